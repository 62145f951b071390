"""Batches for training and for evaluation, from any dataset of samples (see `d3lib.data`).

What a training step sees is a pure function of the seed and the step: the frames of step k are places kB ..
kB + B - 1 of an endless sequence, one permutation of the set after another (each drawn from the seed and its
epoch), and the flips of step k are drawn from the seed and k. So a run resumed at step k goes on exactly as
if it had never stopped, whatever the number of worker processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, default_collate

from d3lib.errors import UserError

Batch = dict[str, torch.Tensor]
_ORDER, _FLIP = 0, 1  # separate random streams


def train_batches(
    dataset: Any,
    *,
    frames: int | Sequence[int] | None,
    batch_size: int,
    seed: int,
    size: tuple[int, int] | None = None,
    device: str | torch.device = "cpu",
    start_step: int = 0,
    flip: bool = True,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Endless shuffled batches on `device`: rgb float32 (B, 3, H, W) in [0, 1]; depth, valid and maybe exact
    (B, 1, H, W).

    `dataset`: samples, or batches by `__getitems__`, whose tensors share no memory (they are mirrored in place).
    `frames`: which frames of `dataset`: the first n, these, or all (None). `size` (H, W): see
    `resize_sample`. `flip`: mirror each sample left-right with probability 1/2, the only augmentation in the
    authors' code. `start_step`: the step to resume at. `workers`: processes that read ahead. `rank`, `world`: of the
    batch that one process would train on, give the slice of process `rank` of `world`, frames and flips alike:
    `batch_size` is the whole batch's. Raises `UserError` if `frames` asks for what is not there, or `world` does not
    divide `batch_size`.
    """
    if batch_size % world:
        raise UserError(f"a batch of {batch_size} cannot be shared equally by {world} processes; choose a multiple")
    share = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    chosen = choose_frames(len(dataset), frames)
    steps = (step[share] for step in batch_indices(chosen, batch_size, seed, start_step))
    for step, batch in enumerate(_fetch(dataset, steps, workers, device), start_step):
        if flip:
            _mirror(batch, (_random(seed, _FLIP, step, batch_size)[share] >> np.uint64(63)).astype(bool))
        yield _finish(batch, size)


def eval_batches(
    dataset: Any,
    *,
    frames: int | Sequence[int] | None = None,
    batch_size: int = 8,
    size: tuple[int, int] | None = None,
    device: str | torch.device = "cpu",
    workers: int = 0,
) -> Iterator[Batch]:
    """Each of `frames` once, in order and unaltered but for `size`; the last batch may be smaller."""
    chosen = choose_frames(len(dataset), frames)
    steps = (chosen[start : start + batch_size].tolist() for start in range(0, len(chosen), batch_size))
    for batch in _fetch(dataset, steps, workers, device):
        yield _finish(batch, size)


def choose_frames(available: int, frames: int | Sequence[int] | None) -> np.ndarray:
    """The indices `frames` means: the first n, these, or all (None). Raises `UserError` if out of range."""
    chosen = np.asarray(range(available) if frames is None else range(frames) if isinstance(frames, int) else frames)
    if not len(chosen) or chosen.min() < 0 or chosen.max() >= available:
        raise UserError(f"frames {frames} asked for, but the data set has {available}; ask for 1 to {available}")
    return chosen


def batch_indices(chosen: np.ndarray, batch_size: int, seed: int, start_step: int = 0) -> Iterator[list[int]]:
    """The indices of each training step from `start_step` on, without end."""
    epoch, start = -1, start_step * batch_size
    while True:
        batch = []
        for place in range(start, start + batch_size):
            if place // len(chosen) != epoch:
                epoch = place // len(chosen)
                # sorting raw bits: unlike Generator.permutation, the same in every version of NumPy
                order = chosen[np.argsort(_random(seed, _ORDER, epoch, len(chosen)), kind="stable")]
            batch.append(int(order[place % len(chosen)]))
        yield batch
        start += batch_size


def resize_sample(sample: Mapping[str, torch.Tensor], size: tuple[int, int]) -> Batch:
    """A sample or batch at `size` (H, W), stretched if the aspect differs; rgb keeps its type.

    rgb: bilinear with antialiasing. depth, valid, exact: the nearest pixel, so that no depth is a mixture
    across an edge or with an invalid pixel. rgb and depth may come in different sizes.
    """
    resized = {}
    for key, image in sample.items():
        if image.shape[-2:] == tuple(size):
            resized[key] = image
        elif key == "rgb":
            batch = image[None] if image.ndim == 3 else image
            values = functional.interpolate(batch.float(), size, mode="bilinear", antialias=True)
            values = values.reshape(*image.shape[:-2], *size)
            resized[key] = values.round().clamp(0, 255).to(torch.uint8) if image.dtype == torch.uint8 else values
        else:
            for dim, new in zip((-2, -1), size, strict=True):
                # the old pixel under the centre of new pixel i, in whole numbers: the same on every device
                nearest = (2 * torch.arange(new, device=image.device) + 1) * image.shape[dim] // (2 * new)
                image = image.index_select(dim, nearest)
            resized[key] = image
    return resized


def to_float(rgb: torch.Tensor) -> torch.Tensor:
    """uint8 0 .. 255 → float32 0 .. 1."""
    return rgb.float().div_(255)  # one conversion and one pass in place: twice as fast as rgb / 255


def _mirror(batch: Batch, chosen: np.ndarray) -> None:
    """Mirror the `chosen` (B,) samples left-right: on the device, while pictures are still bytes."""
    for name, images in batch.items():
        if images.device.type == "cpu":  # in place: many times faster than a masked copy of the batch
            for row in np.flatnonzero(chosen).tolist():
                images[row] = images[row].flip(-1)
        else:  # two operations whatever the batch: there, starting one takes longer than doing it
            mask = torch.from_numpy(chosen).to(images.device, non_blocking=True)
            batch[name] = torch.where(mask[:, None, None, None], images.flip(-1), images)


def _random(seed: int, stream: int, number: int, count: int) -> np.ndarray:
    """`count` random 64-bit integers, a pure function of the arguments on every platform."""
    return np.random.PCG64(np.random.SeedSequence((seed, stream, number))).random_raw(count)


def _fetch(dataset: Any, steps: Iterator[list[int]], workers: int, device: str | torch.device) -> Iterator[Batch]:
    """The batches of `steps` on `device`, read ahead by `workers` processes."""
    loader = DataLoader(
        dataset,
        batch_sampler=steps,  # type: ignore[arg-type] - any iterable of lists of indices will do
        collate_fn=_collate,
        num_workers=workers,
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator(),  # or the loader would draw from torch's global generator
    )
    try:
        for batch in loader:
            yield {key: images.to(device, non_blocking=True) for key, images in batch.items()}
    except UserError as error:  # from a worker it comes wrapped in the text of its traceback
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("d3lib.errors.UserError: ")) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError("a process that was reading data was killed; the same command goes on") from error


def _collate(samples: Any) -> Batch:
    """A store has already made the batch (`Store.__getitems__`); other datasets give a list of samples."""
    return samples if isinstance(samples, dict) else default_collate(samples)


def _finish(batch: Batch, size: tuple[int, int] | None) -> Batch:
    batch["rgb"] = to_float(batch["rgb"])
    return resize_sample(batch, size) if size else batch

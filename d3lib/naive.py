"""The baselines of `d3lib.bench`: the same work as most public code does it, correct and plain; for nothing else."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


def _l1(pred: Tensor, target: Tensor, m: Tensor) -> Tensor:
    return ((pred - target).abs() * m).sum() / m.sum()


def _l2(pred: Tensor, target: Tensor, m: Tensor) -> Tensor:
    return ((pred - target) ** 2 * m).sum() / m.sum()


def _log_difference(pred: Tensor, target: Tensor, m: Tensor) -> Tensor:
    return (torch.log(target.clamp(min=1e-3)) - torch.log(pred.clamp(min=1e-3))) * m


def _eigen(pred: Tensor, target: Tensor, m: Tensor) -> Tensor:
    d = _log_difference(pred, target, m)
    n = m.sum((1, 2, 3))
    return ((d**2).sum((1, 2, 3)) / n - 0.5 * d.sum((1, 2, 3)) ** 2 / n**2).mean()


def _eigengrad(pred: Tensor, target: Tensor, m: Tensor) -> Tensor:
    d = _log_difference(pred, target, m)
    n = m.sum((1, 2, 3))
    dx = (d[..., :, 1:] - d[..., :, :-1]) * m[..., :, 1:] * m[..., :, :-1]
    dy = (d[..., 1:, :] - d[..., :-1, :]) * m[..., 1:, :] * m[..., :-1, :]
    gradients = ((dx**2).sum((1, 2, 3)) + (dy**2).sum((1, 2, 3))) / n
    return ((d**2).sum((1, 2, 3)) / n - 0.5 * d.sum((1, 2, 3)) ** 2 / n**2 + gradients).mean()


def _berhu(pred: Tensor, target: Tensor, m: Tensor, huber: bool = False) -> Tensor:
    error = (pred - target).abs() * m
    c = 0.2 * error.max().detach()
    linear = (error >= c if huber else error <= c).float()
    return ((error * linear + (error**2 + c**2) / (2 * c) * (1 - linear)) * m).sum() / m.sum()


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "l1": _l1,
    "l2": _l2,
    "eigen": _eigen,
    "eigengrad": _eigengrad,
    "berhu": _berhu,
    "huber": functools.partial(_berhu, huber=True),
}


def metrics(preds: np.ndarray, targets: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """The usual loop: one image after another, valid pixels picked out, means of the images. (N, H, W), metres."""
    rows = []
    for pred, target, mask in zip(preds, targets, masks, strict=True):
        y_hat, y = pred[mask].astype(np.float64), target[mask].astype(np.float64)
        ratio = np.maximum(y / y_hat, y_hat / y)
        d = np.log(y) - np.log(y_hat)
        rows.append(
            {
                "rel": np.mean(np.abs(y_hat - y) / y),
                "sq_rel": np.mean((y_hat - y) ** 2 / y),
                "log10": np.mean(np.abs(np.log10(y) - np.log10(y_hat))),
                "rms": np.sqrt(np.mean((y_hat - y) ** 2)),
                "rmslog": np.sqrt(np.mean(d**2)),
                "silog": np.sqrt(np.mean(d**2) - np.mean(d) ** 2) * 100,
                "d1": np.mean(ratio < 1.25),
                "d2": np.mean(ratio < 1.25**2),
                "d3": np.mean(ratio < 1.25**3),
            }
        )
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


class Pictures(Dataset):
    """Pairs of JPEG pictures and 16-bit PNG depth in millimetres, through PIL and torchvision's transforms."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        from d3lib._torchvision import import_torchvision

        functional = import_torchvision().transforms.functional
        with Image.open(self.folder / f"{index}.jpg") as rgb, Image.open(self.folder / f"{index}.png") as depth:
            picture = functional.to_tensor(rgb.convert("RGB"))
            metres = torch.from_numpy(np.asarray(depth).astype(np.float32) / 1000)[None]
        if random.random() < 0.5:
            picture, metres = functional.hflip(picture), functional.hflip(metres)
        return {"rgb": picture, "depth": metres}


def save_pictures(folder: Path, batch: dict[str, Tensor]) -> None:
    """Write the pictures and depths of a batch (see `d3lib.data`) as what `Pictures` reads."""
    for index, (rgb, depth) in enumerate(zip(batch["rgb"].numpy(), batch["depth"].numpy(), strict=True)):
        Image.fromarray(rgb.transpose(1, 2, 0)).save(folder / f"{index}.jpg", quality=95)
        Image.fromarray(np.round(depth[0] * 1000).astype(np.uint16)).save(folder / f"{index}.png")


def batches(data: Pictures, batch_size: int, workers: int, device: str = "cpu") -> Iterator[dict[str, Tensor]]:
    """Endless shuffled batches of a `DataLoader` as the tutorials set it up."""
    loader = DataLoader(
        data, batch_size, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )
    while True:
        for batch in loader:
            yield {key: value.to(device) for key, value in batch.items()}


def train(net: nn.Module, optimiser: torch.optim.Optimizer, source: Iterator[dict[str, Tensor]], steps: int) -> None:
    """The tutorials' loop: float32, contiguous, L1 masked by multiplication, the loss read at each step."""
    net.train()
    for _ in range(steps):
        batch = next(source)
        optimiser.zero_grad()
        mask = (batch["depth"] > 0).float()
        loss = _l1(net(batch["rgb"]), batch["depth"], mask)
        loss.backward()
        optimiser.step()
        loss.item()


def fill_system(rgb: np.ndarray, depth: np.ndarray) -> tuple[Any, np.ndarray]:
    """The equation of `d3lib.data.inpaint` at alpha = 1, written plainly: a sparse matrix and its right-hand side."""
    from scipy.sparse import csc_array, diags_array

    grey = np.tensordot((0.298936, 0.587043, 0.114021), rgb / 255, 1)
    place = np.arange(grey.size).reshape(grey.shape)
    windows, places = (
        np.lib.stride_tricks.sliding_window_view(np.pad(x, 1, constant_values=outside), (3, 3)).reshape(-1, 9)
        for x, outside in ((grey, np.nan), (place, -1))
    )
    neighbours, squares = np.delete(places, 4, 1), (np.delete(windows, 4, 1) - grey.reshape(-1, 1)) ** 2
    spread = np.maximum(0.6 * np.nanvar(windows, 1), -np.nanmin(squares, 1) / np.log(0.01)).clip(2e-6)
    weights = np.where(neighbours >= 0, np.exp(-squares / spread[:, None]), 0)
    weights /= weights.sum(1, keepdims=True)
    row, column = np.nonzero(neighbours >= 0)
    entries = (weights[row, column], (row, neighbours[row, column]))
    known = ((depth != 0) & (depth != 10)).ravel()
    return csc_array(diags_array(1.0 + known) - csc_array(entries, shape=(grey.size,) * 2)), known * depth.ravel()

"""Makes stores from sources: which folder holds which prepared data, and how to make it if it is not there."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import math
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d3lib.artefacts import digest_json, locked
from d3lib.data import rooms, shards
from d3lib.data.folder import FolderRGBD
from d3lib.data.inpaint import fill_depth
from d3lib.data.loader import resize_sample
from d3lib.errors import UserError
from d3lib.provenance import code_digest

MEMORY = 2**31  # bytes; a store smaller than this is read once and kept in memory
BYTES_A_PIXEL = 7  # rgb, depth and exact depth
BESIDE_THE_PICTURES = ("d3lib.errors", "d3lib.artefacts", "d3lib.data.rooms.recording")  # change no rendered pixel
FILL_BATCH = 256  # frames given to the processes that fill at once
RENDER_BATCH = 16  # frames a process renders at once; more is no faster on a CPU and costs memory
GPU_BATCH = 64  # frames a GPU renders at once
REPORT_EVERY = 5.0  # seconds between two lines of progress

Progress = Callable[[str], None]
Batches = Iterable[Mapping[str, Tensor]]


def open_or_make(
    folder: Path, source: Mapping[str, Any], names: Sequence[str], batches: Batches, progress: Progress | None = None
) -> shards.Store:
    """The store in `folder` if it was made from `source` (it may be read-only), else written now, by one process alone.

    `batches` hold the frames that `names` names; nothing is asked of them if the store is there. Raises `UserError` as
    they and `shards` do, and where a process that makes them was killed.
    """
    with contextlib.suppress(UserError):  # another process may just be putting it there: under the lock one sees
        if found := shards.open_if_from(folder, source):
            return found
    with locked(folder.with_name(f".{folder.name}.lock")):
        for rest in folder.parent.glob(f".{glob.escape(folder.name)}.*.part"):  # a killed process had begun it
            shutil.rmtree(rest, ignore_errors=True)
        if found := shards.open_if_from(folder, source):
            return found
        try:
            counted = _counted(batches, len(names), folder.name, progress)
            return shards.write_store(folder, counted, source=source, names=names)
        except RuntimeError as error:
            if not (isinstance(error, BrokenExecutor) or "DataLoader worker" in str(error)):
                raise
            raise UserError(
                f"{folder}: a process that was making it was killed; the same command tries again"
            ) from error


def _counted(batches: Batches, total: int, name: str, progress: Progress | None) -> Iterator[Mapping[str, Tensor]]:
    """The same batches; says every few seconds, and at the end, how many of `total` frames are done and how fast."""
    start = told = time.perf_counter()
    done = 0
    for batch in batches:
        yield batch
        done, now = done + len(batch["rgb"]), time.perf_counter()
        if progress is not None and (now - told >= REPORT_EVERY or done == total):
            told = now
            progress(f"{name}: {done}/{total} frames, {done / (now - start):.1f} frames/s")


def singly(samples: Batches, size: tuple[int, int]) -> Iterator[Mapping[str, Tensor]]:
    """Samples at `size` (H, W), see `loader.resize_sample`, each as a batch of one."""
    for sample in samples:
        yield {key: image[None] for key, image in resize_sample(sample, size).items()}


@dataclass(frozen=True)
class RoomsStore:
    """One prepared set of rooms: `scenes` scenes of a split, `views` frames of each, at one size.

    Frames are in view-major order, so the first `scenes * k` frames are the nested set with k frames a scene.
    """

    root: Path  # folder of all prepared data
    split: str  # train, val, test or unseen
    scenes: int
    views: int
    height: int  # pixels
    width: int  # pixels
    shading: str = "full"  # see `rooms.render`

    @property
    def folder(self) -> Path:
        """Where the store lies."""
        shading = "" if self.shading == "full" else f"-{self.shading}"
        name = f"rooms-{self.split}-{self.scenes}x{self.views}-{self.height}x{self.width}{shading}"
        return self.root / name

    @property
    def source(self) -> dict[str, Any]:
        """What decides the store's content: its parameters and a digest of the renderer's code."""
        parameters = {name: value for name, value in dataclasses.asdict(self).items() if name != "root"}
        return {"kind": "rooms", **parameters, "code": code_digest("d3lib.data.rooms", without=BESIDE_THE_PICTURES)}

    @property
    def frames(self) -> list[tuple[int, int]]:
        """Its frames: scene's seed and view."""
        return rooms.frames(self.split, scenes=self.scenes, views=self.views)

    @property
    def names(self) -> list[str]:
        """One per frame."""
        return [f"{seed}-{view:04d}" for seed, view in self.frames]

    def open(self, progress: Progress | None = None, device: str = "cpu") -> shards.Store:
        """The store, rendered first if it is missing or was rendered by other code.

        Processors render the same pixels everywhere; on a CUDA `device` it is faster, and some differ a little.
        """
        return open_or_make(self.folder, self.source, self.names, self._rendered(device), progress)

    def _rendered(self, device: str) -> Iterator[Mapping[str, Tensor]]:
        frames, size = self.frames, (self.height, self.width)
        if device == "cpu":
            yield from rooms.stream(frames, size, RENDER_BATCH, self.shading)
            return
        for start in range(0, len(frames), GPU_BATCH):
            try:
                yield rooms.render(frames[start : start + GPU_BATCH], size, device, self.shading)
            except torch.OutOfMemoryError as error:
                raise UserError(f"{self.folder}: too little memory on {device}; render with --device cpu") from error


@dataclass(frozen=True)
class FilledRooms:
    """The first `frames` frames of a prepared set of rooms with the sensor's holes filled, as NYU's are."""

    of: RoomsStore
    frames: int

    @property
    def folder(self) -> Path:
        """Where the store lies."""
        return self.of.folder.with_name(f"{self.of.folder.name}-filled-{self.frames}")

    @property
    def source(self) -> dict[str, Any]:
        """What decides the store's content: the set it is made from, and the code that fills."""
        code = code_digest("d3lib.data.inpaint", without=BESIDE_THE_PICTURES)
        return {"kind": "filled rooms", "of": self.of.source, "frames": self.frames, "code": code}

    def open(self, progress: Progress | None = None) -> shards.Store:
        """The store, made first if it is missing or outdated, from its set, which is rendered if need be."""
        names = self.of.names[: self.frames]
        return open_or_make(self.folder, self.source, names, self._filled(progress), progress)

    def _filled(self, progress: Progress | None) -> Iterator[Mapping[str, Tensor]]:
        sensor = self.of.open(progress)
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
            for start in range(0, self.frames, FILL_BATCH):
                batch = sensor.__getitems__(range(start, min(start + FILL_BATCH, self.frames)))
                depth = pool.map(_fill, batch["rgb"].numpy(), batch["depth"][:, 0].numpy(), chunksize=16)
                batch["depth"] = torch.from_numpy(np.stack(list(depth))[:, None])
                batch["valid"] = batch["depth"] > 0
                yield batch


def _fill(rgb: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """The filled depth (H, W) float32 of one frame; one without any valid pixel stays empty."""
    return fill_depth(rgb, depth).astype(np.float32) if depth.any() else depth


@dataclass(frozen=True)
class FolderStore:
    """Your own pictures, decoded and resized once: the pairs of one split of a folder, in order of time or name."""

    root: Path  # folder of all prepared data
    pictures: Path  # holds rgb/<split>/ and depth/<split>/
    split: str
    height: int  # pixels
    width: int  # pixels
    max_depth: float  # metres; farther pixels count as invalid

    @property
    def folder(self) -> Path:
        """Where the store lies."""
        where = digest_json([str(self.pictures.resolve()), self.max_depth])[:8]
        return self.root / f"folder-{self.pictures.name}-{where}-{self.split}-{self.height}x{self.width}"

    def open(self, progress: Progress | None = None) -> shards.Store:
        """The store, made first if it is missing or a picture has changed. Raises `UserError` for unfit pictures."""
        size = (self.height, self.width)
        pairs = FolderRGBD(self.pictures, self.split, size=size, max_depth=self.max_depth)
        if progress is not None:
            progress(f"{self.pictures}: {pairs.report}")
        samples = (pairs[index] for index in range(len(pairs)))
        made = open_or_make(self.folder, pairs.source, pairs.names, singly(samples, size), progress)
        return _in_memory_if_small(made)


def open_nyu(root: Path, name: str, height: int, width: int) -> shards.Store:
    """A prepared set of NYU Depth V2: train (795), 12k, 230k or test, each also with measured depth (`...-raw`).

    Raises `UserError` if it is not there.

    A training set is kept in memory if it is small; a test set, at full size and rarely read, is not.
    """
    folder = root / f"nyu-{name}-{height}x{width}"
    if not (folder / "store.json").is_file():
        measured = name.startswith(("train", "12k", "230k")) and name.endswith("-raw")
        if name.startswith(("12k", "230k")):
            how = f"nyu-raw ZIP-or-DIR... --frames {'all' if name.startswith('230k') else 12000}"
            how += " --no-fill" if measured else ""
        else:
            how = "nyu-labeled nyu_depth_v2_labeled.mat" + (" --target raw" if measured else "")
        raise UserError(
            f"{folder}: NYU Depth V2 is not prepared there; make it with `d3lib data {how} --size {height}x{width}`, "
            "or use --data rooms or --data folder:PATH"
        )
    store = shards.open_store(folder)
    return store if name.startswith("test") else _in_memory_if_small(store)


def _in_memory_if_small(store: shards.Store) -> shards.Store:
    small = len(store) * math.prod(store.size) * BYTES_A_PIXEL < MEMORY
    return shards.open_store(store.path, in_memory=True) if small else store

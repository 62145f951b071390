"""Makes stores from sources: which folder holds which prepared data, and how to make it if it is not there."""

from __future__ import annotations

import contextlib
import glob
import math
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
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
from d3lib.errors import UserError
from d3lib.provenance import code_digest

MEMORY = 2**31  # bytes; a store smaller than this is read once and kept in memory
BYTES_A_PIXEL = 7  # rgb, depth and exact depth
BESIDE_THE_PICTURES = ("d3lib.errors", "d3lib.artefacts", "d3lib.data.rooms.recording")  # change no rendered pixel
FILL_BATCH = 256  # frames filled between two lines of progress
RENDER_BATCH = 16  # frames a process renders at once; more is no faster on a CPU and costs memory


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
        return {
            "kind": "rooms",
            "split": self.split,
            "scenes": self.scenes,
            "views": self.views,
            "height": self.height,
            "width": self.width,
            "shading": self.shading,
            "code": code_digest("d3lib.data.rooms", without=BESIDE_THE_PICTURES),
        }

    def open(self, progress: Callable[[str], None] | None = None) -> shards.Store:
        """The store, rendered first if it is missing or was rendered by other code."""
        with _found_or_alone(self.folder, self.source) as store:
            if store is not None:
                return store
            frames = rooms.frames(self.split, scenes=self.scenes, views=self.views)
            names = [f"{seed}-{view:04d}" for seed, view in frames]
            return shards.write_store(self.folder, self._rendered(frames, progress), source=self.source, names=names)

    def _rendered(
        self, frames: list[tuple[int, int]], progress: Callable[[str], None] | None
    ) -> Iterator[Mapping[str, Tensor]]:
        start, done = time.perf_counter(), 0
        size = (self.height, self.width)
        for batch in rooms.stream(frames, size, RENDER_BATCH, self.shading):
            yield batch
            done += len(batch["rgb"])
            if progress is not None and (done // RENDER_BATCH % 10 == 0 or done == len(frames)):
                rate = done / (time.perf_counter() - start)
                progress(f"{self.folder.name}: {done}/{len(frames)} frames, {rate:.1f} frames/s")


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

    def open(self, progress: Callable[[str], None] | None = None) -> shards.Store:
        """The store, made first if it is missing or outdated, from its set, which is rendered if need be."""
        with _found_or_alone(self.folder, self.source) as store:
            if store is not None:
                return store
            sensor = self.of.open(progress)
            names = list(sensor.names[: self.frames])
            return shards.write_store(self.folder, self._filled(sensor, progress), source=self.source, names=names)

    def _filled(self, sensor: shards.Store, progress: Callable[[str], None] | None) -> Iterator[Mapping[str, Tensor]]:
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
            for start in range(0, self.frames, FILL_BATCH):
                batch = sensor.__getitems__(range(start, min(start + FILL_BATCH, self.frames)))
                depth = pool.map(_fill, batch["rgb"].numpy(), batch["depth"][:, 0].numpy(), chunksize=16)
                batch["depth"] = torch.from_numpy(np.stack(list(depth))[:, None])
                batch["valid"] = batch["depth"] > 0
                yield batch
                if progress is not None:
                    progress(f"{self.folder.name}: {min(start + FILL_BATCH, self.frames)}/{self.frames} frames")


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

    def open(self, progress: Callable[[str], None] | None = None) -> shards.Store:
        """The store, made first if it is missing or a picture has changed. Raises `UserError` for unfit pictures."""
        size = (self.height, self.width)
        pairs = FolderRGBD(self.pictures, self.split, size=size, max_depth=self.max_depth)
        if progress is not None:
            progress(f"{self.pictures}: {pairs.report}")
        with _found_or_alone(self.folder, pairs.source) as found:
            return _in_memory_if_small(found) if found else pairs.to_store(self.folder)


@contextlib.contextmanager
def _found_or_alone(folder: Path, source: Mapping[str, Any]) -> Iterator[shards.Store | None]:
    """The store made from `source`, where it is there (it may be read-only); else None, while no one else makes it."""
    if found := shards.open_if_from(folder, source):
        yield found
        return
    with locked(folder.with_name(f".{folder.name}.lock")):
        for rest in folder.parent.glob(f".{glob.escape(folder.name)}.*.part"):  # a killed process had begun it
            shutil.rmtree(rest, ignore_errors=True)
        try:
            yield shards.open_if_from(folder, source)
        except RuntimeError as error:
            if not (isinstance(error, BrokenExecutor) or "DataLoader worker" in str(error)):
                raise
            raise UserError(
                f"{folder}: a process that was making it was killed; the same command tries again"
            ) from error


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

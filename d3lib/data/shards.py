"""The HDF5 store: what prepared data is written to and read from, whatever its source.

A store is a folder: `store.json` (an artefact, see `d3lib.artefacts`) and `shard-00000.h5`, `shard-00001.h5`,
... A shard holds the datasets `rgb` uint8 (n, 3, H, W), `depth` uint16 (n, H, W) in millimetres with 0 =
invalid, and for synthetic sources `exact`, likewise. A chunk is one frame; its Fletcher-32 checksum is
checked on every read.

Depth is rounded to the nearest millimetre, an error of at most 0.5 mm, far below what a Kinect resolves;
valid depths must round to 1 .. 65535 mm. What was read may be written again without change.

Nothing that a shard says of itself is trusted: types, shapes and layout must be those of `store.json`,
themselves bounded, all frames must be there, and links, external or virtual storage and any other filter are
refused.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from d3lib import artefacts
from d3lib.errors import UserError

FORMAT, VERSION = "d3lib-store", 1
SHARD_FRAMES = 4096  # at 256x320: 1.7 GB a shard, 57 shards for 230k frames
MAX_SIDE, MAX_FRAMES, MAX_INDEX_BYTES = 16384, 10_000_000, 1 << 30  # what a store.json may declare, and weigh
DISK_RESERVE = 1 << 25  # bytes left free when a disk fills up
_OWN = re.compile(r"store\.json|shard-\d{5}\.h5|\.snakemake_timestamp")  # files that a store may be made of
_ADVICE = "copy it again, or delete the store and make it again"

Frames = dict[str, np.ndarray]  # as stored: rgb, depth in mm, maybe exact; with a leading n, or of one frame


class Store(torch.utils.data.Dataset):
    """A store opened for reading (by `open_store`): a sequence of samples, see `d3lib.data`.

    Attributes: `path`; `size` (H, W); `source` (dict: what made the frames); `names` (one per frame);
    `has_exact`; `digest` (SHA-256 of the frames alone: equal frames give equal digests, however they are
    split into shards). It may be pickled and used by worker processes, forked ones too: no open file belongs
    to it.
    """

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path, self.size, self.source = path, tuple(content["size"]), content["source"]
        self.names, self.has_exact, self.digest = content["names"], content["exact"], content["digest"]
        self._shards = content["shards"]
        self._starts = np.cumsum([0] + [shard["frames"] for shard in self._shards])
        self._memory: Frames | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index`. Raises `IndexError`, and `UserError` if its shard is damaged or gone."""
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The samples at `indices`, in that order, as one batch (a leading B); an index may be repeated."""
        rows = np.asarray(indices, dtype=np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"no such frame: the store has {len(self)}")
        frames = {key: array[rows] for key, array in self._memory.items()} if self._memory else self._read(rows)
        metres = {
            key: torch.from_numpy(np.true_divide(frames[key], 1000, dtype=np.float32))[:, None]
            for key in ("depth", "exact")
            if key in frames
        }
        return {"rgb": torch.from_numpy(frames["rgb"]), **metres, "valid": metres["depth"] > 0}

    def verify(self) -> None:
        """Read every byte and compare with the digests of `store.json`; `UserError` names what differs."""
        _open_shard.cache_clear()  # or HDF5 would answer from what it has already read
        whole = _new_digest(self.size, self.has_exact)
        for number, shard in enumerate(self._shards):
            path, content = self.path / shard["file"], hashlib.sha256()
            with _blame(path):
                intact = artefacts.digest_file(path) == shard["sha256"]
            for row in range(*self._starts[number : number + 2]) if intact else ():
                frame = {key: array[0] for key, array in self._read(np.array([row])).items()}
                _digest_frame(frame, content, whole)
            if content.hexdigest() != shard["content"]:
                raise UserError(f"{path}: damaged, its digest is not the one in store.json; {_ADVICE}")
        if whole.hexdigest() != self.digest:
            raise UserError(f"{self.path}: the digest in store.json is not that of its frames; {_ADVICE}")

    def _read(self, rows: np.ndarray) -> Frames:
        """Frames `rows` from the shards, read in the order in which they lie on the disk."""
        layout = _layout(self.size, self.has_exact).items()
        frames = {key: np.empty((len(rows), *shape), dtype) for key, (shape, dtype) in layout}
        for place in np.argsort(rows, kind="stable"):
            number = int(np.searchsorted(self._starts, rows[place], side="right")) - 1
            shard, offset = self._shards[number], int(rows[place] - self._starts[number])
            _, datasets = self._open(number)
            with _blame(self.path / shard["file"], f"frame {offset} cannot be read: "):
                for key, array in frames.items():
                    # h5py's own interface takes as long again to work out the selection
                    chunk = datasets[key].id.get_space()
                    chunk.select_hyperslab((offset,) + (0,) * (array.ndim - 1), (1, *array.shape[1:]))
                    datasets[key].id.read(h5py.h5s.create_simple(array[place].shape), chunk, array[place])
        return frames

    def _open(self, number: int) -> tuple[h5py.File, dict[str, h5py.Dataset]]:
        shard = self._shards[number]
        return _open_shard(self.path / shard["file"], shard["frames"], self.size, self.has_exact, shard["sha256"])


def open_store(path: str | Path, *, in_memory: bool = False) -> Store:
    """Open a store for reading; `in_memory` reads it whole at once (0.4 MB a frame at 256x320), and never
    again.

    Checks `store.json` and of each shard length, format, types and layout; `Store.verify` checks every byte.
    Raises `UserError` naming the file that is missing, truncated, damaged, or no part of a store of this
    version.
    """
    path = Path(path)
    store = Store(path, _read_index(path / "store.json"))
    for number, shard in enumerate(store._shards):
        file = path / shard["file"]
        if not file.is_file():  # nor a pipe, which would wait for ever
            raise UserError(f"{file}: no such file; {_ADVICE}")
        if (length := file.stat().st_size) != shard["bytes"]:
            raise UserError(f"{file}: truncated or changed, {length} of {shard['bytes']} bytes; {_ADVICE}")
        store._open(number)
    if in_memory:
        store._memory = store._read(np.arange(len(store)))
    return store


def open_if_from(path: str | Path, source: Mapping[str, Any]) -> Store | None:
    """The store in `path` if it is there and was made from `source`, else None. Raises `UserError` as `open_store`."""
    store = open_store(path) if (Path(path) / "store.json").is_file() else None
    return store if store is not None and store.source == source else None


def write_store(
    path: str | Path,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    source: Mapping[str, Any],
    names: Sequence[str] | None = None,
    shard_frames: int = SHARD_FRAMES,
) -> Store:
    """Write batches (rgb, depth, valid and maybe exact, see `d3lib.data`) as a store, and open it.

    The folder `path` appears whole, once all is on disk, or not at all; it may replace an older store,
    nothing else. Memory holds one batch. `source` says what made the frames (plain JSON); `names` gives one
    name per frame and is read after the last batch (default: their numbers). Raises `UserError` if there is
    something else at `path`, no frame, frames of unequal form, a valid depth outside 0.001 .. 65.535 m, or if
    the disk is full.
    """
    path = Path(path)
    # what a store is made of, with the index or (after a batch took it away to make it anew) without
    foreign = [entry for entry in path.iterdir() if not _OWN.fullmatch(entry.name)] if path.is_dir() else []
    if path.is_file() or foreign:
        raise UserError(f"{path}: already exists and is no store; delete it, or write to another folder")
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.part"
    frames, shards = _encode(batches), []
    try:
        with _blame(path, "cannot write: "):
            temporary.mkdir(parents=True)
        if (first := next(frames, None)) is None:
            raise UserError(f"{path}: there are no frames to write")
        size, has_exact = first["depth"].shape, "exact" in first
        whole = _new_digest(size, has_exact)
        while first is not None:
            file = temporary / f"shard-{len(shards):05d}.h5"
            ahead = itertools.chain([first], itertools.islice(frames, shard_frames - 1))
            shards.append(_write_shard(file, ahead, shard_frames, whole))
            first = next(frames, None)
        total = sum(shard["frames"] for shard in shards)
        names = [f"{number:06d}" for number in range(total)] if names is None else list(names)
        if len(names) != total:
            raise UserError(f"{path}: {len(names)} names for {total} frames")
        content = {"source": dict(source), "size": list(size), "exact": has_exact, "names": names}
        content |= {"shards": shards, "digest": whole.hexdigest()}
        with _blame(path, "cannot write: "):
            artefacts.write_json(temporary / "store.json", content, format=FORMAT, version=VERSION)
            if path.exists():
                path.replace(temporary / "replaced")
            temporary.replace(path)
            shutil.rmtree(path / "replaced", ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_store(path)


def _layout(size: tuple[int, int], has_exact: bool) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Dataset → (shape of one frame, type)."""
    layout = {"rgb": ((3, *size), np.dtype("u1")), "depth": (tuple(size), np.dtype("<u2"))}
    return layout | ({"exact": layout["depth"]} if has_exact else {})


def _encode(batches: Iterable[Mapping[str, torch.Tensor]]) -> Iterator[Frames]:
    """Batches → single frames as stored, all of the form of the first."""
    number, layout = 0, None
    for batch in batches:
        keys = [key for key in ("rgb", "depth", "valid", "exact") if key in batch]
        for rgb, depth, valid, *exact in zip(*(batch[key].cpu().numpy() for key in keys), strict=True):
            frame = {"rgb": rgb, "depth": _millimetres(depth[0], valid[0], number)}
            frame |= {"exact": _millimetres(exact[0][0], np.True_, number)} if exact else {}
            layout = layout or _layout(depth[0].shape, bool(exact))
            found = {key: (array.shape, array.dtype) for key, array in frame.items()}
            if found != layout:
                raise UserError(f"frame {number}: {found} is unlike the first frame or no uint8 RGB; give one size")
            yield frame
            number += 1


def _millimetres(depth: np.ndarray, valid: np.ndarray, number: int) -> np.ndarray:
    """Metres (H, W) → uint16 mm, 0 where not `valid`."""
    rounded = np.where(valid, np.rint(depth.astype(np.float64) * 1000), 0)
    if not ((rounded >= np.where(valid, 1, 0)) & (rounded <= 65535)).all():
        raise UserError(f"frame {number}: a valid depth is outside 0.001 .. 65.535 m; mark such pixels invalid")
    return rounded.astype("<u2")


def _new_digest(size: tuple[int, int], has_exact: bool) -> hashlib._Hash:
    return hashlib.sha256(f"{FORMAT}|{size[0]}x{size[1]}|{has_exact}|".encode())


def _digest_frame(frame: Frames, *digests: hashlib._Hash) -> None:
    """Add the SHA-256 of a frame's raw arrays to each of `digests`."""
    own = hashlib.sha256()
    for array in frame.values():
        own.update(np.ascontiguousarray(array))
    for digest in digests:
        digest.update(own.digest())


def _write_shard(path: Path, frames: Iterator[Frames], capacity: int, whole: hashlib._Hash) -> dict[str, Any]:
    """Write up to `capacity` frames as one shard; returns its entry in `store.json`."""
    count, content, datasets = 0, hashlib.sha256(), {}
    _need_space(path.parent, 0)
    with artefacts.atomic_path(path) as temporary:
        # since 1.10 HDF5's own structures have checksums too
        with h5py.File(temporary, "w", libver=("v110", "v110")) as file:
            file.attrs["format"], file.attrs["version"] = np.bytes_(FORMAT), VERSION
            for count, frame in enumerate(frames, 1):
                _need_space(path.parent, sum(array.nbytes for array in frame.values()))
                for key, array in frame.items():
                    if count == 1:
                        shape, chunk = (capacity, *array.shape), (1, *array.shape)
                        datasets[key] = file.create_dataset(
                            key, shape, array.dtype, maxshape=shape, chunks=chunk, fletcher32=True
                        )
                    datasets[key][count - 1] = array
                _digest_frame(frame, content, whole)
            for dataset in datasets.values():
                dataset.resize(count, axis=0)
        entry = {"bytes": temporary.stat().st_size, "sha256": artefacts.digest_file(temporary)}
    return entry | {"file": path.name, "frames": count, "content": content.hexdigest()}


def _need_space(folder: Path, size: int) -> None:
    """Stop while there is room to close the files: HDF5 2.0 takes the whole process down when a write fails."""
    if shutil.disk_usage(folder).free < size + DISK_RESERVE:
        raise UserError(f"{folder.parent}: the disk is full; free some space, or write elsewhere")


@functools.lru_cache(maxsize=128)
def _open_shard(
    path: Path, frames: int, size: tuple[int, int], has_exact: bool, identity: str
) -> tuple[h5py.File, dict[str, h5py.Dataset]]:
    """A shard's file and datasets, checked, kept open. `identity` tells a store from its successor."""
    with _blame(path, "not a shard as declared in store.json: "):
        file = h5py.File(path, "r", rdcc_nbytes=0)  # whole frames: a chunk cache would only copy
        for name, expected in (("format", FORMAT.encode()), ("version", VERSION)):
            attribute = h5py.h5a.open(file.id, name.encode())
            if attribute.shape or attribute.get_storage_size() > 64 or file.attrs[name] != expected:
                raise ValueError(f"its {name} is not {expected!r}")
        datasets = {}
        for key, (shape, dtype) in _layout(size, has_exact).items():
            if not isinstance(file.get(key, getlink=True), h5py.HardLink):
                raise ValueError(f"{key} is missing or a link to elsewhere")
            dataset = datasets[key] = file[key]
            if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
                raise ValueError(f"{key} is no array in this file")
            found = (dataset.shape, dataset.dtype, dataset.chunks)
            if found != ((frames, *shape), dtype, (1, *shape)):
                raise ValueError(f"{key} has shape, type and chunk {found}")
            if not dataset.fletcher32 or dataset.id.get_create_plist().get_nfilters() != 1:
                raise ValueError(f"{key} has not the Fletcher-32 checksum alone")
            # every frame is really there: memory is bounded by the length of the file
            if dataset.id.get_storage_size() != frames * (math.prod(shape) * dtype.itemsize + 4):
                raise ValueError(f"{key} has missing frames")
        return file, datasets


# A child that inherits HDF5 with files open shares state with its parent: fork with none open.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_open_shard.cache_clear)


def _read_index(path: Path) -> dict[str, Any]:
    """`store.json`, its fields of the types and within the bounds that the rest relies on."""
    if not path.is_file():
        raise UserError(f"{path.parent}: not a store (no store.json); make one with `d3lib data`")
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise UserError(f"{path}: too large for a store.json; {_ADVICE}")
    content = artefacts.read_json(path, format=FORMAT, version=VERSION)
    with _blame(path, "not the fields of a store: "):
        sides, names, shards = content["size"], content["names"], content["shards"]
        counts = [shard["frames"] for shard in shards]
        digests = [content["digest"], *(shard[key] for shard in shards for key in ("sha256", "content"))]
        if not (
            len(sides) == 2
            and {type(number) for number in (*sides, *counts)} == {int}
            and 1 <= min(*sides, *counts)
            and max(sides) <= MAX_SIDE
            and sum(counts) == len(names) <= MAX_FRAMES
            and {type(text) for text in (*names, *digests)} == {str}
            and (type(content["exact"]), type(content["source"])) == (bool, dict)
            and [shard["file"] for shard in shards] == [f"shard-{n:05d}.h5" for n in range(len(shards))]
            and all("bytes" in shard for shard in shards)
        ):
            raise ValueError("wrong types or numbers")
    return content


@contextlib.contextmanager
def _blame(path: Path, what: str = "") -> Iterator[None]:
    """Turn what h5py and the system raise over a bad file or a full disk into one line that names `path`."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        advice = "free some space, or write elsewhere" if what.startswith("cannot write") else _ADVICE
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path}: {what}{' '.join(str(reason).split())[:200]}; {advice}") from error

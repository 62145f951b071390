"""NYU Depth V2: its official split, its training scenes, and the labelled file `nyu_depth_v2_labeled.mat`.

Silberman, Hoiem, Kohli and Fergus, "Indoor segmentation and support inference from RGBD images" (ECCV 2012).
1449 Kinect frames, their depth projected to the colour camera and its holes filled; 795 frames of 249 scenes are for
training, 654 of the other scenes for testing. The file is HDF5 (MATLAB v7.3) of 3 GB: it is read frame by frame, and
nothing that it says of itself is trusted.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from d3lib import artefacts
from d3lib.data import prepare, shards
from d3lib.data.kinect import CROP, HEIGHT, MAX_DEPTH, WIDTH
from d3lib.errors import UserError
from d3lib.provenance import code_digest

FRAMES = 1449
BYTES, MD5 = 2_972_037_809, "520609c519fba3ba5ac58c8fefcc3530"  # of the file that NYU publishes
FULL_SIZE = (427, 561)  # pixels: what the toolbox's crop leaves
TARGETS = {"filled": "depths", "raw": "rawDepths"}
VALIDATION_SCENES = 25
MAX_SIDE = 2048  # pixels: what a store's frames may measure
MAX_CHUNK = 1 << 25  # bytes: what HDF5 must hold to read one pixel
BLOCK = 16  # frames read at once where chunks hold several: 27 MB, and a chunk is unpacked less often
_NAME = re.compile(r"[A-Za-z0-9_]{1,64}")
_ADVICE = "get nyu_depth_v2_labeled.mat again (`d3lib data nyu-labeled --download DIR`)"
_log = logging.getLogger(__name__)


@functools.cache
def _listed(name: str) -> tuple[str, ...]:
    """The words of a file beside this one."""
    return tuple(Path(__file__).with_name(name).read_text(encoding="utf-8").split())


def official_split() -> dict[str, np.ndarray]:
    """The official split of the labelled file: 0-based, ascending indices, `train` (795,) and `test` (654,)."""
    test = np.array([int(word) - 1 for word in _listed("nyu_test_indices.txt")])
    return {"train": np.setdiff1d(np.arange(FRAMES), test), "test": test}


def training_directories() -> tuple[str, ...]:
    """The 284 directories of the raw set that belong to training scenes, in alphabetical order."""
    return _listed("nyu_train_directories.txt")


def training_scenes() -> frozenset[str]:
    """The 249 scenes of the official training split."""
    return frozenset(map(scene_of, training_directories()))


@functools.cache
def validation_scenes() -> frozenset[str]:
    """25 of the 249 training scenes, for validation: the same ones for every NYU set.

    Every tenth of the scenes ordered by type (kitchen, office, ...) and within a type by the SHA-256 of the name: so
    types are represented in proportion, and neither file order nor a random generator has a say.
    """

    def place(scene: str) -> tuple[str, str]:
        return scene.rpartition("_")[0], hashlib.sha256(scene.encode()).hexdigest()

    ordered = sorted(training_scenes(), key=place)
    step = len(ordered) // VALIDATION_SCENES + 1
    return frozenset(ordered[step // 2 :: step])


def scene_of(name: str) -> str:
    """The scene of a raw directory (`bedroom_0010b` → `bedroom_0010`) or of a frame name that begins with one."""
    return re.sub(r"(?<=\d)[a-z]$", "", name.partition("/")[0])


def check_splits(path: str | Path) -> None:
    """Compare a `splits.mat` with `official_split`. Raises `UserError` if it differs or is no such file."""
    path = Path(path)
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError('--splits needs SciPy: pip install "d3lib[raw]", or leave it out') from error
    try:
        if path.stat().st_size > 1 << 16:  # NYU's has 2626 bytes; no compression makes 64 kB dangerous
            raise ValueError("too large")
        content = loadmat(str(path), appendmat=False, variable_names=["trainNdxs", "testNdxs"])
        found = {key: np.sort(content[f"{key}Ndxs"].ravel().astype(np.int64)) - 1 for key in ("train", "test")}
    except Exception as error:  # SciPy raises many kinds over a damaged file
        reason = " ".join(str(error).replace(str(path), "file").split())[:100] or type(error).__name__
        raise UserError(f"{path}: not NYU's splits.mat ({reason}); leave --splits out") from error
    if not all(np.array_equal(found[key], indices) for key, indices in official_split().items()):
        raise UserError(f"{path}: not the official split of 795 and 654 frames; leave --splits out")


def md5_of(path: Path) -> str:
    """A file's MD5 (hexadecimal), by which NYU's is known."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


class LabelledSet:
    """The frames of `nyu_depth_v2_labeled.mat`, read when asked for; keeps the file open, to its end in a `with`.

    Attributes: `path`; `scenes` (one per frame, a tuple of strings). Any number of frames will do. Raises `UserError`
    if the file is missing, truncated or no such file: keys, types, shapes, layout and scene names are checked.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():  # nor a pipe, which would wait for ever
            raise UserError(f"{path}: no such file; name nyu_depth_v2_labeled.mat, or use --download DIR")
        with self._blame():
            # network disks of clusters cannot always lock
            self._file = h5py.File(self.path, "r", locking="best-effort")
            self._count = self._array("images").shape[:1]  # (n,)
            self._data = {
                key: self._array(key, (*self._count, *shape), dtype)
                for key, shape, dtype in (
                    ("images", (3, WIDTH, HEIGHT), np.uint8),
                    ("depths", (WIDTH, HEIGHT), np.float32),
                    ("rawDepths", (WIDTH, HEIGHT), np.float32),
                )
            }
            self.scenes = self._texts("scenes")

    def __len__(self) -> int:
        return self._count[0]

    def __enter__(self) -> LabelledSet:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def sample(self, index: int, target: str = "filled", crop: bool = True) -> dict[str, torch.Tensor]:
        """Frame `index` (0-based) as a sample, see `d3lib.data`: 427x561, or 480x640 without `crop`.

        `target`: the depth, "filled" (`depths`) or "raw" (`rawDepths`: 0 and 10 m or more are invalid). Raises
        `IndexError`, and `UserError` if the frame cannot be read or has no valid depth.
        """
        return next(self.samples([index], target, crop))

    def samples(
        self, indices: Iterable[int], target: str = "filled", crop: bool = True
    ) -> Iterator[dict[str, torch.Tensor]]:
        """`sample` of each of `indices`, in that order; much faster for neighbours where chunks hold several frames."""
        rows, columns = CROP if crop else (slice(None), slice(None))
        images, depths = self._data["images"], self._data[TARGETS[target]]
        block = min(max((data.chunks or (1,))[0] for data in (images, depths)), BLOCK)
        for _, neighbours in itertools.groupby(indices, lambda index: index // block):
            group = list(neighbours)
            first, last = min(group), max(group)
            if not 0 <= first <= last < len(self):
                raise IndexError(f"no such frame: {self.path} has {len(self)}")
            with self._blame(f"frame {first + 1} " if first == last else f"frames {first + 1} to {last + 1} "):
                rgb = images[first : last + 1, :, columns, rows].transpose(0, 1, 3, 2)  # (n, 3, W, H) → (n, 3, H, W)
                depth = depths[first : last + 1, columns, rows].transpose(0, 2, 1)[:, None]  # → (n, 1, H, W)
            for index in group:
                with self._blame(f"frame {index + 1} "):
                    sample = _make_sample(rgb[index - first], depth[index - first], target)
                yield sample
            del rgb, depth  # or the next would be read before these are let go

    def _array(self, key: str, shape: tuple[int, ...] | None = None, dtype: Any = None) -> h5py.Dataset:
        """A dataset of this very file, of this form and all there."""
        link = self._file.get(key, getlink=True)
        if link is None:
            raise ValueError(f"has no {key}")
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"has a link to elsewhere for {key}")
        dataset = _plain(self._file[key], key)
        if shape is not None and (dataset.shape, dataset.dtype) != (shape, dtype):
            raise ValueError(f"has {key} of {dataset.shape} {dataset.dtype}, not {shape} {np.dtype(dtype)}")
        if not dataset.shape or not all(dataset.shape):
            raise ValueError(f"has {key} of shape {dataset.shape}")
        if dataset.chunks is None:
            whole = dataset.id.get_storage_size() == dataset.nbytes
        elif math.prod(dataset.chunks) * dataset.dtype.itemsize > MAX_CHUNK:
            raise ValueError(f"has {key} in chunks of more than {MAX_CHUNK >> 20} MiB")
        else:
            parts = (-(-side // chunk) for side, chunk in zip(dataset.shape, dataset.chunks, strict=True))
            whole = dataset.id.get_num_chunks() == math.prod(parts)
        if not whole:  # HDF5 would read zeros
            raise ValueError(f"has missing frames in {key}")
        return dataset

    def _texts(self, key: str) -> tuple[str, ...]:
        """A MATLAB cell of names: object references to arrays of UTF-16 codes, (length, 1)."""
        cell = self._array(key)
        if cell.shape != (1, *self._count) or h5py.check_ref_dtype(cell.dtype) is not h5py.Reference:
            raise ValueError(f"has {key} of {cell.shape} {cell.dtype}, not {(1, *self._count)} references")
        texts = []
        for number, reference in enumerate(cell[0], 1):
            what = f"{key} of frame {number}"
            try:
                codes = _plain(self._file[reference], what)
            except (OSError, RuntimeError, ValueError, KeyError) as error:
                raise ValueError(f"has a reference to nowhere for {what}") from error
            if codes.ndim != 2 or codes.shape[1] != 1 or codes.shape[0] > 64 or codes.dtype != np.uint16:
                raise ValueError(f"has {what} of {codes.shape} {codes.dtype}, not a name")
            text = "".join(map(chr, codes[:, 0]))
            if not _NAME.fullmatch(text):
                raise ValueError(f"has {text!r} for {what}, not a name")
            texts.append(text)
        return tuple(texts)

    @contextlib.contextmanager
    def _blame(self, what: str = "") -> Iterator[None]:
        """Turn what h5py raises over a bad file into one line."""
        try:
            yield
        except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).replace(str(self.path), "file").split())[:200]
            reason = f"{what}cannot be read: {reason}" if isinstance(error, OSError | RuntimeError) else what + reason
            raise UserError(f"{self.path}: not a sound labelled set, {reason}; {_ADVICE}") from error


def _make_sample(rgb: np.ndarray, depth: np.ndarray, target: str) -> dict[str, torch.Tensor]:
    """Colour (3, H, W) and depth (1, H, W), views of any layout, as a sample; raises `ValueError` for bad depth."""
    valid = (depth > 0) & ((depth < MAX_DEPTH) if target == "raw" else (depth <= MAX_DEPTH))
    if not np.isfinite(depth).all() or depth.min() < 0 or not valid.any():
        raise ValueError(f"of {TARGETS[target]} is negative, not finite or nowhere within {MAX_DEPTH:g} m")
    arrays = {"rgb": rgb, "depth": np.where(valid, depth, np.float32(0)), "valid": valid}
    return {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in arrays.items()}


def _plain(found: Any, what: str) -> h5py.Dataset:
    """`found` if it is an array that lies in its own file."""
    if not isinstance(found, h5py.Dataset) or found.is_virtual or found.external:
        raise ValueError(f"has no array in this file for {what}")
    return found


def prepare_labelled(
    path: str | Path,
    data_root: Path,
    size: tuple[int, int] = (256, 320),
    target: str = "filled",
    splits: str | Path | None = None,
    progress: prepare.Progress | None = None,
    *,
    split: Mapping[str, np.ndarray] | None = None,
) -> list[shards.Store]:
    """Make three stores below `data_root` from the labelled file: training, test, and test with raw depths.

    They are `nyu-train-HxW` (or `nyu-train-raw-HxW` where `target` is "raw"), whose frames are cropped to 427x561 and
    stretched to `size` (see `loader.resize_sample`), and `nyu-test-427x561` and `nyu-test-raw-427x561`, which are
    scored at that size and at the network's. Frames are named `<scene>/<number>`, counted from 1 in four digits. A
    store made already from the same file by the same code is kept. `splits`: a splits.mat to check (see
    `check_splits`). `split`: other frames than `official_split`. Raises `UserError` for bad input; a file or scenes
    other than NYU's are worth a logged warning.
    """
    if target not in TARGETS:
        raise UserError(f"target {target!r} is unknown; choose {' or '.join(TARGETS)}")
    if not 1 <= min(size) <= max(size) <= MAX_SIDE:
        raise UserError(f"size {size[0]}x{size[1]}: each side must be 1 to {MAX_SIDE}")
    if splits is not None:
        check_splits(splits)
    frames = LabelledSet(path)
    if split is None:
        split = official_split()
        if len(frames) != FRAMES:
            raise UserError(f"{path}: {len(frames)} frames, not the {FRAMES} of the official split; {_ADVICE}")
    _warn_of_scenes(frames, split)
    if (md5 := md5_of(frames.path)) != MD5:
        _log.warning("%s: not the file that NYU publishes (MD5 %s, not %s); its frames are taken as they are",
                     path, md5, MD5)  # fmt: skip
    stores = []
    for part, depth, (height, width) in (
        ("train", target, size),
        ("test", "filled", FULL_SIZE),
        ("test", "raw", FULL_SIZE),
    ):
        source = {
            "kind": "nyu-labeled", "part": part, "target": depth, "size": [height, width], "md5": md5,
            "frames": artefacts.digest_json(split[part].tolist()),
            "code": code_digest("d3lib.data.nyu", "d3lib.data.loader"),
        }  # fmt: skip
        folder = data_root / f"nyu-{part}{'-raw' if depth == 'raw' else ''}-{height}x{width}"
        indices = split[part].tolist()
        names = [f"{frames.scenes[index]}/{index + 1:04d}" for index in indices]
        batches = prepare.singly(frames.samples(indices, depth), (height, width))
        stores.append(prepare.open_or_make(folder, source, names, batches, progress))
    return stores


def _warn_of_scenes(frames: LabelledSet, split: Mapping[str, np.ndarray]) -> None:
    """Log a line if the file's scenes are not those of the raw set's split: a sign of frames in another order."""
    scenes = {part: {scene_of(frames.scenes[index]) for index in indices} for part, indices in split.items()}
    for odd, what in (
        (scenes["train"] - training_scenes(), "training frames are not among the 249 training scenes"),
        (scenes["test"] & training_scenes(), "test frames are training scenes"),
    ):
        if odd:
            _log.warning("%s: %d scenes of %s (%s)", frames.path, len(odd), what, ", ".join(sorted(odd)[:3]))

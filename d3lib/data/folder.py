"""Your own RGB-D pictures: `<root>/rgb/<split>/*` and `<root>/depth/<split>/*`, paired by name or by nearest time.

Colour: JPG or PNG, 8 bits. Depth: PNG or TIFF of whole numbers (`depth_scale` units per metre), TIFF or `.npy` of
floats (metres); endings in any case. 0, NaN, infinities and anything beyond `max_depth` are invalid.

Pairing. Where most names are times (`2018-04-26T17:16:27.356719`, `1305031102.175304`,
`d-1315166703.129542-2466101449`), a colour and a depth picture belong together if each is the other's nearest in
time and they are at most `tolerance` seconds apart; so none is used twice, and a picture whose partner is missing
does not take a neighbour's. Elsewhere equal names (without endings) belong together. What is left over, and every
name that two files share, is reported in `strays`: nothing is guessed.

Two pictures of one place are nearly one picture, so a random half says nothing about the other. `write_folds` cuts a
walk into stretches of time, gives each its turn as the test set, and leaves its neighbours out of training.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from d3lib import artefacts
from d3lib.data.loader import resize_sample
from d3lib.errors import UserError

MAX_PIXELS = 1 << 26  # 64 megapixels: what a picture may declare before it is decoded
RGB_SUFFIXES = (".jpg", ".jpeg", ".png")
DEPTH_SUFFIXES = (".png", ".tif", ".tiff", ".npy")
_ISO = re.compile(r"(\d{4})-?(\d\d)-?(\d\d)[T_ ](\d\d)[:_-]?(\d\d)[:_-]?(\d\d)((?:[.,]\d{1,9})?)Z?")
_SECONDS = re.compile(r"(?:[rd]-)?(\d{9,10}\.\d{1,9})(?:-\d+)?")
_log = logging.getLogger(__name__)


class FolderRGBD(torch.utils.data.Dataset):
    """The pairs of a folder, a sequence of samples (see `d3lib.data`), read when asked for.

    Args: `size` (H, W) resizes (see `d3lib.data.loader.resize_sample`; default: the depth picture's own
    size); `depth_scale` units per metre of whole-number depth (1000 = millimetres); `tolerance` in seconds;
    `max_depth` in metres.

    Attributes: `pairs` (rgb path, depth path) in order of time, or of name; `names` (of the colour pictures,
    without ending); `strays` (path → why it is in no pair); `report` (one line that sums it up); `paired_by`
    ("time" or "name").

    Raises `UserError` if the folders are missing or empty or nothing pairs; on reading, if a picture is
    unreadable, has the wrong type, scale or shape, negative depth, or no valid depth at all.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        size: tuple[int, int] | None = None,
        depth_scale: float = 1000.0,
        tolerance: float = 1.0,
        max_depth: float = 65.535,
    ) -> None:
        self.root, self.split, self.size = Path(root), split, size
        self.depth_scale, self.tolerance, self.max_depth = depth_scale, tolerance, max_depth
        if not (depth_scale > 0 and tolerance >= 0 and max_depth > 0):
            raise UserError(
                f"depth_scale {depth_scale}, tolerance {tolerance}, max_depth {max_depth}: must be positive"
            )
        if not self.root.is_dir():
            raise UserError(f"{root}: no such folder; it should hold rgb/{split}/ and depth/{split}/")
        self.strays: dict[str, str] = {}
        rgb = self._list("rgb", RGB_SUFFIXES)
        depth = self._list("depth", DEPTH_SUFFIXES)
        known = [{stem: t for stem in files if (t := time_of(stem)) is not None} for files in (rgb, depth)]
        by_time = all(2 * len(times) > len(files) for times, files in zip(known, (rgb, depth), strict=True))
        self.paired_by = "time" if by_time else "name"
        if by_time:
            partners, apart = pair_by_time(*known, tolerance)
        else:
            partners, apart = {stem: stem for stem in rgb if stem in depth}, {}
        missing = f"is nearest in time, within {tolerance:g} s" if by_time else "has this name"
        for kind, files, used in (("depth", rgb, partners), ("colour", depth, set(partners.values()))):
            self.strays |= {str(files[stem]): f"no {kind} picture {missing}" for stem in files.keys() - used}
        self.names = sorted(partners, key=known[0].__getitem__ if by_time else _natural)
        self.pairs = [(rgb[stem], depth[partners[stem]]) for stem in self.names]
        self.report = f"{len(self.pairs)} pairs by {self.paired_by}"
        self.report += f" (at most {max(apart.values()):.3f} s apart)" if apart else ""
        self.report += f", {len(self.strays)} strays"
        for path, why in sorted(self.strays.items())[:3]:
            self.report += f"; {Path(path).relative_to(self.root)}: {why}"
        if not self.pairs:
            raise UserError(f"{root}: {self.report}")
        _log.log(logging.WARNING if self.strays else logging.INFO, "%s: %s", root, self.report)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index`; raises `IndexError`, and `UserError` as the class says."""
        rgb_path, depth_path = self.pairs[index]
        rgb = read_rgb(rgb_path)
        depth = read_depth(depth_path, self.depth_scale)
        (height, width), (depth_height, depth_width) = rgb.shape[1:], depth.shape
        if abs(width * depth_height / (height * depth_width) - 1) > 0.01:
            raise UserError(
                f"{rgb_path}: {height}x{width} has not the aspect of {depth_path}, "
                f"{depth_height}x{depth_width}; crop or rotate one of them"
            )
        valid = (depth > 0) & (depth <= self.max_depth)
        if not valid.any():
            raise UserError(f"{depth_path}: no valid depth, every pixel is 0, NaN or beyond {self.max_depth} m")
        sample = {"rgb": rgb, "depth": np.where(valid, depth, 0)[None], "valid": valid[None]}
        return resize_sample({key: torch.from_numpy(x) for key, x in sample.items()}, self.size or depth.shape)

    @property
    def source(self) -> dict[str, Any]:
        """What made these samples, for a store or a record (plain JSON)."""
        stats = [(path, path.stat()) for pair in self.pairs for path in pair]  # tell of a change, unread
        return {
            "kind": "folder", "name": self.root.resolve().name, "split": self.split, "pairs": len(self),
            "paired_by": self.paired_by, "tolerance": self.tolerance, "strays": len(self.strays),
            "size": self.size and list(self.size), "depth_scale": self.depth_scale, "max_depth": self.max_depth,
            "files": artefacts.digest_json([[path.name, stat.st_size, stat.st_mtime_ns] for path, stat in stats]),
        }  # fmt: skip

    def _list(self, kind: str, suffixes: tuple[str, ...]) -> dict[str, Path]:
        """Stem → picture; what is no picture, or shares its stem with another, becomes a stray."""
        folder = self.root / kind / self.split
        if not folder.is_dir():
            splits = sorted(path.name for path in (self.root / kind).glob("*/"))
            raise UserError(f"{folder}: no such folder" + (f"; {kind}/ has {', '.join(splits[:9])}" if splits else ""))
        stems: dict[str, list[Path]] = {}
        for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
            if path.suffix.lower() in suffixes and path.is_file():
                stems.setdefault(path.stem, []).append(path)
            else:
                self.strays[str(path)] = f"not a file ending in {' '.join(suffixes)}"
        if not stems:
            raise UserError(f"{folder}: no pictures; expected {kind} files ending in {' '.join(suffixes)}")
        for paths in stems.values():
            for path in paths if len(paths) > 1 else ():
                self.strays[str(path)] = f"{len(paths)} files have this name; keep one"
        return {stem: paths[0] for stem, paths in stems.items() if len(paths) == 1}


def write_folds(pictures: str | Path, target: str | Path, folds: int, apart: int = 3) -> list[int]:
    """Split the pairs of `pictures` (its split "train") into `folds` stretches, each the test set of one folder.

    `<target>/fold-1` ... are folders like `pictures` with splits "train" and "test"; their files are links. Between two
    stretches lies the longest pause in reach, a quarter of a stretch to either side of the equal cut; where names are
    no times, the equal cut itself. A pause is no change of room, so the `apart` pairs before and after a test stretch
    are left out of its training set.

    Returns the stretches' sizes. Raises `UserError` if the target exists or lies in `pictures`, if `folds` or `apart`
    leave too few pairs, and if a part of the pictures pairs otherwise than the whole.
    """
    target, pairs = Path(target).absolute(), FolderRGBD(pictures, "train")
    if not 2 <= folds <= len(pairs) // 2:
        raise UserError(f"{pictures}: {len(pairs)} pairs make 2 to {len(pairs) // 2} folds of two or more, not {folds}")
    if target.exists() or target.resolve().is_relative_to(Path(pictures).resolve()):
        raise UserError(f"{target}: exists already, or lies among the pictures; name another folder")
    times = [time_of(name) for name in pairs.names] if pairs.paired_by == "time" else range(len(pairs))
    cuts = [0, *_cuts(times, folds), len(pairs)]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as place:
        for fold, (first, last) in enumerate(itertools.pairwise(cuts), 1):
            far = [index for index in range(len(pairs)) if index < first - apart or index >= last + apart]
            if apart < 0 or len(far) < 2:
                raise UserError(f"{pictures}: {apart} pairs apart leave {len(far)} to learn from; choose 0 or few")
            folder = Path(place) / "folds" / f"fold-{fold}"
            for split, chosen in (("train", far), ("test", range(first, last))):
                for index in chosen:
                    for kind, path in zip(("rgb", "depth"), pairs.pairs[index], strict=True):
                        link = folder / kind / split / path.name
                        link.parent.mkdir(parents=True, exist_ok=True)
                        link.symlink_to(path.resolve())
                part = FolderRGBD(folder, split)
                if part.strays or part.names != [pairs.names[index] for index in chosen]:
                    raise UserError(f"{pictures}: {part.report} in a fold; name all pictures by time, or none")
        os.rename(Path(place) / "folds", target)
    return [last - first for first, last in itertools.pairwise(cuts)]


def _cuts(times: Sequence[float], folds: int) -> list[int]:
    """Where each stretch but the first begins: after the longest pause in reach, of equal ones the most central."""
    count = len(times)
    reach = count // (4 * folds)
    cuts = []
    for part in range(1, folds):
        middle = round(part * count / folds)
        near = sorted(range(middle - reach, middle + reach + 1), key=lambda index: abs(index - middle))
        cuts.append(max(near, key=lambda index: times[index] - times[index - 1]))
    return cuts


def time_of(stem: str) -> float | None:
    """Seconds since 1970 in a file name (an ISO time taken as UTC, or plain or Kinect seconds), or None."""
    if match := _SECONDS.fullmatch(stem):
        return float(match[1])
    if match := _ISO.fullmatch(stem):
        try:
            start = datetime(*(int(match[group]) for group in range(1, 7)), tzinfo=UTC)  # type: ignore[misc]
        except ValueError:  # month 13
            return None
        return start.timestamp() + float(match[7].replace(",", ".") or 0)
    return None


def pair_by_time(
    rgb: Mapping[str, float], depth: Mapping[str, float], tolerance: float
) -> tuple[dict[str, str], dict[str, float]]:
    """Pair names that are each other's nearest in time (the earlier, if two are equally near) within
    `tolerance` s.

    Returns (rgb name → depth name, rgb name → seconds apart).
    """
    forth, back = _nearest(rgb, depth), _nearest(depth, rgb)
    apart = {name: abs(rgb[name] - depth[partner]) for name, partner in forth.items() if back[partner] == name}
    apart = {name: seconds for name, seconds in apart.items() if seconds <= tolerance}
    return {name: forth[name] for name in apart}, apart


def _nearest(names: Mapping[str, float], others: Mapping[str, float]) -> dict[str, str]:
    """Each name's nearest among `others` in time."""
    ordered = sorted(others, key=lambda other: (others[other], other))
    times = [others[other] for other in ordered]
    nearest = {}
    for name, time in names.items():
        after = bisect.bisect_left(times, time)
        around = range(max(after - 1, 0), min(after + 1, len(times)))
        nearest[name] = ordered[min(around, key=lambda index: abs(times[index] - time))]
    return nearest


def _natural(stem: str) -> list[Any]:
    """Sorting key in which img2 comes before img10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", stem)]


def read_rgb(path: str | Path) -> np.ndarray:
    """A colour picture as uint8 (3, H, W), upright by its EXIF orientation. Raises `UserError`."""
    image = _decode(path, ("JPEG", "PNG", "MPO"))
    if image.mode.startswith(("I", "F")):
        raise UserError(f"{path}: not 8-bit colour but mode {image.mode}; is it a depth map in the rgb folder?")
    return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def read_depth(path: str | Path, depth_scale: float = 1000.0) -> np.ndarray:
    """A depth picture as float32 metres (H, W), 0 where it is 0 or not finite. Raises `UserError`.

    Whole numbers are divided by `depth_scale`; floats are metres.
    """
    values = _map(path) if Path(path).suffix.lower() == ".npy" else np.asarray(_decode(path, ("PNG", "TIFF")))
    if values.ndim != 2 or not 0 < values.size <= MAX_PIXELS:
        raise UserError(f"{path}: shape {values.shape} is no depth map (H, W); is it a colour picture?")
    if values.dtype.itemsize == 1 or values.dtype.kind not in "uif":
        raise UserError(
            f"{path}: depth of type {values.dtype}; an 8-bit PNG has 256 levels, too few to learn from: "
            "export 16-bit whole numbers or float metres"
        )
    scale = 1.0 if values.dtype.kind == "f" else depth_scale
    depth = np.where(np.isfinite(values), values, 0).astype(np.float64) / scale
    if (depth < 0).any():
        raise UserError(f"{path}: negative depth, {depth.min():.3g} m; mark missing pixels as 0 or NaN")
    if (depth > 0).any() and not 0.01 <= (median := float(np.median(depth[depth > 0]))) <= 100:
        fits = [guess for guess in (1000, 5000, 256, 10000, 100) if 0.2 <= median * scale / guess <= 20]
        unit = "as float metres" if values.dtype.kind == "f" else f"at depth_scale={scale:g}"
        hint = f"1/{fits[0]} m would make it {median * scale / fits[0]:.3g} m" if fits else "no usual unit fits"
        raise UserError(f"{path}: the median depth {unit} is {median:.3g} m, the wrong scale; {hint}")
    return np.minimum(depth, np.finfo(np.float32).max).astype(np.float32)


def _decode(path: str | Path, formats: tuple[str, ...]) -> Image.Image:
    """A picture, decoded and upright, if it is one of `formats` and of bounded size."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.height}x{image.width} is more than {MAX_PIXELS >> 20} million pixels")
            return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise many kinds over a damaged file
        raise _unreadable(path, f"{' or '.join(formats)} picture", error) from error


def _map(path: str | Path) -> np.ndarray:
    """An array of a `.npy` file: mapped, so that no shape exceeds the file, and never unpickled."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a damaged header raises many kinds
        raise _unreadable(path, ".npy array", error) from error


def _unreadable(path: str | Path, what: str, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: no such file; check its name")
    reason = " ".join(str(error).replace(str(path), "file").split())[:200] or type(error).__name__
    return UserError(f"{path}: not a readable {what} ({reason}); export it again or take it away")

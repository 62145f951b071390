"""NYU Depth V2's raw archives → the paper's 12k and 230k training sets, without MATLAB and without extracting them.

Three steps, each whole or not at all, so that the same command continues wherever it was stopped:

1. `make_plan` lists the archives, pairs the frames of the official training scenes by name, takes an equally spaced
   subset before anything is decoded, and writes it as `plan.json`: the list of chosen frames.
2. `process` makes of each directory one `scenes/<directory>.zip`: per frame a 427x561 picture, its depth as a 16-bit
   PNG in millimetres and the mask of measured pixels; and `manifest.json`, which names every skipped frame and why.
3. `make_store` reads these at the training size into a store (`d3lib.data.shards`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d3lib import artefacts
from d3lib.data import kinect
from d3lib.data.inpaint import fill_depth
from d3lib.errors import UserError

PLAN, SCENE, VERSION = "d3lib-raw-plan", "d3lib-raw-scene", 1
SET_NAMES = {12000: "12k", None: "230k"}  # as the paper calls them
DISK_RESERVE = 1 << 27  # bytes to leave free
JPEG_QUALITY = 95
ATTEMPTS = 3  # how often a directory is begun whose process is killed
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """What decides the frames, beside the archives themselves."""

    frames: int | None = None  # how many, equally spaced over all pairs of the training scenes; None: all
    order: str = "crop-fill"  # crop, then fill; or "fill-crop", which differs by up to 0.5 m
    alpha: float = 1.0  # weight of the measured depths, see `inpaint.fill_depth`
    fill: bool = True  # False keeps the holes, as mask
    lossless: bool = False  # keep pictures as PNG instead of JPEG

    def __post_init__(self) -> None:
        """Raise `UserError` for values that mean nothing."""
        if self.frames is not None and self.frames < 1:
            raise UserError(f"frames is {self.frames}; give a number of at least 1, or all")
        if self.order not in ("crop-fill", "fill-crop"):
            raise UserError(f"order {self.order!r} is unknown; choose crop-fill or fill-crop")
        if not 1e-3 <= self.alpha <= 1e3:
            raise UserError(f"alpha is {self.alpha}; it must lie between 0.001 and 1000")

    @property
    def name(self) -> str:
        """What the set is called in a path: 12k, 230k, or its number of frames; `-raw` if its holes are kept."""
        return SET_NAMES.get(self.frames, str(self.frames)) + ("" if self.fill else "-raw")


class Archive:
    """A zip file, or a folder, that holds directories of a recording; members are read one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path = path.resolve()
        self._zip: zipfile.ZipFile | None = None
        if not path.is_dir():
            if not path.is_file():  # a pipe would wait for ever
                raise UserError(f"{path}: neither a zip file nor a folder")
            try:
                self._zip = zipfile.ZipFile(path)
            except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
                raise UserError(f"{path}: not a readable zip ({error}); download it again or leave it out") from error

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        if self._zip is not None:
            self._zip.close()

    def directories(self) -> dict[str, dict[str, str]]:
        """Directory → file name → member. The folder a file lies in is its directory, wherever that lies itself."""
        if self._zip is not None:
            members = [info.filename for info in self._zip.infolist() if not info.is_dir()]
        else:
            members = [path.relative_to(self.path).as_posix() for path in self.path.rglob("[rd]-*.p[gp]m")]
            members = [f"{self.path.name}/{name}" if "/" not in name else name for name in members]
        found: dict[str, dict[str, str]] = {}
        for member in members:
            *folders, name = member.split("/")
            if folders:
                found.setdefault(folders[-1], {})[name] = member
        return found

    def read(self, member: str, limit: int) -> bytes:
        """The member's bytes, but never more than one beyond `limit`. Raises `UserError` naming it if it is damaged."""
        try:
            if self._zip is not None:
                if self._zip.getinfo(member).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise zipfile.BadZipFile("compressed in a way that NYU's archives are not")  # bounds nothing
                with self._zip.open(member) as file:
                    content = file.read(limit + 1)
                    # what follows is only read for its checksum
                    if len(content) <= limit and file.read(1):
                        raise zipfile.BadZipFile("longer than declared")
                    return content
            path = self.path / member
            if not path.is_file():  # files that lie in the folder itself
                path = self.path.parent / member
            with path.open("rb") as file:
                return file.read(limit + 1)
        except (OSError, ValueError, KeyError, RuntimeError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path}: {member} cannot be read ({error})") from error


def make_plan(archives: Sequence[str | Path], folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Choose the frames and write `folder/plan.json`; a plan already there is returned if it is of the same input.

    Returns its content: `recipe`; `archives` (name, bytes); `available` (synchronised pairs of the training scenes);
    `chosen`; `left_out` (directories that are no official training scene, or lack a modality, by reason);
    `directories` (name → archive's number, its pairs "depth-file rgb-file" in order of time).

    Raises `UserError` for an archive that is missing or unreadable, a directory that two archives hold, too few
    frames, or a folder with another plan.
    """
    from d3lib.data import nyu  # not at the top: it needs torch, which the worker processes need not carry

    paths = [Path(archive) for archive in archives]
    if not paths:
        raise UserError("no archives; name NYU's raw zip files, or folders that they were extracted to")
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such archive")
    listing, left_out, seen = {}, {}, {}
    for number, path in enumerate(paths):
        with Archive(path) as archive:
            for name, members in archive.directories().items():
                if name not in nyu.training_directories():
                    left_out[name] = "not a directory of the official training scenes"
                    continue
                if name in seen:
                    raise UserError(f"{path} and {seen[name]} both hold {name}; name one of them")
                seen[name] = path
                pairs = kinect.synchronise(members)
                if pairs:
                    listing[name] = (number, [" ".join(pair) for pair in pairs])
                else:
                    left_out[name] = "no depth pictures with colour pictures"
    names = sorted(listing)
    available = sum(len(listing[name][1]) for name in names)
    count = available if recipe.frames is None else recipe.frames
    if not 1 <= count <= available:
        raise UserError(
            f"{count} frames asked for, but {', '.join(path.name for path in paths)} hold {available} synchronised "
            f"pairs of training scenes; name more archives or ask for fewer"
        )
    chosen = np.arange(count) * available // count  # equally spaced over the directories in order of name
    directories, start = {}, 0
    for name in names:
        number, pairs = listing[name]
        here = chosen[(chosen >= start) & (chosen < start + len(pairs))] - start
        start += len(pairs)
        if len(here):
            directories[name] = {"archive": number, "pairs": [pairs[index] for index in here]}
    content = {
        "recipe": dataclasses.asdict(recipe),
        "archives": [{"path": str(path.resolve()), "bytes": _size(path)} for path in paths],
        "available": available,
        "chosen": count,
        "left_out": left_out,
        "directories": directories,
    }
    place = folder / "plan.json"
    with artefacts.locked(folder / ".lock"):
        if place.exists():
            if artefacts.read_json(place, format=PLAN, version=VERSION) != content:
                raise UserError(f"{place}: a plan of other archives or another recipe; delete {folder} or use --out")
        else:
            artefacts.write_json(place, content, format=PLAN, version=VERSION)
    return content


def read_plan(folder: Path) -> dict[str, Any]:
    """The content of `folder/plan.json`. Raises `UserError` if it is missing or damaged."""
    return artefacts.read_json(folder / "plan.json", format=PLAN, version=VERSION)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def process_frame(
    archive: Archive, members: Sequence[str], recipe: Recipe
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read, project, crop and fill one pair (members of the archive: depth, colour).

    Returns rgb uint8 (427, 561, 3), depth float64 (427, 561) in metres, and where depth was measured, bool.
    Raises `UserError` for a damaged or unfit frame.
    """
    raw = kinect.read_pgm(archive.read(members[0], kinect.DEPTH_BYTES), members[0])
    rgb, depth = kinect.project(kinect.read_ppm(archive.read(members[1], kinect.RGB_BYTES), members[1]), raw)
    measured = (depth > 0) & (depth < kinect.MAX_DEPTH)
    if not kinect.crop(measured).any():
        raise UserError(f"{members[0]}: no pixel of it has a depth")
    if recipe.fill and recipe.order == "fill-crop":
        depth = fill_depth(rgb.transpose(2, 0, 1), depth, recipe.alpha)
    rgb, depth, measured = (kinect.crop(image) for image in (rgb, depth, measured))
    if recipe.fill and recipe.order == "crop-fill":
        depth = fill_depth(rgb.transpose(2, 0, 1), depth, recipe.alpha)
    return rgb, depth if recipe.fill else np.where(measured, depth, 0), measured


def process(
    folder: Path, *, archives: Sequence[str | Path] = (), workers: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Process every directory of the plan that is not done, on `workers` processes (default: one per core).

    Args: `archives`: only directories of these (default: of all).

    Prints, through `progress`, an estimate first and then rate, bytes and time left. Returns a summary: `written`,
    `skipped` frames, `bytes`, `seconds`. A bad frame is skipped with its reason; a killed process costs the directory
    it was at. Raises `UserError` for a full disk, or a plan of changed archives.
    """
    kinect.require_numba()  # or every frame would be skipped for want of it
    plan = read_plan(folder)
    recipe = Recipe(**plan["recipe"])
    for entry in plan["archives"]:
        if not Path(entry["path"]).exists() or _size(Path(entry["path"])) != entry["bytes"]:
            raise UserError(
                f"{entry['path']}: missing, or changed since plan.json was written; restore it or plan anew"
            )
    wanted = {str(Path(archive).resolve()) for archive in archives}
    known = [entry["path"] for entry in plan["archives"]]
    if unknown := wanted - set(known):
        raise UserError(f"{', '.join(sorted(unknown))}: not in {folder / 'plan.json'}; plan with all archives first")
    jobs = {
        name: (known[entry["archive"]], name, entry["pairs"], recipe, folder)
        for name, entry in plan["directories"].items()
        if not wanted or known[entry["archive"]] in wanted
    }
    waiting = {name: job for name, job in jobs.items() if _read_scene(folder, name, recipe) is None}
    workers = min(workers or os.cpu_count() or 1, max(len(waiting), 1))
    ticker = _Ticker(sum(len(job[2]) for job in waiting.values()), workers, progress)
    if waiting:
        ticker.estimate(next(iter(waiting.values())), folder)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _run_jobs(waiting, workers, ticker)
            break
        except BrokenProcessPool:
            waiting = {name: job for name, job in waiting.items() if _read_scene(folder, name, recipe) is None}
            if attempt == ATTEMPTS:
                raise UserError(
                    f"{folder}: a process was killed {ATTEMPTS} times (out of memory?), {len(waiting)} directories are "
                    "not done; try fewer --workers, the same command goes on"
                ) from None
    manifests = [_read_scene(folder, name, recipe) or {} for name in jobs]
    summary = {
        "available": plan["available"],
        "written": sum(len(manifest["frames"]) for manifest in manifests),
        "skipped": [row for manifest in manifests for row in manifest["skipped"]],
        "bytes": sum((folder / "scenes" / f"{name}.zip").stat().st_size for name in jobs),
        "seconds": ticker.seconds,
    }
    return summary


def _run_jobs(jobs: Mapping[str, tuple], workers: int, ticker: _Ticker) -> None:
    if workers == 1:
        for job in jobs.values():
            ticker.add(_process_directory(job))
        return
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    before = {name: os.environ.get(name) for name in threads}
    os.environ.update(threads)  # a process has one core: BLAS threads would only get in each other's way
    # spawned: neither torch nor open files are inherited, a worker stays small
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_quiet)
    try:
        for future in as_completed([pool.submit(_process_directory, job) for job in jobs.values()]):
            ticker.add(future.result())
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    pool.shutdown()


def _quiet() -> None:
    """In a worker: leave Ctrl-C to the parent, which cancels what has not begun."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Ticker:
    """Counts frames and bytes, and says how long the rest will take."""

    def __init__(self, total: int, workers: int, progress: Progress | None) -> None:
        self.total, self.workers, self.say = total, workers, progress or (lambda line: None)
        self.done = self.bytes = 0
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def estimate(self, job: tuple, folder: Path) -> None:
        """Time one frame, say what all will take, and refuse a disk that is too small. Raises `UserError`."""
        path, _, pairs, recipe, _ = job
        with Archive(Path(path)) as archive:
            names = archive.directories()[job[1]]
            size, seconds = 0, 0.0
            for pair in pairs[:3]:
                with contextlib.suppress(UserError):
                    for _ in range(2):  # the first call compiles
                        started = time.perf_counter()
                        frame = process_frame(archive, [names[name] for name in pair.split()], recipe)
                        size = sum(len(content) for content in _encode(*frame, recipe).values())
                        seconds = time.perf_counter() - started
                    break
        need, free = size * self.total, shutil.disk_usage(folder).free
        self.say(
            f"{self.total} frames: about {_duration(seconds * self.total / self.workers)} on {self.workers} processes "
            f"and {_amount(need)} "
            f"({seconds * 1000:.0f} ms and {size / 1e6:.2f} MB for one; {_amount(free)} free)"
        )
        if need + DISK_RESERVE > free:
            raise UserError(f"{folder}: about {_amount(need)} are needed and {_amount(free)} free; use --out")
        self.start = time.perf_counter()

    def add(self, summary: Mapping[str, Any]) -> None:
        self.done += summary["frames"]
        self.bytes += summary["bytes"]
        rate = self.done / max(self.seconds, 1e-9)
        left = (self.total - self.done) / rate if rate else math.inf
        self.say(f"{self.done}/{self.total} frames, {rate:.1f} frames/s, {_amount(self.bytes)}, {_duration(left)} left")


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _amount(size: float) -> str:
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


def _process_directory(job: tuple[str, str, list[str], Recipe, Path]) -> dict[str, Any]:
    """Make one directory's zip, unless another process has made it meanwhile."""
    path, directory, pairs, recipe, folder = job
    target = folder / "scenes" / f"{directory}.zip"
    with artefacts.locked(target.with_name(f".{directory}.lock")):
        if _read_scene(folder, directory, recipe) is None:
            for rest in target.parent.glob(f".{directory}.*.part.zip"):
                rest.unlink()  # of a process that was killed: ours is the only one here now
            _write_scene(target, Path(path), directory, pairs, recipe)
    return {"frames": len(pairs), "bytes": target.stat().st_size}


def _write_scene(target: Path, path: Path, directory: str, pairs: Sequence[str], recipe: Recipe) -> None:
    frames, skipped = [], []
    with (
        Archive(path) as archive,
        artefacts.atomic_path(target) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as out,
    ):
        members = archive.directories().get(directory, {})
        for pair in pairs:
            stem = pair.split()[0].removesuffix(".pgm").removeprefix("d-")
            try:
                content = _encode(*process_frame(archive, [members[name] for name in pair.split()], recipe), recipe)
            except (UserError, KeyError, ArithmeticError, np.linalg.LinAlgError) as error:
                skipped.append({"frame": f"{directory}/{stem}", "reason": " ".join(str(error).split())})
                continue
            if shutil.disk_usage(target.parent).free < DISK_RESERVE:
                raise UserError(f"{target.parent}: the disk is full; free some space, the same command goes on")
            for ending, data in content.items():
                out.writestr(zipfile.ZipInfo(f"{stem}.{ending}"), data)  # without today's date: equal bytes
            frames.append({"frame": stem, "pair": pair})
        manifest = {"directory": directory, "recipe": dataclasses.asdict(recipe), "frames": frames, "skipped": skipped}
        text = json.dumps({"format": SCENE, "version": VERSION, "content": manifest}, indent=1, sort_keys=True)
        out.writestr(zipfile.ZipInfo("manifest.json"), text)


def _encode(rgb: np.ndarray, depth: np.ndarray, measured: np.ndarray, recipe: Recipe) -> dict[str, bytes]:
    """Ending → bytes of the three pictures of a frame."""
    picture = Image.fromarray(rgb)
    millimetres = Image.fromarray(np.rint(depth.clip(0, 65.535) * 1000).astype(np.uint16))
    return {
        **({"png": _saved(picture, "PNG", compress_level=1)} if recipe.lossless else {}),
        **({} if recipe.lossless else {"jpg": _saved(picture, "JPEG", quality=JPEG_QUALITY)}),
        "depth.png": _saved(millimetres, "PNG", compress_level=1),
        "mask.png": _saved(Image.fromarray(measured), "PNG", compress_level=1),  # one bit a pixel
    }


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _read_scene(folder: Path, directory: str, recipe: Recipe) -> dict[str, Any] | None:
    """The manifest of a directory's zip, or None if it is not there, not whole, or made by another recipe."""
    try:
        with zipfile.ZipFile(folder / "scenes" / f"{directory}.zip") as scene:
            found = json.loads(scene.read("manifest.json"))
        content = found["content"]
        same = (found["format"], found["version"], content["recipe"]) == (SCENE, VERSION, dataclasses.asdict(recipe))
        return content if same and content["directory"] == directory else None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, zlib.error, zipfile.BadZipFile):
        return None


def samples(folder: Path) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """All frames that `process` has kept, in order: (`<directory>/<time>`, sample as in `d3lib.data`, 427x561).

    Raises `UserError` naming the directory that is not done, or the file that is damaged.
    """
    plan = read_plan(folder)
    recipe = Recipe(**plan["recipe"])
    for name in plan["directories"]:
        path = folder / "scenes" / f"{name}.zip"
        manifest = _read_scene(folder, name, recipe)
        if manifest is None:
            raise UserError(f"{path}: not done yet, or damaged; run `d3lib data nyu-raw` again")
        with Archive(path) as scene:
            for frame in manifest["frames"]:
                stem = frame["frame"]
                rgb = _load(scene, f"{stem}.{'png' if recipe.lossless else 'jpg'}", (3,), np.uint8)
                depth = _load(scene, f"{stem}.depth.png", (), np.uint16)
                mask = _load(scene, f"{stem}.mask.png", (), np.bool_)
                yield (
                    f"{name}/{stem}",
                    {
                        "rgb": np.ascontiguousarray(rgb.transpose(2, 0, 1)),
                        "depth": (depth / 1000.0).astype(np.float32)[None],
                        "valid": ((depth > 0) & (mask | recipe.fill))[None],
                    },
                )


def _load(scene: Archive, member: str, channels: tuple[int, ...], kind: type) -> np.ndarray:
    content = scene.read(member, 1 << 22)
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            if image.size != (561, 427):
                raise ValueError(f"a picture of {image.size}")
            array = np.asarray(image)
        if array.shape[2:] != channels or array.dtype != kind:
            raise ValueError(f"a picture of {array.dtype} {array.shape}")
    except Exception as error:  # Pillow's decoders raise many kinds over a damaged file
        raise UserError(
            f"{scene.path}: {member} is damaged ({error}); delete the zip, the command makes it anew"
        ) from error
    return array


def make_store(folder: Path, target: Path, size: tuple[int, int], progress: Progress | None = None) -> Any:
    """Write the kept frames at `size` (H, W), stretched, as the store `target`, or open the one that is there.

    Returns the store (`d3lib.data.shards.Store`).
    """
    import torch

    from d3lib.data import shards
    from d3lib.data.loader import resize_sample

    plan = read_plan(folder)
    source = {
        "kind": "nyu-raw",
        "plan": artefacts.digest_json(plan),
        "recipe": plan["recipe"],
        "size": list(size),
        "scenes": {name: _stamp(folder / "scenes" / f"{name}.zip") for name in plan["directories"]},
    }
    with artefacts.locked(target.parent / f".{target.name}.lock"):
        if store := shards.open_if_from(target, source):
            return store
        recipe = Recipe(**plan["recipe"])
        manifests = {name: _read_scene(folder, name, recipe) or {"frames": []} for name in plan["directories"]}
        names = [f"{name}/{row['frame']}" for name, found in manifests.items() for row in found["frames"]]
        start = time.perf_counter()

        def batches() -> Iterator[dict[str, torch.Tensor]]:
            for number, (_, sample) in enumerate(samples(folder), 1):
                tensors = {key: torch.from_numpy(image) for key, image in sample.items()}
                resized = resize_sample(tensors, size)
                yield {key: image[None] for key, image in resized.items()}
                if progress is not None and number % 50 == 0:
                    rate = number / (time.perf_counter() - start)
                    progress(f"{target.name}: {number}/{len(names)} frames, {rate:.0f} frames/s")

        return shards.write_store(target, batches(), source=source, names=names)


def _stamp(path: Path) -> list[int]:
    """What tells that a file has changed, without reading it."""
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else []


def folder_of(data_root: Path, recipe: Recipe) -> Path:
    """Where the plan and the kept frames of a recipe lie."""
    return data_root / f"nyu-raw-{recipe.name}-{artefacts.digest_json(dataclasses.asdict(recipe))[:8]}"


def store_of(data_root: Path, recipe: Recipe, size: tuple[int, int]) -> Path:
    """Where the training store of a recipe lies."""
    return data_root / f"nyu-{recipe.name}-{size[0]}x{size[1]}"

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
import datetime
import errno
import functools
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d3lib import artefacts
from d3lib.data import kinect
from d3lib.data.inpaint import fill_depth
from d3lib.errors import UserError
from d3lib.provenance import code_digest

PLAN, SCENE, VERSION = "d3lib-raw-plan", "d3lib-raw-scene", 2
SET_NAMES = {12000: "12k", None: "230k"}  # as the paper calls them
DISK_RESERVE = 1 << 27  # bytes to leave free
JPEG_QUALITY = 95
ATTEMPTS = 3  # how often a directory is begun whose process is killed
DAMAGE = (OSError, ValueError, KeyError, RuntimeError, EOFError, zlib.error, zipfile.BadZipFile)
_PICTURE = re.compile(r"(?:(.*)/)?([rd]-[^/]*\.p[gp]m)", re.DOTALL)
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
        """What the set is called in a path: 12k, 230k, or its number of frames; `-raw` if its holes are kept.

        Anything else that is not the default shows as a digest.
        """
        name = SET_NAMES.get(self.frames, str(self.frames)) + ("" if self.fill else "-raw")
        rest = dataclasses.replace(self, frames=None, fill=True)
        return name if rest == Recipe() else f"{name}-{artefacts.digest_json(dataclasses.asdict(rest))[:8]}"


class Archive:
    """A zip file, or a folder, that holds directories of a recording; members are read one at a time."""

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        self._zip: zipfile.ZipFile | None = None
        if not path.is_dir():
            if not path.is_file():  # a pipe would wait for ever
                raise UserError(f"{path}: neither a zip file nor a folder")
            try:
                self._zip = zipfile.ZipFile(path)
            except DAMAGE as error:
                _raise_if_passing(error)
                raise UserError(f"{path}: not a readable zip ({error}); download it again or leave it out") from error

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        if self._zip is not None:
            self._zip.close()

    def folders(self) -> dict[str, list[str]]:
        """Where colour and depth pictures lie, at any depth ("" is the archive itself) → their file names."""
        members = _walk(self.path) if self._zip is None else (info.filename for info in self._zip.infolist())
        found: dict[str, list[str]] = {}
        for match in filter(None, map(_PICTURE.fullmatch, members)):
            found.setdefault(match[1] or "", []).append(match[2])
        return found

    def read(self, member: str, limit: int) -> bytes:
        """The member's bytes, but never more than one beyond `limit`.

        Raises `UserError` naming it if it is damaged, `OSError` if the disk or the network fails.
        """
        try:
            if self._zip is None:
                with (self.path / member).open("rb") as file:
                    return file.read(limit + 1)
            if self._zip.getinfo(member).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise zipfile.BadZipFile("compressed in a way that NYU's archives are not")  # bounds nothing
            with self._zip.open(member) as file:
                content = file.read(limit + 1)
                # what follows is only read for its checksum
                if len(content) <= limit and file.read(1):
                    raise zipfile.BadZipFile("longer than declared")
                return content
        except DAMAGE as error:
            _raise_if_passing(error)
            raise UserError(f"{self.path}: {member} cannot be read ({error})") from error


_open_archive = functools.lru_cache(maxsize=1)(Archive)  # the list of a large zip's members takes seconds to read


def _raise_if_passing(error: BaseException) -> None:
    """Raise `error` on if it is the system's, not the content's: another time it may be gone."""
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a zip points before itself
        raise error


def _walk(top: Path) -> Iterator[str]:
    """The files below a folder. Links to folders are followed, but a folder is not visited twice by the same name.

    Raises `OSError` for a folder that cannot be listed: what is in it would be missing without a word.
    """
    seen = set()
    for place, folders, files in os.walk(top, onerror=_raise_if_passing, followlinks=True):
        where = (os.path.realpath(place), os.path.basename(place))
        if where in seen:
            folders.clear()
            continue
        seen.add(where)
        folders.sort()
        yield from (Path(place, name).relative_to(top).as_posix() for name in files)


def _size(path: Path) -> int:
    """Bytes of a zip, or of a folder's pictures; -1 if there is nothing."""
    if not path.is_dir():
        return path.stat().st_size if path.exists() else -1
    return sum((path / name).stat().st_size for name in _walk(path) if _PICTURE.fullmatch(name))


def make_plan(archives: Sequence[str | Path], folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Choose the frames and write `folder/plan.json`; a plan already there is returned if it is of the same input.

    Returns its content: `recipe`; `archives` (path, name, bytes), in order of name; `present` (how many of the 284
    training directories they hold); `available` (synchronised pairs in these); `chosen`; `left_out` (directories that
    are no official training scene, or lack a modality, by reason); `directories` (name → archive's number, the folder
    in it, its pairs "depth-file rgb-file" in order of time).

    Raises `UserError` for an archive that is missing or unreadable, a directory that is there twice, too few frames,
    or a folder with another plan.
    """
    from d3lib.data import nyu  # not at the top: it needs torch, which the worker processes need not carry

    if not archives:
        raise UserError("no archives; name NYU's raw zip files, or folders that they were extracted to")
    paths = [Path(os.path.abspath(archive)) for archive in archives]  # a link keeps its name
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such archive")
    entries = sorted(({"path": str(path), "name": path.name, "bytes": _size(path)} for path in paths), key=_identity)
    for one, two in itertools.pairwise(entries):
        if _identity(one) == _identity(two):
            raise UserError(f"{one['path']} and {two['path']}: the same name and size; leave one out or rename it")
    listing, left_out = {}, {}
    for number, entry in enumerate(entries):
        with Archive(entry["path"]) as archive:
            for inside, members in archive.folders().items():
                name = (inside or entry["name"]).rpartition("/")[2]
                readable = inside.encode("utf-8", "backslashreplace").decode()  # a plan is UTF-8, a disk need not be
                if name not in nyu.training_directories():
                    left_out[readable.rpartition("/")[2] or name] = "not a directory of the official training scenes"
                elif inside != readable:
                    left_out[readable] = "a name that is not UTF-8; rename the folder"
                elif not (pairs := kinect.synchronise(members)):
                    left_out[name] = "no depth pictures with colour pictures"
                elif name in listing:
                    other = Path(entries[listing[name]["archive"]]["path"], listing[name]["folder"])
                    raise UserError(
                        f"{other} and {Path(entry['path'], inside)} both hold {name}; leave one of them out"
                    )
                else:
                    listing[name] = {"archive": number, "folder": inside, "pairs": [" ".join(pair) for pair in pairs]}
    available = sum(len(entry["pairs"]) for entry in listing.values())
    count = available if recipe.frames is None else recipe.frames
    if not 1 <= count <= available:
        raise UserError(
            f"{count} frames asked for, but {', '.join(path.name for path in paths)} hold {available} synchronised "
            f"pairs of training scenes; name more archives or ask for fewer"
        )
    every = [(name, pair) for name in sorted(listing) for pair in listing[name]["pairs"]]
    chosen: dict[str, list[str]] = {}
    for index in range(count):  # equally spaced over the directories in order of name
        name, pair = every[index * available // count]
        chosen.setdefault(name, []).append(pair)
    directories = {name: listing[name] | {"pairs": pairs} for name, pairs in chosen.items()}
    content = {
        "recipe": dataclasses.asdict(recipe),
        "archives": entries,
        "present": len(listing),
        "available": available,
        "chosen": count,
        "left_out": left_out,
        "directories": directories,
    }
    place = folder / "plan.json"
    with artefacts.locked(folder / ".lock"):
        if not place.exists():
            artefacts.write_json(place, content, format=PLAN, version=VERSION)
        elif _wherever(read_plan(folder)) != _wherever(content):
            raise UserError(f"{place}: a plan of other archives or another recipe; delete {folder} or use --out")
    return content


def read_plan(folder: Path) -> dict[str, Any]:
    """The content of `folder/plan.json`. Raises `UserError` if it is missing or damaged."""
    return artefacts.read_json(folder / "plan.json", format=PLAN, version=VERSION)


def _identity(entry: Mapping[str, Any]) -> tuple[str, int]:
    """By what an archive is known again, on whatever disk it lies."""
    return entry["name"], entry["bytes"]


def _wherever(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A plan without the places of its archives, which do not decide the frames."""
    return {**plan, "archives": [_identity(entry) for entry in plan["archives"]]}


@dataclass(frozen=True)
class Scene:
    """The zip of one directory of a plan: where it is, what is to be in it, and what it is made from."""

    folder: Path  # of the plan
    name: str
    pairs: Sequence[str]  # "depth-file rgb-file" of each frame
    recipe: Recipe
    archive: Path | None  # where the archive of the directory lies now; None: not asked for
    inside: str  # the directory there

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.folder / "scenes" / f"{self.name}.zip"

    @property
    def key(self) -> str:
        """A digest of what decides the content: the choice of frames, the recipe and the code."""
        code = code_digest("d3lib.data.kinect", "d3lib.data.inpaint")
        return artefacts.digest_json([self.name, list(self.pairs), dataclasses.asdict(self.recipe), code])

    def manifest(self) -> dict[str, Any] | None:
        """What the zip says of itself, or None if it is not there, not whole, or made from something else."""
        try:
            with zipfile.ZipFile(self.path) as scene:
                found = json.loads(scene.read("manifest.json"))
            same = (found["format"], found["version"], found["content"]["key"]) == (SCENE, VERSION, self.key)
            return found["content"] if same else None
        except (*DAMAGE, TypeError):
            return None


def _scenes(folder: Path, plan: Mapping[str, Any], places: Mapping[int, Path]) -> list[Scene]:
    """Every directory of the plan; `places` says where archives lie, by their numbers."""
    recipe = Recipe(**plan["recipe"])
    return [
        Scene(folder, name, entry["pairs"], recipe, places.get(entry["archive"]), entry["folder"])
        for name, entry in plan["directories"].items()
    ]


def process_frame(archive: Archive, inside: str, pair: str, recipe: Recipe) -> dict[str, bytes]:
    """Read, project, crop, fill and encode one pair ("depth-file rgb-file") of the folder `inside` of an archive.

    Returns ending → bytes of a picture, its depth in millimetres and where depth was measured, each 427x561.
    Raises `UserError` for a damaged or unfit frame.
    """
    members = [f"{inside}/{name}" if inside else name for name in pair.split()]
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
    if not recipe.fill:
        depth = np.where(measured, depth, 0)
    millimetres = np.rint(depth.clip(0, 65.535) * 1000).astype(np.uint16)
    lossless = {"png": _saved(rgb, "PNG", compress_level=1)} if recipe.lossless else {}
    return (lossless or {"jpg": _saved(rgb, "JPEG", quality=JPEG_QUALITY)}) | {
        "depth.png": _saved(millimetres, "PNG", compress_level=1),
        "mask.png": _saved(measured, "PNG", compress_level=1),  # one bit a pixel
    }


def _saved(image: np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def process(
    folder: Path, *, archives: Sequence[str | Path] = (), workers: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Process every directory of the plan that is not done, on `workers` processes (default: one per core).

    Args: `archives`: only directories of these, read where they are now (default: of all, where the plan found them).

    Prints, through `progress`, an estimate first and then rate, bytes and time left. Returns a summary: `written`,
    `skipped` (frame and reason of each), `bytes`. A bad frame is skipped; a killed process costs the directory it was
    at, and so does a disk or a network that fails. Raises `UserError` for a full disk, archives that are not those of
    the plan, directories that could not be read, and if not a single frame is fit.
    """
    kinect.require_numba()  # or every frame would be skipped for want of it
    _open_archive.cache_clear()  # the same path may be another file by now
    plan = read_plan(folder)
    known = [_identity(entry) for entry in plan["archives"]]
    places = {}
    for path in [Path(os.path.abspath(path)) for path in archives or [entry["path"] for entry in plan["archives"]]]:
        identity = (path.name, _size(path))
        if identity not in known:
            raise UserError(
                f"{path}: missing, changed since {folder / 'plan.json'} was written, or not in it; restore it, or "
                f"delete {folder} and plan with all archives"
            )
        places[known.index(identity)] = path
    scenes = [scene for scene in _scenes(folder, plan, places) if scene.archive is not None]
    jobs = [scene for scene in scenes if scene.manifest() is None]
    workers = min(workers or os.cpu_count() or 1, max(len(jobs), 1))
    ticker = _Ticker(sum(len(scene.pairs) for scene in jobs), workers, progress)
    if jobs:
        ticker.estimate(jobs[0])
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _run_jobs(jobs, workers, ticker)
            break
        except BrokenProcessPool:
            jobs = [scene for scene in jobs if scene.manifest() is None]
            if attempt == ATTEMPTS:
                raise UserError(
                    f"{folder}: a process was killed {ATTEMPTS} times (out of memory?), {len(jobs)} directories are "
                    "not done; try fewer --workers, the same command goes on"
                ) from None
    if ticker.faults:
        raise UserError(f"{len(ticker.faults)} directories are not done ({ticker.faults[0]}); the same command goes on")
    manifests = [scene.manifest() or {"frames": [], "skipped": []} for scene in scenes]
    written = sum(len(manifest["frames"]) for manifest in manifests)
    skipped = [row for manifest in manifests for row in manifest["skipped"]]
    if skipped and not written:  # no fault of single frames
        for scene in scenes:
            scene.path.unlink()
        first = skipped[0]
        raise UserError(f"{folder}: none of {len(skipped)} frames is fit ({first['frame']}: {first['reason']})")
    size = sum(scene.path.stat().st_size for scene in scenes)
    return {"written": written, "skipped": skipped, "bytes": size}


def _run_jobs(jobs: Sequence[Scene], workers: int, ticker: _Ticker) -> None:
    if workers == 1:
        for scene in jobs:
            ticker.add(*_make(scene))
        return
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    before = {name: os.environ.get(name) for name in threads}
    os.environ.update(threads)  # a process has one core: BLAS threads would only get in each other's way
    # spawned: neither torch nor open files are inherited, a worker stays small
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _follow_parent)
    queue, running = iter(jobs), set[Future]()
    try:
        while True:  # the pool gets no job before a process is free: what it has, it cannot be made to forget
            running |= {pool.submit(_make, scene) for scene in itertools.islice(queue, workers - len(running))}
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                ticker.add(*future.result())
    except KeyboardInterrupt:
        ticker.say(f"interrupted: {len(running)} directories are being finished; interrupt again to leave them")
        raise
    finally:
        try:
            pool.shutdown()
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _follow_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end when it ends, however that happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Ticker:
    """Counts frames and bytes, and says how long the rest will take."""

    def __init__(self, total: int, workers: int, progress: Progress | None) -> None:
        self.total, self.workers, self.say = total, workers, progress or (lambda line: None)
        self.done = self.bytes = 0
        self.faults: list[str] = []
        self.start = time.perf_counter()

    def estimate(self, scene: Scene) -> None:
        """Time one frame, say what all will take, and refuse a disk that is too small. Raises `UserError`."""
        size, seconds = 0, 0.0
        with Archive(scene.archive) as archive:
            for pair in [*scene.pairs[:2], scene.pairs[0]]:  # the first call compiles, the last that succeeds counts
                with contextlib.suppress(UserError, OSError):
                    started = time.perf_counter()
                    size = sum(map(len, process_frame(archive, scene.inside, pair, scene.recipe).values()))
                    seconds = time.perf_counter() - started
        need, free = size * self.total, shutil.disk_usage(scene.folder).free
        self.say(
            f"{self.total} frames: about {_duration(seconds * self.total / self.workers)} on {self.workers} processes "
            f"and {_amount(need)} "
            f"({seconds * 1000:.0f} ms and {size / 1e6:.2f} MB for one; {_amount(free)} free)"
        )
        if need + DISK_RESERVE > free:
            raise UserError(f"{scene.folder}: about {_amount(need)} are needed and {_amount(free)} free; use --out")
        self.start = time.perf_counter()

    def add(self, frames: int, size: int, fault: str) -> None:
        """Count a directory: so many frames and bytes, or none and why."""
        self.done += frames
        self.bytes += size
        self.faults += [fault] if fault else []
        rate = max(self.done, 1) / max(time.perf_counter() - self.start, 1e-9)
        left = _duration((self.total - self.done) / rate)
        self.say(fault or f"{self.done}/{self.total} frames, {rate:.1f} frames/s, {_amount(self.bytes)}, {left} left")


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _amount(size: float) -> str:
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


def _make(scene: Scene) -> tuple[int, int, str]:
    """Make one directory's zip, unless another process has made it meanwhile. Returns frames, bytes and no fault.

    Or 0, 0 and the fault, where disk or network fail: they may not another time.
    """
    target = scene.path
    try:
        with artefacts.locked(target.with_name(f".{scene.name}.lock")):
            if scene.manifest() is None:
                for rest in target.parent.glob(f".{scene.name}.*.part.zip"):
                    rest.unlink()  # of a process that was killed: ours is the only one here now
                _write(scene)
        return len(scene.pairs), target.stat().st_size, ""
    except OSError as error:
        return 0, 0, f"{scene.name} is not done: {error}"


def _write(scene: Scene) -> None:
    frames, skipped, archive = [], [], _open_archive(scene.archive)
    with artefacts.atomic_path(scene.path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as out:
        for pair in scene.pairs:
            stem = pair.split()[0].removesuffix(".pgm").removeprefix("d-")
            try:
                content = process_frame(archive, scene.inside, pair, scene.recipe)
            except (UserError, ArithmeticError, np.linalg.LinAlgError) as error:
                skipped.append({"frame": f"{scene.name}/{stem}", "reason": " ".join(str(error).split())})
                continue
            if shutil.disk_usage(scene.folder).free < DISK_RESERVE:
                raise UserError(f"{scene.folder}: the disk is full; free some space, the same command goes on")
            for ending, data in content.items():
                out.writestr(zipfile.ZipInfo(f"{stem}.{ending}"), data)  # without today's date: equal bytes
            frames.append({"frame": stem, "pair": pair})
        manifest = {"directory": scene.name, "key": scene.key, "recipe": dataclasses.asdict(scene.recipe)}
        manifest |= {"frames": frames, "skipped": skipped}
        text = json.dumps({"format": SCENE, "version": VERSION, "content": manifest}, indent=1, sort_keys=True)
        out.writestr(zipfile.ZipInfo("manifest.json"), text)


def samples(folder: Path) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """All frames that `process` has kept, in order: (`<directory>/<time>`, sample as in `d3lib.data`, 427x561).

    Raises `UserError` naming the directory that is not done, or the file that is damaged. The zip of a damaged file is
    deleted, so that the same command makes it anew.
    """
    for scene, manifest in _done(folder, read_plan(folder)):
        recipe = scene.recipe
        with Archive(scene.path) as archive:
            for stem in (row["frame"] for row in manifest["frames"]):
                rgb = _load(archive, f"{stem}.{'png' if recipe.lossless else 'jpg'}", (3,), np.uint8)
                depth = _load(archive, f"{stem}.depth.png", (), np.uint16)
                mask = _load(archive, f"{stem}.mask.png", (), np.bool_)
                yield (
                    f"{scene.name}/{stem}",
                    {
                        "rgb": np.ascontiguousarray(rgb.transpose(2, 0, 1)),
                        "depth": (depth / 1000.0).astype(np.float32)[None],
                        "valid": ((depth > 0) & (mask | recipe.fill))[None],
                    },
                )


def _done(folder: Path, plan: Mapping[str, Any]) -> list[tuple[Scene, dict[str, Any]]]:
    """Every directory of the plan with its manifest. Raises `UserError` naming one that is not done."""
    found = []
    for scene in _scenes(folder, plan, {}):
        if (manifest := scene.manifest()) is None:
            raise UserError(f"{scene.path}: not done yet, or damaged; run `d3lib data nyu-raw` again")
        found.append((scene, manifest))
    return found


def _load(archive: Archive, member: str, channels: tuple[int, ...], kind: type) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(archive.read(member, 1 << 22)), formats=("PNG", "JPEG")) as image:
            if image.size != (561, 427):
                raise ValueError(f"a picture of {image.size}")
            array = np.asarray(image)
        if array.shape[2:] != channels or array.dtype != kind:
            raise ValueError(f"a picture of {array.dtype} {array.shape}")
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds over a damaged file
        _raise_if_passing(error)
        archive.path.unlink(missing_ok=True)
        raise UserError(
            f"{archive.path}: {member} was damaged ({error}); the zip is deleted, `d3lib data nyu-raw` makes it anew"
        ) from error
    return array


def make_store(folder: Path, target: Path, size: tuple[int, int], progress: Progress | None = None) -> Any:
    """Write the kept frames at `size` (H, W), stretched, as the store `target`, or open the one that is there.

    Returns the store (`d3lib.data.shards.Store`). Raises `UserError` as `samples` does.
    """
    import torch

    from d3lib.data import nyu, prepare

    plan = read_plan(folder)
    done = _done(folder, plan)
    stats = {scene.name: scene.path.stat() for scene, _ in done}
    source = {
        "kind": "nyu-raw",
        "plan": artefacts.digest_json(_wherever(plan)),
        "directories": f"{plan['present']} of {len(nyu.training_directories())}",
        "recipe": plan["recipe"],
        "size": list(size),
        "code": code_digest("d3lib.data.raw", "d3lib.data.loader", "d3lib.data.shards"),
        "scenes": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},  # tell of a change, unread
    }
    names = [f"{scene.name}/{row['frame']}" for scene, manifest in done for row in manifest["frames"]]
    tensors = ({key: torch.from_numpy(image) for key, image in sample.items()} for _, sample in samples(folder))
    return prepare.open_or_make(target, source, names, prepare.singly(tensors, size), progress)


def folder_of(data_root: Path, recipe: Recipe) -> Path:
    """Where the plan and the kept frames of a recipe lie."""
    return data_root / f"nyu-raw-{recipe.name}"


def store_of(data_root: Path, recipe: Recipe, size: tuple[int, int]) -> Path:
    """Where the training store of a recipe lies."""
    return data_root / f"nyu-{recipe.name}-{size[0]}x{size[1]}"

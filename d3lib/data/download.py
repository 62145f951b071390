"""Downloads of large files that resume after a cut, and are used only if size and hash are right."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from d3lib import __version__
from d3lib.artefacts import locked
from d3lib.data import nyu
from d3lib.data.prepare import Progress
from d3lib.errors import UserError

LABELLED_URLS = (
    "https://horatio.cs.nyu.edu/mit/silberman/nyu_depth_v2/nyu_depth_v2_labeled.mat",
    "http://horatio.cs.nyu.edu/mit/silberman/nyu_depth_v2/nyu_depth_v2_labeled.mat",
)
LABELLED_PAGE = "https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html"
TIMEOUT = 30.0  # seconds: for a connection, and for each piece of an answer
SLOWEST, WINDOW = 1000, 60.0  # bytes a second, measured over so many seconds: less counts as down
GAIN, PAUSE = 1_000_000, 1.0  # a source is asked again while each request brings so many bytes; seconds between
REPORT_EVERY = 5.0  # seconds
DISK_RESERVE = 1 << 25  # bytes left free
_PIECE = 1 << 18  # bytes


def fetch_labelled(folder: str | Path, progress: Progress | None = None) -> Path:
    """Download `nyu_depth_v2_labeled.mat` into `folder`, or check the one that is there; see `fetch`."""
    path = Path(folder) / "nyu_depth_v2_labeled.mat"
    advice = f"get it by hand from {LABELLED_PAGE}, then run `d3lib data nyu-labeled PATH`"
    return fetch(LABELLED_URLS, path, nyu.BYTES, nyu.MD5, progress, advice=advice)


def fetch(
    urls: Sequence[str],
    path: str | Path,
    size: int,
    md5: str,
    progress: Progress | None = None,
    *,
    advice: str = "try again later, or get it by hand",
) -> Path:
    """Download one file from the first of `urls` (http or https) that gives `size` bytes of this MD5.

    What has come lies in `<path>.part`, from which the next source, or the next call, goes on. `path` appears once
    size and hash are right, and is checked if it is there already. Raises `UserError`, in one line, if it is another
    file, the disk has too little room, or no source gave the file (each one's failure, and `advice`).
    """
    path, part, failures = Path(path), Path(f"{path}.part"), []
    tell = progress or (lambda text: None)
    with locked(path.with_name(f".{path.name}.lock"), wait=False):
        if path.exists():
            if path.is_file() and _is_right(path, size, md5):
                return path
            raise UserError(f"{path}: is there, but not the file of {size} bytes and MD5 {md5}; move it away")
        if _length(part) >= size and not _is_right(part, size, md5):
            part.unlink()
            tell(f"{part}: was complete, but not the right file; deleted")
        missing = size - _length(part)
        if missing and (free := shutil.disk_usage(path.parent).free) < missing + DISK_RESERVE:
            raise UserError(f"{path}: {missing / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free; free some space")
        for url in urls:
            failure = _try_source(url, part, size, tell)
            if failure is None and not _is_right(part, size, md5):
                part.unlink()
                failure = "wrong MD5, what came was deleted"
            if failure is None:
                part.replace(path)
                return path
            failures.append(f"{'/'.join(url.split('/')[:3])}: {failure}")
            tell(f"{path.name}: {failures[-1]}")
        raise UserError(f"{path}: no source gave it ({'; '.join(failures)}); {advice}")


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_right(path: Path, size: int, md5: str) -> bool:
    return _length(path) == size and nyu.md5_of(path) == md5


def _try_source(url: str, part: Path, size: int, tell: Progress) -> str | None:
    """Bring `part` to `size` bytes; returns what went wrong, or None."""
    while (before := _length(part)) < size:
        try:
            _transfer(url, part, size, tell)
        except urllib.error.HTTPError as error:
            error.close()
            return f"HTTP {error.code} {_shortly(error)}"
        except (OSError, http.client.HTTPException, ValueError) as error:
            if _length(part) < min(before + GAIN, size):
                return _shortly(error)
            time.sleep(PAUSE)
    return None


def _shortly(error: Exception) -> str:
    """What an error says, on one line; a server may have written it."""
    reason = getattr(error, "reason", error)
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:100]


def _transfer(url: str, part: Path, size: int, tell: Progress) -> None:
    """One request for what `part` lacks; raises `ValueError` if the answer is not a piece of this file."""
    have = _length(part)
    headers = {"User-Agent": f"d3lib/{__version__}"} | ({"Range": f"bytes={have}-"} if have else {})
    with contextlib.closing(_opener().open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)) as answer:
        resumed = answer.status == 206
        if resumed and answer.headers.get("Content-Range") != f"bytes {have}-{size - 1}/{size}":
            raise ValueError("another file, or another part of it, than was asked for")
        position = have if resumed else 0  # 200: the server knows no ranges; what is there already is passed over
        if (offered := answer.headers.get("Content-Length")) is not None and int(offered) != size - position:
            raise ValueError(f"another file: {int(offered)} bytes where {size - position} should come")
        with _writing(part):
            file = part.open("ab")
        with file:
            for piece in _pieces(answer, position, size, lambda text: tell(f"{part.stem}: {text}")):
                with _writing(part):
                    file.write(piece[max(have - position, 0) :])
                position += len(piece)
            with _writing(part):
                file.flush()
                os.fsync(file.fileno())
        if answer.read1(1):
            part.unlink()
            raise ValueError(f"another file: more than {size} bytes")


def _pieces(answer: http.client.HTTPResponse, start: int, size: int, tell: Progress) -> Iterator[bytes]:
    """Bytes `start` to `size` of the file, as they come; raises `OSError` if they end early or trickle."""
    began = window = reported = time.monotonic()
    position = counted = start
    while position < size:
        piece = answer.read1(min(_PIECE, size - position))
        if not piece:
            raise ConnectionError(f"cut after {position} of {size} bytes")
        yield piece
        position += len(piece)
        now = time.monotonic()
        if now - window >= WINDOW:
            if position - counted < SLOWEST * (now - window):
                raise TimeoutError(f"less than {SLOWEST} bytes a second")
            window, counted = now, position
        if now - reported >= REPORT_EVERY or position == size:
            reported, rate = now, (position - start) / max(now - began, 1e-3)
            tell(f"{position / 1e9:.2f} of {size / 1e9:.2f} GB, {rate / 1e6:.1f} MB/s")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A failing disk is no failure of the source."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror or error}); what has come is kept") from error


def _opener() -> urllib.request.OpenerDirector:
    """Opens http and https alone, redirects included: urllib's own would also follow one to ftp, and open files."""
    request, opener = urllib.request, urllib.request.OpenerDirector()
    for handler in (
        request.ProxyHandler, request.UnknownHandler, request.HTTPHandler, request.HTTPSHandler,
        request.HTTPRedirectHandler, request.HTTPDefaultErrorHandler, request.HTTPErrorProcessor,
    ):  # fmt: skip
        opener.add_handler(handler())
    return opener

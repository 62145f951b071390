"""Files this project makes: written whole, carrying a format version and a digest, checked when read.

Every JSON artefact is `{"format": name, "version": int, "digest": sha256 of the content, "content": {...}}`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from d3lib.errors import UserError

if TYPE_CHECKING:
    import torch


PROJECT = Path(__file__).resolve().parent.parent


def runs_folder() -> Path:
    """Where all that a machine makes goes: `D3LIB_RUNS` if set, else `runs` in the clone, or in the current folder."""
    named = os.environ.get("D3LIB_RUNS")
    if named:
        return Path(named)
    return (PROJECT if (PROJECT / "pyproject.toml").is_file() else Path.cwd()) / "runs"


def data_folder() -> Path:
    """Where prepared data lie: `D3LIB_DATA` if set (a batch sets it for its notebooks), else `data` among the runs."""
    named = os.environ.get("D3LIB_DATA")
    return Path(named) if named else runs_folder() / "data"


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that becomes `path` if the block succeeds, and vanishes if it does not.

    The file is flushed to disk before the rename, so that a power cut leaves the old file or the new one, never half.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=f".part{path.suffix}")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:  # a full disk does not say of which file it speaks
        raise error if error.filename or not error.errno else OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    """The process's umask; mkstemp ignores it and makes files only their owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open `path` for writing so that it appears whole or not at all (text is UTF-8)."""
    with atomic_path(path) as temporary, temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file


@contextlib.contextmanager
def locked(path: str | Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock file `path`, which the system releases however the process ends.

    Two processes never hold it at once: the second waits, or with `wait=False` gets a `UserError`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(f"{path.parent}: another process is working there; wait for it to end") from error
        yield


def canonical_json(content: Any) -> str:
    """JSON with sorted keys and no spaces: equal contents give equal text on every platform.

    Raises `ValueError` for NaN and infinities; use `None` for a number that does not exist.
    """
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def digest_json(content: Any) -> str:
    """SHA-256 (hexadecimal) of `canonical_json(content)`."""
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def digest_file(path: str | Path) -> str:
    """SHA-256 (hexadecimal) of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and raw values, in name order: equal weights give equal digests."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(dtype=torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def finite(value: float) -> float | None:
    """`value` as a float for JSON, or `None` where it is NaN or infinite."""
    return float(value) if math.isfinite(value) else None


def wrap(content: Any, *, format: str, version: int = 1) -> dict[str, Any]:
    """`content` as an artefact: with the name and version of its format, and its digest."""
    return {"format": format, "version": version, "digest": digest_json(content), "content": content}


def unwrap(text: str, where: str, *, format: str, version: int = 1) -> Any:
    """The content of an artefact's text. Raises `UserError` naming `where` if it is damaged, or of another kind."""
    try:
        artefact = json.loads(text)
        found = (artefact["format"], artefact["version"])
        content, digest = artefact["content"], artefact["digest"]
        matches = found != (format, version) or digest_json(content) == digest
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: not a {format} (damaged?); delete it and make it again") from error
    if found != (format, version):
        raise UserError(f"{where}: is a {found[0]} version {found[1]}, expected {format} version {version}")
    if not matches:
        raise UserError(f"{where}: its digest does not match its content; delete it and make it again")
    return content


def write_json(path: str | Path, content: Any, *, format: str, version: int = 1) -> None:
    """Write `content` as an artefact of the named format (see the module's docstring)."""
    artefact = wrap(content, format=format, version=version)
    with atomic_write(path) as file:
        file.write(json.dumps(artefact, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: str | Path, *, format: str, version: int = 1) -> Any:
    """Read what `write_json` wrote. Raises `UserError` if it is missing, damaged, or of another format or version."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a {format}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a {format} (damaged?); delete it and make it again") from error
    return unwrap(text, str(path), format=format, version=version)


def save_weights(path: str | Path, weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write weights as safetensors, with `metadata` (strings), their digest and one of both in the header.

    Raises `UserError` where the `safetensors` package is missing (a bare machine can train without it), and `OSError`
    where the file cannot be written.
    """
    save_file = _safetensors().torch.save_file
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    about = {**metadata, "digest": digest_tensors(tensors)}
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=about | {"seal": _seal(about)})
        except Exception as error:  # the package's own kind, whatever the system said
            raise OSError(f"{path}: cannot be written ({error})") from error


def load_weights(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read weights and their metadata; nothing in the file is ever executed.

    Raises `UserError` if the file is missing, not safetensors, damaged, or its digest does not match.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    safe_open = _safetensors().safe_open
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # the package raises several kinds for a damaged header
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    if (metadata.get("digest"), metadata.get("seal")) != (digest_tensors(tensors), _seal(metadata)):
        raise UserError(f"{path}: damaged, or not written by d3lib (no matching digest in its header)")
    return tensors, metadata


def _seal(metadata: Mapping[str, str]) -> str:
    """The digest of all else that a weights file says of itself: a depth range of 90 for 10 is damage too."""
    return digest_json({name: text for name, text in metadata.items() if name != "seal"})


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise UserError("the safetensors package is needed for weights files: pip install safetensors") from error
    return safetensors

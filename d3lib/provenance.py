"""Where a number comes from: the commit, a digest of the code that made it, versions, machine and cost."""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
PACKAGES = ("torch", "torchvision", "numpy", "h5py")
TRAINING_CODE = ("d3lib.execution",)
"""The modules whose code decides a run's result, given its data and parameters."""
BESIDE_THE_POINT = (
    *("d3lib.artefacts", "d3lib.errors", "d3lib.experiments", "d3lib.provenance", "d3lib.records"),
    *("d3lib.data.folder", "d3lib.data.nyu", "d3lib.data.prepare", "d3lib.data.rooms"),
)
"""Imported by training code but without effect on a run's numbers (data carry a digest of their own)."""


@functools.cache
def code_digest(*modules: str, without: tuple[str, ...] = BESIDE_THE_POINT) -> str:
    """SHA-256 over the named `d3lib` modules and every `d3lib` module they import, however indirectly.

    What the interpreter ignores is ignored: comments, docstrings and layout change nothing, so editing them
    re-runs nothing; editing a loss changes the digest of `d3lib.training` but not of `d3lib.data.rooms`.
    Imports of `without` are not followed.
    """
    digest = hashlib.sha256()
    for path in sorted(_closure(modules, without)):
        digest.update(f"{path.relative_to(PACKAGE).as_posix()}\n".encode())
        _feed(digest, ast.parse(path.read_text(encoding="utf-8")))
    return digest.hexdigest()


def _closure(modules: tuple[str, ...], without: tuple[str, ...]) -> set[Path]:
    """The source files of `modules` and of all the `d3lib` modules they import, but for `without`."""
    found: set[Path] = set()
    queue = [path for module in modules for path in _module_files(module)]
    while queue:
        path = queue.pop()
        if path in found:
            continue
        found.add(path)
        package = ".".join(["d3lib", *path.relative_to(PACKAGE).parent.parts])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = resolve_name("." * node.level + (node.module or ""), package)
                names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
            else:
                continue
            wanted = [name for name in names if name.startswith("d3lib.") and not name.startswith(without)]
            queue += [path for name in wanted for path in _module_files(name)]
    return found


def _module_files(module: str) -> list[Path]:
    """The files that importing `module` reads below the package's own `__init__`; empty if it is no module."""
    base = PACKAGE.joinpath(*module.split(".")[1:])
    if base.is_dir():
        return [base / "__init__.py"]
    return [base.with_suffix(".py")] if base.with_suffix(".py").is_file() else []


def _feed(digest: Any, node: Any) -> None:
    """Feed what an AST node means, in a form that Python 3.11 to 3.13 agree on (empty fields left out)."""
    if isinstance(node, ast.AST):
        digest.update(type(node).__name__.encode())
        for name, value in ast.iter_fields(node):
            if name == "body" and isinstance(value, list) and value and _is_docstring(value[0]):
                value = value[1:]
            if value not in (None, []) and name not in ("ctx", "kind", "type_comment", "type_params"):
                digest.update(f"({name}=".encode())
                _feed(digest, value)
                digest.update(b")")
    elif isinstance(node, list):
        for item in node:
            _feed(digest, item)
            digest.update(b",")
    else:
        digest.update(f"{type(node).__name__}:{node!r}".encode())


def _is_docstring(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def commit() -> dict[str, Any]:
    """The repository's commit and whether the library differs from it; `None` where there is no repository."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    changes = git("status", "--porcelain", "--", ".")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def peak_memory(device: str) -> int:
    """Peak memory in bytes: of the GPU on CUDA, of this process elsewhere."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    try:  # of this program alone: what getrusage says begins with the peak of the process that started it
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # not on Linux
        pass
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, kibibytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name(device: str) -> str:
    """The device in words: the GPU's name, or the processor's."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def collect(*modules: str, device: str = "cpu") -> dict[str, Any]:
    """Everything about code and machine that a record needs; `modules` are the ones the result depends on."""
    import torch

    from d3lib import __version__

    return {
        **commit(),
        "d3lib": __version__,
        "code_digest": code_digest(*modules),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in PACKAGES if _installed(name)},
        "platform": platform.platform(),
        "device": device_name(device),
        "device_kind": device.split(":")[0],
        "vectors": torch.backends.cpu.get_cpu_capability(),  # a sum's rounding depends on how many it takes at once
        "threads": torch.get_num_threads(),
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True

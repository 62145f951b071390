"""Building the book as `make book` does, for the tests that look at its pages."""

import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
EXT = ROOT / "book" / "_ext"
TOC = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
PAGES = [TOC["root"], *(chapter["file"] for part in TOC["parts"] for chapter in part["chapters"])]


def build_book(folder: Path, address: str | None = None) -> Path:
    """Build the book into `folder` as `make book` does; or, to see its buttons, with an address and without outputs."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    if address:
        config["repository"]["url"], config["execute"]["execute_notebooks"] = address, "off"
    config["sphinx"]["local_extensions"] = {"d3book": str(EXT)}
    (folder / "_config.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [
        str(Path(sys.executable).with_name("jupyter-book")),
        "build",
        "book",
        "--config",
        str(folder / "_config.yml"),
    ]
    command += ["--path-output", str(folder), *([] if address else ["-W", "-n", "--keep-going"])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "[IPKernelApp]" not in done.stdout + done.stderr, "a kernel's warning for each page"
    return folder / "_build" / "html"

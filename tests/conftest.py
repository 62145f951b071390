"""What several test modules share."""

import os
import signal
from pathlib import Path

import pytest

from d3lib.artefacts import locked

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background a shell says so, and every child would too
    signal.signal(signal.SIGINT, signal.default_int_handler)

for name in ("D3LIB_COMPILE", "D3LIB_KEEP_MEMORY"):  # tests of them set them themselves
    os.environ.pop(name, None)


def pytest_collection_modifyitems(config, items):
    """Leave out what runs on request: the drill on SLURM, which starts daemons, and what takes long."""
    for marker in ("slurm", "drill", "study", "colab"):
        asked = [item for item in items if item.get_closest_marker(marker)]
        if asked and marker not in config.option.markexpr:
            config.hook.pytest_deselected(items=asked)
            items[:] = [item for item in items if item not in asked]
    # the last: by then one worker has built the book, and all can look at its pages
    items.sort(key=lambda item: item.get_closest_marker("browser") is not None)


@pytest.fixture(scope="session")
def absent():
    """Call with one line when what a test needs is not on this machine: skips, or fails where D3LIB_NO_SKIP=1."""

    def leave(line):
        pytest.fail(line, pytrace=False) if os.environ.get("D3LIB_NO_SKIP") == "1" else pytest.skip(line)

    return leave


@pytest.fixture(scope="session")
def test_data(absent):
    """The folder of real RGB-D data (D3LIB_TEST_DATA), which is no part of the project."""
    folder = os.environ.get("D3LIB_TEST_DATA", "")
    if not Path(folder).is_dir() or not folder:
        absent(f"no real data: D3LIB_TEST_DATA is {folder or 'not set'}")
    return Path(folder)


@pytest.fixture(scope="session")
def html(tmp_path_factory):
    """Built once for all workers: two builds at once would write the same cache of executed pages."""
    from building import build_book

    own = tmp_path_factory.getbasetemp()
    shared = own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own
    pages = shared / "book" / "_build" / "html"
    with locked(shared / "book.lock"):
        if not (shared / "book-built").is_file():
            if (shared / "book").is_dir():
                pytest.fail("the book could not be built: see the first test that asked for it", pytrace=False)
            (shared / "book").mkdir()
            build_book(shared / "book")
            (shared / "book-built").touch()
    return pages

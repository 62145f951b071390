"""What several test modules share."""

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(config, items):
    """Leave out the drill on SLURM, which installs packages and starts daemons, unless it is asked for by name."""
    drills = [item for item in items if item.get_closest_marker("slurm")]
    if drills and "slurm" not in config.option.markexpr:
        config.hook.pytest_deselected(items=drills)
        items[:] = [item for item in items if item not in drills]


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

"""The code digest notices code, and only code."""

import shutil
from pathlib import Path

import pytest

from d3lib import provenance
from d3lib.data.prepare import BESIDE_THE_PICTURES
from d3lib.provenance import TRAINING_CODE, code_digest


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the library that a test may edit; digests are taken of it."""
    copy = tmp_path / "d3lib"
    shutil.copytree(provenance.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "PACKAGE", copy)
    code_digest.cache_clear()
    yield copy
    code_digest.cache_clear()


def edited(package: Path, file: str, old: str, new: str) -> tuple[str, str]:
    """Digests of training code and of the renderer after an edit."""
    path = package / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    code_digest.cache_clear()
    return code_digest(*TRAINING_CODE), code_digest("d3lib.data.rooms", without=BESIDE_THE_PICTURES)


def before() -> tuple[str, str]:
    return code_digest(*TRAINING_CODE), code_digest("d3lib.data.rooms", without=BESIDE_THE_PICTURES)


def test_comments_docstrings_and_layout_change_nothing(package):
    old = before()
    text = (package / "losses.py").read_text(encoding="utf-8")
    (package / "losses.py").write_text("# a comment\n\n\n" + text.replace("Mean absolute", "The mean absolute"))
    code_digest.cache_clear()
    assert before() == old


def test_a_changed_loss_changes_training_but_not_the_rooms(package):
    training, rooms = before()
    new_training, new_rooms = edited(package, "losses.py", "LOG_MIN = 1e-3", "LOG_MIN = 2e-3")
    assert new_training != training
    assert new_rooms == rooms


def test_a_changed_renderer_changes_the_rooms_but_not_training(package):
    training, rooms = before()
    folder = package / "data" / "rooms"
    for path in set(folder.glob("*.py")) - {folder / "recording.py"}:  # which renders nothing by itself
        path.write_text(path.read_text(encoding="utf-8") + "\nADDED = 1\n", encoding="utf-8")
        code_digest.cache_clear()
        assert code_digest("d3lib.data.rooms", without=BESIDE_THE_PICTURES) != rooms, path.name
        rooms = code_digest("d3lib.data.rooms", without=BESIDE_THE_PICTURES)
    assert code_digest(*TRAINING_CODE) == training


def test_a_changed_figure_re_runs_no_training(package):
    training, _ = before()
    assert edited(package, "figures.py", "import numpy as np", "import numpy as np\nADDED = 1")[0] == training

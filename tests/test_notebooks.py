"""Every page that takes a budget runs through papermill at smoke, as the batch runs it.

The others run with their own parameters' values when the book is built (tests/building.py).
"""

import json

import jupytext
import pytest
from building import PAGES

from d3lib.artefacts import PROJECT
from d3lib.batch import declared_parameters, execute_notebook

BOOK = PROJECT / "book"
NOTEBOOKS = [page for page in PAGES if "{code-cell}" in (BOOK / f"{page}.md").read_text(encoding="utf-8")]
BUDGETED = [page for page in NOTEBOOKS if "budget" in declared_parameters(jupytext.read(BOOK / f"{page}.md"))]


def test_the_book_has_its_chapters():
    assert {"intro", "data/rooms", "losses/l1_l2", "network/d3net", "experiments/results"} <= set(NOTEBOOKS)


@pytest.mark.slow
@pytest.mark.xdist_group("book")  # beside the book's own build, which executes the same pages
@pytest.mark.parametrize("page", BUDGETED)
def test_a_page_runs_through_papermill(page, tmp_path):
    source, target = BOOK / f"{page}.md", tmp_path / "page.ipynb"
    execute_notebook(source, target, {"budget": "smoke"})
    cells = [cell for cell in json.loads(target.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells if "".join(cell["source"]).strip())


@pytest.mark.slow
def test_figure_4_bears_records_whose_pictures_did_not_come_with_the_book(tmp_path, monkeypatch):
    monkeypatch.setenv("D3LIB_RUNS", str(tmp_path / "runs"))
    execute_notebook(BOOK / "experiments" / "fig4.md", tmp_path / "page.ipynb", {"budget": "laptop"})
    assert "no pictures" in (tmp_path / "page.ipynb").read_text(encoding="utf-8")

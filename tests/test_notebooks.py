"""Every page that takes a budget runs at smoke, as the batch runs it: through papermill, where its own is another.

All pages run with their own parameters' values when the book is built (tests/building.py).
"""

import json
import re

import pytest
from building import PAGES

from d3lib.artefacts import PROJECT
from d3lib.batch import execute_notebook

BOOK = PROJECT / "book"
TEXTS = {page: (BOOK / f"{page}.md").read_text(encoding="utf-8") for page in PAGES}
NOTEBOOKS = [page for page, text in TEXTS.items() if "{code-cell}" in text]
OTHERS = [page for page in NOTEBOOKS if re.search(r'^budget(: str)? = "(?!smoke")', TEXTS[page], re.MULTILINE)]


def test_the_book_has_its_chapters():
    assert {"intro", "data/rooms", "losses/l1_l2", "network/d3net", "experiments/results"} <= set(NOTEBOOKS)


@pytest.mark.slow
@pytest.mark.xdist_group("book")  # beside the book's own build, which executes the same pages
@pytest.mark.parametrize("page", OTHERS)
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

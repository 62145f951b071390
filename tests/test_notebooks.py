"""Every page that takes a budget runs at smoke, as the batch runs it: through papermill, where its own is another.

All pages run with their own parameters' values when the book is built (tests/building.py).
"""

import dataclasses
import json
import re
import subprocess
import sys
import typing

import jupytext
import pytest
from building import PAGES

from d3lib.artefacts import PROJECT
from d3lib.errors import UserError
from d3lib.experiments import Run, plain_kind
from d3lib.notebooks import check_parameters, declared_parameters, execute_notebook, read_parameters

BOOK = PROJECT / "book"
TEXTS = {page: (BOOK / f"{page}.md").read_text(encoding="utf-8") for page in PAGES}
NOTEBOOKS = [page for page, text in TEXTS.items() if "{code-cell}" in text]
OTHERS = [page for page in NOTEBOOKS if re.search(r'^budget(: str)? = "(?!smoke")', TEXTS[page], re.MULTILINE)]
PAGE = """---
kernelspec:
  name: python3
  display_name: Python 3
  language: python
---

```{code-cell} ipython3
:tags: [parameters]
count = 2
rate: float = 0.5
name: str | None = None
```

```{code-cell} ipython3
print("count is", count)
assert count < 5, "too many"
```
"""


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


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def test_parameters_reach_the_notebook(page, tmp_path):
    target = tmp_path / "out.ipynb"
    execute_notebook(page, target, {"count": 3})
    outputs = [out["text"] for cell in json.loads(target.read_text())["cells"] for out in cell.get("outputs", [])]
    assert any("count is 3" in "".join(text) for text in outputs)


def test_a_cell_that_raises_is_one_line_and_leaves_the_failed_notebook(page, tmp_path):
    target = tmp_path / "out.ipynb"
    with pytest.raises(UserError, match="AssertionError: too many"):
        execute_notebook(page, target, {"count": 9})
    assert not target.exists()
    assert target.with_suffix(".failed.ipynb").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.failed.ipynb", "page.md"]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"cout": 3}, "no parameter 'cout'; it has count, rate, name"),
        ({"count": "3"}, "count must be int, not '3'"),
        ({"count": True}, "count must be int"),
        ({"count": 1.5}, "count must be int"),
        ({"rate": "fast"}, "rate must be float"),
        ({"name": 3}, "name must be str or None"),
    ],
)
def test_a_misspelt_or_mistyped_parameter_is_refused_before_anything_runs(page, parameters, words):
    with pytest.raises(UserError, match=words):
        check_parameters(jupytext.read(page), parameters, "page.md")


def test_whole_numbers_pass_for_floats_and_none_where_it_is_declared(page):
    check_parameters(jupytext.read(page), {"rate": 1, "name": None}, "page.md")
    assert declared_parameters(jupytext.read(page))["name"] == ("str", "None")


def test_parameters_come_from_a_file_an_object_or_pairs(tmp_path):
    path = tmp_path / "p.json"
    path.write_text('{"a": 1}')
    assert read_parameters(str(path), [("b", "x")]) == {"a": 1, "b": "x"}
    assert read_parameters('{"a": 1}', [("a", "2")]) == {"a": 2}
    for text in ("[1]", "{", "missing.json"):
        if text == "[1]":
            path.write_text(text)
            text = str(path)
        with pytest.raises(UserError):
            read_parameters(text, [])


def test_the_train_notebook_declares_exactly_the_fields_of_a_run():
    declared = declared_parameters(jupytext.read(PROJECT / "book/experiments/train.md"))
    kinds = {name: plain_kind(kind).__name__ for name, kind in typing.get_type_hints(Run).items()}
    assert {name: kind[0] for name, kind in declared.items()} == kinds
    defaults = {field.name: field.default for field in dataclasses.fields(Run)}
    assert defaults.keys() == declared.keys()


def test_the_process_that_waits_for_a_notebook_does_not_load_torch(page, tmp_path):
    script = f"""
import sys
from d3lib.cli import main
assert main(["notebook", {str(page)!r}, {str(tmp_path / "out.ipynb")!r}, "-p", "count", "1"]) == 0
assert "papermill" in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)

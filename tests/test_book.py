"""The built book: its links, its status page, its Colab notebooks, its execution cache."""

import functools
import importlib.util
import json
import re
import shutil
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from building import EXT, ROOT, build_book

ADDRESS = "https://github.com/someone/d3-book"  # pretended, so that repository and Colab buttons exist
# One worker builds the book once, and the others do something else meanwhile.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("book")]


def load(name):
    """A module of the book's extension folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, EXT / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


colab = load("colab")
PAGES = list(colab.Book().pages)


@pytest.fixture(scope="session")
def html_with_address(tmp_path_factory):
    return build_book(tmp_path_factory.mktemp("book-with-address"), ADDRESS)


@functools.lru_cache(maxsize=1)  # of dozens at once the garbage collector takes seconds
def parsed(path: Path):
    from bs4 import BeautifulSoup

    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@functools.cache
def references(html: Path):
    """(page, href) of every link, picture, script and style sheet; and the ids of each page."""
    links, ids = [], {}
    for path in sorted(html.rglob("*.html")):
        if "_static" in path.parts:
            continue
        soup = parsed(path)
        ids[path] = {tag["id"] for tag in soup.find_all(id=True)}
        links += [(path, tag[key]) for key in ("href", "src") for tag in soup.find_all(**{key: True})]
    return links, ids


def test_every_internal_link_and_anchor_leads_somewhere(html):
    links, ids = references(html)
    assert len(ids) >= len(PAGES)
    dead = []
    for page, href in links:
        parts = urlsplit(href)
        if parts.scheme or parts.netloc or href in ("#", ""):
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        if not target.exists():
            dead.append((page.name, href))
        elif parts.fragment and target in ids and unquote(parts.fragment) not in ids[target]:
            dead.append((page.name, href))
    assert not dead


def test_scripts_styles_and_pictures_come_with_the_book(html):
    links, _ = references(html)
    foreign = [h for _, h in links if h.startswith(("http", "//")) and re.search(r"\.(js|css|woff2?|png|svg)(\?|$)", h)]
    assert not foreign


def test_no_sentence_or_table_shows_an_object_as_python_prints_it(html):
    shown = []
    for page in PAGES:
        text = (html / f"{page}.html").read_text(encoding="utf-8")
        text = unescape(
            re.sub(r"<[^>]+>", "", re.sub(r"<(pre|code|script|style)\b.*?</\1>", "", text, flags=re.DOTALL))
        )
        found = re.finditer(r"\b[A-Z]\w+\(\w+=|<[\w.]+ object", text)
        shown += [(page, text[match.start() : match.start() + 60]) for match in found]
    assert not shown


def test_the_status_page_gives_the_time_and_the_memory_of_every_page_that_executes(html):
    tables = parsed(html / "status.html").select("table")
    head, *rows = next(
        [[cell.get_text(strip=True) for cell in row.select("th, td")] for row in table.select("tr")]
        for table in tables
        if "Memory (MB)" in table.get_text()
    )
    assert not [row for row in rows if "-" in row[1:]], "a page was executed without a note of its time or memory"
    found = {row[0]: (float(row[head.index("Seconds")]), float(row[head.index("Memory (MB)")])) for row in rows}
    assert found.keys() == {page for page in PAGES if "{code-cell}" in (ROOT / "book" / f"{page}.md").read_text()}
    assert all(0 < seconds < 300 for seconds, _ in found.values()), found
    # every page imports torch, which takes 200 MB alone; none needs more than a small laptop has
    assert all(200 < megabytes < 6000 for _, megabytes in found.values()), found


def test_without_a_repository_address_no_page_offers_colab(html):
    assert yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"] == "" or pytest.skip("it has one")
    assert not [href for _, href in references(html)[0] if "colab.research.google.com" in href]


def test_every_colab_link_of_the_built_pages_leads_to_a_file_that_exists(html_with_address):
    prefix = ADDRESS.replace("https://github.com", "https://colab.research.google.com/github") + "/blob/main/"
    links = [(page, href) for page, href in references(html_with_address)[0] if "colab.research.google.com" in href]
    for _, href in links:
        assert href.startswith(prefix) and (ROOT / href.removeprefix(prefix)).is_file(), href
    with_button = {page.relative_to(html_with_address).with_suffix("").as_posix() for page, _ in links}
    assert with_button == set(colab.notebooks(colab.Book()))


def test_the_notebooks_for_colab_are_the_ones_the_pages_give():
    made = colab.notebooks(colab.Book())
    folder = ROOT / "book" / "colab"
    kept = {path.relative_to(folder).with_suffix("").as_posix(): path.read_text() for path in folder.rglob("*.ipynb")}
    assert kept.keys() == made.keys(), "run: make colab"
    assert [page for page in made if made[page] != kept[page]] == [], "run: make colab"


@pytest.mark.parametrize("address", ["", ADDRESS])
def test_a_notebook_for_colab_keeps_its_parameters_and_shows_no_raw_markup(address):
    import nbformat

    book = colab.Book(repository=address)
    for page, text in colab.notebooks(book).items():
        notebook = nbformat.reads(text, as_version=4)
        nbformat.validate(notebook)
        assert notebook.metadata.accelerator == "GPU" and notebook.metadata.kernelspec.name == "python3"
        first = notebook.cells[0].source
        assert "torch" not in "".join(line for line in first.splitlines() if "install" in line and line[0] != "#")
        assert not address or f"--branch v{book.version} {ADDRESS}" in first and "--no-deps" in first
        source = (ROOT / "book" / f"{page}.md").read_text(encoding="utf-8")
        tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        assert len(tagged) == len(re.findall(r"^(?::tags:|tags:) \[.*\bparameters\b.*\]", source, re.MULTILINE))
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                prose = re.sub(r"```.*?```", "", cell.source, flags=re.DOTALL)
                assert not re.search(r"\{[\w:-]+\}`|^:::|^\(\S+\)=", prose, re.MULTILINE), (page, cell.source)


def test_figures_and_equations_have_the_same_numbers_in_colab_as_in_the_book(html):
    for label, target in colab.Book().targets.items():
        soup = parsed(html / f"{target.page}.html")
        if target.kind in ("figure", "table") and (element := soup.find(id=label)):
            assert element.find(class_="caption-number").text.strip() == target.text, label
        elif target.kind == "equation":
            element = soup.find(id=f"equation-{label}")
            assert element.find(class_="eqno").text.strip("¶# \n") == target.text, label


PAGE = """# Title

```{note}
Careful with $x$ in {eq}`eq-one`.
```

$$
x = 1
$$ (eq-one)

:::{admonition} Look
:class: tip
See {cite:t}`huber1964robust` and {cite}`eigen2014depth,eigen2015predicting`.
:::

:::{dropdown} Solution
```python
x = {"a": 1}
```
:::

```{code-cell} ipython3
:mystnb:
:  figure:
:    name: fig-one
:    caption: "What you see."
x
```

{numref}`fig-one` shows it.

```{literalinclude} ../d3lib/errors.py
:pyobject: UserError
```

```{code-cell} ipython3
:tags: [parameters]
x = 1
```

:::{exercise} Try
Read [](page.md).
:::
"""


@pytest.fixture
def small_book(tmp_path):
    for name in ("d3lib/__init__.py", "d3lib/errors.py", "book/references.bib", "_config.yml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "book" / "_toc.yml").write_text("{format: jb-book, root: page}")
    (tmp_path / "book" / "page.md").write_text("---\nkernelspec: {name: python3, display_name: Python 3}\n---\n" + PAGE)
    return tmp_path


def test_directives_become_plain_markdown_in_colab(small_book):
    cells = json.loads(colab.notebook(colab.Book(small_book, ADDRESS), "page"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells)
    for expected in (
        "> **Note**\n>\n> Careful with $x$ in (1).",
        "$$\nx = 1 \\tag{1}\n$$",
        "> See [Huber (1964)](https://doi.org/10.1214/aoms/1177703732) and ([Eigen et al., 2014](",
        "; [Eigen and Fergus, 2015](https://doi.org/10.1109/ICCV.2015.304)).",
        '<details><summary>Solution</summary>\n\n```python\nx = {"a": 1}\n```\n\n</details>',
        "```python\n# d3lib/errors.py, UserError\nclass UserError(Exception):",
        "**Figure 1.** What you see.",
        "Figure 1 shows it.",
        "> **Exercise 1: Try**\n>\n> Read [Title](https://someone.github.io/d3-book/page.html).",
    ):
        assert expected in text
    assert [cell["metadata"] for cell in cells if cell["cell_type"] == "code"] == [{}, {}, {"tags": ["parameters"]}]


def test_markup_that_colab_cannot_show_is_an_error_and_names_the_page(small_book):
    (small_book / "book" / "page.md").write_text("# Title\n\n```{mystery}\n```\n")
    with pytest.raises(ValueError, match=r"book/page\.md: directive \{mystery\}"):
        colab.notebook(colab.Book(small_book), "page")


def test_the_pages_execute_again_after_an_edit_of_the_library_or_a_new_record(tmp_path):
    d3book = load("d3book")
    library = tmp_path / "d3lib" / "losses.py"
    record = tmp_path / "runs" / "smoke" / "l1" / "record.json"
    for path, text in {tmp_path / "constraints.txt": "", library: "a = 1", record: "{}"}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    seen = [d3book.digest(tmp_path, tmp_path / "runs")]
    (record.parent / "notes.txt").write_text("not an input")
    assert d3book.digest(tmp_path, tmp_path / "runs") == seen[0]
    for path in (library, record, tmp_path / "book" / "records" / "study.jsonl"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("b = 2")
        seen.append(d3book.digest(tmp_path, tmp_path / "runs"))
    assert len(set(seen)) == len(seen)

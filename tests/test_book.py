"""The built book, opened in Chromium; its Colab notebooks; its execution cache."""

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from d3lib.artefacts import locked

ROOT = Path(__file__).resolve().parents[1]
EXT = ROOT / "book" / "_ext"
ADDRESS = "https://github.com/someone/d3-book"  # pretended, so that repository and Colab buttons exist
VIEWS = {
    f"{size}-{theme}": (width, theme)
    for size, width in {"desktop": 1400, "phone": 390}.items()
    for theme in ("light", "dark")
}
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


def build(folder: Path, address: str | None = None) -> Path:
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
    return folder / "_build" / "html"


@pytest.fixture(scope="session")
def html(tmp_path_factory):
    """Built once for all workers: two builds at once would write the same cache of executed pages."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own
    pages = shared / "book" / "_build" / "html"
    with locked(shared / "book.lock"):
        if not (shared / "book-built").is_file():
            (shared / "book").mkdir(exist_ok=True)
            build(shared / "book")
            (shared / "book-built").touch()
    return pages


@pytest.fixture(scope="session")
def html_with_address(tmp_path_factory):
    return build(tmp_path_factory.mktemp("book-with-address"), ADDRESS)


@pytest.fixture(scope="session")
def server(html):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=html)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture(scope="session")
def browser(absent):
    names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        absent("no Chromium on the PATH: the book was not opened in a browser")
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=path, args=[*flags, "--disable-component-update", "--disable-sync"]
        )
        yield running
        running.close()


def open_page(browser, address, width, theme):
    """Open a page; returns it once it is still, and the list of what went wrong on the way."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)  # a first visit
    page, faults = context.new_page(), []
    own = address[: address.index("/", 8)]  # http://host:port, or file://
    page.on("console", lambda m: faults.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(f"script: {error}"))
    page.on("requestfailed", lambda request: faults.append(f"failed: {request.url}"))
    page.on("response", lambda r: faults.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    page.on(
        "request",
        lambda r: None if r.url.startswith((own, "data:", "blob:")) else faults.append(f"leaves the book: {r.url}"),
    )
    page.goto(address, wait_until="load")
    page.evaluate("async () => { if (window.MathJax?.startup) await MathJax.startup.promise }")
    show(page, width, theme)
    return page, faults


def show(page, width, theme):
    """Let a page be as wide as asked, and as still as it will be in the theme that the reader's system asks for."""
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=theme)
    page.wait_for_function("theme => document.documentElement.dataset.theme == theme", arg=theme)
    # Buttons fade to the colours of a theme: half-way, their contrast is of neither.
    page.evaluate("document.getAnimations().forEach(each => each instanceof CSSTransition && each.finish())")


LOOK = """() => {
  const main = document.querySelector("main");
  const images = [...main.querySelectorAll("img")];
  images.forEach(image => { image.loading = "eager" });
  const root = document.documentElement;
  return {
    overflow: root.scrollWidth - root.clientWidth,
    wide: [...main.querySelectorAll("*")].filter(e => e.getBoundingClientRect().right > root.clientWidth + 1)
      .slice(0, 3).map(e => e.outerHTML.slice(0, 120)),
    maths: main.querySelectorAll(".math").length,
    typeset: main.querySelectorAll(".math mjx-container").length,
    errors: [...document.querySelectorAll("mjx-merror, .math .noError")].map(e => e.textContent),
    broken: images.filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.src),
    mute: images.filter(i => !i.alt.trim() || /^_images|\\.(png|svg|jpe?g)$/.test(i.alt)).map(i => i.src),
    raw: main.innerText.match(/\\{(cite|eq|numref|ref|doc|glue)[:\\w]*\\}`?.*/g),
  }
}"""


WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]  # levels A and AA
AXE = """async (rules) => (await axe.run(document, {runOnly: rules, preload: false})).violations
  .filter(v => ["serious", "critical"].includes(v.impact))
  .flatMap(v => v.nodes.map(n => `${v.impact} ${v.id}: ${n.html.slice(0, 160)} ${n.failureSummary.slice(0, 300)}`))"""


@functools.cache
def axe_core() -> str:
    """The script of axe-core, which looks for what keeps people from reading a page."""
    return (Path(importlib.util.find_spec("axe_playwright_python").origin).parent / "axe.min.js").read_text("utf-8")


@pytest.mark.browser
@pytest.mark.parametrize("page", [*PAGES, "search", "genindex"])
def test_a_page_shows_whole_at_every_width_and_in_both_themes_and_asks_nothing_of_the_network(browser, server, page):
    opened, faults = open_page(browser, f"{server}/{page}.html", 1400, "light")
    for view, (width, theme) in VIEWS.items():
        show(opened, width, theme)
        look = opened.evaluate(LOOK)
        assert look["overflow"] <= 0, (view, look["wide"])
        assert look["typeset"] >= look["maths"] and not look["errors"], (view, look)
        assert not look["broken"] and not look["mute"], (view, look["broken"], look["mute"])
        assert not look["raw"], (view, look["raw"])
        if width > 1000:  # only colours differ between the themes, and nothing that axe looks at between the widths
            opened.evaluate(axe_core())
            barriers = opened.evaluate(AXE, ["color-contrast"] if theme == "dark" else WCAG)
            assert not barriers, (view, barriers[:5])
        assert not faults, (view, faults)
    opened.context.close()


PRINTED = """() => {
  const style = (selector, name) => getComputedStyle(document.querySelector(selector))[name];
  const shown = [...document.querySelectorAll(".bd-header-article, .bd-sidebar-primary, .copybtn, .prev-next-area")]
    .filter(e => e.getClientRects().length);
  const wide = [...document.querySelectorAll("main pre, main table, main img")]
    .filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth);
  return {
    text: style("main p", "color"), behind: style("body", "backgroundColor"),
    shown: shown.map(e => e.className), wide: wide.map(e => e.outerHTML.slice(0, 120)),
  };
}"""


@pytest.mark.browser
@pytest.mark.parametrize("page", ["losses/huber", "experiments/conclusions"])
def test_a_page_is_printed_black_on_white_whole_and_without_buttons(browser, server, page):
    opened, faults = open_page(browser, f"{server}/{page}.html", 794, "dark")  # A4 at 96 pixels an inch
    opened.emulate_media(media="print", color_scheme="dark")
    look = opened.evaluate(PRINTED)
    assert not faults and (look["text"], look["behind"]) == ("rgb(0, 0, 0)", "rgb(255, 255, 255)")
    assert not look["shown"] and not look["wide"], look
    assert opened.pdf(format="A4").startswith(b"%PDF")
    opened.context.close()


@pytest.mark.browser
def test_the_book_reads_from_disk_without_a_server(browser, html):
    opened, faults = open_page(browser, f"file://{html}/{PAGES[0]}.html", 1400, "light")
    look = opened.evaluate(LOOK)
    assert not faults and look["typeset"] >= look["maths"] > 0 and not look["broken"]
    opened.context.close()


@pytest.mark.browser
def test_the_search_finds_a_word_of_the_book(browser, server):
    opened, faults = open_page(browser, f"{server}/search.html?q=metres", 1400, "light")
    opened.wait_for_selector("#search-results li a", timeout=10_000)
    assert not faults
    opened.context.close()


def references(html: Path):
    """(page, href) of every link, picture, script and style sheet; and the ids of each page."""
    from bs4 import BeautifulSoup

    links, ids = [], {}
    for path in sorted(html.rglob("*.html")):
        if "_static" in path.parts:
            continue
        soup = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
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


def test_the_status_page_gives_the_time_and_the_memory_of_every_page_that_executes(html):
    from bs4 import BeautifulSoup

    tables = BeautifulSoup((html / "status.html").read_text(encoding="utf-8"), "html.parser").select("table")
    head, *rows = next(
        [[cell.get_text(strip=True) for cell in row.select("th, td")] for row in table.select("tr")]
        for table in tables
        if "Memory (MB)" in table.get_text()
    )
    found = {row[0]: (float(row[head.index("Run Time (s)")]), float(row[head.index("Memory (MB)")])) for row in rows}
    assert found.keys() == {page for page in PAGES if "{code-cell}" in (ROOT / "book" / f"{page}.md").read_text()}
    # a kernel that has imported torch takes some hundred megabytes; no page needs more than a small laptop has
    assert all(0 < seconds < 300 and 100 < megabytes < 6000 for seconds, megabytes in found.values()), found


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

    for page, text in colab.notebooks(colab.Book(repository=address)).items():
        notebook = nbformat.reads(text, as_version=4)
        nbformat.validate(notebook)
        assert notebook.metadata.accelerator == "GPU" and notebook.metadata.kernelspec.name == "python3"
        first = notebook.cells[0].source
        assert "torch" not in "".join(line for line in first.splitlines() if "install" in line and line[0] != "#")
        assert not address or f"--branch v{colab.Book().version} {ADDRESS}" in first and "--no-deps" in first
        source = (ROOT / "book" / f"{page}.md").read_text(encoding="utf-8")
        tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        assert len(tagged) == len(re.findall(r"^(?::tags:|tags:) \[.*\bparameters\b.*\]", source, re.MULTILINE))
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                prose = re.sub(r"```.*?```", "", cell.source, flags=re.DOTALL)
                assert not re.search(r"\{[\w:-]+\}`|^:::|^\(\S+\)=", prose, re.MULTILINE), (page, cell.source)


def test_figures_and_equations_have_the_same_numbers_in_colab_as_in_the_book(html):
    from bs4 import BeautifulSoup

    for label, target in colab.Book().targets.items():
        soup = BeautifulSoup((html / f"{target.page}.html").read_text(encoding="utf-8"), "html.parser")
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

"""Sphinx extension of this book: a cache that notices edits, maths without a network, Colab links, exercises."""

import hashlib
import importlib.util
import logging
import os
import shutil
import time
from pathlib import Path

import yaml
from docutils import nodes
from jupyter_cache import get_cache
from jupyter_cache.executors import load_executor
from myst_nb.ext import execution_tables
from myst_nb.sphinx_ import NbMetadataCollector
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.fileutil import copy_asset

ROOT = Path(__file__).resolve().parents[2]
RUNS = Path(os.environ.get("D3LIB_RUNS") or ROOT / "runs").resolve()
CACHES = RUNS / "cache" / "jupyter"
UNUSED_S = 24 * 3600  # caches of other digests go after a day: another build may be reading one now


def inputs(root: Path = ROOT, runs: Path = RUNS) -> list[Path]:
    """The files besides the page itself that what is kept of it depends on: the library, the pins, the records."""
    library = (path for path in (root / "d3lib").rglob("*") if "__pycache__" not in path.parts)
    committed = (root / "book" / "records").rglob("*")
    made_here = runs.glob("*/**/record.json")
    notes = root / "book" / "_ext" / "peak.py"
    paths = {root / "constraints.txt", notes, *library, *committed, *made_here}
    return sorted(path for path in paths if path.is_file())


def digest(root: Path = ROOT, runs: Path = RUNS) -> str:
    """First 16 hexadecimal digits of a SHA-256 over the names and contents of `inputs`."""
    total = hashlib.sha256()
    for path in inputs(root, runs):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        name = path.relative_to(runs if path.is_relative_to(runs) else root)
        total.update(f"{name.as_posix()} {content}\n".encode())
    return total.hexdigest()[:16]


def choose_cache(app: Sphinx, config) -> None:
    """Executed pages are kept per digest, so that an edit of the library or a new record executes them again."""
    current = CACHES / digest()
    current.mkdir(parents=True, exist_ok=True)
    current.touch()
    for cache in CACHES.iterdir():
        if cache.stat().st_mtime < time.time() - UNUSED_S:
            shutil.rmtree(cache, ignore_errors=True)
    config.nb_execution_cache_path = str(current)


def execute_pages(app: Sphinx, config) -> None:
    """Execute the pages that are not in the cache on all cores; Sphinx itself would do one after the other.

    What fails here is executed again by Sphinx, which then reports it.
    """
    if config.nb_execution_mode != "cache":
        return
    peaks = Path(config.nb_execution_cache_path) / "peaks"
    peaks.mkdir(exist_ok=True)
    # Kernels with settings of their own: none of the reader's, and no line from each that it listens on this machine.
    settings = peaks.with_name("ipython") / "profile_default" / "ipython_kernel_config.py"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text('get_config().IPKernelApp.log_level = "ERROR"\n')
    os.environ |= {"PYTHONSTARTUP": str(Path(__file__).with_name("peak.py")), "BOOK_PEAKS": str(peaks)}
    os.environ["IPYTHONDIR"] = str(settings.parents[1])
    reader = {"type": "plugin", "name": "myst_nb_md"}  # as myst-nb reads them, or the cache would not match
    cache = get_cache(config.nb_execution_cache_path)
    pages = [Path(app.srcdir) / f"{page}.md" for page in chapters(Path(app.srcdir))]
    todo = [str(page) for page in pages if "{code-cell}" in page.read_text(encoding="utf-8")]
    for page in todo:
        cache.add_nb_to_project(page, read_data=reader)
    workers = len(cache.list_unexecuted(filter_uris=todo)) > 1
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # of each kernel: more get in each other's way
    if workers:
        executor = load_executor("local-parallel", cache, logger=logging.getLogger("jupyter_cache.quiet"))
        executor.logger.setLevel(logging.CRITICAL)
        executor.run_and_cache(filter_uris=todo, timeout=config.nb_execution_timeout)
    if threads is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = threads


def add_memory(app: Sphinx, env) -> None:
    """Let the table of executed pages show the peak memory that each page's kernel noted (see `peak.py`)."""
    headers = {"mtime": "Executed", "runtime": "Seconds", "peak": "Memory (MB)", "succeeded": "Without error"}
    execution_tables._key2header = headers
    execution_tables._key2transform |= {
        "peak": lambda peak: "-" if peak is None else f"{peak / 1e6:.0f}",
        "succeeded": lambda succeeded: "yes" if succeeded else "no",  # not all machines have myst-nb's emoji
    }
    folder = Path(app.config.nb_execution_cache_path or "")
    cache = get_cache(folder) if app.config.nb_execution_mode == "cache" else None
    for page, data in NbMetadataCollector.get_doc_data(env).items():
        if "exec_data" in data:
            data["exec_data"]["peak"] = cache and noted_memory(cache, folder / "peaks", Path(app.srcdir) / f"{page}.md")


def noted_memory(cache, peaks: Path, page: Path) -> int | None:
    """The bytes that the page's kernel noted when it made the outputs that the cache has for the page as it is now."""
    try:
        cells = cache.get_cache_bundle(cache.get_cached_project_nb(str(page)).pk).nb.cells
    except (AttributeError, KeyError):  # the page was never executed, or its execution failed
        return None
    code = "\n".join(cell.source.strip() for cell in cells if cell.cell_type == "code" and cell.source.strip())
    note = peaks / hashlib.sha256(code.encode()).hexdigest()[:16]
    return int(note.read_text()) if note.is_file() else None


def chapters(book: Path) -> list[str]:
    """Every page of `_toc.yml`, in its order, without its ending."""
    toc = yaml.safe_load((book / "_toc.yml").read_text(encoding="utf-8"))
    return [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]


def use_local_mathjax(app: Sphinx, config) -> None:
    config.mathjax_path = "mathjax/tex-chtml.js"
    # The menu offers parts that are not copied (speech, other renderers).
    config.mathjax3_config = {**(config.mathjax3_config or {}), "options": {"enableMenu": False}}


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    """Copy from the installed MathJax the 2 MB that pages use (the package's own extension copies 24 MB)."""
    if error or app.builder.format != "html":
        return
    package = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent
    source, target = package / "static" / "mathjax", Path(app.outdir) / "_static" / "mathjax"
    for part in ["tex-chtml.js", "output/chtml", "input/tex/extensions"]:
        copy_asset(str(source / part), str((target / part) if "." not in part else target))


def repository(config) -> str:
    return config.html_theme_options.get("repository_url", "").rstrip("/")


def show_repository(app: Sphinx, config) -> None:
    """The repository's buttons appear once `_config.yml` gives its address."""
    for button in ("use_repository_button", "use_edit_page_button", "use_issues_button"):
        config.html_theme_options[button] = bool(repository(config))


def add_colab_button(app: Sphinx, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Link each page that has a Colab notebook to it; the theme's own button would lead to the page's `.md`."""
    notebook = Path("book") / "colab" / f"{pagename}.ipynb"
    address = repository(app.config)
    if not address.startswith("https://github.com/") or not (ROOT / notebook).is_file():
        return
    branch = app.config.html_theme_options["repository_branch"]
    path = address.removeprefix("https://github.com/")
    button = {
        "type": "link",
        "url": f"https://colab.research.google.com/github/{path}/blob/{branch}/{notebook.as_posix()}",
        "tooltip": "Open in Colab",
        "icon": "_static/images/logo_colab.png",
        "text": "Colab",
        "label": "colab",
    }
    context["header_buttons"].insert(0, button)


class Exercise(SphinxDirective):
    """`:::{exercise} Title`, numbered within the page; a `{dropdown}` or a cell tagged `solution` follows."""

    has_content = True
    optional_arguments = 1
    final_argument_whitespace = True

    def run(self):
        number = self.env.temp_data["exercises"] = self.env.temp_data.get("exercises", 0) + 1
        title = f"Exercise {number}" + (f": {self.arguments[0]}" if self.arguments else "")
        box = nodes.admonition(classes=["exercise"])
        children, messages = self.state.inline_text(title, self.lineno)
        box += nodes.title(title, "", *children)
        self.state.nested_parse(self.content, self.content_offset, box)
        return [box, *messages]


def make_citations_list_items(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    """Entries of the bibliography stand in a list, and a list has items: docutils gives them an outdated role."""
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def setup(app: Sphinx) -> dict:
    app.add_directive("exercise", Exercise)
    for listener in (choose_cache, execute_pages, use_local_mathjax, show_repository):
        app.connect("config-inited", listener)
    app.connect("env-updated", add_memory, priority=400)  # before myst-nb makes its table
    app.connect("html-page-context", add_colab_button, priority=600)  # after the theme has made its buttons
    app.connect("html-page-context", make_citations_list_items)
    app.connect("build-finished", copy_mathjax)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}

"""The built pages, opened in Chromium: whole at every width, legible in both themes, printable, without a network."""

import functools
import importlib.util
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from building import PAGES

VIEWS = {
    f"{size}-{theme}": (width, theme)
    for size, width in {"desktop": 1400, "phone": 390}.items()
    for theme in ("light", "dark")
}
pytestmark = [pytest.mark.slow, pytest.mark.browser]


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
    cut: [...main.querySelectorAll("caption")].filter(e => e.getBoundingClientRect().width > root.clientWidth)
      .map(e => e.textContent.slice(0, 60)),
    maths: main.querySelectorAll(".math").length,
    typeset: main.querySelectorAll(".math mjx-container").length,
    errors: [...document.querySelectorAll("mjx-merror, .math .noError")].map(e => e.textContent),
    broken: images.filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.src),
    mute: images.filter(i => !i.alt.trim() || /^_images|\\.(png|svg|jpe?g)$/.test(i.alt)).map(i => i.src),
    raw: main.innerText.match(/\\{(cite|eq|numref|ref|doc|glue)[:\\w]*\\}`?.*/g),
  }
}"""


WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]  # levels A and AA
# A third of a second after the page is resized, the theme makes boxes that scroll at the new width focusable.
TAB_STOPS = (
    """() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 400))))"""
)
# One coloured piece of each kind, in each kind of box, stands for the thousands that a page's code has.
FEWER = """() => {
  const seen = new Set();
  for (const piece of document.querySelectorAll(".highlight span")) {
    const kind = piece.className + " in " + piece.closest(".highlight").parentElement.parentElement.className;
    if (seen.has(kind)) piece.replaceWith(...piece.childNodes);
    seen.add(kind);
  }
  document.body.normalize();
}"""
AXE = """async (rules) => (await axe.run(document, {runOnly: rules, preload: false})).violations
  .filter(v => ["serious", "critical"].includes(v.impact))
  .flatMap(v => v.nodes.map(n => `${v.impact} ${v.id}: ${n.html.slice(0, 160)} ${n.failureSummary.slice(0, 300)}`))"""


@functools.cache
def axe_core() -> str:
    """The script of axe-core, which looks for what keeps people from reading a page."""
    return (Path(importlib.util.find_spec("axe_playwright_python").origin).parent / "axe.min.js").read_text("utf-8")


@pytest.mark.parametrize("page", [*PAGES, "search", "genindex"])
def test_a_page_shows_whole_at_every_width_and_in_both_themes_and_asks_nothing_of_the_network(browser, server, page):
    opened, faults = open_page(browser, f"{server}/{page}.html", 1400, "light")
    for view, (width, theme) in VIEWS.items():
        show(opened, width, theme)
        look = opened.evaluate(LOOK)
        assert look["overflow"] <= 0, (view, look["wide"])
        assert not look["cut"], (view, look["cut"])
        assert look["typeset"] >= look["maths"] and not look["errors"], (view, look)
        assert not look["broken"] and not look["mute"], (view, look["broken"], look["mute"])
        assert not look["raw"], (view, look["raw"])
        assert not faults, (view, faults)
    show(opened, 1400, "light")
    opened.evaluate(TAB_STOPS)
    opened.evaluate(FEWER)
    opened.evaluate(axe_core())
    for theme in ("light", "dark"):  # they differ in colours alone, and the widths in nothing that axe looks at
        show(opened, 1400, theme)
        barriers = opened.evaluate(AXE, ["color-contrast"] if theme == "dark" else WCAG)
        assert not barriers, (theme, barriers[:5])
    assert not faults, faults
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


@pytest.mark.parametrize("page", ["losses/huber", "experiments/conclusions"])
def test_a_page_is_printed_black_on_white_whole_and_without_buttons(browser, server, page):
    opened, faults = open_page(browser, f"{server}/{page}.html", 794, "dark")  # A4 at 96 pixels an inch
    opened.emulate_media(media="print", color_scheme="dark")
    look = opened.evaluate(PRINTED)
    assert not faults and (look["text"], look["behind"]) == ("rgb(0, 0, 0)", "rgb(255, 255, 255)")
    assert not look["shown"] and not look["wide"], look
    assert opened.pdf(format="A4").startswith(b"%PDF")
    opened.context.close()


def test_the_book_reads_from_disk_without_a_server(browser, html):
    opened, faults = open_page(browser, f"file://{html}/{PAGES[0]}.html", 1400, "light")
    look = opened.evaluate(LOOK)
    assert not faults and look["typeset"] >= look["maths"] > 0 and not look["broken"]
    opened.context.close()


def test_the_search_finds_a_word_of_the_book(browser, server):
    opened, faults = open_page(browser, f"{server}/search.html?q=metres", 1400, "light")
    opened.wait_for_selector("#search-results li a", timeout=10_000)
    assert not faults
    opened.context.close()

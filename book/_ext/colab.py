"""Write book/colab/<page>.ipynb, a notebook for Colab, from each page of the book that executes code.

    python book/_ext/colab.py

The same pages always give the same bytes. MyST that Colab cannot show becomes plain Markdown; an unknown
directive or role is an error, so that no notebook shows raw markup.
"""

import ast
import hashlib
import itertools
import json
import posixpath
import re
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jupytext
import yaml
from pybtex.database import parse_file

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^(?P<fence>:{3,}|`{3,})(?:\{(?P<name>[\w:-]+)\}[ \t]*(?P<argument>.*))?")
ROLE = re.compile(r"\{(?P<name>[\w:.-]+)\}`(?P<text>[^`]+)`")
LABEL = re.compile(r"^\((?P<label>[^)\s]+)\)=\s*$")
HEADING = re.compile(r"^#{1,6} +(?P<title>.+?)\s*$")
EQUATION = re.compile(r"^(?P<open>\$\$.*?\$\$)[ \t]*\((?P<label>[^)\s]+)\)[ \t]*$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<page>[\w./-]+\.md)?(?:#(?P<label>[\w:.-]+))?\)")
IMAGE = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<path>(?!https?:)[^)\s]+)\)")
TABLE_NAME = re.compile(r"\bname=\"(tab-[\w-]+)\"")  # a table that a code cell displays
ADMONITIONS = {"note", "tip", "hint", "important", "warning", "caution", "attention", "danger", "error", "seealso"}
TRANSPARENT = {
    "grid",
    "grid-item",
    "grid-item-card",
    "card",
    "tab-set",
    "tab-item",
    "margin",
    "sidebar",
    "div",
    "glossary",
}
CODE = {"code", "code-block", "sourcecode"}
DROPPED = {"tableofcontents", "bibliography", "contents", "nb-exec-table"}


@dataclass(frozen=True)
class Target:
    """What a label names: `kind` is figure, table, equation or section; `number` is as in the built book."""

    kind: str
    page: str
    text: str

    def shown(self, page: str, book: "Book") -> str:
        if page == self.page:
            return self.text
        return f"{self.text} of {book.link(self.page)}"


class Book:
    """The pages in reading order, their titles and labels, and the addresses that depend on `_config.yml`."""

    def __init__(self, root: Path = ROOT, repository: str | None = None):
        self.root, self.source = root, root / "book"
        config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))
        self.repository = (config["repository"]["url"] if repository is None else repository).rstrip("/")
        self.version = re.search(r'__version__ = "(.+)"', (root / "d3lib" / "__init__.py").read_text()).group(1)
        self.chapters = _chapters(yaml.safe_load((self.source / "_toc.yml").read_text(encoding="utf-8")))
        self.pages = {page: (self.source / f"{page}.md").read_text(encoding="utf-8") for page in self.chapters}
        self.titles = {page: _title(text, page) for page, text in self.pages.items()}
        self.citations = parse_file(str(self.source / "references.bib")).entries
        self.targets: dict[str, Target] = {}
        counts: Counter = Counter()
        for page, text in self.pages.items():
            self._collect(page, text, counts)

    def _collect(self, page: str, text: str, counts: Counter) -> None:
        """Number figures, tables and equations as Sphinx does: within the chapter, in order of appearance."""
        chapter = self.chapters[page]

        def number(kind: str) -> str:
            counts[kind, chapter] += 1
            return f"{chapter}.{counts[kind, chapter]}" if chapter else str(counts[kind, chapter])

        def add(label: str, kind: str) -> None:
            text = f"({number(kind)})" if kind == "equation" else f"{kind.capitalize()} {number(kind)}"
            self.targets[label] = Target(kind, page, text)

        def visit(block: str) -> None:
            pending = None
            for part in _blocks(block):
                if isinstance(part, Directive):
                    if part.name in ("figure", "table", "list-table"):
                        add(part.options.get("name") or f"{page}-{len(self.targets)}", part.name.removeprefix("list-"))
                    elif part.name == "math" and "label" in part.options:
                        add(part.options["label"], "equation")
                    elif part.name == "code-cell" and (shown := part.options.get("mystnb")):
                        if "figure" in shown:
                            add(shown["figure"]["name"], "figure")
                        for label in TABLE_NAME.findall(part.body):
                            add(label, "table")
                    elif part.name not in CODE | {"code-cell", "literalinclude"}:
                        visit(part.body)
                    continue
                for line in EQUATION.sub(lambda match: f"$$ ({match['label']})", part).splitlines():
                    if match := re.match(r"^\$\$ \((\S+)\)$", line):
                        add(match[1], "equation")
                    elif match := LABEL.match(line):
                        pending = match["label"]
                    elif (match := HEADING.match(line)) and pending:
                        self.targets[pending], pending = Target("section", page, match["title"]), None

        visit(text)

    def link(self, page: str, text: str = "") -> str:
        """A link to the published page, or its title alone while the repository has no address."""
        text = text or self.titles[page]
        if not self.repository:
            return f"*{text}*"
        owner, name = self.repository.split("/")[-2:]
        return f"[{text}](https://{owner.lower()}.github.io/{name}/{page}.html)"

    def image(self, page: str, path: str) -> str:
        """Address of a picture that lies in the book's folder."""
        path = (Path("book") / page).parent.joinpath(path).as_posix()
        if not self.repository:
            return "/".join([".."] * (2 + page.count("/")) + [path])
        return f"{self.repository.replace('github.com', 'raw.githubusercontent.com')}/v{self.version}/{path}"

    def cite(self, keys: str, textual: bool) -> str:
        """`Carvalho et al. [2018]` or `[Carvalho et al., 2018]`, linked to the paper."""
        shown = []
        for key in keys.split(","):
            entry = self.citations[key.strip()]
            people = [" ".join(person.prelast_names + person.last_names) for person in entry.persons["author"]]
            people = [_unlatex(name) for name in people]
            names = {1: people[0], 2: " and ".join(people)}.get(len(people), f"{people[0]} et al.")
            year, doi = entry.fields["year"], entry.fields.get("doi")
            address = f"https://doi.org/{doi}" if doi else entry.fields.get("url", "")
            label = f"{names} ({year})" if textual else f"{names}, {year}"
            shown.append(f"[{label}]({address})" if address else label)
        return ", ".join(shown) if textual else f"({'; '.join(shown)})"


@dataclass
class Directive:
    """A fenced block: `body` without its options."""

    name: str
    argument: str
    options: dict
    body: str


def _chapters(toc: dict) -> dict[str, int | None]:
    """Page -> chapter number (None where the contents are not numbered), in reading order."""
    chapters, count = {toc["root"]: None}, 0

    def add(entry: dict, number: int | None) -> None:
        if "file" in entry:
            chapters[entry["file"].removesuffix(".md")] = number
        for child in entry.get("sections", []):
            add(child, number)

    for part in toc.get("parts", [toc]):
        for entry in part.get("chapters", []):
            count += bool(part.get("numbered"))
            add(entry, count if part.get("numbered") else None)
    return chapters


def _title(text: str, page: str) -> str:
    for line in text.splitlines():
        if match := HEADING.match(line):
            return match["title"]
    raise ValueError(f"book/{page}.md has no title")


def _unlatex(text: str) -> str:
    from pybtex.backends.plaintext import Backend  # by its name, pybtex would look for it among all that is installed
    from pybtex.richtext import Text

    return Text.from_latex(text).render(Backend())


def _blocks(text: str) -> list["str | Directive"]:
    """Split MyST into plain text and directives; a fence without a directive (a listing) becomes a `code` directive."""
    parts, plain, lines = [], [], text.splitlines()
    index = 0
    while index < len(lines):
        match = FENCE.match(lines[index])
        if not match:
            plain.append(lines[index])
            index += 1
            continue
        if plain:
            parts.append("\n".join(plain))
            plain = []
        fence, body = match["fence"], []
        index += 1
        while index < len(lines) and not re.match(rf"^{fence[0]}{{{len(fence)},}}\s*$", lines[index]):
            body.append(lines[index])
            index += 1
        language = lines[index - len(body) - 1][len(fence) :].strip()
        if match["name"]:
            options, body = _options(body)
            parts.append(Directive(match["name"], match["argument"].strip(), options, "\n".join(body)))
        else:
            parts.append(Directive("code", language, {}, "\n".join(body)))
        index += 1
    if plain:
        parts.append("\n".join(plain))
    return parts


def _options(body: list[str]) -> tuple[dict, list[str]]:
    """The options that open a directive (YAML between `---`, or lines that begin with a colon), and the rest."""
    if body and body[0].strip() == "---":
        end = next(index for index, line in enumerate(body[1:], 1) if line.strip() == "---")
        return yaml.safe_load("\n".join(body[1:end])) or {}, body[end + 1 :]
    lines = list(itertools.takewhile(re.compile(r":\s*[\w-]+:|:\s{2,}").match, body))
    nested = any(line[1:2] == " " for line in lines)
    options = yaml.safe_load("\n".join(line[1:] for line in lines)) if nested else _flat(lines)
    return options, body[len(lines) :]


def _flat(lines: list[str]) -> dict:
    return {key: value.strip() for key, value in (line[1:].split(":", 1) for line in lines)}


def _quote(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.strip().splitlines())


class Converter:
    """Turns one page's MyST into Markdown that Colab shows."""

    def __init__(self, book: Book, page: str):
        self.book, self.page, self.exercises = book, page, 0

    def markdown(self, text: str) -> str:
        parts = [self._directive(part) if isinstance(part, Directive) else self._text(part) for part in _blocks(text)]
        plain = re.sub(r"\n{3,}", "\n\n", "\n\n".join(part.strip("\n") for part in parts)).strip()
        if left := re.search(r"^[ \t>*-]+(?::{3,}|`{3,})\{.*", plain, re.MULTILINE):
            raise self._unknown(f"the indented directive {left[0].strip()!r}")
        return plain

    def _text(self, text: str) -> str:
        text = "\n".join(line for line in text.splitlines() if not LABEL.match(line) and not line.startswith("%"))
        text = EQUATION.sub(lambda match: self._equation(match["open"].strip("$"), match["label"]), text)
        text = ROLE.sub(self._role, text)
        text = IMAGE.sub(lambda match: f"![{match['alt']}]({self.book.image(self.page, match['path'])})", text)
        return LINK.sub(self._link, text)

    def _equation(self, body: str, label: str | None) -> str:
        tag = f" \\tag{{{self.book.targets[label].text.strip('()')}}}" if label else ""
        return f"$$\n{body.strip()}{tag}\n$$"

    def _link(self, match: re.Match) -> str:
        page, label, text = match["page"], match["label"], match["text"]
        if page:
            return self.book.link(self._resolved(page), text)
        if label in self.book.targets:
            return text or self.book.targets[label].shown(self.page, self.book)
        return text

    def _resolved(self, path: str) -> str:
        """The page, from the book's folder, that `path` names as seen from this one."""
        return posixpath.normpath((Path(self.page).parent / path).as_posix()).removesuffix(".md")

    def _role(self, match: re.Match) -> str:
        name, text = match["name"], match["text"]
        title, label = re.match(r"^(?:(.*?)\s*<)?([^<>]+)>?$", text, re.DOTALL).groups()
        match name:
            case "cite" | "cite:p" | "cite:t" | "cite:ps" | "cite:ts":
                return self.book.cite(text, textual=name.startswith("cite:t"))
            case "eq" | "numref" | "ref":
                if label not in self.book.targets:
                    raise ValueError(f"book/{self.page}.md: {match[0]} names a label that no page has")
                return title or self.book.targets[label].shown(self.page, self.book)
            case "doc":
                return self.book.link(self._resolved(label), title or "")
            case "math":
                return f"${text}$"
            case "sub" | "sup" | "kbd":
                return f"<{name}>{text}</{name}>"
            case "term" | "abbr" | "dfn":
                return title or text
            case "code" | "file" | "command":
                return f"`{text}`"
            case "glue" | "glue:text" | "glue:":
                return "(see the output above)"
        raise self._unknown(f"role {{{name}}}")

    def _directive(self, part: Directive) -> str:
        name, options = part.name, part.options
        if name in CODE:
            return f"```{part.argument}\n{part.body}\n```"
        if name in ADMONITIONS or name == "admonition":
            title = self._text(part.argument) if name == "admonition" else name.capitalize()
            return _quote(f"**{title}**\n\n{self.markdown(part.body)}")
        if name == "exercise":
            self.exercises += 1
            title = f"Exercise {self.exercises}" + (f": {self._text(part.argument)}" if part.argument else "")
            return _quote(f"**{title}**\n\n{self.markdown(part.body)}")
        if name == "dropdown":
            summary = self._text(part.argument) or "More"
            return f"<details><summary>{summary}</summary>\n\n{self.markdown(part.body)}\n\n</details>"
        if name in ("figure", "image"):
            picture = f"![{options.get('alt', '')}]({self.book.image(self.page, part.argument)})"
            return picture if name == "image" else f"{picture}\n\n{self._caption(options.get('name'), part.body)}"
        if name == "table":
            caption = self._caption(options.get("name"), part.argument) if part.argument else ""
            return f"{caption}\n\n{self.markdown(part.body)}"
        if name == "math":
            return self._equation(part.body, options.get("label"))
        if name == "literalinclude":
            return self._included(part)
        if name in TRANSPARENT:
            title = f"**{self._text(part.argument)}**\n\n" if part.argument and not part.argument.isdigit() else ""
            return title + self.markdown(part.body)
        if name in DROPPED:
            return ""
        raise self._unknown(f"directive {{{name}}}")

    def _caption(self, label: str | None, text: str) -> str:
        number = f"**{self.book.targets[label].text}.** " if label else ""
        return number + self.markdown(text)

    def _included(self, part: Directive) -> str:
        """The lines of a library object, and where they come from."""
        path = (self.book.source / self.page).parent.joinpath(part.argument).resolve()
        text, name = path.read_text(encoding="utf-8"), part.options.get("pyobject")
        if name:
            node = ast.parse(text)
            for step in name.split("."):
                node = next(child for child in node.body if getattr(child, "name", None) == step)
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            text = textwrap.dedent("\n".join(text.splitlines()[first - 1 : node.end_lineno]))
        origin = f"{path.relative_to(self.book.root).as_posix()}{f', {name}' if name else ''}"
        return f"```{part.options.get('language', 'python')}\n# {origin}\n{text.strip()}\n```"

    def _unknown(self, what: str) -> ValueError:
        return ValueError(f"book/{self.page}.md: {what} has no form for Colab; add one to book/_ext/colab.py")


def install_cell(book: Book, page: str) -> str:
    """The first cell: makes `d3lib` and the book's files available without touching what Colab has installed."""
    release = f"v{book.version}"
    opening = f'# "{book.titles[page]}", a page of the D3-Net book, release {release}.\n'
    if not book.repository:
        return opening + (
            "# Install d3lib from your copy of the book first: pip install --no-deps -e <folder of the book>\n"
            "import d3lib"
        )
    folder = "/".join(["book", *page.split("/")[:-1]])
    return opening + textwrap.dedent(f"""\
        # In Colab this fetches the book and adds d3lib; Colab's own torch and numpy stay (--no-deps).
        import importlib.util

        if importlib.util.find_spec("d3lib") is None:
            !git clone --quiet -c advice.detachedHead=false --depth 1 --branch {release} {book.repository} d3-book
            %pip install --quiet --no-deps ./d3-book
            %cd -q d3-book/{folder}
        import d3lib""")


def _cell(kind: str, source: str, index: int, tags: list[str]) -> dict:
    cell = {
        "cell_type": kind,
        "id": hashlib.sha1(f"{index}{source}".encode()).hexdigest()[:8],
        "metadata": ({"tags": tags} if tags else {}) | ({"cellView": "form"} if "solution" in tags else {}),
        "source": source.splitlines(keepends=True),
    }
    return {**cell, "execution_count": None, "outputs": []} if kind == "code" else cell


def notebook(book: Book, page: str) -> str:
    """The text of one page's notebook."""
    converter = Converter(book, page)
    sources: list[tuple[str, str, list[str]]] = [("code", install_cell(book, page), [])]
    for cell in jupytext.reads(book.pages[page], fmt="md:myst").cells:
        if cell.cell_type == "code":
            tags = list(cell.metadata.get("tags", []))
            folded = "# @title Solution\n" if "solution" in tags else ""
            sources.append(("code", folded + cell.source, tags))
            if figure := cell.metadata.get("mystnb", {}).get("figure"):
                sources.append(("markdown", converter._caption(figure["name"], figure["caption"]), []))
        elif source := converter.markdown(cell.source):
            sources.append(("markdown", source, []))
    content = {
        "cells": [_cell(kind, source, index, tags) for index, (kind, source, tags) in enumerate(sources)],
        "metadata": {
            "accelerator": "GPU",
            "colab": {"provenance": [], "toc_visible": True},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def notebooks(book: Book) -> dict[str, str]:
    """Page -> text of its notebook, for every page that executes code."""
    executed = (page for page, text in book.pages.items() if re.search(r"^`{3,}\{code-cell\}", text, re.MULTILINE))
    return {page: notebook(book, page) for page in executed}


def main() -> None:
    """Write every notebook, and delete those whose page is gone."""
    folder, made = ROOT / "book" / "colab", notebooks(Book())
    for old in folder.rglob("*.ipynb"):
        if old.relative_to(folder).as_posix().removesuffix(".ipynb") not in made:
            old.unlink()
    for page, text in made.items():
        path = folder / f"{page}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    print(f"book/colab: {len(made)} notebooks")


if __name__ == "__main__":
    main()

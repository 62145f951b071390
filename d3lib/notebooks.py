"""Notebooks executed with checked parameters. It never imports torch: each run starts with this, in a process that only
waits for the notebook's own."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d3lib.artefacts import atomic_path
from d3lib.errors import UserError

KINDS = {"int": int, "float": (int, float), "str": str, "bool": bool, "list": list, "None": type(None)}


def read_parameters(text: str, pairs: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Parameters from a JSON object or a file that holds one, then from NAME VALUE pairs.

    A pair's value that is no JSON is a string.
    """
    try:
        parameters = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read parameters from {text[:200]!r}: {reason}") from error
    if not isinstance(parameters, dict):
        raise UserError(f"{text[:200]!r}: must hold a JSON object of parameters, not a {type(parameters).__name__}")
    for name, text in pairs:
        try:
            parameters[name] = json.loads(text)
        except (ValueError, RecursionError):
            parameters[name] = text
    return parameters


def declared_parameters(notebook: Any) -> dict[str, tuple[str, ...]]:
    """The names in a notebook's cell tagged `parameters`, each with the kinds of value it takes.

    A kind comes from the annotation (`steps: int | None = None`), else from the default's type.
    """
    kinds: dict[str, tuple[str, ...]] = {}
    for cell in notebook.cells:
        if "parameters" not in cell.metadata.get("tags", []):
            continue
        for node in ast.parse(cell.source).body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                kinds[node.target.id] = tuple(part.strip() for part in ast.unparse(node.annotation).split("|"))
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                default = ast.literal_eval(node.value)
                kinds[node.targets[0].id] = ("None" if default is None else type(default).__name__,)
    return kinds


def check_parameters(notebook: Any, parameters: Mapping[str, Any], name: str) -> None:
    """Raise `UserError` for a parameter the notebook does not declare, or of the wrong type (papermill only warns)."""
    declared = declared_parameters(notebook)
    for parameter, value in parameters.items():
        if parameter not in declared:
            known = ", ".join(declared) or "none"
            raise UserError(f"{name} has no parameter {parameter!r}; it has {known}")
        wanted = declared[parameter]
        fits = any(isinstance(value, KINDS[kind]) for kind in wanted if kind in KINDS)
        if not fits or (isinstance(value, bool) and "bool" not in wanted):
            raise UserError(
                f"{name}: parameter {parameter} must be {' or '.join(wanted)}, not {value!r} "
                "(on the command line a string that looks like a number needs its own quotes)"
            )


def execute_notebook(source: Path, target: Path, parameters: Mapping[str, Any]) -> None:
    """Execute a MyST Markdown notebook with parameters and write the executed notebook, whole, to `target`.

    A cell that raises ends the execution; the notebook with its error is still written.

    Raises:
        UserError: no such notebook, parameters that do not fit, or a cell that raised (with its last line).
    """
    import jupytext
    import papermill

    if not source.is_file():
        raise UserError(f"{source}: no such notebook")
    try:
        notebook = jupytext.read(source)
    except Exception as error:  # the package raises its own kinds beside ValueError and UnicodeError
        raise UserError(f"{source}: is no notebook ({error})".splitlines()[0]) from error
    check_parameters(notebook, parameters, str(source))
    with atomic_path(target) as temporary:
        try:
            papermill.execute_notebook(
                notebook,
                str(temporary),
                parameters=dict(parameters),
                kernel_name="python3",
                language="python",
                progress_bar=False,
                cwd=str(source.resolve().parent),
            )
        except papermill.PapermillExecutionError as error:
            failed = target.with_suffix(".failed.ipynb")
            failed.write_bytes(temporary.read_bytes())
            raise UserError(f"{source}: {error.ename}: {error.evalue} (see {failed})".splitlines()[0]) from error

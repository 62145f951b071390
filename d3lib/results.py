"""Reading results back: a budget's runs and their state, and our numbers beside the paper's with a computed status."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d3lib.artefacts import read_json
from d3lib.experiments import BUDGETS, all_runs
from d3lib.intervals import prediction_interval
from d3lib.records import State, is_current, read_record
from d3lib.scoring import baselines_path

REFERENCE = Path(__file__).resolve().parent / "reference" / "paper_results.csv"
NARROW = 0.05  # an interval's half-width counts as narrow up to this part of the value


@dataclass(frozen=True)
class PaperNumber:
    """One number of the paper, and where it stands."""

    item: str  # fig2, fig5 or table2
    method: str  # a loss, or in table2 the name of a method
    train_set: str  # 795, 12k, 230k, or "" where the row is another paper's
    encoder: str
    metric: str
    value: float
    source: str


def paper_numbers() -> list[PaperNumber]:
    """Every number of the paper (and, for its plots, of the author's plotting script)."""
    with REFERENCE.open(encoding="utf-8", newline="") as file:
        return [PaperNumber(**{**row, "value": float(row["value"])}) for row in csv.DictReader(file)]


def load_records(budget: str, out: Path, only: str | None = None) -> dict[str, dict[str, Any] | None]:
    """The records of a budget's runs by key; `None` for a run without one. Raises `UserError` for a damaged one."""
    place = out / budget
    found = {key: place / key / "record.json" for key in all_runs(budget, only)}
    return {key: read_record(path) if path.is_file() else None for key, path in found.items()}


def load_baselines(budget: str, out: Path) -> dict[str, dict[str, Any]]:
    """The baselines' scores by training set, for the sets that have been scored."""
    runs = [run for run in all_runs(budget).values() if run.encoder == BUDGETS[budget].encoder]
    paths = {run.train_set: baselines_path(run, out / budget) for run in reversed(runs)}  # the first run's of each set
    return {
        name: read_json(path, format="d3lib-baselines", version=1) for name, path in paths.items() if path.is_file()
    }


def score(record: Mapping[str, Any], metric: str, part: str = "test", pooling: str = "pooled") -> float | None:
    """One number of a record: the chosen weights' metric on a set, against the depth that counts for its data."""
    return record["metrics"]["chosen"][part][record["data"]["target"]][pooling][metric]


def cell_status(paper: float, records: Iterable[Mapping[str, Any]], metric: str) -> str:
    """What our runs say about one number of the paper; computed, never typed.

    "not run", "smoke only", "other data" (metres of other scenes or without ImageNet weights do not compare),
    "reproduced" (the paper's value lies in our prediction interval, and that is narrow), "inconclusive" (in it, but
    it is wide), or "differs"; with ", older" where other training code made a record.
    """
    records = list(records)
    values = [value for value in (score(record, metric) for record in records) if value is not None]
    if not values:
        return "not run"
    older = "" if all(map(is_current, records)) else ", older"
    runs = [record["run"] for record in records]
    if any(run["budget"] in ("smoke", "drill") for run in runs):
        return "smoke only" + older
    if any(run["data"] != "nyu" or not run["pretrained"] for run in runs):
        return "other data" + older
    mean, half = prediction_interval(values)
    if abs(paper - mean) > half:
        return "differs" + older
    return ("reproduced" if half <= NARROW * abs(mean) else "inconclusive") + older


@dataclass(frozen=True)
class Cell:
    """One number of the paper beside ours."""

    paper: PaperNumber
    ours: float | None  # mean over seeds
    half_width: float | None  # of the 95 % prediction interval; None for a single run
    n: int  # runs behind it
    status: str
    keys: tuple[str, ...]  # the runs' folders


def compare(budget: str, out: Path) -> list[Cell]:
    """Every number of the paper's figures, and D3-Net's row of Table 2, beside ours at the given budget."""
    records = [record for record in load_records(budget, out).values() if record is not None]
    cells = []
    for number in paper_numbers():
        ours = [record for record in records if stands_for(record["run"], number)]
        if number.item == "table2" and number.method != "D3-Net":
            continue
        values = [value for value in (score(record, number.metric) for record in ours) if value is not None]
        mean, half = prediction_interval(values) if values else (None, math.inf)
        status = cell_status(number.value, ours, number.metric)
        width = half if math.isfinite(half) else None
        cells.append(Cell(number, mean, width, len(values), status, tuple(record["key"] for record in ours)))
    return cells


def stands_for(run: Mapping[str, Any], number: PaperNumber) -> bool:
    """Whether a run is our counterpart of a number. A small budget's encoder stands for D3-Net's but in Figure 5."""
    loss = "gan" if number.method == "D3-Net" else number.method
    encoder = number.encoder if number.item == "fig5" else BUDGETS[run["budget"]].encoder
    return (run["loss"], run["train_set"], run["encoder"], run["variant"]) == (
        loss,
        number.train_set,
        encoder,
        "paper",
    )


def status_text(budget: str, out: Path, only: str | None = None) -> str:
    """A line for each run: its state, and what went wrong with a failed one; then the counts."""
    states = {key: State(out / budget / key).read() for key in all_runs(budget, only)}
    lines = [f"{state:<12} {key}{'  ' + error if error else ''}" for key, (state, error) in states.items()]
    counts: dict[str, int] = {}
    for state, _ in states.values():
        counts[state] = counts.get(state, 0) + 1
    summary = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    return "\n".join([*lines, f"budget {budget}: {len(states)} runs: {summary}"])


def comparison_text(budget: str, out: Path) -> str:
    """The paper's numbers beside ours as a plain table."""
    rows = [("item", "loss", "set", "encoder", "metric", "paper", "ours", "n", "status")]
    for cell in compare(budget, out):
        number = cell.paper
        loss = "gan" if number.item == "table2" else number.method
        ours = "-" if cell.ours is None else f"{cell.ours:.3f}"
        rows.append(
            (number.item, loss, number.train_set, number.encoder, number.metric)
            + (f"{number.value:.3f}", ours, str(cell.n), cell.status)
        )
    return text_table(rows)


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of strings as aligned columns; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown_table(rows: Sequence[Sequence[str]], *, name: str, caption: str) -> str:
    """Rows of strings as a numbered MyST table; the first row is the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join([f":::{{table}} {caption}", f":name: {name}", "", *lines, ":::"])

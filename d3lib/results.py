"""Reading results back: a budget's runs and their state, and our numbers beside the paper's with a computed status."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d3lib.artefacts import read_json
from d3lib.experiments import BUDGETS, Run, all_runs, make_run, manifest
from d3lib.intervals import prediction_interval
from d3lib.records import (
    BOOK,
    PICTURES,
    State,
    but_for_seed,
    committed_records,
    is_current,
    read_pictures,
    read_record,
)
from d3lib.scoring import baselines_path

REFERENCE = Path(__file__).resolve().parent / "reference" / "paper_results.csv"
QUICK = ("drill", "smoke")  # budgets whose runs are too short to say anything
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


def source_of(budget: str, data_root: Path) -> str:
    """The data a budget's runs read: its own, but rooms for a budget whose NYU Depth V2 is not in `data_root`."""
    row = BUDGETS[make_run(budget).budget]
    if row.data == "nyu" and not any(data_root.glob(f"nyu-*-{row.height}x{row.width}/store.json")):
        return "rooms"
    return row.data


def runs_of(budget: str, out: Path, only: str | None = None) -> dict[str, Run]:
    """A budget's runs by key, on the data that its batch in `out` works on."""
    return all_runs(budget, only, **choice_of(budget, out))


def read_plan(budget: str, out: Path) -> dict[str, Any]:
    """What the batch in `out` was last told to work on (see `batch.make_plan`); empty if that is not to be read."""
    try:
        plan = json.loads((out / budget / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    names = ("data_root", "pictures")
    return {name: plan[name] for name in names if isinstance(plan, dict) and isinstance(plan.get(name), str)}


def choice_of(budget: str, out: Path) -> dict[str, str | None]:
    """The data source, and the folder of real pictures if any, of the batch in `out`; arguments of `manifest`.

    Where this copy was given no such folder, it is the one whose records came with the book.
    """
    plan = read_plan(budget, out)
    known = [record["run"].get("data", "") for record in committed_records() if record["run"]["budget"] == budget]
    folders = [str(Path(data.removeprefix("folder:")).parent) for data in known if data.startswith("folder:")]
    pictures = plan.get("pictures") or next(iter(folders), None)
    return {"data": source_of(budget, Path(plan.get("data_root", out / "data"))), "pictures": pictures}


def load_records(budget: str, out: Path, only: str | None = None) -> dict[str, dict[str, Any] | None]:
    """The records of a budget's runs by key: this copy's, else those that came with the book, else `None`.

    Raises `UserError` for a damaged one.
    """
    found = {key: out / budget / key / "record.json" for key in runs_of(budget, out, only)}
    book = {record["key"]: record for record in committed_records()}
    return {key: read_record(path) if path.is_file() else book.get(key) for key, path in found.items()}


def what_stands_behind(budget: str, out: Path, only: str) -> str:
    """One paragraph in Markdown for the head of a page: budget, data, how many runs there are, and what that means."""
    records = load_records(budget, out, only)
    done = [record for record in records.values() if record is not None]
    runs, row = runs_of(budget, out, only), BUDGETS[budget]
    text = f"**What stands behind this page.** Budget `{budget}`: {row.purpose}. "
    text += f"{len(done)} of {len(records)} runs have a record. "
    if not done:
        return text + "Nothing was run yet."
    came = sum(not (out / budget / record["key"] / "record.json").is_file() for record in done)
    text += f"{came} of them came with the book. " if came else ""
    data = done[0]["data"]["description"].split(",")[0]
    seeds = sorted(Counter(map(but_for_seed, done)).values())
    size = next(iter(runs.values()))
    sizes = dict.fromkeys(f"{r['run']['height']} x {r['run']['width']}" for r in done)
    text += f"Data: {data}. Pictures of {' and '.join(sizes)}, batches of {size.batch_size}. "
    text += f"Runs behind one point: {seeds[0]}" + (f" to {seeds[-1]}. " if seeds[-1] != seeds[0] else ". ")
    if row.data == "nyu" and size.data == "rooms":
        text += "NYU Depth V2 is not prepared here: nested sets of rooms stand for its three sets. "
    elif size.data == "nyu":
        text += "NYU's 795 labelled frames are not a part of its 12k: the sets are not nested. "
    if budget in QUICK:
        text += "**Runs this short rank nothing**: they show that every step works."
    elif any(not is_current(record) for record in done):
        text += "Some records were made by an older version of the training code."
    return text


def load_pictures(budget: str, out: Path, key: str) -> dict[str, np.ndarray] | None:
    """A few test pictures of the run whose record `load_records` gives (see `read_pictures`); None if none are kept."""
    ours = out / budget / key
    place = ours if (ours / "record.json").is_file() else BOOK / budget / key
    return read_pictures(place) if (place / PICTURES).is_file() else None


def load_baselines(budget: str, out: Path, item: str = "fig2") -> dict[str, dict[str, Any]]:
    """The baselines' scores by training set, or by `fold-K`, for the sets that were scored here or for the book."""
    found = {}
    for run in runs_of(budget, out, item).values():
        name = Path(run.data).name if run.data.startswith("folder:") else run.train_set
        for place in (out / budget, BOOK / budget):
            if run.seed == 0 and name not in found and (path := baselines_path(run, place)).is_file():
                found[name] = read_json(path, format="d3lib-baselines", version=1)
    return found


def score(
    record: Mapping[str, Any], metric: str, part: str = "test", pooling: str = "pooled", weights: str = "chosen"
) -> float | None:
    """One number of a record: a metric on a set, against the depth that counts for its data.

    Args:
        weights: "chosen", those with the least validation error, or "last".
    """
    return record["metrics"][weights][part][record["data"]["target"]][pooling][metric]


def scores(records: Iterable[Mapping[str, Any]], metric: str) -> list[float]:
    """The `score` of each record that has it: one without a valid pixel has none."""
    found = (score(record, metric) for record in records)
    return [value for value in found if value is not None]


def cell_status(paper: float, records: Iterable[Mapping[str, Any]], metric: str) -> str:
    """What our runs say about one number of the paper; computed, never typed.

    "not run", "smoke only", "other data" (metres of other scenes or without ImageNet weights do not compare),
    "reproduced" (the paper's value lies in our prediction interval, and that is narrow), "inconclusive" (in it, but
    it is wide), or "differs"; with ", older" where other training code made a record.
    """
    records = list(records)
    values = scores(records, metric)
    if not values:
        return "not run"
    older = "" if all(map(is_current, records)) else ", older"
    runs = [record["run"] for record in records]
    if any(run["budget"] in QUICK for run in runs):
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

    @property
    def difference(self) -> float | None:
        """Ours less the paper's, where they compare: the same data, protocol and pretraining."""
        compares = self.status.split(",")[0] in ("reproduced", "inconclusive", "differs")
        return self.ours - self.paper.value if compares and self.ours is not None else None


def compare(budget: str, out: Path) -> list[Cell]:
    """Every number of the paper's figures, and D3-Net's row of Table 2, beside ours at the given budget."""
    records = [record for record in load_records(budget, out).values() if record is not None]
    cells = []
    for number in paper_numbers():
        if number.item == "table2" and number.method != "D3-Net":
            continue
        ours = [record for record in records if stands_for(record["run"], number)]
        values = scores(ours, number.metric)
        mean, half = prediction_interval(values) if values else (None, math.inf)
        status = cell_status(number.value, ours, number.metric)
        width = half if math.isfinite(half) else None
        cells.append(Cell(number, mean, width, len(values), status, tuple(record["key"] for record in ours)))
    return cells


def stands_for(run: Mapping[str, Any], number: PaperNumber) -> bool:
    """Whether a run, of any seed, is our counterpart of a number: one of the manifest's for its figure.

    A small budget's encoder stands for D3-Net's but in Figure 5.
    """
    loss = "gan" if number.method == "D3-Net" else number.method
    item = "fig5" if number.item == "fig5" else "fig2"
    encoder = number.encoder if item == "fig5" else BUDGETS[run["budget"]].encoder
    wanted = (loss, number.train_set, encoder)
    if (run["loss"], run["train_set"], run["encoder"]) != wanted or run["data"] not in ("rooms", "nyu"):
        return False
    fields = {**dataclasses.asdict(Run()), **run, "seed": 0}  # a record of older code may lack a field
    return fields in _counterparts(run["budget"], run["data"], item, *wanted)


@functools.cache
def _counterparts(budget: str, data: str, item: str, *wanted: str) -> list[dict[str, Any]]:
    runs = (run for run in manifest(budget, data)[item].runs if run.seed == 0)
    return [dataclasses.asdict(run) for run in runs if (run.loss, run.train_set, run.encoder) == wanted]


@dataclass(frozen=True)
class Contrast:
    """What one change does to a run: runs that differ in it from others of the same seeds, and in nothing else."""

    what: str  # the change, such as "learning_rate 0.0001"
    loss: str
    train_set: str
    values: tuple[float, ...]  # with the change, one per seed
    differences: tuple[float, ...]  # from the same seed without it
    seeds: tuple[int, ...]  # of the differences


def contrasts(budget: str, out: Path, item: str, metric: str = "rms") -> list[Contrast]:
    """Every change that a question beyond the paper asks about, with paired differences; empty tuples: not run."""
    records = load_records(budget, out)
    plain = ("reference", "fig2", "fig5", *(() if item == "decoder" else ("decoder",)))
    pool = [run for name in plain for run in runs_of(budget, out, name).values()]
    groups: dict[tuple[str, str, str], list[tuple[Run, Run]]] = {}
    for run in runs_of(budget, out, item).values():
        rivals = [r for r in pool if (r.loss, r.train_set, r.seed) == (run.loss, run.train_set, run.seed)]
        if not rivals or run in rivals:
            continue
        closest = min(rivals, key=lambda rival: len(_changes(run, rival)))
        what = ", ".join(f"{name} {getattr(run, name)}" for name in _changes(run, closest))
        if closest.encoder != make_run(budget).encoder:
            what += f" {'for' if run.encoder == closest.encoder else 'instead of'} {closest.encoder}"
        groups.setdefault((what, run.loss, run.train_set), []).append((run, closest))
    found = []
    for (what, loss, size), pairs in groups.items():
        scored = [[score(r, metric) if (r := records.get(run.key)) else None for run in pair] for pair in pairs]
        values = tuple(a for a, _ in scored if a is not None)
        both = {run.seed: a - b for (run, _), (a, b) in zip(pairs, scored, strict=True) if None not in (a, b)}
        found.append(Contrast(what, loss, size, values, tuple(both.values()), tuple(both)))
    return found


def _changes(run: Run, other: Run) -> list[str]:
    """The names of the fields in which two runs differ."""
    return [f.name for f in dataclasses.fields(Run) if getattr(run, f.name) != getattr(other, f.name)]


def status_text(budget: str, out: Path, only: str | None = None, every: bool = False) -> str:
    """A line for each figure, table and question with its runs' states, one for each failed run; then the counts.

    `every`: a line for each run instead.
    """
    states = {key: State(out / budget / key).read() for key in runs_of(budget, out, only)}
    if every:
        lines = [f"{state:<12} {key}{'  ' + error if error else ''}" for key, (state, error) in states.items()]
    else:
        lines = [
            f"{name:<12} {_counts(states[run.key][0] for run in item.runs):<40} {item.question}"
            for name, item in manifest(budget, **choice_of(budget, out)).items()
            if all(run.key in states for run in item.runs)
        ]
        lines += [f"{state:<12} {key}  {error}" for key, (state, error) in states.items() if state == "failed"]
    return "\n".join([*lines, f"budget {budget}: {len(states)} runs: {_counts(state for state, _ in states.values())}"])


def _counts(states: Iterable[str]) -> str:
    """ "3 done, 1 failed"."""
    return ", ".join(f"{count} {state}" for state, count in sorted(Counter(states).items()))


def comparison_text(budget: str, out: Path) -> str:
    """The paper's numbers beside ours as a plain table."""
    rows = [("item", "loss", "set", "encoder", "metric", "paper", "ours", "n", "status")]
    for cell in compare(budget, out):
        number = cell.paper
        loss = "gan" if number.item == "table2" else number.method
        ours = "-" if cell.ours is None else f"{cell.ours:.3f}"
        what = (number.item, loss, number.train_set, number.encoder, number.metric)
        rows.append((*what, f"{number.value:.3f}", ours, str(cell.n), cell.status))
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

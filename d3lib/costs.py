"""What a batch will cost on this machine: seconds of each run, from its own training loop timed for a few steps."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d3lib.artefacts import digest_json, read_json, write_json
from d3lib.errors import UserError
from d3lib.evaluation import as_predictor
from d3lib.execution import CURVE_FRAMES, EVAL_BATCH, build_network
from d3lib.experiments import BUDGETS, Run, all_runs, manifest
from d3lib.losses import l1_loss
from d3lib.models import D3Net, PatchDiscriminator
from d3lib.provenance import TRAINING_CODE, code_digest, device_name
from d3lib.records import read_record
from d3lib.results import choice_of
from d3lib.training import Batch, fit, pick_compiler, pick_device, pick_layout, pick_precision

ENOUGH = 1.0  # seconds of timed steps, after one step that warms up
START = 10.0  # seconds to start a run's process and notebook, and to write its results


def measure(run: Run, device: str) -> dict[str, float]:
    """Seconds of one training step (`step`) and of predicting one image (`image`) of a run, on random pictures."""
    batch = random_batch(run.batch_size, (run.height, run.width), device)
    precision = pick_precision(run.precision, device)
    plain = dataclasses.replace(run, pretrained=False, init="")  # weights change no time
    layout = pick_layout(device, precision, (run.height, run.width))
    net = build_network(plain).to(device, memory_format=layout)
    adversary = PatchDiscriminator(ndf=run.ndf).to(device) if run.loss == "gan" else None

    def train(steps: int) -> float:
        compiler = pick_compiler(device) if run.gpus == 1 else None
        options = {"adversary": adversary, "device": device, "precision": precision, "compiler": compiler}
        return sum(train_in_parts(net, itertools.repeat(batch), steps + 1, 1, **options)[1]) / steps

    step = train(1)
    if step < ENOUGH / 2:
        step = train(min(20, int(ENOUGH / step)))
    predict = as_predictor(net, device, precision)
    start = time.perf_counter()
    predict(batch["rgb"]).cpu()
    return {"step": step, "image": (time.perf_counter() - start) / run.batch_size}


def random_batch(count: int, size: Sequence[int], device: str) -> Batch:
    """Random pictures (count, 3, H, W) in [0, 1], with depth (count, 1, H, W) of 1 to 9 m, valid everywhere."""
    generator = torch.Generator().manual_seed(0)
    rgb, depth = (torch.rand((count, channels, *size), generator=generator) for channels in (3, 1))
    batch = {"rgb": rgb, "depth": 1 + 8 * depth, "valid": torch.ones(depth.shape, dtype=torch.bool)}
    return {name: images.to(device) for name, images in batch.items()}


def train_in_parts(
    net: D3Net, source: Iterator[Batch], parts: int, steps: int, **options: Any
) -> tuple[list[float], list[float]]:
    """Train with L1 for `parts` times `steps` steps: the loss at each part's end, and the seconds of all but the first.

    The first part warms up, compiles and records. `options` are those of `fit`.
    """
    times: list[float] = []

    def look(net: nn.Module) -> dict[str, float | None]:
        times.append(time.perf_counter())
        return {}

    options |= {"steps": parts * steps, "evaluations": parts, "evaluate": look}
    curve = fit(net, l1_loss, lambda start: source, **options).curve
    seconds = [after - before for before, after in itertools.pairwise(times)]
    return [point["loss"] or math.nan for point in curve], seconds


def kind_of(run: Run, **other: Any) -> Run:
    """The fields of a run that decide most of its speed, with `other` in their place; the rest at their defaults."""
    kept = {name: getattr(run, name) for name in ("encoder", "height", "width", "batch_size", "ndf", "precision")}
    return Run(**{"loss": "gan" if run.loss == "gan" else "l1"} | kept | other)


def recorded(runs: Iterable[Run], place: Path, device: str) -> dict[str, float]:
    """Median seconds of a whole run that was done on this device, by the key of its `kind_of` and its steps."""
    found: dict[str, list[float]] = {}
    for run in runs:
        if (path := place / run.key / "record.json").is_file():
            made = read_record(path)["provenance"]
            if made["device"] == device_name(device):
                found.setdefault(f"{kind_of(run).key} {run.steps}", []).append(made["total_seconds"])
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def seconds_of(runs: Iterable[Run], out: Path, device: str = "auto") -> dict[str, float]:
    """Estimated seconds of each run, by key, on this device: those of runs like it, or else from a few timed steps.

    What was timed is kept in `out/throughput.json`.
    """
    device, runs = pick_device(device), list(runs)
    done: dict[str, float] = {}
    for budget, data in {(run.budget, run.data) for run in runs if run.data in ("rooms", "nyu")}:
        done |= recorded(all_runs(budget, data=data).values(), out / budget, device)
    path = out / "throughput.json"
    machine = [device_name(device), torch.get_num_threads(), torch.__version__]
    here = digest_json([*machine, code_digest(*TRAINING_CODE), pick_compiler(device)])
    try:
        known = read_json(path, format="d3lib-throughput")
    except UserError:
        known = {}
    known = {name: value for name, value in known.items() if name.startswith(here[:8])}
    seconds, before = {}, len(known)

    def timed(kind: Run) -> dict[str, float]:
        name = f"{here[:8]}-{kind.key}"
        if name not in known:
            known[name] = measure(kind, device)
        return known[name]

    for run in runs:
        if like := done.get(f"{kind_of(run).key} {run.steps}"):
            seconds[run.key] = START + like
            continue
        cost = dict(timed(kind_of(run, loss="l1")))
        if run.loss == "gan":  # its discriminator costs the same whatever it judges: timed beside a small network
            with_it, without = (timed(kind_of(run, loss=loss, encoder="tiny")) for loss in ("gan", "l1"))
            cost["step"] += max(0.0, with_it["step"] - without["step"])
        row = BUDGETS[run.budget]
        test = row.test_scenes * row.test_views
        points = run.evaluations * 2 * min(CURVE_FRAMES, test)
        images = points + 2 * (2 * test + CURVE_FRAMES + row.val_scenes * row.test_views) + EVAL_BATCH
        seconds[run.key] = START + run.steps * cost["step"] / run.gpus + images * cost["image"]
    if len(known) > before:
        write_json(path, known, format="d3lib-throughput")
    return seconds


def plan_text(budget: str, runs: Iterable[Run], out: Path, device: str = "auto") -> str:
    """What of a budget is still to be done, by figure, table and question, and what it costs on one such device."""
    todo = {run.key: run for run in runs}
    if not todo:
        return "every run is done"
    seconds = seconds_of(todo.values(), out, device)
    lines, counted = [], set[str]()
    for name, item in manifest(budget, **choice_of(budget, out)).items():
        new = [run.key for run in item.runs if run.key in todo and run.key not in counted]
        counted |= set(new)
        if new:
            cost = _time(sum(seconds[key] for key in new))
            lines.append(f"  {name:<12} {len(new):>4} runs {cost:>9}  {item.question}")
    where = device_name(pick_device(device))
    total = _time(sum(seconds.values()))
    return "\n".join([f"to do: {len(todo)} runs, about {total} one after the other on one {where}", *lines])


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"

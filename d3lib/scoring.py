"""Scores beside a run's: baselines fitted to its data, and any weights file on any data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from d3lib import provenance
from d3lib.artefacts import digest_json, read_json, write_json
from d3lib.baselines import BASELINES, fit_baseline
from d3lib.evaluation import as_predictor, evaluate, load_network
from d3lib.execution import EVAL_BATCH, open_sources
from d3lib.experiments import Run
from d3lib.metrics import Protocol
from d3lib.training import pick_device

BASELINE_CODE = ("d3lib.baselines", "d3lib.evaluation", "d3lib.data.loader")
BASELINE_STEPS = 600  # of the small networks among the baselines, at most
Progress = Callable[[str], None]


def score_baselines(
    run: Run, out: Path, data_root: Path, *, device: str = "auto", progress: Progress | None = None
) -> dict[str, Any]:
    """What any network must beat on the run's data: each baseline, fitted to the training set, scored like a run.

    Written to `baselines_path` and read from there if code and data are unchanged.
    """
    device = pick_device(device)
    sources = open_sources(run, data_root, progress)
    path = baselines_path(run, out)
    code = provenance.code_digest(*BASELINE_CODE)
    if path.is_file():
        found = read_json(path, format="d3lib-baselines", version=1)
        if (found["provenance"]["code_digest"], found["data_digest"]) == (code, sources.digest):
            return found
    targets = ("exact", "depth") if sources.target == "exact" else ("depth",)
    protocol = Protocol(max_depth=run.max_depth)
    scores = {}
    for name in BASELINES:
        if progress is not None:
            progress(f"baseline {name} on {path.stem}")
        fitted = fit_baseline(name, lambda: sources.batches("train", run, device), run.seed, baseline_steps(run))
        scores[name] = {
            part: evaluate(fitted, sources.batches(part, run, device), protocol, targets)
            for part in sources.sets
            if part not in ("train", "val")
        }
    content = {
        "scores": scores,
        "target": sources.target,
        "data_digest": sources.digest,
        "provenance": provenance.collect(*BASELINE_CODE, device=device),
    }
    write_json(path, content, format="d3lib-baselines", version=1)
    return content


def score_weights(weights: Path, run: Run, data_root: Path, out: Path, *, device: str = "auto") -> list[list[str]]:
    """A weights file's errors on a run's data, beside the baselines fitted to that data's training set.

    Returns a table as rows of text, the head first. Raises `UserError` for unfit weights or data.
    """
    device = pick_device(device)
    net, _ = load_network(weights, device)
    sources = open_sources(run, data_root)
    parts = [name for name in sources.sets if name not in ("train", "val")]
    protocol, targets = Protocol(max_depth=run.max_depth), (sources.target,)
    predict = as_predictor(net, device)
    ours = {name: evaluate(predict, sources.batches(name, run, device), protocol, targets) for name in parts}
    found = {weights.name: ours, **score_baselines(run, out, data_root, device=device)["scores"]}
    columns = {"rms": "RMSE (m)", "rel": "abs rel", "log10": "log10", "d1": "d1", "d2": "d2", "d3": "d3"}
    rows = [["predictor", "set", f"images ({sources.target})", *columns.values(), "RMSE per image (m)"]]
    for name, scores in found.items():
        for part, score in scores.items():
            values = [score[sources.target]["pooled"][metric] for metric in columns]
            values.append(score[sources.target]["per_image"]["rms"])
            shown = ["-" if value is None else f"{value:.3f}" for value in values]
            rows.append([name, part, str(score[sources.target]["images"]), *shown])
    return rows


def baselines_path(run: Run, out: Path) -> Path:
    """Where the baselines beside a run are kept; runs with equal data, size, images seen and seed share them."""
    data = run.data if run.data in ("rooms", "nyu") else f"folder-{digest_json([run.data, run.hold_out])[:8]}"
    return out / "baselines" / f"{data}-{run.train_set}-{run.height}x{run.width}-{baseline_steps(run)}-s{run.seed}.json"


def baseline_steps(run: Run) -> int:
    """The small networks see as many images as the run does, up to where they have learnt what they can."""
    return max(1, min(BASELINE_STEPS, run.images // EVAL_BATCH))

"""Are the rooms fit for a study? The difficulty gate, and what happens when cues are taken from the pictures.

Depth in the rooms must have to be *seen*: hard enough that sets and losses can differ, learnable, and out of reach for
predictors that do not look. The rule is fixed here, before any run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d3lib.artefacts import read_json, write_json
from d3lib.data import rooms
from d3lib.data.loader import eval_batches, to_float
from d3lib.evaluation import as_predictor, evaluate, load_network
from d3lib.execution import execute, stores_of
from d3lib.experiments import Run
from d3lib.scoring import score_baselines
from d3lib.training import pick_device

GATE, GATE_VERSION = "d3lib-gate", 1
D1_RANGE = (0.65, 0.90)  # δ < 1.25 on test scenes of a network trained on the middle set
OVERFIT = 1.5  # on the small set, test RMSE is at least so many times training RMSE
BASELINE = 1.5  # the best baseline's RMSE is at least so many times the network's


def measure_gate(
    run: Run, out: Path, data_root: Path, *, device: str = "auto", progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Train on the middle and the small set, score baselines and interventions, and apply the rule.

    Args:
        run: how to train; its training set is replaced by 12k and 795 in turn.

    Returns the content of the gate's artefact: measured numbers, the rule's outcome, and the runs' provenance.
    """
    middle = dataclasses.replace(run, train_set="12k")
    records = {
        name: execute(dataclasses.replace(run, train_set=name), out, data_root, device=device, progress=progress)
        for name in ("12k", "795")
    }
    baselines = score_baselines(middle, out, data_root, device=device, progress=progress)
    baseline_rms = {name: _pooled(parts["test"])["rms"] for name, parts in baselines["scores"].items()}
    test = _pooled(records["12k"]["metrics"]["chosen"]["test"])
    small = {part: _pooled(records["795"]["metrics"]["chosen"][part], "depth")["rms"] for part in ("train", "test")}
    measured = {
        "d1": test["d1"],
        "overfit": small["test"] / small["train"],
        "baseline": min(baseline_rms.values()) / test["rms"],
    }
    outcome = {
        "d1": D1_RANGE[0] <= measured["d1"] <= D1_RANGE[1],
        "overfit": measured["overfit"] >= OVERFIT,
        "baseline": measured["baseline"] >= BASELINE,
    }
    return {
        "measured": measured,
        "outcome": outcome,
        "network": test,
        "unseen": _pooled(records["12k"]["metrics"]["chosen"]["unseen"]),
        "baselines": baseline_rms,
        "interventions": score_interventions(middle, out, data_root, device),
        "runs": {name: record["run"] | {"key": record["key"]} for name, record in records.items()},
        "curve": {name: record["curve"] for name, record in records.items()},
        "data": records["12k"]["data"],
        "provenance": records["12k"]["provenance"],
    }


def score_interventions(run: Run, out: Path, data_root: Path, device: str = "auto") -> dict[str, dict[str, float]]:
    """Test errors of a run's kept weights when a cue is taken away: pooled metrics by intervention.

    "none" is the untouched test set; shadings are rendered anew (no light, no texture); the others change the
    picture's pixels alone. A network that sees depth must suffer from each.
    """
    device = pick_device(device)
    net, _ = load_network(out / run.key / "weights.safetensors", device)
    predict = as_predictor(net, device)
    stored = stores_of(run, data_root)["test"]
    shaded = {shading: dataclasses.replace(stored, shading=shading).open() for shading in rooms.SHADINGS}
    sets = {name: _intervened(shaded["full"], name, device) for name in rooms.INTERVENTIONS}
    sets |= {
        name: eval_batches(store, batch_size=16, device=device) for name, store in shaded.items() if name != "full"
    }
    return {name: _pooled(evaluate(predict, batches, targets=("exact",))) for name, batches in sets.items()}


def _intervened(store: Any, name: str, device: str) -> Iterator[Mapping[str, Tensor]]:
    """Evaluation batches whose pictures went through `rooms.intervene`."""
    generator = torch.Generator().manual_seed(0)
    for batch in eval_batches(store, batch_size=16):
        changed = rooms.intervene((batch["rgb"] * 255).round().byte(), name, generator)
        yield {key: value.to(device) for key, value in (batch | {"rgb": to_float(changed)}).items()}


def _pooled(scores: Mapping[str, Any], target: str = "exact") -> dict[str, float]:
    return scores[target]["pooled"]


def gate_rows(content: Mapping[str, Any] | None) -> list[tuple[str, str, str, str]]:
    """The rule beside what was measured, as rows of text with their head; "not run" without a measurement."""
    rules = {
        "d1": ("δ < 1.25 on test scenes, middle set", f"{D1_RANGE[0]:.2f} to {D1_RANGE[1]:.2f}"),
        "overfit": ("test RMSE / training RMSE, small set", f"at least {OVERFIT}"),
        "baseline": ("best baseline's RMSE / the network's", f"at least {BASELINE}"),
    }
    rows = [("what", "asked", "measured", "holds")]
    for name, (what, asked) in rules.items():
        if content is None:
            rows.append((what, asked, "not run", "not run"))
        else:
            rows.append((what, asked, f"{content['measured'][name]:.3f}", "yes" if content["outcome"][name] else "no"))
    return rows


def write_gate(path: Path, content: Mapping[str, Any]) -> None:
    """Keep the gate's numbers."""
    write_json(path, content, format=GATE, version=GATE_VERSION)


def read_gate(path: Path) -> dict[str, Any]:
    """The gate's numbers. Raises `UserError` if they are missing or damaged."""
    return read_json(path, format=GATE, version=GATE_VERSION)

"""Doing one `Run`: open its data, train, evaluate, and write a record that says how every number was made."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from d3lib import provenance
from d3lib.artefacts import (
    atomic_write,
    canonical_json,
    digest_json,
    digest_tensors,
    load_weights,
    locked,
    read_json,
    save_weights,
    write_json,
)
from d3lib.baselines import BASELINES, fit_baseline
from d3lib.data.loader import eval_batches, train_batches
from d3lib.data.prepare import FolderStore, RoomsStore
from d3lib.data.shards import Store
from d3lib.errors import UserError
from d3lib.evaluation import as_predictor, evaluate, load_network
from d3lib.experiments import BUDGETS, Run
from d3lib.losses import build_loss
from d3lib.models import D3Net, PatchDiscriminator
from d3lib.training import fit, pick_device, pick_precision

BASELINE_CODE = ("d3lib.baselines", "d3lib.metrics", "d3lib.data.loader")
RECORD, RECORD_VERSION = "d3lib-record", 1
EVAL_BATCH = 16  # images predicted at once
BASELINE_STEPS = 600  # of the small networks among the baselines, at most
CURVE_FRAMES = 64  # frames of a set that a point of the learning curve is computed on
PREDICTIONS = 4  # test pictures kept with a run
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Sources:
    """The data of one run: sets by name, how many frames of each to use, and the depth that results count against."""

    sets: Mapping[str, Dataset]  # train, val, test, and for rooms unseen
    frames: Mapping[str, range]  # which frames of each set
    target: str  # "exact" where the true depth is known, else "depth"
    digest: str
    description: str

    def batches(self, name: str, run: Run, device: str, limit: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Evaluation batches of the named set, in order, at the run's size; at most `limit` frames."""
        size = (run.height, run.width)
        return eval_batches(
            self.sets[name], frames=self.frames[name][:limit], batch_size=EVAL_BATCH, size=size, device=device
        )


def stores_of(run: Run, data_root: Path) -> dict[str, RoomsStore]:
    """The prepared sets of rooms that a run reads, by name; empty for other data."""
    if run.data != "rooms":
        return {}
    budget = BUDGETS[run.budget]
    counts = {
        "train": (budget.train_scenes, max(budget.views.values())),
        "val": (budget.val_scenes, budget.test_views),
        "test": (budget.test_scenes, budget.test_views),
        "unseen": (budget.test_scenes, budget.test_views),
    }
    return {
        split: RoomsStore(data_root, split, scenes, views, run.height, run.width)
        for split, (scenes, views) in counts.items()
    }


def open_sources(run: Run, data_root: Path, progress: Progress | None = None) -> Sources:
    """Open (and for rooms, render if missing) the data of a run. Raises `UserError` where it is not to be had."""
    if run.data == "rooms":
        budget = BUDGETS[run.budget]
        stores = {name: store.open(progress) for name, store in stores_of(run, data_root).items()}
        frames = {name: range(len(store)) for name, store in stores.items()}
        frames["train"] = range(budget.frames(run.train_set))
        text = f"synthetic rooms, {len(frames['train'])} frames of {budget.train_scenes} scenes"
        return Sources(stores, frames, "exact", _digest_of(stores), text)
    if run.data == "nyu":
        raise UserError(
            f"{data_root / 'nyu'}: NYU Depth V2 is not prepared there; use --data rooms or --data folder:PATH"
        )
    return _folder_sources(run, data_root, progress)


def _folder_sources(run: Run, data_root: Path, progress: Progress | None) -> Sources:
    """A folder's sets. The last tenth of the training pairs, by time or name, is the validation set.

    The test set is the folder's own test split, or with `hold_out` the last pairs of its training split.
    """
    pictures = Path(run.data.removeprefix("folder:"))

    def store(split: str) -> Store:
        return FolderStore(data_root, pictures, split, run.height, run.width).open(progress)

    pairs = store("train")
    test = pairs if run.hold_out else store("test")
    remaining = len(pairs) - run.hold_out
    fitted = remaining - max(1, remaining // 10)
    if fitted < 1:
        raise UserError(f"{pictures}: {len(pairs)} pairs are too few to hold {run.hold_out} out; lower --hold-out")
    frames = {
        "train": range(fitted),
        "val": range(fitted, remaining),
        "test": range(remaining, len(pairs)) if run.hold_out else range(len(test)),
    }
    text = f"{fitted} RGB-D pairs of the folder {pictures.name}"
    sets = {"train": pairs, "val": pairs, "test": test}
    return Sources(sets, frames, "depth", _digest_of(sets), text)


def _digest_of(stores: Mapping[str, Store]) -> str:
    return digest_json({name: store.digest for name, store in stores.items()})


def execute(
    run: Run,
    out: Path,
    data_root: Path,
    *,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Do one run, or return its record if it was done with the same code and data; continue it if it was cut off.

    Writes `out/<run.key>/`: `record.json`, `weights.safetensors` (the checkpoint chosen on validation scenes) with
    its `model_card.md`, `predictions.npz` (a few test pictures), and while training `checkpoint.pt`.

    Returns the record's content. Raises `UserError` for missing or unfit data, `DivergedError` for a diverged run.
    """
    device = pick_device(device)
    folder = out / run.key
    net = build_network(run)  # before the data: weights that do not fit should not cost minutes of rendering
    sources = open_sources(run, data_root, progress)
    code = provenance.code_digest(*provenance.TRAINING_CODE)
    with locked(folder / ".lock"):  # two processes with the same run: the second finds the first one's record
        if (folder / "record.json").is_file():
            record = read_record(folder / "record.json")
            if (record["provenance"]["code_digest"], record["data"]["digest"]) == (code, sources.digest):
                return record
        state = State(folder)
        state.write("running")
        try:
            record = _train_and_score(run, net, sources, folder, device, code, progress)
        except BaseException as error:
            state.write("failed", f"{type(error).__name__}: {error}".splitlines()[0])
            raise
        state.write("done")
        return record


def _train_and_score(
    run: Run, net: D3Net, sources: Sources, folder: Path, device: str, code: str, progress: Progress | None
) -> dict[str, Any]:
    started = time.perf_counter()
    precision = pick_precision(run.precision, device)
    net = net.to(device, memory_format=torch.channels_last)
    adversary = PatchDiscriminator(ndf=run.ndf, seed=run.seed).to(device) if run.loss == "gan" else None

    def scores(name: str, network: nn.Module, limit: int | None = None) -> dict[str, Any]:
        targets = ("exact", "depth") if sources.target == "exact" else ("depth",)
        batches = sources.batches(name, run, device, limit)
        return evaluate(as_predictor(network, device, precision), batches, targets=targets)

    def point(network: nn.Module) -> dict[str, float | None]:
        """A point of the learning curve: pooled RMSE and δ<1.25 on a part of each set."""
        found = {name: scores(name, network, CURVE_FRAMES) for name in ("val", "test")}
        # the validation error that chooses weights counts against the training target: nobody has exact depth at home
        return {
            "val_rms": found["val"]["depth"]["pooled"]["rms"],
            "test_rms": found["test"][sources.target]["pooled"]["rms"],
            "test_d1": found["test"][sources.target]["pooled"]["d1"],
        }

    def batches(start: int) -> Iterator[dict[str, Tensor]]:
        return train_batches(
            sources.sets["train"],
            frames=sources.frames["train"],
            batch_size=run.batch_size,
            seed=run.seed,
            size=(run.height, run.width),
            device=device,
            start_step=start,
        )

    trace = fit(
        net,
        build_loss("l1" if run.loss == "gan" else run.loss, "paper" if run.loss == "gan" else run.variant),
        batches,
        steps=run.steps,
        learning_rate=run.learning_rate,
        betas=(run.beta1, run.beta2),
        adversary=adversary,
        lam=run.lam,
        variant=run.variant,
        device=device,
        precision=precision,
        evaluate=point,
        evaluations=run.evaluations,
        checkpoint=folder / "checkpoint.pt",
        identity=f"{run.key} {code} {sources.digest}",
        progress=progress,
    )
    last = {name: scores(name, net, CURVE_FRAMES if name == "train" else None) for name in sources.sets}
    net.load_state_dict(trace.best_weights)
    chosen = {name: scores(name, net, CURVE_FRAMES if name == "train" else None) for name in sources.sets}
    record = {
        "key": run.key,
        "run": dataclasses.asdict(run),
        "metrics": {"chosen": chosen, "last": last},
        "chosen_step": trace.best_step,
        "curve": trace.curve,
        "data": {
            "digest": sources.digest,
            "description": sources.description,
            "target": sources.target,
            "train_frames": len(sources.frames["train"]),
        },
        "weights_digest": digest_tensors(trace.best_weights),
        "provenance": provenance.collect(*provenance.TRAINING_CODE, device=device)
        | {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "precision": precision,
            "train_seconds": trace.seconds,
            "total_seconds": time.perf_counter() - started,
            "peak_memory_bytes": provenance.peak_memory(device),
        },
    }
    _write_predictions(folder, net, run, sources, device, precision)
    _write_weights(folder, trace.best_weights, record)
    write_json(folder / "record.json", record, format=RECORD, version=RECORD_VERSION)
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return record


def build_network(run: Run) -> D3Net:
    """The run's network with its initial weights: by seed alone, or from `run.init`."""
    net = D3Net(run.encoder, pretrained=run.pretrained, max_depth=run.max_depth, seed=run.seed)
    if run.init:
        weights, _ = load_weights(run.init)
        try:
            net.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"{run.init}: does not fit encoder {run.encoder}: {str(error).splitlines()[0]}") from error
    return net


def read_record(path: Path) -> dict[str, Any]:
    """A run's record. Raises `UserError` if it is missing, damaged or of another version."""
    return read_json(path, format=RECORD, version=RECORD_VERSION)


@dataclass(frozen=True)
class State:
    """What a run's folder says of it while there is no record: running, failed (and why), or done."""

    folder: Path

    def write(self, state: str, error: str = "") -> None:
        """Write `state.json`."""
        with atomic_write(self.folder / "state.json") as file:
            json.dump({"state": state, "error": error, "pid": os.getpid()}, file)

    def read(self) -> tuple[str, str]:
        """(state, error); a run said to be running whose process is gone is "interrupted"."""
        try:
            found = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
            state, error, pid = found["state"], found["error"], int(found["pid"])
        except (OSError, ValueError, KeyError, TypeError):
            state, error, pid = "done", "", 0
        if state == "done":
            return ("done" if (self.folder / "record.json").is_file() else "not run"), ""
        if state == "running" and not _alive(pid):
            return "interrupted", "its process ended without a record; run it again to continue from its checkpoint"
        return state, error


def _alive(pid: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _write_predictions(folder: Path, net: nn.Module, run: Run, sources: Sources, device: str, precision: str) -> None:
    """Keep a few test pictures with what the network made of them, spread over the test set (float16 metres)."""
    batch = next(iter(sources.batches("test", run, device, limit=PREDICTIONS)))
    pred = as_predictor(net, device, precision)(batch["rgb"])
    with atomic_write(folder / "predictions.npz", "wb") as file:
        np.savez_compressed(
            file,
            rgb=(batch["rgb"] * 255).round().to(torch.uint8).cpu().numpy(),
            depth=batch[sources.target].half().cpu().numpy(),
            valid=batch["valid"].cpu().numpy(),
            pred=pred.half().cpu().numpy(),
        )


def _write_weights(folder: Path, weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write the chosen weights with all that `predict` must know of them, and their model card."""
    run, data = record["run"], record["data"]
    metadata = {
        "encoder": run["encoder"],
        "max_depth": str(run["max_depth"]),
        "height": str(run["height"]),
        "width": str(run["width"]),
        "trained_on": data["description"],
        "run": canonical_json(run),
        "key": record["key"],
    }
    try:
        save_weights(folder / "weights.safetensors", weights, metadata)
    except UserError as error:  # a bare machine without the package still gets its record
        print(f"weights are not kept: {error}")
        return
    with atomic_write(folder / "model_card.md") as file:
        file.write(model_card(record))


def model_card(record: Mapping[str, Any]) -> str:
    """A weights file's card in Markdown: what it is, what it was trained on, how good it is, what it is not for."""
    run, data, made = record["run"], record["data"], record["provenance"]
    rows = [
        (name, target, scores)
        for name, found in record["metrics"]["chosen"].items()
        for target, scores in found.items()
    ]
    lines = [
        f"# {record['key']}",
        "",
        f"D3-Net ({run['encoder']}) trained with the loss `{run['loss']}` ({run['variant']} variant): "
        "depth in metres from one RGB image.",
        "",
        f"- Trained on: {data['description']}, {run['steps']} steps of {run['batch_size']} images at "
        f"{run['height']}x{run['width']}, seed {run['seed']}; the weights of step {record['chosen_step']} did best on "
        "validation scenes.",
        f"- ImageNet weights: {'yes' if run['pretrained'] else 'no'}; started from: {run['init'] or 'random weights'}.",
        f"- Made by commit {made['commit'] or 'unknown'}{' with changes' if made['dirty'] else ''} on "
        f"{made['device']}, finished {made['finished']}; weights digest {record['weights_digest'][:16]}.",
        "",
        "| set | against | images | RMSE (m) | abs rel | δ < 1.25 |",
        "|---|---|---|---|---|---|",
    ]
    for name, target, scores in rows:
        cells = [scores["pooled"][metric] for metric in ("rms", "rel", "d1")]
        shown = " | ".join("-" if cell is None else f"{cell:.3f}" for cell in cells)
        words = {"exact": "exact depth", "depth": "sensor depth"}[target]
        lines.append(f"| {name} | {words} | {scores['images']} | {shown} |")
    lines += [
        "",
        "Scores are pooled over all valid pixels of a set, at network size.",
        "",
        "Limits: a network knows the kind of scenes it was trained on and no others. Depth from one picture is a guess "
        "at scale: do not use it where people rely on distances.",
        "",
    ]
    return "\n".join(lines)


def score_baselines(
    run: Run, out: Path, data_root: Path, *, device: str = "auto", progress: Progress | None = None
) -> dict[str, Any]:
    """What any network must beat on the run's data: each baseline, fitted to the training set, scored like a run.

    Written to `out/baselines/<name>.json` and read from there if code and data are unchanged.
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
    # the small networks see as many images as the run does, up to where they have learnt what they can
    steps = max(1, min(BASELINE_STEPS, run.images // EVAL_BATCH))
    scores = {}
    for name in BASELINES:
        if progress is not None:
            progress(f"baseline {name} on {path.stem}")
        fitted = fit_baseline(name, lambda: sources.batches("train", run, device), run.seed, steps)
        scores[name] = {
            part: evaluate(fitted, sources.batches(part, run, device), targets=targets)
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
    ours = {name: evaluate(as_predictor(net, device), sources.batches(name, run, device)) for name in parts}
    found = {weights.name: ours, **score_baselines(run, out, data_root, device=device)["scores"]}
    columns = {"rms": "RMSE (m)", "rel": "abs rel", "log10": "log10", "d1": "d1", "d2": "d2", "d3": "d3"}
    rows = [["predictor", "set", "images", *columns.values(), "RMSE per image (m)"]]
    for name, scores in found.items():
        for part, score in scores.items():
            values = [score["depth"]["pooled"][metric] for metric in columns]
            values.append(score["depth"]["per_image"]["rms"])
            shown = ["-" if value is None else f"{value:.3f}" for value in values]
            rows.append([name, part, str(score["depth"]["images"]), *shown])
    return rows


def baselines_path(run: Run, out: Path) -> Path:
    """Where the baselines of a run's data are kept; runs with the same training data and size share them."""
    data = run.data if run.data in ("rooms", "nyu") else f"folder-{digest_json([run.data, run.hold_out])[:8]}"
    return out / "baselines" / f"{data}-{run.train_set}-{run.height}x{run.width}.json"

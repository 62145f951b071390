"""What a run leaves behind, read back: its record, its state, its model card."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import platform
import random
import statistics
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d3lib.artefacts import PROJECT, atomic_write, canonical_json, digest_json, read_json, unwrap, wrap, write_json
from d3lib.errors import UserError
from d3lib.experiments import Run
from d3lib.intervals import converged
from d3lib.provenance import TRAINING_CODE, code_digest

RECORD, RECORD_VERSION = "d3lib-record", 1
STATE, PICTURES = "d3lib-state", "predictions.npz"
RERUN, VOUCHED, RERUN_ENOUGH = "d3lib-rerun", "d3lib-vouched", 10
OUTCOMES = {
    RERUN: {"key": str, "rms_then": float, "rms_now": float, "same_weights": bool, "same_data": bool},
    VOUCHED: {"key": str, "code": str, "data": str, "same": bool},
}
BOOK = PROJECT / "book" / "records"  # what comes with the book


def read_record(path: Path) -> dict[str, Any]:
    """A run's record. Raises `UserError` if it is missing, damaged or of another version."""
    return read_json(path, format=RECORD, version=RECORD_VERSION)


def committed_records(folder: Path = BOOK) -> list[dict[str, Any]]:
    """The records that are part of the book: each line of each `*.jsonl` in `folder` is a run's record.

    They are read once for as long as the files stay as they are: what calls this must not change them.
    Raises `UserError` for a damaged line.
    """
    stamps = ((path, path.stat()) for path in sorted(folder.glob("*.jsonl")))
    return [record for path, now in stamps for record in _read_lines(path, now.st_ino, now.st_size, now.st_mtime_ns)]


@functools.lru_cache(maxsize=8)
def _read_lines(path: Path, *_: int) -> tuple[dict[str, Any], ...]:
    """The records in one file; the other arguments say which state of it was read."""
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    return tuple(unwrap(line, f"{path}, line {n}", format=RECORD, version=RECORD_VERSION) for n, line in lines)


def keep_records(records: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Give `path`, a part of the book, a line for each record, beside those of other runs; returns how many it has.

    Numbers are rounded to six digits, of which the pages show three or four. Of a folder of pictures only the name is
    kept (see `published`).
    """
    kept = {record["key"]: record for record in committed_records(path.parent) if path.stem == record["run"]["budget"]}
    for record in records:
        if record["run"].get("data", "").startswith("folder:"):
            run = published(Run(**record["run"]))
            record = {**record, "run": dataclasses.asdict(run), "key": run.key}
        kept[record["key"]] = _rounded(record)
    with atomic_write(path) as file:
        for key in sorted(kept):
            file.write(canonical_json(wrap(kept[key], format=RECORD, version=RECORD_VERSION)) + "\n")
    return len(kept)


def keep_pictures(folder: Path, place: Path) -> None:
    """Give `place`, a part of the book, the first test pictures of the run in `folder` and its depth of them.

    The run's worst pictures stay behind. Raises `UserError` if the file is damaged.
    """
    found = read_pictures(folder)
    with atomic_write(place / PICTURES, "wb") as file:
        np.savez_compressed(file, **{name: values[~found["worst"]] for name, values in found.items()})


def read_pictures(folder: Path) -> dict[str, np.ndarray]:
    """A few test pictures of the run in `folder`, n of them at network size.

    Returns rgb (n, 3, H, W) uint8, depth and pred (n, 1, H, W) float16 in metres, valid (n, 1, H, W), index and worst
    (n,): place in the test set, and whether it is there as one of the worst. Raises `UserError` if they are damaged.
    """
    path = folder / PICTURES
    try:
        with np.load(path, allow_pickle=False) as kept:
            return {name: kept[name] for name in ("rgb", "depth", "valid", "pred", "index", "worst")}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete its run's folder and do the run again") from error


def published(run: Run) -> Run:
    """A run as the book names it: of a folder of pictures, `<name>/fold-K` and not where it lies on some machine."""
    if not run.data.startswith("folder:"):
        return run
    return dataclasses.replace(run, data="folder:" + "/".join(Path(run.data.removeprefix("folder:")).parts[-2:]))


def _rounded(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its floats to six digits; parameters of a run are what they are in six, too."""
    return json.loads(json.dumps(record), parse_float=lambda digits: float(f"{float(digits):.6g}"))


@dataclass(frozen=True)
class State:
    """What a run's folder says of it: not run, running, interrupted, failed (and why), done, or older."""

    folder: Path

    def write(self, state: str, error: str = "") -> None:
        """Write `state.json`."""
        content = {"state": state, "error": error, "pid": os.getpid(), "host": platform.node()}
        write_json(self.folder / "state.json", content, format=STATE)

    def read(self) -> tuple[str, str]:
        """(state, error); a run said to be running whose process is gone is "interrupted"."""
        try:
            found = read_json(self.folder / "state.json", format=STATE)
            state, error, pid = str(found["state"]), str(found["error"]), int(found["pid"])
            here = found["host"] == platform.node()
        except (UserError, KeyError, TypeError, ValueError, OverflowError):  # missing or damaged: the record says it
            state, error, pid, here = "done", "", 0, True
        if state == "done":
            return self._done()
        if state == "running" and here and not _alive(pid):  # of another machine's process one sees nothing
            return "interrupted", "its process ended without a record; run it again to continue from its checkpoint"
        return state, error

    def _done(self) -> tuple[str, str]:
        path = self.folder / "record.json"
        if not path.is_file():
            return "not run", ""
        try:
            return ("done", "") if same_code(read_record(path)) else ("older", "made by other training code")
        except UserError as error:
            return "failed", str(error)


def same_code(record: Mapping[str, Any]) -> bool:
    """Whether the training code that made a record is the code that is here now, but for layout and comments."""
    return record["provenance"]["code_digest"] == code_digest(*TRAINING_CODE)


def is_current(record: Mapping[str, Any]) -> bool:
    """Whether a record is what today's training code would make: of the same code, or of older code that does the same.

    That is taken from `make vouch`: it begins at least RERUN_ENOUGH records drawn at random of each `population` again,
    by their own code and by today's, and all of them must have come to the same bits.
    """
    return same_code(record) or population(record) in _vouched(BOOK, code_digest(*TRAINING_CODE))


def draw_records(records: Sequence[Mapping[str, Any]], count: int = RERUN_ENOUGH) -> list[Mapping[str, Any]]:
    """`count` (or all) records of each `population`, drawn at random, but no loss twice before every loss once."""
    populations: dict[tuple[str, ...], dict[str, list[Mapping[str, Any]]]] = {}
    for record in random.sample(records, len(records)):
        populations.setdefault(population(record), {}).setdefault(record["run"]["loss"], []).append(record)
    drawn = []
    for by_loss in populations.values():
        turns = itertools.chain.from_iterable(itertools.zip_longest(*by_loss.values()))
        drawn += [record for record in turns if record is not None][:count]
    return drawn


def population(record: Mapping[str, Any]) -> tuple[str, ...]:
    """What records share that can stand for each other: code, budget, encoder, kind of data and start, device."""
    run, made = record["run"], record["provenance"]
    kind = str(run.get("data")).partition(":")[0]  # of all folders of pictures one
    start = "weights" if run.get("init") else "random"
    return (made["code_digest"], str(run.get("budget")), str(run.get("encoder")), kind, start, str(made.get("device")))


@functools.cache
def _vouched(folder: Path, now: str) -> frozenset[tuple[str, ...]]:
    """The populations that the book's own outcomes vouch for, if they are of the code `now`."""
    kept = read_rerun(folder / "vouched.json", VOUCHED)
    if kept is None or kept["provenance"]["code_digest"] != now:
        return frozenset()
    return vouched_for(kept, committed_records(folder))


def vouched_for(kept: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> frozenset[tuple[str, ...]]:
    """The populations of which enough of `records` were begun again by their own code and by today's alike.

    `kept` is as `read_rerun` gives it. A code that once came to other bits is vouched for in no population, also if the
    record that showed it has been made anew since.
    """
    book = {record["key"]: record for record in records}
    differ = {outcome["code"] for outcome in kept["outcomes"] if not outcome["same"]}
    found: dict[tuple[str, ...], set[str]] = {}
    for outcome in kept["outcomes"]:
        if (record := book.get(outcome["key"])) is None:
            continue
        made = record["provenance"]
        its_own = [made["code_digest"], record["data"]["digest"], made.get("device_kind")]
        if its_own == [outcome["code"], outcome["data"], kept["provenance"].get("device_kind")]:
            found.setdefault(population(record), set()).add(record["key"])
    size = Counter(map(population, book.values()))
    return frozenset(p for p, same in found.items() if len(same) >= min(RERUN_ENOUGH, size[p]) and p[0] not in differ)


def vouch_outcome(key: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Whether two codes came to the same weights and scores, to the last bit.

    `then` is by the older code; parts that it did not write yet (details, say) are not compared.
    """
    parts = ("weights_digest", "data", "metrics", "details", "by_scene", "chosen_step")
    same = all(then[part] == now[part] for part in parts if part in then)
    code, data = then["provenance"]["code_digest"], then["data"]["digest"]
    return {"key": key, "code": code, "data": data, "same": same}


def rerun_outcome(record: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What a record's run gave when it was done again: test RMSE in metres, weights and data compared by digest."""
    return {
        "key": record["key"],
        "rms_then": _test_rms(record),
        "rms_now": _test_rms(now),
        "same_weights": record["weights_digest"] == now["weights_digest"],
        "same_data": record["data"]["digest"] == now["data"]["digest"],
    }


def but_for_seed(record: Mapping[str, Any]) -> str:
    """A digest that a record shares with those whose runs differ from its own in nothing but the seed."""
    return digest_json(record["run"] | {"seed": 0})


def moves(outcomes: Iterable[Mapping[str, Any]], records: Iterable[Mapping[str, Any]]) -> tuple[int, float, float]:
    """How far re-runs that ended with other weights moved, beside what two seeds of the same runs differ by.

    Args:
        outcomes: as of `rerun_outcome`; those count whose run has a second seed among `records`.

    Returns how many count, and two root mean squares of test RMSE in metres (NaN if none counts).
    """
    kept = {record["key"]: record for record in records}
    cell = {key: but_for_seed(record) for key, record in kept.items()}
    seeds: dict[str, list[float]] = {}
    for key, record in kept.items():
        seeds.setdefault(cell[key], []).append(_test_rms(record))
    pairs = [
        (outcome["rms_now"] - outcome["rms_then"], same)
        for outcome in outcomes
        if not outcome["same_weights"] and outcome["key"] in kept and len(same := seeds[cell[outcome["key"]]]) > 1
    ]
    if not pairs:
        return 0, math.nan, math.nan
    moved = statistics.fmean(change**2 for change, _ in pairs)
    return len(pairs), math.sqrt(moved), math.sqrt(2 * statistics.fmean(statistics.variance(x) for _, x in pairs))


def _test_rms(record: Mapping[str, Any]) -> float:
    """Pooled test RMSE of the chosen weights, metres, against the record's own kind of depth."""
    return record["metrics"]["chosen"]["test"][record["data"]["target"]]["pooled"]["rms"]


def write_rerun(
    path: Path, outcomes: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any], format: str = RERUN
) -> None:
    """Keep outcomes beside the code and machine that they come from; `format` is RERUN or VOUCHED."""
    write_json(path, {"outcomes": list(outcomes), "provenance": provenance}, format=format)


def read_rerun(path: Path, format: str = RERUN) -> dict[str, Any] | None:
    """What `write_rerun` kept, `None` if nothing is there. Raises `UserError` if it is damaged or odd."""
    if not path.is_file():
        return None
    kept = read_json(path, format=format)
    try:
        found = [(kept["provenance"]["code_digest"], str)]
        found += [(outcome[name], kind) for outcome in kept["outcomes"] for name, kind in OUTCOMES[format].items()]
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path}: lacks {error}; delete it, or make it again (see `make help`)") from error
    for value, kind in found:
        if type(value) is not kind:
            raise UserError(f"{path}: {value!r} should be a {kind.__name__}; delete it, or make it again")
    return kept


def _alive(pid: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _end_of(curve: Sequence[Mapping[str, Any]]) -> str:
    """How the learning curve ends, in words."""
    end = converged(curve)
    if end.change is None:
        return "too few points to say how it ends"
    return f"{end.course} in the end, test RMSE changed by {end.change:+.1%} in the last fifth of the run"


def model_card(record: Mapping[str, Any]) -> str:
    """A weights file's card in Markdown: what it is, what it was trained on, how good it is, what it is not for."""
    run, data, made = record["run"], record["data"], record["provenance"]
    lines = [
        f"# {record['key']}",
        "",
        f"D3-Net ({run['encoder']}) trained with the loss `{run['loss']}` ({run['variant']} variant): "
        "depth in metres from one RGB image.",
        "",
        f"- Trained on: {data['description']}, {run['steps']} steps of {run['batch_size']} images at "
        f"{run['height']}x{run['width']}, seed {run['seed']}; the weights of step {record['chosen_step']} did best on "
        "validation scenes.",
        f"- Learning curve: {_end_of(record['curve'])}.",
        f"- ImageNet weights: {'yes' if run['pretrained'] else 'no'}; started from: {run['init'] or 'random weights'}.",
        f"- Made by commit {made['commit'] or 'unknown'}{' with changes' if made['dirty'] else ''} on "
        f"{made['device']}, finished {made['finished']}; weights digest {record['weights_digest'][:16]}.",
        "",
        "| set | against | images | RMSE (m) | abs rel | δ < 1.25 |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in record["metrics"]["chosen"].items():
        for target, scores in found.items():
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

"""The book's records: run again (`make rerun`), or begun again by older and today's training code (`make vouch`)."""

import concurrent.futures
import functools
import io
import json
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from test_kill import CONTEXT

from d3lib.artefacts import PROJECT, data_folder, digest_file, digest_json
from d3lib.experiments import make_run
from d3lib.provenance import TRAINING_CODE, code_digest, collect
from d3lib.records import (
    RERUN_ENOUGH,
    VOUCHED,
    committed_records,
    draw_records,
    moves,
    population,
    read_rerun,
    rerun_outcome,
    same_code,
    vouch_outcome,
    vouched_for,
    write_rerun,
)
from d3lib.training import pick_device

COUNT = int(os.environ.get("D3LIB_RERUN", RERUN_ENOUGH))
RECORD = os.environ.get("D3LIB_RERUN_RECORD")
ELSEWHERE = 2  # on another kind of machine rounding differs, and so a run's course: as another seed's, not twice as far
LONGEST = 30 * 60  # seconds of a run that is done again
FIRST_STEPS = 30  # of a run that is begun again: where two codes differ in one bit, so do all weights soon after
PICTURES = os.environ.get("D3LIB_PICTURES")  # the folder of folds that some records were trained on, who has it
BEGIN = """
import json, sys
from pathlib import Path
import torch
from d3lib.execution import execute
from d3lib.experiments import make_run
from d3lib.provenance import TRAINING_CODE, code_digest
run, threads, out, data, result = json.loads(sys.argv[1])
torch.set_num_threads(threads)
record = execute(make_run(**run), Path(out), Path(data))
record["provenance"]["code_digest"] = code_digest(*TRAINING_CODE)
Path(result).write_text(json.dumps(record))
"""


def candidates(records):
    """Those that can be trained here: on this device, on data anyone can make or on `PICTURES`.

    From random weights, or from those of a run that has a record too and can be trained here itself.
    """
    device = pick_device().partition(":")[0]
    here = {
        record["key"]: record
        for record in records
        if record["provenance"]["device_kind"] == device
        and (record["run"]["data"] == "rooms" or (PICTURES and record["run"]["data"].startswith("folder:")))
    }
    return [r for r in here.values() if not r["run"]["init"] or r["run"]["init"].removeprefix("run:") in here]


@pytest.fixture(autouse=True)
def writable():
    """Asked before half an hour of work."""
    if RECORD:
        assert COUNT >= RERUN_ENOUGH, f"{RECORD}: a record of a re-run needs {RERUN_ENOUGH} runs"
        assert os.access(Path(RECORD).parent, os.W_OK), f"{RECORD}: cannot be written"


def at_once(records):
    return max(1, os.cpu_count() // max(record["provenance"]["threads"] for record in records))


def again(record, out):
    """The record's run, done again in a process of its own, with as many threads."""
    import torch

    from d3lib.execution import execute

    torch.set_num_threads(record["provenance"]["threads"])
    os.environ["D3LIB_COMPILE"] = record["provenance"].get("compiler") or "none"
    return execute(make_run(**record["run"]), out, data_folder())


def kind(provenance):
    """What decides a rounding: who lacks one of them is of a kind of its own."""
    return [provenance.get("device"), provenance.get("vectors"), provenance["versions"].get("torch")]


@pytest.mark.study
def test_records_of_the_book_drawn_at_random_run_again_to_the_same_numbers(tmp_path):
    records = [r for r in candidates(committed_records()) if r["run"]["data"] == "rooms" and not r["run"]["init"]]
    records = [r for r in records if r["provenance"]["total_seconds"] < LONGEST]
    assert records, "the book has no records"
    drawn = random.sample(records, min(COUNT, len(records)))
    with concurrent.futures.ProcessPoolExecutor(at_once(drawn), CONTEXT) as pool:
        outcomes = []
        for record, now in zip(drawn, pool.map(functools.partial(again, out=tmp_path), drawn), strict=True):
            outcomes.append(rerun_outcome(record, now))
            print(outcomes[-1], flush=True)
    here = collect(*TRAINING_CODE)
    if RECORD:
        write_rerun(Path(RECORD), outcomes, here)
    _, moved, apart = moves(outcomes, committed_records())
    assert not moved > ELSEWHERE * apart, (moved, apart)  # NaN where all have the same weights
    for record, outcome in zip(drawn, outcomes, strict=True):
        assert outcome["same_data"], outcome
        if kind(record["provenance"]) == kind(here):
            assert outcome["same_weights"], outcome
            assert outcome["rms_now"] == pytest.approx(outcome["rms_then"], rel=1e-5)  # the book keeps six digits


def library_of(records, folder):
    """The library as it was when the records were made; None where no commit of it is in this clone."""
    for commit in {record["provenance"]["commit"] for record in records if record["provenance"]["dirty"] is False}:
        packed = subprocess.run(["git", "archive", commit, "d3lib"], cwd=PROJECT, capture_output=True)
        if packed.returncode == 0:
            with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
                archive.extractall(folder, filter="data")
            return folder
    return None


def begun(run, made, library, out):
    """The first steps of a run by the code in `library`, with as many threads and the compiler that `made` names."""
    out.mkdir(parents=True)
    run = run | {"steps": min(run["steps"], FIRST_STEPS), "evaluations": 1}
    if run["data"] != "rooms":
        run["data"] = f"folder:{Path(PICTURES).resolve() / Path(run['data']).name}"
    arguments = [run, made["threads"], str(out), str(data_folder().resolve()), str(out / "result.json")]
    environment = {name: value for name, value in os.environ.items() if name != "D3LIB_COMPILE"}
    environment |= {"PYTHONPATH": str(library)} | ({"D3LIB_COMPILE": made["compiler"]} if made.get("compiler") else {})
    command = [sys.executable, "-c", BEGIN, json.dumps(arguments)]
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((out / "result.json").read_text())


def from_new_weights(record, library, out):
    """A record's run from other weights than it had, which are gone, and the digest that its data must have then.

    The weights are those after the first steps of the run that it started from. That the pictures are the record's is
    taken from the record that differs from it in nothing but its start, at random: its own digest covers weights too.
    """
    book = committed_records()
    before = next(r for r in book if record["run"]["init"] == f"run:{r['key']}")
    at_random = next((r for r in book if r["run"] == record["run"] | {"init": ""}), None)
    assert at_random, "no record of the same run from random weights tells its pictures"
    begun(before["run"], record["provenance"], library, out)
    weights = next(out.rglob("weights.safetensors"))
    return record["run"] | {"init": str(weights)}, digest_json([at_random["data"]["digest"], digest_file(weights)])


def both(record, library, out):
    """Begin a record's run by its own code and by today's."""
    made, today = record["provenance"], code_digest(*TRAINING_CODE)
    try:
        run, data = record["run"], record["data"]["digest"]
        if run["init"]:
            run, data = from_new_weights(record, library, out / "start")
        places = ((library, "then"), (PROJECT, "now"))
        then, now = (begun(run, made, place, out / name) for place, name in places)
        assert [r["provenance"]["code_digest"] for r in (then, now)] == [made["code_digest"], today]
        assert then["data"]["digest"] == data, "other data than the record's"
        outcome = vouch_outcome(record["key"], then, now) | {"data": record["data"]["digest"]}
    except Exception as error:  # counts as not the same, and takes nothing from the others
        print(record["key"], error)
        data = record["data"]["digest"]
        outcome = {"key": record["key"], "code": made["code_digest"], "data": data, "same": False}
    print(outcome["key"], outcome["same"], flush=True)
    return outcome


def vouched_before(path, provenance):
    """What the file to add to holds, if that is of today's code and was found on this kind of machine; else nothing."""

    def found_by(made):
        return [*kind(made), made["code_digest"], made.get("device_kind"), made.get("steps")]

    before = read_rerun(Path(path), VOUCHED) if path else None
    holds = before and found_by(before["provenance"]) == found_by(provenance)
    return before if holds else {"outcomes": [], "provenance": provenance}


@pytest.mark.study
def test_older_code_that_made_records_and_todays_begin_their_runs_alike_to_the_last_bit(tmp_path):
    provenance = collect(*TRAINING_CODE, device=pick_device()) | {"steps": FIRST_STEPS}
    kept = vouched_before(RECORD, provenance)
    done = vouched_for(kept, committed_records())
    failed = {outcome["key"] for outcome in kept["outcomes"] if not outcome["same"]}
    versions = {}
    for record in candidates(committed_records()):
        if not same_code(record) and population(record) not in done:
            versions.setdefault(record["provenance"]["code_digest"], []).append(record)
    if done and not versions:
        pytest.skip(f"{RECORD} vouches for all records of older code already; without it they are begun again")
    libraries = {code: library_of(records, tmp_path / code) for code, records in versions.items()}
    known = [record for code, records in versions.items() if libraries[code] for record in records]
    drawn = {record["key"]: record for record in draw_records(known, COUNT)}
    drawn = list((drawn | {record["key"]: record for record in known if record["key"] in failed}).values())
    if not drawn:
        pytest.skip("no records of older code that is in this clone's history")
    with concurrent.futures.ThreadPoolExecutor(at_once(drawn)) as pool:
        places = [(libraries[r["provenance"]["code_digest"]], tmp_path / "runs" / r["key"]) for r in drawn]
        outcomes = [done.result() for done in [pool.submit(both, r, *p) for r, p in zip(drawn, places, strict=True)]]
    if RECORD:
        again = {outcome["key"] for outcome in outcomes}
        outcomes = [outcome for outcome in kept["outcomes"] if outcome["key"] not in again] + outcomes
        write_rerun(Path(RECORD), outcomes, provenance, VOUCHED)
    assert all(outcome["same"] for outcome in outcomes)

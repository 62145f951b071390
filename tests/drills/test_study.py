"""The book's records, run again: `make rerun`. Ten take half an hour on two cores, `D3LIB_RERUN=2` runs two.

So many are drawn of each version of the training code that made records.
"""

import concurrent.futures
import functools
import os
from pathlib import Path

import pytest
from test_kill import CONTEXT

from d3lib.artefacts import data_folder
from d3lib.experiments import make_run
from d3lib.provenance import TRAINING_CODE, collect
from d3lib.records import RERUN_ENOUGH, committed_records, draw_records, rerun_outcome, write_rerun

ELSEWHERE = 0.10  # on another kind of machine a run's rounding differs, and so does its course: as another seed's would


def again(record, out):
    """The record's run, done again in a process of its own, with as many threads."""
    import torch

    from d3lib.execution import execute

    torch.set_num_threads(record["provenance"]["threads"])
    os.environ["D3LIB_COMPILE"] = record["provenance"].get("compiler") or "none"
    return execute(make_run(**record["run"]), out, data_folder())


@pytest.mark.study
def test_records_of_the_book_drawn_at_random_run_again_to_the_same_numbers(tmp_path):
    made = [record for record in committed_records() if record["run"]["data"] == "rooms"]  # data that anyone can make
    records = [record for record in made if not record["run"]["init"]]
    count, kept = int(os.environ.get("D3LIB_RERUN", RERUN_ENOUGH)), os.environ.get("D3LIB_RERUN_RECORD")
    assert records, "the book has no records"
    if kept:  # before half an hour of work
        assert count >= RERUN_ENOUGH, f"{kept}: a record of a re-run needs {RERUN_ENOUGH} runs"
        assert os.access(Path(kept).parent, os.W_OK), f"{kept}: cannot be written"
    drawn = draw_records(records, count)
    at_once = os.cpu_count() // max(record["provenance"]["threads"] for record in drawn)
    with concurrent.futures.ProcessPoolExecutor(max(1, at_once), CONTEXT) as pool:
        outcomes = []
        for record, now in zip(drawn, pool.map(functools.partial(again, out=tmp_path), drawn), strict=True):
            outcomes.append(rerun_outcome(record, now))
            print(outcomes[-1], flush=True)
    here = collect(*TRAINING_CODE)
    if kept:
        write_rerun(Path(kept), outcomes, here)
    for record, outcome in zip(drawn, outcomes, strict=True):
        made = record["provenance"]
        assert outcome["same_data"], outcome
        if made["device"] == here["device"] and made["versions"]["torch"] == here["versions"]["torch"]:
            assert outcome["same_weights"], outcome
            assert outcome["rms_now"] == pytest.approx(outcome["rms_then"], rel=1e-5)  # the book keeps six digits
        else:
            assert outcome["rms_now"] == pytest.approx(outcome["rms_then"], rel=ELSEWHERE)

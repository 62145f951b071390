"""What a batch will cost: from runs that were done, or from a few timed steps."""

import time

import pytest

from d3lib import costs
from d3lib.artefacts import write_json
from d3lib.experiments import all_runs, make_run, manifest
from d3lib.provenance import device_name
from d3lib.records import RECORD, RECORD_VERSION


def test_a_few_timed_steps_foretell_many(tmp_path):
    run = make_run("drill", steps=40)
    found = costs.measure(run, "cpu")
    start = time.perf_counter()
    again = costs.measure(run, "cpu")
    spent = time.perf_counter() - start
    assert 0 < found["step"] < spent and 0 < found["image"] < spent
    assert again["step"] == pytest.approx(found["step"], rel=10)  # the order of magnitude, on a busy machine


def test_runs_that_were_done_here_tell_more_than_timed_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "measure", lambda run, device: {"step": 1.0 + (run.loss == "gan"), "image": 0})
    runs = all_runs("drill", "fig2")
    first = next(key for key, run in runs.items() if run.loss == "l1")
    made = {"device": device_name("cpu"), "total_seconds": 77.0}
    content = {"provenance": made}
    write_json(tmp_path / "drill" / first / "record.json", content, format=RECORD, version=RECORD_VERSION)
    seconds = costs.seconds_of(runs.values(), tmp_path, "cpu")
    for key, run in runs.items():
        expected = run.steps * 2.0 if run.loss == "gan" else 77.0
        assert seconds[key] == pytest.approx(costs.START + expected)
    monkeypatch.setattr(costs, "measure", None)  # what was timed is kept
    assert costs.seconds_of(runs.values(), tmp_path, "cpu") == seconds


def test_a_plan_counts_a_run_once_and_names_the_question(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "measure", lambda run, device: {"step": 36.0, "image": 0.0})
    monkeypatch.setattr(costs, "START", 0.0)
    runs = all_runs("study")
    text = costs.plan_text("study", runs.values(), tmp_path, "cpu")
    counts = [int(line.split()[1]) for line in text.splitlines()[1:]]
    assert sum(counts) == len(runs)
    hours = sum(run.steps for run in runs.values()) * 36 / 3600
    assert f"about {hours:.1f} h" in text
    assert manifest("study")["rate"].question in text
    assert costs.plan_text("study", [], tmp_path, "cpu") == "every run is done"

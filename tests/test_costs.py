"""What a batch will cost: from runs that were done, or from a few timed steps."""

import dataclasses
import time
from types import SimpleNamespace

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
    first = manifest("study")["fig2"].runs
    assert text.splitlines()[1].split()[:5] == ["fig2", "105", "runs", f"{sum(r.steps for r in first) / 100:.1f}", "h"]
    hours = sum(run.steps for run in runs.values()) * 36 / 3600
    assert f"about {hours:.1f} h" in text
    assert manifest("study")["rate"].question in text
    assert costs.plan_text("study", [], tmp_path, "cpu") == "every run is done"


def test_a_run_like_others_takes_their_median_and_only_those_of_this_device(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "measure", lambda run, device: {"step": 1.0, "image": 0})
    runs = {run.loss: run for run in manifest("drill")["fig2"].runs if run.train_set == "12k"}
    here = device_name("cpu")
    done = {"l1": (here, 10.0), "l2": (here, 20.0), "eigen": (here, 90.0), "huber": ("another", 1e6)}
    for loss, (device, seconds) in done.items():
        path = tmp_path / "drill" / runs[loss].key / "record.json"
        content = {"provenance": {"device": device, "total_seconds": seconds}}
        write_json(path, content, format=RECORD, version=RECORD_VERSION)
    assert costs.seconds_of([runs["berhu"]], tmp_path, "cpu") == {runs["berhu"].key: costs.START + 20.0}


def test_a_measurement_is_of_one_step_and_of_one_image(monkeypatch):
    clock = iter([100.0, 104.0])  # before and after the prediction of 8 images
    monkeypatch.setattr(costs, "as_predictor", lambda *_: lambda rgb: rgb)
    monkeypatch.setattr(costs, "train_in_parts", lambda net, source, parts, *_, **__: ([], [0.25] * (parts - 1)))
    monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert costs.measure(make_run("drill"), "cpu") == {"step": 0.25, "image": 0.5}


def test_points_on_the_curve_cost_and_processes_share_the_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "measure", lambda run, device: {"step": 10.0, "image": 1.0})
    one = make_run("drill", loss="l1")
    runs = [one, dataclasses.replace(one, evaluations=3), dataclasses.replace(one, gpus=2)]
    base, longer, shared = (costs.seconds_of([run], tmp_path, "cpu")[run.key] for run in runs)
    assert longer - base == 2 * 2 * 3  # two more points, each scored on two sets of three frames
    assert base - shared == one.steps * 10 / 2

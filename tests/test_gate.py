"""The difficulty gate: its rule is applied as written, and its numbers come from the runs."""

import pytest

from d3lib import gate as rule
from d3lib.artefacts import PROJECT
from d3lib.data import rooms
from d3lib.experiments import make_run
from d3lib.gate import BASELINE, D1_RANGE, OVERFIT, gate_rows, measure_gate, read_gate, write_gate
from d3lib.records import read_record


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    run = make_run("drill")
    return measure_gate(run, place / "drill", place / "data", device="cpu"), place


def test_the_gates_numbers_are_those_of_its_records(gate):
    content, place = gate
    records = {
        name: read_record(place / "drill" / content["runs"][name]["key"] / "record.json") for name in ("12k", "795")
    }
    test = records["12k"]["metrics"]["chosen"]["test"]["exact"]["pooled"]
    assert content["measured"]["d1"] == test["d1"]
    assert content["measured"]["baseline"] == min(content["baselines"].values()) / test["rms"]
    small = records["795"]["metrics"]["chosen"]
    ratio = small["test"]["depth"]["pooled"]["rms"] / small["train"]["depth"]["pooled"]["rms"]
    assert content["measured"]["overfit"] == ratio
    assert content["interventions"]["none"]["rms"] == pytest.approx(test["rms"], rel=1e-6)
    assert set(content["interventions"]) == {*rooms.INTERVENTIONS, *rooms.SHADINGS[1:]}


def test_the_outcome_follows_the_rule(gate):
    content, _ = gate
    measured = content["measured"]
    assert content["outcome"]["d1"] == (D1_RANGE[0] <= measured["d1"] <= D1_RANGE[1])
    assert content["outcome"]["overfit"] == (measured["overfit"] >= OVERFIT)
    assert content["outcome"]["baseline"] == (measured["baseline"] >= BASELINE)


@pytest.mark.parametrize(
    ("d1", "overfit", "baseline", "outcome"),
    [
        (0.65, 1.5, 1.5, [True, True, True]),
        (0.9, 2.0, 2.0, [True, True, True]),
        (0.64, 1.49, 1.5, [False, False, True]),
        (0.91, 1.5, 1.49, [False, True, False]),
    ],
)
def test_the_rule_is_the_one_that_was_fixed_before_any_run(d1, overfit, baseline, outcome, monkeypatch, tmp_path):
    def scored(rms, d1=0.0):
        return {target: {"pooled": {"rms": rms, "d1": d1}} for target in ("exact", "depth")}

    def execute(run, *_, **__):
        test = scored(1.0, d1) if run.train_set == "12k" else scored(overfit)
        metrics = {"chosen": {"train": scored(1.0), "test": test, "unseen": scored(3.0)}}
        return {"metrics": metrics, "run": {}, **dict.fromkeys(("curve", "data", "provenance"), {}), "key": ""}

    monkeypatch.setattr(rule, "execute", execute)
    monkeypatch.setattr(rule, "score_interventions", lambda *_: {})
    scores = {"mean": {"test": scored(baseline)}, "prior": {"test": scored(7.0)}}
    monkeypatch.setattr(rule, "score_baselines", lambda *_, **__: {"scores": scores})
    content = measure_gate(make_run("drill"), tmp_path, tmp_path)
    assert list(content["outcome"].values()) == outcome
    assert content["unseen"]["rms"] == 3.0


def test_every_intervention_changes_what_the_network_sees(gate):
    errors = [scores["rms"] for scores in gate[0]["interventions"].values()]
    assert len(set(errors)) == len(errors)


def test_the_gate_is_kept_and_read_back_and_says_not_run_without_a_measurement(gate, tmp_path):
    write_gate(tmp_path / "gate.json", gate[0])
    assert read_gate(tmp_path / "gate.json") == gate[0]
    assert {row[2] for row in gate_rows(None)[1:]} == {"not run"}
    assert len(gate_rows(gate[0])) == len(gate_rows(None)) == 4


def test_the_committed_gate_is_readable_and_of_rooms():
    committed = read_gate(PROJECT / "book" / "records" / "gate.json")
    assert committed["data"]["description"].startswith("synthetic rooms")
    assert committed["provenance"]["commit"]

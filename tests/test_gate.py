"""The difficulty gate: its rule is applied as written, and its numbers come from the runs."""

import pytest

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


def test_the_gate_is_kept_and_read_back_and_says_not_run_without_a_measurement(gate, tmp_path):
    write_gate(tmp_path / "gate.json", gate[0])
    assert read_gate(tmp_path / "gate.json") == gate[0]
    assert {row[2] for row in gate_rows(None)[1:]} == {"not run"}
    assert len(gate_rows(gate[0])) == len(gate_rows(None)) == 4


def test_the_committed_gate_is_readable_and_of_rooms():
    committed = read_gate(PROJECT / "book" / "records" / "gate.json")
    assert committed["data"]["description"].startswith("synthetic rooms")
    assert committed["provenance"]["commit"]

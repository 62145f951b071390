"""The batch: a budget's runs with the engine and without it."""

import dataclasses
import re

import pytest

from d3lib.artefacts import locked
from d3lib.batch import reproduce, work_through
from d3lib.cli import main
from d3lib.errors import UserError
from d3lib.experiments import all_runs, manifest
from d3lib.provenance import TRAINING_CODE, code_digest
from d3lib.records import read_record


@pytest.mark.slow
def test_a_small_batch_runs_and_repeats_only_what_is_lost(tmp_path, capfd):
    out = tmp_path / "a folder with spaces"
    assert reproduce("drill", out=out, only="output", cores=2) == 0
    printed = capfd.readouterr().out  # of the work, not of the engines under it
    assert "rooms-train" in printed
    assert not any(word in printed for word in ("DAG", "ernel", "Passed unknown"))
    records = {path: path.stat().st_mtime_ns for path in out.glob("drill/*/record.json")}
    assert len(records) == 2
    assert all(read_record(path)["metrics"] for path in records)
    assert all((path.parent / "notebook.ipynb").is_file() for path in records)
    lost, kept = records
    lost.unlink()
    locks = out / "drill" / ".snakemake" / "locks"  # as a killed batch leaves them
    locks.mkdir(exist_ok=True)
    (locks / "0.output.lock").write_text(f"{lost}\n")
    assert reproduce("drill", out=out, only="output", cores=2) == 0
    assert lost.is_file()
    assert (out / "drill" / "figures" / "beyond.ipynb").is_file()
    assert kept.stat().st_mtime_ns == records[kept]
    # Records that the page reads, and that are no runs of the batch: a question beside finished ones of its page.
    (out / "drill" / "figures" / "beyond.ipynb").unlink()
    capfd.readouterr()
    assert reproduce("drill", out=out, only="pooling", dry_run=True) == 0
    assert "1 runs at budget drill" in capfd.readouterr().out


def test_two_batches_in_one_place_do_not_mix(tmp_path):
    with locked(tmp_path / "drill" / ".batch.lock"):
        with pytest.raises(UserError, match="another process"):
            reproduce("drill", out=tmp_path)


def test_runs_without_the_engine_stop_in_time_and_go_on(tmp_path, capfd):
    """The records are those of `d3lib train`; a bare machine needs no notebooks for them."""
    assert work_through("drill", out=tmp_path, only="skips", jobs=1, device="cpu") == 0
    told = capfd.readouterr().out
    assert re.search(r"^rooms-train.* frames/s\n(.*\n)*done ", told, re.MULTILINE)  # rendered here: a run has few cores
    (path,) = tmp_path.glob("drill/*/record.json")
    before = path.stat().st_mtime_ns
    assert work_through("drill", out=tmp_path, only="skips", device="cpu") == 0
    assert "0 runs to do" in capfd.readouterr().out
    assert path.stat().st_mtime_ns == before
    assert work_through("drill", out=tmp_path, only="table2", minutes=1e-6, device="cpu") == 0  # no time: none begun
    assert len(list(tmp_path.glob("drill/*/record.json"))) == 1


def test_a_study_goes_on_from_the_records_of_the_book(tmp_path, monkeypatch, capsys):
    runs = {key: dataclasses.asdict(run) for key, run in all_runs("drill", "fig2").items()}
    keys, made = list(runs), {"code_digest": code_digest(*TRAINING_CODE)}
    book = [{"key": key, "run": runs[key], "provenance": made} for key in keys[2:]]
    book[-1] = book[-1] | {"provenance": {"code_digest": "older"}}
    monkeypatch.setattr("d3lib.batch.committed_records", lambda: book)
    for go_on, count in ((True, 3), (False, len(keys))):
        assert work_through("drill", out=tmp_path, only="fig2", minutes=1e-6, device="cpu", go_on=go_on) == 0
        assert f"{count} runs to do" in capsys.readouterr().out


def test_a_run_by_its_key_gives_the_bytes_of_the_run_by_its_fields(tmp_path):
    key = manifest("drill")["table2"].runs[0].key
    assert main(["train", "--run", key, "--out", str(tmp_path / "a"), "--device", "cpu"]) == 0
    fields = ["--budget", "drill", "--loss", "gan", "--train-set", "230k"]
    assert main(["train", *fields, "--out", str(tmp_path / "b"), "--device", "cpu"]) == 0
    a, b = (read_record(tmp_path / name / "drill" / key / "record.json") for name in "ab")
    assert a["weights_digest"] == b["weights_digest"]
    assert a["metrics"] == b["metrics"] and a["details"] == b["details"]
    assert main(["train", "--run", key, "--seed", "1"]) == 2
    assert main(["train", "--run", "l9-x"]) == 2

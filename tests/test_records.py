"""Records that are part of the book."""

import hashlib
import json
import platform

import numpy as np
import pytest

from d3lib import records, results
from d3lib.artefacts import write_json
from d3lib.errors import UserError
from d3lib.experiments import all_runs
from d3lib.provenance import TRAINING_CODE, code_digest
from d3lib.records import (
    RECORD,
    RECORD_VERSION,
    VOUCHED,
    committed_records,
    draw_records,
    is_current,
    keep_records,
    moves,
    read_rerun,
    rerun_outcome,
    same_code,
    vouch_outcome,
    write_rerun,
)


def content(key="l1-a", budget="study", rms=0.1234567891, **more):
    return {
        "key": key,
        "run": {"budget": budget, "lam": None, "skips": True},
        "metrics": {"rms": [rms, 7, None]},
        **more,
    }


def line(record):
    """An artefact, made by hand: the digest is the SHA-256 of the content in canonical JSON."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({"format": RECORD, "version": RECORD_VERSION, "digest": digest, "content": record})


def test_records_of_the_book_are_read_line_by_line_and_a_damaged_line_is_named(tmp_path):
    assert committed_records(tmp_path) == []
    first, second = content(), content("l2-b")
    path = tmp_path / "study.jsonl"
    path.write_text(line(first) + "\n" + line(second) + "\n")
    assert committed_records(tmp_path) == [first, second]
    whole = json.loads(line(first))
    for broken in ("{", "[]", json.dumps(whole | {"digest": "0"}), json.dumps(whole | {"version": 0})):
        path.write_text(line(first) + "\n" + broken + "\n")
        with pytest.raises(UserError, match=r"study\.jsonl, line 2: "):
            committed_records(tmp_path)


def test_keeping_adds_and_replaces_and_loses_nothing(tmp_path):
    path = tmp_path / "study.jsonl"
    assert keep_records([content("a"), content("b", rms=1e-7)], path) == 2
    assert keep_records([content("b", rms=2.0), content("c")], path) == 3
    kept = {record["key"]: record for record in committed_records(tmp_path)}
    assert sorted(kept) == ["a", "b", "c"]
    assert kept["a"] == content("a", rms=0.123457)  # six digits, all else as it was
    assert kept["b"]["metrics"]["rms"][0] == 2.0
    assert keep_records([content("d", budget="colab")], tmp_path / "colab.jsonl") == 1  # another budget, another file
    assert len(committed_records(tmp_path)) == 4


def test_a_page_shows_the_records_of_this_copy_before_those_of_the_book(tmp_path, monkeypatch):
    keys = list(all_runs("study"))[:2]
    book = [content(key, rms=1.0) for key in keys]
    monkeypatch.setattr(results, "committed_records", lambda: book)
    mine = content(keys[0], rms=2.0)
    write_json(tmp_path / "study" / keys[0] / "record.json", mine, format=RECORD, version=RECORD_VERSION)
    found = results.load_records("study", tmp_path)
    assert [found[key] for key in keys] == [mine, book[1]]
    assert set(list(found.values())[2:]) == {None}


def trained(key, code, weights="w", rms=1.0, **run):
    scores = {"chosen": {"test": {"exact": {"pooled": {"rms": rms}}}}}
    return {
        "key": key, "run": {"budget": "laptop", "encoder": "tiny", "data": "rooms"} | run, "metrics": scores,
        "data": {"target": "exact", "digest": "d"}, "weights_digest": weights,
        "provenance": {"code_digest": code, "device": "some", "device_kind": "cpu"},
    }  # fmt: skip


def vouch(folder, records_then, kept=None, code=None, kind="cpu", **now):
    """The records, kept in a book with others of their kind, and the outcome of beginning them again by two codes."""
    keep_records(TEN if kept is None else kept, folder / "laptop.jsonl")
    today = code or code_digest(*TRAINING_CODE)
    outcomes = [vouch_outcome(r["key"], r, trained(r["key"], today) | now.get(r["key"], {})) for r in records_then]
    write_rerun(folder / "vouched.json", outcomes, {"code_digest": today, "device_kind": kind}, VOUCHED)
    records._vouched.cache_clear()


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "BOOK", tmp_path)
    records._vouched.cache_clear()
    yield tmp_path
    records._vouched.cache_clear()


TEN = [trained(str(i), "old") for i in range(10)]


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        (TEN, {}, True),
        (TEN[:9], {}, False),
        (TEN[:9] + TEN[:1], {}, False),  # one of them twice
        (TEN, {"3": {"weights_digest": "v"}}, False),
        (TEN, {"3": {"data": {"target": "exact", "digest": "e"}}}, False),
        (TEN, {"3": trained("3", "x", rms=1.0000001)}, False),
        ([*TEN[:9], trained("9", "old") | {"data": {"target": "exact", "digest": "other"}}], {}, False),
        ([*TEN[:9], trained("9", "yet another")], {}, False),  # whose code is not the record's
        (TEN, {"code": "yet another"}, False),
        (TEN, {"kind": "cuda"}, False),
    ],
)
def test_older_code_counts_as_todays_once_enough_of_its_runs_began_alike(book, then, now, expected):
    assert is_current(trained("b", code_digest(*TRAINING_CODE))) and not is_current(trained("a", "old"))
    vouch(book, then, **now)
    assert is_current(trained("a", "old")) is expected
    assert not same_code(trained("a", "old"))  # a run of one's own is done again all the same


def test_a_code_that_once_came_to_other_bits_is_not_vouched_for_by_ten_more(book):
    """Also where the record that showed it has been made anew by today's code."""
    made_anew = trained("3", code_digest(*TRAINING_CODE))
    more = [r for r in TEN if r["key"] != "3"] + [trained(str(i), "old") for i in range(10, 20)]
    elsewhere = trained("a", "old", encoder="densenet121")
    vouch(book, [*more, elsewhere], kept=[*more, made_anew, elsewhere])
    assert is_current(trained("b", "old")) and is_current(elsewhere)
    vouch(book, [*TEN, *more, elsewhere], kept=[*more, made_anew, elsewhere], **{"3": {"weights_digest": "v"}})
    assert not is_current(trained("b", "old")) and not is_current(elsewhere)


def test_of_a_kind_with_fewer_records_all_must_begin_alike(book):
    few = TEN[:4]
    vouch(book, few[:3], kept=few)
    assert not is_current(trained("a", "old"))
    vouch(book, few, kept=few)
    assert is_current(trained("a", "old"))


def test_records_are_drawn_of_every_version_of_the_code_and_of_every_loss_in_turn():
    old = [trained(f"old{i}", "old", loss=loss) for loss in ("l1", "l2", "gan") for i in range(20)]
    new = [trained(f"new{i}", "new", loss="l1") for i in range(4)]
    drawn = draw_records([*old, *new], 10)
    assert sorted(r["key"] for r in drawn if r["provenance"]["code_digest"] == "new") == [
        "new0",
        "new1",
        "new2",
        "new3",
    ]
    losses = [r["run"]["loss"] for r in drawn if r["provenance"]["code_digest"] == "old"]
    assert sorted(map(losses.count, ("l1", "l2", "gan"))) == [3, 3, 4]
    assert [r["key"] for r in drawn] != [r["key"] for r in draw_records([*old, *new], 10)]  # at random


@pytest.mark.parametrize(
    "other", [{"budget": "study"}, {"encoder": "densenet121"}, {"data": "nyu"}, {"init": "run:another"}]
)
def test_nothing_vouches_for_another_budget_encoder_data_start_or_code(book, other):
    vouch(book, TEN)
    assert not is_current(trained("a", "old", **other)) and not is_current(trained("a", "a third"))


def test_of_folders_of_pictures_one_stands_for_all(book):
    folds = [trained(str(i), "old", data=f"folder:pictures/fold-{i % 5}", seed=i) for i in range(10)]
    keep_records(folds, book / "laptop.jsonl")
    folds = committed_records(book)  # by other keys: of the folder only the name is kept
    vouch(book, folds, kept=folds)
    assert is_current(trained("a", "old", data="folder:pictures/fold-6")) and not is_current(trained("a", "old"))


def test_nothing_vouches_for_another_device(book):
    vouch(book, TEN)
    elsewhere = trained("a", "old")
    elsewhere["provenance"]["device"] = "another"
    assert is_current(trained("a", "old")) and not is_current(elsewhere)


def test_a_rerun_is_told_by_score_weights_and_data():
    then, now = trained("a", "old", rms=1.0), trained("a", "new", weights="v", rms=1.5)
    expected = {"key": "a", "rms_then": 1.0, "rms_now": 1.5, "same_weights": False, "same_data": True}
    assert rerun_outcome(then, now) == expected


@pytest.mark.parametrize(
    ("host", "fault", "state"),
    [
        (None, ProcessLookupError, "interrupted"),
        (None, PermissionError, "running"),  # somebody else's process, so it is there
        ("elsewhere", ProcessLookupError, "running"),  # of another machine's process one sees nothing
    ],
)
def test_a_run_whose_process_is_gone_is_interrupted_if_one_can_know(tmp_path, monkeypatch, host, fault, state):
    def kill(pid, signal):
        raise fault

    monkeypatch.setattr(records.os, "kill", kill)
    content = {"state": "running", "error": "", "pid": 12345, "host": host or platform.node()}
    write_json(tmp_path / "state.json", content, format=records.STATE)
    assert records.State(tmp_path).read()[0] == state


def test_a_model_card_says_in_per_cent_how_the_run_ended_and_shows_no_number_where_there_is_none():
    steady = [{"images": k, "test_rms": 2.05 - 0.05 * k} for k in range(1, 21)]  # by 0.2 m in a fifth, 1.15 m its mean
    record = json.loads(json.dumps(committed_records()[0])) | {"curve": steady}
    record["metrics"]["chosen"]["test"]["exact"]["pooled"] |= {"rms": 0.5, "rel": None, "d1": 0.25}
    card = records.model_card(record)
    assert "Learning curve: falling in the end, test RMSE changed by -17.4% in the last fifth of the run." in card
    assert "| 0.500 | - | 0.250 |" in card


@pytest.mark.parametrize(
    "content",
    [{}, [], None, {"outcomes": 3, "provenance": {"code_digest": "x"}}, {"outcomes": [{}], "provenance": {}},
     {"outcomes": [{"key": 1, "rms_then": 1.0, "rms_now": 1.0, "same_weights": True, "same_data": True}],
      "provenance": {"code_digest": "x"}},
     {"outcomes": [{"key": "a", "rms_then": 1.0, "rms_now": 1.0, "same_weights": "false", "same_data": True}],
      "provenance": {"code_digest": "x"}}],
)  # fmt: skip
def test_an_odd_rerun_is_one_line(tmp_path, content):
    write_json(tmp_path / "rerun.json", content, format="d3lib-rerun")
    with pytest.raises(UserError, match=r"rerun\.json: ") as caught:
        read_rerun(tmp_path / "rerun.json")
    assert "\n" not in str(caught.value)


def test_moves_compares_re_runs_that_ended_elsewhere_with_two_seeds_of_the_same_runs():
    def record(loss, seed, rms):
        scores = {"chosen": {"test": {"exact": {"pooled": {"rms": rms}}}}}
        return {
            "key": f"{loss}{seed}",
            "run": {"loss": loss, "seed": seed},
            "data": {"target": "exact"},
            "metrics": scores,
        }

    values = {"l1": [0.90, 0.96, 0.87], "gan": [1.0, 1.2], "l2": [0.8]}
    book = [record(loss, seed, rms) for loss, column in values.items() for seed, rms in enumerate(column)]
    now = {"l10": (0.97, False), "gan1": (1.1, False), "l11": (0.96, True), "l20": (2.0, False), "gone": (3.0, False)}
    outcomes = [
        {"key": key, "rms_then": {"l10": 0.90, "gan1": 1.2}.get(key, 0.96), "rms_now": rms, "same_weights": same}
        for key, (rms, same) in now.items()
    ]
    count, moved, apart = moves(outcomes, book)
    assert count == 2  # the same weights, a run of one seed, and one that the book no longer has do not count
    assert moved == pytest.approx(np.sqrt((0.07**2 + 0.1**2) / 2))
    assert apart == pytest.approx(np.sqrt(2 * np.mean([np.var(values[loss], ddof=1) for loss in ("l1", "gan")])))
    assert moves([], book)[0] == 0

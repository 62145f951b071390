"""Records that are part of the book."""

import hashlib
import json

import pytest

from d3lib import records, results
from d3lib.artefacts import write_json
from d3lib.errors import UserError
from d3lib.experiments import all_runs
from d3lib.provenance import TRAINING_CODE, code_digest
from d3lib.records import (
    RECORD,
    RECORD_VERSION,
    committed_records,
    is_current,
    keep_records,
    rerun_outcome,
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


def trained(key, code, weights="w", rms=1.0):
    scores = {"chosen": {"test": {"exact": {"pooled": {"rms": rms}}}}}
    data = {"target": "exact", "digest": "d"}
    return {
        "key": key, "metrics": scores, "data": data, "weights_digest": weights, "provenance": {"code_digest": code},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("count", "different", "code_then", "expected"),
    [
        (10, 0, None, True),
        (9, 0, None, False),
        (10, 1, None, False),
        (12, 1, None, False),
        (10, 0, "yet another", False),
    ],
)
def test_older_code_counts_as_todays_once_enough_of_its_runs_gave_the_same_bits(
    tmp_path, monkeypatch, count, different, code_then, expected
):
    monkeypatch.setattr(records, "BOOK", tmp_path)
    now, old = code_digest(*TRAINING_CODE), trained("a", "old")
    assert is_current(trained("b", now)) and not is_current(old)
    records._same_bits.cache_clear()
    outcomes = [
        rerun_outcome(trained(str(i), "old"), trained(str(i), now, "v" if i < different else "w", rms=1.5))
        for i in range(count)
    ]
    assert (outcomes[0]["rms_then"], outcomes[0]["rms_now"], outcomes[0]["same_data"]) == (1.0, 1.5, True)
    write_rerun(tmp_path / "rerun.json", outcomes, {"code_digest": code_then or now})
    assert is_current(old) is expected
    assert not is_current(trained("c", "a third"))
    records._same_bits.cache_clear()

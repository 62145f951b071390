"""Numbers beside the paper's: statuses are computed by the stated rule, from records alone."""

import dataclasses
import functools
import json

import numpy as np
import pytest

from d3lib import records as records_of_runs
from d3lib import results
from d3lib.artefacts import write_json
from d3lib.cli import main
from d3lib.errors import UserError
from d3lib.experiments import all_runs, make_run, manifest
from d3lib.provenance import TRAINING_CODE, code_digest
from d3lib.records import RECORD, RECORD_VERSION, committed_records, keep_pictures, keep_records
from d3lib.results import cell_status, compare, paper_numbers, score, status_text


def record(rms, **fields):
    """A record with one number in it, made by the code that is here."""
    run = {"budget": "paper", "data": "nyu", "pretrained": True, "loss": "l1"} | fields
    return {
        "key": "k",
        "run": run,
        "data": {"target": "depth", "description": "frames, some"},
        "metrics": {"chosen": {"test": {"depth": {"pooled": {"rms": rms}}}}},
        "provenance": {"code_digest": code_digest(*TRAINING_CODE)},
    }


def test_the_paper_column_holds_75_distinct_numbers():
    ours = [n for n in paper_numbers() if n.item != "table2" or n.method == "D3-Net"]
    loss = {"D3-Net": "gan"}
    distinct = {(loss.get(n.method, n.method), n.train_set, n.encoder, n.metric) for n in ours}
    assert len(distinct) == 75


@pytest.mark.parametrize(
    ("records", "status"),
    [
        ([], "not run"),
        ([record(0.7, budget="smoke", data="rooms")], "smoke only"),
        ([record(0.7, data="rooms")], "other data"),
        ([record(0.7, pretrained=False)], "other data"),
        ([record(0.7)], "inconclusive"),
        ([record(0.714), record(0.712), record(0.716)], "reproduced"),
        ([record(0.6), record(0.7), record(0.8)], "inconclusive"),
        ([record(0.814), record(0.812), record(0.816)], "differs"),
        ([record(0.706), record(0.714), record(0.722)], "inconclusive"),  # 0.040 to either side, 5.6 % of the value
        ([record(0.7, budget="gate", data="rooms")], "other data"),
    ],
)
def test_a_status_follows_the_rule(records, status):
    assert cell_status(0.714, records, "rms") == status


def test_a_record_of_other_training_code_is_marked_older():
    old = record(0.7, data="rooms")
    old["provenance"]["code_digest"] = "0" * 64
    assert cell_status(0.714, [old], "rms") == "other data, older"
    assert cell_status(0.714, [record(0.7, data="rooms"), old], "rms") == "other data, older"


def test_a_score_of_zero_is_a_score_and_none_is_not():
    assert results.scores([record(0.0), record(None), record(0.5)], "rms") == [0.0, 0.5]


def test_the_difference_is_ours_less_the_papers_where_they_compare():
    number = next(n for n in paper_numbers() if n.item == "fig2")
    cell = results.Cell(number, number.value + 0.25, None, 1, "differs, older", ("k",))
    assert cell.difference == pytest.approx(0.25)
    assert dataclasses.replace(cell, status="other data").difference is None


def test_a_run_of_any_seed_stands_for_a_number_and_one_with_another_setting_for_none():
    number = next(n for n in paper_numbers() if (n.item, n.method, n.train_set) == ("fig2", "l2", "795"))
    for seed in (0, 4):
        run = make_run("study", loss="l2", train_set="795", seed=seed)
        assert results.stands_for(dataclasses.asdict(run), number)
        assert not results.stands_for(dataclasses.asdict(dataclasses.replace(run, learning_rate=1e-4)), number)


def test_a_page_says_which_records_are_of_the_book_and_that_some_are_older(tmp_path, monkeypatch):
    runs = all_runs("study", "skips")
    found = [record(0.5, **dataclasses.asdict(run)) | {"key": key} for key, run in runs.items()]
    monkeypatch.setattr(results, "committed_records", lambda: found[1:])
    write_json(tmp_path / "study" / found[0]["key"] / "record.json", found[0], format=RECORD, version=RECORD_VERSION)
    text = results.what_stands_behind("study", tmp_path, "skips")
    assert "3 of 3 runs have a record. 2 of them came with the book." in text and "older" not in text
    found[2]["provenance"] = {"code_digest": "0" * 64}
    assert "older version" in results.what_stands_behind("study", tmp_path, "skips")


def test_the_head_of_a_page_counts_seeds_and_not_changes(tmp_path, monkeypatch):
    runs = all_runs("study", "lam_gan")  # three values of λ, three seeds each
    found = [record(0.5, **dataclasses.asdict(run)) | {"key": key} for key, run in runs.items()]
    monkeypatch.setattr(results, "committed_records", lambda: found)
    assert "Runs behind one point: 3. " in results.what_stands_behind("study", tmp_path, "lam_gan")


def test_baselines_of_this_copy_come_before_those_of_the_book(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "BOOK", tmp_path / "book")
    for place, sizes in (("book", ("795", "12k")), ("out", ("795",))):
        for size in sizes:
            path = results.baselines_path(make_run("study", train_set=size), tmp_path / place / "study")
            write_json(path, {"from": place}, format="d3lib-baselines", version=1)
    found = results.load_baselines("study", tmp_path / "out")
    assert found == {"795": {"from": "out"}, "12k": {"from": "book"}}


def test_without_any_run_every_cell_says_not_run(tmp_path):
    cells = compare("smoke", tmp_path)
    assert {cell.status for cell in cells} == {"not run"}
    assert all(cell.ours is None and cell.n == 0 for cell in cells)
    assert {cell.paper.method for cell in cells if cell.paper.item == "table2"} == {"D3-Net"}
    assert f"{len(all_runs('smoke'))} not run" in status_text("smoke", tmp_path)


def test_a_smoke_record_fills_exactly_its_cells(tmp_path):
    run = make_run("smoke", loss="gan", train_set="230k")
    row = {"rms": 1.5, "d1": 0.4, "rel": 0.3, "log10": 0.1, "rmslog": 0.2, "d2": 0.6, "d3": 0.8}
    content = record(0.0) | {"key": run.key, "run": dataclasses.asdict(run)}
    content["metrics"] = {"chosen": {"test": {"depth": {"pooled": row}}}}
    write_json(tmp_path / "smoke" / run.key / "record.json", content, format=RECORD, version=RECORD_VERSION)
    filled = [cell for cell in compare("smoke", tmp_path) if cell.n]
    assert {(c.paper.item, c.paper.metric) for c in filled} == {("fig2", "rms"), ("fig2", "d1")} | {
        ("table2", metric) for metric in row
    }
    assert {c.status for c in filled} == {"smoke only"}
    assert all(c.ours == row[c.paper.metric] for c in filled)
    assert "1 done" in status_text("smoke", tmp_path)


def test_a_damaged_record_is_named_in_one_line(tmp_path):
    run = make_run("smoke", loss="l1", train_set="795")
    path = tmp_path / "smoke" / run.key / "record.json"
    write_json(path, record(0.5), format=RECORD, version=RECORD_VERSION)
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.raises(UserError, match="digest") as caught:
        compare("smoke", tmp_path)
    assert str(path) in str(caught.value)


def test_tables_are_aligned_and_numbered():
    text = results.text_table([("a", "bb"), ("ccc", "d")])
    assert text.splitlines() == ["a    bb", "-------", "ccc  d"]
    assert results.markdown_table([("a",), ("b",)], name="tab-x", caption="C").splitlines()[:2] == [
        ":::{table} C",
        ":name: tab-x",
    ]


def test_figure_2_shows_the_main_grid_alone_and_not_runs_of_other_encoders_or_variants():
    """At a small budget the runs that compare encoders share loss and set with the grid; they are no seeds of it."""
    import matplotlib

    matplotlib.use("Agg")
    from d3lib.figures import figure2

    def made(rms, **fields):
        found = record(rms, **dataclasses.asdict(make_run("smoke", **{"loss": "l1"} | fields)))
        found["metrics"]["chosen"]["test"]["depth"]["pooled"]["d1"] = 0.5
        return found

    others = [{"encoder": "densenet121"}, {"encoder": "resnet50"}, {"loss": "eigen", "variant": "released"}]
    others += [{"learning_rate": 1e-4}, {"skips": False}, {"target": "exact"}, {"steps": 16}]
    records = [made(1.1), *(made(9, **fields) for fields in others)]
    ours = figure2(records, paper_numbers()).axes[1]
    assert [list(bar.lines[0].get_ydata()) for bar in ours.containers if len(bar.lines[0].get_ydata())] == [[1.1]]


def test_a_contrast_pairs_each_run_with_the_run_of_its_seed_that_differs_in_one_thing(tmp_path):
    found = {}
    grid, rate = (manifest("study")[name].runs for name in ("fig2", "rate"))
    for run in (*grid, *rate):
        if (run.loss, run.train_set) == ("berhu", "12k"):
            rms = 1 + 0.1 * run.seed + (0.02 + 0.001 * run.seed if run.learning_rate == 4e-4 else 0)
            found[run.key] = record(rms, **dataclasses.asdict(run)) | {"key": run.key, "curve": []}
    for key, content in found.items():
        write_json(tmp_path / "study" / key / "record.json", content, format=RECORD, version=RECORD_VERSION)
    rows = {(c.loss, c.what): c for c in results.contrasts("study", tmp_path, "rate")}
    assert len(rows) == 14
    assert rows["berhu", "learning_rate 0.0004"].differences == pytest.approx((0.02, 0.021, 0.022))
    assert rows["berhu", "learning_rate 0.0001"].differences == pytest.approx((0, 0, 0))
    assert rows["l1", "learning_rate 0.0001"].differences == rows["l1", "learning_rate 0.0001"].values == ()
    assert results.contrasts("study", tmp_path, "reference") == []  # nothing is compared with itself


def test_a_contrast_never_mixes_two_encoders(tmp_path):
    found = {}
    expected = {"densenet121": (1.2, 1.0), "resnet50": (1.25, 1.06), "resnet50_narrow": (1.3, 1.03)}
    for name, at in (("fig5", 0), ("decoder", 0), ("encoders", 1)):
        for run in manifest("laptop")[name].runs:
            if (run.loss, run.seed) == ("l1", 0):
                found[run.key] = record(expected[run.encoder][at], **dataclasses.asdict(run)) | {"key": run.key}
    for key, content in found.items():
        write_json(tmp_path / "laptop" / key / "record.json", content, format=RECORD, version=RECORD_VERSION)
    rows = {c.what: c.differences for c in results.contrasts("laptop", tmp_path, "encoders") if c.loss == "l1"}
    assert rows == {
        "steps 1200 for densenet121": pytest.approx((-0.2,)),
        "steps 1200 for resnet50": pytest.approx((-0.19,)),
        "steps 1200 for resnet50_narrow": pytest.approx((-0.27,)),
    }
    (row,) = (c for c in results.contrasts("laptop", tmp_path, "decoder") if c.loss == "l1")
    assert row.what == "encoder resnet50_narrow instead of densenet121" and row.differences == pytest.approx((0.1,))


def test_kept_records_of_real_pictures_name_no_place_and_serve_who_has_no_pictures_of_their_own(tmp_path, monkeypatch):
    runs = manifest("laptop", pictures=str(tmp_path / "office"))["transfer"].runs[:2]
    made = [
        record(rms, **dataclasses.asdict(run)) | {"key": run.key} for rms, run in zip((0.5, 0.4), runs, strict=True)
    ]
    book = tmp_path / "book"
    assert keep_records(made, book / "laptop.jsonl") == keep_records(made, book / "laptop.jsonl") == 2
    assert str(tmp_path) not in (book / "laptop.jsonl").read_text(encoding="utf-8")
    monkeypatch.setattr(results, "committed_records", functools.partial(committed_records, book))
    for plan, found in (
        ({}, [0.5, 0.4]),
        ({"pictures": str(tmp_path / "other" / "office")}, []),
    ):  # another office of the same name
        (tmp_path / "laptop").mkdir(exist_ok=True)
        (tmp_path / "laptop" / "plan.json").write_text(json.dumps(plan))
        kept = [r for r in results.load_records("laptop", tmp_path, "transfer").values() if r is not None]
        assert [score(r, "rms") for r in kept] == found
    assert len(results.load_records("laptop", tmp_path, "transfer")) == 30
    (tmp_path / "laptop" / "plan.json").unlink()
    assert all(cell.status == "not run" for cell in compare("laptop", tmp_path))  # other pictures stand for no number


def test_a_budget_for_nyu_takes_rooms_where_nyu_is_absent_and_says_so(tmp_path):
    assert {run.data for run in results.runs_of("paper", tmp_path).values()} == {"rooms"}
    write_json(tmp_path / "data" / "nyu-train-256x320" / "store.json", {}, format="any")
    assert {run.data for run in results.runs_of("paper", tmp_path).values()} == {"nyu"}


def few_pictures(folder, rng, worst=(False, False, False, True), **changed):
    """What a run keeps of its test pictures; `changed` parts instead of good ones."""
    n = len(worst)
    arrays = {
        "rgb": rng.integers(0, 256, (n, 3, 8, 12), dtype=np.uint8),
        "depth": rng.uniform(1, 9, (n, 1, 8, 12)).astype(np.float16),
        "pred": rng.uniform(1, 9, (n, 1, 8, 12)).astype(np.float16),
        "valid": rng.random((n, 1, 8, 12)) < 0.9,
        "index": np.arange(n),
        "worst": np.array(worst),
    } | changed
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "predictions.npz", **{name: part for name, part in arrays.items() if part is not None})
    return arrays


def test_the_book_keeps_a_runs_first_pictures_and_shows_them_where_this_copy_has_not_run_it(tmp_path, monkeypatch):
    rng, out, book = np.random.default_rng(0), tmp_path / "runs", tmp_path / "book"
    monkeypatch.setattr(results, "BOOK", book)
    made = few_pictures(tmp_path / "made", rng)
    keep_pictures(tmp_path / "made", book / "laptop" / "key")
    assert results.load_pictures("laptop", out, "other") is None
    shown = results.load_pictures("laptop", out, "key")
    assert all(np.array_equal(shown[name], made[name][:3]) and shown[name].dtype == made[name].dtype for name in made)
    own = few_pictures(out / "laptop" / "key", rng)
    assert np.array_equal(results.load_pictures("laptop", out, "key")["pred"], shown["pred"])  # no record: not of a run
    (out / "laptop" / "key" / "record.json").touch()
    assert np.array_equal(results.load_pictures("laptop", out, "key")["pred"], own["pred"])
    (out / "laptop" / "key" / "predictions.npz").unlink()
    assert results.load_pictures("laptop", out, "key") is None  # another run's pictures would not be its own


def test_keep_takes_pictures_of_figure_4_with_its_records_and_leaves_none_of_an_older_one(tmp_path, monkeypatch):
    book, out = tmp_path / "book", tmp_path / "runs"
    for module in (records_of_runs, results):
        monkeypatch.setattr(module, "BOOK", book)
    (book).mkdir()
    runs = [
        run
        for name in ("fig4", "reference")
        for run in manifest("laptop")[name].runs
        if run.loss == "l1" and run.seed < 2
    ]
    for run in runs:
        made = record(1.0, **dataclasses.asdict(run)) | {"key": run.key}
        write_json(out / "laptop" / run.key / "record.json", made, format=RECORD, version=RECORD_VERSION)
        few_pictures(out / "laptop" / run.key, np.random.default_rng(run.seed))
    assert main(["keep", "--budget", "laptop", "--out", str(out)]) == 0
    first = next(run.key for run in runs if run.seed == 0 and run.train_set == "230k")
    assert [path.parent.name for path in book.rglob("predictions.npz")] == [first]
    assert len((book / "laptop.jsonl").read_text(encoding="utf-8").splitlines()) == len(runs) == 4
    (out / "laptop" / first / "predictions.npz").unlink()
    assert main(["keep", "--budget", "laptop", "--out", str(out)]) == 0
    assert not list(book.rglob("predictions.npz"))


@pytest.mark.parametrize("changed", [{"pred": None}, {"rgb": np.array([{"a": 1}], dtype=object)}])
def test_damaged_or_hostile_pictures_are_one_line(tmp_path, changed):
    few_pictures(tmp_path / "run", np.random.default_rng(0), **changed)
    with pytest.raises(UserError, match=r"predictions\.npz: cannot be read"):
        keep_pictures(tmp_path / "run", tmp_path / "book")
    (tmp_path / "run" / "predictions.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(UserError, match=r"predictions\.npz: cannot be read"):
        keep_pictures(tmp_path / "run", tmp_path / "book")
    assert not (tmp_path / "book").exists()

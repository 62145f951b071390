"""One run from data to record: what it keeps, what it repeats, what it says of itself."""

import contextlib
import dataclasses
import itertools
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from d3lib import execution
from d3lib.artefacts import digest_tensors, load_weights, save_weights
from d3lib.data.loader import train_batches
from d3lib.errors import StoppedError, UserError
from d3lib.evaluation import load_network
from d3lib.execution import execute, open_sources
from d3lib.experiments import BUDGETS, make_run
from d3lib.models import D3Net
from d3lib.records import State, read_record
from d3lib.scoring import score_baselines


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run():
    return make_run("drill", loss="gan", train_set="12k", steps=4, evaluations=2)


@pytest.fixture(scope="module")
def record(run, place):
    return execute(run, place / "drill", place / "data", device="cpu")


def test_a_record_says_what_was_run_on_what_by_what(record, run):
    assert record["run"] == dataclasses.asdict(run)
    made = record["provenance"]
    assert {"commit", "dirty", "code_digest", "versions", "device", "threads", "finished"} <= made.keys()
    assert made["peak_memory_bytes"] > 10**7 and made["train_seconds"] > 0
    assert record["data"]["train_frames"] == 4 * 2
    assert "synthetic rooms" in record["data"]["description"]
    assert "NYU" not in json.dumps(record["data"])


def test_the_curve_counts_images_and_watches_the_discriminator(record):
    assert [point["images"] for point in record["curve"]] == [16, 32]
    assert all(
        {"loss", "val_rms", "test_rms", "test_d1", "d_real", "d_fake"} <= point.keys() for point in record["curve"]
    )


def test_metrics_are_there_for_every_set_against_sensor_and_exact_depth(record):
    for kind in ("chosen", "last"):
        assert record["metrics"][kind].keys() == {"train", "val", "test", "unseen"}
        for scores in record["metrics"][kind].values():
            assert scores.keys() == {"exact", "depth"}
            assert scores["exact"]["pooled"].keys() == scores["depth"]["per_image"].keys()


def test_the_kept_weights_give_the_recorded_error_when_scored_by_hand(record, run, place):
    weights = place / "drill" / run.key / "weights.safetensors"
    assert digest_tensors(load_weights(weights)[0]) == record["weights_digest"]
    net, made = load_network(weights)
    assert made["encoder"] == "tiny" and "synthetic rooms" in made["trained_on"]
    test = open_sources(run, place / "data").sets["test"]
    squares = []
    for i in range(len(test)):
        sample = test[i]
        with torch.no_grad():
            pred = net(sample["rgb"][None].float() / 255)[0].double().numpy()
        squares.append((np.clip(pred, 1e-3, 10) - sample["exact"].double().numpy()) ** 2)
    by_hand = np.sqrt(np.mean(squares))
    assert record["metrics"]["chosen"]["test"]["exact"]["pooled"]["rms"] == pytest.approx(by_hand, rel=1e-5)


def test_the_model_card_and_a_few_predictions_lie_beside_the_weights(record, run, place):
    folder = place / "drill" / run.key
    card = (folder / "model_card.md").read_text(encoding="utf-8")
    assert "synthetic rooms" in card and record["weights_digest"][:16] in card
    with np.load(folder / "predictions.npz", allow_pickle=False) as kept:
        assert kept["rgb"].dtype == np.uint8 and kept["rgb"].shape == (5, 3, 32, 48)
        assert kept["pred"].shape == kept["depth"].shape == kept["valid"].shape == (5, 1, 32, 48)
        assert kept["worst"].tolist() == [False] * 3 + [True] * 2
        squares = (kept["pred"].astype(float) - kept["depth"].astype(float)) ** 2
        rmse = np.sqrt(squares.mean((1, 2, 3)))
        assert kept["index"][3:].tolist() == np.argsort(-rmse[:3])[:2].tolist()
        np.testing.assert_array_equal(kept["pred"][3], kept["pred"][kept["index"][3]])


def test_a_compiler_that_fails_is_one_line_and_one_that_works_is_named_in_the_record(run, place, tmp_path, monkeypatch):
    @torch._dynamo.register_backend(name="broken")
    def _(*_):
        raise OSError("no C++ compiler")

    monkeypatch.setenv("D3LIB_COMPILE", "broken")
    with pytest.raises(UserError, match=r"D3LIB_COMPILE=broken: torch.compile failed .*no C\+\+ compiler.*; unset it"):
        execute(run, tmp_path, place / "data", device="cpu")
    with monkeypatch.context() as patch:  # a checkpoint of a run without the compiler is not what this one goes on from
        patch.setenv("D3LIB_COMPILE", "")
        patch.setattr(execution, "_told_to_stop", lambda: contextlib.nullcontext(lambda: True))
        with pytest.raises(StoppedError):
            execute(run, tmp_path, place / "data", device="cpu")
    monkeypatch.setenv("D3LIB_COMPILE", "aot_eager")
    lines = []
    made = execute(run, tmp_path, place / "data", device="cpu", progress=lines.append)
    assert made["provenance"]["compiler"] == "aot_eager" and made["curve"][0]["step"] == 2
    assert not list((tmp_path / run.key).glob("checkpoint*"))


def test_sums_by_scene_add_up_to_the_pooled_scores(record):
    sums, scores = record["by_scene"], record["metrics"]["chosen"]["test"]["exact"]["pooled"]
    assert len(sums["scene"]) == len(set(sums["scene"])) == BUDGETS["drill"].test_scenes
    n = np.sum(sums["n"])
    assert n == 3 * 32 * 48
    assert np.sqrt(np.sum(sums["se"]) / n) == pytest.approx(scores["rms"], rel=1e-4)
    assert np.sum(sums["rel"]) / n == pytest.approx(scores["rel"], rel=1e-4)
    assert np.sum(sums["d1"]) / n == pytest.approx(scores["d1"], rel=1e-6)
    assert record["details"]["images"] == 3


def test_a_training_target_may_be_the_sensor_s_view_filled_or_exact(place):
    plain, filled, exact = (
        open_sources(make_run("drill", target=target), place / "data").sets["train"]
        for target in ("sensor", "filled", "exact")
    )
    holes = 0
    for i in range(8):
        sensor, full, true = (store.__getitems__([i]) for store in (plain, filled, exact))
        assert torch.equal(sensor["rgb"], full["rgb"]) and torch.equal(sensor["rgb"], true["rgb"])
        assert torch.equal(true["depth"], sensor["exact"]) and true["valid"].all()
        assert full["valid"].all()
        mask = sensor["valid"]
        holes += int((~mask).sum())
        assert full["depth"].min() >= sensor["depth"][mask].min() - 1e-3  # the filling makes no new extremes
        assert full["depth"].max() <= sensor["depth"][mask].max() + 1e-3
        assert (full["depth"] - sensor["depth"])[mask].abs().median() < 0.05
    streams = [
        train_batches(data, frames=None, batch_size=8, seed=4, workers=workers)
        for data, workers in ((plain, 0), (exact, 0), (exact, 1))
    ]
    for sensor, *trues in itertools.islice(zip(*streams, strict=True), 3):
        for true in trues:  # mirrored with its picture, and once
            assert torch.equal(true["rgb"], sensor["rgb"]) and torch.equal(true["exact"], sensor["exact"])
            assert torch.equal(true["depth"], sensor["exact"]) and true["valid"].all()
    assert holes > 0


def test_as_many_frames_can_come_from_fewer_scenes(place):
    run = make_run("drill", scenes=3)
    sources = open_sources(run, place / "data")
    names = [sources.sets["train"].names[i] for i in sources.frames["train"]]
    assert len(set(names)) == len(names) == 8
    assert len({name.rpartition("-")[0] for name in names}) == 3
    with pytest.raises(UserError, match="ask for more scenes"):
        open_sources(make_run("drill", scenes=1), place / "data")


def test_the_same_run_in_another_place_gives_the_same_numbers_and_weights(record, run, place, tmp_path):
    again = execute(run, tmp_path, place / "data", device="cpu")
    assert again["metrics"] == record["metrics"]
    assert again["weights_digest"] == record["weights_digest"]
    assert [p | {"seconds": 0} for p in again["curve"]] == [p | {"seconds": 0} for p in record["curve"]]


def test_a_run_done_with_other_code_is_done_again(record, run, place, monkeypatch):
    path = place / "drill" / run.key / "record.json"
    before = path.stat().st_mtime_ns
    execute(run, place / "drill", place / "data", device="cpu")
    assert path.stat().st_mtime_ns == before
    monkeypatch.setattr(execution.provenance, "code_digest", lambda *modules, **options: "other")
    assert execute(run, place / "drill", place / "data", device="cpu")["metrics"] == record["metrics"]
    assert path.stat().st_mtime_ns != before


def test_other_initial_weights_under_the_same_name_are_another_run(place, tmp_path):
    path = tmp_path / "init.safetensors"
    ends = []
    for seed in (1, 2):
        save_weights(path, D3Net("tiny", seed=seed).state_dict(), {})
        run = make_run("drill", steps=1, init=str(path))
        ends.append(execute(run, tmp_path, place / "data", device="cpu")["weights_digest"])
    assert ends[0] != ends[1]


def test_a_run_can_start_from_another_of_its_batch(record, run, place):
    """At a learning rate of nothing it predicts what that one does, on other data too."""
    folder_of_pairs(place / "real", 8)
    still = {"data": f"folder:{place / 'real'}", "hold_out": 3, "steps": 1, "learning_rate": 1e-30, "beta1": 0.0}
    after = make_run("drill", loss="gan", train_set="12k", init=f"run:{run.key}", batch_size=2, **still)
    found = execute(after, place / "drill", place / "data", device="cpu")
    assert "before that: synthetic rooms" in found["data"]["description"]
    first, then = (load_weights(place / "drill" / key / "weights.safetensors")[0] for key in (run.key, after.key))
    convolutions = [name for name in first if "running" not in name and "batches" not in name]
    assert all(torch.allclose(first[name], then[name], atol=1e-12, rtol=0) for name in convolutions)
    with pytest.raises(UserError, match="no such weights file"):
        execute(dataclasses.replace(after, init="run:l1-none"), place / "drill", place / "data", device="cpu")


def test_another_number_of_frames_is_another_run(run, record, place, tmp_path, monkeypatch):
    fewer = dataclasses.replace(BUDGETS["drill"], views=BUDGETS["drill"].views | {"12k": 1})
    monkeypatch.setattr(execution, "BUDGETS", dict(BUDGETS) | {"drill": fewer})
    sources = open_sources(run, place / "data")
    assert sources.digest != record["data"]["digest"]
    assert len(sources.frames["train"]) == 4


def test_a_checkpoint_of_older_code_is_dropped_not_obeyed(run, place, tmp_path):
    folder = tmp_path / run.key
    folder.mkdir()
    (folder / "checkpoint-00000000.pt").write_bytes(b"made by older code")
    execute(run, tmp_path, place / "data", device="cpu")
    assert not list(folder.glob("checkpoint*"))


def test_depth_beyond_the_range_of_a_run_neither_trains_nor_counts(tmp_path):
    folder_of_pairs(tmp_path / "mine", 4)
    for i, path in enumerate(sorted((tmp_path / "mine/depth/train").iterdir())):
        row = np.where(np.arange(48) < 24, 15000, 1000 + i).astype(np.uint16)  # left half at 15 m
        Image.fromarray(np.tile(row, (32, 1))).save(path)
    for far, share in ((10.0, 0.5), (20.0, 1.0)):
        run = make_run("drill", data=f"folder:{tmp_path / 'mine'}", hold_out=1, max_depth=far, batch_size=2)
        sources = open_sources(run, tmp_path / "data")
        assert float(sources.sets["train"][0]["valid"].float().mean()) == share
        scores = score_baselines(run, tmp_path, tmp_path / "data", device="cpu")["scores"]["constant"]["test"]["depth"]
        assert (scores["pooled"]["rms"] > 5) == (far > 10)


def test_nested_training_sets_share_their_first_frames(place):
    sources = {s: open_sources(make_run("drill", train_set=s), place / "data") for s in ("795", "12k", "230k")}
    frames = {s: list(found.frames["train"]) for s, found in sources.items()}
    assert frames["12k"][: len(frames["795"])] == frames["795"]
    assert frames["230k"][: len(frames["12k"])] == frames["12k"]


def test_baselines_are_scored_like_a_run_and_kept(run, place):
    found = score_baselines(run, place / "drill", place / "data", device="cpu")
    sources = open_sources(run, place / "data")
    train, test = sources.sets["train"], sources.sets["test"]
    depths = np.concatenate([train[i]["depth"][train[i]["valid"]].double().numpy() for i in sources.frames["train"]])
    errors = [test[i]["exact"].double().numpy() - depths.mean() for i in range(len(test))]
    by_hand = np.sqrt(np.mean(np.square(errors)))
    assert found["scores"]["constant"]["test"]["exact"]["pooled"]["rms"] == pytest.approx(by_hand, rel=1e-4)
    assert score_baselines(run, place / "drill", place / "data", device="cpu") == found


def test_a_failed_run_says_why_and_a_killed_one_is_interrupted(tmp_path, place, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("the cable was pulled\nand more")

    monkeypatch.setattr(execution, "fit", fail)
    run = make_run("drill", seed=5)
    with pytest.raises(RuntimeError):
        execute(run, tmp_path, place / "data", device="cpu")
    assert State(tmp_path / run.key).read() == ("failed", "RuntimeError: the cable was pulled")
    (tmp_path / "x").mkdir()
    child = os.fork()
    if child == 0:
        State(tmp_path / "x").write("running")
        os._exit(0)
    os.waitpid(child, 0)
    assert State(tmp_path / "x").read()[0] == "interrupted"
    assert State(tmp_path / "y").read() == ("not run", "")


def folder_of_pairs(root, count):
    for kind in ("rgb", "depth"):
        (root / kind / "train").mkdir(parents=True)
    for i in range(count):
        name = f"2020-01-01T00:00:{i:02d}.000000"
        Image.fromarray(np.full((32, 48, 3), i, np.uint8)).save(root / "rgb/train" / f"{name}.png")
        Image.fromarray(np.full((32, 48), 1000 + i, np.uint16)).save(root / "depth/train" / f"{name}.png")


def test_the_last_pairs_by_time_are_the_test_set_and_none_is_in_two_sets(tmp_path):
    folder_of_pairs(tmp_path / "mine", 20)
    run = make_run("drill", data=f"folder:{tmp_path / 'mine'}", hold_out=5)
    sources = open_sources(run, tmp_path / "data")
    assert [list(sources.frames[name]) for name in ("train", "val", "test")] == [
        list(range(14)),
        [14],
        list(range(15, 20)),
    ]
    depths = [float(sources.sets["test"][i]["depth"].mean()) for i in sources.frames["test"]]
    assert depths == pytest.approx([1.015, 1.016, 1.017, 1.018, 1.019])


def test_too_few_pairs_to_hold_out_are_refused(tmp_path):
    folder_of_pairs(tmp_path / "mine", 3)
    with pytest.raises(UserError, match="too few"):
        open_sources(make_run("drill", data=f"folder:{tmp_path / 'mine'}", hold_out=2), tmp_path / "data")


def test_a_record_of_another_format_is_refused(tmp_path):
    path = tmp_path / "record.json"
    path.write_text('{"format": "d3lib-record", "version": 99, "digest": "", "content": {}}')
    with pytest.raises(UserError, match="version 99"):
        read_record(path)
    path.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_record(path)


@pytest.mark.realdata
def test_the_real_pairs_train_and_are_scored(test_data, tmp_path):
    run = make_run(
        "drill", data=f"folder:{test_data / 'dfd_indoor'}", hold_out=16, height=48, width=64, steps=3, evaluations=1
    )
    record = execute(run, tmp_path, tmp_path / "data", device="cpu")
    assert record["metrics"]["chosen"]["test"]["depth"]["images"] == 16
    assert record["data"]["train_frames"] == 59

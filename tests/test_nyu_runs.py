"""Runs on NYU Depth V2's prepared sets: which frames train, validate and test, and what is scored at which size."""

import numpy as np
import pytest
import torch

from d3lib.data import nyu
from d3lib.data.shards import write_store
from d3lib.errors import UserError
from d3lib.execution import execute, open_sources
from d3lib.experiments import make_run


def fake_store(folder, names, size, holes=False):
    """A store of smooth made-up frames: a picture whose brightness follows depth."""
    rng = np.random.default_rng(len(names))
    ramp = np.linspace(1, 4, size[1], dtype=np.float32) * np.ones((len(names), 1, *size), np.float32)
    depth = torch.from_numpy(ramp + rng.random((len(names), 1, 1, 1), dtype=np.float32))
    valid = torch.ones_like(depth, dtype=torch.bool)
    if holes:
        valid[..., : size[0] // 2, :] = False
    rgb = (depth.expand(-1, 3, -1, -1) * 50).byte()
    write_store(folder, [{"rgb": rgb, "depth": depth * valid, "valid": valid}], source={"kind": "test"}, names=names)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("nyu") / "data"
    held_out = sorted(nyu.validation_scenes())[:2]
    others = sorted(nyu.training_scenes() - nyu.validation_scenes())[:5]
    labelled = [f"{scene}/{number:04d}" for number, scene in enumerate(others[:3] + held_out, 1)]
    fake_store(root / "nyu-train-32x48", labelled, (32, 48))
    raw = [f"{scene}/{second}.5-1" for scene in (*others, held_out[0]) for second in (1, 2)]
    fake_store(root / "nyu-12k-32x48", raw, (32, 48))
    tests = [f"test_scene_{number:04d}/{number:04d}" for number in range(3)]
    fake_store(root / "nyu-test-427x561", tests, (427, 561))
    fake_store(root / "nyu-test-raw-427x561", tests, (427, 561), holes=True)
    return root


def drill(train_set):
    return make_run("drill", data="nyu", train_set=train_set, steps=2)


def scenes(sources, name):
    return {nyu.scene_of(sources.sets[name].names[index]) for index in sources.frames[name]}


@pytest.mark.parametrize(("train_set", "frames"), [("795", 3), ("12k", 10)])
def test_no_validation_scene_trains_and_all_sets_validate_on_the_same_frames(prepared, train_set, frames):
    sources = open_sources(drill(train_set), prepared)
    assert len(sources.frames["train"]) == frames and len(sources.frames["val"]) == 2
    assert not scenes(sources, "train") & nyu.validation_scenes()
    assert scenes(sources, "val") <= nyu.validation_scenes()
    assert "NYU Depth V2" in sources.description


def test_the_sets_differ_in_their_digest(prepared):
    assert open_sources(drill("795"), prepared).digest != open_sources(drill("12k"), prepared).digest


def test_a_set_that_is_not_prepared_is_named_with_the_command_that_makes_it(prepared):
    with pytest.raises(UserError, match=r"nyu-230k-32x48: .*d3lib data nyu-raw .*--frames all --size 32x48"):
        open_sources(drill("230k"), prepared)


def test_results_count_at_network_size_and_at_full_size_against_filled_and_measured_depth(prepared, tmp_path):
    record = execute(drill("12k"), tmp_path, prepared, device="cpu")
    scores = record["metrics"]["chosen"]
    assert scores.keys() == {"train", "val", "test", "test_full", "test_raw", "test_raw_full"}
    assert record["data"]["target"] == "depth" and record["data"]["train_frames"] == 10
    # the lower half alone is measured, and the picture is the same: another mean over other pixels
    assert scores["test_raw"]["depth"]["pooled"]["rms"] != scores["test"]["depth"]["pooled"]["rms"]
    full, small = (scores[name]["depth"]["pooled"]["rms"] for name in ("test_full", "test"))
    assert full != small and full == pytest.approx(small, rel=0.1)


def test_full_size_scores_are_those_of_the_prediction_brought_to_427x561(prepared, tmp_path):
    run = drill("12k")
    sources = open_sources(run, prepared)
    batch = next(iter(sources.batches("test_full", run, "cpu")))
    assert tuple(batch["rgb"].shape[-2:]) == (32, 48) and tuple(batch["depth"].shape[-2:]) == (427, 561)
    small = next(iter(sources.batches("test", run, "cpu")))
    assert torch.equal(batch["rgb"], small["rgb"])

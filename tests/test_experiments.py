"""Runs, budgets and the manifest: what is to be run is said once, checked, and keyed without collisions."""

import dataclasses
import subprocess
import sys

import pytest

from d3lib import experiments, losses, models
from d3lib.errors import UserError
from d3lib.experiments import BUDGETS, LOSSES, TRAIN_SETS, Run, all_runs, make_run, manifest
from d3lib.results import paper_numbers


def test_names_agree_with_the_modules_that_implement_them():
    assert losses.LOSSES == LOSSES
    assert set(models.ENCODERS) == set(experiments.ENCODERS)


def test_every_field_of_a_run_has_a_one_line_meaning():
    for field in dataclasses.fields(Run):
        assert field.metadata["help"] and "\n" not in field.metadata["help"]


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_main_grid_is_seven_losses_on_three_sets_at_every_budget(budget):
    grid = manifest(budget)["fig2"].runs
    assert {(run.loss, run.train_set) for run in grid} == {(loss, size) for loss in LOSSES for size in TRAIN_SETS}
    assert len(grid) == 21 * BUDGETS[budget].seeds


def test_seeds_are_paired_across_losses():
    grid = manifest("study")["fig2"].runs
    by_loss = {loss: sorted((r.train_set, r.seed) for r in grid if r.loss == loss) for loss in LOSSES}
    assert len(set(map(tuple, by_loss.values()))) == 1


def test_every_number_the_paper_plots_has_a_run_at_the_paper_budget():
    runs = all_runs("paper").values()
    for number in paper_numbers():
        if number.item == "table2":
            continue
        wanted = (number.method, number.train_set, number.encoder)
        assert any((run.loss, run.train_set, run.encoder) == wanted for run in runs), number


def test_a_key_changes_with_every_field_and_with_nothing_else():
    base = make_run("smoke")
    other = {
        "loss": "l2", "variant": "released", "encoder": "resnet50", "pretrained": True, "init": "x.safetensors",
        "train_set": "795", "data": "nyu", "hold_out": 3, "budget": "study", "seed": 1, "height": 64, "width": 64,
        "max_depth": 8.0, "steps": 7, "batch_size": 2, "learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.99,
        "lam": 1.0, "ndf": 8, "precision": "bf16", "evaluations": 3,
    }  # fmt: skip
    assert set(other) == {field.name for field in dataclasses.fields(Run)}
    keys = [dataclasses.replace(base, **{name: value}).key for name, value in other.items()]
    assert len({base.key, *keys}) == len(keys) + 1
    assert Run(**dict(reversed(dataclasses.asdict(base).items()))).key == base.key


def test_a_key_does_not_depend_on_the_hash_seed():
    code = "from d3lib.experiments import make_run; print(make_run('smoke', loss='gan').key)"
    keys = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1")
    }
    assert len(keys) == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"loss": "l3"}, "loss 'l3' is unknown"),
        ({"losss": "l1"}, "no parameter 'losss'"),
        ({"steps": "many"}, "steps must be int"),
        ({"steps": True}, "steps must be int"),
        ({"steps": 0}, "steps is 0"),
        ({"height": 8}, "height is 8"),
        ({"data": "kitti"}, "data 'kitti'"),
        ({"seed": -1}, "seed is -1"),
        ({"train_set": "1M"}, "train_set '1M'"),
    ],
)
def test_a_wrong_run_is_refused_in_one_line(fields, words):
    with pytest.raises(UserError, match=words) as caught:
        make_run("smoke", **fields)
    assert "\n" not in str(caught.value)


def test_an_unknown_budget_or_item_is_refused():
    with pytest.raises(UserError, match="budget 'huge'"):
        make_run("huge")
    with pytest.raises(UserError, match="no figure or table 'fig9'"):
        all_runs("smoke", "fig9")

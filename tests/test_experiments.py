"""Runs, budgets and the manifest: what is to be run is said once, checked, and keyed without collisions."""

import dataclasses
import subprocess
import sys

import pytest

from d3lib import experiments, losses, models
from d3lib.errors import UserError
from d3lib.experiments import (
    BUDGETS,
    LOSSES,
    TRAIN_SETS,
    Run,
    all_runs,
    find_run,
    make_run,
    manifest,
    pages_of,
    runs_to_do,
)
from d3lib.results import paper_numbers


def test_names_agree_with_the_modules_that_implement_them():
    assert losses.LOSSES == LOSSES
    assert set(models.ENCODERS) == set(experiments.ENCODERS)
    assert (models.POOLINGS, models.OUTPUTS) == (experiments.POOLINGS, experiments.OUTPUTS)


def test_every_field_of_a_run_has_a_one_line_meaning():
    for field in dataclasses.fields(Run):
        assert field.metadata["help"] and "\n" not in field.metadata["help"]


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_main_grid_is_seven_losses_on_three_sets_at_every_budget(budget):
    grid = manifest(budget)["fig2"].runs
    assert {(run.loss, run.train_set) for run in grid} == {(loss, size) for loss in LOSSES for size in TRAIN_SETS}
    row = BUDGETS[budget]
    assert len(set(grid)) == len(grid) == 3 * 7 * row.seeds


def test_the_paper_budget_holds_what_the_paper_did_and_the_questions_beyond_it():
    items = manifest("paper")
    assert len({(r.loss, r.encoder) for r in items["fig5"].runs}) == 14
    assert {(r.loss, r.train_set) for r in items["table2"].runs} == {("gan", "230k")}
    assert {(r.loss, r.learning_rate) for r in items["rate"].runs} == {
        (loss, r) for loss in LOSSES for r in (1e-4, 4e-4)
    }
    assert {r.lam for r in items["lam_gan"].runs} >= {0.0}
    assert all(not r.pretrained for r in items["pretraining"].runs)
    assert all(r.pretrained for r in items["fig2"].runs)
    assert list(items)[0] == "fig2"  # the main grid first
    assert {r.target for r in items["fig2"].runs} == {"filled"}  # the paper's depths
    assert {r.target for r in items["target"].runs} == {"sensor"}
    assert "scenes" not in items and "scenes" in manifest("paper", "rooms")  # a choice of rooms


def test_every_run_beyond_the_paper_differs_from_a_run_of_the_paper_in_one_thing():
    for budget in ("study", "paper"):
        items = manifest(budget)
        grid = [dataclasses.asdict(run) for name in ("fig2", "fig5") for run in items[name].runs]
        for item in items.values():
            if item.beyond and item.name != "reference":
                for run in map(dataclasses.asdict, item.runs):
                    assert min(sum(run[name] != other[name] for name in run) for other in grid) == 1, (item.name, run)


def test_real_pictures_bring_the_question_of_transfer_in_pairs():
    assert "transfer" not in manifest("study")
    runs = manifest("study", pictures="/pictures")["transfer"].runs
    scratch, tuned = ([run for run in runs if bool(run.init) == with_init] for with_init in (False, True))
    assert {run.data for run in runs} == {f"folder:/pictures/fold-{fold}" for fold in range(1, 6)}
    assert [dataclasses.replace(run, init="") for run in tuned] == scratch and len(set(scratch)) == 3 * 5
    grid = {f"run:{run.key}": run for run in manifest("study")["fig2"].runs}
    assert all((grid[run.init].loss, grid[run.init].seed) == (run.loss, run.seed) for run in tuned)
    assert {run.steps for run in runs} == {500}  # of a few pictures no more is learnt
    assert pages_of("study", "transfer", pictures="/pictures").keys() == {"real"}


def test_a_question_that_two_pages_show_renews_both_and_trains_for_one():
    runs = {name: list(all_runs("laptop", name)) for name in ("fig5", "decoder", "encoders")}
    assert pages_of("laptop", "encoders").keys() == {"beyond", "fig5"} and pages_of("laptop", "rate").keys() == {
        "beyond"
    }
    assert pages_of("laptop", "fig5") == {"fig5": [*runs["fig5"], *runs["decoder"], *runs["encoders"]]}


def test_encoders_are_trained_longer_where_they_are_cut_short_and_differ_in_nothing_else():
    assert [budget for budget in BUDGETS if "encoders" in manifest(budget)] == ["laptop"]
    items = manifest("laptop")
    short = {run.key: run for name in ("fig5", "decoder") for run in items[name].runs}
    for run in items["encoders"].runs:
        assert dataclasses.replace(run, steps=run.steps // 3).key in short and run.steps == 3 * 400


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_run_of_a_budget_finds_its_frames(budget):
    from d3lib.execution import frames_of

    for run in all_runs(budget, data="rooms").values():
        frames = frames_of(run)
        assert len(set(frames)) == len(frames) == BUDGETS[budget].frames(run.train_set)
        assert max(frames) < BUDGETS[budget].train_scenes * max(BUDGETS[budget].views.values())


def test_equal_epochs_means_as_many_epochs_as_the_middle_set_has():
    row = BUDGETS["study"]
    for run in manifest("study")["epochs"].runs:
        assert run.steps / row.frames(run.train_set) == pytest.approx(row.steps / row.frames("12k"), rel=1e-3)


def test_longer_runs_are_the_main_grids_in_all_but_their_end_and_only_a_cpus_study_has_them():
    assert [budget for budget in BUDGETS if "longer" in manifest(budget)] == ["gate", "laptop"]
    grid = manifest("laptop")["fig2"].runs
    runs = manifest("laptop")["longer"].runs
    assert len(runs) == 9 and {run.train_set for run in runs} == {"230k"}
    for run in runs:
        assert dataclasses.replace(run, steps=run.steps // 4, evaluations=run.evaluations // 4) in grid


def test_a_budgets_own_numbers_stand_behind_its_sets_rates_and_counts():
    assert [BUDGETS["study"].frames(name) for name in TRAIN_SETS] == [249, 249 * 15, 249 * 290]
    assert {run.learning_rate for run in manifest("laptop")["rate"].runs} == {5e-4, 2e-3}  # half and twice its 1e-3
    assert make_run("smoke", steps=7, batch_size=2).images == 14
    assert make_run("smoke", scenes=BUDGETS["smoke"].train_scenes).scenes == 83


@pytest.mark.parametrize(
    ("budget", "data", "target"),
    [("study", "nyu", "filled"), ("paper", None, "filled"), ("paper", "rooms", "sensor"), ("study", None, "sensor")],
)
def test_training_depth_is_filled_on_nyu_alone_whatever_the_budget(budget, data, target):
    assert make_run(budget, data=data).target == target


def test_a_run_comes_after_the_one_whose_weights_it_starts_from():
    todo = runs_to_do("study", "transfer", pictures="/pictures")
    order, starts = list(todo), {run.init.removeprefix("run:") for run in todo.values()} - {""}
    assert set(order[: len(starts)]) == starts and len(starts) == 3
    assert len(order) == 3 + 2 * 3 * 5


def test_a_key_finds_its_run_and_an_unknown_key_is_refused():
    run = manifest("study")["rate"].runs[3]
    assert find_run(run.key) == run
    stand_in = make_run("paper", data="rooms")  # rooms, where NYU is absent
    assert find_run(stand_in.key) == stand_in
    with pytest.raises(UserError, match="no budget has a run 'l1-nothing'"):
        find_run("l1-nothing")


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
    bases = {"lam": "gan", "adversarial_from": "gan", "pooled": "eigen"}  # fields that some losses alone have
    other = {
        "loss": "l2", "variant": "released", "encoder": "resnet50", "pretrained": True, "init": "x.safetensors",
        "train_set": "795", "data": "nyu", "hold_out": 3, "budget": "study", "seed": 1, "height": 64, "width": 64,
        "max_depth": 8.0, "steps": 7, "batch_size": 2, "learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.99,
        "lam": 1.0, "ndf": 4, "precision": "bf16", "evaluations": 3, "pooled": True, "adversarial_from": 0.5,
        "skips": False, "pooling": "max", "output": "log", "scenes": 3, "target": "exact", "gpus": 2,
        "clip_norm": 1.0,
    }  # fmt: skip
    assert set(other) == {field.name for field in dataclasses.fields(Run)}
    plain = {make_run("smoke", loss=loss).key for loss in ("l1", *bases.values())}
    keys = [
        dataclasses.replace(make_run("smoke", loss=bases.get(name, "l1")), **{name: value}).key
        for name, value in other.items()
    ]
    assert len({*plain, *keys}) == len(keys) + len(plain)
    base = make_run("smoke")
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
        ({"lam": 1.0}, "has no lam"),
        ({"lam": "x", "loss": "gan"}, "lam must be float"),
        ({"loss": "eigen", "variant": "released", "lam": 1.0}, "has no lam"),
        ({"adversarial_from": 0.5}, "adversarial_from is 0.5"),
        ({"pooled": True}, "has no pooled form"),
        ({"scenes": 84}, "scenes is 84"),
        ({"target": "exact", "data": "nyu"}, "target must be filled or sensor"),
        ({"gpus": 3}, "cannot be shared by 3"),
        ({"learning_rate": True}, "learning_rate must be float"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"beta2": 1.0}, "beta2 is 1.0"),
        ({"clip_norm": -1.0}, "clip_norm is -1.0"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"batch_size": 1, "height": 32, "width": 63}, "batch normalisation"),
        ({"loss": "gan", "adversarial_from": 1.0}, "adversarial_from is 1.0"),
        ({"loss": "eigen", "variant": "released", "pooled": True}, "has no pooled form"),
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
    for name in ("transfer", "real"):
        with pytest.raises(UserError, match=f"'{name}' is about real pictures; .*--pictures"):
            all_runs("smoke", name)

"""Several processes train as one would: the same losses, weights and curve, also after one of them was killed."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from d3lib import distributed
from d3lib.errors import UserError
from d3lib.execution import execute
from d3lib.experiments import make_run
from d3lib.losses import build_loss
from d3lib.models import D3Net, PatchDiscriminator
from d3lib.records import State, read_record
from d3lib.training import fit

STEPS, BATCH, SIZE = 6, 4, (32, 48)
LOSSES = ("l1", "berhu", "eigen", "gan")


def batch_of(step):
    """A batch in float64 whose two halves have very different numbers of valid pixels."""
    rng = np.random.default_rng(step)
    valid = rng.random((BATCH, 1, *SIZE)) < np.array([0.9, 0.8, 0.1, 0.0]).reshape(BATCH, 1, 1, 1)
    return {
        "rgb": torch.from_numpy(rng.random((BATCH, 3, *SIZE))),
        "depth": torch.from_numpy(rng.uniform(0.5, 9.0, (BATCH, 1, *SIZE))),
        "valid": torch.from_numpy(valid),
    }


def stream(start, dies_at=None):
    """This process's slices of the batches from step `start` on; process 1 dies before the step `dies_at`."""
    share = BATCH // distributed.world()
    part = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    for step in range(start, STEPS):
        if step == dies_at and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield {key: value[part] for key, value in batch_of(step).items()}


def train(loss, checkpoint=None, dies_at=None, frozen=True):
    """Six steps in float64; `frozen`: with batch normalisation in evaluation mode. Give all weights and the curve."""
    net = D3Net("tiny", seed=1).double()
    adversary = PatchDiscriminator(ndf=8, seed=1).double() if loss == "gan" else None
    for module in net.modules():
        if frozen and isinstance(module, nn.BatchNorm2d):
            module.eval().train = lambda mode=True, module=module: module
    trace = fit(
        net,
        build_loss("l1" if loss == "gan" else loss),
        lambda start: stream(start, dies_at),
        steps=STEPS,
        adversary=adversary,
        adversarial_from=2,
        evaluate=lambda net: {"val_rms": 1.0},
        evaluations=3,
        checkpoint=checkpoint,
        identity="x",
    )
    weights = {f"net.{name}": value for name, value in net.state_dict().items()}
    if adversary is not None:
        weights |= {f"adversary.{name}": value for name, value in adversary.state_dict().items()}
    return {"weights": weights, "curve": trace.curve}


def process(rank, folder, jobs):
    """What one of two processes does: each of `jobs` (name -> arguments of `train`), kept under its name."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, arguments in jobs.items():
        torch.save(train(**arguments), folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()


def both(folder, jobs):
    """Run `jobs` in two processes; name -> what each of the two has."""
    (folder / "meet").unlink(missing_ok=True)
    mp.spawn(process, (folder, jobs), nprocs=2)
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(2)] for name in jobs}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def ends(folder):
    jobs = {loss: {"loss": loss} for loss in LOSSES} | {"moving": {"loss": "gan", "frozen": False}}
    return both(folder, jobs)


def largest_difference(weights, others):
    assert weights.keys() == others.keys()
    return max((weights[name] - others[name]).abs().max().item() for name in weights)


@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_end_where_one_with_the_whole_batch_does(loss, ends):
    alone, (first, second) = train(loss), ends[loss]
    assert largest_difference(alone["weights"], first["weights"]) < 1e-9
    assert largest_difference(first["weights"], second["weights"]) == 0
    assert [point["images"] for point in first["curve"]] == [8, 16, 24]
    for point, whole in zip(first["curve"], alone["curve"], strict=True):
        assert point == pytest.approx(whole, rel=1e-9)
    assert not any("val_rms" in point for point in second["curve"])


def test_with_moving_statistics_the_parameters_are_equal_in_all_processes(ends):
    first, second = (end["weights"] for end in ends["moving"])
    parameters = [name for name in first if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert len(parameters) > 100 and all(torch.equal(first[name], second[name]) for name in parameters)
    assert not torch.equal(
        first["net.decoder.blocks.0.0.weight"], ends["gan"][0]["weights"]["net.decoder.blocks.0.0.weight"]
    )


def test_a_run_of_which_one_process_was_killed_resumes_and_ends_as_if_never_cut(folder, ends):
    checkpoint = folder / "checkpoint.pt"
    job = {"loss": "gan", "frozen": False, "checkpoint": checkpoint}
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):  # and the other process ends too
        both(folder, {"killed": job | {"dies_at": 4}})
    assert checkpoint.is_file() and not list(folder.glob("killed-*"))
    first, _ = both(folder, {"resumed": job})["resumed"]
    assert largest_difference(first["weights"], ends["moving"][0]["weights"]) == 0
    assert first["curve"] == ends["moving"][0]["curve"]


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "100")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="100 processes .* of which there are 0"), distributed.joined("cuda"):
        pass


@pytest.fixture(scope="module")
def run():
    return make_run("drill", loss="gan", adversarial_from=0.25, steps=4, evaluations=2, gpus=2)


@pytest.fixture(scope="module")
def record(run, folder):
    return execute(run, folder / "drill", folder / "data", device="cpu")


def test_a_run_on_two_gpus_starts_its_processes_and_leaves_what_any_run_leaves(run, record, folder):
    place = folder / "drill" / run.key
    assert record["run"]["gpus"] == 2 and record == read_record(place / "record.json")
    assert [point["images"] for point in record["curve"]] == [16, 32]
    assert {"weights.safetensors", "model_card.md", "predictions.npz"} <= {path.name for path in place.iterdir()}
    assert not list(place.glob("checkpoint*")) and State(place).read()[0] == "done"


def test_torchrun_on_the_command_line_does_the_same_run_and_says_so_once(run, record, folder, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "d3lib"]
    flags = "train --budget drill --loss gan --adversarial-from 0.25 --steps 4 --evaluations 2 --device cpu".split()
    places = ["--out", tmp_path, "--data-root", folder / "data"]
    done = subprocess.run([*command, *flags, *places], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"# {run.key}") == 1
    again = read_record(tmp_path / "drill" / run.key / "record.json")
    assert again["metrics"] == record["metrics"] and again["weights_digest"] == record["weights_digest"]


def test_what_ends_one_process_ends_the_run_with_its_one_line(folder):
    run = make_run("drill", data="nyu", gpus=2)
    with pytest.raises(UserError, match="NYU|nyu") as caught:
        execute(run, folder / "drill", folder / "data", device="cpu")
    assert "\n" not in str(caught.value)


def test_a_run_started_in_another_number_of_processes_is_refused(run, monkeypatch, folder):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="gpus 2 was started in 4 processes"):
        execute(run, folder / "drill", folder / "data", device="cpu")

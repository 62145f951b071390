"""Several processes train as one would: the same losses, weights and curve, also after one of them was killed."""

import os
import signal

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from d3lib import distributed
from d3lib.losses import build_loss
from d3lib.models import D3Net, PatchDiscriminator
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

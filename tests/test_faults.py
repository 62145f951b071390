"""Faults in the middle of a run: it says which step and frames, saves what it has, and goes on to the same numbers."""

import dataclasses
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from d3lib import cli, execution
from d3lib.artefacts import load_weights
from d3lib.errors import StoppedError, UserError
from d3lib.execution import execute, open_sources
from d3lib.experiments import make_run
from d3lib.losses import build_loss
from d3lib.models import D3Net
from d3lib.records import State
from d3lib.training import DivergedError, fit


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    open_sources(make_run("drill"), place)
    return place


def batches(start, bad_step=None):
    """Batches that are a function of the step; at one step, one pixel of depth is NaN."""
    for step in range(start, 1000):
        rng = np.random.default_rng(step)
        rgb, depth = rng.uniform(size=(2, 3, 32, 48)), rng.uniform(1, 5, (2, 1, 32, 48))
        if step + 1 == bad_step:
            depth[1, 0, 3, 4] = np.nan
        batch = {"rgb": torch.tensor(rgb).float(), "depth": torch.tensor(depth).float()}
        yield batch | {"valid": torch.ones(2, 1, 32, 48, dtype=torch.bool)}


def weights_of(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# --- divergence ---


@pytest.mark.parametrize("bad_step", [1, 4, 6])
def test_the_step_that_saw_a_nan_is_the_one_named(bad_step):
    with pytest.raises(DivergedError) as error:
        fit(D3Net("tiny", seed=0), build_loss("l2"), lambda s: batches(s, bad_step), steps=6, evaluations=1)
    assert error.value.step == bad_step and f"step {bad_step} " in one_line(error)


def test_a_learning_rate_that_is_too_large_diverges_at_the_step_whose_loss_was_first_infinite():
    seen = []

    def loss(pred, target, mask):
        mean = pred.mean()  # pushed up, step by step, into a range where the loss is infinite
        value = -mean if mean < 8 else mean * torch.inf
        seen.append(value.item())
        return value

    with pytest.raises(DivergedError) as error:
        fit(D3Net("tiny", seed=0), loss, batches, steps=8, evaluations=1, learning_rate=1e-2)
    assert error.value.step == 1 + int(np.argmin(np.isfinite(seen))) > 1


def test_a_diverged_run_names_the_frames_of_its_first_bad_batch(data, tmp_path, monkeypatch):
    loaded, honest = [], open_sources

    class Poisoned(torch.utils.data.Dataset):
        def __init__(self, store, bad):
            self.store, self.names, self.bad = store, store.names, bad

        def __len__(self):
            return len(self.store)

        def __getitems__(self, indices):
            loaded.append(list(indices))
            batch = self.store.__getitems__(indices)
            batch["depth"][np.asarray(indices) == self.bad] = np.nan
            return batch | {"valid": torch.ones_like(batch["valid"])}

    def poisoned(*arguments):
        sources = honest(*arguments)
        train = Poisoned(sources.sets["train"], bad=5)
        return dataclasses.replace(sources, sets=dict(sources.sets) | {"train": train})

    monkeypatch.setattr(execution, "open_sources", poisoned)
    run = make_run("drill", batch_size=2, steps=12, evaluations=1)
    with pytest.raises(UserError) as error:
        execute(run, tmp_path, data, device="cpu")
    first = next(number for number, indices in enumerate(loaded) if 5 in indices)
    names = honest(run, data).sets["train"].names
    assert f"step {first + 1} " in one_line(error)
    said = re.search(r"its frames: (.*)\)", str(error.value))[1].split(", ")
    assert sorted(said) == sorted(names[index] for index in loaded[first])
    assert State(tmp_path / run.key).read()[0] == "failed"


def test_the_checkpoint_of_a_diverged_run_is_from_before(tmp_path):
    path = tmp_path / "c.pt"
    options = {"steps": 6, "evaluations": 6, "checkpoint": path, "identity": "x"}
    with pytest.raises(DivergedError):
        fit(D3Net("tiny", seed=0), build_loss("l1"), lambda s: batches(s, 4), **options)
    net = D3Net("tiny", seed=0)
    fit(net, build_loss("l1"), batches, **options)  # the frame is mended
    whole = D3Net("tiny", seed=0)
    fit(whole, build_loss("l1"), batches, steps=6, evaluations=6)
    assert equal(weights_of(net), weights_of(whole))


# --- clipping ---


def test_a_gradient_is_scaled_down_to_the_norm_asked_for_and_a_smaller_one_is_left_alone():
    def gradient(**options):
        net = D3Net("tiny", seed=0)
        fit(net, build_loss("l1"), batches, steps=1, evaluations=1, **options)
        found = torch.cat([p.grad.double().flatten() for p in net.parameters() if p.grad is not None])
        return found, weights_of(net)

    free, weights = gradient()
    norm = float(free.norm())
    clipped, _ = gradient(clip_norm=norm / 10)
    torch.testing.assert_close(clipped, free / 10, rtol=1e-4, atol=1e-9)
    assert equal(gradient(clip_norm=norm * 2)[1], weights)


# --- told to stop ---


def test_once_told_to_stop_a_checkpoint_is_saved_and_training_goes_on_from_there(tmp_path):
    path, asked = tmp_path / "c.pt", iter([False, False, True])
    options = {"steps": 6, "evaluations": 2, "checkpoint": path, "identity": "x"}
    with pytest.raises(StoppedError, match="step 3 of 6"):
        fit(D3Net("tiny", seed=0), build_loss("l1"), batches, stop=lambda: next(asked), **options)
    net, whole = D3Net("tiny", seed=0), D3Net("tiny", seed=0)
    started = []
    trace = fit(net, build_loss("l1"), lambda step: started.append(step) or batches(step), **options)
    assert started == [3]
    unbroken = fit(whole, build_loss("l1"), batches, steps=6, evaluations=2)
    assert equal(weights_of(net), weights_of(whole)) and trace.curve == unbroken.curve


def test_told_to_stop_at_the_last_step_the_run_is_done():
    fit(D3Net("tiny", seed=0), build_loss("l1"), batches, steps=1, evaluations=1, stop=lambda: True)


def test_sigterm_ends_the_command_with_143_and_the_same_command_ends_in_the_same_weights(data, tmp_path):
    fields = ["--budget", "drill", "--loss", "gan", "--steps", "40", "--evaluations", "20"]
    run = make_run("drill", loss="gan", steps=40, evaluations=20)
    command = [sys.executable, "-m", "d3lib", "train", "--device", "cpu", "--data-root", str(data), *fields]
    process = subprocess.Popen([*command, "--out", str(tmp_path)], stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("step"):
            process.send_signal(signal.SIGTERM)
            break
    lines += process.stderr.readlines()
    assert process.wait(60) == 143, lines
    assert re.search(r"^d3lib: stopped at step \d+ of 40; the same command continues", lines[-1])
    folder = tmp_path / "drill" / run.key
    assert State(folder).read()[0] == "interrupted"
    assert list(folder.glob("checkpoint-*.pt")) and not (folder / "record.json").exists()
    arguments = command[3:]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    assert cli.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    found, whole = (
        load_weights(place / "drill" / run.key / "weights.safetensors") for place in (tmp_path, tmp_path / "whole")
    )
    assert found[1] == whole[1] and equal(found[0], whole[0])
    assert State(folder).read()[0] == "done"


# --- out of memory ---


class Hungry(torch.nn.Module):
    """A network for which so many pictures at once are too many."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.scale = limit, torch.nn.Parameter(torch.ones(()))

    def forward(self, rgb):
        if len(rgb) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore lines")
        return self.scale * rgb[:, :1]


@pytest.mark.parametrize(
    ("error", "limit", "advice"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 3, "batch_size 2 fits"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 4, "batch_size 4 fits"),
        (torch.OutOfMemoryError("CUDA out of memory"), 0, "no batch fits; choose a smaller height and width"),
    ],
)
def test_out_of_memory_is_one_line_with_a_batch_size_that_fits(data, tmp_path, monkeypatch, error, limit, advice):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(execution, "fit", fail)
    monkeypatch.setattr(execution, "build_network", lambda run, place=None: Hungry(limit))
    with pytest.raises(UserError) as caught:
        execute(make_run("drill", batch_size=8), tmp_path, data, device="cpu")
    assert f"batch_size 8, 32x48; {advice}" in one_line(caught)


def test_other_faults_of_the_machine_are_not_taken_for_a_lack_of_memory(data, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(execution, "fit", fail)
    with pytest.raises(RuntimeError, match="illegal"):
        execute(make_run("drill"), tmp_path, data, device="cpu")

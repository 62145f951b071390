"""The training loop: it learns, it repeats itself, it resumes, and it says when it diverges."""

import contextlib
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch

from d3lib.errors import StoppedError, UserError
from d3lib.losses import build_loss
from d3lib.models import D3Net, PatchDiscriminator
from d3lib.training import Adversary, DivergedError, fit, pick_compiler, pick_layout, pick_precision


def scene_batch(count=2, height=64, width=96, seed=0):
    """Smooth pictures whose depth is a simple function of their colours, with a few holes."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    a, b, c = rng.uniform(0.2, 1, (3, count, 1, 1))
    rgb = np.stack([a * x + 0 * y, b * y + 0 * x, c * (x + y) / 2], axis=1)
    depth = 1 + 3 * rgb[:, :1] + 2 * rgb[:, 1:2]
    return {
        "rgb": torch.tensor(rgb, dtype=torch.float32),
        "depth": torch.tensor(depth, dtype=torch.float32),
        "valid": torch.tensor(rng.uniform(size=depth.shape) > 0.1),
    }


def stream(start, length=1000):
    """Batches that are a function of the step, as the loop demands."""
    return iter([scene_batch(seed=step) for step in range(start, length)])


def weights_of(net):
    return torch.cat([value.double().flatten() for value in net.state_dict().values()])


def test_one_batch_is_learnt_to_two_centimetres():
    batch = scene_batch()
    net = D3Net("tiny", seed=0)
    fit(net, build_loss("l2"), lambda start: iter(lambda: batch, None), steps=300, learning_rate=3e-3)
    fit(net, build_loss("l2"), lambda start: iter(lambda: batch, None), steps=300, learning_rate=3e-4)
    net.train()  # the batch's own statistics, as in training: this asks whether the loop can fit, not generalise
    with torch.no_grad():
        error = (net(batch["rgb"]) - batch["depth"])[batch["valid"]].double().numpy()
    assert np.sqrt(np.mean(error**2)) < 0.02


@pytest.mark.parametrize("adversarial", [False, True])
def test_two_runs_with_the_same_seed_end_in_the_same_bits(adversarial):
    ends = []
    for _ in range(2):
        net = D3Net("tiny", seed=3)
        adversary = PatchDiscriminator(ndf=8, seed=3) if adversarial else None
        fit(net, build_loss("l1"), stream, steps=5, adversary=adversary)
        ends.append(weights_of(net))
    assert torch.equal(*ends)


@pytest.mark.parametrize(("adversarial", "start"), [(False, 0), (True, 0), (True, 2), (True, 6)])
def test_a_run_cut_off_and_resumed_equals_one_never_cut(adversarial, start, tmp_path):
    def run(steps, checkpoint):
        net = D3Net("tiny", seed=1)
        adversary = PatchDiscriminator(ndf=8, seed=1) if adversarial else None
        options = {"adversary": adversary, "checkpoint": checkpoint, "identity": "x", "evaluations": 4}
        options["adversarial_from"] = start
        curve = fit(net, build_loss("l1"), stream, steps=steps, evaluate=lambda n: {"val_rms": 1.0}, **options).curve
        weights = weights_of(net)
        return torch.cat([weights, weights_of(adversary)]) if adversarial else weights, curve

    class CutError(Exception):
        pass

    def cut_stream(start):
        for step, batch in enumerate(stream(start), start):
            if step == 5:
                raise CutError
            yield batch

    whole, curve = run(8, None)
    path = tmp_path / "checkpoint.pt"
    net = D3Net("tiny", seed=1)
    adversary = PatchDiscriminator(ndf=8, seed=1) if adversarial else None
    with contextlib.suppress(CutError):
        fit(
            net,
            build_loss("l1"),
            cut_stream,
            steps=8,
            adversary=adversary,
            adversarial_from=start,
            checkpoint=path,
            identity="x",
            evaluations=4,
            evaluate=lambda n: {"val_rms": 1.0},
        )
    assert path.exists()
    resumed, curve_resumed = run(8, path)
    assert torch.equal(whole, resumed)
    assert curve == curve_resumed


def test_a_run_that_goes_on_in_the_other_memory_format_keeps_each_weights_own_moments(tmp_path):
    options = {"checkpoint": tmp_path / "c.pt", "identity": "x"}

    def weights(layout, steps):
        net = D3Net("tiny", seed=1).to(memory_format=layout)
        fit(net, build_loss("l1"), stream, steps=steps, evaluations=steps, **options)
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    before = weights(torch.channels_last, 3)
    saved = options["checkpoint"].read_bytes()
    same = weights(torch.channels_last, 4)
    options["checkpoint"].write_bytes(saved)
    other = weights(torch.contiguous_format, 4)
    # rounding moves a few steps, another weight's moments would move nearly all
    assert (same - other).abs().median() < 0.02 * (same - before).abs().median()


def test_the_adversarial_term_enters_after_so_many_steps_of_l1_alone():
    def weighted(*arguments):
        return 20 * build_loss("l1")(*arguments)

    def run(loss, steps, **options):
        net = D3Net("tiny", seed=1)
        curve = fit(net, loss, stream, steps=steps, evaluations=steps, **options).curve
        return weights_of(net), curve

    adversary, untouched = PatchDiscriminator(ndf=8, seed=1), PatchDiscriminator(ndf=8, seed=1)
    first, curve = run(build_loss("l1"), 3, adversary=adversary, adversarial_from=3)
    plain, curve_plain = run(weighted, 3)
    assert torch.equal(first, plain) and curve == curve_plain
    assert torch.equal(weights_of(adversary), weights_of(untouched))
    longer, curve = run(build_loss("l1"), 5, adversary=adversary, adversarial_from=3)
    assert curve[:3] == curve_plain and ["d_real" in point for point in curve[3:]] == [True, True]
    assert not torch.equal(weights_of(adversary), weights_of(untouched))
    assert not torch.equal(longer, run(weighted, 5)[0])


class Line(torch.nn.Module):
    """Depth = a + b times the first colour: small enough to be trained by hand."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        self.modes = []

    def forward(self, rgb):
        self.modes.append(self.training)
        return self.w[0] + self.w[1] * rgb[:, :1]


@pytest.mark.parametrize("clip", [0.0, 4.0])
def test_the_steps_are_adams_with_the_rate_the_decays_and_the_clipping_asked_for(clip):
    rng = np.random.default_rng(0)
    x, y = rng.uniform(size=(2, 4, 2, 3, 2, 2))
    y = y[:, :, :1] * np.array([1, 9, 3, 0.5])[:, None, None, None, None]  # gradients of all sizes
    w, mean, square, norms = np.array([1.0, 2.0]), 0, 0, []
    for t in range(1, 5):  # Kingma and Ba (2015), algorithm 1
        off, colour = w[0] + w[1] * x[t - 1][:, :1] - y[t - 1], x[t - 1][:, :1]
        gradient = np.array([np.mean(2 * off), np.mean(2 * off * colour)])
        norms.append(np.linalg.norm(gradient))
        gradient *= min(1, clip / norms[-1]) if clip else 1
        mean, square = 0.3 * mean + 0.7 * gradient, 0.9 * square + 0.1 * gradient**2
        w = w - 0.05 * mean / (1 - 0.3**t) / (np.sqrt(square / (1 - 0.9**t)) + 1e-8)
    assert min(norms) < 4 < max(norms)
    batches = [
        {"rgb": torch.tensor(a).float(), "depth": torch.tensor(b).float(), "valid": torch.ones(b.shape).bool()}
        for a, b in zip(x, y, strict=True)
    ]
    net = Line()
    options = {"learning_rate": 0.05, "betas": (0.3, 0.9), "clip_norm": clip}
    fit(net, build_loss("l2"), lambda start: iter(batches), steps=4, **options)
    np.testing.assert_allclose(net.w.detach().numpy(), w, rtol=1e-5)


def test_the_weights_kept_are_those_of_the_first_best_point_and_training_goes_on_in_training_mode():
    errors, seen = iter([3.0, 1.0, 1.0, 2.0]), []

    def evaluate(net):
        seen.append(net.w.detach().clone())
        net.eval()
        return {"val_rms": next(errors)}

    net = Line()
    trace = fit(net, build_loss("l1"), stream, steps=4, evaluations=4, evaluate=evaluate)
    assert trace.best_step == 2 and torch.equal(trace.best_weights["w"], seen[1])
    assert not torch.equal(seen[1], net.w) and net.modes == [True] * 4


def test_the_first_step_that_was_not_finite_is_named():
    calls = []

    def loss(pred, depth, valid):
        calls.append(1)
        return pred.mean() * (float("nan") if len(calls) > 1 else 1)

    with pytest.raises(DivergedError) as caught:
        fit(Line(), loss, stream, steps=4, evaluations=1)
    assert caught.value.step == 2


@pytest.mark.parametrize(("seconds", "step"), [(0.0, 3), (60.0, None)])
def test_a_checkpoint_is_saved_once_its_time_has_come_and_not_before(seconds, step, tmp_path):
    def cut(start):
        yield from (scene_batch(seed=k) for k in range(3))
        raise InterruptedError

    path = tmp_path / "checkpoint.pt"
    with pytest.raises(InterruptedError):
        fit(Line(), build_loss("l1"), cut, steps=9, evaluations=1, checkpoint=path, checkpoint_seconds=seconds)
    assert (torch.load(path, weights_only=True)["step"] if path.exists() else None) == step


def test_a_run_that_is_told_to_stop_at_its_last_step_is_done(tmp_path):
    assert len(fit(Line(), build_loss("l1"), stream, steps=2, evaluations=1, stop=lambda: False).curve) == 1
    assert len(fit(Line(), build_loss("l1"), stream, steps=1, stop=lambda: True).curve) == 1
    with pytest.raises(StoppedError, match="step 1 of 2"):
        fit(Line(), build_loss("l1"), stream, steps=2, stop=lambda: True)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    fit(D3Net("tiny", seed=0), build_loss("l1"), stream, steps=1, checkpoint=path, identity="a")
    with pytest.raises(UserError, match="another run"):
        fit(D3Net("tiny", seed=0), build_loss("l1"), stream, steps=2, checkpoint=path, identity="b")


@pytest.mark.parametrize("name", ["version", "identity", "step", "trace"])
@pytest.mark.parametrize("value", [torch.ones(3), None, "x", [1]], ids=["tensor", "none", "text", "list"])
def test_a_checkpoint_whose_fields_are_of_other_kinds_is_refused_in_one_line(tmp_path, name, value):
    path = tmp_path / "checkpoint.pt"
    fit(D3Net("tiny", seed=0), build_loss("l1"), stream, steps=1, checkpoint=path, identity="a")
    torch.save(torch.load(path, weights_only=True) | {name: value}, path)
    with pytest.raises(UserError, match="delete it to start"):
        fit(D3Net("tiny", seed=0), build_loss("l1"), stream, steps=2, checkpoint=path, identity="a")


def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="delete it") as caught:
        fit(D3Net("tiny", seed=0), build_loss("l1"), stream, steps=1, checkpoint=path, identity="a")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_with_code_inside_is_never_executed(tmp_path):
    path, marker = tmp_path / "checkpoint.pt", tmp_path / "executed"

    class Hostile:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    torch.save({"version": 1, "identity": "a", "step": Hostile()}, path)
    with pytest.raises(UserError):
        fit(D3Net("tiny", seed=0), build_loss("l1"), stream, steps=1, checkpoint=path, identity="a")
    assert not marker.exists()


def test_the_best_validation_error_chooses_the_weights_not_the_last():
    errors = iter([3.0, 1.0, 2.0])
    trace = fit(
        D3Net("tiny", seed=0),
        build_loss("l1"),
        stream,
        steps=3,
        evaluations=3,
        evaluate=lambda net: {"val_rms": next(errors)},
    )
    assert (trace.best_step, trace.best_error) == (2, 1.0)
    assert [point["step"] for point in trace.curve] == [1, 2, 3]


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(DivergedError, match="diverged"):
        fit(D3Net("tiny", seed=0), lambda p, y, m: p.mean() * float("nan"), stream, steps=1, evaluations=1)


def test_the_discriminator_learns_to_tell_true_from_predicted_depth():
    batch = scene_batch(4)
    adam = {"lr": 2e-3, "betas": (0.5, 0.999)}
    opponent = Adversary(PatchDiscriminator(ndf=8, seed=0), "paper", 10.0, adam)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    fake = torch.full_like(batch["depth"], 4.0)
    for _ in range(40):
        logs = opponent.learn(fake, batch, contextlib.nullcontext, scaler)
    assert logs["d_real"] > logs["d_fake"] + 0.5


def test_what_the_depth_network_pays_reaches_it_and_not_the_discriminator():
    batch = scene_batch()
    opponent = Adversary(PatchDiscriminator(ndf=8, seed=0), "paper", 10.0, {"lr": 1e-3})
    pred = torch.full_like(batch["depth"], 4.0, requires_grad=True)
    opponent.penalty(pred, batch).backward()
    assert pred.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in opponent.net.parameters())


@pytest.mark.parametrize(("variant", "factor"), [("paper", 0.5), ("released", 1.0)])
def test_what_is_paid_is_the_variants_least_squares_of_depth_scaled_to_the_networks_range(variant, factor):
    batch = scene_batch()
    opponent = Adversary(PatchDiscriminator(ndf=8, seed=0), variant, 4.0, {"lr": 1e-3})
    pred = torch.full_like(batch["depth"], 3.0, requires_grad=True)
    seen = torch.cat([pred / 2 - 1, 2 * batch["rgb"] - 1], 1) * batch["valid"]
    expected = factor * ((opponent.net(seen) - 1) ** 2).mean()
    assert opponent.penalty(pred, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    opponent.learn(pred, batch, contextlib.nullcontext, torch.amp.GradScaler("cpu", enabled=False))
    assert pred.grad is None  # D learns, and leaves the depth network alone


def test_precision_auto_is_float32_on_a_cpu_and_fp16_is_refused_there():
    assert pick_precision("auto", "cpu") == "float32"
    with pytest.raises(UserError, match="fp16"):
        pick_precision("fp16", "cpu")


def test_bf16_training_stays_near_float32():
    ends = {}
    for precision in ("float32", "bf16"):
        net = D3Net("tiny", seed=0)
        curve = fit(net, build_loss("l1"), stream, steps=4, evaluations=4, precision=precision).curve
        ends[precision] = [point["loss"] for point in curve]
    np.testing.assert_allclose(ends["bf16"], ends["float32"], rtol=0.05)


@pytest.mark.parametrize(("precision", "adversarial"), [("float32", True), ("bf16", False)])
def test_compiled_training_is_the_same_training_also_when_cut_off_and_resumed(precision, adversarial, tmp_path):
    # "aot_eager" takes the network apart into one graph as every backend does, then runs PyTorch's own kernels on it
    ends = {}
    for compiler in (None, "aot_eager"):
        net = D3Net("tiny", seed=0)
        adversary = PatchDiscriminator(ndf=8, seed=0) if adversarial else None
        options = {"steps": 5, "evaluations": 5, "adversary": adversary, "precision": precision, "compiler": compiler}
        if compiler:
            cut = {"checkpoint": tmp_path / "checkpoint.pt", "stop": lambda: True}
            with pytest.raises(StoppedError):
                fit(net, build_loss("eigen"), stream, **options, **cut)
            options |= {"checkpoint": cut["checkpoint"]}
            net = D3Net("tiny", seed=1)  # the checkpoint's weights must replace these
        curve = fit(net, build_loss("eigen"), stream, **options).curve
        ends[compiler] = [point["loss"] for point in curve], weights_of(net)
    np.testing.assert_allclose(ends["aot_eager"][0], ends[None][0], rtol=1e-6 if precision == "float32" else 0.02)
    if precision == "float32":
        torch.testing.assert_close(ends["aot_eager"][1], ends[None][1], rtol=1e-6, atol=1e-7)


def test_the_compiler_comes_from_the_environment_and_an_unknown_one_is_refused(monkeypatch):
    monkeypatch.delenv("D3LIB_COMPILE", raising=False)
    assert (pick_compiler("cpu"), pick_compiler("cuda:0")) == (None, "graphs")
    for name, found in {"inductor": "inductor", "none": None}.items():
        monkeypatch.setenv("D3LIB_COMPILE", name)
        assert pick_compiler("cpu") == pick_compiler("cuda") == found
    for name, what in {"gcc": "D3LIB_COMPILE is 'gcc'", "graphs": "graphs needs a CUDA device"}.items():
        monkeypatch.setenv("D3LIB_COMPILE", name)
        with pytest.raises(UserError, match=what):
            pick_compiler("cpu")


def test_several_processes_record_no_graphs(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    assert pick_compiler("cuda") is None
    monkeypatch.setenv("D3LIB_COMPILE", "graphs")
    with pytest.raises(UserError, match="a single process"):
        pick_compiler("cuda")


@pytest.mark.parametrize(
    ("capability", "device", "precision", "size", "contiguous"),
    [
        ("AVX2", "cpu", "float32", (256, 320), True),
        ("AVX2", "cpu", "float32", (96, 128), False),
        ("AVX2", "cpu", "bf16", (256, 320), False),
        ("AVX2", "cuda", "float32", (256, 320), False),
        ("AVX512", "cpu", "float32", (256, 320), False),
        ("DEFAULT", "cpu", "float32", (256, 320), False),
    ],
)
def test_tensors_lie_channels_last_but_where_that_is_slow(monkeypatch, capability, device, precision, size, contiguous):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert (pick_layout(device, precision, size) == torch.contiguous_format) is contiguous


def test_both_layouts_are_near_to_the_loss_and_gradient_of_float64():
    batch = scene_batch()

    def backwards(net):
        rgb, depth = (batch[name].to(net.decoder.last.weight.dtype) for name in ("rgb", "depth"))
        loss = build_loss("l1")(net(rgb), depth, batch["valid"])
        gradient = torch.autograd.grad(loss, list(net.parameters()))
        return float(loss.detach()), np.concatenate([g.double().numpy().ravel() for g in gradient])

    loss, gradient = backwards(D3Net("tiny", seed=0).double())
    errors = []
    for layout in (torch.contiguous_format, torch.channels_last):
        net = D3Net("tiny", seed=0).to(memory_format=layout)
        assert net.decoder.blocks[0][3].weight.is_contiguous(memory_format=layout)
        found, slope = backwards(net)
        assert found == pytest.approx(loss, rel=1e-5)
        errors.append(np.linalg.norm(slope - gradient) / np.linalg.norm(gradient))
    # Channels last, PyTorch sums a batch normalisation's channels in plain float32, and ReLUs near 0 open or close.
    assert errors[0] < 0.02 and errors[1] < 0.05


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told so")
@pytest.mark.parametrize(
    "work", ["fit(D3Net('tiny', seed=0), l1_loss, batches, steps=1)", "as_predictor(D3Net('tiny'))"]
)
def test_a_process_that_trains_or_predicts_is_given_memory_once_and_not_each_time_it_frees_some(work):
    code = f"""
import resource, torch
from d3lib.evaluation import as_predictor
from d3lib.losses import l1_loss
from d3lib.models import D3Net
from d3lib.training import fit
batch = {{"rgb": torch.rand(2, 3, 64, 64), "depth": torch.ones(2, 1, 64, 64), "valid": torch.ones(2, 1, 64, 64) > 0}}
batches = lambda start: iter([batch] * 2)
{work}
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.zeros(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", code], env=plain | more, capture_output=True, check=True).stdout)
        for more in ({}, {"D3LIB_KEEP_MEMORY": "0"})
    )
    assert kept < given_back / 4

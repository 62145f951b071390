"""On a GPU: the same losses, metrics and networks as on a CPU, training in each precision, resumed and compiled."""

import dataclasses
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from d3lib.data.prepare import RoomsStore
from d3lib.details import Details
from d3lib.errors import StoppedError, UserError
from d3lib.evaluation import load_network
from d3lib.execution import execute
from d3lib.experiments import make_run
from d3lib.losses import VARIANTS, build_loss
from d3lib.metrics import KEYS, DepthMetrics
from d3lib.models import D3Net, PatchDiscriminator
from d3lib.records import State
from d3lib.training import fit, pick_precision

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def depths(seed=0, shape=(3, 1, 40, 56)):
    """Prediction, truth (some of it NaN or 0 where it is not valid) and mask, float64 on the CPU."""
    rng = np.random.default_rng(seed)
    target = rng.uniform(0.5, 9.5, shape)
    pred, mask = target * rng.uniform(0.7, 1.4, shape), rng.random(shape) < 0.8
    target[~mask] = rng.choice([0.0, np.nan], (~mask).sum())
    mask[1] = False  # a picture without any valid pixel
    return torch.from_numpy(pred), torch.from_numpy(target), torch.from_numpy(mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("variant", "name"), [(v, n) for v, losses in VARIANTS.items() for n in losses])
def test_a_loss_and_its_gradient_are_those_of_float64_on_the_cpu(variant, name, dtype):
    pred, target, mask = depths()
    pred = pred.to(dtype)  # what bf16 makes of a depth is the same number on both sides
    values, gradients = [], []
    for place, kind in ((DEVICE, dtype), ("cpu", torch.float64)):
        x = pred.to(place, kind, copy=True).requires_grad_()
        y = target.to(place, torch.float32 if place == DEVICE else kind)
        loss = build_loss(name, variant)(x, y, mask.to(place))
        loss.backward()
        values.append(loss.item())
        gradients.append(x.grad.double().cpu())
    assert values[0] == pytest.approx(values[1], rel=2e-5)
    kind = torch.finfo(dtype)
    atol = max(1e-4 * float(gradients[1].abs().max()), kind.tiny * kind.eps)  # the smallest step of float16 is 6e-8
    torch.testing.assert_close(*gradients, rtol=max(1e-4, 2 * kind.eps), atol=atol)


def test_metrics_and_details_are_those_of_the_cpu():
    pred, target, mask = depths()
    pred, target = pred.float(), torch.where(mask, target, 0).float()
    found = []
    for place in (DEVICE, "cpu"):
        metrics, details = DepthMetrics(), Details()
        metrics.update(*(x.to(place) for x in (pred, target, mask)))
        details.update(*(x.to(place) for x in (pred, target, mask)))
        found.append((metrics.compute(), details.compute()))
    for kind in ("pooled", "per_image"):
        assert [found[0][0][kind][key] for key in KEYS] == pytest.approx(
            [found[1][0][kind][key] for key in KEYS], rel=1e-9
        )
    flat = [list(numbers(details)) for _, details in found]
    assert len(flat[0]) > 5 and flat[0] == pytest.approx(flat[1], rel=1e-3, nan_ok=True)


def numbers(value):
    """All numbers of nested dictionaries and lists, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from numbers(part)
    elif value is not None and not isinstance(value, str):
        yield float(value)


@pytest.mark.parametrize("encoder", ["densenet121", "resnet50", "tiny"])
def test_a_network_sees_the_same_depth_in_each_precision_and_memory_format(encoder):
    rgb = torch.rand((2, 3, 70, 100), generator=torch.Generator().manual_seed(0))
    net = D3Net(encoder, seed=0).eval()
    with torch.no_grad():
        expected = net(rgb)
        net.to(DEVICE)
        for form, precision, tolerance in (
            (torch.contiguous_format, None, 0.01),  # products of float32 are TF32 there
            (torch.channels_last, None, 0.01),
            (torch.channels_last, torch.bfloat16, 0.1),
            (torch.channels_last, torch.float16, 0.02),
        ):
            net.to(memory_format=form)
            with torch.autocast(DEVICE, precision or torch.float16, enabled=precision is not None):
                depth = net(rgb.to(DEVICE).contiguous(memory_format=form))
            assert depth.dtype == torch.float32
            torch.testing.assert_close(depth.cpu(), expected, rtol=0, atol=tolerance)


def scenes(start=0):
    """Endless small batches on the GPU, a function of the step; depth is told by the colours."""
    for step in range(start, 10_000):
        rgb = torch.rand((4, 3, 64, 96), generator=torch.Generator().manual_seed(step))
        depth = 1 + 3 * rgb[:, :1] + 2 * rgb[:, 1:2]
        valid = rgb[:, 2:] > 0.1
        yield {"rgb": rgb.to(DEVICE), "depth": depth.to(DEVICE), "valid": valid.to(DEVICE)}


def train(seed=0, adversarial=False, encoder="tiny", **options):
    net = D3Net(encoder, seed=seed).to(DEVICE, memory_format=torch.channels_last)
    adversary = PatchDiscriminator(ndf=8, seed=seed).to(DEVICE) if adversarial else None
    options = {"steps": 6, "evaluations": 3, "device": DEVICE} | options
    trace = fit(net, build_loss("l1"), scenes, adversary=adversary, **options)
    return [point["loss"] for point in trace.curve], {name: x.clone() for name, x in net.state_dict().items()}


@pytest.fixture
def deterministic(monkeypatch):
    """Kernels that add in the same order each time."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize(("adversarial", "compiler"), [(False, None), (True, None), (True, "graphs")])
def test_training_cut_off_and_resumed_is_training_never_cut(precision, adversarial, compiler, deterministic, tmp_path):
    options = {"adversarial": adversarial, "precision": precision, "compiler": compiler}
    expected = train(**options)
    cut = {"checkpoint": tmp_path / "checkpoint.pt", "identity": "x"}
    answers = iter([False, True])
    with pytest.raises(StoppedError):
        train(**options, **cut, stop=lambda: next(answers))
    found = train(seed=1, **options, **cut)  # the checkpoint's weights must replace these
    assert found[0][1:] == expected[0][1:]
    assert all(torch.equal(found[1][name], x) for name, x in expected[1].items())


@pytest.mark.parametrize(("precision", "steps"), [("bf16", 6), ("fp16", 60)])
def test_half_the_bits_train_nearly_as_float32(precision, steps):
    # float16 leaves out its first steps, until it has found a scale at which no gradient overflows
    narrow, wide = (train(precision=name, encoder="densenet121", steps=steps)[0][-1] for name in (precision, "float32"))
    assert narrow == pytest.approx(wide, rel=0.05 if precision == "bf16" else 0.25)


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("adversarial", [False, True])
def test_training_from_recorded_graphs_is_the_same_training_to_the_last_bit(adversarial, precision, deterministic):
    options = {"adversarial": adversarial, "precision": precision, "clip_norm": 0.5}
    options |= {"adversarial_from": 3} if adversarial else {}
    plain, graphs = (train(**options, compiler=compiler) for compiler in (None, "graphs"))
    assert graphs[0] == plain[0]
    assert all(torch.equal(graphs[1][name], x) for name, x in plain[1].items())


def test_what_was_recorded_refuses_a_batch_of_another_size():
    def shrinking(start):
        return ({name: x[: 4 - step] for name, x in batch.items()} for step, batch in enumerate(scenes(start)))

    net = D3Net("tiny", seed=0).to(DEVICE, memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="give batches of one size"):
        fit(net, build_loss("l1"), shrinking, steps=2, device=DEVICE, compiler="graphs")


@pytest.mark.parametrize("loss", ["eigen", "eigengrad", "berhu", "huber"])
def test_every_loss_can_be_recorded(loss, deterministic):
    curves = []
    for compiler in (None, "graphs"):
        net = D3Net("tiny", seed=0).to(DEVICE, memory_format=torch.channels_last)
        options = {"steps": 4, "evaluations": 4, "device": DEVICE, "compiler": compiler, "clip_norm": 1.0}
        curves.append([point["loss"] for point in fit(net, build_loss(loss), scenes, **options).curve])
    assert curves[1] == pytest.approx(curves[0], rel=1e-2)


@pytest.mark.parametrize("loss", ["l1", "eigengrad", "gan"])
def test_a_run_on_a_gpu_says_so_and_its_weights_predict_on_a_cpu(loss, tmp_path):
    run = make_run("drill", loss=loss, train_set="12k", steps=4, evaluations=2)
    record = execute(run, tmp_path / "drill", tmp_path / "data", device="auto")
    made = record["provenance"]
    assert made["device_kind"] == "cuda" and made["device"] == torch.cuda.get_device_name()
    assert made["compiler"] == "graphs"
    assert made["precision"] == pick_precision("auto", DEVICE) and 10**7 < made["peak_memory_bytes"] < 10**10
    assert all(np.isfinite(list(numbers(scores))).all() for scores in record["metrics"]["chosen"].values())
    net, _ = load_network(tmp_path / "drill" / run.key / "weights.safetensors")
    with torch.no_grad():
        assert bool(torch.isfinite(net(torch.rand(1, 3, 64, 64))).all())
    assert execute(run, tmp_path / "drill", tmp_path / "data", device="auto")["provenance"] == made  # not done again


def test_a_run_told_to_stop_goes_on_where_it_was(tmp_path):
    run = make_run("drill", steps=400, evaluations=2)
    command = [sys.executable, "-m", "d3lib", "train", "--budget", "drill", "--steps", "400", "--evaluations", "2"]
    with subprocess.Popen([*command, "--out", str(tmp_path)], stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("step "):
                break
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
    folder = tmp_path / "drill" / run.key
    assert State(folder).read()[0] == "interrupted" and list(folder.glob("checkpoint*.pt"))
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=300, check=True)
    first = next(line for line in done.stderr.splitlines() if line.startswith("step "))
    assert int(first.split()[1].split("/")[0]) > 50 and State(folder).read()[0] == "done"


def test_rooms_are_rendered_by_the_gpu_and_near_those_of_the_cpu(tmp_path):
    stores = [RoomsStore(tmp_path / name, "train", 3, 2, 64, 96).open(device=name) for name in (DEVICE, "cpu")]
    assert stores[0].digest != stores[1].digest, "not rendered by the GPU?"
    ours, plain = (store.__getitems__(range(6)) for store in stores)
    assert ((ours["rgb"].int() - plain["rgb"].int()).abs() > 1).float().mean() <= 1e-3
    assert ((ours["exact"] - plain["exact"]).abs() > 1.5e-3).float().mean() <= 1e-3  # a store keeps whole millimetres


def test_a_batch_too_large_for_the_gpu_is_one_line_that_says_what_fits(tmp_path):
    torch.cuda.set_per_process_memory_fraction(2e9 / torch.cuda.get_device_properties(0).total_memory)
    try:
        run = make_run("drill", encoder="densenet121", batch_size=16, height=256, width=320, steps=1)
        with pytest.raises(UserError, match="out of memory at batch_size 16, 256x320; batch_size [1248] fits") as error:
            execute(run, tmp_path / "drill", tmp_path / "data", device=DEVICE)
        advised = int(str(error.value).split("batch_size ")[2].split()[0])
        small = dataclasses.replace(run, batch_size=max(1, advised // 2))  # training needs more than the pass tried
        execute(small, tmp_path / "drill", tmp_path / "data", device=DEVICE)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def test_more_processes_than_gpus_are_refused(tmp_path):
    count = torch.cuda.device_count() + 1
    run = make_run("drill", gpus=count, batch_size=4 * count, steps=2)
    with pytest.raises(UserError, match=f"{count} processes .* of which there are {count - 1}"):
        execute(run, tmp_path / "drill", tmp_path / "data", device=DEVICE)

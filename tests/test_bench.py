"""The benchmarks: their baselines give the same answers, a race of unequal answers is none, and rows are kept."""

import os

import numpy as np
import pytest
import torch

from d3lib import bench, naive
from d3lib.artefacts import read_json
from d3lib.cli import main
from d3lib.errors import UserError
from d3lib.losses import build_loss
from d3lib.metrics import DepthMetrics


@pytest.mark.parametrize("name", list(naive.LOSSES))
def test_a_naive_loss_has_the_value_and_the_gradient_of_ours(name):
    generator = torch.Generator().manual_seed(3)
    target = 0.5 + 9 * torch.rand((3, 1, 16, 20), generator=generator, dtype=torch.float64)
    mask = torch.rand(target.shape, generator=generator) < 0.8
    found = []
    for loss, valid in ((naive.LOSSES[name], mask.double()), (build_loss(name), mask)):
        pred = (target + torch.rand(target.shape, generator=generator.manual_seed(4)) - 0.4).requires_grad_()
        loss(pred, target, valid).backward()
        found.append((loss(pred, target, valid).detach(), pred.grad))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)


def test_the_naive_metrics_are_those_of_each_image_averaged():
    rng = np.random.default_rng(1)
    target = rng.uniform(0.5, 9, (3, 12, 17)).astype(np.float32)
    pred = (target * rng.uniform(0.6, 1.5, target.shape)).astype(np.float32)
    mask = rng.random(target.shape) < 0.7
    metrics = DepthMetrics()
    metrics.update(*(torch.from_numpy(x)[:, None] for x in (pred, target, mask)))
    assert metrics.compute()["per_image"] == pytest.approx(naive.metrics(pred, target, mask), rel=1e-9)


def test_pictures_on_disk_are_read_back_as_they_were(tmp_path):
    rng = np.random.default_rng(2)
    rgb = np.repeat(rng.integers(40, 216, (2, 3, 4, 5), dtype=np.uint8), 8, 2).repeat(8, 3)  # flat blocks: JPEG is near
    depth = rng.uniform(0, 9, (2, 32, 40)).round(3)
    naive.save_pictures(tmp_path, {"rgb": torch.from_numpy(rgb), "depth": torch.from_numpy(depth)[:, None]})
    seen = naive.Pictures(tmp_path, 2)[1]
    straight = min((seen["depth"][0], seen["depth"][0].flip(-1)), key=lambda x: (x - depth[1]).abs().max())
    np.testing.assert_allclose(straight, depth[1], atol=1e-6)
    assert seen["rgb"].shape == (3, 32, 40) and 0 <= seen["rgb"].min() <= seen["rgb"].max() <= 1


def test_two_different_answers_are_no_race():
    bench._agree("equal", [1.0, 2.0], [1.0, 2.0 + 1e-9], 1e-6)
    for other in ([1.0, 2.1], [1.0, float("nan")]):
        with pytest.raises(RuntimeError, match="differ"):
            bench._agree("unequal", other, [1.0, 2.0], 1e-3)


def test_a_ratio_says_how_many_times_as_long_the_baseline_takes(monkeypatch):
    clock = iter([0.0, 6.0, 0.0, 2.0, 0.0, 8.0, 0.0, 2.0])  # starts and ends: baseline, ours, and once more
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    row = bench._versus("work", lambda: None, lambda: None, repeats=2)
    assert (row["rate"], row["low"], row["high"], row["unit"]) == (3.5, 3.0, 4.0, "x")


def test_the_rows_are_printed_and_kept_with_their_machine(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert main(["bench", "eval", "--json", str(path), "--device", "cpu"]) == 0
    kept = read_json(path, format="d3lib-bench", version=2)
    (row,) = kept["rows"]
    assert row["bench"] == "eval" and row["low"] <= row["rate"] <= row["high"]
    assert row["name"] in capsys.readouterr().out
    assert kept["provenance"]["device_kind"] == "cpu" and isinstance(kept["provenance"]["native_bf16"], bool)


def test_a_row_that_cannot_be_measured_costs_no_other_row(tmp_path, monkeypatch, capsys):
    row = bench._row("good", "x", [1.0])

    def bad(device):
        yield row
        raise RuntimeError("the two answers differ")

    monkeypatch.setattr(bench, "BENCHES", {"bad": bad, "good": lambda device: iter([row])})
    bench.bench("all", tmp_path / "rows.json", "cpu")
    assert [kept["bench"] for kept in read_json(tmp_path / "rows.json", format="d3lib-bench", version=2)["rows"]] == [
        "bad",
        "good",
    ]
    assert "bad: the two answers differ" in capsys.readouterr().out


def test_compiled_training_is_raced_against_the_same_without_and_a_failing_compiler_is_one_line():
    size = ("tiny", (32, 48), "float32", 1)
    (row,) = bench._bench_compiled("cpu", *size, ["aot_eager"])
    assert row["name"].endswith("with aot_eager: without / with") and 0 < row["low"] <= row["high"]
    with pytest.raises(UserError, match="nowhere failed: .*nowhere"):
        list(bench._bench_compiled("cpu", *size, ["nowhere"]))


def test_kinds_of_kernels_add_up_to_the_trace():
    trace = [
        {"cat": "kernel", "name": "cudnn::bn_fw_tr_1C11", "dur": 2.0},
        {"cat": "kernel", "name": "sm90_xmma_fprop_implicit_gemm_bf16", "dur": 3.0},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD", "dur": 4.0},
        {"cat": "kernel", "name": "vectorized_elementwise_kernel", "dur": 5.0},
        {"cat": "cpu_op", "name": "aten::conv2d", "dur": 99.0},
    ]
    seconds = bench._kernel_seconds(trace)
    assert sum(seconds.values()) == pytest.approx(14e-6)
    assert seconds["batch normalisation"] == 2e-6 and seconds["convolutions"] == 3e-6


def test_processes_start_with_the_settings_asked_for_and_this_one_keeps_its_own(monkeypatch):
    monkeypatch.setenv("D3LIB_KEPT", "before")
    with bench._processes(1, abs, {"D3LIB_KEPT": "inside", "D3LIB_NEW": "1"}) as pool:
        assert list(pool.map(os.getenv, ["D3LIB_KEPT", "D3LIB_NEW"])) == ["inside", "1"]
        assert (os.environ["D3LIB_KEPT"], os.environ.get("D3LIB_NEW")) == ("before", None)


def test_start_up_reads_no_torch():
    import subprocess
    import sys

    code = "import sys, d3lib, d3lib.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"

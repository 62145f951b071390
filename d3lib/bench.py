"""How fast it is: ratios to the plain code in `d3lib.naive`, measured here and now.

Where a baseline and ours are compared, the two run by turns (training: half the baseline before, half after ours), and
their results must agree or there is no row. All is done in one process, but for a baseline that runs a whole network
on a CPU: this one keeps the memory that it frees (see `d3lib.training.keep_memory`), and a plain program does not.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d3lib import naive
from d3lib.artefacts import write_json
from d3lib.costs import random_batch, train_in_parts
from d3lib.errors import UserError
from d3lib.losses import build_loss, generator_loss, l1_loss
from d3lib.models import D3Net
from d3lib.provenance import collect
from d3lib.training import autocast, keep_memory, pick_compiler, pick_device, pick_layout, pick_precision

REPEATS = 5
Row = dict[str, Any]


def bench(what: str = "all", json_path: Path | None = None, device: str = "auto") -> list[Row]:
    """Measure and print; `what` is one of `BENCHES`, some with commas between, or "all". `json_path` keeps the rows.

    Returns rows of name, median, smallest and largest value, and unit ("x": times as fast as the named baseline).
    Raises `UserError` for another `what`, and where a benchmark asked for by name needs packages that are missing or a
    compiler that fails, and RuntimeError where its two answers differ (of several, the others go on).
    """
    names = list(BENCHES) if what == "all" else what.split(",")
    for name in names:
        if name not in BENCHES:
            raise UserError(f"there is no benchmark {name!r}; choose of {', '.join(BENCHES)}, all")
    device = pick_device(device)
    if device == "cpu":
        keep_memory()  # from the start, or the order of the benchmarks would matter
    machine = collect("d3lib.bench", device=device) | {"native_bf16": _native_bf16(device)}
    print(f"{machine['device']}, {'with' if machine['native_bf16'] else 'no'} native bfloat16, ", end="")
    print(f"{machine['threads']} threads, torch {machine['versions'].get('torch')}", flush=True)
    rows: list[Row] = []
    for name in names:
        try:
            for row in BENCHES[name](device):
                print(f"{row['name']:<58} {row['rate']:>9.4g} {row['unit']}", end="  ")
                print(f"({row['low']:.4g} to {row['high']:.4g})", flush=True)
                rows.append({"bench": name} | row)
        except (UserError, RuntimeError) as error:
            if len(names) == 1:
                raise
            print(f"{name}: {error}")
        finally:
            if json_path is not None and rows:  # each time: who is cut off keeps what was measured
                write_json(json_path, {"rows": rows, "provenance": machine}, format="d3lib-bench", version=2)
    return rows


def _row(name: str, unit: str, values: list[float]) -> Row:
    return {"name": name, "unit": unit, "rate": statistics.median(values), "low": min(values), "high": max(values)}


def _seconds(work: Callable[[], Any]) -> float:
    """How long `work` takes, the device's part of it included."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _rate(name: str, unit: str, count: float, work: Callable[[], Any]) -> Row:
    """`count` units of work a call: the median rate of several calls after one to warm up."""
    work()
    return _row(name, unit, [count / _seconds(work) for _ in range(REPEATS)])


def _versus(
    name: str, baseline: Callable[[], Any], ours: Callable[[], Any], repeats: int = REPEATS, what: str = "naive / ours"
) -> Row:
    """How many times as long the baseline takes, each pair of calls one after the other."""
    baseline(), ours()
    return _row(f"{name}: {what}", "x", [_seconds(baseline) / _seconds(ours) for _ in range(repeats)])


def _agree(name: str, ours: Any, baseline: Any, tolerance: float) -> None:
    """Raise RuntimeError where two results differ by more than `tolerance`, relative to the larger: no fair race."""
    ours, baseline = np.asarray(ours, np.float64), np.asarray(baseline, np.float64)
    apart = float((np.abs(ours - baseline) / np.maximum(np.abs(baseline), 1e-12)).max())
    if not apart <= tolerance:
        raise RuntimeError(f"{name}: the two answers differ by {apart:.2g} of them, so their times do not compare")


def _native_bf16(device: str) -> bool:
    """Whether the device computes in bfloat16 itself; a CPU that does not takes minutes for what takes seconds."""
    if device.startswith("cuda"):
        return pick_precision("auto", device) == "bf16"
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _tolerances(device: str) -> dict[str, float]:
    """How far apart two ways through one network may end, by the device's precisions; a GPU's float32 is TF32."""
    float32 = {"float32": 1e-2 if device.startswith("cuda") else 1e-3}
    return float32 | ({"bf16": 5e-2} if _native_bf16(device) else {})


def _render(count: int, size: tuple[int, int]) -> list[dict[str, torch.Tensor]]:
    from d3lib.data import rooms

    return list(rooms.stream(rooms.frames("train", scenes=count), size, batch_size=8))


@functools.cache
def _pictures(size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """32 rooms as one batch, their depth as a Kinect saw it."""
    batches = _render(32, size)
    return {key: torch.cat([batch[key] for batch in batches]) for key in ("rgb", "depth", "valid")}


def _bench_start(device: str) -> Iterator[Row]:
    """What every call pays before it works: Python, imports, reading the command line."""
    for code in (["-c", "pass"], ["-c", "import d3lib"], ["-m", "d3lib", "--help"], ["-c", "import torch"]):
        run = partial(subprocess.run, [sys.executable, *code], capture_output=True, check=True)
        run()
        yield _row(f"python {' '.join(code)}", "s", [_seconds(run) for _ in range(REPEATS)])


def _bench_rooms(device: str) -> Iterator[Row]:
    """Frames of rooms rendered per second, Kinect view included, at two sizes."""
    cores = torch.get_num_threads()
    for size, count in (((96, 128), max(64, 8 * cores)), ((240, 320), 8 * max(2, cores))):
        yield _rate(f"rooms, {size[0]}x{size[1]}", "frames/s", count, partial(_render, count, size))
    if device.startswith("cuda"):
        from d3lib.data import rooms

        for size in ((96, 128), (240, 320)):
            work = partial(rooms.render, rooms.frames("train", scenes=64), size, device)
            yield _rate(f"rooms, {size[0]}x{size[1]}, by the GPU", "frames/s", 64, work)


def _bench_loss(device: str) -> Iterator[Row]:
    """Each loss forwards and backwards at 8x256x320 with a mask, and as a part of a training step of D3-Net."""
    generator = torch.Generator().manual_seed(0)
    shape = (8, 1, 256, 320)
    target, noise = 1 + 8 * torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.9
    target, mask = target.to(device), mask.to(device)
    pred = (target * (0.8 + 0.4 * noise.to(device))).requires_grad_()
    logits = torch.rand((8, 1, 62, 78), generator=generator).to(device).requires_grad_()
    precision = pick_precision("auto", device)
    steps = 10 if device.startswith("cuda") else 1
    times = _train("densenet121", shape[2:], device, precision, steps, pick_compiler(device))[1]
    whole = statistics.median(times) / steps
    calls = 20  # in a row, as a step leaves caches and allocator; on a GPU one alone is shorter than the clock's cost

    def gan(pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return generator_loss(logits) + 20 * l1_loss(pred, target, mask)

    def naive_gan(pred: torch.Tensor, target: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        ones = torch.ones_like(logits)
        return torch.nn.functional.mse_loss(logits, ones) / 2 + 20 * naive.LOSSES["l1"](pred, target, m)

    def work(loss: Callable[..., torch.Tensor], mask: torch.Tensor) -> list[torch.Tensor]:
        value = loss(pred, target, mask)
        return [value.detach(), *torch.autograd.grad(value, [pred, logits], allow_unused=True)]

    for name in (*naive.LOSSES, "gan"):
        ours = partial(work, gan if name == "gan" else build_loss(name), mask)
        plain = partial(work, naive_gan if name == "gan" else naive.LOSSES[name], mask.float())
        _agree(name, ours()[0].cpu(), plain()[0].cpu(), 1e-4)
        ours, plain = (partial(_often, calls, _replayed(form, device)) for form in (ours, plain))
        what = "naive / ours, both from CUDA graphs" if device.startswith("cuda") else "naive / ours"
        yield _versus(f"loss {name}, 8x256x320", plain, ours, 15, what)
        shares = [100 * _seconds(ours) / calls / whole for _ in range(15)]
        yield _row(f"loss {name}: share of a step of D3-Net, {precision}", "%", shares)


def _often(times: int, work: Callable[..., Any], *arguments: Any) -> None:
    for _ in range(times):
        work(*arguments)


def _replayed(work: Callable[[], Any], device: str) -> Callable[[], Any]:
    """On a GPU the same as a CUDA graph, as training runs it; elsewhere `work` itself."""
    if not device.startswith("cuda"):
        return work
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        _often(3, work)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()

    def replay(kept: Any = kept) -> None:  # what the graph writes to must live as long as it
        graph.replay()

    return replay


def _bench_train(device: str) -> Iterator[Row]:
    """Training D3-Net from files: the tutorials' loop and loader against the library's, in each precision there is."""
    from d3lib.data.loader import train_batches
    from d3lib.data.shards import open_store, write_store

    on_gpu, size = device.startswith("cuda"), (256, 320)
    repeats = 4 if on_gpu else 6
    steps, workers = (30, min(os.cpu_count() or 1, 8)) if on_gpu else (1, 0)  # a step takes a CPU seconds
    pictures = _pictures(size)
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory())
        naive.save_pictures(Path(place), pictures)
        write_store(Path(place) / "store", [pictures], source={"kind": "rooms"})
        store = open_store(Path(place) / "store", in_memory=True)
        sample = pictures["rgb"][:8].to(device) / 255
        with torch.no_grad():
            expected = D3Net(seed=0).to(device).eval()(sample).float().cpu()
        naively = stack.enter_context(_plain(partial(_train_naively, place, workers, device), device))
        baseline = partial(naively, steps)
        for precision, tolerance in _tolerances(device).items():
            net = D3Net(seed=0).to(device, memory_format=pick_layout(device, precision, size))
            with torch.no_grad(), autocast(device, precision):
                _agree(f"D3-Net in {precision}", net.eval()(sample).float().cpu(), expected, tolerance)
            source = train_batches(store, frames=None, batch_size=8, seed=0, device=device)
            cached = itertools.cycle([next(source) for _ in range(2)])
            options = {"device": device, "precision": precision, "compiler": pick_compiler(device)}
            baseline()
            before = [baseline() for _ in range(repeats // 2)]
            from_store, from_memory = (
                train_in_parts(net, batches, repeats + 1, steps, **options)[1] for batches in (source, cached)
            )
            plain = before + [baseline() for _ in range(repeats // 2)]
            name = f"train D3-Net 8x{size[0]}x{size[1]}, {precision}"
            yield _row(f"{name}: naive / ours", "x", _ratios(plain, from_store))
            lost = [100 * (ratio - 1) for ratio in _ratios(from_store, from_memory)]
            yield _row(f"{name}: waiting for pictures", "%", lost)


def _train_naively(place: str, workers: int, device: str, steps: int) -> float:
    """Seconds of so many more steps of the tutorials' training on the pictures in `place`."""
    return _seconds(partial(naive.train, *_tutorial(place, workers, device), steps))


@functools.cache
def _tutorial(place: str, workers: int, device: str) -> tuple[D3Net, torch.optim.Optimizer, Iterator[Any]]:
    net = D3Net(seed=0).to(device)
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999))
    return net, optimiser, naive.batches(naive.Pictures(Path(place), 32), 8, workers, device)


def _ratios(ones: Sequence[float], others: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(ones, others, strict=True)]


def _train(
    encoder: str, size: Sequence[int], device: str, precision: str, steps: int, compiler: str | None = None
) -> tuple[list[float], list[float]]:
    """`train_in_parts` of a new network on one random batch of 8 pictures of `size` (H, W), in four parts."""
    batch = random_batch(8, size, device)
    net = D3Net(encoder, seed=0).to(device, memory_format=pick_layout(device, precision, size))
    options = {"device": device, "precision": precision, "compiler": compiler}
    return train_in_parts(net, itertools.repeat(batch), 4, steps, **options)


def _bench_compile(device: str) -> Iterator[Row]:
    """Training from CUDA graphs and with `torch.compile` against the same operation by operation.

    D3-Net on a GPU, a network soon translated on a CPU. One after the other, not by turns: each turn would begin with
    compiling.
    """
    if device.startswith("cuda"):
        yield from _bench_compiled(device, "densenet121", (256, 320), "bf16", 20, ("graphs", "inductor"))
    elif shutil.which(os.environ.get("CXX", "g++")):
        yield from _bench_compiled(device, "tiny", (96, 128), "float32", 10, ("inductor",))


def _bench_compiled(
    device: str, encoder: str, size: tuple[int, int], precision: str, steps: int, compilers: Sequence[str]
) -> Iterator[Row]:
    losses, plain = _train(encoder, size, device, precision, steps)
    name = f"train {'D3-Net' if encoder == 'densenet121' else encoder} 8x{size[0]}x{size[1]}, {precision}"
    for compiler in compilers:
        try:
            same, seconds = _train(encoder, size, device, precision, steps, compiler)
        except RuntimeError as error:  # torch's own kinds for a compiler that is missing or fails
            raise UserError(f"{compiler} failed: {str(error).splitlines()[0]}") from error
        # after the first quarter: later, rounding alone leads two trainings apart
        _agree(compiler, same[:1], losses[:1], 5e-2 if precision == "bf16" else 1e-3)
        what = "CUDA graphs" if compiler == "graphs" else f"torch.compile with {compiler}"
        yield _row(f"{name}, {what}: without / with", "x", _ratios(plain, seconds))


def _bench_gpu(device: str) -> Iterator[Row]:
    """What bounds a training step of D3-Net in bf16 on a GPU: its two peaks, the step's share of them, its kernels.

    The pictures are on the device already; the kernels' time is the profiler's. Nothing without a GPU.
    """
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode

    if not device.startswith("cuda"):
        return
    one, other = (torch.rand(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = _rate(
        "matrix product, 8192, bf16", "TFLOP/s", 20 * 2 * 8192**3 / 1e12, partial(_often, 20, torch.mm, one, other)
    )
    yield product
    long = torch.rand(1 << 29, device=device)
    copy = partial(_often, 10, torch.empty_like(long).copy_, long)
    yield _rate("memory, copying 2 GiB", "GB/s", 10 * 2 * long.nbytes / 1e9, copy)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        D3Net()(torch.empty(8, 3, 256, 320))
    name, shape = "train D3-Net 8x256x320, bf16", ("densenet121", (256, 320), device, "bf16")
    work = 3 * counter.get_total_flops() / 1e12  # backwards each convolution is done twice more
    for compiler, what in ((None, "operation by operation"), ("graphs", "from CUDA graphs")):
        times = [part / 10 for part in _train(*shape, 10, compiler)[1]]
        yield _row(f"{name}: a step {what}", "ms", [1000 * time for time in times])
        yield _row(
            f"{name}: share of the product's rate, {what}", "%", [100 * work / t / product["rate"] for t in times]
        )
    with tempfile.TemporaryDirectory() as place:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            _train(*shape, 2)
            torch.cuda.synchronize()
        seen.export_chrome_trace(f"{place}/trace.json")
        events = json.loads(Path(place, "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    kinds = _kernel_seconds(events)
    for kind, spent in kinds.items():
        yield _row(f"{name}: GPU at {kind}", "ms", [1000 * spent / 8])


_KERNELS = {  # kind of work: what names of its kernels contain
    "batch normalisation": ("bn_", "batch_norm", "batchnorm"),
    "the optimiser": ("multi_tensor", "adam"),
    "pooling and layout": ("pool", "upsample", "nchwtonhwc", "nhwctonchw"),
    "convolutions": ("conv", "gemm", "xmma", "cutlass", "dgrad", "wgrad", "fprop", "cudnn"),
    "copies and casts": ("memcpy", "memset", "copy", "catarray"),
}


def _kernel_seconds(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of a profiler's trace by kind of work; what has no other kind is "other operations"."""
    seconds = dict.fromkeys([*_KERNELS, "other operations"], 0.0)
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            name = event["name"].lower()
            kind = next((k for k, parts in _KERNELS.items() if any(part in name for part in parts)), "other operations")
            seconds[kind] += event["dur"] / 1e6
    return seconds


def _bench_together(device: str) -> Iterator[Row]:
    """Small runs at once, sharing the cores or the GPU, against the same runs one at a time with all of them."""
    cores, on_gpu = os.cpu_count() or 1, device.startswith("cuda")
    count, steps = (4, 50) if on_gpu else (min(cores, 8), 5)
    if count == 1:
        return
    work = partial(_small_run, device, steps)
    with _processes(count, work, {"D3LIB_KEEP_MEMORY": "1"}) as pool:
        one_at_a_time = lambda: [list(pool.map(work, [cores])) for _ in range(count)]  # noqa: E731 - beside the other
        at_once = lambda: list(pool.map(work, [max(1, cores // count)] * count))  # noqa: E731
        where = "one GPU" if on_gpu else f"{cores} cores"
        yield _versus(f"{count} runs of tiny on {where}", one_at_a_time, at_once, 3, "one at a time / at once")
        if on_gpu:
            return
        with _processes(count, work, {"D3LIB_KEEP_MEMORY": "0"}) as giving:
            given = lambda: list(giving.map(work, [max(1, cores // count)] * count))  # noqa: E731
            yield _versus(f"{count} runs of tiny at once", given, at_once, what="freed memory given back / kept")


@contextlib.contextmanager
def _processes(
    count: int, work: Callable[[int], Any], settings: Mapping[str, str]
) -> Iterator[concurrent.futures.Executor]:
    """Processes that have started and done `work` once, each with these settings in its environment."""
    before = {name: os.environ.get(name) for name in settings}
    with concurrent.futures.ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        os.environ |= settings
        try:
            list(pool.map(work, [1] * count))
        finally:
            for name in settings:
                del os.environ[name]
            os.environ |= {name: value for name, value in before.items() if value is not None}
        yield pool


@contextlib.contextmanager
def _plain(work: Callable[[int], float], device: str) -> Iterator[Callable[[int], float]]:
    """`work` in a process of its own, with memory as a plain program has it; on a GPU, where torch keeps it, here."""
    if device.startswith("cuda"):
        yield work
        return
    with _processes(1, work, {}) as pool:
        yield lambda times: pool.submit(work, times).result()


def _small_run(device: str, steps: int, threads: int) -> None:
    """Four times so many steps of a `laptop` run's size, with so many threads."""
    torch.set_num_threads(threads)
    _train("tiny", (96, 128), device, pick_precision("auto", device), steps, pick_compiler(device))


def _bench_infer(device: str) -> Iterator[Row]:
    """Depth of one picture after another at 256x320, as `d3lib predict` and scoring do it."""
    from d3lib.evaluation import as_predictor

    predict, sample = _plain_predictor(device)
    expected = predict().cpu()
    with _plain(partial(_predict_naively, device), device) as naively:
        for precision, tolerance in _tolerances(device).items():
            net = D3Net(seed=0).to(device, memory_format=torch.channels_last)
            ours = partial(as_predictor(net, device, precision), sample)
            _agree(f"inference in {precision}", ours().cpu(), expected, tolerance)
            naively(1), ours()
            pairs = [(naively(1), _seconds(ours)) for _ in range(REPEATS)]
            yield _row(f"infer D3-Net 8x256x320, {precision}: naive / ours", "x", _ratios(*zip(*pairs, strict=True)))


def _predict_naively(device: str, times: int) -> float:
    """Seconds of so many predictions as the tutorials do it."""
    return _seconds(partial(_often, times, _plain_predictor(device)[0]))


@functools.cache
def _plain_predictor(device: str) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    """What predicts depth of 8 pictures (8, 3, 256, 320), and they."""
    sample = torch.rand((8, 3, 256, 320), generator=torch.Generator().manual_seed(0)).to(device)
    net = D3Net(seed=0).to(device).eval()
    return torch.no_grad()(partial(net, sample)), sample


def _bench_eval(device: str) -> Iterator[Row]:
    """All nine metrics of full-size predictions in one pass, against the loop over images in NumPy."""
    from d3lib.metrics import KEYS, DepthMetrics

    rng = np.random.default_rng(0)
    count, size = 64, (427, 561)
    target = rng.uniform(0.5, 9.5, (count, 1, *size)).astype(np.float32)
    pred = (target * rng.uniform(0.7, 1.4, target.shape)).astype(np.float32)
    mask = rng.random(target.shape) < 0.9
    tensors = [torch.from_numpy(x).to(device).split(8) for x in (pred, target, mask)]

    def ours() -> dict[str, float]:
        metrics = DepthMetrics()
        for batch in zip(*tensors, strict=True):
            metrics.update(*batch)
        return metrics.compute()["per_image"]

    baseline = partial(naive.metrics, pred[:, 0], target[:, 0], mask[:, 0])
    found, expected = ours(), baseline()
    _agree("metrics", [found[key] for key in KEYS], [expected[key] for key in KEYS], 1e-6)
    yield _versus(f"metrics of {count} images of 427x561", baseline, ours)


def _bench_data(device: str) -> Iterator[Row]:
    """Pictures a second from the training cache and from files; filling against SciPy's `spsolve`; raw Kinect dumps.

    Filling on a room's Kinect view, and on the real reference frame where `D3LIB_TEST_DATA` names its folder.
    """
    from d3lib.data import rooms
    from d3lib.data.inpaint import fill_depth
    from d3lib.data.loader import train_batches
    from d3lib.data.shards import open_store, write_store

    size, steps = (256, 320), 32
    pictures = _pictures(size)

    def draw(source: Iterator[Any]) -> None:
        for _ in range(steps):
            next(source)

    with tempfile.TemporaryDirectory() as place:
        naive.save_pictures(Path(place), pictures)
        # 512 frames, 0.2 GB: more than the processor's caches hold
        write_store(Path(place) / "store", [pictures] * 16, source={"kind": "rooms"})
        stores = {
            "memory": open_store(Path(place) / "store", in_memory=True),
            "disk": open_store(Path(place) / "store"),
        }
        files = naive.batches(naive.Pictures(Path(place), 32), 8, 0, device)
        for name, store in stores.items():
            source = train_batches(store, frames=None, batch_size=8, seed=0, device=device)
            yield _rate(f"loader from {name}, 8x256x320", "images/s", 8 * steps, partial(draw, source))
        source = train_batches(stores["memory"], frames=None, batch_size=8, seed=0, device=device)
        yield _versus("loader from memory / from files, 8x256x320", partial(draw, files), partial(draw, source), 3)
    long = torch.rand(1 << 25)
    other = torch.empty_like(long)
    yield _rate("memory, copying 128 MiB", "GB/s", 2 * long.nbytes / 1e9, partial(other.copy_, long))
    room = rooms.render([(3011, 0)], (427, 561))  # as large a part of it is missing as of the real frame, 7 %
    frames = {"room": (room["rgb"][0].numpy(), room["depth"][0, 0].numpy())}
    real = Path(os.environ.get("D3LIB_TEST_DATA", "")) / "nyu_raw_frame" / "toolbox_reference.npz"
    if real.is_file():
        with np.load(real) as content:
            rgb, depth = (content[f"projected_{name}"][44:471, 40:601] for name in ("rgb", "depth"))
        frames["real"] = rgb.transpose(2, 0, 1), depth
    for name, frame in frames.items():
        ours = partial(fill_depth, *frame)
        filled = ours()  # first: without the packages of `raw` it says what is missing
        from scipy.sparse.linalg import spsolve

        baseline = partial(spsolve, *naive.fill_system(*frame))
        _agree(f"fill_depth, {name}", filled.ravel(), baseline(), 1e-5)
        yield _versus(f"fill_depth, {name} 427x561", baseline, ours)
    yield _raw_pipeline()


def _raw_pipeline(frames: int = 96) -> Row:
    """Frames a second from a zip of Kinect dumps to kept 427x561 frames: unzip, project, crop, fill, encode, write.

    One synthetic recording's frame, many times over in several directories, on all cores.
    """
    from d3lib.data import nyu, raw
    from d3lib.data.rooms import make_camera, make_scene, recording

    with tempfile.TemporaryDirectory() as place:
        archive, directories = Path(place) / "recording.zip", nyu.training_directories()[:8]
        rgb, disparity = recording.capture(make_scene(3011), make_camera(3011, 0))
        pictures = {
            "r-{:.6f}-1.ppm": b"P6 640 480 255\n" + rgb.tobytes(),
            "d-{:.6f}-1.pgm": b"P5 640 480 65535\n" + disparity.astype("<u2").tobytes(),
        }
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for number in range(frames):
                for name, content in pictures.items():
                    file.writestr(f"{directories[number % 8]}/{name.format(1.3e9 + number)}", content)
        folders = (Path(place) / str(number) for number in itertools.count())

        def work() -> None:
            folder = next(folders)
            raw.make_plan([archive], folder, raw.Recipe())
            if (written := raw.process(folder)["written"]) != frames:
                raise RuntimeError(f"{written} frames of {frames} were written")

        return _rate(f"raw pipeline, {os.cpu_count()} processes", "frames/s", frames, work)


BENCHES: dict[str, Callable[[str], Iterator[Row]]] = {
    "start": _bench_start,
    "loss": _bench_loss,
    "train": _bench_train,
    "compile": _bench_compile,
    "gpu": _bench_gpu,
    "together": _bench_together,
    "infer": _bench_infer,
    "eval": _bench_eval,
    "data": _bench_data,
    "rooms": _bench_rooms,
}

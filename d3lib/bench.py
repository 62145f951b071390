"""How fast it is: rates measured here and now, with the machine they were measured on."""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d3lib.artefacts import write_json
from d3lib.errors import UserError
from d3lib.provenance import collect

REPEATS = 5


def bench(what: str = "all", json_path: Path | None = None) -> list[dict[str, Any]]:
    """Measure and print rates; `what` is "rooms", "train", "data" or "all". `json_path` keeps them as an artefact.

    Returns rows of name, median rate, its smallest and largest value, and unit. Raises `UserError` for another `what`,
    and where a benchmark asked for by name needs packages that are missing ("all" does without it).
    """
    if what not in (*BENCHES, "all"):
        raise UserError(f"there is no benchmark {what!r}; choose one of {', '.join(BENCHES)}, all")
    machine = collect("d3lib.bench")
    print(f"{machine['device']}, {machine['threads']} threads, torch {machine['versions'].get('torch')}")
    rows = []
    for name in BENCHES if what == "all" else (what,):
        try:
            rows += BENCHES[name]()
        except UserError as error:
            if what != "all":
                raise
            print(f"{name}: {error}")
    for row in rows:
        print(f"{row['name']:<42} {row['rate']:>8.1f} {row['unit']}  ({row['low']:.1f} to {row['high']:.1f})")
    if json_path is not None:
        write_json(json_path, {"rows": rows, "provenance": machine}, format="d3lib-bench", version=1)
    return rows


def _rate(name: str, unit: str, count: int, work: Callable[[], Any]) -> dict[str, Any]:
    """`count` units of work a call: the median rate of several calls after one to warm up."""
    work()
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        rates.append(count / (time.perf_counter() - start))
    return {"name": name, "unit": unit, "rate": statistics.median(rates), "low": min(rates), "high": max(rates)}


def _bench_rooms() -> list[dict[str, Any]]:
    """Frames of rooms rendered per second, Kinect view included, at two sizes."""
    from d3lib.data import rooms

    rows = []
    for size, count in (((96, 128), 64), ((240, 320), 16)):
        frames = rooms.frames("train", scenes=count)
        work = partial(_render_all, frames, size)
        rows.append(_rate(f"rooms, {size[0]}x{size[1]}", "frames/s", count, work))
    return rows


def _render_all(frames: list[tuple[int, int]], size: tuple[int, int]) -> None:
    from d3lib.data import rooms

    for _ in rooms.stream(frames, size, batch_size=8):
        pass


def _bench_train() -> list[dict[str, Any]]:
    """Optimiser steps per second of the smoke budget's network, for a regression loss and the adversarial one."""
    from d3lib.experiments import BUDGETS
    from d3lib.losses import build_loss
    from d3lib.models import D3Net, PatchDiscriminator
    from d3lib.training import fit

    budget, steps = BUDGETS["smoke"], 10
    generator = torch.Generator().manual_seed(0)
    size = (8, 1, budget.height, budget.width)
    depth = torch.rand(size, generator=generator) * 5 + 1
    rgb = torch.rand((8, 3, budget.height, budget.width), generator=generator)
    batch = {"rgb": rgb, "depth": depth, "valid": torch.ones(size, dtype=torch.bool)}
    rows = []
    for loss in ("l1", "gan"):
        net = D3Net(budget.encoder, seed=0)
        adversary = PatchDiscriminator(ndf=budget.ndf, seed=0) if loss == "gan" else None

        def work(net: D3Net = net, adversary: PatchDiscriminator | None = adversary) -> None:
            fit(net, build_loss("l1"), lambda step: iter(lambda: batch, None), steps=steps, adversary=adversary)

        rows.append(_rate(f"train {budget.encoder}, {loss}, 8x{size[2]}x{size[3]}", "steps/s", steps, work))
    return rows


def _bench_data() -> list[dict[str, Any]]:
    """What preparing raw NYU data costs: how many times faster than SciPy's `spsolve` holes are filled, on one frame.

    On a room's Kinect view, and on the real reference frame where `D3LIB_TEST_DATA` names the folder that has it.
    """
    from d3lib.data import rooms

    room = rooms.render([(3011, 0)], (427, 561))  # as large a part of it is missing as of the real frame, 7 %
    frames = {"room": (room["rgb"][0].numpy(), room["depth"][0, 0].numpy())}
    real = Path(os.environ.get("D3LIB_TEST_DATA", "")) / "nyu_raw_frame" / "toolbox_reference.npz"
    if real.is_file():
        with np.load(real) as content:
            rgb, depth = (content[f"projected_{name}"][44:471, 40:601] for name in ("rgb", "depth"))
        frames["real"] = rgb.transpose(2, 0, 1), depth
    rows = [_fill_against_spsolve(f"fill_depth / spsolve, {name} 427x561", *frames[name]) for name in frames]
    return [*rows, _raw_pipeline()]


def _raw_pipeline(frames: int = 96) -> dict[str, Any]:
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


def _fill_against_spsolve(name: str, rgb: np.ndarray, depth: np.ndarray) -> dict[str, Any]:
    """Ratio of their times, each pair of calls one after the other. The two must agree to 0.1 mm."""
    from d3lib.data.inpaint import fill_depth

    ours = partial(fill_depth, rgb, depth)
    filled = ours()  # first, to compile, and to say what is missing
    from scipy.sparse.linalg import spsolve

    baseline = partial(spsolve, *_fill_system(rgb, depth))
    apart = float(np.abs(baseline() - filled.ravel()).max())
    if not apart <= 1e-4:
        raise RuntimeError(f"{name}: the two answers differ by {apart:.2g} m, so their times do not compare")
    ratios = [_seconds(baseline) / _seconds(ours) for _ in range(REPEATS)]
    return {"name": name, "unit": "x", "rate": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _fill_system(rgb: np.ndarray, depth: np.ndarray) -> tuple[Any, np.ndarray]:
    """The equation of `d3lib.data.inpaint` at alpha = 1, written plainly: a sparse matrix and its right-hand side."""
    from scipy.sparse import csc_array, diags_array

    grey = np.tensordot((0.298936, 0.587043, 0.114021), rgb / 255, 1)
    place = np.arange(grey.size).reshape(grey.shape)
    windows, places = (
        np.lib.stride_tricks.sliding_window_view(np.pad(x, 1, constant_values=outside), (3, 3)).reshape(-1, 9)
        for x, outside in ((grey, np.nan), (place, -1))
    )
    neighbours, squares = np.delete(places, 4, 1), (np.delete(windows, 4, 1) - grey.reshape(-1, 1)) ** 2
    spread = np.maximum(0.6 * np.nanvar(windows, 1), -np.nanmin(squares, 1) / np.log(0.01)).clip(2e-6)
    weights = np.where(neighbours >= 0, np.exp(-squares / spread[:, None]), 0)
    weights /= weights.sum(1, keepdims=True)
    row, column = np.nonzero(neighbours >= 0)
    entries = (weights[row, column], (row, neighbours[row, column]))
    known = ((depth != 0) & (depth != 10)).ravel()
    return csc_array(diags_array(1.0 + known) - csc_array(entries, shape=(grey.size,) * 2)), known * depth.ravel()


BENCHES = {"rooms": _bench_rooms, "train": _bench_train, "data": _bench_data}

"""How fast it is: rates measured here and now, with the machine they were measured on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from d3lib.artefacts import write_json
from d3lib.errors import UserError
from d3lib.provenance import collect

REPEATS = 5


def bench(what: str = "all", json_path: Path | None = None) -> list[dict[str, Any]]:
    """Measure and print rates; `what` is "rooms", "train" or "all". With `json_path` they are kept as an artefact.

    Returns rows of name, median rate, its smallest and largest value, and unit. Raises `UserError` for another `what`.
    """
    if what not in (*BENCHES, "all"):
        raise UserError(f"there is no benchmark {what!r}; choose one of {', '.join(BENCHES)}, all")
    machine = collect("d3lib.bench")
    print(f"{machine['device']}, {machine['threads']} threads, torch {machine['versions'].get('torch')}")
    rows = [row for name in BENCHES if what in (name, "all") for row in BENCHES[name]()]
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


BENCHES = {"rooms": _bench_rooms, "train": _bench_train}

"""Every loss and metric against float64, over depths from a micrometre to ten kilometres; the same bits each time."""

import contextlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_losses import EVERY, oracle
from test_metrics import KEYS, pooled_and_per_image

from d3lib.experiments import BUDGETS, all_runs
from d3lib.losses import build_loss
from d3lib.metrics import DepthMetrics

LOGARITHMIC = ("eigen", "eigengrad")


def drawn(seed, kind, shape):
    """Depths (B, H, W) of pred and target, and a mask, float32 values in float64."""
    rng = np.random.default_rng(seed)
    pred, target = (10 ** rng.uniform(-6, 4, shape) for _ in range(2))
    mask = rng.random(shape) < 0.7
    if kind == "rooms":
        target = rng.uniform(0.5, 10, shape)
        pred = target * np.exp(rng.normal(0, 0.2, shape))
    elif kind == "close":
        pred = target * (1 + rng.normal(0, 1e-5, shape))
    elif kind == "equal":
        pred = np.full(shape, pred.flat[0])
        target = np.full(shape, target.flat[0])
    elif kind == "same":
        pred = target
    elif kind == "one valid":
        mask = np.zeros(shape, bool)
        mask.flat[rng.integers(mask.size)] = True
    elif kind == "outlier":
        target = np.ones(shape)
        pred = np.full(shape, 1 + 1e-4)
        pred.flat[rng.integers(mask.size)] = 1e4
    return pred.astype(np.float32).astype(np.float64), target.astype(np.float32).astype(np.float64), mask


KINDS = ("wild", "rooms", "close", "equal", "same", "one valid", "outlier")
cases = st.tuples(
    st.integers(0, 2**32), st.sampled_from(KINDS), st.tuples(st.integers(1, 3), *[st.integers(2, 24)] * 2)
)


def tensors(pred, target, mask, dtype=torch.float32):
    """(B, H, W) arrays as (B, 1, H, W) tensors; of `dtype` the prediction alone."""
    kinds = (dtype, torch.float32, torch.bool)
    return [torch.tensor(x)[:, None].to(kind) for x, kind in zip((pred, target, mask), kinds, strict=True)]


def sizes(name, variant, *arrays):
    """A loss in float64, and its size without the term that is taken away."""
    taken = {"lam": 0.0} if name in LOGARITHMIC and variant == "paper" else {}
    return oracle(name, variant, *arrays), oracle(name, variant, *arrays, **taken)


def bound(name, exact, scale):
    """How far float32 may be from float64, as the docstring of `d3lib.losses` says."""
    return 1e-5 * (scale + np.sqrt(scale)) + 1e-9 if name in LOGARITHMIC else 1e-5 * exact + 1e-12


def each(drill, check, quick, long):
    @settings(max_examples=drill.times(quick, long), deadline=None, database=None, phases=(Phase.generate,),
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(cases)
    def examples(case):
        with drill.trial(repr(case)):
            check(*drawn(*case))

    examples()


def test_losses_in_float32_and_under_autocast_keep_to_their_bound(drill):
    def check(pred, target, mask):
        p, t, m = tensors(pred, target, mask)
        p.requires_grad_()
        for name, variant in EVERY:
            exact, scale = sizes(name, variant, pred, target, mask)
            for dtype in (None, torch.bfloat16, torch.float16):
                with torch.autocast("cpu", dtype=dtype) if dtype else contextlib.nullcontext():
                    value = build_loss(name, variant)(p, t, m)
                p.grad = None
                value.backward()
                assert abs(value.item() - exact) <= bound(name, exact, scale), (name, variant, value.item(), exact)
                assert torch.isfinite(p.grad).all() and (p.grad[~m] == 0).all()

    each(drill, check, quick=12, long=600)


def test_losses_of_narrow_predictions_are_those_of_the_values_they_hold(drill):
    def check(pred, target, mask):
        for dtype in (torch.bfloat16, torch.float16):
            narrow, t, m = tensors(pred.clip(max=6e4), target, mask, dtype)
            held = narrow[:, 0].double().numpy()
            for name, variant in EVERY:
                exact, scale = sizes(name, variant, held, target, mask)
                value = build_loss(name, variant)(narrow, t, m)
                assert abs(value.item() - exact) <= bound(name, exact, scale), (name, variant, value.item(), exact)

    each(drill, check, quick=6, long=200)


def test_metrics_keep_to_their_bound(drill):
    def check(pred, target, mask):
        metrics = DepthMetrics()
        metrics.update(*tensors(pred, target, mask))
        found = metrics.compute()
        if not mask.any():
            return
        expected = pooled_and_per_image(pred, target, mask)
        for kind in ("pooled", "per_image"):
            for key in KEYS:
                tolerance = {"abs": 1e-4} if key == "silog" else {"rel": 1e-10, "abs": 1e-12}
                assert found[kind][key] == pytest.approx(expected[kind][key], **tolerance), (kind, key)

    each(drill, check, quick=30, long=1000)


@pytest.mark.drill
def test_ten_million_pixels_cost_no_precision(drill):
    rng = np.random.default_rng(0)
    for low, high in ((0.5, 10.0), (1e-6, 1e4)):
        shape = (1, 1, 2500, 4000)
        pred, target = (torch.tensor(np.exp(rng.uniform(np.log(low), np.log(high), shape))).float() for _ in range(2))
        for name, variant in EVERY:
            loss = build_loss(name, variant)
            with drill.trial(f"{name} {variant} {low} {high}", 120):
                exact = loss(pred.double(), target.double()).item()
                scale = exact
                if name in LOGARITHMIC and variant == "paper":
                    scale = build_loss(name, lam=0.0)(pred.double(), target.double()).item()
                assert abs(loss(pred, target).item() - exact) <= bound(name, exact, scale)


CODE = """
import json, sys
from pathlib import Path
from d3lib.execution import execute
from d3lib.experiments import make_run
found = {}
for loss in sys.argv[2:]:
    run = make_run("drill", loss=loss, steps=4, evaluations=2)
    record = execute(run, Path(sys.argv[1]) / "out", Path(sys.argv[1]) / "data", device="cpu")
    record.pop("provenance")
    found[loss] = record
print(json.dumps(found, sort_keys=True))
"""


def spoken(code, *arguments, seed):
    environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.drill
def test_two_processes_from_nothing_give_the_same_records_bit_for_bit(drill, tmp_path):
    """Data rendered anew, other seeds of Python's hashes; the same machine and number of threads."""
    losses = ["gan", "eigengrad", *drill.times([], ["l1", "l2", "eigen", "berhu", "huber"])]
    first, second = (spoken(CODE, str(tmp_path / seed), *losses, seed=seed) for seed in ("1", "2"))
    for loss in losses:
        with drill.trial(loss):
            assert first[loss] == second[loss]


KEYS_CODE = """
import json
from d3lib.experiments import BUDGETS, all_runs
plans = [(budget, data) for budget in BUDGETS for data in (None, "rooms")]
print(json.dumps({f"{budget} {data}": list(all_runs(budget, data=data)) for budget, data in plans}))
"""


def test_no_two_runs_of_any_budget_share_a_key(drill):
    runs = {run for budget in BUDGETS for data in (None, "rooms") for run in all_runs(budget, data=data).values()}
    with drill.trial("collisions"):
        assert len({run.key for run in runs}) == len(runs) > 100


@pytest.mark.drill
def test_no_key_depends_on_the_process(drill):
    with drill.trial("hash seeds"):
        assert spoken(KEYS_CODE, seed="1") == spoken(KEYS_CODE, seed="2")

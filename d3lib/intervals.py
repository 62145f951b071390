"""How sure are we? Intervals, corrected p values and learning-curve summaries; numbers in, numbers out.

All intervals hold 95 %. An interval that holds 0 means "not separated": with these runs the two sides cannot be told
apart. SciPy is imported where a quantile is needed, so that a bare machine can import this module.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
FLAT = 0.02  # a curve counts as converged if it falls by less than this part of itself in a fifth of the run


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    mean: float  # the estimate
    low: float
    high: float
    n: int  # values behind it: seeds, or scenes
    p: float = math.nan  # two-sided, of "it is 0"; NaN where none is computed

    @property
    def separated(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0

    @property
    def half_width(self) -> float | None:
        """Half of the interval's width; `None` where it is infinite: a single value says nothing of its own error."""
        half = (self.high - self.low) / 2
        return half if math.isfinite(half) else None


@dataclass(frozen=True)
class RankAgreement:
    """How far two rankings agree."""

    tau: float  # Kendall's τ-b: 1 the same order, -1 the opposite one; NaN if one side is all ties
    p: float  # exact, two-sided


@dataclass(frozen=True)
class Flatness:
    """How a learning curve ends."""

    change: float | None  # in the last fifth of the run, relative: -0.03 is a fall by 3 %; None: too few points
    converged: bool | None  # None: too few points to say

    @property
    def course(self) -> str:
        """falling, flat or rising, by `FLAT`, or unknown. A curve that rises is restless, or its network overfits."""
        if self.change is None:
            return "unknown"
        return "falling" if not self.converged else "rising" if self.change >= FLAT else "flat"


def t_interval(values: Sequence[float]) -> Interval:
    """Student's t interval of a mean and its p value; of fewer than two values, infinite."""
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Interval(mean, -math.inf, math.inf, n, 1.0)
    from scipy.special import stdtr

    error = statistics.stdev(values) / math.sqrt(n)
    half = _t_quantile(n - 1) * error
    p = float(2 * stdtr(n - 1, -abs(mean) / error)) if error else float(mean == 0)
    return Interval(mean, mean - half, mean + half, n, p)


def paired_interval(first: Mapping[Hashable, float], second: Mapping[Hashable, float]) -> Interval:
    """t interval of the mean difference first - second over the seeds that both have.

    Seeds are paired (the same initial weights and data order), so what a seed does to both cancels. Raises
    `ValueError` if they share no seed.
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        raise ValueError("the two have no seed in common")
    return t_interval([first[seed] - second[seed] for seed in seeds])


def folds_interval(values: Sequence[float], ratio: float) -> Interval:
    """t interval of a mean over the k folds of a cross-validation, widened as they share training pictures.

    The variance of the mean is taken as (1/k + `ratio`) s² with `ratio` = pictures tested / trained on in a fold
    (Nadeau and Bengio, 2003). Of fewer than two values, infinite.
    """
    plain = t_interval(values)
    if plain.half_width is None:
        return plain
    from scipy.special import stdtr

    wider = math.sqrt(1 + plain.n * ratio)
    half, error = wider * plain.half_width, wider * statistics.stdev(values) / math.sqrt(plain.n)
    p = float(2 * stdtr(plain.n - 1, -abs(plain.mean) / error)) if error else plain.p
    return Interval(plain.mean, plain.mean - half, plain.mean + half, plain.n, p)


def against_others(changes: Mapping[str, Mapping[Hashable, float]]) -> dict[str, Interval]:
    """How much more each of several things changed than the mean of the others, with t intervals over shared seeds.

    What changes all of them alike changes no order among them. Of two things only the first is given: the other is its
    mirror image. Empty for fewer than two things or shared seeds.

    Args:
        changes: for each thing its change by seed.
    """
    seeds = set.intersection(*map(set, changes.values())) if changes else set()
    if len(changes) < 2 or len(seeds) < 2:
        return {}
    asked = list(changes)[: None if len(changes) > 2 else 1]
    others = {name: [changes[other] for other in changes if other != name] for name in asked}
    return {
        name: t_interval(
            [changes[name][s] - statistics.fmean(other[s] for other in others[name]) for s in sorted(seeds)]
        )
        for name in asked
    }


def prediction_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % prediction interval for one more run, from `values` of n runs.

    Half-width t(0.975, n - 1) · s · √(1 + 1/n); infinite for a single run.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.inf
    return mean, _t_quantile(len(values) - 1) * statistics.stdev(values) * math.sqrt(1 + 1 / len(values))


def _t_quantile(freedom: int) -> float:
    """Student's t at (1 + LEVEL) / 2. From `scipy.special`: importing `scipy.stats` takes seconds."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2))


def spread_interval(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Interval of ln(s₁/s₂), two standard deviations over seeds compared by the F distribution (normal values).

    0 means equally spread, ln 2 that the first is twice as spread. `n` is the smaller number of values. With fewer
    than two values on a side, or no spread at all on one, the interval is infinite.
    """
    n = min(len(first), len(second))
    if n < 2 or not (statistics.pvariance(first) and statistics.pvariance(second)):
        return Interval(0.0, -math.inf, math.inf, n, 1.0)
    from scipy.special import fdtr, fdtrc, fdtri

    freedom = len(first) - 1, len(second) - 1
    ratio = statistics.variance(first) / statistics.variance(second)
    low, high = (0.5 * math.log(ratio / fdtri(*freedom, q)) for q in ((1 + LEVEL) / 2, (1 - LEVEL) / 2))
    p = 2 * min(fdtr(*freedom, ratio), fdtrc(*freedom, ratio))
    return Interval(0.5 * math.log(ratio), low, high, n, float(p))


def bootstrap_scenes(
    terms: Sequence[tuple[float, Mapping[str, Any]]], metric: str, *, samples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile interval of Σ weight · metric if the test set had been other scenes of the same kind.

    Whole scenes are drawn with replacement, the same ones for every term: two networks are compared on the same
    pictures. Frames of one scene are alike, so drawing frames would make the interval too narrow.

    Args:
        terms: (weight, sums by scene), e.g. (1, of one run), (-1, of another) for a difference; or 1/n for a mean.
            The sums: `scene` names, and per scene `n` valid pixels, `se` squared error in m², `rel` |error| / depth,
            `d1` pixels with δ < 1.25.
        metric: "rms" (metres), "rel" or "d1", pooled over all pixels drawn.

    Raises `ValueError` if the terms are of different scenes.
    """
    scenes = list(terms[0][1]["scene"])
    if any(list(sums["scene"]) != scenes for _, sums in terms):
        raise ValueError("the terms are of different test scenes")
    weights = np.array([weight for weight, _ in terms])
    pixels, sums = (np.array([found[name] for _, found in terms], float) for name in ("n", _SUMS[metric]))

    def pooled(counts: np.ndarray) -> np.ndarray:
        mean = (counts @ sums.T) / (counts @ pixels.T)  # (samples, terms)
        return (np.sqrt(mean) if metric == "rms" else mean) @ weights

    low, high = np.quantile(pooled(_draws(len(scenes), samples, seed)), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(pooled(np.ones((1, len(scenes))))[0]), float(low), float(high), len(scenes))


_SUMS = {"rms": "se", "rel": "rel", "d1": "d1"}


@functools.lru_cache(maxsize=4)
def _draws(scenes: int, samples: int, seed: int) -> np.ndarray:
    """How often each scene is drawn in each sample, (samples, scenes)."""
    return np.random.default_rng(seed).multinomial(scenes, np.full(scenes, 1 / scenes), size=samples)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p values, in the order given: of m, the k-th smallest is multiplied by m - k + 1.

    Whoever makes many comparisons finds some difference by chance. Adjusted values below 0.05 keep the chance of even
    one false finding in the whole family below 5 %.
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> RankAgreement:
    """Kendall's τ-b of two rankings, and its exact two-sided p value by all permutations (ties allowed).

    Of n things, n(n - 1)/2 pairs stand in the same or in the opposite order; τ is their balance. Raises `ValueError`
    for unequal lengths, fewer than 2 or more than 8 things (8! orders are still quick).
    """
    n = len(first)
    if len(second) != n or not 2 <= n <= 8:
        raise ValueError(f"two rankings of 2 to 8 things are needed, not of {n} and {len(second)}")
    i, j = np.triu_indices(n, 1)
    orders = np.array(list(itertools.permutations(range(n))))
    a, b = np.asarray(first, float), np.asarray(second, float)[orders]  # the first order is the given one
    signs = np.sign(a[i] - a[j])
    balance = np.sign(b[:, i] - b[:, j]) @ signs
    untied = math.sqrt(np.abs(signs).sum() * np.abs(np.sign(b[0, i] - b[0, j])).sum())
    tau = float(balance[0] / untied) if untied else math.nan
    return RankAgreement(tau, float(np.mean(np.abs(balance) >= abs(balance[0]))))


def _points(curve: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Images seen and test RMSE, (2, n), of a curve's points that have one."""
    found = [(point["images"], point["test_rms"]) for point in curve if point.get("test_rms") is not None]
    return np.array(found, float).reshape(-1, 2).T


def last_fifth(curve: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The points of a curve at and after four fifths of the images seen."""
    return [point for point in curve if 5 * point["images"] >= 4 * curve[-1]["images"]]


def converged(curve: Sequence[Mapping[str, Any]]) -> Flatness:
    """Whether test RMSE had stopped falling: a rule fixed before any run.

    A straight line is fitted to `test_rms` over the last fifth of the images seen. The run had converged if the line
    falls by less than 2 % of its mean height (`FLAT`) in that fifth. A rising line counts as converged: more training
    would not help. Of fewer than three points there, nothing is said.
    """
    images, values = _points(last_fifth(curve))
    if len(values) < 3:
        return Flatness(None, None)
    slope = np.polyfit(images - images.mean(), values, 1)[0]  # metres an image
    change = float(slope * curve[-1]["images"] / 5 / values.mean())
    return Flatness(change, change > -FLAT)


def courses(curves: Iterable[Sequence[Mapping[str, Any]]]) -> str:
    """How many learning curves end in which `Flatness.course`, in words: "3 falling, 1 flat, 2 rising"."""
    counts = Counter(converged(curve).course for curve in curves)
    return ", ".join(
        f"{counts[course]} {course}" for course in ("falling", "flat", "rising", "unknown") if counts[course]
    )


def images_to_reach(curve: Sequence[Mapping[str, Any]], factor: float = 1.05) -> float | None:
    """Images seen when test RMSE first came down to `factor` times the curve's best value.

    Between two points the curve is a straight line; before the first one nothing is known, so that is the earliest
    answer. `None` for a curve without points.
    """
    images, values = _points(curve)
    if not len(values):
        return None
    goal = factor * values.min()
    k = int(np.argmax(values <= goal))
    if k == 0:
        return float(images[0])
    return float(np.interp(goal, values[[k, k - 1]], images[[k, k - 1]]))


def area_under(curve: Sequence[Mapping[str, Any]]) -> float | None:
    """Test RMSE averaged over the images seen, metres, by the trapezoidal rule; `None` for fewer than two points.

    A low area means low errors early, whatever the last value is.
    """
    images, values = _points(curve)
    if len(values) < 2:
        return None
    return float(np.sum((values[1:] + values[:-1]) / 2 * np.diff(images)) / (images[-1] - images[0]))

"""Intervals, corrections and curve summaries agree with SciPy, with brute force, and with numbers worked by hand."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from d3lib.intervals import (
    Interval,
    against_others,
    area_under,
    bootstrap_scenes,
    converged,
    courses,
    folds_interval,
    holm,
    images_to_reach,
    kendall_tau,
    last_fifth,
    paired_interval,
    prediction_interval,
    spread_interval,
    t_interval,
)


def curve(values, step=100, name="test_rms"):
    return [{"images": step * (k + 1), name: value} for k, value in enumerate(values)]


def scenes(rng, count=40, error=0.3, names=None):
    """Sums by scene of random errors, and the errors themselves per scene."""
    pixels = rng.integers(50, 200, count)
    errors = [error * rng.normal(size=n) * (1 + rng.random()) for n in pixels]
    sums = {
        "scene": names or [f"s{k}" for k in range(count)],
        "n": pixels.tolist(),
        "se": [float((e**2).sum()) for e in errors],
        "rel": [float(np.abs(e).sum()) / 2 for e in errors],  # a depth of 2 m everywhere
        "d1": [int((np.abs(e) < 0.4).sum()) for e in errors],
    }
    return sums, errors


def test_a_t_interval_is_scipys():
    values = [0.61, 0.63, 0.60, 0.66, 0.62]
    ours = t_interval(values)
    test = stats.ttest_1samp(values, 0)
    low, high = test.confidence_interval(0.95)
    assert (ours.mean, ours.low, ours.high, ours.p) == pytest.approx((np.mean(values), low, high, test.pvalue))
    assert ours.n == 5 and ours.separated and ours.half_width == pytest.approx((high - low) / 2)


def test_three_seeds_have_a_half_width_of_two_and_a_half_standard_deviations():
    ours = t_interval([1.0, 2.0, 3.0])  # s = 1; t(0.975, 2) = 4.302653 from a printed table, over sqrt(3)
    assert ours.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert ours.half_width == pytest.approx(2.48, abs=0.01)


def test_one_run_separates_nothing():
    ours = t_interval([5.0])
    assert not ours.separated and ours.half_width is None and ours.p == 1


def test_equal_values_are_separated_from_zero_unless_they_are_zero():
    assert t_interval([0.5, 0.5, 0.5]).p == 0 and t_interval([0.5, 0.5]).separated
    assert t_interval([0.0, 0.0]).p == 1 and not t_interval([0.0, 0.0]).separated


def test_paired_differences_use_the_common_seeds_and_cancel_what_seeds_share():
    seed_effect = {0: 0.30, 1: -0.25, 2: 0.11, 3: -0.40, 4: 0.05}
    wiggle = {0: 0.001, 1: -0.001, 2: 0.0, 3: 0.002, 4: -0.002}
    first = {s: 1 + seed_effect[s] for s in seed_effect} | {9: 50.0}
    second = {s: 1.01 + seed_effect[s] + wiggle[s] for s in seed_effect} | {8: -50.0}
    ours = paired_interval(first, second)
    test = stats.ttest_rel([first[s] for s in range(5)], [second[s] for s in range(5)])
    assert ours.n == 5 and ours.separated
    assert ours.mean == pytest.approx(-0.01)  # the first less the second
    assert ours.p == pytest.approx(test.pvalue)
    assert not stats.ttest_ind([first[s] for s in range(5)], [second[s] for s in range(5)]).pvalue < 0.5
    with pytest.raises(ValueError, match="in common"):
        paired_interval({0: 1.0}, {1: 1.0})


def test_a_prediction_interval_is_the_textbook_one():
    mean, half = prediction_interval([1.0, 2.0, 4.0])
    # t(0.975, 2) = 4.302653 from a printed table; s = sqrt(7/3)
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.302653 * math.sqrt(7 / 3) * math.sqrt(1 + 1 / 3), rel=1e-5)
    assert prediction_interval([1.0]) == (1.0, math.inf)


def test_two_in_forty_new_runs_fall_outside_the_prediction_interval():
    rng = np.random.default_rng(0)
    misses = 0
    for _ in range(2000):
        *seen, new = rng.normal(size=6)
        mean, half = prediction_interval(seen)
        misses += abs(new - mean) > half
    assert misses / 2000 == pytest.approx(0.05, abs=0.015)


def test_the_spread_of_two_groups_is_compared_by_the_printed_f_table():
    first, second = [0.0, 2.0, 4.0, 6.0, 8.0], [0.0, 1.0, 2.0, 3.0, 4.0]  # standard deviations in the ratio 2
    ours = spread_interval(first, second)
    f = 9.6045  # F(0.975; 4, 4) from a printed table
    assert ours.mean == pytest.approx(math.log(2))
    assert (ours.low, ours.high) == pytest.approx(
        (math.log(2) - math.log(f) / 2, math.log(2) + math.log(f) / 2), abs=1e-4
    )
    assert not ours.separated and 0.05 < ours.p < 0.5
    back = spread_interval(second, first)
    assert (back.mean, back.low, back.p) == pytest.approx((-ours.mean, -ours.high, ours.p))
    assert not spread_interval([1.0, 1.0], [1.0, 2.0]).separated


def test_the_spread_of_groups_of_unequal_size_has_each_sides_freedom():
    ours = spread_interval([0.0, 2.0, 4.0, 6.0, 8.0], [0.0, 1.0, 2.0])  # variances 10 and 1
    low, high = 39.2484, 10.6491  # F(0.975; 4, 2) and F(0.975; 2, 4) from a printed table
    assert (ours.low, ours.high) == pytest.approx((math.log(10 / low) / 2, math.log(10 * high) / 2), abs=1e-5)
    assert ours.n == 3


def test_the_spread_interval_excludes_zero_exactly_when_p_is_below_a_twentieth():
    rng = np.random.default_rng(1)
    found = [spread_interval(s * rng.normal(size=6), rng.normal(size=6)) for s in np.geomspace(0.1, 10, 60)]
    assert {i.separated for i in found} == {True, False}
    assert all(i.separated == (i.p < 0.05) for i in found)


@pytest.mark.parametrize("metric", ["rms", "rel", "d1"])
def test_the_bootstrap_is_that_of_a_plain_loop_over_drawn_scenes(metric):
    rng = np.random.default_rng(2)
    sums, errors = scenes(rng)
    read = {
        "rms": lambda e: math.sqrt(np.mean(e**2)),
        "rel": lambda e: np.mean(np.abs(e) / 2),
        "d1": lambda e: np.mean(np.abs(e) < 0.4),
    }[metric]
    drawn = [read(np.concatenate([errors[k] for k in rng.integers(0, 40, 40)])) for _ in range(4000)]
    ours = bootstrap_scenes([(1, sums)], metric, samples=4000)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert ours.mean == pytest.approx(read(np.concatenate(errors)))
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.05 * (high - low))
    assert ours.n == 40


def test_a_paired_bootstrap_sees_a_difference_that_hard_scenes_would_hide():
    rng = np.random.default_rng(3)
    sums, _ = scenes(rng)
    better = sums | {"se": [0.98 * x for x in sums["se"]]}  # a little better on every scene
    difference = bootstrap_scenes([(1, sums), (-1, better)], "rms")
    alone = bootstrap_scenes([(1, sums)], "rms")
    assert difference.low > 0 and difference.high - difference.low < 0.1 * (alone.high - alone.low)
    assert not bootstrap_scenes([(1, sums), (-1, sums)], "rms").separated


def test_the_bootstrap_repeats_itself_and_refuses_other_scenes():
    sums, _ = scenes(np.random.default_rng(4))
    once, again, other = (bootstrap_scenes([(1, sums)], "rms", seed=seed) for seed in (0, 0, 1))
    assert (once.low, once.high) == (again.low, again.high) != (other.low, other.high)
    with pytest.raises(ValueError, match="different test scenes"):
        bootstrap_scenes([(1, sums), (-1, sums | {"scene": sums["scene"][::-1]})], "rms")


def test_holm_by_hand():
    # sorted: .01 x 4 = .04, .02 x 3 = .06, .03 x 2 = .06 (never below the one before), .8 x 1
    assert holm([0.8, 0.01, 0.03, 0.02]) == pytest.approx([0.8, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_the_chance_of_any_false_finding_below_five_percent():
    rng = np.random.default_rng(5)
    any_false = [min(holm(list(rng.random(20)))) < 0.05 for _ in range(4000)]
    assert np.mean(any_false) == pytest.approx(0.05, abs=0.012)


def test_kendalls_tau_is_scipys_exact_one():
    rng = np.random.default_rng(6)
    for _ in range(5):
        a, b = rng.random(7), rng.random(7)
        ours, theirs = kendall_tau(a, b), stats.kendalltau(a, b, method="exact")
        assert (ours.tau, ours.p) == pytest.approx((theirs.statistic, theirs.pvalue))


def test_kendalls_tau_with_ties_is_that_of_all_permutations():
    a, b = [1, 2, 2, 3, 4], [1, 1, 3, 2, 4]

    def balance(x, y):
        return sum(np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i in range(5) for j in range(i))

    every = [abs(balance(a, order)) >= abs(balance(a, b)) for order in itertools.permutations(b)]
    ours = kendall_tau(a, b)
    assert ours.tau == pytest.approx(stats.kendalltau(a, b).statistic)
    assert ours.p == pytest.approx(np.mean(every))


def test_seven_losses_need_a_tau_of_fifteen_in_twentyone():
    order = list(range(7))
    three = [1, 0, 3, 2, 5, 4, 6]  # 3 of 21 pairs swapped: tau 15/21 = 0.714
    four = [1, 0, 3, 2, 6, 4, 5]  # 4 swapped: 13/21
    assert kendall_tau(order, three).tau == pytest.approx(15 / 21)
    assert kendall_tau(order, three).p < 0.05 < kendall_tau(order, four).p
    with pytest.raises(ValueError, match="2 to 8"):
        kendall_tau(range(9), range(9))
    assert math.isnan(kendall_tau([1, 1, 1], [1, 2, 3]).tau)


def test_a_curve_that_still_falls_by_two_percent_a_fifth_has_not_converged():
    steady = [2.0 - 0.05 * k for k in range(20)]  # at the end 1.05: a fifth of the run is four steps, 0.2 m
    ours = converged(curve(steady))
    assert ours.converged is False
    assert ours.change == pytest.approx(-0.2 / 1.15)  # the mean of the last five points is 1.15
    assert converged(curve([2.0 - 0.1 * min(k, 9) for k in range(20)])).converged is True
    assert converged(curve([1.0] * 15 + [1.0, 1.1, 1.2, 1.3, 1.4])).converged is True


def test_folds_that_share_training_pictures_have_the_wider_interval_of_nadeau_and_bengio():
    values, ratio = np.array([0.5, 0.7, 0.4, 0.9, 0.6]), 0.3
    found = folds_interval(list(values), ratio)
    half = 2.7764451 * math.sqrt((1 / 5 + ratio) * values.var(ddof=1))  # t(0.975, 4)
    assert [found.low, found.high] == pytest.approx([values.mean() - half, values.mean() + half], rel=1e-6)
    edge = folds_interval(list(values - found.low), ratio)  # its own interval ends at zero: so p is 0.05
    assert edge.low == pytest.approx(0, abs=1e-9) and edge.p == pytest.approx(0.05)
    assert folds_interval(list(values), 0) == t_interval(list(values))
    assert folds_interval([0.5], ratio).half_width is None and folds_interval([0.5, 0.5], ratio).p == 0


def test_what_changes_all_alike_changes_nothing_against_the_others():
    alike = {name: {seed: 0.25 * seed - 1 for seed in range(4)} for name in "abc"}
    found = against_others(alike)
    assert set(found) == set("abc") and not any(interval.mean or interval.separated for interval in found.values())
    changes = {"a": {0: 1.0, 1: 1.25, 2: 9.0}, "b": {0: 0.0, 1: 0.5}, "c": {1: -0.5, 0: 0.5}}
    found = against_others(changes)
    assert found["a"] == t_interval([1.0 - 0.25, 1.25 - 0.0]) and found["b"] == t_interval([0 - 0.75, 0.5 - 0.375])
    pair = {name: changes[name] for name in "ab"}
    assert against_others(pair) == {"a": t_interval([1.0, 0.75])}  # the other says the same
    assert (
        against_others({})
        == against_others({"a": changes["a"]})
        == against_others({"a": {0: 1.0}, "b": {1: 1.0}})
        == {}
    )


def test_a_curve_that_does_not_fall_may_still_rise():
    def ends(change):
        return curve([*[1.0] * 15, *(1 + change * k / 4 for k in range(5))])

    slopes = {change: converged(ends(change)).change for change in (-0.1, -0.01, 0, 0.01, 0.1)}
    assert all(np.sign(slope) == np.sign(change) for change, slope in slopes.items())
    named = {change: converged(ends(change)).course for change in slopes}
    assert named == {-0.1: "falling", -0.01: "flat", 0: "flat", 0.01: "flat", 0.1: "rising"}
    assert courses([*map(ends, slopes), [], ends(0.1)]) == "1 falling, 3 flat, 2 rising, 1 unknown"
    assert courses([]) == ""


@pytest.mark.parametrize(("fall", "answer"), [(0.019, True), (0.021, False)])
def test_the_line_between_is_two_percent(fall, answer):
    x = np.arange(1, 21) / 20
    values = 1 - fall * (x - 0.9) / 0.2  # falls by `fall` in a fifth; its mean there is 1
    assert converged(curve(values)).converged is answer


def test_too_few_points_say_nothing_about_the_end():
    assert converged(curve([3.0, 2.0, 1.0, 1.0])).converged is None
    assert converged([]).converged is None
    gaps = curve([1.0] * 18 + [None, None])
    assert converged(gaps).converged is True and converged(curve([1.0] * 17 + [None] * 3)).converged is None


def test_the_last_fifth_includes_its_first_point():
    assert [p["images"] for p in last_fifth(curve(range(10)))] == [800, 900, 1000]


def test_images_to_reach_by_hand():
    falling = curve([4.0, 2.0, 1.2, 1.0])  # the goal 1.05 is passed between 300 and 400: at 0.15 / 0.2 of the way
    assert images_to_reach(falling) == pytest.approx(375)
    assert images_to_reach(falling, factor=2.0) == pytest.approx(200)
    assert images_to_reach(falling, factor=9.0) == 100
    assert images_to_reach(curve([2.0, 1.0, 1.5])) == pytest.approx(195)  # the best, not the last, sets the goal
    assert images_to_reach([]) is None and images_to_reach(curve([None, None])) is None


def test_area_under_a_curve_by_hand():
    assert area_under(curve([3.0, 1.0, 1.0])) == pytest.approx((2 * 100 + 1 * 100) / 200)
    uneven = [{"images": 0, "test_rms": 2.0}, {"images": 10, "test_rms": 1.0}, {"images": 40, "test_rms": 1.0}]
    assert area_under(uneven) == pytest.approx((15 + 30) / 40)
    assert area_under(curve([1.0])) is None


def test_an_interval_that_holds_zero_is_not_separated():
    assert Interval(1.0, 0.1, 2.0, 5).separated and Interval(-1.0, -2.0, -0.1, 5).separated
    assert not Interval(1.0, -0.1, 2.0, 5).separated


def test_importing_the_module_needs_no_scipy():
    code = "import sys; sys.modules['scipy'] = None; import d3lib.intervals as i; print(i.holm([0.01]))"
    assert "0.01" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

"""Details of predictions against NumPy loops written from their definitions, and on maps made to have one fault."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from d3lib.details import BANDS, REACH, RESIDUALS, Details, depth_edges, edge_distance

NUMBERS = (
    "edge_precision edge_recall edge_f1 dbe_acc dbe_comp gradient_ratio spectrum_high share_1cm share_10cm".split()
)


def rooms(seed, n=3, size=(24, 40)):
    """Walls with boxes before them and slow waves: edges of many heights."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    depth = np.empty((n, *size))
    for image in depth:
        image[:] = rng.uniform(3, 6) + 0.3 * np.sin(columns / 7 + rng.uniform(0, 6)) + 0.01 * rows
        for _ in range(4):
            top, left = rng.integers(0, size[0] - 6), rng.integers(0, size[1] - 6)
            image[top : top + rng.integers(4, 12), left : left + rng.integers(4, 16)] = rng.uniform(1, 4)
    return depth


def tensor(x):
    return torch.from_numpy(x)[:, None].to(torch.bool if x.dtype == bool else torch.float64)


def details(pred, target, mask=None):
    found = Details()
    found.update(pred, target, mask)
    return found.compute()


# The definitions, one pixel after the other.


def oracle_edges(depth, valid):
    height, width = depth.shape
    weights = [math.comb(8, k) for k in range(9)]
    smooth = np.zeros_like(depth)
    for i, j in np.ndindex(depth.shape):
        total = weight = 0.0
        for a in range(-4, 5):
            for b in range(-4, 5):
                if 0 <= i + a < height and 0 <= j + b < width and valid[i + a, j + b]:
                    total += weights[a + 4] * weights[b + 4] * math.log(max(depth[i + a, j + b], 1e-3))
                    weight += weights[a + 4] * weights[b + 4]
        smooth[i, j] = total / weight if weight else 0

    def jump(i, j, a, b):
        if not (0 <= i and 0 <= j and i + a < height and j + b < width and valid[i, j] and valid[i + a, j + b]):
            return 0.0
        return abs(smooth[i + a, j + b] - smooth[i, j])

    edges = np.zeros(depth.shape, bool)
    for i, j in np.ndindex(depth.shape):
        for a, b in ((0, 1), (1, 0)):
            here = jump(i, j, a, b)
            edges[i, j] |= here > 0.03 and here >= jump(i - a, j - b, a, b) and here > jump(i + a, j + b, a, b)
    return edges


def oracle_distance(edges):
    rows, columns = np.nonzero(edges)
    distance = np.empty(edges.shape)
    for i, j in np.ndindex(edges.shape):
        distance[i, j] = np.hypot(rows - i, columns - j).min(initial=10)
    return distance


def oracle_power(depth, valid):
    """Power by band from the definition of the Fourier sum, for one map."""
    height, width = depth.shape
    window = np.outer(*(np.sin(np.pi * (np.arange(n) + 1) / (n + 1)) ** 2 for n in (height, width)))
    x = np.where(valid, depth - depth[valid].mean(), 0) * window / np.sqrt((window**2).mean())
    bands = [[] for _ in range(5)]
    for k in range(height):
        row = np.exp(-2j * np.pi * k * np.arange(height) / height)
        for m in range(width):
            frequency = math.hypot(min(k, height - k) / height, min(m, width - m) / width)
            value = abs(row @ x @ np.exp(-2j * np.pi * m * np.arange(width) / width)) ** 2 / (height * width)
            for band, (low, high) in enumerate(zip(BANDS[:-1], BANDS[1:], strict=True)):
                if low < frequency <= high:
                    bands[band].append(value)
    return np.array([np.mean(band) if band else 0 for band in bands])


def oracle(pred, target, valid):
    n = dict.fromkeys(("found", "right", "near", "to_true", "true", "recalled", "to_found", "g", "g_true"), 0.0)
    power = np.zeros((2, 5))
    for p, t, v in zip(pred, target, valid, strict=True):
        found, true = oracle_edges(p, v), oracle_edges(t, v)
        to_found, to_true = oracle_distance(found), oracle_distance(true)
        n["found"] += found.sum()
        n["right"] += (found & (to_true <= 2)).sum()
        n["near"] += (found & (to_true < 10)).sum()
        n["to_true"] += to_true[found & (to_true < 10)].sum()
        n["true"] += true.sum()
        n["recalled"] += (true & (to_found <= 2)).sum()
        n["to_found"] += to_found[true].sum()
        for i, j in np.ndindex(p.shape):
            for a, b in ((i + 1, j), (i, j + 1)):
                if a < p.shape[0] and b < p.shape[1] and v[i, j] and v[a, b]:
                    n["g"] += abs(p[a, b] - p[i, j])
                    n["g_true"] += abs(t[a, b] - t[i, j])
        if v.mean() >= 0.95:
            power += [oracle_power(p, v), oracle_power(t, v)]
    error = np.abs(pred - target)[valid]
    precision, recall = n["right"] / n["found"], n["recalled"] / n["true"]
    spectrum = [a / b if b else None for a, b in power.T]
    return {
        "images": sum(v.any() for v in valid),
        "edge_precision": precision,
        "edge_recall": recall,
        "edge_f1": 2 / (1 / precision + 1 / recall),
        "dbe_acc": n["to_true"] / n["near"],
        "dbe_comp": n["to_found"] / n["true"],
        "gradient_ratio": n["g"] / n["g_true"],
        "spectrum": spectrum,
        "spectrum_high": spectrum[-1],
        "share_1cm": (error < 0.01).mean(),
        "share_10cm": (error < 0.1).mean(),
    }, error


@pytest.mark.parametrize("holes", [0.0, 0.03, 0.3])
def test_details_equal_their_definitions_in_loops(holes):
    rng = np.random.default_rng(3)
    target = rooms(1, n=2)
    pred = target * np.exp(rng.normal(0, 0.01, target.shape))
    pred[:, 2:] = 0.7 * pred[:, 2:] + 0.3 * pred[:, :-2]
    valid = rng.random(target.shape) >= holes
    expected, error = oracle(pred, target, valid)
    found = details(*map(tensor, (pred, target, valid)))
    residuals = found.pop("residuals")
    spectrum = expected.pop("spectrum")
    assert found.pop("spectrum") == (spectrum if None in spectrum else pytest.approx(spectrum, rel=1e-8))
    assert found.pop("spectrum_high") == (None if holes == 0.3 else pytest.approx(expected["spectrum_high"], rel=1e-8))
    del expected["spectrum_high"]
    assert found == pytest.approx(expected, rel=1e-6)
    assert residuals["edges"] == pytest.approx(np.geomspace(1e-3, 10, 33), rel=1e-6)
    assert residuals["counts"] == np.histogram(np.clip(error, 1e-3, 10), residuals["edges"])[0].tolist()


def test_a_perfect_prediction_is_perfect_in_everything():
    target = tensor(rooms(2, size=(64, 80)))
    found = details(target.float(), target.float())
    residuals, spectrum = found.pop("residuals"), found.pop("spectrum")
    assert found == {
        **dict.fromkeys(NUMBERS, 1.0),
        "dbe_acc": 0.0,
        "dbe_comp": 0.0,
        "images": 3,
    }
    assert spectrum == [1.0] * (len(BANDS) - 1)
    assert residuals["counts"] == [target.numel(), *[0] * (len(RESIDUALS) - 2)]


def test_a_scaled_prediction_has_all_edges_in_place_and_a_larger_gradient():
    target = tensor(rooms(2))
    found = details(1.2 * target, target)
    assert (found["edge_f1"], found["dbe_acc"], found["dbe_comp"]) == (1, 0, 0)
    assert found["gradient_ratio"] == pytest.approx(1.2)
    assert found["spectrum"][1:] == pytest.approx([1.44] * 4)


def test_blur_lowers_recall_gradient_and_fine_power_the_more_the_wider():
    target = tensor(rooms(4, size=(64, 80)))
    rows = [details(F.avg_pool2d(target, k, 1, k // 2, count_include_pad=False), target) for k in (1, 5, 9, 15)]
    for key in ("edge_recall", "gradient_ratio", "spectrum_high", "share_1cm"):
        values = [row[key] for row in rows]
        assert values == sorted(values, reverse=True) and len(set(values)) == 4, key
    errors = [row["dbe_comp"] for row in rows]
    assert errors == sorted(errors) and errors[-1] > errors[0]


def test_noise_raises_gradient_and_fine_power():
    target = tensor(rooms(4, size=(64, 80)))
    noise = 0.2 * torch.randn(target.shape, generator=torch.Generator().manual_seed(0), dtype=target.dtype)
    found = details(target + noise, target)
    assert found["gradient_ratio"] > 2 and found["spectrum_high"] > 1.1
    assert found["spectrum"][0] == pytest.approx(1, abs=0.05), "coarse structure is untouched"


@pytest.mark.parametrize("shift", [1, 2, 3, 7])
def test_an_edge_beside_its_place_costs_the_pixels_it_is_off(shift):
    target, pred = torch.full((2, 1, 30, 40), 4.0), torch.full((2, 1, 30, 40), 4.0)
    target[..., 15:] = 2
    pred[..., 15 + shift :] = 2
    found = details(pred, target)
    assert found["dbe_acc"] == found["dbe_comp"] == shift
    agree = float(shift <= 2)
    assert (found["edge_precision"], found["edge_recall"], found["edge_f1"]) == (agree, agree, agree)


def test_edges_farther_than_the_reach_are_missed_but_not_measured():
    target, pred = torch.full((1, 1, 30, 60), 4.0), torch.full((1, 1, 30, 60), 4.0)
    target[..., 15:] = 2
    pred[..., 40:] = 2
    found = details(pred, target)
    assert found["dbe_acc"] is None and found["dbe_comp"] == REACH and found["edge_f1"] == 0


def test_a_map_without_edges_has_no_precision_and_no_recall():
    target = torch.full((1, 1, 30, 40), 4.0)
    flat = target.clone()
    target[..., 15:] = 2
    found = details(flat, target)
    assert (found["edge_precision"], found["edge_recall"], found["edge_f1"]) == (None, 0, 0)
    assert (found["dbe_acc"], found["dbe_comp"], found["gradient_ratio"]) == (None, REACH, 0)
    found = details(target, flat)
    assert (found["edge_precision"], found["edge_recall"], found["edge_f1"]) == (0, None, 0)
    assert (found["dbe_acc"], found["dbe_comp"], found["gradient_ratio"]) == (None, None, None)
    assert details(flat, flat)["edge_f1"] is None


def test_an_edge_is_one_pixel_wide_and_a_gentle_slope_is_none():
    depth = torch.full((1, 1, 9, 60), 4.0)
    depth[..., 30:] = 4 * 1.3
    valid = torch.ones_like(depth, dtype=torch.bool)
    edges = depth_edges(depth, valid)
    assert edges[..., 29].all() and edges.sum() == 9
    assert not depth_edges(1 + 0.025 * torch.arange(60.0).expand(1, 1, 9, 60), valid).any()
    blurred = depth_edges(F.avg_pool2d(depth, (1, 5), 1, (0, 2), count_include_pad=False), valid)
    assert blurred[..., 27:32].sum() == blurred.sum() == 9
    assert not depth_edges(4 + 0.08 * (depth > 4), valid).any(), "a step of 2 %"


def test_a_jump_across_a_hole_is_no_edge():
    depth = torch.full((1, 1, 9, 40), 4.0)
    depth[..., 20:] = 2
    valid = torch.ones_like(depth, dtype=torch.bool)
    valid[..., 16:24] = False
    assert not depth_edges(depth, valid).any()


def test_distances_are_euclidean_and_end_at_the_reach():
    edges = torch.zeros(2, 1, 25, 30, dtype=torch.bool)
    edges[0, 0, 12, 15] = edges[1, 0, 0, 0] = True
    distance = edge_distance(edges)
    for image, (a, b) in enumerate(((12, 15), (0, 0))):
        rows, columns = np.mgrid[:25, :30]
        expected = np.minimum(np.hypot(rows - a, columns - b), REACH)
        np.testing.assert_allclose(distance[image, 0], expected, rtol=1e-6)


def test_what_invalid_pixels_hold_changes_nothing():
    target, pred = tensor(rooms(5)), tensor(rooms(5)) * 1.1
    mask = torch.from_numpy(np.random.default_rng(0).random(target.shape) > 0.02)
    first = details(pred, target, mask)
    pred[~mask], target[~mask] = math.nan, 0
    assert details(pred, target, mask) == first == details(pred, target)


def test_images_with_many_holes_leave_the_spectrum_alone():
    target = tensor(rooms(6))
    pred = target + tensor(rooms(7)) / 10
    holes = torch.ones_like(target, dtype=torch.bool)
    holes[1, :, :4] = False
    assert details(pred, target, holes)["spectrum"] == pytest.approx(details(pred[::2], target[::2])["spectrum"])


def test_batches_and_merged_parts_give_the_same_numbers():
    target = tensor(rooms(8, n=5))
    pred = target * 1.03
    parts, rest = Details(), Details()
    parts.update(pred[:1], target[:1])
    rest.update(pred[1:3], target[1:3])
    rest.update(pred[3:], target[3:])
    before = rest.compute()
    parts.merge(rest)
    expected = details(pred, target)
    for found in (parts.compute(), expected):
        assert found.pop("spectrum") == pytest.approx([1.03**2] * 5)
        found.pop("spectrum_high")
        found["residuals"] = found["residuals"]["counts"]
    assert parts.compute()["images"] == 5 and before["images"] == 4 == rest.compute()["images"]
    counts = expected.pop("residuals")
    found = parts.compute()
    assert found["residuals"]["counts"] == counts
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_nothing_seen_is_undefined_and_everything_fits_json():
    for empty in (Details().compute(), details(torch.ones(1, 1, 8, 9), torch.zeros(1, 1, 8, 9))):
        assert empty["images"] == 0 and all(empty[key] is None for key in NUMBERS)
        assert sum(empty["residuals"]["counts"]) == 0
    assert json.loads(json.dumps(empty, allow_nan=False)) == empty


def test_a_prediction_that_is_not_a_number_shows():
    target = torch.full((1, 1, 40, 50), 3.0)
    pred = target.clone()
    pred[..., 3, 4] = math.nan
    found = details(pred, target)
    assert found["gradient_ratio"] is None
    assert found["share_10cm"] == 1 - 1 / 2000 and found["residuals"]["counts"][-1] == 1
    json.dumps(found, allow_nan=False)


def test_bad_arguments_are_refused():
    depth = torch.ones(1, 1, 8, 9)
    for pred, target, mask in (
        (depth, depth[..., 1:], None),
        (depth[0], depth[0], None),
        (depth.int(), depth.int(), None),
        (depth, depth, depth),
    ):
        with pytest.raises(ValueError):
            Details().update(pred, target, mask)


def test_the_residual_edges_are_the_shares_limits_too():
    assert {0.01, 0.1, 1.0, 10.0} < set(RESIDUALS) and RESIDUALS[0] == 0.001


def test_distances_are_cut_at_ten_pixels():
    edges = torch.zeros(1, 1, 5, 40, dtype=torch.bool)
    edges[..., 2, 0] = True
    expected = np.minimum(np.hypot(*np.mgrid[-2:3, 0:40]), 10)
    np.testing.assert_allclose(edge_distance(edges)[0, 0].numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(("holes", "counts"), [(10, True), (11, False)])
def test_a_map_with_more_than_a_twentieth_of_holes_is_left_out_of_the_spectrum(holes, counts):
    target = tensor(rooms(5, n=1, size=(10, 20)))
    valid = torch.ones_like(target, dtype=torch.bool)
    valid.view(-1)[:holes] = False
    assert (details(target, target, valid)["spectrum_high"] is not None) == counts


def test_of_two_equal_jumps_side_by_side_one_is_the_edge():
    log_depth = torch.tensor([-1.0] * 15 + [0.0] + [1.0] * 15, dtype=torch.float64)
    depth = log_depth.exp().expand(1, 1, 9, 31)
    assert (depth_edges(depth, torch.ones_like(depth, dtype=torch.bool)).sum(-1) == 1).all()


def test_an_error_on_the_border_of_two_bins_is_in_the_upper_one():
    counts = details(torch.full((1, 1, 2, 2), 2.0), torch.full((1, 1, 2, 2), 1.0))["residuals"]["counts"]
    assert counts[RESIDUALS.index(1.0)] == 4 == sum(counts)

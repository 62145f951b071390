"""Metrics against NumPy float64 written from their definitions; protocols against hand-made frames."""

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from d3lib.errors import UserError
from d3lib.metrics import CROPS, KEYS, DepthMetrics, Protocol, image_sums, summarise


def oracle(y_hat, y):
    """Every metric of some pixels: 1-d float64 arrays in metres."""
    clamped, clamped_hat = np.maximum(y, 1e-3), np.maximum(y_hat, 1e-3)
    d = np.log(clamped) - np.log(clamped_hat)
    ratio = np.maximum(clamped / clamped_hat, clamped_hat / clamped)
    return {
        "rel": np.mean(np.abs(y_hat - y) / y),
        "sq_rel": np.mean((y_hat - y) ** 2 / y),
        "log10": np.mean(np.abs(np.log10(clamped) - np.log10(clamped_hat))),
        "rms": np.sqrt(np.mean((y_hat - y) ** 2)),
        "rmslog": np.sqrt(np.mean(d**2)),
        "silog": 100 * np.sqrt(max(0.0, np.mean(d**2) - np.mean(d) ** 2)),
        "d1": np.mean(ratio < 1.25),
        "d2": np.mean(ratio < 1.25**2),
        "d3": np.mean(ratio < 1.25**3),
    }


def pooled_and_per_image(pred, target, mask):
    """The same for images (B, H, W): over all pixels, and averaged over the images that have any."""
    pooled = oracle(pred[mask], target[mask])
    each = [oracle(p[m], t[m]) for p, t, m in zip(pred, target, mask, strict=True) if m.any()]
    return {"pooled": pooled, "per_image": {key: np.mean([e[key] for e in each]) for key in KEYS}}


def images(seed, shape=(5, 12, 16), holes=0.3):
    rng = np.random.default_rng(seed)
    target = rng.uniform(0.4, 10, shape)
    pred = target * np.exp(rng.normal(0, 0.3, shape) + rng.normal(0, 0.2, (shape[0], 1, 1)))
    return pred, target, rng.random(shape) >= holes


def tensors(*arrays, dtype=torch.float64):
    return [torch.from_numpy(a)[:, None].to(torch.bool if a.dtype == bool else dtype) for a in arrays]


def assert_same(found, expected, **tolerance):
    for kind in ("pooled", "per_image"):
        assert tuple(found[kind]) == KEYS
        assert found[kind] == pytest.approx(expected[kind], **({"rel": 1e-10, "abs": 1e-12} | tolerance))


@pytest.mark.parametrize("holes", [0.0, 0.4, 0.99])
def test_metrics_equal_their_definitions_in_numpy(holes):
    for seed in range(4):
        pred, target, mask = images(seed, holes=holes)
        metrics = DepthMetrics()
        metrics.update(*tensors(pred, target, mask))
        assert_same(metrics.compute(), pooled_and_per_image(pred, target, mask), abs=1e-6)  # silog of one pixel


def test_batches_of_any_size_and_merged_parts_give_the_same_numbers():
    pred, target, mask = tensors(*images(1, shape=(9, 10, 11)))
    whole, parts, left, right = (DepthMetrics() for _ in range(4))
    whole.update(pred, target, mask)
    for i, n in ((0, 1), (1, 4), (5, 4)):
        parts.update(pred[i : i + n], target[i : i + n], mask[i : i + n])
    left.update(pred[:3], target[:3], mask[:3])
    right.update(pred[3:], target[3:], mask[3:])
    left.merge(right)
    assert_same(parts.compute(), whole.compute())
    assert_same(left.compute(), whole.compute())
    assert right.counts["images"] == 6, "merging leaves the other one as it was"


def test_reset_forgets_everything():
    metrics = DepthMetrics()
    metrics.update(*tensors(*images(2)))
    metrics.reset()
    assert metrics.counts == {"images": 0, "skipped": 0, "pixels": 0}


def test_nothing_seen_gives_nan_for_every_key():
    for metrics in (DepthMetrics(), DepthMetrics()):
        for row in metrics.compute().values():
            assert tuple(row) == KEYS and all(math.isnan(value) for value in row.values())
        metrics.update(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4), torch.zeros(2, 1, 3, 4, dtype=torch.bool))
        assert all(math.isnan(value) for row in metrics.compute().values() for value in row.values())


def test_images_without_a_valid_pixel_are_skipped_and_counted():
    pred, target, mask = images(3)
    mask[1] = mask[4] = False
    metrics = DepthMetrics()
    metrics.update(*tensors(pred, target, mask))
    assert_same(metrics.compute(), pooled_and_per_image(pred, target, mask))
    assert metrics.counts == {"images": 3, "skipped": 2, "pixels": int(mask.sum())}


def test_targets_that_are_no_depth_never_count():
    pred, target, _ = tensors(*images(4))
    mask = torch.ones_like(target, dtype=torch.bool)
    target[0, 0, 0, :4] = torch.tensor([0.0, -1.0, float("nan"), float("inf")])
    mask[1, 0, 2, 2], pred[1, 0, 2, 2] = False, float("nan")
    metrics = DepthMetrics()
    metrics.update(pred, target, mask)
    assert metrics.counts["pixels"] == target.numel() - 5
    assert all(math.isfinite(value) for row in metrics.compute().values() for value in row.values())


def test_a_nan_prediction_on_a_valid_pixel_shows():
    pred, target, mask = tensors(*images(5, holes=0))
    pred[0, 0, 0, 0] = float("nan")
    metrics = DepthMetrics()
    metrics.update(pred, target, mask)
    assert math.isnan(metrics.compute()["pooled"]["rms"])


def test_thresholds_are_strict():
    target = torch.ones(1, 1, 1, 4, dtype=torch.float64)
    pred = torch.tensor([1.25, 1.25**2, 1.25**3, 1 / 1.24], dtype=torch.float64).view(1, 1, 1, 4)
    metrics = DepthMetrics()
    metrics.update(pred, target)
    row = metrics.compute()["pooled"]
    assert (row["d1"], row["d2"], row["d3"]) == (1 / 4, 2 / 4, 3 / 4)


def test_silog_is_100_times_the_standard_deviation_of_log_errors_and_ignores_scale():
    pred, target, mask = images(6, shape=(1, 20, 20))
    d = (np.log(target) - np.log(pred))[mask]
    for factor in (1.0, 2.5):
        metrics = DepthMetrics()
        metrics.update(*tensors(pred * factor, target, mask))
        assert metrics.compute()["pooled"]["silog"] == pytest.approx(100 * np.std(d))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_with_equal_counts_only_the_roots_differ_and_pooled_is_the_larger(seed):
    pred, target, _ = tensors(*images(seed, shape=(4, 5, 6), holes=0))
    metrics = DepthMetrics()
    metrics.update(pred, target)
    pooled, per_image = metrics.compute().values()
    for key in ("rel", "sq_rel", "log10", "d1", "d2", "d3"):
        assert pooled[key] == pytest.approx(per_image[key])
    for key in ("rms", "rmslog", "silog"):
        assert pooled[key] > per_image[key] - 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)))
def test_extreme_depths_agree_with_numpy_in_every_type(dtype, data, shape):
    depths = st.one_of(st.sampled_from([1e-6, 1e-3, 0.25, 1.0, 10.0, 1e4]), st.floats(2**-9, 1e4, width=32))
    pred = torch.from_numpy(data.draw(hnp.arrays(np.float64, shape, elements=depths)))[:, None].to(dtype)
    target = torch.from_numpy(data.draw(hnp.arrays(np.float64, shape, elements=depths)))[:, None].to(dtype)
    mask = data.draw(hnp.arrays(bool, shape)) & (target[:, 0].double().numpy() > 0)  # float16's 1e-8 is 0
    metrics = DepthMetrics()
    metrics.update(pred, target, torch.from_numpy(mask)[:, None])
    if mask.any():
        expected = pooled_and_per_image(pred[:, 0].double().numpy(), target[:, 0].double().numpy(), mask)
        assert_same(metrics.compute(), expected, abs=1e-4)  # silog of a pure error of scale: √ε


def test_ten_million_pixels_lose_no_precision():
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(1, 1, 2500, 4000, generator=generator) * 9 + 1
    pred = target + 0.1  # single-precision sums over 10^7 pixels would be off in the fourth digit
    metrics = DepthMetrics()
    metrics.update(pred, target)
    error = (pred.double() - target.double()).square().mean().sqrt().item()
    assert metrics.compute()["pooled"]["rms"] == pytest.approx(error, rel=1e-12)
    assert metrics.counts["pixels"] == 10**7


def test_sums_of_images_can_be_drawn_anew_for_a_bootstrap():
    pred, target, mask = images(7)
    drawn = [3, 3, 0, 4]
    sums = image_sums(*tensors(pred, target, mask))
    assert_same(summarise(sums[drawn]), pooled_and_per_image(pred[drawn], target[drawn], mask[drawn]))


def test_updating_keeps_no_graph():
    pred, target, mask = tensors(*images(8))
    metrics = DepthMetrics()
    metrics.update(pred.requires_grad_(), target, mask)
    assert not metrics.sums.requires_grad and metrics.sums.dtype == torch.float64


def test_bad_shapes_and_types_are_refused_with_a_clear_line():
    depth = torch.ones(2, 1, 4, 5)
    for arguments in [
        (depth, depth[:1]),
        (depth, depth, torch.ones(2, 1, 4, 4, dtype=torch.bool)),
        (depth, depth, torch.ones_like(depth)),
        (depth.to(torch.uint8), depth),
    ]:
        with pytest.raises(ValueError, match="must"):
            DepthMetrics().update(*arguments)


def frame(batch=1):
    """A 480x640 frame whose every pixel is different and within range."""
    return 1 + torch.arange(batch * 480 * 640, dtype=torch.float64).view(batch, 1, 480, 640) / (batch * 480 * 640)


@pytest.mark.parametrize(
    ("crop", "size", "corner"),
    [
        ("none", (480, 640), (0, 0)),
        ("toolbox", (427, 561), (44, 40)),
        ("eigen_bts", (426, 560), (45, 41)),
        ("dorn", (440, 592), (20, 24)),
    ],
)
def test_a_crop_keeps_its_region_of_prediction_target_and_mask(crop, size, corner):
    target = frame(2)
    pred, cut, mask = Protocol(crop=crop).apply(target + 1, target)
    assert pred.shape == cut.shape == mask.shape == (2, 1, *size)
    assert cut[0, 0, 0, 0] == target[0, 0, corner[0], corner[1]]
    assert cut[0, 0, -1, -1] == target[0, 0, corner[0] + size[0] - 1, corner[1] + size[1] - 1]
    assert torch.equal(pred, cut + 1) and mask.all()


def test_eigens_crop_lies_inside_the_toolboxs_and_both_inside_dorns_columns():
    rows, columns = zip(*(CROPS[name] for name in ("eigen_bts", "toolbox")), strict=True)
    assert rows[0].start == rows[1].start + 1 and columns[0].start == columns[1].start + 1
    assert rows[0].stop == rows[1].stop and columns[0].stop == columns[1].stop


def test_a_crop_is_refused_for_frames_of_another_size():
    depth = torch.ones(1, 1, 427, 561)
    with pytest.raises(UserError, match="480x640.*427x561"):
        Protocol(crop="eigen_bts").apply(depth, depth)
    with pytest.raises(UserError, match="480x640.*240x320"):
        Protocol(crop="dorn", size="network").apply(torch.ones(1, 1, 240, 320), frame())


def test_predictions_are_clamped_and_targets_out_of_range_do_not_count():
    target = torch.tensor([0.0, 1e-3, 0.5, 9.99, 10.0, float("nan")]).view(1, 1, 1, 6)
    pred = torch.tensor([5.0, -1.0, 1e-5, 12.0, 5.0, 5.0]).view(1, 1, 1, 6)
    valid = torch.ones_like(target, dtype=torch.bool)
    pred, _, mask = Protocol().apply(pred, target, valid)
    assert mask.flatten().tolist() == [False, False, True, True, False, False]
    assert pred.flatten().tolist() == pytest.approx([5.0, 1e-3, 1e-3, 10.0, 5.0, 5.0])


def test_the_prediction_is_brought_to_the_targets_size_bilinearly():
    rows = torch.linspace(1, 5, 8).view(1, 1, 8, 1).expand(1, 1, 8, 10)
    target = torch.full((1, 1, 32, 40), 2.0)
    pred, same, mask = Protocol().apply(rows, target)
    assert pred.shape == same.shape == mask.shape == (1, 1, 32, 40)
    inner = pred[0, 0, 4:-4, 0]
    assert torch.allclose(inner.diff(), torch.full((23,), 4 / 7 / 4), atol=1e-5)


def test_at_network_size_the_target_and_its_holes_are_picked_never_mixed():
    target = torch.rand(1, 1, 32, 40, generator=torch.Generator().manual_seed(0)) + 1
    valid = torch.rand(1, 1, 32, 40, generator=torch.Generator().manual_seed(1)) > 0.5
    target = torch.where(valid, target, 0)
    pred, small, mask = Protocol(size="network").apply(torch.ones(1, 1, 8, 10), target, valid)
    assert pred.shape == small.shape == mask.shape == (1, 1, 8, 10)
    assert set(small[mask].tolist()) <= set(target[valid].tolist())
    assert torch.equal(mask, small > 0)


def test_a_protocol_is_frozen_and_checks_itself():
    with pytest.raises(FrozenInstanceError):
        Protocol().crop = "dorn"
    for options, words in [
        ({"crop": "eigen"}, "none, toolbox, eigen_bts, dorn"),
        ({"size": "half"}, "target, network"),
        ({"min_depth": 0.0}, "min_depth"),
        ({"max_depth": 1e-4}, "max_depth"),
    ]:
        with pytest.raises(UserError, match=words):
            Protocol(**options)


def test_the_sums_of_an_image_are_those_of_its_pixels_by_hand():
    target, pred = torch.tensor([4.0, 2.0, 3.0]), torch.tensor([2.0, 2.2, 9.0])
    mask = torch.tensor([True, True, False])
    found = image_sums(*(x.view(1, 1, 1, 3) for x in (pred, target, mask)))[0].tolist()
    d = [math.log(4 / 2), math.log(2 / 2.2)]  # ln y - ln y_hat: positive where the prediction is too near
    squares = [2.0**2, 0.2**2, d[0] ** 2 + d[1] ** 2]
    expected = [2, 0.5 + 0.1, squares[0] / 4 + squares[1] / 2, (d[0] - d[1]) / math.log(10), squares[0] + squares[1]]
    assert found == pytest.approx([*expected, squares[2], sum(d), 1, 1, 1], rel=1e-6)


def test_at_network_size_the_target_is_the_pixel_in_the_middle():
    numbers = torch.arange(9.0 * 15).view(1, 1, 9, 15)  # each 3 x 3 pixels of it become one
    _, small, _ = Protocol(size="network", max_depth=1e3).apply(torch.ones(1, 1, 3, 5), numbers)
    assert torch.equal(small, numbers[..., 1::3, 1::3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_prediction_is_widened_before_it_is_resized(dtype):
    pred = (torch.rand(1, 1, 8, 10, generator=torch.Generator().manual_seed(0)) + 5).to(dtype)
    target = torch.full((1, 1, 32, 40), 2.0)
    narrow, exact = (Protocol().apply(x, target)[0] for x in (pred, pred.double()))
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), exact, rtol=1e-6, atol=0)

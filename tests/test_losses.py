"""Losses against NumPy float64 written from Table 1, pixel by pixel where that is clearer, and their promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from d3lib import losses
from d3lib.errors import UserError
from d3lib.losses import LABELS, LOSSES, VARIANTS, build_loss

NAMES = list(VARIANTS["paper"])
EVERY = [(name, variant) for variant in VARIANTS for name in NAMES]
every_loss = pytest.mark.parametrize(("name", "variant"), EVERY, ids=[f"{n}-{v}" for n, v in EVERY])


def oracle(name, variant, pred, target, mask, lam=None, pooled=False):
    """Table 1 in NumPy float64: arrays (B, H, W)."""
    images = list(zip(pred, target, mask, strict=True))
    valid_l = np.concatenate([t[m] - p[m] for p, t, m in images])
    c = 0.2 * np.abs(valid_l).max(initial=0)

    def logs(p, t):
        return np.log(np.maximum(t, 1e-3)) - np.log(np.maximum(p, 1e-3))

    def average(values):
        return float(np.mean(values)) if len(values) else 0.0

    if name == "l1":
        return average(np.abs(valid_l))
    if name == "l2":
        return average(valid_l**2)
    if name == "berhu":
        return average([e if e <= c else (e * e + c * c) / (2 * c) for e in np.abs(valid_l)])
    if name == "huber" and variant == "paper":
        return average([e if e >= c else (e * e + c * c) / (2 * c) for e in np.abs(valid_l)])
    if name == "huber":
        return average([e * e / 2 if e <= c else c * (e - c / 2) for e in np.abs(valid_l)])
    if name == "eigen" and variant == "released":
        return average(np.concatenate([logs(p[m], t[m]) ** 2 for p, t, m in images]))
    if name == "eigengrad" and variant == "released":
        terms = []
        sobel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
        for p, t, m in images:
            m = m & (t > 0.5)
            d = np.pad(np.where(m, logs(np.where(m, p, 1), np.where(m, t, 1)), 0), 1)
            for i, j in np.argwhere(m):
                window = d[i : i + 3, j : j + 3]
                terms.append(d[i + 1, j + 1] ** 2 + (window * sobel).sum() ** 2 + (window * sobel.T).sum() ** 2)
        return average(terms)
    lam = {"eigen": 0.5, "eigengrad": 1.0}[name] if lam is None else lam
    parts = []  # N, sum d², sum d, sum of squared gradients, for each image
    for p, t, m in images:
        d = logs(np.where(m, p, 1), np.where(m, t, 1))
        gradient = 0.0
        for i, j in np.argwhere(m):
            if j + 1 < m.shape[1] and m[i, j + 1]:
                gradient += (d[i, j + 1] - d[i, j]) ** 2
            if i + 1 < m.shape[0] and m[i + 1, j]:
                gradient += (d[i + 1, j] - d[i, j]) ** 2
        parts.append((m.sum(), (d[m] ** 2).sum(), d[m].sum(), gradient))
    parts = [np.sum(parts, axis=0)] if pooled else [part for part in parts if part[0]]
    if name == "eigen":
        return average([s2 / n - lam / n**2 * s1**2 for n, s2, s1, _ in parts if n])
    return average([s2 / n - lam / (2 * n**2) * s1**2 + g / n for n, s2, s1, g in parts if n])


def batch(seed, shape=(3, 6, 7), low=0.2, high=10.0, holes=0.3):
    rng = np.random.default_rng(seed)
    pred, target = rng.uniform(low, high, (2, *shape))
    return pred, target, rng.random(shape) >= holes


def tensors(*arrays, dtype=torch.float64):
    return [torch.from_numpy(a)[:, None].to(torch.bool if a.dtype == bool else dtype) for a in arrays]


@every_loss
@pytest.mark.parametrize("holes", [0.0, 0.3, 0.95])
def test_a_loss_equals_its_equation_in_numpy(name, variant, holes):
    for seed in range(5):
        pred, target, mask = batch(seed, holes=holes)
        value = build_loss(name, variant)(*tensors(pred, target, mask))
        assert value.dtype == torch.float64
        assert value.item() == pytest.approx(oracle(name, variant, pred, target, mask), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", ["eigen", "eigengrad"])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.85, 1.0])
def test_lambda_and_pooling_are_those_of_the_equation(name, pooled, lam):
    pred, target, mask = batch(7)
    value = build_loss(name, lam=lam, pooled=pooled)(*tensors(pred, target, mask)).item()
    assert value == pytest.approx(oracle(name, "paper", pred, target, mask, lam, pooled), rel=1e-12)


@every_loss
def test_without_a_mask_every_pixel_counts(name, variant):
    pred, target, _ = batch(1)
    loss = build_loss(name, variant)
    full = torch.ones(3, 1, 6, 7, dtype=torch.bool)
    assert torch.equal(loss(*tensors(pred, target)), loss(*tensors(pred, target), full))


@every_loss
def test_float32_agrees_with_float64(name, variant):
    pred, target, mask = batch(2, shape=(4, 48, 64))
    exact = build_loss(name, variant)(*tensors(pred, target, mask)).item()
    assert build_loss(name, variant)(*tensors(pred, target, mask, dtype=torch.float32)).item() == pytest.approx(
        exact, rel=2e-6
    )


@every_loss
def test_gradients_are_those_of_finite_differences(name, variant):
    pred, target, mask = tensors(*batch(3, shape=(2, 4, 5), low=0.6))
    options = {"c": 2.0} if name in ("berhu", "huber") else {}  # a c that does not move with the largest error
    loss = build_loss(name, variant, **options)
    assert torch.autograd.gradcheck(lambda p: loss(p, target, mask), pred.requires_grad_(), eps=1e-7)


@pytest.mark.parametrize(("name", "variant"), [("berhu", "paper"), ("huber", "paper"), ("huber", "released")])
def test_c_is_a_fifth_of_the_largest_valid_error_of_the_batch_and_has_no_gradient(name, variant):
    pred, target, mask = tensors(*batch(4))
    c = 0.2 * (pred - target)[mask].abs().max().item()
    moving, fixed = build_loss(name, variant), build_loss(name, variant, c=c)
    pred.requires_grad_()
    (a,) = torch.autograd.grad(moving(pred, target, mask), pred)
    (b,) = torch.autograd.grad(fixed(pred, target, mask), pred)
    assert torch.equal(a, b)


def test_huber_of_the_paper_is_the_classic_one_divided_by_c_plus_half_c():
    pred, target, _ = tensors(*batch(5))
    for c in (0.3, 1.0, 4.0):
        classic = torch.nn.functional.huber_loss(pred, target, delta=c)
        paper, released = build_loss("huber", c=c), build_loss("huber", "released", c=c)
        torch.testing.assert_close(paper(pred, target), classic / c + c / 2)
        torch.testing.assert_close(released(pred, target), classic)


def test_berhu_is_the_same_in_both_variants_and_at_least_l1():
    pred, target, mask = tensors(*batch(6))
    assert build_loss("berhu")(pred, target, mask) == build_loss("berhu", "released")(pred, target, mask)
    assert build_loss("berhu")(pred, target, mask) >= build_loss("l1")(pred, target, mask)


def test_eigen_with_lambda_1_ignores_the_scale_of_each_single_image():
    pred, target, mask = tensors(*batch(8, shape=(4, 12, 16)))
    scaled = pred.clone()
    scaled[1] *= 1.7
    loss = build_loss("eigen", lam=1.0)
    torch.testing.assert_close(loss(scaled, target, mask), loss(pred, target, mask))
    pooled = build_loss("eigen", lam=1.0, pooled=True)
    assert abs(pooled(scaled, target, mask) - pooled(pred, target, mask)) > 1e-3


def test_pooling_over_a_batch_of_8_shrinks_the_second_term_to_about_an_eighth():
    target = torch.full((8, 1, 30, 40), 3.0, dtype=torch.float64)
    shrink = []
    for draw in range(200):  # images whose errors of scale are independent
        scales = torch.randn(8, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(draw))
        pred = target * (0.2 * scales).exp()
        log_mse = build_loss("eigen", lam=0.0)(pred, target)
        second = [log_mse - build_loss("eigen", lam=1.0, pooled=p)(pred, target) for p in (True, False)]
        shrink.append(second[0] / second[1])
    assert torch.stack(shrink).mean().item() == pytest.approx(1 / 8, rel=0.25)


def test_eigen_averages_over_the_images_that_have_a_valid_pixel():
    pred, target, mask = tensors(*batch(9))
    mask[1] = False
    loss = build_loss("eigen")
    one_by_one = [loss(pred[i : i + 1], target[i : i + 1], mask[i : i + 1]) for i in (0, 2)]
    torch.testing.assert_close(loss(pred, target, mask), torch.stack(one_by_one).mean())


def test_eigen_as_released_is_the_mean_square_log_error():
    pred, target, mask = tensors(*batch(10))
    log_mse = torch.nn.functional.mse_loss(pred[mask].log(), target[mask].log())
    torch.testing.assert_close(build_loss("eigen", "released")(pred, target, mask), log_mse)


def test_eigengrad_as_released_ignores_depths_up_to_half_a_metre():
    pred, target, mask = tensors(*batch(11))
    target[0, 0, 0, :4] = torch.tensor([0.5, 0.3, 0.1, 0.49])
    loss = build_loss("eigengrad", "released")
    changed = pred.clone()
    changed[0, 0, 0, :4] = 9.0
    assert loss(pred, target, mask) == loss(changed, target, mask)


@every_loss
def test_an_empty_mask_gives_zero_with_zero_gradients_still_on_the_graph(name, variant):
    pred, target, mask = tensors(*batch(12), dtype=torch.float32)
    pred.requires_grad_()
    value = build_loss(name, variant)(pred, target, torch.zeros_like(mask))
    assert value.item() == 0 and value.requires_grad
    value.backward()
    assert torch.equal(pred.grad, torch.zeros_like(pred))


@every_loss
@pytest.mark.parametrize("value", [0.0, 1e-3, 1.0, 1e4])
def test_a_perfect_prediction_costs_nothing_and_has_finite_gradients(name, variant, value):
    pred = torch.full((2, 1, 5, 6), value, requires_grad=True)
    loss = build_loss(name, variant)(pred, pred.detach().clone())
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(pred.grad).all()


@every_loss
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), 0.0, -1.0])
def test_invalid_pixels_contribute_nothing_whatever_they_hold(name, variant, junk):
    pred, target, mask = tensors(*batch(13), dtype=torch.float32)
    loss = build_loss(name, variant)
    clean = pred.clone().requires_grad_()
    loss(clean, target, mask).backward()
    dirty = torch.where(mask, pred, junk).requires_grad_()
    value = loss(dirty, torch.where(mask, target, junk), mask)
    value.backward()
    assert value == loss(pred, target, mask)
    assert torch.equal(dirty.grad, clean.grad)
    assert (dirty.grad[~mask] == 0).all()


extremes = st.one_of(
    st.sampled_from([0.0, -0.0, 1e-6, 1e-3, 0.00100040435791015625, 0.5, 1.0, 10.0, 1e4, -1e4]),
    st.floats(-1e4, 1e4, width=32),
)
shapes = st.tuples(st.integers(1, 3), st.just(1), st.integers(1, 5), st.integers(1, 5))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=40, deadline=None)
@given(data=st.data(), shape=shapes)
def test_values_and_gradients_are_finite_up_to_1e4_metres_in_every_type(name, variant, dtype, data, shape):
    pred = torch.from_numpy(data.draw(hnp.arrays(np.float64, shape, elements=extremes))).to(dtype)
    target = torch.from_numpy(data.draw(hnp.arrays(np.float64, shape, elements=extremes))).to(dtype)
    mask = torch.from_numpy(data.draw(hnp.arrays(bool, shape)))
    pred.requires_grad_()
    value = build_loss(name, variant)(pred, target, mask)
    value.backward()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.isfinite(value) and torch.isfinite(pred.grad).all()
    pred, target, mask = (x.detach().double().numpy()[:, 0] for x in (pred, target, mask))
    rounding = 1e-6 * {"l1": 2e4, "berhu": 5e4, "l2": 4e8, "huber": 4e8}.get(name, 1e3)  # 1e-6 of the largest
    exact = oracle(name, variant, pred, target, mask.astype(bool))
    assert value.item() == pytest.approx(exact, rel=1e-5, abs=rounding)


@every_loss
def test_an_isolated_worst_pixel_has_a_finite_gradient_even_in_float16(name, variant):
    pred = torch.full((1, 1, 3, 3), 1e4, dtype=torch.float16)
    target = torch.full((1, 1, 3, 3), 1e-3, dtype=torch.float16)
    pred[0, 0, 1, 1], target[0, 0, 1, 1] = target[0, 0, 0, 0].item(), 1e4
    cross = torch.tensor([[0, 1, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.bool).expand(1, 1, 3, 3)
    pred.requires_grad_()
    build_loss(name, variant)(pred, target, cross).backward()
    assert torch.isfinite(pred.grad).all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(name, variant, dtype):
    pred, target, mask = tensors(*batch(14), dtype=torch.float32)
    loss = build_loss(name, variant)
    outside = loss(pred, target, mask)
    with torch.autocast("cpu", dtype=dtype):
        inside = loss(pred, target, mask)
        narrow = loss(pred.to(dtype), target, mask)
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)
    assert torch.equal(narrow, loss(pred.to(dtype).float(), target, mask))


@every_loss
def test_the_gradient_of_a_narrow_prediction_comes_back_narrow(name, variant):
    pred, target, mask = tensors(*batch(15), dtype=torch.float32)
    narrow = pred.bfloat16().requires_grad_()
    build_loss(name, variant)(narrow, target, mask).backward()
    assert narrow.grad.dtype == torch.bfloat16 and narrow.grad.abs().sum() > 0


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_gradient_beyond_float16_saturates_on_both_sides(sign):
    pred = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float16, requires_grad=True)
    (1e6 * build_loss("l1")(pred, torch.full((1, 1, 1, 1), 2.0 - sign))).backward()
    assert pred.grad.item() == sign * 65504  # float16's largest number


@every_loss
def test_a_million_pixels_in_float32_agree_with_float64(name, variant):
    pred, target, mask = (torch.from_numpy(a)[:, None] for a in batch(16, shape=(1, 1000, 1000), low=0.6))
    loss = build_loss(name, variant)
    assert loss(pred.float(), target.float(), mask).item() == pytest.approx(loss(pred, target, mask).item(), rel=1e-5)


def test_bad_shapes_and_types_are_refused_with_a_clear_line():
    pred = torch.ones(2, 1, 4, 5)
    for arguments in [
        (pred, torch.ones(2, 1, 5, 4)),
        (pred[:, 0], pred[:, 0]),
        (torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4, 5)),
        (pred[:0], pred[:0]),
        (pred, pred, torch.ones(2, 1, 4, 4, dtype=torch.bool)),
        (pred, pred, torch.ones(2, 1, 4, 5)),
        (pred.long(), pred),
    ]:
        with pytest.raises(ValueError, match="must"):
            build_loss("l1")(*arguments)


def test_unknown_names_variants_and_options_are_refused_and_the_known_ones_listed():
    with pytest.raises(UserError, match="l1, l2, eigen, eigengrad, berhu, huber"):
        build_loss("l3")
    with pytest.raises(UserError, match="generator_loss"):
        build_loss("gan")
    with pytest.raises(UserError, match="paper, released"):
        build_loss("l1", "draft")
    with pytest.raises(UserError, match="lam, pooled"):
        build_loss("eigen", lamda=1.0)
    with pytest.raises(UserError, match="no option lam"):
        build_loss("eigen", "released", lam=1.0)
    with pytest.raises(UserError, match="paper, released"):
        losses.generator_loss(torch.zeros(1), "draft")


def test_the_seven_losses_stand_in_the_papers_order_and_have_labels():
    assert LOSSES == ("l1", "l2", "eigen", "eigengrad", "berhu", "huber", "gan")
    assert tuple(LABELS) == LOSSES and all(label.startswith("$") for label in LABELS.values())


def test_the_adversarial_losses_are_least_squares_with_their_halves():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(2, 3, 1, 5, 6))
    a, b = torch.from_numpy(real), torch.from_numpy(fake)
    discriminator = 0.5 * np.mean((real - 1) ** 2) + 0.5 * np.mean(fake**2)
    assert losses.discriminator_loss(a, b).item() == pytest.approx(discriminator)
    assert losses.generator_loss(b).item() == pytest.approx(0.5 * np.mean((fake - 1) ** 2))
    assert losses.generator_loss(b, "released").item() == pytest.approx(np.mean((fake - 1) ** 2))
    assert losses.generator_loss(b.bfloat16()).dtype == torch.float32
    assert losses.L1_WEIGHT == 100 / 5


def test_the_discriminator_sees_the_same_holes_in_true_and_predicted_depth():
    generator = torch.Generator().manual_seed(0)
    true, predicted = (10 * torch.rand(2, 1, 8, 9, generator=generator) for _ in range(2))
    rgb, mask = torch.rand(2, 3, 8, 9, generator=generator), torch.rand(2, 1, 8, 9, generator=generator) > 0.4
    true = torch.where(mask, true, float("nan"))
    real, fake = (losses.discriminator_input(depth, rgb, mask) for depth in (true, predicted))
    assert real.shape == (2, 4, 8, 9)
    holes = ~mask.expand(-1, 4, -1, -1)
    assert (real[holes] == 0).all() and (fake[holes] == 0).all()
    assert torch.equal(real[:, 1:], fake[:, 1:])
    torch.testing.assert_close(real[:, :1][mask], true[mask] / 5 - 1)
    torch.testing.assert_close(real[:, 1:][~holes[:, 1:]], (2 * rgb - 1)[~holes[:, 1:]])
    ends = torch.tensor([[[[0.0, 1.0]]]])
    scaled = losses.discriminator_input(10 * ends, ends.expand(1, 3, 1, 2), torch.ones_like(ends).bool())
    assert torch.equal(scaled, torch.tensor([-1.0, 1.0]).expand(1, 4, 1, 2))
    near = losses.discriminator_input(4 * ends, ends.expand(1, 3, 1, 2), torch.ones_like(ends).bool(), max_depth=4.0)
    assert torch.equal(near, scaled)


def test_losses_can_be_pickled_for_worker_processes():
    import pickle

    pred, target, mask = tensors(*batch(17))
    loss = build_loss("eigen", lam=0.3)
    assert pickle.loads(pickle.dumps(loss))(pred, target, mask) == loss(pred, target, mask)

"""What a network must beat: each baseline learns what it may see, and sees no more."""

import numpy as np
import pytest
import torch

from d3lib import baselines
from d3lib.baselines import BASELINES, CoordinateNet, PatchNet, fit_baseline
from d3lib.errors import UserError


def dataset(seed=0, count=12, size=(24, 32)):
    """Pictures with a bright square that is near on a far wall; the wall is nearer at the bottom. Holes hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    rgb = 0.2 * torch.rand(count, 3, *size, generator=generator)
    depth = torch.linspace(8, 4, size[0]).view(1, 1, -1, 1).repeat(count, 1, 1, size[1])
    for i in range(count):
        row, column = (int(torch.randint(0, n - 8, (1,), generator=generator)) for n in size)
        rgb[i, :, row : row + 8, column : column + 8] += 0.7
        depth[i, :, row : row + 8, column : column + 8] = 2.0
    valid = torch.rand(depth.shape, generator=generator) > 0.2
    return {"rgb": rgb, "depth": torch.where(valid, depth, float("nan")), "valid": valid}


def passes(data, batch_size=4):
    """Batches of the data, in order; each call is a new pass."""
    return lambda: ({k: v[i : i + batch_size] for k, v in data.items()} for i in range(0, len(data["rgb"]), batch_size))


def rmse(predict, data):
    error = (predict(data["rgb"]) - data["depth"])[data["valid"]]
    return error.square().mean().sqrt().item()


@pytest.fixture(scope="module")
def fitted():
    data = dataset()
    return {name: fit_baseline(name, passes(data)) for name in BASELINES}


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_predicts_metres_at_the_pictures_size(fitted, name):
    for size in ((24, 32), (33, 47)):
        depth = fitted[name](torch.rand(3, 3, *size))
        assert depth.shape == (3, 1, *size) and depth.dtype == torch.float32 and not depth.requires_grad
        assert torch.isfinite(depth).all()


def test_the_constant_is_the_mean_of_the_valid_depths(fitted):
    data = dataset()
    mean = np.mean(data["depth"][data["valid"]].double().numpy())
    assert torch.allclose(fitted["constant"](data["rgb"]), torch.tensor(mean, dtype=torch.float32))


def test_the_mean_map_is_each_pixels_mean_and_the_constant_where_a_pixel_was_never_valid():
    data = dataset()
    data["valid"][:, :, 3, 5] = False
    found = fit_baseline("mean_map", passes(data))(data["rgb"][:1])[0, 0].numpy()
    depth, valid = data["depth"].double().numpy(), data["valid"].numpy()
    expected = np.nanmean(np.where(valid, depth, np.nan)[:, :, 4, 6])
    assert found[4, 6] == pytest.approx(expected, rel=1e-6)
    assert found[3, 5] == pytest.approx(depth[valid].mean(), rel=1e-6)


def test_nearest_gives_a_training_picture_its_own_depth_with_holes_filled_by_the_mean_map(fitted):
    data = dataset()
    depth = fitted["nearest"](data["rgb"])
    filled = torch.where(data["valid"], data["depth"], fitted["mean_map"](data["rgb"]))
    assert torch.allclose(depth, filled, atol=0.005)  # stored in half precision


def test_nearest_keeps_the_first_pictures_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(baselines, "LIBRARY", 6)
    data = dataset()
    depth = fit_baseline("nearest", passes(data))(data["rgb"])
    kept = fit_baseline("nearest", passes({k: v[:6] for k, v in data.items()}))
    assert torch.equal(depth[:6] > 3, kept(data["rgb"][:6]) > 3)


@pytest.mark.parametrize(("size", "field"), [(17, 17), (33, 33)])
def test_a_patch_network_sees_its_patch_and_no_more(size, field):
    net = PatchNet(size).double()
    for parameter in net.parameters():
        torch.nn.init.uniform_(parameter, 0.1, 1.0)  # all positive: no ReLU hides a pixel
    image = torch.rand(1, 3, 80, 80, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(image)[0, 0, 40, 40], image)
    seen = gradient.abs().sum((0, 1)) > 0
    assert seen.any(0).sum() == seen.any(1).sum() == field


@pytest.mark.parametrize("size", [17, 33])
def test_a_patch_network_cannot_tell_where_it_is(size):
    depth = PatchNet(size)(torch.full((1, 3, 48, 64), 0.3))
    assert torch.allclose(depth, depth[0, 0, 0, 0].expand_as(depth), atol=1e-6), "borders must not show"


def test_the_coordinate_network_sees_its_own_pixel_and_place():
    net, image = CoordinateNet(), torch.rand(1, 3, 20, 30).requires_grad_()
    (gradient,) = torch.autograd.grad(net(image)[0, 0, 7, 9], image)
    touched = gradient.abs().sum((0, 1)).nonzero()
    assert touched.tolist() in ([[7, 9]], [])
    flat = net(torch.full((1, 3, 20, 30), 0.3))
    assert flat.std() > 0


def test_each_baseline_that_sees_more_does_better_where_that_helps(fitted):
    test = dataset(seed=1)
    error = {name: rmse(predict, test) for name, predict in fitted.items()}
    assert error["mean_map"] < error["constant"]  # the wall's slope
    assert error["patch17"] < error["constant"]  # the square's brightness
    assert error["coordinates"] < 0.5 * error["mean_map"]  # both


def test_fitting_is_a_function_of_its_seed_and_leaves_torchs_generator_alone():
    data = dataset()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = (fit_baseline("patch17", passes(data), seed, 3)(data["rgb"]) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_unknown_names_and_training_sets_without_depth_are_refused():
    data = dataset()
    with pytest.raises(UserError, match="constant, mean_map, coordinates, patch17, patch33, nearest"):
        fit_baseline("median", passes(data))
    data["valid"] = torch.zeros_like(data["valid"])
    for name in BASELINES:
        with pytest.raises(UserError, match="no valid depth"):
            fit_baseline(name, passes(data))
    with pytest.raises(UserError, match="no valid depth"):
        fit_baseline("constant", lambda: iter(()))

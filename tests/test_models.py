"""Networks: parameter counts of the paper's code, shapes, ranges, weights, and that one batch can be learnt."""

import logging
import subprocess
import sys
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import nn

from d3lib._torchvision import import_torchvision
from d3lib.errors import UserError
from d3lib.models import ENCODERS, D3Net, PatchDiscriminator, count_parameters


@pytest.fixture(scope="module")
def tiny():
    return D3Net("tiny", seed=0).eval()


def picture(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_the_parameter_counts_are_those_of_the_papers_code():
    dense = D3Net("densenet121")
    assert count_parameters(dense) == 24_220_224
    assert round(count_parameters(dense.encoder) / 1e6, 2) == 7.02
    assert dense.decoder.last.bias is None
    assert round(count_parameters(D3Net("resnet50")) / 1e6, 1) == 91.2
    assert 0.1e6 < count_parameters(D3Net("tiny")) < 1e6
    assert count_parameters(PatchDiscriminator()) == 663_617


@pytest.mark.parametrize("encoder", ENCODERS)
def test_skips_and_decoder_meet_at_half_a_quarter_an_eighth_and_a_sixteenth(encoder):
    net = D3Net(encoder, seed=0).eval()
    with torch.no_grad():
        features = net.encoder(picture(1, 3, 64, 96))
        depth = net(picture(1, 3, 64, 96))
    assert [f.shape[1] for f in features] == net.encoder.channels
    assert [tuple(f.shape[2:]) for f in features] == [(64 // s, 96 // s) for s in (2, 4, 8, 16, 32)]
    assert depth.shape == (1, 1, 64, 96) and (0 < depth).all() and (depth < 10).all()


def test_densenets_encoder_is_the_one_of_the_facts():
    features = D3Net("densenet121").encoder.features
    assert [len(features.get_submodule(f"denseblock{i}")) for i in (1, 2, 3, 4)] == [6, 12, 24, 16]
    conv, norm, relu = features.pool0
    assert (conv.kernel_size, conv.stride, conv.padding, conv.bias) == ((4, 4), (2, 2), (1, 1), None)
    assert (conv.in_channels, conv.out_channels, norm.num_features) == (64, 64, 64)
    for leaky in (relu, features.relu0, features.relu5):
        assert isinstance(leaky, nn.LeakyReLU) and leaky.negative_slope == 0.2
    assert not any(isinstance(m, nn.MaxPool2d) for m in features.modules())


def test_a_decoder_block_is_a_transposed_convolution_and_a_convolution_each_normalised():
    decoder = D3Net("densenet121").decoder
    assert [block[0].in_channels for block in decoder.blocks] == [1024, 1024, 512, 256, 128]
    assert [block[0].out_channels for block in decoder.blocks] == [512, 256, 128, 64, 64]
    for up, norm1, relu1, conv, norm2, relu2 in decoder.blocks:
        assert (up.kernel_size, up.stride, up.padding) == ((4, 4), (2, 2), (1, 1)) and up.bias is not None
        assert conv.kernel_size == (3, 3) and conv.bias is None
        assert all(isinstance(m, nn.BatchNorm2d) for m in (norm1, norm2))
        assert all(isinstance(m, nn.ReLU) for m in (relu1, relu2))


def block_parameters(inputs, outputs):
    """A decoder block by hand: transposed 4x4 with bias, BN, 3x3 without bias, BN."""
    return 16 * inputs * outputs + outputs + 2 * outputs + 9 * outputs * outputs + 2 * outputs


def test_the_narrow_resnet_is_the_same_encoder_under_the_densenets_decoder():
    wide, narrow, dense = (D3Net(name) for name in ("resnet50", "resnet50_narrow", "densenet121"))
    assert count_parameters(narrow.encoder) == count_parameters(wide.encoder)
    assert [b[0].out_channels for b in narrow.decoder.blocks] == [b[0].out_channels for b in dense.decoder.blocks]
    shapes = [(2048, 512), (1024 + 512, 256), (512 + 256, 128), (256 + 128, 64), (64 + 64, 64)]
    assert count_parameters(narrow.decoder) == sum(block_parameters(*shape) for shape in shapes) + 9 * 64


@pytest.mark.parametrize("encoder", ["densenet121", "resnet50_narrow"])
def test_without_skips_a_block_sees_the_block_before_it_alone(encoder):
    net = D3Net(encoder, seed=0, skips=False).eval()
    deepest = net.encoder.channels[-1]
    shapes = [(deepest, 512), (512, 256), (256, 128), (128, 64), (64, 64)]
    assert count_parameters(net.decoder) == sum(block_parameters(*shape) for shape in shapes) + 9 * 64
    with torch.no_grad():
        *skips, deep = net.encoder(picture(1, 3, 32, 64))
        depth = net.decoder([*skips, deep])
        assert depth.shape == (1, 1, 32, 64)
        assert torch.equal(depth, net.decoder([*(torch.full_like(s, torch.nan) for s in skips), deep]))


@pytest.mark.parametrize("encoder", ["densenet121", "resnet50", "tiny"])
def test_max_pooling_halves_the_stem_by_torchvisions_own_and_without_weights(encoder):
    net, learned = D3Net(encoder, seed=0, pooling="max").eval(), D3Net(encoder, seed=0)
    stem = net.encoder.channels[0]
    assert count_parameters(learned) - count_parameters(net) == 16 * stem * stem + 2 * stem
    (pool,) = [module for module in net.encoder.modules() if isinstance(module, nn.MaxPool2d)]
    seen = []
    pool.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        assert net(picture(1, 3, 64, 96)).shape == (1, 1, 64, 96)
    ((before, after),) = seen
    assert before.shape == (1, stem, 32, 48) and after.shape == (1, stem, 16, 24)
    padded = nn.functional.pad(before, (1, 1, 1, 1), value=-torch.inf)[0].numpy()
    by_hand = padded[:, 8:11, 20:23].max((1, 2))  # the 3x3 window about pixel (8, 20)
    assert after[0, :, 4, 10].tolist() == by_hand.tolist()


@pytest.mark.parametrize("max_depth", [0.05, 10.0, 80.0])
def test_the_logarithmic_output_spans_two_decades_below_the_largest_depth_and_stays_inside(max_depth):
    net = D3Net("tiny", max_depth=max_depth, seed=0, output="log").eval()
    logits = []
    net.decoder.register_forward_hook(lambda module, inputs, output: logits.append(output))
    for scale in (0.2, 1e4):
        nn.init.normal_(net.decoder.last.weight, 0, scale, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            depth = net(picture(1, 3, 32, 64))
        assert depth.dtype == torch.float32 and (depth > max_depth / 101).all() and (depth < max_depth).all()
        low, high = np.log(max_depth / 100), np.log(max_depth)
        share = (np.tanh(logits.pop().double().numpy()) + 1) / 2
        np.testing.assert_allclose(depth.numpy(), np.exp(low + (high - low) * share), rtol=1e-5)
    assert depth.max() > 0.99 * max_depth and depth.min() < 0.011 * max_depth


@pytest.mark.parametrize("size", [(32, 32), (33, 32), (32, 95), (61, 100), (97, 129)])
def test_any_size_from_32_up_gives_depth_of_that_size(tiny, size):
    with torch.no_grad():
        assert tiny(picture(2, 3, *size)).shape == (2, 1, *size)


def test_padding_repeats_the_border_at_the_right_and_below(tiny):
    small = picture(1, 3, 40, 50)
    padded = nn.functional.pad(small, (0, 14, 0, 24), mode="replicate")
    with torch.no_grad():
        assert torch.equal(tiny(small), tiny(padded)[..., :40, :50])


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "divide a uint8 image by 255"),
        (torch.zeros(1, 1, 64, 64), r"\(B, 3, H, W\)"),
        (torch.zeros(3, 64, 64), r"\(B, 3, H, W\)"),
        (torch.zeros(1, 3, 31, 64), ">= 32"),
        (torch.zeros(1, 3, 64, 20), ">= 32"),
    ],
)
def test_images_it_cannot_take_are_refused_with_a_clear_line(tiny, image, words):
    with pytest.raises(ValueError, match=words):
        tiny(image)


@pytest.mark.parametrize("max_depth", [1.0, 10.0, 80.0])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_depth_stays_strictly_inside_its_range_when_tanh_saturates(max_depth, precision):
    net = D3Net("tiny", max_depth=max_depth, seed=0).eval()
    for sign in (1, -1):
        nn.init.constant_(net.decoder.last.weight, sign * 1e4)
        with torch.no_grad(), torch.autocast("cpu", dtype=precision, enabled=precision is not None):
            depth = net(picture(1, 3, 32, 32))
        assert depth.dtype == torch.float32
        assert (depth > 0).all() and (depth < max_depth).all()
        assert (depth > 0.99 * max_depth if sign > 0 else depth < 0.01 * max_depth).any()


def test_metres_are_five_times_one_plus_tanh(tiny):
    logits = []
    hook = tiny.decoder.register_forward_hook(lambda module, inputs, output: logits.append(output))
    with torch.no_grad():
        depth = tiny(picture(1, 3, 32, 64))
    hook.remove()
    torch.testing.assert_close(depth, 5 * (torch.tanh(logits[0]) + 1), rtol=0, atol=1e-5)


def test_rgb_is_scaled_to_minus_one_to_one(tiny):
    seen = []
    hook = tiny.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        tiny(torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32))
    hook.remove()
    assert seen[0][0, :, 0, 0].tolist() == [-1, 0, 1]


def test_weights_start_from_n_0_002_and_normalisation_from_n_1_002():
    net = D3Net("densenet121", seed=0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.weight.numel() > 10_000:
            assert module.weight.mean().abs() < 1e-3 and module.weight.std().item() == pytest.approx(0.02, rel=0.05)
        if isinstance(module, nn.BatchNorm2d) and module.num_features >= 256:
            assert module.weight.mean().item() == pytest.approx(1, abs=0.005)
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.2)
        if getattr(module, "bias", None) is not None:
            assert (module.bias == 0).all()


@pytest.mark.parametrize("make", [lambda seed: D3Net("tiny", seed=seed), lambda seed: PatchDiscriminator(seed=seed)])
def test_a_seed_gives_the_same_weights_whatever_torchs_generator_holds_and_leaves_it_alone(make):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make(7)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    second, other = make(7), make(8)
    states = [list(net.state_dict().values()) for net in (first, second, other)]
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[0], states[2], strict=True))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_channels_last_and_autocast_agree_with_the_plain_network(precision):
    net = D3Net("tiny", seed=0).eval()
    nn.init.normal_(net.decoder.last.weight, 0, 0.2, generator=torch.Generator().manual_seed(0))
    rgb = picture(2, 3, 64, 96)
    with torch.no_grad():
        plain = net(rgb)
        net = net.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
            fast = net(rgb.to(memory_format=torch.channels_last))
    assert fast.dtype == torch.float32
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-4 if precision == torch.float32 else 0.25)


def test_every_parameter_gets_a_gradient():
    net = D3Net("tiny", seed=0)
    net(picture(2, 3, 64, 64)).mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_unknown_encoders_are_refused_and_the_known_ones_listed():
    with pytest.raises(UserError, match="densenet121, resnet50, resnet50_narrow, tiny"):
        D3Net("vgg16")
    with pytest.raises(UserError, match="unknown pooling 'mean'; choose from conv, max"):
        D3Net("tiny", pooling="mean")
    with pytest.raises(UserError, match="unknown output 'inverse'; choose from linear, log"):
        D3Net("tiny", output="inverse")
    with pytest.raises(UserError, match="no ImageNet weights"):
        D3Net("tiny", pretrained=True)


def imagenet_like(name):
    """A state dict as torchvision's file holds it, with random values; DenseNet's has names of old."""
    torch.manual_seed(0)
    state = import_torchvision().models.get_model(name, weights=None).state_dict()
    for number in (1, 2):
        for kind in ("norm", "conv"):
            state = {
                key.replace(f".{kind}{number}.", f".{kind}.{number}.") if "denselayer" in key else key: value
                for key, value in state.items()
            }
    return state


@pytest.mark.parametrize(
    ("name", "unused", "new"),
    [
        ("densenet121", ["classifier.bias", "classifier.weight"], "features.pool0"),
        ("resnet50", ["fc.bias", "fc.weight"], "pool"),
    ],
)
def test_every_pretrained_tensor_that_fits_is_used_and_a_log_line_names_the_others(
    name, unused, new, monkeypatch, caplog
):
    state = imagenet_like(name)
    weights = type(import_torchvision().models.get_weight(ENCODERS[name].weights))
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **options: state)
    with caplog.at_level(logging.INFO, logger="d3lib.models"):
        net = D3Net(name, pretrained=True)
    original = import_torchvision().models.get_model(name, weights=None).state_dict()
    own = net.encoder.state_dict()
    assert len([key for key in original if key in own]) == len(state) - 2
    for key, value in zip(original, state.values(), strict=True):
        if key not in unused:
            assert torch.equal(own[key], value), key
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"{len(state) - 2} of {len(state)} ImageNet tensors used" in line
    assert f"not used: {', '.join(unused)};" in line
    left = line.split("left at their initial values: ")[1].split(", ")
    assert len(left) == 5 and all(key.startswith(new) for key in left)


@pytest.mark.parametrize("error", [URLError("no route to host"), RuntimeError("invalid hash value")])
def test_weights_that_cannot_be_had_give_one_clear_line(error, monkeypatch):
    weights = type(import_torchvision().models.get_weight(ENCODERS["densenet121"].weights))

    def fail(self, **options):
        raise error

    monkeypatch.setattr(weights, "get_state_dict", fail)
    with pytest.raises(UserError, match="download https.*checkpoints, or use pretrained=False") as caught:
        D3Net("densenet121", pretrained=True)
    assert "\n" not in str(caught.value)


def test_torchvision_is_imported_only_when_a_network_is_built():
    code = "import sys, d3lib.models as m; assert 'torchvision' not in sys.modules; m.D3Net('tiny')"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_failed_import_of_torchvision_that_is_not_about_its_operators_is_shown(monkeypatch):
    def fail(name):
        raise RuntimeError("something else")

    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(RuntimeError, match="something else"):
        import_torchvision()


def test_the_discriminator_judges_62_by_78_patches_of_a_256_by_320_image():
    with torch.no_grad():
        assert PatchDiscriminator()(torch.zeros(2, 4, 256, 320)).shape == (2, 1, 62, 78)
        assert PatchDiscriminator(n_layers=3)(torch.zeros(1, 4, 256, 320)).shape == (1, 1, 30, 38)


@pytest.mark.parametrize(("n_layers", "patch"), [(2, 34), (3, 70)])
def test_a_patch_of_the_discriminator_is_34_pixels_wide(n_layers, patch):
    net = PatchDiscriminator(n_layers, ndf=4, seed=0)
    image = picture(1, 4, 160, 160).requires_grad_()
    logits = net(image)
    (gradient,) = torch.autograd.grad(logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2], image)
    touched = gradient.abs().sum((0, 1)) > 0
    assert touched.any(0).sum() == touched.any(1).sum() == patch


def test_the_discriminator_works_on_one_image_and_in_any_mode_alike():
    net, images = PatchDiscriminator(seed=0), picture(3, 4, 64, 80)
    with torch.no_grad():
        together, alone = net(images), net(images[1:2])
        torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-6)
        assert torch.equal(net.eval()(images), together)

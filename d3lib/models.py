"""D3-Net, an encoder-decoder from one image to its depth, and the discriminator of its adversarial loss.

The encoder halves the picture five times; the decoder doubles it five times, and each of its blocks but the
first also sees the encoder's features of the same size (a skip):

    image 1/1   encoder: stem 1/2, then 1/4, 1/8, 1/16, 1/32 depth 1/1 <- block5 <- [skip 1/2, block4] <-
    [skip 1/4, block3] <- [skip 1/8, block2] <- [skip 1/16, block1]

`ENCODERS` holds the three networks in numbers. Shapes are (B, channels, H, W).
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d3lib._torchvision import import_torchvision
from d3lib.errors import UserError

log = logging.getLogger(__name__)

STRIDE = 32  # the encoder's: sides are padded to a multiple of it
SLOPE = 0.2  # of the encoder's LeakyReLUs
LOG_RANGE = 100.0  # output="log": the largest depth over the smallest, so 0.1 m to 10 m


@dataclass(frozen=True)
class Config:
    """One network in numbers.

    Attributes:
        stem: channels of the first convolution, at 1/2.
        blocks: layers of each dense block (DenseNet), or residual blocks of each stage (ResNet).
        growth: channels each dense layer adds; 0 makes a ResNet.
        decoder: widths of the five decoder blocks, at 1/16, 1/8, 1/4, 1/2 and 1/1.
        weights: torchvision's ImageNet weights that fit, if there are any.
    """

    stem: int
    blocks: tuple[int, int, int, int]
    growth: int
    decoder: tuple[int, int, int, int, int]
    weights: str | None = None


ENCODERS = {
    "densenet121": Config(64, (6, 12, 24, 16), 32, (512, 256, 128, 64, 64), "DenseNet121_Weights.IMAGENET1K_V1"),
    "resnet50": Config(64, (3, 4, 6, 3), 0, (1024, 512, 256, 64, 64), "ResNet50_Weights.IMAGENET1K_V1"),
    # The same encoder under the DenseNet's decoder: what differs then is the encoder alone.
    "resnet50_narrow": Config(64, (3, 4, 6, 3), 0, (512, 256, 128, 64, 64), "ResNet50_Weights.IMAGENET1K_V1"),
    # For a CPU: most of the time goes into the stem and the last decoder blocks, so these are the thinnest.
    "tiny": Config(16, (2, 3, 4, 4), 8, (64, 32, 16, 8, 8)),
}
POOLINGS = ("conv", "max")
OUTPUTS = ("linear", "log")


class DenseNetEncoder(nn.Module):
    """torchvision's DenseNet: LeakyReLU after stem and end, and a 4x4 convolution instead of max-pooling.

    With `pooling="max"` torchvision's own stays. Its skips are the stem and each transition's 1x1 convolution,
    before that transition's pooling.
    """

    def __init__(self, config: Config, pooling: str = "conv") -> None:
        super().__init__()
        dense_net = import_torchvision().models.DenseNet
        self.features = dense_net(config.growth, config.blocks, config.stem, num_classes=1).features
        self.features.relu0 = nn.LeakyReLU(SLOPE, inplace=True)
        if pooling == "conv":
            self.features.pool0 = _halving_conv(config.stem)
        self.features.relu5 = nn.LeakyReLU(SLOPE, inplace=True)
        transitions = [self.features.get_submodule(f"transition{i}") for i in (1, 2, 3)]
        self.channels = [
            config.stem,
            *(t.conv.out_channels for t in transitions),
            self.features.norm5.num_features,
        ]

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> features at 1/2, 1/4, 1/8, 1/16 (the skips) and 1/32."""
        skips = []
        for name, layer in self.features.named_children():
            if name.startswith("transition"):  # norm, relu, conv, pool
                x = layer.conv(layer.relu(layer.norm(x)))
                skips.append(x)
                x = layer.pool(x)
            else:
                x = layer(x)
                if name == "relu0":
                    skips.append(x)
        return [*skips, x]


class ResNetEncoder(nn.Module):
    """torchvision's ResNet of bottleneck blocks, its stem and pooling changed as in `DenseNetEncoder`.

    Its skips are the stem and the first three stages.
    """

    def __init__(self, config: Config, pooling: str = "conv") -> None:
        super().__init__()
        resnet = import_torchvision().models.resnet
        net = resnet.ResNet(resnet.Bottleneck, list(config.blocks), num_classes=1)
        self.conv1, self.bn1 = net.conv1, net.bn1
        self.relu = nn.LeakyReLU(SLOPE, inplace=True)
        self.pool = _halving_conv(config.stem) if pooling == "conv" else net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        self.channels = [config.stem, 256, 512, 1024, 2048]

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> features at 1/2, 1/4, 1/8, 1/16 (the skips) and 1/32."""
        stem = self.relu(self.bn1(self.conv1(x)))  # (B, 64, H/2, W/2)
        quarter = self.layer1(self.pool(stem))  # (B, 256, H/4, W/4)
        eighth = self.layer2(quarter)  # (B, 512, H/8, W/8)
        sixteenth = self.layer3(eighth)  # (B, 1024, H/16, W/16)
        return [stem, quarter, eighth, sixteenth, self.layer4(sixteenth)]  # last (B, 2048, H/32, W/32)


class Decoder(nn.Module):
    """Five blocks, each doubling the size by a transposed convolution, then a convolution to one map.

    Without `skips` a block sees the block before it alone.
    """

    def __init__(self, channels: list[int], widths: tuple[int, ...], skips: bool = True) -> None:
        super().__init__()
        self.skips = skips
        *seen, deepest = channels if skips else [0, 0, 0, 0, channels[-1]]
        inputs = [deepest, *(skip + width for skip, width in zip(seen[::-1], widths[:-1], strict=True))]
        self.blocks = nn.ModuleList(map(_decoder_block, inputs, widths))
        self.last = nn.Conv2d(widths[-1], 1, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Encoder features at 1/2 ... 1/32 -> (B, 1, H, W)."""
        *skips, x = features
        x = self.blocks[0](x)  # (B, widths[0], H/16, W/16)
        for block, skip in zip(self.blocks[1:], skips[::-1], strict=True):
            x = block(torch.cat([skip, x], dim=1) if self.skips else x)
        return self.last(x)


class D3Net(nn.Module):
    """Depth from one image.

    Args:
        encoder: "densenet121" (24,220,224 parameters), "resnet50" (91.2 M; its decoder is wider too),
            "resnet50_narrow" (51.9 M: the ResNet under the DenseNet's decoder widths) or "tiny" (a thin
            DenseNet for a CPU).
        pretrained: start the encoder from torchvision's ImageNet weights, downloaded on first use.
        max_depth: metres; predictions lie strictly between 0 and this.
        seed: draw the initial weights from this seed, whatever the state of torch's generator, which is
            left as it was; None draws from that generator.
        skips: let decoder blocks see the encoder's features; without, they see the block before them alone.
        pooling: what halves the stem's features: "conv", the paper's learned 4x4 convolution, or "max",
            the 3x3 max-pooling of the network that the encoder comes from.
        output: "linear": metres = max_depth (tanh + 1) / 2; "log": the same tanh spans the logarithm,
            from ln(max_depth / 100) to ln(max_depth), so 0.1 m to 10 m.

    Raises:
        UserError: unknown encoder, pooling or output, or weights that do not exist or cannot be downloaded.
    """

    def __init__(
        self,
        encoder: str = "densenet121",
        pretrained: bool = False,
        max_depth: float = 10.0,
        seed: int | None = None,
        *,
        skips: bool = True,
        pooling: str = "conv",
        output: str = "linear",
    ) -> None:
        super().__init__()
        choices = {"encoder": (encoder, ENCODERS), "pooling": (pooling, POOLINGS), "output": (output, OUTPUTS)}
        for name, (value, known) in choices.items():
            if value not in known:
                raise UserError(f"unknown {name} {value!r}; choose from {', '.join(known)}")
        config = ENCODERS[encoder]
        self.max_depth = max_depth
        self.output = output
        with _seeded(seed):
            self.encoder = (DenseNetEncoder if config.growth else ResNetEncoder)(config, pooling)
            self.decoder = Decoder(self.encoder.channels, config.decoder, skips)
            self.apply(_init)
        if pretrained:
            load_pretrained(self.encoder, encoder)

    def forward(self, rgb: Tensor) -> Tensor:
        """RGB (B, 3, H, W) in [0, 1], H, W >= 32 -> depth (B, 1, H, W) in metres, float32 also under autocast.

        Raises:
            ValueError: integer images, other shapes, sides under 32.
        """
        if not rgb.is_floating_point():
            raise ValueError(f"rgb must be floating point in [0, 1], got {rgb.dtype}; divide a uint8 image by 255")
        if rgb.ndim != 4 or rgb.shape[1] != 3 or min(rgb.shape[2:]) < STRIDE:
            raise ValueError(f"rgb must be (B, 3, H, W) with H, W >= {STRIDE}, got {tuple(rgb.shape)}")
        height, width = rgb.shape[2:]
        x = rgb * 2 - 1
        if height % STRIDE or width % STRIDE:
            x = F.pad(x, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")
        x = self.decoder(self.encoder(x))[..., :height, :width]  # (B, 1, H, W)
        x = x if x.dtype == torch.float64 else x.float()  # bfloat16 would round 9.99 m to 10
        # 1 - 1e-6 keeps the ends out where tanh saturates, with room for float32 to show it.
        x = (1 - 1e-6) * torch.tanh(x)
        if self.output == "log":
            return self.max_depth * torch.exp(math.log(LOG_RANGE) / 2 * (x - 1))
        return self.max_depth / 2 * (x + 1)


class PatchDiscriminator(nn.Module):
    """PatchGAN: judges each patch of a picture and its depth, (B, 4, H, W) -> logits (B, 1, h, w).

    4x4 convolutions with LeakyReLU, `n_layers` of stride 2 and then two of stride 1, and no normalisation:
    a patch is 34 pixels wide with 2 layers, 70 with pix2pix's 3. 256x320 gives 62x78.

    Args:
        n_layers: convolutions of stride 2.
        ndf: channels of the first; each later one has twice as many, up to 8 times.
        seed: as in `D3Net`.
    """

    def __init__(self, n_layers: int = 2, ndf: int = 64, seed: int | None = None) -> None:
        super().__init__()
        widths = [ndf * min(2**i, 8) for i in range(n_layers + 1)]
        with _seeded(seed):
            layers: list[nn.Module] = [nn.Conv2d(4, ndf, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
            for i in range(1, n_layers + 1):
                stride = 2 if i < n_layers else 1
                conv = nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False)
                layers += [conv, nn.LeakyReLU(SLOPE)]
            self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
            self.apply(_init)

    def forward(self, x: Tensor) -> Tensor:
        """`losses.discriminator_input` (B, 4, H, W) -> one logit per patch (B, 1, h, w)."""
        return self.layers(x)


def count_parameters(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def load_pretrained(encoder: nn.Module, name: str) -> None:
    """Load torchvision's ImageNet weights into an encoder: all that fit; a log line says which do not.

    Raises:
        UserError: there are none for `name`, or they cannot be downloaded.
    """
    if (weights := ENCODERS[name].weights) is None:
        raise UserError(f"encoder {name} has no ImageNet weights; use pretrained=False, or another encoder")
    source = import_torchvision().models.get_weight(weights)
    try:
        state = source.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # no connection; a file whose hash is wrong
        raise UserError(
            f"cannot load {weights} ({error}): download {source.url} into {torch.hub.get_dir()}/checkpoints, "
            "or use pretrained=False"
        ) from error
    # DenseNet's file is older than torchvision's names: norm.1 is norm1 today.
    state = {re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=\d)", r"\1", key): x for key, x in state.items()}
    own = encoder.state_dict()
    fits = {key: x for key, x in state.items() if key in own and own[key].shape == x.shape}
    encoder.load_state_dict(fits, strict=False)
    unused, new = sorted(state.keys() - fits.keys()), sorted(own.keys() - fits.keys())
    new = [key for key in new if not key.endswith("num_batches_tracked")]
    log.info(
        "%s: %d of %d ImageNet tensors used; not used: %s; left at their initial values: %s",
        name, len(fits), len(state), ", ".join(unused) or "none", ", ".join(new) or "none",
    )  # fmt: skip


def _halving_conv(channels: int) -> nn.Sequential:
    """What stands in for the encoder's max-pooling: (B, channels, H, W) -> (B, channels, H/2, W/2)."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.LeakyReLU(SLOPE, inplace=True),
    )


def _decoder_block(inputs: int, outputs: int) -> nn.Sequential:
    """(B, inputs, H, W) -> (B, outputs, 2H, 2W)."""
    return nn.Sequential(
        nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def _init(module: nn.Module) -> None:
    """Convolutions N(0, 0.02), batch normalisation N(1, 0.02), biases 0: as in pix2pix, as the authors do."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Let torch's CPU generator start from `seed` here and restore it afterwards; None changes nothing."""
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield

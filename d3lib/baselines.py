"""What a network must beat: predictors that see nothing, only the place, or only a small patch of the picture.

Depth must have to be *seen*, so every result stands beside these. Each is fitted on training batches and then
predicts as a network does.

| name | sees | predicts |
|---|---|---|
| constant | nothing | the mean training depth (the best constant for RMSE; for L1 it is the median) |
| mean_map | the pixel's place | the mean training depth there |
| coordinates | the pixel's colour and place | a 1x1-convolution network |
| patch17, patch33 | 17 or 33 pixels around it, not the place | a small convolution network |
| nearest | the whole picture, coarsely | the depth of the most similar training picture |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d3lib.errors import UserError
from d3lib.losses import l1_loss

Batch = Mapping[str, Tensor]  # rgb float (B, 3, H, W) in [0, 1], depth (B, 1, H, W) metres, valid bool
MakeBatches = Callable[[], Iterable[Batch]]  # starts a finite pass over the training set
Predictor = Callable[[Tensor], Tensor]  # RGB float (B, 3, H, W) -> metres (B, 1, H, W)

STEPS = 300  # of Adam, for each of the small networks, unless told otherwise
WIDTH = 24  # their channels
THUMBNAIL = (12, 16)  # nearest: grey pixels compared
LIBRARY = 4000  # nearest: at most so many training pictures, the first


def fit_baseline(name: str, batches: MakeBatches, seed: int = 0, steps: int = STEPS) -> Predictor:
    """Fit one of `BASELINES`.

    Args:
        name: see the table above.
        batches: called for each pass over the training set; gives batches of `rgb`, `depth` and `valid`,
            all of one size and on one device, on which the predictor then works too.
        seed: initial weights of the small networks.
        steps: of Adam, for the small networks.

    Raises:
        UserError: unknown name, or a training set without a valid pixel.
    """
    if name not in BASELINES:
        raise UserError(f"unknown baseline {name!r}; choose from {', '.join(BASELINES)}")
    return BASELINES[name](batches, seed, steps)


def fit_constant(batches: MakeBatches, seed: int = 0, steps: int = 0) -> Predictor:
    """The mean of all valid training depths, everywhere."""
    mean = _mean_map(batches)[1]
    return lambda rgb: mean.expand(len(rgb), 1, *rgb.shape[2:])


def fit_mean_map(batches: MakeBatches, seed: int = 0, steps: int = 0) -> Predictor:
    """The mean of each pixel's valid training depths; the mean of all where a pixel never had one."""
    mean_map = _mean_map(batches)[0]
    return lambda rgb: _resize(mean_map, rgb).expand(len(rgb), -1, -1, -1)


def fit_nearest(batches: MakeBatches, seed: int = 0, steps: int = 0) -> Predictor:
    """The depth of the training picture whose grey thumbnail is nearest (L2); its holes hold the mean map."""
    mean_map = _mean_map(batches)[0]
    thumbnails, depths, count = [], [], 0
    for batch in batches():
        thumbnails.append(_thumbnail(batch["rgb"]))
        depths.append(torch.where(batch["valid"], batch["depth"], mean_map).half())
        if (count := count + len(depths[-1])) >= LIBRARY:
            break
    library, depth = torch.cat(thumbnails)[:LIBRARY], torch.cat(depths)[:LIBRARY]
    return lambda rgb: _resize(depth[torch.cdist(_thumbnail(rgb), library).argmin(dim=1)].float(), rgb)


class CoordinateNet(nn.Module):
    """1x1 convolutions on a pixel's colour and its place: (B, 3, H, W) -> (B, 1, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = _conv_stack([(5, 1, 1, 1), (WIDTH, 1, 1, 1), (WIDTH, 1, 1, 1)])

    def forward(self, rgb: Tensor) -> Tensor:
        """Coordinates run from -1 to 1 over each side, whatever its length."""
        rows, columns = (torch.linspace(-1, 1, n, device=rgb.device) for n in rgb.shape[2:])
        place = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))  # (2, H, W)
        return self.layers(torch.cat([rgb, place.expand(len(rgb), -1, -1, -1)], dim=1))


class PatchNet(nn.Module):
    """Convolutions that see `size` (17 or 33) pixels and no more: (B, 3, H, W) -> (B, 1, H, W).

    A 5x5 convolution of stride 2, then three 3x3 at half size: 5 + 3 * 4 = 17 pixels; with dilations 1, 2,
    4 they see 5 + 7 * 4 = 33. Each answer serves 2x2 pixels. Borders are replicated: zeros would tell a
    pixel where it is.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        dilations = {17: (1, 1, 1), 33: (1, 2, 4)}[size]
        self.layers = _conv_stack([(3, 5, 2, 1), *((WIDTH, 3, 1, dilation) for dilation in dilations)])

    def forward(self, rgb: Tensor) -> Tensor:
        """Give depth at full size."""
        height, width = rgb.shape[2:]
        return F.interpolate(self.layers(rgb), scale_factor=2, mode="nearest")[..., :height, :width]


def fit_network(batches: MakeBatches, seed: int, steps: int, *, make: Callable[[], nn.Module]) -> Predictor:
    """Train a small network for `steps` steps of Adam on L1, from the mean depth, with the rate falling to zero."""
    mean = _mean_map(batches)[1]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = make().to(mean.device)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _, batch in zip(range(steps), _forever(batches), strict=False):
        loss = l1_loss(mean + net(batch["rgb"]), batch["depth"], batch["valid"])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    net.eval()
    return torch.no_grad()(lambda rgb: mean + net(rgb))


BASELINES: dict[str, Callable[[MakeBatches, int, int], Predictor]] = {
    "constant": fit_constant,
    "mean_map": fit_mean_map,
    "coordinates": partial(fit_network, make=CoordinateNet),
    "patch17": partial(fit_network, make=partial(PatchNet, 17)),
    "patch33": partial(fit_network, make=partial(PatchNet, 33)),
    "nearest": fit_nearest,
}


def _mean_map(batches: MakeBatches) -> tuple[Tensor, Tensor]:
    """Mean depth of every pixel (1, 1, H, W), and of all of them together (a scalar), in float32."""
    total = count = torch.zeros(())
    for batch in batches():
        valid, depth = batch["valid"], batch["depth"].double()
        total = total.to(depth) + torch.where(valid, depth, 0).sum(0, keepdim=True)
        count = count.to(depth) + valid.sum(0, keepdim=True)
    if not count.sum() > 0:
        raise UserError("the training set has no valid depth, so no baseline can be fitted; check its masks")
    mean = total.sum() / count.sum()
    return torch.where(count > 0, total / count.clamp(min=1), mean).float(), mean.float()


def _conv_stack(convs: list[tuple[int, int, int, int]]) -> nn.Sequential:
    """Convolutions (channels in, kernel, stride, dilation), each with ReLU, then a 1x1 convolution to one map."""
    layers: list[nn.Module] = []
    for inputs, kernel, stride, dilation in convs:
        pad = dilation * (kernel // 2)
        conv = nn.Conv2d(
            inputs, WIDTH, kernel, stride, padding=pad, dilation=dilation, padding_mode="replicate" if pad else "zeros"
        )
        layers += [conv, nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(WIDTH, 1, 1))


def _forever(batches: MakeBatches) -> Iterator[Batch]:
    while True:
        yield from batches()


def _thumbnail(rgb: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 192) grey values."""
    return F.adaptive_avg_pool2d(rgb.mean(1, keepdim=True), THUMBNAIL).flatten(1)


def _resize(depth: Tensor, rgb: Tensor) -> Tensor:
    """Bring a map to the size of the picture it is asked for."""
    return depth if depth.shape[2:] == rgb.shape[2:] else F.interpolate(depth, size=rgb.shape[2:], mode="nearest")

r"""What the usual metrics do not show: depth edges, fine structure, and which errors are common.

A blurred map may have a lower RMSE than a sharp one whose edge is one pixel off. These numbers tell them
apart. Everything is pooled over the images of a set. Pixels that are not valid take no part.

**Edges.** $\ln y$ is smoothed a little (binomial weights, $\sigma = \sqrt 2$ pixels, over valid pixels; otherwise
a prediction would need to be sharp to the pixel to have any edge). Two valid neighbours, left-right or
above-below, form an edge if the smoothed values differ by more than 0.03, and by more than those of the pairs before
and after them in that direction. So a sharp step of 12 % or more is found, and a step of any width is marked once, at
its steepest place, on the left or upper pixel of the pair. A jump across a hole is no edge.

**Depth boundary error** (Koch et al. 2018, iBims-1), with Euclidean distances $D$ in pixels and
$\theta = 10$: accuracy is the mean of $D$ to the nearest true edge, over predicted edges with
$D < \theta$; completeness is the mean of $\min(D, \theta)$ to the nearest predicted edge, over all true
edges. (The original finds edges with Canny's detector and averages over images.)

**Gradient ratio**: sum of $|\hat y_1 - \hat y_2|$ over all valid neighbours by the sum of $|y_1 - y_2|$.

**Spectrum**: mean power of the predicted maps by that of the true ones, in octaves of the spatial frequency.
Below 1 the prediction is too smooth at that size of detail. Both maps lose the mean of their valid pixels,
holes become 0, and a Hann window fades out the borders. Images with more than 5 % of holes are left out:
filled with a constant, holes would make most of the power.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from d3lib.artefacts import finite
from d3lib.metrics import LOG_MIN, valid_pixels

SMOOTHING = tuple(math.comb(8, k) / 2**8 for k in range(9))  # a variance of 8 / 4 pixels squared
EDGE_JUMP = 0.03  # difference of smoothed logarithms above which two neighbours form an edge
EDGE_TOLERANCE = 2  # pixels, Euclidean: a predicted and a true edge this near to each other agree
REACH = 10  # pixels: distances between edges are cut here
BANDS = (0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # cycles per pixel: band k holds f with BANDS[k] < f <= BANDS[k + 1]
MAX_HOLES = 0.05  # share of an image's pixels
RESIDUALS = tuple(round(10 ** (k / 8 - 3), 9) for k in range(33))  # metres: 1 mm to 10 m, eight bins a decade


def depth_edges(depth: Tensor, valid: Tensor) -> Tensor:
    """Depth edges as the module defines them, one pixel wide.

    Args:
        depth: (B, 1, H, W) metres.
        valid: bool, same shape.

    Returns:
        bool (B, 1, H, W), True on the left or upper pixel of each edge.
    """
    log_depth = _smooth(torch.where(valid, depth.clamp(min=LOG_MIN).log(), 0)) / _smooth(valid.to(depth.dtype))
    edges = torch.zeros_like(valid)
    for dim, before, after in ((-1, (1, 0), (0, 1)), (-2, (0, 0, 1, 0), (0, 0, 0, 1))):
        n = depth.shape[dim] - 1
        both = valid.narrow(dim, 0, n) & valid.narrow(dim, 1, n)
        jump = torch.where(both, log_depth.diff(dim=dim).abs(), 0)
        # `jump` with a pair without a jump at one end, cut at the other: each pair beside its neighbour.
        previous, following = (F.pad(jump, side) for side in (before, after))
        steepest = (jump >= previous.narrow(dim, 0, n)) & (jump > following.narrow(dim, 1, n))
        edges |= F.pad(steepest & (jump > EDGE_JUMP), after)
    return edges


def _smooth(x: Tensor) -> Tensor:
    """Weighted sums over 9x9 pixels around each; beyond the border x is 0."""
    weights = torch.tensor(SMOOTHING, dtype=x.dtype, device=x.device)
    with torch.backends.cudnn.flags(enabled=False):  # on a GPU it would round float32 to 11 bits
        x = F.conv2d(x, weights.view(1, 1, 1, -1), padding=(0, len(SMOOTHING) // 2))
        return F.conv2d(x, weights.view(1, 1, -1, 1), padding=(len(SMOOTHING) // 2, 0))


def edge_distance(edges: Tensor) -> Tensor:
    """Euclidean distance of every pixel to the nearest edge pixel of its image, in pixels, cut at `REACH`.

    Args:
        edges: bool (B, 1, H, W).

    Returns:
        float32 (B, 1, H, W) in [0, REACH].
    """
    # Squared distances separate: along rows first, then along columns over what the rows found.
    squared = torch.where(edges, 0.0, REACH**2)
    for height, width, vertical in ((0, REACH, False), (REACH, 0, True)):
        padded = F.pad(squared, (width, width, height, height), value=REACH**2)
        for step in range(2 * REACH + 1):
            shifted = padded.narrow(-2 if vertical else -1, step, squared.shape[-2 if vertical else -1])
            squared = torch.minimum(squared, shifted + (step - REACH) ** 2)
    return squared.sqrt()


def _gradient(depth: Tensor, valid: Tensor) -> Tensor:
    """Sum of the absolute differences between valid neighbours."""
    total = depth.new_zeros(())
    for dim in (-1, -2):
        n = depth.shape[dim] - 1
        both = valid.narrow(dim, 0, n) & valid.narrow(dim, 1, n)
        total = total + torch.where(both, depth.diff(dim=dim).abs(), 0).sum()
    return total


def _power(depth: Tensor, valid: Tensor) -> Tensor:
    """Mean power of the maps (B, 1, H, W) with few enough holes in each band: (len(BANDS) - 1,), summed over images."""
    height, width = depth.shape[-2:]
    options = {"dtype": depth.dtype, "device": depth.device}
    # Two longer and cut: without the zeros at its ends a window of any length has some weight.
    fade = [torch.hann_window(n + 2, periodic=False, **options)[1:-1] for n in (height, width)]
    window = fade[0][:, None] * fade[1]
    window = window / window.square().mean().sqrt()  # so that maps of any size give the same power
    count = valid.sum((-2, -1), keepdim=True)
    whole = count >= (1 - MAX_HOLES) * height * width
    mean = torch.where(valid, depth, 0).sum((-2, -1), keepdim=True) / count.clamp(min=1)
    centred = torch.where(valid & whole, depth - mean, 0)
    power = torch.fft.fft2(centred * window, norm="ortho").abs().square().sum((0, 1))  # (H, W)
    rows, columns = (torch.fft.fftfreq(n, **options) for n in (height, width))
    frequency = torch.hypot(rows[:, None], columns)
    bands = [(frequency > low) & (frequency <= high) for low, high in pairwise(BANDS)]
    return torch.stack([torch.where(band, power, 0).sum() / band.sum().clamp(min=1) for band in bands])


def detail_sums(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """What every number of `Details` is made of: counts and float64 sums over a batch, on the batch's device.

    Args:
        pred: predicted depth (B, 1, H, W) in metres, any floating type.
        target: true depth, same shape.
        mask: bool, same shape, True = valid. Pixels whose target is not positive and finite never count.

    Raises:
        ValueError: shapes differ or are not 4-D, integer depths, or a mask that is not bool.
    """
    valid = valid_pixels(pred, target, mask)
    if pred.ndim != 4:
        raise ValueError(f"pred must have the shape (B, 1, H, W), got {tuple(pred.shape)}")
    pred, target = (torch.where(valid, x.detach(), 1).double() for x in (pred, target))
    found, true = (depth_edges(x.float(), valid) for x in (pred, target))  # a third of the time of float64
    to_found, to_true = edge_distance(found), edge_distance(true)
    near = found & (to_true < REACH)
    error = torch.where(valid, (pred - target).abs(), math.inf)
    return {
        "images": valid.flatten(1).any(1).sum(),
        "pixels": valid.sum(),
        "found": found.sum(),
        "found_right": (found & (to_true <= EDGE_TOLERANCE)).sum(),
        "found_near": near.sum(),
        "distance_to_true": torch.where(near, to_true, 0).sum(dtype=torch.float64),
        "true": true.sum(),
        "true_found": (true & (to_found <= EDGE_TOLERANCE)).sum(),
        "distance_to_found": torch.where(true, to_found, 0).sum(dtype=torch.float64),
        "gradient": torch.stack([_gradient(x, valid) for x in (pred, target)]),  # (2,)
        "power": torch.stack([_power(x, valid) for x in (pred, target)]),  # (2, bands)
        "below": torch.stack([(error < edge).sum() for edge in RESIDUALS]),
    }


class Details:
    """Accumulates the details of predictions over batches, on any device, without waiting for the device."""

    def __init__(self) -> None:
        self._parts: list[dict[str, Tensor]] = []

    def update(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch; arguments and errors as in `detail_sums`."""
        self._parts.append(detail_sums(pred, target, mask))

    def merge(self, other: Details) -> None:
        """Add the images another one has seen."""
        self._parts.extend(other._parts)

    def compute(self) -> dict[str, Any]:
        """Everything so far, ready for JSON; `None` where a number has no pixel, edge or image to stand on.

        Returns:
            - `images`: how many had a valid pixel.
            - `edge_precision`, `edge_recall`: share of predicted edges within `EDGE_TOLERANCE` of a true one,
              and of true edges within it of a predicted one; `edge_f1`: their harmonic mean, 0 if none agree.
            - `dbe_acc`, `dbe_comp`: depth boundary errors in pixels, in [0, REACH]; smaller is better.
            - `gradient_ratio`, `spectrum` (one a band, from coarse to fine), `spectrum_high` (the finest): 1 is best.
            - `share_1cm`, `share_10cm`: share of pixels with an error below.
            - `residuals`: `{"edges", "counts"}`, a histogram of |error| in metres. The first bin also holds
              what is below it, the last what is above it or not a number.
        """
        hole = torch.zeros(1, 1, 2, 2)  # counts for nothing, but gives every sum a 0 to start from
        parts = [detail_sums(hole, hole), *self._parts]
        total = {key: sum(part[key].cpu().double() for part in parts) for key in parts[0]}
        precision = _ratio(total["found_right"], total["found"])
        recall = _ratio(total["true_found"], total["true"])
        spectrum = [_ratio(*pair) for pair in total["power"].unbind(1)]
        below, pixels = total["below"].long().tolist(), int(total["pixels"])
        return {
            "images": int(total["images"]),
            "edge_precision": precision,
            "edge_recall": recall,
            "edge_f1": _harmonic_mean(precision, recall),
            "dbe_acc": _ratio(total["distance_to_true"], total["found_near"]),
            "dbe_comp": _ratio(total["distance_to_found"], total["true"]),
            "gradient_ratio": _ratio(*total["gradient"]),
            "spectrum": spectrum,
            "spectrum_high": spectrum[-1],
            "share_1cm": _ratio(below[RESIDUALS.index(0.01)], pixels),
            "share_10cm": _ratio(below[RESIDUALS.index(0.1)], pixels),
            "residuals": {
                "edges": list(RESIDUALS),
                "counts": [b - a for a, b in pairwise([0, *below[1:-1], pixels])],
            },
        }


def _ratio(a: Tensor | float, b: Tensor | float) -> float | None:
    return finite(float(a) / float(b)) if b else None


def _harmonic_mean(a: float | None, b: float | None) -> float | None:
    if a is None and b is None:
        return None
    return 2 * a * b / (a + b) if a and b else 0.0

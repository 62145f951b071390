r"""Depth metrics, pooled over all pixels and per image, and the protocol that says which pixels count.

With $y$ the true and $\hat y$ the predicted depth in metres, $e = \hat y - y$ and $d = \ln y - \ln \hat y$,
means over valid pixels:

| key | metric |
|---|---|
| rel | $\overline{|e| / y}$ |
| sq_rel | $\overline{e^2 / y}$ (metres) |
| log10 | $\overline{|\log_{10} y - \log_{10} \hat y|}$ |
| rms | $\sqrt{\overline{e^2}}$ (metres) |
| rmslog | $\sqrt{\overline{d^2}}$ |
| silog | $100 \sqrt{\overline{d^2} - \overline{d}^2}$ |
| d1, d2, d3 | share of pixels with $\max(y / \hat y, \hat y / y) < 1.25^k$, strictly |

*Pooled* takes these means over all pixels of all images (Eigen, FCRN, the paper); *per image* takes them
over each image, then averages over images (BTS, AdaBins, ZoeDepth). With equal counts rel, sq_rel, log10
and d1-d3 agree, while pooled rms, rmslog and silog are the larger: report both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from d3lib.errors import UserError
from d3lib.masks import ones_of, zeroed

KEYS = ("rel", "sq_rel", "log10", "rms", "rmslog", "silog", "d1", "d2", "d3")
LOG_MIN = 1e-3  # metres; depths are clamped here in logarithms and ratios, as in the losses
PIECE = 1 << 16  # pixels at a time, on a CPU

# Rows and columns of a 480x640 frame. "dorn" is 21:460, 25:616 when counted from 1 with both ends included.
CROPS = {
    "none": None,
    "toolbox": (slice(44, 471), slice(40, 601)),  # 427x561, what the NYU toolbox keeps
    "eigen_bts": (slice(45, 471), slice(41, 601)),  # 426x560, Eigen's as used by BTS: one short
    "dorn": (slice(20, 460), slice(24, 616)),  # 440x592, DORN, DenseDepth
}


def valid_pixels(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Which pixels count (B, 1, H, W): where the mask, if any, allows it and the target is positive and finite.

    Raises:
        ValueError: shapes differ, integer depths, or a mask that is not bool.
    """
    if pred.ndim < 2 or pred.shape != target.shape or (mask is not None and mask.shape != pred.shape):
        shapes = [tuple(x.shape) for x in (pred, target, mask) if x is not None]
        raise ValueError(f"pred, target and mask must have the same shape (B, 1, H, W), got {shapes}")
    if not (pred.is_floating_point() and target.is_floating_point()):
        raise ValueError(f"pred and target must be floating point, got {pred.dtype} and {target.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}")
    valid = (target > 0) & (target < math.inf)
    return valid if mask is None else valid & mask


def image_sums(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""What every metric is made of: (B, 10) float64 sums over each image's valid pixels.

    The columns are the number of valid pixels, then the sums of $|e|/y$, $e^2/y$, $|\log_{10}|$, $e^2$,
    $d^2$, $d$ and of the three thresholds. Sums of sums are sums: rows may be added, stored, or drawn anew
    (a bootstrap over scenes).

    Args:
        pred: predicted depth (B, 1, H, W) in metres, any floating type.
        target: true depth, same shape.
        mask: bool, same shape, True = valid. Pixels whose target is not positive and finite never count.

    Raises:
        ValueError: shapes differ, integer depths, or a mask that is not bool.
    """
    valid = valid_pixels(pred, target, mask).flatten(1)  # (B, HW)
    pixels = [pred.detach().flatten(1), target.detach().flatten(1), valid]
    # On a CPU in pieces that stay in its cache, each in few passes: faster than over whole pictures.
    width = max(1, PIECE // max(1, len(valid)) if valid.device.type == "cpu" else valid.shape[1])
    pieces = zip(*(x.split(width, 1) for x in pixels), strict=True)
    return torch.stack([_piece_sums(*piece) for piece in pieces]).sum(0)


def _piece_sums(pred: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """`image_sums` of (B, n) pixels."""
    n = valid.count_nonzero(1)
    # Invalid pixels hold 0 m in both, and so an error of 0; clamped, it is one over anything, and their ratio 1.
    ones = ones_of(valid)
    y_hat, y = (zeroed(x if x.dtype == torch.float64 else x.float(), ones).double() for x in (pred, target))
    e = y_hat - y
    error = e.abs()
    relative = error / y.clamp(min=torch.finfo(y.dtype).tiny)
    y, y_hat = y.clamp_(min=LOG_MIN), y_hat.clamp_(min=LOG_MIN)
    ratio = torch.maximum(y, y_hat).div_(torch.minimum(y, y_hat))
    holes = valid.shape[1] - n
    below = torch.empty_like(ratio)  # 1 or 0 in its own type: on a CPU a third of the time of comparing into a mask
    within = [torch.lt(ratio, 1.25**k, out=below).sum(1) - holes for k in (1, 2, 3)]
    size = ratio.log_()  # |d|; d has the other sign than e
    d_sum = -e.sign_().mul_(size).sum(1)
    relative_sum, size_sum = relative.sum(1), size.sum(1)
    squares = [x.sum(1) for x in (relative.mul_(error), error.mul_(error), size.mul_(size))]
    sums = [n, relative_sum, squares[0], size_sum / math.log(10), *squares[1:], d_sum, *within]
    return torch.stack([x.double() for x in sums], dim=1)


def summarise(sums: Tensor) -> dict[str, dict[str, float]]:
    """Metrics of images from their `image_sums` (images, 10): {"pooled": {...}, "per_image": {...}}.

    Images without a valid pixel are skipped; without any image every value is NaN.
    """
    sums = sums[sums[:, 0] > 0]
    pooled, per_image = _finish(sums.sum(0)), _finish(sums).mean(0)
    return {
        "pooled": dict(zip(KEYS, pooled.tolist(), strict=True)),
        "per_image": dict(zip(KEYS, per_image.tolist(), strict=True)),
    }


def _finish(sums: Tensor) -> Tensor:
    """(..., 10) sums -> (..., 9) metrics in the order of KEYS."""
    rel, sq_rel, log10, square, log_square, log, *within = (sums[..., 1:] / sums[..., :1]).unbind(-1)
    silog = 100 * (log_square - log**2).clamp(min=0).sqrt()  # rounding may leave a variance of 0 below it
    return torch.stack([rel, sq_rel, log10, square.sqrt(), log_square.sqrt(), silog, *within], dim=-1)


class DepthMetrics:
    """Accumulates metrics over batches, on any device, in float64, without waiting for the device.

    For depths from 1e-6 to 1e4 m every metric is within 1e-10 of its definition, relative to its value; silog, the
    root of a difference, within 1e-4 (of its per cent).

    It keeps ten numbers an image (`sums`); `compute` gives NaN for everything while no image has had a
    valid pixel.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget every image."""
        self._rows: list[Tensor] = []

    def update(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch; arguments and errors as in `image_sums`."""
        self._rows.append(image_sums(pred, target, mask))

    def merge(self, other: DepthMetrics) -> None:
        """Add the images another one has seen, after this one's own."""
        self._rows.extend(other._rows)

    @property
    def sums(self) -> Tensor:
        """(images, 10) float64 on the CPU: `image_sums` of every image so far, in order."""
        return torch.cat([torch.zeros(0, 10, dtype=torch.float64), *(row.cpu() for row in self._rows)])

    @property
    def counts(self) -> dict[str, int]:
        """How many images and pixels counted, and how many images had no valid pixel and were skipped."""
        pixels = self.sums[:, 0]
        seen = int((pixels > 0).sum())
        return {"images": seen, "skipped": len(pixels) - seen, "pixels": int(pixels.sum())}

    def compute(self) -> dict[str, dict[str, float]]:
        """{"pooled": {...}, "per_image": {...}}, each with the keys of KEYS."""
        return summarise(self.sums)


@dataclass(frozen=True)
class Protocol:
    """Which pixels count, at which size, and what a prediction is clamped to.

    Attributes:
        crop: none, toolbox, eigen_bts or dorn; the last three are regions of a 480x640 frame and need
            targets of it.
        min_depth: metres; nearer targets do not count, and predictions are clamped here.
        max_depth: metres; the same for farther ones. Both bounds are exclusive for targets, as in BTS and
            AdaBins.
        size: "target" brings the prediction to the target's size (bilinear), "network" the target to the
            prediction's (nearest).
    """

    crop: str = "none"
    min_depth: float = 1e-3
    max_depth: float = 10.0
    size: str = "target"

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise UserError(f"unknown crop {self.crop!r}; choose from {', '.join(CROPS)}")
        if self.size not in ("target", "network"):
            raise UserError(f"unknown evaluation size {self.size!r}; choose from target, network")
        if not 0 < self.min_depth < self.max_depth:
            raise UserError(f"depth range {self.min_depth}..{self.max_depth} m: need 0 < min_depth < max_depth")

    def apply(self, pred: Tensor, target: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Give pred, target and mask as `DepthMetrics.update` takes them.

        Args:
            pred: (B, 1, h, w) metres, as the network gives it.
            target: (B, 1, H, W) metres.
            valid: (B, 1, H, W) bool; None: all.

        Raises:
            UserError: a crop for targets that are not 480x640.
        """
        valid = torch.ones_like(target, dtype=torch.bool) if valid is None else valid
        pred = pred if pred.dtype == torch.float64 else pred.float()
        if self.size == "network" and pred.shape[-2:] != target.shape[-2:]:
            target, valid = (
                F.interpolate(x.to(target.dtype), size=pred.shape[-2:], mode="nearest-exact") for x in (target, valid)
            )
            valid = valid > 0
        elif pred.shape[-2:] != target.shape[-2:]:
            pred = F.interpolate(pred, size=target.shape[-2:], mode="bilinear", align_corners=False)
        if (region := CROPS[self.crop]) is not None:
            if tuple(target.shape[-2:]) != (480, 640):
                size = "x".join(str(n) for n in target.shape[-2:])
                raise UserError(
                    f"crop {self.crop!r} is a region of 480x640 frames, but these are {size}; "
                    'evaluate at the original size or use crop="none"'
                )
            pred, target, valid = (x[..., region[0], region[1]] for x in (pred, target, valid))
        mask = valid & (target > self.min_depth) & (target < self.max_depth)
        return pred.clamp(self.min_depth, self.max_depth), target, mask

r"""The seven losses of Table 1, each a few lines under its equation.

Symbols, as in the paper: $y$ is the true depth (`target`) and $\hat y$ the predicted depth (`pred`), both
(B, 1, H, W) in metres; $l = y - \hat y$ and $d = \ln y - \ln \hat y$; $N$ is the number of valid pixels,
those where `mask` (B, 1, H, W, bool) is True; without a mask all are valid.

What all of them promise:

- They leave autocast: float16 and bfloat16 inputs are widened to float32, float64 stays float64, and no
  operation here is one that autocast would narrow.
- Depths enter logarithms clamped at 1e-3 m, so values and gradients are finite for |pred|, |target| <= 1e4.
  The gradient handed back to a float16 prediction saturates at that type's range.
- Float32 is near float64, for depths from 1e-6 to 1e4 m and up to ten million pixels: within 1e-5 of the value for
  the losses in metres, within 1e-5 (v + √v) + 1e-9 for those of logarithms, v being the value at λ = 0.
- An invalid pixel contributes nothing, whatever it holds (NaN included). A batch without valid pixels gives
  a zero that is still attached to the graph and has zero gradients. A loss that is not finite, of a valid NaN say,
  may have gradients that are not, at any pixel.
- Gradients are for descent: right to the first order. A second derivative (`create_graph`) would be wrong.
- Nothing waits for the device: no value is read back to the host.

Wrong shapes or types raise ValueError.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, threshold

from d3lib.errors import UserError
from d3lib.masks import ones_of, zero_, zeroed

LOG_MIN = 1e-3  # metres; depths are clamped here before a logarithm
C_FRACTION = 0.2  # berhu, huber: c as a fraction of the largest error
L1_WEIGHT = 20.0  # gan: lambda per metre; the authors' 100 per unit of depths scaled to [-1, 1], 5 m a unit

LABELS = {
    "l1": r"$\mathcal{L}_1$",
    "l2": r"$\mathcal{L}_2$",
    "eigen": r"$\mathcal{L}_\mathrm{eigen}$",
    "eigengrad": r"$\mathcal{L}_\mathrm{eigengrad}$",
    "berhu": r"$\mathcal{L}_\mathrm{berhu}$",
    "huber": r"$\mathcal{L}_\mathrm{huber}$",
    "gan": r"$\mathcal{L}_\mathrm{gan}$",
}
LOSSES = tuple(LABELS)  # the paper's order


def l1_loss(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Mean absolute error in metres, $\frac{1}{N}\sum_i |l_i|$, over the batch's valid pixels."""
    l_i, valid = _residuals(pred, target, mask)
    return _mean(l_i.abs(), valid)


def l2_loss(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Mean square error in square metres, $\frac{1}{N}\sum_i l_i^2$, over the batch's valid pixels."""
    l_i, valid = _residuals(pred, target, mask)
    return _mean(l_i**2, valid)


def eigen_loss(
    pred: Tensor, target: Tensor, mask: Tensor | None = None, lam: float = 0.5, pooled: bool = False
) -> Tensor:
    r"""Scale-invariant loss, $\frac{1}{N}\sum_i d_i^2 - \frac{\lambda}{N^2}\bigl(\sum_i d_i\bigr)^2$.

    The sums run over the valid pixels of one image, and the loss is the mean over the images that have any:
    the invariance is an image's. With $\lambda=1$, multiplying one image's prediction by a constant changes
    nothing.

    Args:
        lam: $\lambda$, from 0 (mean square log error) to 1 (invariant to scale).
        pooled: let the sums run over the whole batch instead. In a batch of 8 this shrinks the second term to
            about an eighth.
    """
    d, valid = _log_residuals(pred, target, mask)
    d, n = _per_image(d, pooled), _count(_per_image(valid, pooled))
    some = n.clamp(min=1)
    loss = (d**2).sum(1) / some - lam * (d.sum(1) / some) ** 2
    return loss.sum() / n.count_nonzero().clamp(min=1)


def eigengrad_loss(
    pred: Tensor, target: Tensor, mask: Tensor | None = None, lam: float = 1.0, pooled: bool = False
) -> Tensor:
    r"""Scale-invariant loss with gradients, per image and then averaged as `eigen_loss` does.

    $$\frac{1}{N}\sum_i d_i^2 - \frac{\lambda}{2N^2}\bigl(\sum_i d_i\bigr)^2
    + \frac{1}{N}\sum_i \bigl[(\nabla_x d_i)^2 + (\nabla_y d_i)^2\bigr]$$

    $\nabla_x$ and $\nabla_y$ are forward differences between a pixel and its right and lower neighbour; a
    difference counts only where both are valid.

    Args:
        lam: $\lambda$ of the equation, whose second term has a 2 of its own.
        pooled: sums over the whole batch, as in `eigen_loss`.
    """
    d, valid = _log_residuals(pred, target, mask)
    dx = _blank(d.diff(dim=-1), valid[..., :, 1:], valid[..., :, :-1])
    dy = _blank(d.diff(dim=-2), valid[..., 1:, :], valid[..., :-1, :])
    d, dx, dy, valid = (_per_image(x, pooled) for x in (d, dx, dy, valid))
    n = _count(valid)
    some = n.clamp(min=1)
    loss = (d**2).sum(1) / some - lam / 2 * (d.sum(1) / some) ** 2
    loss = loss + ((dx**2).sum(1) + (dy**2).sum(1)) / some
    return loss.sum() / n.count_nonzero().clamp(min=1)


def berhu_loss(pred: Tensor, target: Tensor, mask: Tensor | None = None, c: float | None = None) -> Tensor:
    r"""BerHu: $|l|$ where $|l| \le c$, else $(l^2 + c^2) / 2c$; mean over the batch, in metres.

    The second form is the first plus $(|l| - c)^2 / 2c$: so it is written here.

    Args:
        c: threshold in metres; None takes $0.2 \max_i |l_i|$ over the batch's valid pixels, without gradient.
    """
    l_i, valid = _residuals(pred, target, mask)
    error = l_i.abs()
    c = _threshold(error, c)
    beyond = torch.relu(error - c)
    return _mean(error + beyond**2 / (2 * _positive(c)), valid)


def huber_loss(pred: Tensor, target: Tensor, mask: Tensor | None = None, c: float | None = None) -> Tensor:
    r"""Huber as the paper writes it: $|l|$ where $|l| \ge c$, else $(l^2 + c^2) / 2c$; c as in `berhu_loss`.

    At a fixed c this is the classic Huber loss divided by c, plus c / 2: the same minimiser, in metres. The second
    form is the first plus $(c - |l|)^2 / 2c$.
    """
    l_i, valid = _residuals(pred, target, mask)
    error = l_i.abs()
    c = _threshold(error, c)
    within = _keep(torch.relu(c - error), valid)
    return _mean(error + within**2 / (2 * _positive(c)), valid)


def released_eigen_loss(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""What the released code computes for eigen: $\frac{1}{N}\sum_i d_i^2$ over the batch's valid pixels.

    It divides the second term by $n^2$ once more, n being the batch's pixels, so that nothing of it is left.
    """
    d, valid = _log_residuals(pred, target, mask)
    return _mean(d**2, valid)


def released_eigengrad_loss(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""The released code's eigengrad: $\frac{1}{N}\sum_i \bigl[d_i^2 + (S_x d)_i^2 + (S_y d)_i^2\bigr]$.

    $S_x$ and $S_y$ are Sobel filters without their factor 1/8, over d with zeros in its holes and beyond
    its border: a response at a valid pixel also sees the edge of a hole. Depths up to 0.5 m count as holes.
    The average is over the batch's valid pixels, as in the other losses here (the authors divide by all
    pixels).
    """
    d, valid = _log_residuals(pred, target, _check(pred, target, mask) & (target > 0.5))
    d = torch.nn.functional.pad(d, (1, 1, 1, 1))  # (B, 1, H+2, W+2)
    across, down = d[..., 2:] - d[..., :-2], d[..., 2:, :] - d[..., :-2, :]
    sobel_x = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]  # (B, 1, H, W)
    sobel_y = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    return _mean(_keep(d[..., 1:-1, 1:-1] ** 2 + sobel_x**2 + sobel_y**2, valid), valid)


def released_huber_loss(pred: Tensor, target: Tensor, mask: Tensor | None = None, c: float | None = None) -> Tensor:
    r"""The released code's Huber, the classic: $l^2 / 2$ where $|l| \le c$, else $c\,(|l| - c / 2)$.

    Both are $m\,(|l| - m / 2)$ with $m = \min(|l|, c)$. The mean over the batch's valid pixels, in square metres; c as
    in `berhu_loss`.
    """
    l_i, valid = _residuals(pred, target, mask)
    error = l_i.abs()
    least = torch.minimum(error, _threshold(error, c))
    return _mean(least * (error - least / 2), valid)


def discriminator_input(depth: Tensor, rgb: Tensor, mask: Tensor, max_depth: float = 10.0) -> Tensor:
    """What the discriminator sees of a picture and a depth map, true or predicted: (B, 4, H, W) in [-1, 1].

    Depth (B, 1, H, W), metres from 0 to `max_depth`, and RGB (B, 3, H, W), from 0 to 1, are scaled to [-1, 1]
    and set to 0 where `mask` (B, 1, H, W, bool) is False, in the true and the predicted pair alike: else the
    holes would tell them apart.
    """
    seen = torch.cat([depth / (max_depth / 2) - 1, rgb * 2 - 1], dim=1)
    return torch.where(mask, seen, 0)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    r"""Least squares for D: $\frac12\mathbb{E}[(D(x, y) - 1)^2] + \frac12\mathbb{E}[(D(x, G(x)) - 0)^2]$.

    Give `fake_logits` of a detached prediction, so that G is left alone.
    """
    return _square_from(1, real_logits) / 2 + _square_from(0, fake_logits) / 2


def generator_loss(fake_logits: Tensor, variant: str = "paper") -> Tensor:
    r"""Least squares for G: $\frac12\mathbb{E}[(D(x, G(x)) - 1)^2]$; its whole loss adds $\lambda \mathcal{L}_1$.

    Args:
        fake_logits: $D(x, G(x))$, any shape. The other term is `L1_WEIGHT` times `l1_loss` of the same
            prediction.
        variant: "paper" for the equation above, "released" for the authors' code, which lacks its ½.
    """
    _check_variant(variant)
    return _square_from(1, fake_logits) / (2 if variant == "paper" else 1)


def _square_from(goal: float, logits: Tensor) -> Tensor:
    """Mean square distance of the logits from a goal."""
    logits = _wide(logits)
    return mse_loss(logits, torch.full_like(logits, goal))


VARIANTS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "paper": {
        "l1": l1_loss,
        "l2": l2_loss,
        "eigen": eigen_loss,
        "eigengrad": eigengrad_loss,
        "berhu": berhu_loss,
        "huber": huber_loss,
    },
    "released": {
        "l1": l1_loss,
        "l2": l2_loss,
        "eigen": released_eigen_loss,
        "eigengrad": released_eigengrad_loss,
        "berhu": berhu_loss,
        "huber": released_huber_loss,
    },
}


def build_loss(name: str, variant: str = "paper", **options: Any) -> Callable[..., Tensor]:
    """Give the regression loss called `name` as a function (pred, target, mask=None) -> scalar.

    Args:
        name: l1, l2, eigen, eigengrad, berhu or huber; gan has two sides, `discriminator_loss` and
            `generator_loss`.
        variant: "paper" for Table 1's form, "released" for what the authors' code computes.
        options: arguments of that loss, such as `lam` and `pooled` of eigen or `c` of berhu.

    Raises:
        UserError: an unknown name, variant or option.
    """
    _check_variant(variant)
    if name not in VARIANTS[variant]:
        hint = " (gan: see discriminator_loss and generator_loss)" if name == "gan" else ""
        raise UserError(f"unknown regression loss {name!r}; choose from {', '.join(VARIANTS[variant])}{hint}")
    loss = VARIANTS[variant][name]
    known = [key for key in inspect.signature(loss).parameters if key not in ("pred", "target", "mask")]
    if unknown := sorted(set(options) - set(known)):
        raise UserError(
            f"loss {name} ({variant}) has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}"
        )
    return partial(loss, **options)


def _check_variant(variant: str) -> None:
    if variant not in VARIANTS:
        raise UserError(f"unknown loss variant {variant!r}; choose from {', '.join(VARIANTS)}")


def _check(pred: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """The mask, or a full one, of a batch whose shapes and types fit; else ValueError."""
    if pred.ndim != 4 or pred.shape[1] != 1 or pred.numel() == 0 or target.shape != pred.shape:
        raise ValueError(
            f"pred and target must both be (B, 1, H, W), got {tuple(pred.shape)} and {tuple(target.shape)}"
        )
    if not (pred.is_floating_point() and target.is_floating_point()):
        raise ValueError(f"pred and target must be floating point, got {pred.dtype} and {target.dtype}")
    if mask is None:
        return torch.ones_like(target, dtype=torch.bool)
    if mask.shape != pred.shape or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool {tuple(pred.shape)}, got {mask.dtype} {tuple(mask.shape)}")
    return mask


def _wide(x: Tensor) -> Tensor:
    """The values in float32, or float64 if given; a float16 tensor gets its gradient within its range."""
    if x.dtype == torch.float64:
        return x
    wide = x.float()
    if x.dtype == torch.float16 and wide.requires_grad:
        limit = torch.finfo(torch.float16).max
        wide.register_hook(lambda gradient: gradient.clamp(-limit, limit))
    return wide


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, valid: Tensor) -> Tensor:
        ctx.save_for_backward(valid)
        return zeroed(x, valid)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _keep(gradient, *ctx.saved_tensors), None


def _keep(x: Tensor, valid: Tensor) -> Tensor:
    """x where `valid` (see `ones_of`), else 0, and so its gradient: `torch.where(mask, x, 0)`."""
    return _Keep.apply(x, valid)


class _Log(torch.autograd.Function):
    """ln max(x, LOG_MIN) where `valid` (see `ones_of`), else ln LOG_MIN; no gradient where that is what it gave."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, valid: Tensor) -> Tensor:
        x = threshold(zeroed(x, valid), LOG_MIN, LOG_MIN, inplace=True)
        ctx.save_for_backward(x)
        return x.log()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient / x, x, LOG_MIN), None


def _blank(difference: Tensor, *valid: Tensor) -> Tensor:
    """A difference just made, set to 0 in place where not all of `valid` are, without telling its gradient.

    So only |x| and x² may be taken of it: a finite gradient is 0 at their 0 anyway. That spares a pass on the way back.
    """
    with torch.no_grad():
        for ones in valid:
            zero_(difference, ones)
    return difference


def _residuals(pred: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Give -l, 0 at invalid pixels (see `_blank`), and the mask as `ones_of`.

    No loss minds the sign, and y_hat - y spares a negation on the way back.
    """
    mask = _check(pred, target, mask)
    l_i = _wide(pred) - _wide(target)
    valid = ones_of(mask)
    return _blank(l_i, valid), valid


def _log_residuals(pred: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Give -d, 0 without gradient at invalid pixels, and the mask as `ones_of`.

    Invalid pixels become `LOG_MIN` in both before the logarithm: masked after it, a NaN would leave a NaN gradient.
    """
    mask = _check(pred, target, mask)
    y, y_hat = _wide(target), _wide(pred)
    dtype = torch.promote_types(y.dtype, y_hat.dtype)
    valid = ones_of(mask)
    y, y_hat = (_Log.apply(x.to(dtype), valid) for x in (y, y_hat))
    return y_hat - y, valid


def _per_image(x: Tensor, pooled: bool) -> Tensor:
    """(B, 1, H, W) -> (B, H*W), or (1, B*H*W) when the batch counts as one image."""
    return x.reshape(1 if pooled else len(x), -1)


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean over the `valid` (see `ones_of`) of `values` that are 0 elsewhere; 0 if nothing is."""
    return values.sum() / _count(valid.reshape(-1)).clamp(min=1)


def _count(valid: Tensor) -> Tensor:
    """The sum of `ones_of` along the last axis, in a third of the time of `count_nonzero`."""
    return valid.sum(-1, dtype=torch.int32)


def _threshold(error: Tensor, c: float | None) -> Tensor:
    """The c of berhu and huber, given or 0.2 max |l| (invalid pixels hold 0 and cannot be the maximum)."""
    return C_FRACTION * error.detach().max() if c is None else error.new_tensor(c)


def _positive(c: Tensor) -> Tensor:
    """Keep c from 0 as a divisor: if every error is 0, the branch not taken must not make NaN gradients."""
    return c.clamp(min=torch.finfo(c.dtype).tiny)

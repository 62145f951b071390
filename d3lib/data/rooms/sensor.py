"""The cameras: develops linear light into an sRGB picture, and sees exact depth as a Kinect would.

The two share nothing but the scene: no hole of the depth map leaves a trace in the picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .scene import Camera
from .textures import bell, hash2, unit, value_noise
from .tracer import FX, intrinsics

PROJECTOR, IR_CAMERA = 0.050, -0.025  # metres to the right of the RGB camera; 7.5 cm apart (NYU's calibration)
SHIFT, SCALE = 1092.5, 351.3  # z = SCALE / (SHIFT - d), d the raw 11-bit disparity
LOWEST = 600  # smaller disparities (0.71 m) are dropped, as NYU's toolbox does
WEAKEST = 0.0017  # a return cos(angle) / z³ (1/m³) below about this is lost (from 7 m on, head-on),
FLATTEST = 0.1  # and so is a surface seen under a cosine below this


def _grid(size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    y, x = torch.meshgrid(*[torch.arange(n, device=device, dtype=torch.int32) for n in size], indexing="ij")
    return x, y


def _per_frame(values: Sequence[object], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, K) numbers as (B, K, 1, 1)."""
    return torch.as_tensor(np.array(values), dtype=dtype).to(device).reshape(len(values), -1, 1, 1)


def develop(linear: Tensor, cameras: Sequence[Camera]) -> Tensor:
    """Expose, vignette, add noise and encode: linear (B, 3, H, W) to sRGB uint8 (B, 3, H, W).

    Exposure brings the median signal to each camera's aim, as a camera's own metering does.
    """
    size, device = (linear.shape[2], linear.shape[3]), linear.device
    grey = (linear[:, 0] + 2 * linear[:, 1] + linear[:, 2]) * 0.25
    gain = _per_frame([c.exposure for c in cameras], device) / grey.flatten(1).median(1).values.reshape(
        -1, 1, 1, 1
    ).clamp(min=1e-4)
    x, y = _grid(size, device)
    rx, ry = (x.float() + 0.5) / size[1] - 0.5, (y.float() + 0.5) / size[0] - 0.5
    fall = 1 / (1 + _per_frame([c.vignette for c in cameras], device) * 2 * (rx * rx + ry * ry))
    signal = linear * gain * _per_frame([c.balance for c in cameras], device) * (fall * fall)
    seed = _per_frame([c.seed for c in cameras], device, torch.int32)
    channel = torch.arange(3, device=device, dtype=torch.int32).reshape(1, 3, 1, 1)
    noise = bell(hash2(x, y, seed + channel * 7919)) * _per_frame([c.noise for c in cameras], device)
    signal = signal + noise * (signal.clamp(0, 1) + 0.02).sqrt()
    signal = torch.where(signal > 0.8, 0.8 + 0.2 * (1 - 0.2 / (signal - 0.6).clamp(min=0.2)), signal)  # soft shoulder
    return (
        _srgb_codes(device).index_select(0, (signal.clamp(0, 1) * 16383 + 0.5).int().reshape(-1)).reshape(signal.shape)
    )


def _srgb_codes(device: torch.device) -> Tensor:
    """The sRGB code (uint8) of each of 16384 linear levels."""
    x = np.arange(16384) / 16383
    code = np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055) * 255
    return torch.as_tensor(np.rint(code).astype(np.uint8)).to(device)


def _hidden(exact: Tensor, offset: float, fx: float) -> Tensor:
    """Whether a pixel is out of sight of a device `offset` metres to the right of the camera, by its scanline.

    Seen from there a pixel of depth z stands fx offset / z pixels to the left; it is hidden where something clearly
    nearer, on the offset's side, lands on the same spot.
    """
    width = exact.shape[-1]
    shift = fx * offset / exact
    side = 1 if offset > 0 else -1
    hidden = torch.zeros_like(exact, dtype=torch.bool)
    for k in range(1, min(width - 1, math.ceil(fx * abs(offset) / 0.4)) + 1):
        me, other = (slice(0, width - k), slice(k, width))[::side]
        lands = side * k - shift[..., other] + shift[..., me]
        hidden[..., me] |= (lands.abs() < 0.75) & (exact[..., other] < exact[..., me] * 0.97 - 0.02)
    return hidden


def kinect(exact: Tensor, cosine: Tensor, cameras: Sequence[Camera]) -> tuple[Tensor, Tensor]:
    """Depth (B, 1, H, W) metres, 0 where nothing was measured, and its valid mask, from exact depth and viewing angle.

    As `disparity` on the RGB camera's picture, less what is nearer than 0.71 m.
    """
    fx = intrinsics((exact.shape[2], exact.shape[3]))[0]
    level, valid = disparity(exact, cosine, cameras, fx, (PROJECTOR, IR_CAMERA), LOWEST)
    return torch.where(valid, SCALE / (SHIFT - level), 0.0), valid


def disparity(
    exact: Tensor, cosine: Tensor, cameras: Sequence[Camera], fx: float, offsets: Sequence[float], lowest: int
) -> tuple[Tensor, Tensor]:
    """Raw disparity (B, 1, H, W), whole levels d = SHIFT - SCALE / z, and where it was measured.

    Noise of a third of a level comes before the rounding. Lost are pixels that a device at one of the `offsets` (metres
    to the right of the picture's own camera, of focal length `fx` pixels) cannot see, weak returns (far or grazing
    surfaces, in blotches), ragged edges, and levels below `lowest`.
    """
    size, device = (exact.shape[2], exact.shape[3]), exact.device
    x, y = _grid(size, device)
    seed = _per_frame([c.seed ^ 0x5BD1E995 & 0x7FFFFFFF for c in cameras], device, torch.int32)
    random = hash2(x, y, seed)
    level = (SHIFT - SCALE / exact + bell(random) * 0.33).round()
    blotch = value_noise(x.float() * (FX / fx / 14), y.float() * (FX / fx / 14), seed + 1)
    luck = 0.55 + 0.6 * blotch + 0.5 * unit(random, 12)
    weak = (cosine / (exact * exact * exact) < WEAKEST * luck) | (cosine < FLATTEST * luck)
    edge = torch.zeros_like(weak)
    jump = (exact[..., 1:] - exact[..., :-1]).abs() > 0.06 * exact[..., 1:]
    edge[..., 1:] |= jump
    edge[..., :-1] |= jump
    ragged = edge & (unit(random, 4) < 0.35)
    valid = (level >= lowest) & (level < SHIFT - SCALE / 10) & ~weak & ~ragged
    for offset in offsets:
        valid &= ~_hidden(exact, offset, fx)
    return level, valid

"""Procedural textures: integer hashes and the patterns drawn from them, equal on every device.

Only correctly rounded operations (+ - * / floor, comparisons, 32-bit integers) are used: no torch random numbers and
no transcendental functions, so that a pixel depends neither on the device nor on its neighbours in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_PRIMES = 668265263, 374761393


def mix_bits(h: Tensor) -> Tensor:
    """Scramble int32 so that every output bit depends on every input bit (the finaliser of MurmurHash3)."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * -2048144789
    h = (h ^ ((h >> 13) & 0x7FFFF)) * -1028477387
    return h ^ ((h >> 16) & 0xFFFF)


def hash2(i: Tensor, j: Tensor, seed: Tensor | int) -> Tensor:
    """An int32 hash of two int32 lattice coordinates and a seed."""
    return mix_bits((i * _PRIMES[0]) ^ (j * _PRIMES[1]) ^ seed)


def unit(h: Tensor, shift: int = 0) -> Tensor:
    """Eight bits of a hash, from bit `shift`, as a float in [0, 1]."""
    return ((h >> shift) & 0xFF).float() * (1 / 255)


def bell(h: Tensor) -> Tensor:
    """A hash as a nearly Gaussian number of mean 0 and variance 1: the sum of its four bytes (Irwin-Hall), scaled."""
    return (unit(h) + unit(h, 8) + unit(h, 16) + unit(h, 24) - 2) * 1.72524  # 1 / sqrt(4 var(byte / 255))


def value_noise(a: Tensor, b: Tensor, seed: Tensor | int) -> Tensor:
    """Smooth noise in [0, 1] with one random value per unit cell corner."""
    a0, b0 = a.floor(), b.floor()
    fa, fb = a - a0, b - b0
    fa, fb = fa * fa * (3 - 2 * fa), fb * fb * (3 - 2 * fb)
    i0, j0 = a0.int() * _PRIMES[0], (b0.int() * _PRIMES[1])
    i1, j1, j0 = i0 + _PRIMES[0], (j0 + _PRIMES[1]) ^ seed, j0 ^ seed
    n00, n10, n01, n11 = ((mix_bits(i ^ j) & 0xFF).float() for i, j in ((i0, j0), (i1, j0), (i0, j1), (i1, j1)))
    low, high = n00 + (n10 - n00) * fa, n01 + (n11 - n01) * fa
    return (low + (high - low) * fb) * (1 / 255)


class Surface(NamedTuple):
    """What a pattern may look at, one value per ray: all (N,)."""

    a: Tensor  # along the surface, in units of the material's period
    b: Tensor
    ua: Tensor  # the same across the whole face, -1 to 1
    ub: Tensor
    seed: Tensor  # int32
    blur: Tensor  # width of a sample's footprint, in periods


Pattern = Callable[[Surface], tuple[Tensor, Tensor]]


def _fract(x: Tensor) -> Tensor:
    return x - x.floor()


def _wave(x: Tensor) -> Tensor:
    """A triangle wave of period 1: 0 at integers, 1 halfway between."""
    return 1 - (2 * _fract(x) - 1).abs()


def _step(x: Tensor, edge: float, width: Tensor) -> Tensor:
    """0 below `edge`, 1 above, with a ramp as wide as a sample: what a perfect camera would average."""
    return ((x - edge) / (width + 0.01) + 0.5).clamp(0, 1)


def _fade(x: Tensor, mean: float, period_in_samples: Tensor) -> Tensor:
    """Blend detail towards its mean where its period is no wider than two samples (`period_in_samples` < 2)."""
    return mean + (x - mean) * (period_in_samples - 1).clamp(0, 1)


def _cells(s: Surface, a: Tensor, b: Tensor) -> Tensor:
    return hash2(a.floor().int(), b.floor().int(), s.seed)


def _grout(s: Surface, a: Tensor, b: Tensor, width: float) -> Tensor:
    """1 on the joints between unit cells."""
    edge = torch.minimum(_wave(a), _wave(b))
    return _fade(1 - _step(edge, width, 2 * s.blur), width, 0.5 / s.blur)


def plain(s: Surface) -> tuple[Tensor, Tensor]:
    """Paint: faint cloudy mottling."""
    return value_noise(s.a * 2, s.b * 2, s.seed), s.seed


def wood(s: Surface) -> tuple[Tensor, Tensor]:
    """Grain along a, bent by noise."""
    bend = value_noise(s.a * 0.6, s.b * 2, s.seed)
    return _fade(_wave(s.b * 4 + 2.5 * bend), 0.5, 0.2 / s.blur), s.seed


def planks(s: Surface) -> tuple[Tensor, Tensor]:
    """Boards five times as long as wide, each with its own tint and grain."""
    row = s.b.floor()
    along = s.a * 0.2 + unit(hash2(row.int(), row.int(), s.seed))
    cell = _cells(s, along, s.b)
    grain = value_noise(s.a * 0.7 + unit(cell) * 40, s.b * 5, s.seed)
    joint = torch.maximum(_grout(s, along + 0 * s.b, s.b * 0 + 0.5, 0.01), _grout(s, s.a * 0 + 0.5, s.b, 0.05))
    return torch.maximum(_fade(grain, 0.5, 0.3 / s.blur) * 0.6, joint), cell


def tiles(s: Surface) -> tuple[Tensor, Tensor]:
    """Square tiles with joints of the second colour."""
    return _grout(s, s.a, s.b, 0.06), _cells(s, s.a, s.b)


def checker(s: Surface) -> tuple[Tensor, Tensor]:
    """Two colours of tile in turn."""
    odd = ((s.a.floor() + s.b.floor()).int() & 1).float()
    return _fade(odd, 0.5, 1 / s.blur), _cells(s, s.a, s.b)


def stripes(s: Surface) -> tuple[Tensor, Tensor]:
    """Bands of two colours, the second narrower."""
    return _fade(_step(_wave(s.a), 0.6, 2 * s.blur), 0.4, 1 / s.blur), s.seed


def dots(s: Surface) -> tuple[Tensor, Tensor]:
    """Wallpaper: a staggered motif of discs."""
    a = s.a + 0.5 * (s.b.floor().int() & 1).float()
    x, y = _fract(a) - 0.5, _fract(s.b) - 0.5
    return _fade(1 - _step(x * x + y * y, 0.07, s.blur), 0.2, 1 / s.blur), s.seed


def fabric(s: Surface) -> tuple[Tensor, Tensor]:
    """A weave under large soft folds."""
    weave = _fade(_wave(s.a * 6) * _wave(s.b * 6) * 2, 0.5, 0.16 / s.blur)
    return 0.6 * weave.clamp(0, 1) + 0.4 * value_noise(s.a, s.b, s.seed), s.seed


def books(s: Surface) -> tuple[Tensor, Tensor]:
    """Spines side by side, each with its own colour, and a title band on some; the gap above is dark."""
    cell = hash2(s.a.floor().int(), s.seed * 0, s.seed)
    top = 0.98 - 0.7 * unit(cell, 8) * unit(cell, 16)
    band = (s.ub - 0.6 * unit(cell, 16) + 0.3).abs() < 0.12
    gap = (s.ub > top) | (_wave(s.a) < 0.1)
    return torch.where(gap, 1.0, torch.where(band, 0.35, 0.0)), cell


def picture(s: Surface) -> tuple[Tensor, Tensor]:
    """A framed painting: patches of colour under a wandering horizon."""
    noise = value_noise(s.ua * 2, s.ub * 3, s.seed) + 0.5 * value_noise(s.ua * 5, s.ub * 6, s.seed + 1)
    level = ((s.ub + 1) * 1.2 + 2.2 * noise).floor().int()
    frame = torch.maximum(s.ua.abs(), s.ub.abs()) > 0.88
    return torch.where(frame, 1.0, 0.0), torch.where(frame, s.seed, hash2(level, level, s.seed))


def door(s: Surface) -> tuple[Tensor, Tensor]:
    """Two recessed panels; their bevels are the second colour."""
    x, y = s.ua.abs(), (s.ub - 0.1).abs()
    ring = (x < 0.68) & (y > 0.08) & (y < 0.82) & ~((x < 0.6) & (y > 0.11) & (y < 0.79))
    return ring.float() * 0.8 + 0.1 * value_noise(s.a, s.b * 8, s.seed), s.seed


def window(s: Surface) -> tuple[Tensor, Tensor]:
    """Sky over foliage behind panes; bars are the second colour."""
    bars = (torch.minimum(s.ua.abs(), (s.ub + 0.1).abs()) < 0.04) | (torch.maximum(s.ua.abs(), s.ub.abs()) > 0.93)
    leaves = value_noise(s.ua * 9, s.ub * 9, s.seed + 1)
    trees = s.ub < value_noise(s.ua * 2 + 9, s.ua * 0, s.seed) * 1.2 - 0.9 + 0.15 * leaves
    return torch.where(bars, 1.0, torch.where(trees, 0.4 + 0.5 * leaves, 0.0)), s.seed


def brick(s: Surface) -> tuple[Tensor, Tensor]:
    """Courses of bricks in running bond, with mortar of the second colour."""
    a = s.a * 0.5 + 0.5 * (s.b.floor().int() & 1).float()
    return _grout(s, a, s.b, 0.1), _cells(s, a, s.b)


def terrazzo(s: Surface) -> tuple[Tensor, Tensor]:
    """Chips of many tints in a matrix."""
    chip = value_noise(s.a * 4, s.b * 4, s.seed)
    return _fade((chip > 0.6).float(), 0.3, 0.3 / s.blur), _cells(s, s.a * 3, s.b * 3)


def hexagons(s: Surface) -> tuple[Tensor, Tensor]:
    """Rhombic tiles in three tints, after a tumbling-blocks floor."""
    a, b = s.a + s.b * 0.5, s.b
    third = (a.floor() + b.floor()).int() % 3
    return _fade(third.float() * 0.5, 0.5, 1 / s.blur), _cells(s, a, b)


def plaid(s: Surface) -> tuple[Tensor, Tensor]:
    """Tartan: bands both ways that add up."""
    bands = [_step(_wave(x), 0.55, 2 * s.blur) * 0.4 + _step(_wave(x * 3), 0.85, 6 * s.blur) * 0.2 for x in (s.a, s.b)]
    return _fade((bands[0] + bands[1]).clamp(0, 1), 0.4, 0.6 / s.blur), s.seed


def zigzag(s: Surface) -> tuple[Tensor, Tensor]:
    """Chevrons."""
    return _fade(_step(_wave(s.b + 0.6 * _wave(s.a)), 0.5, 2 * s.blur), 0.5, 1 / s.blur), s.seed


def marble(s: Surface) -> tuple[Tensor, Tensor]:
    """Veins where two octaves of noise cross the middle."""
    n = value_noise(s.a, s.b, s.seed) + 0.5 * value_noise(s.a * 2.3, s.b * 2.3, s.seed + 1)
    return (1 - 6 * (n - 0.75).abs()).clamp(0, 1), s.seed


def speckle(s: Surface) -> tuple[Tensor, Tensor]:
    """Fine grains on a plain ground."""
    grain = unit(_cells(s, s.a * 12, s.b * 12))
    return _fade(grain * grain, 0.33, 0.08 / s.blur), s.seed


def ribbed(s: Surface) -> tuple[Tensor, Tensor]:
    """Corrugated panel."""
    wave = _wave(s.a * 3)
    return _fade(wave * wave, 0.33, 0.33 / s.blur), s.seed


def poster(s: Surface) -> tuple[Tensor, Tensor]:
    """Nested discs and a caption."""
    ring = ((s.ua * s.ua + (s.ub - 0.2) * (s.ub - 0.2)) * 6).floor().int()
    caption = (s.ub < -0.6) & (_wave(s.ua * 6) > 0.4) & (s.ub > -0.75)
    return caption.float(), hash2(ring, ring, s.seed)


def blinds(s: Surface) -> tuple[Tensor, Tensor]:
    """A bright window behind slats."""
    return (_wave(s.ub * 8) > 0.45).float(), s.seed


PATTERNS: tuple[Pattern, ...] = (
    plain, wood, planks, tiles, checker, stripes, dots, fabric, books, picture, door, window,
    brick, terrazzo, hexagons, plaid, zigzag, marble, speckle, ribbed, poster, blinds,
)  # fmt: skip

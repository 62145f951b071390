"""What a scene is made of, and how one is built by hand or placed by chance: parts, materials, lights, cameras.

World axes: x and y on the floor, z up, metres, the origin in a corner of the room. Everything here is float64 made with
correctly rounded operations only (no sine, no power, no BLAS), so that parameters are the same bits on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .textures import PATTERNS

Array = NDArray[np.float64]
SHAPES = ("room", "box", "cylinder", "sphere")  # a room is a box seen from inside
KINDS = {pattern.__name__: kind for kind, pattern in enumerate(PATTERNS)}


class Draw:
    """A stream of random numbers named by integers; the same on every platform and NumPy version that has PCG64."""

    def __init__(self, *key: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))

    def __call__(self, low: float = 0.0, high: float = 1.0) -> float:
        """Uniform in [low, high)."""
        return low + (high - low) * float(self._generator.random())

    def index(self, count: int) -> int:
        """Uniform in 0 ... count - 1."""
        return min(int(self() * count), count - 1)

    def pick(self, choices: Sequence[Any]) -> Any:
        """One of `choices`."""
        return choices[self.index(len(choices))]

    def ratio(self, most: float) -> float:
        """A factor between 1 / most and most, either side of 1 equally likely."""
        factor = self(1.0, most)
        return factor if self() < 0.5 else 1 / factor


def rotation(axis: int, degrees: float) -> Array:
    """Rotation (3, 3) about a coordinate axis, exactly orthogonal; its angle is right to 0.01 degrees."""
    quarters = int(np.floor(degrees / 90 + 0.5))
    x = (degrees - 90 * quarters) * (np.pi / 360)
    t = x * (1 + x * x * (1 / 3 + x * x * (2 / 15 + x * x * 17 / 315)))  # tan x
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    for _ in range(quarters % 4):
        cos, sin = -sin, cos
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = cos, -sin, sin, cos
    return matrix


def product(a: Array, b: Array) -> Array:
    """Matrix product (..., 3, 3) x (3, K) by plain sums: BLAS may round differently from machine to machine."""
    return a[..., :, 0, None] * b[0] + a[..., :, 1, None] * b[1] + a[..., :, 2, None] * b[2]


class Material(NamedTuple):
    """How a face looks: a pattern that blends two linear RGB colours."""

    pattern: str = "plain"
    first: tuple[float, float, float] = (0.5, 0.5, 0.5)
    second: tuple[float, float, float] = (0.5, 0.5, 0.5)
    frequency: float = 1.0  # periods per metre
    seed: int = 0
    variation: float = 0.0  # how much tint differs from cell to cell
    emission: float = 0.0
    gloss: float = 0.0


class Part(NamedTuple):
    """One convex solid: an affine image of the unit box, cylinder (along its third axis) or sphere."""

    shape: str
    centre: Array
    half: Array  # half sizes along its own axes, metres
    axes: Array  # (3, 3), columns are its own axes
    material: Material
    front: Material | None = None  # the face at its own -y, where it differs
    casts: bool = True  # whether it throws shadows


class Light(NamedTuple):
    """A point light; irradiance falls with the squared distance."""

    position: Array
    colour: Array  # linear RGB times power


def part(
    shape: str,
    centre: Iterable[float],
    size: Iterable[float],
    material: Material,
    axes: Array | None = None,
    front: Material | None = None,
    casts: bool = True,
) -> Part:
    """A part from its full sizes (metres) along its own axes."""
    half = np.maximum(np.array(list(size), dtype=float) / 2, 0.002)
    return Part(
        shape,
        np.array(list(centre), float),
        half,
        np.eye(3) if axes is None else axes,
        material,
        front,
        casts,
    )


def reach(item: Part) -> Array:
    """Half extents (3,) of a part's bounding box along the world axes."""
    a = np.abs(item.axes) * item.half
    return a[:, 0] + a[:, 1] + a[:, 2]


def moved(item: Part, axes: Array, shift: Array) -> Part:
    """The part turned about the origin by `axes`, then shifted."""
    centre = product(axes, item.centre[:, None])[:, 0] + shift
    return item._replace(centre=centre, axes=product(axes, item.axes))


@dataclass(frozen=True, eq=False)
class Scene:
    """A furnished room. `parts[0]` is the room itself; `walls` are the materials of its faces -x +x -y +y -z +z."""

    size: Array  # room width, length, height
    walls: tuple[Material, ...]
    parts: tuple[Part, ...]
    lights: tuple[Light, ...]
    ambient: Array = field(default_factory=lambda: np.full(3, 0.2))
    path: Array = field(
        default_factory=lambda: np.zeros((0, 4))
    )  # the camera's way points on the floor, and what it looks at
    items: tuple[str, ...] = ()  # what was placed, for people and tests

    @cached_property
    def arrays(self) -> tuple[Array, Array, Array]:
        """Centres (P, 3), half sizes (P, 3) and axes (P, 3, 3) of the parts."""
        centre, half, axes = (np.array([getattr(q, name) for q in self.parts]) for name in ("centre", "half", "axes"))
        return centre, half, axes


def hand_made(
    size: Sequence[float],
    parts: Iterable[Part] = (),
    lights: Iterable[Light] = (),
    wall: Material | None = None,
) -> Scene:
    """A scene given in full, for tests and lessons: a room of `size` metres with one material and these parts."""
    extent = np.array(size, dtype=float)
    wall = wall or Material(first=(0.6, 0.6, 0.6), second=(0.5, 0.5, 0.5))
    room = Part("room", extent / 2, extent / 2, np.eye(3), wall)
    default = Light(extent * np.array([0.5, 0.5, 0.9]), np.full(3, 4.0))
    return Scene(extent, (wall,) * 6, (room, *parts), tuple(lights) or (default,))


class Camera(NamedTuple):
    """Where a frame is taken from, and how the picture is developed."""

    position: Array
    axes: Array  # (3, 3), columns are right, down, forward in the world
    exposure: float = 0.18  # median linear signal the exposure aims at
    vignette: float = 0.0
    noise: float = 0.0  # standard deviation of the linear signal at white
    balance: tuple[float, float, float] = (1.0, 1.0, 1.0)
    seed: int = 0


def look(yaw: float, pitch: float, roll: float) -> Array:
    """Camera axes for angles in degrees: yaw 0 looks along +y, yaw > 0 more to the left; pitch > 0 up."""
    level = np.array([[1.0, 0, 0], [0, 0, 1.0], [0, -1.0, 0]])  # columns: right = x, down = -z, forward = y
    return product(rotation(2, yaw), product(rotation(0, pitch), product(level, rotation(2, roll))))


def gap(scene: Scene, point: Array) -> float:
    """Distance (metres) from a point to the nearest part of a scene but the room, parts taken as boxes; 0 inside."""
    centre, half, axes = (x[1:] for x in scene.arrays)
    d = point - centre
    local = axes[:, 0] * d[:, :1] + axes[:, 1] * d[:, 1:2] + axes[:, 2] * d[:, 2:]
    out = np.maximum(np.abs(local) - half, 0.0) ** 2
    return float(np.sqrt((out[:, 0] + out[:, 1] + out[:, 2]).min(initial=np.inf)))


def glance(scene: Scene, camera: Camera, across: int = 8, down: int = 6) -> tuple[Array, NDArray[np.int64]]:
    """A coarse look through a camera: depth (metres) and part seen for each of `across` x `down` rays.

    Every part counts as a box. Used to choose a view worth taking.
    """
    u, v = np.meshgrid(np.linspace(-0.55, 0.55, across), np.linspace(-0.42, 0.42, down))
    rays = product(camera.axes, np.stack([u.ravel(), v.ravel(), np.ones(u.size)]))  # (3, R)
    centre, half, axes = scene.arrays
    o = camera.position - centre
    origin = axes[:, 0] * o[:, :1] + axes[:, 1] * o[:, 1:2] + axes[:, 2] * o[:, 2:]  # (P, 3)
    direction = product(axes.transpose(0, 2, 1), rays) + 1e-12  # (P, 3, R)
    low, high = ((s * half - origin)[:, :, None] / direction for s in (-1, 1))
    near, far = np.minimum(low, high).max(1), np.maximum(low, high).min(1)
    depth = np.where((near < far) & (near > 0), near, np.inf)
    depth[0] = far[0]  # the room
    return depth.min(0), depth.argmin(0)

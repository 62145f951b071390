"""A batched ray tracer in plain torch: linear RGB, exact depth and viewing angle of furnished rooms.

A camera ray is (u, v, 1) in camera axes, so the ray parameter *is* the depth along the optical axis. The frame is cut
into tiles; each tile (and each tile's bundle of shadow rays) meets only the parts its bounding planes cannot exclude.
All arithmetic is elementwise and correctly rounded, so a frame's pixels depend on nothing else in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .layout import MOST_LIGHTS
from .scene import KINDS, SHAPES, Camera, Part, Scene
from .textures import PATTERNS, Surface, unit, mix_bits

FX, FY, CX, CY = 518.85790117450188, 519.46961112127485, 325.58244941119034, 253.73616633400465  # NYU's RGB, 1-based
TILE = 8  # pixels
GRID = 2  # RGB samples per pixel and axis
SHADINGS = ("full", "flat", "constant_albedo")
_INF = float("inf")
_RAYS_AT_ONCE = {"cpu": 2**16, "cuda": 2**23}


def intrinsics(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """fx, fy, cx, cy in pixels of NYU's full 480 x 640 RGB frame resized to `size` (H, W).

    Pixel (row j, column i), counted from 0, looks along ((i - cx) / fx, (j - cy) / fy, 1): x right, y down, z forward.
    """
    sy, sx = size[0] / 480, size[1] / 640
    return FX * sx, FY * sy, (CX - 0.5) * sx - 0.5, (CY - 0.5) * sy - 0.5


@dataclass
class _Pack:
    """The parts of all views in a row, as seen from their cameras: tensors on the device, parts last (K, P)."""

    frame: Tensor  # (P,) which view a part belongs to; a view's first part is its room
    shape: Tensor  # (P,) index into SHAPES
    coefficients: Tensor  # (12, P): a ray's unit-shape coordinates are o + t (au u + av v + a1), three rows each
    centre: Tensor  # (3, P) in camera axes
    axes: Tensor  # (3, 3, P): half axes in camera axes; [k] is the k-th axis times its half size
    inverse: Tensor  # (9, P): world to unit shape, row by row
    world: Tensor  # (3, P) centre in the world
    half: Tensor  # (3, P)
    casts: Tensor  # (P,)
    material: Tensor  # (6 P,) index of a face's material; faces in the order -x +x -y +y -z +z
    looks: Tensor  # (12, M): first and second colour, frequency, variation, emission, gloss, whole face?, spare
    kind: Tensor  # (M,)
    seed: Tensor  # (M,) int32
    rooms: Tensor  # (F,) index of each view's room
    views: Tensor  # (F, 15): camera position, axes (column by column), room size
    lights: Tensor  # (F, L, 6): position and colour; dark where there is none
    ambient: Tensor  # (F, 3)


def _pack(views: Sequence[tuple[Scene, Camera]], device: torch.device) -> _Pack:
    parts: list[Part] = []
    materials, face_rows, frame, rooms = [], [], [], []
    coefficient, centre, axes, inverse = [], [], [], []
    for f, (scene, camera) in enumerate(views):
        rooms.append(len(parts))
        index: dict[int, int] = {}

        def number(material: object, index: dict[int, int] = index) -> int:
            if id(material) not in index:
                index[id(material)] = len(materials)
                materials.append(material)
            return index[id(material)]

        for item in scene.parts:
            faces = [number(item.material)] * 6
            if item.shape == "room":
                faces = [number(m) for m in scene.walls]
            elif item.front is not None:
                faces[2] = number(item.front)
            face_rows.append(faces)
        frame += [f] * len(scene.parts)
        parts += scene.parts
        a, h = np.array([q.axes for q in scene.parts]), np.array([q.half for q in scene.parts])
        c = np.array([q.centre for q in scene.parts])
        m = a.transpose(0, 2, 1) / h[:, :, None]  # (P, 3, 3)
        basis = camera.axes  # columns right, down, forward
        d = (m[..., None] * basis).sum(2)  # (P, 3, 3): unit coordinates per u, v, 1
        o = (m * (camera.position - c)[:, None]).sum(2)
        coefficient.append(np.concatenate([o, d[..., 0], d[..., 1], d[..., 2]], 1))
        centre.append(((c - camera.position)[:, :, None] * basis).sum(1))
        axes.append(((a * h[:, None])[..., None] * basis[:, None]).sum(1))  # (P, own axis, camera axis)
        inverse.append(m.reshape(-1, 9))

    def column(rows: Sequence[np.ndarray], dtype: torch.dtype = torch.float32) -> Tensor:
        """(P, ...) arrays one after the other, as a tensor with parts last."""
        return torch.as_tensor(np.moveaxis(np.concatenate(rows), 0, -1).copy(), dtype=dtype).to(device)

    looks = [[*m.first, *m.second, m.frequency, m.variation, m.emission, m.gloss] for m in materials]
    lights = np.zeros((len(views), MOST_LIGHTS, 6))
    lights[:, :, 2] = 1.0
    for f, (scene, _) in enumerate(views):
        for k, light in enumerate(scene.lights):
            lights[f, k] = [*light.position, *light.colour]

    def tensor(values: object, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.as_tensor(np.array(values), dtype=dtype).to(device)

    return _Pack(
        frame=tensor(frame, torch.int32),
        shape=tensor([SHAPES.index(q.shape) for q in parts], torch.int32),
        coefficients=column(coefficient),
        centre=column(centre),
        axes=column(axes),
        inverse=column(inverse),
        world=column([np.array([q.centre for q in parts])]),
        half=column([np.array([q.half for q in parts])]),
        casts=tensor([q.casts for q in parts], torch.bool),
        material=tensor(np.concatenate(face_rows), torch.int32),
        looks=column([np.array(looks)]),
        kind=tensor([KINDS[m.pattern] for m in materials], torch.int32),
        seed=tensor([m.seed for m in materials], torch.int32),
        rooms=tensor(rooms, torch.int32),
        views=tensor([[*c.position, *c.axes.T.ravel(), *s.size] for s, c in views]),
        lights=tensor(lights),
        ambient=tensor([s.ambient for s, _ in views]),
    )


# --- which parts a tile can see ---------------------------------------------------------------------------------------


def _camera_pairs(pack: _Pack, us: Tensor, vs: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (tile, part) that no plane through the eye separates; `us`, `vs` are the tile borders."""
    c, a = pack.centre, pack.axes

    def spans(k: int, borders: Tensor) -> Tensor:
        """(P, borders - 1): whether a part touches the wedge between neighbouring planes x_k = border z."""
        s = c[k, :, None] - borders * c[2, :, None]
        r = sum((a[j, k, :, None] - borders * a[j, 2, :, None]).abs() for j in range(3)) + 1e-5
        return (s + r > 0)[:, :-1] & (s - r < 0)[:, 1:]

    in_front = c[2] + a[:, 2].abs().sum(0) > 0
    touches = spans(1, vs)[:, :, None] & spans(0, us)[:, None] & (in_front & (pack.shape > 0))[:, None, None]
    item, row, col = touches.nonzero(as_tuple=True)
    rows, cols = len(vs) - 1, len(us) - 1
    return (pack.frame[item].long() * rows + row) * cols + col, item


def _rounds(bundle: Tensor, item: Tensor, group: int = 2**62) -> dict[int, list[tuple[Tensor, Tensor]]]:
    """Split pairs into rounds in which no bundle occurs twice, per group of `group` neighbouring bundles."""
    if not len(bundle):
        return {}
    order = torch.argsort(bundle, stable=True)
    bundle, item = bundle[order], item[order]
    first = torch.searchsorted(bundle, bundle)
    rank = torch.arange(len(bundle), device=bundle.device) - first
    most = int(rank.max()) + 1
    key = bundle // group * most + rank
    order = torch.argsort(key, stable=True)
    found, counts = torch.unique_consecutive(key[order], return_counts=True)
    pieces = zip(
        found.tolist(), bundle[order].split(counts.tolist()), item[order].split(counts.tolist()), strict=True
    )
    rounds: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for k, some, parts in pieces:
        rounds.setdefault(k // most, []).append((some, parts))
    return rounds


# --- where rays meet parts --------------------------------------------------------------------------------------------

Interval = tuple[Tensor, Tensor]


def _slab(o: Tensor, d: Tensor) -> Interval:
    inverse = d.reciprocal()
    a, b = (-1 - o) * inverse, (1 - o) * inverse
    return torch.minimum(a, b), torch.maximum(a, b)


def _box(o: list[Tensor], d: list[Tensor]) -> Interval:
    near, far = _slab(o[0], d[0])
    for k in (1, 2):
        a, b = _slab(o[k], d[k])
        near, far = torch.maximum(near, a), torch.minimum(far, b)
    return near, far


def _quadric(o: list[Tensor], d: list[Tensor]) -> Interval:
    """Where o + t d is inside the unit circle or sphere; an empty interval where it misses."""
    a, b, c = sum(x * x for x in d), sum(x * y for x, y in zip(o, d, strict=True)), sum(x * x for x in o) - 1
    inside = b * b - a * c
    root, inverse = inside.clamp(min=0).sqrt(), a.reciprocal()
    near = torch.where(inside > 0, (-b - root) * inverse, _INF)
    return near, (root - b) * inverse


def _cylinder(o: list[Tensor], d: list[Tensor]) -> Interval:
    (a, b), (near, far) = _quadric(o[:2], d[:2]), _slab(o[2], d[2])
    return torch.maximum(near, a), torch.minimum(far, b)


_MEET: dict[str, Callable[[list[Tensor], list[Tensor]], Interval]] = {
    "box": _box,
    "cylinder": _cylinder,
    "sphere": _quadric,
}


def _by_shape(pack: _Pack, bundle: Tensor, item: Tensor, group: int = 2**62) -> dict[str, dict[int, list]]:
    shape = pack.shape[item]
    chosen = {name: (shape == SHAPES.index(name)).nonzero()[:, 0] for name in _MEET}
    return {name: _rounds(bundle[index], item[index], group) for name, index in chosen.items()}


class _Tiles:
    """The rays of a run of tiles: (C, S, TILE * TILE) with S samples a pixel, the first through the pixel's centre."""

    def __init__(self, pack: _Pack, size: tuple[int, int], device: torch.device) -> None:
        self.rows, self.cols = -(-size[0] // TILE), -(-size[1] // TILE)
        self.fx, self.fy, self.cx, self.cy = intrinsics(size)
        inner = (torch.arange(GRID, device=device) + 0.5) / GRID - 0.5
        dy, dx = torch.meshgrid(inner, inner, indexing="ij")
        zero = torch.zeros(1, device=device)
        y, x = torch.meshgrid(*[torch.arange(TILE, device=device)] * 2, indexing="ij")
        self.x = torch.cat([zero, dx.reshape(-1)])[:, None] + x.reshape(1, -1)  # (S, TILE²) pixels
        self.y = torch.cat([zero, dy.reshape(-1)])[:, None] + y.reshape(1, -1)
        self.samples = self.x.shape[0]
        self.us = (torch.arange(self.cols + 1, device=device) * TILE - 0.5 - self.cx) / self.fx
        self.vs = (torch.arange(self.rows + 1, device=device) * TILE - 0.5 - self.cy) / self.fy

    def rays(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """u and v (C, S * TILE²) of the given tiles."""
        within = tiles % (self.rows * self.cols)
        x0, y0 = (within % self.cols * TILE)[:, None].float(), (within // self.cols * TILE)[:, None].float()
        return (x0 + self.x.reshape(1, -1) - self.cx) / self.fx, (y0 + self.y.reshape(1, -1) - self.cy) / self.fy


def _closest(pack: _Pack, room: Tensor, u: Tensor, v: Tensor, rounds: dict[str, list]) -> tuple[Tensor, Tensor]:
    """Depth (C, R) and part (C, R) that each ray meets first; `room` (C,) is what is behind everything."""

    def local(item: Tensor, some: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        k = pack.coefficients[:, item][:, :, None]  # (12, n, 1)
        us, vs = (u, v) if some is None else (u[some], v[some])
        return [k[0], k[1], k[2]], [us * k[3 + i] + vs * k[6 + i] + k[9 + i] for i in range(3)]

    o, d = local(room, None)
    exits = [(torch.where(d[i] < 0, -1.0, 1.0) - o[i]) / d[i] for i in range(3)]
    depth = torch.minimum(torch.minimum(exits[0], exits[1]), exits[2])
    part = room[:, None].expand_as(depth).contiguous()
    for name, meet in _MEET.items():
        for some, item in rounds[name]:
            near, far = meet(*local(item, some))
            before = depth[some]
            closer = (near < far) & (near > 0) & (near < before)
            depth[some] = torch.where(closer, near, before)
            part[some] = torch.where(closer, item[:, None].to(part.dtype), part[some])
    return depth, part


# --- what they look like ----------------------------------------------------------------------------------------------


@dataclass
class _Hits:
    """Points where rays meet parts, all (N,) or lists of three (N,)."""

    local: list[Tensor]  # unit-shape coordinates
    normal: list[Tensor]  # in the world, towards the viewer
    face: Tensor  # 0 ... 5
    axis: Tensor  # 0, 1, 2
    flat: Tensor  # whether the face is flat (texture by axis) or round
    shape: Tensor
    cosine: Tensor  # of the angle between normal and ray


def _hits(pack: _Pack, part: Tensor, depth: Tensor, u: Tensor, v: Tensor, ray: list[Tensor]) -> _Hits:
    k = pack.coefficients.index_select(1, part)
    q = [k[i] + depth * (u * k[3 + i] + v * k[6 + i] + k[9 + i]) for i in range(3)]
    m = pack.inverse.index_select(1, part)
    shape = pack.shape[part]
    size = [x.abs() for x in q]
    box, cylinder = shape <= 1, shape == 2
    top = cylinder & (size[2] > 0.9999)
    axis = torch.where((size[1] > size[0]) & (size[1] >= size[2]), 1, 0)
    axis = torch.where((size[2] > size[0]) & (size[2] > size[1]), 2, axis)
    axis = torch.where(box, axis, torch.where(top, 2, 0))
    flat = box | top
    at = [axis == i for i in range(3)]
    g = [torch.where(flat, torch.where(at[i], q[i], 0.0), q[i]) for i in range(3)]
    g[2] = torch.where(cylinder & ~top, 0.0, g[2])
    n = [g[0] * m[i] + g[1] * m[3 + i] + g[2] * m[6 + i] for i in range(3)]
    along = n[0] * ray[0] + n[1] * ray[1] + n[2] * ray[2]
    scale = torch.where(along > 0, -1.0, 1.0) / (n[0] * n[0] + n[1] * n[1] + n[2] * n[2]).sqrt()
    n = [x * scale for x in n]
    length = (ray[0] * ray[0] + ray[1] * ray[1] + ray[2] * ray[2]).sqrt()
    picked = torch.where(at[0], q[0], torch.where(at[1], q[1], q[2]))
    face = 2 * axis + (flat & (picked > 0)).int()
    return _Hits(q, n, face, axis, flat, shape, -(along * scale) / length)


def _turns(x: Tensor, y: Tensor) -> Tensor:
    """A stand-in for the angle of (x, y) in radians, monotone and exact to rounding: the diamond angle."""
    ring = x / (x.abs() + y.abs() + 1e-12)
    return torch.where(y < 0, ring - 1, 1 - ring) * (np.pi / 2)


def _albedo(pack: _Pack, part: Tensor, hits: _Hits, footprint: Tensor, constant: bool) -> tuple[list[Tensor], Tensor]:
    """Linear RGB reflectance, three (N,), and the materials' numbers (10, N)."""
    index = pack.material[part * 6 + hits.face]
    look = pack.looks.index_select(1, index)
    kind, seed = pack.kind[index], pack.seed[index]
    if constant:
        kind = torch.where(look[8] > 0, kind, -1)
    half = pack.half.index_select(1, part)
    q = hits.local
    metres = [q[i] * half[i] for i in range(3)]
    x_face, z_face, round_ = hits.axis == 0, hits.axis == 2, ~hits.flat
    wrapped = _turns(q[0], q[1])
    ua = torch.where(round_, wrapped * (1 / np.pi), torch.where(x_face, q[1], q[0]))
    ub = torch.where(z_face, q[1], q[2])
    a = torch.where(round_, wrapped * torch.maximum(half[0], half[1]), torch.where(x_face, metres[1], metres[0]))
    b = torch.where(z_face, metres[1], metres[2])
    # grain runs along the longer side
    swap = hits.flat & (torch.where(z_face, half[1], half[2]) > torch.where(x_face, half[1], half[0])) & (kind == 1)
    a, b = torch.where(swap, b, a), torch.where(swap, a, b)
    a, b = (a + 50) * look[6], (b + 50) * look[6]
    blur = footprint * look[6]
    mix, cell = torch.zeros_like(a), seed.clone()
    for number, pattern in enumerate(PATTERNS):
        chosen = (kind == number).nonzero()[:, 0]
        if len(chosen):
            surface = Surface(a[chosen], b[chosen], ua[chosen], ub[chosen], seed[chosen], blur[chosen] + 1e-4)
            mix[chosen], cell[chosen] = pattern(surface)
    tint = mix_bits(cell)
    bright = unit(tint, 24) - 0.5
    keep = 1 - mix
    colour = [
        (look[i] * keep * (1 + look[7] * (bright + 0.6 * (unit(tint, 8 * i) - 0.5))) + look[3 + i] * mix).clamp(0, 1)
        for i in range(3)
    ]
    if constant:
        colour = [torch.where(kind < 0, 0.5, c) for c in colour]
    return colour, look


def _shadow_pairs(pack: _Pack, frame: Tensor, eye: Tensor, points: list[Tensor], spans: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (bundle, part) for shadow rays from a light `eye` (B, 3) to `points` three (B, R), B bundles.

    A bundle lies in a pyramid from its light; parts whose bounding sphere is outside one of its planes are left out.
    """
    rel = [points[i] - eye[:, i : i + 1] for i in range(3)]
    mid = torch.stack([(x.amin(1) + x.amax(1)) / 2 for x in rel])
    w = mid / (mid[0] * mid[0] + mid[1] * mid[1] + mid[2] * mid[2] + 1e-12).sqrt()
    upright = w[2].abs() < 0.7
    helper = torch.stack([torch.zeros_like(w[0]), torch.where(upright, 0.0, 1.0), torch.where(upright, 1.0, 0.0)])
    e1 = torch.linalg.cross(w, helper, dim=0)
    e1 = e1 / (e1[0] * e1[0] + e1[1] * e1[1] + e1[2] * e1[2]).sqrt()
    e2 = torch.linalg.cross(w, e1, dim=0)

    def dot(e: Tensor) -> Tensor:
        return rel[0] * e[0][:, None] + rel[1] * e[1][:, None] + rel[2] * e[2][:, None]

    deep = dot(w)
    reach = deep.amax(1)
    wide = deep.amin(1) < 0.1 * reach
    safe = deep.clamp(min=1e-3)
    borders = []
    for e in (e1, e2):
        slope = dot(e) / safe
        borders.append((e, torch.where(wide, -1e3, slope.amin(1)), torch.where(wide, 1e3, slope.amax(1))))
    # parts of each bundle's frame, padded to the longest
    start, count = spans[:, 0][frame], spans[:, 1][frame]
    slot = torch.arange(int(spans[:, 1].max()), device=frame.device)
    item = (start[:, None] + slot).clamp(max=len(pack.casts) - 1)
    ok = (slot < count[:, None]) & pack.casts[item] & (pack.shape[item] > 0)
    c = [pack.world[i][item] - eye[:, i : i + 1] for i in range(3)]
    h = pack.half
    radius = (h[0] * h[0] + h[1] * h[1] + h[2] * h[2]).sqrt()[item] + 1e-3

    def place(e: Tensor) -> Tensor:
        return c[0] * e[0][:, None] + c[1] * e[1][:, None] + c[2] * e[2][:, None]

    z = place(w)
    ok &= (z - radius < reach[:, None]) & ((z + radius > 0) | wide[:, None])
    for e, low, high in borders:
        x = place(e)
        for border, sign in ((low, 1), (high, -1)):
            norm = (1 + border * border).sqrt()[:, None]
            ok &= (sign * (x - border[:, None] * z) + radius * norm > 0) | wide[:, None]
    bundle, column = ok.nonzero(as_tuple=True)
    return bundle, item[bundle, column]


def _lit(pack: _Pack, frame: Tensor, points: list[Tensor], spans: Tensor) -> Tensor:
    """(C, L, R): 1 where a light reaches the points three (C, R), 0 in shadow."""
    c, r = points[0].shape
    lights = pack.lights[frame]  # (C, L, 6)
    eye = lights[:, :, :3].reshape(-1, 3)
    spread = [p[:, None].expand(c, MOST_LIGHTS, r).reshape(-1, r) for p in points]
    shining = lights[:, :, 3:].sum(2).reshape(-1) > 0
    dark = torch.zeros(c * MOST_LIGHTS, r, dtype=torch.bool, device=frame.device)
    on = shining.nonzero()[:, 0]
    eye, spread = eye[on], [p[on] for p in spread]
    bundle, item = _shadow_pairs(pack, frame.repeat_interleave(MOST_LIGHTS)[on], eye, spread, spans)
    shadow = dark[on]
    for name, groups in _by_shape(pack, bundle, item).items():
        for some, parts in groups.get(0, []):
            m = pack.inverse[:, parts][:, :, None]
            from_eye = [eye[some, i] - pack.world[i, parts] for i in range(3)]
            o = [sum(m[3 * k + i] * from_eye[i][:, None] for i in range(3)) for k in range(3)]
            ray = [spread[i][some] - eye[some, i : i + 1] for i in range(3)]
            d = [ray[0] * m[3 * k] + ray[1] * m[3 * k + 1] + ray[2] * m[3 * k + 2] for k in range(3)]
            near, far = _MEET[name](o, d)
            shadow[some] |= (near < far) & (far > 0) & (near < 1)
    dark[on] = shadow
    return (~dark).float().reshape(c, MOST_LIGHTS, r)


def _shade(
    pack: _Pack, tiles: _Tiles, frame: Tensor, depth: Tensor, part: Tensor, u: Tensor, v: Tensor, shading: str, spans: Tensor
) -> tuple[Tensor, Tensor]:
    """Linear RGB (C, 3, TILE²) of the samples' mean, and the cosine (C, TILE²) at pixel centres."""
    c, s, r = len(frame), tiles.samples, TILE * TILE
    view = pack.views[frame]  # (C, 15)
    where = [view[:, i : i + 1] for i in range(15)]
    ray = [where[3 + i] * u + where[6 + i] * v + where[9 + i] for i in range(3)]
    world = [where[i] + depth * ray[i] for i in range(3)]
    hits = _hits(pack, part.reshape(-1), depth.reshape(-1), u.reshape(-1), v.reshape(-1), [x.reshape(-1) for x in ray])
    cosine = hits.cosine.reshape(c, s, r)
    footprint = (depth / (GRID * tiles.fx)).reshape(-1) / hits.cosine.clamp(min=0.15)
    albedo, look = _albedo(pack, part.reshape(-1), hits, footprint, shading == "constant_albedo")
    shape3 = (c, s, r)
    colour = [x.reshape(shape3) for x in albedo]
    glow = look[8].reshape(shape3)
    if shading == "flat":
        linear = [x * 0.6 for x in colour]
    else:
        normal = [x.reshape(shape3) for x in hits.normal]
        where3 = [x[:, :, None] for x in where]
        point = [world[i].reshape(shape3) for i in range(3)]
        lift = 0.004 + 0.002 * depth.reshape(shape3)[:, 0]
        lit = _lit(pack, frame, [point[i][:, 0] + normal[i][:, 0] * lift for i in range(3)], spans)
        # ambient light is dimmer in corners, near the floor, and from below
        corner = 0.75 + 0.25 * normal[2]
        for i in range(3):
            d = torch.minimum(point[i], where3[12 + i] - point[i]).clamp(min=0)
            corner = corner * (1 - 0.04 / (d + 0.1))
        light = [pack.ambient[frame][:, i, None, None] * corner for i in range(3)]
        shine = torch.zeros_like(corner)
        gloss = look[9].reshape(shape3)
        length = (u * u + v * v + 1).sqrt().reshape(shape3)
        toward = [ray[i].reshape(shape3) / length for i in range(3)]
        for k in range(MOST_LIGHTS):
            lamp = pack.lights[frame, k]
            to = [lamp[:, i, None, None] - point[i] for i in range(3)]
            square = to[0] * to[0] + to[1] * to[1] + to[2] * to[2]
            inverse = 1 / (square + 0.02).sqrt()
            facing = (to[0] * normal[0] + to[1] * normal[1] + to[2] * normal[2]).clamp(min=0) * inverse
            arrives = lit[:, k][:, None] / (square + 0.15)
            power = facing * arrives
            light = [light[i] + lamp[:, 3 + i, None, None] * power for i in range(3)]
            half = [to[i] * inverse - toward[i] for i in range(3)]
            squared = half[0] * half[0] + half[1] * half[1] + half[2] * half[2] + 1e-6
            spark = (half[0] * normal[0] + half[1] * normal[1] + half[2] * normal[2]).clamp(min=0)
            spark = spark * spark / squared  # cos² of the half angle
            for _ in range(5):
                spark = spark * spark  # to the 64th power of the cosine
            shine = shine + spark * arrives * (0.5 * (lamp[:, 3] + lamp[:, 4] + lamp[:, 5]) / 3)[:, None, None]
        linear = [colour[i] * (light[i] + glow) + gloss * shine for i in range(3)]
    mean = torch.stack([sum(x[:, j] for j in range(1, s)) / (s - 1) for x in linear], 1)
    return mean, cosine[:, 0]


def trace(
    views: Sequence[tuple[Scene, Camera]], size: tuple[int, int], device: torch.device, shading: str = "full"
) -> tuple[Tensor, Tensor, Tensor]:
    """Render views: linear RGB (B, 3, H, W), exact depth (B, 1, H, W) metres, cosine of viewing angle (B, 1, H, W)."""
    pack = _pack(views, device)
    tiles = _Tiles(pack, size, device)
    per_frame = tiles.rows * tiles.cols
    rays = tiles.samples * TILE * TILE
    group = max(1, _RAYS_AT_ONCE.get(device.type, 2**16) // rays)
    rounds = _by_shape(pack, *_camera_pairs(pack, tiles.us, tiles.vs), group)
    ends = torch.cat([pack.rooms[1:], torch.tensor([len(pack.frame)], device=device, dtype=torch.int32)])
    spans = torch.stack([pack.rooms, ends - pack.rooms], 1)
    out = [[], [], []]
    for number, index in enumerate(torch.arange(len(views) * per_frame, device=device).split(group)):
        frame = index // per_frame
        u, v = tiles.rays(index)
        mine = {
            name: [(some - number * group, item) for some, item in groups.get(number, [])]
            for name, groups in rounds.items()
        }
        depth, part = _closest(pack, pack.rooms[frame], u, v, mine)
        linear, cosine = _shade(pack, tiles, frame, depth, part, u, v, shading, spans)
        for pile, piece in zip(out, (linear, depth[:, None, : TILE * TILE], cosine[:, None]), strict=True):
            pile.append(piece)

    def whole(pile: list[Tensor]) -> Tensor:
        x = torch.cat(pile).reshape(len(views), tiles.rows, tiles.cols, -1, TILE, TILE)
        x = x.permute(0, 3, 1, 4, 2, 5).reshape(len(views), x.shape[3], tiles.rows * TILE, tiles.cols * TILE)
        return x[..., : size[0], : size[1]].contiguous()

    linear, depth, cosine = (whole(pile) for pile in out)
    return linear, depth, cosine

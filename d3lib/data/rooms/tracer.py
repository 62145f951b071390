"""A batched ray tracer in plain torch: linear RGB, exact depth and viewing angle of furnished rooms.

A camera ray is (u, v, 1) in camera axes, so the ray parameter *is* the depth along the optical axis. The frame is cut
into tiles; each tile (and each tile's bundle of shadow rays) meets only the parts its bounding planes cannot exclude.
All arithmetic is elementwise and correctly rounded, so a frame's pixels depend on nothing else in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .scene import KINDS, SHAPES, Camera, Material, Part, Scene
from .textures import PATTERNS, Surface, mix_bits, unit

FX, FY, CX, CY = 518.85790117450188, 519.46961112127485, 325.58244941119034, 253.73616633400465  # NYU's RGB, 1-based
TILE = 8  # pixels
GRID = 2  # RGB samples per pixel and axis
SHADINGS = ("full", "flat", "constant_albedo")
_RAYS_AT_ONCE = {"cpu": 2**17, "cuda": 2**23}  # on a CPU: fit its cache, and stay below what torch splits over threads


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
    coefficients: Tensor  # (12, P): a ray's unit-shape coordinates are o + t (u du + v dv + d1), three rows each
    centre: Tensor  # (3, P) in camera axes
    axes: Tensor  # (3, 3, P) in camera axes; [k] is the k-th axis times its half size
    inverse: Tensor  # (9, P): world to unit shape, row by row
    world: Tensor  # (3, P) centre in the world
    edges: Tensor  # (3, 3, P) like `axes`, in the world
    radius: Tensor  # (P,) of the bounding sphere
    casts: Tensor  # (P,)
    faces: Tensor  # (16, 6 P) per face, -x +x -y +y -z +z: normal (3), half sizes along a and b, 11 numbers of `_looks`
    kind: Tensor  # (6 P,) index of the face's pattern
    seed: Tensor  # (6 P,)
    rooms: Tensor  # (F + 1,) where each view's parts begin
    views: Tensor  # (F, 15): camera position, axes (column by column), room size
    lights: Tensor  # (F, L, 6): position and colour; dark where there is none
    ambient: Tensor  # (F, 3)


def _looks(item: Part, walls: Sequence[Material]) -> tuple[list[list[float]], list[int], list[int]]:
    """Half sizes and material of a part's six faces, their patterns and seeds."""
    rows, kinds, seeds = [], [], []
    for face in range(6):
        m = walls[face] if item.shape == "room" else item.material
        if face == 2 and item.front is not None:
            m = item.front
        a, b = item.half[1 if face < 2 else 0], item.half[1 if face > 3 else 2]
        along_b = float(m.pattern == "wood" and b > a)  # grain runs along the longer side
        rows.append([a, b, *m.first, *m.second, m.frequency, m.variation, m.emission, m.gloss, along_b])
        kinds.append(KINDS[m.pattern])
        seeds.append(m.seed)
    return rows, kinds, seeds


@lru_cache(maxsize=256)
def _scene_tables(scene: Scene) -> tuple[np.ndarray, ...]:
    """What of a scene no camera changes: centre, half, axes, inverse, `_Pack.faces`, patterns, seeds."""
    c, h, a = scene.arrays
    inverse = a.transpose(0, 2, 1) / h[:, :, None]
    normal = np.stack([-a, a], 3).transpose(0, 2, 3, 1).reshape(-1, 6, 3)  # (P, face, xyz)
    normal[0] *= -1  # the room is seen from inside
    looks = [_looks(q, scene.walls) for q in scene.parts]
    faces = np.concatenate([normal, np.array([q[0] for q in looks])], 2)
    return c, h, a, inverse, faces, np.array([q[1] for q in looks]), np.array([q[2] for q in looks])


def _pack(views: Sequence[tuple[Scene, Camera]], device: torch.device) -> _Pack:
    rows: dict[str, list[np.ndarray]] = {}

    def add(**columns: np.ndarray) -> None:
        for name, values in columns.items():
            rows.setdefault(name, []).append(values)

    for f, (scene, camera) in enumerate(views):
        c, h, a, m, faces, kind, seed = _scene_tables(scene)
        basis, d = camera.axes, c - camera.position
        turned = (m[..., None] * basis).sum(2)  # (P, 3, 3): unit coordinates per u, v, 1
        origin = -(m * d[:, None]).sum(2)
        add(
            frame=np.full(len(c), f),
            shape=np.array([SHAPES.index(q.shape) for q in scene.parts]),
            coefficients=np.concatenate([origin, *turned.transpose(2, 0, 1)], 1),
            centre=(d[:, :, None] * basis).sum(1),
            axes=((a * h[:, None])[..., None] * basis[:, None]).sum(1),  # (P, own axis, camera axis)
            inverse=m.reshape(-1, 9),
            world=c,
            edges=(a * h[:, None]).transpose(0, 2, 1),
            radius=np.sqrt((h * h).sum(1)),
            casts=np.array([q.casts and q.shape != "room" for q in scene.parts]),
            faces=faces.reshape(-1, 16),
            kind=kind.ravel(),
            seed=seed.ravel(),
        )
    lights = np.zeros((len(views), max(len(scene.lights) for scene, _ in views), 6))
    for f, (scene, _) in enumerate(views):
        for k, light in enumerate(scene.lights):
            lights[f, k] = [*light.position, *light.colour]

    def tensor(values: object) -> Tensor:
        x = np.ascontiguousarray(values)
        dtype = {"f": torch.float32, "i": torch.int32, "b": torch.bool}[x.dtype.kind]
        return torch.as_tensor(x).to(dtype).to(device)

    starts = np.cumsum([0] + [len(scene.parts) for scene, _ in views])
    return _Pack(
        **{name: tensor(np.moveaxis(np.concatenate(values), 0, -1)) for name, values in rows.items()},
        rooms=tensor(starts),
        views=tensor([[*c.position, *c.axes.T.ravel(), *s.size] for s, c in views]),
        lights=tensor(lights),
        ambient=tensor([s.ambient for s, _ in views]),
    )


# --- which parts a tile can see ---------------------------------------------------------------------------------------


def _camera_pairs(pack: _Pack, tiles: _Tiles) -> tuple[Tensor, Tensor]:
    """Pairs (tile, part) that no plane through the eye separates."""
    c, a, rows, cols = pack.centre, pack.axes, tiles.rows, tiles.cols

    def spans(k: int, borders: Tensor, n: int) -> Tensor:
        """(P, n): whether a part touches the wedge between the planes x_k = border z on either side of each band.

        The first n borders are the bands' lower ones, the last n the upper ones (where bands adjoin, n + 1 suffice).
        """
        s = c[k, :, None] - borders * c[2, :, None]
        r = sum((a[j, k, :, None] - borders * a[j, 2, :, None]).abs() for j in range(3)) + 1e-5
        return (s + r > 0)[:, :n] & (s - r < 0)[:, -n:]

    in_front = c[2] + a[:, 2].abs().sum(0) > 0
    touches = (
        spans(1, tiles.vs, rows)[:, :, None]
        & spans(0, tiles.us, cols)[:, None]
        & (in_front & (pack.shape > 0))[:, None, None]
    )
    item, row, col = touches.nonzero(as_tuple=True)
    return (pack.frame[item].long() * rows + row) * cols + col, item


def _rounds(tile: Tensor, item: Tensor, group: int) -> dict[int, list[tuple[Tensor, Tensor]]]:
    """Split pairs into rounds in which no tile occurs twice, per group of `group` tiles (numbered within it)."""
    rounds: dict[int, list[tuple[Tensor, Tensor]]] = {}
    if len(tile):
        order = torch.argsort(tile, stable=True)
        tile, item = tile[order], item[order]
        rank = torch.arange(len(tile), device=tile.device) - torch.searchsorted(tile, tile)
        most = int(rank.max()) + 1
        key, order = torch.sort(tile // group * most + rank, stable=True)
        found, counts = (x.tolist() for x in torch.unique_consecutive(key, return_counts=True))
        pairs = zip((tile % group)[order].split(counts), item[order].split(counts), strict=True)
        for k, pair in zip(found, pairs, strict=True):
            rounds.setdefault(k // most, []).append(pair)
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
    near = torch.where(inside > 0, (-b - root) * inverse, float("inf"))
    return near, (root - b) * inverse


def _cylinder(o: list[Tensor], d: list[Tensor]) -> Interval:
    (a, b), (near, far) = _quadric(o[:2], d[:2]), _slab(o[2], d[2])
    return torch.maximum(near, a), torch.minimum(far, b)


_MEET: dict[str, Callable[[list[Tensor], list[Tensor]], Interval]] = {
    "box": _box,
    "cylinder": _cylinder,
    "sphere": _quadric,
}


class _Tiles:
    """The rays of a run of tiles: (C, S, TILE * TILE) with S samples a pixel, the first through the pixel's centre.

    The other samples form a `grid` by `grid` raster.
    """

    def __init__(self, size: tuple[int, int], device: torch.device, grid: int = GRID) -> None:
        self.rows, self.cols = -(-size[0] // TILE), -(-size[1] // TILE)
        self.fx, self.fy, self.cx, self.cy = intrinsics(size)
        inner = (torch.arange(grid, device=device) + 0.5) / grid - 0.5
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


Lens = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Where pixels look: float64 x and y, counted from 0 and broadcast together, to u and v of the rays (u, v, 1)."""


@lru_cache(maxsize=4)
def _bent(lens: Lens, size: tuple[int, int], grid: int) -> tuple[Tensor, Tensor]:
    """u and v, float32 (tile rows, tile columns, S * TILE²), of a picture taken through a lens."""
    tiles = _Tiles(size, torch.device("cpu"), grid)
    x0, y0 = np.arange(tiles.cols)[None, :, None] * TILE, np.arange(tiles.rows)[:, None, None] * TILE
    x, y = (a.reshape(-1).double().numpy() for a in (tiles.x, tiles.y))
    u, v = (torch.as_tensor(a, dtype=torch.float32) for a in lens(x0 + x, y0 + y))
    return u, v


class _LensTiles(_Tiles):
    """The same through a lens that bends rays: they are looked up, and the columns (rows) of tiles overlap a little."""

    def __init__(self, size: tuple[int, int], device: torch.device, grid: int, lens: Lens) -> None:
        super().__init__(size, device, grid)
        self.u, self.v = (a.to(device) for a in _bent(lens, size, grid))
        self.us = torch.cat([self.u.amin((0, 2)), self.u.amax((0, 2))])
        self.vs = torch.cat([self.v.amin((1, 2)), self.v.amax((1, 2))])

    def rays(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        within = tiles % (self.rows * self.cols)
        return self.u.flatten(0, 1).index_select(0, within), self.v.flatten(0, 1).index_select(0, within)


def _closest(pack: _Pack, room: Tensor, u: Tensor, v: Tensor, rounds: dict[str, list]) -> tuple[Tensor, Tensor]:
    """Depth (C, R) and part (C, R) that each ray meets first; `room` (C,) is what is behind everything."""

    def local(item: Tensor, some: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        k = pack.coefficients.index_select(1, item)[:, :, None]  # (12, n, 1)
        us, vs = (u, v) if some is None else (u.index_select(0, some), v.index_select(0, some))
        return [k[0], k[1], k[2]], [us * k[3 + i] + vs * k[6 + i] + k[9 + i] for i in range(3)]

    o, d = local(room, None)
    exits = [(torch.where(d[i] < 0, -1.0, 1.0) - o[i]) / d[i] for i in range(3)]
    depth = torch.minimum(torch.minimum(exits[0], exits[1]), exits[2])
    part = room[:, None].expand_as(depth).contiguous()
    for name, meet in _MEET.items():
        for some, item in rounds[name]:
            near, far = meet(*local(item, some))
            before = depth.index_select(0, some)
            closer = (near < far) & (near > 0) & (near < before)
            depth.index_copy_(0, some, torch.where(closer, near, before))
            part.index_copy_(0, some, torch.where(closer, item[:, None].to(part.dtype), part.index_select(0, some)))
    return depth, part


# --- what they look like ----------------------------------------------------------------------------------------------


@dataclass
class _Hits:
    """Points where rays meet parts, all (N,) or lists of (N,)."""

    normal: list[Tensor]  # in the world, of length 1, towards the viewer
    face: Tensor  # index into the columns of `_Pack.faces`
    look: Tensor  # (16, N): those columns
    across: tuple[Tensor, Tensor]  # texture coordinates over the whole face, -1 to 1
    along: tuple[Tensor, Tensor]  # the same in metres


def _turns(x: Tensor, y: Tensor) -> Tensor:
    """A stand-in for the angle of (x, y), -1 to 1, monotone and exact to rounding: the diamond angle."""
    ring = x / (x.abs() + y.abs() + 1e-12)
    return torch.where(y < 0, ring - 1, 1 - ring)


def _hits(pack: _Pack, part: Tensor, depth: Tensor, u: Tensor, v: Tensor) -> _Hits:
    k = pack.coefficients.index_select(1, part)
    q = [k[i] + depth * (u * k[3 + i] + v * k[6 + i] + k[9 + i]) for i in range(3)]
    # the face of a box is where a coordinate is 1; comparisons are slow in torch, so this is arithmetic
    x, y, z = (a.abs() for a in q)
    on_z = ((z - torch.maximum(x, y)) * 1e9).clamp(0, 1)
    on_x = ((x - torch.maximum(y, z)) * 1e9).clamp(0, 1)
    on_y = 1 - on_x - on_z
    sign = (q[0] * on_x + q[1] * on_y + q[2] * on_z).sign()
    face = part * 6 + (2 * on_y + 4 * on_z + 0.5 * sign + 0.5).round().int()
    across = [q[0] + (q[1] - q[0]) * on_x, q[2] + (q[1] - q[2]) * on_z]
    look = pack.faces.index_select(1, face)
    normal, along = list(look[:3].unbind()), [across[0] * look[3], across[1] * look[4]]
    shape = pack.shape.index_select(0, part)
    bent = (shape > 1).nonzero()[:, 0]
    if len(bent):  # cylinders and spheres: side normals, and textures wrapped around
        q = [a.index_select(0, bent) for a in q]
        item, post = part.index_select(0, bent), shape.index_select(0, bent) == 2
        top = post & (q[2].abs() > 0.9999)
        m = pack.inverse.index_select(1, item)
        g = [torch.where(top, 0.0, q[0]), torch.where(top, 0.0, q[1]), torch.where(post & ~top, 0.0, q[2])]
        n = [g[0] * m[i] + g[1] * m[3 + i] + g[2] * m[6 + i] for i in range(3)]
        length = (n[0] * n[0] + n[1] * n[1] + n[2] * n[2]).sqrt()
        turns, first = _turns(q[0], q[1]), pack.faces.index_select(1, item * 6)
        ua, ub = torch.where(top, q[0], turns), torch.where(top, q[1], q[2])
        a, b = ua * torch.where(top, 1.0, np.pi) * first[3], ub * torch.where(top, first[3], first[4])
        look.index_copy_(1, bent, first)
        for whole, some in (
            *zip(normal, [x / length for x in n], strict=True),
            *zip(across, (ua, ub), strict=True),
            *zip(along, (a, b), strict=True),
            (face, item * 6),
        ):
            whole.index_copy_(0, bent, some)
    return _Hits(normal, face, look, (across[0], across[1]), (along[0], along[1]))


def _albedo(pack: _Pack, hits: _Hits, footprint: Tensor, constant: bool) -> list[Tensor]:
    """Linear RGB reflectance, three (N,)."""
    look, (ua, ub), (a, b) = hits.look, hits.across, hits.along
    kind, seed = pack.kind.index_select(0, hits.face), pack.seed.index_select(0, hits.face)
    if constant:
        return [torch.full_like(a, 0.5) for _ in range(3)]
    swap = look[15]
    a, b = (a + (b - a) * swap + 50) * look[11], (b + (a - b) * swap + 50) * look[11]
    blur = footprint * look[11] + 1e-4
    mix, cell = torch.zeros_like(a), seed.clone()
    for number, count in enumerate(torch.bincount(kind).tolist()):
        if count:
            chosen = (kind == number).nonzero()[:, 0]
            columns = [x.index_select(0, chosen) for x in (a, b, ua, ub, seed, blur)]
            blend, cells = PATTERNS[number](Surface(*columns))
            mix.index_copy_(0, chosen, blend)
            cell.index_copy_(0, chosen, cells)
    tint = mix_bits(cell)
    bright = 0.5 * unit(tint, 24) - 0.75
    tints = [(1 + look[12] * (bright + unit(tint, 8 * i))).clamp(min=0.08) for i in range(3)]
    return [(look[5 + i] * (1 - mix) * tints[i] + look[8 + i] * mix).clamp(0, 1) for i in range(3)]


def _dot(a: Sequence[Tensor] | Tensor, b: Sequence[Tensor] | Tensor) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _shadow_pairs(
    pack: _Pack, frame: Tensor, eye: Tensor, low: Tensor, high: Tensor, own: Tensor
) -> tuple[Tensor, Tensor]:
    """Pairs (bundle, part) for B bundles of shadow rays from the lights `eye` (3, B) of views `frame` (B,).

    A bundle's points lie between `low` and `high` (3, B), so its rays lie in the pyramid from the light around that
    box: left out are the parts whose bounding sphere, then whose own box, is outside one of the pyramid's sides. Left
    out too is the part `own` (B,) that all of a bundle's points lie on, if any: no convex part shades its lit side.
    """
    high_x, high_y, high_z = (torch.arange(8, device=frame.device) // n % 2 for n in (1, 2, 4))
    pick = torch.stack([high_x, high_y, high_z])[:, None]
    ray = torch.where(pick > 0, high[:, :, None], low[:, :, None]) - eye[:, :, None]  # (3, B, 8)
    w = (low + high) / 2 - eye
    w = w / (_dot(w, w) + 1e-12).sqrt()
    helper = torch.zeros_like(w)
    helper[0], helper[2] = (w[2].abs() > 0.7).float(), (w[2].abs() <= 0.7).float()

    def cross(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([a[(i + 1) % 3] * b[(i + 2) % 3] - a[(i + 2) % 3] * b[(i + 1) % 3] for i in range(3)])

    e1 = cross(w, helper)
    e1 = e1 / _dot(e1, e1).sqrt()
    deep = _dot(ray, w[:, :, None])
    reach = deep.amax(1, keepdim=True)
    wide = deep.amin(1, keepdim=True) < 0.1 * reach  # no pyramid narrower than half of space
    sides = []  # planes through the light, normals inwards
    for e in (e1, cross(w, e1)):
        slope = _dot(ray, e[:, :, None]) / deep.clamp(min=1e-3)
        sides += [e - slope.amin(1) * w, slope.amax(1) * w - e]
    # the parts of each bundle's view, padded to the longest
    start, end = pack.rooms[frame][:, None], pack.rooms[frame + 1][:, None]
    item = start + torch.arange(int((pack.rooms[1:] - pack.rooms[:-1]).max()), device=frame.device)
    within = item < end
    item = torch.minimum(item, end - 1)
    flat = item.reshape(-1)
    c = pack.world.index_select(1, flat).reshape(3, *item.shape) - eye[:, :, None]
    radius = pack.radius.index_select(0, flat).reshape(item.shape) + 1e-3
    z = _dot(c, w[:, :, None])
    inside = (z - radius < reach) & (z + radius > 0)
    for n in sides:
        inside &= _dot(c, n[:, :, None]) + radius * _dot(n, n).sqrt()[:, None] > 0
    inside = (inside | wide) & within & pack.casts.index_select(0, flat).reshape(item.shape) & (item != own[:, None])
    bundle, column = inside.nonzero(as_tuple=True)
    item = item[bundle, column]
    normal = torch.stack(sides).index_select(2, bundle)  # (4, 3, pairs)
    edges, middle = pack.edges.index_select(2, item), c[:, bundle, column]
    extent = sum(normal[:, None, i] * edges[None, :, i] for i in range(3)).abs().sum(1)
    inside = ((normal * middle).sum(1) + extent > -1e-3).all(0) | wide[bundle, 0]
    # and of those, the ones that overlap the upright box around light and points
    near, far = torch.minimum(low, eye) - eye, torch.maximum(high, eye) - eye
    extent = edges.abs().sum(0) + 1e-3
    inside &= ((middle + extent > near[:, bundle]) & (middle - extent < far[:, bundle])).all(0)
    return bundle[inside], item[inside]


def _lit(pack: _Pack, frame: Tensor, part: Tensor, points: list[Tensor]) -> Tensor:
    """(L, C, R): 1 where a light reaches points, three (C, R), on `part` (C, R) in views `frame` (C,); 0 in shadow."""
    count, (c, r) = pack.lights.shape[1], points[0].shape
    lamps = pack.lights[frame].permute(2, 1, 0).reshape(6, -1)  # (6, L C): bundle = light * C + tile
    on = (lamps[3:].sum(0) > 0).nonzero()[:, 0]
    low, high = (torch.stack([x.amin(1) for x in points]), torch.stack([x.amax(1) for x in points]))
    tile, eye = on % c, lamps[:3].index_select(1, on)
    own = torch.where(part.amin(1) == part.amax(1), part[:, 0], -1)
    boxes = low.index_select(1, tile), high.index_select(1, tile)
    bundle, item = _shadow_pairs(pack, frame[tile], eye, *boxes, own[tile])
    blocked = torch.zeros(count * c, r, device=frame.device)
    shape, block = pack.shape[item], max(1, _RAYS_AT_ONCE.get(frame.device.type, 2**15) // r)
    for name, meet in _MEET.items():
        chosen = (shape == SHAPES.index(name)).nonzero()[:, 0]
        for some, parts in zip(bundle[chosen].split(block), item[chosen].split(block), strict=True):
            m = pack.inverse.index_select(1, parts)[:, :, None]
            source = eye.index_select(1, some)[:, :, None]
            origin = source - pack.world.index_select(1, parts)[:, :, None]
            d = [points[i].index_select(0, tile[some]) - source[i] for i in range(3)]
            near, far = meet(*([_dot(x, m[3 * k : 3 * k + 3]) for k in range(3)] for x in (origin, d)))
            overlap = far.clamp_(max=1) - near.clamp_(min=0)  # of the ray inside the part
            blocked.index_add_(0, on[some], overlap.mul_(1e6).clamp_(0, 1))
    return (1 - blocked).clamp_(min=0).reshape(count, c, r)


def _shade(
    pack: _Pack, frame: Tensor, depth: Tensor, part: Tensor, u: Tensor, v: Tensor, fx: float, shading: str
) -> Tensor:
    """Linear RGB (C, 3, R) of C tiles of R samples."""
    shape = depth.shape
    hits = _hits(pack, *(x.reshape(-1) for x in (part, depth, u, v)))
    where = pack.views[frame].t()[:, :, None]
    ray = [u * where[3 + i] + v * where[6 + i] + where[9 + i] for i in range(3)]
    length = (u * u + v * v + 1).sqrt()
    normal = [x.reshape(shape) for x in hits.normal]
    cosine = -_dot(ray, normal) / length
    footprint = depth / (GRID * fx * cosine.clamp(min=0.15))
    colour = [x.reshape(shape) for x in _albedo(pack, hits, footprint.reshape(-1), shading == "constant_albedo")]
    if shading == "flat":
        return torch.stack(colour, 1)
    point = [where[i] + depth * ray[i] for i in range(3)]
    # ambient light is dimmer in corners, near the floor, and a little from below
    corner = 0.9 + 0.1 * normal[2]
    for i in range(3):
        d = torch.minimum(point[i], where[12 + i] - point[i]).clamp(min=0)
        corner = corner * (1 - 0.04 / (d + 0.1))
    light = [pack.ambient[frame][:, i, None] * corner + hits.look[13].reshape(shape) for i in range(3)]
    mirrored = [(ray[i] + 2 * cosine * length * normal[i]) / length for i in range(3)]  # direction of the reflected ray
    shine = torch.zeros_like(corner)
    lift = 0.003 + 0.002 * depth
    lifted = [point[i] + normal[i] * lift for i in range(3)]
    lit = _lit(pack, frame, part, lifted)
    for k in range(len(lit)):
        lamp = pack.lights[frame, k].t()[:, :, None]
        to = [lamp[i] - point[i] for i in range(3)]
        facing = _dot(to, normal)
        square = _dot(to, to)
        inverse = 1 / (square + 0.01).sqrt()
        arrives = lit[k] / (square + 0.15)
        power = facing.clamp(min=0) * inverse * arrives
        light = [light[i] + lamp[3 + i] * power for i in range(3)]
        spark = _dot(to, mirrored).clamp(min=0) * inverse
        for _ in range(4):
            spark = spark * spark  # to the 16th power
        shine = shine + spark * arrives * (0.4 / 3 * (lamp[3] + lamp[4] + lamp[5]))
    shine = shine * hits.look[14].reshape(shape)
    return torch.stack([colour[i] * light[i] + shine for i in range(3)], 1)


@torch.no_grad()
def trace(
    views: Sequence[tuple[Scene, Camera]],
    size: tuple[int, int],
    device: torch.device,
    shading: str | None = "full",
    lens: Lens | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Render views: linear RGB (B, 3, H, W), exact depth (B, 1, H, W) metres, cosine of viewing angle (B, 1, H, W).

    Without shading there is no RGB (an empty tensor). A `lens` says where pixels look, instead of `intrinsics`.
    """
    pack = _pack(views, device)
    grid = GRID if shading else 0
    tiles = _LensTiles(size, device, grid, lens) if lens else _Tiles(size, device, grid)
    per_frame, pixels = tiles.rows * tiles.cols, TILE * TILE
    group = max(1, _RAYS_AT_ONCE.get(device.type, 2**15) // (tiles.samples * pixels))
    tile, item = _camera_pairs(pack, tiles)
    of_shape = {name: (pack.shape[item] == SHAPES.index(name)).nonzero()[:, 0] for name in _MEET}
    rounds = {name: _rounds(tile[chosen], item[chosen], group) for name, chosen in of_shape.items()}
    out: tuple[list[Tensor], ...] = ([], [], [])
    for number, index in enumerate(torch.arange(len(views) * per_frame, device=device).split(group)):
        frame = index // per_frame
        u, v = tiles.rays(index)
        mine = {name: groups.get(number, []) for name, groups in rounds.items()}
        depth, part = _closest(pack, pack.rooms[frame], u, v, mine)
        if shading:
            samples = [x[:, pixels:].contiguous() for x in (depth, part, u, v)]
            linear = _shade(pack, frame, *samples, tiles.fx, shading).unflatten(2, (tiles.samples - 1, pixels))
            out[0].append(sum(linear[:, :, j] for j in range(tiles.samples - 1)) / (tiles.samples - 1))
        u, v = u[:, :pixels], v[:, :pixels]
        centre = [x[:, :pixels].reshape(-1) for x in (part, depth, u, v)]
        normal = [x.reshape(u.shape) for x in _hits(pack, *centre).normal]
        where = pack.views[frame].t()[:, :, None]
        ray = [u * where[3 + i] + v * where[6 + i] + where[9 + i] for i in range(3)]
        cosine = -_dot(ray, normal) / (u * u + v * v + 1).sqrt()
        out[1].append(depth[:, None, :pixels])
        out[2].append(cosine[:, None])

    def whole(pile: list[Tensor]) -> Tensor:
        if not pile:
            return torch.empty(0, device=device)
        x = torch.cat(pile).reshape(len(views), tiles.rows, tiles.cols, -1, TILE, TILE)
        x = x.permute(0, 3, 1, 4, 2, 5).reshape(len(views), x.shape[3], tiles.rows * TILE, tiles.cols * TILE)
        return x[..., : size[0], : size[1]].contiguous()

    linear, depth, cosine = (whole(pile) for pile in out)
    return linear, depth, cosine

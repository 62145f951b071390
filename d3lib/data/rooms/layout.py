"""From a scene's seed to its room, furniture and lights, and from a view's index to its camera."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .furniture import ANYWHERE, AT_WALL, SEEN, UNSEEN, Palette, hue
from .scene import (
    Array,
    Camera,
    Draw,
    Light,
    Material,
    Part,
    Scene,
    gap,
    glance,
    look,
    moved,
    part,
    product,
    reach,
    rotation,
)

UNSEEN_FROM = 4000  # scenes with this seed or a larger one are furnished from the unseen families
NEAR, FAR = 0.4, 10.0  # metres: every exact depth lies between
CLEARANCE = 0.55  # metres between camera and anything: at the corners of the frame this is 0.43 m of depth
MOST_LIGHTS = 3
_SCENE, _PATH, _VIEW, _PICTURE = range(4)  # separate streams, so that nothing drawn for one moves another


def _bounds(parts: Sequence[Part]) -> tuple[Array, Array]:
    centres, extents = np.array([p.centre for p in parts]), np.array([reach(p) for p in parts])
    return (centres - extents).min(0), (centres + extents).max(0)


class _Room:
    """The room while it is being furnished: keeps track of what stands where."""

    def __init__(self, draw: Draw, palette: Palette) -> None:
        self.draw, self.palette = draw, palette
        long, short = 2.5 + 7.5 * max(draw(), draw()) * draw(0.4, 1), 2.5 + 5.0 * draw() * draw(0.4, 1)
        sides = (long, short) if draw() < 0.5 else (short, long)
        self.size = np.array([*sides, draw(2.2, 2.7) if draw() < 0.6 else draw(2.5, 3.8)])
        wall = palette.wall()
        accent = palette.wall() if draw() < 0.4 else wall
        self.walls = (accent, wall, wall, wall, palette.floor(), palette.ceiling())
        self.parts: list[Part] = [Part("room", self.size / 2, self.size / 2, np.eye(3), wall)]
        self.lights: list[Light] = []
        self.items: list[str] = []
        self.taken: list[tuple[Array, Array]] = []  # boxes on the floor and along the walls
        stand = np.array([self._along(0, 0.9), self._along(1, 0.9)])
        self.stand = stand  # a spot that stays free for the camera
        self.taken.append((np.array([*(stand - 0.6), 0.0]), np.array([*(stand + 0.6), self.size[2]])))

    def _along(self, axis: int, margin: float) -> float:
        return self.draw(margin, float(self.size[axis]) - margin)

    def _free(self, low: Array, high: Array) -> bool:
        return not any(((low < b) & (high > a)).all() for a, b in self.taken)

    def place(self, parts: list[Part], lights: list[Light], name: str, wall: bool, tries: int = 8) -> bool:
        """Stand an item somewhere free, back to a wall or anywhere; False where it does not fit."""
        draw = self.draw
        centres, edges = np.array([p.centre for p in parts]), np.array([p.axes * p.half for p in parts])
        edges = edges.transpose(1, 0, 2).reshape(3, -1)
        for _ in range(tries):
            quarter = draw.index(4)
            yaw = 90 * quarter + (draw(-4, 4) if wall else draw(-45, 45))
            turn = rotation(2, yaw)
            spread = np.abs(product(turn, edges)).reshape(3, -1, 3)
            spread = spread[:, :, 0] + spread[:, :, 1] + spread[:, :, 2]
            middle = product(turn, centres.T)
            low, high = (middle - spread).min(1), (middle + spread).max(1)
            if ((high - low)[:2] > self.size[:2] - 0.1).any():
                continue
            shift = np.zeros(3)
            for axis in (0, 1):
                shift[axis] = draw(0.02 - low[axis], float(self.size[axis]) - 0.02 - high[axis])
            if wall:  # the item's back (+y) turned by quarters: +y, -x, -y, +x
                axis, end = (1, 0, 1, 0)[quarter], quarter in (0, 3)
                shift[axis] = self.size[axis] - 0.03 - high[axis] if end else 0.03 - low[axis]
            low, high = low + shift, high + shift
            if high[2] < self.size[2] - 0.05 and self._free(low - 0.04, high + 0.04):
                self.taken.append((low, high))
                self.parts.extend(moved(p, turn, shift) for p in parts)
                self.lights.extend(Light(product(turn, q[:, None])[:, 0] + shift, c) for q, c in lights)
                self.items.append(name)
                return True
        return False

    def hang(self, parts: list[Part], name: str, height: float, keep_clear: float) -> tuple[Array, Array] | None:
        """Hang flat parts (x across, z up from 0, -y into the room) on a wall; its turn and place, or None."""
        for _ in range(4):
            quarter = self.draw.index(4)
            turn = rotation(2, 90 * quarter)
            axis, end = (1, 0, 1, 0)[quarter], quarter in (0, 3)
            spot = np.array([0.0, 0.0, height])
            spot[1 - axis] = self._along(1 - axis, 0.2)
            spot[axis] = self.size[axis] - 0.001 if end else 0.001
            set_up = [moved(p, turn, spot) for p in parts]
            low, high = _bounds(set_up)
            fits = low[1 - axis] > 0.1 and high[1 - axis] < self.size[1 - axis] - 0.1 and high[2] < self.size[2]
            clear_low, clear_high = low - 0.05, high + 0.05
            clear_low[axis] -= keep_clear
            clear_high[axis] += keep_clear
            if fits and self._free(clear_low, clear_high):
                self.taken.append((clear_low, clear_high))
                self.parts.extend(set_up)
                self.items.append(name)
                return turn, spot
        return None

    def fixtures(self) -> None:
        """Skirting, corner blocks, doors, windows with curtains, ceiling lamps, pictures, a rug."""
        d, p, (w, length, h) = self.draw, self.palette, self.size
        wall, trim = self.walls[1], p.hard()
        for _ in range(d.index(3) if min(w, length) > 3 else 0):  # a chimney breast or pillar makes an L of the room
            size = np.array([d(0.3, 0.3 * float(w)), d(0.3, 0.3 * float(length)), h])
            corner = np.array([d.index(2), d.index(2), 0])
            block = part("box", corner * (self.size - size) + size / 2, size, wall)
            low, high = _bounds([block])
            if self._free(low, high):
                self.parts.append(block)
                self.taken.append((low, high))
        if d() < 0.7:
            tall = d(0.05, 0.14)
            for axis in (0, 1):
                for end in (0, 1):
                    centre, size = self.size / 2, self.size.copy()
                    centre = np.array([centre[0], centre[1], tall / 2])
                    centre[axis], size[axis], size[2] = end * self.size[axis], 0.03, tall
                    self.parts.append(part("box", centre, size, trim, casts=False))
        for _ in range(1 + (d() < 0.3)):
            self._door(d(0.75, 1.0), d(1.95, 2.1), trim)
        for _ in range(d.index(3)):
            self._window(d(0.6, 1.8), d(0.8, 1.5), d(0.6, 1.0), trim)
        for _ in range(1 + d.index(2)):
            self._ceiling_lamp()
        if d() < 0.5:
            size = (d(0.8, 2.2), d(0.6, 1.5), 0.012)
            rug = part("box", (self._along(0, 0.6), self._along(1, 0.6), 0.006), size, p.cloth(), casts=False,
                       axes=rotation(2, d(0, 180)))  # fmt: skip
            low, high = _bounds([rug])
            if (low[:2] > 0).all() and (high[:2] < self.size[:2]).all():
                self.parts.append(rug)

    def _door(self, wide: float, tall: float, trim: Material) -> None:
        leaf = part("box", (0, -0.02, tall / 2), (wide, 0.04, tall), self.palette.hard(), casts=False,
                    front=self.palette.face(self.palette.style.door))  # fmt: skip
        knob = part("sphere", (wide * 0.42, -0.07, 1.0), (0.06, 0.06, 0.06), self.palette.metal(), casts=False)
        jambs = [part("box", (s * (wide / 2 + 0.04), -0.03, tall / 2 + 0.04), (0.08, 0.06, tall + 0.08), trim)
                 for s in (-1, 1)]  # fmt: skip
        lintel = part("box", (0, -0.03, tall + 0.04), (wide, 0.06, 0.08), trim)
        self.hang([leaf, knob, lintel, *jambs], "door", 0.0, 0.7)

    def _window(self, wide: float, tall: float, sill: float, trim: Material) -> None:
        d, p = self.draw, self.palette
        tall = min(tall, float(self.size[2]) - sill - 0.2)
        day, blue = d() < 0.75, d(0.0, 0.35)
        sky = (1 - blue, 1 - 0.5 * blue, 1.0)
        pane = Material(p.style.window, sky, (0.1, 0.14, 0.06), 1.0, d.index(2**30), emission=d(1, 3) if day else 0.02)
        parts = [part("box", (0, -0.01, tall / 2), (wide, 0.02, tall), trim, front=pane, casts=False),
                 part("box", (0, -0.08, -0.02), (wide + 0.1, 0.16, 0.04), trim)]  # fmt: skip
        parts += [part("box", (s * (wide / 2 + 0.03), -0.03, tall / 2), (0.06, 0.06, tall), trim) for s in (-1, 1)]
        parts.append(part("box", (0, -0.03, tall + 0.03), (wide + 0.12, 0.06, 0.06), trim))
        if d() < 0.5:
            cloth, drop = p.cloth(), sill * d(0.3, 0.9)
            size = (d(0.07, 0.13), 0.1, tall + drop + 0.1)
            for s in (-1, 1):
                for k in range(3):  # folds
                    x = s * (wide / 2 + 0.15 - k * size[0] * 0.9)
                    parts.append(part("cylinder", (x, -0.13, (tall - drop + 0.1) / 2), size, cloth))
        hung = self.hang(parts, "window", sill, 0.2)
        if hung and day:
            inside = product(hung[0], np.array([[0.0], [-0.35], [tall * 0.6]]))[:, 0]
            self.lights.append(Light(hung[1] + inside, np.array(sky) * d(1.5, 7.0)))

    def _ceiling_lamp(self) -> None:
        d, p, h = self.draw, self.palette, float(self.size[2])
        x, y, colour = self._along(0, 0.5), self._along(1, 0.5), np.array(hue(d(0.05, 0.18), d(0.02, 0.4), 1.0))
        if d() < 0.08:
            return
        glow = p.glow(tuple(colour), d(0.8, 2.5))
        drop = d(0.1, 0.2) if h < 2.6 else d(0.1, 0.7)
        wide, kind = d(0.15, 0.5), d.index(3)
        if kind == 0:
            drop = 0.06
            self.parts.append(part("box", (x, y, h - 0.03), (wide * 2, wide, 0.05), glow, casts=False))
        else:
            size = (wide, wide, wide if kind == 1 else d(0.1, 0.25))
            self.parts.append(
                part(("sphere", "cylinder")[kind - 1], (x, y, h - drop - size[2] / 2), size, glow, casts=False)
            )
            self.parts.append(part("cylinder", (x, y, h - drop / 2), (0.02, 0.02, drop), p.metal(), casts=False))
        self.lights.append(Light(np.array([x, y, h - drop - 0.05]), colour * d(1.0, 6.0)))
        self.items.append("ceiling_lamp")

    def furnish(self, unseen: bool) -> None:
        """Place furniture until the room is as full as its draw says, then pictures where walls are left."""
        d, area = self.draw, float(self.size[0] * self.size[1])
        for wall, makers, count in (
            (True, AT_WALL[unseen], 3 + int(area * d(0.1, 0.35))),
            (False, ANYWHERE[unseen], 2 + int(area * d(0.05, 0.3))),
        ):
            for _ in range(min(count, 10)):
                maker = d.pick(makers)
                self.place(*maker(d, self.palette), maker.__name__, wall)
        for _ in range(d.index(6)):
            w, h = d(0.25, 1.2), d(0.25, 0.9)
            face = self.palette.face(self.palette.style.picture)
            frame = part("box", (0, -0.02, h / 2), (w, 0.04, h), self.palette.hard(), front=face, casts=False)
            self.hang([frame], "picture", d(0.9, 1.6), 0.0)


@lru_cache(maxsize=256)
def make_scene(seed: int) -> Scene:
    """The scene of a seed: equal bits on every machine."""
    draw, unseen = Draw(_SCENE, seed), seed >= UNSEEN_FROM
    room = _Room(draw, Palette(draw, UNSEEN if unseen else SEEN))
    room.fixtures()
    room.furnish(unseen)
    lights = room.lights[:MOST_LIGHTS]
    if not lights:
        lights = [Light(room.size * np.array([0.5, 0.5, 0.95]), np.full(3, draw(1.0, 5.0)))]
    power = sum(light.colour for light in lights) * (draw(0.4, 1.4) / float(room.size[0] * room.size[1] + 10))
    way, path = Draw(_PATH, seed), []
    for k in range(8):
        spot = room.stand if k == 7 else room.size[:2] * np.array([way(), way()])
        path.append([*spot, *(room.size[:2] * np.array([way(), way()]))])
    return Scene(room.size, room.walls, tuple(room.parts), tuple(lights), power, np.array(path), tuple(room.items))


def van_der_corput(index: int) -> float:
    """The index's binary digits mirrored at the point: 0, 1/2, 1/4, 3/4 ...: any prefix covers [0, 1) evenly."""
    value, step = 0.0, 0.5
    while index:
        value, index, step = value + step * (index & 1), index >> 1, step / 2
    return value


def _worth_taking(scene: Scene, camera: Camera, median: float, parts: float) -> bool:
    """Whether a view shows `parts` parts at a median depth of `median` metres, and is not mostly one thing."""
    depth, seen = glance(scene, camera)
    counts = np.bincount(seen)
    blank = counts[1:].max(initial=0) > 0.5 * len(seen) or counts[0] > 0.85 * len(seen)
    return bool(np.sort(depth)[len(depth) // 2] > median) and (counts > 0).sum() >= parts and not blank


def make_camera(seed: int, view: int) -> Camera:
    """The camera of a view along its scene's path; height, pitch, roll and exposure are drawn independently.

    From a place too close to something, with a corner beyond `FAR` ahead, or with little but a blank wall to see, the
    camera moves and turns, ever further from the path; height, pitch and roll stay as drawn.
    """
    scene = make_scene(seed)
    draw, picture = Draw(_VIEW, seed, view), Draw(_PICTURE, seed, view)
    place = van_der_corput(view) * len(scene.path)
    start = int(place)
    a, b = scene.path[start], scene.path[(start + 1) % len(scene.path)]
    way = a + (b - a) * (place - start)
    style = {
        "exposure": 0.17 * picture.ratio(1.7),
        "vignette": picture(0.0, 0.5),
        "noise": picture(0.002, 0.02),
        "balance": (picture(0.88, 1.12), 1.0, picture(0.88, 1.12)),
        "seed": int(picture() * 2**31),
    }
    x_max, y_max, z_max = (float(side) for side in scene.size)
    corners = np.array([[x, y, z] for x in (0, x_max) for y in (0, y_max) for z in (0, z_max)])
    median = min(draw(0.9, 3.8), 0.45 * max(x_max, y_max))
    z, head = draw(0.6, min(2.2, z_max - 0.57)), look(0.0, 8 - 40 * draw() * draw(0.4, 1), draw(-8, 8))
    for attempt in range(600):
        loose = 0.15 + attempt / 60
        x, y, to_x, to_y = (float(w) + draw(-loose, loose) for w in way)
        if attempt >= 300:  # rare: the spot that was kept free, at another height
            (x, y), z = (float(w) for w in scene.path[-1][:2]), draw(0.6, min(2.2, z_max - 0.57))
        x, y = (min(max(w, CLEARANCE + 0.02), side - CLEARANCE - 0.02) for w, side in ((x, x_max), (y, y_max)))
        position = np.array([x, y, z])
        if gap(scene, position) < CLEARANCE:
            continue
        ahead = np.array([to_x - x, to_y - y, 0.0])
        ahead = ahead / np.sqrt(ahead[0] * ahead[0] + ahead[1] * ahead[1] + 1e-9)
        toward = np.array([[ahead[1], ahead[0], 0.0], [-ahead[0], ahead[1], 0.0], [0.0, 0.0, 1.0]])
        axes = product(toward, head)
        camera = Camera(position, axes, **style)
        reach = corners - position
        if (reach[:, 0] * axes[0, 2] + reach[:, 1] * axes[1, 2] + reach[:, 2] * axes[2, 2]).max() > FAR - 0.05:
            continue
        if attempt >= 300 or _worth_taking(scene, camera, median - attempt / 40, 7 - attempt / 12):
            return camera
    raise AssertionError(f"scene {seed} has no place to stand")  # the reserved spot makes this impossible

"""The furniture families: a function each, which makes an item around the origin on the floor, front at -y."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .scene import Draw, Light, Material, Part, moved, part, product, rotation

Colour = tuple[float, float, float]


class Style(NamedTuple):
    """The patterns a family of scenes may use, by role."""

    wall: tuple[str, ...]
    ceiling: tuple[str, ...]
    floor: tuple[str, ...]
    hard: tuple[str, ...]
    cloth: tuple[str, ...]
    picture: str
    window: str
    door: str
    books: str


SEEN = Style(
    wall=("plain", "plain", "stripes", "dots"), ceiling=("plain",), floor=("planks", "tiles", "checker", "fabric"),
    hard=("wood", "wood", "plain"), cloth=("fabric", "fabric", "stripes"),
    picture="picture", window="window", door="door", books="books",
)  # fmt: skip
UNSEEN = Style(
    wall=("speckle", "brick", "zigzag"), ceiling=("speckle",), floor=("terrazzo", "hexagons", "brick"),
    hard=("marble", "speckle", "ribbed"), cloth=("plaid", "zigzag"),
    picture="poster", window="blinds", door="ribbed", books="brick",
)  # fmt: skip
# Periods per metre around which a pattern's frequency varies.
FREQUENCY = {"plain": 1.5, "wood": 3, "planks": 8, "tiles": 3, "checker": 3, "stripes": 7, "dots": 9, "fabric": 8,
             "books": 28, "brick": 9, "terrazzo": 6, "hexagons": 4, "plaid": 6, "zigzag": 6, "marble": 2.5,
             "speckle": 5, "ribbed": 5}  # fmt: skip


def hue(h: float, saturation: float, value: float) -> Colour:
    """Linear RGB from hue (turns), saturation and value."""
    ramps = [min(max(abs((h + shift) % 1 * 6 - 3) - 1, 0), 1) for shift in (0, 2 / 3, 1 / 3)]
    return tuple(value * (1 - saturation * (1 - ramp)) for ramp in ramps)  # type: ignore[return-value]


class Palette:
    """Materials for one scene: draws pattern, colours and frequency by role."""

    def __init__(self, draw: Draw, style: Style) -> None:
        self.draw, self.style = draw, style
        self.finish = [self.hard() for _ in range(3)]  # furniture of one scene shares a few finishes

    def make(self, pattern: str, first: Colour, second: Colour, variation: float = 0.0, gloss: float = 0.0) -> Material:
        """A material whose frequency is drawn around its pattern's usual one."""
        frequency = FREQUENCY.get(pattern, 1) * self.draw.ratio(2)
        return Material(pattern, first, second, frequency, self.draw.index(2**30), variation, 0.0, gloss)

    def _shade(self, colour: Colour, low: float, high: float) -> Colour:
        factor = self.draw(low, high)
        return tuple(c * factor for c in colour)  # type: ignore[return-value]

    def hard(self) -> Material:
        """Wood, lacquer or another hard finish."""
        d = self.draw
        pattern = d.pick(self.style.hard)
        if pattern == "plain":
            first = hue(d(), d(0, 0.5), d(0.1, 0.8)) if d() < 0.6 else hue(0, 0, d(0.03, 0.85))
            return self.make(pattern, first, self._shade(first, 0.8, 0.95), gloss=d(0, 0.5))
        first = hue(d(0.05, 0.11), d(0.35, 0.75), d(0.1, 0.65))
        return self.make(pattern, first, self._shade(first, 0.45, 0.8), gloss=d(0, 0.35))

    def wood(self) -> Material:
        """One of the scene's own finishes."""
        return self.draw.pick(self.finish)

    def cloth(self) -> Material:
        """Upholstery, bedding, rugs."""
        d = self.draw
        first = hue(d(), d(0.05, 0.8), d(0.08, 0.75))
        second = self._shade(first, 0.4, 0.8) if d() < 0.6 else hue(d(), d(0.1, 0.7), d(0.1, 0.8))
        return self.make(d.pick(self.style.cloth), first, second)

    def paint(self) -> Material:
        """Small things of any colour."""
        d = self.draw
        first = hue(d(), d(0.1, 0.9), d(0.08, 0.8))
        return self.make(self.style.ceiling[0], first, self._shade(first, 0.7, 0.95), gloss=d(0, 0.6))

    def metal(self) -> Material:
        """Grey and glossy."""
        first = hue(0, 0, self.draw(0.05, 0.5))
        return self.make(self.style.ceiling[0], first, self._shade(first, 0.8, 1.0), gloss=0.6)

    def wall(self) -> Material:
        """Light and weakly coloured, mostly."""
        d = self.draw
        first = hue(d(0.02, 0.2), d(0, 0.3), d(0.4, 0.85)) if d() < 0.65 else hue(d(), d(0.05, 0.5), d(0.2, 0.75))
        pattern = d.pick(self.style.wall)
        variation = 0.15 if pattern == "brick" else 0.0
        darker = (0.88, 0.97) if pattern in ("plain", "speckle") else (0.65, 0.92)
        return self.make(pattern, first, self._shade(first, *darker), variation)

    def ceiling(self) -> Material:
        """White, mostly."""
        first = hue(self.draw(), self.draw(0, 0.1), self.draw(0.5, 0.9))
        return self.make(self.draw.pick(self.style.ceiling), first, self._shade(first, 0.9, 0.98))

    def floor(self) -> Material:
        """Boards, tiles or carpet."""
        d = self.draw
        pattern = d.pick(self.style.floor)
        wooden = pattern == "planks"
        first = hue(d(0.05, 0.11), d(0.3, 0.7), d(0.15, 0.6)) if wooden else hue(d(), d(0, 0.5), d(0.15, 0.7))
        second = self._shade(first, 0.2, 0.6) if d() < 0.7 else self._shade((0.7, 0.7, 0.7), 0.6, 1.2)
        return self.make(pattern, first, second, d(0.05, 0.3), d(0, 0.35))

    def face(self, pattern: str) -> Material:
        """Doors, books, pictures: patterns that fill a face."""
        d = self.draw
        first = hue(d(), d(0.1, 0.7), d(0.3, 0.9))
        if pattern in (self.style.door, self.style.window):
            first = hue(d(0.03, 0.18), d(0, 0.6), d(0.2, 0.85))
        if pattern == self.style.books:
            first = hue(d(), d(0, 0.3), d(0.3, 0.6))
        variation = {"books": 1.8, "picture": 1.5, "poster": 1.5, "brick": 1.5}.get(pattern, 0.0)
        return self.make(pattern, first, self._shade(first, 0.05, 0.5), variation)

    def glow(self, colour: Colour, strength: float) -> Material:
        """A lamp's shade or bulb."""
        return self.make(self.style.ceiling[0], colour, colour)._replace(emission=strength)


Item = tuple[list[Part], list[Light]]
Maker = Callable[[Draw, Palette], Item]


def _block(x: float, y: float, z: float, w: float, d: float, h: float, m: Material, **more: object) -> Part:
    """A box by the middle of its underside."""
    return part("box", (x, y, z + h / 2), (w, d, h), m, **more)  # type: ignore[arg-type]


def _post(x: float, y: float, z: float, diameter: float, h: float, m: Material, **more: object) -> Part:
    """A cylinder by the middle of its underside."""
    return part("cylinder", (x, y, z + h / 2), (diameter, diameter, h), m, **more)  # type: ignore[arg-type]


def _ball(x: float, y: float, z: float, diameter: float, m: Material, **more: object) -> Part:
    return part("sphere", (x, y, z + diameter / 2), (diameter,) * 3, m, **more)  # type: ignore[arg-type]


def _legs(w: float, d: float, h: float, thick: float, m: Material, round_: bool, splay: float = 0.0) -> list[Part]:
    parts = []
    for sx in (-1, 1):
        for sy in (-1, 1):
            leg = (_post if round_ else _block)(0, 0, -h / 2, thick, *((h,) if round_ else (thick, h)), m)
            lean = rotation(1, -sx * splay)
            parts.append(moved(leg, lean, np.array([sx * (w / 2 - thick), sy * (d / 2 - thick), h / 2])))
    return parts


def _clutter(d: Draw, p: Palette, w: float, depth: float, z: float, most: int) -> list[Part]:
    """A few small things on a surface w x depth at height z."""
    parts = []
    for _ in range(d.index(most + 1)):
        x, y, s = d(-0.4, 0.4) * w, d(-0.35, 0.35) * depth, min(d(0.07, 0.2), depth * 0.5)
        kind = d.index(4)
        if kind == 0:
            parts.append(_ball(x, y, z, s, p.paint()))
        elif kind == 1:
            parts.append(_post(x, y, z, s * 0.6, s * d(0.8, 1.8), p.paint()))
        else:
            turned = rotation(2, d(-60, 60))
            tall = s * (d(0.15, 0.5) if kind == 2 else d(0.7, 1.5))
            parts.append(part("box", (x, y, z + tall / 2), (s, s * d(0.6, 1.4), tall), p.paint(), turned))
    return parts


def table(d: Draw, p: Palette) -> Item:
    """A dining table or desk-high table with things on it."""
    w, depth, h, m = d(0.7, 2.0), d(0.6, 1.0), d(0.66, 0.8), p.wood()
    top = _block(0, 0, h - 0.04, w, depth, 0.04, m)
    return [top, *_legs(w, depth, h - 0.04, d(0.04, 0.09), m, d() < 0.4), *_clutter(d, p, w, depth, h, 4)], []


def dining(d: Draw, p: Palette) -> Item:
    """A table with chairs drawn up to it, some askew."""
    parts, _ = table(d, p)
    half, like, _ = parts[0].half, *chair(d, p)
    for side in range(4):
        if d() < 0.6:
            turn = rotation(2, 90 * side + d(-25, 25))
            out, along = half[1 - side % 2] + d(0.05, 0.4), half[side % 2] * d(-0.4, 0.4)
            spot = product(rotation(2, 90 * side), np.array([[along], [out], [0.0]]))[:, 0]
            parts.extend(moved(piece, turn, spot) for piece in like)
    return parts, []


def low_table(d: Draw, p: Palette) -> Item:
    """A coffee table with a shelf under its top."""
    w, depth, h, m = d(0.6, 1.2), d(0.4, 0.7), d(0.3, 0.5), p.wood()
    shelf = _block(0, 0, h * 0.4, w * 0.9, depth * 0.9, 0.02, m)
    top = _block(0, 0, h - 0.05, w, depth, 0.05, m)
    return [top, shelf, *_legs(w, depth, h - 0.05, 0.05, m, False), *_clutter(d, p, w, depth, h, 3)], []


def chair(d: Draw, p: Palette) -> Item:
    """Four legs, a seat, a leaning back."""
    w, depth, h, back, m = d(0.38, 0.5), d(0.38, 0.5), d(0.42, 0.5), d(0.35, 0.6), p.wood()
    seat = _block(0, 0, h - 0.05, w, depth, 0.05, p.cloth() if d() < 0.5 else m)
    lean = rotation(0, -d(4, 16))
    rest = moved(_block(0, 0, 0, w, 0.03, back, m), lean, np.array([0, depth / 2 - 0.02, h]))
    return [seat, rest, *_legs(w, depth, h - 0.05, 0.04, m, d() < 0.5, d(0, 8))], []


def stool(d: Draw, p: Palette) -> Item:
    """A round seat on splayed legs."""
    w, h, m = d(0.3, 0.42), d(0.4, 0.75), p.wood()
    return [
        _post(0, 0, h - 0.05, w, 0.05, m),
        *_legs(w * 0.9, w * 0.9, h - 0.05, 0.035, m, True, d(3, 9)),
    ], []


def shelf(d: Draw, p: Palette) -> Item:
    """A bookcase with rows of books and small things."""
    w, depth, h, m = d(0.6, 1.4), d(0.25, 0.4), d(0.9, 2.2), p.wood()
    parts = [_block(s * (w / 2 - 0.015), 0, 0, 0.03, depth, h, m) for s in (-1, 1)]
    parts.append(_block(0, depth / 2 - 0.01, 0, w, 0.02, h, m))
    boards = max(3, int(h / d(0.3, 0.45)))
    for k in range(boards + 1):
        z = 0.05 + k * (h - 0.08) / boards
        parts.append(_block(0, 0, z, w - 0.06, depth - 0.02, 0.025, m))
        room = (h - 0.08) / boards - 0.05
        if k == boards or d() < 0.15:
            continue
        if d() < 0.75:
            wide = (w - 0.08) * d(0.4, 1.0)
            side = d.pick((-1, 1)) * (w - 0.08 - wide) / 2
            front = p.face(p.style.books)
            spine = _block(side, d(0, 0.03), z + 0.025, wide, depth * 0.7, room * d(0.7, 0.95), p.paint(), front=front)
            parts.append(spine)
        else:
            parts.extend(_clutter(d, p, w - 0.1, depth, z + 0.025, 2))
    return parts, []


def cabinet(d: Draw, p: Palette) -> Item:
    """A chest of drawers with knobs."""
    w, depth, h, m, knob = d(0.5, 1.3), d(0.4, 0.55), d(0.55, 1.2), p.wood(), p.metal()
    parts = [_block(0, 0, 0, w, depth, h, m)]
    rows = 2 + d.index(3)
    for k in range(rows):
        z = 0.06 + k * (h - 0.1) / rows
        parts.append(_block(0, -depth / 2, z, w * 0.94, 0.03, (h - 0.1) / rows - 0.03, m))
        parts.append(_ball(0, -depth / 2 - 0.03, z + (h - 0.1) / rows / 2 - 0.03, 0.04, knob))
    return [*parts, *_clutter(d, p, w, depth, h, 3)], []


def wardrobe(d: Draw, p: Palette) -> Item:
    """Tall, with two doors and handles."""
    w, depth, h, m, knob = d(0.9, 1.8), d(0.5, 0.65), d(1.8, 2.2), p.wood(), p.metal()
    parts = [_block(0, 0, 0, w, depth, h, m)]
    for s in (-1, 1):
        parts.append(_block(s * w / 4, -depth / 2, 0.06, w / 2 - 0.02, 0.03, h - 0.1, m, front=p.face(p.style.door)))
        parts.append(_block(s * 0.06, -depth / 2 - 0.03, h * 0.45, 0.02, 0.03, 0.18, knob))
    return parts, []


def bed(d: Draw, p: Palette) -> Item:
    """A frame, a mattress, a blanket and pillows, head at the wall."""
    w, depth, h, m = d(0.9, 1.8), d(1.9, 2.1), d(0.25, 0.4), p.wood()
    sheet, cover = p.cloth(), p.cloth()
    parts = [
        _block(0, 0, 0.06, w, depth, h - 0.06, m),
        _block(0, 0, h, w - 0.04, depth - 0.06, 0.16, sheet),
        _block(0, -depth * 0.16, h + 0.02, w, depth * 0.66, 0.17, cover),
        _block(0, depth / 2, 0, w + 0.04, 0.06, h + d(0.3, 0.8), m),
    ]
    for s in (-1, 1) if w > 1.2 else (0,):
        pillow = part("sphere", (s * w / 4, depth / 2 - 0.28, h + 0.22), (min(w, 0.6), 0.4, 0.22), p.cloth())
        parts.append(pillow)
    return parts, []


def sofa(d: Draw, p: Palette) -> Item:
    """A seat, a leaning back, arms and cushions."""
    w, depth, h, m, c = d(0.8, 2.2), d(0.75, 0.95), d(0.36, 0.46), p.cloth(), p.cloth()
    back = moved(_block(0, 0, 0, w, 0.18, d(0.4, 0.55), m), rotation(0, -d(5, 15)), np.array([0, depth / 2 - 0.15, h]))
    parts = [_block(0, 0, 0.08, w, depth, h - 0.08, m), back]
    parts += [_block(s * (w / 2 - 0.08), 0, 0.05, 0.16, depth, h + 0.15, m) for s in (-1, 1)]
    for _ in range(d.index(3)):
        tilt = product_of_turns(d(-20, 20), -d(15, 30))
        size = (d(0.35, 0.5), 0.14, d(0.35, 0.45))
        parts.append(part("sphere", (d(-0.35, 0.35) * w, depth / 2 - 0.34, h + 0.2), size, c, tilt))
    return parts, []


def product_of_turns(yaw: float, pitch: float) -> np.ndarray:
    """A tilt about x, then a turn about z."""
    return product(rotation(2, yaw), rotation(0, pitch))


def floor_lamp(d: Draw, p: Palette) -> Item:
    """A stand with a glowing shade; its bulb is one of the scene's lights."""
    h, wide, m = d(1.2, 1.8), d(0.25, 0.45), p.metal()
    warm = hue(d(0.06, 0.13), d(0.1, 0.45), 1.0)
    shade = _post(0, 0, h - 0.3, wide, 0.28, p.glow(warm, d(0.6, 2.0)), casts=False)
    light = Light(np.array([0, 0, h - 0.05]), np.array(warm) * d(0.5, 3.0))
    return [_post(0, 0, 0, 0.28, 0.03, m), _post(0, 0, 0.03, 0.03, h - 0.3, m), shade], [light]


def night_stand(d: Draw, p: Palette) -> Item:
    """A small cabinet with a lamp."""
    w, h, m = d(0.35, 0.55), d(0.4, 0.65), p.wood()
    warm = hue(d(0.06, 0.13), d(0.1, 0.5), 1.0)
    parts = [_block(0, 0, 0, w, 0.4, h, m), _block(0, -0.2, h * 0.55, w * 0.85, 0.03, h * 0.35, m)]
    parts += [
        _post(0, 0, h, 0.06, 0.2, p.paint()),
        _ball(0, 0, h + 0.17, 0.24, p.glow(warm, 1.5), casts=False),
    ]
    return parts, [Light(np.array([0, 0, h + 0.4]), np.array(warm) * d(0.3, 1.5))]


def plant(d: Draw, p: Palette) -> Item:
    """A pot with leaves."""
    h = d(0.5, 1.5)
    parts = [_post(0, 0, 0, 0.3, 0.28, p.paint()), _post(0, 0, 0.28, 0.03, h * 0.5, p.wood())]
    for _ in range(6 + d.index(6)):
        green = hue(d(0.22, 0.38), d(0.4, 0.8), d(0.08, 0.4))
        leaf = part("sphere", (d(-0.1, 0.1), 0.12, d(0, 0.3) * h), (d(0.1, 0.2), d(0.25, 0.45), 0.03),
                    p.make(p.style.ceiling[0], green, green), rotation(0, d(10, 60)))  # fmt: skip
        parts.append(moved(leaf, rotation(2, d(0, 360)), np.array([0, 0, 0.3 + h * 0.35])))
    return parts, []


def boxes(d: Draw, p: Palette) -> Item:
    """Cartons, stacked askew."""
    parts, z = [], 0.0
    for _ in range(1 + d.index(3)):
        s, tall = d(0.3, 0.6), d(0.2, 0.45)
        parts.append(part("box", (d(-0.05, 0.05), d(-0.05, 0.05), z + tall / 2), (s, s * d(0.6, 1.0), tall), p.hard(),
                          rotation(2, d(-30, 30))))  # fmt: skip
        z += tall
    return parts, []


def leaning_board(d: Draw, p: Palette) -> Item:
    """A board or mirror-sized frame that leans against the wall."""
    w, h, angle = d(0.4, 1.0), d(0.9, 1.8), d(6, 18)
    board = part("box", (0, 0, h / 2), (w, 0.03, h), p.wood(), front=p.face(p.style.picture))
    return [moved(board, rotation(0, -angle), np.array([0, -0.05 - h * angle * 0.004, 0.01]))], []


def television(d: Draw, p: Palette) -> Item:
    """A dark screen on a long low cabinet."""
    w, m = d(1.0, 1.8), p.wood()
    dark = p.make(p.style.ceiling[0], (0.02, 0.02, 0.025), (0.015, 0.015, 0.02), gloss=0.8)
    screen = [
        _block(0, 0.05, 0.5, w * 0.75, 0.05, w * 0.42, dark),
        _block(0, 0.05, 0.44, 0.2, 0.15, 0.07, dark),
    ]
    return [_block(0, 0, 0.08, w, 0.4, 0.36, m), *screen, *_legs(w, 0.4, 0.08, 0.05, m, False)], []


def piano(d: Draw, p: Palette) -> Item:
    """An upright piano with keys and a bench."""
    w, h, m = d(1.35, 1.5), d(1.1, 1.3), p.hard()
    keys = p.make("ribbed", (0.85, 0.85, 0.8), (0.1, 0.1, 0.1))
    parts = [_block(0, 0.15, 0, w, 0.35, h, m), _block(0, -0.15, 0.62, w, 0.3, 0.1, m)]
    parts += [_block(0, -0.17, 0.72, w * 0.9, 0.16, 0.02, keys), *_legs(w, 0.6, 0.62, 0.07, m, False)]
    return [
        *parts,
        _block(0, -0.75, 0.42, 0.7, 0.35, 0.08, p.cloth()),
        _block(0, -0.75, 0, 0.5, 0.25, 0.42, m),
    ], []


def bunk_bed(d: Draw, p: Palette) -> Item:
    """Two beds on four posts, with a ladder."""
    w, depth, h, m = d(0.9, 1.1), d(1.8, 2.0), d(1.5, 1.8), p.wood()
    parts = [_post(sx * w / 2, sy * depth / 2, 0, 0.08, h, m) for sx in (-1, 1) for sy in (-1, 1)]
    for z in (0.3, h * 0.7):
        parts += [
            _block(0, 0, z, w, depth, 0.08, m),
            _block(0, 0, z + 0.08, w - 0.08, depth - 0.08, 0.14, p.cloth()),
        ]
    lean = rotation(1, d(5, 12))
    return [*parts, *(moved(_block(0, 0, 0.25 * k, 0.04, 0.4, 0.03, m), lean, np.array([-w / 2 - 0.25, 0.4, 0.15]))
                      for k in range(int(h * 3)))], []  # fmt: skip


def round_table(d: Draw, p: Palette) -> Item:
    """A pedestal table with a globe on it."""
    w, h, m = d(0.7, 1.2), d(0.65, 0.78), p.hard()
    parts = [
        _post(0, 0, h - 0.04, w, 0.04, m),
        _post(0, 0, 0.03, 0.1, h - 0.07, m),
        _post(0, 0, 0, w / 2, 0.03, m),
    ]
    return [*parts, _post(0.1, 0, h, 0.05, 0.06, m), _ball(0.1, 0, h + 0.05, d(0.2, 0.35), p.cloth())], []


def barrels(d: Draw, p: Palette) -> Item:
    """Drums with hoops, one on its side perhaps."""
    s, h, m, hoop = d(0.4, 0.6), d(0.6, 0.95), p.hard(), p.metal()
    parts = [
        _post(0, 0, 0, s, h, m),
        _post(0, 0, h * 0.2, s + 0.02, 0.04, hoop),
        _post(0, 0, h * 0.75, s + 0.02, 0.04, hoop),
    ]
    if d() < 0.5:
        lying = part("cylinder", (s + 0.1, 0, s / 2), (s, s, h), m, product_of_turns(d(-30, 30), 90))
        parts.append(lying)
    return parts, []


def step_ladder(d: Draw, p: Palette) -> Item:
    """Two leaning sides with treads."""
    h, w, m = d(1.0, 1.8), d(0.4, 0.6), p.metal()
    parts = []
    for lean in (-15.0, 15.0):
        for s in (-1, 1):
            rail = _block(s * w / 2, 0, -h / 2, 0.04, 0.06, h, m)
            parts.append(moved(rail, rotation(0, lean), np.array([0, lean * 0.0045 * h * 2 - 0.0, h / 2 * 0.97])))
    return [
        *parts,
        *(_block(0, -0.27 * h * (1 - k / 5), h * k / 5, w, 0.1, 0.03, m) for k in range(1, 5)),
    ], []


def poufs(d: Draw, p: Palette) -> Item:
    """Soft balls to sit on."""
    parts = []
    for k in range(1 + d.index(3)):
        s = d(0.4, 0.7)
        parts.append(part("sphere", (k * 0.6, d(-0.2, 0.2), s * 0.35), (s, s, s * 0.7), p.cloth()))
    return parts, []


def bench(d: Draw, p: Palette) -> Item:
    """Slats on two trestles."""
    w, h, m = d(1.0, 1.8), d(0.4, 0.5), p.wood()
    slats = [_block(0, 0.13 * (k - 1), h - 0.04, w, 0.1, 0.04, m) for k in range(3)]
    return [*slats, *(_block(s * w * 0.38, 0, 0, 0.08, 0.36, h - 0.04, m) for s in (-1, 1))], []


def arc_lamp(d: Draw, p: Palette) -> Item:
    """A glowing globe on a leaning rod."""
    h, m = d(1.4, 1.9), p.metal()
    cool = hue(d(0.5, 0.65), d(0, 0.2), 1.0)
    rod = moved(_post(0, 0, 0, 0.03, h, m), rotation(0, 12), np.array([0, 0, 0.03]))
    globe = _ball(0, -0.21 * h, h * 0.95, 0.3, p.glow(cool, 1.5), casts=False)
    return [_post(0, 0, 0, 0.32, 0.04, m), rod, globe], [
        Light(np.array([0, -0.21 * h, h * 0.9]), np.array(cool) * d(0.5, 3))
    ]


# Items stand with their back to a wall, or anywhere.
AT_WALL: dict[bool, tuple[Maker, ...]] = {
    False: (bed, sofa, shelf, shelf, cabinet, wardrobe, table, night_stand, leaning_board, television),
    True: (piano, bunk_bed, bench, step_ladder, barrels),
}
ANYWHERE: dict[bool, tuple[Maker, ...]] = {
    False: (dining, dining, low_table, chair, chair, stool, floor_lamp, plant, boxes, sofa),
    True: (round_table, poufs, bench, barrels, arc_lamp, step_ladder),
}

"""A raw Kinect recording of the rooms, file for file as NYU Depth V2's, so that its processing can be tried and tested.

Two cameras look at a room, each through its own distorting lens and from its own place; poses, lenses and disparity
are the calibration of NYU's toolbox (Silberman et al., ECCV 2012, `camera_params.m`). The toolbox turns
a point of the depth camera into one of the RGB camera by p_rgb = R p_d + T with R = inv(-L): both come out with X and Z
negated, and X / Z is the same. In true directions (x right, y down, z forward) the depth camera therefore stands at
-T, 2.5 cm to the left of the RGB camera, and is turned by inv(L): p = inv(L) p_d - T.

The toolbox undistorts pictures with pixels counted from 0, but back-projects and projects with pixels counted from 1.
A camera is simulated as the toolbox takes it to be: the undistorted pixel x, counted from 0, looks along
(x + 1 - cx) / fx. (With the other reading, the two shifts nearly cancel: 0.1 pixels remain.)
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from d3lib.artefacts import atomic_path
from d3lib.data import kinect
from d3lib.data.kinect import HEIGHT, INVALID, TRANSLATION, WIDTH, L
from d3lib.errors import UserError

from .layout import make_camera, make_scene
from .scene import Array, Camera, Draw, Scene, product
from .sensor import IR_CAMERA, PROJECTOR, develop, disparity
from .tracer import trace

SIZE = (HEIGHT, WIDTH)
NEAREST = 390  # the smallest disparity that a Kinect reports, 0.5 m
BLIND = 8  # columns at the right that its matching window leaves without a measurement
TICKS = 60_000_000  # of the Kinect's clock, a second


class Lens(kinect.Lens):
    """A lens that can also be looked through from the picture's side."""

    def undistort(self, x: Array, y: Array) -> tuple[Array, Array]:
        """The inverse of `distort`, to rounding, for all pixels of a picture."""
        c, d = (x - self.cx) / self.fx, (y - self.cy) / self.fy
        a, b = c, d
        for _ in range(25):  # a fixed point: each step leaves at most a fifth of the error
            p, q = self.bend(a, b)
            a, b = a + (c - p), b + (d - q)
        return a * self.fx + self.cx, b * self.fy + self.cy

    def __call__(self, x: Array, y: Array) -> tuple[Array, Array]:
        """u and v of the rays (u, v, 1) that meet distorted pixels, counted from 0."""
        x, y = self.undistort(x, y)
        return (x + 1 - self.cx) / self.fx, (y + 1 - self.cy) / self.fy


RGB_LENS, DEPTH_LENS = Lens(*kinect.RGB_LENS), Lens(*kinect.DEPTH_LENS)


def depth_camera(camera: Camera) -> Camera:
    """The depth camera that goes with an RGB camera: 2.5 cm to its left, turned by half a degree."""
    centre = product(camera.axes, -TRANSLATION[:, None])[:, 0]
    # L is a rotation, so that inv(L) is its transpose
    return camera._replace(position=camera.position + centre, axes=product(camera.axes, L.T))


def capture(scene: Scene, camera: Camera) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """What a Kinect sends: its distorted RGB picture uint8 (480, 640, 3) and raw disparity uint16 (480, 640).

    Disparity d = 1092.5 - 351.3 / z, z metres along the depth camera's axis, with noise, rounded; 2047 where nothing
    was measured: as in `sensor.disparity`, with the projector 7.5 cm to the right of this camera.
    """
    cpu = torch.device("cpu")
    linear = trace([(scene, camera)], SIZE, cpu, lens=RGB_LENS)[0]
    seeing = depth_camera(camera)
    _, exact, cosine = trace([(scene, seeing)], SIZE, cpu, None, DEPTH_LENS)
    level, valid = disparity(exact, cosine, [seeing], DEPTH_LENS.fx, [PROJECTOR - IR_CAMERA], NEAREST)
    valid[..., -BLIND:] = False
    raw = torch.where(valid, level, float(INVALID))[0, 0].numpy().astype(np.uint16)
    return develop(linear, [camera])[0].permute(1, 2, 0).contiguous().numpy(), raw


def truth(seed: int, view: int) -> tuple[NDArray[np.uint8], Array]:
    """What perfect processing would recover of a frame, in the toolbox's own convention.

    Returns the undistorted RGB picture, uint8 (3, 480, 640), and at each of its pixels the exact distance along the
    *depth* camera's axis, float64 (480, 640), metres in [0, 10], without holes. Raises `UserError` for no such frame.
    """
    scene, camera = _view((seed, view))
    linear, exact, _ = trace([(scene, camera)], SIZE, torch.device("cpu"))
    z = exact[0, 0].double().numpy()
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 1.0
    eye = RGB_LENS
    point = np.stack([z * ((x - eye.cx) / eye.fx), z * ((y - eye.cy) / eye.fy), z])
    depth = (L[2][:, None, None] * (point + TRANSLATION[:, None, None])).sum(0)
    return develop(linear, [camera])[0].numpy(), np.clip(depth, 0.0, 10.0)


def record(path: str | Path, directories: Mapping[str, Sequence[tuple[int, int]]], *, seed: int = 0) -> None:
    """Write a zip of raw frames: each directory (such as `living_room_0001a`) with its frames (scene seed, view).

    Every frame is `r-<seconds>-<ticks>.ppm`, `d-<seconds>-<ticks>.pgm` (little-endian, whatever PGM says) and
    `a-<seconds>-<ticks>.dump`, as libfreenect's `record` writes them. Both cameras run at 30 Hz, out of phase; the
    host's seconds are late by a jitter; sometimes a frame is lost; and RGB starts one frame early (with the first
    picture). So pictures belong together by time, not by count: the k-th depth's nearest RGB is the k-th frame's, at
    most 13 ms away, the next one at least 20 ms. Times are drawn from `seed` (>= 0) and the directory's name.

    The file appears whole or not at all; equal arguments give equal bytes. Raises `UserError` for bad names or frames.
    """
    if seed < 0:
        raise UserError(f"{path}: seed must be 0 or more, not {seed}")
    if not directories:
        raise UserError(f"{path}: nothing to record; give at least one directory of frames")
    for name, frames in directories.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not frames:
            raise UserError(f"{path}: directory {name!r}: needs a name of letters, digits, _ or -, and some frames")
    views = {name: [_view(frame) for frame in frames] for name, frames in directories.items()}
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:

        def add(name: str, content: bytes) -> None:
            member = zipfile.ZipInfo(name)  # stored, dated 1980: zlib's output and clocks differ between machines
            member.create_system, member.external_attr = 3, 0o644 << 16
            archive.writestr(member, content)

        for name, some in views.items():
            clock = _Clock(Draw(seed, zlib.crc32(name.encode())), name)
            for k, (scene, camera) in enumerate(some):
                rgb, raw = capture(scene, camera)
                picture = b"P6 640 480 255\n" + rgb.tobytes()
                if k == 0:
                    add(clock.name("r", "ppm"), picture)
                clock.tick()
                add(clock.name("r", "ppm"), picture)
                add(clock.name("d", "pgm"), b"P5 640 480 65535\n" + raw.astype("<u2").tobytes())
                up = camera.axes[2] * (819, -819, 819)  # counts: what a Kinect at rest feels is 1 g upwards
                add(clock.name("a", "dump"), struct.pack("<hhhbxi", *(int(n) for n in np.rint(up)), 0, 0))


class _Clock:
    """Names of a directory's files: the host's time, and the Kinect's own at which a picture was taken."""

    def __init__(self, draw: Draw, directory: str) -> None:
        self.draw, self.directory = draw, directory
        self.start, self.offset = 1_300_000_000 + draw.index(10_000_000), draw.index(2**32)
        self.period, self.phase = draw(0.9999, 1.0001) / 30, draw(-0.008, 0.008)
        self.slot = 0

    def tick(self) -> None:
        self.slot += 1 + (self.draw() < 0.1)

    def name(self, kind: str, suffix: str) -> str:
        taken = 1 + self.slot * self.period + (0.0 if kind == "r" else self.phase)
        host = taken + self.draw(0.0, 0.005) + (0.005 if kind == "a" else 0.0)
        ticks = (self.offset + int(taken * TICKS)) % 2**32
        return f"{self.directory}/{kind}-{self.start + host:.6f}-{ticks}.{suffix}"


def _view(frame: Sequence[int]) -> tuple[Scene, Camera]:
    if len(frame) != 2 or min(frame) < 0:
        raise UserError(f"rooms: a frame is (scene seed, view), both >= 0, not {tuple(frame)}")
    return make_scene(int(frame[0])), make_camera(int(frame[0]), int(frame[1]))

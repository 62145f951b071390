"""From a Kinect's raw dumps to a depth map on the RGB picture, as NYU Depth V2's official toolbox does it.

Files of a recording: `r-<seconds>-<ticks>.ppm` colour and `d-<seconds>-<ticks>.pgm` raw disparity, 640x480, each with
the host's clock in its name. `synchronise` pairs them by name alone; `project` undistorts both pictures and moves each
depth pixel to the RGB camera. Both follow the toolbox step by step, its quirks included, so that the results are
equal to it: pictures exactly, depth to 1e-9 m. Calibration: Silberman et al., ECCV 2012, `camera_params.m`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from d3lib.errors import UserError

HEIGHT, WIDTH = 480, 640
INVALID = 2047  # raw disparity of a pixel without a return
LOWEST = 600  # smaller disparities (0.71 m) are dropped by the toolbox
MAX_DEPTH = 10.0  # metres
CROP = (slice(44, 471), slice(40, 601))  # rows and columns where both cameras see something: 427 x 561
RGB_BYTES, DEPTH_BYTES = 921_615, 614_417  # lengths of a .ppm and a .pgm: 15 or 17 bytes of header, then pixels


class Lens(NamedTuple):
    """A camera's focal lengths and principal point (pixels), and Brown's distortion k1, k2, p1, p2, k3."""

    fx: float
    fy: float
    cx: float
    cy: float
    k: tuple[float, float, float, float, float]

    def bend(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Where the lens sends the ray (x, y, 1): x and y of the bent one, of any shape."""
        k1, k2, p1, p2, k3 = self.k
        r2 = x**2 + y**2
        radial = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3
        return (
            x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x**2),
            y * radial + p1 * (r2 + 2 * y**2) + 2 * p2 * x * y,
        )

    def distort(
        self, columns: NDArray[np.float64], rows: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """From where undistorted pixels are, counted from 0, to where the lens puts them: columns and rows."""
        x, y = self.bend((columns - self.cx) / self.fx, (rows - self.cy) / self.fy)
        return self.fx * x + self.cx, self.fy * y + self.cy


RGB_LENS = Lens(
    5.1885790117450188e02,
    5.1946961112127485e02,
    3.2558244941119034e02,
    2.5373616633400465e02,
    (2.0796615318809061e-01, -5.8613825163911781e-01, 7.2231363135888329e-04, 1.0479627195765181e-03,
     4.9856986684705107e-01),
)  # fmt: skip
DEPTH_LENS = Lens(
    5.8262448167737955e02,
    5.8269103270988637e02,
    3.1304475870804731e02,
    2.3844389626620386e02,
    (-9.9897236553084481e-02, 3.9065324602765344e-01, 1.9290592870229277e-03, -1.9422022475975055e-03,
     -5.1031725053400578e-01),
)  # fmt: skip
# p_rgb = R p_depth + T. With R = inv(-L) both p_rgb's X and Z are negative; the signs cancel in X / Z.
L = np.array(
    [
        [9.9997798940829263e-01, 5.0518419386157446e-03, 4.3011152014118693e-03],
        [-5.0359919480810989e-03, 9.9998051861143999e-01, -3.6879781309514218e-03],
        [-4.3196624923060242e-03, 3.6662365748484798e-03, 9.9998394948385538e-01],
    ]
)
ROTATION = np.linalg.inv(-L)
TRANSLATION = np.array([2.5031875059141302e-02, -2.9342312935846411e-04, 6.6238747008330102e-04])  # metres

_NAME = re.compile(r"[rd]-(\d{1,12}\.\d{1,9})-\d{1,20}\.(ppm|pgm)")


class Pair(NamedTuple):
    """File names of a depth picture and of the colour picture nearest to it in time."""

    depth: str
    rgb: str


def synchronise(names: Iterable[str]) -> list[Pair]:
    """Pair the depth pictures of one directory with its colour pictures, by the toolbox's rule.

    In order of name, every depth picture is kept; the colour picture moves forward for as long as the difference in
    time does not grow (it advances on a tie). A colour picture may serve twice. `names` that are neither are ignored.
    """
    times = {name: float(match[1]) for name in names if (match := _NAME.fullmatch(name))}
    depths, rgbs = (sorted(name for name in times if name.endswith(end)) for end in (".pgm", ".ppm"))
    pairs, place = [], 0
    for depth in depths if rgbs else []:
        apart = abs(times[depth] - times[rgbs[place]])
        while place + 1 < len(rgbs) and (following := abs(times[depth] - times[rgbs[place + 1]])) <= apart:
            apart, place = following, place + 1
        pairs.append(Pair(depth, rgbs[place]))
    return pairs


def read_ppm(content: bytes, name: str = "picture") -> NDArray[np.uint8]:
    """The bytes of a .ppm file as uint8 (480, 640, 3). Raises `UserError` naming `name` if they are anything else."""
    return np.frombuffer(_pixels(content, name, b"P6", b"255", RGB_BYTES), np.uint8).reshape(HEIGHT, WIDTH, 3)


def read_pgm(content: bytes, name: str = "picture") -> NDArray[np.uint16]:
    """The bytes of a .pgm file as raw disparity, uint16 (480, 640). Raises `UserError` as `read_ppm`.

    The Kinect's dumps are little-endian, although the format says otherwise: other readers swap the bytes.
    """
    raw = np.frombuffer(_pixels(content, name, b"P5", b"65535", DEPTH_BYTES), "<u2").reshape(HEIGHT, WIDTH)
    if raw.max() > INVALID:
        raise UserError(f"{name}: a raw disparity of {raw.max()} is no 11-bit number; the file is damaged")
    return raw.astype(np.uint16)


def _pixels(content: bytes, name: str, magic: bytes, largest: bytes, length: int) -> bytes:
    header = rb"%s\s+%d\s+%d\s+%s\s" % (magic, WIDTH, HEIGHT, largest)
    match = re.match(header, content[:32])
    if match is None:
        raise UserError(f"{name}: no {magic.decode()} picture of {WIDTH}x{HEIGHT} as a Kinect writes it; skip it")
    if len(content) != length or match.end() != length - WIDTH * HEIGHT * (3 if magic == b"P6" else 2):
        raise UserError(f"{name}: {len(content)} bytes instead of {length}; it is truncated or too long, skip it")
    return content[match.end() :]


def project(rgb: NDArray[np.uint8], raw: NDArray[np.uint16]) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Undistort a raw pair and project its depth onto the colour picture.

    Args: `rgb` uint8 (480, 640, 3); `raw` disparity uint16 (480, 640).

    Returns the undistorted colour picture, uint8 (480, 640, 3), white outside the lens's view, and depth float64
    (480, 640) in metres, 0 where nothing was projected. As in the toolbox it is the depth camera's z that is stored.

    Raises `UserError` for other shapes or types.
    """
    for what, array, shape, kind in (
        ("rgb", rgb, (HEIGHT, WIDTH, 3), np.uint8),
        ("raw disparity", raw, (HEIGHT, WIDTH), np.uint16),
    ):
        if array.shape != shape or array.dtype != kind:
            raise UserError(f"{what} is {array.dtype} {array.shape}; a Kinect's is {np.dtype(kind)} {shape}")
    return undistort_rgb(rgb), project_depth(undistort_depth(raw))


def undistort_rgb(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The colour picture as a pinhole camera sees it: bilinear, rounded, 255 outside; uint8 (480, 640, 3)."""
    return _kernels().undistort_rgb(rgb, *_sources(RGB_LENS))


def undistort_depth(raw: NDArray[np.uint16]) -> NDArray[np.float64]:
    """Raw disparity as a pinhole camera sees it, float64 (480, 640); `INVALID` where it is missing.

    Pixels without a return (the picture's largest value) take no part in the interpolation, except that the toolbox
    looks them up in the mask that is already undistorted. Disparities below `LOWEST` are dropped.
    """
    return _kernels().undistort_depth(raw, *_sources(DEPTH_LENS))


def to_metres(disparity: NDArray[Any]) -> NDArray[np.float64]:
    """Depth in metres, 0 to `MAX_DEPTH`, of raw disparity d: z = 351.3 / (1092.5 - d), 0 where that is negative."""
    with np.errstate(divide="ignore"):
        return np.clip(351.3 / (1092.5 - np.asarray(disparity, np.float64)), 0, MAX_DEPTH)


def project_depth(disparity: NDArray[np.float64]) -> NDArray[np.float64]:
    """Undistorted disparity (480, 640) → metres on the colour picture's pixels, 0 where nothing lands; nearest wins."""
    return _kernels().project_depth(to_metres(disparity))


def crop(image: NDArray[Any]) -> NDArray[Any]:
    """The toolbox's region of an image (480, 640, ...): (427, 561, ...)."""
    return image[CROP]


@functools.cache
def _sources(lens: Lens) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each pixel of the undistorted picture, where it lies in the raw one: columns and rows, 0-based."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return lens.distort(columns, rows)


def require_numba() -> None:
    """Raise `UserError` where numba is missing, before any work."""
    _kernels()


class _Kernels(NamedTuple):
    undistort_rgb: Callable[..., NDArray[np.uint8]]
    undistort_depth: Callable[..., NDArray[np.float64]]
    project_depth: Callable[..., NDArray[np.float64]]


@functools.cache
def _kernels() -> _Kernels:
    """The loops over pixels, compiled: ten times faster than NumPy. Compiled when first needed, not on import."""
    try:
        import numba
    except ImportError as error:
        raise UserError('raw Kinect data needs numba and scipy: pip install "d3lib[raw]"') from error
    compiled = numba.njit(cache=True)
    return _Kernels(compiled(_undistort_rgb), compiled(_undistort_depth), compiled(_project_depth))


def _undistort_rgb(rgb, columns, rows):  # noqa: ANN001, ANN202 - compiled
    out = np.full(rgb.shape, 255, np.uint8)
    for i in range(rgb.shape[0]):
        for j in range(rgb.shape[1]):
            left, top = int(np.floor(columns[i, j])), int(np.floor(rows[i, j]))
            if 0 <= left <= rgb.shape[1] - 2 and 0 <= top <= rgb.shape[0] - 2:
                u, v = columns[i, j] - left, rows[i, j] - top
                for c in range(3):
                    value = (
                        (1 - v) * (1 - u) * rgb[top, left, c]
                        + (1 - v) * u * rgb[top, left + 1, c]
                        + v * (1 - u) * rgb[top + 1, left, c]
                        + v * u * rgb[top + 1, left + 1, c]
                    )
                    out[i, j, c] = int(np.floor(value + 0.5))
    return out


def _undistort_depth(raw, columns, rows):  # noqa: ANN001, ANN202 - compiled
    height, width = raw.shape
    largest = raw.max()
    mask = np.ones(raw.shape, np.bool_)  # what is outside counts as missing
    for i in range(height):
        for j in range(width):
            left, top = int(np.floor(columns[i, j])), int(np.floor(rows[i, j]))
            if 0 <= left <= width - 2 and 0 <= top <= height - 2:
                u, v = columns[i, j] - left, rows[i, j] - top
                mask[i, j] = (
                    ((1 - v) * (1 - u) > 0 and raw[top, left] == largest)
                    or ((1 - v) * u > 0 and raw[top, left + 1] == largest)
                    or (v * (1 - u) > 0 and raw[top + 1, left] == largest)
                    or (v * u > 0 and raw[top + 1, left + 1] == largest)
                )
    out = np.full(raw.shape, float(INVALID))
    for i in range(height):
        for j in range(width):
            if mask[i, j]:
                continue
            left, top = int(np.floor(columns[i, j])), int(np.floor(rows[i, j]))
            u, v = columns[i, j] - left, rows[i, j] - top
            a = 0.0 if mask[top, left] else (1 - v) * (1 - u)
            b = 0.0 if mask[top, left + 1] else (1 - v) * u
            c = 0.0 if mask[top + 1, left] else v * (1 - u)
            d = 0.0 if mask[top + 1, left + 1] else v * u
            total = a + b + c + d
            if total > 0:
                value = (
                    a * raw[top, left] + b * raw[top, left + 1] + c * raw[top + 1, left] + d * raw[top + 1, left + 1]
                ) / total
                if value >= LOWEST:
                    out[i, j] = value
    return out


def _project_depth(z):  # noqa: ANN001, ANN202 - compiled
    height, width = z.shape
    out = np.zeros(z.shape)
    for i in range(height):
        for j in range(width):
            depth = z[i, j]
            if depth <= 0:
                continue
            x = (j + 1 - DEPTH_LENS.cx) * depth / DEPTH_LENS.fx  # the toolbox counts pixels from 1 here
            y = (i + 1 - DEPTH_LENS.cy) * depth / DEPTH_LENS.fy
            px = ROTATION[0, 0] * x + ROTATION[0, 1] * y + ROTATION[0, 2] * depth + TRANSLATION[0]
            py = ROTATION[1, 0] * x + ROTATION[1, 1] * y + ROTATION[1, 2] * depth + TRANSLATION[1]
            pz = ROTATION[2, 0] * x + ROTATION[2, 1] * y + ROTATION[2, 2] * depth + TRANSLATION[2]
            column = int(np.floor(px * RGB_LENS.fx / pz + RGB_LENS.cx + 0.5))
            row = int(np.floor(py * RGB_LENS.fy / pz + RGB_LENS.cy + 0.5))
            # so the last column and row are never hit
            if 0 < column < width and 0 < row < height:
                before = out[row - 1, column - 1]
                if before == 0 or depth < before:
                    out[row - 1, column - 1] = depth
    return out

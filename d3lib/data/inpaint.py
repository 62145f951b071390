"""Missing depth filled from colour, as the NYU Depth V2 toolbox's `fill_depth_colorization` does it.

After Levin, Lischinski and Weiss, "Colorization using optimization" (SIGGRAPH 2004). Every pixel c is to be the
weighted mean of its neighbours n in the 3x3 window (clipped at the borders), and a known one close to its measurement:

    (I - W + alpha K) x = alpha K d,    K = diag(known),    w_cn = exp(-(g_n - g_c)^2 / s_c) / sum over n,
    s_c = max(0.6 variance of g in the window, -min over n (g_n - g_c)^2 / ln 0.01, 2e-6),

with g the BT.601 grey in [0, 1]. Known pixels move as well; the labelled set's `depths` are this of its `rawDepths`.
No torch in here, so that the worker processes of a preparation stay small.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from d3lib.errors import UserError

BT601 = (0.298936, 0.587043, 0.114021)  # rgb2gray's digits; three of them move a real frame by up to 0.7 mm
MISSING = (0.0, 10.0)  # metres: the toolbox's marks for no measurement and for out of range
ACCURACY = 5e-5  # metres, the largest error of an iterated answer
CORRECTIONS = 20  # of which 2 or 3 are taken
ROUNDS = 30  # of which alpha = 1 takes 19 at most
DY, DX = (-1, -1, -1, 0, 0, 1, 1, 1), (-1, 0, 1, -1, 1, -1, 0, 1)  # the 3x3 window's neighbours
LOG_001 = math.log(0.01)
Array = NDArray[np.float64]


def fill_depth(rgb: np.ndarray, depth: np.ndarray, alpha: float = 1.0) -> np.ndarray:
    """Solve the module's equation: fill what is missing, and smooth what is known.

    Args:
        rgb: uint8 (3, H, W), H and W >= 2 (along a line, double precision often cannot tell what a hole sees).
        depth: float (H, W), metres, >= 0; exactly 0 or exactly 10 is missing.
        alpha: > 0, how strongly known pixels hold to their measurement (the toolbox and the labelled set: 1).

    Returns:
        float64 (H, W), metres, within `ACCURACY` of the exact solution and so between the smallest and the largest
        known depth.

    Memory of the process, NumPy, SciPy and numba included: 0.21 GB for most frames of 427x561. Where nearly all is
    missing, or alpha is a tenth or less and the turns do not suffice, one factorisation holds all pixels: 0.39 GB
    (480x640: 0.46 GB).

    Raises:
        UserError: for another shape or type, NaN, infinite or negative depth, no valid depth, an alpha that is not
            positive, holes too nearly cut off for double precision, or where numba or scipy is missing.
    """
    rgb, depth = np.asarray(rgb), np.asarray(depth)
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or len(rgb) != 3:
        raise UserError(f"fill_depth: rgb must be uint8 (3, H, W), not {rgb.dtype} {rgb.shape}")
    if depth.dtype.kind != "f" or depth.shape != rgb.shape[1:] or min(depth.shape) < 2:
        raise UserError(
            f"fill_depth: depth must be floats {rgb.shape[1:]}, as rgb, with sides of 2 pixels or more, "
            f"not {depth.dtype} {depth.shape}"
        )
    if not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"fill_depth: alpha must be positive and finite, not {alpha}")
    depth = depth.astype(np.float64)
    if not (np.isfinite(depth).all() and depth.min() >= 0):
        raise UserError("fill_depth: depth has NaN, infinite or negative values; mark missing pixels as 0")
    known = ~np.isin(depth, MISSING)
    if not known.any():
        raise UserError("fill_depth: no valid depth, every pixel is 0 or 10 m; leave this frame out")
    kernels = _kernels()
    weights = kernels.weigh(np.tensordot(BT601, rgb / 255, 1))
    # The toolbox divides by the largest depth first and multiplies by it last: nothing changes, the equation is linear.
    pull = np.where(known, float(alpha), 0.0)
    start = np.where(known, depth, 0.0)
    system = _System(weights, pull, pull * start)
    x = _alternate(kernels, system, start)
    if x is None:
        x = np.zeros_like(start)
        _direct(kernels, system, np.ones(known.shape, np.bool_))(x)
    return x


class _System(NamedTuple):
    """(1 + pull) x - sum of weights x neighbours = target, for every pixel."""

    weights: Array
    pull: Array
    target: Array


def _alternate(kernels: _Kernels, system: _System, start: Array) -> Array | None:
    """The solution by turns: holes and a ring around them exactly, then one Gauss-Seidel sweep over the other pixels.

    A known pixel's new error is at most 1 / (1 + alpha) of the largest around it, and a hole's no larger than those
    around the hole. So the largest error shrinks by 1 + alpha or more in a round, and is then at most the largest
    change of its sweep / alpha. Returns None where `ROUNDS` do not suffice (a small alpha).
    """
    x = start.copy()
    inside = kernels.ring(system.pull)
    solve = _direct(kernels, system, inside)
    solve(x)
    for _ in range(ROUNDS):
        change = kernels.sweep(x, *system, inside)
        solve(x)
        if change <= ACCURACY * system.pull.max():
            return x
    return None


def _direct(kernels: _Kernels, system: _System, inside: NDArray[np.bool_]) -> Callable[[Array], None]:
    """Factorise the rows of the pixels `inside`; the result solves for them in place, given the pixels around."""
    from scipy.sparse import csc_array
    from scipy.sparse.linalg import SuperLU, splu

    if not inside.any():
        return lambda x: None
    rows = kernels.block(system.weights, system.pull, inside)
    # Rows dominate, so no pivoting is needed; handed over as columns they are the transpose. The usual panels are
    # made for denser matrices: without them the factorisation takes two thirds of the time. In single precision it
    # takes two thirds of the memory; corrections in double precision make up for the digits, except where the rows
    # are all but singular (a hole whose pixels hardly look at what is known).
    values, *places = rows
    columns = csc_array((values, *places), shape=(len(places[1]) - 1,) * 2)
    sparse = {"diag_pivot_thresh": 0.0, "relax": 1, "panel_size": 1, "options": {"SymmetricMode": True}}

    @functools.cache
    def factorise(precision: type) -> SuperLU | None:
        try:
            return splu(columns.astype(precision), permc_spec="MMD_AT_PLUS_A", **sparse)
        except RuntimeError:  # exactly singular in this precision
            return None

    known = system.pull > 0
    measured = system.target[known] / system.pull[known]
    low, high = measured.min() - ACCURACY, measured.max() + ACCURACY  # a weighted mean of these is every solution

    def corrected(wanted: Array, precision: type) -> Array | None:
        """The solution, or None where the corrections do not settle, or not on weighted means."""
        if (lu := factorise(precision)) is None:
            return None
        found = np.zeros_like(wanted)
        for _ in range(CORRECTIONS):
            step = lu.solve((wanted - found @ columns).astype(precision), "T")
            found += step
            if np.abs(step).max() <= ACCURACY / 100:
                return found if low <= found.min() and found.max() <= high else None
        return None

    def solve(x: Array) -> None:
        wanted = kernels.around(x, *system, inside)
        for precision in (np.float32, np.float64):
            if (found := corrected(wanted, precision)) is not None:
                x[inside] = found
                return
        raise UserError("fill_depth: double precision does not suffice for this frame's holes; leave this frame out")

    return solve


class _Kernels(NamedTuple):
    weigh: Callable[[Array], Array]
    ring: Callable[[Array], NDArray[np.bool_]]
    block: Callable[[Array, Array, NDArray[np.bool_]], tuple[Array, NDArray[np.int32], NDArray[np.int32]]]
    around: Callable[[Array, Array, Array, Array, NDArray[np.bool_]], Array]
    sweep: Callable[[Array, Array, Array, Array, NDArray[np.bool_]], float]


@functools.cache
def _kernels() -> _Kernels:
    """The loops over pixels, compiled when first needed, not on import."""
    try:
        import numba
        import scipy.sparse.linalg  # noqa: F401 - needed later; say so before any work
    except ImportError as error:
        raise UserError('filling depth needs numba and scipy: pip install "d3lib[raw]"') from error
    compiled = numba.njit(cache=True)
    return _Kernels(*(compiled(loop) for loop in (_weigh, _ring, _block, _around, _sweep)))


def _weigh(grey):  # noqa: ANN001, ANN202 - compiled
    """W, (H, W, 8): each pixel's neighbours from upper left to lower right, 0 beyond the border."""
    height, width = grey.shape
    out = np.zeros((height, width, 8))
    squares = np.empty(8)
    for i in range(height):
        for j in range(width):
            centre = grey[i, j]
            count, total, total2, nearest = 1, 0.0, 0.0, np.inf
            for k in range(8):
                y, x = i + DY[k], j + DX[k]
                squares[k] = -1.0
                if 0 <= y < height and 0 <= x < width:
                    difference = grey[y, x] - centre
                    squares[k] = difference * difference
                    count += 1
                    total += difference
                    total2 += squares[k]
                    nearest = min(nearest, squares[k])
            mean = total / count
            spread = max(0.6 * (total2 / count - mean * mean), -nearest / LOG_001, 2e-6)
            weight = 0.0
            for k in range(8):
                if squares[k] >= 0:
                    out[i, j, k] = math.exp(-squares[k] / spread)
                    weight += out[i, j, k]
            for k in range(8):
                out[i, j, k] /= weight
    return out


def _ring(pull):  # noqa: ANN001, ANN202 - compiled
    """The pixels that are unknown or touch one that is."""
    height, width = pull.shape
    out = np.zeros(pull.shape, np.bool_)
    for i in range(height):
        for j in range(width):
            if pull[i, j] == 0:
                out[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2] = True
    return out


def _block(weights, pull, inside):  # noqa: ANN001, ANN202 - compiled
    """The rows and columns `inside` of I - W + alpha K, compressed by rows: (values, columns, row starts)."""
    height, width = inside.shape
    number = np.empty(inside.shape, np.int32)
    count = 0
    for i in range(height):
        for j in range(width):
            number[i, j] = count
            count += inside[i, j]
    values, columns, starts = np.empty(9 * count), np.empty(9 * count, np.int32), np.zeros(count + 1, np.int32)
    size = 0
    for i in range(height):
        for j in range(width):
            if not inside[i, j]:
                continue
            for k in range(9):
                m = k if k < 4 else k - 1  # the pixel itself comes between its neighbours 3 and 4
                y, x = (i, j) if k == 4 else (i + DY[m], j + DX[m])
                if 0 <= y < height and 0 <= x < width and inside[y, x]:
                    values[size] = 1 + pull[i, j] if k == 4 else -weights[i, j, m]
                    columns[size] = number[y, x]
                    size += 1
            starts[number[i, j] + 1] = size
    return values[:size], columns[:size], starts


def _around(x, weights, pull, target, inside):  # noqa: ANN001, ANN202 - compiled
    """The right-hand side of the block's rows, with the pixels that are not `inside` as they are in `x`."""
    height, width = x.shape
    out = np.empty(inside.sum())
    size = 0
    for i in range(height):
        for j in range(width):
            if inside[i, j]:
                out[size] = target[i, j]
                for k in range(8):
                    y, z = i + DY[k], j + DX[k]
                    if 0 <= y < height and 0 <= z < width and not inside[y, z]:
                        out[size] += weights[i, j, k] * x[y, z]
                size += 1
    return out


def _sweep(x, weights, pull, target, inside):  # noqa: ANN001, ANN202 - compiled
    """One Gauss-Seidel sweep over the pixels that are not `inside`, in place; returns the largest change."""
    height, width = x.shape
    change = 0.0
    for i in range(height):
        for j in range(width):
            if inside[i, j]:
                continue
            total = target[i, j]
            w = weights[i, j]
            if 0 < i < height - 1 and 0 < j < width - 1:
                above, here, below = x[i - 1, j - 1 : j + 2], x[i, j - 1 : j + 2], x[i + 1, j - 1 : j + 2]
                total += w[0] * above[0] + w[1] * above[1] + w[2] * above[2] + w[4] * here[2]
                total += w[5] * below[0] + w[6] * below[1] + w[7] * below[2]
                total += w[3] * here[0]  # last: it is the one just computed
            else:
                for k in range(8):
                    y, z = i + DY[k], j + DX[k]
                    if 0 <= y < height and 0 <= z < width:
                        total += w[k] * x[y, z]
            total /= 1 + pull[i, j]
            change = max(change, abs(total - x[i, j]))
            x[i, j] = total
    return change

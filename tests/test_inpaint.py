"""Filling depth: against the official toolbox, and against the equation written down plainly and solved by SciPy."""

import builtins
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from d3lib import bench, naive
from d3lib.data import inpaint
from d3lib.data.inpaint import fill_depth
from d3lib.errors import UserError


def equation(rgb, depth, alpha=1.0):
    """(I - W + alpha K, right-hand side), pixel by pixel as in the toolbox's loop, scaled as there."""
    grey = 0.298936 * (rgb[0] / 255.0) + 0.587043 * (rgb[1] / 255.0) + 0.114021 * (rgb[2] / 255.0)
    height, width = depth.shape
    matrix = np.zeros((depth.size, depth.size))
    known = (depth != 0) & (depth != 10)
    for i in range(height):
        for j in range(width):
            window = [(y, x) for y in (i - 1, i, i + 1) for x in (j - 1, j, j + 1) if y in range(height)]
            window = [(y, x) for y, x in window if x in range(width)]
            others = [place for place in window if place != (i, j)]
            squares = np.array([(grey[place] - grey[i, j]) ** 2 for place in others])
            spread = 0.6 * np.var([grey[place] for place in window])
            spread = max(spread, -squares.min() / np.log(0.01), 2e-6)
            weights = np.exp(-squares / spread)
            matrix[i * width + j, [y * width + x for y, x in others]] = -weights / weights.sum()
            matrix[i * width + j, i * width + j] = 1 + alpha * known[i, j]
    largest = depth[known].max()
    return matrix, alpha * (known * depth / largest).ravel(), largest


def exact(rgb, depth, alpha=1.0):
    matrix, right, largest = equation(rgb, depth, alpha)
    return np.linalg.solve(matrix, right).reshape(depth.shape) * largest


def frame(seed, height, width, holes, flat=False):
    """Random colours (in a few flat patches, or at random everywhere), depth, and holes in blobs and single pixels."""
    rng = np.random.default_rng(seed)
    rgb = rng.integers(0, 256, (3, height, width), dtype=np.uint8)
    if flat:
        rgb = np.repeat(np.repeat(rgb[:, ::4, ::4], 4, 1), 4, 2)[:, :height, :width].copy()
    depth = rng.uniform(0.5, 12, (height, width))
    depth[rng.random((height, width)) < holes / 2] = 0
    top, left = rng.integers(0, height), rng.integers(0, width)
    depth[top : top + int(holes * height) + 1, left : left + int(holes * width) + 1] = rng.choice([0.0, 10.0])
    if not ((depth > 0) & (depth != 10)).any():
        depth[0, 0] = 3.0
    return rgb, depth


@pytest.mark.realdata
def test_a_real_frame_is_filled_as_by_the_official_toolbox(test_data):
    with np.load(test_data / "nyu_raw_frame" / "toolbox_reference.npz") as reference:
        rgb, depth = (reference[f"projected_{name}"][44:471, 40:601] for name in ("rgb", "depth"))
        expected = reference["filled_427x561"]
    filled = fill_depth(rgb.transpose(2, 0, 1), depth)
    assert filled.dtype == np.float64 and np.abs(filled - expected).max() <= 1e-4


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1), st.integers(2, 18), st.integers(2, 18), st.sampled_from([0.0, 0.1, 0.4, 0.9]),
    st.booleans(), st.sampled_from([1.0, 0.3, 2.0, 50.0]),
)  # fmt: skip
def test_any_frame_solves_the_equation(seed, height, width, holes, flat, alpha):
    rgb, depth = frame(seed, height, width, holes, flat)
    assert np.abs(fill_depth(rgb, depth, alpha) - exact(rgb, depth, alpha)).max() <= 1e-4


def test_a_larger_frame_solves_the_equation():
    rgb, depth = frame(3, 40, 55, 0.5, flat=True)
    matrix, right, largest = equation(rgb, depth)
    solved = scipy.sparse.linalg.spsolve(scipy.sparse.csc_array(matrix), right).reshape(depth.shape) * largest
    assert np.abs(fill_depth(rgb, depth) - solved).max() <= 1e-4


@pytest.mark.parametrize("alpha", [1e-4, 0.02])
def test_a_weak_pull_on_known_pixels_is_solved_directly(alpha, monkeypatch):
    turns = []
    alternate = inpaint._alternate
    monkeypatch.setattr(inpaint, "_alternate", lambda *a: turns.append(alternate(*a)) or turns[-1])
    rgb, depth = frame(5, 24, 30, 0.3)
    assert np.abs(fill_depth(rgb, depth, alpha) - exact(rgb, depth, alpha)).max() <= 1e-6
    assert turns == [None]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 9.9), st.sampled_from([0.1, 1.0, 10.0]))
def test_constant_depth_stays_constant(seed, metres, alpha):
    rgb, depth = frame(seed, 12, 15, 0.5)
    depth = np.where((depth == 0) | (depth == 10), depth, metres)
    np.testing.assert_allclose(fill_depth(rgb, depth, alpha), metres, rtol=0, atol=1e-4)


def test_a_fully_valid_frame_is_smoothed_as_the_equation_says():
    rgb, depth = frame(7, 16, 20, 0.0)
    depth = np.where((depth == 0) | (depth == 10), 2.0, depth)
    filled = fill_depth(rgb, depth)
    assert np.abs(filled - exact(rgb, depth)).max() <= 1e-4
    assert np.abs(filled - depth).max() > 0.1


def test_a_known_pixel_moves_to_the_mean_of_its_measurement_and_its_neighbours():
    # One colour: all weights are equal. Each column is one number: 2 x = (x + 2 y) / 3 + 2, 2 y = (y + 2 x) / 3 + 5.
    black = np.zeros((3, 2, 2), np.uint8)
    filled = fill_depth(black, np.array([[2.0, 5.0]] * 2))
    np.testing.assert_allclose(filled, [[20 / 7, 29 / 7]] * 2, atol=1e-4)
    held = fill_depth(black, np.array([[2.0, 5.0]] * 2), alpha=1e6)
    np.testing.assert_allclose(held, [[2.0, 5.0]] * 2, atol=1e-4)


def test_ten_metres_is_missing_and_values_beyond_are_known():
    # A hole takes what its only known neighbours have: 2 x = (x + 2 y) / 3 + d, y = (y + 2 x) / 3 give d.
    black = np.zeros((3, 2, 2), np.uint8)
    for marked in (0.0, 10.0):
        filled = fill_depth(black, np.array([[4.0, marked]] * 2))
        np.testing.assert_allclose(filled, [[4.0, 4.0]] * 2, atol=1e-4)
    filled = fill_depth(black, np.array([[4.0, 10.3]] * 2))
    np.testing.assert_allclose(filled, [[4 + 6.3 * 2 / 7, 10.3 - 6.3 * 2 / 7]] * 2, atol=1e-4)


def step_by_step(last: int) -> tuple[np.ndarray, np.ndarray]:
    """Greys whose steps shrink by a tenth, up and down: every pixel hardly looks back to the only known one."""
    greys, step = [255.0], 255.0
    while step > last:
        greys.append(greys[-1] - step if len(greys) % 2 else greys[-1] + step)
        step *= 0.9
    rgb = np.broadcast_to(np.round(greys).astype(np.uint8), (3, 2, len(greys)))
    depth = np.zeros(rgb.shape[1:])
    depth[:, 0] = 4.0
    return rgb, depth


@pytest.mark.parametrize("last", [140, 90, 80])  # condition 1e7, 1e10 and 2e11; single precision ends between them
def test_a_hole_that_is_nearly_cut_off_is_filled_from_what_it_sees(last):
    np.testing.assert_allclose(fill_depth(*step_by_step(last)), 4.0, rtol=0, atol=5e-5)


@pytest.mark.parametrize("last", [60, 20])
def test_a_hole_cut_off_beyond_double_precision_is_refused_and_not_filled_wrongly(last):
    with pytest.raises(UserError, match="double precision does not suffice"):
        fill_depth(*step_by_step(last))


def test_the_edges_of_a_fill_follow_the_edges_of_the_picture():
    rgb = np.zeros((3, 40, 60), np.uint8)
    slant = np.arange(60) >= 25 + np.arange(40)[:, None] // 4
    rgb[:, slant] = 200
    depth = np.where(slant, 4.0, 2.0)
    depth[8:30, 18:46] = 0
    filled = fill_depth(rgb, depth)
    assert np.abs(filled - np.where(slant, 4.0, 2.0)).max() < 0.05


@pytest.mark.parametrize(("height", "width"), [(2, 2), (3, 3), (2, 3), (3, 2), (2, 40), (40, 2)])
def test_pictures_two_pixels_wide_and_their_borders_solve_the_equation(height, width):
    rgb, depth = frame(11, height, width, 0.3)
    assert np.abs(fill_depth(rgb, depth) - exact(rgb, depth)).max() <= 1e-4


def test_one_known_pixel_fills_the_whole_frame_whatever_its_colours():
    rgb, depth = frame(13, 30, 30, 0.0, flat=True)
    depth[:] = 0
    depth[29, 0] = 3.5
    np.testing.assert_allclose(fill_depth(rgb, depth), 3.5, atol=1e-4)


def test_the_fill_lies_between_the_smallest_and_the_largest_known_depth():
    rgb, depth = frame(17, 30, 40, 0.5)
    known = depth[(depth > 0) & (depth != 10)]
    filled = fill_depth(rgb, depth)
    assert known.min() - 1e-9 <= filled.min() and filled.max() <= known.max() + 1e-9


def test_the_input_is_left_as_it_was_and_its_layout_and_precision_do_not_matter():
    rgb, depth = frame(19, 20, 25, 0.3)
    depth = depth.astype(np.float32)
    before = rgb.copy(), depth.copy()
    filled = fill_depth(rgb, depth)
    assert (rgb == before[0]).all() and (depth == before[1]).all()
    for array in (rgb, depth):
        array.flags.writeable = False
    turned = fill_depth(np.asfortranarray(rgb), np.asfortranarray(depth.astype(np.float64)))
    assert (turned == filled).all()


@pytest.mark.parametrize("shape", [(1, 7), (9, 14)])
def test_the_benchmark_solves_the_same_equation(shape):
    rgb, depth = frame(23, *shape, 0.4)
    matrix, right = naive.fill_system(rgb, depth)
    expected, scaled, largest = equation(rgb, depth)
    np.testing.assert_allclose(matrix.toarray(), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(right, scaled * largest, rtol=1e-12)


def test_without_the_extra_the_benchmark_says_so_and_the_others_still_run(monkeypatch, capsys):
    def absent(device):
        raise UserError("filling depth needs numba")

    row = {"name": "quick", "unit": "x", "rate": 1.0, "low": 1.0, "high": 1.0}
    monkeypatch.setattr(bench, "BENCHES", {"data": absent, "quick": lambda device: [row]})
    assert bench.bench() == [{"bench": "quick"} | row] and "data: filling depth needs numba" in capsys.readouterr().out
    with pytest.raises(UserError, match="numba"):
        bench.bench("data")


GOOD = np.zeros((3, 4, 5), np.uint8), np.full((4, 5), 2.0)


@pytest.mark.parametrize(
    ("rgb", "depth", "alpha", "says"),
    [
        (GOOD[0], np.zeros((4, 5)), 1.0, "no valid depth"),
        (GOOD[0], np.full((4, 5), 10.0), 1.0, "no valid depth"),
        (GOOD[0], np.full((4, 5), np.nan), 1.0, "NaN"),
        (GOOD[0], np.full((4, 5), np.inf), 1.0, "infinite"),
        (GOOD[0], np.full((4, 5), -1.0), 1.0, "negative"),
        (GOOD[0], np.full((5, 4), 2.0), 1.0, r"\(4, 5\)"),
        (GOOD[0], np.full((1, 4, 5), 2.0), 1.0, r"\(4, 5\)"),
        (GOOD[0], np.full((4, 5), 2000, np.uint16), 1.0, "uint16"),
        (GOOD[0].transpose(1, 2, 0), GOOD[1], 1.0, r"\(3, H, W\)"),
        (GOOD[0] / 255, GOOD[1], 1.0, "uint8"),
        (np.zeros((3, 1, 1), np.uint8), np.full((1, 1), 2.0), 1.0, "2 pixels"),
        (np.zeros((3, 1, 7), np.uint8), np.full((1, 7), 2.0), 1.0, "2 pixels"),
        (np.zeros((3, 0, 5), np.uint8), np.zeros((0, 5)), 1.0, "2 pixels"),
        (*GOOD, 0.0, "alpha"),
        (*GOOD, -1.0, "alpha"),
        (*GOOD, float("nan"), "alpha"),
        (*GOOD, float("inf"), "alpha"),
    ],
)
def test_what_cannot_be_filled_gets_one_clear_line(rgb, depth, alpha, says):
    with pytest.raises(UserError, match=says) as caught:
        fill_depth(rgb, depth, alpha)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["numba", "scipy"])
def test_without_numba_or_scipy_the_message_names_the_extra(missing, monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.split(".")[0] == missing:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    inpaint._kernels.cache_clear()
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r'pip install "d3lib\[raw\]"'):
        fill_depth(*GOOD)
    monkeypatch.undo()
    assert np.allclose(fill_depth(*GOOD), 2.0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
@pytest.mark.parametrize("missing", ["depth[100:220, 200:400] = 0", "depth[rng.random(depth.shape) < 0.95] = 0"])
def test_a_process_that_fills_a_full_size_frame_stays_small_and_without_torch(missing):
    fill_depth(*GOOD)  # compiled and cached: that takes memory once on a machine, not in each process
    code = f"""
import sys
import numpy as np
from d3lib.data.inpaint import fill_depth
assert "numba" not in sys.modules and "scipy" not in sys.modules
rng = np.random.default_rng(0)
rgb = rng.integers(0, 256, (3, 427, 561), dtype=np.uint8)
depth = rng.uniform(1, 9, (427, 561))
{missing}
fill_depth(rgb, depth)
assert "torch" not in sys.modules
# What this process itself held at most: ru_maxrss begins at the size of the process that started it.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(int(peak) / 1024)
"""
    peak = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert peak < 500  # of which Python, NumPy, SciPy and the compiled kernels are some 250, more with newer Python

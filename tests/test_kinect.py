"""The Kinect's dumps: names, bytes, undistortion and projection, against the official toolbox and plain NumPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d3lib.data import kinect
from d3lib.errors import UserError


def depth_name(seconds, ticks=1):
    return f"d-{seconds:.6f}-{ticks}.pgm"


def rgb_name(seconds, ticks=1):
    return f"r-{seconds:.6f}-{ticks}.ppm"


def as_pgm(raw):
    return b"P5 640 480 65535\n" + raw.astype("<u2").tobytes()


def as_ppm(rgb):
    return b"P6 640 480 255\n" + rgb.tobytes()


def toolbox_rule(depths, rgbs):
    """Brute force: for each depth in turn, go on through the remaining pictures while the difference does not grow."""
    found, place = [], 0
    for time in depths:
        while place + 1 < len(rgbs) and abs(time - rgbs[place + 1]) <= abs(time - rgbs[place]):
            place += 1
        found.append(place)
    return found


def test_depth_takes_the_nearest_picture_and_a_tie_goes_to_the_later_one():
    names = [depth_name(100.5), rgb_name(100.0), rgb_name(101.0), rgb_name(102.0), "a-100.500000-3.dump", "INDEX.txt"]
    assert kinect.synchronise(names) == [(depth_name(100.5), rgb_name(101.0))]


def test_names_out_of_order_are_sorted_and_a_picture_may_serve_twice():
    names = [depth_name(101.2), rgb_name(101.0), depth_name(100.9), rgb_name(110.0)]
    assert [pair.rgb for pair in kinect.synchronise(names)] == [rgb_name(101.0)] * 2
    assert [pair.depth for pair in kinect.synchronise(names)] == [depth_name(100.9), depth_name(101.2)]


@pytest.mark.parametrize("names", [[], [depth_name(1.0)], [rgb_name(1.0)], ["r-.ppm", "d-1.0.pgm", "../d-1.0-2.pgm"]])
def test_nothing_to_pair_gives_no_pairs(names):
    assert kinect.synchronise(names) == []


@given(
    st.lists(st.integers(100_000, 999_999), min_size=1, max_size=20, unique=True),
    st.lists(st.integers(100_000, 999_999), min_size=1, max_size=20, unique=True),
)
def test_every_depth_picture_is_kept_by_the_toolbox_rule(depths, rgbs):
    depths, rgbs = sorted(depths), sorted(rgbs)
    pairs = kinect.synchronise([depth_name(t) for t in depths] + [rgb_name(t) for t in rgbs])
    assert [pair.depth for pair in pairs] == [depth_name(t) for t in depths]
    assert [pair.rgb for pair in pairs] == [rgb_name(rgbs[place]) for place in toolbox_rule(depths, rgbs)]


def test_dumps_are_read_little_endian_whatever_the_format_says():
    raw = np.arange(480 * 640, dtype=np.uint16).reshape(480, 640) % 2048
    assert (kinect.read_pgm(as_pgm(raw)) == raw).all()
    rgb = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    assert (kinect.read_ppm(as_ppm(rgb)) == rgb).all()


RAW = np.full((480, 640), 900, np.uint16)


@pytest.mark.parametrize(
    "content",
    [b"", b"P5", as_pgm(RAW)[:-1], as_pgm(RAW) + b"\0", as_pgm(RAW).replace(b"640 480", b"480 640"), as_ppm(
        np.zeros((480, 640, 3), np.uint8)), as_pgm(np.full((480, 640), 9000)), b"P5 99999999 99999999 65535\n"],
)  # fmt: skip
def test_what_is_no_kinect_depth_picture_is_named_in_one_line(content):
    with pytest.raises(UserError) as caught:
        kinect.read_pgm(content, "d-1.0-2.pgm")
    assert str(caught.value).startswith("d-1.0-2.pgm") and "\n" not in str(caught.value)


@pytest.mark.realdata
def test_the_reference_frame_equals_the_official_toolbox(test_data):
    folder = test_data / "nyu_raw_frame"
    expected = np.load(folder / "toolbox_reference.npz")
    rgb = kinect.read_ppm(next(folder.glob("*.ppm")).read_bytes())
    raw = kinect.read_pgm(next(folder.glob("*.pgm")).read_bytes())
    projected_rgb, projected_depth = kinect.project(rgb, raw)
    assert (projected_rgb == expected["projected_rgb"]).all()
    assert np.abs(projected_depth - expected["projected_depth"]).max() <= 1e-9
    assert kinect.crop(projected_depth).shape == (427, 561)


@given(st.integers(0, 2047))
@settings(max_examples=50)
def test_metres_follow_the_formula(d):
    z = 351.3 / (1092.5 - d)
    assert kinect.to_metres(d) == pytest.approx(min(max(z, 0), 10), abs=1e-12)


def plain_projection(z):
    """Steps 5 to 7 of the toolbox, pixel by pixel, in the order of its loop over columns."""
    x, y = np.meshgrid(np.arange(1, 641), np.arange(1, 481))
    d, c = kinect.DEPTH_LENS, kinect.RGB_LENS
    points = np.stack([(x - d.cx) / d.fx * z, (y - d.cy) / d.fy * z, z]).reshape(3, -1)
    points = kinect.ROTATION @ points + kinect.TRANSLATION[:, None]
    column = np.floor(points[0] * c.fx / points[2] + c.cx + 0.5)
    row = np.floor(points[1] * c.fy / points[2] + c.cy + 0.5)
    out = np.full((480, 640), np.inf)
    keep = (z.ravel() > 0) & (column > 0) & (column < 640) & (row > 0) & (row < 480)
    np.minimum.at(out, (row[keep].astype(int) - 1, column[keep].astype(int) - 1), z.ravel()[keep])
    return np.where(np.isinf(out), 0, out)


def test_projection_keeps_the_nearest_of_what_falls_on_a_pixel():
    rng = np.random.default_rng(1)
    disparity = rng.uniform(600, 1050, (480, 640))
    disparity[rng.random((480, 640)) < 0.2] = kinect.INVALID
    found = kinect.project_depth(disparity)
    assert np.abs(found - plain_projection(kinect.to_metres(disparity))).max() <= 1e-12
    assert (found[:, 639] == 0).all() and (found[479] == 0).all()  # the toolbox loses these


def test_a_constant_picture_stays_constant_inside_and_white_outside():
    out = kinect.undistort_rgb(np.full((480, 640, 3), 77, np.uint8))
    assert set(np.unique(out)) <= {77, 255} and (out[100:380, 100:540] == 77).all()


def test_missing_disparity_spreads_to_no_valid_neighbour():
    raw = np.full((480, 640), 900, np.uint16)
    raw[200:210, 300:310] = kinect.INVALID
    out = kinect.undistort_depth(raw)
    assert set(np.unique(out.round(9))) == {900.0, 2047.0}
    assert (out[203:207, 303:307] == kinect.INVALID).all() and np.abs(out[230:240, 300:310] - 900).max() < 1e-9


def test_disparities_below_600_are_dropped():
    raw = np.full((480, 640), 900, np.uint16)
    raw[0, 0] = kinect.INVALID
    raw[100:200, 100:200] = 500
    assert (kinect.undistort_depth(raw)[120:180, 120:180] == kinect.INVALID).all()


@pytest.mark.parametrize(
    ("rgb", "raw"),
    [
        (np.zeros((480, 640), np.uint8), RAW),
        (np.zeros((480, 640, 3)), RAW),
        (np.zeros((480, 640, 3), np.uint8), RAW.astype(np.int32)),
        (np.zeros((480, 640, 3), np.uint8), RAW.T),
    ],
)
def test_other_shapes_and_types_are_refused(rgb, raw):
    with pytest.raises(UserError, match="Kinect's is"):
        kinect.project(rgb, raw)


@pytest.mark.parametrize(("disparity", "kept"), [(601, True), (599, False)])
def test_the_bound_on_disparities_is_600(disparity, kept):
    raw = np.full((480, 640), disparity, np.uint16)
    raw[0, 0] = kinect.INVALID  # a picture's largest value counts as missing
    out = kinect.undistort_depth(raw)[200:210, 300:310]
    np.testing.assert_allclose(out, disparity if kept else kinect.INVALID, rtol=1e-12)


@pytest.mark.parametrize(
    ("rgb", "raw"),
    [
        (np.zeros((480, 640, 3), np.uint8), RAW.astype(np.float64)),
        (np.zeros((480, 640, 3), np.float32), RAW),
        (np.zeros((3, 480, 640), np.uint8), RAW),
        (np.zeros((480, 640, 3), np.uint8), RAW.T),
    ],
)
def test_pictures_of_other_shapes_or_types_are_not_projected(rgb, raw):
    with pytest.raises(UserError, match="a Kinect's is"):
        kinect.project(rgb, raw)

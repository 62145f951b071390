"""The synthetic Kinect recording, against the file formats and a projection written anew in NumPy float64."""

import re
import struct
import zipfile

import numpy as np
import pytest

from d3lib.data import rooms
from d3lib.data.rooms import recording
from d3lib.errors import UserError

FRAMES = {"living_room_0001a": [(1000, 0), (1003, 2), (1000, 1)], "kitchen_0002": [(4001, 0)]}
# NYU's calibration: fx, fy, cx, cy and k1, k2, p1, p2, k3; relative pose
RGB = (518.85790117450188, 519.46961112127485, 325.58244941119034, 253.73616633400465)
RGB_K = (0.20796615318809061, -0.58613825163911781, 0.00072231363135888329, 0.0010479627195765181, 0.49856986684705107)
DEPTH = (582.62448167737955, 582.69103270988637, 313.04475870804731, 238.44389626620386)
DEPTH_K = (-0.099897236553084481, 0.39065324602765344, 0.0019290592870229277, -0.0019422022475975055,
           -0.51031725053400578)  # fmt: skip
R = np.linalg.inv(
    -np.array(
        [
            [0.99997798940829263, 0.0050518419386157446, 0.0043011152014118693],
            [-0.0050359919480810989, 0.99998051861143999, -0.0036879781309514218],
            [-0.0043196624923060242, 0.0036662365748484798, 0.99998394948385538],
        ]
    )
)
T = np.array([0.025031875059141302, -0.00029342312935846411, 0.00066238747008330102])


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("recording") / "rooms.zip"
    recording.record(path, FRAMES)
    return path


def members(path, directory):
    """(kind, seconds, ticks, bytes) of a directory's files, by time."""
    with zipfile.ZipFile(path) as opened:
        names = [n for n in opened.namelist() if n.startswith(directory + "/")]
        files = [(re.fullmatch(r".*/([rda])-(\d{10}\.\d{6})-(\d{1,10})\.(ppm|pgm|dump)", n), n) for n in names]
        assert all(match for match, _ in files)
        return sorted((float(m[2]), m[1], int(m[3]), m[4], opened.read(n)) for m, n in files)


def pairs(path, directory):
    """(rgb uint8 (480, 640, 3), disparity (480, 640), seconds apart): each depth with the RGB nearest in time."""
    files = members(path, directory)
    colour = [(time, content) for time, kind, _, _, content in files if kind == "r"]
    for time, kind, _, _, content in files:
        if kind == "d":
            nearest, picture = min(colour, key=lambda c: abs(c[0] - time))
            rgb = np.frombuffer(picture, np.uint8, offset=15).reshape(480, 640, 3)
            yield rgb, np.frombuffer(content, "<u2", offset=17).reshape(480, 640), abs(nearest - time)


def seen_by(x, y, camera, k):
    """Where the undistorted pixels (x, y), counted from 0, are in the distorted picture."""
    fx, fy, cx, cy = camera
    k1, k2, p1, p2, k3 = k
    x, y = (x - cx) / fx, (y - cy) / fy
    r2 = x**2 + y**2
    radial = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3
    xd = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x**2)
    yd = y * radial + p1 * (r2 + 2 * y**2) + 2 * p2 * x * y
    return fx * xd + cx, fy * yd + cy


def undistorted(picture, camera, k):
    """The nearest distorted pixel for each undistorted one, and where there is one."""
    y, x = np.mgrid[:480, :640].astype(float)
    xd, yd = (np.rint(a).astype(int) for a in seen_by(x, y, camera, k))
    inside = (xd >= 0) & (xd < 640) & (yd >= 0) & (yd < 480)
    return picture[np.clip(yd, 0, 479), np.clip(xd, 0, 639)], inside


def projected(raw, translation=T):
    """Depth (480, 640) on the RGB picture, 0 where there is none: steps 4 to 7 of the toolbox."""
    d, inside = undistorted(raw, DEPTH, DEPTH_K)
    keep = inside & (d >= 600) & (d < 2047)
    row, col = np.nonzero(keep)
    z = 351.3 / (1092.5 - d[keep])
    point = np.stack([(col + 1 - DEPTH[2]) / DEPTH[0] * z, (row + 1 - DEPTH[3]) / DEPTH[1] * z, z])
    x, y, w = R @ point + translation[:, None]
    u = np.rint(x / w * RGB[0] + RGB[2]).astype(int)
    v = np.rint(y / w * RGB[1] + RGB[3]).astype(int)
    out = np.zeros((480, 640))
    for i in np.argsort(-z, kind="stable"):
        if 0 < u[i] < 640 and 0 < v[i] < 480:
            out[v[i] - 1, u[i] - 1] = z[i]
    return out


def smooth(depth):
    """Where neighbours within 3 pixels have nearly the same depth."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(depth, 3, mode="edge"), (7, 7))
    return windows.max((2, 3)) - windows.min((2, 3)) < 0.05 * depth


def test_files_are_what_their_names_say(archive):
    for directory, frames in FRAMES.items():
        files = members(archive, directory)
        assert [sum(kind == k for _, kind, *_ in files) for k in "rda"] == [len(frames) + 1, len(frames), len(frames)]
        for _, kind, ticks, suffix, content in files:
            assert 0 <= ticks < 2**32
            if kind == "r":
                assert suffix == "ppm" and content.startswith(b"P6 640 480 255\n") and len(content) == 921_615
            elif kind == "d":
                assert suffix == "pgm" and content.startswith(b"P5 640 480 65535\n") and len(content) == 614_417
            else:
                assert suffix == "dump" and len(content) == 12
                force = struct.unpack("<hhhbxi", content)[:3]
                assert np.linalg.norm(force) == pytest.approx(819, abs=2) and force[1] > 500  # 1 g, upwards


def test_the_zip_is_well_formed_and_alone_in_its_folder(archive):
    with zipfile.ZipFile(archive) as opened:
        assert opened.testzip() is None
        assert len(set(opened.namelist())) == len(opened.namelist()) == sum(3 * len(f) + 1 for f in FRAMES.values())
    assert [p.name for p in archive.parent.iterdir()] == ["rooms.zip"]


def test_the_nearest_rgb_in_time_is_the_same_frames_and_not_the_one_with_the_same_number(archive):
    frames = FRAMES["living_room_0001a"]
    for (seed, view), (rgb, raw, apart) in zip(frames, pairs(archive, "living_room_0001a"), strict=True):
        scene, camera = rooms.make_scene(seed), rooms.make_camera(seed, view)
        own_rgb, own_raw = recording.capture(scene, camera)
        assert np.array_equal(rgb, own_rgb) and np.array_equal(raw, own_raw)
        assert apart < 0.0135
    files = members(archive, "living_room_0001a")
    colour, depth = ([(t, ticks) for t, kind, ticks, *_ in files if kind == k] for k in "rd")
    assert all(after - before > 0.025 for (before, _), (after, _) in zip(colour, colour[1:], strict=False))
    assert len(colour) > len(depth)
    for stream in (colour, depth):  # the device's clock and the host's agree but for the jitter
        elapsed = [((ticks - stream[0][1]) % 2**32) / 60e6 - (t - stream[0][0]) for t, ticks in stream]
        assert max(elapsed, key=abs) < 0.0051


def test_disparities_are_eleven_bits_with_holes(archive):
    for _, raw, _ in [*pairs(archive, "living_room_0001a"), *pairs(archive, "kitchen_0002")]:
        measured = raw[raw != 2047]
        assert 390 <= measured.min() and measured.max() < 1058
        assert (raw[:, -8:] == 2047).all() and 0.002 < np.mean(raw[:, :-8] == 2047) < 0.4


def test_what_is_nearer_than_the_toolbox_accepts_is_still_recorded():
    scene = rooms.hand_made((6.0, 5.0, 6.0))
    _, raw = recording.capture(scene, rooms.Camera(np.array([3.0, 4.4, 3.0]), rooms.look(0, 0, 0)))
    assert 390 <= np.median(raw) < 600


@pytest.mark.parametrize("distance", [0.9, 2.0, 4.2])
def test_a_wall_facing_the_depth_camera_has_the_disparity_of_its_distance(distance):
    scene = rooms.hand_made((20.0, 6.0, 20.0))
    facing = rooms.look(0, 0, 0)
    # p_rgb = R p_d + T, both negated: the depth camera is at -T and turned by -R
    camera = rooms.Camera(np.array([10.0, 6.0 - distance, 10.0]) + facing @ (-R.T) @ T, facing @ (-R.T))
    _, raw = recording.capture(scene, camera)
    level = 1092.5 - 351.3 / distance
    measured = raw[raw != 2047]
    assert len(measured) > 0.95 * raw.size
    assert np.abs(measured - level).max() <= 2 and measured.mean() == pytest.approx(level, abs=0.05)


@pytest.mark.parametrize(
    ("lens", "camera", "k"), [(recording.RGB_LENS, RGB, RGB_K), (recording.DEPTH_LENS, DEPTH, DEPTH_K)]
)
def test_undistorting_and_distorting_returns_to_the_start(lens, camera, k):
    y, x = np.mgrid[-1:481, -1:641].astype(float)
    u, v = lens.undistort(x, y)
    assert np.abs(u - x).max() > 5
    for again in (lens.distort(u, v), seen_by(u, v, camera, k)):
        assert max(np.abs(again[0] - x).max(), np.abs(again[1] - y).max()) < 1e-6
    ray = lens(x, y)
    assert np.abs(ray[0] * camera[0] + camera[2] - 1 - u).max() < 1e-6  # rays count pixels from 1
    assert np.abs(ray[1] * camera[1] + camera[3] - 1 - v).max() < 1e-6


def test_a_solid_shows_where_the_depth_cameras_lens_and_pose_put_it():
    """A small ball's outline in the raw disparity, against Brown's model and p_d = inv(R) (p_rgb - T) by hand."""
    position, facing = np.array([3.0, 0.5, 1.5]), rooms.look(0, 0, 0)
    for offset in ((0.0, 0.0), (0.75, 0.5), (-0.8, -0.55), (0.7, -0.55)):
        centre = np.array([*offset, 1.6])
        ball = rooms.part("sphere", position + facing @ centre, (0.06,) * 3, rooms.Material())
        _, raw = recording.capture(rooms.hand_made((6.0, 4.5, 3.0), [ball]), rooms.Camera(position, facing))
        x, y, z = np.linalg.inv(R) @ (-centre - T)
        expected = seen_by(x / z * DEPTH[0] + DEPTH[2] - 1, y / z * DEPTH[1] + DEPTH[3] - 1, DEPTH, DEPTH_K)
        row, col = np.nonzero(np.abs(raw - (1092.5 - 351.3 / z)) < 8)
        assert len(row) > 150
        assert abs(col.mean() - expected[0]) < 1 and abs(row.mean() - expected[1]) < 1, offset


def test_the_toolboxs_projection_brings_depth_back_onto_the_truth(archive):
    shares = []
    for directory, frames in FRAMES.items():
        for frame, (_, raw, _) in zip(frames, pairs(archive, directory), strict=True):
            expected = recording.truth(*frame)[1]
            found = projected(raw)
            calm = smooth(expected) & (found > 0)
            assert np.mean(found > 0) > 0.6
            assert np.median(np.abs(found - expected)[calm]) < 0.01
            level = expected**2 / 351.3  # metres per level of disparity
            off = np.abs(found - expected) > 3 * level + 0.02
            assert np.mean(off[calm]) < 0.01
            mirrored = projected(raw, -T)
            wrong = (np.abs(mirrored - expected) > 3 * level + 0.02)[mirrored > 0].mean()
            shares.append((off[found > 0].mean(), wrong))
    right, wrong = np.mean(shares, 0)
    assert right < 0.01 and right < 0.1 * wrong  # edges too; a camera on the other side would miss them


def test_undistorting_the_rgb_picture_gives_the_true_picture(archive):
    for frame, (rgb, _, _) in zip(FRAMES["living_room_0001a"], pairs(archive, "living_room_0001a"), strict=True):
        expected = recording.truth(*frame)[0].transpose(1, 2, 0).astype(float)
        found, inside = undistorted(rgb.astype(float), RGB, RGB_K)
        y, x = np.mgrid[:480, :640].astype(float)
        inside &= np.hypot(*np.subtract(seen_by(x, y, RGB, RGB_K), (x, y))) > 2  # where the lens shifts clearly
        inside[:2] = inside[-2:] = inside[:, :2] = inside[:, -2:] = False  # room to shift
        assert inside.sum() > 20_000

        def apart(dy, dx, found=found, inside=inside, expected=expected):
            return np.abs(np.roll(found, (dy, dx), (0, 1)) - expected)[inside].mean()

        best = min((apart(dy, dx), dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
        assert best[1:] == (0, 0)
        assert best[0] < 0.8 * np.abs(rgb - expected)[inside].mean()


def test_truth_is_the_rendered_frame_seen_by_the_depth_cameras_ruler():
    rgb, depth = recording.truth(1003, 2)
    frame = rooms.render([(1003, 2)], (480, 640))
    assert rgb.dtype == np.uint8 and depth.dtype == np.float64 and depth.shape == (480, 640)
    assert np.array_equal(rgb, frame["rgb"][0].numpy())
    z = frame["exact"][0, 0].double().numpy()
    y, x = np.mgrid[1:481, 1:641]
    point = np.stack([(x - RGB[2]) / RGB[0] * z, (y - RGB[3]) / RGB[1] * z, z]).reshape(3, -1)
    along = (np.linalg.inv(R) @ (-point - T[:, None]))[2].reshape(480, 640)
    np.testing.assert_allclose(depth, along, atol=1e-12)
    assert 0 < np.abs(depth - z).max() < 0.05


def test_the_same_arguments_give_the_same_bytes_and_another_seed_other_times(tmp_path, archive):
    few = {"kitchen_0002": FRAMES["kitchen_0002"]}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        recording.record(tmp_path / name, few, seed=seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b and a != c
    with zipfile.ZipFile(tmp_path / "a") as alone, zipfile.ZipFile(archive) as whole:
        assert set(alone.namelist()) < set(whole.namelist())  # a directory does not depend on the others


@pytest.mark.parametrize(
    ("directories", "words"),
    [
        ({}, "nothing to record"),
        ({"a": []}, "some frames"),
        ({"../a": [(1000, 0)]}, "directory '../a'"),
        ({"a": [(1000, -1)]}, ">= 0"),
    ],
)
def test_bad_input_gets_one_clear_line_and_no_file(directories, words, tmp_path):
    with pytest.raises(UserError, match=words) as error:
        recording.record(tmp_path / "x.zip", directories)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())

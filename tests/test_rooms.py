"""The synthetic rooms, against ray casting written anew in NumPy float64."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from d3lib.data import rooms
from d3lib.data.rooms import sensor, tracer
from d3lib.data.rooms.furniture import FREQUENCY
from d3lib.data.rooms.layout import van_der_corput
from d3lib.errors import UserError

SIZE = (48, 64)
GREY = rooms.Material(first=(0.5, 0.5, 0.5), second=(0.5, 0.5, 0.5))
AHEAD = rooms.look(0, 0, 0)


def camera(position, axes=AHEAD, **style):
    return rooms.Camera(np.array(position, dtype=float), axes, **style)


def pixel_rays(axes, size):
    """Directions (H, W, 3) in the world, scaled so that one unit along them is one metre of depth."""
    fx, fy, cx, cy = rooms.intrinsics(size)
    j, i = np.mgrid[: size[0], : size[1]]
    local = np.stack([(i - cx) / fx, (j - cy) / fy, np.ones(size)], -1)
    return local @ np.asarray(axes).T


def cast(scene, camera, size):
    """Depth (H, W) of a scene by brute force: every part against every ray, from the shapes' own definitions."""
    rays = pixel_rays(camera.axes, size)
    with np.errstate(all="ignore"):
        walls = np.where(rays > 0, (scene.size - camera.position) / rays, -camera.position / rays)
        depth = np.nanmin(np.where(rays == 0, np.inf, walls), -1)
        for item in scene.parts[1:]:
            o, d = (camera.position - item.centre) @ item.axes, rays @ item.axes
            candidates = []
            if item.shape in ("box", "cylinder"):
                for k in range(3) if item.shape == "box" else (2,):  # flat faces: on the plane and within the outline
                    for side in (-1, 1):
                        t = (side * item.half[k] - o[k]) / d[..., k]
                        p = np.delete((o + t[..., None] * d) / item.half, k, -1)
                        inside = (np.abs(p) <= 1).all(-1) if item.shape == "box" else (p**2).sum(-1) <= 1
                        candidates.append(np.where(inside & (t > 0), t, np.inf))
            if item.shape in ("cylinder", "sphere"):  # the round side: a quadratic in t
                n = 2 if item.shape == "cylinder" else 3
                o1, d1 = (o / item.half)[:n], (d / item.half)[..., :n]
                a, b, c = (d1**2).sum(-1), (o1 * d1).sum(-1), (o1**2).sum() - 1
                for sign in (-1, 1):
                    t = (-b + sign * np.sqrt(b * b - a * c)) / a
                    tall = np.abs(o[2] + t * d[..., 2]) <= (item.half[2] if n == 2 else np.inf)
                    candidates.append(np.where(tall & (t > 0), t, np.inf))
            depth = np.fmin(depth, np.min(candidates, 0))
    return depth


def exact(scene, view, size=SIZE):
    return rooms.render_views([(scene, view)], size)["exact"][0, 0].double().numpy()


@pytest.mark.parametrize("size", [(48, 64), (61, 83), (240, 320)])
def test_depth_of_an_empty_room_is_the_distance_to_its_planes_along_the_optical_axis(size):
    scene = rooms.hand_made((4.0, 6.0, 2.5))
    view = camera((1.5, 1.0, 1.4), rooms.look(20, -10, 5))
    np.testing.assert_allclose(exact(scene, view, size), cast(scene, view, size), atol=1e-4)


def test_a_wall_straight_ahead_has_one_depth_although_its_corners_are_farther_away():
    depth = exact(rooms.hand_made((20.0, 5.0, 20.0)), camera((10, 1.0, 10)))
    np.testing.assert_allclose(depth, 4.0, atol=1e-5)


@pytest.mark.parametrize("shape", ["box", "cylinder", "sphere"])
def test_depth_of_a_turned_solid_agrees_with_float64(shape):
    axes = rooms.rotation(2, 30) @ rooms.rotation(0, 25)
    scene = rooms.hand_made((5.0, 5.0, 3.0), [rooms.part(shape, (2.4, 3.0, 1.2), (0.9, 0.5, 1.1), GREY, axes)])
    view = camera((2.5, 0.8, 1.5), rooms.look(0, -5, 3))
    ours, reference = exact(scene, view, (96, 128)), cast(scene, view, (96, 128))
    assert np.mean(reference < 3.2) > 0.05  # the solid is in the picture
    assert np.mean(np.abs(ours - reference) > 1e-4) < 1e-3  # rays that touch its outline may go either way


def test_depth_of_furnished_rooms_agrees_with_float64_over_all_parts():
    chosen = rooms.frames("train", scenes=6) + rooms.frames("unseen", scenes=6)
    batch = rooms.render(chosen, SIZE)
    for (seed, view), depth in zip(chosen, batch["exact"], strict=True):
        reference = cast(rooms.make_scene(seed), rooms.make_camera(seed, view), SIZE)
        assert np.mean(np.abs(depth[0].numpy() - reference) > 1e-3) <= 2e-3, (seed, view)


def test_intrinsics_are_nyus_for_the_full_frame_and_keep_the_field_of_view_when_resized():
    fx, fy, cx, cy = rooms.intrinsics((480, 640))
    assert (fx, fy) == pytest.approx((518.857901, 519.469611))
    assert (cx + 1, cy + 1) == pytest.approx((325.582449, 253.736166))  # NYU counts pixels from 1
    small = rooms.intrinsics((120, 160))
    assert (-0.5 - small[2]) / small[0] == pytest.approx((-0.5 - cx) / fx)
    assert (119.5 - small[3]) / small[1] == pytest.approx((479.5 - cy) / fy)


def parameters_digest(seeds):
    """SHA-256 over every number of some scenes and their first cameras, bit for bit."""
    digest = hashlib.sha256()
    for seed in seeds:
        scene = rooms.make_scene(seed)
        for item in scene.parts:
            numbers = [*item.centre, *item.half, *item.axes.ravel()]
            for material in (item.material, item.front):
                numbers += [x for value in material or () if not isinstance(value, str) for x in np.ravel(value)]
            digest.update(np.array(numbers, dtype=float).tobytes())
        for light in scene.lights:
            digest.update(np.array([*light.position, *light.colour]).tobytes())
        for view in range(3):
            c = rooms.make_camera(seed, view)
            style = [c.exposure, c.vignette, c.noise, *c.balance, c.seed]
            digest.update(np.array([*c.position, *c.axes.ravel(), *style], dtype=float).tobytes())
    return digest.hexdigest()


def test_scene_parameters_are_the_same_bits_everywhere():
    """Pinned: another platform, NumPy or Python must find the same. A wanted change of the rooms changes it too."""
    assert (
        parameters_digest((1000, 1001, 3000, 4000))
        == "ea4c694d6eb6fa3392c8a458095ff331d77265867faffa1789da03683a9863c6"
    )


def test_pictures_do_not_depend_on_process_threads_or_instruction_set():
    code = (
        "import hashlib, torch; from d3lib.data import rooms; b = rooms.render([(1003, 1), (4002, 0)], (40, 56));"
        "print(hashlib.sha256(b''.join(b[k].numpy().tobytes() for k in sorted(b))).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": seed, **instructions},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, instructions in (("1", {}), ("2", {"ATEN_CPU_CAPABILITY": "default"}))
    }
    assert len(found) == 1


def test_a_frame_does_not_depend_on_its_batch():
    chosen = rooms.frames("train", scenes=5)
    together = rooms.render(chosen, (37, 50))
    for k, frame in enumerate(chosen):
        alone = rooms.render([frame], (37, 50))
        for key, value in alone.items():
            assert torch.equal(value[0], together[key][k]), (frame, key)


def test_a_frame_does_not_depend_on_how_many_rays_are_traced_at_once(monkeypatch):
    few = rooms.render([(1000, 0), (1001, 0)], SIZE)
    monkeypatch.setitem(tracer._RAYS_AT_ONCE, "cpu", 2**22)
    many = rooms.render([(1000, 0), (1001, 0)], SIZE)
    assert all(torch.equal(few[key], many[key]) for key in few)


@pytest.mark.parametrize("workers", [1, 2])
def test_streamed_batches_are_the_rendered_frames_in_order(workers):
    chosen = rooms.frames("val", scenes=5)
    streamed = list(rooms.stream(chosen, (32, 40), batch_size=2, workers=workers))
    assert [len(batch["rgb"]) for batch in streamed] == [2, 2, 1]
    whole = rooms.render(chosen, (32, 40))
    assert all(torch.equal(torch.cat([batch[key] for batch in streamed]), whole[key]) for key in whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_paints_the_same_pictures():
    chosen = rooms.frames("train", scenes=8)
    here, there = (rooms.render(chosen, (96, 128), device) for device in ("cpu", "cuda"))
    there = {key: value.cpu() for key, value in there.items()}
    assert ((here["rgb"].int() - there["rgb"].int()).abs() > 1).float().mean() <= 1e-3
    assert ((here["exact"] - there["exact"]).abs() > 1e-3).float().mean() <= 1e-3
    assert (here["valid"] != there["valid"]).float().mean() <= 1e-3


def test_sets_mirror_nyus_sizes_and_share_no_scene():
    seeds = {split: rooms.scene_seeds(split) for split in ("train", "val", "test", "unseen")}
    assert {split: len(s) for split, s in seeds.items()} == {"train": 249, "val": 25, "test": 215, "unseen": 215}
    assert len(set().union(*seeds.values())) == 249 + 25 + 215 + 215


def test_smaller_sets_are_prefixes_of_larger_ones():
    small, middle = rooms.frames("train"), rooms.frames("train", views=15)
    assert len(small) == 249 and len(middle) == 249 * 15 and len(set(middle)) == len(middle)
    assert middle[:249] == small
    assert {view for _, view in small} == {0}
    assert [seed for seed, _ in rooms.frames("train", scenes=10)] == list(rooms.scene_seeds("train")[:10])


def test_any_prefix_of_views_covers_the_camera_path():
    for count in (1, 5, 15, 100, 290):
        places = sorted(van_der_corput(k) for k in range(count))
        assert len(set(places)) == count
        assert max(np.diff([*places, 1.0])) <= 2 / count


def test_views_of_a_scene_differ():
    batch = rooms.render([(1000, view) for view in range(4)], SIZE)["exact"]
    assert all((batch[i] - batch[j]).abs().mean() > 0.1 for i in range(4) for j in range(i))


@pytest.fixture(scope="module")
def some():
    """One view of many scenes, small."""
    return rooms.render(rooms.frames("train", scenes=60) + rooms.frames("unseen", scenes=30), (32, 48))


def test_exact_depth_is_positive_and_within_range_everywhere(some):
    assert some["exact"].min() >= 0.4 and some["exact"].max() <= 10
    assert 1.5 < some["exact"].median() < 3.5


def test_batches_have_the_promised_types_and_shapes(some):
    assert some["rgb"].shape == (90, 3, 32, 48) and some["rgb"].dtype == torch.uint8
    for key, dtype in (("depth", torch.float32), ("valid", torch.bool), ("exact", torch.float32)):
        assert some[key].shape == (90, 1, 32, 48) and some[key].dtype == dtype


def test_depth_is_zero_exactly_where_invalid_and_near_the_truth_elsewhere(some):
    assert torch.equal(some["depth"] > 0, some["valid"])
    assert 0.8 < some["valid"].float().mean() < 0.99
    z, truth = some["depth"][some["valid"]], some["exact"][some["valid"]]
    level = truth**2 / 351.3  # metres per level of disparity
    assert ((z - truth).abs() <= 2.2 * level).all()


def test_kinect_depths_are_whole_levels_of_disparity(some):
    z = some["depth"][some["valid"]].double().numpy()
    level = 1092.5 - 351.3 / z
    np.testing.assert_allclose(level, np.round(level), atol=2e-3)
    assert level.min() >= 600 - 1e-3


def test_shadow_holes_lie_beside_near_edges_as_wide_as_the_offsets_say():
    """Projector 5 cm to the right of the RGB camera: its shadow falls left; infrared camera 2.5 cm to the left."""
    near, far, size = 1.2, 2.4, (240, 320)
    board = rooms.part("box", (2.0, 0.5 + near + 0.01, 1.3), (0.5, 0.02, 0.6), GREY)
    scene = rooms.hand_made((4.0, 0.5 + far, 2.6), [board])
    batch = rooms.render_views([(scene, camera((2.0, 0.5, 1.3)))], size)
    row = int(rooms.intrinsics(size)[3])
    truth, valid = batch["exact"][0, 0, row].numpy(), batch["valid"][0, 0, row].numpy()
    on = np.flatnonzero(truth < 1.5)
    left, right = valid[: on[0]], valid[on[-1] + 1 :]
    parallax = rooms.intrinsics(size)[0] * (1 / near - 1 / far)
    holes_left = np.argmax(left[::-1]), 0.050 * parallax
    holes_right = np.argmax(right), 0.025 * parallax
    for measured, expected in (holes_left, holes_right):
        assert abs(measured - expected) <= 1.5, (measured, expected)
    assert left[: -int(holes_left[1]) - 3].mean() > 0.99 and right[int(holes_right[1]) + 3 :].mean() > 0.99


def test_far_and_grazing_surfaces_are_missing():
    view = camera((2.0, 0.8, 1.0))
    near, far = (rooms.render_views([(rooms.hand_made((4.0, length, 2.4)), view)], (96, 128)) for length in (4.0, 10.7))
    ahead = (slice(None), slice(None), slice(44, 52), slice(56, 72))
    assert near["valid"][ahead].all() and far["valid"][ahead].float().mean() < 0.1
    skimming = camera((2.0, 0.8, 0.05))  # 5 cm above the floor
    floor = rooms.render_views([(rooms.hand_made((4.0, 6.0, 2.4)), skimming)], (96, 128))
    below = floor["valid"][..., 56:, :] & (floor["exact"][..., 56:, :] > 0.8) & (floor["exact"][..., 56:, :] < 4)
    assert not below.any()


def test_the_picture_holds_no_trace_of_the_holes(monkeypatch):
    chosen = rooms.frames("train", scenes=3)
    before = rooms.render(chosen, SIZE)
    monkeypatch.setattr(sensor, "PROJECTOR", 0.3)
    monkeypatch.setattr(sensor, "WEAKEST", 0.02)
    after = rooms.render(chosen, SIZE)
    assert (before["valid"] != after["valid"]).float().mean() > 0.05
    assert torch.equal(before["rgb"], after["rgb"]) and torch.equal(before["exact"], after["exact"])


def test_nuisances_are_drawn_independently_of_each_other():
    rows = []
    for seed in rooms.scene_seeds("train")[:245]:
        scene, view = rooms.make_scene(seed), rooms.make_camera(seed, 0)
        forward, right = view.axes[:, 2], view.axes[:, 0]
        nuisances = {
            "height": view.position[2] / min(2.2, scene.size[2] - 0.57),
            "pitch": forward[2],
            "roll": right[2],
            "exposure": view.exposure,
            "noise": view.noise,
            "vignette": view.vignette,
            "floor texture": scene.walls[4].frequency / FREQUENCY[scene.walls[4].pattern],
            "wall texture": scene.walls[1].frequency / FREQUENCY[scene.walls[1].pattern],
            "light power": scene.lights[0].colour.sum(),
            "light place": scene.lights[0].position[0] / scene.size[0],
        }
        rows.append(list(nuisances.values()))
    ranks = np.array(rows).argsort(0).argsort(0)
    correlation = np.corrcoef(ranks.T) - np.eye(len(nuisances))
    # 45 pairs of 245 ranks: the largest of as many independent pairs stays below 0.21 in 95 of 100 worlds
    a, b = np.unravel_index(np.abs(correlation).argmax(), correlation.shape)
    assert abs(correlation[a, b]) < 0.21, (list(nuisances)[a], list(nuisances)[b], correlation[a, b])
    height, pitch = np.ptp(rows, axis=0)[:2]
    assert height > 0.5 and pitch > 0.5


def test_unseen_scenes_share_no_furniture_and_no_pattern_with_the_others():
    def families(seeds):
        scenes = [rooms.make_scene(seed) for seed in seeds]
        fixtures = {"door", "window", "picture", "ceiling_lamp"}  # parts of a room, drawn with other patterns
        items = {name for scene in scenes for name in scene.items} - fixtures
        materials = [m for s in scenes for p in s.parts for m in (p.material, p.front) if m]
        return items, {m.pattern for m in [*materials, *(m for s in scenes for m in s.walls)]}

    known = families([*rooms.scene_seeds("train")[:60], *rooms.scene_seeds("test")[:20], *rooms.scene_seeds("val")])
    unseen = families(rooms.scene_seeds("unseen")[:60])
    assert known[0].isdisjoint(unseen[0]) and known[1].isdisjoint(unseen[1])
    assert min(map(len, (*known, *unseen))) >= 5


def floor_picture(part=None, light=(1.0, 1.5, 2.0), position=(2.0, 0.6, 1.5), shading="full", floor=GREY):
    """Linear light and floor points (H, W) of a bare room, seen from above."""
    scene = rooms.hand_made((4.0, 4.0, 2.5), [part] if part else [], [rooms.Light(np.array(light), np.ones(3))], floor)
    view = camera(position, rooms.look(0, -35, 0))
    linear, depth, _ = tracer.trace([(scene, view)], SIZE, torch.device("cpu"), shading)
    points = view.position + depth[0, 0].double().numpy()[..., None] * pixel_rays(view.axes, SIZE)
    return linear[0, 1].double().numpy(), points


def test_light_falls_with_the_squared_distance_and_the_cosine():
    linear, points = floor_picture()
    floor = points[..., 2] < 1e-3
    to = np.array((1.0, 1.5, 2.0)) - points[floor]
    square = (to**2).sum(-1)
    expected = to[:, 2] / np.sqrt(square) / square
    slope, constant = np.polyfit(expected, linear[floor], 1)
    residual = linear[floor] - slope * expected - constant
    assert slope == pytest.approx(0.5, rel=0.15)  # reflectance 0.5, light of power 1
    assert residual.std() < 0.03 * np.ptp(linear[floor])


def test_a_part_shades_the_points_whose_way_to_the_light_it_blocks_and_no_others():
    light, centre, half = np.array((1.0, 1.5, 2.0)), np.array((1.6, 2.0, 0.9)), np.array((0.3, 0.2, 0.15))
    lit, points = floor_picture()
    shaded, shaded_points = floor_picture(rooms.part("box", centre, 2 * half, GREY))
    floor = (points[..., 2] < 1e-3) & (np.abs(points - shaded_points).max(-1) < 1e-3)
    steps = np.linspace(0, 1, 400)[:, None, None]
    way = light + steps * (points[floor] - light)
    blocked = (np.abs(way - centre) < half).all(-1).any(0)
    dark = shaded[floor] < 0.9 * lit[floor]
    assert blocked.sum() > 50
    assert np.mean(dark != blocked) < 0.03  # penumbra pixels at the shadow's outline


def test_lights_stay_where_they_are_when_the_camera_moves():
    one, points = floor_picture(position=(2.0, 0.6, 1.5))
    two, others = floor_picture(position=(2.4, 0.9, 1.2))
    matched = 0
    for row, col in zip(*np.nonzero(points[..., 2] < 1e-3), strict=True):
        gaps = np.linalg.norm(others - points[row, col], axis=-1)
        if gaps.min() < 0.01:
            matched += 1
            assert two.ravel()[gaps.argmin()] == pytest.approx(one[row, col], rel=0.05)
    assert matched > 20


def test_flat_shading_leaves_reflectance_alone_and_constant_albedo_leaves_light_alone():
    tiles = rooms.Material("checker", (0.8, 0.8, 0.1), (0.1, 0.1, 0.8), 2.0)
    box = rooms.part("box", (1.6, 2.0, 0.5), (0.5, 0.5, 1.0), GREY)
    flat, _ = floor_picture(box, shading="flat")
    assert np.ptp(flat) < 1e-6  # grey everywhere: no shading, no shadow
    plain, _ = floor_picture(box, shading="constant_albedo")
    tiled, _ = floor_picture(box, shading="constant_albedo", floor=tiles)
    np.testing.assert_array_equal(plain, tiled)
    assert plain.std() > 0.05 * plain.mean()
    assert floor_picture(shading="flat", floor=tiles)[0].std() > 0.05


def test_edges_in_the_picture_are_averaged_over_samples():
    board = rooms.part("box", (2.0, 2.0, 1.2), (1.0, 0.02, 0.8), rooms.Material(first=(0.9,) * 3, second=(0.9,) * 3))
    scene = rooms.hand_made((4.0, 3.0, 2.5), [board], wall=rooms.Material(first=(0.1,) * 3, second=(0.1,) * 3))
    view = camera((2.0, 0.5, 1.25), rooms.look(0, 0, 7))
    linear, _, _ = tracer.trace([(scene, view)], SIZE, torch.device("cpu"), "flat")
    assert set(linear[0, 0].double().numpy().round(3).ravel()) == {0.1, 0.3, 0.5, 0.7, 0.9}


def test_grey_has_three_equal_channels_of_the_same_luma(some):
    rgb = some["rgb"][:4]
    grey = rooms.intervene(rgb, "grey")
    luma = np.einsum("bchw,c->bhw", rgb.numpy().astype(float), [0.299, 0.587, 0.114])
    assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 0], grey[:, 2])
    assert np.abs(grey[:, 0].numpy() - luma).max() <= 0.51


def test_shuffled_patches_are_the_same_patches_in_another_order(some):
    rgb = some["rgb"][:4]
    mixed = rooms.intervene(rgb, "shuffled_patches", torch.Generator().manual_seed(1))
    again = rooms.intervene(rgb, "shuffled_patches", torch.Generator().manual_seed(1))
    other = rooms.intervene(rgb, "shuffled_patches", torch.Generator().manual_seed(2))
    assert torch.equal(mixed, again) and not torch.equal(mixed, other) and not torch.equal(mixed, rgb)

    def patches(x):
        return sorted(x[:, :, r : r + 16, c : c + 16].numpy().tobytes() for r in (0, 16) for c in (0, 16, 32))

    assert patches(mixed) == patches(rgb)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rooms.scene_seeds("training"), "unknown split 'training'"),
        (lambda: rooms.frames("train", scenes=250), "1 to 249"),
        (lambda: rooms.frames("train", scenes=0), "1 to 249"),
        (lambda: rooms.frames("train", views=0), "at least 1"),
        (lambda: rooms.render([]), "no frames"),
        (lambda: rooms.render([(-1, 0)]), ">= 0"),
        (lambda: rooms.render([(1000, 0)], (16, 64)), "at least 32 x 32"),
        (lambda: rooms.render([(1000, 0)], SIZE, shading="phong"), "unknown shading 'phong'"),
        (lambda: rooms.render([(1000, 0)], SIZE, device="abacus"), "abacus"),
        (lambda: rooms.stream([(1000, 0)], SIZE, shading="phong", workers=2), "unknown shading 'phong'"),
        (lambda: rooms.intervene(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "blur"), "unknown intervention"),
    ],
)
def test_bad_input_gets_one_clear_line(call, words):
    with pytest.raises(UserError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def test_parts_have_positive_finite_sizes_and_orthogonal_axes():
    for seed in rooms.scene_seeds("train")[:40]:
        for item in rooms.make_scene(seed).parts:
            assert np.isfinite(item.centre).all() and np.isfinite(item.half).all() and (item.half > 0).all()
            np.testing.assert_allclose(item.axes.T @ item.axes, np.eye(3), atol=1e-9)

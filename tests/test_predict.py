"""Depth from one's own picture: what is written, in which units, and what happens without weights."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from d3lib import predict
from d3lib.artefacts import load_weights, save_weights, write_json
from d3lib.errors import UserError
from d3lib.evaluation import as_predictor, load_network
from d3lib.models import D3Net
from d3lib.predict import DEMONSTRATION, choose_weights, parse_intrinsics, point_cloud, predict_depth, predict_picture
from d3lib.records import RECORD, RECORD_VERSION, committed_records


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "smoke" / "some-run" / "weights.safetensors"
    made = {"encoder": "tiny", "max_depth": "10.0", "height": "64", "width": "96", "trained_on": "noise", "key": "k"}
    save_weights(path, D3Net("tiny", seed=0).state_dict(), made)
    return path


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    pixels = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def read_ply(path):
    head, body = path.read_bytes().split(b"end_header\n", 1)
    assert head.startswith(b"ply\nformat binary_little_endian 1.0\n")
    row = np.dtype([("p", "<f4", 3), ("c", "u1", 3)])
    points = np.frombuffer(body, row)
    assert f"element vertex {len(points)}\n".encode() in head
    return points


def test_a_picture_becomes_a_coloured_map_millimetres_and_points(photo, weights, tmp_path):
    paths = predict_picture(photo, weights, tmp_path / "to", (100, 80, 60, 45))
    coloured, millimetres, cloud = paths
    assert Image.open(coloured).size[0] > 500
    depth_mm = np.asarray(Image.open(millimetres))
    assert depth_mm.dtype == np.uint16 and depth_mm.shape == (90, 120)
    rgb = np.asarray(Image.open(photo))
    depth, _ = predict_depth(rgb.transpose(2, 0, 1), weights)
    assert np.abs(depth_mm / 1000 - depth).max() <= 0.00051
    points = read_ply(cloud)
    assert len(points) == 90 * 120
    # the pixel at column 10, row 20, by hand
    x, y, z = points["p"][20 * 120 + 10]
    assert z == depth[20, 10]
    assert (x, y) == pytest.approx(((10 - 60) * z / 100, (20 - 45) * z / 80), rel=1e-5)
    assert tuple(points["c"][20 * 120 + 10]) == tuple(rgb[20, 10])


def test_without_intrinsics_there_is_no_point_cloud(photo, weights):
    assert [path.name for path in predict_picture(photo, weights)] == ["photo_depth.png", "photo_depth_mm.png"]


def test_wide_pictures_give_thinned_clouds():
    rgb = np.zeros((3, 10, 1300), np.uint8)
    points, colours = point_cloud(rgb, np.ones((10, 1300), np.float32), (1, 1, 0, 0))
    assert len(points) == len(colours) == 4 * 434


def test_the_last_long_run_predicts_else_the_books_small_network_else_whatever_there_is(weights, tmp_path):
    runs, absent, book = tmp_path / "runs", tmp_path / "absent", tmp_path / "book.safetensors"
    assert choose_weights(weights.parents[2], absent) == weights  # made without a record: the only one
    with pytest.raises(UserError, match="make batch"):
        choose_weights(runs, absent)
    book.touch()
    assert choose_weights(weights.parents[2], book) == choose_weights(runs, book) == book
    made = {}
    for age, (budget, steps) in enumerate([("study", 12000), ("laptop", 2000), ("laptop", 3), ("smoke", 96)]):
        made[budget, steps] = runs / budget / str(steps) / "weights.safetensors"
        content = {"run": {"budget": budget, "steps": steps}}
        write_json(made[budget, steps].with_name("record.json"), content, format=RECORD, version=RECORD_VERSION)
        made[budget, steps].touch()
        os.utime(made[budget, steps], (age, age))
    assert choose_weights(runs, book) == made["laptop", 2000]  # later ones were too short


def test_the_books_network_is_small_and_says_what_it_is():
    net, made = load_network(DEMONSTRATION)
    assert DEMONSTRATION.stat().st_size < 5e6 and "rooms" in made["trained_on"]
    card = DEMONSTRATION.with_name("model_card.md").read_text(encoding="utf-8")
    record = next(record for record in committed_records() if record["key"] == made["key"])
    assert made["key"] in card and record["weights_digest"][:16] in card
    rgb = torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    depth = as_predictor(net)(rgb)
    assert depth.shape == (1, 1, 96, 128) and 0 < depth.min() and depth.max() < 10


@pytest.mark.parametrize("text", ["1,2,3", "a,b,c,d", "0,1,2,3", "1,0,2,3", "1,1,nan,2", ""])
def test_wrong_intrinsics_are_refused(text):
    with pytest.raises(UserError, match="intrinsics"):
        parse_intrinsics(text)


def test_a_sliver_of_a_picture_is_refused_rather_than_blown_up(weights, tmp_path):
    path = tmp_path / "sliver.png"
    Image.fromarray(np.zeros((1, 3000, 3), np.uint8)).save(path)
    with pytest.raises(UserError, match="too narrow"):
        predict_picture(path, weights)
    with pytest.raises(UserError, match="too narrow"):
        predict_depth(np.zeros((3, 20, 161), np.uint8), weights)
    depth, _ = predict_depth(np.zeros((3, 160, 20), np.uint8), weights)  # eight times as high as wide is the last
    assert depth.shape == (160, 20)


def test_a_picture_is_seen_at_the_height_of_training_in_its_own_aspect(weights):
    rgb = np.random.default_rng(1).integers(0, 256, (3, 64, 112), dtype=np.uint8)  # nothing to resize
    net, _ = load_network(weights)
    expected = as_predictor(net)(torch.from_numpy(rgb)[None] / 255)[0, 0].numpy()
    np.testing.assert_allclose(predict_depth(rgb, weights)[0], expected, rtol=1e-5)


def test_depth_beyond_sixteen_bits_of_millimetres_is_the_largest_number(photo, weights, monkeypatch):
    far = np.full((90, 120), 70.0, np.float32), {"trained_on": "noise", "key": "k"}
    monkeypatch.setattr(predict, "predict_depth", lambda *_: far)
    assert (np.asarray(Image.open(predict_picture(photo, weights)[1])) == 65535).all()


def test_a_picture_that_is_none_is_refused(weights, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"nothing like a picture")
    with pytest.raises(UserError, match="bad.jpg"):
        predict_picture(bad, weights)
    with pytest.raises(UserError, match="missing.jpg"):
        predict_picture(tmp_path / "missing.jpg", weights)


def test_weights_that_do_not_fit_or_are_damaged_are_refused(photo, weights, tmp_path):
    tensors, made = load_weights(weights)
    other = tmp_path / "other.safetensors"
    save_weights(other, tensors, {**made, "encoder": "resnet50"})
    with pytest.raises(UserError, match="do not fit"):
        predict_picture(photo, other)
    damaged = tmp_path / "damaged.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        predict_picture(photo, damaged)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="safetensors"):
        predict_picture(photo, cut)

"""Folders of one's own pictures: what pairs with what, what is read, and what each kind of bad input says."""

import io
import logging
import os
import re
import struct
import time
import zipfile
import zlib
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from d3lib.data.folder import FolderRGBD, pair_by_time, read_depth, read_rgb, time_of, write_folds
from d3lib.data.prepare import FolderStore
from d3lib.errors import UserError

H, W = 12, 18
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (H, W, 3), dtype=np.uint8)
DEPTH = RNG.uniform(0.5, 9, (H, W)).astype(np.float32)
MM = np.rint(DEPTH * 1000).astype(np.uint16)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".npy":
        with path.open("wb") as file:
            np.save(file, array)
    else:
        kind = {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF", "tiff": "TIFF"}.get(path.suffix.lower()[1:], "PNG")
        Image.fromarray(array).save(path, format=kind)


def folder(root, rgb, depth, split="train"):
    """Make `rgb` and `depth` (file names, or name → array)."""
    for kind, names, default in (("rgb", rgb, RGB), ("depth", depth, MM)):
        (root / kind / split).mkdir(parents=True)
        for name in names:
            save(root / kind / split / name, names[name] if isinstance(names, dict) else default)
    return root


def pairs(dataset):
    return [(rgb.name, depth.name) for rgb, depth in dataset.pairs]


def refused(call, *parts):
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


# --- pairing ---


def test_equal_names_pair_whatever_their_endings_and_numbers_sort_as_numbers(tmp_path):
    rgb = ["img10.JPG", "img2.jpeg", "img1.PNG", "IMG3.png"]
    depth = {"img1.png": MM, "img2.NPY": DEPTH, "img10.TIF": DEPTH, "IMG3.tiff": MM}
    dataset = FolderRGBD(folder(tmp_path, rgb, depth), "train")
    assert pairs(dataset) == [("IMG3.png", "IMG3.tiff"), ("img1.PNG", "img1.png"), ("img2.jpeg", "img2.NPY"),
                              ("img10.JPG", "img10.TIF")]  # fmt: skip
    assert dataset.names == ["IMG3", "img1", "img2", "img10"]
    assert (dataset.paired_by, dataset.strays) == ("name", {})
    for index in range(4):
        assert np.allclose(dataset[index]["depth"][0], DEPTH, atol=0.0005001)


def test_strays_and_duplicates_are_reported_in_one_log_line_and_never_paired(tmp_path, caplog):
    root = folder(tmp_path, ["a.png", "b.png", "b.jpg", "c.png"], ["a.png", "b.png", "d.png", "d.npy"])
    (root / "rgb" / "train" / "notes.txt").write_text("hello")
    (root / "rgb" / "train" / ".DS_Store").write_text("")
    (root / "rgb" / "train" / "folder.png").mkdir()
    os.mkfifo(root / "rgb" / "train" / "pipe.png")
    with caplog.at_level(logging.INFO):
        dataset = FolderRGBD(root, "train")
    assert pairs(dataset) == [("a.png", "a.png")]
    strays = {path.removeprefix(f"{root}/"): why for path, why in dataset.strays.items()}
    assert strays.keys() == {"rgb/train/b.png", "rgb/train/b.jpg", "rgb/train/c.png", "rgb/train/notes.txt",
                             "rgb/train/folder.png", "rgb/train/pipe.png",
                             "depth/train/b.png", "depth/train/d.png", "depth/train/d.npy"}  # fmt: skip
    assert "2 files have this name" in strays["rgb/train/b.jpg"] and "no depth picture" in strays["rgb/train/c.png"]
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING
    assert "1 pairs by name, 9 strays" in caplog.text and dataset.report in caplog.text


def test_names_that_are_times_pair_by_nearest_time_once_and_within_the_tolerance(tmp_path):
    rgb = ["2018-04-26T17:16:27.000000.JPG", "2018-04-26T17:16:27.400000.JPG", "2018-04-26T17:20:00.000000.JPG",
           "2018-04-26T17:00:00.900000.JPG", "cover.jpg"]  # fmt: skip
    depth = ["2018-04-26T17:16:27.300000.png", "2018-04-26T17:20:01.100000.png", "2018-04-26T17:00:00.100000.png"]
    root = folder(tmp_path, rgb, depth)
    dataset = FolderRGBD(root, "train")
    assert pairs(dataset) == [(rgb[3], depth[2]), (rgb[1], depth[0])]  # in order of time
    assert dataset.paired_by == "time" and len(dataset.strays) == 4
    assert "within 1 s" in dataset.strays[str(root / "rgb" / "train" / rgb[0])]
    assert "no depth picture" in dataset.strays[str(root / "rgb" / "train" / "cover.jpg")]
    assert "at most 0.800 s apart" in dataset.report
    assert len(FolderRGBD(root, "train", tolerance=0.5)) == 1
    assert len(FolderRGBD(root, "train", tolerance=2)) == 3
    refused(lambda: FolderRGBD(root, "train", tolerance=0.01), "0 pairs by time", "8 strays", "within 0.01 s")


def brute_force(rgb, depth, tolerance):
    """Every (rgb, depth) such that no other depth is nearer to the rgb, nor another rgb to the depth."""
    found = set()
    for a, ta in rgb.items():
        for b, tb in depth.items():
            apart = abs(ta - tb)
            alone = all(abs(ta - other) > apart for name, other in depth.items() if name != b)
            alone = alone and all(abs(other - tb) > apart for name, other in rgb.items() if name != a)
            if alone and apart <= tolerance:
                found.add((a, b))
    return found


@settings(max_examples=200, deadline=None)
@given(*[st.lists(st.integers(0, 3000), min_size=1, max_size=25, unique=True)] * 2, st.integers(0, 1500))
def test_pairing_by_time_equals_brute_force_and_uses_nothing_twice(left, right, tolerance):
    # irrational offsets keep any two distances from being equal
    rgb = {f"r{n}": n + (n * 2**0.5) % 1 / 7 for n in left}
    depth = {f"d{n}": n + (n * 3**0.5) % 1 / 7 + 0.037 for n in right}
    partners, apart = pair_by_time(rgb, depth, tolerance)
    assert set(partners.items()) == brute_force(rgb, depth, tolerance)
    assert len(set(partners.values())) == len(partners)
    for a, b in partners.items():
        assert apart[a] == abs(rgb[a] - depth[b]) <= tolerance
        assert apart[a] == min(abs(rgb[a] - t) for t in depth.values()) == min(abs(t - depth[b]) for t in rgb.values())


def test_the_tolerance_itself_is_within_it_and_half_of_the_names_are_not_most(tmp_path):
    assert pair_by_time({"a": 1.0}, {"b": 1.5}, 0.5) == ({"a": "b"}, {"a": 0.5})
    half = ["1305031102.175304.png", "cover.png"]
    assert FolderRGBD(folder(tmp_path, half, half), "train").paired_by == "name"


def test_a_time_is_utc_wherever_the_machine_stands(monkeypatch):
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        assert time_of("1970-01-02T00:00:00") == 86400
    finally:
        monkeypatch.undo()
        time.tzset()


def test_ten_thousand_frames_a_side_pair_in_seconds():
    rng = np.random.default_rng(0)
    start = 1.5e9 + np.arange(10_000) / 30
    rgb = {f"{t:.6f}": float(t) for t in start}
    depth = {f"d{t:.6f}": float(t) for t in start + rng.uniform(-0.01, 0.01, len(start))}
    partners, apart = pair_by_time(rgb, depth, 1.0)
    assert len(partners) == 10_000 and max(apart.values()) <= 0.01


@settings(max_examples=100, deadline=None)
@given(st.datetimes(datetime(1980, 1, 1), datetime(2100, 1, 1)))
def test_times_are_read_as_python_reads_them(moment):
    expected = (moment.replace(tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(seconds=1)
    text = moment.isoformat(timespec="microseconds")
    for stem in (text, text.replace(":", "-"), text.replace("T", " "), moment.strftime("%Y%m%dT%H%M%S.%f"), text + "Z"):
        assert time_of(stem) == pytest.approx(expected, abs=1e-5)


def test_kinect_and_plain_seconds_are_times_and_ordinary_names_are_not():
    assert time_of("d-1315166703.129542-2466101449") == time_of("1315166703.129542") == 1315166703.129542
    assert time_of("r-1294886360.208451-2996770081") == 1294886360.208451
    for stem in ("0001", "img_20", "2018-04-26", "2018-13-26T17:16:27", "2018-04-26T25:00:00", "1315166703", "x" * 99):
        assert time_of(stem) is None


# --- reading ---


@pytest.mark.parametrize(
    ("name", "array", "scale"),
    [
        ("d.png", MM, 1000.0),
        ("d.png", (MM.astype(np.float64) * 5).astype(np.uint16), 5000.0),
        ("d.TIF", MM, 1000.0),
        ("d.tiff", MM.astype(np.int32), 1000.0),
        ("d.npy", MM, 1000.0),
        ("d.npy", MM.astype(np.int64), 1000.0),
        ("d.npy", MM.astype(">u2"), 1000.0),
        ("d.npy", DEPTH, 1000.0),
        ("d.npy", np.asfortranarray(DEPTH.astype(np.float64)), 1000.0),
        ("d.tif", DEPTH, 7.0),  # the scale is for whole numbers alone
    ],
)
def test_every_kind_of_depth_file_gives_the_same_metres(tmp_path, name, array, scale):
    save(tmp_path / name, array)
    depth = read_depth(tmp_path / name, scale)
    assert depth.dtype == np.float32 and depth.shape == (H, W)
    assert np.abs(depth - MM / 1000).max() <= 0.00051


def test_zero_nan_infinite_and_far_pixels_are_invalid(tmp_path):
    depth = DEPTH.copy()
    depth[0, :5] = [0, np.nan, np.inf, -np.inf, 200.0]
    depth[1, 0] = 9.5
    root = folder(tmp_path, ["a.png"], {"a.npy": depth})
    sample = FolderRGBD(root, "train")[0]
    assert (~sample["valid"][0]).nonzero().tolist() == [[0, c] for c in range(5)]
    assert (sample["depth"][~sample["valid"]] == 0).all() and np.isfinite(sample["depth"].numpy()).all()
    assert np.array_equal(sample["depth"][0][2:], depth[2:])
    assert not FolderRGBD(root, "train", max_depth=9.4)[0]["valid"][0, 1, 0]
    assert FolderRGBD(root, "train", max_depth=9.5)[0]["valid"][0, 1, 0]


def test_a_sample_is_what_every_source_gives_at_any_size(tmp_path):
    root = folder(tmp_path, {"a.png": RGB}, {"a.png": MM})
    sample = FolderRGBD(root, "train")[0]
    assert np.array_equal(sample["rgb"], RGB.transpose(2, 0, 1)) and str(sample["rgb"].dtype) == "torch.uint8"
    assert np.array_equal(sample["depth"][0], (MM / 1000).astype(np.float32)) and sample["valid"].all()
    small = FolderRGBD(root, "train", size=(5, 7))[0]
    assert {key: (str(x.dtype), tuple(x.shape)) for key, x in small.items()} == {
        "rgb": ("torch.uint8", (3, 5, 7)), "depth": ("torch.float32", (1, 5, 7)), "valid": ("torch.bool", (1, 5, 7)),
    }  # fmt: skip
    assert set(small["depth"].flatten().tolist()) <= set(sample["depth"].flatten().tolist())


def test_colour_of_another_size_but_the_same_aspect_is_brought_to_the_depth(tmp_path):
    big = np.asarray(Image.fromarray(RGB).resize((2 * W, 2 * H)))
    sample = FolderRGBD(folder(tmp_path, {"a.png": big}, {"a.png": MM}), "train")[0]
    assert sample["rgb"].shape[1:] == sample["depth"].shape[1:] == (H, W)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_pictures_of_any_8_bit_mode_become_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image = Image.fromarray(RGB).convert(mode)
    image.save(path)
    with Image.open(path) as saved:
        assert np.array_equal(read_rgb(path), np.asarray(saved.convert("RGB")).transpose(2, 0, 1))


def test_a_photograph_lying_on_its_side_is_turned_upright(tmp_path):
    image = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    exif = image.getexif()
    exif[274] = 6  # turn by 90 degrees to see it
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_rgb(tmp_path / "a.jpg").shape == (3, 30, 20)


def test_a_store_holds_the_same_samples(tmp_path):
    root = folder(tmp_path / "in", ["a.png", "b.png"], ["a.png", "b.png"])
    dataset = FolderRGBD(root, "train", size=(6, 9))
    store = FolderStore(tmp_path / "data", root, "train", 6, 9, dataset.max_depth).open()
    assert store.names == ["a", "b"] and store.source == dataset.source and store.source["strays"] == 0
    for kept, sample in zip(store, dataset, strict=True):
        assert kept.keys() == sample.keys() and all((kept[key] == sample[key]).all() for key in kept)


def test_pairs_are_in_order_of_time(tmp_path):
    names = [f"2020-01-01T00:0{minute}:00.0" for minute in (3, 0, 4, 1, 2)]
    root = folder(tmp_path, [f"{name}.png" for name in names], [f"{name}5.png" for name in names])
    assert [name[14:16] for name in FolderRGBD(root, "train").names] == ["00", "01", "02", "03", "04"]


def test_a_changed_picture_changes_the_source(tmp_path):
    root = folder(tmp_path, ["a.png"], ["a.png"])
    before = FolderRGBD(root, "train").source
    path = next((root / "rgb" / "train").iterdir())
    assert FolderRGBD(root, "train").source == before
    os.utime(path, ns=(1, 1))
    assert FolderRGBD(root, "train").source != before


# --- bad input ---


def test_missing_and_empty_folders_say_what_is_expected(tmp_path):
    refused(lambda: FolderRGBD(tmp_path / "no", "train"), "no such folder", "rgb/train/")
    root = folder(tmp_path / "r", ["a.png"], ["a.png"])
    refused(lambda: FolderRGBD(root, "test"), "rgb/test", "rgb/ has train")
    folder(tmp_path / "empty", [], [])
    refused(lambda: FolderRGBD(tmp_path / "empty", "train"), "empty/rgb/train: no pictures", ".jpg")
    folder(tmp_path / "no_depth", ["a.png"], [])
    refused(lambda: FolderRGBD(tmp_path / "no_depth", "train"), "no_depth/depth/train: no pictures", ".npy")
    folder(tmp_path / "other", ["a.png"], ["b.png"])
    refused(lambda: FolderRGBD(tmp_path / "other", "train"), "0 pairs by name", "a.png: no depth picture")
    for bad in ({"depth_scale": 0}, {"max_depth": -1}, {"tolerance": float("nan")}):
        refused(lambda bad=bad: FolderRGBD(root, "train", **bad), "must be positive")


BAD_DEPTH = {
    "8-bit": ("a.png", (MM // 256).astype(np.uint8), "8-bit PNG has 256 levels"),
    "8-bit array": ("a.npy", (MM // 256).astype(np.uint8), "8-bit"),
    "colour": ("a.png", RGB, "is it a colour picture?"),
    "truth values": ("a.npy", MM > 5, "bool"),
    "complex": ("a.npy", MM.astype(complex), "complex"),
    "text": ("a.npy", np.full((H, W), "far"), "<U3"),
    "no pixels": ("a.npy", np.zeros((0, W), np.float32), "(0, 18)"),
    "three dimensions": ("a.npy", np.zeros((2, H, W), np.float32), "(2, 12, 18)"),
    "millimetres as float": ("a.npy", MM.astype(np.float32), "1/1000 m would make it"),
    "metres as whole numbers": ("a.npy", DEPTH.astype(np.uint16) + 1, "wrong scale"),
    "negative": ("a.npy", -DEPTH, "negative depth"),
    "negative whole numbers": ("a.npy", -MM.astype(np.int32), "negative depth"),
    "all zero": ("a.png", MM * 0, "no valid depth"),
    "all NaN": ("a.npy", DEPTH * np.nan, "no valid depth"),
    "all too far": ("a.npy", DEPTH + 80, "no valid depth"),
    "another aspect": ("a.png", MM.T.copy(), "has not the aspect"),
    "a column too few": ("a.png", MM[:, 1:].copy(), "has not the aspect"),
    "hundreds of metres": ("a.npy", DEPTH * 50, "wrong scale"),
    "a pickle": ("a.npy", np.array([[print, 1]], dtype=object), "not a readable .npy"),
}


@pytest.mark.parametrize("kind", BAD_DEPTH)
def test_bad_depth_is_one_line_naming_the_file(tmp_path, kind):
    name, array, part = BAD_DEPTH[kind]
    dataset = FolderRGBD(folder(tmp_path, ["a.png"], {name: array}), "train")
    refused(lambda: dataset[0], f"depth/train/{name}", part)


def test_a_wrong_scale_says_which_one_would_fit(tmp_path):
    root = folder(tmp_path, ["a.png"], {"a.png": MM})
    refused(lambda: FolderRGBD(root, "train", depth_scale=1)[0], "depth_scale=1 is", "1/1000 m would make it")
    refused(lambda: FolderRGBD(root, "train", depth_scale=1e6)[0], "depth_scale=1e+06", "1/1000 m would make it")


def _png(width, height, depth=16, data=b""):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def _npy(shape, dtype="<f4"):
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()


def _zip():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("arr_0.npy", b"x")
    return file.getvalue()


HOSTILE = {
    "empty png": ("a.png", b""),
    "text as png": ("a.png", b"hello"),
    "a bomb of pixels": ("a.png", _png(60_000, 60_000)),
    "too many pixels": ("a.png", _png(9000, 9000)),
    "no pixels behind the header": ("a.png", _png(W, H)),
    "a huge shape": ("a.npy", _npy((1 << 40, 1 << 20))),
    "a shape beyond the file": ("a.npy", _npy((4000, 4000)) + b"\0" * 100),
    "a negative shape": ("a.npy", _npy((-4, 4)) + b"\0" * 100),
    "code in the header": ("a.npy", _npy("(__import__('os').abort(),)")),
    "objects": ("a.npy", _npy((2, 2), "|O") + b"\0" * 64),
    "a zip called npy": ("a.npy", _zip()),
    "an empty npy": ("a.npy", b""),
    "a tiff of nothing": ("a.tif", b"II*\0\xff\xff\xff\x7f"),
    "a gif called png": ("a.png", b"GIF89a\x01\x00\x01\x00\x00\x00\x00;"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_depth_files_are_refused_in_one_line(tmp_path, kind):
    name, content = HOSTILE[kind]
    root = folder(tmp_path, ["a.png"], [])
    (root / "depth" / "train" / name).write_bytes(content)
    refused(lambda: FolderRGBD(root, "train")[0], name, "not a readable")


def test_unreadable_colour_is_one_line_and_so_is_depth_in_the_rgb_folder(tmp_path):
    root = folder(tmp_path, {"a.png": MM}, ["a.png"])
    refused(lambda: FolderRGBD(root, "train")[0], "rgb/train/a.png", "not 8-bit colour")
    whole = io.BytesIO()
    Image.fromarray(RGB).save(whole, format="JPEG")
    for content in (whole.getvalue()[:300], b"", b"\xff\xd8\xff"):
        (root / "rgb" / "train" / "a.png").write_bytes(content)
        refused(lambda: FolderRGBD(root, "train")[0], "rgb/train/a.png", "not a readable")


BYTES = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=8)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["a.png", "a.tif", "a.npy"]), BYTES, st.integers(0, 2000))
def test_damaged_depth_files_give_an_array_or_one_line(tmp_path_factory, name, changes, length):
    path = tmp_path_factory.mktemp("fuzz") / name
    save(path, MM)
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    path.write_bytes(content[: max(length, 1)] if length < len(content) else content)
    try:
        assert read_depth(path).ndim == 2
    except UserError as error:
        assert "\n" not in str(error)


# --- folds ---


def test_folds_cut_a_walk_at_its_pauses_and_test_every_picture_once(tmp_path):
    start = datetime(2026, 5, 4, 9, tzinfo=UTC)
    seconds = np.cumsum([0, 9, 9, 9, 60, 9, 9, 9, 9, 90, 9, 9])  # pauses after the 4th and the 9th, not at 4 and 8
    stamps = [(start + timedelta(seconds=int(t))).strftime("%Y-%m-%dT%H:%M:%S.000000") for t in seconds]
    source = folder(tmp_path / "walk", [f"{t}.jpg" for t in stamps], [f"{t}.png" for t in stamps])
    assert write_folds(source, tmp_path / "new" / "folds", 3, apart=1) == [4, 5, 3]
    tested = []
    for fold, beside in ((1, stamps[4:5]), (2, [stamps[3], stamps[9]]), (3, stamps[8:9])):
        train, test = (FolderRGBD(tmp_path / "new" / "folds" / f"fold-{fold}", split) for split in ("train", "test"))
        assert sorted(train.names + test.names + beside) == stamps  # those beside the test set are in neither
        tested += test.names
    assert tested == stamps
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folds"]  # nothing half-done is left
    assert train.pairs[0][0].resolve() == source / "rgb/train" / f"{stamps[0]}.jpg"  # a link, no copy


def test_folds_of_pictures_without_times_are_equal_parts(tmp_path):
    names = [str(number) for number in range(12)]
    source = folder(tmp_path / "mine", [f"{name}.png" for name in names], [f"{name}.png" for name in names])
    assert write_folds(source, tmp_path / "folds", 4, apart=0) == [3, 3, 3, 3]
    assert FolderRGBD(tmp_path / "folds/fold-2", "train").names == [*names[:3], *names[6:]]
    assert FolderRGBD(tmp_path / "folds/fold-2", "test").names == ["3", "4", "5"]
    refused(lambda: write_folds(source, tmp_path / "folds", 4), str(tmp_path / "folds"), "exists")
    for folds in (-1, 1, 7):
        refused(lambda folds=folds: write_folds(source, tmp_path / "other", folds), "12 pairs make 2 to 6 folds")
    for apart in (-1, 9):
        refused(lambda apart=apart: write_folds(source, tmp_path / "other", 4, apart), f"{apart} pairs apart leave")
    refused(lambda: write_folds(source, source / "rgb" / "train" / "new", 4), "among the pictures")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folds", "mine"]


def test_pictures_that_would_pair_otherwise_in_a_fold_are_refused(tmp_path):
    names = [f"img{k}" for k in range(6)] + [
        f"2026-05-04T09:00:{k:02}" for k in range(6)
    ]  # by name, but a half by time
    source = folder(tmp_path / "mine", [f"{name}.jpg" for name in names], [f"{name}.png" for name in names])
    assert FolderRGBD(source, "train").paired_by == "name"
    refused(lambda: write_folds(source, tmp_path / "folds", 3, apart=0), str(source), "by time, or none")
    assert not (tmp_path / "folds").exists()


# --- real pictures ---


@pytest.mark.realdata
def test_the_81_real_pairs_of_two_cameras_pair_as_brute_force_pairs_them(test_data):
    root = test_data / "dfd_indoor"
    dataset = FolderRGBD(root, "train", size=(96, 128))
    assert (len(dataset), dataset.paired_by, dataset.strays) == (81, "time", {})

    def seconds(kind):
        files = (root / kind / "train").iterdir()
        return {file.name: datetime.fromisoformat(re.sub(r"\.\w+$", "", file.name)).timestamp() for file in files}

    rgb, depth = seconds("rgb"), seconds("depth")
    assert not {name.rsplit(".", 1)[0] for name in rgb} & {name.rsplit(".", 1)[0] for name in depth}
    assert set(pairs(dataset)) == brute_force(rgb, depth, 1.0)
    apart = [abs(rgb[a] - depth[b]) for a, b in pairs(dataset)]
    assert max(apart) < 0.31 and [rgb[a] for a, _ in pairs(dataset)] == sorted(rgb.values())
    nearest = {b: min(rgb, key=lambda a, t=t: abs(rgb[a] - t)) for b, t in depth.items()}
    assert all(nearest[b] == a for a, b in pairs(dataset))


@pytest.mark.realdata
def test_the_real_pairs_read_as_pillow_and_numpy_read_them(test_data, tmp_path):
    dataset = FolderRGBD(test_data / "dfd_indoor", "train")
    for index in (0, 40, 80):
        sample, (rgb, depth) = dataset[index], dataset.pairs[index]
        assert np.array_equal(sample["rgb"], np.asarray(Image.open(rgb)).transpose(2, 0, 1))
        assert sample["rgb"].shape == (3, 432, 645)
        assert np.array_equal(sample["depth"][0], (np.asarray(Image.open(depth)) / 1000).astype(np.float32))
        assert sample["valid"].all() and 0.3 < sample["depth"].min() and sample["depth"].max() < 10
    store = FolderStore(tmp_path, test_data / "dfd_indoor", "train", 96, 128, max_depth=10.0).open()
    store.verify()
    assert len(store) == 81 and list(store.names) == sorted(store.names)


@pytest.mark.realdata
def test_a_real_picture_whose_partner_is_gone_is_a_stray_and_nothing_shifts(test_data, tmp_path):
    whole = FolderRGBD(test_data / "dfd_indoor", "train")
    gone = {7, 8, 30, 80}
    for index, (rgb, depth) in enumerate(whole.pairs):
        for kind, path, keep in (("rgb", rgb, index not in {7, 80}), ("depth", depth, index not in {8, 30})):
            (tmp_path / kind / "train").mkdir(parents=True, exist_ok=True)
            if keep:
                (tmp_path / kind / "train" / path.name).symlink_to(path)
    rest = FolderRGBD(tmp_path, "train")
    assert pairs(rest) == [pair for index, pair in enumerate(pairs(whole)) if index not in gone]
    assert len(rest.strays) == 4

"""NYU's labelled file: pictures are upright and unmirrored, splits the official ones, a bad file is one line."""

import hashlib
import logging
import os
import re
import subprocess
import sys
import textwrap

import h5py
import numpy as np
import pytest
import torch
from scipy.io import savemat

from d3lib.cli import main
from d3lib.data import nyu, shards
from d3lib.data.loader import resize_sample
from d3lib.errors import UserError

H, W = 480, 640
SCENES = ["kitchen_0004", "office_0003", "cafe_0001a", "bedroom_0028"]
SPLIT = {"train": np.array([1, 3]), "test": np.array([0, 2])}


def pictures(count):
    """Frames as a viewer sees them, rgb (n, H, W, 3), depth and raw depth (n, H, W): no two pixels' colours are alike.

    Red counts rows, green columns, blue mixes both with the frame; depth grows downwards and, less, to the right.
    """
    y, x = np.mgrid[:H, :W]
    frame = np.arange(count)[:, None, None]
    rgb = np.stack(np.broadcast_arrays(y % 256, x % 256, (y // 256 * 100 + x // 256 * 30 + frame) % 256), -1)
    depth = (1 + y / 100 + x / 1000 + frame / 10).astype(np.float32)
    raw = depth.copy()
    raw[:, 100:150, 200:300] = 0
    raw[:, 300:320, 500:520] = 10
    return rgb.astype(np.uint8), depth, raw


def write_labelled(path, count=4, chunks=None, change=None, scenes=SCENES):
    """A file laid out as MATLAB v7.3 does (column-major arrays, cells of references), with `count` frames."""
    rgb, depth, raw = pictures(count)
    layout = {"chunks": None} if chunks is None else {"compression": "gzip", "compression_opts": 1}
    with h5py.File(path, "w", userblock_size=512) as file:
        file.create_dataset("images", data=rgb.transpose(0, 3, 2, 1), **layout | ({"chunks": chunks} if chunks else {}))
        for key, values in (("depths", depth), ("rawDepths", raw)):
            where = (chunks[0], *chunks[2:]) if chunks else None
            file.create_dataset(key, data=values.transpose(0, 2, 1), **layout | ({"chunks": where} if where else {}))
        for key in ("scenes", "sceneTypes", "rawDepthFilenames", "rawRgbFilenames"):
            cell = file.create_dataset(key, (1, count), h5py.ref_dtype)
            for number in range(count):
                codes = np.array([[ord(c)] for c in scenes[number % len(scenes)]], np.uint16)
                cell[0, number] = file.create_dataset(f"#refs#/{key}{number}", data=codes).ref
        if change:
            change(file)
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file".ljust(512))
    return path


@pytest.fixture(scope="module", params=[None, (1, 3, W, H), (3, 1, 100, 90)], ids=["contiguous", "frames", "blocks"])
def labelled(request, tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("nyu") / "labelled.mat", chunks=request.param)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("small") / "labelled.mat", chunks=(1, 3, W, H))


def test_a_frame_comes_out_as_a_viewer_sees_it_neither_mirrored_nor_turned(labelled):
    rgb, depth, _ = pictures(4)
    with nyu.LabelledSet(labelled) as frames:
        assert len(frames) == 4
        for index in (0, 3):
            sample = frames.sample(index, crop=False)
            assert (sample["rgb"].dtype, sample["depth"].dtype) == (torch.uint8, torch.float32)
            assert np.array_equal(sample["rgb"].numpy(), rgb[index].transpose(2, 0, 1))
            assert np.array_equal(sample["depth"].numpy()[0], depth[index])
            assert sample["valid"].dtype == torch.bool and sample["valid"].shape == (1, H, W) and sample["valid"].all()


def test_the_crop_is_the_toolboxs(labelled):
    # the toolbox's rows 45:471 and columns 41:601, counted from 1
    with nyu.LabelledSet(labelled) as frames:
        sample = frames.sample(2)
    assert sample["rgb"].shape == (3, 427, 561)
    for place, (y, x) in {(0, 0): (45, 41), (426, 0): (471, 41), (0, 560): (45, 601), (426, 560): (471, 601)}.items():
        assert sample["rgb"][:2, *place].tolist() == [(y - 1) % 256, (x - 1) % 256]
        assert sample["depth"][0, *place].item() == pytest.approx(1.2 + (y - 1) / 100 + (x - 1) / 1000)


def test_a_raw_depth_of_0_or_10_metres_is_invalid(labelled):
    with nyu.LabelledSet(labelled) as frames:
        sample = frames.sample(0, "raw", crop=False)
    lost = np.zeros((H, W), bool)
    lost[100:150, 200:300] = lost[300:320, 500:520] = True
    assert np.array_equal(~sample["valid"].numpy()[0], lost)
    assert (sample["depth"].numpy()[0][lost] == 0).all()
    assert sample["depth"][0, 299, 0].item() == pytest.approx(3.99)


def test_scenes_are_read_through_the_references_and_a_missing_frame_is_an_index_error(labelled):
    with nyu.LabelledSet(labelled) as frames:
        assert frames.scenes == tuple(SCENES)
        for index in (-1, 4):
            with pytest.raises(IndexError):
                frames.sample(index)


def test_frames_come_in_the_order_asked_for_whatever_the_blocks_they_are_read_in(tmp_path):
    depth = pictures(30)[1]
    path = write_labelled(tmp_path / "long.mat", 30, chunks=(20, 1, 100, 90))
    wanted = [3, 17, 18, 29, 0, 15, 15, 16]
    with nyu.LabelledSet(path) as frames:
        found = list(frames.samples(wanted, crop=False))
        assert [int(sample["rgb"][2, 0, 0]) for sample in found] == wanted  # blue of the first pixel is the frame
        assert all(np.array_equal(s["depth"].numpy()[0], depth[i]) for s, i in zip(found, wanted, strict=True))
        with pytest.raises(IndexError):
            list(frames.samples([28, 30]))


def test_the_official_split_has_795_and_654_frames_that_share_none():
    split = nyu.official_split()
    assert {part: len(indices) for part, indices in split.items()} == {"train": 795, "test": 654}
    assert sorted(np.concatenate(list(split.values())).tolist()) == list(range(1449))
    # the first test frames as every paper on NYU knows them, counted from 1
    assert (split["test"][:6] + 1).tolist() == [1, 2, 9, 14, 15, 16]


def test_nobody_can_change_the_official_split():
    nyu.official_split()["test"][:] = 0
    assert nyu.official_split()["test"][1] == 1


@pytest.mark.realdata
def test_the_built_in_split_and_directories_are_nyus_own(test_data):
    from scipy.io import loadmat

    lists = test_data / "nyu_lists"
    assert hashlib.md5((lists / "splits.mat").read_bytes()).hexdigest() == "08e3c3aea27130ac7c01ffd739a4535f"
    content = loadmat(lists / "splits.mat")
    for part, indices in nyu.official_split().items():
        assert np.array_equal(indices + 1, content[f"{part}Ndxs"].ravel())
    assert "\n".join(nyu.training_directories()) == (lists / "train_scene_directories.txt").read_text().strip()
    nyu.check_splits(lists / "splits.mat")


def test_the_284_training_directories_are_249_scenes():
    assert len(set(nyu.training_directories())) == len(nyu.training_directories()) == 284
    assert len(nyu.training_scenes()) == 249
    assert all(re.fullmatch(r"[a-z_]+_\d+", scene) for scene in nyu.training_scenes())


@pytest.mark.parametrize(
    ("name", "scene"),
    [
        ("bedroom_0010b", "bedroom_0010"),
        ("cafe_0001a/0017", "cafe_0001"),
        ("nyu_office_0", "nyu_office_0"),
        ("study_0003/d-1294886360.236757-2998770081.pgm", "study_0003"),
        ("basement", "basement"),
    ],
)
def test_the_scene_of_a_directory_is_its_name_without_the_trailing_letter(name, scene):
    assert nyu.scene_of(name) == scene


def test_25_training_scenes_of_many_types_are_for_validation_always_the_same():
    scenes = nyu.validation_scenes()
    assert len(scenes) == 25 and scenes < nyu.training_scenes()
    types = [scene.rpartition("_")[0] for scene in sorted(scenes)]
    assert len(set(types)) >= 8 and max(types.count(kind) for kind in types) <= 8
    # changing the choice would let a network validate on what another trained on
    digest = hashlib.sha256("\n".join(sorted(scenes)).encode()).hexdigest()
    assert digest.startswith("b17e1cfcf1e4153c")


def prepare(path, root, **options):
    return nyu.prepare_labelled(path, root, **{"size": (64, 80), "split": SPLIT} | options)


def test_three_stores_hold_what_the_file_holds(small, tmp_path):
    stores = prepare(small, tmp_path, size=(427, 561))
    assert [store.path.name for store in stores] == [
        "nyu-train-427x561",
        "nyu-test-427x561",
        "nyu-test-raw-427x561",
    ]
    assert stores[0].names == ["office_0003/0002", "bedroom_0028/0004"]
    assert stores[1].names == stores[2].names == ["kitchen_0004/0001", "cafe_0001a/0003"]
    rgb, depth, raw = pictures(4)
    for store, frame, truth in ((stores[0], 3, depth), (stores[1], 2, depth), (stores[2], 2, raw)):
        sample, truth = store[1], truth[frame, 44:471, 40:601]
        assert np.array_equal(sample["rgb"].numpy(), rgb[frame, 44:471, 40:601].transpose(2, 0, 1))
        assert np.array_equal(sample["valid"].numpy()[0], (truth > 0) & (truth < 10))
        difference = np.abs(sample["depth"].numpy()[0] - truth)[sample["valid"].numpy()[0]]
        assert difference.max() <= 0.00051  # stores keep whole millimetres
    for store in stores:
        store.verify()


def test_a_store_is_stretched_to_its_size(small, tmp_path):
    store = prepare(small, tmp_path, target="raw")[0]
    with nyu.LabelledSet(small) as frames:
        expected = resize_sample(frames.sample(3, "raw"), (64, 80))
    assert store.size == (64, 80)
    assert torch.equal(store[1]["rgb"], expected["rgb"]) and torch.equal(store[1]["valid"], expected["valid"])
    assert (store[1]["depth"] - expected["depth"]).abs().max() <= 0.00051


def test_with_raw_target_training_depths_have_holes(small, tmp_path):
    stores = prepare(small, tmp_path, target="raw")
    assert [store.path.name for store in stores] == ["nyu-train-raw-64x80", "nyu-test-427x561", "nyu-test-raw-427x561"]
    assert not stores[0][0]["valid"].all() and stores[1][0]["valid"].all() and not stores[2][0]["valid"].all()


def blacken(file):
    file["images"][1] = 0


def test_a_store_is_kept_for_the_same_content_wherever_it_lies_and_made_anew_for_another(small, tmp_path, monkeypatch):
    first = prepare(small, tmp_path / "root")
    moved = tmp_path / "elsewhere.mat"
    moved.write_bytes(small.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_store", lambda *_, **__: pytest.fail("made again"))
        again = prepare(moved, tmp_path / "root")
    assert [store.digest for store in again] == [store.digest for store in first]
    other = write_labelled(tmp_path / "other.mat", change=blacken)
    assert prepare(other, tmp_path / "root")[0].digest != first[0].digest
    swapped = {"train": SPLIT["test"], "test": SPLIT["train"]}
    assert prepare(other, tmp_path / "root", split=swapped)[0].names == first[1].names


def test_a_file_that_is_not_nyus_and_strange_scenes_are_warned_of(tmp_path, caplog):
    path = write_labelled(tmp_path / "labelled.mat", scenes=["attic_0001", "office_0003", "kitchen_0003", "cafe_0001"])
    with caplog.at_level(logging.WARNING):
        prepare(path, tmp_path, split={"train": np.array([0, 1]), "test": np.array([2, 3])})
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3 and not any("\n" in line for line in said)
    assert "1 scenes of training frames are not among the 249" in said[0] and "attic_0001" in said[0]
    assert "2 scenes of test frames are training scenes" in said[1]
    assert hashlib.md5(path.read_bytes()).hexdigest() in said[2]


def test_progress_counts_the_frames_of_each_store(small, tmp_path):
    said = []
    prepare(small, tmp_path, progress=said.append)
    assert [line.split(",")[0] for line in said] == [
        "nyu-train-64x80: 2/2 frames",
        "nyu-test-427x561: 2/2 frames",
        "nyu-test-raw-427x561: 2/2 frames",
    ]


def remake(key, **options):
    """Replace a dataset."""

    def change(file):
        old = file[key]
        shape, dtype = options.pop("shape", old.shape), options.pop("dtype", old.dtype)
        del file[key]
        file.create_dataset(key, shape, dtype, **options)

    return change


def drop(key):
    def change(file):
        del file[key]

    return change


def link(key, to):
    def change(file):
        del file[key]
        file[key] = to(file)

    return change


def refer(to):
    """Point the second scene's reference elsewhere."""

    def change(file):
        file["scenes"][0, 1] = to(file)

    return change


def dangle(file):
    """A reference to an object that has been deleted, and whose place is beyond all others."""
    reference = file.create_dataset("gone", data=np.zeros((3, 1), np.uint16)).ref
    del file["gone"]
    return reference


def virtual(file):
    layout = h5py.VirtualLayout((4, W, H), np.float32)
    layout[:] = h5py.VirtualSource("/etc/hostname", "depths", (4, W, H))
    del file["depths"]
    file.create_virtual_dataset("depths", layout)


def external(file):
    del file["depths"]
    file.create_dataset("depths", (4, W, H), np.float32, external=[("/dev/zero", 0, 4 * W * H * 4)])


def text(value, dtype=np.uint16):
    return lambda file: file.create_dataset("text", data=np.array(value, dtype)).ref


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("images"), "no images"),
        (drop("rawDepths"), "no rawDepths"),
        (drop("scenes"), "no scenes"),
        (remake("images", dtype=np.uint16), "images"),
        (remake("images", shape=(4, W, H, 3)), "images"),
        (remake("depths", dtype=np.float64), "float64"),
        (remake("depths", dtype=">f4"), "depths"),
        (remake("depths", shape=(4, H, W)), "depths"),
        (remake("rawDepths", shape=(3, W, H)), "rawDepths"),
        (remake("depths", chunks=(1, W, H)), "missing frames in depths"),
        (remake("depths"), "missing frames in depths"),
        (remake("images", shape=(0, 3, W, H), maxshape=(None, 3, W, H)), "images"),
        (remake("images", shape=()), "images"),
        (remake("images", shape=(4, 3, W, H), chunks=(40, 3, W, H), maxshape=(None, 3, W, H)), "chunks of more than"),
        (link("images", lambda file: h5py.ExternalLink("/etc/passwd", "images")), "link to elsewhere"),
        (link("depths", lambda file: h5py.SoftLink("/rawDepths")), "link to elsewhere"),
        (link("depths", lambda file: file.create_group("other")), "depths"),
        (link("scenes", lambda file: np.zeros((1, 4), np.uint64)), "scenes"),
        (remake("scenes", shape=(1, 3)), "scenes"),
        (remake("scenes", dtype=h5py.regionref_dtype), "scenes"),
        (virtual, "no array in this file for depths"),
        (external, "no array in this file for depths"),
        (refer(lambda file: h5py.Reference()), "scenes of frame 2"),
        (refer(dangle), "scenes of frame 2"),
        (refer(lambda file: file.ref), "scenes of frame 2"),
        (refer(lambda file: file["images"].ref), "scenes of frame 2"),
        (refer(text([[1.5]], np.float64)), "scenes of frame 2"),
        (refer(text([[ord(c)] for c in "../../etc"])), "scenes of frame 2"),
        (refer(text([[ord(c)] for c in "two\nlines"])), "scenes of frame 2"),
        (refer(text([[65]] * 1000)), "scenes of frame 2"),
        (refer(text(65)), "scenes of frame 2"),
    ],
)
def test_a_file_that_is_no_labelled_set_is_refused_in_one_line(tmp_path, change, words):
    path = write_labelled(tmp_path / "bad.mat", change=change)
    with pytest.raises(UserError) as caught:
        nyu.LabelledSet(path)
    said = str(caught.value)
    assert str(path) in said and words in said and "--download" in said and "\n" not in said and len(said) < 600


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "truncated", "empty", "header"])
def test_what_is_no_hdf5_file_is_refused_in_one_line(tmp_path, small, kind):
    path = tmp_path / "bad.mat"
    whole = small.read_bytes()
    content = {"text": b"hello", "truncated": whole[: len(whole) // 2], "empty": b"", "header": whole[:600]}
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(content[kind])
    with pytest.raises(UserError, match=re.escape(str(path))) as caught:
        nyu.LabelledSet(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ((300, 200), np.nan, "not finite"),
        ((300, 200), np.inf, "not finite"),
        ((300, 200), -1, "negative"),
        ((), 1500, "within 10 m"),
        ((), 0, "nowhere"),
    ],
)
def test_a_frame_of_impossible_depths_is_named(tmp_path, where, value, words):
    def change(file):
        file["depths"][2, *where] = value

    with nyu.LabelledSet(write_labelled(tmp_path / "bad.mat", change=change)) as frames:
        frames.sample(1)
        with pytest.raises(UserError, match="frame 3 ") as caught:
            frames.sample(2)
    assert words in str(caught.value)


def test_a_damaged_frame_is_named_and_no_store_appears(tmp_path, small):
    path = tmp_path / "bad.mat"
    content = bytearray(small.read_bytes())
    with h5py.File(small) as file:
        chunk = file["images"].id.get_chunk_info(3)
        start = 512 + chunk.byte_offset if content[chunk.byte_offset] != 0x78 else chunk.byte_offset
    content[start : start + 2000] = bytes(2000)
    path.write_bytes(content)
    with pytest.raises(UserError, match="frame 4 ") as caught:
        prepare(path, tmp_path / "root")
    assert "\n" not in str(caught.value) and not list((tmp_path / "root").glob("nyu-*"))


def test_another_number_of_frames_than_the_official_splits_is_refused(small, tmp_path):
    with pytest.raises(UserError, match="4 frames, not the 1449"):
        nyu.prepare_labelled(small, tmp_path)


@pytest.mark.parametrize("size", [(0, 80), (64, -1), (64, 100_000)])
def test_a_size_beyond_reason_is_refused(small, tmp_path, size):
    with pytest.raises(UserError, match="size"):
        prepare(small, tmp_path, size=size)


def write_splits(path, train, test):
    savemat(path, {"trainNdxs": np.uint16([train]).T, "testNdxs": np.uint16([test]).T})
    return path


def test_a_splits_file_must_be_the_official_one(tmp_path, small):
    train, test = (nyu.official_split()[part] + 1 for part in ("train", "test"))
    nyu.check_splits(write_splits(tmp_path / "good", train, test))
    for name, pair in {
        "swapped": (test, train),
        "short": (train[1:], test),
        "moved": (train, [*test[1:], 1449]),
    }.items():
        with pytest.raises(UserError, match="not the official split"):
            nyu.check_splits(write_splits(tmp_path / name, *pair))
    savemat(tmp_path / "other", {"x": 1}, appendmat=False)
    (tmp_path / "text").write_text("hello")
    (tmp_path / "cut").write_bytes((tmp_path / "good").read_bytes()[:700])
    whole = {"trainNdxs": np.uint16([train]).T, "testNdxs": np.uint16([test]).T}
    savemat(tmp_path / "large", whole | {"more": np.zeros(10**5)}, appendmat=False)
    for name in ("other", "text", "cut", "large", "missing"):
        with pytest.raises(UserError, match=name) as caught:
            prepare(small, tmp_path / "root", splits=tmp_path / name)
        assert "\n" not in str(caught.value)


def test_the_command_names_what_is_wrong_in_one_line(tmp_path, small, capsys):
    for arguments in ((small,), (tmp_path / "no.mat",), (small, "--target", "best"), (small, "--size", "0x9"), ()):
        try:
            code = main(["data", "nyu-labeled", *map(str, arguments), "--out", str(tmp_path)])
        except SystemExit as stop:
            code = stop.code
        assert code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_command_prints_its_stores(tmp_path, small, capsys, monkeypatch):
    monkeypatch.setattr(nyu, "official_split", lambda: SPLIT)
    monkeypatch.setattr(nyu, "FRAMES", 4)
    assert main(["data", "nyu-labeled", str(small), "--size", "64x80", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].startswith(f"{tmp_path / 'data' / 'nyu-train-64x80'}: 2 frames, digest ")


def test_preparing_takes_150_mb_of_memory_at_most_however_long_the_file(tmp_path):
    # 506 MB of frames; they weigh little on the disk, being all alike
    path, count = tmp_path / "long.mat", 150
    write_labelled(path, count=1, chunks=(1, 3, W, H), scenes=["kitchen_0004"])
    rgb, depth, raw = pictures(1)
    with h5py.File(path, "r+") as file:
        reference = file["scenes"][0, 0]
        arrays = {"images": rgb.transpose(0, 3, 2, 1), "depths": depth.transpose(0, 2, 1)}
        for key, frame in (arrays | {"rawDepths": raw.transpose(0, 2, 1)}).items():
            del file[key]
            data = file.create_dataset(
                key, (count, *frame.shape[1:]), frame.dtype, compression="gzip", compression_opts=1,
                chunks=(5, *frame.shape[1:]) if frame.ndim == 3 else (10, 1, 320, H),
            )  # fmt: skip
            for start in range(0, count, 10):
                data[start : start + 10] = np.repeat(frame, 10, 0)
        del file["scenes"]
        file.create_dataset("scenes", (1, count), h5py.ref_dtype)[0] = [reference] * count
    program = textwrap.dedent("""
        import re, sys
        from pathlib import Path
        import numpy as np
        from d3lib.data.nyu import prepare_labelled

        def peak():  # of this program alone: ru_maxrss begins with the peak of the process that started it
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

        before = peak()
        split = {"train": np.arange(75), "test": np.arange(75, 150)}
        stores = prepare_labelled(sys.argv[1], Path(sys.argv[2]), (256, 320), split=split)
        print(sum(map(len, stores)), before, peak())
    """)
    done = subprocess.run(
        [sys.executable, "-c", program, path, tmp_path / "root"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    frames, before, peak = map(int, done.stdout.split())
    assert frames == 225
    # PyTorch's own libraries take 240 MB (the build for CPUs; others more)
    assert (peak - before) * 1024 < 150e6, f"{before} → {peak} kB"

"""The HDF5 store: what is written is read, equal content has equal digests, and nothing damaged or hostile gets in."""

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d3lib import artefacts
from d3lib.data import shards
from d3lib.data.shards import FORMAT, VERSION, open_store, write_store
from d3lib.errors import UserError


def frames(count, size=(6, 8), exact=False, seed=0):
    """A batch of random frames with holes."""
    rng = np.random.default_rng(seed)
    depth = rng.uniform(0.4, 10, (count, 1, *size)).astype(np.float32)
    valid = rng.random((count, 1, *size)) < 0.8
    batch = {
        "rgb": rng.integers(0, 256, (count, 3, *size), dtype=np.uint8),
        "depth": np.where(valid, depth, 0).astype(np.float32),
        "valid": valid,
    } | ({"exact": depth} if exact else {})
    return {key: torch.from_numpy(value) for key, value in batch.items()}


def cut(batch, *sizes):
    return [
        dict(zip(batch, parts, strict=True)) for parts in zip(*(v.split(sizes) for v in batch.values()), strict=True)
    ]


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "store", [frames(7, exact=True)], source={"kind": "test"}, shard_frames=3)


def forge(path, change_shard=None, change_index=None):
    """Alter a store as an attacker would: change shard 0 or the index, and make every digest and length fit again."""
    shards._open_shard.cache_clear()  # the attacker is another process
    index = json.loads((path / "store.json").read_text())["content"]
    if change_shard:
        file = path / "shard-00000.h5"
        change_shard(file)
        index["shards"][0] |= {"bytes": file.stat().st_size, "sha256": artefacts.digest_file(file)}
    if change_index:
        change_index(index)
    artefacts.write_json(path / "store.json", index, format=FORMAT, version=VERSION)


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


# --- what is written is read ---


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    shard_frames=st.integers(1, 6),
    exact=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_store_gives_back_what_was_written_however_it_is_cut(tmp_path, sizes, shape, shard_frames, exact, seed):
    path = tmp_path / "cut"
    batch = frames(sum(sizes), shape, exact, seed)
    store = write_store(path, cut(batch, *sizes), source={}, shard_frames=shard_frames)
    assert (len(store), store.size, store.has_exact) == (sum(sizes), shape, exact)
    order = np.random.default_rng(seed).integers(0, len(store), 11)
    for read in (store.__getitems__(order), open_store(path, in_memory=True).__getitems__(order.tolist())):
        assert read.keys() == batch.keys()
        assert torch.equal(read["rgb"], batch["rgb"][order]) and read["rgb"].dtype == torch.uint8
        assert torch.equal(read["valid"], batch["valid"][order]) and read["valid"].dtype == torch.bool
        for key in {"depth", "exact"} & batch.keys():
            assert read[key].dtype == torch.float32 and read[key].shape == batch[key][order].shape
            assert (read[key].double() - batch[key][order].double()).abs().max() <= 0.0005 + 1e-6
    assert (read["depth"][~read["valid"]] == 0).all()
    shutil.rmtree(path)


def test_one_sample_is_the_batch_without_its_leading_dimension(store):
    sample, batch = store[4], store.__getitems__([4])
    assert {key: tuple(value.shape) for key, value in sample.items()} == {
        "rgb": (3, 6, 8), "depth": (1, 6, 8), "exact": (1, 6, 8), "valid": (1, 6, 8),
    }  # fmt: skip
    assert all(torch.equal(sample[key], batch[key][0]) for key in batch)


def test_the_files_hold_what_the_documentation_says(store):
    batch, start = frames(7, exact=True), 0
    for number, count in enumerate((3, 3, 1)):
        with h5py.File(store.path / f"shard-{number:05d}.h5") as file:
            assert (file.attrs["format"], file.attrs["version"]) == (b"d3lib-store", 1)
            assert set(file) == {"rgb", "depth", "exact"}
            for key, dataset in file.items():
                assert dataset.fletcher32 and dataset.chunks == (1, *dataset.shape[1:]) and len(dataset) == count
                assert dataset.dtype == (np.uint8 if key == "rgb" else np.uint16)
            rows = slice(start, start + count)
            assert np.array_equal(file["rgb"][:], batch["rgb"][rows])
            millimetres = np.rint(batch["depth"][rows, 0].numpy().astype(np.float64) * 1000)
            assert np.array_equal(file["depth"][:], millimetres)
            start += count
    assert store.source == {"kind": "test"}
    assert store.names == [f"{number:06d}" for number in range(7)]


def test_depth_is_rounded_by_at_most_half_a_millimetre_over_the_whole_range(tmp_path):
    depth = torch.from_numpy(np.geomspace(0.001, 65.535, 100_000).astype(np.float32)).view(1, 1, 250, 400)
    batch = {"rgb": torch.zeros(1, 3, 250, 400, dtype=torch.uint8), "depth": depth, "valid": depth > 0}
    read = write_store(tmp_path / "range", [batch], source={})[0]
    assert read["valid"].all()
    assert (read["depth"].double() - depth[0].double()).abs().max() <= 0.0005 + 4e-6  # float32 near 65 m


def test_every_millimetre_survives_being_written_again(tmp_path):
    millimetres = np.arange(1, 65536).reshape(1, 1, 3, 21845)
    depth = torch.from_numpy((millimetres / 1000).astype(np.float32))
    batch = {"rgb": torch.zeros(1, 3, 3, 21845, dtype=torch.uint8), "depth": depth, "valid": depth > 0}
    first = write_store(tmp_path / "1", [{k: v[..., :16384] for k, v in batch.items()}], source={})
    again = write_store(tmp_path / "2", [first.__getitems__([0])], source={})
    assert first.digest == again.digest
    assert torch.equal(first[0]["depth"], depth[0, ..., :16384])


# --- digests ---


def test_the_digest_is_that_of_the_raw_frames_in_order(store):
    batch = frames(7, exact=True)
    whole = hashlib.sha256(b"d3lib-store|6x8|True|")
    for row in range(7):
        raw = batch["rgb"][row].numpy().tobytes()
        for key in ("depth", "exact"):
            raw += np.rint(batch[key][row].numpy().astype(np.float64) * 1000).astype("<u2").tobytes()
        whole.update(hashlib.sha256(raw).digest())
    assert store.digest == whole.hexdigest()


def test_equal_frames_have_equal_digests_whatever_the_files_look_like(store, tmp_path):
    batch = frames(7, exact=True)
    other = write_store(tmp_path / "other", cut(batch, 2, 5), source={"other": 1}, names=list("abcdefg"))
    assert other.digest == store.digest
    batch["rgb"][6, 2, 5, 7] ^= 1
    assert write_store(tmp_path / "third", [batch], source={}).digest != store.digest
    fewer = {key: value[:6] for key, value in frames(7, exact=True).items()}
    assert write_store(tmp_path / "fourth", [fewer], source={}).digest != store.digest


def test_verify_accepts_a_sound_store_and_finds_every_flipped_byte(store):
    store.verify()
    rng, found = np.random.default_rng(0), 0
    files = sorted(store.path.iterdir())
    for _ in range(120):
        file = files[rng.integers(len(files))]
        sound = file.read_bytes()
        damaged = bytearray(sound)
        damaged[rng.integers(len(sound))] ^= 1 << rng.integers(8)
        file.write_bytes(damaged)
        with pytest.raises(UserError) as error:
            open_store(store.path).verify()
        one_line(error, file.name)
        file.write_bytes(sound)
        found += 1
    assert found == 120
    open_store(store.path).verify()


def test_damaged_pixels_are_found_on_reading_without_verify(tmp_path):
    batch = frames(4, (32, 32))
    path = write_store(tmp_path / "s", [batch], source={}).path
    file = path / "shard-00000.h5"
    sound = file.read_bytes()
    place = sound.index(batch["rgb"][2].numpy().tobytes()[:64])
    file.write_bytes(sound[: place + 10] + bytes([sound[place + 10] ^ 4]) + sound[place + 11 :])
    store = open_store(path)
    assert torch.equal(store[1]["rgb"], batch["rgb"][1])
    with pytest.raises(UserError) as error:
        store[2]
    one_line(error, "shard-00000.h5", "frame 2")


def test_verify_finds_a_digest_that_is_not_the_frames(store):
    forge(store.path, change_index=lambda index: index.update(digest="0" * 64))
    with pytest.raises(UserError) as error:
        open_store(store.path).verify()
    one_line(error, "store.json")


# --- processes ---


def _sums(store, rows):
    return [int(store[row]["rgb"].long().sum()) for row in rows]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_an_opened_store_in_parallel(store, method):
    expected = frames(7)["rgb"].long().sum((1, 2, 3)).tolist()
    assert _sums(store, range(7)) == expected  # files are open in the parent
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(2 if method == "fork" else 1, mp_context=context) as pool:
        jobs = [pool.submit(_sums, store, list(range(7)) * 20) for _ in range(4)]
        assert all(job.result(timeout=120) == expected * 20 for job in jobs)
    assert _sums(pickle.loads(pickle.dumps(store)), range(7)) == expected


def test_a_store_made_again_at_the_same_place_is_not_confused_with_the_old_one(tmp_path):
    for seed in (1, 2):
        batch = frames(3, seed=seed)
        store = write_store(tmp_path / "s", [batch], source={"seed": seed})
        assert torch.equal(store.__getitems__(range(3))["rgb"], batch["rgb"]) and store.source == {"seed": seed}
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_store_in_memory_is_never_read_again(store):
    memory = open_store(store.path, in_memory=True)
    plain = store.__getitems__([5, 0])
    for file in store.path.glob("*.h5"):
        file.unlink()
    shards._open_shard.cache_clear()
    found = memory.__getitems__([5, 0])
    assert all(torch.equal(found[key], plain[key]) for key in plain)


def test_indices_beyond_the_store_raise_so_that_iteration_ends(store):
    assert len(list(store)) == 7
    for index in (-1, 7):
        with pytest.raises(IndexError):
            store[index]


# --- bad input when writing ---


def _bad(**changes):
    return frames(2) | changes


@pytest.mark.parametrize(
    ("batches", "part"),
    [
        ([], "no frames"),
        ([frames(2), frames(1, (5, 8))], "frame 2"),
        ([frames(2), frames(1, exact=True)], "frame 2"),
        ([_bad(rgb=torch.zeros(2, 3, 6, 8))], "uint8"),
        ([_bad(rgb=torch.zeros(2, 1, 6, 8, dtype=torch.uint8))], "frame 0"),
        ([_bad(depth=torch.full((2, 1, 6, 8), torch.nan))], "65.535"),
        ([_bad(depth=torch.full((2, 1, 6, 8), 65.6))], "65.535"),
        ([_bad(depth=torch.full((2, 1, 6, 8), 65.5358))], "65.535"),  # 65536 mm would be 0 in 16 bits
        ([_bad(depth=torch.full((2, 1, 6, 8), -1.0))], "65.535"),
        ([_bad(depth=torch.full((2, 1, 6, 8), 0.0004))], "65.535"),
    ],
)
def test_bad_frames_leave_one_line_and_no_files(tmp_path, batches, part):
    with pytest.raises(UserError) as error:
        write_store(tmp_path / "s", batches, source={})
    one_line(error, part)
    assert not list(tmp_path.iterdir())


def test_what_is_no_store_is_never_overwritten(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "photo.jpg").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(UserError) as error:
            write_store(tmp_path / name, [frames(1)], source={})
        one_line(error, name, "already exists")
    assert (tmp_path / "folder" / "photo.jpg").read_text() == "mine"


def test_a_source_that_fails_half_way_leaves_the_old_store_alone(tmp_path):
    old = write_store(tmp_path / "s", [frames(2)], source={})

    def failing():
        yield frames(3, seed=9)
        raise OSError("camera unplugged")

    with pytest.raises(OSError, match="camera unplugged"):
        write_store(tmp_path / "s", failing(), source={}, shard_frames=2)
    assert open_store(tmp_path / "s").digest == old.digest and [p.name for p in tmp_path.iterdir()] == ["s"]
    with pytest.raises(UserError, match="3 names for 2 frames"):
        write_store(tmp_path / "s", [frames(2)], source={}, names=["a", "b", "c"])
    assert open_store(tmp_path / "s").digest == old.digest


def _run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], capture_output=True, text=True
    )


@pytest.mark.parametrize("frames_that_fit", [0, 5])
def test_a_full_disk_gives_one_line_and_leaves_nothing(tmp_path, monkeypatch, frames_that_fit):
    real, reserve, frame = shutil.disk_usage(tmp_path), 1 << 25, 5 * 64 * 64 * 2
    free = iter([reserve + 1] + [reserve + frame] * frames_that_fit + [reserve - 1] * 9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=next(free)))
    with pytest.raises(UserError) as error:
        write_store(tmp_path / "s", [frames(9, (64, 64))], source={}, shard_frames=4)
    one_line(error, "the disk is full", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_writer_that_is_killed_leaves_no_store(tmp_path):
    run = _run(
        """
        import os, signal, sys, torch
        from d3lib.data.shards import write_store
        batch = {"rgb": torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "depth": torch.ones(1, 1, 8, 8)}
        batch["valid"] = batch["depth"] > 0
        def batches():
            for number in range(9):
                if number == 7:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch
        write_store(sys.argv[1], batches(), source={}, shard_frames=2)
        """,
        tmp_path / "s",
    )
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "s").exists()
    assert len(write_store(tmp_path / "s", [frames(1)], source={})) == 1


# --- bad input when reading ---


def test_missing_and_truncated_files_are_named(store, tmp_path):
    file = store.path / "shard-00001.h5"
    sound = file.read_bytes()
    for content in (sound[:-1], sound[: len(sound) // 2], b"", sound + b"x"):
        file.write_bytes(content)
        with pytest.raises(UserError) as error:
            open_store(store.path)
        one_line(error, "shard-00001.h5", "truncated or changed", "make it again")
    file.unlink()
    with pytest.raises(UserError) as error:
        open_store(store.path)
    one_line(error, "shard-00001.h5", "no such file")
    os.mkfifo(file)
    forge(store.path, change_index=lambda index: index["shards"][1].update(bytes=0))
    with pytest.raises(UserError):  # and does not wait for the pipe
        open_store(store.path)
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(UserError) as error:
            open_store(path)
        one_line(error, "not a store")


def test_a_store_that_vanishes_after_opening_gives_one_line(tmp_path):
    path = write_store(tmp_path / "s", [frames(3)], source={}).path
    store = open_store(path)
    shutil.rmtree(path)
    shards._open_shard.cache_clear()  # as in a new process
    with pytest.raises(UserError) as error:
        store[0]
    one_line(error, "shard-00000.h5")


def _replace(key, make):
    def change(file):
        with h5py.File(file, "r+") as h5:
            if key in h5:
                del h5[key]
            make(h5)

    return change


RGB, CHUNK = (3, 3, 6, 8), (1, 3, 6, 8)
CHUNKED = {"chunks": CHUNK, "fletcher32": True}


def _sparse(h5):
    h5.create_dataset("rgb", RGB, "u1", **CHUNKED)[0] = 1  # two frames never written


def _external_storage(h5):
    h5.create_dataset("rgb", RGB, "u1", external=[("/etc/passwd", 0, 432)])


def _virtual(h5):
    layout = h5py.VirtualLayout(RGB, "u1")
    layout[:] = h5py.VirtualSource("/etc/passwd", "rgb", RGB)
    h5.create_virtual_dataset("rgb", layout)


def _many_filters(h5):
    h5.create_dataset("rgb", RGB, "u1", chunks=CHUNK, fletcher32=True, shuffle=True, compression="gzip")[:] = 1


def _filled(dtype, shape=RGB, **options):
    def make(h5):
        h5.create_dataset("rgb", shape, dtype, **(CHUNKED | options))[...] = 1

    return make


def _attribute(name, value):
    return _replace("", lambda h5: h5.attrs.__setitem__(name, value))


HOSTILE_SHARDS = {
    "no dataset": _replace("rgb", lambda h5: None),
    "soft link": _replace("rgb", lambda h5: h5.__setitem__("rgb", h5py.SoftLink("/depth"))),
    "cyclic soft link": _replace("rgb", lambda h5: h5.__setitem__("rgb", h5py.SoftLink("/rgb"))),
    "external link": _replace("rgb", lambda h5: h5.__setitem__("rgb", h5py.ExternalLink("/etc/passwd", "/rgb"))),
    "group": _replace("rgb", lambda h5: h5.create_group("rgb")),
    "cyclic group": _replace("rgb", lambda h5: h5.__setitem__("rgb", h5["/"])),
    "named type": _replace("rgb", lambda h5: h5.__setitem__("rgb", np.dtype("u1"))),
    "external storage": _replace("rgb", _external_storage),
    "virtual": _replace("rgb", _virtual),
    "missing frames": _replace("rgb", _sparse),
    "other filters": _replace("rgb", _many_filters),
    "no checksum": _replace("rgb", _filled("u1", fletcher32=False)),
    "wrong type": _replace("rgb", _filled("f4")),
    "big endian": _replace("depth", lambda h5: h5.create_dataset("depth", (3, 6, 8), ">u2", chunks=(1, 6, 8))),
    "text": _replace("rgb", lambda h5: h5.create_dataset("rgb", RGB, h5py.string_dtype(), chunks=CHUNK)),
    "wrong shape": _replace("rgb", _filled("u1", (3, 3, 6, 9), chunks=(1, 3, 6, 9))),
    "scalar": _replace("rgb", lambda h5: h5.__setitem__("rgb", 1)),
    "huge shape": _replace("rgb", lambda h5: h5.create_dataset("rgb", (1 << 40, 3, 6, 8), "u1", **CHUNKED)),
    "two frames a chunk": _replace("rgb", _filled("u1", chunks=(3, 3, 6, 8))),
    "contiguous": _replace("rgb", lambda h5: h5.create_dataset("rgb", data=np.zeros(RGB, "u1"))),
    "other format": _attribute("format", np.bytes_("something")),
    "huge format": _attribute("format", np.bytes_(b"x" * 60_000)),
    "list of formats": _attribute("format", [b"d3lib-store"] * 3),
    "variable-length format": _attribute("format", "d3lib-store" * 9000),
    "other version": _attribute("version", 2),
    "no HDF5": lambda file: file.write_bytes(b"P5 640 480 255" * 99),
    "empty": lambda file: file.write_bytes(b""),
    "half an HDF5": lambda file: file.write_bytes(file.read_bytes()[:700]),
}  # fmt: skip


@pytest.mark.parametrize("attack", HOSTILE_SHARDS)
def test_hostile_shards_are_refused_on_opening(store, attack):
    forge(store.path, HOSTILE_SHARDS[attack])
    with pytest.raises(UserError) as error:
        open_store(store.path)
    one_line(error, "shard-00000.h5")


def test_a_huge_shape_declared_everywhere_allocates_nothing(store):
    def declare(index):
        index["size"] = [16384, 16384]

    def make(file):
        with h5py.File(file, "r+") as h5:
            for key in list(h5):
                shape = (3, 3, 16384, 16384) if key == "rgb" else (3, 16384, 16384)
                dtype = h5[key].dtype
                del h5[key]
                h5.create_dataset(key, shape, dtype, chunks=(1, *shape[1:]), fletcher32=True)

    forge(store.path, make, declare)
    with pytest.raises(UserError, match="missing frames"):
        open_store(store.path, in_memory=True)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


FIELDS = "size exact names shards source digest file frames sha256 bytes content name side all".split()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(FIELDS), value=JSON)
def test_a_hostile_index_is_refused_in_one_line_or_harmless(store, field, value):
    index = json.loads((store.path / "sound.json").read_text()) if (store.path / "sound.json").exists() else None
    if index is None:
        index = json.loads((store.path / "store.json").read_text())["content"]
        (store.path / "sound.json").write_text(json.dumps(index))
    if field == "all":
        index = value
    elif field in index:
        index[field] = value
    elif field == "name":
        index["names"][0] = value
    elif field == "side":
        index["size"][0] = value
    else:
        index["shards"][0][field] = value
    artefacts.write_json(store.path / "store.json", index, format=FORMAT, version=VERSION)
    try:
        opened = open_store(store.path)
    except UserError as error:
        assert "\n" not in str(error)
    else:  # the source, a name, or a digest that only `verify` looks at
        assert torch.equal(opened[0]["rgb"], frames(7)["rgb"][0])


@pytest.mark.parametrize("name", ["../shard-00000.h5", "/etc/passwd", "shard-00001.h5", "shard-00000.h5\0"])
def test_an_index_cannot_name_files_of_its_own_choice(store, name):
    forge(store.path, change_index=lambda index: index["shards"][0].update(file=name))
    with pytest.raises(UserError) as error:
        open_store(store.path)
    one_line(error, "store.json")


def test_other_versions_and_other_files_are_refused_with_advice(store):
    text = (store.path / "store.json").read_text()
    for changed, part in (
        (text.replace('"version": 1', '"version": 2'), "version 2"),
        (text.replace("d3lib-store", "d3lib-record"), "d3lib-record"),
        (text[:-20], "damaged"),
        ("", "damaged"),
        ("[]", "damaged"),
    ):
        (store.path / "store.json").write_text(changed)
        with pytest.raises(UserError) as error:
            open_store(store.path)
        one_line(error, "store.json", part)


def test_memory_stays_flat_while_many_frames_are_written(tmp_path):
    run = _run(
        """
        import resource, sys, torch
        from d3lib.data.shards import write_store
        unit = 1024 if sys.platform == "linux" else 1
        batch = {"rgb": torch.zeros(8, 3, 64, 64, dtype=torch.uint8), "depth": torch.ones(8, 1, 64, 64)}
        batch["valid"] = batch["depth"] > 0
        for count in (4, 400):  # 0.7 MB and 65 MB of frames
            write_store(f"{sys.argv[1]}/{count}", (batch for _ in range(count)), source={}, shard_frames=256)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
        """,
        tmp_path,
    )
    few, many = map(int, run.stdout.split())
    assert many - few < 20e6, run.stderr
    assert len(list((tmp_path / "400").iterdir())) == 14

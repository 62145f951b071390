"""Hostile input of every kind is refused in one line or read as what it is: no trace, no hang, no code of its own."""

import json
import pickle
import random
import resource
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_corruption import batches, train

from d3lib import cli
from d3lib.artefacts import digest_json, read_json, save_weights
from d3lib.data import kinect, raw
from d3lib.data.folder import read_depth
from d3lib.data.shards import open_store
from d3lib.errors import UserError
from d3lib.evaluation import load_network
from d3lib.experiments import Run, make_run
from d3lib.losses import build_loss
from d3lib.models import D3Net
from d3lib.notebooks import check_parameters, read_parameters
from d3lib.records import RECORD, State, read_record
from d3lib.training import fit

MEMORY = 1 << 28  # bytes; no input here is worth more


def cases(drill, check, *strategies, quick, long):
    """Run `check` on so many drawn cases; each is a trial."""

    @settings(
        max_examples=drill.times(quick, long),
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.tuples(*strategies))
    def examples(drawn):
        with drill.trial(repr(drawn)[:200], 30):
            check(*drawn)

    examples()


def refused(drill, call):
    """Call it; a `UserError` of one line is fine, and so is a result."""
    try:
        found = call()
    except UserError as error:
        assert "\n" not in str(error)
        drill.note("refused")
        return None
    drill.note("read")
    return found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
NUMBERS = st.integers(-1, 70_000) | st.sampled_from([640, 480, 65535, 255, 1 << 31, 1 << 63, 10**30])


def test_headers_of_pgm_and_ppm_files(drill):
    sound = np.zeros((480, 640), "<u2").tobytes()
    rgb = np.zeros((480, 640, 3), np.uint8).tobytes()
    sep = st.sampled_from([b" ", b"\n", b"\t", b"\r\n", b"#x\n", b"", b"\0", b"\xa0"])
    number = NUMBERS.map(lambda n: str(n).encode()) | st.binary(max_size=6)
    magic = st.sampled_from([b"P5", b"P6", b"P4", b"P2", b"p5", b"P55", b""])

    def check(magic, parts, seps, body, cut):
        data = magic + b"".join(s + p for s, p in zip(seps, parts, strict=True)) + seps[-1] + (sound, rgb, b"")[body]
        for read, shape in ((kinect.read_pgm, (480, 640)), (kinect.read_ppm, (480, 640, 3))):
            array = refused(drill, lambda read=read: read(data[: len(data) - cut]))
            assert array is None or array.shape[:2] == shape[:2]

    header = st.lists(number, min_size=3, max_size=3) | st.just([b"640", b"480", b"65535"])
    cases(drill, check, magic, header, st.lists(sep, min_size=3, max_size=3), st.integers(0, 2), st.integers(0, 9),
          quick=40, long=2500)  # fmt: skip


def png(header, chunks):
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in [(b"IHDR", header), *chunks, (b"IEND", b"")]:
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data


def tiff(tags, body):
    data = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    for tag, kind, count, value in tags:
        data += struct.pack("<HHII", tag, kind, count & 0xFFFFFFFF, value & 0xFFFFFFFF)
    return data + struct.pack("<I", 0) + body


def test_pictures_forged_field_by_field(drill, tmp_path):
    pixels = zlib.compress(b"".join(b"\0" + b"\x03\xe8" * 8 for _ in range(8)))
    bomb = zlib.compress(b"\0" * (1 << 27), 9)  # 128 MB in 130 kB
    side = st.sampled_from([8, 1, 0, 9000, 60_000, 1 << 31]) | st.integers(1, 100)
    few, zero = st.integers(0, 20), st.just((0, 0, 0))

    def check_png(width, height, depth, colour, rest, body, extra):
        header = struct.pack(">IIBBBBB", width & 0xFFFFFFFF, height & 0xFFFFFFFF, depth, colour, *rest)
        chunks = [(kind.encode(), content) for kind, content in extra] + [(b"IDAT", (pixels, bomb, b"", b"x")[body])]
        read(png(header, chunks), "a.png")

    def check_tiff(tags, body):
        named = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 16), (259, 3, 1, 1), (273, 4, 1, 140), (279, 4, 1, 128)]
        read(tiff(sorted({tag[0]: tag for tag in [*named, (262, 3, 1, 1), *tags]}.values()), body), "a.tif")

    def read(content, name):
        (tmp_path / name).write_bytes(content)
        tracemalloc.start()
        depth = refused(drill, lambda: read_depth(tmp_path / name))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * MEMORY and (depth is None or (depth.ndim == 2 and (depth >= 0).all()))

    kinds = st.tuples(
        st.sampled_from(["tEXt", "zTXt", "iTXt", "eXIf", "iCCP", "PLTE", "tRNS", "gAMA"]), st.binary(max_size=40)
    )
    depths = st.sampled_from([16, 8, 1]) | few
    cases(drill, check_png, side, side, depths, st.sampled_from([0, 0, 2, 3, 4, 6]), zero | st.tuples(few, few, few),
          st.integers(0, 3), st.lists(kinds, max_size=2), quick=20, long=1500)  # fmt: skip
    tag = st.tuples(st.integers(254, 340) | st.integers(0, 65535), st.integers(0, 13), NUMBERS, NUMBERS)
    cases(drill, check_tiff, st.lists(tag, max_size=4), st.binary(min_size=0, max_size=300), quick=20, long=1500)


def test_json_of_the_wrong_kinds(drill, tmp_path):
    """Artefacts whose digests fit and whose contents do not."""
    path = tmp_path / "a.json"

    def check(content, format, version, text):
        artefact = {"format": format, "version": version, "content": content}
        try:
            artefact["digest"] = digest_json(content)
        except ValueError:
            artefact["digest"] = "none"
        path.write_text(json.dumps(artefact) if text is None else text, errors="replace")
        refused(drill, lambda: read_json(path, format="f"))
        refused(drill, lambda: read_record(path))
        path.with_name("state.json").write_text(path.read_text(errors="replace"))
        State(tmp_path).read()

    formats = st.sampled_from(["f", RECORD, "d3lib-state"]) | JSON
    text = (
        st.none()
        | st.text(max_size=30)
        | st.sampled_from(["[" * 10**5, '{"a":' * 10**5, "9" * 10**5, "NaN", "\ufeff{}"])
    )
    cases(drill, check, JSON, formats, st.just(1) | JSON, text, quick=40, long=1500)


def test_parameters_of_notebooks_and_runs(drill, tmp_path):
    from types import SimpleNamespace

    source = "budget: str = 'smoke'\nsteps: int | None = None\nrate: float = 1.0\nflag = True"
    page = SimpleNamespace(cells=[SimpleNamespace(metadata={"tags": ["parameters"]}, source=source)])
    fields = list(Run.__dataclass_fields__)

    def check(parameters, text, field, value):
        refused(drill, lambda: check_parameters(page, parameters, "page.md"))
        refused(drill, lambda: read_parameters(text, [("a", text)]))
        run = refused(drill, lambda: make_run(**({"budget": "drill"} | {field: value})))
        assert run is None or getattr(run, field) == value or value is None or field == "budget"

    names = st.sampled_from(["budget", "steps", "rate", "flag", "stepps"])
    words = st.text(max_size=40) | st.sampled_from(
        ["{" * 10**5, '{"a":' * 10**5, "{}", "[1]", "/etc", "\0", "x" * 5000]
    )
    numbers = st.integers() | st.floats() | st.booleans()
    cases(drill, check, st.dictionaries(names, JSON, max_size=3), words, st.sampled_from(fields), JSON | numbers,
          quick=40, long=1500)  # fmt: skip


class Hostile:
    """Unpickled, it leaves a file behind."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (open, (self.canary, "w"))


def test_checkpoints_that_carry_code_or_other_shapes(drill, tmp_path):
    canary, path, sound = str(tmp_path / "canary"), tmp_path / "c.pt", tmp_path / "sound.pt"
    train(sound, 1)
    state = torch.load(sound, weights_only=True)
    keys = list(state)
    values = st.sampled_from(["code", "none", "huge", "nan", "tensor", "empty", "list", "negative"])

    def forged(kind):
        return {
            "code": Hostile(canary), "none": None, "huge": 10**30, "nan": float("nan"), "tensor": torch.ones(3),
            "empty": {}, "list": [1, "x", {}], "negative": -1,
        }[kind]  # fmt: skip

    def check(key, kind, deeper, wrapped):
        found = dict(state)
        if deeper and isinstance(found[key], dict) and found[key]:
            first = next(iter(found[key]))
            found[key] = dict(found[key]) | {first: forged(kind)}
        else:
            found[key] = forged(kind)
        if wrapped == "pickle":
            path.write_bytes(pickle.dumps(found["net"] if kind == "code" else Hostile(canary)))
        elif wrapped == "deflated":
            torch.save(found, path)
            members = {info.filename: zipfile.ZipFile(path).read(info) for info in zipfile.ZipFile(path).infolist()}
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, data in members.items():
                    archive.writestr(name, data)
        else:
            torch.save(found, path)
        refused(drill, lambda: train(path, 2 if key.startswith("optimiser") else 1))  # a step shows what it is worth
        assert not (tmp_path / "canary").exists()

    cases(drill, check, st.sampled_from(keys), values, st.booleans(), st.sampled_from(["", "", "pickle", "deflated"]),
          quick=5, long=60)  # fmt: skip


def test_weights_of_other_names_shapes_and_claims(drill, tmp_path):
    path, weights = tmp_path / "w.safetensors", dict(D3Net("tiny", seed=0).state_dict())
    about = {"encoder": "tiny", "max_depth": "10.0", "height": "64", "width": "96", "trained_on": "x", "key": "k"}
    names = list(weights)
    claims = st.sampled_from(
        ["", "nan", "inf", "-1", "0", "1e400", "tiny", "10", "9" * 30, "../x", "\0", "True", "64"]
    ) | st.text(max_size=9)

    def check(name, change, field, claim):
        tensors = dict(weights)
        if change == "drop":
            del tensors[name]
        elif change == "add":
            tensors["more"] = torch.ones(2)
        elif change == "shape":
            tensors[name] = torch.ones(3, 5)
        elif change == "type":
            tensors[name] = tensors[name].to(torch.int64)
        save_weights(path, tensors, about | {field: claim})
        found = refused(drill, lambda: load_network(path))
        if found is not None:  # then it does predict
            depth = found[0](torch.zeros(1, 3, 32, 48))
            assert torch.isfinite(depth).all() and int(found[1]["height"]) >= 32

    cases(drill, check, st.sampled_from(names), st.sampled_from(["", "drop", "add", "shape", "type"]),
          st.sampled_from([*about, "skips", "pooling", "output", "digest"]), claims, quick=15, long=500)  # fmt: skip

    def head(length, text, body):
        path.write_bytes(struct.pack("<Q", length if length is not None else len(text)) + text + body)
        refused(drill, lambda: load_network(path))

    tensor = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    texts = JSON.map(lambda value: json.dumps(value).encode()) | st.sampled_from(
        [json.dumps(tensor | {"a": tensor["a"] | change}).encode() for change in (
            {}, {"shape": [1 << 60]}, {"data_offsets": [0, 1 << 60]}, {"data_offsets": [8, 0]}, {"dtype": "X"},
            {"shape": [-1]}, {"data_offsets": [-8, 0]})]
    )  # fmt: skip
    lengths = st.none() | st.integers(0, (1 << 64) - 1) | st.integers(0, 99)
    cases(drill, head, lengths, texts, st.binary(max_size=20), quick=20, long=1000)


def test_raw_archives_with_bombs_and_members_that_climb(drill, tmp_path):
    depth = b"P5 640 480 65535\n" + np.full((480, 640), 800, "<u2").tobytes()
    rgb = b"P6 640 480 255\n" + bytes(480 * 640 * 3)
    bomb = b"P5 640 480 65535\n" + bytes(1 << 26)
    climbs = ("", "../", "../../", "/", "/etc/", "a/../../", "C:\\", "..\\", "./")
    archive, out = tmp_path / "in" / "a.zip", tmp_path / "in" / "out"
    archive.parent.mkdir()
    made = 0

    def check(climb, first, second, method, comment, cut):
        nonlocal made
        made += 1
        with zipfile.ZipFile(archive, "w", method, compresslevel=1) as file:
            contents = ((depth, bomb, b"", rgb)[first], (rgb, depth, bomb, b"P6")[second])
            for name, data in zip(("d-1300000000.5-1.pgm", "r-1300000000.5-1.ppm"), contents, strict=True):
                name = f"{climb}basement_0001a/{name}"
                file.writestr(zipfile.ZipInfo(name), data, compress_type=method)
            file.comment = comment
        content = archive.read_bytes()
        archive.write_bytes(content[: len(content) - cut])
        place = out / str(made)

        def whole():
            raw.make_plan([archive], place, raw.Recipe(fill=False))
            return raw.process(place, workers=1)

        tracemalloc.start()
        refused(drill, whole)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
        assert {path.name for path in archive.parent.iterdir()} <= {"a.zip", "out"}

    # stored, deflated, and what NYU's archives are not: bzip2 and LZMA
    methods = st.sampled_from([0, 8, 8, 12, 14])
    one = st.sampled_from([0, 0, 0, 1, 2, 3])
    cut = st.sampled_from([0, 0, 1, 30, 2000])
    cases(drill, check, st.sampled_from(climbs), one, one, methods, st.binary(max_size=30), cut, quick=6, long=150)


def test_any_bytes_in_the_place_of_any_file(drill, tmp_path):
    """What is no such file at all, or begins like one."""
    heads = [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"II*\0",
        b"PK\x03\x04",
        b"\x89HDF\r\n\x1a\n",
        b"\x93NUMPY\x01\x00",
        b"{",
        b"\x80\x02",
        b"\xff\xd8",
    ]
    store = tmp_path / "store"
    store.mkdir()
    readers = {
        "a.png": read_depth, "a.tif": read_depth, "a.npy": read_depth,
        "c.pt": lambda path: fit(D3Net("tiny", seed=0), build_loss("l1"), batches, steps=0, checkpoint=path),
        "w.safetensors": load_network, "a.json": lambda path: read_json(path, format="f"),
        "store/store.json": lambda path: open_store(path.parent), "a.zip": lambda path: raw.Archive(path),
        "p.json": lambda path: read_parameters(str(path), []),
    }  # fmt: skip

    def check(name, head, body):
        path = tmp_path / name
        path.write_bytes(head + body)
        if refused(drill, lambda: readers[name](path)) is not None:
            assert not name.endswith((".pt", ".safetensors"))

    cases(
        drill,
        check,
        st.sampled_from(list(readers)),
        st.sampled_from(heads),
        st.binary(max_size=200),
        quick=30,
        long=1500,
    )


def test_hostile_files_on_the_command_line_are_one_line_and_code_2_in_bounded_time_and_memory(drill, tmp_path, capsys):
    photo, pairs = tmp_path / "photo.png", tmp_path / "pairs"
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(photo)
    for kind in ("rgb", "depth"):
        (pairs / kind / "train").mkdir(parents=True)
        (pairs / kind / "train" / "a.png").write_bytes(png(struct.pack(">IIBBBBB", 9000, 9000, 16, 0, 0, 0, 0), []))
    bad = tmp_path / "bad"
    bad.write_bytes(random.Random(0).randbytes(4000))
    nested = tmp_path / "nested.json"
    nested.write_text('{"a":' * 10**5)
    page = tmp_path / "page.md"
    page.write_text("---\njupytext: {}\n---\n")
    commands = [
        ["predict", str(photo), "--weights", str(bad)],
        ["predict", str(bad), "--weights", str(bad)],
        ["evaluate", "--weights", str(bad), "--budget", "drill"],
        ["train", "--budget", "drill", "--data", f"folder:{pairs}", "--hold-out", "1"],
        ["train", "--budget", "drill", "--init", str(bad)],
        ["data", "verify", str(tmp_path)],
        ["data", "nyu-labeled", str(bad)],
        ["data", "nyu-raw", str(bad)],
        ["notebook", str(page), str(tmp_path / "o.ipynb"), "--parameters", str(nested)],
        ["notebook", str(bad), str(tmp_path / "o.ipynb")],
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for command in commands:
        with drill.trial(" ".join(command), 60):
            if command[0] != "notebook" and command[0] != "data":
                command += ["--device", "cpu"]
            if command[0] != "notebook" and command[1] != "verify":
                command += ["--out", str(tmp_path / "out")]
            code = cli.main(command)
            error = capsys.readouterr().err
            said = [line for line in error.splitlines() if "pairs by name" not in line]  # progress
            assert code == 2 and len(said) == 1 and said[0].startswith("d3lib: "), (code, error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < (2 << 30) / 1024
    with drill.trial("a wrong flag"):
        done = subprocess.run([sys.executable, "-m", "d3lib", "train", "--steps", "x"], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1

"""A full, vanished or read-only disk: one line, the old file intact, nothing half-written left behind."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_corruption import batches

from d3lib import artefacts, cli
from d3lib.artefacts import read_json, save_weights, write_json
from d3lib.data import shards
from d3lib.data.shards import open_store, write_store
from d3lib.errors import UserError
from d3lib.execution import execute, open_sources
from d3lib.experiments import make_run
from d3lib.losses import build_loss
from d3lib.models import D3Net
from d3lib.records import State, read_record
from d3lib.training import fit


@contextlib.contextmanager
def at_most(size):
    """No file may grow beyond so many bytes in this process, as on a disk that is full."""
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def listing(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checkpoint(path, steps):
    net = D3Net("tiny", seed=0)
    fit(net, build_loss("l1"), batches, steps=steps, checkpoint=path, identity="x", evaluations=1)
    return net.state_dict()


def test_a_disk_that_fills_up_leaves_the_old_file_and_no_rest(drill, tmp_path):
    """The disk fills at a random byte of a checkpoint, a record, or weights."""
    rng = np.random.default_rng(0)
    weights = D3Net("tiny", seed=0).state_dict()
    content = {"numbers": list(range(2000))}
    kinds = {
        "checkpoint.pt": lambda path: checkpoint(path, 2),
        "record.json": lambda path: write_json(path, content, format="f"),
        "w.safetensors": lambda path: save_weights(path, weights, {"key": "k"}),
    }
    for name, write in kinds.items():
        folder = tmp_path / name
        path = folder / name
        checkpoint(path, 1) if name.endswith("pt") else write(path)
        old = listing(folder)
        for _ in range(drill.times(3, 20)):
            limit = int(rng.integers(0, len(old[name]) - 1))
            with drill.trial(f"{name}: full at byte {limit}"):
                with at_most(limit), pytest.raises((UserError, OSError)) as error:
                    write(path)
                assert listing(folder) == old and name in str(error.value)
                assert "\n" not in str(error.value)
        write(path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_last_moment_leaves_the_old_file(drill, tmp_path, monkeypatch, call):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1}, format="f")
    old = listing(tmp_path)

    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error", str(path))

    with drill.trial(call):
        monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), fail)
        with pytest.raises(OSError, match="Input/output"):
            write_json(path, {"new": 2}, format="f")
        assert listing(tmp_path) == old and read_json(path, format="f") == {"old": 1}


def test_a_command_on_a_full_disk_is_one_line_and_with_room_it_ends_as_if_nothing_had_been(drill, tmp_path, capsys):
    data, run = tmp_path / "data", make_run("drill", steps=2, evaluations=2)
    sources = open_sources(run, data)
    whole = execute(run, tmp_path / "whole" / "drill", data, device="cpu")
    arguments = ["train", "--budget", "drill", "--steps", "2", "--evaluations", "2", "--device", "cpu"]
    arguments += ["--data-root", str(data)]
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "whole" / "drill" / run.key).iterdir()}
    limits = [0, 100, sizes["record.json"] - 1, sizes["predictions.npz"] - 1, 10_000, sizes["weights.safetensors"] - 1]
    for limit in limits[: drill.times(4, 6)]:
        out = tmp_path / str(limit)
        with drill.trial(f"limit {limit}"):
            capsys.readouterr()
            with at_most(limit):
                assert cli.main([*arguments, "--out", str(out)]) == 2
            said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("d3lib: ")]
            assert len(said) == 1, said
            folder = out / "drill" / run.key
            assert not list(folder.glob(".*.part*")) and not (folder / "record.json").exists()
            assert State(folder).read()[0] in ("failed", "not run", "interrupted")
            again = execute(run, out / "drill", data, device="cpu")
            assert (again["metrics"], again["weights_digest"]) == (whole["metrics"], whole["weights_digest"])
    assert sources.digest == whole["data"]["digest"]


def test_a_small_disk_takes_no_half_store(drill, tmp_path):
    """A real file system of a few megabytes, where the system lets one be mounted; the reserve keeps HDF5 from it."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=34m", "drill", str(tmp_path)], capture_output=True
    ).returncode:
        drill.tally["tried"] = drill.tally["not run"] = 1
        pytest.skip("no file system may be mounted here")
    try:
        batch = {"rgb": torch.zeros(8, 3, 64, 64, dtype=torch.uint8), "depth": torch.ones(8, 1, 64, 64)}
        batch |= {"valid": batch["depth"] > 0}
        small = write_store(tmp_path / "old", [batch], source={"kind": "old"}) and listing(tmp_path)
        with drill.trial("store"):
            with pytest.raises(UserError, match="disk is full") as error:
                write_store(tmp_path / "old", (batch for _ in range(1000)), source={"kind": "new"})
            assert "\n" not in str(error.value) and listing(tmp_path) == small
            assert open_store(tmp_path / "old").source == {"kind": "old"}
        (tmp_path / "ballast").write_bytes(b"\0" * (32 << 20))
        for name in ("a.json", "checkpoint.pt"):
            with drill.trial(name):
                with pytest.raises((UserError, OSError)), contextlib.ExitStack() as stack:
                    stack.enter_context(open(tmp_path / "more", "wb")).write(b"\0" * (1 << 25))  # the last of it
                with pytest.raises((UserError, OSError)):
                    if name == "a.json":
                        write_json(tmp_path / name, list(range(10**6)), format="f")
                    else:
                        checkpoint(tmp_path / name, 1)
                assert sorted(p.name for p in tmp_path.iterdir()) == ["ballast", "more", "old"]
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_finished_data_may_be_read_only_and_what_vanishes_is_named(drill, tmp_path, capsys):
    data, run = tmp_path / "data", make_run("drill", steps=1, evaluations=1)
    open_sources(run, data)
    whole = execute(run, tmp_path / "whole", data, device="cpu")  # and everything is imported
    with drill.trial("read-only"), tempfile.TemporaryDirectory(prefix="d3-drill-") as place:
        shared, out = Path(place) / "data", Path(place) / "out"
        shutil.copytree(data, shared)
        out.mkdir()
        for path in (*shared.rglob("*"), shared):
            path.chmod(0o444 if path.is_file() else 0o555)
        Path(place).chmod(0o755)
        out.chmod(0o777)
        if (child := os.fork()) == 0:  # root may write anywhere: as nobody in particular
            with contextlib.suppress(BaseException):
                if os.geteuid() == 0:
                    os.setgid(65534)
                    os.setuid(65534)
                with pytest.raises(OSError):
                    (shared / "x").touch()
                execute(run, out, shared, device="cpu")
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        shared.chmod(0o755)
        again = read_record(out / run.key / "record.json")
        assert (again["metrics"], again["weights_digest"]) == (whole["metrics"], whole["weights_digest"])
    arguments = ["train", "--budget", "drill", "--device", "cpu", "--out", str(tmp_path / "o")]
    with drill.trial("a file in the place of the data"):
        (tmp_path / "file").write_text("x")
        assert cli.main([*arguments, "--data-root", str(tmp_path / "file")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with drill.trial("data that vanish while they are read"):
        sources = open_sources(run, data)
        shutil.rmtree(data)
        shards._open_shard.cache_clear()
        with pytest.raises(UserError) as error:
            next(iter(sources.batches("test", run, "cpu")))
        assert "\n" not in str(error.value) and "shard-00000.h5" in str(error.value)


def test_a_lock_file_s_folder_that_cannot_be_made_is_one_line(drill, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    with drill.trial("out is a file"):
        assert cli.main(["train", "--budget", "drill", "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert artefacts.PROJECT.is_dir()

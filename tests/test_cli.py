"""The command line: what people type, and one clear line with exit code 2 for what cannot work."""

import subprocess
import sys

import h5py
import numpy as np
import pytest
from PIL import Image

from d3lib.cli import main


def run(capsys, *arguments):
    """(exit code, standard output, standard error) of a command."""
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def folder_of_pictures(root, count=4, size=(48, 64), depth=2000):
    """A tiny folder of pairs: noise, and constant depth in millimetres."""
    rng = np.random.default_rng(0)
    for kind in ("rgb", "depth"):
        (root / kind / "train").mkdir(parents=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(root / f"rgb/train/{i}.jpg")
        Image.fromarray(np.full(size, depth, np.uint16)).save(root / f"depth/train/{i}.png")
    return root


TRAIN = ("train", "--encoder", "tiny", "--hold-out", "1", "--steps", "2", "--evaluations", "1", "--height", "48")
TRAIN += ("--width", "64", "--batch-size", "2", "--device", "cpu")


def test_a_folder_trains_evaluates_and_predicts_from_the_command_line(capsys, tmp_path):
    pictures = folder_of_pictures(tmp_path / "mine")
    out = tmp_path / "runs"
    data = f"folder:{pictures}"
    code, shown, err = run(capsys, *TRAIN, "--data", data, "--out", out)
    assert code == 0, err
    assert "δ < 1.25" in shown
    weights = next(out.glob("smoke/*/weights.safetensors"))
    code, shown, _ = run(capsys, "evaluate", "--weights", weights, "--data", data, "--hold-out", "1", "--out", out)
    assert code == 0
    rows = {line.split()[0] for line in shown.splitlines()[2:]}
    assert {"weights.safetensors", "constant", "mean_map"} <= rows
    picture = pictures / "rgb/train/0.jpg"
    to = tmp_path / "p"
    code, shown, _ = run(capsys, "predict", picture, "--out", out, "--to", to, "--intrinsics", "60,60,32,24")
    assert code == 0
    assert {path.suffix for path in to.iterdir()} == {".png", ".ply"}


def test_the_same_command_again_returns_the_same_record_without_training(capsys, tmp_path):
    pictures = folder_of_pictures(tmp_path / "mine")
    command = (*TRAIN, "--data", f"folder:{pictures}", "--out", tmp_path / "runs")
    assert run(capsys, *command)[0] == 0
    record = next((tmp_path / "runs").glob("smoke/*/record.json"))
    before = record.stat().st_mtime_ns
    assert run(capsys, *command)[0] == 0
    assert record.stat().st_mtime_ns == before


def bad_inputs():
    def no_depth(root):
        folder_of_pictures(root)
        for path in (root / "depth/train").iterdir():
            path.unlink()

    def eight_bit(root):
        folder_of_pictures(root)
        for path in (root / "depth/train").iterdir():
            Image.fromarray(np.full((48, 64), 20, np.uint8)).save(path)

    def all_invalid(root):
        folder_of_pictures(root, depth=0)

    def other_size(root):
        folder_of_pictures(root)
        for path in (root / "depth/train").iterdir():
            Image.fromarray(np.full((64, 48), 2000, np.uint16)).save(path)

    def nan_depth(root):
        folder_of_pictures(root)
        for path in list((root / "depth/train").iterdir()):
            np.save(path.with_suffix(".npy"), np.full((48, 64), np.nan, np.float32))
            path.unlink()

    def wrong_scale(root):
        folder_of_pictures(root, depth=2)

    def nothing(root):
        (root / "rgb/train").mkdir(parents=True)
        (root / "depth/train").mkdir(parents=True)

    return [no_depth, eight_bit, all_invalid, other_size, nan_depth, wrong_scale, nothing, lambda root: None]


@pytest.mark.parametrize("spoil", bad_inputs(), ids=lambda spoil: spoil.__name__.strip("<>"))
def test_unfit_pictures_give_one_line_and_exit_code_2(capsys, tmp_path, spoil):
    spoil(tmp_path / "mine")
    code, _, err = run(capsys, *TRAIN, "--data", f"folder:{tmp_path / 'mine'}", "--out", tmp_path / "runs")
    lines = [line for line in err.splitlines() if line.startswith("d3lib:")]
    assert code == 2
    assert len(lines) == 1 and str(tmp_path / "mine") in lines[0], err
    assert "Traceback" not in err
    assert not list((tmp_path / "runs").glob("**/record.json"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "--loss", "l3"), "loss 'l3' is unknown"),
        (("train", "--steps", "many"), "--steps"),
        (("train", "--colour", "red"), "--colour"),
        (("train", "--learning-rate", "nan"), "learning_rate is nan"),
        (("train", "--max-depth", "inf"), "max_depth is inf"),
        (("train", "--beta1", "1.5"), "beta1 is 1.5"),
        (("train", "--seed", "99999999999999999999"), "seed is"),
        (("train", "--device", "foo"), "device 'foo'"),
        (("train", "--batch-size", "1", "--height", "32", "--width", "32"), "one image at 32x32"),
        (("notebook", "/dev/null/x.md", "out.ipynb"), "x.md"),
        (("gate", "--record", "missing/gate.json"), "missing/gate.json"),
        (("train", "--data", "nyu"), "NYU Depth V2 is not prepared"),
        (("train", "--device", "cuda:99"), "CUDA"),
        (("train", "--init", "missing.safetensors"), "missing.safetensors"),
        (("evaluate", "--weights", "missing.safetensors"), "missing.safetensors"),
        (("predict", "missing.jpg", "--weights", "missing.safetensors"), "missing.jpg"),
        (("predict", "missing.jpg"), "missing.jpg: no such file"),
        (("keep", "--budget", "drill"), "no run of budget drill is done"),
        (("reproduce", "--budget", "huge"), "budget 'huge'"),
        (("reproduce", "--only", "fig9"), "fig9"),
        (("reproduce", "--pictures", "missing"), "missing: has no fold-1"),
        (("status", "--budget", "huge"), "budget 'huge'"),
        (("data", "rooms", "--split", "attic"), "attic"),
        (("data", "rooms", "--size", "large"), "large"),
        (("data", "verify", "missing"), "missing"),
        (("data", "folds", "missing", "--to", "folds"), "missing: no such folder"),
        (("notebook", "missing.md", "out.ipynb"), "missing.md"),
        (("bench", "everything"), "everything"),
        ((), "COMMAND"),
    ],
)
def test_what_cannot_work_is_said_in_one_line_with_exit_code_2(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D3LIB_RUNS", str(tmp_path / "runs"))
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert len(err.strip().splitlines()) == 1, err
    assert words in err


def test_a_truncated_store_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("D3LIB_RUNS", str(tmp_path))
    code, shown, err = run(capsys, "data", "rooms", "--split", "val", "--scenes", "1", "--size", "32x48")
    assert code == 0, err
    store = next((tmp_path / "data").iterdir())
    shard = next(store.glob("*.h5"))
    shard.write_bytes(shard.read_bytes()[:-700])
    code, _, err = run(capsys, "data", "verify", store)
    assert code == 2
    assert str(store) in err and len(err.strip().splitlines()) == 1


def test_a_flipped_byte_in_a_store_is_found(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("D3LIB_RUNS", str(tmp_path))
    assert run(capsys, "data", "rooms", "--split", "val", "--scenes", "1", "--size", "32x48")[0] == 0
    store = next((tmp_path / "data").iterdir())
    shard = next(store.glob("*.h5"))
    with h5py.File(shard) as file:
        offset = file["rgb"].id.get_chunk_info(0).byte_offset
    content = bytearray(shard.read_bytes())
    content[offset + 100] ^= 1
    shard.write_bytes(content)
    assert run(capsys, "data", "verify", store)[0] == 2


def test_the_module_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "d3lib", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("d3lib ")

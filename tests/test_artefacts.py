"""Artefacts appear whole or not at all, and damage is noticed."""

import multiprocessing
import os
import signal
import time

import pytest
import torch

from d3lib.artefacts import (
    atomic_write,
    canonical_json,
    digest_tensors,
    load_weights,
    locked,
    read_json,
    save_weights,
    write_json,
)
from d3lib.errors import UserError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_every_flipped_byte_of_a_json_artefact_is_noticed_or_harmless(tmp_path):
    path = tmp_path / "a.json"
    content = {"rms": 0.5, "name": "x", "list": [1, 2, None]}
    write_json(path, content, format="f")
    good = path.read_bytes()
    assert read_json(path, format="f") == content
    for i in range(len(good)):
        path.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
        try:
            assert read_json(path, format="f") == content  # white space may change
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 100000, '{"format": "f", "version": 1, "digest": 1, "content": NaN}']
)
def test_what_is_no_artefact_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"a\.json"):
        read_json(path, format="f")


def test_numbers_that_are_none_never_get_into_json():
    with pytest.raises(ValueError):
        canonical_json({"rms": float("nan")})


def test_weights_come_back_with_their_metadata_and_damage_is_noticed(tmp_path):
    path = tmp_path / "w.safetensors"
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}
    save_weights(path, weights, {"key": "k"})
    found, metadata = load_weights(path)
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert metadata["key"] == "k" and metadata["digest"] == digest_tensors(weights)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(UserError, match="digest"):
        load_weights(path)


def hold(path, held):
    with locked(path):
        held.set()
        time.sleep(60)


def test_a_lock_keeps_a_second_process_out_until_the_first_is_killed(tmp_path):
    path = tmp_path / "place" / ".lock"
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=hold, args=(path, held))
    process.start()
    assert held.wait(20)
    with pytest.raises(UserError, match="another process"), locked(path, wait=False):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with locked(path, wait=False):
        pass

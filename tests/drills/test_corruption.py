"""One flipped byte in any artefact is found before it counts, or changes nothing: never a wrong result or a trace."""

import dataclasses
import random
import shutil
import zipfile
import zlib

import h5py
import numpy as np
import pytest
import torch

from d3lib.artefacts import load_weights, read_json, write_json
from d3lib.data import raw, shards
from d3lib.data.shards import open_store
from d3lib.errors import UserError
from d3lib.evaluation import load_network
from d3lib.execution import execute, open_sources
from d3lib.experiments import make_run
from d3lib.gate import read_gate, write_gate
from d3lib.losses import build_loss
from d3lib.models import D3Net, PatchDiscriminator
from d3lib.records import State, read_record
from d3lib.results import runs_of
from d3lib.scoring import baselines_path, score_baselines
from d3lib.training import fit

RUN = make_run("drill", loss="gan", steps=2, evaluations=1)


def batches(start):
    for step in range(start, 100):
        rng = np.random.default_rng(step)
        batch = {"rgb": rng.uniform(size=(2, 3, 32, 48)), "depth": rng.uniform(1, 5, (2, 1, 32, 48))}
        batch = {name: torch.tensor(value).float() for name, value in batch.items()}
        yield batch | {"valid": torch.ones(2, 1, 32, 48, dtype=torch.bool)}


def train(path, steps):
    """Weights of both networks after so many steps, going on from the checkpoint `path`."""
    net, adversary = D3Net("tiny", seed=1), PatchDiscriminator(ndf=8, seed=1)
    fit(net, build_loss("l1"), batches, steps=steps, adversary=adversary, checkpoint=path, identity="x", evaluations=1)
    return [value.numpy().tobytes() for model in (net, adversary) for value in model.state_dict().values()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One artefact of every kind: name → (file to damage, what is read from it)."""
    place = tmp_path_factory.mktemp("made")
    torch.set_num_threads(1)
    folder, data = place / "drill" / RUN.key, place / "data"
    execute(RUN, place / "drill", data, device="cpu")
    score_baselines(RUN, place / "drill", data, device="cpu")
    baselines = baselines_path(RUN, place / "drill")
    store = next(data.glob("rooms-train-*"))
    train(place / "checkpoint.pt", 1)
    shutil.copy(place / "checkpoint.pt", place / "checkpoint.sound")

    throughput = place / "throughput.json"
    write_json(throughput, {"x": {"step": 0.1, "image": 0.01}}, format="d3lib-throughput")
    write_gate(place / "gate.json", {"measured": {"d1": 0.7}, "outcome": {"d1": True}})

    def frames():
        shards._open_shard.cache_clear()  # as in a new process
        found = open_store(store)
        return [value.numpy().tobytes() for value in found.__getitems__(range(len(found))).values()]

    def resumed():
        found = train(place / "checkpoint.pt", 2)
        shutil.copy(place / "checkpoint.sound", place / "checkpoint.pt")
        return found

    def pictures():
        with np.load(folder / "predictions.npz", allow_pickle=False) as kept:
            return {name: kept[name].tobytes() for name in kept.files}

    def network():
        weights, about = load_weights(folder / "weights.safetensors")
        load_network(folder / "weights.safetensors")
        return {name: value.numpy().tobytes() for name, value in weights.items()}, about

    return {
        "store.json": (store / "store.json", frames),
        "shard": (store / "shard-00000.h5", frames),
        "record": (folder / "record.json", lambda: read_record(folder / "record.json")),
        "checkpoint": (place / "checkpoint.pt", resumed),
        "weights": (folder / "weights.safetensors", network),
        "predictions": (folder / "predictions.npz", pictures),
        "baselines": (baselines, lambda: read_json(baselines, format="d3lib-baselines")),
        "throughput": (throughput, lambda: read_json(throughput, format="d3lib-throughput")),
        "gate": (place / "gate.json", lambda: read_gate(place / "gate.json")),
        "state": (folder / "state.json", lambda: State(folder).read()),
    }


KINDS = "store.json shard record checkpoint weights predictions baselines state throughput gate".split()
FOUND = (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, OSError)  # by a notebook's own np.load


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_is_found_or_changes_nothing(drill, made, kind):
    path, read = made[kind]
    sound, content = path.read_bytes(), read()
    rng = random.Random(kind)
    # every part of the file gets its share, and the head, where formats keep their secrets, a quarter of all
    count = drill.times(4, 60)
    places = [rng.randrange(min(len(sound), 400)) for _ in range(count // 4)]
    rest = count - len(places)
    places += [rng.randrange(n * len(sound) // rest, (n + 1) * len(sound) // rest) for n in range(rest)]
    for place in places:
        bits = rng.randrange(1, 256)
        path.write_bytes(sound[:place] + bytes([sound[place] ^ bits]) + sound[place + 1 :])
        with drill.trial(f"{path.name}: byte {place} of {len(sound)} xor {bits}"):
            try:
                assert read() == content
                drill.note("harmless")
            except UserError as error:
                assert "\n" not in str(error)
                drill.note("found")
            except FOUND:
                if kind != "predictions":  # read by NumPy, in notebooks alone
                    raise
                drill.note("found")
    path.write_bytes(sound)
    assert read() == content


def test_a_flipped_byte_in_a_plan_or_a_scene_costs_work_and_no_pixel(drill, tmp_path):
    from test_raw import recording, zipped

    archive = zipped(tmp_path / "part.zip", recording(2, ["basement_0001a"]))
    place, target = tmp_path / "out", tmp_path / "store"
    raw.make_plan([archive], place, raw.Recipe())
    raw.process(place, workers=1)
    digest = raw.make_store(place, target, (48, 64)).digest
    scene, plan = place / "scenes" / "basement_0001a.zip", place / "plan.json"
    rng = random.Random(0)
    for path in (scene, plan):
        sound = path.read_bytes()
        for _ in range(drill.times(2, 25)):
            where, bits = rng.randrange(len(sound)), rng.randrange(1, 256)
            path.write_bytes(sound[:where] + bytes([sound[where] ^ bits]) + sound[where + 1 :])
            shutil.rmtree(target)
            with drill.trial(f"{path.name}: byte {where} xor {bits}"):
                try:
                    again = raw.make_store(place, target, (48, 64))
                    drill.note("harmless")
                except UserError as error:
                    assert "\n" not in str(error)
                    drill.note("found")
                    if path == plan:  # the message says to delete it and make it again
                        plan.unlink()
                        raw.make_plan([archive], place, raw.Recipe())
                    raw.process(place, workers=1)
                    again = raw.make_store(place, target, (48, 64))
                assert again.digest == digest
            path.write_bytes(sound)


def test_a_damaged_plan_of_a_batch_hides_no_run(drill, tmp_path):
    (tmp_path / "drill").mkdir()
    plan = tmp_path / "drill" / "plan.json"
    runs = runs_of("drill", tmp_path)
    for text in ("", "{", "[]", "null", '{"data_root": 3}', '{"data_root": "\\u0000"}', "[" * 10**5, '"' * 999):
        plan.write_text(text)
        with drill.trial(text[:30]):
            assert runs_of("drill", tmp_path) == runs


@pytest.mark.drill
def test_a_damaged_record_or_store_stops_a_run_in_one_line_and_made_again_it_is_the_same(drill, tmp_path):
    run = dataclasses.replace(RUN, loss="l1")
    whole = execute(run, tmp_path, tmp_path / "data", device="cpu")
    store = next((tmp_path / "data").glob("rooms-test-*"))
    for path in (tmp_path / run.key / "record.json", store / "store.json", store / "shard-00000.h5"):
        content = bytearray(path.read_bytes())
        place = len(content) // 2
        if path.suffix == ".h5":
            with h5py.File(path) as file:
                place = file["exact"].id.get_chunk_info(1).byte_offset + 99
        content[place] ^= 0x40
        path.write_bytes(content)
        shards._open_shard.cache_clear()
        with drill.trial(path.name):
            if path.suffix == ".h5":
                (tmp_path / run.key / "record.json").unlink()  # or the run would not read its data again
            with pytest.raises(UserError) as error:
                execute(run, tmp_path, tmp_path / "data", device="cpu")
            assert "\n" not in str(error.value) and path.name in str(error.value)
            shutil.rmtree(store) if path.parent == store else path.unlink()
            again = execute(run, tmp_path, tmp_path / "data", device="cpu")
            assert (again["metrics"], again["weights_digest"]) == (whole["metrics"], whole["weights_digest"])
    assert open_sources(run, tmp_path / "data").digest == whole["data"]["digest"]

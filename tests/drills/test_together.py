"""Several processes at once, clocks that jump, and workers that die: one result, the same as ever."""

import itertools
import os
import random
import signal
import time

import pytest
import torch
from test_kill import CONTEXT, result, work

from d3lib.artefacts import read_json
from d3lib.data import loader, prepare, rooms
from d3lib.data.prepare import FilledRooms, RoomsStore
from d3lib.data.shards import open_store
from d3lib.errors import UserError
from d3lib.execution import execute, open_sources
from d3lib.experiments import make_run


def leftovers(place):
    return [path for path in place.rglob("*") if ".part" in path.name or path.name.startswith("checkpoint")]


def test_processes_with_the_same_run_do_it_once_also_when_the_first_is_killed(drill, tmp_path):
    run = make_run("drill", loss="gan", steps=4, evaluations=1)
    whole = None
    for killed in drill.times((True,), (False, True)):
        for attempt in range(drill.times(1, 3)):
            out, data = tmp_path / f"{killed}{attempt}", tmp_path / f"data {killed}{attempt}"
            with drill.trial(f"killed {killed}", 200):
                several = [CONTEXT.Process(target=work, args=(run, out, data)) for _ in range(drill.times(2, 4))]
                for process in several:
                    process.start()
                if killed:
                    while not (out / run.key / "state.json").is_file():
                        time.sleep(0.01)
                    first = read_json(out / run.key / "state.json", format="d3lib-state")["pid"]
                    os.kill(first, signal.SIGKILL)
                for process in several:
                    process.join()
                codes = sorted(process.exitcode for process in several)
                assert codes == [-signal.SIGKILL if killed else 0] + [0] * (len(several) - 1)
                assert not leftovers(out) and not leftovers(data)
                whole = whole or result(out / run.key)
                assert result(out / run.key) == whole


def jumping(run, out, data, seed):
    """Do the run with a clock that jumps by years at every look."""
    rng = random.Random(seed)
    now = time.time
    time.time = lambda: now() + rng.uniform(-1e9, 1e9)
    work(run, out, data)


@pytest.mark.drill
def test_a_clock_that_jumps_and_files_from_the_future_change_nothing(drill, tmp_path):
    data, run = tmp_path / "data", make_run("drill", steps=4, evaluations=2)
    open_sources(run, data)
    whole = execute(run, tmp_path / "whole", data, device="cpu")
    store = next(data.glob("rooms-train-*"))
    digest = open_store(store).digest
    for seed in range(drill.times(1, 5)):
        out = tmp_path / str(seed)
        with drill.trial(f"clock {seed}"):
            process = CONTEXT.Process(target=jumping, args=(run, out, data, seed))
            process.start()
            process.join()
            assert process.exitcode == 0 and result(out / run.key) == result(tmp_path / "whole" / run.key)
    for shift in (1e8, -1e8, 4e9)[: drill.times(2, 3)]:
        with drill.trial(f"files {shift:+g} s away"):
            for path in (*store.iterdir(), *(tmp_path / "whole" / run.key).iterdir()):
                os.utime(path, (time.time() + shift,) * 2)
            assert open_sources(run, data).digest == whole["data"]["digest"] and open_store(store).digest == digest
            assert execute(run, tmp_path / "whole", data, device="cpu") == whole


def die(*arguments, **options):
    """What a worker does that the system kills for its memory."""
    os.kill(os.getpid(), signal.SIGKILL)


class Dying(torch.utils.data.Dataset):
    """A store whose second batch kills the process that reads it."""

    def __init__(self, store):
        self.store, self.asked = store, 0

    def __len__(self):
        return len(self.store)

    def __getitems__(self, indices):
        self.asked += 1
        return die() if self.asked == 2 else self.store.__getitems__(indices)


def test_a_worker_that_is_killed_costs_a_line_and_the_same_call_goes_on(drill, tmp_path, monkeypatch):
    store = RoomsStore(tmp_path, "train", 2, 2, 32, 48)
    expected, stream = store.open(), rooms.stream
    filled, again = FilledRooms(store, 4), RoomsStore(tmp_path / "again", "train", 2, 2, 32, 48)
    monkeypatch.setattr(rooms, "stream", lambda frames, *rest: stream(frames, (32, 48), 1, "full", workers=2))
    kinds = (("filling", prepare, "_fill", filled), ("rendering", rooms, "render", again))
    for what, place, function, prepared in kinds:
        with drill.trial(what):
            with monkeypatch.context() as patched:
                patched.setattr(place, function, die)
                with pytest.raises(UserError, match="was killed") as error:
                    prepared.open()
            assert "\n" not in str(error.value) and not prepared.folder.exists() and not leftovers(tmp_path)
            assert len(prepared.open()) == 4
    assert again.open().digest == expected.digest
    with drill.trial("reading"):
        options = {"frames": 4, "batch_size": 2, "seed": 0, "size": (32, 48), "workers": 1}
        with pytest.raises(UserError, match="was killed") as error:
            list(itertools.islice(loader.train_batches(Dying(expected), **options), 9))
        assert "\n" not in str(error.value)
        assert len(list(itertools.islice(loader.train_batches(expected, **options), 9))) == 9

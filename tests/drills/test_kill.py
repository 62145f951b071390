"""A run that is killed at any moment, and started again, ends in the numbers and weights of one never killed."""

import functools
import multiprocessing
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from d3lib.artefacts import load_weights, read_json
from d3lib.execution import open_sources
from d3lib.experiments import make_run
from d3lib.records import State, read_record

# children start from a process that has imported all and done nothing: in milliseconds, with no threads behind them
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["d3lib.execution"])


def work(run, out, data, dying=None, told=None):
    """Do the run, saving a checkpoint after every step; die just before the file operation of number `dying`."""
    import torch

    from d3lib import execution

    torch.set_num_threads(1)
    execution.fit = functools.partial(execution.fit, checkpoint_seconds=0)
    count = 0

    def counted(function):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count == dying:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    # the steps by which a file appears whole: made, flushed, given its rights, renamed; and those it vanishes by
    for owner, name in ((tempfile, "mkstemp"), (os, "fsync"), *((Path, n) for n in ("chmod", "replace", "unlink"))):
        setattr(owner, name, counted(getattr(owner, name)))
    started = time.perf_counter()
    execution.execute(run, out, data, device="cpu")
    if told is not None:
        told.send((count, time.perf_counter() - started))


def result(folder):
    """All that a run leaves that does not depend on when it ran."""
    record = read_record(folder / "record.json")
    weights, about = load_weights(folder / "weights.safetensors")
    with np.load(folder / "predictions.npz") as kept:
        pictures = {name: kept[name].tobytes() for name in kept.files}
    numbers = {name: value for name, value in record.items() if name != "provenance"}
    return numbers, {name: value.numpy().tobytes() for name, value in weights.items()}, about, pictures


@pytest.mark.parametrize("loss", [pytest.param("l1", marks=pytest.mark.drill), "gan"])
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(drill, loss, tmp_path):
    data, run = tmp_path / "data", make_run("drill", loss=loss, steps=6, evaluations=2)
    told, tell = CONTEXT.Pipe(duplex=False)
    open_sources(run, data)
    process = CONTEXT.Process(target=work, args=(run, tmp_path / "whole", data, None, tell))
    process.start()
    process.join()
    operations, seconds = told.recv()
    whole = result(tmp_path / "whole" / run.key)
    rng, kills, wanted, chain = random.Random(loss), 0, drill.times(2, 20), 0
    while kills < wanted:
        chain += 1
        out = tmp_path / f"killed {chain}"
        with drill.trial(f"chain {chain}", 240):
            for attempt in range(5):  # one run is killed up to four times in a row
                last = attempt == 4 or kills >= wanted
                dying = rng.randint(1, operations) if rng.random() < 0.5 and not last else None
                process = CONTEXT.Process(target=work, args=(run, out, data, dying))
                process.start()
                if dying is None and not last:
                    process.join(rng.uniform(0.02, 1.1 * seconds))
                    process.kill()
                process.join()
                if process.exitcode == 0:
                    break
                assert process.exitcode == -signal.SIGKILL
                kills += 1
                drill.note("kills")
                state = State(out / run.key).read()[0]
                assert state in ("not run", "interrupted", "done", "older"), state
            assert result(out / run.key) == whole
            assert read_json(out / run.key / "state.json", format="d3lib-state")["state"] == "done"
            left = sorted(path.name for path in (out / run.key).iterdir())
            assert left == sorted(path.name for path in (tmp_path / "whole" / run.key).iterdir())

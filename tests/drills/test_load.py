"""A hundred times as much: memory stays, and what is asked a hundred times a day still answers in seconds."""

import dataclasses
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from d3lib import experiments
from d3lib.artefacts import canonical_json, wrap, write_json
from d3lib.data import nyu
from d3lib.data.shards import write_store
from d3lib.execution import execute
from d3lib.experiments import BUDGETS, make_run, runs_to_do
from d3lib.records import RECORD, RECORD_VERSION, committed_records

ROOT = Path(__file__).parents[2]
GROWTH = 1.25  # the peak of a hundred times the frames is at most so many times the peak of the few
MORE_SEEDS = """
import dataclasses
from d3lib import experiments
row = dataclasses.replace(experiments.BUDGETS["drill"], seeds={0}, beyond_seeds={0})
experiments.BUDGETS = {{**experiments.BUDGETS, "drill": row}}
"""


MEASURED = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""


def command(*arguments, path=(ROOT,), **environment):
    """Run a command of the library; returns what it printed, its seconds, and the peak memory of a process in MB.

    A small process starts it and asks for the peak: a child of this one would begin with this one's.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"} | environment
    whole = [sys.executable, "-c", MEASURED, sys.executable, *map(str, arguments)]
    started = time.perf_counter()
    done = subprocess.run(whole, env=environment, cwd=path[0], stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stdout[-2000:]
    *printed, peak = done.stdout.splitlines()
    return "\n".join(printed), seconds, int(peak) / 1000


def flat(drill, what, few, many, peak):
    """One trial: the peaks at few and at many frames, which are noted, hardly differ."""
    with drill.trial(what, 900):
        peaks = [peak(count) for count in (few, many)]
        for count, megabytes in zip((few, many), peaks, strict=True):
            drill.tally[f"MB {what} {count} frames"] = round(megabytes)
        assert peaks[1] <= GROWTH * peaks[0], peaks


def recorded(folder, count):
    """Two archives of so many Kinect frames: walls at a slope, in ten directories of the official training scenes."""
    y, x = np.mgrid[:480, :640]
    paths = [folder / f"part{number}.zip" for number in range(2)]
    for path, directories in zip(paths, np.array_split(sorted(nyu.training_directories())[:10], 2), strict=True):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
            for directory in directories:
                for number in range(count // 10):
                    disparity = (800 + x // 8 + y // 16 + number % 50).astype("<u2")
                    rgb = np.stack([x // 4, y // 2, 0 * x + number % 256], -1).astype(np.uint8)
                    second = 1_300_000_000 + number / 30
                    file.writestr(
                        f"{directory}/d-{second:.6f}-{number}.pgm", b"P5 640 480 65535\n" + disparity.tobytes()
                    )
                    file.writestr(
                        f"{directory}/r-{second + 0.01:.6f}-{number}.ppm", b"P6 640 480 255\n" + rgb.tobytes()
                    )
    return paths


@pytest.mark.drill
def test_raw_archives_of_a_hundred_times_the_frames_take_no_more_memory(drill, tmp_path):
    def peak(count):
        place = tmp_path / str(count)
        place.mkdir()
        options = ["--no-fill", "--frames", "all", "--size", "96x128", "--workers", "2", "--out", place]
        printed, _, megabytes = command("-m", "d3lib", "data", "nyu-raw", *recorded(place, count), *options)
        assert f"{count} frames, 0 skipped" in printed and f"{count} frames, digest" in printed
        shutil.rmtree(place)
        return megabytes

    flat(drill, "at most with", 50, drill.times(500, 5000), peak)


EPOCH = """
import sys
from d3lib.data.loader import train_batches
from d3lib.data.shards import open_store
store = open_store(sys.argv[1])
batches = train_batches(store, frames=None, batch_size=10, seed=0, workers=int(sys.argv[2]))
print(sum(len(next(batches)["rgb"]) for _ in range(len(store) // 10)))
"""


@pytest.mark.drill
def test_a_store_of_a_hundred_times_the_frames_is_written_and_read_in_the_same_memory(drill, tmp_path):
    def batches(count):
        generator = torch.Generator().manual_seed(0)
        for _ in range(count // 10):
            depth = torch.rand(10, 1, 96, 128, generator=generator) + 1
            rgb = torch.randint(0, 256, (10, 3, 96, 128), dtype=torch.uint8, generator=generator)
            yield {"rgb": rgb, "depth": depth, "valid": depth > 1.1}

    def peak(count, workers):
        if not (tmp_path / str(count)).exists():
            write_store(tmp_path / str(count), batches(count), source={}, shard_frames=1000)
        printed, _, megabytes = command("-c", EPOCH, tmp_path / str(count), workers)
        assert int(printed) == count
        return megabytes

    many = drill.times(500, 5000)
    flat(drill, "read by one process of", 50, many, lambda count: peak(count, 0))
    flat(drill, "read by workers of", 50, many, lambda count: peak(count, 2))


@pytest.mark.drill
def test_pages_and_status_answer_with_a_thousand_records(drill, tmp_path):
    copy = tmp_path / "copy"
    keep = shutil.ignore_patterns(".*", "_build", "runs", "colab", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=keep)
    known = committed_records()
    file = copy / "book" / "records" / f"{known[0]['run']['budget']}.jsonl"
    lines = []
    for number in range(drill.times(200, 1000)):
        record = known[number % len(known)]
        fields = record["run"] | {"seed": record["run"]["seed"] + 100 * (number // len(known))}
        record = {**record, "run": fields, "key": make_run(**fields).key}
        lines.append(canonical_json(wrap(record, format=RECORD, version=RECORD_VERSION)))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    budget, runs = known[0]["run"]["budget"], tmp_path / "runs"
    own = {"fig2": ("-p", "budget", budget), "claims": ("-p", "budget", budget), "conclusions": ()}
    asked = {
        name: ("-m", "d3lib", "notebook", f"book/experiments/{name}.md", tmp_path / f"{name}.ipynb", *parameters)
        for name, parameters in own.items()
    }
    asked["status"] = ("-m", "d3lib", "status", "--budget", budget, "--all", "--table")
    for name, arguments in asked.items():
        with drill.trial(name, 120):
            _, seconds, _ = command(*arguments, path=(copy,), D3LIB_RUNS=str(runs))
            drill.tally[f"s for {name}"] = round(seconds)


@pytest.mark.drill
def test_a_batch_of_five_hundred_runs_is_planned_and_found_done_in_seconds(drill, tmp_path, monkeypatch):
    seeds = drill.times(2, 7)
    (tmp_path / "sitecustomize.py").write_text(MORE_SEEDS.format(seeds))  # every process imports it
    ask = ("-m", "d3lib", "reproduce", "--budget", "drill", "--out", tmp_path / "runs", "--dry-run", "--cores", "1")
    with drill.trial("nothing is done", 120):
        printed, seconds, _ = command(*ask, path=(ROOT, tmp_path))
        count = int(printed.split()[0])
        assert count >= drill.times(100, 500)
        drill.tally["s to plan"] = round(seconds)
        drill.tally["runs"] = count
    first = make_run("drill")
    record = execute(first, tmp_path / "runs" / "drill", tmp_path / "runs" / "data", device="cpu")
    row = dataclasses.replace(BUDGETS["drill"], seeds=seeds, beyond_seeds=seeds)
    monkeypatch.setattr("d3lib.experiments.BUDGETS", {**BUDGETS, "drill": row})
    monkeypatch.setattr(experiments, "manifest", experiments.manifest.__wrapped__)  # not those of the budget as it was
    for key, run in runs_to_do("drill").items():
        folder = tmp_path / "runs" / "drill" / key
        folder.mkdir(exist_ok=True)
        fields = {**record, "run": dataclasses.asdict(run), "key": key}
        write_json(folder / "record.json", fields, format=RECORD, version=RECORD_VERSION)
        (folder / "weights.safetensors").touch()
    with drill.trial("all is done", 120):
        printed, seconds, _ = command(*ask, path=(ROOT, tmp_path))
        assert f"{count} runs at budget drill" in printed and "every run is done" in printed, printed[:2000]
        drill.tally["s to find it done"] = round(seconds)
    with drill.trial("all is done, without the engine", 120):
        printed, seconds, _ = command(*ask[:-3], "--no-engine", "--jobs", "1", path=(ROOT, tmp_path))
        assert printed.startswith("0 runs to do"), printed
        drill.tally["s without the engine"] = round(seconds)

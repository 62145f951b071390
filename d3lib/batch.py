"""The batch: a budget's runs handed to Snakemake, or worked through without it."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from d3lib.artefacts import PROJECT, atomic_write, locked
from d3lib.costs import plan_text
from d3lib.errors import UserError
from d3lib.execution import stores_of
from d3lib.experiments import FOLDS, Run, runs_to_do
from d3lib.records import State, committed_records, is_current
from d3lib.results import read_plan, source_of
from d3lib.training import pick_compiler, pick_device

SNAKEFILE = Path(__file__).resolve().parent / "workflow" / "Snakefile"
NOISE = (  # lines that say nothing about the work; all else, errors above all, is passed on
    *("Assuming unrestricted", "Building DAG", "Using shell", "Provided cores", "Rules claiming", "Complete log"),
    *("Select jobs to execute", "Execute ", "Elapsed time", "Passed unknown parameter"),
    *("No SLURM account given", "not able to get a SLURM account", "Unable to guess SLURM account"),  # no fault
    "Kernel is running over TCP without encryption",
    "KeyboardInterrupt caught in kernel",  # an idle one, told to end
)


def reproduce(
    budget: str,
    *,
    out: Path,
    data_root: Path | None = None,
    pictures: Path | None = None,
    only: str | None = None,
    cores: int | None = None,
    dry_run: bool = False,
    prepare: bool = False,
    profile: Path | None = None,
) -> int:
    """Bring every run and figure of a budget up to date with Snakemake; only what changed is done again.

    Args:
        data_root: where prepared data lie or will lie; default `out/data`. A budget for NYU Depth V2 takes rooms where
            NYU is not prepared there.
        pictures: a folder of real RGB-D pairs (see `d3lib.data.folder`), to try the transfer to them.
        dry_run: print the plan and what it costs, and do nothing.
        prepare: fetch ImageNet weights and make the data alone, so that machines without internet can do the rest.

    Returns 0 if all of it is done, 1 if something failed (the rest is done all the same).
    Raises `UserError` for an unknown budget or item, outside a clone, or while another batch works in `out`.
    """
    plan = make_plan(budget, out, data_root, only, pictures)
    runs = runs_to_do(budget, only, plan["data"], plan["pictures"])
    if not (PROJECT / "book").is_dir():
        raise UserError(f"{PROJECT / 'book'}: the notebooks are not there; run from a clone of the repository")
    place = out.resolve() / budget
    if place.exists() and not place.is_dir():
        raise UserError(f"{place}: is a file; name a folder with --out")
    engine = functools.partial(_run_engine, SNAKEFILE, place, place / "plan.json", out, cores, profile, dry_run)
    with locked(place / ".batch.lock", wait=False):
        with atomic_write(place / "plan.json") as file:
            json.dump(plan | {"out": str(place), "book": str(PROJECT / "book")}, file)
        print(f"{len(runs)} runs at budget {budget} on {plan['data']}; results in {place}", flush=True)
        if prepare:
            fetch_encoders(runs.values())
            return engine("data")
        states = {key: State(place / key).read()[0] for key in runs}
        for key, state in states.items():  # made by `d3lib train` with older code: the engine knows nothing of them
            if state != "done" and not dry_run:
                (place / key / "record.json").unlink(missing_ok=True)
        todo = [run for key, run in runs.items() if states[key] != "done"]
        elsewhere = f"{len(todo)} runs to do where {profile} sends them"  # this machine's speed says nothing of theirs
        print(elsewhere if profile else plan_text(budget, todo, out), flush=True)
        failed = engine("runs")
        return engine("figures") or failed


def work_through(
    budget: str,
    *,
    out: Path,
    data_root: Path | None = None,
    pictures: Path | None = None,
    only: str | None = None,
    minutes: float = math.inf,
    jobs: int | None = None,
    device: str = "auto",
    go_on: bool = False,
) -> int:
    """Do a budget's runs without the engine, in the manifest's order, `jobs` at a time, and stop in time.

    For a bare machine: it needs what `d3lib train` needs. Rooms are rendered first, by a process for each thread that
    torch takes. Runs that are done are left alone; one that is cut off by the clock goes on from its checkpoint when
    this is called again.

    Args:
        go_on: leave out runs whose records came with the book, made by today's training code: to add to a study.

    Returns 0 if everything that was started ended well, else 1.
    """
    plan = make_plan(budget, out, data_root, only, pictures)
    place, deadline = out.resolve() / budget, time.monotonic() + minutes * 60
    with locked(place / ".batch.lock", wait=False):
        with atomic_write(place / "plan.json") as file:
            json.dump(plan | {"out": str(place)}, file)
        runs = runs_to_do(budget, only, plan["data"], plan["pictures"])
        kept = {record["key"] for record in committed_records() if go_on and is_current(record)}
        kept -= {run.init.removeprefix("run:") for run in runs.values()}  # a record alone is no start for another run
        waiting = [key for key in runs if key not in kept and State(place / key).read()[0] != "done"]
        count = jobs or (1 if pick_device(device).startswith("cuda") else os.cpu_count() or 1)
        command = [sys.executable, "-m", "d3lib", "train", "--out", str(out), "--data-root", plan["data_root"]]
        command += ["--pictures", plan["pictures"]] if plan["pictures"] else []
        threads = str(max(1, (os.cpu_count() or 1) // count))
        environment = {"OMP_NUM_THREADS": threads} | os.environ
        working: dict[str, subprocess.Popen[bytes]] = {}
        failed = 0
        print(f"{len(waiting)} runs to do at budget {budget} on {plan['data']}, {count} at a time", flush=True)
        stores = [stores_of(runs[key], Path(plan["data_root"])) for key in waiting]
        for store in {store.folder: store for each in stores for store in each.values()}.values():
            if time.monotonic() > deadline:
                break
            with contextlib.suppress(UserError, OSError):  # the runs that need it say so
                store.open(progress=functools.partial(_report, deadline))
        try:
            while working or (waiting and time.monotonic() < deadline):
                while len(working) < count and time.monotonic() < deadline:
                    undone = {*waiting, *working}  # who starts from another run waits for it
                    key = next((key for key in waiting if runs[key].init.removeprefix("run:") not in undone), None)
                    if key is None:
                        break
                    waiting.remove(key)
                    arguments = [*command, "--run", key, "--device", device]
                    with (place / f"{key}.log").open("wb") as log:
                        working[key] = subprocess.Popen(arguments, env=environment, stdout=log, stderr=log)
                if time.monotonic() > deadline:
                    break
                time.sleep(0.2)
                for key, process in list(working.items()):
                    if (code := process.poll()) is not None:
                        del working[key]
                        failed += code != 0
                        state, error = State(place / key).read()
                        print(f"{state:<12} {key}{'  ' + error if error else ''}", flush=True)
        finally:
            for process in working.values():
                process.terminate()  # it saves a checkpoint first
            for key, process in working.items():
                process.wait()
                print(f"{State(place / key).read()[0]:<12} {key}", flush=True)
        return int(failed > 0)


def _report(deadline: float, line: str) -> None:
    """Print a line of progress; raise `UserError` when the time is up."""
    if time.monotonic() > deadline:
        raise UserError("the time is up")
    print(line, flush=True)


def make_plan(
    budget: str, out: Path, data_root: Path | None = None, only: str | None = None, pictures: Path | None = None
) -> dict[str, Any]:
    """What a batch works on: {budget, only, data_root, data, pictures}; see `results.source_of`.

    Folders of a former plan in the same place are kept where none are given.
    """
    pick_compiler("cuda")  # an unknown one is refused once, not by every run; this machine may only plan
    former = read_plan(budget, out)
    root = (data_root or Path(former.get("data_root", out / "data"))).resolve()
    folder = str(pictures.resolve()) if pictures else former.get("pictures")
    for fold in range(1, FOLDS + 1) if pictures else ():
        if not (pictures / f"fold-{fold}" / "rgb" / "test").is_dir():
            raise UserError(f"{pictures}: has no fold-{fold}; make {FOLDS} folds of your pairs by `d3lib data folds`")
    data = source_of(budget, root)
    return {"budget": budget, "only": only, "data_root": str(root), "data": data, "pictures": folder}


def fetch_encoders(runs: Iterable[Run]) -> None:
    """Download the ImageNet weights that the runs start from, where they are not there yet. Raises `UserError`."""
    for encoder in sorted({run.encoder for run in runs if run.pretrained}):
        from d3lib.models import D3Net

        D3Net(encoder, pretrained=True)
        print(f"ImageNet weights of {encoder}: there", flush=True)


def process_archives(archives: Sequence[Path], recipe: Any, size: tuple[int, int], out: Path, profile: Path) -> int:
    """Process the raw archives of a plan (see `d3lib.data.raw`) as jobs, one per archive, then write the store.

    Args: `recipe` (`d3lib.data.raw.Recipe`), `size` (H, W) of the store, `profile` a Snakemake profile.

    Returns 0, or 1 if a job failed. Raises `UserError` for a profile that is no folder, and while another process works
    in the same folder.
    """
    from d3lib.data import raw

    if not profile.is_dir():
        raise UserError(f"{profile}: no such folder; name a Snakemake profile, a folder that holds its config.yaml")
    folder = raw.folder_of(out.resolve() / "data", recipe)
    options = ["--frames", "all" if recipe.frames is None else str(recipe.frames), "--order", recipe.order]
    options += ["--alpha", repr(recipe.alpha), "--size", f"{size[0]}x{size[1]}", "--out", str(out.resolve())]
    options += ([] if recipe.fill else ["--no-fill"]) + (["--lossless"] if recipe.lossless else [])
    with locked(folder / ".batch.lock", wait=False):
        shutil.rmtree(folder / "done", ignore_errors=True)  # the jobs see for themselves what is done, and it is cheap
        config = {"archives": [os.path.abspath(path) for path in archives], "options": options}
        with atomic_write(folder / "batch.json") as file:
            json.dump(config | {"threads": os.cpu_count() or 1}, file)
        return _run_engine(SNAKEFILE.with_name("nyu.smk"), folder, folder / "batch.json", out, None, profile)


def _run_engine(
    snakefile: Path,
    place: Path,
    config: Path,
    out: Path,
    cores: int | None,
    profile: Path | None,
    dry_run: bool = False,
    target: str | None = None,
) -> int:
    """Run Snakemake in `place`, whose lock the caller holds, and pass its lines on; returns 0, or 1 if a job failed."""
    quiet = ["--quiet", *([] if profile else ["rules"]), "host", "progress", "reason"]  # a cluster's failures are there
    command = [sys.executable, "-m", "snakemake", *([target] if target else [])]  # first: options would swallow it
    command += ["--snakefile", str(snakefile), "--directory", str(place), "--configfile", str(config)]
    if cores or not profile:  # a profile says how many
        command += ["--cores", str(cores or os.cpu_count() or 1)]
    environment = os.environ | {"D3LIB_RUNS": str(out.resolve())}
    if root := json.loads(config.read_text(encoding="utf-8")).get("data_root"):
        environment["D3LIB_DATA"] = root
    if any((place / ".snakemake" / "locks").glob("*")):  # a killed batch; ours is the only one now
        subprocess.run([*command, "--cores", "1", "--unlock", *quiet], env=environment, check=False)
    command += ["--keep-going", "--rerun-incomplete", "--rerun-triggers", "mtime", "params", "input", *quiet]
    command += ["--dry-run"] if dry_run else []
    command += ["--profile", str(profile)] if profile else []
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    for line in process.stdout or ():
        if not any(noise in line for noise in NOISE):
            print(line, end="", flush=True)
    return 1 if process.wait() else 0

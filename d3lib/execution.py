"""Doing one `Run`: open its data, train, evaluate, and write a record that says how every number was made."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from d3lib import distributed, provenance
from d3lib.artefacts import (
    atomic_write,
    canonical_json,
    digest_file,
    digest_json,
    digest_tensors,
    load_weights,
    locked,
    save_weights,
    write_json,
)
from d3lib.data import nyu
from d3lib.data.loader import batch_indices, eval_batches, resize_sample, train_batches
from d3lib.data.prepare import FilledRooms, FolderStore, RoomsStore, open_nyu
from d3lib.data.shards import Store
from d3lib.errors import StoppedError, UserError
from d3lib.evaluation import Closely, as_predictor, evaluate
from d3lib.experiments import BUDGETS, Run
from d3lib.losses import L1_WEIGHT, build_loss
from d3lib.metrics import Protocol
from d3lib.models import D3Net, PatchDiscriminator
from d3lib.records import RECORD, RECORD_VERSION, State, model_card, read_record
from d3lib.training import DivergedError, fit, pick_compiler, pick_device, pick_layout, pick_precision

EVAL_BATCH = 16  # images predicted at once
CURVE_FRAMES = 64  # frames of a set that a point of the learning curve is computed on
PREDICTIONS = 4  # test pictures kept with a run, the same ones for every run
WORST = 2  # and those with the largest error
Progress = Callable[[str], None]

atexit.register(gc.freeze)  # or at its end Python searches torch's million objects for cycles, for a second


@dataclass(frozen=True)
class Sources:
    """The data of one run: sets by name, how many frames of each to use, and the depth that results count against."""

    sets: Mapping[str, Dataset]  # train, val, test; rooms: unseen; NYU: test_raw and both at full size, test..._full
    frames: Mapping[str, Sequence[int]]  # which frames of each set
    target: str  # "exact" where the true depth is known, else "depth"
    scenes: Sequence[str]  # of each test frame
    digest: str
    description: str

    def batches(self, name: str, run: Run, device: str, limit: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Evaluation batches of the named set, in order, at the run's size; at most `limit` frames.

        Of a set named `..._full` the pictures alone are resized: its depth keeps the size it is scored at.
        """
        size, full = (run.height, run.width), name.endswith("_full")
        batches = eval_batches(
            self.sets[name],
            frames=self.frames[name][:limit],
            batch_size=EVAL_BATCH,
            size=None if full else size,
            device=device,
        )
        return (batch | resize_sample({"rgb": batch["rgb"]}, size) for batch in batches) if full else batches


class ExactTarget(Dataset):
    """A training set of rooms whose depth is the exact one, at every pixel."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.names = store.names

    def __len__(self) -> int:
        return len(self.store)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The samples at `indices` as one batch."""
        batch = self.store.__getitems__(indices)
        # memory of its own: batches are mirrored in place, and what is shared would be mirrored twice
        return batch | {"depth": batch["exact"].clone(), "valid": torch.ones_like(batch["valid"])}


def stores_of(run: Run, data_root: Path) -> dict[str, RoomsStore | FilledRooms]:
    """The prepared sets of rooms that a run reads, by name; empty for other data."""
    if run.data != "rooms":
        return {}
    budget = BUDGETS[run.budget]
    counts = {
        "train": (budget.train_scenes, max(budget.views.values())),
        "val": (budget.val_scenes, budget.test_views),
        "test": (budget.test_scenes, budget.test_views),
        "unseen": (budget.test_scenes, budget.test_views),
    }
    stores: dict[str, RoomsStore | FilledRooms] = {
        split: RoomsStore(data_root, split, scenes, views, run.height, run.width)
        for split, (scenes, views) in counts.items()
    }
    if run.target == "filled":
        stores["train"] = FilledRooms(stores["train"], max(frames_of(run)) + 1)
    return stores


def frames_of(run: Run) -> Sequence[int]:
    """Which frames of the prepared set of rooms a run trains on; empty for other data.

    A store is in view-major order: its first frames are one view of each scene, then come the second views.
    """
    if run.data != "rooms":
        return range(0)
    budget = BUDGETS[run.budget]
    count, scenes = budget.frames(run.train_set), run.scenes or budget.train_scenes
    views = -(-count // scenes)
    if views > max(budget.views.values()):
        raise UserError(f"budget {run.budget} has no {count} frames of {scenes} scenes; ask for more scenes")
    if scenes == budget.train_scenes:
        return range(count)
    return [view * budget.train_scenes + scene for view in range(views) for scene in range(scenes)][:count]


def open_sources(run: Run, data_root: Path, progress: Progress | None = None) -> Sources:
    """Open (and for rooms, render if missing) the data of a run. Raises `UserError` where it is not to be had."""
    if run.data == "rooms":
        budget = BUDGETS[run.budget]
        stores = {name: store.open(progress) for name, store in stores_of(run, data_root).items()}
        frames = {name: range(len(store)) for name, store in stores.items()}
        frames["train"] = frames_of(run)
        digest = _digest_of(stores, frames)
        text = f"synthetic rooms, {len(frames['train'])} frames of {run.scenes or budget.train_scenes} scenes"
        if run.target != "sensor":
            text += f" with {run.target} depth"
        scenes = [name.rpartition("-")[0] for name in stores["test"].names]
        sets = stores | ({"train": ExactTarget(stores["train"])} if run.target == "exact" else {})
        return Sources(sets, frames, "exact", scenes, digest, text)
    if run.data == "nyu":
        return _nyu_sources(run, data_root)
    return _folder_sources(run, data_root, progress)


def _folder_sources(run: Run, data_root: Path, progress: Progress | None) -> Sources:
    """A folder's sets. The last tenth of the training pairs, by time or name, is the validation set.

    The test set is the folder's own test split, or with `hold_out` the last pairs of its training split.
    """
    pictures = Path(run.data.removeprefix("folder:"))

    def store(split: str) -> Store:
        return FolderStore(data_root, pictures, split, run.height, run.width, run.max_depth).open(progress)

    pairs = store("train")
    test = pairs if run.hold_out else store("test")
    remaining = len(pairs) - run.hold_out
    fitted = remaining - max(1, remaining // 10)
    if fitted < 1:
        raise UserError(f"{pictures}: {len(pairs)} pairs are too few to hold {run.hold_out} out; lower --hold-out")
    frames = {
        "train": range(fitted),
        "val": range(fitted, remaining),
        "test": range(remaining, len(pairs)) if run.hold_out else range(len(test)),
    }
    text = f"{fitted} RGB-D pairs of the folder {pictures.name}"
    sets = {"train": pairs, "val": pairs, "test": test}
    scenes = [test.names[index] for index in frames["test"]]  # nobody says which pictures are of one scene
    return Sources(sets, frames, "depth", scenes, _digest_of(sets, frames), text)


def _nyu_sources(run: Run, data_root: Path) -> Sources:
    """NYU Depth V2 as `d3lib data nyu-labeled` and `nyu-raw` prepared it.

    Validation frames are the labelled ones of a fixed tenth of the training scenes, the same for every training set,
    which leaves these scenes out. Results count against the filled depths (as the paper's), `test_raw` against the
    sensor's own; the target "sensor" trains on these too.
    """
    held_out = nyu.validation_scenes()
    name = ("train" if run.train_set == "795" else run.train_set) + ("-raw" if run.target == "sensor" else "")
    labelled, train = (open_nyu(data_root, part, run.height, run.width) for part in ("train", name))
    sets = {"train": train, "val": labelled}
    for part in ("test", "test-raw"):
        sets[part.replace("-", "_")] = sets[part.replace("-", "_") + "_full"] = open_nyu(
            data_root, part, *nyu.FULL_SIZE
        )
    frames: dict[str, Sequence[int]] = {part: range(len(store)) for part, store in sets.items()}
    frames["train"] = [index for index, name in enumerate(train.names) if nyu.scene_of(name) not in held_out]
    frames["val"] = [index for index, name in enumerate(labelled.names) if nyu.scene_of(name) in held_out]
    if not frames["train"] or not frames["val"]:
        raise UserError(f"{train.path}: no frames outside, or none inside the validation scenes; prepare NYU anew")
    text = f"NYU Depth V2 {run.train_set}, {len(frames['train'])} frames ({len(train)} less those of validation scenes)"
    scenes = [nyu.scene_of(name) for name in sets["test"].names]
    return Sources(sets, frames, "depth", scenes, _digest_of(sets, frames), text)


def _digest_of(stores: Mapping[str, Store], frames: Mapping[str, Sequence[int]]) -> str:
    """A digest of the frames a run sees: each store's content, and which part of it."""
    return digest_json({name: [store.digest, *map(str, (frames[name],))] for name, store in stores.items()})


def execute(
    run: Run,
    out: Path,
    data_root: Path,
    *,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Do one run, or return its record if it was done with the same code and data; continue it if it was cut off.

    Writes `out/<run.key>/`: `record.json`, `weights.safetensors` (the checkpoint chosen on validation scenes) with
    its `model_card.md`, `predictions.npz` (a few test pictures), and while training a checkpoint.

    A run on several GPUs (on a machine without any: in several processes) starts its processes by itself, or joins
    those that torchrun started: then the first alone prepares data, evaluates and writes.

    Returns the record's content, in a process other than the first an empty one. Raises `UserError` for missing or
    unfit data, `DivergedError` for a diverged run.
    """
    started = distributed.started()
    if started == 1 < run.gpus:
        return _in_processes(run, out, data_root, device, progress)
    if started != run.gpus:
        raise UserError(f"a run of gpus {run.gpus} was started in {started} processes; make the two numbers equal")
    pick_compiler(pick_device(device))  # an unknown one is refused before data are prepared
    with distributed.joined(pick_device(device)) as device:
        return _execute(run, out / run.key, data_root, device, progress if distributed.rank() == 0 else None)


def _in_processes(run: Run, out: Path, data_root: Path, device: str, progress: Progress | None) -> dict[str, Any]:
    """Let torchrun do a run in as many processes as it asks for, pass on their progress, and read the record."""
    arguments = [canonical_json(dataclasses.asdict(run)), str(out), str(data_root), device]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={run.gpus}"]
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // run.gpus))}
    with subprocess.Popen(
        [*command, "-m", "d3lib.execution", *arguments],
        env=os.environ | threads,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as processes:
        said: deque[str] = deque(maxlen=200)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: processes.terminate())  # they save a checkpoint, and we end too
        try:
            for line in map(str.strip, processes.stdout or ()):
                said.append(line)
                if progress is not None:
                    progress(line)
        except BaseException:  # interrupted: torchrun ends its processes if it is ended
            processes.terminate()
            processes.wait()
            raise
    if processes.returncode:
        errors = [line.removeprefix("d3lib: ") for line in said if line.startswith("d3lib: ")]
        if errors:
            raise (StoppedError if errors[0].startswith("stopped at") else UserError)(errors[0])
        raise RuntimeError("\n".join([f"one of {run.gpus} processes failed:", *said]))
    return read_record(out / run.key / "record.json")


def _execute(run: Run, folder: Path, data_root: Path, device: str, progress: Progress | None) -> dict[str, Any]:
    """`execute`, in each of the run's processes."""
    with distributed.first_alone():
        net = build_network(
            run, folder.parent
        )  # before the data: weights that do not fit should not cost minutes of rendering
        sources = open_sources(run, data_root, progress)
    if run.init:  # the file's content is part of what the result depends on, not only its name
        start = initial_weights(run, folder.parent)
        inputs = digest_json([sources.digest, digest_file(start)])
        before = load_weights(start)[1].get("trained_on", "data unknown")
        sources = dataclasses.replace(
            sources, digest=inputs, description=f"{sources.description} (before that: {before})"
        )
    code = provenance.code_digest(*provenance.TRAINING_CODE)
    if distributed.rank() > 0:
        done = distributed.as_the_first(True)
        return {} if done else _train_and_score(run, net, sources, folder, device, code, None)
    with locked(folder / ".lock"):  # two processes with the same run: the second finds the first one's record
        for rest in folder.glob(".*.part*"):  # of files that a killed process was writing
            rest.unlink(missing_ok=True)
        record = read_record(folder / "record.json") if (folder / "record.json").is_file() else None
        found = record and (record["provenance"]["code_digest"], record["data"]["digest"])
        state = State(folder)
        if distributed.as_the_first(found == (code, sources.digest)):
            for rest in folder.glob("checkpoint*.pt"):  # killed between its record and its end
                rest.unlink(missing_ok=True)
            if state.read()[0] != "done":
                state.write("done")
            return record
        state.write("running")
        try:
            record = _train_and_score(run, net, sources, folder, device, code, progress)
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt | SystemExit | StoppedError)
            state.write("interrupted" if stopped else "failed", f"{type(error).__name__}: {error}".splitlines()[0])
            raise
        state.write("done")
        return record


def _train_and_score(
    run: Run, net: D3Net, sources: Sources, folder: Path, device: str, code: str, progress: Progress | None
) -> dict[str, Any]:
    started = time.perf_counter()
    precision, compiler = pick_precision(run.precision, device), pick_compiler(device)
    net = net.to(device, memory_format=pick_layout(device, precision, (run.height, run.width)))
    adversary = PatchDiscriminator(ndf=run.ndf, seed=run.seed).to(device) if run.loss == "gan" else None

    closely = Closely()  # at the newest predictions of the whole test set

    def scores(name: str, network: nn.Module, limit: int | None = None) -> dict[str, Any]:
        nonlocal closely
        targets = ("exact", "depth") if sources.target == "exact" else ("depth",)
        batches = sources.batches(name, run, device, limit)
        whole = name == "test" and len(sources.frames[name]) <= (limit or math.inf)
        closely = Closely() if whole else closely
        predict, protocol = as_predictor(network, device, precision), Protocol(max_depth=run.max_depth)
        return evaluate(predict, batches, protocol, targets, closely if whole else None)

    newest: dict[str, dict[str, Any]] = {}  # whole sets as scored at the newest point: in the end, the last weights

    def point(network: nn.Module) -> dict[str, float | None]:
        """A point of the learning curve: pooled RMSE and δ<1.25 on a part of each set."""
        found = {name: scores(name, network, CURVE_FRAMES) for name in ("val", "test")}
        newest.update((name, found[name]) for name in found if len(sources.frames[name]) <= CURVE_FRAMES)
        # the validation error that chooses weights counts against the training target: nobody has exact depth at home
        return {
            "val_rms": found["val"]["depth"]["pooled"]["rms"],
            "test_rms": found["test"][sources.target]["pooled"]["rms"],
            "test_d1": found["test"][sources.target]["pooled"]["d1"],
        }

    def batches(start: int) -> Iterator[dict[str, Tensor]]:
        return train_batches(
            sources.sets["train"],
            frames=sources.frames["train"],
            batch_size=run.batch_size,
            seed=run.seed,
            size=(run.height, run.width),
            device=device,
            start_step=start,
            rank=distributed.rank(),
            world=distributed.world(),
        )

    # from graphs or without, the same kernels run: a checkpoint of the one goes on as the other
    identity = " ".join([run.key, code, sources.digest, *([] if compiler in (None, "graphs") else [compiler])])
    checkpoint = folder / f"checkpoint-{digest_json(identity)[:8]}.pt"
    for old in set(folder.glob("checkpoint*.pt")) - {checkpoint}:
        old.unlink(missing_ok=True)  # of other code or other data: nothing can continue from it
    training = partial(
        fit,
        net,
        _pixel_loss(run),
        batches,
        steps=run.steps,
        learning_rate=run.learning_rate,
        betas=(run.beta1, run.beta2),
        adversary=adversary,
        lam=L1_WEIGHT if run.lam is None else run.lam,
        adversarial_from=round(run.steps * run.adversarial_from),
        variant=run.variant,
        device=device,
        precision=precision,
        compiler=compiler,
        evaluate=point,
        evaluations=run.evaluations,
        checkpoint=checkpoint,
        identity=identity,
        clip_norm=run.clip_norm,
        progress=progress,
    )
    try:
        with _told_to_stop() as stop:
            trace = training(stop=stop)
    except DivergedError as error:
        batch = next(batch_indices(np.asarray(sources.frames["train"]), run.batch_size, run.seed, error.step - 1))
        names = [sources.sets["train"].names[index] for index in batch]
        raise UserError(f"{error} (its frames: {', '.join(names)})") from error
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = " ".join([line for line in str(error).splitlines() if line.strip()][:2])
            raise UserError(f"D3LIB_COMPILE={compiler}: torch.compile failed ({reason}); unset it") from error
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold all that filled the memory
        net.to("cpu")
        gc.collect()  # what was recorded refers to itself
        fitting = _batch_that_fits(run, device)
        advice = f"batch_size {fitting} fits" if fitting else "no batch fits; choose a smaller height and width"
        raise UserError(f"out of memory at batch_size {run.batch_size}, {run.height}x{run.width}; {advice}") from error
    if distributed.rank() > 0:
        return {}  # the first process has the curve, and scores
    if not trace.best_weights:
        raise UserError(f"{run.data}: no validation picture has a depth up to {run.max_depth:g} m; check the data")
    part = {"train": min(CURVE_FRAMES, len(sources.frames["test"]))}  # a set not named here is scored whole
    last = {name: newest.get(name) or scores(name, net, part.get(name)) for name in sources.sets}
    chosen = last
    if trace.best_step != run.steps:
        net.load_state_dict(trace.best_weights)
        chosen = {name: scores(name, net, part.get(name)) for name in sources.sets}
    record = {
        "key": run.key,
        "run": dataclasses.asdict(run),
        "metrics": {"chosen": chosen, "last": last},
        "details": closely.details.compute(),
        "by_scene": closely.by_scene(sources.scenes),
        "chosen_step": trace.best_step,
        "curve": trace.curve,
        "data": {
            "digest": sources.digest,
            "description": sources.description,
            "target": sources.target,
            "train_frames": len(sources.frames["train"]),
        },
        "weights_digest": digest_tensors(trace.best_weights),
        "provenance": provenance.collect(*provenance.TRAINING_CODE, device=device)
        | {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "precision": precision,
            "compiler": compiler,
            "train_seconds": trace.seconds,
            "total_seconds": time.perf_counter() - started,
            "peak_memory_bytes": provenance.peak_memory(device),
        },
    }
    _write_predictions(folder, net, run, sources, closely.worst(WORST), device, precision)
    _write_weights(folder, trace.best_weights, record)
    write_json(folder / "record.json", record, format=RECORD, version=RECORD_VERSION)
    checkpoint.unlink(missing_ok=True)
    return record


@contextlib.contextmanager
def _told_to_stop() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGTERM has come, which a first time ends nothing inside the block."""
    told: list[int] = []

    def note(signum: int, frame: Any) -> None:
        told.append(signum)
        signal.signal(signal.SIGTERM, before)  # a second one means now

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: bool(told)
    finally:
        signal.signal(signal.SIGTERM, before)


def _batch_that_fits(run: Run, device: str) -> int:
    """The largest batch size, of halves of the run's, with which a step of the depth network fits; 0 if none."""
    size = run.batch_size // 2
    while size:
        if device.startswith("cuda"):
            gc.collect()
            torch.cuda.empty_cache()
        try:
            net = build_network(dataclasses.replace(run, pretrained=False, init="")).to(device)
            net(torch.zeros(size, 3, run.height, run.width, device=device)).sum().backward()
            return size
        except (torch.OutOfMemoryError, RuntimeError):
            size //= 2
    return 0


def _pixel_loss(run: Run) -> Callable[..., Tensor]:
    """The run's regression loss; for gan, its L1 term."""
    if run.loss == "gan":
        return build_loss("l1")
    options = ({} if run.lam is None else {"lam": run.lam}) | ({"pooled": True} if run.pooled else {})
    return build_loss(run.loss, run.variant, **options)


def initial_weights(run: Run, place: Path) -> Path:
    """The file that `run.init` names; `place` is the folder of the batch's runs."""
    key = run.init.removeprefix("run:")
    return Path(run.init) if key == run.init else place / key / "weights.safetensors"


def build_network(run: Run, place: Path = Path()) -> D3Net:
    """The run's network with its initial weights: by seed alone, or from `run.init` (see `initial_weights`)."""
    shape = {name: getattr(run, name) for name in ("skips", "pooling", "output")}
    net = D3Net(run.encoder, pretrained=run.pretrained, max_depth=run.max_depth, seed=run.seed, **shape)
    if run.init:
        weights, _ = load_weights(initial_weights(run, place))
        try:
            net.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"{run.init}: does not fit encoder {run.encoder}: {str(error).splitlines()[0]}") from error
    return net


def _write_predictions(
    folder: Path, net: nn.Module, run: Run, sources: Sources, worst: Sequence[int], device: str, precision: str
) -> None:
    """Keep a few test pictures with what the network made of them (float16 metres): the first, then the worst."""
    index = [*range(min(PREDICTIONS, len(sources.frames["test"]))), *worst]
    frames = dict(sources.frames) | {"test": [sources.frames["test"][row] for row in index]}
    batch = next(iter(dataclasses.replace(sources, frames=frames).batches("test", run, device)))
    pred = as_predictor(net, device, precision)(batch["rgb"])
    size = pred.shape[-2:]  # of NYU's test set the depth is kept at network size, like the rest
    batch = resize_sample(batch, (int(size[0]), int(size[1])))
    with atomic_write(folder / "predictions.npz", "wb") as file:
        np.savez_compressed(
            file,
            rgb=(batch["rgb"] * 255).round().to(torch.uint8).cpu().numpy(),
            depth=batch[sources.target].half().cpu().numpy(),
            valid=batch["valid"].cpu().numpy(),
            pred=pred.half().cpu().numpy(),
            index=np.array(index),
            worst=np.arange(len(index)) >= len(index) - len(worst),
        )


def _write_weights(folder: Path, weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write the chosen weights with all that `predict` must know of them, and their model card."""
    run, data = record["run"], record["data"]
    metadata = {
        **{name: str(run[name]) for name in ("encoder", "skips", "pooling", "output")},
        "max_depth": str(run["max_depth"]),
        "height": str(run["height"]),
        "width": str(run["width"]),
        "trained_on": data["description"],
        "run": canonical_json(run),
        "key": record["key"],
    }
    try:
        save_weights(folder / "weights.safetensors", weights, metadata)
    except UserError as error:  # a bare machine without the package still gets its record
        print(f"weights are not kept: {error}")
        return
    with atomic_write(folder / "model_card.md") as file:
        file.write(model_card(record))


if __name__ == "__main__":  # one of the processes that `_in_processes` starts
    from d3lib.training import progress_line

    try:
        fields, out, data_root, device = sys.argv[1:]
        execute(Run(**json.loads(fields)), Path(out), Path(data_root), device=device, progress=progress_line())
    except UserError as error:
        sys.exit(f"d3lib: {error}")

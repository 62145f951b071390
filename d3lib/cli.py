"""The command line. Each command is a few lines over the library; bad input gets one line and exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from d3lib import __version__
from d3lib.artefacts import runs_folder
from d3lib.errors import StoppedError, UserError
from d3lib.experiments import BUDGETS, FOLDS, Run, find_run, make_run, plain_kind


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and where to read more, and exit with code 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad input, 130 or 143 if it was told to end."""
    options = build_parser().parse_args(arguments)
    try:
        return options.action(options) or 0
    except UserError as error:
        print("d3lib:", *str(error).splitlines(), file=sys.stderr)  # a name may hold the end of a line
        return 143 if isinstance(error, StoppedError) else 2
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        return 0
    except (OSError, UnicodeError) as error:
        print(f"d3lib: {error}; check that the path exists, is of the right kind and may be written", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("d3lib: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130


def build_parser() -> Parser:
    """All commands with their help."""
    parser = Parser(prog="d3lib", description="Regression losses for deep depth estimation: data, training, batch.")
    parser.add_argument("--version", action="version", version=f"d3lib {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    data = commands.add_parser("data", help="prepare data").add_subparsers(required=True, metavar="SOURCE")
    rooms = _command(data, "rooms", _data_rooms, "render a set of synthetic rooms into a store")
    rooms.add_argument("--split", default="train", help="train, val, test or unseen (default: train)")
    rooms.add_argument("--scenes", type=int, help="how many scenes of the split (default: all)")
    rooms.add_argument("--views", type=int, default=1, help="frames of each scene (default: 1)")
    rooms.add_argument("--size", type=_size, default=(96, 128), metavar="HxW", help="default: 96x128")
    _add_out(rooms)
    rooms.add_argument("--shading", default="full", help="full, flat or constant_albedo (default: full)")
    rooms.add_argument(
        "--device", default="cpu", help="what renders: cpu (default), the same pixels everywhere, or cuda"
    )
    nyu = _command(data, "nyu-labeled", _data_nyu_labelled, "NYU's labelled file: 795 training and 654 test frames")
    where = nyu.add_mutually_exclusive_group(required=True)
    where.add_argument("file", nargs="?", type=Path, metavar="PATH.mat", help="nyu_depth_v2_labeled.mat, 3 GB")
    where.add_argument("--download", type=Path, metavar="DIR", help="download it into DIR first, or go on doing so")
    nyu.add_argument("--splits", type=Path, metavar="splits.mat", help="check NYU's own against the built-in split")
    nyu.add_argument("--target", default="filled", help="training depth: filled or raw (default: filled)")
    nyu.add_argument("--size", type=_size, default=(256, 320), metavar="HxW", help="for training (default: 256x320)")
    _add_out(nyu)
    raw = _command(data, "nyu-raw", _data_nyu_raw, "NYU's raw Kinect archives: synchronise, project, fill, store")
    raw.add_argument("archives", nargs="+", type=Path, metavar="ZIP-or-DIR", help="raw archives, or extracted folders")
    raw.add_argument("--frames", type=_frames, default=12000, metavar="N|all", help="equally spaced (default: 12000)")
    raw.add_argument("--order", default="crop-fill", help="crop-fill or fill-crop (default: crop-fill)")
    raw.add_argument("--alpha", type=float, default=1.0, help="weight of measured depths in the filling (default: 1)")
    raw.add_argument("--no-fill", dest="fill", action="store_false", help="keep the holes, as mask")
    raw.add_argument("--lossless", action="store_true", help="keep 427x561 pictures as PNG instead of JPEG 95")
    raw.add_argument("--size", type=_size, default=(256, 320), metavar="HxW", help="of the store (default: 256x320)")
    raw.add_argument("--workers", type=int, help="processes (default: one per core)")
    raw.add_argument("--step", choices=("plan", "process", "store"), help="one step alone (default: all three)")
    raw.add_argument("--profile", type=Path, help="run one job per archive by this Snakemake profile (a cluster)")
    _add_out(raw)
    folds = _command(data, "folds", _data_folds, "split your own pairs by time, each part a test set")
    folds.add_argument("pictures", type=Path, metavar="DIR", help="a folder of pairs, rgb/train and depth/train")
    folds.add_argument("--to", type=Path, required=True, metavar="DIR", help="the new folder, of links")
    folds.add_argument("--folds", type=int, default=FOLDS, metavar="N", help=f"default: {FOLDS}, as the batch asks")
    folds.add_argument("--apart", type=int, default=3, metavar="N", help="pairs left out beside it (default: 3)")
    verify = _command(data, "verify", _data_verify, "check every byte of a store against its digests")
    verify.add_argument("store", type=Path, help="the store's folder")

    train = _command(commands, "train", _train, "do one run: train, evaluate, write its record")
    train.add_argument("--run", metavar="KEY", help="a run of a budget's manifest, instead of flags for its fields")
    train.add_argument("--pictures", type=Path, metavar="DIR", help="with --run: the batch's folds of real RGB-D pairs")
    train.add_argument("--data-root", type=Path, metavar="DIR", help="prepared data (default: OUT/data)")
    _add_run_flags(train)
    _add_places(train)

    evaluate = _command(commands, "evaluate", _evaluate, "score a weights file on a data source, beside baselines")
    evaluate.add_argument("--weights", type=Path, required=True, help="a .safetensors file that d3lib wrote")
    _add_run_flags(evaluate)
    _add_places(evaluate)

    predict = _command(commands, "predict", _predict, "depth from your own picture")
    predict.add_argument("image", type=Path, help="a JPEG or PNG picture")
    predict.add_argument(
        "--weights", type=Path, help="a .safetensors file (default: your newest long run, else the book's small one)"
    )
    predict.add_argument("--intrinsics", metavar="FX,FY,CX,CY", help="in pixels of the picture: also writes a .ply")
    predict.add_argument("--to", type=Path, help="folder for the results (default: beside the picture)")
    _add_places(predict)

    reproduce = _command(commands, "reproduce", _reproduce, "do all runs of a budget and draw its figures")
    _add_batch_flags(reproduce)
    reproduce.add_argument("--cores", type=int, help="local cores to use (default: all)")
    reproduce.add_argument("--dry-run", action="store_true", help="print the plan and its cost, and run nothing")
    reproduce.add_argument("--prepare", action="store_true", help="only fetch weights and make the data")
    reproduce.add_argument("--data", type=Path, metavar="DIR", help="where prepared data lie (default: OUT/data)")
    reproduce.add_argument(
        "--pictures", type=Path, metavar="DIR", help="folds of real RGB-D pairs: also try transfer to them"
    )
    reproduce.add_argument("--profile", type=Path, help="a Snakemake profile folder (a cluster, for example)")
    bare = reproduce.add_argument_group("without the engine, on a bare machine: no notebooks, no figures")
    bare.add_argument("--no-engine", action="store_true", help="work through the runs in the order of the manifest")
    bare.add_argument("--minutes", type=float, default=math.inf, help="stop in time; the same command goes on later")
    bare.add_argument("--jobs", type=int, help="runs at a time (default: one on a GPU, else one per core)")
    bare.add_argument("--go-on", action="store_true", help="leave out runs whose records came with the book")
    _add_places(reproduce)

    status = _command(commands, "status", _status, "a budget's figures and tables: runs done, running, failed, not run")
    _add_batch_flags(status)
    status.add_argument("--all", action="store_true", help="a line for each run")
    status.add_argument("--table", action="store_true", help="also print our numbers beside the paper's")
    _add_out(status)

    keep = _command(commands, "keep", _keep, "put a budget's finished records into the book")
    keep.add_argument("--budget", required=True, help=f"one of {', '.join(BUDGETS)}")
    _add_out(keep)

    notebook = _command(commands, "notebook", _notebook, "execute one notebook with checked parameters")
    notebook.add_argument("source", type=Path, help="a MyST Markdown notebook (.md)")
    notebook.add_argument("target", type=Path, help="the executed notebook to write (.ipynb)")
    notebook.add_argument("--parameters", default="{}", metavar="JSON", help="a JSON object, or a file that holds one")
    notebook.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="pairs")

    gate = _command(commands, "gate", _gate, "measure whether the rooms are fit for a study, and keep the outcome")
    gate.add_argument("--record", type=Path, required=True, metavar="JSON", help="where to keep the outcome")
    _add_run_flags(gate)
    _add_places(gate)

    bench = _command(commands, "bench", _bench, "measure speed against named baselines, in one run")
    what = "start, loss, train, compile, gpu, together, infer, eval, data, rooms; several with commas; or all (default)"
    bench.add_argument("what", nargs="?", default="all", help=what)
    bench.add_argument("--json", type=Path, help="also write the figures to this file")
    bench.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def _command(commands: typing.Any, name: str, action: typing.Any, text: str) -> Parser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(action=action)
    return parser


def _add_run_flags(parser: Parser) -> None:
    """One flag for each field of `Run`; what is not given keeps the budget's number."""
    kinds = typing.get_type_hints(Run)
    group = parser.add_argument_group("the run (what is not given comes from the budget)")
    for field in dataclasses.fields(Run):
        flag = f"--{field.name.replace('_', '-')}"
        text = field.metadata["help"].replace("%", "%%")
        kind = plain_kind(kinds[field.name])
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            group.add_argument(flag, type=kind, metavar=field.name.upper(), help=text)


def _add_batch_flags(parser: Parser) -> None:
    parser.add_argument("--budget", default="smoke", help=f"one of {', '.join(BUDGETS)} (default: smoke)")
    parser.add_argument("--only", metavar="ITEM", help="one figure or table, for example fig2")


def _add_out(parser: Parser) -> None:
    parser.add_argument("--out", type=Path, default=runs_folder(), help="where results go (default: runs)")


def _add_places(parser: Parser) -> None:
    _add_out(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def _size(text: str) -> tuple[int, int]:
    """Parse HxW."""
    height, _, width = text.partition("x")
    try:
        return int(height), int(width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write HEIGHTxWIDTH, for example 96x128") from None


def _frames(text: str) -> int | None:
    """Parse a number of frames, or "all" (None)."""
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of frames; write for example 12000, or all") from None


def _run_of(options: argparse.Namespace) -> Run:
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(Run)}
    return make_run(fields.pop("budget") or "smoke", **fields)


def _data_rooms(options: argparse.Namespace) -> None:
    from d3lib.data import rooms
    from d3lib.data.prepare import RoomsStore
    from d3lib.training import pick_device, progress_line

    scenes = len(rooms.scene_seeds(options.split)) if options.scenes is None else options.scenes
    prepared = RoomsStore(options.out / "data", options.split, scenes, options.views, *options.size, options.shading)
    store = prepared.open(progress_line(), pick_device(options.device))
    print(f"{prepared.folder}: {len(store)} frames, digest {store.digest[:16]}")


def _data_nyu_labelled(options: argparse.Namespace) -> None:
    from d3lib.data.download import fetch_labelled
    from d3lib.data.nyu import prepare_labelled
    from d3lib.training import progress_line

    progress = progress_line()
    file = fetch_labelled(options.download, progress) if options.download else options.file
    for store in prepare_labelled(file, options.out / "data", options.size, options.target, options.splits, progress):
        print(f"{store.path}: {len(store)} frames, digest {store.digest[:16]}")


def _data_nyu_raw(options: argparse.Namespace) -> int:
    from d3lib.data import raw
    from d3lib.data.nyu import training_directories

    recipe = raw.Recipe(options.frames, options.order, options.alpha, options.fill, options.lossless)
    folder = raw.folder_of(options.out / "data", recipe)
    if not 1 <= min(options.size) <= max(options.size) <= 2048:
        raise UserError(f"--size is {options.size[0]}x{options.size[1]}; each side must be 1 to 2048")
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers is {options.workers}; it must be at least 1")
    if options.profile is not None and (options.step or options.workers):
        raise UserError("--profile does every step, on all cores of its jobs; leave --step and --workers out")
    say = functools.partial(print, flush=True)
    if options.step in (None, "plan"):
        plan = raw.make_plan(options.archives, folder, recipe)
        say(f"{folder / 'plan.json'}: {plan['chosen']} of {plan['available']} synchronised pairs, "
            f"{len(plan['directories'])} directories, {len(plan['left_out'])} left out")  # fmt: skip
        if plan["present"] < len(training_directories()) and recipe.frames in raw.SET_NAMES:
            say(f"warning: {plan['present']} of the {len(training_directories())} training directories are in these "
                f"archives, so this is not the paper's {raw.SET_NAMES[recipe.frames]}")  # fmt: skip
    if options.profile is not None:
        from d3lib.batch import process_archives

        return process_archives(options.archives, recipe, options.size, options.out, options.profile)
    if options.step in (None, "process"):
        # of a plan with other archives too, a cluster's job does its own alone
        done = raw.process(folder, archives=options.archives, workers=options.workers, progress=say)
        print(f"{folder}: {done['written']} frames, {len(done['skipped'])} skipped, {done['bytes'] / 1e6:.0f} MB")
        for row in done["skipped"][:9]:
            print(f"  skipped {row['frame']}: {row['reason']}")
    if options.step in (None, "store"):
        target = raw.store_of(options.out / "data", recipe, options.size)
        store = raw.make_store(folder, target, options.size, say)
        print(f"{target}: {len(store)} frames, digest {store.digest[:16]}")
    return 0


def _data_folds(options: argparse.Namespace) -> None:
    from d3lib.data.folder import write_folds

    sizes = write_folds(options.pictures, options.to, options.folds, options.apart)
    print(f"{options.to}: {len(sizes)} folds of {', '.join(map(str, sizes))} pairs")


def _data_verify(options: argparse.Namespace) -> None:
    from d3lib.data.shards import open_store

    store = open_store(options.store)
    store.verify()
    print(f"{options.store}: {len(store)} frames, every digest matches")


def _train(options: argparse.Namespace) -> None:
    from d3lib.distributed import started
    from d3lib.execution import execute
    from d3lib.records import model_card
    from d3lib.training import progress_line

    if options.gpus is None and not options.run and started() > 1:
        options.gpus = started()
    run = _run_of(options)
    if options.run:
        given = [f.name for f in dataclasses.fields(Run) if getattr(options, f.name) is not None]
        if given:
            raise UserError(f"--run names every field of a run; leave --{given[0].replace('_', '-')} out")
        run = find_run(options.run, options.pictures and str(options.pictures.resolve()))
    out = options.out / run.budget
    data = options.data_root or options.out / "data"
    record = execute(run, out, data, device=options.device, progress=progress_line())
    if record:  # of several processes, the first has it
        print(f"\n{model_card(record)}\nrecord: {out / run.key / 'record.json'}")


def _evaluate(options: argparse.Namespace) -> None:
    from d3lib.evaluation import load_network
    from d3lib.results import text_table
    from d3lib.scoring import score_weights

    made = load_network(options.weights)[1]
    for name in ("height", "width"):  # evaluate at the size the network was trained at, unless told otherwise
        if getattr(options, name) is None:
            setattr(options, name, int(made[name]))
    run = _run_of(options)
    out = options.out / run.budget
    print(text_table(score_weights(options.weights, run, options.out / "data", out, device=options.device)))


def _predict(options: argparse.Namespace) -> None:
    from d3lib.predict import choose_weights, parse_intrinsics, predict_picture

    weights = options.weights or choose_weights(options.out)
    intrinsics = parse_intrinsics(options.intrinsics) if options.intrinsics else None
    for path in predict_picture(options.image, weights, options.to, intrinsics, options.device):
        print(path)


def _reproduce(options: argparse.Namespace) -> int:
    from d3lib.batch import reproduce, work_through

    places = {"out": options.out, "data_root": options.data, "pictures": options.pictures, "only": options.only}
    if options.no_engine:
        if options.profile or options.prepare or options.dry_run or options.cores:
            raise UserError("--no-engine knows no --profile, --prepare, --dry-run or --cores; leave them out")
        if options.minutes <= 0 or (options.jobs is not None and options.jobs < 1):
            raise UserError("--minutes and --jobs must be positive")
        limits = {"minutes": options.minutes, "jobs": options.jobs, "device": options.device}
        return work_through(options.budget, **places, **limits, go_on=options.go_on)
    if options.jobs or options.minutes != math.inf or options.device != "auto" or options.go_on:
        names = "--jobs, --minutes, --device and --go-on"
        raise UserError(f"{names} go with --no-engine; the engine takes --cores or --profile")
    engine = {"cores": options.cores, "dry_run": options.dry_run, "prepare": options.prepare}
    return reproduce(options.budget, **places, **engine, profile=options.profile)


def _status(options: argparse.Namespace) -> None:
    from d3lib.results import comparison_text, status_text

    print(status_text(options.budget, options.out, options.only, options.all))
    if options.table:
        print(comparison_text(options.budget, options.out))


def _keep(options: argparse.Namespace) -> None:
    from d3lib.artefacts import atomic_write
    from d3lib.records import BOOK, PICTURES, State, keep_pictures, keep_records, published, read_record
    from d3lib.results import runs_of
    from d3lib.scoring import baselines_path

    place, runs = options.out / options.budget, runs_of(options.budget, options.out)
    done = [key for key in runs if State(place / key).read()[0] == "done"]
    if not done:
        raise UserError(f"{place}: no run of budget {options.budget} is done there; name another folder with --out")
    path = BOOK / f"{options.budget}.jsonl"
    count = keep_records((read_record(place / key / "record.json") for key in done), path)
    for run in runs.values():
        if (file := baselines_path(run, place)).is_file():
            with atomic_write(baselines_path(published(run), BOOK / options.budget)) as copy:
                copy.write(file.read_text(encoding="utf-8"))
    for key, run in runs_of(options.budget, options.out, "fig4").items():
        if run.seed == 0 and run.data == "rooms" and key in done:  # pictures of others are not ours to give away
            (BOOK / options.budget / key / PICTURES).unlink(missing_ok=True)  # of the record that this one replaces
            if (place / key / PICTURES).is_file():
                keep_pictures(place / key, BOOK / options.budget / key)
    print(f"{path}: {count} records, {len(done)} of them from {place}")


def _notebook(options: argparse.Namespace) -> None:
    from d3lib.notebooks import execute_notebook, read_parameters

    parameters = read_parameters(options.parameters, options.pairs)
    execute_notebook(options.source, options.target, parameters)
    print(options.target)


def _gate(options: argparse.Namespace) -> None:
    from d3lib.gate import measure_gate, write_gate
    from d3lib.training import progress_line

    run = _run_of(options)
    data = options.out / "data"
    if not options.record.parent.is_dir() or options.record.is_dir():
        raise UserError(f"{options.record}: cannot be written; name a file in a folder that exists")
    content = measure_gate(run, options.out / run.budget, data, device=options.device, progress=progress_line())
    write_gate(options.record, content)
    for name, value in content["measured"].items():
        print(f"{name:<10} {value:.3f}  {'passed' if content['outcome'][name] else 'not passed'}")


def _bench(options: argparse.Namespace) -> None:
    from d3lib.bench import bench

    bench(options.what, options.json, options.device)


if __name__ == "__main__":
    sys.exit(main())

"""What to run: one `Run` says everything that decides a result, a budget fills in its numbers, the manifest lists
the runs behind each figure and table. Nothing here computes anything; `d3lib.execution` does."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from d3lib.artefacts import digest_json
from d3lib.errors import UserError

LOSSES = ("l1", "l2", "eigen", "eigengrad", "berhu", "huber", "gan")
VARIANTS = ("paper", "released")
ENCODERS = ("densenet121", "resnet50", "resnet50_narrow", "tiny")
TRAIN_SETS = ("795", "12k", "230k")
PRECISIONS = ("auto", "float32", "bf16", "fp16")
POOLINGS = ("conv", "max")
OUTPUTS = ("linear", "log")
TARGETS = ("sensor", "filled", "exact")
WITH_LAMBDA = ("eigen", "eigengrad", "gan")


@dataclass(frozen=True)
class Budget:
    """One row of the budget table: the same code with other numbers. The defaults are those of a study on one GPU."""

    purpose: str  # one line for people
    views: Mapping[str, int]  # rooms: frames per scene of each nested training set
    data: str = "rooms"  # the data source the budget is meant for
    encoder: str = "densenet121"  # the main network's
    height: int = 256  # pixels
    width: int = 320  # pixels
    pretrained: bool = False  # start the encoder from ImageNet weights
    ndf: int = 64  # channels of the discriminator's first layer; the paper's is 64
    steps: int = 12000  # optimiser steps of one run of the main grid
    encoders: Mapping[str, int] = dataclasses.field(default_factory=dict)  # what is less where encoders are compared
    beyond: Mapping[str, int] = dataclasses.field(default_factory=dict)  # what is less in the runs beyond the paper
    side_losses: tuple[str, ...] = LOSSES  # the losses tried on other encoders and at other learning rates
    train_scenes: int = 249  # rooms: how many of the 249 training scenes
    val_scenes: int = 25  # rooms: how many of the 25 validation scenes
    test_scenes: int = 215  # rooms: how many of the 215 test scenes, and of the 215 unseen ones
    test_views: int = 1  # rooms: frames per validation, test and unseen scene
    evaluations: int = 20  # points on a learning curve
    seeds: int = 5  # paired seeds of the main grid
    beyond_seeds: int = 3  # of the runs beyond the paper
    learning_rate: float = 2e-4  # the paper's

    def frames(self, train_set: str) -> int:
        """How many frames the named nested training set of rooms has."""
        return self.train_scenes * self.views[train_set]


_TINY = {"encoder": "tiny", "height": 96, "width": 128}
_ONE_SEED = {"seeds": 1, "beyond_seeds": 1}
BUDGETS: Mapping[str, Budget] = types.MappingProxyType(
    {
        "drill": Budget(
            "CPU, a second a run: tests the machinery; the numbers mean nothing",
            views={"795": 1, "12k": 2, "230k": 3},
            encoder="tiny",
            height=32,
            width=48,
            ndf=8,
            steps=2,
            encoders={"steps": 1},
            beyond={"steps": 1, "evaluations": 2},
            train_scenes=4,
            val_scenes=2,
            test_scenes=3,
            evaluations=1,
            **_ONE_SEED,
        ),
        "smoke": Budget(
            "CPU, seconds a run: shows that everything works; ranks nothing",
            views={"795": 1, "12k": 4, "230k": 16},
            **_TINY,
            ndf=8,
            steps=64,
            encoders={"steps": 2, "height": 48, "width": 64, "evaluations": 1},
            beyond={"steps": 8, "evaluations": 2},
            side_losses=("l1", "eigen", "gan"),
            train_scenes=83,
            val_scenes=8,
            test_scenes=24,
            evaluations=4,
            **_ONE_SEED,
        ),
        "gate": Budget(
            "CPU, minutes a run: whether the rooms are fit for a study",
            views={"795": 1, "12k": 15, "230k": 15},
            **_TINY,
            ndf=16,
            steps=6000,
            evaluations=12,
            **_ONE_SEED,
        ),
        "laptop": Budget(
            "CPU, minutes a run, hours for the main grid: a study of the thin network that anyone can repeat",
            views={"795": 1, "12k": 15, "230k": 60},
            **_TINY,
            ndf=16,
            steps=2000,
            encoders={"steps": 400, "height": 48, "width": 64},
            evaluations=10,
            learning_rate=1e-3,
        ),
        "hour": Budget(
            "one large GPU, synthetic rooms at the paper's size: about an hour for the main grid",
            views={"795": 1, "12k": 4, "230k": 15},  # 2.1 GB: just what is kept in memory
            steps=2000,
            evaluations=10,
            seeds=3,
        ),
        "study": Budget(
            "one GPU, synthetic rooms: minutes a run that add up to the grid",
            views={"795": 1, "12k": 15, "230k": 290},
            test_views=2,
        ),
        "colab": Budget(
            "a free Colab GPU: under an hour a run",
            views={"795": 1, "12k": 15, "230k": 60},
            steps=4000,
            evaluations=10,
            **_ONE_SEED,
        ),
        "paper": Budget(
            "NYU Depth V2 at 256x320, a cluster: the full reproduction",
            views={"795": 3, "12k": 48, "230k": 924},
            data="nyu",
            pretrained=True,
            steps=350000,
            test_views=3,
            evaluations=50,
        ),
    }
)


def _doc(default: Any, meaning: str, choices: Iterable[str] = ()) -> Any:
    """A dataclass field: its one-line meaning, which the command line shows as its help, and its values if few."""
    return dataclasses.field(default=default, metadata={"help": meaning, "choices": tuple(choices)})


@dataclass(frozen=True)
class Run:
    """One training run: every hyperparameter. Two runs with equal fields give equal results on equal machines."""

    loss: str = _doc("l1", "which of the seven losses trains the network", LOSSES)
    variant: str = _doc("paper", "the loss as the paper prints it, or as the authors' code computes it", VARIANTS)
    pooled: bool = _doc(False, "eigen, eigengrad: form the sums over the batch instead of over each image")
    lam: float | None = _doc(None, "the loss's λ: eigen 0.5, eigengrad 1, gan 20 per metre of L1; None: that")
    adversarial_from: float = _doc(0.0, "gan: share of the steps that train with L1 alone, before D enters")
    encoder: str = _doc(
        "densenet121", "the front-end: densenet121, resnet50, resnet50_narrow, or tiny (small budgets)", ENCODERS
    )
    pretrained: bool = _doc(False, "start the encoder from ImageNet weights")
    skips: bool = _doc(True, "the decoder sees the encoder's features")
    pooling: str = _doc(
        "conv", "after the stem: conv, the paper's 4x4 convolution, or max, the encoder's own pooling", POOLINGS
    )
    output: str = _doc("linear", "what the last layer stands for: depth (linear) or its logarithm (log)", OUTPUTS)
    init: str = _doc("", "start from these weights: a file (safetensors), or run:KEY of the same batch; empty for none")
    train_set: str = _doc("12k", "795, 12k or 230k; on rooms: the nested set that stands for it", TRAIN_SETS)
    scenes: int = _doc(0, "rooms: the same number of frames from so many scenes; 0: from all of the budget's")
    target: str = _doc(
        "sensor", "train on the sensor's depth where valid, on it filled, or (rooms) on exact depth", TARGETS
    )
    data: str = _doc("rooms", "rooms, nyu, or folder:PATH")
    hold_out: int = _doc(0, "folder data: hold the last so many pairs (by time) out as the test set")
    budget: str = _doc("smoke", "the row of the budget table that the other numbers come from", BUDGETS)
    seed: int = _doc(0, "initial weights, data order, flips")
    height: int = _doc(256, "training and evaluation height, pixels")
    width: int = _doc(320, "training and evaluation width, pixels")
    max_depth: float = _doc(10.0, "the network's output range ends here, metres")
    steps: int = _doc(20000, "optimiser steps")
    batch_size: int = _doc(8, "images a step")
    learning_rate: float = _doc(2e-4, "Adam's, constant")
    beta1: float = _doc(0.5, "Adam's first-moment decay")
    beta2: float = _doc(0.999, "Adam's second-moment decay")
    clip_norm: float = _doc(0.0, "scale gradients down to this norm where they are larger; 0, as in the paper: never")
    ndf: int = _doc(64, "gan: channels of the discriminator's first layer (smoke: a thin one)")
    precision: str = _doc("auto", "float32, bf16, fp16, or auto: the best the device has natively", PRECISIONS)
    gpus: int = _doc(1, "processes that share each step's batch, one a GPU")
    evaluations: int = _doc(20, "points on the learning curve")

    def __post_init__(self) -> None:
        """Raise `UserError` for a value of the wrong type or outside its choices."""
        for name, kind in _kinds().items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), kind))
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if choices and value not in choices:
                raise UserError(f"{field.name} {value!r} is unknown; choose one of {', '.join(choices)}")
        if self.data not in ("rooms", "nyu") and not self.data.startswith("folder:"):
            raise UserError(f"data {self.data!r} is unknown; choose rooms, nyu or folder:PATH")
        for name in ("height", "width"):
            if not 32 <= getattr(self, name) <= 4096:
                raise UserError(f"{name} is {getattr(self, name)}; it must lie between 32 and 4096 pixels")
        for name in ("steps", "batch_size", "evaluations", "ndf", "learning_rate", "max_depth", "gpus"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")
        if self.seed >= 2**63:
            raise UserError(f"seed is {self.seed}; it must be below 2**63")
        if self.batch_size % self.gpus:
            raise UserError(f"batch_size {self.batch_size} cannot be shared by {self.gpus} gpus; choose a multiple")
        if self.batch_size // self.gpus * (self.height // 32) * (self.width // 32) < 2:
            raise UserError("one image at 32x32 leaves batch normalisation one value a channel; raise either")
        for name in ("seed", "hold_out", "lam", "scenes", "clip_norm"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must not be negative")
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Refuse what would be ignored: a run must not claim a setting that had no effect."""
        if not 0 <= self.adversarial_from < 1 or (self.adversarial_from and self.loss != "gan"):
            raise UserError(f"adversarial_from is {self.adversarial_from}; it is a share in [0, 1) of gan's steps")
        if self.lam is not None and (self.loss not in WITH_LAMBDA or (self.loss != "gan" and self.variant != "paper")):
            raise UserError(f"loss {self.loss} ({self.variant}) has no lam; leave it out")
        if self.pooled and (self.loss not in ("eigen", "eigengrad") or self.variant != "paper"):
            raise UserError(f"loss {self.loss} ({self.variant}) has no pooled form; eigen and eigengrad have")
        targets = {"rooms": TARGETS, "nyu": ("filled", "sensor")}.get(self.data, ("sensor",))
        if self.target not in targets or (self.scenes and self.data != "rooms"):
            raise UserError(f"data {self.data}: target must be {' or '.join(targets)}; scenes is for rooms alone")
        if self.scenes > BUDGETS[self.budget].train_scenes:
            raise UserError(f"scenes is {self.scenes}; budget {self.budget} has {BUDGETS[self.budget].train_scenes}")

    @functools.cached_property
    def key(self) -> str:
        """The run's folder name: what a person looks for, then a digest of every field that tells runs apart."""
        loss = self.loss if self.variant == "paper" else f"{self.loss}-{self.variant}"
        train_set = self.train_set if self.data in ("rooms", "nyu") else "folder"
        return f"{loss}-{train_set}-{self.encoder}-s{self.seed}-{digest_json(dataclasses.asdict(self))[:8]}"

    @property
    def images(self) -> int:
        """How many images the run sees, counting repeats."""
        return self.steps * self.batch_size


@functools.cache
def _kinds() -> dict[str, Any]:
    """The annotation of each field of a run."""
    return typing.get_type_hints(Run)


def plain_kind(kind: Any) -> type:
    """The type behind a field's annotation: `float` for `float | None`."""
    return next(part for part in (typing.get_args(kind) or (kind,)) if part is not type(None))


def _checked(name: str, value: Any, kind: Any) -> Any:
    """`value` if it is of the field's type (an int passes for a float), else a `UserError`."""
    if value is None and type(None) in typing.get_args(kind):
        return None
    kind = plain_kind(kind)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value}; it must be a finite number")
    if type(value) is not kind:
        raise UserError(f"{name} must be {kind.__name__}, not {value!r} ({type(value).__name__})")
    return value


def make_run(budget: str, **fields: Any) -> Run:
    """A `Run` with the budget's numbers, overridden by `fields` (a field that is `None` keeps the budget's number).

    Raises `UserError` for an unknown budget or field name, or a value of the wrong type.
    """
    if not isinstance(budget, str) or budget not in BUDGETS:
        raise UserError(f"budget {budget!r} is unknown; choose one of {', '.join(BUDGETS)}")
    row = BUDGETS[budget]
    names = [field.name for field in dataclasses.fields(Run)]
    for name in fields:
        if name not in names:
            raise UserError(f"a run has no parameter {name!r}; it has {', '.join(names)}")
    numbers = {name: getattr(row, name) for name in names if hasattr(row, name)}
    given = {name: value for name, value in fields.items() if value is not None}
    numbers["target"] = "filled" if given.get("data", row.data) == "nyu" else "sensor"  # NYU: as in the paper
    return Run(**{**numbers, **given, "budget": budget})


FIGURE_PAGES = ("fig2", "fig3", "fig4", "fig5", "table2", "beyond", "real", "claims", "results")
"""The notebooks in `book/experiments` that draw figures and tables from records; each takes the parameter `budget`."""
FOLDS = 5  # of a folder of real pictures, each the test set in its turn (see `d3lib.data.folder.write_folds`)
LONGER = 4  # times the steps of a CPU's study, to see what its runs would still have learnt
LONGER_ENCODERS = 3  # the same for its large encoders
TRANSFER_STEPS = 500  # on a few real pictures, each of which is seen dozens of times
OVERVIEWS = ("claims", "results")  # the pages that read every run


@dataclass(frozen=True)
class Item:
    """A figure or table of the paper, or a question beyond it, and the runs that stand behind it."""

    name: str  # fig2, table2, rate, ...
    question: str  # what it asks, in one line
    runs: tuple[Run, ...]
    page: str = "beyond"  # the name of the page in `FIGURE_PAGES` that shows it
    also: str = ""  # another page that reads its runs

    @property
    def beyond(self) -> bool:
        """Whether the paper does not have it: each run differs in one thing from one of another item."""
        return self.page == "beyond"


@functools.lru_cache(maxsize=32)  # pages ask for the same ones dozens of times
def manifest(budget: str, data: str | None = None, pictures: str | None = None) -> Mapping[str, Item]:
    """The runs behind each figure, table and question at the given budget; one run may serve several.

    Args:
        data: take the budget's runs on this data source instead of its own (rooms where NYU is absent).
        pictures: a folder of the folds of real RGB-D pairs; with it comes the question of transfer to them.

    The order is that of what they teach per hour of computing: the main grid, then Figure 5, then what the paper lacks.
    Those without a run are left out.
    """
    row = BUDGETS[make_run(budget).budget]

    def runs(losses: Iterable[str], sizes: Iterable[str] = ("12k",), **fields: Any) -> tuple[Run, ...]:
        return tuple(
            make_run(budget, loss=loss, train_set=size, seed=seed, data=data, **{**row.beyond, **fields})
            for seed in range(row.beyond_seeds)
            for size in sizes
            for loss in losses
        )

    grid = tuple(
        make_run(budget, loss=loss, train_set=size, seed=seed, data=data)
        for seed in range(row.seeds)
        for size in TRAIN_SETS
        for loss in LOSSES
    )
    largest = tuple(run for run in grid if run.train_set == "230k")
    encoders = tuple(
        make_run(budget, loss=loss, train_set="12k", encoder=encoder, seed=seed, data=data, **row.encoders)
        for seed in range(row.seeds)
        for encoder in ("densenet121", "resnet50")
        for loss in row.side_losses
    )
    decoders = tuple(
        dataclasses.replace(run, encoder="resnet50_narrow")
        for run in encoders
        if run.encoder == "resnet50" and run.loss in ("l1", "eigen", "gan")
    )
    beyond_steps = row.beyond.get("steps", row.steps)
    equal_epochs = max(1, round(beyond_steps * row.views["795"] / row.views["12k"]))
    real = data or row.data
    parts = [math.ceil(row.train_scenes * share) for share in (0.25, 0.5, 0.75)]
    fewer = [n for n in parts if real == "rooms" and row.frames("12k") <= n * max(row.views.values())][:2]
    items = [
        Item("fig2", "How do error and accuracy change with the loss and the training-set size?", grid, "fig2"),
        Item("fig3", "How fast does each loss converge on each training set?", grid, "fig3"),
        Item("fig4", "What do the seven losses make of the same pictures?", largest, "fig4"),
        Item("fig5", "Does the ranking of losses hold with another encoder?", encoders, "fig5"),
        Item("table2", "Where does the best network stand among published ones?",
             tuple(run for run in largest if run.loss == "gan"), "table2"),
        Item("reference", "The runs that the following are compared with", runs(LOSSES)),
        Item("released", "Does the authors' code, as released, train another network than the paper's equations?",
             runs(("eigen", "eigengrad", "huber", "gan"), variant="released")),
        Item("pooled", "Does it matter that eigen is formed per image and not over the batch?",
             runs(("eigen",), pooled=True)),
        Item("rate", "Does one learning rate for all losses favour one of them?",
             tuple(run for factor in (0.5, 2)
                   for run in runs(row.side_losses, learning_rate=factor * row.learning_rate))),
        Item("lam_gan", "How much L1 does the adversarial loss need?",
             tuple(run for lam in (0.0, 2.0, 200.0) for run in runs(("gan",), lam=lam))),
        Item("lam_eigen", "How much scale invariance is good?",
             tuple(run for lam in (0.0, 0.25, 1.0) for run in runs(("eigen",), lam=lam))),
        Item("phases", "Is one phase enough, or should L1 come first?", runs(("gan",), adversarial_from=0.5)),
        Item("epochs", "Equal steps or equal epochs: what if the small set is seen no more often than the middle one?",
             runs(("l1", "eigen", "gan"), ("795",), steps=equal_epochs)),
        Item("longer", f"Are the runs too short: what do {LONGER} times the steps on the largest set change?",
             runs(("l1", "eigen", "gan"), ("230k",), steps=LONGER * row.steps, evaluations=LONGER * row.evaluations)
             if row.encoder == "tiny" and not row.beyond else ()),
        Item("skips", "Do the skip connections help?", runs(("l1",), skips=False)),
        Item("pooling", "Does the 4x4 convolution replace max-pooling well?", runs(("l1",), pooling="max")),
        Item("output", "Should the network say depth or its logarithm?", runs(("l1", "eigen"), output="log")),
        Item("target", "What if training counts against filled, measured or exact depth?",
             tuple(run for target in (("sensor",) if real == "nyu" else ("filled", "exact"))
                   for run in runs(("l1", "l2"), target=target))),
        Item("scenes", "As many frames from fewer scenes: what makes a training set large?",
             tuple(run for count in fewer for run in runs(("l1",), scenes=count))),
        Item("decoder", "Is it the encoder or the wider decoder that tells ResNet-50 from DenseNet-121?", decoders,
             also="fig5"),
        Item("encoders", f"Are the encoders' runs too short: what do {LONGER_ENCODERS} times their steps change?",
             tuple(dataclasses.replace(run, steps=LONGER_ENCODERS * run.steps)
                   for run in (*encoders, *decoders) if run.seed == 0 and run.loss in ("l1", "eigen"))
             if row.encoders.get("steps", row.steps) < row.steps and not row.beyond else (), also="fig5"),
        Item("transfer", "Does a network trained on the batch's data learn real pictures better than a new one?",
             _transfer(grid, pictures, beyond_steps) if pictures else (), "real"),
        Item("pretraining", "What do ImageNet weights bring?",
             runs(("l1", "gan"), pretrained=not row.pretrained) if row.encoder != "tiny" else ()),
    ]  # fmt: skip
    return types.MappingProxyType({item.name: item for item in items if item.runs})  # some make no sense on some data


def _transfer(grid: Iterable[Run], pictures: str, steps: int) -> tuple[Run, ...]:
    """Runs on real pictures, from random weights and from those of the middle set's first run of the same loss.

    What repeats here is the fold: other pictures to learn from, others to be tested on.
    """
    before = [run for run in grid if (run.train_set, run.seed) == ("12k", 0) and run.loss in ("l1", "eigen", "gan")]
    shared = {"target": "sensor", "pretrained": False, "steps": min(steps, TRANSFER_STEPS), "evaluations": 5}
    return tuple(
        dataclasses.replace(run, init=init, data=f"folder:{pictures}/fold-{fold}", **shared)
        for fold in range(1, FOLDS + 1)
        for run in before
        for init in ("", f"run:{run.key}")
    )


def all_runs(
    budget: str, only: str | None = None, data: str | None = None, pictures: str | None = None
) -> dict[str, Run]:
    """The budget's runs by key, each once, in the manifest's order; `only` keeps those of one item or of one page.

    Raises `UserError` for an unknown item.
    """
    items = manifest(budget, data, pictures)
    chosen = items.values() if only in (None, *OVERVIEWS) else [i for i in items.values() if only in (i.name, i.page)]
    if only in ("transfer", "real") and not pictures:
        raise UserError(f"{only!r} is about real pictures; name a folder of their folds with --pictures")
    if not chosen:
        names = dict.fromkeys([*items, *FIGURE_PAGES])
        raise UserError(f"there is no figure or table {only!r}; choose one of {', '.join(names)}")
    return {run.key: run for item in chosen for run in item.runs}


def runs_to_do(
    budget: str, only: str | None = None, data: str | None = None, pictures: str | None = None
) -> dict[str, Run]:
    """The runs of `all_runs`, and before them those whose weights some of them start from."""
    runs = all_runs(budget, only, data, pictures)
    every = all_runs(budget, None, data, pictures)
    starts = (run.init.removeprefix("run:") for run in runs.values() if run.init.startswith("run:"))
    return {key: every[key] for key in starts} | runs


def pages_of(
    budget: str, only: str | None = None, data: str | None = None, pictures: str | None = None
) -> dict[str, list[str]]:
    """The pages that show the budget's runs, or those of `only`, each with the keys of the runs it reads."""
    items = manifest(budget, data, pictures).values()
    pages = {page for item in items if only in (None, item.name, item.page) for page in (item.page, item.also)}
    pages |= {name for name in OVERVIEWS if only in (None, name)}
    found = {name: all_runs(budget, name, data, pictures) for name in FIGURE_PAGES if name in pages}
    for item in items:
        if item.also in found:
            found[item.also] |= {run.key: run for run in item.runs}
    return {name: list(runs) for name, runs in found.items()}


def find_run(key: str, pictures: str | None = None) -> Run:
    """The run of any budget's manifest with this key. Raises `UserError` if there is none."""
    for budget, row in BUDGETS.items():
        for data in dict.fromkeys((row.data, "rooms")):  # rooms stand in for NYU where it is absent
            if run := all_runs(budget, data=data, pictures=pictures).get(key):
                return run
    raise UserError(f"no budget has a run {key!r}; `d3lib status --budget B --all` lists a budget's runs")

"""What to run: one `Run` says everything that decides a result, a budget fills in its numbers, the manifest lists
the runs behind each figure and table. Nothing here computes anything; `d3lib.execution` does."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from d3lib.artefacts import digest_json
from d3lib.errors import UserError

LOSSES = ("l1", "l2", "eigen", "eigengrad", "berhu", "huber", "gan")
VARIANTS = ("paper", "released")
ENCODERS = ("densenet121", "resnet50", "tiny")
TRAIN_SETS = ("795", "12k", "230k")
PRECISIONS = ("auto", "float32", "bf16", "fp16")


def _doc(default: Any, meaning: str) -> Any:
    """A dataclass field whose one-line meaning the command line shows as its help."""
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Run:
    """One training run: every hyperparameter. Two runs with equal fields give equal results on equal machines."""

    loss: str = _doc("l1", "which of the seven losses trains the network")
    variant: str = _doc("paper", "the loss as the paper prints it, or as the authors' code computes it")
    encoder: str = _doc("densenet121", "the front-end: densenet121, resnet50, or tiny (smoke budgets)")
    pretrained: bool = _doc(False, "start the encoder from ImageNet weights")
    init: str = _doc("", "start the whole network from this weights file (safetensors); empty for none")
    train_set: str = _doc("12k", "795, 12k or 230k; on rooms: the nested set that stands for it")
    data: str = _doc("rooms", "rooms, nyu, or folder:PATH")
    hold_out: int = _doc(0, "folder data: hold the last so many pairs (by time) out as the test set")
    budget: str = _doc("smoke", "the row of the budget table that the other numbers come from")
    seed: int = _doc(0, "initial weights, data order, flips")
    height: int = _doc(256, "training and evaluation height, pixels")
    width: int = _doc(320, "training and evaluation width, pixels")
    max_depth: float = _doc(10.0, "the network's output range ends here, metres")
    steps: int = _doc(20000, "optimiser steps")
    batch_size: int = _doc(8, "images a step")
    learning_rate: float = _doc(2e-4, "Adam's, constant")
    beta1: float = _doc(0.5, "Adam's first-moment decay")
    beta2: float = _doc(0.999, "Adam's second-moment decay")
    lam: float = _doc(20.0, "gan: weight of the L1 term, per metre")
    ndf: int = _doc(64, "gan: channels of the discriminator's first layer (smoke: a thin one)")
    precision: str = _doc("auto", "float32, bf16, fp16, or auto: the best the device has natively")
    evaluations: int = _doc(20, "points on the learning curve")

    def __post_init__(self) -> None:
        """Raise `UserError` for a value of the wrong type or outside its choices."""
        for name, kind in typing.get_type_hints(Run).items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), kind))
        choices = {
            "loss": LOSSES,
            "variant": VARIANTS,
            "encoder": ENCODERS,
            "train_set": TRAIN_SETS,
            "budget": tuple(BUDGETS),
            "precision": PRECISIONS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}")
        if self.data not in ("rooms", "nyu") and not self.data.startswith("folder:"):
            raise UserError(f"data {self.data!r} is unknown; choose rooms, nyu or folder:PATH")
        for name in ("height", "width"):
            if not 32 <= getattr(self, name) <= 4096:
                raise UserError(f"{name} is {getattr(self, name)}; it must lie between 32 and 4096 pixels")
        for name in ("steps", "batch_size", "evaluations", "ndf", "learning_rate", "max_depth"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")
        if self.seed >= 2**63:
            raise UserError(f"seed is {self.seed}; it must be below 2**63")
        if self.batch_size * (self.height // 32) * (self.width // 32) < 2:
            raise UserError("batch_size 1 at 32x32 leaves batch normalisation one value a channel; raise either")
        for name in ("seed", "hold_out", "lam"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must not be negative")

    @property
    def key(self) -> str:
        """The run's folder name: what a person looks for, then a digest of every field that tells runs apart."""
        parts = [self.loss if self.variant == "paper" else f"{self.loss}-{self.variant}"]
        parts += [
            self.train_set if self.data in ("rooms", "nyu") else "folder",
            self.encoder,
            f"s{self.seed}",
        ]
        return "-".join([*parts, digest_json(dataclasses.asdict(self))[:8]])

    @property
    def images(self) -> int:
        """How many images the run sees, counting repeats."""
        return self.steps * self.batch_size


def _checked(name: str, value: Any, kind: Any) -> Any:
    """`value` if it is of the field's type (an int passes for a float), else a `UserError`."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value}; it must be a finite number")
    if type(value) is not kind:
        raise UserError(f"{name} must be {kind.__name__}, not {value!r} ({type(value).__name__})")
    return value


@dataclass(frozen=True)
class Budget:
    """One row of the budget table: the same code with other numbers."""

    data: str  # the data source the budget is meant for
    encoder: str  # the main network's encoder
    height: int  # pixels
    width: int  # pixels
    pretrained: bool  # start the encoder from ImageNet weights
    ndf: int  # channels of the discriminator's first layer; the paper's is 64
    steps: int  # optimiser steps of one run
    encoder_steps: int  # optimiser steps of the runs that compare encoders
    train_scenes: int  # rooms: how many of the 249 training scenes
    views: Mapping[str, int]  # rooms: frames per scene of each nested training set
    val_scenes: int  # rooms: how many of the 25 validation scenes
    test_scenes: int  # rooms: how many of the 215 test scenes, and of the 215 unseen ones
    test_views: int  # rooms: frames per validation, test and unseen scene
    evaluations: int  # points on a learning curve
    seeds: int  # paired seeds of the main grid
    purpose: str  # one line for people

    def frames(self, train_set: str) -> int:
        """How many frames the named nested training set of rooms has."""
        return self.train_scenes * self.views[train_set]


BUDGETS: Mapping[str, Budget] = types.MappingProxyType(
    {
        "drill": Budget(
            data="rooms",
            encoder="tiny",
            height=32,
            width=48,
            pretrained=False,
            ndf=8,
            steps=2,
            encoder_steps=1,
            train_scenes=4,
            views={"795": 1, "12k": 2, "230k": 3},
            val_scenes=2,
            test_scenes=3,
            test_views=1,
            evaluations=1,
            seeds=1,
            purpose="CPU, a second a run: tests the machinery; the numbers mean nothing",
        ),
        "smoke": Budget(
            data="rooms",
            encoder="tiny",
            height=96,
            width=128,
            pretrained=False,
            ndf=16,
            steps=128,
            encoder_steps=2,
            train_scenes=83,
            views={"795": 1, "12k": 4, "230k": 16},
            val_scenes=12,
            test_scenes=48,
            test_views=1,
            evaluations=4,
            seeds=1,
            purpose="CPU, seconds a run: shows that everything works; ranks nothing",
        ),
        "gate": Budget(
            data="rooms",
            encoder="tiny",
            height=96,
            width=128,
            pretrained=False,
            ndf=16,
            steps=6000,
            encoder_steps=6000,
            train_scenes=249,
            views={"795": 1, "12k": 15, "230k": 15},
            val_scenes=25,
            test_scenes=215,
            test_views=1,
            evaluations=12,
            seeds=1,
            purpose="CPU, minutes a run: whether the rooms are fit for a study",
        ),
        "study": Budget(
            data="rooms",
            encoder="densenet121",
            height=256,
            width=320,
            pretrained=False,
            ndf=64,
            steps=12000,
            encoder_steps=12000,
            train_scenes=249,
            views={"795": 1, "12k": 15, "230k": 290},
            val_scenes=25,
            test_scenes=215,
            test_views=2,
            evaluations=20,
            seeds=5,
            purpose="one GPU, synthetic rooms: minutes a run that add up to the grid",
        ),
        "colab": Budget(
            data="rooms",
            encoder="densenet121",
            height=256,
            width=320,
            pretrained=False,
            ndf=64,
            steps=4000,
            encoder_steps=4000,
            train_scenes=249,
            views={"795": 1, "12k": 15, "230k": 60},
            val_scenes=25,
            test_scenes=215,
            test_views=1,
            evaluations=10,
            seeds=1,
            purpose="a free Colab GPU: under an hour a run",
        ),
        "paper": Budget(
            data="nyu",
            encoder="densenet121",
            height=256,
            width=320,
            pretrained=True,
            ndf=64,
            steps=350000,
            encoder_steps=350000,
            train_scenes=249,
            views={"795": 3, "12k": 48, "230k": 924},
            val_scenes=25,
            test_scenes=215,
            test_views=3,
            evaluations=50,
            seeds=5,
            purpose="NYU Depth V2 at 256x320, a cluster: the full reproduction",
        ),
    }
)


def make_run(budget: str, **fields: Any) -> Run:
    """A `Run` with the budget's numbers, overridden by `fields` (a field that is `None` keeps the budget's number).

    Raises `UserError` for an unknown budget or field name, or a value of the wrong type.
    """
    if budget not in BUDGETS:
        raise UserError(f"budget {budget!r} is unknown; choose one of {', '.join(BUDGETS)}")
    row = BUDGETS[budget]
    names = [field.name for field in dataclasses.fields(Run)]
    for name in fields:
        if name not in names:
            raise UserError(f"a run has no parameter {name!r}; it has {', '.join(names)}")
    numbers = {
        name: getattr(row, name) for name in ("encoder", "height", "width", "ndf", "steps", "evaluations", "data")
    }
    given = {name: value for name, value in fields.items() if value is not None}
    return Run(**{**numbers, **given, "budget": budget})


FIGURE_PAGES: Mapping[str, str] = types.MappingProxyType({"fig2": "experiments/results.md"})
"""The notebook that draws each figure, below `book/`; each takes the parameter `budget`."""


@dataclass(frozen=True)
class Item:
    """A figure or table of the paper and the runs that stand behind it."""

    name: str  # fig2, fig5, ...
    title: str
    runs: tuple[Run, ...]


def manifest(budget: str) -> dict[str, Item]:
    """The runs behind each figure and table at the given budget; one run may serve several."""
    row = BUDGETS[budget] if budget in BUDGETS else make_run(budget)
    seeds = range(row.seeds)
    grid = [
        make_run(budget, loss=loss, train_set=size, seed=s) for s in seeds for size in TRAIN_SETS for loss in LOSSES
    ]
    return {
        "fig2": Item("fig2", "RMSE and accuracy of seven losses on three training-set sizes", tuple(grid)),
        "fig5": Item(
            "fig5",
            "Both encoders, a few steps" if row.encoder == "tiny" else "Seven losses with two encoders",
            tuple(_encoder_runs(budget, row)),
        ),
    }


def _encoder_runs(budget: str, row: Budget) -> list[Run]:
    """The runs that compare encoders; at a small budget one loss each, enough to show that both networks train."""
    short = row.encoder == "tiny"
    losses = ("l1",) if short else LOSSES
    few = {"steps": row.encoder_steps, "evaluations": 1 if short else row.evaluations}
    return [
        make_run(budget, loss=loss, train_set="12k", encoder=encoder, seed=seed, **few)
        for seed in range(row.seeds)
        for encoder in ("densenet121", "resnet50")
        for loss in losses
    ]


def all_runs(budget: str, only: str | None = None) -> dict[str, Run]:
    """The budget's runs by key, each once; `only` keeps those of one item. Raises `UserError` for an unknown item."""
    items = manifest(budget)
    if only is not None and only not in items:
        raise UserError(f"there is no figure or table {only!r}; choose one of {', '.join(items)}")
    wanted = items.values() if only is None else [items[only]]
    return {run.key: run for item in wanted for run in item.runs}

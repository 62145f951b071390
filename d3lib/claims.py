"""The paper's claims, each with a rule fixed before any run, and what the paper's numbers and ours say about it.

A claim is a list of comparisons: one cell of the study (a loss on a training set, perhaps with one setting changed)
is said to have a lower or higher value of something measured than other cells. The rule is the same for every claim:

- **supported**: every comparison is separated in the direction that the paper claims (for Table 2: more than half);
- **contradicted**: one is separated in the other direction (Table 2: so many that half can no longer be passed);
- **not separated**: neither, though all could be made;
- **not tested**: a comparison lacks runs, the budget is too short, or the data do not bear on the claim.

A comparison is *separated* if the t test over paired seeds says so after Holm's correction within the claim's family
(adjusted p < 0.05), and, where records hold sums by scene, a bootstrap over test scenes leaves 0 out on the same side.
Comparisons that lack runs count in the correction as well: the rule does not loosen while runs come in.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d3lib.experiments import BUDGETS, LOSSES, TRAIN_SETS, make_run
from d3lib.intervals import (
    Interval,
    area_under,
    bootstrap_scenes,
    converged,
    holm,
    images_to_reach,
    last_fifth,
    spread_interval,
    t_interval,
)
from d3lib.records import is_current
from d3lib.results import QUICK, paper_numbers, score

Record = Mapping[str, Any]

ALPHA = 0.05
MIN_SEEDS, FULL_SEEDS = 3, 5  # paired seeds: a preview, and a full test
ENOUGH = 0.02  # "as good as": at most 2 % worse
PATCH = 34  # pixels that one score of the discriminator sees
GAN_SIZE = (256, 320)  # claims about gan come from pictures of this size or larger
# what may differ between runs that stand for the same cell
FREE = ("seed", "precision", "gpus", "evaluations", "height", "width", "hold_out", "budget", "data")


@dataclass(frozen=True)
class Measure:
    """Something measured in a record."""

    text: str
    unit: str
    read: Callable[[Record], float | None]  # `None` where a record lacks it


def _score(name: str) -> Callable[[Record], float | None]:
    def read(record: Record) -> float | None:
        try:
            return score(record, name)
        except KeyError:
            return None

    return read


def _detail(name: str) -> Callable[[Record], float | None]:
    return lambda record: (record.get("details") or {}).get(name)


def _small_residuals(record: Record) -> float | None:
    near, small = _detail("share_1cm")(record), _detail("share_10cm")(record)
    return None if near is None or small is None else small - near


def _gap(record: Record) -> float | None:
    points = [p for p in last_fifth(record["curve"]) if p.get("d_real") is not None and p.get("d_fake") is not None]
    return statistics.fmean(p["d_real"] - p["d_fake"] for p in points) if points else None


MEASURES: Mapping[str, Measure] = {
    "rms": Measure("RMSE", "m", _score("rms")),
    "rel": Measure("abs rel", "", _score("rel")),
    "d1": Measure("δ < 1.25", "", _score("d1")),
    **{name: Measure(name, "", _score(name)) for name in ("log10", "rmslog", "d2", "d3")},
    "images": Measure("images to come within 5 % of its best", "", lambda r: images_to_reach(r["curve"])),
    "area": Measure("RMSE averaged over training", "m", lambda r: area_under(r["curve"])),
    "gradient": Measure("gradient ratio", "", _detail("gradient_ratio")),
    "spectrum": Measure("high-frequency power ratio", "", _detail("spectrum_high")),
    "edges": Measure("F1 of depth edges", "", _detail("edge_f1")),
    "boundary": Measure("depth boundary error", "px", _detail("dbe_acc")),
    "near": Measure("share of errors below 1 cm", "", _detail("share_1cm")),
    "small": Measure("share of errors from 1 to 10 cm", "", _small_residuals),
    "gap": Measure("D(real) - D(fake) at the end", "", _gap),
}


@dataclass(frozen=True)
class Cell:
    """A cell of the study: runs of the budget's own settings but for what is named here, of any seed.

    Where an encoder is named, the settings are those that the budget has for comparing encoders.
    """

    loss: str
    train_set: str = "12k"
    changed: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return ", ".join([f"{self.loss} at {self.train_set}", *(f"{name} {value}" for name, value in self.changed)])

    def holds(self, run: Mapping[str, Any]) -> bool:
        """Whether a record's `run` is one of this cell; fields that an older record lacks have their defaults."""
        own = _own_settings(run["budget"], run["data"], "encoder" in dict(self.changed))
        wanted = own | {"loss": self.loss, "train_set": self.train_set} | dict(self.changed)
        return {name: run.get(name, own[name]) for name in own} == wanted


@functools.cache
def _own_settings(budget: str, data: str, of_encoders: bool) -> dict[str, Any]:
    """A budget's settings, less those that may differ within a cell."""
    fields = dataclasses.asdict(make_run(budget, data=data, **(BUDGETS[budget].encoders if of_encoders else {})))
    return {name: value for name, value in fields.items() if name not in FREE}


@dataclass(frozen=True)
class Comparison:
    """`first` is said to have a lower (or `higher`) value of a measure than the mean of `others`, or than a number.

    `allowance`: it may be worse by this part of the others' value and still count ("as good as"). `spread`: the
    standard deviations over seeds are compared instead of the values.
    """

    first: Cell
    others: tuple[Cell, ...]
    measure: str = "rms"
    higher: bool = False
    allowance: float = 0.0
    spread: bool = False
    than: float | None = None  # a published number, instead of `others`

    def __str__(self) -> str:
        if self.than is not None:
            others = f"{self.than:g}"
        elif len(self.others) == 1:
            others = str(self.others[0])
        else:
            others = f"the mean of {', '.join(cell.loss for cell in self.others)}"
        if self.allowance:
            others = f"{1 + self.allowance:g} times {others}"
        what = MEASURES[self.measure].text
        what = f"spread over seeds of {what}" if self.spread else what
        return f"{what}, {self.first} {'above' if self.higher else 'below'} {others}"

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells that take part."""
        return (self.first, *self.others)

    def advantage(self, first: float, others: Sequence[float]) -> float:
        """How far the values speak as claimed: positive for, negative against; in the measure's unit."""
        sign = 1 if self.higher else -1
        bar = statistics.fmean(others) if self.than is None else self.than
        return sign * (first - (1 - sign * self.allowance) * bar)


@dataclass(frozen=True)
class Claim:
    """One sentence of the paper and what would have to hold."""

    name: str
    sentence: str  # in our words
    section: str  # of the paper
    rule: str  # in one plain sentence
    family: str  # Holm's correction runs over all comparisons of a family
    comparisons: tuple[Comparison, ...]
    quorum: int | None = None  # how many must be separated as claimed; None: all
    about_gan: bool = False  # needs pictures of GAN_SIZE

    def status(self, signs: Sequence[int]) -> str:
        """The claim's status from its comparisons: 1 separated as claimed, -1 against, 0 neither."""
        needed = len(self.comparisons) if self.quorum is None else self.quorum
        if signs.count(1) >= needed:
            return "supported"
        return "contradicted" if signs.count(-1) > len(signs) - needed else "not separated"


@dataclass(frozen=True)
class Verdict:
    """What one source of numbers says about a claim."""

    status: str  # supported, contradicted, not separated or not tested
    evidence: str
    runs: int
    source: str


# --- the table of claims -------------------------------------------------------------------------------------------

BEST_SMALL = ("l1", "eigen")
SMALL_SETS = TRAIN_SETS[:2]
_REST = tuple(loss for loss in LOSSES if loss not in BEST_SMALL)
_GAN_SETS = Cell("gan", "795"), (Cell("gan", "230k"),)
_GAN_L1 = Cell("gan"), (Cell("gan", changed=(("lam", 0.0),)),)


def _beats(loss: str, others: Iterable[str], train_set: str, changed: tuple = (), **what: Any) -> list[Comparison]:
    """`loss` against each of `others`, one comparison each."""
    first = Cell(loss, train_set, changed)
    return [Comparison(first, (Cell(other, train_set, changed),), **what) for other in others if other != loss]


def _against_mean(loss: str, others: Iterable[str], train_set: str, **what: Any) -> Comparison:
    return Comparison(Cell(loss, train_set), tuple(Cell(other, train_set) for other in others), **what)


def _design(loss: str, allowance: float = 0.0, **changed: Any) -> tuple[Comparison, ...]:
    """The paper's choice against one changed setting."""
    return (Comparison(Cell(loss), (Cell(loss, changed=tuple(changed.items())),), allowance=allowance),)


_WITH = {name: (("encoder", name),) for name in ("densenet121", "resnet50")}  # what is changed in Figure 5's cells
FIGURE5 = {"rel": False, "rms": False, "d1": True}  # Figure 5's metrics; True: higher is better
TABLE2 = {"rel": False, "log10": False, "rms": False, "rmslog": False, "d1": True, "d2": True, "d3": True}


def table2_ranks() -> dict[str, tuple[int, int]]:
    """D3-Net's rank among the rows of the paper's Table 2 that report a metric, and how many those are.

    Equal values share the better rank.
    """
    ranks = {}
    for metric, higher in TABLE2.items():
        rows = {n.method: n.value for n in paper_numbers() if (n.item, n.metric) == ("table2", metric)}
        own = rows["D3-Net"]
        ranks[metric] = (1 + sum(value > own if higher else value < own for value in rows.values()), len(rows))
    return ranks


def _table2() -> tuple[Comparison, ...]:
    """D3-Net against the median of the other rows, metric by metric."""
    numbers = [n for n in paper_numbers() if n.item == "table2" and n.method != "D3-Net"]
    medians = {m: statistics.median(n.value for n in numbers if n.metric == m) for m in TABLE2}
    return tuple(Comparison(Cell("gan", "230k"), (), m, TABLE2[m], than=round(medians[m], 6)) for m in TABLE2)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="more data",
        sentence="More training data gives better results, whatever the loss.",
        section="4, quantitative",
        rule="For each of the seven losses, RMSE is lower on 12k than on 795 and lower on 230k than on 12k.",
        family="Figure 2",
        comparisons=tuple(
            Comparison(Cell(loss, large), (Cell(loss, small),))
            for loss in LOSSES
            for small, large in zip(TRAIN_SETS, TRAIN_SETS[1:], strict=False)
        ),
    ),
    Claim(
        name="small sets",
        sentence="On small training sets L1 and the scale-invariant loss (eigen) are the best.",
        section="1, 4 and 5",
        rule="On 795 and on 12k, L1 and eigen each have a lower RMSE than each of the other five losses.",
        family="Figure 2",
        comparisons=tuple(c for size in SMALL_SETS for loss in BEST_SMALL for c in _beats(loss, _REST, size)),
    ),
    Claim(
        name="large set",
        sentence="On the largest set the adversarial loss is the best, and eigen comes next.",
        section="4, quantitative, and 5",
        rule="On 230k, gan has a lower RMSE than each other loss, and eigen than each of the remaining five.",
        family="Figure 2",
        comparisons=(
            *_beats("gan", LOSSES, "230k"),
            *_beats("eigen", [loss for loss in LOSSES if loss != "gan"], "230k"),
        ),
        about_gan=True,
    ),
    Claim(
        name="convergence",
        sentence="L1 and eigen converge faster than the other losses on the two smaller sets.",
        section="4, quantitative, Figure 3",
        rule="On 795 and on 12k, L1 and eigen each need fewer images to come within 5 % of their own best RMSE, and "
        "have a lower RMSE averaged over training, than the mean of the other five losses.",
        family="Figure 3",
        comparisons=tuple(
            _against_mean(loss, _REST, size, measure=measure)
            for size in SMALL_SETS
            for loss in BEST_SMALL
            for measure in ("images", "area")
        ),
    ),
    Claim(
        name="smoothing",
        sentence="L2, huber and berhu smooth their depth maps.",
        section="4, qualitative, Figure 4",
        rule="On 230k, L2, huber and berhu each have a lower gradient ratio and a lower high-frequency power ratio "
        "than the mean of L1 and eigen.",
        family="Figure 4",
        comparisons=tuple(
            _against_mean(loss, BEST_SMALL, "230k", measure=measure)
            for loss in ("l2", "huber", "berhu")
            for measure in ("gradient", "spectrum")
        ),
    ),
    Claim(
        name="fine details",
        sentence="The adversarial loss gives finer details: contours and small objects.",
        section="1, 3 and 4, Figure 4",
        rule="On 230k, gan has a higher F1 of depth edges and a lower depth boundary error than each other loss.",
        family="Figure 4",
        comparisons=(
            *_beats("gan", LOSSES, "230k", measure="edges", higher=True),
            *_beats("gan", LOSSES, "230k", measure="boundary"),
        ),
        about_gan=True,
    ),
    Claim(
        name="residuals",
        sentence="L1 makes many errors vanish; L2 leaves many that are small but not zero.",
        section="4, qualitative",
        rule="On each of the three sets, L1 has a larger share of errors below 1 cm than L2, and L2 a larger share of "
        "errors from 1 to 10 cm than L1.",
        family="Figure 4",
        comparisons=tuple(
            c
            for size in TRAIN_SETS
            for c in (
                *_beats("l1", ["l2"], size, measure="near", higher=True),
                *_beats("l2", ["l1"], size, measure="small", higher=True),
            )
        ),
    ),
    Claim(
        name="unstable gan",
        sentence="Adversarial training is unstable on little data; more data cures it.",
        section="4, quantitative",
        rule="At 795, gan's RMSE is spread more widely over seeds, and its discriminator tells real from predicted "
        "maps better in the last fifth of training, than at 230k.",
        family="gan",
        comparisons=(
            Comparison(*_GAN_SETS, higher=True, spread=True),
            Comparison(*_GAN_SETS, "gap", higher=True),
        ),
        about_gan=True,
    ),
    Claim(
        name="L1 term",
        sentence="The L1 term smooths the adversarial loss's predictions and guides its training.",
        section="3, Patch-GAN",
        rule="At 12k, gan with its L1 term has a lower RMSE, a smaller spread of it over seeds and a lower "
        "high-frequency power ratio than gan without (λ = 0).",
        family="gan",
        comparisons=(Comparison(*_GAN_L1), Comparison(*_GAN_L1, spread=True), Comparison(*_GAN_L1, "spectrum")),
        about_gan=True,
    ),
    Claim(
        name="one phase",
        sentence="One training phase is enough; no phase of L1 alone is needed first.",
        section="3 and 4",
        rule="At 12k, gan trained in one phase has an RMSE below 1.02 times that of gan whose first half of the same "
        "steps is L1 alone.",
        family="gan",
        comparisons=_design("gan", allowance=ENOUGH, adversarial_from=0.5),
        about_gan=True,
    ),
    Claim(
        name="skips",
        sentence="Skip connections improve the network.",
        section="3, a design choice that the paper does not test",
        rule="At 12k with L1, the network with skip connections has a lower RMSE than the one without.",
        family="design",
        comparisons=_design("l1", skips=False),
    ),
    Claim(
        name="pooling",
        sentence="A 4x4 convolution with stride 2 replaces the encoder's max-pooling well.",
        section="3, a design choice that the paper does not test",
        rule="At 12k with L1, the network with the convolution has an RMSE below 1.02 times that with max-pooling.",
        family="design",
        comparisons=_design("l1", allowance=ENOUGH, pooling="max"),
    ),
    Claim(
        name="both encoders",
        sentence="L1 and eigen lead with both encoders.",
        section="4, front-ends, Figure 5",
        rule="At 12k, with DenseNet-121 and with ResNet-50, L1 and eigen are each better than each of the other five "
        "losses in abs rel, RMSE and δ < 1.25.",
        family="Figure 5",
        comparisons=tuple(
            c
            for changed in _WITH.values()
            for measure, higher in FIGURE5.items()
            for loss in BEST_SMALL
            for c in _beats(loss, _REST, "12k", changed, measure=measure, higher=higher)
        ),
    ),
    Claim(
        name="DenseNet",
        sentence="DenseNet-121 is better than ResNet-50, with the one exception of a slightly worse RMSE.",
        section="4, front-ends, Figure 5",
        rule="At 12k and for each of the seven losses, DenseNet-121 is better in abs rel and δ < 1.25, and ResNet-50 "
        "in RMSE.",
        family="Figure 5",
        comparisons=tuple(
            Comparison(Cell(loss, changed=_WITH[better]), (Cell(loss, changed=_WITH[worse]),), measure, higher)
            for measure, higher in FIGURE5.items()
            for better, worse in [("resnet50", "densenet121") if measure == "rms" else ("densenet121", "resnet50")]
            for loss in LOSSES
        ),
    ),
    Claim(
        name="Table 2",
        sentence="D3-Net with the adversarial loss is among the top of the state of the art on NYUv2.",
        section="1, 4 and 5, Table 2",
        rule="In more than half of Table 2's seven metrics, D3-Net is better than the median of the other rows that "
        "report the metric.",
        family="Table 2",
        comparisons=_table2(),
        quorum=len(TABLE2) // 2 + 1,
        about_gan=True,
    ),
)


# --- verdicts ------------------------------------------------------------------------------------------------------

PAPER = "the paper's own numbers"


def paper_verdicts(claims: Sequence[Claim] = CLAIMS) -> dict[str, Verdict]:
    """What the paper's printed and plotted numbers say about each claim. One run each: signs count, not intervals."""
    published = {
        ("gan" if n.method == "D3-Net" else n.method, n.train_set, n.encoder, n.metric): n.value
        for n in paper_numbers()
        if n.item != "table2" or n.method == "D3-Net"
    }

    def value(cell: Cell, measure: str) -> float | None:
        changed = dict(cell.changed)
        encoder = changed.pop("encoder", "densenet121")
        return None if changed else published.get((cell.loss, cell.train_set, encoder, measure))

    verdicts = {}
    for claim in claims:
        found: dict[Comparison, float] = {}
        for comparison in claim.comparisons:
            first, *others = (value(cell, comparison.measure) for cell in comparison.cells)
            if first is not None and None not in others and not comparison.spread:
                found[comparison] = round(comparison.advantage(first, others), 6) + 0.0  # never -0.0
        if len(found) < len(claim.comparisons):
            verdicts[claim.name] = Verdict("not tested", "The paper gives no numbers for this.", 0, PAPER)
            continue
        signs = [(gain > 0) - (gain < 0) for gain in found.values()]
        text = f"{signs.count(1)} of {len(signs)} differences as claimed, {signs.count(-1)} against"
        text += f", {signs.count(0)} tie{'s' * (signs.count(0) > 1)}" * (0 in signs)
        worst, least = min(found.items(), key=lambda pair: pair[1])
        if claim.quorum is None:
            text += f". {'Largest against' if least < 0 else 'Smallest'}: {worst}: by {_amount(least, worst)}"
        if claim.family == "Table 2":
            text += ". Ranks: " + ", ".join(f"{m} {rank} of {rows}" for m, (rank, rows) in table2_ranks().items())
        cells = {cell for comparison in claim.comparisons for cell in comparison.cells}
        verdicts[claim.name] = Verdict(claim.status(signs), text + ". One run each: no interval.", len(cells), PAPER)
    return verdicts


def source(record: Record) -> str:
    """The data source that a record belongs to: comparisons never cross data, picture sizes or budgets."""
    run = record["run"]
    folder = Path(run["data"].removeprefix("folder:"))
    name = folder.parent.name if folder.name.startswith("fold-") else folder.name  # the folds of some pictures are one
    data = {"rooms": "synthetic rooms", "nyu": "NYU Depth V2"}.get(run["data"], f"folder {name}")
    return f"{data} at {run['height']}x{run['width']}, budget {run['budget']}"


def verdicts(records: Iterable[Record | None], claims: Sequence[Claim] = CLAIMS) -> dict[str, dict[str, Verdict]]:
    """The verdict on each claim by data source, then by the claim's name; no source without a record.

    Args:
        records: of any budgets and data; `None` (a run without a record) is passed over.
    """
    groups: dict[str, list[Record]] = {}
    for record in filter(None, records):
        groups.setdefault(source(record), []).append(record)
    return {name: _verdicts(name, group, claims) for name, group in groups.items()}


def _verdicts(name: str, records: Sequence[Record], claims: Sequence[Claim]) -> dict[str, Verdict]:
    """The verdicts on the records of one source."""
    runs = Runs(records)
    tests: dict[str, dict[Comparison, _Test]] = {}
    for family in dict.fromkeys(claim.family for claim in claims):
        planned = list(dict.fromkeys(c for claim in claims if claim.family == family for c in claim.comparisons))
        intervals = [runs.interval(comparison) for comparison in planned]
        adjusted = holm([1.0 if found is None else found.p for found in intervals])
        outcomes = zip(planned, intervals, adjusted, strict=True)
        tests[family] = {outcome[0]: _Test(*outcome, runs) for outcome in outcomes}
    return {claim.name: _verdict(claim, name, runs, tests[claim.family]) for claim in claims}


class Runs:
    """The records of one source, by cell."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.run: Mapping[str, Any] = records[0]["run"]
        self._cells: dict[Cell, dict[int, Record]] = {}

    def of(self, cell: Cell) -> dict[int, Record]:
        """The cell's records by seed."""
        if cell not in self._cells:
            found = (record for record in self.records if cell.holds(record["run"]))
            self._cells[cell] = {record["run"]["seed"]: record for record in found}
        return self._cells[cell]

    def values(self, cell: Cell, measure: str) -> dict[int, float]:
        """What is measured of the cell's runs, by seed, where it is."""
        found = {seed: MEASURES[measure].read(record) for seed, record in self.of(cell).items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def interval(self, comparison: Comparison) -> Interval | None:
        """The comparison's advantage over seeds (positive: as claimed); `None` below MIN_SEEDS."""
        first, *others = (self.values(cell, comparison.measure) for cell in comparison.cells)
        if comparison.spread:
            pair = [*first.values()], [*others[0].values()]
            if min(map(len, pair)) < MIN_SEEDS:
                return None
            return spread_interval(*(pair if comparison.higher else pair[::-1]))
        seeds = sorted(set(first).intersection(*others))
        if len(seeds) < MIN_SEEDS:
            return None
        return t_interval([comparison.advantage(first[s], [other[s] for other in others]) for s in seeds])

    def over_scenes(self, comparison: Comparison) -> Interval | None:
        """The same advantage over test scenes, the seeds averaged; `None` where records or measure do not allow it."""
        if comparison.measure not in ("rms", "rel", "d1") or comparison.spread or comparison.than is not None:
            return None
        cells = [self.of(cell) for cell in comparison.cells]
        seeds = sorted(set(cells[0]).intersection(*cells[1:]))
        sign = 1 if comparison.higher else -1
        share = -sign * (1 - sign * comparison.allowance) / (len(cells) - 1)
        terms = [
            (weight / len(seeds), cell[seed].get("by_scene"))
            for cell, weight in zip(cells, [sign, *[share] * (len(cells) - 1)], strict=True)
            for seed in seeds
        ]
        if not terms or any(not sums for _, sums in terms) or any(s["scene"] != terms[0][1]["scene"] for _, s in terms):
            return None
        return bootstrap_scenes(terms, comparison.measure)


class _Test:
    """One comparison's outcome."""

    def __init__(self, comparison: Comparison, interval: Interval | None, p: float, runs: Runs) -> None:
        self.comparison, self.interval = comparison, interval
        over_seeds = 0 if interval is None or p >= ALPHA else 1 if interval.mean > 0 else -1
        scenes = runs.over_scenes(comparison) if over_seeds else None
        self.only_over_seeds = scenes is not None and not (scenes.low > 0 if over_seeds > 0 else scenes.high < 0)
        self.sign = 0 if self.only_over_seeds else over_seeds


def _verdict(claim: Claim, name: str, runs: Runs, tests: Mapping[Comparison, _Test]) -> Verdict:
    cells = dict.fromkeys(cell for comparison in claim.comparisons for cell in comparison.cells)
    used = [record for cell in cells for record in runs.of(cell).values()]

    def answer(status: str, *evidence: str) -> Verdict:
        return Verdict(status, " ".join(part for part in evidence if part), len(used), name)

    run = runs.run
    if run["budget"] in QUICK:
        return answer("not tested", f"Budget {run['budget']} is too short to say anything.")
    if any(c.than is not None for c in claim.comparisons) and (run["data"] != "nyu" or not run.get("pretrained")):
        return answer("not tested", "Published numbers compare on NYU Depth V2 with ImageNet weights alone.")
    patch = ""
    small = run["height"] < GAN_SIZE[0] or run["width"] < GAN_SIZE[1]
    if small and any(cell.loss == "gan" for cell in cells):
        patch = f"gan's patch of {PATCH} pixels is {PATCH / run['width']:.0%} of this picture's width"
        if claim.about_gan:
            return answer("not tested", f"{patch}; claims about gan need {GAN_SIZE[0]}x{GAN_SIZE[1]}.")
        patch += "."
    mine = [tests[comparison] for comparison in claim.comparisons]
    made = [test for test in mine if test.interval is not None]
    if len(made) < len(mine):
        text = f"{len(made)} of {len(mine)} comparisons have {MIN_SEEDS} paired seeds."
        return answer("not tested", text if used else "No run of those that it compares.")
    signs = [test.sign for test in mine]
    status = claim.status(signs)
    text = f"{signs.count(1)} of {len(signs)} comparison{'s' * (len(signs) > 1)} separated as claimed, "
    text += f"{signs.count(-1)} against."
    if status == "contradicted":
        shown, label = min(made, key=lambda test: (test.sign, test.interval.high)), "Against: "
    else:
        shown, label = min(made, key=lambda test: (test.sign, test.interval.low)), "Weakest: " if len(made) > 1 else ""
    low, high = (_amount(x, shown.comparison) for x in (shown.interval.low, shown.interval.high))
    text += f" {label}{shown.comparison}: by {_amount(shown.interval.mean, shown.comparison)} ({low} to {high})."
    seeds = min(test.interval.n for test in mine)
    text += f" {'Preview: ' if seeds < FULL_SEEDS else ''}{seeds} paired seeds."
    lost = sum(test.only_over_seeds for test in mine)
    text += f" {lost} separated over seeds but not over test scenes." if lost else ""
    return answer(status, text, *_reservations(used), patch)


def _reservations(records: Sequence[Record]) -> list[str]:
    """What a reader should know of the runs behind a verdict."""
    ends = [converged(record["curve"]).converged for record in records]
    older = sum(not is_current(record) for record in records)
    found = [
        (ends.count(False), f"of {len(ends)} runs had not converged."),
        (ends.count(None), f"of {len(ends)} learning curves are too short to tell whether they had converged."),
        (older, "made by older training code."),
    ]
    return [f"{count} {text}" for count, text in found if count]


def _amount(value: float, comparison: Comparison) -> str:
    """An advantage in words that fit its measure."""
    if comparison.spread:
        return f"{value:+.2f} (log of the ratio)"
    if comparison.measure == "images":
        return f"{value:+.0f}"
    unit = MEASURES[comparison.measure].unit
    return f"{value:+.4f}" + (f" {unit}" if unit else "")

"""Drawing: the book's figures, from records and arrays; nothing is trained or measured here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from d3lib.experiments import LOSSES, TRAIN_SETS
from d3lib.intervals import t_interval
from d3lib.losses import LABELS
from d3lib.results import PaperNumber, scores, stands_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DEPTH_COLOURS = "viridis_r"  # one map for depth throughout: near is bright, far is dark; safe for colour-blind readers
ERROR_COLOURS = "magma"
PUSH_COLOURS = "PuOr"  # signed maps: orange is negative (pushes nearer), purple positive (farther)
# Okabe and Ito's colours, with a marker each so that a loss is known without its colour
STYLES = {
    "l1": ("#0072B2", "o", "-"),
    "l2": ("#D55E00", "s", "-"),
    "eigen": ("#009E73", "^", "-"),
    "eigengrad": ("#56B4E9", "v", "--"),
    "berhu": ("#CC79A7", "D", "--"),
    "huber": ("#8C6D00", "P", ":"),
    "gan": ("#000000", "X", "-"),
}
METRICS = {"rms": "RMSE (m)", "d1": "δ < 1.25", "rel": "abs rel"}
BASELINE_GREY = "#6b6b6b"
UNKNOWN_GREY = "#b0b0b0"  # where there is no depth


def use_style() -> None:
    """Set matplotlib's defaults for the book: legible on a phone, white behind the axes in dark mode too."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.dpi": 140,
            "figure.facecolor": "white",
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "image.interpolation": "nearest",
            "legend.frameon": False,
        }
    )


def show_depth(axes: Axes, depth: np.ndarray, valid: np.ndarray | None = None, near: float = 0, far: float = 10) -> Any:
    """Draw a depth map (H, W) in metres with the book's colours; where not `valid` it is left grey."""
    shown = np.ma.masked_array(depth, None if valid is None else ~valid)
    axes.set_facecolor(UNKNOWN_GREY)
    _bare(axes)
    return axes.imshow(shown, cmap=DEPTH_COLOURS, vmin=near, vmax=far)


def show_push(axes: Axes, values: np.ndarray, span: float) -> Any:
    """Draw a signed map (H, W), such as what a loss pushes each pixel to, with colours from -span to span."""
    _bare(axes)
    return axes.imshow(values, cmap=PUSH_COLOURS, vmin=-span, vmax=span)


def _bare(axes: Axes) -> None:
    """Leave nothing of a picture's axes but the picture."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.grid(False)


def prediction_grid(
    rgb: np.ndarray, truth: np.ndarray, preds: Mapping[str, np.ndarray], valid: np.ndarray | None = None
) -> Figure:
    """Pictures in rows: RGB, true depth, each prediction and its absolute error, with bars in metres.

    More than two predictions have their errors below them, fewer beside them.

    Args:
        rgb: uint8 (n, 3, H, W).
        truth: metres (n, 1, H, W).
        preds: metres (n, 1, H, W) by title.
        valid: bool (n, 1, H, W); elsewhere there is no truth to compare with.
    """
    import matplotlib.pyplot as plt

    below = len(preds) > 2
    rows, columns, side = (2 * len(rgb), 2 + len(preds), 1.55) if below else (len(rgb), 2 + 2 * len(preds), 2.3)
    size = (side * columns, side * rows * rgb.shape[2] / rgb.shape[3] + 1.1)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    maps, errors = (axes[::2, 2:], axes[1::2, 2:]) if below else (axes[:, 2::2], axes[:, 3::2])
    known = truth > 0 if valid is None else valid
    far = float(np.percentile(truth[known], 99))
    error_far = max(float(np.percentile(np.abs(pred - truth)[known], 98)) for pred in preds.values())
    for ax in axes.flat:
        _bare(ax)
    for i, line in enumerate(axes[:: 1 + below]):
        line[0].imshow(rgb[i].transpose(1, 2, 0))
        depth = show_depth(line[1], truth[i, 0], known[i, 0], far=far)
        for k, pred in enumerate(preds.values()):
            show_depth(maps[i, k], pred[i, 0], far=far)
            wrong = np.ma.masked_array(np.abs(pred - truth)[i, 0], ~known[i, 0])
            errors[i, k].set_facecolor(UNKNOWN_GREY)
            error = errors[i, k].imshow(wrong, cmap=ERROR_COLOURS, vmin=0, vmax=error_far)
    titles = list(preds) if below else [text for name in preds for text in (name, "|error|")]
    for ax, title in zip(axes[0], ["picture", "true depth", *titles], strict=True):
        ax.set_title(title)
    left, right = (axes[:, :2], axes[:, 2:]) if below else (axes[:, 1], axes[:, -1])
    figure.colorbar(depth, ax=left.ravel().tolist(), location="bottom", label="depth (m)", aspect=14)
    aspect = 40 if below else 14
    figure.colorbar(error, ax=right.ravel().tolist(), location="bottom", label="|error| (m)", aspect=aspect)
    return figure


def learning_curve(record: Mapping[str, Any]) -> Figure:
    """One run while it trains: training loss, and validation and test RMSE, over images seen."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    curve = record["curve"]
    images = [point["images"] for point in curve]
    colour, marker, line = STYLES[record["run"]["loss"]]
    left.plot(images, [point["loss"] for point in curve], line, color=colour, marker=marker)
    left.set(xlabel="images seen", ylabel="training loss", title=LABELS[record["run"]["loss"]])
    right.plot(images, [point["val_rms"] for point in curve], "--", color=BASELINE_GREY, marker=".", label="validation")
    right.plot(images, [point["test_rms"] for point in curve], line, color=colour, marker=marker, label="test")
    right.axvline(record["chosen_step"] * record["run"]["batch_size"], color=BASELINE_GREY, lw=0.8)
    right.set(xlabel="images seen", ylabel="RMSE (m)", title="pooled error; line: weights chosen")
    right.legend()
    return figure


def figure2(
    records: Iterable[Mapping[str, Any]],
    paper: Iterable[PaperNumber],
    baselines: Mapping[str, Mapping[str, Any]] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Figure:
    """Figure 2's form: RMSE and δ < 1.25 against training-set size, one line a loss; the paper left, ours right.

    Args:
        records: runs; those that stand for a number of Figure 2 count (`results.stands_for`). Seeds of one cell are
            averaged; of three or more the bar is the mean's 95 % interval.
        paper: the paper's numbers; those of "fig2" are drawn.
        baselines: scores by training set, drawn as grey lines in our panels.
        sizes: how many frames our sets have, for their axis.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained", sharey=False)
    records, paper = list(records), list(paper)
    for row, metric in zip(axes, ("rms", "d1"), strict=True):
        for loss in LOSSES:
            colour, marker, line = STYLES[loss]
            style = {"color": colour, "marker": marker, "ls": line, "label": LABELS[loss]}
            printed = {n.train_set: n for n in paper if (n.item, n.method, n.metric) == ("fig2", loss, metric)}
            row[0].plot(TRAIN_SETS, [printed[size].value for size in TRAIN_SETS], **style)
            ours = {size: _values(records, number) for size, number in printed.items()}
            shown = [size for size in TRAIN_SETS if ours[size]]
            means = [float(np.mean(ours[size])) for size in shown]
            bars = [t_interval(ours[size]).half_width if len(ours[size]) > 2 else 0 for size in shown]
            aside = 0.05 * (LOSSES.index(loss) - len(LOSSES) // 2)  # or seven bars would hide each other
            row[1].errorbar([TRAIN_SETS.index(size) + aside for size in shown], means, bars, capsize=3, **style)
        for name, (text, line) in {"mean_map": ("mean map", "--"), "constant": ("constant", ":")}.items():
            heights = [_baseline(baselines, size, name, metric) for size in TRAIN_SETS]
            if None not in heights:
                row[1].plot(range(3), heights, ls=line, color=BASELINE_GREY, label=text)
        for ax in row:
            ax.set(ylabel=METRICS[metric], xlabel="training images")
        row[1].set_xticks(range(3), [f"{size}" if sizes is None else f"{sizes[size]}\n({size})" for size in TRAIN_SETS])
    axes[0, 0].set_title("paper (NYU Depth V2)")
    axes[0, 1].set_title(_ours(records))
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def figure3(records: Iterable[Mapping[str, Any]], sizes: Mapping[str, int] | None = None) -> Figure:
    """Figure 3's form: test RMSE while training, against images seen, a panel for each training set.

    Args:
        records: runs of the main grid. Seeds of one cell are averaged, with their range as a band.
        sizes: how many frames our sets have, for their titles.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 4.2), layout="constrained", sharey=True)
    records = list(records)
    for ax, size in zip(axes, TRAIN_SETS, strict=True):
        for loss in LOSSES:
            curves = [r["curve"] for r in records if (r["run"]["loss"], r["run"]["train_set"]) == (loss, size)]
            curves = [curve for curve in curves if all(point["test_rms"] is not None for point in curve)]
            if not curves:
                continue
            colour, marker, line = STYLES[loss]
            length = min(map(len, curves))
            images = [point["images"] for point in curves[0][:length]]
            values = np.array([[point["test_rms"] for point in curve[:length]] for curve in curves])
            ax.plot(images, values.mean(0), line, color=colour, marker=marker, ms=5, label=LABELS[loss])
            if len(curves) > 1:
                ax.fill_between(images, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
        ax.set(xlabel="images seen", title=size if sizes is None else f"{sizes[size]} images ({size})")
        ax.ticklabel_format(axis="x", style="sci", scilimits=(0, 4))
    axes[0].set_ylabel("test RMSE (m)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    return figure


def figure5(records: Iterable[Mapping[str, Any]], paper: Iterable[PaperNumber]) -> Figure:
    """Figure 5's form: rel, RMSE and δ < 1.25 of seven losses with two encoders; the paper above, ours below.

    Args:
        records: runs; those that stand for a number of Figure 5 count, every seed a point.
        paper: the paper's numbers; those of "fig5" are drawn.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(11, 6.2), layout="constrained")
    records, paper = list(records), [number for number in paper if number.item == "fig5"]
    looks = {"densenet121": ("#0072B2", "o", "DenseNet-121", -0.12), "resnet50": ("#D55E00", "s", "ResNet-50", 0.12)}
    for column, metric in enumerate(("rel", "rms", "d1")):
        for encoder, (colour, marker, label, shift) in looks.items():
            numbers = [n for n in paper if (n.encoder, n.metric) == (encoder, metric)]
            places = [LOSSES.index(n.method) + shift for n in numbers]
            axes[0, column].plot(places, [n.value for n in numbers], marker, color=colour, label=label)
            points = [(x, v) for x, n in zip(places, numbers, strict=True) for v in _values(records, n)]
            axes[1, column].plot([x for x, _ in points], [v for _, v in points], marker, color=colour, label=label)
        for ax, where in zip(axes[:, column], ("paper (NYU Depth V2)", _ours(records)), strict=True):
            ax.set_xticks(range(len(LOSSES)), [LABELS[loss] for loss in LOSSES], rotation=60)
            ax.set(ylabel=METRICS[metric], title=where, xlim=(-0.5, len(LOSSES) - 0.5))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def forest(rows: Iterable[tuple[str, float | None, float | None]], axis: str) -> Figure:
    """Differences with their intervals, one under the other: (label, mean or `None` for not run, half-width)."""
    import matplotlib.pyplot as plt

    rows = list(rows)
    figure, ax = plt.subplots(figsize=(7.5, 0.32 * len(rows) + 1.1), layout="constrained")
    for y, (_, mean, half) in enumerate(rows):
        if mean is None:
            ax.text(0, y, " not run", va="center", color=BASELINE_GREY, fontsize=9)
        else:
            ax.errorbar(mean, y, xerr=half, fmt="o", color="#0072B2", capsize=3)
    ax.axvline(0, color=BASELINE_GREY, lw=0.8)
    ax.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    ax.set(xlabel=axis, ylim=(len(rows) - 0.5, -0.5))
    return figure


def _ours(records: Iterable[Mapping[str, Any]]) -> str:
    """What our half of a figure is headed: it must not be taken for the paper's data."""
    data = sorted({record["data"]["description"].split(",")[0] for record in records})
    return f"ours ({', '.join(data)})" if data else "ours (not run)"


def _values(records: Iterable[Mapping[str, Any]], number: PaperNumber) -> list[float]:
    """Our counterparts of a number of the paper, one per seed."""
    return scores((record for record in records if stands_for(record["run"], number)), number.metric)


def _baseline(baselines: Mapping[str, Any] | None, size: str, name: str, metric: str) -> float | None:
    scores = (baselines or {}).get(size)
    return None if scores is None else scores["scores"][name]["test"][scores["target"]]["pooled"][metric]

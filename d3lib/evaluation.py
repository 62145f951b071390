"""How good a network's depth is: predictions over a set, scored by a stated protocol, beside what it must beat."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d3lib.artefacts import finite, load_weights
from d3lib.details import Details
from d3lib.errors import UserError
from d3lib.metrics import DepthMetrics, Protocol
from d3lib.models import D3Net
from d3lib.training import autocast, keep_memory

MAX_SIDE = 4096  # pixels; no network here was trained at more
Predictor = Callable[[Tensor], Tensor]
Scores = dict[str, dict[str, float | None]]


def as_predictor(net: nn.Module, device: str = "cpu", precision: str = "float32") -> Predictor:
    """A function RGB float (B, 3, H, W) in [0, 1] → float32 metres (B, 1, H, W) that runs `net` for evaluation.

    On a CPU the process keeps freed memory from then on (see `d3lib.training.keep_memory`).
    """
    if device == "cpu":
        keep_memory()

    def predict(rgb: Tensor) -> Tensor:
        net.eval()
        with torch.inference_mode(), autocast(device, precision):
            return net(rgb).float()

    return predict


def evaluate(
    predict: Predictor,
    batches: Iterable[Mapping[str, Tensor]],
    protocol: Protocol | None = None,
    targets: tuple[str, ...] = ("depth",),
    also: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> dict[str, Scores]:
    """Score predictions over a finite set of batches.

    Args:
        predict: RGB (B, 3, H, W) → metres (B, 1, H, W).
        batches: dictionaries with `rgb`, `depth`, `valid` and, for the target "exact", `exact`.
        protocol: crop, depth range and size; the default scores every valid pixel between 1e-3 and 10 m.
        targets: "depth" (the sensor's values, where valid) and/or "exact" (the true depth, everywhere).
        also: called with each batch's predictions, depth of the first target, and mask, as they are scored.

    Returns:
        For each target `{"pooled": {...}, "per_image": {...}, "images": n}` with finite numbers or `None`.

    Raises:
        UserError: there is no batch, or a target is not in the data.
    """
    protocol = protocol or Protocol()
    metrics = {target: DepthMetrics() for target in targets}
    seen = 0
    for batch in batches:
        pred = predict(batch["rgb"])
        for target, metric in metrics.items():
            if target not in batch:
                raise UserError(f"this data has no {target!r} depth; it has {', '.join(sorted(batch))}")
            valid = batch["valid"] if target == "depth" else torch.ones_like(batch["valid"])
            scored = protocol.apply(pred, batch[target], valid)
            metric.update(*scored)
            if also is not None and target == targets[0]:
                also(*scored)
        seen += len(pred)
    if seen == 0:
        raise UserError("nothing to evaluate: the set is empty")
    return {target: tidy(metric.compute()) | {"images": seen} for target, metric in metrics.items()}


class Closely:
    """A closer look at the predictions that `evaluate` scores: details, and sums by scene; pass it as `also`."""

    def __init__(self) -> None:
        self.details = Details()
        self.rows: list[Tensor] = []

    def __call__(self, pred: Tensor, depth: Tensor, valid: Tensor) -> None:
        """Take in a batch, (B, 1, H, W) metres and the mask of what counts."""
        self.details.update(pred, depth, valid)
        pred, depth = torch.where(valid, pred, 1).double(), torch.where(valid, depth, 1).double()
        error, ratio = (pred - depth).abs(), torch.maximum(pred / depth, depth / pred)
        sums = [valid, error**2, error / depth, (ratio < 1.25) & valid]
        self.rows.append(torch.stack([image.double().flatten(1).sum(1) for image in sums], 1).cpu())

    def worst(self, count: int) -> list[int]:
        """The frames with the largest RMSE, worst first."""
        n, squares = torch.cat(self.rows)[:, :2].T
        return (squares / n.clamp(min=1)).argsort(descending=True, stable=True)[:count].tolist()

    def by_scene(self, scenes: Sequence[str]) -> dict[str, list[Any]]:
        """Sums over each scene's frames, `scenes` naming each frame's: what a bootstrap over scenes resamples.

        Keys: `scene`, `n` valid pixels, `se` squared error (m²), `rel` |error| / depth, `d1` pixels with δ < 1.25.
        """
        names = list(dict.fromkeys(scenes))
        places = torch.tensor([names.index(scene) for scene in scenes])
        sums = torch.zeros(len(names), 4, dtype=torch.float64).index_add_(0, places, torch.cat(self.rows))
        columns = {name: sums[:, i].tolist() for i, name in enumerate(("n", "se", "rel", "d1"))}
        return {"scene": names} | {
            name: [int(x) if name in ("n", "d1") else float(f"{x:.5g}") for x in column]
            for name, column in columns.items()
        }


def tidy(scores: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Scores ready for JSON: NaN (no valid pixel) becomes `None`."""
    return {kind: {name: finite(value) for name, value in row.items()} for kind, row in scores.items()}


def load_network(path: str | Path, device: str = "cpu") -> tuple[D3Net, dict[str, Any]]:
    """A trained network from a weights file, ready to predict, and the file's metadata (all strings).

    Raises:
        UserError: no such file, damaged, not a D3-Net, or tensors that do not fit.
    """
    weights, metadata = load_weights(path)
    if not {"encoder", "max_depth", "height", "width", "trained_on"} <= metadata.keys():
        raise UserError(f"{path}: these weights do not say which network they are for (no encoder in the header)")
    try:
        max_depth, sides = float(metadata["max_depth"]), [int(metadata[name]) for name in ("height", "width")]
        if not (0 < max_depth < math.inf and 32 <= min(sides) <= max(sides) <= MAX_SIDE):
            raise ValueError(f"a range of {max_depth} m at {sides[0]}x{sides[1]}")
        net = D3Net(
            metadata["encoder"],
            max_depth=max_depth,
            skips=metadata.get("skips", "True") == "True",
            pooling=metadata.get("pooling", "conv"),
            output=metadata.get("output", "linear"),
        )
        net.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"{path}: the weights do not fit D3-Net with {metadata['encoder']}: {line}") from error
    return net.to(device, memory_format=torch.channels_last).eval(), metadata

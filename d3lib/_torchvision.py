"""Import torchvision beside any torch, once and lazily."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its compiled half does not fit the installed torch.

    torchvision's wheel and a CPU-only torch may not match: its operators do not load and its import dies
    with "operator torchvision::nms does not exist". Networks and weights need none of them, so the
    operators are declared and left without a body, and the import runs again.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")

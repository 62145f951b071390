"""Depth from your own picture: a coloured map, a 16-bit PNG in millimetres and, with intrinsics, a point cloud."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from d3lib.artefacts import atomic_path, atomic_write
from d3lib.data.folder import read_rgb
from d3lib.data.loader import resize_sample, to_float
from d3lib.errors import UserError
from d3lib.evaluation import as_predictor, load_network
from d3lib.experiments import BUDGETS
from d3lib.records import BOOK, read_record
from d3lib.results import QUICK
from d3lib.training import pick_device

MAX_ASPECT = 8  # a narrower picture is refused: it would be blown up beyond memory
CLOUD_WIDTH = 640  # a point cloud has at most so many points in a row
DEMONSTRATION = BOOK / "demonstration" / "weights.safetensors"  # of a small network, with its model card
Intrinsics = tuple[float, float, float, float]


def choose_weights(out: Path, demonstration: Path = DEMONSTRATION) -> Path:
    """The weights made last below `out` by a run long enough to show something, else the book's, else the last at all.

    Raises `UserError` that says how to get some if there are none.
    """
    found = sorted(out.glob("*/*/weights.safetensors"), key=lambda path: path.stat().st_mtime)
    trained = [path for path in found if _is_trained(path)]
    if not trained and demonstration.is_file():
        return demonstration
    if not found:
        raise UserError(
            f"no weights below {out}: make some with `make batch` (minutes on a CPU) or `d3lib train`, "
            "or name a file with --weights"
        )
    return (trained or found)[-1]


def _is_trained(weights: Path) -> bool:
    """Whether the run had at least the steps that its budget gives a run, and the budget more than a few."""
    try:
        run = read_record(weights.with_name("record.json"))["run"]
    except UserError:
        return False
    return run["budget"] not in QUICK and run["steps"] >= BUDGETS[run["budget"]].steps


def parse_intrinsics(text: str) -> Intrinsics:
    """fx, fy, cx, cy in pixels from "FX,FY,CX,CY". Raises `UserError` if they are not four numbers, fx and fy > 0."""
    try:
        fx, fy, cx, cy = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"intrinsics {text!r}: give four numbers FX,FY,CX,CY in pixels of the picture") from None
    if not (fx > 0 and fy > 0 and np.isfinite([fx, fy, cx, cy]).all()):
        raise UserError(f"intrinsics {text!r}: the focal lengths must be positive and all four finite")
    return fx, fy, cx, cy


def predict_depth(rgb: np.ndarray, weights: Path, device: str = "auto") -> tuple[np.ndarray, dict[str, str]]:
    """Depth of a picture by the network in `weights`.

    The picture is brought to the height the network was trained at, its aspect kept, and the map back to the
    picture's size (bilinear).

    Args:
        rgb: uint8 (3, H, W).

    Returns:
        metres float32 (H, W), and the weights' metadata.
    """
    device = pick_device(device)
    net, made = load_network(weights, device)
    height = int(made["height"])
    if not 1 / MAX_ASPECT <= rgb.shape[2] / rgb.shape[1] <= MAX_ASPECT:
        raise UserError(f"a picture of {rgb.shape[1]} x {rgb.shape[2]} pixels is too narrow; crop it")
    width = max(32, round(height * rgb.shape[2] / rgb.shape[1]))
    small = resize_sample({"rgb": torch.tensor(rgb)[None]}, (height, width))["rgb"]
    depth = as_predictor(net, device)(to_float(small).to(device))
    depth = functional.interpolate(depth, rgb.shape[1:], mode="bilinear")
    return depth[0, 0].cpu().numpy(), made


def predict_picture(
    image: Path, weights: Path, to: Path | None = None, intrinsics: Intrinsics | None = None, device: str = "auto"
) -> list[Path]:
    """Predict `image`'s depth and write it beside the picture, or into the folder `to`.

    Writes `<name>_depth.png` (coloured, with a bar in metres and what the weights were trained on),
    `<name>_depth_mm.png` (16 bit, millimetres) and, with `intrinsics`, `<name>_cloud.ply` (metres, camera frame:
    x right, y down, z forward).

    Returns the paths written. Raises `UserError` for an unreadable picture or unfit weights.
    """
    rgb = read_rgb(image)
    depth, made = predict_depth(rgb, weights, device)
    folder = image.parent if to is None else to
    stem = image.stem
    paths = [folder / f"{stem}_depth.png", folder / f"{stem}_depth_mm.png"]
    with atomic_path(paths[1]) as temporary:
        Image.fromarray(np.clip(np.rint(depth * 1000), 0, 65535).astype(np.uint16)).save(temporary, format="PNG")
    _write_coloured(paths[0], rgb, depth, f"trained on {made['trained_on']}\n{made['key']}")
    if intrinsics is not None:
        paths.append(folder / f"{stem}_cloud.ply")
        write_ply(paths[-1], *point_cloud(rgb, depth, intrinsics))
    return paths


def point_cloud(rgb: np.ndarray, depth: np.ndarray, intrinsics: Intrinsics) -> tuple[np.ndarray, np.ndarray]:
    """Back-project a depth map: x = (u - cx) z / fx, y = (v - cy) z / fy, z.

    Args:
        rgb: uint8 (3, H, W).
        depth: metres (H, W).
        intrinsics: fx, fy, cx, cy in pixels of this picture, pixel centres at whole numbers.

    Returns:
        points float32 (n, 3) in metres and colours uint8 (n, 3); pictures wider than 640 pixels are thinned.
    """
    fx, fy, cx, cy = intrinsics
    step = -(-depth.shape[1] // CLOUD_WIDTH)
    v, u = np.mgrid[: depth.shape[0] : step, : depth.shape[1] : step]
    z = depth[::step, ::step]
    points = np.stack([(u - cx) * z / fx, (v - cy) * z / fy, z], axis=-1)
    return points.reshape(-1, 3).astype(np.float32), rgb[:, ::step, ::step].reshape(3, -1).T


def write_ply(path: Path, points: np.ndarray, colours: np.ndarray) -> None:
    """Write points (n, 3) float32 and colours (n, 3) uint8 as a binary little-endian PLY file."""
    fields = [(axis, "<f4") for axis in "xyz"] + [(name, "u1") for name in ("red", "green", "blue")]
    vertices = np.rec.fromarrays([*points.T, *colours.T], dtype=fields)
    kinds = {"<f4": "float", "u1": "uchar"}
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}"]
    lines += [f"property {kinds[kind]} {name}" for name, kind in fields] + ["end_header", ""]
    with atomic_write(path, "wb") as file:
        file.write("\n".join(lines).encode("ascii") + vertices.tobytes())


def _write_coloured(path: Path, rgb: np.ndarray, depth: np.ndarray, note: str) -> None:
    """The picture and its depth side by side, with a bar in metres and a line that says what the weights know."""
    from matplotlib.figure import Figure

    from d3lib.figures import show_depth

    aspect = rgb.shape[1] / rgb.shape[2]
    figure = Figure(figsize=(7, 3.1 * aspect + 0.9), dpi=190, layout="constrained")  # legible on a phone
    left, right = figure.subplots(1, 2)
    left.imshow(rgb.transpose(1, 2, 0))
    left.set(xticks=[], yticks=[], title="picture")
    near, far = np.percentile(depth, [1, 99])
    drawn = show_depth(right, depth, near=float(near), far=float(max(far, near + 0.1)))
    right.set_title("predicted depth")
    figure.colorbar(drawn, ax=right, label="depth (m)", shrink=0.9)
    figure.supxlabel(note, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")

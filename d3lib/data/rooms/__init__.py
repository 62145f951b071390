"""Procedural indoor RGB-D, the embedded default: furnished rooms seen through NYU's RGB camera, with exact depth.

A frame is (scene seed, view index). Nothing is downloaded; scenes are the same everywhere, and pixels agree between
devices. This is synthetic data: it mirrors the sizes of NYU Depth V2's sets, and says nothing about NYU's numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from d3lib.errors import UserError

from . import recording
from .layout import FAR, NEAR, UNSEEN_FROM, make_camera, make_scene
from .scene import Camera, Light, Material, Scene, hand_made, look, part, rotation
from .sensor import develop, kinect
from .tracer import SHADINGS, intrinsics, trace

__all__ = [
    "FAR", "INTERVENTIONS", "NEAR", "SHADINGS", "SPLITS", "Camera", "Light", "Material", "Scene", "frames", "hand_made",
    "intervene", "intrinsics", "look", "make_camera", "make_scene", "part", "recording", "render", "render_views",
    "rotation", "scene_seeds", "stream",
]  # fmt: skip

# First seed and number of scenes, after NYU Depth V2: 249 training scenes (25 more for validation), 215 test scenes.
SPLITS = {"train": (1000, 249), "val": (2000, 25), "test": (3000, 215), "unseen": (UNSEEN_FROM, 215)}
INTERVENTIONS = ("none", "grey", "shuffled_patches")

Frame = tuple[int, int]


def scene_seeds(split: str) -> tuple[int, ...]:
    """The scenes of a split: "train" (249), "val" (25), "test" (215), "unseen" (215, other furniture and textures).

    Raises `UserError` for another name.
    """
    if split not in SPLITS:
        raise UserError(f"rooms: unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    first, count = SPLITS[split]
    return tuple(range(first, first + count))


def frames(split: str, scenes: int | None = None, views: int = 1) -> list[Frame]:
    """Frames (scene seed, view) of a split's first `scenes` scenes, view 0 of every scene first, then view 1, ...

    A smaller set of the same scenes is therefore a prefix of a larger one. Raises `UserError` for numbers out of range.
    """
    seeds = scene_seeds(split)
    scenes = len(seeds) if scenes is None else scenes
    if not 1 <= scenes <= len(seeds):
        raise UserError(f"rooms: split {split!r} has 1 to {len(seeds)} scenes, not {scenes}")
    if views < 1:
        raise UserError(f"rooms: views must be at least 1, not {views}")
    return [(seed, view) for view in range(views) for seed in seeds[:scenes]]


def _check(size: tuple[int, int], shading: str) -> tuple[int, int]:
    if shading not in SHADINGS:
        raise UserError(f"rooms: unknown shading {shading!r}; choose one of {', '.join(SHADINGS)}")
    if len(size) != 2 or min(size) < 32:
        raise UserError(f"rooms: size must be (H, W) of at least 32 x 32, not {tuple(size)}")
    return int(size[0]), int(size[1])


def stream(
    frames: Sequence[Frame],
    size: tuple[int, int] = (96, 128),
    batch_size: int = 32,
    shading: str = "full",
    workers: int | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Render many frames on several cores: batches as from `render`, in order, the last one perhaps smaller.

    `workers` processes (by default one per torch thread) share the work, one core each: tracing is many small
    operations, which several threads only slow down.
    """
    task = partial(render, size=_check(size, shading), shading=shading)
    chunks = [frames[i : i + batch_size] for i in range(0, len(frames), batch_size)]
    workers = min(torch.get_num_threads() if workers is None else workers, len(chunks))
    return iter(DataLoader(chunks, None, collate_fn=task, num_workers=workers))


def render(
    frames: Sequence[Frame],
    size: tuple[int, int] = (96, 128),
    device: str | torch.device = "cpu",
    shading: str = "full",
) -> dict[str, Tensor]:
    """Render frames into a batch.

    Args:
        frames: pairs (scene seed, view index), each >= 0.
        size: (H, W), at least 32 each; the camera's full field of view is resized to it.
        device: where to compute and leave the tensors.
        shading: "full"; "flat" (reflectance under constant light: no shading, shadows or highlights); or
            "constant_albedo" (every surface grey, no texture: lighting alone).

    Returns:
        rgb uint8 (B, 3, H, W), sRGB; depth float32 (B, 1, H, W), metres, the Kinect's view, 0 where invalid;
        valid bool (B, 1, H, W); exact float32 (B, 1, H, W), metres, in [0.4, 10].

    Raises:
        UserError: for no frames, a negative seed or view, a size too small, or an unknown shading.
    """
    if not frames:
        raise UserError("rooms: no frames to render; give at least one (scene seed, view)")
    for frame in frames:
        if len(frame) != 2 or min(frame) < 0:
            raise UserError(f"rooms: a frame is (scene seed, view), both >= 0, not {tuple(frame)}")
    views = [(make_scene(int(seed)), make_camera(int(seed), int(view))) for seed, view in frames]
    return render_views(views, size, device, shading)


@torch.no_grad()
def render_views(
    views: Sequence[tuple[Scene, Camera]],
    size: tuple[int, int] = (96, 128),
    device: str | torch.device = "cpu",
    shading: str = "full",
) -> dict[str, Tensor]:
    """As `render`, for scenes and cameras made by hand (`hand_made`, `part`, `Camera`, `look`)."""
    size = _check(size, shading)
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"rooms: no such device: {device!r}; use cpu or cuda") from error
    cameras = [camera for _, camera in views]
    linear, exact, cosine = trace(views, size, device, shading)
    depth, valid = kinect(exact, cosine, cameras)
    return {"rgb": develop(linear, cameras), "depth": depth, "valid": valid, "exact": exact}


def intervene(rgb: Tensor, name: str, generator: torch.Generator | None = None, patch: int = 16) -> Tensor:
    """Take one kind of cue out of pictures, rgb uint8 (B, 3, H, W), without touching the scene.

    "none" returns them as they are; "grey" keeps BT.601 luma only; "shuffled_patches" cuts each picture into `patch` x
    `patch` pixels and puts them back in random order (drawn from `generator`, the same for the whole batch), leaving
    rests at the right and lower border in place. Raises `UserError` for another name.
    """
    if name not in INTERVENTIONS:
        raise UserError(f"rooms: unknown intervention {name!r}; choose one of {', '.join(INTERVENTIONS)}")
    if name == "grey":
        weights = torch.tensor([0.299, 0.587, 0.114], device=rgb.device).reshape(3, 1, 1)
        return (rgb.float() * weights).sum(-3, keepdim=True).round().to(torch.uint8).expand_as(rgb).contiguous()
    if name == "shuffled_patches":
        b, c, rows, cols = rgb.shape[0], rgb.shape[1], rgb.shape[2] // patch, rgb.shape[3] // patch
        inner = rgb[..., : rows * patch, : cols * patch]
        pieces = inner.reshape(b, c, rows, patch, cols, patch).permute(2, 4, 0, 1, 3, 5).flatten(0, 1)
        order = torch.randperm(rows * cols, generator=generator).to(rgb.device)
        mixed = pieces[order].unflatten(0, (rows, cols)).permute(2, 3, 0, 4, 1, 5)
        out = rgb.clone()
        out[..., : rows * patch, : cols * patch] = mixed.reshape(b, c, rows * patch, cols * patch)
        return out
    return rgb

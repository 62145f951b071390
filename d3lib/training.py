"""The training loop: one readable loop for regression losses and the adversarial one alike.

It knows networks, losses and batches; what to train on which data is decided by its caller. Where torchrun started
several processes, the same loop runs in each of them on its slice of every batch (see `d3lib.distributed`).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import math
import os
import platform
import re
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d3lib import distributed
from d3lib.artefacts import atomic_path
from d3lib.errors import StoppedError, UserError
from d3lib.losses import discriminator_input, discriminator_loss, generator_loss
from d3lib.models import D3Net, PatchDiscriminator

Batch = Mapping[str, Tensor]
Cast = Callable[[], contextlib.AbstractContextManager[Any]]
CHECKPOINT_VERSION = 1


class DivergedError(UserError):
    """The loss is no longer a finite number; `step` is the first at which it was not."""

    def __init__(self, step: int) -> None:
        super().__init__(f"training diverged: the loss of step {step} is not finite; lower learning_rate")
        self.step = step


def pick_device(name: str = "auto") -> str:
    """`name` itself, or for "auto" CUDA where there is one, else the CPU. Raises `UserError` for a missing GPU."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {name!r}: no CUDA device is visible; use --device cpu")
    return name


def pick_precision(precision: str, device: str) -> str:
    """Resolve "auto": bf16 on a GPU that has it natively (a T4 only emulates it), fp16 on other GPUs, else float32."""
    if precision != "auto":
        if precision == "fp16" and not device.startswith("cuda"):
            raise UserError("precision fp16 needs a CUDA device; use float32 or bf16 here")
        return precision
    if not device.startswith("cuda"):
        return "float32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def pick_compiler(device: str) -> str | None:
    """How a training pass runs: "graphs" on a GPU (see `fit`), else None, which is operation by operation.

    The environment variable D3LIB_COMPILE names another way: none, graphs, or a backend of `torch.compile` such as
    inductor. As a run's device, it says how to compute and not what. Raises `UserError` for an unknown one, and for
    graphs where they cannot be.
    """
    alone = distributed.started() == 1  # several processes exchange gradients while they go backwards
    name = os.environ.get("D3LIB_COMPILE") or ("graphs" if device.startswith("cuda") and alone else "none")
    if name not in (own := ["none", "graphs", "aot_eager"]) and name not in torch.compiler.list_backends():
        known = ", ".join([*own, *torch.compiler.list_backends()])  # asked only now: it takes seconds to import
        raise UserError(f"D3LIB_COMPILE is {name!r}; it may be one of {known}")
    if name == "graphs" and not (device.startswith("cuda") and alone):
        raise UserError("D3LIB_COMPILE=graphs needs a CUDA device and a single process; unset it")
    return None if name == "none" else name


def pick_layout(device: str, precision: str, size: tuple[int, int]) -> torch.memory_format:
    """How the numbers of a network that is trained on pictures of `size` (H, W) lie in memory.

    Channels last, but for float32 on a processor with AVX2 and no AVX-512, where that is slow for a convolution's
    gradient to its weights: from about 112x144 on that costs D3-Net more than the layout gains it elsewhere.
    """
    slow = device == "cpu" and precision == "float32" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return torch.contiguous_format if slow and math.prod(size) > 96 * 128 else torch.channels_last


@functools.cache
def keep_memory() -> None:
    """Let this process keep the memory that tensors on the CPU have freed, if its C library is glibc.

    That gives large pieces back to the system at once, and gets them anew, page by page, a step later. `d3lib bench`
    tells the gain. It holds for the whole process, until its end; the environment variable D3LIB_KEEP_MEMORY=0, set
    before the first call, leaves all as it is.
    """
    if platform.libc_ver()[0] == "glibc" and os.environ.get("D3LIB_KEEP_MEMORY") != "0":
        for option, value in ((-4, 0), (-1, -1), (-2, 1 << 26)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD: mallopt(3)
            ctypes.CDLL(None).mallopt(option, value)


def autocast(device: str, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The context in which a network runs at the given precision ("float32", "bf16" or "fp16")."""
    if precision == "float32":
        return contextlib.nullcontext()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    # without its cache of narrowed weights, which are used once a pass and must not outlive it in a graph
    return torch.autocast(device.split(":")[0], dtype=dtype, cache_enabled=False)


class Adversary:
    """The discriminator's side of `gan`: its network, its optimiser, and the two least-squares terms.

    D learns to answer 1 for (true depth, image) and 0 for (predicted depth, image); the depth network is paid
    for making D answer 1. Both see depth times the valid mask, or holes would give the answer away.
    """

    def __init__(
        self, discriminator: PatchDiscriminator, variant: str, max_depth: float, adam: Mapping[str, Any]
    ) -> None:
        self.net = discriminator
        self.model = distributed.wrap(discriminator)
        self.variant = variant
        self.max_depth = max_depth
        self.optimiser = torch.optim.Adam(discriminator.parameters(), **adam)

    def learn(self, pred: Tensor, batch: Batch, cast: Cast, scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
        """One step of D on real and fake depth (B, 1, H, W); returns mean D(real) and D(fake)."""
        self.net.requires_grad_(True)
        with cast():
            # in one pass: several processes average gradients once a pass
            seen = torch.cat([self._seen(batch["depth"], batch), self._seen(pred.detach(), batch)])
            real, fake = self.model(seen).chunk(2)
            loss = discriminator_loss(real, fake)
        self.optimiser.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(self.optimiser)
        return {"d_real": real.detach().mean(), "d_fake": fake.detach().mean()}

    def penalty(self, pred: Tensor, batch: Batch) -> Tensor:
        """What the depth network pays while D still tells its maps from true ones: a scalar with gradient to `pred`."""
        self.net.requires_grad_(False)  # this pass is for the depth network; D's own gradients are not wanted
        return generator_loss(self.net(self._seen(pred, batch)), variant=self.variant)

    def _seen(self, depth: Tensor, batch: Batch) -> Tensor:
        """What D judges of a true or predicted depth: (B, 4, H, W)."""
        return discriminator_input(depth, batch["rgb"], batch["valid"], self.max_depth)


@dataclass
class Trace:
    """What happened during training: the learning curve, and the weights that did best on validation scenes."""

    curve: list[dict[str, float | None]] = field(default_factory=list)
    best_step: int = 0
    best_error: float = math.inf
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0  # spent in optimiser steps, evaluation left out

    def add(self, point: dict[str, float | None], net: nn.Module) -> None:
        """Append a point of the curve; keep the weights if its `val_rms` is the best so far."""
        self.curve.append(point)
        error = point.get("val_rms")
        if error is not None and error < self.best_error:
            self.best_step, self.best_error = int(point["step"] or 0), error
            self.best_weights = {name: value.detach().cpu().clone() for name, value in net.state_dict().items()}


def fit(
    net: D3Net,
    pixel_loss: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    batches: Callable[[int], Iterator[Batch]],
    *,
    steps: int,
    learning_rate: float = 2e-4,
    betas: tuple[float, float] = (0.5, 0.999),
    adversary: PatchDiscriminator | None = None,
    lam: float = 20.0,
    adversarial_from: int = 0,
    variant: str = "paper",
    device: str = "cpu",
    precision: str = "float32",
    compiler: str | None = None,
    evaluate: Callable[[nn.Module], dict[str, float | None]] | None = None,
    evaluations: int = 10,
    clip_norm: float = 0.0,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    identity: str = "",
    progress: Callable[[str], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Trace:
    """Train `net` in place for `steps` optimiser steps, and return the trace.

    In several processes each gives its slice of every batch. `pixel_loss` sees the whole batch, so that l1, eigen or
    berhu are those of one process; only batch normalisation counts each slice alone. Parameters stay equal in all
    of them. Process 0 evaluates, reports and saves while the others wait; their traces lack what `evaluate` gives.
    On a CPU the process keeps freed memory from then on (`keep_memory`).

    Args:
        net: RGB float (B, 3, H, W) in [0, 1] → metres (B, 1, H, W).
        pixel_loss: (pred, target, mask) → scalar; with an `adversary` it is the L1 term.
        batches: start step → endless iterator of batches (rgb, depth, valid) on `device`; it must be a pure
            function of the step, so that a resumed run sees what an uninterrupted one would have seen. In
            several processes: this one's slices, all of the same size.
        adversary: the discriminator, for `gan`: loss = adversarial term + `lam` · pixel loss.
        compiler: how network and pixel loss run. None: operation by operation. "graphs": on a GPU, recorded once as
            two CUDA graphs, forwards and backwards, and replayed; all batches must be of one size. Else the backend
            with which `torch.compile` translates the network, such as inductor. The first step then takes longer,
            with inductor minutes; evaluation is never compiled.
        adversarial_from: with an `adversary`, train so many steps with `lam` · pixel loss alone, then start D and
            add its term: the two phases of Jung et al. (2017). 0 is the paper's single phase.
        evaluate: called at `evaluations` equally spaced steps (the last step among them); its `val_rms` chooses
            the best weights.
        clip_norm: scale the depth network's gradient down to this norm where it is larger; 0, as in the paper: never.
        checkpoint: file to resume from if it exists, and to save to every `checkpoint_seconds` seconds.
        identity: what the checkpoint belongs to; a checkpoint of something else is refused.
        stop: asked after every step; once it says yes, a checkpoint is saved and training ends by `StoppedError`.

    Raises:
        DivergedError: the loss is not finite. The checkpoint is the last one before that.
        StoppedError: `stop` said so.
        UserError: the checkpoint is damaged or belongs to another run.
    """
    if device == "cpu":
        keep_memory()
    adam = {"lr": learning_rate, "betas": betas, "fused": True}
    optimiser = torch.optim.Adam(net.parameters(), **adam)
    opponent = None if adversary is None else Adversary(adversary, variant, net.max_depth, adam)
    scaler = torch.amp.GradScaler(device.split(":")[0], enabled=precision == "fp16")
    trace, start = Trace(), 0
    if checkpoint is not None and checkpoint.exists():
        start = _load_checkpoint(checkpoint, identity, net, optimiser, opponent, scaler, trace)
    model: nn.Module = net
    if compiler not in (None, "graphs"):
        torch.compiler.reset()  # or what was compiled before in this process would count against this network
        model = torch.compile(net, backend=compiler, fullgraph=True, dynamic=False)
    model = distributed.wrap(model)
    leading = distributed.rank() == 0
    points = min(evaluations, steps)
    milestones = {round(steps * (i + 1) / points) for i in range(points)}
    source = batches(start)

    def cast() -> contextlib.AbstractContextManager[Any]:
        return autocast(device, precision)

    def forwards(rgb: Tensor, depth: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        with cast():
            pred = model(rgb)  # (B, 1, H, W), metres
            return pred, pixel_loss(*map(distributed.gather, (pred, depth, valid)))

    net.train()
    clock = saved = time.perf_counter()
    spent = 0.0  # in optimiser steps of this process
    logs: dict[str, Tensor] = {}
    bad = torch.zeros((), dtype=torch.int64, device=device)  # the first step whose loss was not finite
    for step in range(start + 1, steps + 1):
        batch = next(source)
        seen = batch["rgb"], batch["depth"], batch["valid"]
        if compiler == "graphs" and step == start + 1:
            forwards = _recorded(net, forwards, seen)
        pred, loss = forwards(*seen)
        contested = opponent is not None and step > adversarial_from
        if contested:
            logs |= opponent.learn(pred, batch, cast, scaler)
        if opponent is not None:
            loss = lam * loss
        if contested:
            with cast():
                loss = opponent.penalty(pred, batch) + loss
        optimiser.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        if clip_norm:
            scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(net.parameters(), clip_norm)
        scaler.step(optimiser)
        scaler.update()
        logs = distributed.average(logs | {"loss": loss.detach()})
        bad = torch.where((bad == 0) & ~torch.isfinite(torch.stack(list(logs.values()))).all(), step, bad)

        milestone = step in milestones
        stopped = distributed.as_the_first(stop())
        due = leading and checkpoint is not None and (stopped or time.perf_counter() - saved > checkpoint_seconds)
        if not (milestone or due or stopped or step % 50 == 0):
            continue
        if first_bad := int(bad):  # waits for the GPU, so not at every step
            raise DivergedError(first_bad)
        shown = {name: float(value) for name, value in logs.items()}
        spent += time.perf_counter() - clock
        trace.seconds += time.perf_counter() - clock
        if progress is not None and leading:
            text = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
            progress(f"step {step}/{steps}  {text}  {(step - start) / spent:.1f} steps/s")
        if milestone:
            scores = evaluate(net) if evaluate is not None and leading else {}
            net.train()
            images = step * len(batch["rgb"]) * distributed.world()
            trace.add({"step": step, "images": images, **shown, **scores}, net)
        if checkpoint is not None and leading and (due or milestone):
            _save_checkpoint(checkpoint, identity, step, net, optimiser, opponent, scaler, trace)
            saved = time.perf_counter()
        if stopped and step < steps:
            raise StoppedError(f"stopped at step {step} of {steps}; the same command continues from there")
        clock = time.perf_counter()
    return trace


def _recorded(
    net: nn.Module, forwards: Callable[..., tuple[Tensor, Tensor]], sample: tuple[Tensor, ...]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`forwards` of tensors like `sample`, and its way back, as two CUDA graphs: a processor starts each as one piece.

    Piece by piece, it would start some thousand operations in every step, and take longer than the GPU to do them.
    Meanwhile nothing else may use the GPU, such as a thread that reads ahead into pinned memory.

    The replay raises ValueError for tensors of other shapes.
    """
    gc.collect()  # of a network before this one: what was recorded refers to itself
    whole = nn.Module()  # what is recorded, with the parameters that gradients are for
    whole.net, whole.forward = net, forwards
    before = [buffer.clone() for buffer in net.buffers()]
    if quiet := getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None):
        quiet(False)  # recorded on a stream of its own, as it must be
    replayed = torch.cuda.make_graphed_callables(whole, tuple(x.clone() for x in sample))
    with torch.no_grad():
        for buffer, value in zip(net.buffers(), before, strict=True):
            buffer.copy_(value)  # the passes that warmed up have moved the running statistics
    shapes = [x.shape for x in sample]

    def replay(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        if [x.shape for x in tensors] != shapes:  # a smaller one would be spread over the recorded one's memory
            raise ValueError(f"recorded for {shapes}, and given {[x.shape for x in tensors]}: give batches of one size")
        return replayed(*tensors)

    return replay


def _save_checkpoint(
    path: Path,
    identity: str,
    step: int,
    net: nn.Module,
    optimiser: torch.optim.Optimizer,
    opponent: Adversary | None,
    scaler: torch.amp.GradScaler,
    trace: Trace,
) -> None:
    """Write all that resuming needs; data order and flips are functions of the step, so no random state is in it."""
    state = {
        "version": CHECKPOINT_VERSION,
        "identity": identity,
        "step": step,
        "net": net.state_dict(),
        "optimiser": optimiser.state_dict(),
        "scaler": scaler.state_dict(),
        "trace": vars(trace),
    }
    if opponent is not None:
        state |= {
            "adversary": opponent.net.state_dict(),
            "adversary_optimiser": opponent.optimiser.state_dict(),
        }
    try:
        with atomic_path(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:  # torch has its own words for a full disk
        reason = error.strerror if isinstance(error, OSError) else "the disk is full or fails"
        raise UserError(
            f"{path}: a checkpoint cannot be written ({reason}); mend that, and the same command goes on from the last"
        ) from error


def _load_checkpoint(
    path: Path,
    identity: str,
    net: nn.Module,
    optimiser: torch.optim.Optimizer,
    opponent: Adversary | None,
    scaler: torch.amp.GradScaler,
    trace: Trace,
) -> int:
    """Restore everything in place and return the step reached."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums, and does not look at them when it reads
            if archive.testzip() or any(member.compress_type for member in archive.infolist()):
                raise ValueError("damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        own = (state["version"], state["identity"]) == (CHECKPOINT_VERSION, identity)  # here: they may be of any type
    except Exception as error:  # a damaged archive raises many kinds
        raise UserError(f"{path}: not a readable checkpoint; delete it to start this run afresh") from error
    if not own:
        raise UserError(f"{path}: belongs to another run or other training code; delete it to start afresh")
    try:
        net.load_state_dict(state["net"])
        _load_optimiser(optimiser, state["optimiser"])
        scaler.load_state_dict(state["scaler"])
        if opponent is not None:
            opponent.net.load_state_dict(state["adversary"])
            _load_optimiser(opponent.optimiser, state["adversary_optimiser"])
        found, step = Trace(**state["trace"]), int(state["step"])
        numbers = found.best_step + found.best_error + found.seconds
        if step < 0 or math.isnan(numbers) or (type(found.curve), type(found.best_weights)) != (list, dict):
            raise ValueError("the trace of another kind of training")
        vars(trace).update(vars(found))
        return step
    except Exception as error:  # names, shapes or types that are not those of this run
        raise UserError(f"{path}: does not fit this network; delete it to start this run afresh") from error


def _load_optimiser(optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore an optimiser, its moments lying in memory as its parameters do here.

    Another machine may have had another layout (`pick_layout`), and fused Adam takes numbers in the order in which they
    lie, without asking.
    """
    optimiser.load_state_dict(state)
    for parameter, kept in optimiser.state.items():
        for name, value in kept.items():
            if value.shape == parameter.shape:
                kept[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def progress_line() -> Callable[[str], None]:
    """A function that shows the newest line of progress: rewritten in place in a notebook and on a terminal.

    Where output is a file or a pipe, every line is printed.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None and hasattr(shell, "kernel"):
        from IPython.display import Pretty, display

        class Line(Pretty):
            """Shows its text without quotation marks."""

        handle = display(Pretty("training ..."), display_id=True)
        return lambda text: handle.update(Pretty(text))
    if sys.stderr.isatty():
        return lambda text: print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    return lambda text: print(text, file=sys.stderr, flush=True)

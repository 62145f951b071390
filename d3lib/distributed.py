"""One training run in several processes, each on its own GPU or a share of the CPU, as torchrun starts them.

Every process holds the whole network and takes its slice of each step's batch. What they compute together is the
step that one process would have done with the whole batch, to rounding, with one exception: batch normalisation in
training mode uses the statistics of the process's own slice, and the running ones kept are those of the first
process. So a run on N GPUs is another run than on one, and its key says so.

In a lone process each function here does nothing, at no cost.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from d3lib.errors import UserError


def started() -> int:
    """How many processes torchrun started for this run; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


@contextlib.contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the other processes for the block; yields this one's device, "cuda" being the GPU of its number.

    Raises:
        UserError: torchrun started more processes than there are GPUs.
    """
    if started() == 1:
        yield device
        return
    gpu = device.startswith("cuda")
    if gpu:
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(f"{started()} processes share this machine's GPUs, of which there are {gpus}; start fewer")
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    # The first process may render data or evaluate for hours; one that died is noticed by torchrun, not by this.
    own = torch.device(device) if gpu else None
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(days=7), device_id=own)
    yield device
    dist.barrier()
    dist.destroy_process_group()  # not after an error: it would wait for those that torchrun is about to end


def world() -> int:
    """How many processes have joined."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0. Process 0 alone evaluates, reports and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Let process 0 do the block before all others, who then find what it prepared."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world() > 1:
        dist.barrier()


def as_the_first(value: bool) -> bool:
    """What process 0 gives here, in every process."""
    said = [value]
    if world() > 1:
        dist.broadcast_object_list(said)
    return said[0]


def wrap(net: nn.Module) -> nn.Module:
    """`net`, made to start from process 0's values and to average its gradients over the processes."""
    if world() == 1:
        return net
    device = next(net.parameters()).device
    return DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None)


def gather(x: Tensor) -> Tensor:
    """The whole batch (world x B, ...) from each process's slice (B, ...), so that a loss sees what one process would.

    Counts of valid pixels, BerHu's threshold and the like are then right whatever a slice holds. Gradient reaches
    this process's slice alone, times the number of processes: averaged over them it is that of the whole batch.
    """
    if world() == 1:
        return x
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.detach())
    own = x.view_as(x)
    if own.requires_grad:
        own.register_hook(lambda gradient: gradient * world())
    parts[rank()] = own
    return torch.cat(parts)


def average(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each scalar's mean over the processes."""
    if world() == 1:
        return values
    mean = torch.stack(list(values.values())) / world()
    dist.all_reduce(mean)
    return dict(zip(values, mean, strict=True))

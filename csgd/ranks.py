"""Ranks: processes that train one network together, each on its share of every batch.

Without a process group there is one rank, and every function here is the identity.
"""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class RanksDifferError(RuntimeError):
    """The parameters of two ranks are not the same bits."""


@dataclass(frozen=True)
class Share:
    """The part of every batch that one of `ranks` ranks takes."""

    rank: int = 0
    ranks: int = 1

    def of(self, batch: Tensor) -> Tensor:
        """batch [n, …] → the rows of this rank: n / ranks of them, rounded up or down."""
        return batch.tensor_split(self.ranks)[self.rank]

    @property
    def offset(self) -> int:
        """What is added to a seed, so that ranks draw different numbers; rank 0 draws what a single one does."""
        return self.rank * 2_654_435_761  # torch on a CPU reads the lower 32 bits of a seed alone


def own_share() -> Share:
    """The share of this process."""
    return Share(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Share()


def is_first() -> bool:
    """Whether this is rank 0, the one that writes."""
    return own_share().rank == 0


@contextmanager
def group(device: torch.device) -> Iterator[None]:
    """A process group of the ranks that RANK, WORLD_SIZE and MASTER_ADDR in the environment tell of."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield
    dist.destroy_process_group()  # not after an error: it would wait for ranks that may be gone


def total(value: Tensor) -> Tensor:
    """The sum over all ranks, the same bits on each."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def from_first(value: Any) -> Any:
    """Rank 0's value, on every rank; tensors come on the CPU."""
    if not dist.is_initialized():
        return value
    held = [value]
    dist.broadcast_object_list(held, device=torch.device("cpu"))
    return held[0]


def gathered(value: Any) -> list[Any]:
    """The values of all ranks, in their order."""
    if not dist.is_initialized():
        return [value]
    held = [None] * dist.get_world_size()
    dist.all_gather_object(held, value)
    return held


def at_first(value: Any) -> list[Any] | None:
    """The values of all ranks, in their order, on rank 0; None on the others."""
    if not dist.is_initialized():
        return [value]
    held = [None] * dist.get_world_size() if is_first() else None
    dist.gather_object(value, held)
    return held


def parallel(model: nn.Module) -> nn.Module:
    """`model`, with gradients that are the mean over all ranks; to be made anew after a cut."""
    if not dist.is_initialized():
        return model
    # Kernels of one pixel have strides that mean nothing, and DDP copies them if they are not those it expects.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(
        model,
        forward_sync_buffers=False,  # they are shared once an epoch: `share_buffers`
        # A step may leave a parameter without a gradient, on some ranks or on all.  It also keeps DDP from putting
        # gradients together in another order after its first step, which a run that goes on would not have done.
        find_unused_parameters=True,
    )


def alone(model: nn.Module) -> AbstractContextManager:
    """Within it gradients add up on each rank, and wait for the next backward pass outside of it."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Gives every rank the running statistics of rank 0, which have seen its shares alone."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


@torch.no_grad()
def check_equal(model: nn.Module, step: int) -> None:
    """RanksDifferError if a rank's parameters are not rank 0's, bit by bit."""
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().cpu().flatten().view(torch.uint8).numpy())
    first, *others = gathered(digest.hexdigest())
    differ = [str(rank) for rank, other in enumerate(others, 1) if other != first]
    if differ:
        raise RanksDifferError(f"after step {step} the parameters of rank {', '.join(differ)} are not those of rank 0")

"""Stop all ranks at the same step, when the first of them has no more batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar, cast

import torch
import torch.distributed as dist

Batch = TypeVar("Batch")


def stop_together(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield batches for as long as every rank has one.

    DDP and FSDP block forever if one rank takes a step more than the others, and streams of
    unknown length end at different steps. Before each step all ranks tell one another whether they
    have a batch. As soon as one has none, all stop; batches that only some ranks have are dropped.

    The exchange is one gloo all-reduce of 4 bytes between the hosts' processors: no sync with the
    device. Batches are not read ahead, so that the loader's `state_dict` stays that of the step.
    Without torch.distributed, or with one rank, all batches are yielded.

    Args:
        batches: this rank's loader; all ranks must iterate.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        yield from batches
        return
    group = host_group()
    try:
        iterator, none = iter(batches), object()
        while True:
            batch = next(iterator, none)
            if not on_every_rank(batch is not none, group):
                return
            yield batch  # type: ignore[misc]
    finally:
        dist.destroy_process_group(group)


def host_group() -> dist.ProcessGroup:
    """Return a gloo group of all ranks, since NCCL has no collectives of host tensors."""
    # Typed since torch 2.15 as a group or the number of none, which a rank gets that is not in it.
    return cast("dist.ProcessGroup", dist.new_group(backend="gloo"))


def on_every_rank(fact: bool, group: dist.ProcessGroup) -> bool:
    """Return whether a fact holds on all ranks; 4 bytes between hosts, no sync with a device."""
    flag = torch.tensor(fact, dtype=torch.int32)
    dist.all_reduce(flag, dist.ReduceOp.MIN, group=group)
    return bool(flag)

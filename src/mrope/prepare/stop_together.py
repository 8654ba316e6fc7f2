"""Stop all ranks at the same step, when the first of them has no more batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

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
    # A group of its own: NCCL has no collectives of host tensors. Of any type: since torch 2.15 it
    # may also be the number of no group, which a rank gets that is not in it.
    group: Any = dist.new_group(backend="gloo")
    try:
        iterator, none = iter(batches), object()
        while True:
            batch = next(iterator, none)
            has_batch = torch.tensor(batch is not none, dtype=torch.int32)
            dist.all_reduce(has_batch, dist.ReduceOp.MIN, group=group)
            if not has_batch:
                return
            yield batch  # type: ignore[misc]
    finally:
        dist.destroy_process_group(group)

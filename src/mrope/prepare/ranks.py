"""Find this process's rank among those that share a dataset."""

from __future__ import annotations

import torch.distributed as dist

from mrope.arrays import as_whole


def find_rank(rank: int | None, num_replicas: int | None) -> tuple[int, int]:
    """Return rank and number of ranks, those of torch.distributed where none are given.

    Without torch.distributed, or before it is initialised, these are 0 and 1.

    Raises:
        TypeError: one of them is not an int.
        ValueError: there are no ranks, or so many do not have this one.
    """
    distributed = dist.is_available() and dist.is_initialized()
    if num_replicas is None:
        num_replicas = dist.get_world_size() if distributed else 1
    if rank is None:
        rank = dist.get_rank() if distributed else 0
    num_replicas, rank = as_whole("num_replicas", num_replicas, 1), as_whole("rank", rank, 0)
    if rank >= num_replicas:
        raise ValueError(f"rank must be below num_replicas ({num_replicas}), not {rank}")
    return rank, num_replicas

"""DDP on two gloo processes: equal losses on every rank, where last batches are uneven too."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from integration.common import STAGES, count_own_positions, loader, optimizer, prepared, rows

RANKS = 2
# Shuffled, so that ranks meet batches without pictures, whose towers get no gradient, apart.
FAMILY = "qwen3_vl"


def shard(kind: str, rank: int) -> dict[str, Any]:
    """Return what makes a rank's batches: by the sampler of torch, or each its own part."""
    if kind == "sampler":  # 14 rows: 3 + 3 + 1 on both ranks
        examples: Any = rows(FAMILY, count=14)
        return {"dataset": examples, "sampler": DistributedSampler(examples, RANKS, rank)}
    parts = rows(FAMILY, count=13)  # 3 + 3 + 2 rows, and 3 + 2
    return {"dataset": parts[8:] if rank else parts[:8]}


def join(kind: str, model: Any) -> AbstractContextManager[Any]:
    return Join([model]) if kind == "join" else nullcontext()


def train(rank: int, kind: str, stage: str) -> tuple[list[float], float, int]:
    """Return a rank's losses, a sum over the trained weights, and its own computations."""
    own, collate = prepared(stage, FAMILY)
    calls = count_own_positions(own)
    model = DistributedDataParallel(own, find_unused_parameters=True)
    step = optimizer(model)
    losses = []
    with join(kind, model):
        for batch in loader(collate=collate, **shard(kind, rank)):
            loss = model(**batch).loss
            loss.backward()
            step.step()
            step.zero_grad()
            losses.append(loss.item())
    weights = sum(float(parameter.detach().double().sum()) for parameter in own.parameters())
    return losses, weights, calls[0]


def worker(rank: int, kind: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    torch.save([train(rank, kind, stage) for stage in STAGES], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind,batches", [("sampler", [3, 3]), ("join", [3, 2])])
def test_equal_losses(kind: str, batches: list[int], tmp_path: Path) -> None:
    spawn: Any = mp.spawn  # type: ignore[attr-defined]
    spawn(worker, (kind, str(tmp_path)), nprocs=RANKS)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    assert found[0][0][1] == found[1][0][1]
    for rank, (off, on, attached) in enumerate(found):
        assert len(set(off[0])) == batches[rank]
        assert on[:2] == off[:2]
        assert attached[:2] == off[:2]
        assert (off[2], on[2], attached[2]) == (batches[rank], 0, 0)

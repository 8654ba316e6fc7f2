"""FSDP2 over two processes, one of which has text alone: with fixed shapes both run their tower."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import (
    ProcessExitedException,
    ProcessRaisedException,
    spawn,
)

from mrope import MRopeCollator, Shapes, VisionSpec
from support.models import model_config, tiny_examples, tiny_model, tiny_spec

FAMILY = "qwen3_vl"
SHAPES = Shapes(
    tokens=(128,), patches=(256,), longest=128, patches_per_segment=8, tokens_per_example=8
)
STEPS = 3


def train(rank: int, folder: str) -> None:
    """Train with fixed shapes, and save the losses; then without, which fails in one way or another."""
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="2")
    file = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=file, rank=rank, world_size=2)
    torch.save(run_steps(rank, SHAPES), f"{folder}/{rank}.pt")
    # Long enough for one collective; in what follows a rank may wait for one in vain.
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3), dist.group.WORLD)
    run_steps(rank, None)
    (Path(folder) / f"{rank}.met").touch()


def run_steps(rank: int, shapes: Shapes | None) -> list[float]:
    from torch.distributed.fsdp import fully_shard

    from mrope.hf import attach

    model: Any = attach(tiny_model(FAMILY).train())
    base = model.model
    for layer in (*base.visual.blocks, *base.language_model.layers):
        fully_shard(layer)
    fully_shard(base.visual)
    fully_shard(model)
    vision = VisionSpec.from_config(model_config(FAMILY))
    collate = MRopeCollator(None, tiny_spec(FAMILY), vision, shapes=shapes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    examples = tiny_examples(FAMILY, images=rank == 0, videos=False)
    losses = []
    for _ in range(STEPS):
        loss: Any = model(**collate(examples)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks have left."""
    path = tmp_path_factory.mktemp("ranks")
    run: Any = spawn
    with suppress(ProcessExitedException, ProcessRaisedException):
        run(train, (str(path),), nprocs=2)
    return path


def test_a_rank_with_text_alone_trains_beside_one_with_images(folder: Path) -> None:
    for rank in range(2):
        losses = torch.load(folder / f"{rank}.pt")
        assert len(losses) == STEPS
        assert losses[-1] < losses[0]


def test_without_fixed_shapes_the_ranks_do_not_meet(folder: Path) -> None:
    assert not list(folder.glob("*.met"))

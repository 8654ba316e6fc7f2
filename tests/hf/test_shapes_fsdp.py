"""FSDP2 over two processes, one of which has text alone: with fixed shapes both run their tower."""

from __future__ import annotations

import os
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
STEPS = 10


def train(rank: int, folder: str, fixed: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    from mrope.hf import attach

    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="2")
    limit = timedelta(seconds=40)
    file = f"file://{folder}/store-{fixed}"
    dist.init_process_group("gloo", init_method=file, rank=rank, world_size=2, timeout=limit)
    model: Any = attach(tiny_model(FAMILY).train())
    base = model.model
    for layer in (*base.visual.blocks, *base.language_model.layers):
        fully_shard(layer)
    fully_shard(base.visual)
    fully_shard(model)
    vision = VisionSpec.from_config(model_config(FAMILY))
    collate = MRopeCollator(None, tiny_spec(FAMILY), vision, shapes=SHAPES if fixed else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    examples = tiny_examples(FAMILY, images=rank == 0, videos=False)
    losses = []
    for _ in range(STEPS):
        loss: Any = model(**collate(examples)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    torch.save(losses, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run_two_ranks(folder: Path, fixed: bool) -> None:
    run: Any = spawn
    run(train, (str(folder), fixed), nprocs=2)


def test_a_rank_with_text_alone_trains_beside_one_with_images(tmp_path: Path) -> None:
    run_two_ranks(tmp_path, fixed=True)
    for rank in range(2):
        losses = torch.load(tmp_path / f"{rank}.pt")
        assert len(losses) == STEPS
        assert losses[-1] < losses[0]


def test_without_fixed_shapes_the_ranks_do_not_meet(tmp_path: Path) -> None:
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        run_two_ranks(tmp_path, fixed=False)

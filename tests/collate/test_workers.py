"""In the worker: every start method, any number of workers, and nothing heavy imported."""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mrope import MRopeCollator, MRopeSpec, SpanMismatchError
from mrope.spec.spec import example_config
from support.batches import Row, merge_rows, random_batch
from support.fresh import run_python

SPEC = MRopeSpec.from_config(example_config("qwen2_5_vl"), "transformers-5.23")
BATCHES = 200
HEAVY = ("transformers", "datasets", "pydantic", "rich", "typer")


class Batches(Dataset[Any]):
    """Batch number `index`, made anew wherever it is asked for; the one named `bad` is cut short."""

    def __init__(self, length: int, bad: int | None = None) -> None:
        self.length = length
        self.bad = bad

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = random.Random(index)
        if index == self.bad:
            row = Row()
            row.add(SPEC.image_token_id, 3, kind=1)
            row.images.append([1, 4, 4])
            return merge_rows(rng, [row], padding="none")
        return random_batch(rng, SPEC)


def as_batch(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Take the one made-up batch of a list, as tensors, with a list of what the worker imported."""
    (arguments,) = examples
    batch: dict[str, Any] = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in arguments.items()
        if value is not None
    }
    batch["imported"] = [name for name in HEAVY if name in sys.modules]
    batch["threads"] = torch.get_num_threads()
    return batch


def load(length: int, bad: int | None = None, **options: Any) -> Any:
    collate = MRopeCollator(as_batch, SPEC)
    return DataLoader(Batches(length, bad), batch_size=1, collate_fn=collate, **options)


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    return list(load(BATCHES))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_two_workers_give_what_one_process_gives(method: str, alone: list[dict[str, Any]]) -> None:
    loader = load(BATCHES, num_workers=2, multiprocessing_context=method, persistent_workers=True)
    seen = 0
    for ours, theirs in zip(loader, alone, strict=True):
        for name in ("position_ids", "rope_deltas"):
            assert torch.equal(ours[name], theirs[name]) and ours[name].dtype == torch.int64
        assert ours["threads"] == 1  # what DataLoader sets in a worker, left as it is
        if method == "spawn":
            assert ours["imported"] == []
        seen += 1
    assert seen == BATCHES
    again = next(iter(loader))
    assert torch.equal(again["position_ids"], alone[0]["position_ids"])


def test_a_bad_sample_surfaces_with_its_message() -> None:
    loader = load(3, bad=1, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(SpanMismatchError, match="row 0, image 0: found 3 placeholder tokens"):
        list(loader)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning needs a CUDA device")
def test_pinned_batches_are_equal_too(alone: list[dict[str, Any]]) -> None:
    for ours, theirs in zip(load(20, num_workers=1, pin_memory=True), alone, strict=False):
        assert ours["position_ids"].is_pinned()
        assert torch.equal(ours["position_ids"], theirs["position_ids"])


def test_importing_mrope_and_computing_positions_imports_nothing_heavy() -> None:
    code = f"""
import sys
from mrope import MRopeCollator, MRopeSpec
print([name for name in {HEAVY} if name in sys.modules])
from mrope.spec.spec import example_config
collate = MRopeCollator(None, MRopeSpec.from_config(example_config("qwen3_vl")))
batch = collate([{{"input_ids": [101, 102, 7], "image_grid_thw": [[1, 2, 2]]}}])
print(batch["position_ids"].shape, [name for name in {HEAVY} if name in sys.modules])
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "torch.Size([3, 1, 3]) []"]

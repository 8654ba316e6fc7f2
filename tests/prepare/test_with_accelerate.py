"""`TokenBudgetSampler` in transformers' `Trainer` and in accelerate: nothing but the sampler is the user's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from transformers import Trainer

from mrope import MRopeError, TokenBudgetSampler
from prepare.trainer_run import BUDGET, EPOCHS, LENGTHS, Budgeted, make_trainer, run

Results = list[dict[str, Any]]


def assert_exact(ranks: Results, stop: int) -> None:
    """Budgets hold, every epoch has each example once, and the resumed run is the rest of the whole."""
    length = ranks[0]["length"]
    sampler = TokenBudgetSampler(LENGTHS, BUDGET, seed=3, num_replicas=len(ranks), rank=0)
    plans = [sampler.plan(epoch) for epoch in range(EPOCHS + 1)]
    for rank, one in enumerate(ranks):
        # The sampler's epochs in turn, whatever their lengths.
        expected = [plan.batch(step, rank) for plan in plans for step in range(len(plan.grid_SR))]
        assert one["steps"] == EPOCHS * length
        assert one["batches"] == expected[: EPOCHS * length]
        assert one["rest"] == one["batches"][stop:]
        assert one["rest_weight"] == one["weight"] != 1
    taken = Counter(i for one in ranks for batch in one["batches"][:length] for i in batch)
    assert taken == Counter(range(len(LENGTHS)))
    assert (
        max(sum(LENGTHS[i] for i in batch) for one in ranks for batch in one["batches"]) <= BUDGET
    )


@pytest.mark.parametrize("stop", [20, 40])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_one_rank(stop: int, accumulated: int, tmp_path: Path) -> None:
    found = run(tmp_path, stop // accumulated, gradient_accumulation_steps=accumulated)
    if accumulated == 2:  # an epoch of 27 batches has 14 steps, the last of one batch
        assert found["steps"] == EPOCHS * 14
        found["steps"] = EPOCHS * 27
        stop = stop if stop < 27 else 27 + (stop // 2 - 14) * 2
    assert_exact([found], stop)


def test_two_ranks(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*words, "-m", "prepare.trainer_run", str(tmp_path)],
        env={"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.defpath, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_exact([json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)], 25)


def test_the_loader_is_the_trainers_own_but_for_its_batches(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    given = make_trainer(tmp_path, **options).get_train_dataloader()
    plain = make_trainer(tmp_path, Trainer, **options).get_train_dataloader()
    assert type(given) is type(plain)
    for name in ("num_workers", "collate_fn", "persistent_workers", "prefetch_factor", "timeout"):
        assert type(getattr(given, name)) is type(getattr(plain, name))
    assert [batch["index"].tolist() for batch in given] == [
        *TokenBudgetSampler(LENGTHS, BUDGET, seed=3)
    ]
    assert len(plain) == 8  # a loader of any other sampler is as before


def test_the_epoch_reaches_a_loader_that_skips(tmp_path: Path) -> None:
    """By accelerate alone: `Trainer` sets the epoch of the sampler itself only from 5.17 on."""
    loader = accelerate.skip_first_batches(make_trainer(tmp_path).get_train_dataloader(), 5)
    loader.set_epoch(1)
    sampler = TokenBudgetSampler(LENGTHS, BUDGET, seed=3)
    sampler.set_epoch(1)
    assert [batch["index"].tolist() for batch in loader] == [*sampler][5:]


def test_accelerate_alone_takes_the_batches_as_they_are() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    sampler = TokenBudgetSampler(LENGTHS, BUDGET)
    loader: Any = DataLoader(range(len(LENGTHS)), batch_sampler=sampler)  # type: ignore[arg-type]
    ready = accelerator.prepare(loader)
    for epoch in (0, 4):
        ready.set_epoch(epoch)
        assert sampler.epoch == epoch
        assert (
            [batch.tolist() for batch in ready]
            == [batch.tolist() for batch in loader]
            == [*sampler]
        )


class OfOtherRanks(Budgeted):
    """Made before torch.distributed was started, say."""

    def _get_train_sampler(self, *_: object) -> TokenBudgetSampler:
        return TokenBudgetSampler(LENGTHS, BUDGET, rank=1, num_replicas=2)


class Resumed(Budgeted):
    def _get_train_sampler(self, *_: object) -> TokenBudgetSampler:
        batches = iter(sampler := TokenBudgetSampler(LENGTHS, BUDGET))
        next(batches)
        sampler.resume(batches.state_dict())
        return sampler


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (OfOtherRanks, {}, "was made for rank 1 of 2, and accelerate runs rank 0 of 1"),
        (Resumed, {}, "was given a state by resume, and Trainer goes on by itself"),
        (Budgeted, {"split_batches": True}, "neither dispatch_batches nor split_batches"),
    ],
)
def test_what_would_lose_examples_is_refused(
    kind: type, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, kind, accelerator_config=options)
    with pytest.raises(MRopeError, match=message):
        trainer.get_train_dataloader()


def test_no_trainer_is_imported_for_it() -> None:
    code = (
        "import sys; from mrope import TokenBudgetSampler; TokenBudgetSampler([5, 6], 10);"
        "print([name for name in ('transformers', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"

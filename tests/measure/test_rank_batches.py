"""Check the batches that `tests/measure/ranks.py` trains on."""

from __future__ import annotations

import pytest
import torch

from measure.rank_batches import BALANCES, Epoch, complete, qwen3_vl_config

EPOCH = Epoch(qwen3_vl_config(tiny=True, layers=None), 2, 1024, 4, 1, torch.float32)


def test_both_plans_have_the_same_examples() -> None:
    by_tokens, by_work = (sorted(EPOCH.steps[balance].examples_N) for balance in BALANCES)
    assert by_tokens == by_work == list(range(len(EPOCH.examples_N)))
    described = {balance: EPOCH.describe(balance) for balance in BALANCES}
    assert described["work"]["work_imbalance"] < described["tokens"]["work_imbalance"]


@pytest.mark.parametrize("balance", BALANCES)
def test_every_batch_has_an_image_and_a_clip_and_fits_the_ladder(balance: str) -> None:
    examples = 0
    for rank in range(2):
        free = EPOCH.batches(balance, rank, False, None)
        fixed = EPOCH.batches(balance, rank, True, EPOCH.shapes)
        for batch, padded in zip(free, fixed, strict=True):
            assert len(batch["image_grid_thw"]) and len(batch["video_grid_thw"])
            assert batch["input_ids"].shape[1] <= 1024 == padded["input_ids"].shape[1]
            assert len(padded["pixel_values"]) == EPOCH.shapes.patches[0]
            examples += len(batch["cu_seq_lens_q"]) - 1
    assert examples >= len(EPOCH.examples_N)


def test_what_is_added_has_no_labels() -> None:
    text = int(next(one for one, clip in enumerate(EPOCH.counts["patches"]) if not clip))
    row = EPOCH.rows[int(EPOCH.examples_N[text])]
    rows = complete([row], EPOCH.rows)
    assert rows[0] is row and len(rows) == 3
    assert all((one["labels"] == -100).all() for one in rows[1:])
    assert sum(len(one["input_ids"]) for one in rows[1:]) <= 32
    assert complete(rows, EPOCH.rows) is rows

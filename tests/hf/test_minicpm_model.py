"""MiniCPM-V 4.7 takes the collator's position ids; its towers take nothing, and it is not attached."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from hf.test_forwards import assert_same_step, step
from mrope import MRopeCollator, MRopeError
from mrope.collate.padding import PaddingCollator
from mrope.hf import attach
from mrope.training.step import guarded_step
from support.models import tiny_model, tiny_spec

FAMILY = "minicpmv4_7"
# Thumbnails and slices in patches; 4 x 4 of them are one token.
ROWS = [[(8, 8), (8, 4), (8, 4)], [], [(4, 12)]]


def make_batches(padded: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what an inner collate function makes, and the same with position ids."""
    rng = np.random.default_rng(0)
    examples = [_example(crops, rng) for crops in ROWS]
    if not padded:
        examples = [examples[0]] * 2

    def inner(rows: Any) -> dict[str, Any]:
        # Patches of the whole batch stand side by side, (1, channels, side, side * patches).
        pixels = torch.cat([row["pixel_values"] for row in rows], dim=-1)
        tokens = [{name: row[name] for name in row if name != "pixel_values"} for row in rows]
        return PaddingCollator(padding_side="left")(tokens) | {"pixel_values": pixels}

    return inner(examples), MRopeCollator(inner, tiny_spec(FAMILY))(examples)


def _example(crops: list[tuple[int, int]], rng: np.random.Generator) -> dict[str, Any]:
    ids: list[int] = [20, 21]
    for number, (height, width) in enumerate(crops):
        borders = (3, 4) if number == 0 else (8, 9)
        ids += [borders[0], *[5] * (height * width // 16), borders[1]]
    ids += rng.integers(20, 300, 5).tolist()
    tokens = np.array(ids)
    patches = sum(height * width for height, width in crops)
    example = {
        "input_ids": tokens,
        "labels": np.where(tokens == 5, -100, tokens),
        "mm_token_type_ids": (tokens == 5).astype(np.int64),
        "pixel_values": torch.from_numpy(
            rng.standard_normal((1, 3, 4, 4 * patches)).astype(np.float32)
        ),
    }
    return example | ({"target_sizes": np.array(crops)} if crops else {})


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
def test_position_ids_give_the_same_step_with_fewer_syncs(padded: bool) -> None:
    plain, batch = make_batches(padded)
    model = tiny_model(FAMILY).train()
    theirs = step(model, plain)
    assert_same_step(step(model, batch), theirs)
    changed = step(model, batch | {"position_ids": batch["position_ids"] * 2})
    assert not torch.equal(changed[0].logits, theirs[0].logits)
    assert guarded_step(model, plain).count > guarded_step(model, batch).count > 0


def test_it_is_not_attached() -> None:
    with pytest.raises(MRopeError, match="0 base models of a known family"):
        attach(tiny_model(FAMILY))

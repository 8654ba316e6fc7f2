"""Attached models of the families without a shipped config: results of the unmodified model, and no syncs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf.test_forwards import assert_same_step, step, tensor_collator
from mrope.collate.padding import PaddingCollator
from mrope.hf import attach
from mrope.hf.attach import FORWARDS, detach
from mrope.towers import block_index
from mrope.training.step import guarded_step
from support.models import TINY_FAMILIES, media_of, tiny_examples, tiny_model

FAMILIES = [family for family in TINY_FAMILIES if family in FORWARDS]
TEXT = {"images": False, "videos": False}
CASES = [(family, media) for family in FAMILIES for media in [*media_of(family), TEXT]]


def make_batches(family: str, media: dict[str, bool], padded: bool) -> tuple[Any, Any]:
    examples = tiny_examples(family, **media)
    examples = examples if padded else [examples[0]] * 2
    inner = PaddingCollator(padding_side="left")
    plain, batch = inner(examples), tensor_collator(family, inner)(examples)
    if not any(media.values()):
        # Left to itself, transformers 5 numbers such a batch without looking at the mask.
        plain["position_ids"] = batch["position_ids"]
    return plain, batch


def test_these_are_the_families() -> None:
    assert [family for family in TINY_FAMILIES if family not in FORWARDS] == []


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "media"), CASES)
def test_the_same_step_without_a_sync(
    family: str, media: dict[str, bool], attention: str, padded: bool
) -> None:
    """Frames that are taken together, and all images merged at once, round differently."""
    plain, batch = make_batches(family, media, padded)
    model = tiny_model(family, attention).train()
    theirs = step(model, plain)
    assert_same_step(step(model, batch), theirs)  # the unmodified model takes the batch too
    attach(model)
    exact = attention == "sdpa" and family != "paddleocr_vl"
    assert_same_step(step(model, batch), theirs, 0.0 if exact else 2e-6)
    guard = guarded_step(model, batch)
    assert guard.count == 0, guard.report()
    detach(model)
    assert_same_step(step(model, plain), theirs)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.startswith("glm")])
def test_images_and_videos_go_together_where_the_model_is_attached(family: str) -> None:
    """transformers takes frames for images in such a batch, and refuses it. Rows are independent:
    each gives what it gives in a batch of its own kind."""
    image, video = (tiny_examples(family, **media, rows=1)[0] for media in media_of(family))
    collate = tensor_collator(family)
    model = attach(tiny_model(family))
    with torch.no_grad():
        both = model(**collate([image, video])).logits
        for row, example in enumerate((image, video)):
            alone = model(**collate([example])).logits[0]
            torch.testing.assert_close(both[row, : len(alone)], alone, rtol=0, atol=1e-5)


def test_blocks_of_a_raster() -> None:
    assert block_index([[1, 2, 4]], 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert block_index([[2, 2, 2], [1, 2, 2]], 2).tolist() == list(range(12))

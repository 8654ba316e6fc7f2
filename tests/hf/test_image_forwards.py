"""Attached HunYuan-VL and GLM-Image: results of the unmodified model, and no syncs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from hf.test_forwards import assert_same_step, step, tensor_collator
from mrope.collate.padding import PaddingCollator
from mrope.hf import attach, detach
from mrope.hf.image_forwards import IMAGE_FORWARDS
from mrope.training.step import guarded_step
from support.models import EAGER_FAMILIES, SIZED_FAMILIES, tiny_examples, tiny_model

MEDIA = {"images": True, "text": False}
FAMILIES = [family for family in SIZED_FAMILIES if family in IMAGE_FORWARDS]
CASES = [(family, media) for family in FAMILIES for media in MEDIA]


def make_batches(family: str, media: str, padded: bool) -> tuple[Any, Any]:
    examples = tiny_examples(family, images=MEDIA[media], videos=False)
    examples = examples if padded else [examples[0]] * 2
    inner = PaddingCollator(padding_side="left")
    plain, batch = inner(examples), tensor_collator(family, inner)(examples)
    if family == "glm_image":
        for one in (plain, batch):
            del one["mm_token_type_ids"]  # its processor makes none
            one["images_per_sample"] = torch.tensor([len(e["image_grid_thw"]) for e in examples])
    elif media == "text":
        # Left to itself, transformers 5 numbers such a batch without looking at the mask.
        plain["position_ids"] = batch["position_ids"]
    return plain, batch


def test_these_are_the_families() -> None:
    assert {*FAMILIES, *EAGER_FAMILIES} == set(IMAGE_FORWARDS)


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "media"), CASES)
def test_the_same_step_without_a_sync(
    family: str, media: str, attention: str, padded: bool
) -> None:
    """To the last bit, eager attention included."""
    plain, batch = make_batches(family, media, padded)
    model = tiny_model(family, attention).train()
    theirs = step(model, plain)
    assert_same_step(step(model, batch), theirs)  # the unmodified model takes the batch too
    attach(model)
    assert_same_step(step(model, batch), theirs)
    if media == "images":
        outputs = (one[0].image_outputs.last_hidden_state for one in (step(model, batch), theirs))
        assert torch.equal(*outputs)
    guard = guarded_step(model, batch)
    assert guard.count == 0, guard.report()
    detach(model)
    assert_same_step(step(model, plain), theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_tensors_would_be_seen(family: str) -> None:
    _, batch = make_batches(family, "images", padded=True)
    model = attach(tiny_model(family))
    wrongs = {
        "image_scatter_index": batch["image_scatter_index"].roll(1),
        "image_split_sizes": [sum(batch["image_split_sizes"])],
        "position_ids": batch["position_ids"] * 2,
    }
    with torch.no_grad():
        right = model(**batch)
        for name, wrong in wrongs.items():
            changed = model(**batch | {name: wrong})
            # Of GLM-Image's patches only the nearest code reaches the logits.
            equal = [
                torch.equal(changed.logits, right.logits),
                torch.equal(*(one.image_outputs.last_hidden_state for one in (changed, right))),
            ]
            assert not all(equal), name


def test_the_tensors_of_glm_image_are_those_of_the_images_with_pixels() -> None:
    """Each row has the grid of an image that is to be drawn, last; no patch belongs to it."""
    examples = tiny_examples("glm_image", videos=False)
    batch = tensor_collator("glm_image")(examples)
    sources = np.concatenate([example["image_grid_thw"][:-1] for example in examples])
    assert batch["image_source_grids"].tolist() == batch["image_grid_sizes"] == sources.tolist()
    assert batch["image_cu_seqlens"][-1] == len(batch["pixel_values"])
    (text,) = (example for example in examples if "pixel_values" not in example)
    alone = tensor_collator("glm_image")([text])
    assert not [name for name in alone if name.startswith("image_") and name != "image_grid_thw"]

"""Attached HunYuan-VL and GLM-Image: results of the unmodified model, and no syncs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from mrope.hf import attach
from support.models import SIZED_FAMILIES, tiny_examples, tiny_model
from support.steps import MEDIA, make_batches, tensor_collator

FAMILIES = [family for family in SIZED_FAMILIES if family != "minicpmv4_7"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_returns_what_it_returns_in_the_unmodified_model(family: str) -> None:
    plain, batch = make_batches(family, MEDIA["images"])
    model = tiny_model(family)
    own = model(**plain).image_outputs.last_hidden_state
    assert torch.equal(attach(model)(**batch).image_outputs.last_hidden_state, own)


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_tensors_would_be_seen(family: str) -> None:
    _, batch = make_batches(family, MEDIA["images"])
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

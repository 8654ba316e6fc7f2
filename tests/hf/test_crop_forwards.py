"""Attached MiniCPM-V 4.7: results of the unmodified model, and no syncs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from mrope import MRopeCollator, MRopeError
from mrope.collate.padding import PaddingCollator
from mrope.hf import attach
from mrope.spec.families import FAMILIES
from mrope.towers import VisionSpec, vision_tensors
from mrope.training.step import guarded_step
from support.models import model_config, tiny_model, tiny_spec
from support.steps import assert_attached_as_plain, assert_same_step, step

FAMILY = "minicpmv4_7"
INDICES = ("position_ids", "window_index", "block_index", "scatter_index")
# Thumbnails and slices in patches; 4 x 4 of them are one token, 2 x 2 under "4x".
ROWS = [[(8, 8), (8, 4), (8, 4)], [], [(4, 12)]]


def make_batches(
    padded: bool, mode: str = "16x", video: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what an inner collate function makes, and the same with the collator's tensors."""
    rng = np.random.default_rng(0)
    examples = [_example(crops, rng, mode, video) for crops in ROWS]
    suffix = "_videos" if video else ""
    if not padded:
        examples = [examples[0]] * 2

    def inner(rows: Any) -> dict[str, Any]:
        # Patches of the whole batch stand side by side, (1, channels, side, side * patches).
        pixels = torch.cat([row["pixel_values"] for row in rows], dim=-1)
        tokens = [{name: row[name] for name in row if name != "pixel_values"} for row in rows]
        batch = PaddingCollator(padding_side="left")(tokens)
        return batch | {f"pixel_values{suffix}": pixels, "downsample_mode": mode}

    vision = VisionSpec.from_config(model_config(FAMILY))
    return inner(examples), MRopeCollator(inner, tiny_spec(FAMILY), vision)(examples)


def _example(
    crops: list[tuple[int, int]], rng: np.random.Generator, mode: str, video: bool
) -> dict[str, Any]:
    token, merged = 6 if video else 5, 4 if mode == "4x" else 16
    ids: list[int] = [20, 21]
    for number, (height, width) in enumerate(crops):
        borders = (3, 4) if number == 0 else (8, 9)
        ids += [borders[0], *[token] * (height * width // merged), borders[1]]
    ids += rng.integers(20, 300, 5).tolist()
    tokens = np.array(ids)
    patches = sum(height * width for height, width in crops)
    example = {
        "input_ids": tokens,
        "labels": np.where(tokens == token, -100, tokens),
        "mm_token_type_ids": (tokens == token) * (2 if video else 1),
        "pixel_values": torch.from_numpy(
            rng.standard_normal((1, 3, 4, 4 * patches)).astype(np.float32)
        ),
    }
    name = "target_sizes_videos" if video else "target_sizes"
    return example | ({name: np.array(crops)} if crops else {})


@pytest.mark.parametrize("mode", ["16x", "4x"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_same_step_without_a_sync(attention: str, padded: bool, mode: str) -> None:
    """The unmodified model takes the batch to the last bit; merged at once, crops round otherwise."""
    plain, batch = make_batches(padded, mode)
    model = tiny_model(FAMILY, attention).train()
    assert guarded_step(model, plain).count > guarded_step(model, batch).count > 0
    assert_attached_as_plain(model, plain, batch, 2e-6)


def test_wrong_tensors_would_be_seen() -> None:
    _, batch = make_batches(padded=True)
    model = attach(tiny_model(FAMILY))
    wrongs = {name: batch[f"image_{name}"].roll(1) for name in INDICES}
    wrongs["split_sizes"] = [sum(batch["image_split_sizes"])]
    wrongs["window_split_sizes"] = [sum(batch["image_window_split_sizes"])]
    with torch.no_grad():
        right = model(**batch).logits
        for name, wrong in wrongs.items():
            changed = model(**batch | {f"image_{name}": wrong}).logits
            assert not torch.allclose(changed, right, rtol=0, atol=1e-4), name


def test_a_batch_of_text_in_batch_layout() -> None:
    """It has no tensors of the collator, so that the model's own forward runs."""
    examples = [{"input_ids": [20, 21, 22]}, {"input_ids": [20, 21]}]
    model = attach(tiny_model(FAMILY))
    with torch.no_grad():
        logits, expected = (
            model(**MRopeCollator(None, tiny_spec(FAMILY), layout=layout)(examples)).logits
            for layout in ("batch", "model")
        )
    assert torch.equal(logits, expected)


def test_videos_are_encoded_as_images_are() -> None:
    """Frames have names of their own; with the same sizes and pixels they give the same features."""
    plain, batch = make_batches(padded=True, video=True)
    model = tiny_model(FAMILY).train()
    theirs = step(model, plain)
    attach(model)
    assert_same_step(step(model, batch), theirs, 2e-6)
    assert guarded_step(model, batch).count == 0


@pytest.mark.parametrize("side", [14, 16, 32, 70])
def test_crop_tensors_are_those_of_transformers(side: int) -> None:
    from torch.nn.functional import pad
    from transformers.vision_utils import get_vision_nearest_position_ids, get_vision_window_index

    rng = np.random.default_rng(side)
    sizes = rng.integers(1, 20, (40, 2)) * 4
    tower = FAMILIES[FAMILY].tower
    assert tower is not None
    spec = VisionSpec(4, table_side=side, tower=tower)
    tensors = vision_tensors(spec, np.insert(sizes, 0, 1, axis=1))
    given = torch.from_numpy(sizes)
    assert torch.equal(
        torch.from_numpy(tensors["position_ids"]), get_vision_nearest_position_ids(given, side)
    )
    order, borders = get_vision_window_index(pad(given, (1, 0), value=1), 1, 2, 1)
    assert torch.equal(torch.from_numpy(tensors["window_index"]), order)
    assert torch.equal(torch.from_numpy(tensors["cu_window_seqlens"]), borders)


def test_a_tower_of_crops_takes_no_grids() -> None:
    with pytest.raises(MRopeError, match="crops, which have sizes and no grids"):
        vision_tensors(VisionSpec.from_config(model_config(FAMILY)), [[2, 4, 4]])

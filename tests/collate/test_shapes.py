"""Fixed shapes: what is padded, where padding belongs, and what is above the ladder."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mrope import MRopeCollator, MRopeError, MRopeSpec, Shapes, VisionSpec
from mrope.spec import example_config

CONFIG = example_config("qwen3_vl")
CONFIG["vision_config"] |= {"patch_size": 2, "num_position_embeddings": 16}
SPEC = MRopeSpec.from_config(CONFIG, "transformers-5.23")
VISION = VisionSpec.from_config(CONFIG)
START, IMAGE, VIDEO = 101, 102, 103
PATCH = 3 * 2 * 2 * 2
SHAPES = Shapes(
    tokens=(16, 32), patches=(16, 64), longest=16, patches_per_segment=8, tokens_per_example=4
)


def row(images: Any = (), videos: Any = (), text: int = 3) -> dict[str, Any]:
    """Images (h, w) and videos (t, h, w) in patches; pixels count 1, 2, 3 ... in each."""
    out: dict[str, Any] = {}
    ids = [7]
    for h, w in images:
        ids += [START, *[IMAGE] * (h * w // 4)]
    for t, h, w in videos:
        for _ in range(t):
            ids += [START, *[VIDEO] * (h * w // 4)]
    out["input_ids"] = out["labels"] = ids + [9] * text
    for name, pixels, grids in (
        ("image_grid_thw", "pixel_values", [[1, h, w] for h, w in images]),
        ("video_grid_thw", "pixel_values_videos", [list(clip) for clip in videos]),
    ):
        if grids:
            out[name] = torch.tensor(grids)
            patches = int(np.prod(grids, axis=1).sum())
            out[pixels] = torch.ones(patches, PATCH) * (1 if name[0] == "i" else 2)
    return out


def collate(rows: list[dict[str, Any]], packing: Any = None, **options: Any) -> dict[str, Any]:
    shapes = options.pop("shapes", SHAPES)
    collator = MRopeCollator(None, SPEC, VISION, packing=packing, shapes=shapes, **options)
    batch: dict[str, Any] = collator(rows)
    return batch


def described(batch: dict[str, Any]) -> dict[str, Any]:
    """Shapes and dtypes of tensors, and every other value: what a graph is compiled for."""
    return {
        name: (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


@pytest.mark.parametrize("packing", [None, "flatten"])
def test_batches_of_one_rung_have_one_description(packing: Any) -> None:
    kinds = set()
    for seed in range(30):
        rng = random.Random(seed)
        images = [(2, 2 * rng.randint(1, 4)) for _ in range(rng.randint(0, 2))]
        videos = [(2, 2, 2)] * rng.randint(0, 1)
        batch = collate([row(images, videos, rng.randint(1, 4)), row(text=2)], packing)
        kinds.add(str(sorted(described(batch).items())))
    assert len(kinds) <= 4


def test_a_batch_in_full() -> None:
    batch = collate([row([(2, 4)], [(2, 2, 2)]), row([(2, 2)])], "flatten")
    assert batch["input_ids"].tolist() == [
        [7, START, IMAGE, IMAGE, START, VIDEO, START, VIDEO, 9, 9, 9, 7, START, IMAGE, 9, 9]
        + [9]
        + [0] * 15
    ]
    assert batch["labels"][0, 17:].tolist() == [-100] * 15
    assert batch["cu_seq_lens_q"].tolist() == [0, 11, 17, 32, 32, 32, 32, 32, 32, 32]
    assert (batch["max_length_q"], batch["max_length_k"]) == (32, 32)
    assert "segment_sizes" not in batch
    assert "rope_deltas" not in batch
    # Patches of images, then of the clip, then padding.
    assert batch["pixel_values"][:, 0].tolist() == [1.0] * 12 + [2.0] * 8 + [0.0] * 44
    assert "pixel_values_videos" not in batch
    # Frames of 8, 4, 4 and 4 patches, padding in segments of 16 at most, and empty ones.
    assert batch["vision_cu_seqlens"].tolist() == [0, 8, 12, 16, 20, 36, 52, *[64] * 6]
    assert batch["vision_max_seqlen"] == 16
    assert batch["vision_grid_thw"].tolist()[:5] == [
        [1, 2, 4],
        [1, 2, 2],
        [1, 2, 2],
        [1, 2, 2],
        [1, 2, 2],
    ]
    # Features of images come first: two of row 0, one of row 1, then the frames'.
    mask, index = batch["vision_feature_mask"][0], batch["vision_feature_index"]
    assert mask.nonzero().ravel().tolist() == [2, 3, 5, 7, 13]
    assert index[mask].tolist() == [0, 1, 3, 4, 2]


def test_padded_batches_are_widened_on_the_right() -> None:
    batch = collate([row([(2, 4)]), row(text=1)])
    free = MRopeCollator(None, SPEC, VISION)([row([(2, 4)]), row(text=1)])
    width = free["input_ids"].shape[1]
    assert batch["input_ids"].shape == (2, 16)
    assert torch.equal(batch["input_ids"][:, :width], free["input_ids"])
    assert torch.equal(batch["position_ids"][:, :, :width], free["position_ids"])
    assert "attention_mask" not in batch
    assert batch["has_padding"] is False
    assert torch.equal(batch["rope_deltas"], free["rope_deltas"])
    assert batch["vision_feature_mask"].nonzero().tolist() == [[0, 2], [0, 3]]


def test_a_batch_of_text_has_a_rung_of_patches() -> None:
    for packing in (None, "flatten"):
        batch = collate([row()], packing)
        assert batch["pixel_values"].shape == (16, PATCH)
        assert not batch["pixel_values"].any()
        assert not batch["vision_feature_mask"].any()
        assert batch["vision_cu_seqlens"].tolist() == [0, 16, 16, 16]
        assert set(described(batch)) == set(described(collate([row([(2, 2)])], packing)))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row([(8, 8)], text=30), row()], "has 52 tokens, above the top rung 32 .* row 0 with"),
        (
            [row([(8, 4)], text=0), row([(8, 8)], text=0)],
            "has 96 patches, above the top rung 64 .* row 1 with 64",
        ),
        ([row([(2, 2)]), row([(2, 2)], [(1, 2, 16)])], "row 1: .* of 32 .* give Shapes longest=32"),
        ([row([(2, 2)] * 13)], "13 images and frames, but its rung .* borders for 12"),
        ([row(text=1)] * 10 + [row(text=0)] * 2, "has 12 examples, but its rung .* borders for 8"),
    ],
)
def test_what_is_above_the_ladder_is_named(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(MRopeError, match=message):
        collate(rows, "flatten")


@pytest.mark.parametrize(
    ("rows", "name"),
    [([row([(2, 2)] * 13)], "patches_per_segment"), ([row(text=0)] * 16, "tokens_per_example")],
)
def test_the_number_of_borders_that_is_named_is_enough(rows: Any, name: str) -> None:
    with pytest.raises(MRopeError, match=f"smaller {name}, [0-9]+ or less") as raised:
        collate(rows, "flatten")
    named: Any = int(str(raised.value).split()[-3])
    batch = collate(rows, "flatten", shapes=replace(SHAPES, **{name: named}))
    assert batch["input_ids"].numel() == 32


def test_a_rung_without_enough_borders_is_passed_over() -> None:
    shapes = Shapes((32, 64), (16, 64), longest=16, patches_per_segment=8, tokens_per_example=16)
    # 12 patches fit into 16, which has borders for 2 frames and the padding.
    few, many = ([row([(2, 2)] * count)] for count in (2, 3))
    sizes = [len(collate(rows, "flatten", shapes=shapes)["pixel_values"]) for rows in (few, many)]
    assert sizes == [16, 64]
    # 6 tokens fit into 32, which has borders for 2 examples and the padding.
    few, many = ([row(text=1)] * count for count in (2, 3))
    sizes = [collate(rows, "flatten", shapes=shapes)["input_ids"].numel() for rows in (few, many)]
    assert sizes == [32, 64]


@pytest.mark.filterwarnings("ignore::mrope.collate.skip_bad.RejectWarning")
def test_a_row_above_the_ladder_is_skipped() -> None:
    big, small = row([(8, 8)] * 2), row([(2, 2)])
    batch = collate([big, small], on_error="skip", count_key="dropped")
    assert batch["dropped"] == 1
    assert torch.equal(batch["input_ids"], collate([small])["input_ids"])


def test_padding_on_the_left_is_refused() -> None:
    def inner(rows: Any) -> Any:
        ids = torch.tensor([[0, 7], [7, 8]])
        return {"input_ids": ids, "attention_mask": torch.tensor([[0, 1], [1, 1]])}

    with pytest.raises(MRopeError, match="row 0: shapes needs padding on the right"):
        MRopeCollator(inner, SPEC, VISION, shapes=SHAPES)([{}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": (), "patches": (16,)}, "tokens must be ascending integers"),
        ({"tokens": (32, 16), "patches": (16,)}, "tokens must be ascending integers"),
        ({"tokens": (16,), "patches": (True,)}, "patches must be ascending integers"),
        ({"tokens": (16,), "patches": (16,), "longest": 0}, "longest must be at least 1"),
    ],
)
def test_what_is_no_ladder(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shapes(**options)


def test_what_the_collator_refuses() -> None:
    with pytest.raises(ValueError, match="18 patches are not whole tokens of 4"):
        MRopeCollator(None, SPEC, VISION, shapes=Shapes((16,), (18,)))
    with pytest.raises(ValueError, match="shapes needs vision"):
        MRopeCollator(None, SPEC, shapes=SHAPES)
    with pytest.raises(ValueError, match="pad_token_id 102 is a placeholder"):
        MRopeCollator(None, SPEC, shapes=Shapes((16,), pad_token_id=IMAGE))
    omni = MRopeSpec.from_config(example_config("qwen3_omni_moe_thinker"), "transformers-5.23")
    with pytest.raises(MRopeError, match="not supported for qwen3_omni_moe_thinker"):
        MRopeCollator(None, omni, VISION, shapes=SHAPES)


def test_seconds_that_vary_in_number_are_left_out() -> None:
    config = example_config("qwen2_5_vl") | {"vision_config": CONFIG["vision_config"]}
    config["vision_config"] |= {"tokens_per_second": 2, "window_size": 8}
    spec = MRopeSpec.from_config(config, "transformers-5.23")
    vision = VisionSpec.from_config(config)
    clip = {
        "input_ids": [7, START, VIDEO, VIDEO, 8],
        "video_grid_thw": [[2, 2, 2]],
        "second_per_grid_ts": [0.5],
        "pixel_values_videos": torch.ones(8, PATCH),
    }
    collator = MRopeCollator(None, spec, vision, shapes=SHAPES)
    assert described(collator([clip])) == described(collator([{"input_ids": [7, 8]}]))


def test_rungs_of_tokens_alone() -> None:
    batch = collate([row([(2, 4)]), row(text=1)], shapes=Shapes(tokens=(16,)))
    free = MRopeCollator(None, SPEC, VISION)([row([(2, 4)]), row(text=1)])
    assert batch["input_ids"].shape == (2, 16)
    assert torch.equal(batch["pixel_values"], free["pixel_values"])
    assert torch.equal(batch["image_grid_thw"], free["image_grid_thw"])
    assert batch["image_scatter_index"].tolist() == [2, 3]
    late = collate([row(text=1), row([(2, 4)])], shapes=Shapes(tokens=(16,)))
    assert late["image_scatter_index"].tolist() == [18, 19]
    # No tower tensors are needed for it.
    assert MRopeCollator(None, SPEC, shapes=Shapes((16,)))([row()])["input_ids"].shape == (1, 16)


def test_a_ladder_pickles() -> None:
    assert pickle.loads(pickle.dumps(SHAPES)) == SHAPES

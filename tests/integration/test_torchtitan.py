"""torchtitan's collator numbers tokens as we do: packed rows of Qwen3.5, with images and clips."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mrope import MRopeSpec, rope_index
from support.models import model_config, tiny_examples

collator: Any = pytest.importorskip(
    "torchtitan.hf_datasets.multimodal.mm_collator",
    reason="torchtitan cannot be imported: needs torchtitan 0.3.0 and torchvision",
    exc_type=ImportError,
)
FAMILY, SPEC = "qwen3_5", MRopeSpec.from_config(model_config("qwen3_5"), "transformers-5.23")


def packed_row(seed: int) -> tuple[list[dict[str, Any]], dict[str, list[int]]]:
    """Examples, and the columns of their tokens in one row."""
    count = int(np.random.default_rng(seed).integers(1, 5))
    examples = tiny_examples(FAMILY, rows=count, seed=seed)
    lengths = [len(example["input_ids"]) for example in examples]
    columns = {
        "input_ids": [token for example in examples for token in example["input_ids"]],
        "positions": [place for length in lengths for place in range(length)],
    }
    return examples, {**columns, "lengths": lengths}


def padded(rows: list[list[int]], width: int) -> torch.Tensor:
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def joined(examples: list[dict[str, Any]], name: str) -> torch.Tensor | None:
    grids = [np.asarray(example[name]) for example in examples if name in example]
    return torch.tensor(np.concatenate(grids)) if grids else None


@pytest.mark.parametrize("seed", range(20))
def test_packed_rows_have_the_same_positions(seed: int) -> None:
    rows = [packed_row(2 * seed + number) for number in range(2)]
    examples = [example for made, _ in rows for example in made]
    columns = [made for _, made in rows]
    width = max(len(row["input_ids"]) for row in columns)
    ids = padded([row["input_ids"] for row in columns], width)
    grids = {name: joined(examples, f"{name}_grid_thw") for name in ("image", "video")}
    theirs = collator.MultiModalCollator(
        batch_size=2,
        seq_len=width,
        max_images_per_batch=99,
        patch_size=16,
        temporal_patch_size=2,
        spatial_merge_size=2,
        tokenizer=None,
        build_mrope_positions=True,
    )
    found_BS3 = theirs._build_mrope_positions(
        ids,
        grids["image"],
        grids["video"],
        padded([row["positions"] for row in columns], width),
        image_token_id=SPEC.image_token_id,
        video_token_id=SPEC.video_token_id,
    )
    valid_BS = padded([[1] * len(row["input_ids"]) for row in columns], width)
    ours_3BS, _ = rope_index(
        SPEC,
        ids,
        attention_mask=valid_BS,
        image_grid_thw=grids["image"],
        video_grid_thw=grids["video"],
        seq_lengths=[row["lengths"] for row in columns],
    )
    ours_BS3 = torch.as_tensor(np.asarray(ours_3BS)).permute(1, 2, 0)
    assert torch.equal(found_BS3[valid_BS == 1], ours_BS3[valid_BS == 1])

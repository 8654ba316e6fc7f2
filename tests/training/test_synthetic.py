"""Synthetic rows: what they hold in each family, and which shapes are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mrope import MRopeCollator, MRopeError, build_collator, load_config
from mrope.collate.padding import PaddingCollator
from mrope.spec import FAMILIES, ONE_DIMENSIONAL
from mrope.training.dataloader import make_loader
from mrope.training.sections import ShapeSection
from mrope.training.synthetic import SyntheticRows
from support.specs import example_spec

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("family", "shape", "words"),
    [
        ("paddleocr_vl", {"videos": 1}, "videos=1, but paddleocr_vl has no videos"),
        ("isaac", {"videos": 2}, "videos=2, but isaac has no videos"),
        (
            "hunyuan_vl",
            {"images": 1},
            "no sample of hunyuan_vl can be made up, whose tokens are laid",
        ),
        (
            "qwen3_vl",
            {"images": 1, "image": [4, 3]},
            r"image must hold multiples of .*=2, not \[4, 3\]",
        ),
        (
            "qwen3_vl",
            {"videos": 1, "frame": [5, 2]},
            r"frame must hold multiples of .*=2, not \[5, 2\]",
        ),
        ("qwen3_vl", {"image_sides": [1, 8]}, r"image_sides must be at least .*=2, not \[1, 8\]"),
    ],
)
def test_a_shape_that_the_family_cannot_have_is_named(
    family: str, shape: dict[str, Any], words: str
) -> None:
    section = ShapeSection(width=900, **shape)
    with pytest.raises(MRopeError, match=words):
        SyntheticRows(example_spec(family), section, 1, (4,), torch.float32)


@pytest.mark.parametrize(
    "family",
    [name for name, row in (FAMILIES | ONE_DIMENSIONAL).items() if row.custom_index is None],
)
def test_synthetic_rows_are_collated_in_every_family(family: str) -> None:
    spec = example_spec(family)
    row = spec.family_row
    shape = ShapeSection(
        width=400, images=2, image=[8, 4], videos=int(row.has_videos), frames=3, frame=[4, 8]
    )
    rows = SyntheticRows(spec, shape, 2, (4,), torch.float32)
    batch = MRopeCollator(PaddingCollator(), spec)([rows[0], rows[1]])
    assert batch["input_ids"].shape == (2, 400)
    assert batch["input_ids"].min() >= 0
    pixels = sum(len(batch.get(name, ())) for name in ("pixel_values", "pixel_values_videos"))
    assert pixels == rows.sizes()["patches"].sum() > 0


def test_a_row_is_as_wide_as_is_drawn_for_it_in_every_epoch() -> None:
    shape = ShapeSection(width=60, least_width=20, images=1, image=[4, 4])
    rows = SyntheticRows(example_spec("qwen3_vl"), shape, 50, (4,), torch.float32)
    widths = [len(rows[index]["input_ids"]) for index in range(50)]
    assert 20 <= min(widths) < 30 and 50 < max(widths) <= 60
    assert widths == [len(rows[index]["input_ids"]) for index in range(50)]
    assert widths == rows.sizes()["tokens"].tolist()
    short = ShapeSection(width=60, least_width=3, images=1, image=[4, 4])
    with pytest.raises(MRopeError, match="tokens, more than width=3"):
        SyntheticRows(example_spec("qwen3_vl"), short, 1, (4,), torch.float32)


@pytest.mark.parametrize("balance", ["tokens", "work"])
@pytest.mark.parametrize("shapes", [None, {"tokens": [256, 1024], "patches": [128, 512]}])
@pytest.mark.parametrize("max_patches", [None, 400])
def test_batches_stay_within_every_budget_of_the_config(
    balance: str, shapes: dict[str, Any] | None, max_patches: int | None
) -> None:
    """Rows of eight frames of four patches: the ladder's borders are scarcer than its patches."""
    cfg = load_config(
        CONFIGS / "qwen3_vl.yaml",
        [
            "data={source: synthetic, rows: 60, shape: {width: 64, videos: 1, frames: 8, frame: [2, 2]}}",
            f"dataloader={{max_tokens: 1024, balance: {balance}, num_workers: 0}}",
            *([f"dataloader.max_patches={max_patches}"] if max_patches else []),
            *([f"rope.shapes={json.dumps(shapes)}"] if shapes else []),
            "rope.packing=flatten",
            "rope.vision=true",
            "model.attach=true",
        ],
    )
    assert cfg.data.shape is not None
    rows = SyntheticRows(cfg.spec(), cfg.data.shape, 60, (96,), torch.float32)
    batches = list(make_loader(cfg, rows, build_collator(cfg)))
    seen = sum(int((batch["input_ids"] == cfg.spec().video_token_id).sum()) for batch in batches)
    assert seen == 60 * 8
    for batch in batches:
        assert batch["input_ids"].numel() <= 1024
        if max_patches and not shapes:
            assert len(batch["pixel_values_videos"]) <= max_patches

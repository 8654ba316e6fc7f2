"""Samples of one row for several families, and what each reader of samples says of a row."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mrope import MRopeCollator, MRopeError, MRopeSpec
from mrope.check.rows import CheckedRows
from mrope.prepare import Precheck
from support.specs import example_spec

Row = dict[str, Any]

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "glm4v", "qwen2_5_omni_thinker")
END = 98
_WIDTH = 6


def row_of(
    family: str,
    images: tuple[tuple[int, int], ...] = (),
    video: tuple[int, int, int] | None = None,
    *,
    text: int = 3,
    mark: float = 0.0,
) -> Row:
    """Return a row with pixels and labels: images of (h, w) and a video of (t, h, w) patches."""
    spec = example_spec(family)
    tokens, row = [7, 8], Row()
    for height, width in images:
        tokens += _span(spec, spec.image_token_id, height * width // 4)
    if images:
        row["image_grid_thw"] = torch.tensor([[1, *size] for size in images])
        row["pixel_values"] = torch.full((sum(h * w for h, w in images), _WIDTH), mark)
    if video is not None:
        tokens += _video(spec, *video)
        row["video_grid_thw"] = torch.tensor([video])
        row["pixel_values_videos"] = torch.full((int(np.prod(video)), _WIDTH), mark)
        if spec.family_row.timed or spec.family_row.custom_index:
            row["second_per_grid_ts"] = torch.tensor([0.5])
    tokens += range(10, 10 + text)
    return {"input_ids": torch.tensor(tokens), "labels": torch.tensor(tokens), **row}


def _span(spec: MRopeSpec, placeholder: int, count: int) -> list[int]:
    return [spec.vision_start_token_id, *[placeholder] * count, END]


def _video(spec: MRopeSpec, frames: int, height: int, width: int) -> list[int]:
    size = height * width // 4
    if not spec.family_row.frames_apart:
        return _span(spec, spec.video_token_id, frames * size)
    if not spec.family_row.frames_as_images:
        return _span(spec, spec.video_token_id, size) * frames
    start, end = (int(spec.extra[f"video_{side}_token_id"]) for side in ("start", "end"))
    return [start, *_span(spec, spec.image_token_id, size) * frames, end]


def errors_of(family: str, row: Mapping[str, Any]) -> dict[str, str | None]:
    """Return what the collator, `Precheck` and `mrope check` say of a row; None: it is good."""
    spec = example_spec(family)
    return {
        "collator": _error(lambda: MRopeCollator(None, spec)([dict(row)])),
        "flatten": _error(lambda: MRopeCollator(None, spec, packing="flatten")([dict(row)]))
        if spec.family_row.packs and torch.is_tensor(row["input_ids"])
        else None,
        "precheck": _error(lambda: Precheck(spec)({name: [one] for name, one in row.items()})),
        "check": CheckedRows([row], spec)[0].message,
    }


def _error(call: Any) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except MRopeError as error:
        return str(error)
    return None


def assert_same_batch(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Compare two batches key by key, tensors by dtype, shape and values."""
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert ours[name].dtype == value.dtype, name
            assert torch.equal(ours[name], value), name
        else:
            assert ours[name] == value, name

"""Count the tokens and patches of rows before they are read: what batches are planned by."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mrope.arrays import IntArray
from mrope.collate.read import PIXELS, RowSize, measure, read_row
from mrope.spec.spec import MRopeSpec

Sizes = dict[str, IntArray]
"""The fields of `RowSize` of all rows of a dataset, int64 (N,) each."""


def count_columns(spec: MRopeSpec, row: Mapping[str, Any]) -> RowSize:
    """Return the size of a row of columns, as the collator reads it.

    Raises:
        MRopeError: a column that the collator would not take.
    """
    # Of pixels nothing is counted, and to read them takes longer than all the rest.
    return measure(read_row(spec, {name: row[name] for name in row if name not in PIXELS}))


def as_sizes(table_NF: IntArray) -> Sizes:
    """Return a table of sizes, int64 (N, fields), by the fields' names."""
    return dict(zip(RowSize._fields, table_NF.T, strict=True))


def count_text(
    processor: Any, text: str, images: Sequence[tuple[int, int]], clips: Sequence[Mapping[str, Any]]
) -> RowSize:
    """Return the size of a conversation as a processor would write it, from sizes alone.

    Args:
        processor: a processor of transformers, with `get_text_with_replacements`.
        text: of the chat template.
        images: height and width of each, in pixels.
        clips: `frames`, `height`, `width` and `metadata` (as `video_metadata` gives it) of each.
    """
    patches = [
        int(processor.image_processor.get_number_of_image_patches(height, width, {}))
        for height, width in images
    ]
    shown = [
        processor.replace_image_token({"image_grid_thw": [np.array([1, 1, count])]}, 0)
        for count in patches
    ]
    played = [_play(processor, **clip) for clip in clips]
    (text,), _ = processor.get_text_with_replacements([text], shown, [one for one, _ in played])
    frames = [side for _, sides in played for side in sides]
    side_S = np.array([*patches, *frames], np.int64)
    tokens, squares = _count_tokens(processor, text), side_S**2
    most = int(side_S.max(initial=0))
    return RowSize(tokens, tokens, int(side_S.sum()), len(side_S), int(squares.sum()), most)


def _play(
    processor: Any, frames: int, height: int, width: int, metadata: Mapping[str, Any]
) -> tuple[str, list[int]]:
    """Return a clip's placeholders as text, and the patches of each group of frames."""
    from transformers.video_utils import VideoMetadata

    clips = processor.video_processor
    groups = -(-frames // clips.temporal_patch_size)
    each = int(clips.get_num_of_video_patches(frames, height, width, {})) // groups
    grid = np.array([groups, 1, each])
    given = {"video_grid_thw": [grid], "video_metadata": [VideoMetadata(**metadata)]}
    return processor.replace_video_token(given, 0), [each] * groups


def _count_tokens(processor: Any, text: str) -> int:
    """Count the tokens of a text; of a run of placeholders only one is tokenized."""
    left_out = 0
    for token in processor.all_special_multimodal_tokens:
        short = re.sub(f"({re.escape(token)})+", r"\1", text)
        left_out += (len(text) - len(short)) // len(token)
        text = short
    return len(processor.tokenizer(text)["input_ids"]) + left_out

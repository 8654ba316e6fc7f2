"""Count the tokens and patches of rows before they are read, and keep the counts in a file.

Batches are planned by them.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mrope.arrays import IntArray
from mrope.collate.read import PIXELS
from mrope.collate.single_row import RowSize, measure, read_row
from mrope.columns import Columns
from mrope.spec.spec import MRopeSpec
from mrope.training.open_source import DATA_FILES

FOLDER = ".mrope_sizes"
"""Name of the folder beside a dataset that holds the files of counts."""

Sizes = dict[str, IntArray]
"""The fields of `RowSize` of all rows of a dataset, int64 (N,) each."""


def count_columns(spec: MRopeSpec, row: Columns) -> RowSize:
    """Return the size of a row of columns, as the collator reads it.

    Raises:
        MRopeError: a column that the collator would not take.
    """
    # Of pixels nothing is counted, and to read them takes longer than all the rest.
    without = {name: row[name] for name in row if name not in PIXELS}
    return measure(read_row(spec, without).inputs)


def as_sizes(table_NF: IntArray) -> Sizes:
    """Return a table of sizes, int64 (N, fields), by the fields' names."""
    return dict(zip(RowSize._fields, table_NF.T, strict=True))


def count_text(
    processor: Any, text: str, images: Sequence[tuple[int, int]], clips: Sequence[Columns]
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
    processor: Any, frames: int, height: int, width: int, metadata: Columns
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


def file_of_sizes(source: Path, words: Sequence[object]) -> Path:
    """Return the path of the counts of a dataset, in `FOLDER` beside it.

    Another dataset, processor or release has another file.

    Args:
        source: a file, or a folder of files; names, sizes and times of those with rows are part of
            the name.
        words: whatever else the counts depend on.
    """
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    digest = hashlib.blake2b(digest_size=12)
    for file in files:
        # Not pictures, which may stand beside the rows by the million.
        if file.name.endswith((*DATA_FILES, ".arrow")):
            stat = file.stat()
            digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    digest.update(repr(words).encode())
    folder = source if source.is_dir() else source.parent
    return folder / FOLDER / f"{digest.hexdigest()}.npy"


def read_sizes(file: Path, rows: int) -> IntArray | None:
    """Return the counts in a file, int64 (N, fields); None if there are none for so many rows."""
    try:
        table_NF: IntArray = np.load(file)
    except (OSError, ValueError):
        return None
    return table_NF if table_NF.shape == (rows, len(RowSize._fields)) else None


def write_sizes(file: Path, table_NF: IntArray) -> None:
    """Write counts, if the folder is one that can be written to."""
    try:
        file.parent.mkdir(exist_ok=True)
        # Renamed when whole: ranks and other runs read it at the same time.
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as part:
            np.save(part, table_NF)
        os.replace(part.name, file)  # noqa: PTH105 - of a name, not of a Path
    except OSError:
        return

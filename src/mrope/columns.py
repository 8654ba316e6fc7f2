"""Say what every column of a row, and every key of a batch, is: one table, `COLUMNS`.

Whatever reads rows or batches goes by this table: padding, flattening, sharding, prechecks, the
training rows and the attached forward. A new column is one more line here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Literal, NamedTuple

Kind = Literal["token", "item", "patch", "row", "batch", "derived"]

# What stands behind a name differs from column to column; the table says what it is.
Columns = Mapping[str, Any]
"""Values by the names of columns: a row of a dataset, a sample, or a batch that is read."""
Batch = MutableMapping[str, Any]
"""A batch of an inner collate function, which the stage adds to."""
NewColumns = dict[str, Any]
"""Columns that a function makes."""

IGNORED_LABEL = -100
"""Label of a token that is not counted in the loss, as transformers' losses and torch's have it."""


class Column(NamedTuple):
    """What one column is.

    Attributes:
        kind: what it has an entry for. "token": each token, (n,) of a sample and (B, S, ...) of a
            batch. "item": each image, clip or audio, concatenated over the samples. "patch": each
            patch or merged token, likewise. "row": each row, a list in a batch. "batch": the whole
            batch, one value. "derived": added by the stage, from sizes or for the whole batch.
        modality: "image", "video" or "audio", or "vision": images and clips in one call.
        axes: of one sample's value; with one axis less it is that of the only item.
        means: the field of `mrope.positions.inputs.Media` that it fills: "size", "seconds",
            "merge", "kept" or "count"; or "mask", whose sums are sizes.
        sides: numbers that a size consists of: frames, height and width of a grid; height and width
            of a crop; the length of an audio.
        fill: of a token column at padding.
        integers: whether it holds integers, so that NaN alone stands for a null.
        of_part: whether it holds for a part of the sequence too, or is dropped from one.
    """

    kind: Kind
    modality: str | None = None
    axes: int = 1
    means: str | None = None
    sides: int = 3
    fill: int = 0
    integers: bool = True
    of_part: bool = True


def tower_key(modality: str, name: str) -> str:
    """Return the key of a tower's tensor in a batch, as transformers' models take it.

    Example:
        >>> tower_key("image", "cu_seqlens")
        'image_cu_seqlens'
    """
    return f"{modality}_{name}"


MODALITIES = ("image", "video", "audio")

# What the stage adds for a tower under `tower_key`, and which of it is of no use for a part of the
# sequence: attention would run over patches of the whole.
_DERIVED = {
    **dict.fromkeys(
        (
            "cu_seqlens",
            "max_seqlen",
            "position_ids",
            "window_index",
            "cu_window_seqlens",
            "max_window_seqlen",
            "interp_indices",
            "interp_weights",
            "neighbour_offsets",
            "block_index",
            "pair_index",
            "scatter_index",
            "feature_index",
            "merge_size",
            "grid_sizes",
            "grid_thw",
            "source_grids",
            "valid_indices",
            "chunk_lengths",
            "padded_feature",
            "pool_indices",
        ),
        True,
    ),
    **dict.fromkeys(("split_sizes", "window_split_sizes"), False),
}

TOWER_KEYS = {
    (modality, name): tower_key(modality, name)
    for modality in (*MODALITIES, "vision")
    for name in _DERIVED
}
"""What `tower_key` returns, by modality and name, for code that runs in each batch."""

LINEAR_KEYS = ("linear_places", "linear_chunks", "linear_slots", "linear_shape")
"""How linear attention reads a flattened row; see `mrope.collate.linear_columns`."""

COLUMNS: dict[str, Column] = {
    **{
        key: Column("derived", modality, of_part=_DERIVED[name])
        for (modality, name), key in TOWER_KEYS.items()
    },
    "input_ids": Column("token"),
    "attention_mask": Column("token"),
    "labels": Column("token", fill=IGNORED_LABEL),
    "shift_labels": Column("token", fill=IGNORED_LABEL),
    "mm_token_type_ids": Column("token"),
    "moe_mm_token_type_ids": Column("token"),
    "token_type_ids": Column("token"),
    "pixel_values": Column("patch", "image", 2, integers=False),
    "pixel_values_videos": Column("patch", "video", 2, integers=False),
    "image_grid_thw": Column("item", "image", 2, "size"),
    "video_grid_thw": Column("item", "video", 2, "size"),
    # MiniCPM-V's: height and width of each crop, in place of grids.
    "target_sizes": Column("item", "image", 2, "size", sides=2),
    "target_sizes_videos": Column("item", "video", 2, "size", sides=2),
    # Two names of one thing: processors write the second, models take the first.
    "second_per_grid_ts": Column("item", "video", 1, "seconds", integers=False),
    "video_second_per_grid": Column("item", "video", 1, "seconds", integers=False),
    # VideoLLaMA 3's.
    "image_merge_sizes": Column("item", "image", 1, "merge"),
    "video_merge_sizes": Column("item", "video", 1, "merge"),
    "video_compression_mask": Column("patch", "video", 1, "kept"),
    "audio_seqlens": Column("item", "audio", 1, "size", sides=1),
    # A mask over mel frames, whose sums are lengths. The thinkers take these from it, whatever else
    # they are given.
    "feature_attention_mask": Column("item", "audio", 2, "mask"),
    "input_features": Column("item", "audio", 3, integers=False),
    "seq_lengths": Column("row"),
    "images_per_sample": Column("row", "image", 0, "count"),
    "videos_per_sample": Column("row", "video", 0, "count"),
    "audios_per_sample": Column("row", "audio", 0, "count"),
    # One for the batch, or one for each clip where they differ.
    "use_audio_in_video": Column("batch", "video", axes=0),
    "downsample_mode": Column("batch", axes=0, integers=False),
    # With fixed shapes: which tokens take a feature of the one call for images and clips.
    "vision_feature_mask": Column("token"),
    "rope_deltas": Column("derived"),
    "segment_sizes": Column("derived", of_part=False),
    **{key: Column("derived", of_part=False) for key in LINEAR_KEYS},
    "has_padding": Column("derived", of_part=False),
    "padded_behind": Column("derived", of_part=False),
    "moe_text_index": Column("derived", of_part=False),
    "moe_vision_index": Column("derived", of_part=False),
}
"""Every column by its name. A column of the user, which is not here, is a token column of a batch
if its first two axes are those of the tokens, and stays as it is otherwise."""


def columns(*kinds: Kind, modality: str | None = None, means: str | None = None) -> Iterator[str]:
    """Yield the names of columns of these kinds, modality and meaning, in the table's order.

    Example:
        >>> list(columns("item", modality="video", means="seconds"))
        ['second_per_grid_ts', 'video_second_per_grid']
    """
    for name, column in COLUMNS.items():
        if (
            column.kind in kinds
            and modality in (None, column.modality)
            and means in (None, column.means)
        ):
            yield name


def count_key(modality: str) -> str:
    """Return the column that says how many images, clips or audios each row has."""
    return f"{modality}s_per_sample"


def fill_of(name: str, pad_token_id: int) -> int:
    """Return what a token column holds at padding."""
    if name == "input_ids":
        return pad_token_id
    return COLUMNS[name].fill if name in COLUMNS else 0

"""Compute what the model would derive from a batch besides position ids.

Two kinds: what transformers' towers take as keywords, under the models' own names; and what an
attached model (`mrope.hf.attach`) reads in addition, scatter indices and facts on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mrope.positions.custom.counted import merge_size
from mrope.positions.located import Located
from mrope.positions.stream import IMAGE, VIDEO
from mrope.spec.spec import MRopeSpec
from mrope.towers import (
    AudioSpec,
    VisionSpec,
    audio_tensors,
    block_index,
    crop_tensors,
    padded_features,
    pair_index,
    vision_tensors,
)

_KINDS = {"image": IMAGE, "video": VIDEO}
_SIZES = {"image": "target_sizes", "video": "target_sizes_videos"}
# Segment lengths, which attention needs on the host, are named after the borders they come from.
_SPLITS = {"cu_seqlens": "split_sizes", "cu_window_seqlens": "window_split_sizes"}


def image_and_video_tensors(
    vision: VisionSpec, located: Located, flattened: bool
) -> dict[str, Any]:
    """Return the vision tower's keywords, and what an attached model reads besides.

    Args:
        vision: the tower's numbers.
        located: the batch.
        flattened: whether the batch becomes one row without padding.

    Returns:
        `MRopeCollator.__call__` lists the keys.
    """
    inputs = located.inputs
    added: dict[str, Any] = {"has_padding": located.stream.valid_BS is not None and not flattened}
    for modality, kind in _KINDS.items():
        if vision.crops:
            added |= _crops(vision, located, modality, kind)
            continue
        grid_thw = getattr(inputs, f"{modality}_grid_thw")
        if vision.draws_last and len(grid_thw):
            grid_thw = _with_pixels(grid_thw, inputs.images_per_sample)
        if not len(grid_thw) or (modality == "video" and not vision.videos):
            continue
        if vision.merges_in_batch:
            merge = merge_size(inputs, modality)
            vision = replace(vision, spatial_merge_size=merge)
            added[f"{modality}_merge_size"] = merge
            if modality == "video" and inputs.video_compression_mask is not None:
                added["video_feature_index"] = np.flatnonzero(inputs.video_compression_mask)
        tensors = vision_tensors(vision, grid_thw)
        added |= {f"{modality}_{name}": value for name, value in tensors.items()}
        placeholder_T = located.kind_T == kind
        added[f"{modality}_scatter_index"] = _scatter_index(located, placeholder_T, flattened)
        for borders, sizes in _SPLITS.items():
            if borders in tensors:
                added[f"{modality}_{sizes}"] = np.diff(tensors[borders]).tolist()
        if vision.draws_last:
            added[f"{modality}_source_grids"] = grid_thw
        if vision.host_grids or vision.draws_last:
            added[f"{modality}_grid_sizes"] = grid_thw.tolist()
        if vision.pairs:
            added[f"{modality}_pair_index"] = pair_index(grid_thw, vision.spatial_merge_size)
        if vision.raster:
            added[f"{modality}_block_index"] = block_index(grid_thw, vision.spatial_merge_size)
    return added


def _crops(vision: VisionSpec, located: Located, modality: str, kind: int) -> dict[str, Any]:
    """Return the tensors of one modality for a tower that takes crops; none without crops."""
    sizes = getattr(located.inputs, _SIZES[modality])
    if sizes is None or not len(np.asarray(sizes)):
        return {}
    assert vision.table_side is not None  # read with `crops`
    mode = located.inputs.downsample_mode
    merges_windows = vision.spatial_merge_size == 4 if mode is None else mode != "4x"
    tensors = crop_tensors(vision.table_side, sizes, merges_windows)
    added: dict[str, Any] = {f"{modality}_{name}": value for name, value in tensors.items()}
    placeholder_T = located.kind_T == kind
    added[f"{modality}_scatter_index"] = _scatter_index(located, placeholder_T, flattened=False)
    for borders, lengths in _SPLITS.items():
        if borders in tensors:
            added[f"{modality}_{lengths}"] = np.diff(tensors[borders]).tolist()
    return added


def expert_tensors(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return which tokens go to the text experts, and which to the vision experts.

    Args:
        batch: with `moe_mm_token_type_ids` (B, S), as ERNIE's processor makes it: 0 for text, other
            values for images, clips and their markers. Without it, nothing is returned: the model
            then runs the text experts alone.

    Returns:
        `moe_text_index` and `moe_vision_index`, int64, flat indices into the B * S tokens.
    """
    types = batch.get("moe_mm_token_type_ids")
    if types is None:
        return {}
    vision = np.asarray(types).ravel() != 0
    return {"moe_text_index": np.flatnonzero(~vision), "moe_vision_index": np.flatnonzero(vision)}


def _with_pixels(
    grid_N3: npt.NDArray[np.int64], counts_B: npt.ArrayLike | None
) -> npt.NDArray[np.int64]:
    """Return the grids without the last of each row, an image that is to be drawn.

    Counts [2, 0, 3] of 5 grids leave the first, the third and the fourth.
    """
    if counts_B is None:  # one row, as the model takes it
        return grid_N3[:-1]
    counts_B = np.asarray(counts_B)
    return np.delete(grid_N3, counts_B.cumsum()[counts_B > 0] - 1, axis=0)


def sound_tensors(
    spec: MRopeSpec, audio: AudioSpec, located: Located, batch: Mapping[str, Any], flattened: bool
) -> dict[str, Any]:
    """Return the audio tower's keywords, and what an attached model reads besides."""
    lengths = located.inputs.audio_seqlens
    tensors = audio_tensors(audio, lengths)
    if not tensors:
        return {}
    added: dict[str, Any] = {f"audio_{name}": value for name, value in tensors.items()}
    added["audio_split_sizes"] = np.diff(added["audio_cu_seqlens"]).tolist()
    if batch.get("input_features") is not None:
        features = torch.as_tensor(batch["input_features"])
        added["audio_padded_feature"] = padded_features(audio, features, np.asarray(lengths))
    placeholder_T = located.stream.tokens_T == spec.extra["audio_token_id"]
    added["audio_scatter_index"] = _scatter_index(located, placeholder_T, flattened)
    return added


def _scatter_index(
    located: Located, placeholder_T: npt.NDArray[np.bool_], flattened: bool
) -> npt.NDArray[np.int64]:
    """Return which of the batch's tokens each feature row goes to, int64 (features,).

    A flattened row is the stream itself; in a padded batch of B * S tokens the padding counts.
    """
    index: npt.NDArray[np.int64] = placeholder_T.nonzero()[0]
    valid_BS = located.stream.valid_BS
    return index if flattened or valid_BS is None else np.flatnonzero(valid_BS)[index]

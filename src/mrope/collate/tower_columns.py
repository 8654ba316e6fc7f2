"""Compute what the model would derive from a batch besides position ids.

Two kinds: what transformers' towers take as keywords, under the models' own names; and what an
attached model (`mrope.hf.attach`) reads in addition, scatter indices and facts on the host.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from mrope.collate.placement import Placement
from mrope.collate.read import as_numpy
from mrope.collate.values import as_tensor, check_numbers
from mrope.columns import TOWER_KEYS, Columns, NewColumns
from mrope.positions.inputs import Media, length_error
from mrope.positions.located import Located
from mrope.positions.stream import IMAGE, VIDEO
from mrope.spec.spec import MRopeSpec
from mrope.towers import AudioSpec, VisionSpec, audio_tensors, padded_features, tower_tensors

EXPERT_TYPES = "moe_mm_token_type_ids"
_KINDS = {"image": IMAGE, "video": VIDEO}
# Segment lengths, which attention needs on the host, are named after the borders they come from.
_SPLITS = {"cu_seqlens": "split_sizes", "cu_window_seqlens": "window_split_sizes"}


def vision_columns(
    vision: VisionSpec, modality: str, located: Located, placement: Placement
) -> NewColumns:
    """Return the vision tower's keywords for images or clips, and what attached models read.

    Args:
        vision: the tower's numbers.
        modality: "image" or "video".

    Returns:
        `MRopeCollator.__call__` lists the keys; none without images or clips.
    """
    media, tower = located.inputs.media[modality], vision.tower
    tensors: NewColumns = {}
    if tower.sizes in ("crops", "merged_in_batch"):
        # The batch says how patches are merged.
        vision = replace(vision, spatial_merge_size=media.merge)
    if tower.sizes == "merged_in_batch":
        tensors["merge_size"] = media.merge
    if media.kept is not None:
        tensors["feature_index"] = np.flatnonzero(media.kept)
    size_N3 = _with_pixels(media) if tower.sizes == "without_last" else media.size_N3
    if not len(size_N3) or (modality == "video" and not tower.videos):
        return {}
    tensors |= tower_tensors(vision, size_N3)
    # Which features are of which image, for the outputs of an attached model.
    tensors["grid_sizes"] = size_N3.tolist()
    return _of_modality(modality, tensors, located.kind_T == _KINDS[modality], placement)


def audio_columns(
    spec: MRopeSpec,
    audio: AudioSpec,
    batch: Columns,
    located: Located,
    placement: Placement,
) -> NewColumns:
    """Return the audio tower's keywords, and what an attached model reads besides."""
    lengths_N = located.inputs.media["audio"].size_N3[:, 0]
    tensors: NewColumns = dict(audio_tensors(audio, lengths_N))
    if not tensors:
        return {}
    if batch.get("input_features") is not None:
        features = as_tensor("input_features", batch["input_features"])
        tensors["padded_feature"] = padded_features(audio, features, lengths_N)
    of_audio_T = located.stream.tokens_T == spec.extra["audio_token_id"]
    return _of_modality("audio", tensors, of_audio_T, placement)


def _of_modality(
    modality: str,
    tensors: NewColumns,
    placeholder_T: npt.NDArray[np.bool_],
    placement: Placement,
) -> NewColumns:
    """Add the places of features and the lengths of segments, and name all by their modality."""
    tensors["scatter_index"] = placement.places(placeholder_T)
    for borders, sizes in _SPLITS.items():
        if borders in tensors:
            border = tensors[borders]
            tensors[sizes] = (border[1:] - border[:-1]).tolist()
    return {TOWER_KEYS[modality, name]: value for name, value in tensors.items()}


def expert_columns(batch: Columns, placement: Placement) -> NewColumns:
    """Return which tokens go to the text experts, and which to the vision experts.

    Args:
        batch: with `moe_mm_token_type_ids` (B, S), as ERNIE's processor makes it: 0 for text, other
            values for images, clips and their markers. Without it the model runs the text experts
            alone.

    Returns:
        `moe_text_index` and `moe_vision_index`, int64, flat indices into the B * S tokens.

    Raises:
        MRopeError: types of another shape than the tokens, or no integers.
    """
    types, shape = as_numpy(EXPERT_TYPES, batch[EXPERT_TYPES]), (placement.rows, placement.width)
    check_numbers(EXPERT_TYPES, types)
    if types.shape != shape:
        raise length_error(EXPERT_TYPES, types.shape, shape)
    vision = types.ravel() != 0
    return {"moe_text_index": np.flatnonzero(~vision), "moe_vision_index": np.flatnonzero(vision)}


def _with_pixels(media: Media) -> npt.NDArray[np.int64]:
    """Return the grids without the last of each row, an image that is to be drawn.

    Counts [2, 0, 3] of 5 grids leave the first, the third and the fourth.
    """
    if media.count_B is None:  # one row, as the model takes it
        return media.size_N3[:-1]
    last = media.count_B.cumsum()[media.count_B > 0] - 1
    return np.delete(media.size_N3, last, axis=0)

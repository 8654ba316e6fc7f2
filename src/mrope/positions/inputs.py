"""Check and type every argument of a batch that its position ids depend on, once.

Shape suffixes: B rows of the batch, S padded length, N rows of a `*_grid_thw`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.arrays import BoolArray, IntArray, as_array, as_grid, as_integers
from mrope.errors import MRopeError
from mrope.spec.spec import MRopeSpec

# Processors give these for every family; a family whose position ids do not depend on them ignores
# them. Any other input that a family does not read is a mistake of the caller.
_IGNORED = {
    "mm_token_type_ids",
    "images_per_sample",
    "videos_per_sample",
    "second_per_grid_ts",
    "seconds_dtype",
    "seq_lengths",
}


class BatchInputs(NamedTuple):
    """A batch whose arguments were checked one by one: shapes, dtypes and values that stand alone.

    Whether they fit together (tokens and grids, counts and rows) is checked where both are known:
    in `mrope.positions.rope_index.locate`, or in the family's own module.

    Attributes:
        input_ids: (B, S) integers.
        valid: (B, S) bool, False at padding; None where the batch has no padding.
        image_grid_thw, video_grid_thw: int64 (N, 3) frames, height and width in patches; no rows
            where the batch has none.
        has_grids: whether the batch came with grids at all, with or without rows.
        mm_token_type_ids: (B, S) integers, or None.
        second_per_grid_ts: numbers, not checked yet: what is allowed depends on the clips.
        seconds_dtype: dtype in which seconds are multiplied by a frame's number.
        images_per_sample, videos_per_sample, audios_per_sample: how many of each a row has, or
            None; compared with the grids where these are counted.
        seq_lengths: for each row the tokens of the examples that it holds; None: a row is one.
        audio_seqlens, use_audio_in_video: of the Omni thinkers.
        target_sizes, target_sizes_videos, downsample_mode: of MiniCPM-V.
        image_merge_sizes, video_merge_sizes, video_compression_mask: of VideoLLaMA 3.
    """

    input_ids: IntArray
    valid: BoolArray | None
    image_grid_thw: npt.NDArray[np.int64]
    video_grid_thw: npt.NDArray[np.int64]
    has_grids: bool
    mm_token_type_ids: IntArray | None = None
    second_per_grid_ts: npt.ArrayLike | None = None
    seconds_dtype: npt.DTypeLike = np.float32
    images_per_sample: npt.ArrayLike | None = None
    videos_per_sample: npt.ArrayLike | None = None
    audios_per_sample: npt.ArrayLike | None = None
    seq_lengths: Sequence[npt.ArrayLike] | npt.ArrayLike | None = None
    audio_seqlens: npt.ArrayLike | None = None
    use_audio_in_video: npt.ArrayLike | None = None
    target_sizes: npt.ArrayLike | None = None
    target_sizes_videos: npt.ArrayLike | None = None
    downsample_mode: str | None = None
    image_merge_sizes: npt.ArrayLike | None = None
    video_merge_sizes: npt.ArrayLike | None = None
    video_compression_mask: npt.ArrayLike | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S)."""
        return self.input_ids.shape[0], self.input_ids.shape[1]


def check_inputs(
    spec: MRopeSpec,
    input_ids: npt.ArrayLike,
    attention_mask: npt.ArrayLike | None = None,
    image_grid_thw: npt.ArrayLike | None = None,
    video_grid_thw: npt.ArrayLike | None = None,
    mm_token_type_ids: npt.ArrayLike | None = None,
    **others: Any,
) -> BatchInputs:
    """Check the arguments of `mrope.rope_index`, whose docstring says what each of them is.

    Args:
        others: the fields of `BatchInputs` that are not named here.

    Raises:
        MRopeError: an argument of a wrong shape, dtype or value.
        TypeError: an argument that the spec's family does not read.
    """
    _refuse_unread(spec, others)
    ids = as_integers("input_ids", input_ids, "token ids")
    if ids.ndim != 2:
        raise MRopeError(f"input_ids must have shape (B, S), not {ids.shape}")
    types = None
    if mm_token_type_ids is not None and reads_types(spec):
        types = as_integers("mm_token_type_ids", mm_token_type_ids, "0 text, 1 image, 2 video")
        if types.shape != ids.shape:
            raise length_error("mm_token_type_ids", types.shape, ids.shape)
    return BatchInputs(
        input_ids=ids,
        valid=_as_valid(spec, attention_mask, ids.shape),
        image_grid_thw=_as_grids("image_grid_thw", image_grid_thw),
        video_grid_thw=_as_grids("video_grid_thw", video_grid_thw),
        has_grids=image_grid_thw is not None or video_grid_thw is not None,
        mm_token_type_ids=types,
        **others,
    )


def reads_types(spec: MRopeSpec) -> bool:
    """Whether `mm_token_type_ids` of a batch have to agree with its tokens.

    The Omni thinkers and GLM-Image find spans by markers, and their processors write other types.
    """
    row = spec.family_row
    return row.custom_index is None or "mm_token_type_ids" in row.inputs


def length_error(name: str, found: tuple[int, ...], ids: tuple[int, ...]) -> MRopeError:
    """Return the error for a token column of another shape than `input_ids`."""
    cause = ""
    if found and ids and found[:-1] == ids[:-1]:
        what = "one of them was truncated or padded without the other"
        if abs(found[-1] - ids[-1]) == 1:
            what = (
                "a token, such as EOS, was added to or removed from one of them, or one was shifted"
            )
        cause = f". Likely cause: {what}."
    if name == "labels":
        return MRopeError(f"{found[-1]} labels, but {ids[-1]} input_ids{cause}")
    return MRopeError(f"{name} has shape {found}, but input_ids {ids}{cause}")


def refuse_stacked_grids(name: str, axes: int, value: Any) -> None:
    """Refuse grids that have an axis for the rows of the batch.

    Raises:
        MRopeError: grids of more than two axes.
    """
    if axes > 2:
        raise MRopeError(
            f"{name} must have shape (N, 3), not {(*np.shape(value),)}. Likely cause: the grids of "
            "several rows were stacked (torch.stack, default_collate); concatenate them on dim 0."
        )


def _as_grids(name: str, values: npt.ArrayLike | None) -> npt.NDArray[np.int64]:
    """Return grids as int64 (N, 3), with N = 0 for None and for whatever is empty."""
    if values is None:
        return as_grid(name, None)
    array = as_array(name, values, "frames, height and width in patches")
    if not array.size:
        return as_grid(name, None)
    refuse_stacked_grids(name, array.ndim, array)
    return as_grid(name, array)


def _refuse_unread(spec: MRopeSpec, others: Mapping[str, Any]) -> None:
    """Refuse arguments that the family does not read."""
    row = spec.family_row
    known = _IGNORED.union(row.inputs)
    if row.custom_index is not None and not row.packs:
        known -= {"seq_lengths"}
    unread = sorted(
        name for name, value in others.items() if value is not None and name not in known
    )
    if unread:
        raise TypeError(f"rope_index takes no {', '.join(unread)} for {spec.family}")


def _as_valid(
    spec: MRopeSpec, attention_mask: npt.ArrayLike | None, shape: tuple[int, ...]
) -> BoolArray | None:
    """Return which tokens are valid, or None where all of them are."""
    if attention_mask is None:
        return None
    mask = as_array("attention_mask", attention_mask, "a number for each token")
    if mask.shape != shape:
        raise length_error("attention_mask", mask.shape, shape)
    if mask.size == 0:
        return None
    custom = spec.family_row.custom_index is not None
    if mask.dtype.kind not in "biu":
        allowed = "hold 0 and 1 only, or be bool" if custom else "be bool or integers"
        raise MRopeError(f"attention_mask must {allowed}, not {mask.dtype}")
    least = mask.min()
    # Packed rows number their examples 1, 2, 3 ... in the mask. The references of families with a
    # custom index, and 4.57's, disagree about such values: valid, padding, or so many tokens.
    binary = custom or spec.conventions.binary_mask
    if binary and mask.dtype.kind != "b" and not 0 <= least <= mask.max() <= 1:
        raise MRopeError(
            f"attention_mask must hold 0 and 1 only for {spec.family} and {spec.reference}, "
            "which take no other value for valid"
        )
    # One fast reduction tells the usual case, a batch without padding.
    return None if least > 0 else mask != 0

"""Compute M-RoPE position ids and rope deltas of a batch.

`rope_index` is the entry point for arrays. The collator takes the same three steps one by one, to
keep what they find: `check_inputs`, `locate`, `position_tensors`.

Shape suffixes: B rows, S padded length, T tokens of the stream, D documents, G grids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mrope.errors import MRopeError, SpanMismatchError
from mrope.positions.custom import CUSTOM_INDICES
from mrope.positions.diagnose import inverted_mask, type_mismatch
from mrope.positions.grids import to_grids
from mrope.positions.inputs import BatchInputs, check_inputs
from mrope.positions.kernel import PositionIds, number_stream
from mrope.positions.located import Located, Spans
from mrope.positions.seconds import span_steps
from mrope.positions.spans import find_runs, token_kinds
from mrope.positions.stream import Stream, split_rows, to_batch, to_stream
from mrope.spec.spec import MRopeSpec


def rope_index(
    spec: MRopeSpec,
    input_ids: npt.ArrayLike,
    attention_mask: npt.ArrayLike | None = None,
    image_grid_thw: npt.ArrayLike | None = None,
    video_grid_thw: npt.ArrayLike | None = None,
    second_per_grid_ts: npt.ArrayLike | None = None,
    *,
    mm_token_type_ids: npt.ArrayLike | None = None,
    images_per_sample: npt.ArrayLike | None = None,
    videos_per_sample: npt.ArrayLike | None = None,
    seq_lengths: Sequence[npt.ArrayLike] | npt.ArrayLike | None = None,
    seconds_dtype: npt.DTypeLike = np.float32,
    **inputs: Any,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Compute M-RoPE position ids and rope deltas, equal to the reference's `get_rope_index`.

    Args:
        spec: family, reference and token ids; see `MRopeSpec.from_config`.
        input_ids: (B, S) integers.
        attention_mask: (B, S) bool or integers, non-zero where a token is valid; None: all are.
            Padding may stand anywhere in a row.
        image_grid_thw: (images, 3) integers: frames, height, width of each image in patches, in
            the order in which the images stand in the batch, row by row.
        video_grid_thw: (videos, 3) integers, likewise.
        second_per_grid_ts: (videos,) seconds between two temporal positions of each video; None: 1.
            Read by families with timed videos only. A list of Python numbers and a float64 array
            are multiplied as Python floats are by torch: in float64, rounded to float32, then in
            float32 with the frame's number. A float32 array is multiplied in float32 throughout.
        mm_token_type_ids: (B, S) integers, 0 text, 1 image, 2 video; must agree with the token ids.
        images_per_sample, videos_per_sample: (B,) how many grids each row has. With them each
            row is checked on its own; without them tokens and grids must match over the batch.
        seq_lengths: for rows that hold several examples: the tokens of each example of each row.
            Every example is numbered as if it were alone. None: a row is an example.
        seconds_dtype: dtype of the multiplication by the frame's number. float64 is right only
            where the model itself would be given a float64 tensor of seconds.
        inputs: what else the family's own rule reads, by the names in `spec.family_row.inputs`; see
            the family's module in `mrope.positions.custom`.

    Returns:
        `position_ids`, int64 (3, B, S), and `rope_deltas`, int64 (B, 1); families with a rule of
        their own may have another dtype, or more axes. With `seq_lengths` one
        row of deltas for each example, (examples, 1), taken over the example's own tokens.

    Raises:
        SpanMismatchError: placeholder tokens and grids do not fit together.
        MRopeError: an argument of a wrong shape, dtype or value, or a family with 1-D positions.
        TypeError: an input that the family does not read.

    Source: `get_rope_index` of the family's model in the release that `spec.reference` names.

    Example:
        An image of 2 x 2 merged tokens after one text token, then text again:

        >>> from mrope.spec.spec import example_config
        >>> spec = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
        >>> ids, delta = rope_index(spec, [[7, 102, 102, 102, 102, 8]], image_grid_thw=[[1, 4, 4]])
        >>> ids[:, 0].tolist()
        [[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]]
        >>> delta.tolist()
        [[-2]]
    """
    if spec.family_row.one_dimensional:
        # 1-D positions are never returned where M-RoPE was asked for.
        raise MRopeError(
            f"{spec.family} numbers its tokens in 1-D, as those of a text: rope_index has nothing "
            "to compute; MRopeCollator adds its position ids, for the sake of its towers' tensors"
        )
    checked = check_inputs(
        spec,
        input_ids,
        attention_mask,
        image_grid_thw,
        video_grid_thw,
        mm_token_type_ids,
        second_per_grid_ts=second_per_grid_ts,
        images_per_sample=images_per_sample,
        videos_per_sample=videos_per_sample,
        seq_lengths=seq_lengths,
        seconds_dtype=seconds_dtype,
        **inputs,
    )
    return position_tensors(spec, locate(spec, checked))


def locate(spec: MRopeSpec, inputs: BatchInputs) -> Located:
    """Drop the padding, tell placeholders from text, and give every span its grid.

    Families with a custom index find their spans themselves: `spans` is None for them.

    Raises:
        SpanMismatchError: tokens, types and grids do not fit together.
        MRopeError: sizes, counts or seconds that do not fit the batch.
    """
    try:
        return _locate(spec, inputs)
    except SpanMismatchError as error:
        raise _with_mask_cause(spec, inputs, error) from None


def _locate(spec: MRopeSpec, inputs: BatchInputs) -> Located:
    stream = to_stream(inputs.input_ids, inputs.valid)
    if inputs.seq_lengths is not None:
        stream = split_rows(stream, inputs.seq_lengths, inputs.shape[0])
    custom = spec.family_row.custom_index is not None
    grids = None if custom else to_grids(spec, inputs)
    kind_T = token_kinds(spec, stream)
    if inputs.mm_token_type_ids is not None:
        types_T = _of_stream(inputs.mm_token_type_ids, stream)
        if not np.array_equal(kind_T, types_T):
            raise type_mismatch(stream, kind_T, types_T)
    if grids is None:
        return Located(inputs, stream, kind_T, None)
    runs = find_runs(spec, stream, grids, kind_T)
    return Located(inputs, stream, kind_T, Spans(grids, runs, span_steps(spec, inputs, grids)))


def position_tensors(
    spec: MRopeSpec, located: Located
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Compute `position_ids` and `rope_deltas` of a located batch; shapes as of `rope_index`.

    For `one_dimensional` families `position_ids` are int64 (B, S): 0, 1, 2 ... over the padding
    too, as these models number their tokens themselves; their deltas are 0.
    """
    if spec.family_row.one_dimensional and located.spans is not None:
        rows, width = located.inputs.shape
        return np.tile(np.arange(width), (rows, 1)), np.zeros((rows, 1), np.int64)
    if located.spans is None:
        try:
            return _custom_tensors(spec, located)
        except SpanMismatchError as error:
            raise _with_mask_cause(spec, located.inputs, error) from None
    stream, (grids, runs, step_G) = located.stream, located.spans
    positions_3T, end_D = number_stream(
        runs,
        grids.size_3G,
        step_G,
        spec.conventions.advance_over_time,
        grids.moves,
        spec.family_row.planes_at_zero,
    )
    shape = located.inputs.shape
    position_ids = to_batch(positions_3T, stream, shape, spec.conventions.fill)
    if located.inputs.seq_lengths is not None:
        return position_ids, (end_D - stream.length_D)[:, None]
    return position_ids, _deltas(spec, located.inputs, stream, end_D)


def _custom_tensors(spec: MRopeSpec, located: Located) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    custom_index = spec.family_row.custom_index
    assert custom_index is not None  # `locate` leaves spans to these families alone
    return CUSTOM_INDICES[custom_index](spec, located)


def _with_mask_cause(
    spec: MRopeSpec, inputs: BatchInputs, error: SpanMismatchError
) -> SpanMismatchError:
    """Return the error; with another cause if the batch fits once its mask is inverted."""
    if inputs.valid is None:
        return error
    inverted = inputs._replace(valid=~inputs.valid, seq_lengths=None)
    try:
        located = _locate(spec, inverted)
        if located.spans is None:
            _custom_tensors(spec, located)
    except MRopeError:
        return error
    return inverted_mask(error, located.stream, located.kind_T)


def _of_stream(values_BS: npt.NDArray[Any], stream: Stream) -> npt.NDArray[Any]:
    return values_BS.ravel() if stream.valid_BS is None else values_BS[stream.valid_BS]


def _deltas(
    spec: MRopeSpec, inputs: BatchInputs, stream: Stream, end_D: PositionIds
) -> PositionIds:
    """Return `rope_deltas` (B, 1): the largest position + 1, minus the length it is taken over."""
    rows, width = inputs.shape
    conventions = spec.conventions
    if stream.valid_BS is None:
        return (end_D - width)[:, None]
    delta_B = np.zeros(rows, np.int64)
    if not conventions.delta_over_padded:
        delta_B[stream.row_D] = end_D - stream.length_D
        return delta_B[:, None]
    delta_B[stream.row_D] = end_D
    if conventions.text_batch_fill_in_delta and not inputs.has_grids:
        # The release takes the maximum over padding too, where it wrote the fill.
        padded_B = ~stream.valid_BS.all(axis=1)
        np.maximum(delta_B, conventions.fill + 1, out=delta_B, where=padded_B)
    return (delta_B - width)[:, None]

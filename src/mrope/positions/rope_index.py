"""Compute M-RoPE position ids and rope deltas of a batch.

`rope_index` is the entry point for arrays. The collator takes the same steps one by one, to keep
what they find: `check_inputs`, `compute`, `rope_deltas`.

Shape suffixes: B rows, S padded length, T tokens of the stream, D documents, G grids.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mrope.arrays import Array
from mrope.columns import count_key
from mrope.errors import MRopeError, SpanMismatchError
from mrope.positions.custom import RULES, Padding, Rule
from mrope.positions.custom.omni import is_silent
from mrope.positions.diagnose import inverted_mask, type_mismatch
from mrope.positions.grids import to_grids
from mrope.positions.inputs import SECONDS, BatchInputs, check_inputs
from mrope.positions.kernel import number_stream
from mrope.positions.located import Located, Spans
from mrope.positions.seconds import span_steps
from mrope.positions.spans import find_runs, token_kinds
from mrope.positions.stream import split_rows, to_batch, to_stream
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
    **inputs: object,
) -> tuple[Array, Array]:
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
    given = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "image_grid_thw": image_grid_thw,
        "video_grid_thw": video_grid_thw,
        SECONDS: second_per_grid_ts,
        "mm_token_type_ids": mm_token_type_ids,
        count_key("image"): images_per_sample,
        count_key("video"): videos_per_sample,
        "seq_lengths": seq_lengths,
        **inputs,
    }
    given = {name: value for name, value in given.items() if value is not None}
    located, positions_AT, end_D = compute(spec, check_inputs(spec, given, seconds_dtype))
    padded = located.stream.valid_BS is not None
    fill = padding_of(spec, located.inputs).fill if padded else 0
    position_ids = to_batch(positions_AT, located.stream, located.inputs.shape, fill)
    return position_ids, rope_deltas(spec, located, end_D)


def compute(spec: MRopeSpec, inputs: BatchInputs) -> tuple[Located, Array, Array]:
    """Locate the spans of a checked batch and number its tokens.

    Returns:
        What `locate` and `number` return.

    Raises:
        SpanMismatchError: tokens, types and sizes do not fit together; if they fit once the
            attention mask is inverted, that is the cause that it names.
        MRopeError: sizes, counts or seconds that do not fit the batch.
    """
    try:
        located = locate(spec, inputs)
        return located, *number(spec, located)
    except SpanMismatchError as error:
        raise _with_mask_cause(spec, inputs, error) from None


def locate(spec: MRopeSpec, inputs: BatchInputs) -> Located:
    """Drop the padding, tell placeholders from text, and give every span its grid.

    Families with a custom index find their spans themselves: `spans` is None for them.

    Raises:
        SpanMismatchError, MRopeError: as `compute`.
    """
    stream = to_stream(inputs.input_ids, inputs.valid)
    if inputs.seq_lengths is not None:
        stream = split_rows(stream, inputs.seq_lengths, inputs.shape[0])
    custom = spec.family_row.custom_index is not None
    grids = None if custom else to_grids(spec, inputs)
    kind_T = token_kinds(spec, stream)
    if inputs.types is not None:
        types_T = inputs.types.ravel()
        if stream.valid_BS is not None:
            types_T = types_T[stream.valid_BS.ravel()]
        # As bytes, which compare several times faster; what a byte does not hold has a higher bit.
        bits = np.bitwise_or.reduce(types_T, initial=0)
        if not 0 <= bits < 4 or np.count_nonzero(types_T.astype(np.uint8) != kind_T):
            raise type_mismatch(stream, kind_T, types_T)
    if grids is None:
        return Located(inputs, stream, kind_T, None)
    runs = find_runs(spec, stream, grids, kind_T)
    timed = spec.tokens_per_second is not None
    steps = span_steps(spec, inputs, grids) if timed else None
    return Located(inputs, stream, kind_T, Spans(grids, runs, steps))


def number(spec: MRopeSpec, located: Located) -> tuple[Array, Array]:
    """Number the tokens of a located batch, by the kernel or by the family's own rule.

    Returns:
        Positions of the stream (A, T): time, height and width, or the axes of the family's rule;
        and for each document its largest position + 1, (D,), of the same dtype.

    Raises:
        SpanMismatchError, MRopeError: as the family's rule.
    """
    if located.spans is None:
        return _rule(spec).number(spec, located)
    grids, runs, step_G = located.spans
    return number_stream(
        runs,
        grids.size_3G,
        step_G,
        spec.conventions.advance_over_time,
        grids.moves,
        spec.family_row.planes_at_zero,
    )


def padding_of(spec: MRopeSpec, inputs: BatchInputs | bool) -> Padding:
    """Return what stands at padding, and what of it counts in rope deltas.

    Args:
        inputs: the batch; or whether it has images or clips, of a batch that is yet to come.
    """
    batch = None if isinstance(inputs, bool) else inputs
    if spec.family_row.custom_index is not None:
        rule = _rule(spec)
        if rule.silent is not None and batch is not None and is_silent(spec, batch):
            return rule.silent
        has_grids = inputs if batch is None else batch.has_grids
        return rule.padding if has_grids or rule.text is None else rule.text
    conventions = spec.conventions
    text = False
    if conventions.text_batch_fill_in_delta:
        text = not (inputs if batch is None else batch.has_grids)
    return Padding(conventions.fill, text, over_padded=conventions.delta_over_padded)


def rope_deltas(spec: MRopeSpec, located: Located, end_D: Array, apart: bool = False) -> Array:
    """Return `rope_deltas`: the largest position + 1, minus the length it is taken over.

    Args:
        apart: take each example over its own tokens, as in a row without padding.

    Returns:
        (B, 1), of the dtype of `end_D`; one for each example, (D, 1), with `apart` or where rows
        hold several.
    """
    inputs, stream = located.inputs, located.stream
    rows, width = inputs.shape
    dtype = end_D.dtype  # float32 in Qwen3-Omni
    deltas: Array
    if apart or inputs.seq_lengths is not None:
        deltas = end_D - stream.length_D.astype(dtype)
        return deltas[:, None]
    if stream.valid_BS is None:
        deltas = end_D - dtype.type(width)
        return deltas[:, None]
    padding = padding_of(spec, inputs)
    end_B: Array = np.full(rows, padding.empty_end, dtype)
    end_B[stream.row_D] = end_D
    if padding.fill_counts:
        # The release takes the maximum over padding too, where it wrote the fill.
        padded_B = ~stream.valid_BS.all(axis=1)
        np.maximum(end_B, padding.fill + 1, out=end_B, where=padded_B)
    over = width if padding.over_padded else np.count_nonzero(stream.valid_BS, axis=1)
    deltas = end_B - np.asarray(over, dtype)
    return deltas[:, None]


def _rule(spec: MRopeSpec) -> Rule:
    custom_index = spec.family_row.custom_index
    assert custom_index is not None  # `locate` leaves spans to these families alone
    return RULES[custom_index]


def _with_mask_cause(
    spec: MRopeSpec, inputs: BatchInputs, error: SpanMismatchError
) -> SpanMismatchError:
    """Return the error; with another cause if the batch fits once its mask is inverted."""
    if inputs.valid is None:
        return error
    inverted = inputs._replace(valid=~inputs.valid, seq_lengths=None)
    try:
        located = locate(spec, inverted)
        number(spec, located)
    except MRopeError:
        return error
    return inverted_mask(error, located.stream, located.kind_T)

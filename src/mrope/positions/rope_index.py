"""Step 5 of the way: the one kernel that numbers tokens, and `rope_index`, its public face.

Shape suffixes: B rows, S padded length, T tokens of the stream, D documents, R runs, V vision
spans, L lines. A line is a stretch of tokens in which the width position counts up while time and
height stand still: one row of a frame. A text run counts as one line too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.arrays import BoolArray, IntArray, as_array, as_integers
from mrope.errors import MRopeError
from mrope.positions.custom import custom_rope_index
from mrope.positions.grids import Grids, to_grids
from mrope.positions.spans import Runs, find_runs
from mrope.positions.stored import StoredSpans, stored_runs
from mrope.positions.stream import Stream, split_rows, to_batch, to_stream
from mrope.spec.spec import MRopeSpec

PositionIds = npt.NDArray[np.int64]
Steps = npt.NDArray[Any]  # int64, float32 or float64: the dtype decides how products round

# Longer clips are no clips: far below, products of seconds and steps stay exact enough for int64.
_MAX_SECONDS = 2**31


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
    stored: StoredSpans | None = None,
    **inputs: Any,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Compute the 3-D positions of a batch, as `get_rope_index` of the spec's reference does.

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
        stored: the batch's spans, found ahead of time (see `mrope.prepare.precheck`), to number by once they
            agree with tokens and grids. Not for families with a rule of their own.
        inputs: what the rule of the family takes besides, `spec.family_row.inputs`; see the function of
            that name in `mrope.positions.custom`.

    Returns:
        `position_ids`, int64 (3, B, S), and `rope_deltas`, int64 (B, 1); families with a rule of
        their own may have another dtype, or more axes. With `seq_lengths` one
        row of deltas for each example, (examples, 1), taken over the example's own tokens.

    Raises:
        SpanMismatchError: placeholder tokens and grids do not fit together.
        MRopeError: an argument of a wrong shape, dtype or value.

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
    if spec.family_row.custom_index is not None:
        given = {
            "attention_mask": attention_mask,
            "image_grid_thw": image_grid_thw,
            "video_grid_thw": video_grid_thw,
            "second_per_grid_ts": second_per_grid_ts,
            "mm_token_type_ids": mm_token_type_ids,
            "images_per_sample": images_per_sample,
            "videos_per_sample": videos_per_sample,
        }
        return custom_rope_index(spec, input_ids, given | inputs)
    if inputs:
        raise TypeError(f"rope_index takes no {', '.join(inputs)} for {spec.family}")
    batch = locate(
        spec,
        input_ids,
        attention_mask,
        image_grid_thw,
        video_grid_thw,
        second_per_grid_ts,
        mm_token_type_ids=mm_token_type_ids,
        images_per_sample=images_per_sample,
        videos_per_sample=videos_per_sample,
        seq_lengths=seq_lengths,
        seconds_dtype=seconds_dtype,
        stored=stored,
    )
    runs, stream, size_3G = batch.runs, batch.stream, batch.grids.size_3G
    positions_3T, end_D = number_stream(
        runs, size_3G.take(runs.grid_V, axis=1), batch.step_V, spec.conventions.advance_over_time
    )
    position_ids = to_batch(positions_3T, stream, batch.shape, spec.conventions.fill)
    if seq_lengths is not None:
        return position_ids, (end_D - stream.length_D)[:, None]
    has_grids = image_grid_thw is not None or video_grid_thw is not None
    return position_ids, _deltas(spec, stream, end_D, batch.shape, has_grids)


class Located(NamedTuple):
    """A batch that was checked, and in which every image and clip has its place.

    Attributes:
        shape: (B, S).
        stream, grids, runs: see the modules that make them.
        step_V: temporal step of each span; None: 1 everywhere.
    """

    shape: tuple[int, int]
    stream: Stream
    grids: Grids
    runs: Runs
    step_V: Steps | None


def locate(
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
    stored: StoredSpans | None = None,
) -> Located:
    """Do all of `rope_index` but the numbering: arguments and errors are the same."""
    ids_BS = _as_ids(input_ids)
    shape = (ids_BS.shape[0], ids_BS.shape[1])
    stream = to_stream(ids_BS, _as_valid(attention_mask, shape, spec))
    if seq_lengths is not None:
        stream = split_rows(stream, seq_lengths, shape[0])
    grids = to_grids(
        spec, image_grid_thw, video_grid_thw, images_per_sample, videos_per_sample, shape
    )
    types_T = _as_types(mm_token_type_ids, shape, stream)
    if stored is None:
        runs = find_runs(spec, stream, grids, types_T)
    else:
        runs = stored_runs(spec, stream, grids, stored, shape[0], types_T)
    step_V = span_steps(spec, grids, second_per_grid_ts, runs.grid_V, seconds_dtype)
    return Located(shape, stream, grids, runs, step_V)


def number_stream(
    runs: Runs, size_3V: IntArray, step_V: Steps | None, advance_over_time: bool
) -> tuple[PositionIds, PositionIds]:
    """Number every token of a stream. One pass: no loop over tokens, documents, runs or lines.

    Args:
        runs: the stream cut into text runs and vision spans.
        size_3V: frames, merged height and merged width of each span.
        step_V: temporal step of each span, int64 or float; None: 1 everywhere.
        advance_over_time: text goes on after a span's largest position, time included.

    Returns:
        positions (3, T) int64, and for each document its largest position + 1, (D,) int64.

    Example of the index work, one document of `text text [image of 2 x 3] text`:

        runs    length  2 6 1      lines  1 2 1      advance  2 3 1      base  0 2 5
        lines   width   2 3 3 1    start  0 2 5 8
                time    0 2 2 5    height 0 2 3 5    width    0 2 2 5    at each line's start
        tokens  width    repeat(width - start) + arange      0 1 2 3 4 2 3 4 5
                height   repeat(height), then text as above   0 1 2 2 2 3 3 3 5
                time     repeat(time), then text as above     0 1 2 2 2 2 2 2 5
    """
    frames_V, height_V, width_V = size_3V
    advance_V = reach_V = np.maximum(height_V, width_V)
    moving = np.count_nonzero(frames_V != 1) > 0
    if moving:
        reach_V = np.maximum(advance_V, _in_steps(frames_V - 1, step_V) + 1)
        advance_V = reach_V if advance_over_time else advance_V

    advance_R = _assign(runs.length_R.copy(), runs.vision_V, advance_V)
    table_4R = np.empty((4, len(advance_R)), np.int64)
    time_R, height_R, base_R, width_R = table_4R
    advance_R.cumsum(out=base_R)
    base_R -= advance_R
    base_R -= base_R[runs.first_D].repeat(runs.runs_D)
    end_R = base_R + (_assign(advance_R, runs.vision_V, reach_V) if moving else advance_R)
    width_R[:] = runs.length_R
    width_R[runs.vision_V] = width_V
    lines_R = np.ones(len(width_R), np.int64)
    lines_R[runs.vision_V] = frames_V * height_V if moving else height_V
    # Height counts lines within a span: its line's number minus that of the span's first line.
    time_R[:] = base_R
    lines_R.cumsum(out=height_R)
    np.subtract(base_R, height_R, out=height_R)
    height_R += lines_R

    table_4L = table_4R.repeat(lines_R, axis=1)
    line_3L, width_L = table_4L[:3], table_4L[3]
    line_3L[1] += _counting(len(width_L))
    if moving:
        _add_time(line_3L, runs, lines_R, height_V, step_V)
    line_3L[2, 1:] -= width_L[:-1].cumsum()

    positions_3T = line_3L.repeat(width_L, axis=1)
    positions_3T[2] += _counting(positions_3T.shape[1])
    np.copyto(positions_3T[:2], positions_3T[2], where=runs.text_T)
    return positions_3T, _last(end_R, runs.first_D)


def _add_time(
    line_3L: PositionIds, runs: Runs, lines_R: IntArray, height_V: IntArray, step_V: Steps | None
) -> None:
    """Wrap the height of lines at each frame and move their time on by as many steps.

    A span of 2 frames of 3 lines: lines 0 1 2 3 4 5 are frame 0 0 0 1 1 1, height 0 1 2 0 1 2.
    """
    height_R = _assign(lines_R.copy(), runs.vision_V, height_V)
    height_L = height_R.repeat(lines_R)
    frame_L = (line_3L[1] - line_3L[0]) // height_L
    line_3L[1] -= frame_L * height_L
    if step_V is None:
        line_3L[0] += frame_L
    else:
        step_R = _assign(np.ones(len(lines_R), step_V.dtype), runs.vision_V, step_V)
        line_3L[0] += _in_steps(frame_L, step_R.repeat(lines_R))


def _in_steps(frames: IntArray, steps: Steps | None) -> IntArray:
    """Return `frames * steps`, truncated; computed in the dtype of the steps, as torch does."""
    if steps is None:
        return frames
    product: npt.NDArray[Any] = frames.astype(steps.dtype) * steps
    return product.astype(np.int64)


def _assign(values: npt.NDArray[Any], where: IntArray, new: npt.NDArray[Any]) -> npt.NDArray[Any]:
    values[where] = new
    return values


def _last(end_R: IntArray, first_D: IntArray) -> PositionIds:
    return np.maximum.reduceat(end_R, first_D) if len(first_D) else np.empty(0, np.int64)


_COUNT = np.arange(1 << 12)


def _counting(n: int) -> IntArray:
    """Return 0, 1, ... n - 1: a view, not to be written to, of one array that is kept and grows.

    Two batches of a loader are of about the same size; a fresh arange each time is a tenth of the
    kernel's time. What is kept is a third of the largest output at most.
    """
    global _COUNT
    # Threads may collate too: what another of them puts there meanwhile could be shorter.
    count = _COUNT
    if n > len(count):
        count = _COUNT = np.arange(n)
    return count[:n]


def span_steps(
    spec: MRopeSpec,
    grids: Grids,
    second_per_grid_ts: npt.ArrayLike | None,
    grid_V: IntArray,
    seconds_dtype: npt.DTypeLike = np.float32,
) -> Steps | None:
    """Return the temporal step of each span; None where the family has no timed videos.

    Raises:
        MRopeError: seconds of a wrong count, shape, dtype or value.
    """
    if spec.tokens_per_second is None:
        return None
    video_step = _video_steps(spec, grids, second_per_grid_ts, np.dtype(seconds_dtype))
    step_G = np.full(grids.size_3G.shape[1], spec.conventions.timed_image_step, video_step.dtype)
    step_G[grids.images :] = video_step
    return step_G[grid_V]


def _video_steps(
    spec: MRopeSpec,
    grids: Grids,
    second_per_grid_ts: npt.ArrayLike | None,
    dtype: np.dtype[Any],
) -> Steps:
    """Return `tokens_per_second * second_per_grid_ts`, rounded where the reference rounds."""
    videos = len(grids.frames_N)
    rate = spec.tokens_per_second
    assert rate is not None  # the caller asked
    if second_per_grid_ts is None:
        return np.full(videos, rate, np.int64)
    seconds = _as_seconds(second_per_grid_ts, grids)
    if seconds.dtype.kind in "iu" or spec.conventions.whole_seconds:
        whole: Steps = rate * seconds.astype(np.int64)
        return whole
    # A float32 array is multiplied in float32; Python floats in float64, and rounded afterwards.
    step: Steps = seconds.dtype.type(rate) * seconds
    return step.astype(dtype)


def _as_seconds(values: npt.ArrayLike, grids: Grids) -> npt.NDArray[Any]:
    videos = len(grids.frames_N)
    seconds = as_array("second_per_grid_ts", values, "seconds of each video")
    if seconds.size == 0:
        seconds = np.empty(seconds.shape, np.int64)
    if seconds.dtype.kind not in "iu" and seconds.dtype not in (np.float32, np.float64):
        raise MRopeError(
            f"second_per_grid_ts must be float32, float64 or integers, not {seconds.dtype}: "
            "at half precision frames share positions"
        )
    if seconds.shape != (videos,):
        raise MRopeError(
            f"second_per_grid_ts has shape {seconds.shape}, but the batch has {videos} videos"
        )
    most = grids.size_3G[0].max(initial=1)
    with np.errstate(over="ignore"):
        bad = ~((seconds >= 0) & (seconds * most < _MAX_SECONDS))
    if bad.any():
        video = int(bad.argmax())
        raise MRopeError(
            f"second_per_grid_ts[{video}] = {seconds[video]}: must be finite, not negative, "
            f"and keep the clip under {_MAX_SECONDS} seconds"
        )
    return seconds


def _as_ids(input_ids: npt.ArrayLike) -> IntArray:
    ids = as_integers("input_ids", input_ids, "token ids")
    if ids.ndim != 2:
        raise MRopeError(f"input_ids must have shape (B, S), not {ids.shape}")
    return ids


def _as_valid(
    attention_mask: npt.ArrayLike | None, shape: tuple[int, ...], spec: MRopeSpec
) -> BoolArray | None:
    """Return which tokens are valid, or None where all of them are."""
    if attention_mask is None:
        return None
    mask = as_array("attention_mask", attention_mask, "a number for each token")
    if mask.shape != shape:
        raise MRopeError(f"attention_mask has shape {mask.shape}, but input_ids {shape}")
    if mask.size == 0:
        return None
    if mask.dtype.kind not in "biu":
        raise MRopeError(f"attention_mask must be bool or integers, not {mask.dtype}")
    if (
        spec.conventions.binary_mask
        and mask.dtype.kind != "b"
        and not 0 <= mask.min() <= mask.max() <= 1
    ):
        raise MRopeError(
            f"attention_mask must hold 0 and 1 only: {spec.reference} takes every other value "
            "for padding"
        )
    # One fast reduction tells the usual case, a batch without padding.
    return None if mask.min() > 0 else mask != 0


def _as_types(
    mm_token_type_ids: npt.ArrayLike | None, shape: tuple[int, ...], stream: Stream
) -> IntArray | None:
    if mm_token_type_ids is None:
        return None
    types = as_integers("mm_token_type_ids", mm_token_type_ids, "0 text, 1 image, 2 video")
    if types.shape != shape:
        raise MRopeError(f"mm_token_type_ids has shape {types.shape}, but input_ids {shape}")
    return types.ravel() if stream.valid_BS is None else types[stream.valid_BS]


def _deltas(
    spec: MRopeSpec, stream: Stream, end_D: PositionIds, shape: tuple[int, ...], has_grids: bool
) -> PositionIds:
    """Return `rope_deltas` (B, 1): the largest position + 1, minus the length it is taken over."""
    rows, width = shape
    delta_B = np.zeros(rows, np.int64)
    if not spec.conventions.delta_over_padded:
        delta_B[stream.row_D] = end_D - stream.length_D
        return delta_B[:, None]
    delta_B[stream.row_D] = end_D
    if spec.conventions.text_batch_fill_in_delta and not has_grids and stream.valid_BS is not None:
        padded_B = ~stream.valid_BS.all(axis=1)
        np.maximum(delta_B, spec.conventions.fill + 1, out=delta_B, where=padded_B)
    return (delta_B - width)[:, None]

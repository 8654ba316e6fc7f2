"""Compute position ids of a whole stream in one pass, without a loop over tokens or spans.

One idea is used twice: compute a few numbers for each group, and repeat them over its members.
Groups are first runs, then lines; `docs/contributors/design.md` shows both steps on small arrays.

Shape suffixes: T tokens of the stream, D documents, D1 their borders, R runs, R1 their borders, G
grids (one for each vision span), L lines. A line is a stretch of tokens in which the width position
counts up while time and height stand still: one row of a frame. A text run counts as one line too.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mrope.arrays import Array, IntArray
from mrope.positions.located import Runs
from mrope.positions.seconds import Steps
from mrope.positions.stream import count_up

PositionIds = npt.NDArray[np.int64]


def number_stream(
    runs: Runs,
    size_3G: IntArray,
    step_G: Steps | None,
    advance_over_time: bool,
    moves: bool,
    planes_at_zero: bool = False,
) -> tuple[PositionIds, PositionIds]:
    """Compute the position ids of every token of a stream.

    Args:
        runs: the stream cut into text runs and vision spans.
        size_3G: frames, merged height and merged width of each span.
        step_G: temporal step of each span, int64 or float; None: 1 everywhere.
        advance_over_time: text goes on after a span's largest position, time included.
        moves: whether any span has more than one frame.
        planes_at_zero: rows and columns count from 0, and text goes on 1 after a span's time; no
            span has more than one frame.

    Returns:
        positions (3, T) int64, and for each document its largest position + 1, (D,) int64.

    Example of the index work, one document of `text text [image of 2 x 3] text`:

        runs    advance 2 3 1      lines  1 2 1      width  2 3 1
                base    0 2 5      height at the first line, less the line's number: 0 1 2
        lines   width   2 3 3 1    start  0 2 5 8
                time    0 2 2 5    height 0 2 3 5    width    0 2 2 5    at each line's start
        tokens  width    repeat(width - start) + arange      0 1 2 3 4 2 3 4 5
                height   repeat(height), then text as above   0 1 2 2 2 3 3 3 5
                time     repeat(time), then text as above     0 1 2 2 2 2 2 2 5
    """
    # On a short batch calls cost more than arithmetic. So all rows are one allocation, and rows are
    # taken by their index: to unpack an array takes five times as long.
    frames_G, height_G, width_G = size_3G[0], size_3G[1], size_3G[2]
    table_6R1 = np.zeros((6, len(runs.border_R1)), np.int64)
    table_6R = table_6R1[:, :-1]
    advance_R, lines_R, base_R = table_6R[0], table_6R[1], table_6R[2]
    height_R, start_R, width_R = table_6R[3], table_6R[4], table_6R[5]
    advance_R[:] = width_R[:] = runs.length_R
    lines_R[:] = 1
    advance_G = np.ones_like(height_G) if planes_at_zero else np.maximum(height_G, width_G)
    reach_G = np.maximum(advance_G, _in_steps(frames_G - 1, step_G) + 1) if moves else advance_G
    advance_R[runs.vision_G] = reach_G if advance_over_time else advance_G
    lines_R[runs.vision_G] = frames_G * height_G if moves else height_G
    width_R[runs.vision_G] = width_G

    # Running sums of both rows, from 0: where each run begins, and the number of its first line.
    np.add.accumulate(advance_R, out=table_6R1[2, 1:])
    np.add.accumulate(lines_R, out=table_6R1[3, 1:])
    begin_D1 = table_6R1[2][runs.first_D1]
    end_D = begin_D1[1:] - begin_D1[:-1]
    if len(end_D) > 1:
        # Every document begins at 0.
        base_R -= begin_D1[:-1].repeat(runs.first_D1[1:] - runs.first_D1[:-1])
    if moves:
        advance_R[runs.vision_G] = reach_G
        end_D = _largest(base_R + advance_R, runs.first_D1)
    np.subtract(base_R, height_R, out=height_R)
    start_R[:] = base_R

    line_4L = table_6R[2:].repeat(lines_R, axis=1)
    line_3L, height_L, start_L, width_L = line_4L[:3], line_4L[1], line_4L[2, 1:], line_4L[3]
    height_L += count_up(len(width_L))
    if moves:
        _add_time(line_3L, runs, lines_R, height_G, step_G)
    start_L -= np.add.accumulate(width_L[:-1])

    positions_3T = line_3L.repeat(width_L, axis=1)
    width_T = positions_3T[2]
    width_T += count_up(len(width_T))
    np.copyto(positions_3T[:2], width_T, where=runs.text_T)
    return positions_3T, _move_to_zero(positions_3T, runs) if planes_at_zero else end_D


def _move_to_zero(positions_3T: PositionIds, runs: Runs) -> PositionIds:
    """Subtract each span's position from its rows and columns; return each document's end anew.

    A large image may reach beyond all that stands behind it, so that the largest position of a
    document can be anywhere.
    """
    np.subtract(positions_3T[1:], positions_3T[0], out=positions_3T[1:], where=~runs.text_T)
    if len(runs.first_D1) == 1:
        return np.empty(0, np.int64)
    starts_D = runs.border_R1[runs.first_D1[:-1]]
    ends_D: PositionIds = np.maximum.reduceat(positions_3T.max(axis=0), starts_D) + 1
    return ends_D


def _add_time(
    line_3L: PositionIds, runs: Runs, lines_R: IntArray, height_G: IntArray, step_G: Steps | None
) -> None:
    """Wrap the height of lines at each frame and move their time on by as many steps.

    A span of 2 frames of 3 lines: lines 0 1 2 3 4 5 are frame 0 0 0 1 1 1, height 0 1 2 0 1 2.
    """
    height_R = _assign(lines_R.copy(), runs.vision_G, height_G)
    height_L = height_R.repeat(lines_R)
    frame_L = (line_3L[1] - line_3L[0]) // height_L
    line_3L[1] -= frame_L * height_L
    if step_G is None:
        line_3L[0] += frame_L
    else:
        step_R = _assign(np.ones(len(lines_R), step_G.dtype), runs.vision_G, step_G)
        line_3L[0] += _in_steps(frame_L, step_R.repeat(lines_R))


def _in_steps(frames: IntArray, steps: Steps | None) -> IntArray:
    """Return `frames * steps`, truncated; computed in the dtype of the steps, as torch does."""
    if steps is None:
        return frames
    product: Array = frames.astype(steps.dtype) * steps
    return product.astype(np.int64)


def _assign(values: Array, where: IntArray, new: Array) -> Array:
    values[where] = new
    return values


def _largest(end_R: IntArray, first_D1: IntArray) -> PositionIds:
    """Return the largest end of the runs of each document.

    It need not be the last run's: a clip's time may reach beyond the text behind it.
    """
    if len(first_D1) == 1:
        return np.empty(0, np.int64)
    ends_D: PositionIds = np.maximum.reduceat(end_R, first_D1[:-1])
    return ends_D

"""Compute the temporal step of each span: `tokens_per_second * second_per_grid_ts`.

How the product rounds is part of the reference: each release multiplies in the dtype in which the
seconds reach it, and truncates afterwards.

Shape suffixes: G grids of the batch, as in `mrope.positions.grids`: one for each span.
"""

from __future__ import annotations

import numpy as np

from mrope.arrays import Array
from mrope.errors import MRopeError, counted
from mrope.positions.grids import Grids
from mrope.positions.inputs import SECONDS, BatchInputs, Media
from mrope.spec.spec import MRopeSpec

Steps = Array  # int64, float32 or float64: the dtype decides how products round

# No clip is longer. Far below int64's end, so that seconds times frames times rate stay exact.
_MAX_SECONDS = 2**31


def span_steps(spec: MRopeSpec, inputs: BatchInputs, grids: Grids) -> Steps | None:
    """Return the temporal step of each span; None in families without timed videos.

    Raises:
        MRopeError: seconds of a wrong count, shape, dtype or value.
    """
    if spec.tokens_per_second is None:
        return None
    video_step = _video_steps(spec, inputs.media["video"], grids)
    step_G = np.full(grids.size_3G.shape[1], spec.conventions.timed_image_step, video_step.dtype)
    step_G[grids.images :] = video_step
    return step_G


def _video_steps(spec: MRopeSpec, clips: Media, grids: Grids) -> Steps:
    """Return the step of each video, rounded where the reference rounds."""
    videos = len(grids.frames_N)
    rate = spec.tokens_per_second
    assert rate is not None  # the caller asked
    if clips.seconds_N is None:
        return np.full(videos, rate, np.int64)
    seconds = _checked(clips, clips.seconds_N, grids)
    if seconds.dtype.kind in "iu" or spec.conventions.whole_seconds:
        whole: Steps = rate * seconds.astype(np.int64)
        return whole
    # A float32 array is multiplied in float32; Python floats in float64, and rounded afterwards.
    step: Steps = seconds.dtype.type(rate) * seconds
    return step.astype(clips.seconds_dtype)


def _checked(clips: Media, seconds: Array, grids: Grids) -> Array:
    videos = len(grids.frames_N)
    if seconds.size == 0:
        seconds = np.empty(seconds.shape, np.int64)
    if seconds.dtype.kind not in "iu" and seconds.dtype not in (np.float32, np.float64):
        raise MRopeError(
            f"{SECONDS} must be float32, float64 or integers, not {seconds.dtype}: "
            "at half precision frames share positions"
        )
    if seconds.shape != (videos,):
        raise MRopeError(
            f"{SECONDS} has shape {seconds.shape}, but the batch has {counted(videos, 'video')}"
        )
    most = grids.size_3G[0].max(initial=1)
    with np.errstate(over="ignore"):
        bad = ~((seconds >= 0) & (seconds * most < _MAX_SECONDS))
    if bad.any():
        video = int(bad.argmax())
        raise MRopeError(
            f"{clips.row_of(video)}{SECONDS}[{video}] = {seconds[video]}: must be finite, not "
            f"negative, and keep the clip under {_MAX_SECONDS} seconds"
        )
    return seconds

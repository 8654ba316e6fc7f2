"""Read when the frames of a row's clips were taken, as transformers' `VideoMetadata`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mrope.columns import Columns, NewColumns
from mrope.errors import MRopeError


def video_metadata(
    row: Columns,
    items: Sequence[Columns],
    frames: Sequence[int],
    fps: float,
) -> list[NewColumns]:
    """Return the metadata of each clip of a row.

    Args:
        row: its columns `fps` (frames per second; one number, or one of each clip), and for frames
            that were taken unevenly `frame_indices` (of the video with that `fps`) or `frame_times`
            (in seconds), a list for each clip.
        items: the same of single clips, which wins; empty, or one of each clip.
        frames: number of frames of each clip.
        fps: frames per second where a clip has neither.

    Raises:
        MRopeError: a value that is not such, or not one of each clip or frame.
    """
    if not frames:
        return []
    columns = {name: _of_clips(name, row.get(name), len(frames)) for name in ("fps", *_LISTS)}
    made = []
    for number, count in enumerate(frames):
        own = items[number] if number < len(items) else {}
        given = {name: own.get(name, values[number]) for name, values in columns.items()}
        where = f"clip {number}"
        rate = fps if given["fps"] is None else _rate(given["fps"], where)
        made.append(_metadata(given, count, rate, where))
    return made


_LISTS = ("frame_indices", "frame_times")


def _of_clips(name: str, value: Any, clips: int) -> Sequence[Any]:
    """Return one value for each clip: a single one is that of all, or of the only clip."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    nested = isinstance(value, (list, tuple))
    if nested and name in _LISTS and clips == 1 and not any(isinstance(v, list) for v in value):
        return [value or None]
    if not nested:
        if value is not None and name in _LISTS:
            raise MRopeError(f"{name} must be a list for each clip, not {value!r}")
        return [value] * clips
    if len(value) != clips and value:
        raise MRopeError(f"{name} has {len(value)} entries, but the row has {clips} clips")
    return value or [None] * clips


def _rate(value: Any, where: str) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise MRopeError(f"{where}: fps must be a number above 0, not {value!r}")
    return float(value)


def _metadata(given: Columns, frames: int, fps: float, where: str) -> NewColumns:
    if given["frame_times"] is not None:
        times = _ascending("frame_times", given["frame_times"], frames, where)
        # Seconds are indices of a video of one frame a second.
        return {"fps": 1.0, "frames_indices": times, "total_num_frames": _span(times, 1 / fps)}
    if given["frame_indices"] is not None:
        indices = _ascending("frame_indices", given["frame_indices"], frames, where)
        return {"fps": fps, "frames_indices": indices, "total_num_frames": _span(indices, 1)}
    return {"fps": fps, "frames_indices": [*range(frames)], "total_num_frames": frames}


def _ascending(name: str, values: object, frames: int, where: str) -> list[float]:
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise MRopeError(f"{where}: {name} must hold numbers, not {values!r}") from error
    if array.shape != (frames,):
        raise MRopeError(f"{where}: {name} has shape {array.shape}, but there are {frames} frames")
    if not np.isfinite(array).all() or array[0] < 0 or (np.diff(array) < 0).any():
        raise MRopeError(f"{where}: {name} must ascend, from 0 or more")
    listed: list[float] = np.asarray(values).tolist()
    return listed


def _span(values: Sequence[float], only: float) -> float:
    """Return the span of all frames, so that processors find the mean rate in it."""
    if values[-1] == values[0]:
        return only
    return (values[-1] - values[0]) / (len(values) - 1) * len(values)

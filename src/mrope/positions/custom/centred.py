"""Rules of published code that place an image around a point, or apart from text.

Each takes the runs that the kernel takes, so that tokens and grids are checked as everywhere.

Shape suffixes: T tokens of the stream, D documents, R runs, G grids, I tokens of all grids.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.arrays import IntArray
from mrope.errors import SpanMismatchError
from mrope.positions.custom.shared import number_cells
from mrope.positions.grids import to_grids
from mrope.positions.located import Located, Runs
from mrope.positions.spans import find_runs
from mrope.positions.stream import documents_of
from mrope.spec.spec import MRopeSpec

Array = npt.NDArray[Any]

_TIME_STEP = 2
_NO_START = "its start marker was lost, or a placeholder was typed or sampled as text"


class _Cells(NamedTuple):
    """The tokens of all grids: where each is in the stream, its frame, row and column."""

    token_I: IntArray
    frame_I: IntArray
    row_I: IntArray
    column_I: IntArray


def number_centred(spec: MRopeSpec, located: Located) -> tuple[Array, Array]:
    """Number an image around its time: int64 positions (3, T), and ends (D,).

    A grid at position p has time p + 2f; its row y stands at time + y - (H - 1) // 2, and columns
    likewise, so that numbers may be negative. Text goes on 1 behind the last frame's time.

    Source: Ming-flash-omni 2.0, `get_t_scale_rope_index`; SGLang 0.5.23, bailing_mrope.py.
    """
    runs, size_3G, cells = _read(spec, located)
    advance_R = runs.length_R.copy()
    advance_R[runs.vision_G] = _TIME_STEP * (size_3G[0] - 1) + 1
    positions_3T, end_D = _along(runs, advance_R)
    time_I = positions_3T[0, cells.token_I] + _TIME_STEP * cells.frame_I
    middle_2G = (size_3G[1:] - 1) // 2
    row_I, column_I = np.stack((cells.row_I, cells.column_I)) - middle_2G.repeat(
        size_3G.prod(axis=0), axis=1
    )
    positions_3T[:, cells.token_I] = time_I, time_I + row_I, time_I + column_I
    return positions_3T, end_D


def number_planes(spec: MRopeSpec, located: Located) -> tuple[Array, Array]:
    """Number an image on planes of its own: int64 positions (3, T), and ends (D,).

    Text has a time alone, and rows and columns of 0. An image takes one time, and its rows and
    columns count from 0; text goes on 1 behind its time.

    Source: NEO, modeling_neo_chat.py, `get_thw_indexes`.

    Raises:
        SpanMismatchError: an image without its start marker in front, which would take no time.
    """
    runs, _, cells = _read(spec, located)
    stream, start_G = located.stream, runs.border_R1[runs.vision_G]
    opened_G = stream.tokens_T[start_G - 1] == spec.vision_start_token_id
    opened_G &= ~np.isin(start_G, stream.start_D)
    if not opened_G.all():
        start = start_G[[opened_G.argmin()]]
        document = documents_of(stream, start)[0]
        row, token = int(stream.row_D[document]), int(start[0] - stream.start_D[document])
        raise SpanMismatchError(
            f"row {row}, valid token {token}: no start marker {spec.vision_start_token_id} stands "
            f"before an image, without which it takes no time. Likely cause: {_NO_START}.",
            row=row,
            modality="image",
            cause=_NO_START,
        )
    advance_R = runs.length_R.copy()
    advance_R[runs.vision_G] = 1
    positions_3T, end_D = _along(runs, advance_R)
    positions_3T[0, cells.token_I] = positions_3T[1, cells.token_I]
    positions_3T[1:] = 0
    positions_3T[1:, cells.token_I] = cells.row_I, cells.column_I
    return positions_3T, end_D


def number_middle(spec: MRopeSpec, located: Located) -> tuple[Array, Array]:
    """Number an image around the middle of its tokens: int64 positions (2, T), and ends (D,).

    An image of w columns and h rows whose first token has number n in its row: row y stands at
    n + (w * h - h) // 2 + y, and columns likewise. Text has its own number on both axes.

    Source: HunyuanImage-3.0, `build_2d_rope`.
    """
    runs, size_3G, cells = _read(spec, located)
    positions_2T = _along(runs, runs.length_R)[0][:2]
    tokens_G = size_3G.prod(axis=0)
    first_2I = (
        positions_2T[:, runs.border_R1[runs.vision_G]] + (tokens_G - size_3G[1:]) // 2
    ).repeat(tokens_G, axis=1)
    positions_2T[:, cells.token_I] = first_2I + np.stack((cells.row_I, cells.column_I))
    return positions_2T, located.stream.length_D


def _read(spec: MRopeSpec, located: Located) -> tuple[Runs, IntArray, _Cells]:
    grids = to_grids(spec, located.inputs)
    runs = find_runs(spec, located.stream, grids, located.kind_T)
    tokens_G = grids.size_3G.prod(axis=0)
    token_I, cell_I = number_cells(runs.border_R1[runs.vision_G], tokens_G)
    _, height_I, width_I = grids.size_3G.repeat(tokens_G, axis=1)
    line_I, column_I = np.divmod(cell_I, width_I)
    frame_I, row_I = np.divmod(line_I, height_I)
    return runs, grids.size_3G, _Cells(token_I, frame_I, row_I, column_I)


def _along(runs: Runs, advance_R: IntArray) -> tuple[IntArray, IntArray]:
    """Return tokens that count up on three axes within a run, and each document's end.

    Tokens of a grid all have the number at which it begins.
    """
    begin_R1 = np.append(0, advance_R.cumsum())
    begin_D1 = begin_R1[runs.first_D1]
    base_R = begin_R1[:-1] - begin_D1[:-1].repeat(np.diff(runs.first_D1))
    own_T = np.arange(len(runs.text_T)) - runs.border_R1[:-1].repeat(runs.length_R)
    own_T[~runs.text_T] = 0
    return (base_R.repeat(runs.length_R) + own_T)[None].repeat(3, axis=0), np.diff(begin_D1)

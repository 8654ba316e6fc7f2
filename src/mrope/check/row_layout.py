"""Cut a row into runs of text, images and videos, and find the run that an error is about.

For tables and drawings of single rows; the collator does not use it.

Shape suffixes: T valid tokens of the row, R its runs, G grids, as in `mrope.positions.grids`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from mrope.arrays import run_borders
from mrope.columns import COLUMNS, Columns, columns
from mrope.errors import SpanMismatchError
from mrope.positions.grids import to_grids
from mrope.positions.inputs import check_inputs
from mrope.positions.spans import token_kinds
from mrope.positions.stream import Stream, to_stream
from mrope.spec.spec import MRopeSpec

KINDS = ("text", "image", "video")
_GRIDS = tuple(name for name in columns("item", means="size") if COLUMNS[name].sides == 3)


@dataclass(frozen=True)
class TokenRun:
    """Consecutive tokens of one kind.

    Attributes:
        kind: one of `KINDS`.
        start: index of the first token among the row's valid tokens.
        tokens: number of tokens.
    """

    kind: str
    start: int
    tokens: int


@dataclass(frozen=True)
class Misfit:
    """The tokens of a row that do not fit their grid.

    Attributes:
        start: index of the first one; the row's length if all of them are missing.
        found: number of tokens found.
        needed: tokens that the grid needs, 0 without a grid; None if the error is not about a grid.
    """

    start: int
    found: int
    needed: int | None


@dataclass(frozen=True)
class RowLayout:
    """Runs of a row, ready to be drawn.

    Attributes:
        runs: in order; together they cover the valid tokens.
        misfit: None in a good row, or if the error does not tell where it is.
    """

    runs: tuple[TokenRun, ...]
    misfit: Misfit | None = None

    @property
    def tokens(self) -> int:
        """Number of valid tokens of the row."""
        return sum(run.tokens for run in self.runs)


def lay_out(spec: MRopeSpec, row: Columns, error: Exception | None = None) -> RowLayout:
    """Cut a row into runs, and find the tokens that an error is about.

    Args:
        spec: the model's values.
        row: a batch of one row: `input_ids` (1, S), and other arguments of `rope_index` by name.
        error: exception that `rope_index` raised for the row.

    Raises:
        ValueError, TypeError: the row does not hold integer arrays of these shapes.
    """
    stream = _stream(row)
    kind_T = token_kinds(spec, stream)
    runs = tuple(
        TokenRun(KINDS[kind_T[start]], start, end - start)
        for start, end in pairwise(run_borders(kind_T).tolist())
    )
    return RowLayout(runs, _misfit(spec, row, kind_T, error))


def valid_tokens(row: Columns) -> npt.NDArray[np.integer[Any]]:
    """Return the row's token ids without padding, (T,)."""
    return _stream(row).tokens_T


def _stream(row: Columns) -> Stream:
    mask = row.get("attention_mask")
    valid = None if mask is None else np.asarray(mask).astype(np.bool_)
    return to_stream(np.asarray(row["input_ids"]), valid)


def _misfit(
    spec: MRopeSpec,
    row: Columns,
    kind_T: npt.NDArray[np.uint8],
    error: Exception | None,
) -> Misfit | None:
    if not isinstance(error, SpanMismatchError):
        return None
    if error.span is None:
        # Of patches: no token is wrong.
        return None if error.found is not None else _first_wrong_type(row, kind_T)
    if error.modality not in KINDS:
        return None
    kind = KINDS.index(error.modality)
    if error.found is None or error.needed is None:
        return _run_without_marker(kind_T == kind, error.span)
    place = (kind_T == kind).nonzero()[0]
    # Spans are matched in order, so that every span before this one has all the tokens it needs.
    before = int(_needed_tokens(spec, row, kind)[: error.span].sum())
    start = int(place[before]) if before < len(place) else len(kind_T)
    return Misfit(start, error.found, error.needed)


def _first_wrong_type(row: Columns, kind_T: npt.NDArray[np.uint8]) -> Misfit | None:
    """Find the first token whose kind differs from `mm_token_type_ids`."""
    types_T = _stream({**row, "input_ids": row["mm_token_type_ids"]}).tokens_T
    return Misfit(int((kind_T != types_T).argmax()), 1, None)


def _run_without_marker(of_kind_T: npt.NDArray[np.bool_], ordinal: int) -> Misfit:
    """Find a run by its ordinal among the runs of its kind."""
    change = np.diff(of_kind_T.astype(np.int8), prepend=0, append=0)
    start, end = ((change == way).nonzero()[0][ordinal] for way in (1, -1))
    return Misfit(int(start), int(end - start), None)


def _needed_tokens(spec: MRopeSpec, row: Columns, kind: int) -> npt.NDArray[np.int64]:
    """Compute the tokens that each grid of one kind needs, int64 (G,)."""
    given = {"input_ids": row["input_ids"]}
    given |= {name: row[name] for name in _GRIDS if row.get(name) is not None}
    grids = to_grids(spec, check_inputs(spec, given))
    need_G: npt.NDArray[np.int64] = grids.size_3G.prod(axis=0)
    return need_G[: grids.images] if KINDS[kind] == "image" else need_G[grids.images :]

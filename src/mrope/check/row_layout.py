"""What a row looks like: its runs of text, images and videos, and where one of them does not fit.

For tables and pictures of single rows; nothing on the way of a batch needs it.

Shape suffixes: T valid tokens of the row, R its runs, G grids, as in `mrope.positions.grids`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mrope.errors import SpanMismatchError
from mrope.positions.grids import to_grids
from mrope.positions.spans import token_kinds
from mrope.positions.stream import Stream, to_stream
from mrope.spec.spec import MRopeSpec

KINDS = ("text", "image", "video")


@dataclass(frozen=True)
class TokenRun:
    """Neighbouring tokens of one kind.

    Attributes:
        kind: one of `KINDS`.
        start: the first one's number among the row's valid tokens.
        tokens: how many.
    """

    kind: str
    start: int
    tokens: int


@dataclass(frozen=True)
class Misfit:
    """The part of a row that is wrong.

    Attributes:
        start: its first token; the row's length where its tokens are missing altogether.
        found: its tokens.
        needed: tokens that its grid needs, 0 without a grid; None where no grid is to blame.
    """

    start: int
    found: int
    needed: int | None


@dataclass(frozen=True)
class RowLayout:
    """A row as it would be drawn.

    Attributes:
        runs: in order; they cover the valid tokens.
        misfit: None where it is not known.
    """

    runs: tuple[TokenRun, ...]
    misfit: Misfit | None = None

    @property
    def tokens(self) -> int:
        """Valid tokens of the row."""
        return sum(run.tokens for run in self.runs)


def lay_out(spec: MRopeSpec, row: Mapping[str, Any], error: Exception | None = None) -> RowLayout:
    """Cut a row into runs, and find the one that an error is about.

    Args:
        row: a batch of one row: `input_ids` (1, S), and what else `rope_index` takes, by name.
        error: what `rope_index` raised for it.

    Raises:
        ValueError, TypeError: the row does not hold arrays of integers in these shapes.
    """
    stream = _stream(row)
    kind_T = token_kinds(spec, stream)
    border = (kind_T[1:] != kind_T[:-1]).nonzero()[0] + 1
    start_R = np.concatenate(([0], border)) if len(kind_T) else border
    length_R = np.diff(start_R, append=len(kind_T))
    runs = tuple(
        TokenRun(KINDS[kind_T[start]], start, length)
        for start, length in zip(start_R.tolist(), length_R.tolist(), strict=True)
    )
    return RowLayout(runs, _misfit(spec, row, kind_T, error))


def valid_tokens(row: Mapping[str, Any]) -> npt.NDArray[np.integer[Any]]:
    """Return the row's token ids without padding, (T,)."""
    return _stream(row).tokens_T


def _stream(row: Mapping[str, Any]) -> Stream:
    mask = row.get("attention_mask")
    valid = None if mask is None else np.asarray(mask).astype(np.bool_)
    return to_stream(np.asarray(row["input_ids"]), valid)


def _misfit(
    spec: MRopeSpec,
    row: Mapping[str, Any],
    kind_T: npt.NDArray[np.uint8],
    error: Exception | None,
) -> Misfit | None:
    if not isinstance(error, SpanMismatchError):
        return None
    if error.span is None:
        return _first_wrong_type(row, kind_T)
    if error.modality not in KINDS:
        return None
    kind = KINDS.index(error.modality)
    if error.found is None or error.needed is None:
        return _run_without_marker(kind_T == kind, error.span)
    place = (kind_T == kind).nonzero()[0]
    # Spans are dealt out in order, so that all before this one have the tokens that they need.
    before = int(_needed_tokens(spec, row, kind)[: error.span].sum())
    start = int(place[before]) if before < len(place) else len(kind_T)
    return Misfit(start, error.found, error.needed)


def _first_wrong_type(row: Mapping[str, Any], kind_T: npt.NDArray[np.uint8]) -> Misfit | None:
    """Return the first token whose kind is not the one in `mm_token_type_ids`."""
    types_T = _stream({**row, "input_ids": row["mm_token_type_ids"]}).tokens_T
    return Misfit(int((kind_T != types_T).argmax()), 1, None)


def _run_without_marker(of_kind_T: npt.NDArray[np.bool_], ordinal: int) -> Misfit:
    """Return a run by its ordinal among those of its kind."""
    change = np.diff(of_kind_T.astype(np.int8), prepend=0, append=0)
    start, end = ((change == way).nonzero()[0][ordinal] for way in (1, -1))
    return Misfit(int(start), int(end - start), None)


def _needed_tokens(spec: MRopeSpec, row: Mapping[str, Any], kind: int) -> npt.NDArray[np.int64]:
    """Return the tokens that each grid of one kind needs."""
    shape = np.asarray(row["input_ids"]).shape
    grids = to_grids(
        spec, row.get("image_grid_thw"), row.get("video_grid_thw"), None, None, (1, shape[-1])
    )
    need_G: npt.NDArray[np.int64] = grids.size_3G.prod(axis=0)
    return need_G[: grids.images] if KINDS[kind] == "image" else need_G[grids.images :]

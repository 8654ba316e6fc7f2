"""Spans that travel with the samples: the columns they are stored in, and the way back to runs.

`mrope.prepare.precheck` writes the columns, the collator takes them out of the examples, and `mrope.positions.rope_index`
numbers by them instead of searching the tokens. What is stored is believed as far as tokens and
grids agree: a sample that was changed on the way is an error, never a wrong number.

Temporal steps are not stored. They are seconds times a rate, and how that rounds depends on the
dtype in which the seconds reach the batch.

Shape suffixes: T tokens of the stream, D documents, R runs, V vision spans, B rows of the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.arrays import IntArray, as_integers
from mrope.errors import MRopeError
from mrope.positions.grids import Grids
from mrope.positions.spans import Runs, find_runs, token_kinds
from mrope.positions.stream import IMAGE, TEXT, VIDEO, Stream
from mrope.spec.spec import MRopeSpec

SPANS, LENGTH, STAMP = COLUMNS = ("mrope_spans", "mrope_length", "mrope_spec")
"""Names of the stored columns: int64 lists, int64, strings."""

FIELDS = ("kind", "start", "frames", "height", "width")
"""What each span has in `mrope_spans`, one span after the other."""

# Part of the stamp; goes up when the meaning of a stored number changes.
_VERSION = 1
_AGAIN = f"run Precheck again, or remove the columns {', '.join(COLUMNS)}"


class StoredSpans(NamedTuple):
    """The spans of a batch, row by row, in the order of their tokens.

    Attributes:
        length_B: valid tokens of each row.
        count_B: spans of each row.
        table_5V: `FIELDS` of each span: IMAGE or VIDEO, the valid tokens of its row before it, and
            its frames, merged height and merged width.
    """

    length_B: IntArray
    count_B: IntArray
    table_5V: IntArray


def stamp_of(spec: MRopeSpec) -> str:
    """Return what a spec is in a word each, to tell by it whether stored spans are of this spec.

    Example:
        >>> from mrope.spec.spec import example_config
        >>> stamp_of(MRopeSpec.from_config(example_config("qwen2_vl"), "transformers-5.23"))
        'spans-1 qwen2_vl transformers-5.23 image=102 video=103 start=101 merge=2'
    """
    numbers = {
        "image": spec.image_token_id,
        "video": spec.video_token_id,
        "start": spec.vision_start_token_id,
        "merge": spec.spatial_merge_size,
        "per_second": spec.tokens_per_second,
        **spec.extra,
    }
    words = (f"{name}={value}" for name, value in numbers.items() if value is not None)
    return " ".join((f"spans-{_VERSION}", spec.family, spec.reference, *words))


def to_stored(stream: Stream, runs: Runs, grids: Grids, rows: int) -> StoredSpans:
    """Return the spans of a batch of `rows` rows in the form in which they are stored."""
    length_B, first_B = _lengths(stream, rows)
    begin_V = runs.start_R[runs.vision_V]
    row_V = _rows_of(stream, begin_V)
    kind_V = np.where(runs.grid_V < grids.images, IMAGE, VIDEO)
    place_2V = np.stack((kind_V, begin_V - first_B[row_V]))
    table_5V = np.concatenate((place_2V, grids.size_3G[:, runs.grid_V]))
    return StoredSpans(length_B, np.bincount(row_V, minlength=rows), table_5V)


def take_stored(spec: MRopeSpec, examples: Any) -> tuple[Any, StoredSpans | None]:
    """Take the stored columns out of a list of examples; the examples themselves stay as they are.

    Returns:
        The examples without the columns, and what was stored; None where an example has nothing
        stored: the tokens of such a batch are searched.

    Raises:
        MRopeError: spans of another spec, or that no `Precheck` has written.
    """
    if not isinstance(examples, Sequence) or not any(map(_has_columns, examples)):
        return examples, None
    stamp = stamp_of(spec)
    for row, example in enumerate(examples):
        if _has_columns(example) and example.get(STAMP) not in (None, stamp):
            raise MRopeError(
                f"row {row}: its spans were stored for another model: {example[STAMP]!s}; this "
                f"collator's spec is {stamp}. To number it for this one, {_AGAIN}"
            )
    bare = [_without_columns(one) if _has_columns(one) else one for one in examples]
    if not all(map(_is_stored, examples)):
        return bare, None
    tables = [_as_table(row, example[SPANS]) for row, example in enumerate(examples)]
    return bare, StoredSpans(
        np.array([int(example[LENGTH]) for example in examples], np.int64),
        np.array([len(table) for table in tables], np.int64),
        np.concatenate(tables).T,
    )


def stored_runs(
    spec: MRopeSpec,
    stream: Stream,
    grids: Grids,
    stored: StoredSpans,
    rows: int,
    types_T: IntArray | None = None,
) -> Runs:
    """Return the runs that `find_runs` would find, from spans that were found before.

    Args:
        rows: rows of the batch.
        types_T: `mm_token_type_ids` of the stream, if the batch has them.

    Raises:
        SpanMismatchError: tokens, types and grids do not fit together.
        MRopeError: they do, but the stored spans are not theirs.
    """
    length_B, first_B = _lengths(stream, rows)
    _require_lengths(stored, length_B)
    row_V = np.arange(rows).repeat(stored.count_B)
    begin_V = first_B[row_V] + stored.table_5V[1]
    runs = _cut(stream, grids, stored, begin_V)
    if runs is None or not _agree(spec, stream, grids, stored, runs, row_V, types_T):
        found = to_stored(stream, find_runs(spec, stream, grids, types_T), grids, rows)
        raise _changed(stored, found)
    return runs


def _cut(stream: Stream, grids: Grids, stored: StoredSpans, begin_V: IntArray) -> Runs | None:
    """Cut a stream at stored spans; None where they do not lie in it as the grids say.

    Documents at 0 and 5 of 8 tokens, and a span of 4 at 1: bounds 0 1 5 8, and run 1 is the span.
    """
    tokens = len(stream.tokens_T)
    grid_V = _grids_in_order(stored.table_5V[0], grids)
    frames_V, height_V, width_V = size_3V = stored.table_5V[2:]
    if grid_V is None or (grids.size_3G[:, grid_V] != size_3V).any():
        return None
    need_V = frames_V * height_V * width_V
    end_V = begin_V + need_V
    if begin_V.min(initial=0) < 0 or end_V.max(initial=0) > tokens:
        return None
    bound = np.zeros(tokens + 1, np.bool_)
    bound[stream.start_D] = bound[begin_V] = bound[end_V] = bound[tokens] = True
    bounds = bound.nonzero()[0]
    start_R, length_R = bounds[:-1], bounds[1:] - bounds[:-1]
    vision_V = start_R.searchsorted(begin_V)
    # A span that holds another's edge, or the border of a document, is cut in two.
    if (length_R[vision_V] != need_V).any() or (vision_V[1:] <= vision_V[:-1]).any():
        return None
    text_R = np.ones(len(start_R), np.bool_)
    text_R[vision_V] = False
    first_D = start_R.searchsorted(stream.start_D)
    runs_D = start_R.searchsorted(stream.start_D + stream.length_D) - first_D
    return Runs(start_R, length_R, first_D, runs_D, vision_V, grid_V, text_R.repeat(length_R))


def _grids_in_order(kind_V: IntArray, grids: Grids) -> IntArray | None:
    """Return the grid of each span; None where there are not as many images, or clips, as grids."""
    images = np.count_nonzero(kind_V == IMAGE)
    if len(kind_V) != grids.size_3G.shape[1] or images != grids.images:
        return None
    grid_V = np.empty(len(kind_V), np.int64)
    # Grids stand images first; the k-th image takes column k.
    grid_V[kind_V.argsort(kind="stable")] = np.arange(len(kind_V))
    return grid_V


def _agree(
    spec: MRopeSpec,
    stream: Stream,
    grids: Grids,
    stored: StoredSpans,
    runs: Runs,
    row_V: IntArray,
    types_T: IntArray | None,
) -> bool:
    """Whether every token is of the kind that the spans say, and each grid of its span's row."""
    kind_R = np.full(len(runs.start_R), TEXT, np.uint8)
    kind_R[runs.vision_V] = stored.table_5V[0]
    kind_T = token_kinds(spec, stream)
    if not np.array_equal(kind_T, kind_R.repeat(runs.length_R)):
        return False
    if types_T is not None and not np.array_equal(kind_T, types_T):
        return False
    if grids.row_G is not None:
        grid_row_V = grids.row_G[runs.grid_V]
        if ((grid_row_V != row_V) & (grid_row_V >= 0)).any():
            return False
    if not spec.conventions.start_required:
        return True
    begin_V = runs.start_R[runs.vision_V]
    marked_V = stream.tokens_T[begin_V - 1] == spec.vision_start_token_id
    return bool(marked_V.all()) and not np.isin(begin_V, stream.start_D).any()


def _changed(stored: StoredSpans, found: StoredSpans) -> MRopeError:
    """Return the error for the first row whose stored spans are not those of its tokens."""
    borders = (table.count_B.cumsum()[:-1] for table in (stored, found))
    theirs, ours = (
        np.split(table.table_5V.T, border)
        for table, border in zip((stored, found), borders, strict=True)
    )
    for row, (before, now) in enumerate(zip(theirs, ours, strict=True)):
        if np.array_equal(before, now):
            continue
        common = min(len(before), len(now))
        span = next((k for k in range(common) if (before[k] != now[k]).any()), common)
        return MRopeError(
            f"row {row}: its tokens and grids have {len(now)} spans, but {len(before)} were "
            f"stored; span {span} is {_described(now, span)}, but was {_described(before, span)}. "
            f"Likely cause: the sample was changed after Precheck ran; {_AGAIN}"
        )
    raise AssertionError("spans that are the same agree")


def _described(table_V5: IntArray, span: int) -> str:
    if span >= len(table_V5):
        return "not there"
    kind, start, *size = table_V5[span].tolist()
    name = {IMAGE: "an image", VIDEO: "a video"}.get(kind, f"of kind {kind}")
    return f"{name} of {' x '.join(map(str, size))} tokens at token {start}"


def _require_lengths(stored: StoredSpans, length_B: IntArray) -> None:
    if len(stored.length_B) != len(length_B):
        raise MRopeError(
            f"spans were stored for {len(stored.length_B)} examples, but the inner collate "
            f"function made {len(length_B)} rows of them; remove the columns {', '.join(COLUMNS)}"
        )
    differs_B = stored.length_B != length_B
    if differs_B.any():
        row = int(differs_B.argmax())
        raise MRopeError(
            f"row {row}: {length_B[row]} valid tokens, but {stored.length_B[row]} when its spans "
            f"were stored. Likely cause: truncation after Precheck ran, or an inner collate "
            f"function that reorders rows; {_AGAIN}"
        )


def _lengths(stream: Stream, rows: int) -> tuple[IntArray, IntArray]:
    """Return the valid tokens of each row, and where they start in the stream."""
    length_B = np.bincount(stream.row_D, stream.length_D, rows).astype(np.int64)
    return length_B, length_B.cumsum() - length_B


def _rows_of(stream: Stream, begin_V: IntArray) -> IntArray:
    rows: IntArray = stream.row_D[stream.start_D.searchsorted(begin_V, side="right") - 1]
    return rows


def _has_columns(example: Any) -> bool:
    return isinstance(example, Mapping) and (
        SPANS in example or LENGTH in example or STAMP in example
    )


def _is_stored(example: Any) -> bool:
    return _has_columns(example) and all(example.get(name) is not None for name in COLUMNS)


def _without_columns(example: Mapping[str, Any]) -> Mapping[str, Any]:
    twin = copy.copy(example) if isinstance(example, MutableMapping) else dict(example)
    for name in COLUMNS:
        twin.pop(name, None)
    return twin


def _as_table(row: int, spans: npt.ArrayLike) -> IntArray:
    """Return the stored spans of a row as (V, 5)."""
    flat = as_integers(f"row {row}: {SPANS}", spans, f"{', '.join(FIELDS)} of each span")
    if flat.ndim != 1 or flat.size % len(FIELDS):
        raise MRopeError(
            f"row {row}: {SPANS} has shape {flat.shape}, not {len(FIELDS)} numbers for each span; "
            f"{_AGAIN}"
        )
    return flat.reshape(-1, len(FIELDS))

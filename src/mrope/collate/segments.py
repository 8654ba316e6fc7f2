"""Tell how many examples each row holds, and how many tokens each of them has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mrope.arrays import Array, run_borders
from mrope.columns import Columns
from mrope.errors import MRopeError


def seq_lengths(
    batch: Columns, examples: Any, shape: tuple[int, int], mask: Any
) -> list[list[int]] | None:
    """Return for each row of a padded batch the lengths of the examples that it holds.

    None: every row is one example. Rows that were packed before have `seq_lengths`, in the batch or
    in the examples, the tokens of each example (as TRL's packing writes it), or an attention mask
    that numbers the examples 1, 2, 3 ...

    Raises:
        MRopeError: some of the rows have `seq_lengths`, and others not.
    """
    own = _own_lengths(batch, examples, shape[0])
    if own is not None:
        return own
    numbers = mask is not None and mask.size and mask.ndim == 2 and mask.dtype.kind in "iu"
    if not numbers or np.maximum.reduce(mask, axis=None) <= 1:
        return None
    return [_run_lengths(row) for row in mask]


def refuse_packed(batch: Columns, examples: object, shape: tuple[int, int]) -> None:
    """Refuse rows that say that they hold several examples, where they are not kept apart."""
    own = _own_lengths(batch, examples, shape[0])
    for row, lengths in enumerate(own or ()):
        if len(lengths) > 1:
            raise MRopeError(
                f"row {row} holds {len(lengths)} examples (seq_lengths), which would be numbered "
                "and attended to as one; packing='flatten' keeps them apart"
            )


def _own_lengths(batch: Columns, examples: object, rows: int) -> list[list[int]] | None:
    """Return `seq_lengths` as the batch or its examples have it; None where none has."""
    given: Any = batch.get("seq_lengths")
    if given is None and isinstance(examples, Sequence) and len(examples) == rows:
        given = [one.get("seq_lengths") if isinstance(one, Mapping) else None for one in examples]
    if given is None or all(lengths is None for lengths in given):
        return None
    lacking = [row for row, lengths in enumerate(given) if lengths is None]
    if lacking:
        raise MRopeError(f"row {lacking[0]}: no seq_lengths, which other rows of the batch have")
    return [np.asarray(lengths).ravel().tolist() for lengths in given]


def _run_lengths(mask_S: Array) -> list[int]:
    """Return the lengths of the runs of equal values among a row's valid tokens."""
    numbers = mask_S[mask_S != 0]
    lengths: list[int] = np.diff(run_borders(numbers)).tolist()
    return lengths

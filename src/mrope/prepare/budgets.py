"""Check what examples take of a batch's budgets, and their work.

Shape suffixes: N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.collate.ladder import Shapes
from mrope.errors import MRopeError

Lengths = Sequence[int] | npt.NDArray[np.integer[Any]]
Cost = Callable[..., npt.ArrayLike]
AnyInts = npt.NDArray[np.integer[Any]]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Budget:
    """What a batch may hold of one kind.

    Attributes:
        sizes_N: int64 (N,), what each example takes.
        capacity: what a batch may hold.
    """

    sizes_N: IntArray
    capacity: int


def read_budgets(
    columns: Mapping[str, Lengths | None],
    maxima: Mapping[str, int | None],
    shapes: Shapes | None,
    multiple: int,
) -> dict[str, Budget]:
    """Return the budgets of a batch by kind, that of tokens first.

    Args:
        columns: (N,) what each example takes of "tokens", "patches" and "segments"; None: unknown,
            and not limited.
        maxima: what a batch may hold of "tokens", "patches" and "examples"; None: no limit.
        shapes: limits all four to what its top rungs hold.
        multiple: tokens are rounded up to a multiple of this.

    Raises:
        MRopeError: a column is not of one number for each example, or an example is above a budget.
    """
    lengths = _read_lengths(columns["tokens"])
    sizes = {"tokens": lengths, "examples": np.ones(len(lengths), np.int64)}
    for kind in ("patches", "segments"):
        if (column := columns[kind]) is not None:
            sizes[kind] = _read_counts(kind, column, len(lengths))
    limits = {
        kind: [_Limit(most, f"the budget of max_{kind}={most}", f"raise max_{kind}")]
        for kind, most in maxima.items()
        if most is not None
    }
    for kind, most in ({} if shapes is None else _top_rungs(shapes)).items():
        name = f"the top rung of shapes, which has room for {most}"
        limits.setdefault(kind, []).append(_Limit(most, name, "add a higher rung"))
    return {
        kind: _make_budget(kind, sizes[kind], some, multiple if kind == "tokens" else 1)
        for kind, some in limits.items()
        if kind in sizes
    }


def read_work(
    cost: Cost, lengths_N: IntArray, patches: Lengths | None, pairs: Lengths | None
) -> FloatArray:
    """Return the work of each example, float64 (N,), by a user's function of its counts.

    Raises:
        MRopeError: not one finite number of 0 or more for each example, or all are 0.
    """
    # A copy: a function that adds in place would change the budget.
    counts = [lengths_N.copy(), np.zeros_like(lengths_N)]
    if patches is not None:
        counts[1] = _read_counts("patches", patches, len(lengths_N)).astype(np.int64)
    if pairs is not None:
        counts.append(_read_counts("patch_pairs", pairs, len(lengths_N)).astype(np.int64))
    work_N = np.asarray(cost(*counts))
    if work_N.shape != lengths_N.shape or work_N.dtype.kind not in "iuf":
        raise MRopeError(
            f"cost must return a number for each example, {lengths_N.shape}, not {work_N.dtype} "
            f"{work_N.shape}"
        )
    good_N = np.isfinite(work_N) & (work_N >= 0)
    if not good_N.all():
        index = int(good_N.argmin())
        raise MRopeError(
            f"cost must be finite and at least 0, not {work_N[index]} (example {index})"
        )
    if not work_N.any():
        raise MRopeError("cost is 0 for every example")
    return work_N.astype(np.float64)


class _Limit(NamedTuple):
    """What a batch may hold, and what errors say of it."""

    value: int
    name: str
    advice: str


def _top_rungs(shapes: Shapes) -> dict[str, int]:
    """Return what the top rungs of a ladder hold, by kind."""
    # One border is for the padding.
    rungs = {"tokens": shapes.tokens[-1], "examples": shapes.examples(shapes.tokens[-1]) - 1}
    if shapes.patches:
        rungs["patches"] = shapes.patches[-1]
        # Padding takes the other borders of the rung, see `Shapes.borders`.
        rungs["segments"] = -(-shapes.patches[-1] // shapes.patches_per_segment)
    return rungs


def _read_lengths(lengths: Any) -> AnyInts:
    """Return the lengths as an array, (N,).

    Raises:
        MRopeError: there are none, or one is not an integer above 0.
    """
    lengths_N = _integers("lengths", lengths)
    if not len(lengths_N):
        raise MRopeError("no lengths: a dataset without examples fills no batch")
    if lengths_N.min() < 1:
        index = int((lengths_N < 1).argmax())
        raise MRopeError(
            f"example {index} has length {lengths_N[index]}; an example has at least one token"
        )
    return lengths_N


def _read_counts(name: str, counts: Lengths, examples: int) -> AnyInts:
    """Return what each example has of something as an array, (N,).

    Raises:
        MRopeError: not as many as `examples`, or one is not an integer of 0 or more.
    """
    counts_N = _integers(name, counts)
    if len(counts_N) != examples:
        raise MRopeError(f"{name} must be one for each of {examples} examples, not {len(counts_N)}")
    if counts_N.min() < 0:
        index = int((counts_N < 0).argmax())
        raise MRopeError(f"example {index} has {counts_N[index]} {name.replace('_', ' ')}")
    return counts_N


def _make_budget(kind: str, sizes_N: AnyInts, limits: Sequence[_Limit], multiple: int) -> Budget:
    """Return the budget of the lowest of some limits.

    Args:
        kind: "tokens", "patches" and so on, for errors.
        sizes_N: (N,), what each example takes; copied.
        limits: one or more.
        multiple: the sum is rounded up to a multiple of this, which must not exceed the limit.

    Raises:
        MRopeError: an example is above it.
    """
    limit = min(limits, key=lambda one: one.value)
    capacity = limit.value // multiple * multiple
    if sizes_N.max() <= capacity:
        return Budget(sizes_N.astype(np.int64), capacity)
    above = (sizes_N > capacity).nonzero()[0]
    first = f" (the first of {len(above)} such examples)" if len(above) > 1 else ""
    rounded = "" if capacity == limit.value else f", which is {capacity} before rounding up"
    raise MRopeError(
        f"example {above[0]} has {sizes_N[above[0]]} {kind}, above {limit.name}{rounded}{first}; "
        f"{limit.advice}, or remove such examples from the dataset: the sampler does not drop any"
    )


def _integers(name: str, values: Lengths) -> AnyInts:
    try:
        values_N = np.asarray(values)
    except ValueError as error:
        raise MRopeError(f"{name} must be one integer for each example: {error}") from error
    if values_N.ndim != 1:
        raise MRopeError(f"{name} must be (examples,), not {values_N.shape}")
    if values_N.dtype == np.object_:
        # Python's own integers, as pandas and pyarrow hold them in some columns.
        values_N = np.asarray(values_N.tolist())
    if values_N.dtype.kind not in "iu" and len(values_N):
        # Of a column of floats the first null, which made them floats.
        nulls = np.isnan(values_N) if values_N.dtype.kind == "f" else np.zeros(1)
        pairs = list(enumerate(values_N.tolist()))[int(nulls.argmax()) :]
        index, value = next((pair for pair in pairs if type(pair[1]) is not int), pairs[0])
        raise MRopeError(
            f"{name} must be integers of at most 64 bits, not {values_N.dtype}: example {index} "
            f"has {value!r}"
        )
    return values_N

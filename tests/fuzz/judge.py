"""What a damaged sample may do: give the exact result, or raise an `MRopeError`. Nothing else."""

from __future__ import annotations

import copy
import random
import signal
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fuzz.mutations import ARGUMENTS, EXAMPLE
from fuzz.samples import (
    SIZES,
    Arguments,
    Merge,
    counts_of,
    draw_examples,
    draw_long_example,
    merged,
)
from mrope import MRopeCollator, MRopeError, MRopeSpec, SpanMismatchError, rope_index
from mrope.collate.padding import PaddingCollator
from mrope.positions.spans import token_types
from twins.rope_index import slow_rope_index

EXACT = "exact"
UNDAMAGED = "undamaged"
NEIGHBOUR = "a neighbour's sizes"
KINDS = (*EXAMPLE, NEIGHBOUR, *ARGUMENTS)
SECONDS = 10.0
LEAST_TOKENS = 3000


class WrongError(AssertionError):
    """A sample did what no sample may do."""


class Hang(BaseException):
    """A sample took longer than `SECONDS`."""


def judge(
    rng: random.Random, spec: MRopeSpec, kind: str, compared: Counter[str] | None = None
) -> str | None:
    """Damage a batch and look at what becomes of it.

    Args:
        rng: decides about the batch, and the damage.
        spec: the model.
        kind: of damage, one of `KINDS`, or `UNDAMAGED`.
        compared: counts how the installed transformers took what was exact; it is not asked where
            this is None, or where it is another release than the spec's.

    Returns:
        "exact", or the cause of the refusal; None: there was nothing to damage.

    Raises:
        WrongError: anything else.
    """
    with _limited(), warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            judge_kind = _judge_arguments if kind in ARGUMENTS else _judge_examples
            arguments, verdict = judge_kind(rng, spec, kind)
            if verdict == EXACT and compared is not None:
                _ask_transformers(spec, arguments, compared)
        except (Hang, Warning) as problem:
            raise WrongError(f"{type(problem).__name__}: {problem}") from problem
    return verdict


Judged = tuple[Arguments, str | None]


def _judge_arguments(rng: random.Random, spec: MRopeSpec, kind: str) -> Judged:
    examples = draw_examples(rng, spec, rng.choice([1, 1, 2, 3]))
    arguments = merged(examples, rng) | _counts(rng, spec, examples)
    if ARGUMENTS[kind](rng, spec, arguments) is False:
        return arguments, None
    verdict = _verdict(spec, arguments)
    _through_collator(spec, arguments, verdict)
    return arguments, verdict


def _judge_examples(rng: random.Random, spec: MRopeSpec, kind: str) -> Judged:
    examples = draw_examples(rng, spec, rng.choice([1, 2, 2, 3]))
    damaged = copy.deepcopy(examples)
    rows = _damage(rng, spec, kind, damaged)
    if rows is None:
        return {}, None
    placing = rng.getrandbits(32)
    before = merged(examples, random.Random(placing)) | counts_of(spec, examples)
    after = merged(damaged, random.Random(placing)) | _counts(rng, spec, damaged)
    verdict = _verdict(spec, after)
    if kind == UNDAMAGED and verdict != EXACT:
        raise WrongError(f"an undamaged batch was refused: {verdict}")
    if verdict == EXACT:
        _same_in_other_rows(spec, before, after, rows | _between(examples, damaged, rows))
    _skip(spec, examples, damaged, rows)
    return after, verdict


def _damage(
    rng: random.Random, spec: MRopeSpec, kind: str, examples: list[dict[str, Any]]
) -> set[int] | None:
    row = rng.randrange(len(examples))
    if kind == UNDAMAGED:
        return set()
    if kind != NEIGHBOUR:
        return None if EXAMPLE[kind](rng, spec, examples[row]) is False else {row}
    other = rng.randrange(len(examples))
    names = {name for name in SIZES if name in examples[row] and name in examples[other]}
    if other == row or not names:
        return None
    name = rng.choice(sorted(names))
    examples[row][name], examples[other][name] = examples[other][name], examples[row][name]
    return {row, other}


def _between(
    examples: list[dict[str, Any]], damaged: list[dict[str, Any]], rows: set[int]
) -> set[int]:
    """Return the rows between two that swapped sizes, if one of them had more than the other.

    Sizes of a merged batch have no borders of rows: those between take what belongs to another,
    which only the collator can see, by the examples.
    """
    moved = any(
        len(examples[row][name]) != len(damaged[row][name])
        for row in rows
        for name in set(SIZES) & set(examples[row]) & set(damaged[row])
    )
    return set(range(min(rows), max(rows))) if moved else set()


def _counts(rng: random.Random, spec: MRopeSpec, examples: list[dict[str, Any]]) -> Arguments:
    """Counts of the damaged rows: rules may need them, others are better with them."""
    needed = spec.family_row.custom_index is not None
    return counts_of(spec, examples) if needed or rng.random() < 0.5 else {}


def _verdict(spec: MRopeSpec, arguments: Arguments) -> str:
    given = copy.deepcopy(arguments)
    try:
        result = rope_index(spec, **arguments)
    except MRopeError as error:
        return _cause(error)
    except Exception as error:
        raise WrongError(f"{type(error).__name__}: {error}") from error
    _unchanged(given, arguments)
    try:
        expected = slow_rope_index(spec, _for_twin(spec, arguments))
    except Exception as error:
        raise WrongError(f"accepted, but the twin says {type(error).__name__}: {error}") from error
    for name, ours, theirs in zip(("positions", "deltas"), result, expected, strict=True):
        if not np.array_equal(ours, theirs):
            raise WrongError(f"{name} differ:\n{ours}\n{theirs}")
    return EXACT


def _ask_transformers(spec: MRopeSpec, arguments: Arguments, compared: Counter[str]) -> None:
    """Compare with the release itself; it may raise at what the package reads, as lists."""
    from mrope.hf.get_rope_index import installed_reference, reference_rope_index

    if spec.reference != installed_reference():
        return
    reads: tuple[str, ...] = (
        "mm_token_type_ids",
        "use_audio_in_video",
        "attention_mask",
        "input_ids",
        *SIZES,
    )
    if spec.family_row.custom_index == "glm_image":
        reads += ("images_per_sample",)
    asked = {name: value for name, value in arguments.items() if name in reads}
    if spec.family_row.custom_index is None and asked.get("mm_token_type_ids") is None:
        asked["mm_token_type_ids"] = token_types(spec, np.asarray(asked["input_ids"]))
    if not isinstance(asked.get("use_audio_in_video", False), bool):
        return  # any list is true to it
    try:
        theirs = reference_rope_index(spec, asked)
    except Exception:  # noqa: BLE001
        compared["raises"] += 1
        return
    ours = rope_index(spec, **arguments)
    if not all(map(np.array_equal, ours, theirs)):
        raise WrongError(f"the release differs:\n{ours}\n{theirs}")
    compared["equal"] += 1


def _unchanged(given: Arguments, arguments: Arguments) -> None:
    for name, value in given.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "iufb":
            np.testing.assert_array_equal(value, arguments[name], f"{name} was written to")


def _for_twin(spec: MRopeSpec, arguments: Arguments) -> Arguments:
    """Return arguments as `random_batch` makes them: every name, arrays, seconds as they are."""
    names = ("attention_mask", "mm_token_type_ids", *SIZES)
    full: Arguments = dict.fromkeys(names) | {"use_audio_in_video": False} | arguments
    if full.get("images_per_sample") is None and len(full["input_ids"]) == 1:
        full |= counts_of(spec, [full])
    if full["attention_mask"] is None and spec.family_row.custom_index is not None:
        full["attention_mask"] = np.ones_like(full["input_ids"], np.int64)
    return {
        name: np.asarray(value)
        if isinstance(value, list) and name != "second_per_grid_ts"
        else value
        for name, value in full.items()
    }


def _cause(error: MRopeError) -> str:
    if isinstance(error, SpanMismatchError):
        return "tokens and sizes do not fit"
    return "a bad argument"


def _through_collator(spec: MRopeSpec, arguments: Arguments, verdict: str) -> None:
    """The collator says what `rope_index` says; of what is no tensor it may say more."""
    batch = {
        name: torch.from_numpy(value.copy()) if _tensor_like(value) else value
        for name, value in arguments.items()
    }
    try:
        result = MRopeCollator(lambda _: dict(batch), spec)([])
    except MRopeError:
        if verdict == EXACT and all(map(_tensor_like, arguments.values())):
            raise WrongError("the collator refuses what rope_index accepts") from None
        return
    except Exception as error:
        raise WrongError(f"collator: {type(error).__name__}: {error}") from error
    if verdict != EXACT:
        raise WrongError("the collator accepts what rope_index refuses")
    expected = rope_index(spec, **arguments)
    if not np.array_equal(result["position_ids"].numpy(), expected[0]):
        raise WrongError("the collator's positions differ")


def _tensor_like(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "biufc"


def _same_in_other_rows(
    spec: MRopeSpec, before: Arguments, after: Arguments, rows: set[int]
) -> None:
    (was, _), (now, _) = rope_index(spec, **before), rope_index(spec, **after)
    for row in set(range(len(before["input_ids"]))) - rows:
        first, second = (one["attention_mask"][row] != 0 for one in (before, after))
        # Hunyuan's fourth axis numbers images over the batch.
        if not np.array_equal(was[:3, row, first], now[:3, row, second]):
            raise WrongError(f"row {row} has other numbers, but {rows} were damaged")


def _skip(
    spec: MRopeSpec, examples: list[dict[str, Any]], damaged: list[dict[str, Any]], rows: set[int]
) -> None:
    """With `on_error="skip"` the other rows are those of a batch without the dropped ones."""
    for collate, options in _ways(spec):
        plain = MRopeCollator(collate, spec, **options)
        skipping = MRopeCollator(
            collate, spec, **options, on_error="skip", count_key="dropped", stand_in=examples
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = skipping(damaged)
        dropped = ours.pop("dropped")
        if not _raises(plain, damaged):
            kept, bad = damaged, set()
        else:
            bad = {row for row, one in enumerate(damaged) if _raises(plain, [one])}
            kept = [one for row, one in enumerate(damaged) if row not in bad] or examples
        if not bad <= rows:
            raise WrongError(f"rows {bad - rows} are refused, but {rows} were damaged")
        if dropped < len(bad):
            raise WrongError(f"{len(bad)} rows are bad, and {dropped} were dropped")
        # More are dropped where they are good alone, and not with the others.
        if dropped == len(bad):
            _assert_equal(ours, plain(kept))


def _ways(spec: MRopeSpec) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Return inner functions and options; a `PaddingCollator` knows columns of the usual names."""
    yield Merge(spec), {}
    if spec.family_row.custom_index is None:
        yield PaddingCollator(), {}
    if spec.family_row.packs:
        yield PaddingCollator(), {"packing": "flatten"}


def _raises(collate: MRopeCollator, examples: list[dict[str, Any]]) -> bool:
    try:
        collate(examples)
    except MRopeError:
        return True
    except Exception as error:
        raise WrongError(f"collator: {type(error).__name__}: {error}") from error
    return False


def _assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            np.testing.assert_array_equal(ours[name], value, f"{name} without the dropped rows")


def memory(rng: random.Random, spec: MRopeSpec, kind: str) -> float | None:
    """Return the peak memory of a damaged long batch, as a multiple of the undamaged one's."""
    examples = [draw_long_example(rng, spec, LEAST_TOKENS)]
    damaged = copy.deepcopy(examples)
    good = merged(examples) | counts_of(spec, examples)
    if kind in ARGUMENTS:
        bad = merged(damaged) | counts_of(spec, damaged)
        if ARGUMENTS[kind](rng, spec, bad) is False:
            return None
    elif _damage(rng, spec, kind, damaged) is None:
        return None
    else:
        bad = merged(damaged) | counts_of(spec, damaged)
    with _limited():
        _peak(spec, good)  # what is kept between calls is of the first
        return _peak(spec, bad) / _peak(spec, good)


def _peak(spec: MRopeSpec, arguments: Arguments) -> int:
    tracemalloc.start()
    try:
        rope_index(spec, **arguments)
    except MRopeError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


@contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

"""Drop the examples that cannot be collated, and record each of them: `on_error=SkipBad(...)`.

Examples are tried one by one only after collating the whole batch raised, so that good batches cost
no more than a shallow copy of their examples. The good ones are then collated again, and the result
is equal to that of a batch that never held the bad ones.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from mrope.collate.process_files import append_record, process_file, require_writable
from mrope.columns import Batch, NewColumns
from mrope.errors import MRopeError

Collate = Callable[[Any], Any]
Kind = tuple[str, str | None]

INDEX = "mrope_index"
"""Key under which an example carries its index in the dataset; removed before collating."""

# Later names win: the dataset's index replaces one that the row brings along.
_NAMES = ("id", "index", INDEX)
_FACTS = ("row", "span", "modality", "found", "needed", "cause")
_LONGEST = 2000
# Below this many examples a share says nothing: one bad example among the first two is 50 %.
_FEW = 100
_TRIES = 100

_log = logging.getLogger(__name__)


class RejectWarning(UserWarning):
    """Warn that an example was dropped; issued once for each kind of error in each process."""


@dataclass(frozen=True)
class SkipBad:
    """Options of skipping bad examples: `MRopeCollator(on_error=SkipBad(...))`.

    Plain data: it pickles, and `on_error="skip"` is short for `SkipBad()`.

    Args:
        rejects: path from which each process derives the name of its own JSON-lines file, with a
            line for every dropped example; `read_rejects` reads them together. The folder is made
            if it does not exist. None: nothing is written.
        max_rejects: limit for each process, above which collating raises: a count (int from 0), or
            a share of the examples the process was given (float between 0 and 1), tested from the
            hundredth example on. None: no limit.
        count_key: key of the batch that receives the number of examples dropped from it, an int.
            None: no key is added.
        stand_in: good examples, collated in place of a batch in which no example is good if the
            process has not had a good batch yet.
        max_rejects_in_a_row: limit for each process of rejects without a good example between
            them, above which collating raises: a broken disk or a wrong spec is no bad row. None:
            no limit.

    Raises:
        ValueError: `max_rejects` is neither such a count nor such a share, or
            `max_rejects_in_a_row` is no count.

    Example:
        >>> SkipBad(max_rejects=0.01).max_rejects
        0.01
    """

    rejects: str | os.PathLike[str] | None = None
    max_rejects: float | None = None
    count_key: str | None = None
    stand_in: Sequence[Any] | None = None
    max_rejects_in_a_row: int | None = 100

    def __post_init__(self) -> None:
        limit: Any = self.max_rejects
        share = isinstance(limit, float) and 0 < limit < 1
        if limit is not None and not _is_count(limit) and not share:
            raise ValueError(
                "max_rejects must be a count (an int from 0) or a share (a float between 0 and 1), "
                f"not {limit!r}"
            )
        limit = self.max_rejects_in_a_row
        if limit is not None and not _is_count(limit):
            raise ValueError(f"max_rejects_in_a_row must be a count (an int from 0), not {limit!r}")


class Indexed(Dataset[Any]):
    """Add each example's index to a map-style dataset of mappings, for the rejects file.

    Args:
        dataset: map-style dataset whose examples are mappings.

    Example:
        >>> Indexed([{"input_ids": [7]}])[0]
        {'input_ids': [7], 'mrope_index': 0}
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> NewColumns:
        return {**self.dataset[index], INDEX: index}


@dataclass
class _Tally:
    """Counts of one process.

    Attributes:
        process: its id. A forked process inherits its parent's tally, and must not continue it.
        file: its rejects file; None: nothing is written.
        good: the examples of its last good batch.
        seen: number of examples that it was given.
        in_a_row: number of rejects since its last good example.
        kinds: number of rejects for each class and cause of error.
        messages: the first message of each kind.
    """

    process: int
    file: Path | None
    good: Sequence[Any] | None
    seen: int = 0
    in_a_row: int = 0
    kinds: Counter[Kind] = field(default_factory=Counter)
    messages: dict[Kind, str] = field(default_factory=dict)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class BadExampleFilter:
    """Collate examples without the bad ones, and keep the count of each process.

    Raises:
        OSError: the folder of `options.rejects` cannot be made or written to, or the path is a
            folder itself.
    """

    def __init__(self, options: SkipBad) -> None:
        self.options = options
        self.path: Path | None = None
        if options.rejects is not None:
            # Absolute, since a worker may start in another folder.
            self.path = Path(options.rejects).absolute()
            require_writable(self.path)
        self._tally: _Tally | None = None

    def __getstate__(self) -> NewColumns:
        # A worker that is started anew must not count its parent's examples, nor carry its batch.
        return {**self.__dict__, "_tally": None}

    def collate(self, collate: Collate, examples: object) -> Any:
        """Return `collate(examples)`; if that raises, `collate` of the good examples alone.

        Inputs that are not a sequence, and empty ones, are passed to `collate` unchanged.

        Raises:
            MRopeError: more than `max_rejects` were dropped, or than `max_rejects_in_a_row` without
                a good one between them; no example is left and there is none to stand in; or the
                batch already has `count_key`.
        """
        if not isinstance(examples, Sequence) or not examples:
            return collate(examples)
        tally = self._of_this_process()
        tally.seen += len(examples)
        errors: dict[int, Exception] = {}
        batch = _attempt(collate, examples)
        if isinstance(batch, Exception):
            errors = _find_bad(collate, examples)
            for place, error in errors.items():
                _reject(tally, examples[place], place, error)
            # Before collating again: with a wrong spec every example is bad.
            self._check_limits(tally, [place in errors for place in range(len(examples))])
            examples = [one for place, one in enumerate(examples) if place not in errors]
            batch = (
                collate(_copies(examples))
                if examples
                else self._stand_in(tally, collate, len(errors))
            )
        if examples:
            tally.good = examples
        if not errors:
            tally.in_a_row = 0
        self._set_count(batch, len(errors))
        return batch

    def _of_this_process(self) -> _Tally:
        # DataLoader workers are forked: compare the process id at every call.
        if self._tally is None or self._tally.process != os.getpid():
            file = None if self.path is None else process_file(self.path)
            self._tally = _Tally(os.getpid(), file, self.options.stand_in)
        return self._tally

    def _set_count(self, batch: Any, dropped: int) -> None:
        key = self.options.count_key
        if key is None:
            return
        if batch.get(key) is not None:
            raise MRopeError(f"the inner collate function already gave {key}")
        batch[key] = dropped

    def _check_limits(self, tally: _Tally, is_bad: Sequence[bool]) -> None:
        """Raise if the rejects of a batch are beyond a limit.

        Args:
            is_bad: of each example of the batch.
        """
        most = self.options.max_rejects_in_a_row
        for bad in is_bad:
            tally.in_a_row = tally.in_a_row + 1 if bad else 0
            if most is not None and tally.in_a_row > most:
                raise MRopeError(
                    f"more rejects in a row than max_rejects_in_a_row={most}, which is no matter "
                    f"of single rows (a disk, a wrong spec?): {_summary(tally)}"
                )
        rejected, limit = tally.kinds.total(), self.options.max_rejects
        if limit is None:
            return
        # The type decides, not the value: 1 is a count.
        if isinstance(limit, int):
            beyond = rejected > limit
        else:
            beyond = tally.seen >= _FEW and rejected > limit * tally.seen
        if beyond:
            raise MRopeError(f"more rejects than max_rejects={limit}: {_summary(tally)}")

    def _stand_in(self, tally: _Tally, collate: Collate, dropped: int) -> Any:
        """Return a batch of other examples: a rank that skips its step blocks all the others."""
        source = "the last good batch" if tally.good is not self.options.stand_in else "stand_in"
        if tally.good is None:
            source, tally.good = "the dataset", _from_dataset(collate)
        if tally.good is None:
            raise MRopeError(
                "no example of the batch is good, and there is no earlier batch to repeat; pass "
                f"good examples as SkipBad(stand_in=[...]). {_summary(tally)}"
            )
        if tally.file is not None:
            append_record(
                tally.file, {"event": "nothing left", "dropped": dropped, "repeated": source}
            )
        what = f"none of the {dropped} examples of a batch is good; used in its place"
        _warn_once(tally, ("nothing left", None), what, source)
        return collate(_copies(tally.good))


def _reject(tally: _Tally, example: object, place: int, error: Exception) -> None:
    """Count an example, record it, and warn if it is the first of its kind."""
    kind = type(error).__name__, getattr(error, "cause", None)
    tally.kinds[kind] += 1
    message = str(error)[:_LONGEST]
    if tally.file is not None:
        facts = {"place": place, **_facts(error)}
        append_record(tally.file, {"event": "rejected", **_names(example), **facts})
    _log.info("rejected example %d of %d: %s", tally.kinds.total(), tally.seen, message)
    _warn_once(tally, kind, f"an example was dropped, {kind[0]}", message)


def _warn_once(tally: _Tally, kind: Kind, what: str, message: str) -> None:
    if kind not in tally.messages:
        tally.messages[kind] = message
        note = "(shown once for each kind of error and process)"
        warnings.warn(f"{what}: {message} {note}", RejectWarning, stacklevel=2)


def _attempt(collate: Collate, examples: Sequence[Any]) -> Any:
    """Return the batch, or the exception; an inner collate function may raise any."""
    try:
        return collate(_copies(examples))
    except Exception as error:  # noqa: BLE001
        return error


def _copies(examples: Sequence[Any]) -> list[Any]:
    """Return shallow copies: examples may be collated twice, and some functions pop their keys."""
    return [
        _copy(example) if isinstance(example, MutableMapping) else example for example in examples
    ]


def _copy(example: Batch) -> Batch:
    twin = copy.copy(example)
    twin.pop(INDEX, None)
    return twin


def _find_bad(collate: Collate, examples: Sequence[Any]) -> dict[int, Exception]:
    """Return the places of the examples that cannot be collated, each with its exception."""
    alone = {place: _attempt(collate, [example]) for place, example in enumerate(examples)}
    errors = {place: error for place, error in alone.items() if isinstance(error, Exception)}
    good = [place for place in alone if place not in errors]
    if not good or not isinstance(
        _attempt(collate, [examples[place] for place in good]), Exception
    ):
        return errors
    # Good alone but not together: one has labels and another none. A single odd example in front
    # would expel all others; so the order is tried again with the expelled ones first.
    forward = _unfitting(collate, examples, good)
    rest = [place for place in good if place not in forward]
    backward = _unfitting(collate, examples, [*forward, *rest])
    return errors | min(forward, backward, key=len)


def _unfitting(
    collate: Collate, examples: Sequence[Any], order: Sequence[int]
) -> dict[int, Exception]:
    """Add examples one by one, and return those that cannot be collated with the ones before."""
    fitting: list[int] = []
    errors = {}
    for place in order:
        # In the order of the batch, as it would be collated.
        outcome = _attempt(collate, [examples[one] for one in sorted((*fitting, place))])
        if isinstance(outcome, Exception):
            errors[place] = outcome
        else:
            fitting.append(place)
    return errors


def _from_dataset(collate: Collate) -> list[Any] | None:
    """Return the first good example of a worker's map-style dataset; None if there is none."""
    worker = get_worker_info()
    dataset: Any = None if worker is None else worker.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return None
    for index in range(min(len(dataset), _TRIES)):
        try:
            collate(_copies([example := dataset[index]]))
        except Exception:  # noqa: BLE001
            continue
        return [example]
    return None


def _names(example: object) -> NewColumns:
    """Return the values that identify an example, under the keys `id` and `index`."""
    if not isinstance(example, Mapping):
        return {}
    found = {name: example[name] for name in _NAMES if example.get(name) is not None}
    return {
        # Tensors and arrays become numbers, which JSON holds.
        name.removeprefix("mrope_"): value.tolist() if hasattr(value, "tolist") else value
        for name, value in found.items()
    }


def _facts(error: Exception) -> NewColumns:
    facts = {name: getattr(error, name, None) for name in _FACTS}
    return {"error": type(error).__name__, **facts, "message": str(error)[:_LONGEST]}


def _summary(tally: _Tally) -> str:
    worker = get_worker_info()
    where = f"process {tally.process}" if worker is None else f"worker {worker.id}"
    kinds = "; ".join(
        f"{count} x {kind[0]}: {kind[1] or tally.messages[kind]}"
        for kind, count in tally.kinds.most_common()
    )
    return f"{where} dropped {tally.kinds.total()} of {tally.seen} examples: {kinds}"

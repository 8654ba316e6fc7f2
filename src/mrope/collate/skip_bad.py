"""Bad examples are dropped before they are merged, and written down: `on_error="skip"`.

A batch that collates is never looked at again. Only where collating raises are its examples tried
one by one, and the good ones are collated anew, as if the others had not been there.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from mrope.collate.lines import append_line, locked
from mrope.errors import MRopeError

OnError = Literal["raise", "skip"]
Collate = Callable[[Any], Any]
Kind = tuple[str, str | None]

INDEX = "mrope_index"
"""Key under which an example says which of its dataset it is; inner functions never see it."""

# Where a row has an index of its own, that of the dataset wins.
_NAMES = ("id", "index", INDEX)
_FACTS = ("row", "span", "modality", "found", "needed", "cause")
_LONGEST = 2000
# A share of few examples says nothing.
_FEW = 100
_TRIES = 100

_log = logging.getLogger(__name__)


class RejectWarning(UserWarning):
    """An example was dropped: given once for each kind of error in each process."""


class Indexed(Dataset[Any]):
    """A map-style dataset of mappings whose examples say which they are, for the rejects file.

    Args:
        dataset: gives mappings.

    Example:
        >>> Indexed([{"input_ids": [7]}])[0]
        {'input_ids': [7], 'mrope_index': 0}
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], INDEX: index}


@dataclass
class _Tally:
    """What one process has seen.

    Attributes:
        process: its id. A forked process starts with its parent's tally, which is not its own.
        good: the examples of its last good batch.
        seen: examples that it was given.
        kinds: rejected ones by class and cause of their error.
        messages: the first message of each kind.
    """

    process: int
    good: Sequence[Any] | None
    seen: int = 0
    kinds: Counter[Kind] = field(default_factory=Counter)
    messages: dict[Kind, str] = field(default_factory=dict)


class Rejects:
    """What `MRopeCollator(on_error="skip")` does with bad examples.

    Args:
        file: JSON-lines file, made if need be; a line is added for each dropped example. None:
            no file.
        max_rejects: a process that dropped more stops: a count, or a share (a float below 1) of the
            examples it was given, looked at from the hundredth on. None: no limit.
        count_key: key of the batch that gets the number of examples dropped from it, an int.
        stand_in: good examples, for a batch with nothing left in a process that has not had a good
            one yet.

    Raises:
        ValueError: a limit of another kind or value.
        OSError: the file cannot be written.
    """

    def __init__(
        self,
        file: str | os.PathLike[str] | None = None,
        max_rejects: float | None = None,
        count_key: str | None = None,
        stand_in: Sequence[Any] | None = None,
    ) -> None:
        _require_limit(max_rejects)
        self.file = None if file is None else Path(file).absolute()
        self.max_rejects = max_rejects
        self.count_key = count_key
        self.stand_in = stand_in
        if self.file is not None:
            # A path that cannot be written is better found now than at the first bad example.
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.file):
                pass
        self._tally: _Tally | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tally": None}

    def collate(self, collate: Collate, examples: Any) -> Any:
        """Return `collate(examples)`, of the good ones alone where that raises.

        Whatever comes without a length and an order cannot be taken apart: `collate` has the word.

        Raises:
            MRopeError: more than `max_rejects`, or nothing is left and there is no stand-in.
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
                self._reject(tally, examples[place], place, error)
            self._check_limit(tally)
            examples = [one for place, one in enumerate(examples) if place not in errors]
            batch = (
                collate(_copies(examples))
                if examples
                else self._stand_in(tally, collate, len(errors))
            )
        if examples:
            tally.good = examples
        if self.count_key is not None:
            self._set_count(batch, len(errors))
        return batch

    def _set_count(self, batch: Any, dropped: int) -> None:
        if batch.get(self.count_key) is not None:
            raise MRopeError(f"the inner collate function already gave {self.count_key}")
        batch[self.count_key] = dropped

    def _of_this_process(self) -> _Tally:
        if self._tally is None or self._tally.process != os.getpid():
            self._tally = _Tally(os.getpid(), self.stand_in)
        return self._tally

    def _reject(self, tally: _Tally, example: Any, place: int, error: Exception) -> None:
        """Count an example, write it down, and warn if it is the first of its kind."""
        kind = type(error).__name__, getattr(error, "cause", None)
        tally.kinds[kind] += 1
        message = str(error)[:_LONGEST]
        self._write({"event": "rejected", **_named(example), "place": place, **_facts(error)})
        _log.info("rejected example %d of %d: %s", tally.kinds.total(), tally.seen, message)
        self._warn_once(tally, kind, f"an example was dropped, {kind[0]}", message)

    def _warn_once(self, tally: _Tally, kind: Kind, what: str, message: str) -> None:
        if kind not in tally.messages:
            tally.messages[kind] = message
            note = "(said once for each kind and process)"
            warnings.warn(f"{what}: {message} {note}", RejectWarning, stacklevel=2)

    def _check_limit(self, tally: _Tally) -> None:
        rejected, limit = tally.kinds.total(), self.max_rejects
        if limit is None:
            return
        if isinstance(limit, int):
            beyond = rejected > limit
        else:
            beyond = tally.seen >= _FEW and rejected > limit * tally.seen
        if beyond:
            raise MRopeError(f"more rejects than max_rejects={limit}: {_summary(tally)}")

    def _stand_in(self, tally: _Tally, collate: Collate, dropped: int) -> Any:
        """Return what takes the place of a batch with nothing left: every rank needs its step."""
        source = "the last good batch" if tally.good is not self.stand_in else "stand_in"
        if tally.good is None:
            source, tally.good = "the dataset", _from_dataset(collate)
        if tally.good is None:
            raise MRopeError(
                "a batch has no good example, and there is none before it to repeat; give "
                f"MRopeCollator(stand_in=[...]) good ones. {_summary(tally)}"
            )
        self._write({"event": "nothing left", "dropped": dropped, "repeated": source})
        what = f"none of a batch's {dropped} examples is good; in its place"
        self._warn_once(tally, ("nothing left", None), what, source)
        return collate(_copies(tally.good))

    def _write(self, record: dict[str, Any]) -> None:
        if self.file is None:
            return
        worker = get_worker_info()
        append_line(
            self.file,
            {
                "time": datetime.now(timezone.utc).isoformat(),
                "rank": os.environ.get("RANK"),
                "worker": None if worker is None else worker.id,
                "process": os.getpid(),
                **record,
            },
        )


def make_rejects(
    on_error: OnError,
    file: str | os.PathLike[str] | None,
    max_rejects: float | None,
    count_key: str | None,
    stand_in: Sequence[Any] | None,
) -> Rejects | None:
    """Return what skips bad examples, or None where they are to raise.

    Raises:
        ValueError: an option of skipping, and nothing is skipped; or as `Rejects` does.
    """
    if on_error == "skip":
        return Rejects(file, max_rejects, count_key, stand_in)
    options = {
        "rejects": file,
        "max_rejects": max_rejects,
        "count_key": count_key,
        "stand_in": stand_in,
    }
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)} belongs to on_error='skip'")
    return None


def _require_limit(limit: Any) -> None:
    count = isinstance(limit, int) and not isinstance(limit, bool) and limit >= 0
    share = isinstance(limit, float) and 0 < limit < 1
    if limit is not None and not count and not share:
        raise ValueError(
            "max_rejects must be a count (an int from 0) or a share (a float between 0 and 1), "
            f"not {limit!r}"
        )


def _attempt(collate: Collate, examples: Sequence[Any]) -> Any:
    """Return the batch, or what was raised; an inner collate function may raise anything."""
    try:
        return collate(_copies(examples))
    except Exception as error:  # noqa: BLE001
        return error


def _copies(examples: Sequence[Any]) -> list[Any]:
    """Return shallow copies: examples may be collated twice, and some functions pop their keys."""
    return [
        _copy(example) if isinstance(example, MutableMapping) else example for example in examples
    ]


def _copy(example: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    twin = copy.copy(example)
    twin.pop(INDEX, None)
    return twin


def _find_bad(collate: Collate, examples: Sequence[Any]) -> dict[int, Exception]:
    """Return the places of the examples that cannot be collated, and what each of them raises."""
    alone = {place: _attempt(collate, [example]) for place, example in enumerate(examples)}
    errors = {place: error for place, error in alone.items() if isinstance(error, Exception)}
    good = [place for place in alone if place not in errors]
    if not good or not isinstance(
        _attempt(collate, [examples[place] for place in good]), Exception
    ):
        return errors
    # Good alone and not together: one has labels and another none. More of them stay if those that
    # do not go with the first are asked first.
    forward = _unfitting(collate, examples, good)
    rest = [place for place in good if place not in forward]
    backward = _unfitting(collate, examples, [*forward, *rest])
    return errors | min(forward, backward, key=len)


def _unfitting(
    collate: Collate, examples: Sequence[Any], order: Sequence[int]
) -> dict[int, Exception]:
    """Add examples one by one, and return those that cannot be collated with what is there."""
    fitting: list[int] = []
    errors = {}
    for place in order:
        outcome = _attempt(collate, [examples[one] for one in sorted((*fitting, place))])
        if isinstance(outcome, Exception):
            errors[place] = outcome
        else:
            fitting.append(place)
    return errors


def _from_dataset(collate: Collate) -> list[Any] | None:
    """Return the first good example of a worker's map-style dataset; None where there is none."""
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


def _named(example: Any) -> dict[str, Any]:
    """Return what an example says of which it is."""
    if not isinstance(example, Mapping):
        return {}
    found = {name: example[name] for name in _NAMES if example.get(name) is not None}
    return {
        name.removeprefix("mrope_"): value.tolist() if hasattr(value, "tolist") else value
        for name, value in found.items()
    }


def _facts(error: Exception) -> dict[str, Any]:
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

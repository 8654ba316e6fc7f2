"""Compare the batches of two runs by their digests: `mrope check --replay A B`."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from mrope.collate.digests import BatchDigest
from mrope.collate.process_files import read_files
from mrope.errors import MRopeError

# Hex digits of a row's digest that are of its token ids.
_IDS = 16
# Share of a run's rows that several workers were given, above which it is said.
_SHARED = 0.05


class Worker(NamedTuple):
    """A worker of a rank; the only one without DataLoader workers."""

    rank: int
    number: int


class Run(NamedTuple):
    """What a run recorded.

    Attributes:
        name: the path of its files.
        workers: of each rank.
        batches: of each worker, in its order; those that a restart made again are there once.
    """

    name: str
    workers: int
    batches: Mapping[Worker, Sequence[BatchDigest]]

    def in_order(self) -> Iterator[tuple[Worker, BatchDigest]]:
        """Yield all batches with their workers, step by step."""
        for step in itertools.zip_longest(*self.batches.values()):
            for worker, batch in zip(self.batches, step, strict=True):
                if batch is not None:
                    yield worker, batch

    def rows(self) -> Counter[str]:
        """Count the rows by their token ids."""
        return Counter(row[:_IDS] for _, batch in self.in_order() for row in batch.rows)


class Parting(NamedTuple):
    """The first place at which two runs differ.

    Attributes:
        step: of the rank, from 0: its DataLoader's workers take turns.
        row: of the batch; None: what differs is of the whole batch.
        what: in words.
    """

    step: int
    worker: Worker
    row: int | None
    what: str


class Replay(NamedTuple):
    """What the comparison of two runs found.

    Attributes:
        compared: batches that both have.
        parting: None: all of these are equal, or the runs have other ranks or workers.
        same_workers: whether batches could be compared one by one.
        only: rows that the first run alone has, and the second, where they part.
        shared: of each run, the share of its rows that several workers were given.
    """

    compared: int
    parting: Parting | None
    same_workers: bool
    only: tuple[int, int]
    shared: tuple[float, float]


def replay(first: Path, second: Path, json_file: Path | None = None) -> bool:
    """Compare two runs, print the result, and return whether nothing was found.

    Args:
        first, second: what each run was given as `DigestCollator(to=...)`.
        json_file: where to write the result too.

    Raises:
        MRopeError: there are no files of a run, or they are not of digests.
    """
    runs = read_run(first), read_run(second)
    found = compare(*runs)
    print_replay(found, runs, Console())
    if json_file is not None:
        json_file.write_text(json.dumps(found._asdict(), indent=1) + "\n", encoding="utf-8")
    same_rows = found.same_workers or not any(found.only)
    return found.parting is None and same_rows and max(found.shared) <= _SHARED


def read_run(path: Path) -> Run:
    """Read what a run recorded in the files of a path.

    Raises:
        OSError: the folder does not exist or cannot be read.
        MRopeError: there are no files, or they are not of digests.
    """
    files = [lines for lines in read_files(path) if lines]
    if not files:
        raise MRopeError(
            f"no digests at {path}; DigestCollator(collate, {path.name!r}) records them"
        )
    heads = [lines[0] for lines in files]
    if not all(isinstance(head, dict) and "run" in head for head in heads):
        raise MRopeError(f"the files at {path} are not of digests")
    sessions = sorted(files, key=lambda lines: str(lines[0]["time"]))
    batches: dict[Worker, list[BatchDigest]] = defaultdict(list)
    latest: dict[Worker, str] = {}
    for head, *lines in sessions:
        worker = Worker(int(head["rank"] or 0), head["worker"] or 0)
        made = [BatchDigest(tuple(rows), items, tuple(shape)) for rows, items, shape in lines]
        if latest.get(worker, head["run"]) != head["run"]:
            _take_back(batches[worker], made)
        latest[worker] = head["run"]
        batches[worker] += made
    return Run(str(path), max(head["workers"] for head in heads), dict(sorted(batches.items())))


def _take_back(before: list[BatchDigest], after: Sequence[BatchDigest]) -> None:
    """Remove what a process made before it was restarted, and what the next one makes again."""
    for place in reversed(range(len(before))):
        if after and _row_ids(before[place]) == _row_ids(after[0]):
            del before[place:]
            return


def _row_ids(batch: BatchDigest) -> list[str]:
    return [row[:_IDS] for row in batch.rows]


def compare(first: Run, second: Run) -> Replay:
    """Compare two runs, batch by batch if they have the same ranks and workers."""
    same = first.batches.keys() == second.batches.keys()
    partings, compared = [], 0
    for worker in first.batches if same else ():
        pairs = list(zip(first.batches[worker], second.batches[worker], strict=False))
        compared += len(pairs)
        for number, (one, other) in enumerate(pairs):
            if one != other:
                step = number * first.workers + worker.number
                partings.append(Parting(step, worker, *_difference(one, other)))
                break
    rows = first.rows(), second.rows()
    return Replay(
        compared,
        min(partings, default=None),
        same,
        ((rows[0] - rows[1]).total(), (rows[1] - rows[0]).total()),
        (shared_rows(first), shared_rows(second)),
    )


def _difference(one: BatchDigest, other: BatchDigest) -> tuple[int | None, str]:
    """Return the first row in which two batches differ, and in what."""
    for row, (mine, yours) in enumerate(zip(one.rows, other.rows, strict=False)):
        if mine[:_IDS] != yours[:_IDS]:
            return row, "other token ids"
        if mine != yours:
            return row, "the same token ids at other positions"
    if len(one.rows) != len(other.rows):
        least = min(len(one.rows), len(other.rows))
        return least, f"{len(one.rows)} rows against {len(other.rows)}"
    for name in sorted({*one.items, *other.items}):
        pairs = itertools.zip_longest(one.items.get(name, ()), other.items.get(name, ()))
        for item, (mine, yours) in enumerate(pairs):
            if mine != yours:
                return None, f"entry {item} of {name}"
    return None, f"padded to {list(one.shape)} against {list(other.shape)}"


def shared_rows(run: Run) -> float:
    """Return the share of rows that another worker had been given, within the first epoch.

    The first as many rows as there are different ones: an epoch that is divided among the workers
    has few rows twice in these, and one that each worker has all of has every other one again.
    """
    distinct = len(run.rows())
    given: dict[str, Counter[Worker]] = defaultdict(Counter)
    rows = ((row, worker) for worker, batch in run.in_order() for row in _row_ids(batch))
    for row, worker in itertools.islice(rows, distinct):
        given[row][worker] += 1
    # What one worker has again and again is the padding of a rung.
    counts = [workers for workers in given.values() if max(workers.values()) < 3]
    again = sum(len(workers) - 1 for workers in counts)
    # Rows that the dataset has twice come twice to one worker too, one time in so many.
    alone = sum(workers.total() - len(workers) for workers in counts)
    return max(again - alone * (len(run.batches) - 1), 0) / max(distinct, 1)


def print_replay(found: Replay, runs: Sequence[Run], console: Console) -> None:
    """Print what a comparison found, in sentences."""
    for line in _sentences(found, runs):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _sentences(found: Replay, runs: Sequence[Run]) -> Iterator[str]:
    first, second = runs
    if not found.same_workers:
        yield (
            f"The runs have other ranks or workers ({_workers(first)}; {_workers(second)}): their "
            "rows are compared, and not their batches."
        )
    elif found.parting is None:
        yield f"Equal: {found.compared} batches."
    else:
        step, worker, row, what = found.parting
        place = "" if row is None else f", row {row}"
        yield (
            f"The runs part at step {step} of rank {worker.rank}, a batch of worker "
            f"{worker.number}{place}: {what}."
        )
    lengths = [sum(map(len, run.batches.values())) for run in runs]
    if lengths[0] != lengths[1]:
        yield f"{first.name} has {lengths[0]} batches, {second.name} {lengths[1]}."
    if found.parting is not None or not found.same_workers:
        rows = [run.rows().total() for run in runs]
        yield (
            f"Of {rows[0]} rows {found.only[0]} are in {first.name} alone; of {rows[1]} rows "
            f"{found.only[1]} are in {second.name} alone."
        )
    for run, share in zip(runs, found.shared, strict=True):
        if share > _SHARED:
            yield (
                f"{run.name}: {share:.0%} of the rows of the first epoch had been given to another "
                "worker before. A dataset gives every worker all rows unless it reads "
                "torch.utils.data.get_worker_info() and its rank, as webdataset does with a "
                "nodesplitter and a workersplitter; or a sampler draws rows again, or the dataset "
                "has them several times."
            )


def _workers(run: Run) -> str:
    ranks = len({worker.rank for worker in run.batches})
    return f"{ranks} ranks with {run.workers} workers"

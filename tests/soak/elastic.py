"""Lose workers and ranks, go on with other numbers of them, and count every sample of every epoch.

    PYTHONPATH=src:tests python tests/soak/elastic.py [--rows 8000] [--epochs 4] [--json FILE]

Ranks are loaders of one process, in step; their workers are processes. 8 ranks become 6 and then 7. In
each phase a checkpoint is saved, some steps are taken that will be lost, and then a worker is killed
or a rank is gone. Whatever went into the weights of the last checkpoint has to be each sample once.
"""

from __future__ import annotations

import argparse
import itertools
import os
import pickle
import random
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from torchdata.stateful_dataloader import StatefulDataLoader

from mrope.bench.harness import conditions, write_json
from mrope.prepare import TokenBudgetSampler, TokenBudgetStream

BUDGET = 4096
SHARDS = 48


class Phase(NamedTuple):
    """How many ranks and workers train, up to which share of an epoch, and how they end."""

    ranks: int
    workers: int
    until: float
    accident: str


PHASES = (
    Phase(8, 2, 0.25, "a worker is killed"),
    Phase(8, 2, 0.4, "two ranks are lost"),
    Phase(6, 1, 0.6, "a worker is killed"),
    Phase(6, 3, 0.7, "a rank is added"),
    Phase(7, 2, 1.0, "the epoch ends"),
)


def write_rows(folder: Path, rows: int) -> list[int]:
    """Write rows of lognormal lengths to Parquet files, and return the lengths."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(300), 1, rows), 16, BUDGET).astype(int)
    table = datasets.Dataset.from_dict({"row": range(rows), "tokens": lengths})
    datasets.disable_progress_bars()
    for shard in range(SHARDS):
        table.shard(SHARDS, shard).to_parquet(folder / f"{shard:03d}.parquet")
    return [int(length) for length in lengths]


def size_of(row: dict[str, int]) -> tuple[int, int]:
    return row["tokens"], 0


class Streams:
    """Loaders of streams over the files: each rank needs the states of all."""

    def __init__(self, folder: Path) -> None:
        self.files = [str(file) for file in sorted(folder.glob("*.parquet"))]

    def loader(self, phase: Phase, rank: int, epoch: int, states: Any) -> Any:
        source = datasets.IterableDataset.from_parquet(self.files)
        stream = TokenBudgetStream(
            source, BUDGET, buffer_size=32, size=size_of, rank=rank, num_replicas=phase.ranks
        )
        stream.set_epoch(epoch)
        if states:
            stream.resume(states)
        return StatefulDataLoader(
            stream, batch_size=None, num_workers=phase.workers, collate_fn=rows_of
        )


class Samplers:
    """Loaders with a sampler: any rank's state serves all."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def loader(self, phase: Phase, rank: int, epoch: int, states: Any) -> Any:
        sampler = TokenBudgetSampler(
            self.lengths, BUDGET, rank=rank, num_replicas=phase.ranks, seed=3
        )
        sampler.set_epoch(epoch)
        if states:
            sampler.resume(random.Random(rank).choice(states))
        rows: Any = range(len(self.lengths))
        return StatefulDataLoader(
            rows, batch_sampler=sampler, num_workers=phase.workers, collate_fn=list
        )


def rows_of(batch: list[dict[str, int]]) -> list[int]:
    return [row["row"] for row in batch]


def in_step(loaders: list[Any]) -> Iterator[list[int]]:
    """Yield the rows of all ranks, step by step, as long as any rank has a batch."""
    for step in itertools.zip_longest(*loaders, fillvalue=()):
        yield [row for batch in step for row in batch]


def epoch_of(
    kind: Any, epoch: int, rows: int, rng: random.Random
) -> tuple[Counter[int], list[str]]:
    """Train an epoch through all phases; return how often each row is in the weights."""
    kept: Counter[int] = Counter()
    states: list[Any] = []
    happened = []
    for phase in PHASES:
        loaders = [kind.loader(phase, rank, epoch, states) for rank in range(phase.ranks)]
        iterators = [iter(loader) for loader in loaders]
        steps, since = in_step(iterators), Counter[int]()
        for taken in steps:
            since.update(taken)
            if (kept + since).total() >= phase.until * rows:
                break
        if phase.until < 1:
            states = pickle.loads(pickle.dumps([loader.state_dict() for loader in loaders]))
            # Lost with the accident: trained after the checkpoint.
            for _ in itertools.islice(steps, rng.randrange(4)):
                pass
        kept += since
        if phase.accident == "a worker is killed":
            happened.append(kill_one(iterators, steps, rng))
        else:
            happened.append(phase.accident)
        del loaders, iterators, steps
    return kept, happened


def kill_one(iterators: list[Any], steps: Iterator[list[int]], rng: random.Random) -> str:
    """Kill a worker of a rank, and return how its loader ends."""
    victim = rng.choice(rng.choice(iterators)._workers)
    os.kill(victim.pid, signal.SIGKILL)
    try:
        for _ in steps:
            pass
    except RuntimeError as error:
        return f"a worker is killed: {str(error).split(' (')[0]}"
    return "a worker is killed, and nobody noticed"


def soak(rows: int, epochs: int) -> dict[str, Any]:
    """Return for each kind of loader how often rows of an epoch were lost or taken twice."""
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        lengths = write_rows(Path(name), rows)
        for title, kind in (("streams", Streams(Path(name))), ("samplers", Samplers(lengths))):
            started = time.perf_counter()
            counts, accidents = [], []
            for epoch in range(epochs):
                found, happened = epoch_of(kind, epoch, rows, random.Random(epoch))
                counts.append(found)
                accidents += happened
            report[title] = {
                "epochs": epochs,
                "lost": sum(rows - len(found) for found in counts),
                "taken_twice": sum(found.total() - len(found) for found in counts),
                "accidents": dict(Counter(accidents)),
                "seconds": round(time.perf_counter() - started, 1),
            }
    return report


def main() -> int:
    """Print what was lost, and return 0 if nothing was."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    # Of torch: more workers than processors are meant here.
    warnings.filterwarnings("ignore", category=UserWarning)
    found = soak(arguments.rows, arguments.epochs)
    report = {"conditions": conditions(), "rows": arguments.rows, "phases": PHASES, **found}
    for title, one in found.items():
        print(title, one)
    write_json(report, arguments.json)
    whole = all(one["lost"] == one["taken_twice"] == 0 for one in found.values())
    killed = all(any("killed: " in name for name in one["accidents"]) for one in found.values())
    return 0 if whole and killed else 1


if __name__ == "__main__":
    raise SystemExit(main())

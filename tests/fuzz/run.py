"""Damage many samples, and print what became of them: `make fuzz`.

python -m fuzz.run --samples 20000 --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import hypothesis
import numpy as np
from hypothesis import strategies as st

from fuzz.judge import EXACT, KINDS, WrongError, judge, memory
from fuzz.responses import DECODING, judge_responses
from mrope import MRopeSpec
from mrope.spec.references import installed_transformers
from mrope.spec.spec import example_config
from support.batches import ROWS

_DRAWS = 40
_CAUSES = (EXACT, "tokens and sizes do not fit", "a bad argument")


@dataclass
class Tally:
    """What became of the samples.

    Attributes:
        verdicts: by kind and verdict.
        compared: with the installed transformers: "equal", or "raises".
        faults: how often each of them was seen, with how to see it again.
        slowest: seconds of the slowest sample, and the kind of its damage.
    """

    verdicts: Counter[tuple[str, str]] = field(default_factory=Counter)
    compared: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")


def spec_of(row: tuple[str, str]) -> MRopeSpec:
    family, reference = row
    return MRopeSpec.from_config(example_config(family), reference)


def fuzz(samples: int, seed: int) -> Tally:
    """Damage so many samples: the rows of the table in turn, and for each of them every kind."""
    tally = Tally()
    for number in range(samples):
        row = ROWS[number % len(ROWS)]
        first = number // len(ROWS)
        start = time.perf_counter()
        for attempt in range(_DRAWS * 2 * len(KINDS)):
            # Not every family can be damaged in every way: no audio, no flag.
            kind = KINDS[(first + attempt // _DRAWS * (1 + number % 25)) % len(KINDS)]
            rng = random.Random(f"{seed} {number} {attempt}")
            verdict = _judged(rng, row, kind, tally)
            if verdict is not None:
                break
        tally.verdicts[kind, verdict or "nothing to damage"] += 1
        tally.slowest = max(tally.slowest, (time.perf_counter() - start, kind))
    return tally


def _judged(rng: random.Random, row: tuple[str, str], kind: str, tally: Tally) -> str | None:
    try:
        return judge(rng, spec_of(row), kind, tally.compared)
    except WrongError as wrong:
        if len(tally.faults) < 5:
            tally.faults.append(f"{kind}, {' '.join(row)}: {wrong}\n{shrunk(row, kind)}")
        return "WRONG"


def fuzz_responses(samples: int, seed: int) -> Tally:
    """Damage turns behind prompts, so many of them, of every family that decodes."""
    tally, number = Tally(), 0
    while tally.verdicts.total() < samples:
        row = DECODING[number % len(DECODING)]
        try:
            judged = judge_responses(random.Random(f"{seed} {number} turn"), spec_of(row))
        except WrongError as wrong:
            tally.faults.append(f"turn, {' '.join(row)}: {wrong}")
            judged = "a turn", "WRONG"
        if judged is not None:
            tally.verdicts[judged] += 1
        number += 1
    return tally


def shrunk(row: tuple[str, str], kind: str) -> str:
    """Return the simplest failure of a kind that hypothesis finds."""

    failures = ["hypothesis finds no smaller one"]

    def fails(rng: random.Random) -> bool:
        try:
            judge(rng, spec_of(row), kind)
        except WrongError as wrong:
            failures.append(str(wrong))
            return True
        return False

    strategy = st.randoms(use_true_random=False)
    with contextlib.suppress(hypothesis.errors.NoSuchExample):
        hypothesis.find(strategy, fails, settings=hypothesis.settings(max_examples=2000))
    return f"smallest: {failures[-1]}"


def table(tally: Tally) -> str:
    """Return a Markdown table: kinds of damage and what became of them."""
    seen = dict.fromkeys(verdict for _, verdict in tally.verdicts)
    columns = [*_CAUSES, *(verdict for verdict in seen if verdict not in _CAUSES)]
    lines = [
        f"| damage | samples | {' | '.join(columns)} |",
        f"|---|{'---:|' * (len(columns) + 1)}",
    ]
    for kind in [*KINDS, "all"]:
        counts = [
            sum(n for (k, v), n in tally.verdicts.items() if v == column and kind in (k, "all"))
            for column in columns
        ]
        cells = " | ".join(f"{count:,}" for count in (sum(counts), *counts))
        lines.append(f"| {kind} | {cells} |")
    return "\n".join(lines)


def memory_peaks() -> list[tuple[float, str, str]]:
    """Return peaks of long damaged batches over those of good ones, the highest first."""
    peaks = []
    for row in {family: (family, reference) for family, reference in ROWS}.values():
        for kind in KINDS:
            peak = memory(random.Random(f"{row} {kind}"), spec_of(row), kind)
            if peak is not None:
                peaks.append((peak, kind, row[0]))
    return sorted(peaks, reverse=True)


def main() -> int:
    """Run from the command line; the exit code is 1 where any sample did what none may do."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    tally = fuzz(options.samples, options.seed)
    turns = fuzz_responses(options.samples // 10, options.seed)
    seconds = time.perf_counter() - start
    peaks = memory_peaks()
    print(table(tally))
    exact = sum(n for (_, verdict), n in turns.verdicts.items() if verdict == EXACT)
    print(f"\n{turns.verdicts.total()} damaged turns behind prompts, by extend: {exact} exact.")
    print(
        f"\n{options.samples} samples, seed {options.seed}, {len(ROWS)} rows of families and references, "
        f"{seconds:.0f} s; the slowest took {tally.slowest[0]:.2f} s ({tally.slowest[1]}).\n"
        f"Of the exact ones, transformers {installed_transformers()} gives the same for "
        f"{tally.compared['equal']}, and raises for {tally.compared['raises']}.\n"
        f"Peak memory of {len(peaks)} long damaged batches over that of the good one: at most "
        f"{peaks[0][0]:.2f} ({peaks[0][1]}, {peaks[0][2]}).\n"
        f"Python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}."
    )
    for fault in [*tally.faults, *turns.faults]:
        print(f"\nWRONG: {fault}")
    return 1 if tally.faults or turns.faults or peaks[0][0] > 2 else 0


if __name__ == "__main__":
    sys.exit(main())

"""Time the same calls in two checkouts of this repository, alternating in one run.

A script gives a payload of plain data, made once, and a function that turns it into calls by public
names of `mrope` alone, which both checkouts have. Each round starts a fresh process on one checkout
and then on the other, which of them first alternating; the time of a call is the best of all rounds.
Times are of the processor, on one thread, so that they leave out what other processes take:

- warm: the least of 40 turns of about 4 ms, the calls interleaved;
- cold: the median of single calls, before each of which 40 MB are written: a worker's call comes after
  it has decoded and copied pixels, which leave nothing of the last call in the processor's caches.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parents[1]
HERE = TESTS.parent / "src"
ROUNDS, TURNS, TURN_SECONDS, COLD_PASSES = 8, 40, 0.004, 10
CACHES = 40 * 2**20

# For each name a call for each batch: printed times are of one batch.
Calls = Mapping[str, Sequence[Callable[[], Any]]]
Seconds = dict[str, float]


def main(
    module: str,
    make_payload: Callable[[], Any],
    make_calls: Callable[[Any], Calls],
    times: Sequence[Callable[[Calls], Seconds]],
) -> None:
    """Run a script: measure both checkouts, or, in a process of a round, one of them.

    Args:
        module: name of the script's module, for `python -m`.
        make_payload: returns plain data and tensors, without objects of `mrope`.
        make_calls: returns what to time, by name.
        times: how; each returns seconds by name.
    """
    options = _read_options(module)
    if options.payload is not None:
        torch.set_num_threads(1)
        calls = make_calls(torch.load(options.payload, weights_only=False))
        print(json.dumps({name: one for of in times for name, one in of(calls).items()}))
        return
    with tempfile.TemporaryDirectory() as folder:
        payload = Path(folder) / "payload.pt"
        torch.save(make_payload(), payload)
        sources = {"here": HERE, "other": options.other}
        best = best_of_rounds(module, payload, sources, options.rounds)
    print(table(best["here"], best["other"]))
    # Not at the top: the process of a round runs on a checkout that may not have it.
    from mrope.bench.harness import conditions, one_line, write_json

    print(f"best of {options.rounds} rounds,", one_line(conditions()))
    write_json({"conditions": conditions(), "rounds": options.rounds, **best}, options.json)


def _read_options(module: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("other", type=Path, nargs="?", help="folder src of another checkout")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="file for the seconds of both")
    parser.add_argument("--payload", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.payload is None and not (options.other and (options.other / "mrope").is_dir()):
        parser.error("give the folder src of another checkout, which holds mrope")
    return options


def warm_seconds(calls: Calls) -> Seconds:
    """Return the least seconds of a batch, averaged over the batches; names end in ", warm"."""
    timers = {name: _timer(batches) for name, batches in calls.items()}
    repeats = {}
    for name, timer in timers.items():
        timer.timeit(1)  # the first call fills caches
        repeats[name] = max(1, int(TURN_SECONDS / max(timer.timeit(1), 1e-6)))
    found = {name: float("inf") for name in calls}
    for _ in range(TURNS):
        for name, timer in timers.items():
            seconds = timer.timeit(repeats[name]) / repeats[name] / len(calls[name])
            found[name] = min(found[name], seconds)
    return {f"{name}, warm": seconds for name, seconds in found.items()}


def _timer(batches: Sequence[Callable[[], Any]]) -> timeit.Timer:
    def run() -> None:
        for call in batches:
            call()

    return timeit.Timer(run, timer=time.process_time)


def cold_seconds(calls: Calls) -> Seconds:
    """Return the median seconds of a batch after other work; names end in ", cold"."""
    other_work = torch.zeros(CACHES // 4)
    found = {}
    for name, batches in calls.items():
        seconds = []
        for call in [*batches] * COLD_PASSES:
            other_work.add_(1)
            start = time.process_time()
            call()
            seconds.append(time.process_time() - start)
        found[f"{name}, cold"] = statistics.median(seconds)
    return found


def best_of_rounds(
    module: str, payload: Path, sources: Mapping[str, Path], rounds: int
) -> dict[str, Seconds]:
    """Return the least seconds of each call on each checkout over all rounds."""
    best: dict[str, Seconds] = {name: {} for name in sources}
    for number in range(rounds):
        for name in sorted(sources, reverse=number % 2 == 1):
            for call, seconds in _run_round(module, payload, sources[name]).items():
                best[name][call] = min(seconds, best[name].get(call, seconds))
    return best


def _run_round(module: str, payload: Path, source: Path) -> Seconds:
    path = os.pathsep.join(map(str, (source.resolve(), TESTS)))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", module, "--payload", str(payload)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{source}:\n{done.stderr}")
    found: Seconds = json.loads(done.stdout)
    return found


def table(here: Seconds, other: Seconds) -> str:
    """Return a line for each call: its time in both checkouts, and their ratio."""
    width = max(map(len, here))
    lines = [f"{'':{width}}  {'here':>9}  {'other':>9}  here / other"]
    for name, seconds in here.items():
        times = f"{seconds * 1e3:6.3f} ms  {other[name] * 1e3:6.3f} ms"
        lines.append(f"{name:{width}}  {times}  {seconds / other[name]:.3f}")
    return "\n".join(lines)

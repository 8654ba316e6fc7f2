"""Check that the benchmarks' rivals compute equal results, and that their helpers are correct."""

from __future__ import annotations

from functools import partial
from itertools import groupby

import torch

from mrope import MRopeSpec
from mrope.bench.harness import interleaved_medians, one_thread
from mrope.bench.step import Measured, step_table
from mrope.bench.trace import covered_length
from mrope.spec.spec import example_config

SPEC = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")


def test_busy_time_counts_overlaps_once() -> None:
    assert covered_length([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


def test_medians_are_per_call_and_every_function_runs_in_each_round() -> None:
    calls: list[str] = []
    contenders = {name: partial(calls.append, name) for name in ("one", "other")}
    medians = interleaved_medians(contenders, repeats=3)
    assert list(medians) == ["one", "other"] and all(value > 0 for value in medians.values())
    order = [name for name, _ in groupby(calls)]
    # The first call of each sizes its turns; then three interleaved rounds.
    assert order == ["one", "other"] * 4


def test_one_thread_is_restored() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_the_table_of_steps_reads_what_is_measured() -> None:
    measured = Measured(host=[1, 2, 3], step=[4, 5, 6], stage=[0, 1, 2], syncs=7)
    measured.device = {"gpu_idle_share": 0.5, "gpu_busy_ms": 9.0}
    table = step_table("name", {"plain": measured.summary()})
    cells = [next(iter(column.cells)) for column in table.columns]
    timings = ["2000.0 (1000.0 to 3000.0)", "5000.0", "1.000", "20.0 %", "50.0 %", "9.0"]
    assert cells == ["plain", "7", *timings]


def test_sites_of_a_report_carry_no_folder_of_the_machine() -> None:
    measured = Measured(host=[1, 2], step=[1, 2], stage=[1, 2])
    measured.sites = "/home/me/.venv/lib/site-packages/torch/x.py:3 f: tolist\n4 waits at 1 sites"
    assert measured.summary()["sites"] == [
        "site-packages/torch/x.py:3 f: tolist",
        "4 waits at 1 sites",
    ]

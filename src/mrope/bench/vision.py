"""How fast are the vision tensors? `mrope.towers.vision` against `transformers.vision_utils`.

The ceiling is `np.copyto` of the finished arrays: nothing that writes them can take less. "cold" is
a call after `clear_cache()`: every distinct size of the batch is computed, as in a worker's first
batch. "warm" is a call that remembers them, as in every later batch whose sizes were met before.
Every figure is a median on one thread, and every function has its turn in each repeat.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from mrope.bench.conditions import conditions
from mrope.bench.timing import interleaved_medians, one_thread
from mrope.errors import MRopeError
from mrope.towers import frame_cache, vision

Arrays = tuple[npt.NDArray[Any], ...]

_CROPS = 500
# Defaults of transformers' config classes: 2 x 2 patches to a token; Qwen2.5-VL's windows of 112
# pixels and patches of 14; Qwen3-VL's table of 48 x 48 positions.
_MERGE, _WINDOW_PIXELS, _PATCH_PIXELS, _TABLE_SIDE = 2, 112, 14, 48


@dataclass(frozen=True)
class Case:
    """500 crops whose height and width in patches are even and lie between two bounds."""

    shortest: int
    longest: int

    @property
    def name(self) -> str:
        """What the table calls the case."""
        return f"{_CROPS} crops, {self.shortest} to {self.longest} patches a side"


@dataclass(frozen=True)
class Question:
    """A tensor, or a pair of them, that both sides compute; `target` is the speed-up aimed at."""

    name: str
    target: float
    ours: Callable[[npt.NDArray[np.int64]], Arrays]
    theirs: Callable[[torch.Tensor], Any]


CASES = (Case(4, 16), Case(8, 24), Case(16, 40))


def run(repeats: int, quick: bool, json_file: Path | None, plot_file: Path | None) -> None:
    """Measure every case, print one table, and write it as JSON and as a plot where asked.

    Args:
        repeats: turns of each function, at least 1; 15 or more for figures to keep.
        quick: the first case only, to try the command.

    Raises:
        MRopeError: transformers, or the functions to compare with, are not installed.
    """
    questions = _questions()
    report: dict[str, Any] = {"conditions": conditions(), "repeats": repeats}
    with one_thread():
        report["cases"] = [
            _measure(case, questions, repeats) for case in (CASES[:1] if quick else CASES)
        ]
    _print(report)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if plot_file is not None:
        _plot(report, plot_file)


def make_grids(case: Case) -> npt.NDArray[np.int64]:
    """Return the grids of `case`, (500, 3), the same each time."""
    rng = np.random.default_rng(0)
    grid_thw = np.ones((_CROPS, 3), np.int64)
    low, high = case.shortest // _MERGE, case.longest // _MERGE
    grid_thw[:, 1:] = _MERGE * rng.integers(low, high, (_CROPS, 2), endpoint=True)
    return grid_thw


def _questions() -> tuple[Question, ...]:
    try:
        from transformers.vision_utils import (
            get_vision_interpolation_indices_and_weights,
            get_vision_position_ids,
            get_vision_window_index,
        )
    except ImportError as error:
        raise MRopeError(
            f"this benchmark compares with transformers 5.15 or later: {error}"
        ) from error
    side = _WINDOW_PIXELS // _MERGE // _PATCH_PIXELS
    return (
        Question(
            "rotary ids",
            15,
            lambda grid: (vision.patch_positions(grid, _MERGE),),
            lambda grid: (get_vision_position_ids(grid, _MERGE),),
        ),
        Question(
            "window index",
            15,
            lambda grid: vision.window_order(grid, _MERGE, side),
            lambda grid: get_vision_window_index(grid, _MERGE, _WINDOW_PIXELS, _PATCH_PIXELS),
        ),
        Question(
            "interpolation",
            5,
            lambda grid: vision.table_taps(grid, _MERGE, _TABLE_SIDE),
            lambda grid: get_vision_interpolation_indices_and_weights(
                grid, _TABLE_SIDE, "bilinear", align_corners=True, spatial_merge_size=_MERGE
            ),
        ),
    )


def _measure(case: Case, questions: tuple[Question, ...], repeats: int) -> dict[str, Any]:
    grid_thw = make_grids(case)
    return {
        "name": case.name,
        "patches": int(grid_thw.prod(axis=1).sum()),
        "distinct": len(np.unique(grid_thw, axis=0)),
        "tensors": [_answer(question, grid_thw, repeats) for question in questions],
    }


def _answer(question: Question, grid_thw: npt.NDArray[np.int64], repeats: int) -> dict[str, Any]:
    tensor = torch.from_numpy(grid_thw)
    expected = question.ours(grid_thw)
    for theirs, ours in zip(question.theirs(tensor), expected, strict=True):
        np.testing.assert_array_equal(theirs.numpy(), ours, strict=True)
    targets = [np.empty_like(array) for array in expected]

    def cold() -> None:
        frame_cache.clear_cache()
        question.ours(grid_thw)

    def ceiling() -> None:
        for target, array in zip(targets, expected, strict=True):
            np.copyto(target, array)

    seconds = interleaved_medians(
        {
            "transformers": lambda: question.theirs(tensor),
            "cold": cold,
            "warm": lambda: question.ours(grid_thw),
            "ceiling": ceiling,
        },
        repeats,
    )
    return {
        "name": question.name,
        "target": question.target,
        "seconds": seconds,
        "cold_speedup": seconds["transformers"] / seconds["cold"],
        "warm_speedup": seconds["transformers"] / seconds["warm"],
    }


def _print(report: Mapping[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table(title="vision tensors: median time of a call, one thread")
    table.add_column("case")
    table.add_column("tensor")
    for heading in ("transformers", "cold", "warm", "ceiling", "cold speed-up", "warm", "target"):
        table.add_column(heading, justify="right")
    for case in report["cases"]:
        title = f"{case['name']}\n{case['patches']:,} patches, {case['distinct']} distinct sizes"
        for entry in case["tensors"]:
            table.add_row(title, *_cells(entry))
            title = ""
        table.add_section()
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in report["conditions"].items()))


def _cells(entry: Mapping[str, Any]) -> list[str]:
    times = (entry["seconds"][name] for name in ("transformers", "cold", "warm", "ceiling"))
    return [
        entry["name"],
        *(f"{seconds * 1e6:,.0f} µs" for seconds in times),
        f"{entry['cold_speedup']:.1f}",
        f"{entry['warm_speedup']:.1f}",
        f">= {entry['target']}",
    ]


def _plot(report: Mapping[str, Any], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    cases = report["cases"]
    names = [entry["name"] for entry in cases[0]["tensors"]]
    figure, axes = plt.subplots(1, len(names), figsize=(13, 3.5), sharey=True, layout="constrained")
    rows = np.arange(len(cases))
    for index, (axis, name) in enumerate(zip(axes, names, strict=True)):
        entries = [case["tensors"][index] for case in cases]
        for shift, kind in ((-0.2, "cold"), (0.2, "warm")):
            axis.barh(
                rows + shift, [entry[f"{kind}_speedup"] for entry in entries], 0.36, label=kind
            )
        axis.axvline(entries[0]["target"], color="black", linestyle="--", label="target")
        axis.set(title=name, xlabel="times faster than transformers")
    axes[0].set_yticks(rows, [case["name"] for case in cases])
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    figure.savefig(file, dpi=120)
    plt.close(figure)

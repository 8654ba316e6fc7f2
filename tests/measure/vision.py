"""Time the vision tensors against `transformers.vision_utils`: `python -m measure vision`.

The ceiling is `np.copyto` of the finished arrays: a function that writes them cannot take less.
"cold" clears the cache of frame sizes before each call, as in a worker's first batch; "warm" finds
every size in it, as in later batches of the same sizes. Medians on one thread, interleaved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from measure.rivals import vision_functions
from mrope.bench.harness import (
    conditions,
    figure_file,
    interleaved_medians,
    make_console,
    make_table,
    microseconds,
    one_line,
    one_thread,
    write_json,
)
from mrope.towers import frame_cache, vision

Arrays = tuple[npt.NDArray[Any], ...]

_CROPS = 500
# Defaults of transformers' config classes: 2 x 2 patches to a token; Qwen2.5-VL's windows of 112
# pixels and patches of 14; Qwen3-VL's table of 48 x 48 positions.
_MERGE, _WINDOW_PIXELS, _PATCH_PIXELS, _TABLE_SIDE = 2, 112, 14, 48


def arrays_of(tensors: Mapping[str, Any]) -> tuple[npt.NDArray[Any], ...]:
    """Return the arrays among the tensors of a product."""
    return tuple(value for value in tensors.values() if isinstance(value, np.ndarray))


@dataclass(frozen=True)
class Case:
    """500 crops with even heights and widths in patches, drawn from `shortest` to `longest`."""

    shortest: int
    longest: int

    @property
    def name(self) -> str:
        """Name of the case in the table."""
        return f"{_CROPS} crops, {self.shortest} to {self.longest} patches a side"


@dataclass(frozen=True)
class Question:
    """One or two tensors that both sides compute, and the speed-up that is the target."""

    name: str
    target: float
    ours: Callable[[npt.NDArray[np.int64]], Arrays]
    theirs: Callable[[torch.Tensor], Any]


CASES = (Case(4, 16), Case(8, 24), Case(16, 40))


def bench_vision(repeats: int, quick: bool, json_file: Path | None, plot_file: Path | None) -> None:
    """Measure every case, print a table, and write JSON and a picture if files are given.

    Args:
        repeats: interleaved rounds, at least 1; published figures take 15 or more.
        quick: measure the first case only.

    Raises:
        MRopeError: transformers is older than 5.15 or not installed.
    """
    questions = _questions()
    report: dict[str, Any] = {"conditions": conditions(), "repeats": repeats}
    with one_thread():
        report["cases"] = [
            _measure(case, questions, repeats) for case in (CASES[:1] if quick else CASES)
        ]
    _print(report)
    write_json(report, json_file)
    if plot_file is not None:
        _plot(report, plot_file)


def make_grids(case: Case) -> npt.NDArray[np.int64]:
    """Return the grids of `case`, (500, 3) int64, with a fixed seed."""
    rng = np.random.default_rng(0)
    grid_thw = np.ones((_CROPS, 3), np.int64)
    # Drawn in tokens and scaled to patches: a grid must be a multiple of the merge size.
    low, high = case.shortest // _MERGE, case.longest // _MERGE
    grid_thw[:, 1:] = _MERGE * rng.integers(low, high, (_CROPS, 2), endpoint=True)
    return grid_thw


def _questions() -> tuple[Question, ...]:
    rotary_ids, window_index, interpolation = vision_functions()
    side = _WINDOW_PIXELS // _MERGE // _PATCH_PIXELS
    return (
        Question(
            "rotary ids",
            15,
            lambda grid: arrays_of(vision.patch_positions(vision.to_frames(grid, _MERGE), _MERGE)),
            lambda grid: (rotary_ids(grid, _MERGE),),
        ),
        Question(
            "window index",
            15,
            lambda grid: arrays_of(
                vision.window_order(vision.to_frames(grid, _MERGE), _MERGE, side)
            ),
            lambda grid: window_index(grid, _MERGE, _WINDOW_PIXELS, _PATCH_PIXELS),
        ),
        Question(
            "interpolation",
            5,
            lambda grid: arrays_of(
                vision.table_taps(vision.to_frames(grid, _MERGE), _MERGE, _TABLE_SIDE)
            ),
            lambda grid: interpolation(
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
    # Made before the clock starts: the ceiling copies into memory that is already mapped.
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
    times = ("transformers", "cold", "warm", "ceiling")
    title = "vision tensors: median time of a call, one thread"
    table = make_table(title, ("case", "tensor"), (*times, "cold speed-up", "warm", "target"))
    for case in report["cases"]:
        title = f"{case['name']}\n{case['patches']:,} patches, {case['distinct']} distinct sizes"
        for entry in case["tensors"]:
            table.add_row(title, *_cells(entry))
            title = ""
        table.add_section()
    console = make_console()
    console.print(table)
    console.print(one_line(report["conditions"]))


def _cells(entry: Mapping[str, Any]) -> list[str]:
    times = (entry["seconds"][name] for name in ("transformers", "cold", "warm", "ceiling"))
    return [
        entry["name"],
        *map(microseconds, times),
        f"{entry['cold_speedup']:.1f}",
        f"{entry['warm_speedup']:.1f}",
        f">= {entry['target']}",
    ]


def _plot(report: Mapping[str, Any], file: Path) -> None:
    cases = report["cases"]
    names = [entry["name"] for entry in cases[0]["tensors"]]
    rows = np.arange(len(cases))
    with figure_file(file, (13, 3.5), 1, len(names), sharey=True) as (figure, axes):
        for index, (axis, name) in enumerate(zip(axes, names, strict=True)):
            entries = [case["tensors"][index] for case in cases]
            for shift, kind in ((-0.2, "cold"), (0.2, "warm")):
                speedups = [entry[f"{kind}_speedup"] for entry in entries]
                axis.barh(rows + shift, speedups, 0.36, label=kind)
            axis.axvline(entries[0]["target"], color="black", linestyle="--", label="target")
            axis.set(title=name, xlabel="times faster than transformers")
        axes[0].set_yticks(rows, [case["name"] for case in cases])
        axes[0].invert_yaxis()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=3)

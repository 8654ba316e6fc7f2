"""How fast are the positions? The kernel against transformers, a loop over spans, and the ceiling.

The ceiling is `np.copyto` of one int64 (3, B, S) array: no kernel that writes its output can take
less. Every figure is a median on one thread: in each repeat every function has its turn, in which
it
is called as often as fits into a few milliseconds, so that all of them meet warm caches.
"""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mrope.bench.conditions import conditions
from mrope.bench.per_span import per_span_rope_index
from mrope.bench.timing import interleaved_medians, one_thread
from mrope.positions.rope_index import rope_index
from mrope.positions.spans import token_types
from mrope.spec.spec import MRopeSpec, example_config

_TEXT_ID = 7


@dataclass(frozen=True)
class Case:
    """A batch to measure: counts are per row, and a frame of a clip is a span of its own."""

    name: str
    rows: int
    width: int
    images: int
    videos: int = 0
    frames: int = 1

    @property
    def spans(self) -> int:
        """Vision spans of the whole batch."""
        return self.rows * (self.images + self.videos * self.frames)


CASES = (
    Case("B=2 S=4k, 8 images + 2 videos", 2, 4096, 4, 1, 4),
    Case("B=4 S=8k, 16 images + 4 videos", 4, 8192, 4, 1, 4),
    Case("B=1 S=16k, 8 videos of 16 frames", 1, 16384, 0, 8, 16),
    Case("B=1 S=128k, one video of 768 frames", 1, 131072, 0, 1, 768),
    Case("B=8 S=32k, 16 images + 16 videos of 32", 8, 32768, 2, 2, 32),
)
SWEEP = tuple(Case(f"{spans} images", 1, 65536, spans) for spans in (16, 64, 256, 1024, 2048))


def run(repeats: int, quick: bool, json_file: Path | None, plot_file: Path | None) -> None:
    """Measure every case, print one table, and write it as JSON and as a plot where asked.

    Args:
        repeats: turns of each function, at least 1; 15 or more for figures to keep.
        quick: leave out the two largest cases and most of the sweep, to try the command.
    """
    report: dict[str, Any] = {"conditions": conditions(), "repeats": repeats}
    with one_thread():
        cases = CASES[:3] if quick else CASES
        sweep = SWEEP[::4] if quick else SWEEP
        report["cases"] = [_measure(case, repeats) for case in cases]
        report["sweep"] = [_measure(case, repeats) for case in sweep]
    _print(report)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if plot_file is not None:
        _plot(report, plot_file)


def make_batch(case: Case, spec: MRopeSpec) -> dict[str, Any]:
    """Return a batch of `case` without padding: spans, each behind a marker, then text to the end.

    Four fifths of a row are vision, in frames that are as square as they fit.
    """
    per_row = case.images + case.videos * case.frames
    tokens = case.width * 4 // 5 // per_row
    height = int(tokens**0.5)
    wide = tokens // height
    row = np.full(case.width, _TEXT_ID, np.int64)
    kinds = [spec.image_token_id] * case.images + [spec.video_token_id] * case.videos * case.frames
    step = (case.width - 1) // per_row
    for span, token in enumerate(kinds):
        start = 1 + span * step
        row[start - 1] = spec.vision_start_token_id
        row[start : start + height * wide] = token
    size = np.array([1, height, wide]) * [1, spec.spatial_merge_size, spec.spatial_merge_size]
    input_ids = np.tile(row, (case.rows, 1))
    return {
        "input_ids": input_ids,
        "attention_mask": np.ones_like(input_ids),
        "image_grid_thw": np.tile(size, (case.rows * case.images, 1)),
        "video_grid_thw": np.tile(size * [case.frames, 1, 1], (case.rows * case.videos, 1)),
    }


def _measure(case: Case, repeats: int) -> dict[str, Any]:
    spec = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
    batch = make_batch(case, spec)
    contenders: dict[str, Callable[[], Any]] = {}
    peer = _transformers(spec, batch)
    if peer is not None:
        contenders["transformers"] = peer
    contenders["loop"] = lambda: per_span_rope_index(spec, **batch)
    contenders["kernel"] = lambda: rope_index(spec, **batch)
    expected = contenders["kernel"]()
    for function in contenders.values():
        for theirs, ours in zip(function(), expected, strict=True):
            np.testing.assert_array_equal(theirs, ours)
    source, target = np.zeros_like(expected[0]), np.empty_like(expected[0])
    contenders["ceiling"] = lambda: np.copyto(target, source)
    medians = interleaved_medians(contenders, repeats)
    return {
        "name": case.name,
        "rows": case.rows,
        "width": case.width,
        "spans": case.spans,
        "seconds": medians,
        "loop_over_kernel": medians["loop"] / medians["kernel"],
        "kernel_over_ceiling": medians["kernel"] / medians["ceiling"],
        "peak_extra_over_output": _peak_extra_bytes(contenders["kernel"]) / expected[0].nbytes,
    }


def _transformers(spec: MRopeSpec, batch: Mapping[str, Any]) -> Callable[[], Any] | None:
    """Return a call of the installed transformers' function on tensors, or None without it."""
    try:
        from mrope.hf.get_rope_index import installed_reference, reference_rope_index
    except ImportError:
        return None
    if installed_reference() == "transformers-4.57":
        return lambda: reference_rope_index(spec, batch)
    types = token_types(spec, batch["input_ids"])
    return lambda: reference_rope_index(spec, {**batch, "mm_token_type_ids": types})


def _peak_extra_bytes(kernel: Callable[[], Any]) -> int:
    """Return the most bytes that a call holds beyond what it is given and what it returns."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        outputs = kernel()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    extra: int = peak - before - sum(array.nbytes for array in outputs)
    return extra


def _print(report: Mapping[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table(title="positions: median time of a call, one thread")
    for heading in ("case", "spans", "transformers", "per-span loop", "kernel", "ceiling"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for heading in ("loop / kernel", "kernel / ceiling", "extra memory / output"):
        table.add_column(heading, justify="right")
    for section in ("cases", "sweep"):
        for entry in report[section]:
            table.add_row(*_cells(entry))
        table.add_section()
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in report["conditions"].items()))
    times = [entry["seconds"]["kernel"] for entry in report["sweep"]]
    spans = [entry["spans"] for entry in report["sweep"]]
    console.print(
        f"sweep at S=64k: {spans[-1]} spans take {times[-1] / times[0]:.2f} times "
        f"the time of {spans[0]}"
    )


def _cells(entry: Mapping[str, Any]) -> list[str]:
    seconds = entry["seconds"]
    times = [seconds.get(name) for name in ("transformers", "loop", "kernel", "ceiling")]
    return [
        entry["name"],
        str(entry["spans"]),
        *("-" if value is None else f"{value * 1e6:,.0f} µs" for value in times),
        f"{entry['loop_over_kernel']:.1f}",
        f"{entry['kernel_over_ceiling']:.1f}",
        f"{entry['peak_extra_over_output']:.2f}",
    ]


def _plot(report: Mapping[str, Any], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    cases = report["cases"]
    names = [name for name in ("transformers", "loop", "kernel") if name in cases[0]["seconds"]]
    for index, name in enumerate(names):
        ratios = [entry["seconds"][name] / entry["seconds"]["ceiling"] for entry in cases]
        rows = np.arange(len(cases)) + (index - 1) * 0.28
        left.barh(rows, ratios, 0.26, label=name)
    left.set_yticks(np.arange(len(cases)), [entry["name"] for entry in cases])
    left.invert_yaxis()
    left.set(xscale="log", xlabel="times the ceiling (np.copyto of the output)")
    left.legend()
    sweep = report["sweep"]
    for name in names:
        times = [entry["seconds"][name] * 1e3 for entry in sweep]
        right.plot([entry["spans"] for entry in sweep], times, marker="o", label=name)
    right.set(xscale="log", yscale="log", xlabel="spans in B=1 S=64k", ylabel="milliseconds")
    right.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)

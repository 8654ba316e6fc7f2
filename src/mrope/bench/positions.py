"""Time position ids against transformers: `mrope bench positions`.

The ceiling is `np.copyto` of one int64 (3, B, S) array: a kernel that writes its output cannot take
less. Medians on one thread, interleaved, with warm caches.
"""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

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
from mrope.columns import Columns, NewColumns
from mrope.positions.rope_index import rope_index
from mrope.positions.sample_rows import Medium, Part, make_row
from mrope.positions.spans import token_types
from mrope.spec.spec import MRopeSpec, example_config

_TEXT_ID = 7
Rival = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """A batch to measure: counts are per row, and each frame of a video is a span of its own."""

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


def bench_positions(
    repeats: int,
    quick: bool,
    json_file: Path | None,
    plot_file: Path | None,
    rivals: Mapping[str, Rival] | None = None,
) -> None:
    """Measure every case, print a table, and write JSON and a picture if files are given.

    Args:
        repeats: interleaved rounds, at least 1; published figures take 15 or more.
        quick: skip the two largest cases and most of the sweep.
        rivals: other functions with the arguments and the results of `rope_index`, by name.
    """
    report: NewColumns = {"conditions": conditions(), "repeats": repeats}
    with one_thread():
        cases = CASES[:3] if quick else CASES
        sweep = SWEEP[::4] if quick else SWEEP
        report["cases"] = [_measure(case, repeats, rivals or {}) for case in cases]
        report["sweep"] = [_measure(case, repeats, rivals or {}) for case in sweep]
    _print(report)
    write_json(report, json_file)
    if plot_file is not None:
        _plot(report, plot_file)


def make_batch(case: Case, spec: MRopeSpec) -> NewColumns:
    """Return a batch of `case` without padding: spans, each after a start token, then text.

    About four fifths of a row are vision tokens, in frames that are nearly square.
    """
    per_row = case.images + case.videos * case.frames
    tokens = case.width * 4 // 5 // per_row
    height = int(tokens**0.5)
    wide = tokens // height
    # Spans stand at equal distances; the text between them is what is left of each step.
    gap = [_TEXT_ID] * ((case.width - 1) // per_row - height * wide - 1)
    size = height * spec.spatial_merge_size, wide * spec.spatial_merge_size
    media = [Medium("image", (1, *size))] * case.images
    media += [Medium("video", (case.frames, *size), gap.copy)] * case.videos
    parts: list[Part] = [part for medium in media for part in (medium, gap)]
    row = make_row(spec, parts)
    tail = np.full(case.width - len(row["input_ids"]), _TEXT_ID)
    input_ids = np.tile(np.concatenate([row["input_ids"], tail]), (case.rows, 1))
    nothing = np.empty((0, 3), np.int64)
    return {
        "input_ids": input_ids,
        "attention_mask": np.ones_like(input_ids),
        **{
            name: np.tile(row.get(name, nothing), (case.rows, 1))
            for name in ("image_grid_thw", "video_grid_thw")
        },
    }


def _measure(case: Case, repeats: int, rivals: Mapping[str, Rival]) -> NewColumns:
    spec = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
    batch = make_batch(case, spec)
    contenders: dict[str, Callable[[], Any]] = {}
    # A processor makes the token types, so that computing them is not part of the rival's time.
    typed = batch | {"mm_token_type_ids": token_types(spec, batch["input_ids"])}
    with contextlib.suppress(ImportError):
        from mrope.hf.get_rope_index import reference_rope_index

        contenders["transformers"] = partial(reference_rope_index, spec, typed)
    for name, rival in rivals.items():
        contenders[name] = partial(rival, spec, **batch)
    contenders["kernel"] = partial(rope_index, spec, **batch)
    expected = contenders["kernel"]()
    # A faster function with other results would be no rival.
    for function in contenders.values():
        for theirs, ours in zip(function(), expected, strict=True):
            np.testing.assert_array_equal(theirs, ours)
    # Made before the clock starts, so that the ceiling has no page faults of a fresh allocation.
    source, target = np.zeros_like(expected[0]), np.empty_like(expected[0])
    contenders["ceiling"] = lambda: np.copyto(target, source)
    medians = interleaved_medians(contenders, repeats)
    return {
        "name": case.name,
        "rows": case.rows,
        "width": case.width,
        "spans": case.spans,
        "seconds": medians,
        "times_the_kernel": {name: medians[name] / medians["kernel"] for name in rivals},
        "kernel_over_ceiling": medians["kernel"] / medians["ceiling"],
        "peak_extra_over_output": _peak_extra_bytes(contenders["kernel"]) / expected[0].nbytes,
    }


def _peak_extra_bytes(kernel: Callable[[], Any]) -> int:
    """Return the peak of bytes allocated during a call, without its inputs and outputs."""
    tracemalloc.start()
    try:
        # numpy reports its buffers to tracemalloc, so that temporaries of the kernel are counted.
        before, _ = tracemalloc.get_traced_memory()
        outputs = kernel()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    extra: int = peak - before - sum(array.nbytes for array in outputs)
    return extra


def _print(report: Columns) -> None:
    rivals = list(report["cases"][0]["times_the_kernel"])
    times = ("transformers", *rivals, "kernel", "ceiling")
    ratios = [*(f"{name} / kernel" for name in rivals), "kernel / ceiling", "extra memory / output"]
    title = "positions: median time of a call, one thread"
    table = make_table(title, ("case",), ("spans", *times, *ratios))
    for section in ("cases", "sweep"):
        for entry in report[section]:
            table.add_row(*_cells(entry))
        table.add_section()
    console = make_console()
    console.print(table)
    console.print(one_line(report["conditions"]))
    seconds = [entry["seconds"]["kernel"] for entry in report["sweep"]]
    spans = [entry["spans"] for entry in report["sweep"]]
    console.print(
        f"sweep at S=64k: {spans[-1]} spans take {seconds[-1] / seconds[0]:.2f} times "
        f"the time of {spans[0]}"
    )


def _cells(entry: Columns) -> list[str]:
    rivals, seconds = entry["times_the_kernel"], entry["seconds"]
    times = [seconds.get(name) for name in ("transformers", *rivals, "kernel", "ceiling")]
    return [
        entry["name"],
        str(entry["spans"]),
        *map(microseconds, times),
        *(f"{ratio:.1f}" for ratio in rivals.values()),
        f"{entry['kernel_over_ceiling']:.1f}",
        f"{entry['peak_extra_over_output']:.2f}",
    ]


def _plot(report: Columns, file: Path) -> None:
    cases, sweep = report["cases"], report["sweep"]
    names = [name for name in cases[0]["seconds"] if name != "ceiling"]
    with figure_file(file, (13, 4.5), 1, 2) as (_, (left, right)):
        for index, name in enumerate(names):
            ratios = [entry["seconds"][name] / entry["seconds"]["ceiling"] for entry in cases]
            rows = np.arange(len(cases)) + (index - 1) * 0.28
            left.barh(rows, ratios, 0.26, label=name)
        left.set_yticks(np.arange(len(cases)), [entry["name"] for entry in cases])
        left.invert_yaxis()
        left.set(xscale="log", xlabel="times the ceiling (np.copyto of the output)")
        left.legend()
        for name in names:
            times = [entry["seconds"][name] * 1e3 for entry in sweep]
            right.plot([entry["spans"] for entry in sweep], times, marker="o", label=name)
        right.set(xscale="log", yscale="log", xlabel="spans in B=1 S=64k", ylabel="milliseconds")
        right.legend()

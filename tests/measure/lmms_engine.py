"""Measure the three cases of lmms-engine's pull request 184: positions before it, after it, and with the stage.

    PYTHONPATH=src:tests python -m measure.lmms_engine outputs/lmms-engine.json [--wheels .whl/peers]
    PYTHONPATH=src:tests python -m measure.lmms_engine outputs/small.json --small

"before" is transformers 4.57.6's `get_rope_index`, of which lmms-engine's function was a copy until that
pull request; "installed" is that of the installed transformers; "after" is lmms-engine 0.1.4's own
function; "stage" is what the collator leaves to the training process: non-blocking copies of
`position_ids` and `rope_deltas` from pinned memory. The inputs of the first three are on the device, as
in a forward. The functions are read from wheels, which are not installed:

    pip download --no-deps -d .whl/peers lmms-engine==0.1.4 transformers==4.57.6

For each: milliseconds until the call returns ("host"), and until the device has finished too ("synced"),
medians of calls in turn, the device idle before each; syncs of one call, by CUDA's own debug mode, on a
CPU by `SyncGuard`. Results must be equal, those of "installed" at valid tokens. In a step the device is not idle: then every sync waits for the
kernels queued before it, which is not measured here.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console

from mrope import MRopeCollator, MRopeSpec
from mrope.bench.harness import conditions, make_table, write_json
from mrope.guard import SyncGuard
from mrope.guard.cuda_debug import reporting
from mrope.hf.get_rope_index import reference_class
from mrope.positions.sample_rows import Medium, Part, make_row
from mrope.spec import example_config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAMILY, RULE = "qwen3_vl", "transformers-4.57"
WARM_UP, REPEATS = 5, 60
CONFIG = example_config(FAMILY)
IMAGE, VIDEO = (CONFIG[f"{name}_token_id"] for name in ("image", "video"))
# Text in front of a frame: its time.
STAMP = 6

Rope = Callable[[], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """A batch of the pull request's table; images and clips count for the batch, frames for a clip."""

    batch: int
    tokens: int
    images: int
    clips: int
    frames: int
    # Milliseconds on an RTX A6000, from the pull request.
    published: tuple[float, float] | None = None

    def __str__(self) -> str:
        media = [f"{self.images} images"] * (self.images > 0)
        media.append(f"{self.clips} clips of {self.frames} frames")
        return f"B={self.batch} S={self.tokens}, {' + '.join(media)}"


# The pull request gives the frames of the third case only.
CASES = (
    Case(2, 4096, 8, 2, 8, (7.9, 1.3)),
    Case(4, 8192, 16, 4, 16, (30.0, 3.7)),
    Case(1, 16384, 0, 8, 16, (42.4, 3.0)),
)
SMALL = (Case(2, 768, 4, 2, 4), Case(1, 1024, 0, 2, 6))


# Batches ------------------------------------------------------------------------------------------


def make_examples(case: Case) -> list[dict[str, Any]]:
    """Return one example for each row; every other row is an eighth shorter, and padded."""
    draws = np.random.default_rng(0)
    rows = []
    for row in range(case.batch):
        share = slice(row, None, case.batch)
        scale = 1 if case.tokens < 4096 else 2
        images = [draws.integers(4, 9, 2) * 2 * scale for _ in range(case.images)][share]
        clips = [draws.integers(3, 5, 2) * 2 * scale for _ in range(case.clips)][share]
        length = case.tokens - (case.tokens // 8) * (row % 2)
        rows.append(make_example(images, clips, case.frames, length, draws))
    return rows


def make_example(
    images: Any, clips: Any, frames: int, length: int, draws: np.random.Generator
) -> dict[str, Any]:
    """Return a row whose media stand among text of random lengths."""
    sizes = [(1, *size) for size in images] + [(frames, *size) for size in clips]
    # A start marker and, in clips, a stamp in front of each frame.
    taken = sum(one * (int(h * w) // 4 + 1) for one, h, w in sizes) + STAMP * frames * len(clips)
    count = len(images) + frames * len(clips)
    text = length - taken
    assert text > 0, "the media do not fit into the row"
    cuts = iter(np.diff(np.sort(draws.integers(0, text + 1, count)), prepend=0, append=text))

    def words(stamp: int) -> list[int]:
        ids: list[int] = draws.integers(200, 999, int(next(cuts)) + stamp).tolist()
        return ids

    parts: list[Part] = []
    for size in images:
        parts += [words(0), Medium("image", (1, *size.tolist()))]
    for size in clips:
        parts += [words(STAMP), Medium("video", (frames, *size.tolist()), lambda: words(STAMP))]
    spec = MRopeSpec.from_config(CONFIG, RULE)
    return dict(make_row(spec, [*parts, words(0)]))


# Functions ----------------------------------------------------------------------------------------


def read_function(wheels: Path, wheel: str, file: str, name: str) -> Callable[..., Any]:
    """Return one function of a module in a wheel, compiled without the rest of the module."""
    found = sorted(wheels.glob(wheel))
    if not found:
        raise SystemExit(f"no {wheel} in {wheels}: see the head of this file")
    with zipfile.ZipFile(found[-1]) as archive:
        tree = ast.parse(archive.read(file))
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    module = ast.Module([next(node for node in functions if node.name == name)], [])
    # Annotations name classes that are not imported here.
    flags = annotations.compiler_flag
    scope: dict[str, Any] = {"torch": torch, "np": np}
    exec(compile(module, file, "exec", flags=flags), scope)
    made: Callable[..., Any] = scope[name]
    return made


def make_calls(batch: dict[str, Any], wheels: Path) -> dict[str, tuple[str, Rope]]:
    """Return what is measured, by name: its source, and a call on the batch."""
    holder = make_holder()
    names = ("input_ids", "attention_mask", "image_grid_thw", "video_grid_thw")
    inputs = {name: batch[name].to(DEVICE) for name in names if name in batch}
    before = read_function(
        wheels,
        "transformers-4.57.6-*.whl",
        "transformers/models/qwen3_vl/modeling_qwen3_vl.py",
        "get_rope_index",
    )
    after = read_function(
        wheels,
        "lmms_engine-0.1.4-*.whl",
        "lmms_engine/models/common_ops/rope.py",
        "qwen3_vl_get_rope_index",
    )
    kinds = (inputs["input_ids"] == IMAGE).int() + 2 * (inputs["input_ids"] == VIDEO).int()
    installed = reference_class(FAMILY).get_rope_index
    added = [batch[name] for name in ("position_ids", "rope_deltas")]
    if DEVICE.type == "cuda":
        added = [tensor.pin_memory() for tensor in added]

    def stage() -> tuple[torch.Tensor, torch.Tensor]:
        position_ids, rope_deltas = (one.to(DEVICE, non_blocking=True) for one in added)
        return position_ids, rope_deltas

    return {
        "before": ("transformers 4.57.6", lambda: before(holder, **inputs)),
        "installed": (
            f"transformers {conditions()['transformers']}",
            lambda: installed(holder, mm_token_type_ids=kinds, **inputs),
        ),
        "after": ("lmms-engine 0.1.4", lambda: after(holder, **inputs)),
        "stage": ("copies of position_ids and rope_deltas", stage),
    }


def make_holder() -> Any:
    """Return what the functions read of a model: its config, and a method that one calls."""
    values = {name: value for name, value in CONFIG.items() if name.endswith("_id")}
    vision = SimpleNamespace(**CONFIG["vision_config"])
    config = SimpleNamespace(**values, vision_config=vision)
    holder = SimpleNamespace(config=config)
    own = reference_class(FAMILY)
    if hasattr(own, "get_vision_position_ids"):
        holder.get_vision_position_ids = own.get_vision_position_ids.__get__(holder)
    return holder


# Measuring ----------------------------------------------------------------------------------------


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def count_syncs(call: Rope) -> int:
    """Return the syncs of one call, by CUDA's debug mode, or by the guard on a CPU."""
    if DEVICE.type != "cuda":
        with SyncGuard() as guard:
            call()
        return guard.count
    found: list[str] = []
    wait()
    with reporting(lambda name, _: found.append(name), "warn"):
        call()
    return len(found)


def measure(calls: dict[str, Rope], repeats: int) -> dict[str, dict[str, float]]:
    """Return the medians of each call's times, in milliseconds; the calls take turns."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(WARM_UP + repeats):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            call()
            returned = time.perf_counter()
            wait()
            if turn >= WARM_UP:
                times[name].append((returned - start, time.perf_counter() - start))
    return {
        name: {
            kind: round(1000 * statistics.median(column), 4)
            for kind, column in zip(("host_ms", "synced_ms"), zip(*rows, strict=True), strict=True)
        }
        for name, rows in times.items()
    }


def equal(call: Rope, batch: dict[str, Any], everywhere: bool) -> bool:
    """Compare a call's results with the batch's.

    Args:
        everywhere: also at padding, and the rope deltas, in which releases differ on padded rows.
    """
    position_ids, rope_deltas = (found.cpu() for found in call())
    if everywhere:
        same = torch.equal(position_ids, batch["position_ids"])
        return same and torch.equal(rope_deltas, batch["rope_deltas"])
    valid = batch["attention_mask"].bool()
    return torch.equal(position_ids[:, valid], batch["position_ids"][:, valid])


def measure_case(case: Case, wheels: Path, repeats: int) -> dict[str, Any]:
    spec = MRopeSpec.from_config(CONFIG, RULE)
    batch = dict(MRopeCollator(None, spec)(make_examples(case)))
    calls = make_calls(batch, wheels)
    times = measure({name: call for name, (_, call) in calls.items()}, repeats)
    return {
        "case": str(case),
        **{name: getattr(case, name) for name in ("batch", "tokens", "images", "clips", "frames")},
        "spans": case.images + case.clips * case.frames,
        "published_a6000_ms": dict(zip(("before", "after"), case.published or (), strict=False)),
        "rows": {
            name: {
                "source": source,
                **times[name],
                "syncs": count_syncs(call),
                "equal": equal(call, batch, everywhere=name != "installed"),
            }
            for name, (source, call) in calls.items()
        },
    }


def print_table(cases: list[dict[str, Any]]) -> None:
    numbers = ("host ms", "synced ms", "syncs", "equal", "A6000 ms, published")
    table = make_table("position ids in the training process", ("case", "code"), numbers)
    for case in cases:
        for name, row in case["rows"].items():
            published = case["published_a6000_ms"].get(name, "")
            texts = (f"{row['host_ms']:.3f}", f"{row['synced_ms']:.3f}", f"{row['syncs']}")
            what = f"{name}: {row['source']}"
            table.add_row(case["case"], what, *texts, str(row["equal"]), str(published))
    Console(width=200).print(table)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("json", type=Path)
    parser.add_argument("--wheels", type=Path, default=Path(".whl/peers"))
    parser.add_argument("--small", action="store_true", help="small batches, few repeats")
    options = parser.parse_args()
    repeats = 5 if options.small else REPEATS
    cases = [
        measure_case(case, options.wheels, repeats) for case in (SMALL if options.small else CASES)
    ]
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    report = {"conditions": conditions() | {"device": device}, "repeats": repeats, "cases": cases}
    print_table(cases)
    write_json(report, options.json)
    return 0 if all(row["equal"] for case in cases for row in case["rows"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""How many rows a second `Precheck` checks on Ray Data, and `MRopeCollator` collates.

    PYTHONPATH=src:tests python tests/raydata/rates.py [--rows 80000] [--json FILE]

For a machine that runs nothing else. Rows are in Ray's object store before the clock starts. For
`Precheck` it runs from the start of the first batch to the end of the last one, so that the start of
workers is not counted. Ceilings: a function that returns its batch unchanged, and `PaddingCollator`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from mrope import MRopeCollator, MRopeSpec
from mrope.bench.harness import conditions, one_thread, write_json
from mrope.collate.padding import PaddingCollator
from mrope.prepare import Precheck
from mrope.prepare.ray import RayCollator
from mrope.spec.spec import example_config

SPEC = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
START, IMAGE = SPEC.vision_start_token_id, SPEC.image_token_id
REPEATS = 3
BLOCKS = 16
BATCH = 8


def table(rows: int) -> pa.Table:
    """Return rows of 300 to 600 text tokens and 2 to 4 images of 64 to 400 tokens each."""
    rng = np.random.default_rng(0)
    ids, grids = [], []
    for _ in range(rows):
        tokens: list[int] = []
        row_grids = []
        for _ in range(rng.integers(2, 5)):
            height, width = rng.integers(8, 21, 2).tolist()
            row_grids.append([1, 2 * height, 2 * width])
            tokens += [START, *[IMAGE] * (height * width), 99]
        ids.append([*tokens, *rng.integers(1, 50, rng.integers(300, 600)).tolist()])
        grids.append(row_grids or None)
    return pa.table({"input_ids": ids, "image_grid_thw": grids})


def unchanged(batch: Any) -> Any:
    return batch


class Timed:
    """Run a function on a batch, and add columns with the time before and after it."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, batch: Any) -> Any:
        began = time.time()
        result = self.function(batch)
        times = {"began": began, "ended": time.time()}
        if isinstance(result, pa.Table):
            for name, value in times.items():
                result = result.append_column(name, pa.array(np.full(len(result), value)))
            return result
        rows = len(result["input_ids"])
        return result | {name: np.full(rows, value) for name, value in times.items()}


def map_rate(dataset: Any, function: Callable[[Any], Any], form: str, pool: Any) -> float:
    """Return the rate of the fastest of several runs: other processes can only slow one down."""
    fastest = math.inf
    actors = isinstance(pool, ray.data.ActorPoolStrategy)
    timed: Any = Timed if actors else Timed(function)
    options = {"fn_constructor_args": (function,)} if actors else {}
    for _ in range(REPEATS):
        mapped = dataset.map_batches(timed, batch_format=form, compute=pool, **options)
        blocks = list(mapped.materialize().iter_batches(batch_format="pyarrow", batch_size=None))
        began = min(pc.min(block["began"]).as_py() for block in blocks)
        ended = max(pc.max(block["ended"]).as_py() for block in blocks)
        fastest = min(fastest, ended - began)
    return float(dataset.count() / fastest)


def measure_maps(dataset: Any) -> list[dict[str, Any]]:
    actors, tasks = ray.data.ActorPoolStrategy, ray.data.TaskPoolStrategy
    cases: tuple[tuple[str, Callable[[Any], Any], str, str, Any], ...] = (
        ("unchanged", unchanged, "pyarrow", "actors", actors),
        ("Precheck", Precheck(SPEC), "pyarrow", "actors", actors),
        ("Precheck", Precheck(SPEC), "pyarrow", "tasks", tasks),
        ("Precheck", Precheck(SPEC), "numpy", "actors", actors),
    )
    return [
        {
            "function": name,
            "batch_format": form,
            "compute": kind,
            "workers": workers,
            "rows_per_second": round(map_rate(dataset, function, form, pool(size=workers))),
        }
        for name, function, form, kind, pool in cases
        for workers in (1, 2)
    ]


def measure_collators(dataset: Any) -> list[dict[str, Any]]:
    """Return the rates of `iter_torch_batches`, which collates in the process that iterates."""
    collates = (PaddingCollator(), MRopeCollator(None, SPEC))
    return [
        {
            "collate": type(collate).__name__,
            "batch_size": BATCH,
            "rows_per_second": round(collate_rate(dataset, RayCollator(collate))),
        }
        for collate in collates
    ]


def collate_rate(dataset: Any, collate: RayCollator) -> float:
    fastest = math.inf
    with one_thread():
        for _ in range(REPEATS):
            began = time.perf_counter()
            batches = sum(
                1 for _ in dataset.iter_torch_batches(batch_size=BATCH, collate_fn=collate)
            )
            fastest = min(fastest, time.perf_counter() - began)
    return batches * BATCH / fastest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=80_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    few = table(options.rows // 8)
    rows = pa.concat_tables([few] * 8)
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    maps = measure_maps(ray.data.from_arrow(rows).repartition(BLOCKS).materialize())
    collators = measure_collators(ray.data.from_arrow(few).repartition(BLOCKS).materialize())
    ray.shutdown()
    result = {
        "conditions": conditions()
        | {"load before": f"{load:.1f}"}
        | {name: importlib.metadata.version(name) for name in ("ray", "pyarrow")},
        "rows": len(rows),
        "tokens": len(pc.list_flatten(rows["input_ids"])),
        "repeats": REPEATS,
        "map_batches": maps,
        "iter_torch_batches": collators,
    }
    for rate in (*maps, *collators):
        name, *rest, speed = rate.values()
        print(f"{name:>16} {' '.join(map(str, rest)):<20} {speed:>8,} rows/s")
    write_json(result, options.json)


if __name__ == "__main__":
    main()

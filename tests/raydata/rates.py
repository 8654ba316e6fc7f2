"""How fast rows go through `Precheck` on Ray Data, and what a collator gains by what is stored.

    PYTHONPATH=src:tests python tests/raydata/rates.py [--rows 80000] [--json FILE]

Meant for a machine that does nothing else. Rows are in Ray's object store before the clock starts; it
runs from the first batch's start to the last one's end, so that workers that start are not counted.
The ceiling is a stage that returns its batch as it is.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import math
import os
import random
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from mrope import MRopeCollator, MRopeSpec
from mrope.bench.conditions import conditions
from mrope.bench.timing import one_thread
from mrope.collate.padding import PaddingCollator
from mrope.positions.rope_index import rope_index
from mrope.positions.stored import COLUMNS, take_stored
from mrope.prepare.precheck import Precheck
from mrope.spec.spec import example_config

SPEC = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
START, IMAGE = SPEC.vision_start_token_id, SPEC.image_token_id
REPEATS = 3
BLOCKS = 16


def table(rows: int, most_images: int = 4) -> pa.Table:
    """Return rows of 300 to 600 tokens of text and half to all of so many images, 64 to 400 each."""
    rng = np.random.default_rng(0)
    ids, grids = [], []
    for _ in range(rows):
        tokens: list[int] = []
        row_grids = []
        for _ in range(rng.integers(most_images // 2, most_images + 1)):
            height, width = rng.integers(8, 21, 2).tolist()
            row_grids.append([1, 2 * height, 2 * width])
            tokens += [START, *[IMAGE] * (height * width), 99]
        ids.append([*tokens, *rng.integers(1, 50, rng.integers(300, 600)).tolist()])
        grids.append(row_grids or None)
    return pa.table({"input_ids": ids, "image_grid_thw": grids})


def unchanged(batch: Any) -> Any:
    return batch


class Timed:
    """A stage in a worker, that also says when each batch began and ended."""

    def __init__(self, stage: Callable[[Any], Any]) -> None:
        self.stage = stage

    def __call__(self, batch: Any) -> Any:
        began = time.time()
        result = self.stage(batch)
        times = {"began": began, "ended": time.time()}
        if isinstance(result, pa.Table):
            for name, value in times.items():
                result = result.append_column(name, pa.array(np.full(len(result), value)))
            return result
        rows = len(result["input_ids"])
        return result | {name: np.full(rows, value) for name, value in times.items()}


def rows_per_second(dataset: Any, stage: Callable[[Any], Any], form: str, pool: Any) -> float:
    """Return the rate of the fastest run: other processes only slow one."""
    fastest = math.inf
    actors = isinstance(pool, ray.data.ActorPoolStrategy)
    timed: Any = Timed if actors else Timed(stage)
    options = {"fn_constructor_args": (stage,)} if actors else {}
    for _ in range(REPEATS):
        mapped = dataset.map_batches(timed, batch_format=form, compute=pool, **options)
        blocks = list(mapped.materialize().iter_batches(batch_format="pyarrow", batch_size=None))
        began = min(pc.min(block["began"]).as_py() for block in blocks)
        ended = max(pc.max(block["ended"]).as_py() for block in blocks)
        fastest = min(fastest, ended - began)
    return float(dataset.count() / fastest)


def measure_ray(rows: pa.Table) -> list[dict[str, Any]]:
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    dataset = ray.data.from_arrow(rows).repartition(BLOCKS).materialize()
    actors, tasks = ray.data.ActorPoolStrategy, ray.data.TaskPoolStrategy
    cases: tuple[tuple[str, Callable[[Any], Any], str, str, Any], ...] = (
        ("returns its batch", unchanged, "pyarrow", "actors", actors),
        ("Precheck", Precheck(SPEC), "pyarrow", "actors", actors),
        ("Precheck", Precheck(SPEC), "pyarrow", "tasks", tasks),
        ("Precheck", Precheck(SPEC), "numpy", "actors", actors),
    )
    found = [
        {
            "stage": name,
            "batch_format": form,
            "compute": kind,
            "workers": workers,
            "rows_per_second": round(rows_per_second(dataset, stage, form, pool(size=workers))),
        }
        for name, stage, form, kind, pool in cases
        for workers in (1, 2)
    ]
    ray.shutdown()
    return found


def measure_reading(rows: pa.Table) -> dict[str, Any]:
    """Return milliseconds for a batch, with stored spans and without, of the same examples."""
    stored = Precheck(SPEC)(rows).to_pylist()
    examples = [
        {name: _as_array(value) for name, value in row.items() if value is not None}
        for row in stored
    ]
    bare = [{k: v for k, v in row.items() if k not in COLUMNS} for row in examples]
    batch = {name: value.numpy() for name, value in PaddingCollator()(bare).items()}
    spans = take_stored(SPEC, examples)[1]
    collate = MRopeCollator(None, SPEC)
    seconds = fastest(
        {
            "rope_index": lambda: rope_index(SPEC, **batch),
            "rope_index, stored": lambda: rope_index(SPEC, **batch, stored=spans),
            "collator": lambda: collate(bare),
            "collator, stored": lambda: collate(examples),
        }
    )
    return {
        "rows": len(bare),
        "tokens": int(batch["attention_mask"].sum()),
        "milliseconds": {name: round(1e3 * value, 4) for name, value in seconds.items()},
    }


def fastest(functions: dict[str, Callable[[], Any]], turns: int = 200) -> dict[str, float]:
    """Return the seconds of the fastest call of each function.

    They take turns in random order: how long an allocation takes depends on who freed memory last.
    """
    best = dict.fromkeys(functions, math.inf)
    order = list(functions)
    rng = random.Random(0)
    with one_thread():
        for _ in range(turns):
            rng.shuffle(order)
            for name in order:
                best[name] = min(best[name], timeit.timeit(functions[name], number=3) / 3)
    return best


def _as_array(value: Any) -> Any:
    return value if isinstance(value, str) else np.asarray(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=80_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    few = table(options.rows // 8)
    rows = pa.concat_tables([few] * 8)
    reading = [measure_reading(table(8)), measure_reading(table(4, most_images=40))]
    rates = measure_ray(rows)
    tokens = len(pc.list_flatten(rows["input_ids"]))
    result = {
        "conditions": conditions()
        | {"load before": f"{load:.1f}"}
        | {name: importlib.metadata.version(name) for name in ("ray", "pyarrow")},
        "rows": len(rows),
        "tokens": tokens,
        "repeats": REPEATS,
        "rows_per_second": rates,
        "reading": reading,
    }
    for rate in rates:
        print(
            f"{rate['stage']:>18} {rate['batch_format']:>8} {rate['workers']} {rate['compute']} "
            f"{rate['rows_per_second']:>8,} rows/s"
        )
    for found in reading:
        for name, value in found["milliseconds"].items():
            print(f"{name:>20} {value:.3f} ms, {found['rows']} rows, {found['tokens']:,} tokens")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Collate many batches in persistent workers, and measure their memory and open files from outside.

    PYTHONPATH=src:tests python tests/soak/soak.py [--batches 20000] [--json FILE]

Batches differ in size, so that memory kept per size adds up. A second run must give the same batches.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from mrope import MRopeCollator, MRopeSpec, VisionSpec
from mrope.bench.harness import conditions, make_console, write_json
from mrope.spec.spec import example_config

WORKERS = 2
ROWS = 4
WARM_UP = 1000
SPEC = MRopeSpec.from_config(example_config("qwen2_5_vl"), "transformers-5.23")
VISION = VisionSpec(spatial_merge_size=2, window_side=4, table_side=16)


class Samples(Dataset[dict[str, Any]]):
    """Rows with up to four images and videos; the row's index seeds all random draws."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(index)
        tokens: list[int] = rng.integers(1, 50, 3).tolist()
        grids: dict[str, list[list[int]]] = {"image_grid_thw": [], "video_grid_thw": []}
        for _ in range(rng.integers(0, 5)):
            clip = bool(rng.integers(2))
            t, h, w = rng.integers(1, 9) if clip else 1, *rng.integers(1, 25, 2)
            grids["video_grid_thw" if clip else "image_grid_thw"].append([int(t), 2 * h, 2 * w])
            placeholder = SPEC.video_token_id if clip else SPEC.image_token_id
            tokens += [SPEC.vision_start_token_id, *[placeholder] * int(t * h * w), 9]
        example: dict[str, Any] = {"input_ids": np.array(tokens)}
        example |= {name: np.array(sizes) for name, sizes in grids.items() if sizes}
        if grids["video_grid_thw"]:
            example["second_per_grid_ts"] = rng.random(len(grids["video_grid_thw"]), np.float32)
        return example


class Look(NamedTuple):
    """One measurement: after `batches` batches, pid, resident bytes and open files of each worker."""

    batches: int
    workers: list[int]
    resident: list[int]
    open_files: list[int]
    main_files: int


def soak(batches: int, every: int) -> tuple[list[Look], str]:
    """Iterate over `batches` batches, measure after each `every`, and return a digest of all batches."""
    epochs = 4
    others = {one.pid for one in psutil.Process().children()}
    loader: DataLoader[Any] = DataLoader(
        Samples(batches * ROWS // epochs),
        batch_size=ROWS,
        num_workers=WORKERS,
        persistent_workers=True,
        collate_fn=MRopeCollator(None, SPEC, VISION),
    )
    state, looks, seen = hashlib.sha256(), [], 0
    for _ in range(epochs):
        for batch in loader:
            state.update(digest(batch))
            seen += 1
            if seen % every == 0:
                looks.append(look(seen, others))
    del loader
    return looks, state.hexdigest()


def digest(batch: dict[str, Any]) -> bytes:
    state = hashlib.sha256()
    for name in sorted(batch):
        value = batch[name]
        state.update(name.encode())
        state.update(value.numpy().tobytes() if torch.is_tensor(value) else repr(value).encode())
    return state.digest()


def look(batches: int, others: set[int]) -> Look:
    main = psutil.Process()
    # The resource tracker of multiprocessing is a child too, and not a worker.
    workers = [
        one
        for one in main.children()
        if one.pid not in others and "resource_tracker" not in " ".join(one.cmdline())
    ]
    return Look(
        batches,
        [one.pid for one in workers],
        [one.memory_info().rss for one in workers],
        [one.num_fds() for one in workers],
        main.num_fds(),
    )


def left_in_shared_memory(looks: list[Look]) -> int:
    """Return the number of files in shared memory that the workers left after their end."""
    names = [f"torch_{worker}_" for worker in looks[0].workers]
    return sum(file.name.startswith(tuple(names)) for file in Path("/dev/shm").iterdir())


def slopes(looks: list[Look], after: int) -> list[float]:
    """Fit each worker's growth of memory from batch `after` on, in bytes per 1,000 batches."""
    late = [one for one in looks if one.batches >= after]
    thousands = [one.batches / 1000 for one in late]
    resident = np.array([one.resident for one in late], float)
    return [float(np.polyfit(thousands, column, 1)[0]) for column in resident.T]


def most(looks: list[Look], after: int, count: Callable[[Look], int]) -> tuple[int, int]:
    """Return the largest count in each half of the measurements from batch `after` on."""
    late = [count(one) for one in looks if one.batches >= after]
    half = len(late) // 2
    return max(late[:half]), max(late[half:])


def main() -> int:
    """Run twice, print the result, and return 0 if nothing grew and both runs agree."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    every = max(1, arguments.batches // 80)
    looks, first = soak(arguments.batches, every)
    _, second = soak(arguments.batches, every)
    after = min(WARM_UP, arguments.batches // 4)
    report: dict[str, Any] = {
        "conditions": conditions(),
        "batches": arguments.batches,
        "workers": WORKERS,
        "growth_bytes_per_1000_batches": slopes(looks, after),
        "growth_in_the_second_half": slopes(looks, arguments.batches // 2),
        "resident_bytes": [looks[0].resident, looks[-1].resident],
        "most_open_files": most(looks, after, lambda one: max(one.open_files)),
        "most_open_files_of_the_main_process": most(looks, after, lambda one: one.main_files),
        "files_left_in_shared_memory": left_in_shared_memory(looks),
        "equal_to_a_second_run": first == second,
    }
    table = Table("what", "found", title=f"soak: {arguments.batches:,} batches, {WORKERS} workers")
    for name, value in report.items():
        table.add_row(name, str(value))
    make_console().print(table)
    write_json(report, arguments.json)
    # The allocator's heap grows for a while and then stays; see docs/contributors/reliability.md.
    resident = looks[-1].resident
    growth = report["growth_in_the_second_half"]
    flat = all(one < 0.002 * size for one, size in zip(growth, resident, strict=True))
    # Batches in flight hold files open, and their number varies.
    files = [report[name] for name in report if name.startswith("most_")]
    steady = all(late <= early * 1.5 + 4 for early, late in files)
    clean = report["files_left_in_shared_memory"] == 0
    return 0 if flat and steady and clean and first == second else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""Time a training step as `mrope bench step` does, with two rivals beside the package's variants.

    PYTHONPATH=src:tests python -m measure step configs/bench/2b-s4k.yaml --json outputs/step.json

- rows: positions in numpy inside the forward, copied row by row (`rivals.RowsOnHost`);
- on CUDA, and apart from a step: positions by torch operations on the GPU
  (`rivals.rope_index_on_device`), for configs with images and clips.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from measure.rivals import RowsOnHost, rope_index_on_device
from mrope.bench.step import bench_step
from mrope.collate.padding import PaddingCollator
from mrope.training.config import load_config
from mrope.training.dataloader import load_rows
from mrope.training.sections import Config
from mrope.training.step import to_device

_REPEATS, _WARM_UP = 30, 5


def measure_steps(
    configs: list[Path],
    overrides: list[str],
    device: str,
    steps: int,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Measure every config; the arguments are those of `bench_step`."""
    bench_step(configs, overrides, device, steps, json_file, plot_file, {"rows": RowsOnHost})
    if device == "cpu" or not torch.cuda.is_available():
        return
    for path in configs:
        cfg = load_config(path, overrides)
        shape = cfg.data.shape
        if shape is not None and shape.images and shape.videos:
            print(f"{path.stem}: positions by operations on the GPU", _measure_on_device(cfg))


def _measure_on_device(cfg: Config) -> dict[str, float]:
    rows = load_rows(cfg)
    batch = PaddingCollator()([rows[index] for index in range(cfg.dataloader.batch_size)])
    on_device = to_device(batch, torch.device("cuda"))
    names = ("input_ids", "attention_mask", "image_grid_thw", "video_grid_thw")
    arguments = {name: on_device[name] for name in names}
    frames = int(batch["video_grid_thw"][:, 0].sum())
    return median_cuda_times(
        partial(rope_index_on_device, cfg.spec(), **arguments, frames=frames), _REPEATS
    )


def median_cuda_times(function: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Return median milliseconds of a call on an idle GPU.

    Returns:
        `host_ms`: until the call returns; `whole_ms`: until the GPU has finished its work.
    """
    host, whole = [], []
    for _ in range(repeats + _WARM_UP):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        host.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        whole.append(time.perf_counter() - start)
    return {
        "host_ms": 1e3 * statistics.median(host[_WARM_UP:]),
        "whole_ms": 1e3 * statistics.median(whole[_WARM_UP:]),
    }

"""Samples as a dataset holds them before collating, for the tests of `mrope.prepare`."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from mrope import MRopeSpec
from support.batches import Row, _random_row

START, IMAGE, VIDEO = 101, 102, 103


def random_samples(
    rng: random.Random, spec: MRopeSpec, *, odd: bool = True
) -> list[dict[str, Any]]:
    """Return a few samples of a family; `odd` ones may be empty, or have adjacent images."""
    marked = spec.conventions.start_required or rng.random() < 0.7
    rows = [
        Row()
        if odd and rng.random() < 0.1
        else _random_row(rng, spec, marked, vision=rng.random() < 0.85, touching=odd)
        for _ in range(rng.choice([1, 2, 3, 5]))
    ]
    form = rng.choice(["list", "float32", "whole", "none"])
    typed = rng.random() < 0.5
    return [_sample(row, form, typed) for row in rows]


def _sample(row: Row, form: str, typed: bool) -> dict[str, Any]:
    sample: dict[str, Any] = {"input_ids": row.tokens}
    if typed:
        sample["mm_token_type_ids"] = row.types
    if row.images:
        sample["image_grid_thw"] = row.images
    if row.videos:
        sample["video_grid_thw"] = row.videos
        if form != "none":
            sample["second_per_grid_ts"] = _seconds(row.seconds, form)
    return sample


def _seconds(seconds: list[float], form: str) -> Any:
    if form == "whole":
        return [round(value) for value in seconds]
    return seconds if form == "list" else np.array(seconds, np.float32)


def columns_of_samples(samples: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return samples as a batch of columns, None where a sample has nothing."""
    names = dict.fromkeys(name for sample in samples for name in sample)
    return {name: [sample.get(name) for sample in samples] for name in names}


def plain_samples(count: int) -> list[dict[str, Any]]:
    """Return samples of Qwen3-VL: the first ones text, then up to two images, and a clip."""
    return [_plain(index) for index in range(count)]


def _plain(index: int) -> dict[str, Any]:
    images, clip = (index % 3, index % 4 == 3) if index > 4 else (0, False)
    tokens = [7] * (1 + index % 5)
    tokens += [START, *[IMAGE] * 4, 99] * images
    tokens += [START, *[VIDEO] * 2, 9, START, *[VIDEO] * 2] if clip else []
    return {
        "id": f"sample-{index}",
        "input_ids": [*tokens, 8],
        "image_grid_thw": [[1, 4, 4]] * images or None,
        "video_grid_thw": [[2, 2, 4]] if clip else None,
    }

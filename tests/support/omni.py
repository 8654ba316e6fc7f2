"""Random batches for the Omni thinkers, the inputs of their goldens.

Placeholders of a video with audio stand in any order here; `twins.omni.processor_batch` writes them
as transformers' processors do.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from mrope import MRopeSpec
from twins.omni import audio_length

VISION_END_ID, AUDIO_END_ID = 98, 97
_SECONDS = [0.04, 1 / 3, 0.37, 0.5, 0.8, 1.0, 2.0, 2.7]


def random_omni_batch(rng: random.Random, spec: MRopeSpec) -> dict[str, Any]:
    """Return arguments for `rope_index`: images, videos, audio, and audio in every video or none."""
    batch: dict[str, Any] = {
        "image_grid_thw": [],
        "video_grid_thw": [],
        "second_per_grid_ts": [],
        "audio_seqlens": [],
        "use_audio_in_video": rng.random() < 0.5,
    }
    rows = [_random_row(rng, spec, batch) for _ in range(rng.choice([1, 1, 2, 3, 5]))]
    width = max(map(len, rows)) + rng.choice([0, 0, 3])
    left = rng.random() < 0.5
    ids, mask = np.zeros((2, len(rows), width), np.int64)
    for index, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(len(row))
        ids[index, where], mask[index, where] = row, 1
    arrays = {
        name: np.array(values, np.float32 if name == "second_per_grid_ts" else np.int64)
        for name, values in batch.items()
        if isinstance(values, list) and values
    }
    absent = {name: None for name, values in batch.items() if values == []}
    return {"input_ids": ids, "attention_mask": mask, **batch, **absent, **arrays}


def _random_row(rng: random.Random, spec: MRopeSpec, batch: dict[str, Any]) -> list[int]:
    row: list[int] = []
    for _ in range(rng.choice([0, 1, 2, 4])):
        row += rng.choices(range(1, 50), k=rng.choice([0, 0, 1, 3]))
        row += rng.choice([_image, _video, _audio])(rng, spec, batch)
    return row + rng.choices(range(1, 50), k=rng.choice([0, 1, 4]) if row else 3)


def _image(rng: random.Random, spec: MRopeSpec, batch: dict[str, Any]) -> list[int]:
    tokens = _grid(rng, spec, batch["image_grid_thw"], [1, 1, 1, 2])
    return [spec.vision_start_token_id, *[spec.image_token_id] * tokens, VISION_END_ID]


def _audio(rng: random.Random, spec: MRopeSpec, batch: dict[str, Any]) -> list[int]:
    batch["audio_seqlens"].append(rng.choice([rng.randrange(4, 60), 100, 101, rng.randrange(900)]))
    batch["audio_seqlens"][-1] = max(batch["audio_seqlens"][-1], 4)
    tokens = audio_length(spec, batch["audio_seqlens"][-1])
    start, token = spec.extra["audio_start_token_id"], spec.extra["audio_token_id"]
    return [int(start), *[int(token)] * tokens, AUDIO_END_ID]


def _video(rng: random.Random, spec: MRopeSpec, batch: dict[str, Any]) -> list[int]:
    batch["second_per_grid_ts"].append(rng.choice(_SECONDS))
    tokens = _grid(rng, spec, batch["video_grid_thw"], [1, 2, 3, 6, 13])
    start, video = spec.vision_start_token_id, spec.video_token_id
    if not batch["use_audio_in_video"]:
        return [start, *[video] * tokens, VISION_END_ID]
    audio_start, *audio, audio_end = _audio(rng, spec, batch)
    # The rule looks at the first placeholder alone, and puts the others in an order of its own.
    rest = [video] * (tokens - 1) + audio
    rng.shuffle(rest)
    return [start, audio_start, video, *rest, audio_end, VISION_END_ID]


def _grid(rng: random.Random, spec: MRopeSpec, grids: list[list[int]], frames: list[int]) -> int:
    merge = spec.spatial_merge_size
    t, h, w = rng.choice(frames), rng.choice([1, 2, 3]), rng.choice([1, 2, 5])
    grids.append([t, h * merge, w * merge])
    return t * h * w

"""Time the position ids of the Omni thinkers against transformers: `python -m measure omni`.

Every video has audio inside, so that both streams are merged by time, which transformers does token
by token in Qwen3-Omni and chunk by chunk in Qwen2.5-Omni. Medians on one thread, interleaved.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mrope.bench.harness import (
    conditions,
    interleaved_medians,
    make_console,
    make_table,
    microseconds,
    one_thread,
    write_json,
)
from mrope.hf.get_rope_index import reference_rope_index
from mrope.positions.custom.omni import omni_tokens
from mrope.positions.rope_index import rope_index
from mrope.spec.spec import MRopeSpec, example_config
from mrope.towers import AudioSpec, audio_tokens

THINKERS = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
# Tokens of the row, and its videos; four fifths of a row are frames and audio.
CASES = ((4096, 1), (32768, 1), (32768, 8), (131072, 4))
_TEXT_ID, _END_ID = 7, 98
_GRID = (28, 36)  # patches: frames of 14 x 18 merged tokens, one per second
_AUDIO_TOKENS_PER_SECOND = 13
_MEL_FRAMES_PER_SECOND = 100


def bench_omni(repeats: int, json_file: Path | None) -> None:
    """Measure every case, print a table, and write JSON if a file is given.

    Args:
        repeats: interleaved rounds, at least 1; published figures take 15 or more.
    """
    with one_thread():
        rows = [_measure(family, *case, repeats) for family in THINKERS for case in CASES]
    table = make_table(
        "positions of videos with audio: median time of a call, one thread",
        ("thinker", "case"),
        ("transformers", "kernel", "ratio"),
    )
    for row in rows:
        times = [microseconds(row["seconds"][name]) for name in ("transformers", "kernel")]
        table.add_row(row["family"], row["name"], *times, f"{row['ratio']:.1f}")
    make_console().print(table)
    write_json({"conditions": conditions(), "repeats": repeats, "cases": rows}, json_file)


def make_batch(spec: MRopeSpec, width: int, videos: int) -> dict[str, Any]:
    """Return a batch of one row: `videos` videos with audio, then text up to `width` tokens."""
    frame = _GRID[0] * _GRID[1] // spec.spatial_merge_size**2
    each = width * 4 // 5 // videos
    frames = max(1, each // (frame + _AUDIO_TOKENS_PER_SECOND))
    mel = frames * _MEL_FRAMES_PER_SECOND
    # Only the rule of Qwen3-Omni reads `n_window`, so that the spec of Qwen2.5-Omni has none.
    window = spec.extra.get("n_window")
    tower = AudioSpec(int(window or 1), None if window is None else 1)
    sound = int(audio_tokens(tower, np.array([mel]))[0])
    row = omni_tokens(spec, frames * frame, sound, _END_ID) * videos
    row += [_TEXT_ID] * (width - len(row))
    return {
        "input_ids": np.array([row]),
        "attention_mask": np.ones((1, len(row)), np.int64),
        "image_grid_thw": None,
        "video_grid_thw": np.array([[frames, *_GRID]] * videos),
        "second_per_grid_ts": np.ones(videos, np.float32),
        "audio_seqlens": np.array([mel] * videos),
        "use_audio_in_video": True,
    }


def _measure(family: str, width: int, videos: int, repeats: int) -> dict[str, Any]:
    spec = MRopeSpec.from_config(example_config(family), "transformers-5.23")
    batch = make_batch(spec, width, videos)
    contenders: dict[str, Callable[[], Any]] = {
        "transformers": partial(reference_rope_index, spec, batch),
        "kernel": partial(rope_index, spec, **batch),
    }
    expected, found = contenders["transformers"](), contenders["kernel"]()
    for theirs, ours in zip(expected, found, strict=True):
        np.testing.assert_array_equal(theirs, ours, strict=True)
    medians = interleaved_medians(contenders, repeats)
    return {
        "family": family,
        "name": f"S={batch['input_ids'].shape[1]:,}, {videos} videos",
        "seconds": medians,
        "ratio": medians["transformers"] / medians["kernel"],
    }

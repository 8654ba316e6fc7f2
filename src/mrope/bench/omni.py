"""How fast are the Omni thinkers' positions? `mrope bench omni`, against transformers' own.

Every video has its audio inside, so that both streams are merged by time: what transformers does
token by token in Qwen3-Omni, and in chunks in Qwen2.5-Omni. Medians on one thread, in turns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mrope.bench.conditions import conditions
from mrope.bench.timing import interleaved_medians, one_thread
from mrope.hf.get_rope_index import reference_rope_index
from mrope.positions.rope_index import rope_index
from mrope.spec.spec import MRopeSpec, example_config
from mrope.towers.audio import AudioSpec, audio_tokens

THINKERS = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
# Tokens of the row, and videos in it; four fifths of a row are frames and audio.
CASES = ((4096, 1), (32768, 1), (32768, 8), (131072, 4))
_TEXT_ID, _END_ID = 7, 98
_GRID = (28, 36)  # patches: frames of 14 x 18 merged tokens, a second apart
_MEL_FRAMES_A_SECOND = 100


def run(repeats: int, json_file: Path | None) -> None:
    """Measure every case, print a table, and write it as JSON where asked.

    Args:
        repeats: turns of each function, at least 1; 15 or more for figures to keep.
    """
    with one_thread():
        rows = [_measure(family, *case, repeats) for family in THINKERS for case in CASES]
    table = Table(title="positions of videos with audio: median time of a call, one thread")
    for heading in ("thinker", "case", "transformers", "kernel", "ratio"):
        table.add_column(heading, justify="left" if heading in ("thinker", "case") else "right")
    for row in rows:
        times = [f"{row['seconds'][name] * 1e6:,.0f} µs" for name in ("transformers", "kernel")]
        table.add_row(row["family"], row["name"], *times, f"{row['ratio']:.1f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if json_file is not None:
        report = {"conditions": conditions(), "repeats": repeats, "cases": rows}
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def make_batch(spec: MRopeSpec, width: int, videos: int) -> dict[str, Any]:
    """Return one row of `videos` videos with audio, and text to the end."""
    frame = _GRID[0] * _GRID[1] // spec.spatial_merge_size**2
    each = width * 4 // 5 // videos
    frames = max(1, each // (frame + 13))
    mel = frames * _MEL_FRAMES_A_SECOND
    window = spec.extra.get("n_window")
    tower = AudioSpec(int(window or 1), None if window is None else 1)
    sound = int(audio_tokens(tower, np.array([mel]))[0])
    audio, start = int(spec.extra["audio_token_id"]), int(spec.extra["audio_start_token_id"])
    video = [spec.video_token_id] * (frames * frame)
    one = [spec.vision_start_token_id, start, *video, *[audio] * sound, _END_ID, _END_ID]
    row = one * videos
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
        "transformers": lambda: reference_rope_index(spec, batch),
        "kernel": lambda: rope_index(spec, **batch),
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

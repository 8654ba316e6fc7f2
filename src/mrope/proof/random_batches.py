"""Make small random arguments for `rope_index`, for every family: text, images, clips and audio.

Shape suffixes: B rows, S the longest row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mrope.columns import MODALITIES, NewColumns, columns
from mrope.positions.custom.minicpm import minicpm_tokens
from mrope.positions.custom.omni import omni_tokens
from mrope.positions.sample_rows import clip_tokens, image_tokens
from mrope.positions.spans import token_types
from mrope.spec.spec import MRopeSpec

_TEXT_IDS = 90
_NO_MASK = 0.3
# Which count of each row a size adds to.
_COUNTERS = {
    size: count
    for modality in MODALITIES
    for size in columns("item", modality=modality, means="size")
    for count in columns("row", modality=modality, means="count")
}


# The sizes that all rules but MiniCPM-V's take.
_SIZES = {
    modality: next(columns("item", modality=modality, means="size")) for modality in MODALITIES
}


@dataclass
class _Draft:
    """A batch under construction: rows of tokens, and the values of the media in their order."""

    spec: MRopeSpec
    rng: np.random.Generator
    rows: list[list[int]] = field(default_factory=list)
    values: dict[str, list[Any]] = field(default_factory=dict)
    counts: dict[str, list[int]] = field(default_factory=dict)
    audio_in_video: bool = False

    @cached_property
    def text_ids(self) -> tuple[int, int]:
        """First id of text and the one behind the last: above every id that means something."""
        spec = self.spec
        tokens = [spec.image_token_id, spec.video_token_id, spec.vision_start_token_id]
        tokens += [int(value) for name, value in spec.extra.items() if name.endswith("_id")]
        return max(tokens) + 1, max(tokens) + 1 + _TEXT_IDS

    @property
    def end(self) -> int:
        """Return the id of an end marker, which positions treat as text."""
        return self.text_ids[1]

    def add(self, *tokens: int) -> None:
        self.rows[-1] += tokens

    def text(self, least: int, most: int) -> None:
        count = int(self.rng.integers(least, most + 1))
        self.add(*self.rng.integers(*self.text_ids, count).tolist())

    def note(self, name: str, value: object) -> None:
        self.values.setdefault(name, []).append(value)
        if _COUNTERS.get(name) in self.counts:
            self.counts[_COUNTERS[name]][-1] += 1

    def grid(self, frames: tuple[int, ...]) -> tuple[int, int, int]:
        """Return frames, and height and width in merged tokens."""
        height, width = self.rng.integers(1, 6, 2).tolist()
        return int(self.rng.choice(frames)), height, width

    def patches(self, grid: tuple[int, int, int]) -> list[int]:
        merge = self.spec.spatial_merge_size
        return [grid[0], grid[1] * merge, grid[2] * merge]


def random_arguments(spec: MRopeSpec, rng: np.random.Generator) -> NewColumns:
    """Return arguments of `mrope.rope_index` for one to three rows, padded on either side.

    Text stands between any two spans: adjacent spans of one kind are ambiguous to transformers.

    Returns:
        `input_ids` int64 (B, S) and, for some batches, `attention_mask` int64 (B, S); grids and
        whatever else the family's rule reads.
    """
    draft = _Draft(spec, rng, audio_in_video=bool(rng.random() < 0.5))
    media = (_image, _clip) if spec.family_row.video_keys else (_image,)
    kinds = _KINDS.get(spec.family_row.custom_index, media)
    counters = [name for name in spec.family_row.inputs if name.endswith("_per_sample")]
    for _ in range(int(rng.integers(1, 4))):
        draft.rows.append([])
        for name in counters:
            draft.counts.setdefault(name, []).append(0)
        for _ in range(int(rng.integers(0, 4))):
            draft.text(1, 4)
            kinds[int(rng.integers(len(kinds)))](draft)
        draft.text(1, 6)
    return _merge(draft)


def _merge(draft: _Draft) -> NewColumns:
    rng, width = draft.rng, max(map(len, draft.rows))
    # The Omnis' own functions raise without a mask.
    full = rng.random() < _NO_MASK and _SIZES["audio"] not in draft.spec.family_row.inputs
    if full:
        for row in draft.rows:
            row.extend(rng.integers(*draft.text_ids, width - len(row)).tolist())
    left = rng.random() < 0.5
    ids, mask = np.zeros((2, len(draft.rows), width), np.int64)
    for index, row in enumerate(draft.rows):
        where = slice(width - len(row), width) if left else slice(len(row))
        ids[index, where], mask[index, where] = row, 1
    arguments: NewColumns = {"input_ids": ids, "attention_mask": None if full else mask}
    names = {_SIZES["image"], _SIZES["video"], *draft.values, *draft.spec.family_row.inputs}
    for name in sorted(names - {"mm_token_type_ids", "use_audio_in_video", "downsample_mode"}):
        values = draft.values.get(name, draft.counts.get(name))
        dtype = np.float32 if name == "second_per_grid_ts" else np.int64
        arguments[name] = None if values is None else np.array(values, dtype)
    if "use_audio_in_video" in draft.spec.family_row.inputs:
        arguments["use_audio_in_video"] = draft.audio_in_video
    if draft.spec.family_row.custom_index is None or "mm_token_type_ids" in names:
        arguments["mm_token_type_ids"] = token_types(draft.spec, ids)
    return arguments


def _image(draft: _Draft) -> None:
    spec, row = draft.spec, draft.spec.family_row
    grid = draft.grid((1,) if row.still_images else (1, 1, 1, 2))
    frames, height, width = patches = draft.patches(grid)
    draft.note(_SIZES["image"], patches)
    draft.add(*image_tokens(spec, height, width, frames), draft.end)


def _clip(draft: _Draft) -> None:
    spec, row = draft.spec, draft.spec.family_row
    merged = int(spec.extra.get("temporal_merge_size", 1))
    frames, height, width = draft.grid((1, 2, 3, 5))
    frames, height, width = patches = draft.patches((frames * merged, height, width))
    draft.note(_SIZES["video"], patches)
    if spec.tokens_per_second is not None:
        draft.note("second_per_grid_ts", draft.rng.choice([0.25, 1 / 3, 0.5, 1.0, 2.7]))
    gap = [draft.end] * (row.frame_gap or 1)
    draft.add(*clip_tokens(spec, frames, height, width, gap.copy), *gap)


def _audio(draft: _Draft) -> None:
    draft.add(*omni_tokens(draft.spec, 0, _audio_length(draft), draft.end))


def _audio_length(draft: _Draft) -> int:
    """Draw the frames of an audio, and return its tokens."""
    spec, mel = draft.spec, int(draft.rng.integers(4, 400))
    draft.note(_SIZES["audio"], mel)
    if "n_window" in spec.extra:
        # Three convolutions, each of stride 2, over chunks of 2 * n_window frames.
        chunks, rest = divmod(mel, 2 * int(spec.extra["n_window"]))
        return 13 * chunks - (-rest // 8)
    return ((mel - 1) // 2 + 1 - 2) // 2 + 1


def _omni_clip(draft: _Draft) -> None:
    spec, grid = draft.spec, draft.grid((1, 2, 3, 6))
    draft.note(_SIZES["video"], draft.patches(grid))
    draft.note("second_per_grid_ts", draft.rng.choice([0.25, 0.5, 1.0, 2.7]))
    audio = _audio_length(draft) if draft.audio_in_video else 0
    draft.add(*omni_tokens(spec, int(np.prod(grid)), audio, draft.end))


def _glm_image(draft: _Draft) -> None:
    frames, height, width = draft.grid((1, 1, 3))
    draft.note(_SIZES["image"], [frames, height, width])
    draft.add(*image_tokens(draft.spec, height, width, frames))


def _hunyuan_image(draft: _Draft) -> None:
    frames, height, width = patches = draft.patches(draft.grid((1,)))
    draft.note(_SIZES["image"], patches)
    # Some batches have no wrapper: it is two of the placeholders.
    draft.add(*image_tokens(draft.spec, height, width, frames)[2 * int(draft.rng.integers(2)) :])


def _minicpm_image(draft: _Draft) -> None:
    _minicpm_frame(draft, draft.spec.image_token_id, "target_sizes")


def _minicpm_clip(draft: _Draft) -> None:
    _minicpm_frame(draft, draft.spec.video_token_id, "target_sizes_videos")


def _minicpm_frame(draft: _Draft, token: int, sizes: str) -> None:
    """Add a thumbnail, and up to two lines of slices."""
    lines, columns = draft.rng.integers([0, 1], [3, 4]).tolist()
    crops = [
        [_crop(draft, sizes)],
        *([_crop(draft, sizes) for _ in range(columns)] for _ in range(lines)),
    ]
    draft.add(*minicpm_tokens(draft.spec, token, crops))


def _crop(draft: _Draft, sizes: str) -> list[int]:
    _, *size = draft.patches(draft.grid((1,)))
    draft.note(sizes, size)
    return size


# What a batch of a rule of its own can hold, by `Family.custom_index`.
_KINDS: dict[str | None, tuple[Callable[[_Draft], None], ...]] = {
    "omni_2_5": (_image, _omni_clip, _audio),
    "omni_3": (_image, _omni_clip, _audio),
    "omni_3_talker": (_image, _omni_clip, _audio),
    "glm_image": (_glm_image,),
    "hunyuan": (_hunyuan_image,),
    "minicpm": (_minicpm_image, _minicpm_clip),
}

"""Examples to mutate: rows of the random batches, one by one, and how they become a batch again.

An example is what `rope_index` takes of one row without padding: token columns (n,), sizes (k, ...),
and flags. It works for every rule, whatever its inputs are called.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mrope import MRopeSpec
from support.batches import random_batch

Example = dict[str, Any]
Arguments = dict[str, Any]

TOKENS = ("input_ids", "mm_token_type_ids")
SIZES = (
    "image_grid_thw",
    "video_grid_thw",
    "target_sizes",
    "target_sizes_videos",
    "second_per_grid_ts",
    "audio_seqlens",
)
COUNTS = ("images_per_sample", "videos_per_sample")
_COUNTED = {
    "images_per_sample": ("image_grid_thw", "target_sizes"),
    "videos_per_sample": ("video_grid_thw", "target_sizes_videos"),
}


def draw_examples(rng: random.Random, spec: MRopeSpec, count: int) -> list[Example]:
    """Return examples that fit into one batch; all with `mm_token_type_ids`, or none."""
    examples = [_draw(rng, spec)]
    while len(examples) < count:
        one = _draw(rng, spec)
        if one.get("use_audio_in_video") == examples[0].get("use_audio_in_video"):
            examples.append(one)
    if rng.random() < 0.5 and spec.family_row.custom_index is None:
        for example in examples:
            del example["mm_token_type_ids"]
    return examples


def draw_long_example(rng: random.Random, spec: MRopeSpec, tokens: int) -> Example:
    """Return an example of at least so many tokens: many, with a text token between them."""
    parts = [_draw(rng, spec)]
    flag = parts[0].get("use_audio_in_video")
    while sum(len(part["input_ids"]) for part in parts) < tokens:
        part = _draw(rng, spec)
        if part.get("use_audio_in_video") == flag:
            parts.append(part)
    for part in parts:
        for name in TOKENS:
            if name in part:
                part[name] = np.append(part[name], 7 if name == "input_ids" else 0)
    joined = {
        name: np.concatenate([part[name] for part in parts if name in part])
        for name in dict.fromkeys(name for part in parts for name in part)
        if name in (*TOKENS, *SIZES)
    }
    return parts[0] | joined


def _draw(rng: random.Random, spec: MRopeSpec) -> Example:
    batch = random_batch(rng, spec)
    while len(batch["input_ids"]) > 1:
        batch = random_batch(rng, spec)
    mask = batch.pop("attention_mask")
    example = {name: value for name, value in batch.items() if value is not None}
    for name in set(TOKENS) & set(example):
        example[name] = example[name][0] if mask is None else example[name][mask != 0]
    if spec.family_row.custom_index is None:
        # The form of the seconds is the batch's; here every clip has some.
        clips = len(example.get("video_grid_thw", ()))
        seconds = example.pop("second_per_grid_ts", [1.0] * clips)
        if clips:
            example["second_per_grid_ts"] = np.asarray(seconds, np.float32)
    elif isinstance(example.get("second_per_grid_ts"), list):
        # Of families that ignore them: an array, as all other sizes.
        example["second_per_grid_ts"] = np.asarray(example["second_per_grid_ts"], np.float32)
    return {name: value for name, value in example.items() if name not in COUNTS}


def merged(examples: Sequence[Example], rng: random.Random | None = None) -> Arguments:
    """Return the arguments of `rope_index` for a padded batch; on the right without an `rng`."""
    width = max(len(example["input_ids"]) for example in examples)
    width += 0 if rng is None else rng.choice([0, 0, 1, 3])
    arguments: Arguments = {
        name: np.zeros((len(examples), width), np.int64)
        for name in (*TOKENS, "attention_mask")
        if name in examples[0] or name == "attention_mask"
    }
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        where = _places(rng, length, width)
        arguments["attention_mask"][row, where] = 1
        for name in TOKENS:
            if name in arguments:
                arguments[name][row, where] = example[name]
    for name in SIZES:
        parts = [example[name] for example in examples if name in example]
        arguments |= {name: np.concatenate(parts)} if parts else {}
    flags = {k: v for k, v in examples[0].items() if k not in (*TOKENS, *SIZES)}
    return arguments | flags


def _places(rng: random.Random | None, length: int, width: int) -> Any:
    side = "right" if rng is None else rng.choice(["left", "right", "ragged"])
    if side == "ragged":
        assert rng is not None
        return sorted(rng.sample(range(width), length))
    return slice(width - length, width) if side == "left" else slice(length)


def counts_of(spec: MRopeSpec, examples: Sequence[Example]) -> Arguments:
    """Return how many images and videos each example carries, for rules that read it."""
    known = (
        COUNTS
        if spec.family_row.custom_index is None
        else set(COUNTS) & set(spec.family_row.inputs)
    )
    return {
        name: np.array([_count(example, _COUNTED[name]) for example in examples])
        for name in COUNTS
        if name in known
    }


def _count(example: Example, names: Sequence[str]) -> int:
    return next((len(example[name]) for name in names if example.get(name) is not None), 0)


class Merge:
    """An inner collate function for every family: `merged`, with its counts, as tensors."""

    def __init__(self, spec: MRopeSpec) -> None:
        self.spec = spec

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        arguments = merged(examples) | counts_of(self.spec, examples)
        return {
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for name, value in arguments.items()
        }

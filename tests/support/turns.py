"""Random prompts and responses for every family, and the whole that `extend` must equal."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from mrope import MRopeSpec, rope_index
from mrope.columns import COLUMNS
from support.batches import PAD_ID, TEXT_IDS, random_batch

Sample = dict[str, Any]
COUNTS = {"image": "images_per_sample", "video": "videos_per_sample", "audio": "audios_per_sample"}


@dataclass
class Case:
    """Prompts of a batch, what stands behind each, and a padding for them."""

    spec: MRopeSpec
    prompts: list[Sample]
    turns: list[list[Any]]
    left: bool

    def ids_and_mask(self) -> tuple[Any, Any]:
        rows = [sample["input_ids"] for sample in self.prompts]
        width = max(map(len, rows))
        ids, mask = np.full((len(rows), width), PAD_ID), np.zeros((len(rows), width), np.int64)
        for row, tokens in enumerate(rows):
            where = slice(width - len(tokens), width) if self.left else slice(len(tokens))
            ids[row, where], mask[row, where] = tokens, 1
        return ids, mask

    def sizes(self, samples: list[list[Sample]]) -> dict[str, Any]:
        """Return all sizes of these rows, and how many each row has."""
        return join(self.spec, samples)

    def prompt_sizes(self) -> dict[str, Any]:
        return self.sizes([[sample] for sample in self.prompts])

    def expected(self, packed: bool = False) -> tuple[Any, Any]:
        """Number the concatenation of prompts and responses."""
        ids, mask = self.ids_and_mask()
        answers = [np.concatenate([tokens_of(one) for one in row] or [[]]) for row in self.turns]
        width = max(map(len, answers))
        tail, tail_mask = np.full((len(ids), width), PAD_ID), np.zeros((len(ids), width), np.int64)
        for row, tokens in enumerate(answers):
            tail[row, : len(tokens)], tail_mask[row, : len(tokens)] = tokens, 1
        ids, mask = np.concatenate((ids, tail), 1), np.concatenate((mask, tail_mask), 1)
        sizes = self.sizes(
            [
                [prompt, *[one for one in row if isinstance(one, dict)]]
                for prompt, row in zip(self.prompts, self.turns, strict=True)
            ]
        )
        if packed:
            lengths = [mask.sum(1).tolist()]
            sizes = {name: value for name, value in sizes.items() if not name.endswith("_sample")}
            return rope_index(self.spec, ids[mask != 0][None], seq_lengths=lengths, **sizes)
        return rope_index(self.spec, ids, mask, **sizes)


def tokens_of(turn: Any) -> Any:
    return turn["input_ids"] if isinstance(turn, dict) else turn


def join(spec: MRopeSpec, rows: list[list[Sample]]) -> dict[str, Any]:
    """Concatenate the sizes of the samples of each row, and count them."""
    joined: dict[str, Any] = {}
    for name in {name for row in rows for sample in row for name in sample} - {"input_ids"}:
        parts = [[sample[name] for sample in row if name in sample] for row in rows]
        flat = [part for row in parts for part in row]
        if COLUMNS[name].kind == "batch":
            each = [one for row in rows for one in row]
            clips = [len(one.get("video_grid_thw", ())) for one in each]
            joined[name] = np.array([one[name] for one in each], bool).repeat(clips)
            continue
        joined[name] = np.concatenate(flat)
        if COLUMNS[name].means == "size":
            count = COUNTS[str(COLUMNS[name].modality)]
            joined[count] = [sum(map(len, row)) for row in parts]
    return joined


def random_case(rng: random.Random, spec: MRopeSpec) -> Case:
    float64 = rng.random() < 0.5
    rows = rng.choice([1, 1, 2, 3])
    media = rng.random() < 0.8
    prompts = [random_sample(rng, spec, float64, media) for _ in range(rows)]
    tools = rng.random() < 0.6
    turns = [random_turns(rng, spec, float64, tools) for _ in range(rows)]
    return Case(spec, prompts, turns, rng.random() < 0.5)


def random_turns(rng: random.Random, spec: MRopeSpec, float64: bool, tools: bool) -> list[Any]:
    turns: list[Any] = []
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        turns.append(np.array(rng.choices(TEXT_IDS, k=rng.choice([1, 1, 2, 9]))))
        if tools and rng.random() < 0.6:
            turns.append(random_sample(rng, spec, float64, True))
    return turns


def random_sample(rng: random.Random, spec: MRopeSpec, float64: bool, media: bool) -> Sample:
    """Return a row of a random batch, without padding and types, which ends with text."""
    while True:
        batch = random_batch(rng, spec)
        if len(batch["input_ids"]) > 1:
            continue
        mask = batch.pop("attention_mask")
        ids = batch.pop("input_ids")[0]
        ids = ids if mask is None else ids[mask[0] != 0]
        if spec.family_row.custom_index is not None or rng.random() < 0.5:
            ids = np.append(ids, rng.choice(TEXT_IDS))
        sample: Sample = {"input_ids": ids}
        for name, value in batch.items():
            if value is None or name == "mm_token_type_ids" or COLUMNS[name].kind == "row":
                continue
            sample[name] = value
            if COLUMNS[name].means == "seconds":
                sample[name] = np.asarray(value, np.float64 if float64 else np.float32)
        if spec.family_row.timed and "video_grid_thw" in sample:
            seconds = sample.get("second_per_grid_ts", np.ones(len(sample["video_grid_thw"])))
            sample["second_per_grid_ts"] = np.asarray(
                seconds, np.float64 if float64 else np.float32
            )
        if media or not any(COLUMNS[name].kind == "item" for name in sample):
            return sample

"""Maps between an engine's tokens and a trainer's: both ways, with values of each token."""

from __future__ import annotations

import random
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch

from mrope import MRopeError, MRopeSpec
from mrope.spec import FAMILIES
from mrope.transforms import TokenMap
from support.specs import NEWEST, example_spec
from support.turns import random_sample

MAPPED = [
    family
    for family, row in FAMILIES.items()
    if NEWEST in row.references
    and (row.custom_index is None or row.source or "audio_seqlens" in row.inputs)
]


def sizes_of(sample: dict[str, Any]) -> dict[str, Any]:
    names = ("image_grid_thw", "video_grid_thw", "audio_seqlens")
    return {name: sample[name] for name in names if name in sample}


def compact_by_hand(spec: MRopeSpec, ids: list[int], counts: TokenMap) -> list[int]:
    """Walk over a row: of each image the first token stays, and as many as it needs are dropped."""
    rest, compact = list(ids), []
    for count in counts.count_C.tolist():
        assert len(set(rest[:count])) == 1
        compact.append(rest[0])
        del rest[:count]
    assert rest == []
    return compact


@pytest.mark.parametrize("family", MAPPED)
def test_there_and_back(family: str) -> None:
    spec, rng = example_spec(family, NEWEST), random.Random(family)
    placeholders = {spec.image_token_id, spec.video_token_id, spec.extra.get("audio_token_id")}
    for _ in range(60):
        sample = random_sample(rng, spec, True, True)
        if sample.get("use_audio_in_video"):
            continue
        ids, sizes = sample["input_ids"].tolist(), sizes_of(sample)
        tokens = TokenMap.of_expanded(spec, ids, **sizes)
        compact = tokens.compact(ids).tolist()
        assert compact == compact_by_hand(spec, ids, tokens)
        # As an engine has it: one placeholder for each, however many stand together.
        runs = sum(len(list(run)) for token, run in groupby(compact) if token in placeholders)
        assert runs == sum(
            count > 1 or token in placeholders
            for count, token in zip(tokens.count_C, compact, strict=True)
        )
        again = TokenMap.of_compact(spec, compact, **sizes)
        assert again.count_C.tolist() == tokens.count_C.tolist()
        assert again.expand(compact).tolist() == ids


def test_values_are_carried_both_ways() -> None:
    spec = example_spec()
    row, grids = [7, 101, 102, 8, 101, 102, 9], [[1, 2, 4], [1, 4, 4]]
    tokens = TokenMap.of_compact(spec, row, image_grid_thw=grids)
    logprobs = torch.tensor([-0.1, -0.2, 0.0, -0.3, -0.4, 0.0, -0.5])
    expanded = tokens.expand(logprobs, fill=0.0)
    assert expanded.tolist() == pytest.approx(
        [-0.1, -0.2, 0.0, 0.0, -0.3, -0.4, 0.0, 0.0, 0.0, 0.0, -0.5]
    )
    assert torch.equal(tokens.compact(expanded), logprobs)
    # Rewards keep their sum, and a mask of an image is that of all of its tokens.
    rewards = np.array([0, 0, 5, 0, 0, 0, 1])
    assert tokens.expand(rewards, fill=0).tolist() == [0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 1]
    assert tokens.expand(rewards > 0).tolist() == [False, False, True, True] + [False] * 6 + [True]
    two_columns = np.stack((rewards, rewards), axis=1)
    assert tokens.expand(two_columns, fill=0).shape == (11, 2)


@pytest.mark.parametrize(
    ("row", "read", "words"),
    [
        ([7, 102, 102], "of_compact", "2 image placeholders, but 1 sizes"),
        ([7, 102, 102], "of_expanded", r"2 image placeholders do not stand together .* \[4\]"),
        ([102, 102, 7, 102, 102], "of_expanded", "do not stand together"),
    ],
)
def test_rows_that_do_not_fit(row: list[int], read: str, words: str) -> None:
    with pytest.raises(MRopeError, match=words):
        getattr(TokenMap, read)(example_spec(), row, image_grid_thw=[[1, 4, 4]])


def test_values_of_another_row() -> None:
    tokens = TokenMap.of_compact(example_spec(), [7, 102], image_grid_thw=[[1, 4, 4]])
    with pytest.raises(MRopeError, match="3 values, but the row has 2 tokens"):
        tokens.expand([1, 2, 3])
    with pytest.raises(MRopeError, match="3 values, but the row has 5 tokens"):
        tokens.compact([1, 2, 3])


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("minicpmv4_7", {}), ("qwen3_omni_moe_thinker", {"use_audio_in_video": True})],
)
def test_families_without_a_map(family: str, sizes: dict[str, Any]) -> None:
    with pytest.raises(MRopeError, match="cannot be mapped"):
        TokenMap.of_compact(example_spec(family), [7], **sizes)

"""Proposed ladders: least padding for so many rungs, against a search over all choices."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from mrope import MRopeError, Shapes
from mrope.collate.ladder import _padding, _rungs


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_no_choice_of_as_many_rungs_pads_less(seed: int, count: int) -> None:
    sizes = 64 * np.random.default_rng(seed).integers(0, 14, 50)
    candidates = np.unique(sizes.clip(64))
    least = min(
        _padding(sizes, np.array(sorted({*chosen, candidates[-1]})))
        for chosen in combinations(candidates.tolist(), min(count, len(candidates)) - 1)
    )
    assert _padding(sizes, _rungs(sizes, count)) == pytest.approx(least)


def test_a_lognormal_mix_in_eight_graphs() -> None:
    # Rows packed to 16k tokens: 40 to 60 images each, sides lognormal around 20 patches.
    rng = np.random.default_rng(0)
    sides = np.exp(rng.normal(3, 0.45, (4000, 60, 2))).clip(4, 64).astype(int) // 2 * 2
    there = np.arange(60) < rng.integers(40, 61, (4000, 1))
    patches = (sides.prod(axis=2) * there).sum(axis=1)
    ladder = Shapes.fit(np.full(4000, 16384), patches, there.sum(axis=1), longest=4096)
    assert ladder.graphs <= 8
    assert ladder.token_padding == 0
    assert ladder.patch_padding < 0.08
    rung = np.array(ladder.shapes.patches)
    borders = [ladder.shapes.borders(size) for size in rung.tolist()]
    taken = rung.searchsorted(patches)
    assert (there.sum(axis=1) <= np.array(borders)[taken]).all()


def test_graphs_are_shared_between_tokens_and_patches() -> None:
    tokens, patches = [64] * 4 + [4096] * 4, [0, 64] * 4
    ladder = Shapes.fit(tokens, patches, [0, 1] * 4, 64, graphs=2)
    assert (ladder.shapes.tokens, ladder.shapes.patches) == ((64, 4096), (64,))
    assert ladder.graphs == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (([], [], []), "of the same batches"),
        (([1, 2], [1], [1, 1]), "of the same batches"),
        (([1], [-1], [1]), "0 and more"),
    ],
)
def test_what_is_no_batch(sizes: tuple[list[int], ...], message: str) -> None:
    tokens, patches, segments = sizes
    with pytest.raises(MRopeError, match=message):
        Shapes.fit(tokens, patches, segments, longest=64)

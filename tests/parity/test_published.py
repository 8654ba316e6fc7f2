"""Families without a class in transformers: equal to a twin of the rule that `Family.source` names."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mrope import rope_index
from mrope.spec import FAMILIES
from support.batches import PUBLISHED_ROWS, random_batch
from support.specs import example_spec
from twins.published import PUBLISHED
from twins.rope_index import slow_rope_index

BATCHES = 300


@pytest.mark.parametrize(("family", "reference"), PUBLISHED_ROWS)
def test_equal_to_the_published_rule(family: str, reference: str) -> None:
    spec, rng = example_spec(family, reference), random.Random(f"{family} {reference} published")
    spans = 0
    for _ in range(BATCHES):
        batch = random_batch(rng, spec)
        for ours, theirs in zip(
            rope_index(spec, **batch), slow_rope_index(spec, batch), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs, strict=True)
        spans += sum(
            len(batch[name]) for name in batch if "grid_thw" in name and batch[name] is not None
        )
    assert spans > BATCHES


def test_every_family_with_a_source_has_a_twin_of_it() -> None:
    assert {family for family, row in FAMILIES.items() if row.source is not None} == set(PUBLISHED)

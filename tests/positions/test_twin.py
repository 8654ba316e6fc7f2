"""Ring 2: the kernel against its slow twin, on inputs that hypothesis makes up and shrinks."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrope import MRopeSpec, rope_index
from mrope.spec.spec import example_config
from support.batches import ROWS, random_batch
from twins.rope_index import slow_rope_index


@pytest.mark.parametrize(("family", "reference"), ROWS)
@settings(max_examples=30, deadline=None)
@given(rng=st.randoms(use_true_random=False))
def test_equal_to_the_twin(family: str, reference: str, rng: random.Random) -> None:
    spec = MRopeSpec.from_config(example_config(family), reference)
    batch = random_batch(rng, spec, odd=True)
    expected = slow_rope_index(spec, batch)
    for given_types in (batch.get("mm_token_type_ids"), None):
        actual = rope_index(spec, **(batch | {"mm_token_type_ids": given_types}))
        for ours, theirs in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs, strict=True)

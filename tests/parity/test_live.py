"""Ring 3, live: bit for bit equal to the `get_rope_index` of the transformers that is installed."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mrope import MRopeSpec, rope_index
from mrope.spec.spec import example_config
from support.batches import ROWS, random_batch

peer = pytest.importorskip("mrope.hf.get_rope_index", exc_type=ImportError)

BATCHES = 300


@pytest.mark.parametrize(("family", "reference"), ROWS)
def test_equal_to_the_installed_release(family: str, reference: str) -> None:
    if reference != peer.installed_reference():
        pytest.skip("another release is installed")
    spec = MRopeSpec.from_config(example_config(family), reference)
    rng = random.Random(f"{family} live")
    for number in range(BATCHES):
        batch = random_batch(rng, spec)
        expected = peer.reference_rope_index(spec, batch)
        for types in (batch.get("mm_token_type_ids"), None):
            actual = rope_index(spec, **(batch | {"mm_token_type_ids": types}))
            for ours, theirs in zip(actual, expected, strict=True):
                np.testing.assert_array_equal(ours, theirs, f"batch {number}", strict=True)

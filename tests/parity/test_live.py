"""Ring 3, live: bit for bit equal to the `get_rope_index` of the transformers that is installed."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mrope import MRopeSpec, rope_index
from support.batches import RELEASED_ROWS, random_batch
from support.specs import example_spec

peer = pytest.importorskip("mrope.hf.get_rope_index", exc_type=ImportError)

# More in `make parity`, which runs this file under every release.
BATCHES = int(os.environ.get("PARITY_BATCHES", "100"))
# Config values that change a custom rule, beside those of `example_config`.
VARIANTS: dict[str, dict[str, Any]] = {
    "glm_image": {},
    "hunyuan_vl": {"extra": {"axes": 3}},
    "minicpmv4_7": {"spatial_merge_size": 4},
}


@pytest.mark.parametrize(("family", "reference"), RELEASED_ROWS)
def test_equal_to_the_installed_release(family: str, reference: str) -> None:
    spec, rng = spec_of(family, reference), random.Random(f"{family} live")
    for _ in range(BATCHES):
        batch = random_batch(rng, spec)
        expected = peer.reference_rope_index(spec, batch)
        for types in (batch.get("mm_token_type_ids"), None):
            assert_equal(rope_index(spec, **(batch | {"mm_token_type_ids": types})), expected)


@pytest.mark.parametrize(
    ("family", "reference"), [row for row in RELEASED_ROWS if row[0] in VARIANTS]
)
def test_variants_equal_to_the_installed_release(family: str, reference: str) -> None:
    """Other config values, and int32 ids where there is no mask: with one, GLM-Image needs int64."""
    spec = replace(spec_of(family, reference), **VARIANTS[family])
    rng = random.Random(f"{family} variant")
    for _ in range(BATCHES):
        batch = random_batch(rng, spec)
        if batch["attention_mask"] is None:
            batch["input_ids"] = batch["input_ids"].astype(rng.choice([np.int32, np.int64]))
        assert_equal(rope_index(spec, **batch), peer.reference_rope_index(spec, batch))


def spec_of(family: str, reference: str) -> MRopeSpec:
    if reference != peer.installed_reference():
        pytest.skip("another release is installed")
    if not peer.has_rope_index(family):
        pytest.skip("the installed release does not have it")
    return example_spec(family, reference)


def assert_equal(actual: Any, expected: Any) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)

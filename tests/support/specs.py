"""Specs of the smallest configs, for tests that do not read a config of their own."""

from __future__ import annotations

from functools import cache

from mrope import MRopeSpec
from mrope.spec import example_config

NEWEST = "transformers-5.23"


@cache
def example_spec(family: str = "qwen3_vl", reference: str = NEWEST) -> MRopeSpec:
    """Return the spec of `example_config(family)`: start marker 101, image 102, video 103."""
    return MRopeSpec.from_config(example_config(family), reference)

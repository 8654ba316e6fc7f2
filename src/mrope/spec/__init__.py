"""Model families, transformers releases, and the `MRopeSpec` read from a model's config."""

from __future__ import annotations

from mrope.spec.families import FAMILIES, NO_TOKEN, ONE_DIMENSIONAL, ConfigValue, Family, Tower
from mrope.spec.references import REFERENCES, Reference, resolve_reference
from mrope.spec.spec import MRopeSpec, example_config

__all__ = [
    "FAMILIES",
    "NO_TOKEN",
    "ONE_DIMENSIONAL",
    "REFERENCES",
    "ConfigValue",
    "Family",
    "MRopeSpec",
    "Reference",
    "Tower",
    "example_config",
    "resolve_reference",
]

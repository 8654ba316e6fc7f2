"""A small model of every family that can be attached, and batches for it without labels."""

from __future__ import annotations

from typing import Any

from hf import test_crop_forwards as crops
from hf import test_omni_forwards as omni
from mrope.hf.rows import ROWS
from support.models import EAGER_FAMILIES, PLAIN_FAMILIES, tiny_model
from support.steps import Batch, make_batches

FAMILIES = tuple(ROWS)


def make_model(family: str, attention: str = "sdpa") -> Any:
    """Return a small model, in evaluation mode; under eager attention where it has no other."""
    if family in omni.FAMILIES:
        return omni.make_model(family, attention).eval()
    return tiny_model(family, "eager" if family in EAGER_FAMILIES else attention)


def without_labels(family: str) -> tuple[Batch, Batch]:
    """Return a batch of all media that the model takes together, plain and of the stage."""
    if family in omni.FAMILIES:
        plain, batch = omni.make_batches(family, "all", padded=True)
    elif family == crops.FAMILY:
        plain, batch = crops.make_batches(padded=True)
    else:
        plain, batch = make_batches(family)
    for one in (plain, batch):
        one.pop("labels", None)
        if family in PLAIN_FAMILIES:
            del one["mm_token_type_ids"]  # models with 1-D positions take none
    return dict(plain), dict(batch)

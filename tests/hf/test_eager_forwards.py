"""Attached HunYuan V4 VL, whose text model runs under eager attention alone: the same step, no sync."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers.models.hy_v4_vl")

from support.models import EAGER_FAMILIES, tiny_model
from support.steps import MEDIA, assert_attached_as_plain, make_batches


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("media", MEDIA)
@pytest.mark.parametrize("family", EAGER_FAMILIES)
def test_the_same_step_without_a_sync(family: str, media: str, padded: bool) -> None:
    """Frames of equal size are multiplied in one batch under eager attention, and round so."""
    plain, batch = make_batches(family, MEDIA[media], padded)
    assert_attached_as_plain(tiny_model(family, "eager").train(), plain, batch, 2e-6)

"""Attached models of every family: the step of the unmodified model, and no syncs.

Batches of MiniCPM-V and of the Omni thinkers, which hold more than images and clips, have files of
their own: `test_crop_forwards.py` and `test_omni_forwards.py`.
"""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", "5.24")

from mrope.hf.rows import ROWS
from support.models import (
    EAGER_FAMILIES,
    MODEL_FAMILIES,
    PLAIN_FAMILIES,
    SIZED_FAMILIES,
    TINY_FAMILIES,
    media_of,
    tiny_model,
)
from support.steps import MEDIA, Batch, assert_attached_as_plain, make_batches

CROPS, THINKERS = "minicpmv4_7", {"qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"}
FAMILIES = [
    *(*MODEL_FAMILIES, *TINY_FAMILIES, *PLAIN_FAMILIES),
    *(family for family in (*SIZED_FAMILIES, *EAGER_FAMILIES) if family != CROPS),
]
# Every kind of media for some, which stand for those with the same tower.
MEDIA_OF = {
    family: list(MEDIA.values())
    if family in (*MODEL_FAMILIES, *EAGER_FAMILIES)
    else [*media_of(family), MEDIA["text"]]
    for family in FAMILIES
}
# Frames of equal size are multiplied in batches under eager attention, and PaddleOCR-VL's images
# are merged at once: both round differently. The other families are equal to the last bit.
ROUNDED = {
    **dict.fromkeys([*TINY_FAMILIES, *EAGER_FAMILIES], 2e-6),
    **dict.fromkeys(MODEL_FAMILIES, 1e-6),
}
ALWAYS_ROUNDED = ("paddleocr_vl", *EAGER_FAMILIES)


def cases() -> list[tuple[str, dict[str, bool], str, bool]]:
    """Return family, media, attention, and whether rows are padded.

    Under eager attention rows without padding are tried with one kind of media alone.
    """
    found = []
    for family in FAMILIES:
        attentions = ("eager",) if family in EAGER_FAMILIES else ("sdpa", "eager")
        for attention in attentions:
            for number, media in enumerate(MEDIA_OF[family]):
                found.append((family, media, attention, True))
                if attention == attentions[0] or number == 0:
                    found.append((family, media, attention, False))
    return found


def name_of(value: object) -> str | None:
    """Return how a case's name says its media and padding."""
    if isinstance(value, bool):
        return "padded" if value else "full"
    return next((name for name, media in MEDIA.items() if media == value), None)


def test_every_row_is_tried() -> None:
    assert {*FAMILIES, CROPS, *THINKERS} == set(ROWS)


@pytest.mark.parametrize(("family", "media", "attention", "padded"), cases(), ids=name_of)
def test_the_same_step_without_a_sync(
    family: str, media: dict[str, bool], attention: str, padded: bool
) -> None:
    plain: Batch
    plain, batch = make_batches(family, media, padded)
    rounded = attention == "eager" or family in ALWAYS_ROUNDED
    atol = ROUNDED.get(family, 0.0) if rounded else 0.0
    assert_attached_as_plain(tiny_model(family, attention).train(), plain, batch, atol)

"""A batch from the collator goes straight into an unmodified transformers model."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers")

from mrope import MRopeCollator
from mrope.collate.padding import PaddingCollator
from mrope.hf.get_rope_index import has_rope_index
from support.models import (
    EAGER_FAMILIES,
    LIVE_FAMILIES,
    media_of,
    tiny_examples,
    tiny_model,
    tiny_spec,
)

EAGER = [family for family in EAGER_FAMILIES if has_rope_index(family)]
FAMILIES = [*LIVE_FAMILIES, *EAGER]
CASES = [(family, media) for family in FAMILIES for media in media_of(family)]


def attention_of(family: str) -> str:
    return "eager" if family in EAGER_FAMILIES else "sdpa"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "media"), CASES)
def test_the_model_reads_the_positions_and_gives_the_same_logits(
    family: str, media: dict[str, bool], side: Any
) -> None:
    examples = tiny_examples(family, **media)
    inner = PaddingCollator(padding_side=side)
    batch = MRopeCollator(inner, tiny_spec(family))(examples)
    model = tiny_model(family, attention_of(family))
    with torch.no_grad():
        own = model(**inner(examples))
        with mock.patch.object(
            model.model, "get_rope_index", side_effect=AssertionError("computed in the forward")
        ):
            ours = model(**batch)
    assert torch.equal(ours.logits, own.logits)
    assert torch.equal(ours.loss, own.loss)
    assert torch.equal(model.model.rope_deltas, batch["rope_deltas"])


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_positions_would_be_seen(family: str) -> None:
    examples = tiny_examples(family, **media_of(family)[0])
    batch = MRopeCollator(None, tiny_spec(family))(examples)
    model = tiny_model(family, attention_of(family))
    with torch.no_grad():
        right = model(**batch).logits
        batch["position_ids"][2] += batch["position_ids"][1]
        assert not torch.equal(model(**batch).logits, right)

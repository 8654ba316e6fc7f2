"""What an attached base model returns of its towers: what the plain model does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", "5.24")

from mrope.guard import SyncGuard
from mrope.hf import attach
from support.attachable import FAMILIES, make_model, without_labels

FIELDS = ("last_hidden_state", "pooler_output", "deepstack_features", "hidden_states", "attentions")


def assert_same(found: Any, right: Any, where: str) -> None:
    """Tuples and lists of the same lengths, and tensors of the same values."""
    if isinstance(right, torch.Tensor):
        assert isinstance(found, torch.Tensor), where
        torch.testing.assert_close(found, right, rtol=0, atol=2e-6, msg=where)
    elif right is None:
        assert found is None, where
    else:
        assert type(found) is type(right), where
        assert len(found) == len(right), where
        for number, (one, other) in enumerate(zip(found, right, strict=True)):
            assert_same(one, other, f"{where}[{number}]")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_features_of_each_image_and_states_of_each_layer(family: str, attention: str) -> None:
    plain, batch = without_labels(family)
    asked: dict[str, Any] = {
        "output_hidden_states": True,
        "output_attentions": attention == "eager",
    }
    model = make_model(family, attention)
    right = model(**plain, **asked)
    attach(model)
    with SyncGuard() as guard:
        found = model(**batch, **asked)
    assert guard.count == 0, guard.report()
    assert found.keys() == right.keys()
    assert_same(found.hidden_states, right.hidden_states, "hidden_states")
    for name in {"image_outputs", "video_outputs"} & right.keys():
        assert type(found[name]) is type(right[name])
        for field in FIELDS:
            assert_same(
                getattr(found[name], field, None),
                getattr(right[name], field, None),
                f"{name}.{field}",
            )

"""What an attached base model returns of its towers: what the plain model does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", "5.24")

from hf.test_omni_forwards import FAMILIES as OMNIS
from hf.test_one_graph import SHAPES, collate, examples_of
from mrope import MRopeCollator, MRopeError, MRopeSpec, VisionSpec
from mrope.guard import SyncGuard
from mrope.hf import JoinedFeatures, attach
from positions.custom.test_omni import tiny_thinker
from support.attachable import FAMILIES, make_model, without_labels
from support.models import model_config

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


# Whose collator takes no fixed shapes: see docs/shapes.md.
UNFIXED = {
    "ernie4_5_vl_moe",
    "cosmos3_edge",
    "qwen2_5_omni_thinker",
    "qwen3_omni_moe_thinker",
    "video_llama_3",
    "glm_image",
    "hunyuan_vl",
    "hy_v4_vl",
    "minicpmv4_7",
}


@pytest.mark.parametrize("family", sorted(UNFIXED))
def test_families_without_fixed_shapes(family: str) -> None:
    config = tiny_thinker(family).config if family in OMNIS else model_config(family)
    spec, vision = MRopeSpec.from_config(config), VisionSpec.from_config(config)
    with pytest.raises(MRopeError, match="shapes is not supported for"):
        MRopeCollator(None, spec, vision, shapes=SHAPES)


@pytest.mark.parametrize("family", [one for one in FAMILIES if one not in UNFIXED])
def test_with_fixed_shapes_the_type_says_that_features_are_joined(family: str) -> None:
    examples = examples_of(family)
    model = attach(make_model(family))
    right = model(**collate(family, examples, None, None))
    batch = collate(family, examples, None, SHAPES)
    found = model(**batch, output_hidden_states=True).image_outputs
    assert type(found) is JoinedFeatures
    assert not isinstance(right.image_outputs, JoinedFeatures)
    parts = [right[f"{one}_outputs"] for one in ("image", "video") if f"{one}_outputs" in right]
    features = torch.cat([one for part in parts for one in part.pooler_output])
    rung = SHAPES.patches[-1]
    assert len(found.pooler_output) in {rows // 4 for rows in SHAPES.patches}
    torch.testing.assert_close(found.pooler_output[: len(features)], features, rtol=0, atol=2e-6)
    assert found.hidden_states is not None and found.last_hidden_state is not None
    assert found.last_hidden_state.shape[-2] <= rung
    deeper = getattr(parts[0], "deepstack_features", None)
    assert (found.deepstack_features is None) == (deeper is None)
    for level, own in enumerate(found.deepstack_features or ()):
        expected = torch.cat([one for part in parts for one in part.deepstack_features[level]])
        torch.testing.assert_close(own[: len(expected)], expected, rtol=0, atol=2e-6)

"""The proof on a release that no table has: equal goes on, and each kind of difference is named."""

from __future__ import annotations

import inspect
import logging
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from mrope import MRopeCollator, MRopeError, MRopeSpec
from mrope.hf import attach, detach
from mrope.hf.get_rope_index import reference_class
from mrope.hf.rows import ROWS
from mrope.proof import comparisons as proof
from mrope.proof.random_batches import random_arguments
from mrope.proof.shrunken import shrink_config
from mrope.proof.small_models import default_model
from mrope.spec.families import FAMILIES
from mrope.spec.references import describe_known
from support.models import MODEL_FAMILIES, TINY_FAMILIES, model_config, tiny_model, tiny_spec
from support.specs import example_spec

ATTACHED = [family for family in (*MODEL_FAMILIES, *TINY_FAMILIES) if family in ROWS]


@pytest.fixture(autouse=True)
def unknown_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that a release is installed which is newer than the tables."""
    monkeypatch.setattr("mrope.spec.references.installed_transformers", lambda: "5.99.0")
    monkeypatch.setattr("mrope.collate.packing.installed_transformers", lambda: "5.99.0")
    monkeypatch.setattr(proof, "_proven", set())


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "mrope"]


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.source is None])
def test_positions_are_compared_once(family: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="mrope")
    config = example_spec(family)
    for _ in range(2):
        proof.prove("positions", config)
    [line] = messages(caplog)
    assert f"compared positions of {family} on 20 random batches: equal" in line


def test_auto_and_attach_and_flatten_prove_themselves(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="mrope")
    spec = MRopeSpec.from_config(model_config("qwen3_vl"))
    assert spec.reference == "transformers-5.23"
    for _ in range(2):
        attach(tiny_model("qwen3_vl"))
        MRopeCollator(None, spec, packing="flatten")
    assert [line.partition("compared ")[2].partition(" of ")[0] for line in messages(caplog)] == [
        "positions",
        "steps",
        "a small Qwen3VLForConditionalGeneration on padded and on flattened batches, plain and "
        "attached: logits, loss and gradients are equal",
    ]


@pytest.mark.parametrize("family", ATTACHED)
def test_a_small_model_from_the_users_config(family: str) -> None:
    """Of the same class, from configs of users, under either attention."""
    for attention in ("sdpa", "eager"):
        verdict = proof.compare("attach", tiny_model(family, attention))
        assert verdict.equal, verdict.detail
    if FAMILIES[family].packs:
        verdict = proof.compare("flatten", tiny_spec(family))
        assert verdict.equal, verdict.detail


@pytest.mark.parametrize(
    "family", ["dots3_note", "lfm3_vl", "video_llama_3", "hunyuan_vl", "hy_v4_vl"]
)
def test_a_small_model_of_the_defaults_of_a_class(family: str) -> None:
    """Whose layers, towers and kinds of experts have sizes of their own there."""
    verdict = proof.compare("attach", default_model(family))
    assert verdict.equal, verdict.detail
    spec = example_spec(family)
    if spec.family_row.packs:
        verdict = proof.compare("flatten", spec)
        assert verdict.equal, verdict.detail


def test_known_releases_and_workers_compare_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = mock.Mock(side_effect=AssertionError("compared"))
    monkeypatch.setattr(proof, "compare", calls)
    with mock.patch("torch.utils.data.get_worker_info", return_value=object()):
        MRopeSpec.from_config(model_config("qwen3_vl"))
    with pytest.raises(AssertionError, match="compared"):
        MRopeSpec.from_config(model_config("qwen3_vl"))
    monkeypatch.setattr("mrope.spec.references.installed_transformers", lambda: "5.24.0")
    MRopeSpec.from_config(model_config("qwen3_vl"))
    attach(tiny_model("qwen3_vl"))
    monkeypatch.setattr("mrope.spec.references.installed_transformers", lambda: "5.99.0")
    attach(tiny_model("qwen3_vl"), strict=False)


@pytest.mark.parametrize(
    ("family", "was", "becomes"),
    [
        ("qwen2_vl", "max(grid_thw[1], grid_thw[2])", "-max(grid_thw[1], grid_thw[2])"),
        ("qwen2_5_vl", "max(grid_thw[1], grid_thw[2])", "-max(grid_thw[1], grid_thw[2])"),
        ("qwen3_vl", "max(grid_thw[1], grid_thw[2])", "-max(grid_thw[1], grid_thw[2])"),
    ],
)
def test_a_changed_sign_in_get_rope_index(
    family: str, was: str, becomes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = reference_class(family)
    source = inspect.cleandoc("\n" + inspect.getsource(cls.get_rope_index))
    assert source.count(was) == 1
    scope: dict[str, Any] = dict(inspect.unwrap(cls.get_rope_index).__globals__)
    exec(source.replace(was, becomes), scope)
    monkeypatch.setattr(cls, "get_rope_index", scope["get_rope_index"])
    with pytest.raises(MRopeError) as caught:
        MRopeSpec.from_config(model_config(family))
    for part in (
        f"transformers 5.99.0: position_ids of {family} in random batch ",
        "in its get_rope_index; the newest release known to work is "
        f"{describe_known('positions')}: install it, or name a reference",
    ):
        assert part in str(caught.value)
    # Not remembered as compared; and a name is used as it is.
    with pytest.raises(MRopeError, match=r"5\.99\.0: position_ids"):
        MRopeSpec.from_config(model_config(family))
    MRopeSpec.from_config(model_config(family), "transformers-5.23")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_a_forward_that_adds_1_to_a_feature(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own forward changed, so that what is attached no longer is the same."""
    model = tiny_model(family)
    tower = type(model.model)
    own = tower.get_image_features

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = own(self, *args, **kwargs)
        output.pooler_output = tuple(one + 1 for one in output.pooler_output)
        return output

    monkeypatch.setattr(tower, "get_image_features", changed)
    with pytest.raises(MRopeError) as caught:
        attach(model)
    assert "plain and attached, differ: logits by up to " in str(caught.value)
    assert "the newest release known to work is" in str(caught.value)
    assert "forward" not in vars(model.model)
    detach(attach(model, strict=False))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "qwen3_5"])
def test_an_output_without_a_field(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As 5.24 was for the forwards of 5.23: the model reads a field that they did not return."""
    model = tiny_model(family)
    cls = type(model)
    own = inspect.unwrap(cls.forward)

    def reads_more(self: Any, **kwargs: Any) -> Any:
        output = own(self, **kwargs)
        assert "router_map" in self.model.last, "the base model returned no router_map"
        return output

    def remember(self: Any, args: Any, kwargs: Any, output: Any) -> None:
        # What a newer base model returns beside the fields of today; an attached one does not.
        plain = "forward" not in vars(self)
        self.last = {**output, **({"router_map": None} if plain else {})}

    build = cls._from_config.__func__

    def build_newer(this: Any, *args: Any, **kwargs: Any) -> Any:
        built = build(this, *args, **kwargs)
        built.model.register_forward_hook(remember, with_kwargs=True)
        return built

    monkeypatch.setattr(cls, "forward", reads_more)
    monkeypatch.setattr(cls, "_from_config", classmethod(build_newer))
    with pytest.raises(MRopeError, match="attached model raised .* returned no router_map"):
        attach(model)


def test_a_family_that_transformers_lacks_is_not_compared() -> None:
    spec = example_spec("minicpmv4_7")
    with (
        mock.patch("mrope.hf.get_rope_index._find_module", return_value=None),
        pytest.warns(UserWarning, match="not compared: it has no get_rope_index for minicpmv4_7"),
    ):
        proof.prove("positions", spec)


def test_flatten_cannot_be_compared_without_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(family: str) -> Any:
        raise ValueError(f"Unrecognized model identifier: {family}")

    monkeypatch.setattr(proof, "default_model", missing)
    with pytest.raises(MRopeError, match=r"5\.99\.0: not compared: ValueError: Unrecognized"):
        MRopeCollator(None, example_spec("qwen3_vl"), packing="flatten")


def test_wrong_positions_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small random weights attend almost uniformly: those of the proof must not."""
    import mrope.proof.small_models as models

    small = models.default_model("qwen3_vl")
    specs = models._specs(small)
    plain = models._plain_batch(small, specs, {"images": True, "videos": True})
    staged = MRopeCollator(lambda _: dict(plain), specs[0], specs[1])(None)
    expected = models.take_step(small, staged)
    staged["position_ids"][2] += staged["position_ids"][1]
    assert models.describe_difference(models.take_step(small, staged), expected) is not None


def test_a_shrunken_config_keeps_what_decides_about_inputs() -> None:
    config = tiny_model("qwen3_5").config
    config.text_config.num_hidden_layers = 8
    config.text_config.layer_types = ["linear_attention"] * 3 + ["full_attention"] * 5
    small = shrink_config(config)
    assert small.text_config.layer_types == ["linear_attention", "full_attention"]
    assert small.text_config.rope_parameters == config.text_config.rope_parameters
    assert small.text_config.head_dim == config.text_config.head_dim
    ids = [small.image_token_id, small.video_token_id, small.vision_start_token_id]
    assert len(set(ids)) == 3 and max(ids) < small.text_config.vocab_size
    assert config.text_config.num_hidden_layers == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_random_batches_hold_media(family: str) -> None:
    """Twenty batches have spans, several rows, padding on both sides, and no mask now and then."""
    rng, spec = np.random.default_rng(0), example_spec(family)
    batches = [random_arguments(spec, rng) for _ in range(20)]
    masks = [batch["attention_mask"] for batch in batches if batch["attention_mask"] is not None]
    assert any((mask[:, 0] == 0).any() for mask in masks)
    assert any((mask[:, -1] == 0).any() for mask in masks)
    assert sum((batch["input_ids"] == spec.image_token_id).any() for batch in batches) > 5
    assert torch.is_tensor(torch.from_numpy(batches[0]["input_ids"]))

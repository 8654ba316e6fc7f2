"""Attached PEFT models give plain logits: adapters on and off, merged or not, in either order."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")

from mrope import MRopeError
from mrope.guard import SyncGuard
from mrope.hf import attach, detach, explain_attention
from mrope.hf.attaching import base_model
from support.models import media_of, tiny_model
from support.steps import MEDIA, logits_of, make_batches

# Projections of text and tower, and modules that PEFT copies whole.
TARGETS = {
    "qwen2_vl": (["q_proj", "qkv", "proj"], "visual"),
    "qwen2_5_vl": (["q_proj", "qkv", "proj"], "visual"),
    "qwen3_vl": (["q_proj", "qkv", "proj"], "visual"),
    "qwen3_5": (["q_proj", "qkv", "in_proj_qkv"], "visual"),
    "glm4v": (["q_proj", "qkv", "proj"], "visual"),
    "paddleocr_vl": (["q_proj", "out_proj", "o_proj"], "projector"),
}
FAMILIES = list(TARGETS)


def adapted(model: Any, seed: int = 3, **options: Any) -> Any:
    """Return a PEFT model whose adapter, and copies of modules, change the logits."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(init_lora_weights=False, **options)
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def in_order(order: str, family: str, **options: Any) -> Any:
    model = tiny_model(family)
    if order == "attach first":
        return adapted(attach(model), **options)
    return attach(adapted(model, **options))


@pytest.mark.parametrize("order", ["attach first", "attach last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_text_and_tower(family: str, order: str) -> None:
    plain_batch, batch = make_batches(family)
    targets, _ = TARGETS[family]
    plain = adapted(tiny_model(family), target_modules=targets)
    model = in_order(order, family, target_modules=targets)
    expected, off = logits_of(plain, plain_batch), logits_of(tiny_model(family), plain_batch)
    assert not torch.allclose(expected, off)
    torch.testing.assert_close(logits_of(model, batch), expected, rtol=0, atol=2e-6)
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(model, batch), off, rtol=0, atol=2e-6)

    for one in (model, plain):
        one.merge_adapter()
    merged = logits_of(plain, plain_batch)
    torch.testing.assert_close(logits_of(model, batch), merged, rtol=0, atol=2e-6)
    for one in (model, plain):
        one.unmerge_adapter()
    unmerged = logits_of(plain, plain_batch)
    torch.testing.assert_close(logits_of(model, batch), unmerged, rtol=0, atol=2e-6)
    whole = model.merge_and_unload()
    torch.testing.assert_close(logits_of(whole, batch), merged, rtol=0, atol=2e-6)
    torch.testing.assert_close(logits_of(detach(whole), plain_batch), merged, rtol=0, atol=2e-6)


@pytest.mark.parametrize("order", ["attach first", "attach last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_copies_of_a_tower_are_attached(family: str, order: str) -> None:
    plain_batch, batch = make_batches(family)
    options: dict[str, Any] = {
        "target_modules": ["q_proj"],
        "modules_to_save": [TARGETS[family][1]],
    }
    plain = adapted(tiny_model(family), **options)
    model = in_order(order, family, **options)
    expected, off = logits_of(plain, plain_batch), logits_of(tiny_model(family), plain_batch)
    assert not torch.allclose(expected, off)
    torch.testing.assert_close(logits_of(model, batch), expected, rtol=0, atol=2e-6)
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(model, batch), off, rtol=0, atol=2e-6)
    torch.testing.assert_close(logits_of(model, batch), expected, rtol=0, atol=2e-6)
    twin = copy.deepcopy(model)
    detach(model)
    assert not [one for one in model.modules() if "forward" in vars(one)]
    assert not [one for one in model.modules() if "mrope_attention" in vars(one)]
    assert torch.equal(logits_of(model, plain_batch), expected)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, plain_batch), off)
    torch.testing.assert_close(logits_of(twin, batch), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("copied", ["attn", "blocks.0", "merger", "language_model", "self_attn"])
@pytest.mark.parametrize("order", ["attach first", "attach last"])
def test_copies_of_parts_of_a_tower_or_of_the_text_model(order: str, copied: str) -> None:
    plain_batch, batch = make_batches("qwen3_vl")
    options: dict[str, Any] = {"target_modules": ["gate_proj"], "modules_to_save": [copied]}
    if copied == "language_model":
        options["target_modules"] = ["qkv"]
    plain = adapted(tiny_model("qwen3_vl"), **options)
    model = in_order(order, "qwen3_vl", **options)
    expected, off = logits_of(plain, plain_batch), logits_of(tiny_model("qwen3_vl"), plain_batch)
    assert not torch.allclose(expected, off)
    assert torch.equal(logits_of(model, batch), expected)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, batch), off)
    assert torch.equal(logits_of(detach(model), plain_batch), expected)


def test_copies_of_linear_text_layers_attend_within_segments() -> None:
    from hf.test_packed_models import ATOL, collator, logits_alone, mixed_examples

    examples = mixed_examples("qwen3_5", media_of("qwen3_5")[0])
    options: dict[str, Any] = {"target_modules": ["gate_proj"], "modules_to_save": ["linear_attn"]}
    plain = adapted(tiny_model("qwen3_5"), **options)
    model = attach(adapted(tiny_model("qwen3_5"), **options))
    batch = collator("qwen3_5", packing="flatten")(examples)
    expected = logits_alone(plain, "qwen3_5", examples)
    torch.testing.assert_close(logits_of(model, batch)[0], expected, rtol=0, atol=ATOL)
    with model.disable_adapter(), plain.disable_adapter():
        expected = logits_alone(plain, "qwen3_5", examples)
        torch.testing.assert_close(logits_of(model, batch)[0], expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_a_second_adapter_that_comes_after_attach(family: str) -> None:
    plain_batch, batch = make_batches(family)
    options: dict[str, Any] = {"target_modules": ["q_proj", "qkv"], "modules_to_save": ["merger"]}
    model, plain = (adapted(tiny_model(family), **options) for _ in range(2))
    attach(model)
    for one in (model, plain):
        torch.manual_seed(7)
        one.add_adapter("second", peft.LoraConfig(init_lora_weights=False, **options))
    for name in ("second", "default"):
        for one in (model, plain):
            one.set_adapter(name)
            one.eval()
        assert torch.equal(logits_of(model, batch), logits_of(plain, plain_batch))


def test_every_copy_has_the_config_that_its_attention_needs() -> None:
    """Text layers find the variable-length kernel through their config, a copy of a layer too."""
    model = attach(
        adapted(tiny_model("qwen3_vl"), target_modules=["qkv"], modules_to_save=["self_attn"])
    )
    if "varlen" not in explain_attention(model):
        pytest.skip("needs torch 2.10 for the kernel")
    layers = [
        one
        for one in base_model(model).language_model.modules()
        if type(one).__name__ == "Qwen3VLTextAttention"
    ]
    assert len(layers) == 2 * len(base_model(model).language_model.layers)
    assert {one.config._attn_implementation for one in layers} == {"mrope_varlen"}
    detach(model)
    assert {one.config._attn_implementation for one in layers} == {"sdpa"}


KINDS: dict[str, Any] = {
    "ia3": lambda: peft.IA3Config(
        target_modules=["q_proj", "qkv", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    ),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "loha": lambda: peft.LoHaConfig(target_modules=["q_proj"], init_weights=False),
    "dora": lambda: peft.LoraConfig(
        target_modules=["q_proj", "qkv"], use_dora=True, init_lora_weights=False
    ),
    "tokens": lambda: peft.TrainableTokensConfig(
        token_indices=[5, 6], target_modules=["embed_tokens"], init_weights=False
    ),
    "embeddings": lambda: peft.LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False),
    "all linear": lambda: peft.LoraConfig(target_modules="all-linear", init_lora_weights=False),
}


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5", "glm4v"])
def test_other_kinds_of_adapters(family: str, kind: str) -> None:
    plain, batch = make_batches(family)

    def tuned(model: Any) -> Any:
        torch.manual_seed(1)
        return peft.get_peft_model(model, KINDS[kind]()).eval()

    expected = logits_of(tuned(tiny_model(family)), plain)
    for model in (tuned(attach(tiny_model(family))), attach(tuned(tiny_model(family)))):
        with SyncGuard() as guard:
            found = logits_of(model, batch)
        # PEFT copies the indices of trained tokens to the device at each call.
        assert all("/peft/" in site.file for site in guard.sites), guard.report()
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
        assert torch.equal(logits_of(detach(model), plain), expected)


def prompts(kind: str) -> Any:
    """Return a config of a kind of prompt learning."""
    configs = {
        "prompt": peft.PromptTuningConfig,
        "p-tuning": peft.PromptEncoderConfig,
        "prefix": peft.PrefixTuningConfig,
        "several tasks": partial(peft.MultitaskPromptTuningConfig, num_tasks=2),
    }
    return configs[kind](task_type="CAUSAL_LM", num_virtual_tokens=3)


@pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning")
@pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
@pytest.mark.parametrize("media", ["both", "text"])
def test_prompt_learning_is_refused_by_name(kind: str, media: str) -> None:
    """PEFT removes position ids, and puts tokens in front of those that they number."""
    _, batch = make_batches("qwen3_vl", MEDIA[media])
    model = peft.get_peft_model(attach(tiny_model("qwen3_vl")), prompts(kind))
    with pytest.raises(MRopeError, match="prompt learning .* is not supported for attached"):
        model(**batch)
    model = peft.get_peft_model(tiny_model("qwen3_vl"), prompts(kind))
    with pytest.raises(MRopeError, match="Config: PEFT's prompt learning is not supported"):
        attach(model)


def test_prompts_of_tasks_are_refused_too() -> None:
    model = peft.get_peft_model(tiny_model("qwen3_vl"), prompts("several tasks"))
    with pytest.raises(MRopeError, match="MultitaskPromptTuningConfig: PEFT's prompt learning"):
        attach(model)


@pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning")
def test_prompt_learning_of_an_unmodified_model_is_warned_of() -> None:
    _, batch = make_batches("qwen3_vl", MEDIA["text"])
    model = peft.get_peft_model(tiny_model("qwen3_vl"), prompts("prompt"))
    with pytest.warns(UserWarning, match="without its position_ids, as by PEFT's prompt learning"):
        model(**batch)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("order", ["attach first", "attach last"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_prefix_tuning(family: str, order: str) -> None:
    """PEFT fills the cache, and shifts the position ids: the unmodified model takes them, too."""
    _, batch = make_batches(family)

    def tuned(model: Any) -> Any:
        torch.manual_seed(1)
        return peft.get_peft_model(model, prompts("prefix")).eval()

    expected = logits_of(tuned(tiny_model(family)), batch)
    first = order == "attach first"
    model = tuned(attach(tiny_model(family))) if first else attach(tuned(tiny_model(family)))
    assert torch.equal(logits_of(model, batch), expected)
    assert not torch.allclose(expected, logits_of(tiny_model(family), batch))

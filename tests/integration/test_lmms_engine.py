"""lmms-engine on the CPU: its collators inside ours, its models' forwards outside.

It asks for transformers below 5.9, so that it has an environment of its own;
docs/trainers/lmms-engine.md says how to make it. Its padding-free forwards take two functions from
flash_attn and a loss from Liger, both for GPUs; a line or two of torch stands in for each here.
Attention is its own, by its "sdpa" backend.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from integration.common import (
    BATCH,
    STEPS,
    TEXT_PROCESSOR,
    import_lmms_engine,
    loader,
    optimizer,
    rows,
)
from mrope import MRopeCollator, MRopeSpec
from mrope.collate.collator import Collate
from mrope.collate.padding import PaddingCollator
from support.models import model_config, tiny_examples, tiny_model

# Its own imports' calls of what others deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")

RULE = "transformers-4.57"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Return a function that imports a module of lmms-engine."""
    return import_lmms_engine(monkeypatch)


# Its rope functions -------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "family,function",
    [("qwen3_vl", "qwen3_vl_get_rope_index"), ("qwen2_5_vl", "qwen2_5_vl_rope_index")],
)
@pytest.mark.parametrize("seed", range(5))
def test_its_rope_functions_agree(
    engine: Any, family: str, function: str, side: Any, seed: int
) -> None:
    own = getattr(engine("models.common_ops.rope"), function)
    spec = MRopeSpec.from_config(model_config(family), RULE)
    examples = tiny_examples(family, rows=6, seed=seed)
    batch = MRopeCollator(PaddingCollator(padding_side=side), spec)(examples)
    names = ("input_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    arguments = {name: batch[name] for name in names}
    if "second_per_grid_ts" in batch:
        arguments["second_per_grid_ts"] = batch["second_per_grid_ts"]
    wanted = own(SimpleNamespace(config=tiny_model(family).config), **arguments)
    for found, expected in zip((batch["position_ids"], batch["rope_deltas"]), wanted, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


# Its models ---------------------------------------------------------------------------------------


def qwen3_vl(engine: Any) -> Any:
    patch = engine("models.qwen3_vl.monkey_patch").apply_liger_kernel_to_qwen3_vl
    patch(use_rmpad=True, rope=False, rms_norm=False, swiglu=False)
    return tiny_model("qwen3_vl").train()


def plain_aero(engine: Any) -> Any:
    aero = engine("models.aero_realtime")
    own = dict(model_config("qwen3_vl"))
    audio = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = aero.AeroRealtimeConfig(
        text_config=own["text_config"],
        vision_config=own["vision_config"],
        audio_config=aero.AeroRealtimeAudioEncoderConfig(**audio, num_attention_heads=2),
        image_token_index=own["image_token_id"],
        video_token_index=own["video_token_id"],
        vision_start_token_index=own["vision_start_token_id"],
    )
    torch.manual_seed(0)
    model = aero.AeroRealtimeForConditionalGeneration
    return model._from_config(config, attn_implementation="sdpa").train()


def aero_realtime(engine: Any) -> Any:
    return pad_free(engine, plain_aero(engine))


def pad_free(engine: Any, model: Any) -> Any:
    engine("models.aero_realtime.monkey_patch").apply_rmpad_to_aero_realtime(model)
    return model


class _Loss:
    """What Liger's fused loss computes, in torch."""

    def __init__(self, reduction: str) -> None:
        self.reduction = reduction

    def __call__(self, weight: Any, hidden: Any, labels: Any) -> torch.Tensor:
        return functional.cross_entropy(hidden @ weight.T, labels, reduction=self.reduction)


@pytest.fixture
def own_calls(engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stand in for GPU code, undo the patched classes, and count calls of the rope function."""
    calls, rope = [0], engine("models.common_ops.rope").qwen3_vl_get_rope_index

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return rope(*args, **kwargs)

    stand_ins = {
        "index_first_axis": lambda rows, indices: rows[indices],
        "rearrange": importlib.import_module("einops").rearrange,
        "LigerFusedLinearCrossEntropyLoss": _Loss,
        "_HAS_LIGER": True,
        "qwen3_vl_get_rope_index": counted,
    }
    for name in ("qwen3_vl.qwen3_vl_ops", "qwen3_vl.qwen3_vl_liger"):
        for attribute, value in stand_ins.items():
            monkeypatch.setattr(engine(f"models.{name}"), attribute, value, raising=False)
    for attribute, value in stand_ins.items():
        module = engine("models.aero_realtime.aero_realtime_liger")
        monkeypatch.setattr(module, attribute, value, raising=False)
    live = importlib.import_module("transformers.models.qwen3_vl.modeling_qwen3_vl")
    aero = engine("models.aero_realtime.modeling_aero_realtime")
    for module in (live, aero):
        for cls in vars(module).values():
            if isinstance(cls, type) and issubclass(cls, torch.nn.Module):
                monkeypatch.setattr(cls, "forward", cls.forward)
    return calls


def train(model: Any, collate: Collate, examples: list[dict[str, Any]]) -> list[float]:
    step, losses = optimizer(model), []
    for batch in loader(examples, collate):
        loss = model(**batch).loss
        loss.backward()
        step.step()
        step.zero_grad()
        losses.append(loss.item())
    return losses


def tensors(stream: bool) -> list[dict[str, Any]]:
    """Return rows as its processors make them, with a text stream beside the tokens or without."""
    made = [
        {name: torch.as_tensor(x) for name, x in row.items() if name != "mm_token_type_ids"}
        for row in rows("qwen3_vl", count=18)
    ]
    return [row | ({"text_stream_ids": row["input_ids"]} if stream else {}) for row in made]


@pytest.mark.parametrize(
    "build,kind", [(qwen3_vl, "VisionCollator"), (aero_realtime, "AeroRealtimeCollator")]
)
def test_equal_losses(engine: Any, own_calls: list[int], build: Any, kind: str) -> None:
    inner = getattr(engine("datasets.collator"), kind)(TEXT_PROCESSOR)
    examples = tensors(stream=kind == "AeroRealtimeCollator")
    off = train(build(engine), inner, examples)
    assert own_calls == [STEPS] and len(set(off)) == STEPS
    model = build(engine)
    spec = MRopeSpec.from_config(model.config.to_dict(), RULE)
    assert spec.family == model.config.model_type
    assert train(model, MRopeCollator(inner, spec), examples) == off
    assert own_calls == [STEPS]


def test_the_plain_aero_forward_needs_positions(engine: Any, own_calls: list[int]) -> None:
    """Left to itself it numbers tokens one by one; only its padding-free forward knows more."""
    model = plain_aero(engine).eval()
    spec = MRopeSpec.from_config(model.config.to_dict(), RULE)
    collate = MRopeCollator(engine("datasets.collator").VisionCollator(TEXT_PROCESSOR), spec)
    batch = dict(collate(tensors(stream=False)[:BATCH]))
    without = {name: value for name, value in batch.items() if name != "position_ids"}
    with torch.no_grad():
        alone, given = model(**without).loss, model(**batch).loss
        assert own_calls == [0]
        pad_free(engine, model)
        wanted = model(**without).loss
    assert own_calls == [1]
    torch.testing.assert_close(given, wanted, rtol=0, atol=1e-5)
    assert (alone - wanted).abs() > 1e-4

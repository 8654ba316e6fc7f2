"""An unmodified model decodes at the right position behind a batch of the collator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import PreTrainedModel

from mrope.collate.padding import PaddingCollator
from mrope.hf import attach, drop_rope_deltas, keep_rope_deltas
from support.models import media_of, tiny_examples, tiny_model
from support.steps import tensor_collator

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "paddleocr_vl"]
CONFIG = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def kept() -> Iterator[None]:
    """Whatever a test does, models keep deltas afterwards."""
    yield
    keep_rope_deltas()


def make_batches(family: str, side: str = "left", rows: int = 3) -> tuple[dict[str, Any], Any]:
    """Return what a processor gives, and a collator's batch, of rows with the lowest deltas."""
    examples = [dict(one) for one in tiny_examples(family, **media_of(family)[0], rows=6)]
    for example in examples:
        del example["labels"]
    inner = PaddingCollator(padding_side=side)  # type: ignore[arg-type]
    collate = tensor_collator(family, inner)
    picked = collate(examples)["rope_deltas"].flatten().argsort()[:rows]
    examples = [examples[row] for row in picked]
    return inner(examples), collate(examples)


def cache_of(output: Any) -> dict[str, Any]:
    """Return the cache under its name; transformers 5.24 renamed it, in inputs and outputs."""
    [name] = {"past_key_values", "cache"} & output.keys()
    return {name: output[name]}


@torch.no_grad()
def decode(model: Any, batch: dict[str, Any], steps: int = 3) -> torch.Tensor:
    """Prefill, then decode fixed tokens without position ids; return the logits of the steps."""
    cache = cache_of(model(**batch, use_cache=True))
    rows, logits = len(batch["input_ids"]), []
    for step in range(steps):
        output = model(input_ids=torch.full((rows, 1), 5 + step), **cache, use_cache=True)
        cache = cache_of(output)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def go_on(model: Any, batch: dict[str, Any], tokens: int = 4) -> torch.Tensor:
    """Prefill by a call, then let `generate` go on from the cache."""
    prefill = model(**batch, use_cache=True)
    # Not the last column: in a row padded on the right, it is padding.
    last = batch["attention_mask"].cumsum(-1).argmax(-1)
    first = prefill.logits[torch.arange(len(last)), last].argmax(-1)[:, None]
    ids = torch.cat([batch["input_ids"], first], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(first)], dim=1)
    found: torch.Tensor = model.generate(
        input_ids=ids, attention_mask=mask, **cache_of(prefill), max_new_tokens=tokens, **CONFIG
    )
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_decoded_tokens_follow_the_prefill(family: str) -> None:
    plain_batch, batch = make_batches(family, rows=1)
    assert batch["rope_deltas"].any()
    expected = decode(tiny_model(family), plain_batch)
    assert torch.equal(decode(tiny_model(family), batch), expected)
    assert torch.equal(decode(attach(tiny_model(family)), batch), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_decode_as_after_the_models_own_positions(family: str, side: str) -> None:
    plain_batch, batch = make_batches(family, side)
    model, own = tiny_model(family), tiny_model(family)
    assert torch.equal(decode(model, batch), decode(own, plain_batch))
    assert torch.equal(model.model.rope_deltas, own.model.rope_deltas)
    assert torch.equal(go_on(model, batch), go_on(own, plain_batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_deltas_of_an_earlier_generate_are_replaced(family: str) -> None:
    plain_batch, _ = make_batches(family)
    single, single_batch = make_batches(family, rows=1)
    model = tiny_model(family)
    expected = model.generate(**plain_batch, max_new_tokens=4, **CONFIG)
    logits = decode(tiny_model(family), single)
    assert torch.equal(decode(model, single_batch), logits)
    # `generate` computes its own again, whatever the batch before brought.
    assert torch.equal(model.generate(**plain_batch, max_new_tokens=4, **CONFIG), expected)
    assert torch.equal(decode(model, single_batch), logits)


def test_text_rows_replace_deltas_of_images() -> None:
    _, batch = make_batches("qwen3_vl", rows=1)
    [text] = tiny_examples("qwen3_vl", images=False, videos=False, rows=1)
    text_batch = tensor_collator("qwen3_vl")([{"input_ids": text["input_ids"]}])
    model = tiny_model("qwen3_vl")
    decode(model, batch)
    expected = decode(tiny_model("qwen3_vl"), text_batch)
    assert torch.equal(decode(model, text_batch), expected)


def test_without_it_the_position_is_wrong() -> None:
    """What the one line is for: turns green without it once transformers stores deltas itself."""
    plain_batch, batch = make_batches("qwen3_vl", rows=1)
    drop_rope_deltas()
    expected = decode(tiny_model("qwen3_vl"), plain_batch)
    assert not torch.allclose(decode(tiny_model("qwen3_vl"), batch), expected)


def test_it_is_set_once_and_undone() -> None:
    keep_rope_deltas()
    call = PreTrainedModel.__call__
    keep_rope_deltas()
    assert PreTrainedModel.__call__ is call
    drop_rope_deltas()
    assert "__call__" not in vars(PreTrainedModel)
    drop_rope_deltas()


def test_another_librarys_call_is_called_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    drop_rope_deltas()
    calls = []

    def counted(self: Any, *args: Any, **inputs: Any) -> Any:
        calls.append(type(self).__name__)
        return torch.nn.Module.__call__(self, *args, **inputs)

    monkeypatch.setattr(PreTrainedModel, "__call__", counted, raising=False)
    keep_rope_deltas()
    plain_batch, batch = make_batches("qwen2_vl", rows=1)
    assert torch.equal(
        decode(tiny_model("qwen2_vl"), batch), decode(tiny_model("qwen2_vl"), plain_batch)
    )
    assert "Qwen2VLModel" in calls
    drop_rope_deltas()
    assert PreTrainedModel.__call__ is counted


def test_models_without_the_attribute_get_none() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    model(input_ids=torch.tensor([[1, 2]]), rope_deltas=torch.tensor([[3]]))
    assert not [one for one in model.modules() if "rope_deltas" in vars(one)]


def test_a_compiled_model_keeps_deltas_and_is_compiled_once() -> None:
    graphs, family = [], "qwen3_vl"

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    # Without pixels: given these, the unmodified forward reads tensors on the host.
    [text] = tiny_examples(family, images=False, videos=False, rows=1)
    batch = dict(tensor_collator(family)([{"input_ids": text["input_ids"]}]))
    del batch["has_padding"]
    model = tiny_model(family)
    expected = model(**batch).logits
    model.model.rope_deltas = None
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    for delta in (-3, -4, -5):
        batch["rope_deltas"] = torch.tensor([[delta]])
        torch.testing.assert_close(compiled(**batch).logits, expected)  # type: ignore[no-untyped-call]
        assert model.model.rope_deltas is batch["rope_deltas"]
    assert len(graphs) == 1

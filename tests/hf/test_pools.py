"""GLM-5-Next in one row: its linear layers once, its pools within examples, logits of rows alone."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from hf.test_linear import Operators, assert_as_rows_alone
from hf.test_replaced_forwards import doubled
from mrope import MRopeCollator, MRopeError, MRopeSpec, VisionSpec
from mrope.guard import SyncGuard
from mrope.hf import attach, fused, linear
from mrope.hf.pools import find_pools, select_pools
from mrope.spec import example_config
from support.models import model_config, tiny_examples, tiny_spec

glm5 = pytest.importorskip("transformers.models.glm5_next.modeling_glm5_next")

FAMILY = "glm5_next"
# Tokens behind the media of an example: examples within the indexer's 16 tokens, and above them.
LENGTHS = [1, 90, 0, 140, 40, 3, 40]
SHARED = {"layer_types": ["indexed_attention"] * 2, "indexer_types": ["full", "shared"]}
# Two heads: of both products none is positive for many pools, which then tie.
TIES = {"index_n_heads": 2}


def make_model(attention: str = "sdpa", **text: Any) -> Any:
    """A small model whose weights are large enough that its indexer's choice matters."""
    config = model_config(FAMILY)
    config["text_config"] |= text
    torch.manual_seed(0)
    live = AutoConfig.for_model(config.pop("model_type"), **config)
    model: Any = AutoModelForImageTextToText.from_config(live, attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "visual" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def rows_of(lengths: list[int]) -> list[dict[str, Any]]:
    """Examples of media, only text, and media, with so many tokens behind them."""
    made = tiny_examples(FAMILY, rows=3)
    examples = []
    for number, length in enumerate(lengths):
        one = copy.deepcopy(made[number % 3])
        more = np.random.default_rng(number).integers(20, 300, length)
        for name, tail in (("input_ids", more), ("mm_token_type_ids", np.zeros_like(more))):
            one[name] = np.concatenate((one[name], tail))
        one["labels"] = one["input_ids"].copy()
        examples.append(one)
    return examples


def collate(examples: Any, **options: Any) -> dict[str, Any]:
    vision = VisionSpec.from_config(model_config(FAMILY))
    return dict(MRopeCollator(None, tiny_spec(FAMILY), vision, **options)(copy.deepcopy(examples)))


def flatten(examples: Any, multiple: int = 1) -> dict[str, Any]:
    return collate(examples, packing="flatten", attached=True, pad_to_multiple_of=multiple)


def assert_as_alone(model: Any, plain: Any, multiple: int = 1) -> None:
    """An attached model gives the logits, loss and gradients that the plain one gives row by row."""
    examples = rows_of(LENGTHS)
    batch = flatten(examples, multiple)
    with SyncGuard() as guard:
        outputs = model(**batch)
        outputs.loss.backward()
    assert guard.count == 0, guard.report()
    alone = [plain(**collate([one])) for one in examples]
    assert_as_rows_alone(outputs, alone, examples, model, plain)
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name


@pytest.mark.parametrize(
    ("attention", "multiple", "text"),
    [
        ("sdpa", 1, {}),
        ("eager", 64, {}),
        ("sdpa", 64, TIES),
        ("sdpa", 1, {"index_kpool_always_select_tail": False}),
        ("sdpa", 1, {"index_kpool": 1, **TIES}),
        ("sdpa", 1, {"index_kpool": 16}),
        ("sdpa", 1, {"index_topk": 2048}),
        ("sdpa", 1, {"linear_lower_bound": None}),
        ("eager", 1, {**SHARED, **TIES, "mlp_layer_types": ["sparse"] * 2}),
    ],
)
def test_as_each_example_alone(attention: str, multiple: int, text: dict[str, Any]) -> None:
    model = attach(make_model(attention, **text))
    assert_as_alone(model, make_model(attention, **text), multiple)


def test_gradient_checkpointing() -> None:
    model = attach(make_model().train())
    model.gradient_checkpointing_enable()
    assert_as_alone(model, make_model())


def test_a_foreign_forward_of_a_linear_layer_runs_segment_by_segment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cls = glm5.Glm5NextTextLinearAttention
    monkeypatch.setattr(cls, "forward", doubled(cls.forward))
    assert_as_alone(attach(make_model()), make_model())


def test_a_foreign_forward_of_an_indexer_takes_padded_rows_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cls = glm5.Glm5NextTextIndexer
    monkeypatch.setattr(cls, "forward", doubled(cls.forward))
    model = attach(make_model())
    model(**collate(rows_of([4, 11])))
    with pytest.raises(MRopeError, match="not supported with Glm5NextTextIndexer.forward is"):
        model(**flatten(rows_of([4, 11])))


def test_as_many_operators_for_thirty_examples_as_for_three() -> None:
    """Of the same lengths: on a CPU examples with as many pools are ranked together."""
    model = attach(make_model())
    counts = []
    for examples in (3, 30):
        # Of text: a tower attends image by image.
        texts = [rows_of([0, length])[1] for length in (4, 11, 30)]
        batch = flatten(texts * (examples // 3))
        with Operators() as operators, torch.no_grad():
            model(**batch)
        counts.append(operators.count)
    assert counts[0] == counts[1]


def test_a_row_without_what_linear_layers_read_is_refused() -> None:
    batch = flatten(rows_of([4, 11]))
    del batch["linear_slots"]
    with pytest.raises(MRopeError, match="has no linear_slots"):
        attach(make_model())(**batch)


def test_an_unmodified_model_gets_no_flattened_rows() -> None:
    """Its linear layers and its pools look over borders, with causal_conv1d without a word."""
    with pytest.raises(MRopeError, match="refused for an unmodified glm5_next"):
        collate(rows_of([4]), packing="flatten")


def test_a_release_whose_gradients_are_nan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrope.collate.packing.installed_transformers", lambda: "5.16.1")
    with pytest.raises(MRopeError, match="glm5_next with transformers 5.16.1, whose gradients"):
        flatten(rows_of([4]))
    spec = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.17")
    assert MRopeCollator(None, spec, packing="flatten", attached=True)([{"input_ids": [7]}])


def test_a_token_that_selects_nothing_is_refused_under_eager_attention() -> None:
    """It attends to the whole row there, and would see other examples."""
    text = {"index_kpool_always_select_tail": False}
    with pytest.raises(MRopeError, match="without index_kpool_always_select_tail"):
        attach(make_model("eager", **text))(**flatten(rows_of([4, 11])))


def states_of(sizes: list[int], config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    length = sum(sizes)
    return torch.randn(1, length, config.hidden_size), torch.randn(1, length, config.q_lora_rank)


def selected(keys: torch.Tensor, width: int) -> torch.Tensor:
    """Return which keys each token selects, bool (tokens, width), of places with -1 for none."""
    chosen = torch.zeros(len(keys), width + 1, dtype=torch.bool)
    chosen.scatter_(1, torch.where(keys < 0, width, keys).long(), True)
    return chosen[:, :width]


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("heads", [1, 16])
def test_the_choice_of_each_example_alone(heads: int, tail: bool, alike: bool) -> None:
    """With many heads also by one ranking of the whole row, as on a GPU; with one, pools tie."""
    made = make_model(index_n_heads=heads, index_kpool_always_select_tail=tail)
    indexer = made.model.language_model.layers[1].self_attn.indexer
    equal = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(1, 60, 6).tolist()
        torch.manual_seed(seed)
        states, queries = states_of(sizes, indexer.config)
        borders = torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32)
        seq_idx = torch.arange(6).repeat_interleave(torch.tensor(sizes))[None]
        pools = find_pools(indexer.config, borders, seq_idx, sizes)
        pools = pools if alike else pools._replace(alike=[])
        ours = selected(select_pools(indexer, states, queries, pools, cache=None)[0], sum(sizes))
        alone = []
        parts = (torch.split(one, sizes, dim=1) for one in (states, queries))
        for one, query in zip(*parts, strict=True):
            mask = torch.ones(one.shape[:2], dtype=torch.bool)
            alone.append(selected(indexer(one, query, mask, None)[0], one.shape[1]))
        blocks: Any = torch.block_diag
        equal += int(torch.equal(ours, blocks(*alone).bool()))
    assert equal == 8 if alike or heads > 1 else equal < 8


def test_a_kernel_gets_the_padded_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not borders, for whose chunks it would ask the device."""
    reference = inspect.unwrap(glm5.chunk_kimi_delta_attention)
    calls = []

    def kernel(*parts: Any, **options: Any) -> Any:
        calls.append(list(parts[0].shape[:2]))
        assert not {"cu_seqlens", "cu_seq_lens_q", "seq_idx"} & {*options}
        return reference(*parts, **options)

    kernel.__wrapped__ = reference  # type: ignore[attr-defined]
    monkeypatch.setattr(glm5, "chunk_kimi_delta_attention", kernel)
    model, batch = attach(make_model()), flatten(rows_of(LENGTHS))
    model(**batch)
    assert not calls
    monkeypatch.setattr(fused, "can_call", lambda _: True)
    assert_as_alone(model, make_model())
    assert calls[0] == batch["linear_shape"] and len(calls) == 1 + len(LENGTHS)


def test_weights_of_the_convolution_stay_float32_in_half_precision() -> None:
    layer = make_model().model.language_model.layers[0].self_attn
    states = torch.randn(1, 90, 3 * layer.qkv_dim).bfloat16()
    own = inspect.unwrap(glm5.causal_conv1d_fn)
    wanted = own(states.mT, layer.conv1d.weight.squeeze(1), None, layer.activation).mT
    apart = linear._convolve(layer, states, {}) != wanted
    # Not 0 everywhere: float32 may add up the taps in another order.
    assert apart.float().mean() < 0.01

"""The model that only reads: same outputs, same gradients, nothing else touched."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch

pytest.importorskip("transformers")

from mrope import MRopeCollator, MRopeError
from mrope.collate.padding import PaddingCollator
from mrope.hf import attach, detach, explain_attention
from mrope.towers import VisionSpec
from support.models import MODEL_FAMILIES, model_config, tiny_examples, tiny_model, tiny_spec
from support.steps import (
    assert_same_step,
    logits_of,
    make_batches,
    step,
    tensor_collator,
)


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_the_base_model_returns_the_class_of_its_own_forward(family: str) -> None:
    """With the towers' outputs where it has fields for them, as from transformers 5.24 on."""
    plain_batch, batch = make_batches(family)
    labels = ("labels", "second_per_grid_ts")
    model = tiny_model(family).model
    own = model(**{name: value for name, value in plain_batch.items() if name not in labels})
    attach(model)
    ours = model(**{name: value for name, value in batch.items() if name not in labels})
    assert type(ours) is type(own)
    assert ours.keys() == own.keys()
    for name in {"image_outputs", "video_outputs"} & own.keys():
        for one, other in zip(ours[name].pooler_output, own[name].pooler_output, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_generation_gives_the_same_tokens(family: str) -> None:
    examples = [{k: v for k, v in e.items() if k != "labels"} for e in tiny_examples(family)]
    inner = PaddingCollator(padding_side="left")
    plain_batch, batch = inner(examples), tensor_collator(family, inner)(examples)
    model = tiny_model(family)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**plain_batch, **options)
    attach(model)
    assert torch.equal(model.generate(**plain_batch, **options), expected)

    model.model.rope_deltas = None  # what the calls above left there
    with torch.no_grad():
        prefill = model(**batch, use_cache=True)
    assert torch.equal(model.model.rope_deltas, batch["rope_deltas"])
    first = prefill.logits[:, -1:].argmax(-1)
    tokens = torch.cat([batch["input_ids"], first], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(first)], dim=1)
    options["max_new_tokens"] = 5
    # transformers 5.24 renamed the cache, in inputs and outputs.
    [name] = {"past_key_values", "cache"} & prefill.keys()
    continued = model.generate(
        input_ids=tokens, attention_mask=mask, **{name: prefill[name]}, **options
    )
    assert torch.equal(continued, expected)


def test_a_batch_without_positions_is_refused_and_strict_false_computes_them() -> None:
    plain_batch, batch = make_batches("qwen3_vl")
    model = tiny_model("qwen3_vl")
    expected = model(**plain_batch).logits
    attach(model)
    with pytest.raises(MRopeError, match="got image and video pixels without position_ids"):
        model(**plain_batch)
    without_vision = plain_batch | {"position_ids": batch["position_ids"]}
    with pytest.raises(MRopeError, match="without image_scatter_index, image_split_sizes, video_"):
        model(**without_vision)
    without_positions = {name: value for name, value in batch.items() if name != "position_ids"}
    with pytest.raises(MRopeError, match="vision tensors of a MRopeCollator, but no position_ids"):
        model(**without_positions)
    attach(detach(model), strict=False)
    assert torch.equal(model(**plain_batch).logits, expected)
    assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize(
    ("family", "lost"), [("qwen3_vl", "pixel_values"), ("qwen2_5_vl", "pixel_values_videos")]
)
def test_pixels_that_were_removed_are_missed(family: str, lost: str) -> None:
    _, batch = make_batches(family)
    model = attach(tiny_model(family))
    del batch[lost]
    with pytest.raises(MRopeError, match=f"_scatter_index without {lost}"):
        model(**batch)
    model(**tensor_collator(family)(tiny_examples(family, images=False, videos=False)))


def test_only_the_instance_is_touched_and_detach_restores_it() -> None:
    model, other = tiny_model("qwen3_vl"), tiny_model("qwen3_vl")
    base_class, text_class = type(model.model), type(model.model.language_model)
    before = base_class.forward, text_class._deepstack_process
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert attach(model) is model
    assert (base_class.forward, text_class._deepstack_process) == before
    assert "forward" not in vars(other.model)
    assert model.state_dict().keys() == state.keys()
    assert detach(model) is model
    for touched in (model.model, model.model.language_model):
        assert not {"forward", "_deepstack_process", "mrope_strict"} & vars(touched).keys()


def test_a_copy_of_an_attached_model_reads_with_its_own_weights() -> None:
    _, batch = make_batches("qwen3_vl")
    model = attach(tiny_model("qwen3_vl"))
    twin = copy.deepcopy(model)
    expected = model(**batch).logits
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.language_model.embed_tokens.weight.zero_()
    assert torch.equal(twin(**batch).logits, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_attach_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach(tiny_model("qwen3_vl"))
    with pytest.raises(MRopeError, match="already has a forward of its own"):
        attach(model)
    with pytest.raises(MRopeError, match="is not attached"):
        detach(tiny_model("qwen3_vl"))
    with pytest.raises(MRopeError, match="Linear holds 0 base models of a known family"):
        attach(torch.nn.Linear(2, 2))
    pair = torch.nn.ModuleList([tiny_model("qwen2_vl"), tiny_model("qwen3_vl")])
    with pytest.raises(MRopeError, match="dict is no model: give the model"):
        attach(model_config("qwen3_vl"))  # type: ignore[type-var]
    with pytest.raises(MRopeError, match="ModuleList holds 2 base models"):
        attach(pair)
    with pytest.raises(MRopeError, match="too late: .* wrapped by DataParallel"):
        attach(torch.nn.DataParallel(tiny_model("qwen3_vl")))
    with pytest.raises(MRopeError, match=r"too late: .* wrapped by torch.compile"):
        attach(cast("torch.nn.Module", torch.compile(tiny_model("qwen3_vl"))))
    sliding = tiny_model("qwen2_vl")
    sliding.model.language_model.config.layer_types[0] = "sliding_attention"
    with pytest.raises(MRopeError, match="sliding window layers"):
        attach(sliding)


@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_gradient_checkpointing(family: str) -> None:
    plain_batch, batch = make_batches(family)
    model = tiny_model(family).train()
    model.gradient_checkpointing_enable()
    theirs = step(model, plain_batch)
    assert_same_step(step(attach(model), batch), theirs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_text_layers() -> None:
    """With shapes of their own; `test_one_graph.py` compiles those of every family with fixed ones."""
    plain_batch, batch = make_batches("qwen2_5_vl")
    model = tiny_model("qwen2_5_vl").train()
    theirs = step(model, plain_batch)
    attach(model)
    for layer in model.model.language_model.layers:
        layer.compile(backend="aot_eager")
    assert_same_step(step(model, batch), theirs, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
def test_a_peft_model() -> None:
    peft = pytest.importorskip("peft")
    plain_batch, batch = make_batches("qwen3_vl")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("qwen3_vl"), config).train()
    theirs = step(model, plain_batch)
    assert len(theirs[1]) == 4 * len(model.base_model.model.model.language_model.layers)
    assert_same_step(step(attach(model), batch), theirs)


# The unmodified model's output holds views.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
@pytest.mark.usefixtures("one_process")
def test_ddp_and_fsdp2_wrap_an_attached_model() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    plain_batch, batch = make_batches("qwen3_vl")
    model = tiny_model("qwen3_vl").train()
    expected = step(model, plain_batch)[0].loss
    wrapped = DistributedDataParallel(attach(model))
    assert torch.equal(step(wrapped, batch)[0].loss, expected)
    with pytest.raises(MRopeError, match="too late: .* wrapped by DistributedDataParallel"):
        attach(wrapped)

    sharded = attach(tiny_model("qwen3_vl").train())
    mesh = init_device_mesh("cpu", (1,))
    for layer in sharded.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    output = sharded(**batch)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected, rtol=0, atol=1e-6)
    with pytest.raises(MRopeError, match="too late: .* wrapped by FSDPModule"):
        attach(sharded)

    for module in (wrapped, sharded):
        assert "TextModel: varlen" in explain_attention(module)
        torch.testing.assert_close(step(detach(module), plain_batch)[0].loss, expected)
        with pytest.raises(MRopeError, match="is not attached"):
            explain_attention(module)


@pytest.mark.parametrize(
    ("family", "packing"),
    [("qwen3_vl", None), ("qwen3_vl", "flatten"), ("hyperclovax_vision_v2", None)],
)
def test_a_mask_of_the_users_own_is_kept(family: str, packing: Any) -> None:
    """In four dimensions it says what each token attends to; here all of them to all."""
    vision = VisionSpec.from_config(model_config(family))
    collate = MRopeCollator(None, tiny_spec(family), vision, packing=packing)
    batch = dict(collate([tiny_examples(family)[0]] * (1 if packing else 2)))
    rows, width = batch["input_ids"].shape
    model = tiny_model(family)
    causal = logits_of(model, batch)
    batch["attention_mask"] = torch.zeros(rows, 1, width, width)
    expected = logits_of(model, batch)
    assert not torch.allclose(expected, causal, atol=1e-3)
    torch.testing.assert_close(logits_of(attach(model), batch), expected)


def test_a_compiled_model_is_explained_and_detached() -> None:
    model = attach(tiny_model("qwen3_vl"))
    compiled = cast("torch.nn.Module", torch.compile(model, backend="eager"))
    assert "TextModel: varlen" in explain_attention(compiled)
    detach(compiled)
    assert not [one for one in model.modules() if "forward" in vars(one)]

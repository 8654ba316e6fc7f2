"""Fixed shapes: one graph for each pair of rungs, losses of the unmodified model, and padding without effect."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText

import mrope.hf
from mrope import MRopeCollator, MRopeError, Shapes, VisionSpec
from mrope.collate.packing import Flatten
from mrope.collate.padding import PaddingCollator
from mrope.guard import SyncGuard
from mrope.hf import attach, compile_layers, detach, explain_attention
from support.models import media_of, model_config, tiny_examples, tiny_model, tiny_spec

SHAPES = Shapes(
    tokens=(128, 256), patches=(128, 512), longest=128, patches_per_segment=8, tokens_per_example=8
)
# Of one rung: batches that are to be run by one graph, and by no other.
ONE_RUNG = replace(SHAPES, tokens=SHAPES.tokens[-1:], patches=SHAPES.patches[-1:])
PADDED = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "qwen4_exp",
    "glm4v",
    "glm_ocr",
    "paddleocr_vl",
    "cohere_compass",
    "cosmos3_omni",
)
FLATTENED = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
# With 1-D positions.
PLAIN = ("dots3_note", "exaone4_5", "hyperclovax_vision_v2", "lfm3_vl", "glm5_next")
CASES = [
    *((one, None) for one in (*PADDED, *PLAIN)),
    *((one, "flatten") for one in (*FLATTENED, *PLAIN)),
]
ALONE = {"images": False, "videos": False}


def examples_of(family: str, seed: int = 0, **media: bool) -> list[dict[str, Any]]:
    examples = tiny_examples(family, seed=seed, **(media or media_of(family)[0]))
    for example in examples:
        example["labels"] = torch.as_tensor(example["input_ids"]).clone()
    return examples


def collate(family: str, examples: Any, packing: Any, shapes: Shapes | None) -> dict[str, Any]:
    vision = VisionSpec.from_config(model_config(family))
    packing = packing and Flatten(attached=True)
    collator = MRopeCollator(None, tiny_spec(family), vision, packing=packing, shapes=shapes)
    batch: dict[str, Any] = collator(copy.deepcopy(examples))
    return batch


def step(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    model.zero_grad(set_to_none=True)
    loss: Any = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: one.grad for name, one in model.named_parameters()}


def unmodified_loss(model: Any, family: str, examples: Any) -> torch.Tensor:
    """The loss of a plain model on a padded batch of the same examples."""
    batch = PaddingCollator()(copy.deepcopy(examples))
    with torch.no_grad():
        loss: torch.Tensor = model(**batch).loss
    return loss


def model_of_depth(layers: int, family: str) -> Any:
    """Return a small model with so many layers in its tower and its text model, in training mode.

    Two compile in half the time of the shipped configs' four.
    """
    live: Any = tiny_model(family).config
    text, vision = live.text_config, live.vision_config
    if getattr(text, "layer_types", None):
        text.layer_types = (text.layer_types[-2:] * layers)[:layers]
    text.num_hidden_layers = layers
    for name in ("depth", "num_hidden_layers"):
        if hasattr(vision, name):
            setattr(vision, name, layers)
    torch.manual_seed(0)
    auto: Any = AutoModelForImageTextToText
    return auto.from_config(live, attn_implementation="sdpa").train()


@pytest.mark.parametrize(("family", "packing"), CASES)
@pytest.mark.parametrize("text_alone", [False, True])
def test_loss_and_gradients_are_those_without_padding(
    family: str, packing: Any, text_alone: bool
) -> None:
    examples = examples_of(family, **(ALONE if text_alone else {}))
    model: Any = attach(tiny_model(family).train())
    want, wanted = step(model, collate(family, examples, packing, None))
    batch = collate(family, examples, packing, SHAPES)
    # Whatever stands in the padding reaches neither loss nor gradients.
    used = (
        int(batch["vision_feature_mask"].sum()) * model.config.vision_config.spatial_merge_size**2
    )
    batch["pixel_values"][used:] = 3 * torch.randn_like(batch["pixel_values"][used:])
    loss, grads = step(model, batch)
    assert (loss - want).abs() < 1e-5
    for name, grad in grads.items():
        if ".indexer." in name or ".audio_tower." in name:  # it chooses keys, or is not run
            assert grad is None and wanted[name] is None
            continue
        assert grad is not None, name
        expected = torch.zeros_like(grad) if wanted[name] is None else wanted[name]
        assert torch.allclose(grad, expected, atol=2e-6), name
        assert not text_alone or "visual" not in name or not grad.any()


def test_pixels_that_were_removed_are_missed_and_a_model_that_is_not_attached_refuses() -> None:
    batch = collate("qwen3_vl", examples_of("qwen3_vl"), None, SHAPES)
    tokens = Shapes(tokens=SHAPES.tokens)
    model: Any = tiny_model("qwen3_vl")
    with pytest.raises(MRopeError, match=r"fixed shapes, and Qwen3VLModel is not attached"):
        model(**batch)
    model(**collate("qwen3_vl", examples_of("qwen3_vl"), None, tokens))
    del batch["pixel_values"]
    with pytest.raises(MRopeError, match="vision_feature_index without pixel_values"):
        attach(model)(**batch)


def test_garbage_that_is_gathered_would_be_seen() -> None:
    model: Any = attach(tiny_model("qwen3_vl").train())
    batch = collate("qwen3_vl", examples_of("qwen3_vl"), None, SHAPES)
    before, _ = step(model, dict(batch))
    batch["vision_feature_mask"][0, -1] = True
    batch["labels"][0, -1] = 5
    assert (step(model, batch)[0] - before).abs() > 1e-5


@contextmanager
def fresh_dynamo() -> Iterator[Any]:
    """Count graphs from 0. Guards of the attached model of an earlier test do not reach in."""
    reset: Any = torch._dynamo.reset
    reset()
    counters.clear()
    yield counters
    reset()


def test_two_hundred_batches_share_as_many_graphs_as_rungs() -> None:
    family = "qwen3_vl"
    plain, model = model_of_depth(2, family), attach(model_of_depth(2, family))
    compiled: Any = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    with fresh_dynamo() as counted, torch.inference_mode():
        for seed in range(200):
            media = {"images": seed % 3 != 0, "videos": seed % 2 == 0}
            examples = examples_of(family, seed, **media)[: 1 + (seed % 2)]
            examples += examples_of(family, seed, **ALONE)[: 2 - len(examples)]
            loss = compiled(**collate(family, examples, None, SHAPES)).loss
            if seed % 10 == 0:
                assert (loss - unmodified_loss(plain, family, examples)).abs() < 1e-5
        assert counted["stats"]["unique_graphs"] <= 4
        assert not counted["graph_break"]


# torch raises it while it traces the vmap of a packed mask.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_flattened_batches_share_graphs() -> None:
    model = attach(model_of_depth(2, "qwen2_5_vl"))
    compiled: Any = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    with fresh_dynamo() as counted, torch.inference_mode():
        for seed in range(6):
            batch = collate("qwen2_5_vl", examples_of("qwen2_5_vl", seed), "flatten", SHAPES)
            assert (compiled(**dict(batch)).loss - model(**batch).loss).abs() < 1e-5
        assert counted["stats"]["unique_graphs"] <= 4


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", *PLAIN[1:]])
def test_forward_and_backward_compile_to_one_graph(family: str) -> None:
    model: Any = attach(model_of_depth(2, family))
    compiled: Any = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    with fresh_dynamo() as counted:
        for seed in range(2):
            batch = collate(family, examples_of(family, seed), None, ONE_RUNG)
            want, wanted = step(model, dict(batch))
            loss, grads = step(compiled, dict(batch))
            assert (loss - want).abs() < 1e-5
            for one, other in zip(grads.values(), wanted.values(), strict=True):
                # An indexer chooses keys, and has no gradient.
                assert torch.allclose(one, other, atol=2e-6) if other is not None else one is None
        assert counted["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(torch.__version__ < "2.13", reason="an older torch may not quote the error")
def test_the_error_of_a_graph_says_what_its_batch_lacks() -> None:
    model: Any = attach(model_of_depth(2, "qwen3_vl"))
    compiled: Any = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    batch = collate("qwen3_vl", examples_of("qwen3_vl"), None, ONE_RUNG)
    del batch["vision_feature_index"]
    with fresh_dynamo(), pytest.raises(Unsupported, match="pixels without vision_feature_index"):
        compiled(**batch)


# Qwen4-Exp's layers attend to the keys that its indexer selects: always under a mask.
@pytest.mark.parametrize("family", [one for one in PADDED if one != "qwen4_exp"])
def test_compiled_text_layers_attend_without_a_mask(family: str) -> None:
    causal = []

    def find_causal(graph: Any, _: Any) -> Any:
        for node in graph.graph.nodes:
            if getattr(node.target, "__name__", "") == "scaled_dot_product_attention":
                options = node.kwargs
                causal.append(options["is_causal"] and options["attn_mask"] is None)
        return graph

    model: Any = attach(model_of_depth(2, family))
    layers = [one for one in model.modules() if getattr(one, "is_causal", False)]
    with fresh_dynamo():
        compiled: Any = torch.compile(model, fullgraph=True, dynamic=False, backend=find_causal)
        compiled(**collate(family, examples_of(family), None, SHAPES))
    assert sum(causal) == len(layers) > 0


# dynamo looks at the gradient of a layer's input, which is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_compile_one_by_one_and_share_graphs(family: str, checkpointing: bool) -> None:
    """As trainers compile under FSDP2, whose hooks stand between layers."""
    model: Any = attach(model_of_depth(12, family))
    if checkpointing:
        model.gradient_checkpointing_enable()
    batch = collate(family, examples_of(family), "flatten", SHAPES)
    want, _ = step(model, dict(batch))
    with fresh_dynamo() as counted:
        compile_layers(model, backend="aot_eager")
        loss, _ = step(model, batch)
        assert (loss - want).abs() < 1e-5
        # First layers, whose inputs need no gradient or whose windows differ, have graphs of their
        # own, up to 5 of 24 layers; the others are those beside the layers, and the loss.
        assert counted["stats"]["unique_graphs"] <= 9


def checkpointed() -> Any:
    model: Any = attach(model_of_depth(2, "qwen3_vl"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def with_lora() -> Any:
    peft = pytest.importorskip("peft")
    targets = peft.LoraConfig(target_modules=["q_proj", "v_proj", "qkv"])
    return attach(peft.get_peft_model(model_of_depth(2, "qwen3_vl"), targets))


def under_autocast() -> Any:
    return attach(model_of_depth(2, "qwen3_vl"))


@pytest.mark.parametrize("make", [checkpointed, with_lora, under_autocast])
def test_one_graph_for_checkpointing_peft_and_autocast(make: Any) -> None:
    model = make()
    compiled: Any = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    half = make is under_autocast
    with fresh_dynamo() as counted:
        for seed in range(2):
            batch = collate("qwen3_vl", examples_of("qwen3_vl", seed), None, ONE_RUNG)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                want = model(**dict(batch)).loss
                loss: Any = compiled(**dict(batch)).loss
            loss.backward()
            assert (loss - want).abs() < (2e-2 if half else 1e-5)
        assert counted["stats"]["unique_graphs"] == 1


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what a forward dispatches."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["qwen3_vl", "lfm3_vl"])
@pytest.mark.parametrize("images", [1, 6])
def test_as_many_operators_for_any_number_of_images(family: str, images: int) -> None:
    def count(examples: Any) -> int:
        batch = collate(family, examples, None, SHAPES)
        mode: Any = Operators
        with mode() as operators:
            model(**batch)
        return int(operators.count)

    model = attach(tiny_model(family))
    ids = [7, *[8, tiny_spec(family).image_token_id] * images]
    dim = VisionSpec.from_config(model_config(family)).patch_shape
    assert dim is not None
    many = {
        "input_ids": torch.tensor([*ids, 9]),
        "image_grid_thw": torch.tensor([[1, 2, 2]] * images),
        "pixel_values": torch.randn(4 * images, *dim),
    }
    assert count([many]) == count([{"input_ids": torch.tensor([7, 8, 9])}])


def test_what_was_chosen_is_said() -> None:
    model = attach(tiny_model("qwen3_vl"))
    assert "Qwen3VLVisionModel: varlen, in half precision on CUDA" in explain_attention(model)
    detach(model)
    attach(model, attention="segments")
    assert explain_attention(model).count("segments, as attach was told") == 2
    detach(model)
    model.config.text_config.attention_dropout = 0.1
    attach(model, attention="varlen")
    tower, text = explain_attention(model).splitlines()
    assert "varlen, as attach was told" in tower
    assert "segments, the variable-length kernel has no dropout" in text


def test_another_attention_after_attach_is_refused_by_name() -> None:
    model = attach(tiny_model("qwen3_vl"))
    batch = collate("qwen3_vl", examples_of("qwen3_vl"), None, None)
    model.set_attn_implementation("eager")
    with pytest.raises(MRopeError, match="set_attn_implementation does not reach the text layers"):
        model(**dict(batch))
    want = attach(detach(model))(**dict(batch)).loss
    detach(model).set_attn_implementation("sdpa")
    assert (attach(model)(**batch).loss - want).abs() < 1e-5


@pytest.mark.parametrize("packing", [None, "flatten"])
@pytest.mark.parametrize(
    ("family", "attached"),
    [
        ("qwen3_vl", False),
        *((one, True) for one in ("qwen3_vl", "lfm3_vl", "video_llama_3")),
    ],
)
def test_rungs_of_tokens_alone_are_for_unmodified_models_too(
    family: str, attached: bool, packing: Any
) -> None:
    """Tokens get a rung; pixels and tower tensors keep the shapes of their batch."""
    examples = examples_of(family)
    batch = collate(family, examples, packing, Shapes(tokens=(192,), tokens_per_example=8))
    assert batch["input_ids"].shape[1] == 192
    plain: Any = tiny_model(family).train()
    want = unmodified_loss(plain, family, examples)
    model = attach(plain) if attached else plain
    assert (model(**batch).loss - want).abs() < 1e-5


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("packing", [None, "flatten"])
def test_a_compiled_step_has_no_sync(packing: Any) -> None:
    """On CUDA tests/measure/one_graph.py runs these steps under set_sync_debug_mode."""
    syncs: list[str] = []

    def watched(graph: Any, _: Any) -> Any:
        # Within the backend: dynamo compiles nothing under the guard's dispatch mode.
        def run(*inputs: Any) -> Any:
            with SyncGuard() as guard:
                outputs = graph(*inputs)
            syncs.extend(site.op for site in guard.sites)
            return outputs

        return run

    model: Any = attach(model_of_depth(2, "qwen3_vl"))
    compiled: Any = torch.compile(model, fullgraph=True, dynamic=False, backend=watched)
    with fresh_dynamo():
        loss = compiled(**collate("qwen3_vl", examples_of("qwen3_vl"), packing, SHAPES)).loss
    with SyncGuard() as guard:
        loss.backward()
    # A graph has its device as a constant: what is cast to the dtype of a tensor "on the CPU" looks
    # like a copy from the device, and an index that it makes there, under the vmap of a packed mask,
    # like one to the device. On CUDA the constant is the tensors' own device.
    assert {*syncs} <= {"copy from the device", "copy of an index to the device"}
    assert guard.count == 0, guard.report()


def test_what_a_graph_holds_as_a_constant_is_found_from_types_and_texts() -> None:
    """torch before 2.12 passes no module of a model to such a function: compiling whole fails."""
    taken: dict[str, set[str]] = {}
    for file in Path(mrope.hf.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(
                ast.unparse(mark) == "torch.compiler.assume_constant_result"
                for mark in node.decorator_list
            ):
                kinds = {ast.unparse(one.annotation) for one in node.args.args if one.annotation}
                taken[f"{file.name} {node.name}"] = kinds
    assert len(taken) > 5
    others = {name: kinds - {"type", "tuple[str, str]"} for name, kinds in taken.items()}
    assert not any(others.values()), others

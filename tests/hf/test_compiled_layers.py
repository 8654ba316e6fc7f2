"""Layers compiled one by one, under what trainers put around a model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf.test_one_graph import (
    ONE_RUNG,
    checkpointed,
    collate,
    examples_of,
    fresh_dynamo,
    model_of_depth,
    step,
    under_autocast,
    with_lora,
)
from mrope import MRopeError, load_config
from mrope.guard import SyncGuard
from mrope.hf import SyncReport, attach, compile_layers, compiling, detach
from mrope.hf.compiling import CompiledLoss
from mrope.training.model import attach_and_compile
from support.attachable import make_model, without_labels
from support.models import tiny_model

# dynamo looks at the gradient of a layer's input, which is no leaf.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
FAMILY = "qwen3_vl"
# Beside their layers: a convolution or a norm of torch's own; modules that take sizes; crops.
TOWERS = ("glm4v", "video_llama_3", "cosmos3_edge", "hunyuan_vl", "hy_v4_vl", "minicpmv4_7")
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def in_ddp(model: Any) -> Any:
    return DistributedDataParallel(model)


def in_fsdp(model: Any) -> Any:
    for layer in (*model.model.visual.blocks, *model.model.language_model.layers):
        fully_shard(layer)
    return fully_shard(model)


def with_a_frozen_tower() -> Any:
    model = checkpointed()
    model.model.visual.requires_grad_(False)
    return model


@pytest.mark.parametrize("make", [checkpointed, with_a_frozen_tower, with_lora, under_autocast])
def test_checkpointing_peft_and_autocast(make: Any) -> None:
    model = make()
    half = make is under_autocast
    batches = [collate(FAMILY, examples_of(FAMILY, seed), None, ONE_RUNG) for seed in range(2)]
    with fresh_dynamo() as counted, torch.autocast("cpu", torch.bfloat16, enabled=half):
        wanted = [step(model, dict(batch))[0] for batch in batches]
        compile_layers(model, backend="aot_eager")
        graphs = []
        for batch, want in zip(batches, wanted, strict=True):
            assert (step(model, dict(batch))[0] - want).abs() < (2e-2 if half else 1e-5)
            graphs.append(counted["stats"]["unique_graphs"])
        assert graphs[0] == graphs[1] > 3
        assert not counted["graph_break"]


@pytest.mark.parametrize("packing", [None, "flatten"])
def test_pools_of_keys_and_states_that_decay_by_channel(packing: Any) -> None:
    family = "glm5_next"
    model: Any = attach(model_of_depth(2, family))
    batch = collate(family, examples_of(family), packing, ONE_RUNG)
    want, wanted = step(model, dict(batch))
    with fresh_dynamo() as counted:
        compile_layers(model, backend="aot_eager")
        loss, grads = step(model, batch)
        assert not counted["graph_break"]
    assert (loss - want).abs() < 1e-5
    assert [name for name, one in grads.items() if one is None] == [
        name for name, one in wanted.items() if one is None
    ]


@pytest.mark.parametrize("wrap", [in_ddp, in_fsdp])
def test_wrappers_of_ranks(wrap: Any, one_rank: None) -> None:
    model: Any = attach(model_of_depth(2, FAMILY))
    batches = [collate(FAMILY, examples_of(FAMILY, seed), None, ONE_RUNG) for seed in range(2)]
    wanted = [step(model, dict(batch)) for batch in batches]
    with fresh_dynamo() as counted:
        wrapped = wrap(compile_layers(model, backend="aot_eager"))
        graphs = []
        for batch, (want, grads) in zip(batches, wanted, strict=True):
            loss, found = step(wrapped, dict(batch))
            assert (loss - want).abs() < 1e-5
            name = "model.language_model.layers.0.mlp.up_proj.weight"
            grad: Any = found[f"module.{name}" if wrap is in_ddp else name]
            grad = grad.full_tensor() if wrap is in_fsdp else grad
            torch.testing.assert_close(grad, grads[name], rtol=0, atol=1e-5)
            graphs.append(counted["stats"]["unique_graphs"])
        assert graphs[0] == graphs[1] > 3


def test_detach_undoes_it_and_the_loss_takes_a_count_of_tokens() -> None:
    model: Any = attach(model_of_depth(2, FAMILY))
    batch = collate(FAMILY, examples_of(FAMILY), None, ONE_RUNG)
    before = {name: one.shape for name, one in model.state_dict().items()}
    wanted = [model(**dict(batch), num_items_in_batch=count).loss for count in (50, 60)]
    with fresh_dynamo() as counted:
        compile_layers(model, backend="aot_eager")
        assert {name: one.shape for name, one in model.state_dict().items()} == before
        assert isinstance(model.loss_function, CompiledLoss)
        graphs = []
        for count, want in zip((50, 60), wanted, strict=True):
            loss = model(**dict(batch), num_items_in_batch=count).loss
            assert (loss - want).abs() < 1e-5
            graphs.append(counted["stats"]["unique_graphs"])
        assert graphs[0] == graphs[1]
        detach(model)
        assert "_loss_function" not in vars(model)
        layers = model.model.language_model.layers
        assert all(layer._compiled_call_impl is None for layer in layers)


def test_generate_runs_layers_as_they_were() -> None:
    model: Any = attach(model_of_depth(2, FAMILY)).eval()
    prompt = {"input_ids": torch.tensor([[7, 8, 9]]), "max_new_tokens": 12, "do_sample": False}
    want = model.generate(**prompt)
    with fresh_dynamo() as counted:
        compile_layers(model, backend="eager")
        assert torch.equal(model.generate(**prompt), want)
        assert not counted["stats"]["unique_graphs"]


def test_a_loop_that_decodes_runs_layers_as_they_were() -> None:
    model: Any = attach(model_of_depth(2, FAMILY)).eval()

    def decode() -> torch.Tensor:
        ids = torch.tensor([[7, 8, 9]])
        new, cache = ids, None
        for _ in range(12):
            end = ids.shape[1]
            places = torch.arange(end - new.shape[1], end).expand(3, 1, -1)
            out = model(input_ids=new, position_ids=places, cache=cache, use_cache=True)
            cache, new = out.past_key_values, out.logits[:, -1:].argmax(-1)
            ids = torch.cat((ids, new), 1)
        return ids

    with fresh_dynamo() as counted, torch.no_grad():
        want = decode()
        compile_layers(model, backend="eager")
        assert torch.equal(decode(), want)
        assert counted["stats"]["unique_graphs"] <= 3  # of the prompt: layers, and the last norm


def test_what_is_compiled_twice_is_undone_at_once() -> None:
    model: Any = attach(model_of_depth(1, FAMILY))
    batch = collate(FAMILY, examples_of(FAMILY), None, ONE_RUNG)
    with fresh_dynamo() as counted, torch.inference_mode():
        compile_layers(compile_layers(model, backend="aot_eager"), backend="eager")
        detach(model)
        attach(model)(**batch)
        assert not counted["stats"]["unique_graphs"]


def test_what_a_user_compiled_stays() -> None:
    model: Any = attach(model_of_depth(2, FAMILY))
    own = [model, model.model, model.model.language_model.layers[0]]
    for module in own:
        module.compile(backend="eager")
    calls = [module._compiled_call_impl for module in own]
    compile_layers(model, backend="eager")
    later = model.model.language_model.layers[1]
    later.compile(backend="eager")
    calls.append(later._compiled_call_impl)
    detach(model)
    assert [module._compiled_call_impl for module in (*own, later)] == calls


def test_a_model_that_is_not_attached_is_refused() -> None:
    with pytest.raises(MRopeError, match="is not attached"):
        compile_layers(tiny_model(FAMILY))


@pytest.mark.parametrize("packing", [None, "flatten"])
def test_without_rungs_few_shapes_are_taken(packing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_MOST_SHAPES", 1)
    model: Any = attach(model_of_depth(1, FAMILY))
    one, other = (collate(FAMILY, examples_of(FAMILY, seed), packing, None) for seed in range(2))
    with fresh_dynamo() as counted, torch.inference_mode():
        want = model(**dict(one)).logits
        compile_layers(model, backend="eager")
        graphs = []
        for _ in range(2):
            assert torch.equal(model(**dict(one)).logits, want)
            graphs.append(counted["stats"]["unique_graphs"])
        assert graphs[0] == graphs[1]
        with pytest.raises(MRopeError, match="for each shape of a batch, and this is number 2"):
            model(**dict(other))
        model(**dict(one))  # whose graphs there are
        model(**collate(FAMILY, examples_of(FAMILY), packing, ONE_RUNG))
        copy.deepcopy(model)(**dict(other))
        attach(detach(model))(**dict(other))


@pytest.mark.parametrize("learns", [False, True])
def test_equal_layers_share_a_graph_without_rungs_too(learns: bool) -> None:
    """Not with a cache, which transformers makes where it is not told to do without."""
    batch = collate(FAMILY, examples_of(FAMILY), None, None)
    graphs = []
    for depth in (1, 3):
        model: Any = attach(model_of_depth(depth, FAMILY))
        with fresh_dynamo() as counted, torch.set_grad_enabled(learns):
            want = model(**dict(batch)).loss
            compile_layers(model, backend="eager")
            assert torch.equal(model(**dict(batch)).loss, want)
            graphs.append(counted["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]


def test_a_ladder_may_have_more_rungs_than_torch_compiles_a_function_for() -> None:
    model: Any = attach(model_of_depth(1, FAMILY))
    examples = examples_of(FAMILY)
    with fresh_dynamo() as counted, torch.inference_mode():
        compile_layers(model, backend="eager")
        for width in range(128, 128 + 9 * 16, 16):
            rung = replace(ONE_RUNG, tokens=(width,))
            model(**collate(FAMILY, examples, None, rung))
        assert counted["stats"]["unique_graphs"] > 9


@pytest.mark.parametrize("family", TOWERS)
def test_towers_of_all_kinds_compile(family: str) -> None:
    """Images and clips of every size at once, each shape of which has a graph."""
    model = attach(make_model(family))
    _, batch = without_labels(family)
    with fresh_dynamo() as counted, torch.inference_mode():
        want = model(**dict(batch)).logits
        compile_layers(model, backend="eager")
        # Linear layers, which MiniCPM-V has, compute their rule otherwise in a graph.
        torch.testing.assert_close(model(**batch).logits, want, rtol=0, atol=1e-6)
        assert counted["stats"]["unique_graphs"] > 2


@pytest.mark.parametrize("whole", [False, True])
def test_syncs_of_a_compiled_model_are_counted(whole: bool) -> None:
    """On a CPU the guard's modes keep dynamo out; under fullgraph it raises for that."""
    model: Any = attach(model_of_depth(2, FAMILY))
    batch = collate(FAMILY, examples_of(FAMILY), None, ONE_RUNG)
    with fresh_dynamo() as counted:
        if whole:
            model.compile(fullgraph=True, dynamic=False, backend="eager")
        else:
            compile_layers(model, backend="eager")
        with SyncReport(steps=1, warmup=1, quiet=True) as report:
            for _ in range(3):
                float(step(model, dict(batch))[0])
                report.step()
        assert (report.watched, report.count) == (1, 1)
        assert counted["stats"]["unique_graphs"] > 0
        with SyncGuard() as guard:
            step(model, dict(batch))
        assert guard.count == 0


@pytest.mark.parametrize(
    ("value", "layers", "whole"),
    [
        ("false", False, False),
        ("true", True, False),
        ("layers", True, False),
        ("whole", False, True),
    ],
)
def test_the_config_says_how(
    value: str, layers: bool, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[Any] = []
    monkeypatch.setattr(
        torch,
        "compile",
        lambda call, recompile_limit=8, **options: modes.append(
            (call.__self__, options | {"limit": recompile_limit})
        ),
    )
    ladder = "rope.shapes={tokens: [256], patches: [512], longest: 256}"
    options = ["rope.vision=true", "model.attach=true", f"model.compile={value}", ladder]
    cfg = load_config(CONFIGS / "qwen3_vl.yaml", options)
    model: Any = attach_and_compile(cfg, tiny_model(FAMILY))
    compiled = [module for module, _ in modes]
    assert (model in compiled) is whole
    assert (model.model.language_model.layers[0] in compiled) is layers
    want = {"fullgraph": True, "dynamic": False, "limit": 256}
    assert all(options == want for _, options in modes)

"""Compile an attached model layer by layer, for batches of few shapes.

Equal layers share a graph, so that a model compiles in the time of a few layers, and what wraps
layers stays between them: the hooks of FSDP2, gradient checkpointing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._functorch.config as functorch_config
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer

from mrope.columns import NewColumns
from mrope.errors import MRopeError
from mrope.hf.generation import is_generating
from mrope.hf.inputs import Tensors, cache_of, fills_cache, modalities_of
from mrope.hf.thinkers import text_model
from mrope.hf.towers import VISION_TOWERS

Call = Callable[..., object]
_MOST_GRAPHS = 256  # of a function, which is also the most that torch allows in all
# Images of one size in rows of one length have few: of training, of evaluation, and the last batch
# of each. As many as torch compiles a function for by itself.
_MOST_SHAPES = 8
_REMATERIALIZE = "remat_using_tags_for_fwd_loss_bwd_graph"  # older releases of torch have none


def compile_parts(model: torch.nn.Module, base: Any, options: NewColumns) -> None:
    """Compile what `_parts` names, and the loss of the heads around the base model.

    Raises:
        MRopeError: the base model has no layers that transformers marks as such.
    """
    parts = list(_parts(base))
    if not any(isinstance(part, GradientCheckpointingLayer) for part in parts):
        raise MRopeError(f"{type(base).__name__} has no layers to compile one by one")
    options = options | one_graph_a_shape()
    forget_compiled(model)  # what an earlier call has compiled
    for part in parts:
        part._compiled_call_impl = CompiledPart(part, options)  # noqa: SLF001 - as its `compile`
    base.mrope_shapes = set()
    for head in model.modules():
        if _computes_loss(head):
            head.loss_function = CompiledLoss(options)  # type: ignore[assignment]
    # It cuts a graph where its bucket of gradients ends, which a layer's graph has no need of.
    torch._dynamo.config.optimize_ddp = False  # noqa: SLF001
    # It refuses the layers of a frozen tower under checkpointing, whose graphs have no backward.
    if hasattr(functorch_config, _REMATERIALIZE):
        setattr(functorch_config, _REMATERIALIZE, False)


def one_graph_a_shape() -> NewColumns:
    """Return options of `torch.compile` for a graph without breaks for each shape of its inputs.

    Kernels for known sizes are faster, and a ladder has few. But torch compiles a function 8 times,
    and raises at the ninth: kinds of layers share a function, and each has a graph for each rung,
    in training and in evaluation.
    """
    options: NewColumns = {"fullgraph": True, "dynamic": False}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {**options, "recompile_limit": _MOST_GRAPHS}
    # Older releases of torch have one number for the whole process.
    config: Any = torch._dynamo.config  # noqa: SLF001
    config.cache_size_limit = max(config.cache_size_limit, _MOST_GRAPHS)
    return options


def decodes(base: Any, inputs: Tensors) -> bool:
    """Whether a batch reads or fills a cache; with one each layer has graphs of its own.

    Nobody decodes from a step with gradients, or from a batch of the stage that is asked for none.
    """
    if torch.is_grad_enabled():
        return False
    asks_nothing = inputs.get("has_padding") is not None and inputs.get("use_cache") is None
    fills = not asks_nothing and fills_cache(inputs, base.config.get_text_config())
    return fills or cache_of(inputs) is not None


def refuse_many_shapes(base: Any, inputs: Tensors) -> None:
    """Raise where compiled layers would be compiled for one more shape of batches without rungs.

    Raises:
        MRopeError: the model is strict, and has met `_MOST_SHAPES` of them.
    """
    if modalities_of(inputs) == ["vision"]:
        return
    met = base.mrope_shapes
    shape = tuple(
        one.shape if isinstance(one, torch.Tensor) else str(one)
        for one in inputs.values()
        if isinstance(one, (torch.Tensor, list))
    )
    # A deep copy of the model has met the same shapes, and is not compiled.
    if shape not in met and len(met) >= _MOST_SHAPES and base.mrope_strict and is_compiled(base):
        raise MRopeError(
            f"the layers of this model are compiled for each shape of a batch, and this is number "
            f"{len(met) + 1}: give the MRopeCollator, or equip, shapes=Shapes(...) with rungs of "
            "tokens and patches"
        )
    met.add(shape)


def is_compiled(model: torch.nn.Module) -> bool:
    """Whether parts of a model were compiled by `compile_parts`."""
    return any(isinstance(_call_of(module), CompiledPart) for module in model.modules())


def forget_compiled(model: torch.nn.Module) -> None:
    """Undo `compile_parts`, and nothing that was compiled otherwise."""
    for module in model.modules():
        vars(module).pop("mrope_shapes", None)
        if isinstance(call := _call_of(module), CompiledPart):
            module._compiled_call_impl = call.former  # noqa: SLF001 - `compile` has no way back
        if isinstance(vars(module).get("_loss_function"), CompiledLoss):
            del module._loss_function  # noqa: SLF001 - where transformers' setter puts it


def _call_of(module: torch.nn.Module) -> Call | None:
    """Return what `compile` has put in place of a module's call."""
    call: Call | None = module._compiled_call_impl  # noqa: SLF001 - no public name
    return call


class CompiledPart:
    """The call of a module as one graph, and as it was while tokens are generated.

    Each token of a row makes the cache longer: there would be a graph for each.

    Args:
        module: the module; what was in the place of its call is `former`.
        options: of `torch.compile`.
    """

    def __init__(self, module: torch.nn.Module, options: NewColumns) -> None:
        self.former = _call_of(module)
        self._own: Call = module._call_impl  # noqa: SLF001
        self._compiled: Call = torch.compile(self._own, **options)

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Call the graph, or the module."""
        return (self._own if is_generating() else self._compiled)(*args, **kwargs)


def _parts(base: Any) -> Iterator[torch.nn.Module]:
    """Yield what runs as one graph each: layers, and modules beside a stack of layers."""
    towers = [getattr(base, name) for name in VISION_TOWERS if name in base._modules]  # noqa: SLF001
    for stack in (*towers, text_model(base)):
        layers = [one for one in stack.modules() if isinstance(one, GradientCheckpointingLayer)]
        yield from layers
        within = {one for layer in layers for one in layer.modules()}
        for child in stack.children():
            members = child if isinstance(child, torch.nn.ModuleList) else [child]
            for one in members:
                if _computes(one) and within.isdisjoint(one.modules()):
                    yield one


def _computes(module: torch.nn.Module) -> bool:
    """Whether a module has operators to fuse, and tensors alone decide its shapes."""
    has_weights = next(module.parameters(), None) is not None
    # One operator, which torch compiles as part of another module alone; under fullgraph it raises.
    is_torchs = type(module).__module__.startswith("torch.nn.")
    takes_sizes = "grid_thw" in inspect.signature(type(module).forward).parameters
    return has_weights and not is_torchs and not takes_sizes


def _computes_loss(module: torch.nn.Module) -> bool:
    return "lm_head" in module._modules and (  # noqa: SLF001 - a wrapper has its attributes too
        getattr(module, "loss_function", None) is ForCausalLMLoss
    )


class CompiledLoss:
    """transformers' loss of a language model as one graph, without a copy of its logits in float32.

    Args:
        options: of `torch.compile`.
    """

    def __init__(self, options: NewColumns) -> None:
        self.options = options
        self._compiled: Any = None

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor:
        """Return the mean loss, or its sum over `num_items_in_batch`, as `ForCausalLMLoss`."""
        if self._compiled is None:
            self._compiled = torch.compile(ForCausalLMLoss, **self.options)
        if isinstance(num_items_in_batch, int):  # a graph would hold for one number alone
            num_items_in_batch = logits.new_full((), num_items_in_batch, dtype=torch.float32)
        loss: torch.Tensor = self._compiled(
            logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels
        )
        return loss

    def __reduce__(self) -> Any:
        return CompiledLoss, (self.options,)

"""`attach(model)`: let a transformers model take positions and tower tensors from the batch."""

from __future__ import annotations

import copy
from typing import Any, TypeVar
from weakref import WeakSet

import torch

from mrope.errors import MRopeError
from mrope.hf.attention_choice import (
    Attention,
    attending_parts,
    choose_attention,
    forget_attention,
)
from mrope.hf.compiling import compile_parts, forget_compiled
from mrope.hf.methods import unbind
from mrope.hf.patches import (
    METHODS,
    bind_patches,
    find_patches,
    is_base,
    refuse_foreign,
    refuse_foreign_features,
)
from mrope.hf.rows import ROWS, row_of
from mrope.hf.text import run_rope, run_searched
from mrope.spec import references

Model = TypeVar("Model", bound=torch.nn.Module)


def attach(model: Model, strict: bool = True, attention: Attention = "auto") -> Model:
    """Replace a model's forward by one that computes nothing which a `MRopeCollator` computed.

    Only instances change: the `forward` of the base model (the module with the vision tower
    and `language_model`), those of its towers' attention layers and of linear text layers, and for
    Qwen3-VL the text model's `_deepstack_process`. Classes and modules of transformers, parameters,
    names and the state dict stay as they are. Outputs are those of the unmodified model:
    `docs/attach.md` says which are bit-equal.

    Args:
        model: a `...ForConditionalGeneration` or a model with another head, its base model, or a
            PEFT model around one. Attach before DDP, FSDP or `torch.compile` wrap it.
        strict: raise for a batch with pixels but without precomputed positions and vision tensors,
            for a replaced `get_image_features` or its like, which an attached model does not call,
            and, under a release of transformers that mrope does not know, compare a small model of
            the class first, plain and attached. False: the model then computes for itself what a
            batch lacks, and syncs; nothing is compared.
        attention: how towers, and text in flattened rows, attend. "varlen": one call of torch's
            variable-length kernel a layer, whatever the sizes of images, in half precision on
            CUDA; elsewhere as "segments": one call for each run of equal adjacent images. "auto":
            "varlen" where torch has the kernel (2.10 and later) and the model runs under sdpa. A
            model with attention dropout attends as "segments", one under flash_attention_2 keeps
            it. See `explain_attention`.

    Returns:
        `model` itself.

    Raises:
        MRopeError: no base model of a known family inside or more than one; a wrapped or an
            attached model; one with prompts of PEFT's in front of its tokens; a method that another
            library or a subclass replaced, where the attached forward would not call it; a text
            model with sliding windows; or an unknown release of transformers under which the small
            model differs.
    """
    base = base_model(model)
    _refuse_wrapped(model)
    _refuse_prompts(model)
    if is_attached(base):
        raise MRopeError(
            f"{type(base).__name__} already has a forward of its own on the instance: it is "
            "attached; detach it first"
        )
    found = find_patches(model, base)
    refuse_foreign(found)
    _refuse_sliding(base)
    if strict:
        # First, as an unknown release may have changed anything: its error says more.
        references.prove_if_unknown("attach", model)
        refuse_foreign_features(base)
    base.mrope_strict, base.mrope_owner = strict, _Owner(base)
    for name, part in attending_parts(base):
        choose_attention(name, part, attention)
    bind_patches(found)
    return model


def detach(model: Model) -> Model:
    """Undo `attach` and `compile_layers`: remove what they set on the instances.

    A wrapped model stays wrapped.

    A module that another attached model holds too, such as a tower that a policy and its reference
    share, stays as it is until that one is detached. Under a wrapper that has taken the attached
    forward in (`torch.compile(base.forward)`, accelerate's mixed precision), the model's own
    forward is run from now on.

    Raises:
        MRopeError: the model is not attached.
    """
    base = _attached_base(model)
    forget_compiled(model)
    del base.mrope_strict, base.mrope_owner
    held = {module for owner in _OWNERS if owner.holds() for module in owner.base.modules()}
    for module in model.modules():
        if module not in held:
            forget_attention(module)
            for name in METHODS:
                unbind(module, name)
    return model


def compile_layers(model: Model, **options: object) -> Model:
    """Compile each layer of an attached model, what its towers and text run between, and its loss.

    Equal layers share a graph. Parameters, names and the state dict stay. Call it before DDP or
    FSDP2 wrap the model; gradient checkpointing may be enabled before or after.

    Args:
        model: attached, PEFT models too. Each shape of a batch is compiled for: give the collator
            `MRopeCollator(shapes=...)`, or images of one size in rows of one length. A strict model
            raises for the ninth shape of batches without rungs.
        options: of `torch.compile`, such as `backend`; "fullgraph" and "dynamic" are given.

    Returns:
        `model` itself. `detach` undoes it.

    Raises:
        MRopeError: the model is not attached, or has no layers that transformers marks as such.
    """
    compile_parts(model, _attached_base(model), options)
    return model


def explain_attention(model: torch.nn.Module) -> str:
    """Say how an attached model's towers and text attend, and why.

    Raises:
        MRopeError: the model is not attached.
    """
    lines = (
        f"{type(part).__name__}: {part.mrope_attention}, {part.mrope_attention_reason}"
        for _, part in attending_parts(_attached_base(model))
    )
    return "\n".join(dict.fromkeys(lines))  # copies of one tower attend alike


def base_model(model: torch.nn.Module) -> Any:
    """Return the one module inside `model` that holds a vision tower and a language model.

    Raises:
        MRopeError: there is none of a known family or more than one; or no model at all.
    """
    if not isinstance(model, torch.nn.Module):
        raise MRopeError(f"{type(model).__name__} is no model: give the model, a torch module")
    found = [module for module in model.modules() if is_base(module)]
    if len(found) != 1:
        raise MRopeError(
            f"{type(model).__name__} holds {len(found)} base models of a known family, not one; "
            f"known: {', '.join(ROWS)}"
        )
    return found[0]


class _Owner:
    """An attached base model, so that modules which it shares with another are kept attached.

    Held by the base model: its copies, and what is loaded from a file, have owners of their own.
    """

    def __init__(self, base: Any) -> None:
        self.base = base
        _OWNERS.add(self)

    def holds(self) -> bool:
        """Whether the base model is attached, and not only waits to be collected as garbage."""
        return vars(self.base).get("mrope_owner") is self

    def __deepcopy__(self, memo: dict[int, Any]) -> _Owner:
        return _Owner(copy.deepcopy(self.base, memo))

    def __reduce__(self) -> Any:
        return _Owner, (self.base,)


_OWNERS: WeakSet[_Owner] = WeakSet()
_FILL_THE_CACHE = ("PREFIX_TUNING", "CARTRIDGE")


def is_attached(model: torch.nn.Module) -> bool:
    """Whether a model, or the base model inside it, is attached."""
    return "mrope_owner" in vars(base_model(model))


def _attached_base(model: torch.nn.Module) -> Any:
    """Return the base model of an attached model.

    Raises:
        MRopeError: the model is not attached.
    """
    base = base_model(model)
    if not is_attached(base):
        raise MRopeError(f"{type(base).__name__} is not attached")
    return base


def _refuse_prompts(model: torch.nn.Module) -> None:
    """Raise for PEFT's prompt learning, which removes position ids and adds tokens to rows.

    With prefix tuning and cartridges, which fill the cache, PEFT shifts the position ids.
    """
    configs = getattr(model, "peft_config", None)
    for config in configs.values() if isinstance(configs, dict) else ():
        kind = str(getattr(config, "peft_type", None)).rpartition(".")[2]
        if getattr(config, "is_prompt_learning", False) and kind not in _FILL_THE_CACHE:
            raise MRopeError(
                f"{type(config).__name__}: PEFT's prompt learning is not supported for attached "
                "models: it removes position_ids, and adds tokens that they do not number"
            )


def _refuse_sliding(base: Any) -> None:
    """Raise for a text model whose layers with windows would get no mask."""
    if row_of(base.config.model_type).text not in (run_rope, run_searched):
        return  # a mask is made for each kind of layer
    for text in (one for name, one in attending_parts(base) if name == "language_model"):
        if "sliding_attention" in (getattr(text.config, "layer_types", None) or ()):
            raise MRopeError(
                f"{base.config.model_type} with sliding window layers is not supported: their "
                "mask is decided on the device"
            )


def _refuse_wrapped(model: torch.nn.Module) -> None:
    """Raise where a wrapper has already captured the forwards."""
    # By name: importing the wrappers would import torch.distributed and its parts.
    names = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    late = names & {
        "DistributedDataParallel",
        "DataParallel",
        "FullyShardedDataParallel",
        "FSDPModule",
    }
    if hasattr(model, "_orig_mod"):
        late.add("torch.compile")
    if late:
        raise MRopeError(
            f"too late: the model is already wrapped by {', '.join(sorted(late))}; attach it "
            "first, then wrap it"
        )

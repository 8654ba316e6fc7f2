"""`attach(model)`: let a transformers model take positions and tower tensors from the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, TypeVar

import torch

from mrope.errors import MRopeError
from mrope.hf.attention import (
    AUDIO,
    FUSED,
    OMNI_2_5_VISION,
    PADDLEOCR,
    mix_by_segment,
    restore_text,
    tower_forward,
    use_varlen_in_text,
)
from mrope.hf.forwards import VISION_FORWARDS, add_deepstack
from mrope.hf.omni_forwards import OMNI_FORWARDS
from mrope.hf.varlen import find_kernel
from mrope.spec import references

Model = TypeVar("Model", bound=torch.nn.Module)

FORWARDS = VISION_FORWARDS | OMNI_FORWARDS


Attention = Literal["auto", "varlen", "segments"]


def attach(model: Model, strict: bool = True, attention: Attention = "auto") -> Model:
    """Replace a model's forward by one that computes nothing which a `MRopeCollator` computed.

    Only instances change: the `forward` of the base model (the module with `visual` and
    `language_model`), those of its towers' attention layers and of linear text layers, and for
    Qwen3-VL the text model's `_deepstack_process`. Classes and modules of transformers, parameters,
    names and the state dict stay as they are. Outputs are those of the unmodified model:
    `docs/reading.md` says which are bit-equal.

    Args:
        model: a `...ForConditionalGeneration`, its base model, or a PEFT model around one. Attach
            before DDP, FSDP or `torch.compile` wrap it.
        strict: raise for a batch with pixels but without precomputed positions and vision tensors,
            and, under a release of transformers that mrope does not know, compare a small model of
            the class first, plain and attached. False: the model then computes for itself what a
            batch lacks, and syncs; nothing is compared.
        attention: how towers, and text in flattened rows, attend. "varlen": one call of torch's
            variable-length kernel a layer, whatever the sizes of images, in half precision on
            CUDA; elsewhere as "segments": one call for each run of equal adjacent images. "auto":
            "varlen" where torch has the kernel (2.10 and later), the model runs under sdpa and no
            attention dropout is set. A model under flash_attention_2 keeps it. See
            `explain_attention`.

    Returns:
        `model` itself.

    Raises:
        MRopeError: no base model of a known family inside or more than one, a wrapped model, a
            base model with a `forward` of its own on the instance (attached already, or by another
            library), a text model with sliding windows, or an unknown release of transformers
            under which the small model differs.
    """
    base = base_model(model)
    if "forward" in vars(base):
        raise MRopeError(
            f"{type(base).__name__} already has a forward of its own on the instance: it is "
            "attached, or another library (accelerate hooks, for one) came first; attach before it"
        )
    text = base.language_model
    if "sliding_attention" in (getattr(text.config, "layer_types", None) or ()):
        raise MRopeError(
            f"{base.config.model_type} with sliding window layers is not supported: their mask "
            "is decided on the device"
        )
    if strict:
        references.prove_if_unknown("attach", model)
    base.mrope_strict = strict
    for part in _attending_parts(base):
        part.mrope_attention, part.mrope_attention_reason = _choose_attention(part, attention)
    if text.mrope_attention == "varlen":
        use_varlen_in_text(text)
    # On the instance, not the class: other models of the class, such as a frozen reference model,
    # stay unchanged, and `type(base).forward` remains the original.
    base.forward = partial(FORWARDS[base.config.model_type], base)
    for layer, forward in _layer_forwards(base):
        layer.forward = partial(forward, layer)
    if hasattr(text, "_deepstack_process"):
        text._deepstack_process = partial(add_deepstack, text)  # noqa: SLF001
    return model


def explain_attention(model: torch.nn.Module) -> str:
    """Say how an attached model's towers and text attend, and why.

    Raises:
        MRopeError: the model is not attached.
    """
    base = base_model(model)
    if not hasattr(base, "mrope_strict"):
        raise MRopeError(f"{type(base).__name__} is not attached")
    return "\n".join(
        f"{type(part).__name__}: {part.mrope_attention}, {part.mrope_attention_reason}"
        for part in _attending_parts(base)
    )


def _attending_parts(base: Any) -> list[Any]:
    """Return the towers and the text model of a base model."""
    names = ("visual", "audio_tower", "language_model")
    return [getattr(base, name) for name in names if hasattr(base, name)]


def _choose_attention(part: Any, attention: Attention) -> tuple[str, str]:
    """Return how a tower or text model attends, and the reason."""
    implementation = part.config._attn_implementation or "sdpa"  # noqa: SLF001 - no public name
    if "flash" in implementation:
        return "flash", f"the model was built with {implementation}"
    if attention != "auto":
        return attention, "as attach was told"
    if find_kernel() is None:
        return "segments", "torch has no variable-length kernel before 2.10"
    if implementation != "sdpa":
        return "segments", f"the model was built with {implementation}"
    if getattr(part.config, "attention_dropout", 0):
        return "segments", "the variable-length kernel has no dropout"
    return "varlen", "in half precision on CUDA; elsewhere as segments"


def detach(model: Model) -> Model:
    """Undo `attach`: remove the forwards that it set on the instances.

    Raises:
        MRopeError: the model is not attached.
    """
    base = base_model(model)
    if not hasattr(base, "mrope_strict"):
        raise MRopeError(f"{type(base).__name__} is not attached")
    del base.mrope_strict, base.forward
    for part in _attending_parts(base):
        del part.mrope_attention, part.mrope_attention_reason
    restore_text(base.language_model)
    for layer, _ in _layer_forwards(base):
        del layer.forward
    vars(base.language_model).pop("_deepstack_process", None)
    return model


def _layer_forwards(base: Any) -> Iterator[tuple[Any, Callable[..., Any]]]:
    """Yield the layers whose forward is replaced, each with its replacement."""
    if hasattr(base.visual, "vision_model"):
        for layer in base.visual.vision_model.encoder.layers:
            yield layer.self_attn, partial(tower_forward, PADDLEOCR)
    else:
        for block in base.visual.blocks:
            parts = FUSED if hasattr(block.attn, "qkv") else OMNI_2_5_VISION
            yield block.attn, partial(tower_forward, parts)
    for layer in base.audio_tower.layers if hasattr(base, "audio_tower") else ():
        yield layer.self_attn, partial(tower_forward, AUDIO)
    for layer in base.language_model.layers:
        if hasattr(layer, "linear_attn"):
            yield layer.linear_attn, mix_by_segment


def base_model(model: torch.nn.Module) -> Any:
    """Return the one module inside `model` that holds a vision tower and a language model.

    Raises:
        MRopeError: there is none of a known family or more than one, or the model is wrapped.
    """
    _refuse_wrapped(model)
    found = [
        module
        for module in model.modules()
        if hasattr(module, "visual")
        and hasattr(module, "language_model")
        and getattr(getattr(module, "config", None), "model_type", None) in FORWARDS
        # `...ForConditionalGeneration` forwards both attributes from the base model inside it.
        and not hasattr(module, "model")
    ]
    if len(found) != 1:
        known = ", ".join(FORWARDS)
        raise MRopeError(
            f"{type(model).__name__} holds {len(found)} base models of a known family, not one; "
            f"known: {known}"
        )
    return found[0]


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

"""`attach(model)`: a transformers model that reads its positions and vision tensors."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from mrope.errors import MRopeError
from mrope.hf.attention import attend_raster, attend_segments, mix_segments
from mrope.hf.forwards import READERS, add_by_index
from mrope.hf.omni_forwards import THINKERS, attend_audio, attend_frames
from mrope.spec import references

Model = TypeVar("Model", bound=torch.nn.Module)

# Releases whose modelling code the readers were compared with.
TESTED = ("5.23",)

ALL_READERS = READERS | THINKERS


def attach(model: Model, strict: bool = True) -> Model:
    """Make `model` take everything from the batches of a `MRopeCollator` with vision tensors.

    Only instances are touched: the `forward` of the base model (the module with `visual` and
    `language_model`), those of its tower's attention layers and, for Qwen3-VL, the text model's
    `_deepstack_process`. Classes and modules of transformers stay as they are, and so do
    parameters, names and the state dict. Outputs are those of the model before:
    `docs/reading.md` says what is bit-equal.

    Args:
        model: a `...ForConditionalGeneration`, its base model, or a PEFT model around one. Attach
            before DDP, FSDP or `torch.compile` wrap it.
        strict: a batch with pixels but without precomputed positions and vision tensors is an
            error, and so is a transformers release that was not tested. False: the model then
            computes for itself, and waits.

    Returns:
        `model` itself.

    Raises:
        MRopeError: no base model of a known family inside or more than one, a wrapped model, one
            that is attached already or whose forward somebody else replaced, a text model with
            sliding windows, or an untested release of transformers.
    """
    base = base_model(model)
    if strict:
        _check_release()
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
    base.mrope_strict = strict
    base.forward = types.MethodType(ALL_READERS[base.config.model_type], base)
    for layer, stand_in in _stand_ins(base):
        layer.forward = types.MethodType(stand_in, layer)
    if hasattr(text, "_deepstack_process"):
        text._deepstack_process = types.MethodType(add_by_index, text)  # noqa: SLF001
    return model


def detach(model: Model) -> Model:
    """Undo `attach`: the instance's forwards are its classes' again.

    Raises:
        MRopeError: the model is not attached.
    """
    base = base_model(model)
    if not hasattr(base, "mrope_strict"):
        raise MRopeError(f"{type(base).__name__} is not attached")
    del base.mrope_strict, base.forward
    for layer, _ in _stand_ins(base):
        del layer.forward
    vars(base.language_model).pop("_deepstack_process", None)
    return model


def _stand_ins(base: Any) -> Iterator[tuple[Any, Callable[..., Any]]]:
    """Yield the layers whose forward is replaced, each with what stands in for it."""
    if hasattr(base.visual, "vision_model"):
        for layer in base.visual.vision_model.encoder.layers:
            yield layer.self_attn, attend_raster
    else:
        for block in base.visual.blocks:
            yield block.attn, attend_segments if hasattr(block.attn, "qkv") else attend_frames
    for layer in base.audio_tower.layers if hasattr(base, "audio_tower") else ():
        yield layer.self_attn, attend_audio
    for layer in base.language_model.layers:
        if hasattr(layer, "linear_attn"):
            yield layer.linear_attn, mix_segments


def base_model(model: torch.nn.Module) -> Any:
    """Return the one module inside `model` that holds a vision tower and a language model."""
    _refuse_wrapped(model)
    found = [
        module
        for module in model.modules()
        if hasattr(module, "visual")
        and hasattr(module, "language_model")
        and getattr(getattr(module, "config", None), "model_type", None) in ALL_READERS
        and not hasattr(module, "model")
    ]
    if len(found) != 1:
        known = ", ".join(ALL_READERS)
        raise MRopeError(
            f"{type(model).__name__} holds {len(found)} base models of a known family, not one; "
            f"known: {known}"
        )
    return found[0]


def _refuse_wrapped(model: torch.nn.Module) -> None:
    """Raise where a wrapper has already taken hold of the forwards."""
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


def _check_release() -> None:
    version = references.installed_transformers()
    if version is None or not version.startswith(tuple(f"{release}." for release in TESTED)):
        raise MRopeError(
            f"attach was tested with transformers {', '.join(TESTED)}, not {version}; "
            "attach(model, strict=False) tries it all the same"
        )

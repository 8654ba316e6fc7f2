"""`attach(model)`: let a transformers model take positions and tower tensors from the batch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeVar

import torch

from mrope.errors import MRopeError
from mrope.hf.attention import has_layers, mix_by_segment, undo_varlen, use_varlen
from mrope.hf.crop_forwards import CROP_FORWARDS, crops_forward, merge_crops, merge_windows
from mrope.hf.forwards import (
    VISION_FORWARDS,
    VISION_TOWERS,
    add_deepstack,
    merge_patches,
    raster_forward,
)
from mrope.hf.image_forwards import IMAGE_FORWARDS
from mrope.hf.indexer import select_tokens
from mrope.hf.merged_forwards import MERGED_FORWARDS, pair_frames, paired_forward, route
from mrope.hf.methods import bind, copies, find_foreign, foreign_on_instance, is_wrapper, unbind
from mrope.hf.omni_forwards import OMNI_FORWARDS
from mrope.hf.plain_forwards import PLAIN_FORWARDS, pool_states
from mrope.hf.tower_layers import (
    AUDIO,
    FUSED,
    FUSED_NORMED,
    HUNYUAN,
    NORMED,
    OMNI_2_5_VISION,
    PADDLEOCR,
    SIGLIP,
    TowerLayer,
    tower_forward,
)
from mrope.hf.varlen import HAS_KERNEL
from mrope.spec import references

Model = TypeVar("Model", bound=torch.nn.Module)

FORWARDS = (
    VISION_FORWARDS
    | MERGED_FORWARDS
    | OMNI_FORWARDS
    | PLAIN_FORWARDS
    | IMAGE_FORWARDS
    | CROP_FORWARDS
)

# The module behind the tower in a forward that gives it an index, and what replaces its forward.
# Not inlined there: hooks on the module, as FSDP2's, run around its forward alone.
_MERGERS: dict[Any, tuple[str, Any]] = {
    raster_forward: ("projector", merge_patches),
    paired_forward: ("resampler_model", pair_frames),
    crops_forward: ("merger", merge_crops),
}
# What `attach` binds to instances; what `detach` may remove.
_BOUND: set[Any] = {
    *FORWARDS.values(),
    *(forward for _, forward in _MERGERS.values()),
    tower_forward,
    mix_by_segment,
    select_tokens,
    route,
    add_deepstack,
    pool_states,
    merge_windows,
}
# Under which names, and what else it sets on them.
_METHODS = ("forward", "_deepstack_process", "get_pooled_states")
_SET = ("mrope_strict", "mrope_attention", "mrope_attention_reason", "mrope_parts")
# Methods of a base model that its attached forward does not call: it calls the towers itself.
_FEATURES = ("get_image_features", "get_video_features", "get_audio_features")
_VISION = (FUSED, FUSED_NORMED, OMNI_2_5_VISION, PADDLEOCR, NORMED, HUNYUAN, SIGLIP)
_LAYERS = {**dict.fromkeys(VISION_TOWERS, _VISION), "audio_tower": (AUDIO,)}
_TEXT_LAYER = {"q_proj", "k_proj", "v_proj", "o_proj"}

_log = logging.getLogger("mrope")

Attention = Literal["auto", "varlen", "segments"]


def attach(model: Model, strict: bool = True, attention: Attention = "auto") -> Model:
    """Replace a model's forward by one that computes nothing which a `MRopeCollator` computed.

    Only instances change: the `forward` of the base model (the module with the vision tower
    and `language_model`), those of its towers' attention layers and of linear text layers, and for
    Qwen3-VL the text model's `_deepstack_process`. Classes and modules of transformers, parameters,
    names and the state dict stay as they are. Outputs are those of the unmodified model:
    `docs/attach.md` says which are bit-equal.

    Args:
        model: a `...ForConditionalGeneration`, its base model, or a PEFT model around one. Attach
            before DDP, FSDP or `torch.compile` wrap it.
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
            attached model; a method that another library or a subclass replaced, where the
            attached forward would not call it; a text model with sliding windows; or an unknown
            release of transformers under which the small model differs.
    """
    _refuse_wrapped(model)
    base = base_model(model)
    _refuse_replaced(base)
    for text in copies(base.language_model):
        kinds = getattr(text.config, "layer_types", None) or ()
        if "sliding_attention" in kinds and base.config.model_type not in PLAIN_FORWARDS:
            raise MRopeError(
                f"{base.config.model_type} with sliding window layers is not supported: their "
                "mask is decided on the device"
            )
    if strict:
        # First, as an unknown release may have changed anything: its error says more.
        references.prove_if_unknown("attach", model)
        _refuse([find_foreign(base, name) for name in _FEATURES])
    base.mrope_strict = strict
    for name, part in _attending_parts(base):
        _attach_attention(name, part, attention)
    # On the instance, not the class: other models of the class, such as a frozen reference model,
    # stay unchanged, and `type(base).forward` remains the original.
    bind(base, "forward", FORWARDS[base.config.model_type])
    for layer in _linear_layers(base):
        bind(layer, "forward", mix_by_segment)
    for layer, forward in _replaced_layers(base):
        bind(layer, "forward", forward)
    for text in _deepstack_models(base):
        bind(text, "_deepstack_process", add_deepstack)
    for indexer in _pooling_indexers(base):
        bind(indexer, "get_pooled_states", pool_states)
    return model


def explain_attention(model: torch.nn.Module) -> str:
    """Say how an attached model's towers and text attend, and why.

    Raises:
        MRopeError: the model is not attached.
    """
    lines = (
        f"{type(part).__name__}: {part.mrope_attention}, {part.mrope_attention_reason}"
        for _, part in _attending_parts(_attached_base(model))
    )
    return "\n".join(dict.fromkeys(lines))  # copies of one tower attend alike


def _refuse_replaced(base: Any) -> None:
    """Raise where the attached forwards would bypass a method that is not transformers' own."""
    if "mrope_strict" in vars(base):
        raise MRopeError(
            f"{type(base).__name__} already has a forward of its own on the instance: it is "
            "attached; detach it first"
        )
    found = [find_foreign(base)]
    found += [find_foreign(text, "_deepstack_process") for text in _deepstack_models(base)]
    found += [find_foreign(layer) for layer, _ in _replaced_layers(base)]
    found += [find_foreign(one, "get_pooled_states") for one in _pooling_indexers(base)]
    # One that was replaced on the class is called for each segment.
    found += [foreign_on_instance(layer) for layer in _linear_layers(base)]
    _refuse(found)


def _refuse(found: list[str | None]) -> None:
    """Raise for the first method that is described."""
    foreign = [one for one in found if one is not None]
    if foreign:
        raise MRopeError(
            f"{foreign[0]}, not transformers' own: an attached model would not run it. Undo that "
            "before attach, or do not attach: the unmodified model takes the same batches, and "
            "only syncs"
        )


def _attending_parts(base: Any) -> Iterator[tuple[str, Any]]:
    """Yield name and module of the towers and the text model of a base model, and their copies."""
    # The audio tower of dots3-note is run by the model's own forward.
    own = ("audio_tower",) if base.config.model_type in PLAIN_FORWARDS else ()
    for name in (*(one for one in _LAYERS if one not in own), "language_model"):
        for part in copies(getattr(base, name)) if hasattr(base, name) else ():
            yield name, part


def _attach_attention(name: str, part: Any, attention: Attention) -> None:
    """Decide how a tower or text model attends, and replace what that needs."""
    layers = dict(_attention_layers(name, part))
    how, why = _choose_attention(part, attention)
    foreign = next(filter(None, map(find_foreign, _on_the_way(part, layers))), None)
    if name != "language_model" and (foreign or not layers):
        # Its attention takes `cu_seqlens` as a tensor, as in the unmodified model.
        how, why = "own", foreign or "its attention layers are of an unknown kind"
        _log.warning("%s keeps its own attention, which may sync: %s", type(part).__name__, why)
    elif foreign and how == "varlen":
        how, why = "segments", foreign
    part.mrope_attention, part.mrope_attention_reason = how, why
    for path, parts in layers.items() if how != "own" else ():
        layer = part.get_submodule(path)
        if parts is not None:
            layer.mrope_parts = parts.bound_to(layer)
            bind(layer, "forward", tower_forward)
        elif how == "varlen":
            use_varlen(layer)


def _attention_layers(name: str, part: Any) -> Iterator[tuple[str, TowerLayer | None]]:
    """Yield path and kind of the attention layers in a tower; in a text model None for the kind.

    Found by the names of their projections: paths differ under PEFT's wrappers, which keep
    several copies of a layer.
    """
    for path, module in part.named_modules():
        children = module._modules.keys()  # noqa: SLF001 - a wrapper has its copy's attributes
        if name == "language_model" and children >= _TEXT_LAYER and hasattr(module, "config"):
            yield path, None
        for parts in _LAYERS.get(name, ()):
            if parts.describes(module):
                yield path, parts


def _on_the_way(part: Any, paths: Iterable[str]) -> Iterator[torch.nn.Module]:
    """Yield the modules through which borders reach the attention layers, and these layers."""
    names = {"", *paths}
    for path in paths:
        names |= {path[:end] for end, char in enumerate(path) if char == "."}
    for name in sorted(names):
        module = part.get_submodule(name)
        containers = (torch.nn.ModuleList, torch.nn.ModuleDict)
        if not isinstance(module, containers) and not is_wrapper(module):
            yield module


def _linear_layers(base: Any) -> Iterator[Any]:
    """Yield the linear attention layers of the text model, and their copies."""
    for module in base.modules():
        if "linear_attn" in module._modules:  # noqa: SLF001 - a wrapper has its copy's attributes
            yield from copies(module.linear_attn)


def _replaced_layers(base: Any) -> Iterator[tuple[Any, Any]]:
    """Yield further modules whose forward is replaced, and what replaces it."""
    name, merge = _MERGERS.get(FORWARDS[base.config.model_type], (None, None))
    for merger in () if name is None else copies(getattr(base, name)):
        yield merger, merge
    for module in base.modules():
        children = module._modules.keys()  # noqa: SLF001 - a wrapper has its copy's attributes
        if "index_qk_proj" in children:
            yield module, select_tokens
        elif children >= {"text_moe", "vision_moe"}:
            yield module, route
        elif "vit_merger" in children:
            yield from ((merger, merge_windows) for merger in copies(module.vit_merger))


def _deepstack_models(base: Any) -> Iterator[Any]:
    """Yield the text models that add deep-stack features in a method."""
    for text in copies(base.language_model):
        if hasattr(type(text), "_deepstack_process"):
            yield text


def _pooling_indexers(base: Any) -> Iterator[Any]:
    """Yield the indexers of the text model that select pools of tokens."""
    for module in base.language_model.modules():
        if hasattr(type(module), "get_pooled_states"):
            yield module


def _choose_attention(part: Any, attention: Attention) -> tuple[str, str]:
    """Return how a tower or text model attends, and the reason."""
    implementation = part.config._attn_implementation or "sdpa"  # noqa: SLF001 - no public name
    if "flash" in implementation:
        return "flash", f"the model was built with {implementation}"
    if has_layers(part.config, "indexed_attention"):
        return "segments", "its indexer selects tokens by a mask, which the kernel does not take"
    if getattr(part.config, "attention_dropout", 0):
        # Told or not: in training neither mask nor kernel would keep the examples of a row apart.
        return "segments", "the variable-length kernel has no dropout"
    if attention != "auto":
        return attention, "as attach was told"
    if not HAS_KERNEL:
        return "segments", "torch has no variable-length kernel before 2.10"
    if implementation != "sdpa":
        return "segments", f"the model was built with {implementation}"
    return "varlen", "in half precision on CUDA; elsewhere as segments"


def detach(model: Model) -> Model:
    """Undo `attach`: remove what it set on the instances. A wrapped model stays wrapped.

    Raises:
        MRopeError: the model is not attached.
    """
    for module in _attached_base(model).modules():
        undo_varlen(module)
        for name in _SET:
            vars(module).pop(name, None)
        for name in _METHODS:
            unbind(module, name, _BOUND)
    return model


def _attached_base(model: torch.nn.Module) -> Any:
    """Return the base model of an attached model.

    Raises:
        MRopeError: the model is not attached.
    """
    base = base_model(model)
    if "mrope_strict" not in vars(base):
        raise MRopeError(f"{type(base).__name__} is not attached")
    return base


def base_model(model: torch.nn.Module) -> Any:
    """Return the one module inside `model` that holds a vision tower and a language model.

    Raises:
        MRopeError: there is none of a known family or more than one.
    """
    found = [
        module
        for module in model.modules()
        # In `_modules`: models around the base model, and wrappers, pass its attributes on.
        if "language_model" in module._modules  # noqa: SLF001 - no public name
        and not module._modules.keys().isdisjoint(VISION_TOWERS)  # noqa: SLF001
        and getattr(getattr(module, "config", None), "model_type", None) in FORWARDS
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

"""Choose how the towers and the text model of a base model attend, and replace what that needs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch

from mrope.hf.attention import INDEXED, has_layers, undo_varlen, use_varlen
from mrope.hf.methods import as_method_of, bind, copies, find_foreign, is_wrapper
from mrope.hf.rows import row_of
from mrope.hf.thinkers import text_model
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
from mrope.hf.towers import VISION_TOWERS
from mrope.hf.varlen import HAS_KERNEL

Attention = Literal["auto", "varlen", "segments"]

_VISION = (FUSED, FUSED_NORMED, OMNI_2_5_VISION, PADDLEOCR, NORMED, HUNYUAN, SIGLIP)
_LAYERS = {**dict.fromkeys(VISION_TOWERS, _VISION), "audio_tower": (AUDIO,)}
_TEXT_LAYER = {"q_proj", "k_proj", "v_proj", "o_proj"}
# What is set on towers, text models and their layers.
_SET = ("mrope_attention", "mrope_attention_reason", "mrope_parts")

_log = logging.getLogger("mrope")


def attending_parts(base: Any) -> Iterator[tuple[str, Any]]:
    """Yield name and module of the towers and the text model of a base model, and their copies."""
    # An audio tower that takes no tensors of the stage is run by the model's own forward.
    own = () if row_of(base.config.model_type).audio else ("audio_tower",)
    for name in (one for one in _LAYERS if one not in own):
        for part in copies(getattr(base, name)) if hasattr(base, name) else ():
            yield name, part
    for part in copies(text_model(base)):
        yield "language_model", part


def choose_attention(name: str, part: Any, attention: Attention) -> None:
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
            bind(layer, "forward", as_method_of(type(layer), "forward", tower_forward))
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


def _choose_attention(part: Any, attention: Attention) -> tuple[str, str]:
    """Return how a tower or text model attends, and the reason."""
    implementation = part.config._attn_implementation or "sdpa"  # noqa: SLF001 - no public name
    if "flash" in implementation:
        return "flash", f"the model was built with {implementation}"
    if has_layers(part.config, *INDEXED):
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


def forget_attention(module: torch.nn.Module) -> None:
    """Undo `choose_attention` on a module, replaced forwards aside."""
    undo_varlen(module)
    for name in _SET:
        vars(module).pop(name, None)

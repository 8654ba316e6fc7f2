"""Say which method of which module of a base model is replaced by what: one list, `PATCHES`.

Modules are found by what they hold: paths and classes differ between families, and under PEFT's
wrappers, which keep several copies of a module. Attention layers of towers and text models are
replaced too, if their attention is chosen so: see `mrope.hf.attention_choice`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from mrope.errors import MRopeError
from mrope.hf.experts import route
from mrope.hf.features import (
    convolve_frames,
    merge_crops,
    merge_patches,
    merge_windows,
    pair_frames,
)
from mrope.hf.forward import attached_forward
from mrope.hf.heads import embed_for_retrieval
from mrope.hf.indexer import select_tokens
from mrope.hf.linear import mix_segments
from mrope.hf.methods import as_method_of, bind, find_foreign, foreign_on_instance
from mrope.hf.pools import pool_states, select_pools
from mrope.hf.rows import ROWS
from mrope.hf.scatter import add_deepstack
from mrope.hf.text import linear_mask
from mrope.hf.thinkers import TEXT_MODELS, is_text_of_thinker, take_text_inputs
from mrope.hf.towers import VISION_TOWERS

# Methods of a base model that its attached forward does not call: it calls the towers itself.
_FEATURES = ("get_image_features", "get_video_features", "get_audio_features")


class Patch(NamedTuple):
    """A method to replace.

    Attributes:
        where: tells a module whose method is replaced.
        replacement: the function in place of the method; its first argument is the module.
        method: the method's name.
        calls_own: the replacement calls the method of the class, which may be another library's.
        by_name: the replacement's arguments stand in another order than the method's, or are
            keywords alone: it gets the signature of the method.
        around: the module stands around the base model, not in it.
    """

    where: Callable[[torch.nn.Module], bool]
    replacement: Callable[..., Any]
    method: str = "forward"
    calls_own: bool = False
    by_name: bool = False
    around: bool = False

    def find_foreign(self, module: torch.nn.Module) -> str | None:
        """Describe a method that the replacement would bypass and that is not transformers' own."""
        look = foreign_on_instance if self.calls_own else find_foreign
        return look(module, self.method)


def is_base(module: torch.nn.Module) -> bool:
    """Whether a module is a base model of a known family."""
    # In `_modules`: models around the base model, and wrappers, pass its attributes on.
    children = module._modules.keys()  # noqa: SLF001 - no public name
    if children.isdisjoint(TEXT_MODELS) or children.isdisjoint(VISION_TOWERS):
        return False
    return getattr(getattr(module, "config", None), "model_type", None) in ROWS


def _holding(*names: str) -> Callable[[torch.nn.Module], bool]:
    """Tell modules that have these children."""
    # In `_modules`: a wrapper has its copy's attributes.
    return lambda module: module._modules.keys() >= {*names}  # noqa: SLF001


embeds_by_itself = _holding("vlm", "embedding_proj_layer")
"""Whether a module is a head that runs the towers of its base model itself: ColQwen2's."""


def _made_of(*names: str, merges: bool = False) -> Callable[[torch.nn.Module], bool]:
    """Tell modules that have these children and no other, which they might run in between.

    Args:
        merges: the module has a number of patches to merge too, which tells mergers from MLPs.
    """
    return lambda module: (
        module._modules.keys() == {*names}  # noqa: SLF001
        and hasattr(module, "merge_kernel_size") >= merges
    )


def _defining(method: str) -> Callable[[torch.nn.Module], bool]:
    """Tell modules whose class defines a method."""
    return lambda module: hasattr(type(module), method)


PATCHES = (
    Patch(is_base, attached_forward, by_name=True),
    Patch(embeds_by_itself, embed_for_retrieval, calls_own=True, by_name=True, around=True),
    Patch(_defining("_deepstack_process"), add_deepstack, "_deepstack_process"),
    # Up to 5.21 a thinker holds its head itself.
    Patch(is_text_of_thinker, take_text_inputs, calls_own=True, by_name=True),
    # Behind the towers of PaddleOCR-VL, ERNIE-4.5-VL and MiniCPM-V, and within the last one.
    Patch(_made_of("pre_norm", "linear_1", "act", "linear_2", merges=True), merge_patches),
    Patch(_made_of("spatial_linear", "temporal_linear", "mlp", "after_norm"), pair_frames),
    Patch(_made_of("mlp", merges=True), merge_crops),
    Patch(
        _made_of("self_attn", "layer_norm1", "pre_norm", "linear_1", "act", "linear_2"),
        merge_windows,
    ),
    # Within LFM3-VL's tower.
    Patch(_made_of("in_proj", "spatial_conv", "out_proj"), convolve_frames),
    Patch(_defining("_update_linear_attn_mask"), linear_mask, "_update_linear_attn_mask"),
    # In text models: ERNIE's experts, linear attention and LFM3's convolutions, Qwen4-Exp's indexer
    # and GLM-5-Next's.
    Patch(_holding("text_moe", "vision_moe"), route),
    Patch(
        _holding("conv1d", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
        mix_segments,
        calls_own=True,
        by_name=True,
    ),
    Patch(
        _holding("conv1d", "q_proj", "k_proj", "v_proj", "forget_gate", "b_proj", "o_proj"),
        mix_segments,
        calls_own=True,
        by_name=True,
    ),
    Patch(_made_of("conv", "in_proj", "out_proj"), mix_segments, calls_own=True, by_name=True),
    Patch(_holding("index_qk_proj"), select_tokens),
    Patch(_defining("get_pooled_states"), select_pools, calls_own=True),
    Patch(_defining("get_pooled_states"), pool_states, "get_pooled_states"),
)
"""What `attach` replaces in a base model, and around it."""

METHODS = frozenset(patch.method for patch in PATCHES)


def find_patches(
    model: torch.nn.Module, base: torch.nn.Module
) -> list[tuple[torch.nn.Module, Patch]]:
    """Return the modules of a model whose methods are replaced, in the order of `PATCHES`."""
    within = list(base.modules())
    around = [module for module in model.modules() if module not in within]
    return [
        (module, patch)
        for patch in PATCHES
        for module in (around if patch.around else within)
        if patch.where(module)
    ]


def bind_patches(found: list[tuple[torch.nn.Module, Patch]]) -> None:
    """Replace the methods."""
    # On the instance, not the class: other models of the class, such as a frozen reference model,
    # stay unchanged, and `type(base).forward` remains the original.
    for module, patch in found:
        function = patch.replacement
        if patch.by_name:
            function = as_method_of(type(module), patch.method, function)
        bind(module, patch.method, function)


def refuse_foreign(found: list[tuple[torch.nn.Module, Patch]]) -> None:
    """Raise for a method that is not transformers' own, where it would no longer be called."""
    _refuse(patch.find_foreign(module) for module, patch in found)


def refuse_foreign_features(base: torch.nn.Module) -> None:
    """Raise for a method of the base model that the attached forward bypasses, likewise."""
    _refuse(find_foreign(base, name) for name in _FEATURES)


def _refuse(descriptions: Iterator[str | None]) -> None:
    foreign = next((one for one in descriptions if one is not None), None)
    if foreign is not None:
        raise MRopeError(
            f"{foreign}, not transformers' own: an attached model would not run it. Undo that "
            "before attach, or do not attach: the unmodified model takes the same batches, and "
            "only syncs"
        )

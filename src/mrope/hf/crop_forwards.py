"""Forward of MiniCPM-V 4.7, whose tower takes crops of images and frames.

The model's own forward passes no keywords on to its tower, which then asks the sizes of the crops
for their values: for the learned positions, the windows, every attention layer and the last merger.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.utils import can_return_tuple

from mrope.collate.layouts import to_model_layout
from mrope.hf.attention import tower_borders
from mrope.hf.forwards import (
    PIXELS,
    Places,
    Tensors,
    forward_with,
    is_precomputed,
    vision_tower,
)

_SIZES = {"image": "target_sizes", "video": "target_sizes_videos"}
# What the tower takes from its keywords if they are there.
_KEYWORDS = ("position_ids", "max_seqlen", "window_index", "cu_window_seqlens")
# Patches that a window of the tower merges, and the merger after it.
_MERGED = 4


@can_return_tuple  # type: ignore[untyped-decorator]
def crops_forward(self: Any, **inputs: Any) -> Any:
    """Forward of MiniCPM-V 4.7."""
    inputs = to_model_layout(inputs)
    if not is_precomputed(self, inputs):
        return type(self).forward(self, **inputs)
    mode = inputs.pop("downsample_mode", None) or self.config.downsample_mode
    return forward_with(self, inputs, partial(_encode_crops, merges_windows=mode != "4x"))


def _encode_crops(
    self: Any, modality: str, inputs: Tensors, merges_windows: bool
) -> tuple[Places, Any]:
    """Run the tower on all crops of one modality, and merge what it returns by one index."""
    tower = vision_tower(self)
    # Its own forward takes the first of the batch too: the processor makes one row of patches.
    pixels = inputs.pop(PIXELS[modality])[:1].to(tower.dtype)
    taken = {name: inputs.pop(f"{modality}_{name}", None) for name in _KEYWORDS}
    known = {name: value for name, value in taken.items() if value is not None}
    known |= _borders(tower, pixels, modality, inputs, known)
    sizes = inputs.pop(_SIZES[modality])
    output = tower(
        pixels, target_sizes=sizes, use_vit_merger=merges_windows, return_dict=True, **known
    )
    blocks = inputs.pop(f"{modality}_block_index")
    output.pooler_output = self.merger(output.last_hidden_state, blocks=blocks)
    return inputs.pop(f"{modality}_scatter_index"), output


def _borders(
    tower: Any, pixels: torch.Tensor, modality: str, inputs: Tensors, known: Tensors
) -> Tensors:
    """Return the borders of crops and windows, as the layers of an attached tower take them.

    The tower computes the crops' own before and after it merges windows, and passes a keyword on
    to both; under flash attention it needs none.
    """
    crops, lengths = (inputs.pop(f"{modality}_{name}") for name in ("cu_seqlens", "split_sizes"))
    longest = known["max_seqlen"]
    whole = tower_borders(tower, pixels, crops, longest, lengths)
    window_lengths = inputs.pop(f"{modality}_window_split_sizes", None)
    longest_window = inputs.pop(f"{modality}_max_window_seqlen", None)
    if whole is None:
        return {}
    by_places: dict[int, Any] = {sum(lengths): whole}
    windows = known.get("cu_window_seqlens")
    if windows is not None:
        merged = [length // _MERGED for length in lengths]
        by_places[sum(merged)] = tower_borders(
            tower, pixels, crops // _MERGED, longest // _MERGED, merged
        )
        windows.mrope_borders = tower_borders(
            tower, pixels, windows, longest_window, window_lengths
        )
    crops.mrope_borders = by_places
    return {"cu_seqlens": crops}


def merge_windows(
    self: Any,
    hidden_states: torch.Tensor,
    target_sizes: torch.Tensor,
    window_index: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Merge windows of patches between the tower's layers; replaces the forward of `vit_merger`.

    transformers' own formats the sizes of the crops into a message, whether it is needed or not: a
    sync.

    Args:
        hidden_states: (1, P, hidden).
        target_sizes: (crops, 2), for the layer's own forward.
        window_index: int64 (P,), see `mrope.towers.crop_tensors`; None: the layer's own forward.
        kwargs: `cu_window_seqlens`, the borders of the windows, among others.

    Returns:
        (1, P / 4, hidden).
    """
    if window_index is None:
        own: torch.Tensor = type(self).forward(self, hidden_states, target_sizes, **kwargs)
        return own
    normed = self.layer_norm1(hidden_states)[:, window_index, :]
    attended, _ = self.self_attn(
        hidden_states=normed, cu_seqlens=kwargs["cu_window_seqlens"], max_seqlen=_MERGED
    )
    windows = (hidden_states[:, window_index, :] + attended).view(-1, _MERGED, normed.shape[-1])
    merged = self.linear_2(self.act(self.linear_1(self.pre_norm(windows.flatten(1)))))
    result: torch.Tensor = (merged + windows.mean(dim=1)).unsqueeze(0)
    return result


def merge_crops(
    self: Any,
    hidden_states: torch.Tensor,
    target_sizes: torch.Tensor | None = None,
    blocks: torch.Tensor | None = None,
) -> Any:
    """Merge patches of all crops into features by one index; replaces the forward of `merger`.

    Args:
        hidden_states: (1, P, hidden of the tower).
        target_sizes: (crops, 2), for the module's own forward, which goes crop by crop.
        blocks: int64 (P,), see `mrope.towers.crop_tensors`; None: the module's own forward.

    Returns:
        (P / 4, hidden of the text).
    """
    if blocks is None:
        return type(self).forward(self, hidden_states, target_sizes)
    patches = hidden_states[0].index_select(0, blocks)
    return self.mlp[0](patches.view(-1, _MERGED * patches.shape[-1]))


CROP_FORWARDS: dict[str, Callable[..., Any]] = {"minicpmv4_7": crops_forward}

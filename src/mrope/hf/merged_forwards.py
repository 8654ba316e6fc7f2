"""Forwards of ERNIE-4.5-VL and Cosmos3-Edge, whose features pass a module behind the tower.

ERNIE's resampler merges frames in pairs, and its text layers have experts for text and experts for
images and clips. transformers makes the pairs from grids that it reads back, and selects tokens by
a mask, whose count is a sync in every layer; here both go by index.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.utils import can_return_tuple

from mrope.collate.layouts import to_model_layout
from mrope.hf.forwards import (
    Places,
    Tensors,
    forward_with,
    host_grids,
    is_precomputed,
    tower_inputs,
)


class Experts(NamedTuple):
    """Which tokens go to which experts, flat indices into the B * S tokens.

    Attributes:
        text: int64, the tokens of the text experts.
        vision: int64, the tokens of the vision experts; at least one.
    """

    text: torch.Tensor
    vision: torch.Tensor


@can_return_tuple  # type: ignore[untyped-decorator]
def paired_forward(self: Any, **inputs: Any) -> Any:
    """Forward of ERNIE-4.5-VL."""
    inputs = dict(to_model_layout(inputs))
    if not is_precomputed(self, inputs):
        return type(self).forward(self, **inputs)
    text, vision = (inputs.pop(f"moe_{name}_index", None) for name in ("text", "vision"))
    if vision is not None:
        # The text model passes the token types on to `route` unread. Without a vision token the
        # model's own forward runs the text experts alone, too.
        inputs["moe_mm_token_type_ids"] = Experts(text, vision) if len(vision) else None
    return forward_with(self, inputs, _encode_pairs)


@can_return_tuple  # type: ignore[untyped-decorator]
def resized_forward(self: Any, **inputs: Any) -> Any:
    """Forward of Cosmos3-Edge: the tower resizes its positions by grids that are on the host."""
    return forward_with(self, inputs, _encode_resized)


def _encode_pairs(self: Any, modality: str, inputs: Tensors) -> tuple[Places, Any]:
    """Run ERNIE's tower and its resampler on one modality's pixels."""
    pairs_2M = inputs.pop(f"{modality}_pair_index")
    places, pixels, grid_thw, known = tower_inputs(self, modality, inputs)
    output = self.vision_tower(pixels, grid_thw=grid_thw, return_dict=True, **known)
    output.pooler_output = self.resampler_model(output.last_hidden_state, pairs=pairs_2M)
    return places, output


def pair_frames(
    self: Any,
    hidden_states: torch.Tensor,
    grid_thw: torch.Tensor | None = None,
    pairs: torch.Tensor | None = None,
) -> torch.Tensor:
    """Merge the frames of clips in pairs by index; replaces the forward of ERNIE's resampler.

    Args:
        hidden_states: (P, hidden of the tower).
        grid_thw: (images, 3), for the resampler's own forward.
        pairs: int64 (2, M), the merged patches that make up each feature, see
            `mrope.towers.pair_index`; None: the resampler's own forward.

    Returns:
        (M, hidden of the text).
    """
    if pairs is None:
        own: torch.Tensor = type(self).forward(self, hidden_states, grid_thw)
        return own
    frames = self.spatial_linear(hidden_states.reshape(-1, self.spatial_dim))
    paired = torch.cat([frames.index_select(0, half) for half in pairs.unbind()], dim=-1)
    result: torch.Tensor = self.after_norm(self.mlp(self.temporal_linear(paired)))
    return result


def _encode_resized(self: Any, modality: str, inputs: Tensors) -> tuple[Places, Any]:
    """Run Cosmos3-Edge's tower and projector on one modality's pixels."""
    places, pixels, grid_thw, known = tower_inputs(self, modality, inputs)
    grid_thw = host_grids(modality, inputs, grid_thw)
    output = self.visual(pixels, grid_thw=grid_thw, return_dict=True, **known)
    output.pooler_output = self.projector(output.last_hidden_state)
    return places, output


def route(
    self: Any, hidden_states: torch.Tensor, moe_mm_token_type_ids: Experts | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run ERNIE's two kinds of experts, each on its tokens; replaces the block's forward.

    Args:
        hidden_states: (B, S, hidden).
        moe_mm_token_type_ids: `Experts` in place of the token types. Given token types or None, the
            block's own forward is called.

    Returns:
        (B, S, hidden), and router logits, float32 (B * S, experts).
    """
    if not isinstance(moe_mm_token_type_ids, Experts):
        own: tuple[torch.Tensor, torch.Tensor] = type(self).forward(
            self, hidden_states, moe_mm_token_type_ids
        )
        return own
    # In the order of the block's own forward, so that gradients are summed in that order too.
    shared = None if self.shared_experts is None else self.shared_experts(hidden_states)
    mixed = torch.zeros_like(hidden_states).flatten(0, 1)
    logits = mixed.new_zeros((len(mixed), self.num_experts), dtype=torch.float)
    blocks = (self.text_moe, self.vision_moe)
    for index, experts in zip(moe_mm_token_type_ids, blocks, strict=True):
        # Both come back flat.
        output, routed = experts(hidden_states.flatten(0, 1).index_select(0, index))
        mixed = mixed.index_copy(0, index, output.view(len(index), -1))
        logits = logits.index_copy(0, index, routed.view(len(index), -1))
    mixed = mixed.view_as(hidden_states)
    return (mixed if shared is None else mixed + shared), logits


MERGED_FORWARDS: dict[str, Callable[..., Any]] = {
    "ernie4_5_vl_moe": paired_forward,
    "cosmos3_edge": resized_forward,
}

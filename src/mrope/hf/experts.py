"""Experts and n-grams of text models that take more than embeddings from the batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mrope.errors import MRopeError
from mrope.hf.inputs import Tensors
from mrope.hf.outputs import Encoded


class Experts(NamedTuple):
    """Which tokens go to which experts, flat indices into the B * S tokens.

    Attributes:
        text: int64, the tokens of the text experts.
        vision: int64, the tokens of the vision experts; at least one.
    """

    text: torch.Tensor
    vision: torch.Tensor


def give_experts(_: object, inputs: Tensors) -> dict[str, Encoded]:
    """Put `Experts` in the place of ERNIE's token types."""
    text, vision = (inputs.pop(f"moe_{name}_index", None) for name in ("text", "vision"))
    if vision is not None:
        # The text model passes the token types on to `route` unread. Without a vision token the
        # model's own forward runs the text experts alone, too.
        inputs["moe_mm_token_type_ids"] = Experts(text, vision) if len(vision) else None
    return {}


def give_ngrams(self: Any, inputs: Tensors) -> dict[str, Encoded]:
    """Give Qwen4-Exp's layers, which embed n-grams of token ids too, these ids.

    Raises:
        MRopeError: the batch is one flattened row.
    """
    if self.config.text_config.ple_layer_ids:
        if inputs.get("seq_idx") is not None:
            raise MRopeError(
                "packing='flatten' is not supported for qwen4_exp with ple_layer_ids: n-grams of "
                "token ids, and a convolution over them, cross the borders of examples; pad the "
                "batches instead"
            )
        # Without them the text model would search its embeddings for the ids: a sync.
        inputs.setdefault("ple_input_ids", inputs.get("input_ids"))
    return {}


def route(
    self: Any, hidden_states: torch.Tensor, moe_mm_token_type_ids: Experts | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run ERNIE's two kinds of experts, each on its tokens; replaces the block's forward.

    transformers selects tokens by a mask, whose count is a sync in every layer.

    Args:
        self: the block.
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

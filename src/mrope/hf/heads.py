"""Heads that run the towers of their base model in a forward of their own: ColQwen2's."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from mrope.collate.layouts import to_model_layout
from mrope.columns import tower_key
from mrope.hf.forward import embed_media
from mrope.hf.inputs import PIXELS, Tensors, is_precomputed
from mrope.hf.rows import row_of

# What such a head passes on to its base model; the rest it drops.
_PASSED_ON = (
    "attention_mask",
    "position_ids",
    "labels",
    "cache",
    "past_key_values",
    "use_cache",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
)


def embed_for_retrieval(self: Any, **inputs: Any) -> ModelOutput:
    """Embed tokens and images, and let the head's own forward go on from the embeddings.

    ColQwen2's own forward takes pixels out of padded rows by a mask, runs the tower without what
    the stage computed for it, and scatters features by a mask: many syncs. What it does behind the
    base model, a projection and a norm, is left to it.

    Args:
        self: the head, whose base model is `vlm`.
        inputs: a batch; pixels flat, (P, ...), or in rows of one image each, padded to one length,
            (images, longest, ...), as ColQwen2's processor makes them.
    """
    base: PreTrainedModel = self.vlm
    batch = dict(to_model_layout(inputs))
    row = row_of(base.config.model_type)
    embedded = batch.get("inputs_embeds") is not None
    if embedded or not hasattr(base, "mrope_owner") or not is_precomputed(base, batch, row.audio):
        own: ModelOutput = type(self).forward(self, **inputs)
        return own
    passed = {name: batch.pop(name) for name in _PASSED_ON if name in batch}
    _join_rows(batch)
    # Deeper features are left out, as by the head's own forward.
    embeds, _, _ = embed_media(base, row, batch)
    # The rest of the batch reaches the base model with the positions, a tensor that the head's own
    # forward passes on as it is.
    passed["position_ids"].mrope_given = batch
    result: ModelOutput = type(self).forward(self, inputs_embeds=embeds, **passed)
    return result


def _join_rows(batch: Tensors) -> None:
    """Take the pixels of images out of padded rows, by sizes on the host."""
    pixels = batch.get(PIXELS["image"])
    if pixels is not None and pixels.ndim == 3:
        sizes = batch[tower_key("image", "grid_sizes")]
        rows = zip(pixels, sizes, strict=True)
        batch[PIXELS["image"]] = torch.cat(
            [row[: height * width] for row, (_, height, width) in rows]
        )

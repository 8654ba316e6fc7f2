"""Forwards of models whose text has 1-D positions: what they gain is in the towers and the masks.

Families of `mrope.spec.ONE_DIMENSIONAL`. Their text models are ordinary ones, which build a mask
for each kind of layer; here the masks are made first, by a host bool, and given as a dict.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.utils import can_return_tuple

from mrope.errors import MRopeError
from mrope.hf.attention import TEXT_ATTENTION, is_flash
from mrope.hf.forwards import (
    Tensors,
    cache_of,
    host_grids,
    is_precomputed,
    modalities_of,
    scatter_features,
    take_mask,
    token_embeddings,
    tower_inputs,
    vision_tower,
)
from mrope.hf.outputs import own_output

Masks = Callable[[Any, torch.Tensor, torch.Tensor | None, Any], Any]

# Inputs of the collator that no text model knows.
_UNUSED = (
    "has_padding",
    "mm_token_type_ids",
    "mm_encoder_outputs",
    "image_merge_sizes",
    "video_merge_sizes",
    "video_compression_mask",
)
# Layers that multiply their input by the mask, (B, S), and attend to nothing.
_MULTIPLIED = ("conv", "linear_attention")


@can_return_tuple  # type: ignore[untyped-decorator]
def plain_forward(self: Any, **inputs: Any) -> Any:
    """Forward of dots3-note, EXAONE 4.5, HyperCLOVA X Vision V2, LFM3-VL, VideoLLaMA 3."""
    return _forward(self, inputs, text_masks)


@can_return_tuple  # type: ignore[untyped-decorator]
def pooled_forward(self: Any, **inputs: Any) -> Any:
    """Forward of GLM-5-Next: its layers, the indexed ones too, take the padding mask itself."""
    return _forward(self, inputs, _padding_masks)


def _forward(self: Any, inputs: Tensors, make_masks: Masks) -> Any:
    """Replace placeholders by features, and run the text model under the masks made for it."""
    if not is_precomputed(self, inputs) or _has_audio(self, inputs):
        return type(self).forward(self, **inputs)
    embeds = token_embeddings(self, inputs)
    encoded = {}
    for modality in modalities_of(inputs):
        places, pixels, grid_thw, known = tower_inputs(self, modality, inputs)
        grid_thw = host_grids(modality, inputs, grid_thw)
        merge = inputs.pop(f"{modality}_merge_size", None)
        if merge is not None:
            known["merge_sizes"] = torch.full((len(grid_thw),), merge)
        output = vision_tower(self)(pixels, grid_thw=grid_thw, return_dict=True, **known)
        output.pooler_output = _project(self, output)
        kept = inputs.pop(f"{modality}_feature_index", None)
        if kept is not None:
            output.pooler_output = output.pooler_output.index_select(0, kept)
        embeds = scatter_features(embeds, places, output.pooler_output)
        encoded[modality] = output
    return _run_text_model(self, embeds, inputs, encoded, make_masks)


def _has_audio(self: Any, inputs: Tensors) -> bool:
    """Whether the batch has audio, which only the model's own forward encodes.

    Raises:
        MRopeError: it has, and the model is strict.
    """
    if inputs.get("input_features") is None:
        return False
    if self.mrope_strict:
        raise MRopeError(
            f"an attached {self.config.model_type} takes no audio, whose tower takes no "
            "precomputed tensors: attach(model, strict=False) leaves such batches to the model's "
            "own forward"
        )
    return True


def _project(self: Any, output: Any) -> torch.Tensor:
    """Return the features of a tower's output, (features, hidden of the text)."""
    for name in ("projector", "multi_modal_projector"):
        if hasattr(self, name):
            pooled = getattr(output, "pooler_output", None)
            projected: torch.Tensor = getattr(self, name)(
                output.last_hidden_state if pooled is None else pooled
            )
            return projected
    features: torch.Tensor = output.pooler_output
    return features


def _run_text_model(
    self: Any,
    embeds: torch.Tensor,
    inputs: Tensors,
    encoded: Mapping[str, Any],
    make_masks: Masks,
) -> Any:
    """Run the text model on embeddings (B, S, hidden), under masks decided by host facts."""
    mask = take_mask(inputs)
    for name in _UNUSED:
        inputs.pop(name, None)
    text = self.language_model
    if not isinstance(mask, dict):
        mask = make_masks(_own_config(text), embeds, mask, cache_of(inputs))
    with _masks_as_given(text, mask):
        outputs = text(inputs_embeds=embeds, attention_mask=mask, **inputs)
    return own_output(self, outputs, encoded)


def text_masks(
    config: Any, embeds: torch.Tensor, padding_mask: torch.Tensor | None, cache: Any
) -> Any:
    """Return the masks that the text model would build, without a sync.

    Args:
        config: the text model's config.
        embeds: (B, S, hidden).
        padding_mask: (B, S); None if the batch has no padding.
        cache: key-value cache, or None.

    Returns:
        A mask for each kind of layer, in a dict; the one mask itself of a model without
        `layer_types`. None stands for the causal mode of the attention kernel.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return _mask(config, "full_attention", embeds, padding_mask, cache)
    return {kind: _mask(config, kind, embeds, padding_mask, cache) for kind in set(kinds)}


def _mask(
    config: Any, kind: str, embeds: torch.Tensor, padding_mask: torch.Tensor | None, cache: Any
) -> torch.Tensor | None:
    """Return the mask of one kind of layer; without position ids, which would be searched."""
    if kind in _MULTIPLIED:
        return None if padding_mask is None else padding_mask.contiguous()
    # A padding mask is passed on only if the worker found padding: there is nothing to skip.
    skip = padding_mask is None and kind != "indexed_attention"
    make = create_sliding_window_causal_mask if kind == "sliding_attention" else create_causal_mask
    if is_flash(config) and kind == "full_attention":
        return padding_mask
    made: torch.Tensor | None = make(config, embeds, padding_mask, cache, allow_is_causal_skip=skip)
    return made


def _padding_masks(
    config: Any, embeds: torch.Tensor, padding_mask: torch.Tensor | None, _cache: Any
) -> dict[str, torch.Tensor]:
    """Return the padding mask, bool (B, S), for each kind of layer; see `text_masks`."""
    if padding_mask is None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    else:
        mask = padding_mask.bool()
    return dict.fromkeys(config.layer_types, mask)


@contextmanager
def _masks_as_given(text: Any, mask: Any) -> Iterator[None]:
    """Let a text model that takes one mask, not a dict, leave it as it is.

    It would pass its position ids to the function that makes the mask, which searches them for
    jumps where there is neither a mask nor a cache: a sync. For an implementation that transformers
    has no masks for, that function returns what it is given.
    """
    own = _own_config(text)
    if isinstance(mask, dict) or is_flash(own):
        yield
        return
    config = copy.copy(own)
    config._attn_implementation = TEXT_ATTENTION  # noqa: SLF001 - no public name
    config.mrope_own = own
    text.config = config
    try:
        yield
    finally:
        text.config = own


def _own_config(text: Any) -> Any:
    """Return the config of a text model, also while `_masks_as_given` has replaced it."""
    # In another thread, which would otherwise make its masks by the replacement, and restore that.
    return getattr(text.config, "mrope_own", text.config)


def pool_states(
    self: Any, packed_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pool the keys of an indexer of GLM-5-Next; replaces its `get_pooled_states`.

    transformers' own leaves out the pools that no row fills, by a mask: three syncs a layer. Here
    those are left out that no row of this width can fill: the same, if one row has no padding. Of
    any others none is selected, but scores that tie may be ranked in another order.

    Args:
        packed_states: (B, S, 2 * head_dim + 1): keys, scores of the gate, and whether a token is
            valid.

    Returns:
        Keys of the pools (B, P, head_dim); places of their tokens, int64 (B, P, index_kpool), -1
        where there is none; which pools are full, bool (B, P).
    """
    keys, gates, valid = torch.split(packed_states, [self.head_dim, self.head_dim, 1], dim=-1)
    valid = valid.squeeze(-1).bool()
    rows, width = valid.shape
    device = valid.device
    # Pools begin at the first valid token: padding on the left does not shift them.
    first = torch.where(valid.any(-1), valid.long().argmax(-1), width)
    pools = width // self.index_kpool
    offset = torch.arange(pools * self.index_kpool, device=device)
    place = first[:, None, None] + offset.view(1, pools, self.index_kpool)
    row, inside = torch.arange(rows, device=device)[:, None, None], place.clamp(max=width - 1)
    filled = valid[row, inside] & (place < width)
    scores = gates[row, inside].float() + self.index_kpool_compress_ape.float()
    weights = scores.masked_fill(~filled[..., None], float("-inf")).softmax(dim=2).nan_to_num()
    pooled = (weights.to(keys.dtype) * keys[row, inside]).sum(dim=2)
    return pooled, place.masked_fill(~filled, -1), filled.all(-1)


PLAIN_FORWARDS: dict[str, Callable[..., Any]] = {
    "dots3_note": plain_forward,
    "exaone4_5": plain_forward,
    "glm5_next": pooled_forward,
    "hyperclovax_vision_v2": plain_forward,
    "lfm3_vl": plain_forward,
    "video_llama_3": plain_forward,
}

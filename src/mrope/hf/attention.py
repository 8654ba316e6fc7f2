"""Attention of attached models: towers attend within segments, text layers under a mask.

Everything that depends on the attention implementation is decided here: `host_segments` and
`attend_within` for towers, `causal_mask` and `packed_mask` for text models.

A segment is what a tower attends within: an image, a frame of a clip, a window of Qwen2.5-VL, a
window of audio. Segments are `(count, length)` pairs of host ints, in order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Segments = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TowerLayer:
    """Describe the attention layer of a tower: what differs between transformers' classes.

    Attributes:
        inputs: names of the projections to query, key and value: one fused projection, or three.
        output: name of the projection behind the attention.
        rotary: whether query and key are rotated by `position_embeddings`.
        returns_pair: whether the layer returns (output, attention weights); the weights are None.
    """

    inputs: tuple[str, ...]
    output: str
    rotary: bool = True
    returns_pair: bool = False


FUSED = TowerLayer(("qkv",), "proj")
OMNI_2_5_VISION = TowerLayer(("q", "k", "v"), "proj")
PADDLEOCR = TowerLayer(("q_proj", "k_proj", "v_proj"), "out_proj", returns_pair=True)
AUDIO = TowerLayer(("q_proj", "k_proj", "v_proj"), "out_proj", rotary=False)


def segmented_forward(parts: TowerLayer) -> Callable[..., Any]:
    """Return a forward that attends within segments, to replace that of a tower's attention layer.

    It takes the arguments of the layer's own forward, with `cu_seqlens` as `Segments` instead of
    a tensor; `segments` overrides it, for towers that need the tensor for themselves. Given only a
    tensor, as under flash attention, it calls the layer's own forward.
    """

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        cu_seqlens: Segments | torch.Tensor,
        segments: Segments | None = None,
        **kwargs: Any,
    ) -> Any:
        within = cu_seqlens if segments is None else segments
        if isinstance(within, torch.Tensor):
            return type(self).forward(self, hidden_states, cu_seqlens, **kwargs)
        # Flash attention's argument; the other implementations would not know it.
        kwargs.pop("max_seqlen", None)
        rotary = kwargs.pop("position_embeddings") if parts.rotary else None
        heads = _project(self, parts, hidden_states, rotary)
        output = getattr(self, parts.output)(attend_within(self, *heads, within, **kwargs))
        return (output, None) if parts.returns_pair else output

    return forward


def _project(
    layer: Any,
    parts: TowerLayer,
    hidden_states: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and value, each (N, heads, dimension), from hidden states (N, hidden)."""
    tokens = len(hidden_states)
    projected = [getattr(layer, name)(hidden_states) for name in parts.inputs]
    if len(projected) == 1:
        query, key, value = projected[0].reshape(tokens, 3, layer.num_heads, -1).unbind(1)
    else:
        query, key, value = (one.reshape(tokens, layer.num_heads, -1) for one in projected)
    if rotary is not None:
        # Taken from the layer's own modelling file, so that rounding is that of its own forward.
        query, key = _modelling(layer).apply_rotary_pos_emb_vision(query, key, *rotary)
    return query, key, value


def attend_within(
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    **kwargs: Any,
) -> torch.Tensor:
    """Attend within segments, with one call for adjacent segments of equal length.

    transformers makes a call for each segment: 256 frames of equal size in 24 layers are 6,144
    calls there, and 24 here.

    Args:
        layer: the attention layer, with `scaling`, `attention_dropout` and `config`.
        query, key, value: (N, heads, dimension).
        segments: (count, length) pairs; their products sum to N.

    Returns:
        (N, heads * dimension).
    """
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
        layer.config._attn_implementation,  # noqa: SLF001 - no public name
        _modelling(layer).eager_attention_forward,
    )
    outputs = []
    # torch.split needs host ints. From a device tensor they would be read back in every layer.
    sizes = [count * length for count, length in segments]
    pieces = (torch.split(tensor, sizes) for tensor in (query, key, value))
    for (count, length), *piece in zip(segments, *pieces, strict=True):
        # Equal segments become a batch dimension, so that no mask is needed to keep them apart.
        batched = (one.unflatten(0, (count, length)).transpose(1, 2) for one in piece)
        output, _ = attend(
            layer,
            *batched,
            attention_mask=None,
            scaling=layer.scaling,
            dropout=layer.attention_dropout if layer.training else 0.0,
            is_causal=False,
            **kwargs,
        )
        outputs.append(output.reshape(count * length, -1))
    return torch.cat(outputs)


def host_segments(config: Any, lengths: list[int] | None) -> Segments | None:
    """Return what a tower takes as `cu_seqlens`, or None where it must be the tensor.

    Args:
        config: the tower's config.
        lengths: of the segments, in order; None: the batch has none of this kind.

    Returns:
        Adjacent equal lengths as pairs: 4 4 2 gives (2, 4), (1, 2). None under flash attention,
        whose kernel reads the borders on the device, and without lengths.
    """
    if lengths is None or _is_flash(config):
        return None
    return tuple((len(list(equal)), length) for length, equal in groupby(lengths))


def mix_by_segment(
    self: Any, hidden_states: torch.Tensor, segment_sizes: list[int] | None = None, **kwargs: Any
) -> torch.Tensor:
    """Run a linear attention layer on each segment; replaces the layer's forward.

    The layer's state and its convolution run along the row, across segment borders. transformers
    leaves the borders to optional kernels, and raises if these are not installed.

    Args:
        hidden_states: (1, T, hidden).
        segment_sizes: tokens of each segment; None: the layer's own forward, on the whole rows.
    """
    own = type(self).forward
    if segment_sizes is None:
        whole: torch.Tensor = own(self, hidden_states, **kwargs)
        return whole
    # They hold the borders of the whole row. A segment has none, and a layer that is given borders
    # raises where the kernels for them are missing.
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"):
        kwargs.pop(name, None)
    segments = torch.split(hidden_states, segment_sizes, dim=1)
    return torch.cat([own(self, segment, **kwargs) for segment in segments], dim=1)


def causal_mask(
    config: Any, embeds: torch.Tensor, padding_mask: torch.Tensor | None, cache: Any
) -> Any:
    """Return the mask that the text model would build, without a sync.

    Args:
        config: the text model's config.
        embeds: (B, S, hidden).
        padding_mask: (B, S); None if the batch has no padding; with four dimensions a finished
            mask, which is returned as it is.
        cache: key-value cache, or None.

    Returns:
        None without padding: the attention kernel's own causal mode. With padding a mask made on
        the device, (B, 1, S, S). Flash attention takes the 2-D mask, and syncs to unpad with it.
    """
    if padding_mask is None or padding_mask.ndim != 2 or _is_flash(config):
        return padding_mask
    # With the skip allowed, transformers reduces the mask to learn whether it is needed: a sync.
    # It is needed: the caller passes a padding mask only if the worker found padding.
    full = create_causal_mask(config, embeds, padding_mask, cache, allow_is_causal_skip=False)
    if not _has_linear_layers(config):
        return full
    # Linear layers multiply their input by the 2-D mask. Given a dict, the text model uses it as
    # it is; building it itself, it would ask first whether the mask is all ones: a sync.
    return {"full_attention": full, "linear_attention": padding_mask.contiguous()}


def packed_mask(config: Any, embeds: torch.Tensor, inputs: MutableMapping[str, Any]) -> Any:
    """Return the mask of one flattened row, and remove from `inputs` what would make it sync.

    Args:
        config: the text model's config.
        embeds: (1, T, hidden).
        inputs: `seq_idx` (1, T) is taken out; `position_ids` loses its text row; `segment_sizes`
            stays only for models with linear layers.

    Returns:
        A mask made on the device from `seq_idx`; None under flash attention, which takes
        `cu_seq_lens_q`.
    """
    seq_idx = inputs.pop("seq_idx")
    # With the text row present, transformers searches it for jumps to find segments: a sync.
    inputs["position_ids"] = inputs["position_ids"][-3:]
    full = None
    if not _is_flash(config):
        full = create_causal_mask(
            config, embeds, None, None, and_mask_function=packed_sequence_mask_function(seq_idx)
        )
    if _has_linear_layers(config):
        return {"full_attention": full, "linear_attention": None}
    inputs.pop("segment_sizes")
    return full


def _is_flash(config: Any) -> bool:
    return "flash" in (config._attn_implementation or "")  # noqa: SLF001 - no public name


def _has_linear_layers(config: Any) -> bool:
    return "linear_attention" in (getattr(config, "layer_types", None) or ())


def _modelling(layer: Any) -> Any:
    """Return the module of transformers that defines the layer's class."""
    return sys.modules[type(layer).__module__]

"""Run the text model on embeddings, under masks that are decided by facts on the host.

Text models with M-RoPE make what they need without a mask. Those with 1-D positions, families of
`mrope.spec.ONE_DIMENSIONAL`, build a mask for each kind of layer; here the masks are made first, by
a host bool, and given as a dict.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    packed_sequence_mask_function,
)

from mrope.columns import LINEAR_KEYS, NewColumns
from mrope.errors import MRopeError
from mrope.hf.attention import ONLY_CAUSAL, RECURRENT, TEXT_ATTENTION, has_layers, is_flash
from mrope.hf.inputs import Tensors, cache_of, drop_unread, fills_cache, take_mask
from mrope.hf.linear import lacks_kernels
from mrope.hf.pools import find_pools
from mrope.hf.varlen import TAKES_WINDOW, can_attend

Masks = Callable[[Any, torch.Tensor, torch.Tensor | None, Any], Any]


def _hide_nothing(
    _batch: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, _key: torch.Tensor
) -> torch.Tensor:
    return query >= 0


# What lets transformers make a mask without asking first whether it is needed, a sync: since 5.15
# an argument, before it a function of ours, which hides nothing.
_ASKS_NOTHING: NewColumns = (
    {"allow_is_causal_skip": False}
    if "allow_is_causal_skip" in inspect.signature(create_causal_mask).parameters
    else {"and_mask_function": _hide_nothing}
)


def run_rope(text: Any, embeds: torch.Tensor, inputs: Tensors) -> Any:
    """Run a text model with M-RoPE on embeddings (B, S, hidden)."""
    mask = take_mask(inputs, text.config, embeds)
    drop_unread(inputs)
    slow = has_layers(text.config, "linear_attention") and lacks_kernels(embeds)
    if slow and cache_of(inputs) is None and not fills_cache(inputs, text.config):
        # The model would make one all the same, which is filled by the slower rule alone.
        inputs["use_cache"] = False
    if inputs.get("seq_idx") is not None:
        packed = packed_mask(text, embeds, inputs)
        mask = packed if mask is None else mask
    elif not isinstance(mask, dict):
        mask = causal_mask(text.config, embeds, mask, cache_of(inputs))
        if mask is None and cache_of(inputs) is None and text.mrope_attention == "varlen":
            inputs[ONLY_CAUSAL] = True
    mask = _as_taken(text, mask)
    _give_border(text.config, embeds, mask, inputs)
    return text(input_ids=None, inputs_embeds=embeds, attention_mask=mask, **inputs)


def run_searched(text: Any, embeds: torch.Tensor, inputs: Tensors) -> Any:
    """Run Cosmos3-Edge's text model, which up to 5.22 makes its mask by the times of tokens.

    Without a mask it searches them for jumps, as if they were the places of tokens: a sync, and
    borders where there are none. So it is always given a mask.

    Raises:
        MRopeError: such a release, a flattened row, and flash attention, which takes no mask.
    """
    if not tells_text_row(type(text)):
        seq_idx = inputs.get("seq_idx")
        if is_flash(text.config):
            if seq_idx is not None:
                raise MRopeError(
                    "packing='flatten' is not supported for cosmos3_edge under flash attention "
                    "with transformers before 5.23: it takes the times of tokens for their places"
                )
            inputs["has_padding"] = True
        elif cache_of(inputs) is None and (seq_idx is not None or not inputs["has_padding"]):
            within = seq_idx is not None and packed_sequence_mask_function(seq_idx)
            how = {"and_mask_function": within} if within else _ASKS_NOTHING
            inputs["attention_mask"] = create_causal_mask(text.config, embeds, None, None, **how)
    return run_rope(text, embeds, inputs)


_TELLS_TEXT_ROW: dict[type, bool] = {}


# A constant under torch.compile, which cannot trace `inspect`; it would warn of an lru_cache.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def tells_text_row(text: type) -> bool:
    """Whether a text model tells four rows of positions, the first of text, from three."""
    if text not in _TELLS_TEXT_ROW:
        code = inspect.unwrap(text.forward).__code__  # type: ignore[attr-defined]
        _TELLS_TEXT_ROW[text] = 4 in code.co_consts
    return _TELLS_TEXT_ROW[text]


def _as_taken(text: object, mask: object) -> Any:
    """Return masks by kind of layer as one tensor, where up to 5.12 no dict is taken."""
    if not isinstance(mask, dict) or not hasattr(text, "_update_linear_attn_mask"):
        return mask
    full = mask["full_attention"]
    if full is not None:
        full.mrope_linear_mask = mask["linear_attention"]
    return full


def linear_mask(self: Any, attention_mask: torch.Tensor | None, cache: Any) -> torch.Tensor | None:
    """Return the mask of linear layers; replaces `_update_linear_attn_mask`, which asks the device.

    Args:
        self: the text model.
        attention_mask: (B, 1, S, keys), made by `causal_mask`; any other: the model's own method.
        cache: key-value cache, or None.
    """
    if attention_mask is not None and hasattr(attention_mask, "mrope_linear_mask"):
        made: torch.Tensor | None = attention_mask.mrope_linear_mask
        return made
    own: Any = type(self)._update_linear_attn_mask  # noqa: SLF001 - the method that this one replaces
    result: torch.Tensor | None = own(self, attention_mask, cache)
    return result


def run_plain(text: object, embeds: torch.Tensor, inputs: Tensors) -> Any:
    """Run a text model with 1-D positions on embeddings (B, S, hidden)."""
    within = take_borders(_own_config(text), inputs)
    if within is None:
        return _run_under(text_masks, text, embeds, inputs)
    masks = partial(text_masks, within=within, unmasked=_take_borders_alone(text, embeds))
    return _run_under(masks, text, embeds, inputs)


def run_pooled(text: Any, embeds: torch.Tensor, inputs: Tensors) -> Any:
    """Run GLM-5-Next's, whose layers, the indexed ones too, take the padding mask itself.

    Those of a flattened row take its pools in place of a mask.

    Raises:
        MRopeError: as `take_borders`; or a flattened row under eager attention, which lets a token
            that selects nothing attend to the whole row.
    """
    config, row = text.config, dict(inputs)
    if take_borders(config, inputs) is not None:
        if config._attn_implementation != "sdpa" and not config.index_kpool_always_select_tail:  # noqa: SLF001
            raise MRopeError(
                "packing='flatten' is not supported for glm5_next without "
                "index_kpool_always_select_tail under eager attention: a token in front of its "
                "first whole pool attends to the whole row; use sdpa, or pad the batches"
            )
        sizes = row.get("segment_sizes", ())
        pools = find_pools(config, row["cu_seq_lens_q"], row["seq_idx"], sizes)
        masks = dict.fromkeys(config.layer_types, pools) | dict.fromkeys(RECURRENT)
        inputs["attention_mask"] = masks
    return _run_under(_padding_masks, text, embeds, inputs)


def _run_under(make_masks: Masks, text: Any, embeds: torch.Tensor, inputs: Tensors) -> Any:
    config = _own_config(text)
    mask = take_mask(inputs, config, embeds)
    drop_unread(inputs)
    if not isinstance(mask, dict):
        mask = make_masks(config, embeds, mask, cache_of(inputs))
    _give_border(config, embeds, mask, inputs)
    with _masks_as_given(text, mask):
        return text(inputs_embeds=embeds, attention_mask=mask, **inputs)


def _give_border(config: object, embeds: torch.Tensor, mask: object, inputs: Tensors) -> None:
    """Give flash attention the borders of a batch of one row, or it searches positions for some.

    That is a sync in each layer. GLM-4.5V's layers are given M-RoPE's positions, which are equal
    within an image: the row would be cut there.
    """
    masks = mask.values() if isinstance(mask, dict) else (mask,)
    if (
        is_flash(config)
        and len(embeds) == 1
        and all(one is None for one in masks)
        and cache_of(inputs) is None
        and inputs.get("cu_seq_lens_q") is None
        # Whose own forward takes borders with kernels alone.
        and not has_layers(config, *RECURRENT)
    ):
        width = embeds.shape[1]
        border = torch.arange(0, width + 1, width, dtype=torch.int32, device=embeds.device)
        inputs.update(dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), border))
        inputs.update(dict.fromkeys(("max_length_q", "max_length_k"), width))


def causal_mask(
    config: object, embeds: torch.Tensor, padding_mask: torch.Tensor | None, cache: object
) -> Any:
    """Return what an attached forward gives the text model as its mask, made without a sync.

    Args:
        config: the text model's config.
        embeds: (B, S, hidden).
        padding_mask: (B, S); None if the batch has no padding; with four dimensions a finished
            mask, which is returned as it is.
        cache: key-value cache, or None.

    Returns:
        None without padding: the text model then makes what its layers and a cache need, which is
        no sync. With padding a mask made on the device, (B, 1, S, keys); where layers
        differ, a dict by their kind. Flash attention takes the 2-D mask, and syncs to unpad with
        it, which `take_mask` spares rows that are padded behind their tokens.
    """
    if padding_mask is None or padding_mask.ndim != 2 or is_flash(config):
        return padding_mask
    # With the skip allowed, transformers reduces the mask to learn whether it is needed: a sync.
    # It is needed: the caller passes a padding mask only if the worker found padding.
    full = create_causal_mask(config, embeds, padding_mask, cache, **_ASKS_NOTHING)
    # Linear layers multiply their input by the 2-D mask. Given a dict, the text model uses it as
    # it is; building it itself, it would ask first whether the mask is all ones: a sync.
    return _by_layer(config, full, padding_mask.contiguous())


def packed_mask(text: Any, embeds: torch.Tensor, inputs: Tensors) -> Any:
    """Return the mask of one flattened row, and remove from `inputs` what would make it sync.

    Args:
        text: the text model, with the attribute `mrope_attention` that `attach` sets.
        embeds: (1, T, hidden).
        inputs: `seq_idx` (1, T) is taken out; `position_ids` loses its text row; how linear layers
            cut the row stays only for models that have some.

    Returns:
        A mask (1, 1, T, T) made on the device from `seq_idx`; None where a kernel takes
        `cu_seq_lens_q`, flash attention or the variable-length one.

    Raises:
        MRopeError: as `take_borders`.
    """
    within = take_borders(text.config, inputs)
    # With the text row present, transformers searches it for jumps to find segments: a sync.
    inputs["position_ids"] = inputs["position_ids"][-3:]
    full = None
    if "full_attention" not in _take_borders_alone(text, embeds):
        full = _mask(text.config, "full_attention", embeds, None, None, within)
    return _by_layer(text.config, full, None)


def take_borders(config: object, inputs: Tensors) -> NewColumns | None:
    """Remove from `inputs` how a row is cut, but what layers that carry a state read.

    Returns:
        What functions of transformers are given to make masks that keep examples apart; None: the
        batch is no flattened row.

    Raises:
        MRopeError: layers of linear attention, and a row without what they read.
    """
    seq_idx = inputs.pop("seq_idx", None)
    if seq_idx is None:
        return None
    if has_layers(config, "conv"):
        # Of families with 1-D positions, which are the places of tokens in their examples.
        inputs["linear_places"] = inputs["position_ids"]
    elif not has_layers(config, "linear_attention"):
        for name in ("segment_sizes", *LINEAR_KEYS):
            inputs.pop(name, None)
    elif inputs.get("linear_slots") is None:
        raise MRopeError(
            "the text model has linear layers, and the flattened row has no linear_slots: it "
            "is a part of a sequence, or another collator's"
        )
    return {"and_mask_function": packed_sequence_mask_function(seq_idx)}


def _take_borders_alone(text: Any, embeds: torch.Tensor) -> tuple[str, ...]:
    """Return the kinds of layers whose attention takes borders of a flattened row, and no mask."""
    kinds = ("full_attention", "sliding_attention")
    if is_flash(_own_config(text)):
        return kinds
    if text.mrope_attention != "varlen" or not can_attend(embeds):
        return ()
    return kinds if TAKES_WINDOW else kinds[:1]


def _by_layer(config: Any, full: Any, linear: torch.Tensor | None) -> Any:
    """Return the mask of each kind of layer, for text models with linear layers; else the mask."""
    if not has_layers(config, "linear_attention"):
        return full
    # Qwen4-Exp of 5.16 reads the mask of all its kinds of attention by this name.
    kinds = {"full_attention", *config.layer_types}
    return {kind: linear if kind == "linear_attention" else full for kind in kinds}


def text_masks(
    config: object,
    embeds: torch.Tensor,
    padding_mask: torch.Tensor | None,
    cache: object,
    within: NewColumns | None = None,
    unmasked: tuple[str, ...] = (),
) -> Any:
    """Return the masks that the text model would build, without a sync.

    Args:
        config: the text model's config.
        embeds: (B, S, hidden).
        padding_mask: (B, S); None if the batch has no padding.
        cache: key-value cache, or None.
        within: of a flattened row, what `take_borders` returns.
        unmasked: the kinds of layers that take its borders, and no mask.

    Returns:
        A mask for each kind of layer, in a dict; the one mask itself of a model without
        `layer_types`. None stands for the causal mode of the attention kernel.
    """
    kinds = getattr(config, "layer_types", None)
    masks = {
        kind: None if kind in unmasked else _mask(config, kind, embeds, padding_mask, cache, within)
        for kind in set(kinds or ("full_attention",))
    }
    return masks if kinds else masks["full_attention"]


def _mask(
    config: object,
    kind: str,
    embeds: torch.Tensor,
    padding_mask: torch.Tensor | None,
    cache: object,
    within: NewColumns | None,
) -> torch.Tensor | None:
    """Return the mask of one kind of layer; without position ids, which would be searched."""
    if kind in RECURRENT:
        return None if padding_mask is None else padding_mask.contiguous()
    # A padding mask is passed on only if the worker found padding: there is nothing to skip.
    skip = padding_mask is None and kind != "indexed_attention"
    make = create_sliding_window_causal_mask if kind == "sliding_attention" else create_causal_mask
    if is_flash(config) and kind == "full_attention":
        return padding_mask
    asks = {} if skip else _ASKS_NOTHING
    made: torch.Tensor | None = make(config, embeds, padding_mask, cache, **(within or asks))
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
    if isinstance(mask, dict) or (is_flash(own) and mask is not None):
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

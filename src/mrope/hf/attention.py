"""Attention of attached models: towers attend within segments, text layers under a mask.

Everything that depends on the attention implementation is decided here: `tower_borders` and
`attend_within` for towers, `attend_text` for text models, whose masks `mrope.hf.text` makes.

A segment is what a tower attends within: an image, a frame of a clip, a window of Qwen2.5-VL, a
window of audio. There are three ways to keep segments apart:

- one call of a variable-length kernel (`mrope.hf.varlen`), with borders on the device;
- one call for each run of equal adjacent segments, whose lengths are host ints;
- one call under a mask, for fixed shapes where there is no such kernel.
"""

from __future__ import annotations

import copy
import sys
from itertools import groupby
from typing import Any, NamedTuple

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mrope.columns import NewColumns
from mrope.errors import MRopeError
from mrope.hf.varlen import attend_varlen, can_attend

Pairs = tuple[tuple[int, int], ...]
TEXT_ATTENTION = "mrope_varlen"
"""Name under which `attend_text` is registered with transformers."""
ONLY_CAUSAL = "mrope_only_causal"
"""Keyword of `attend_text`: the mask that it is given hides what is behind a token, and no more.

While a graph is compiled with torch before 2.14, transformers makes such a mask where it makes none
otherwise, and with it sdpa takes a slower kernel: twice the time of the step's attention at 16k.
"""

RECURRENT = ("conv", "linear_attention")
"""Layers that multiply their input by the padding mask, (B, S), and attend to nothing."""
INDEXED = ("qwen_sparse_attention", "indexed_attention")
"""Layers whose indexer selects tokens by the mask, by their name up to 5.17 and since."""


class Borders(NamedTuple):
    """Where segments begin and end, in every form that one of the ways takes.

    Attributes:
        cu_seqlens: int32 (segments + 1,), on the device.
        longest: length of the longest segment, or a bound of it; a host int.
        pairs: (count, length) of adjacent equal segments; None with fixed shapes, whose lengths
            would be constants of a compiled graph.
        mask: (1, 1, N, N), with fixed shapes where no kernel takes borders; else None.
        varlen: whether the variable-length kernel is used where it takes the dtype.
    """

    cu_seqlens: torch.Tensor
    longest: int
    pairs: Pairs | None
    mask: torch.Tensor | None
    varlen: bool


def attend_within(
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: Borders,
    options: NewColumns,
    eager: Any,
) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
    """Attend within segments, in one call where that is possible.

    Args:
        layer: the attention layer, with `config`.
        query, key, value: (N, heads, dimension).
        borders: of the segments.
        options: `scaling`, the factor of the scores, `dropout`, and what else transformers'
            attention functions take.
        eager: the attention function for "eager".

    Returns:
        (N, heads * dimension), and of an implementation that gives them the weights of each
        segment, (1, heads, length, length).
    """
    if borders.varlen and can_attend(query):
        cu_seqlens, longest = borders.cu_seqlens, borders.longest
        scale = options["scaling"]
        return attend_varlen(query, key, value, cu_seqlens, longest, scale).flatten(1), None
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
        layer.config._attn_implementation,  # noqa: SLF001 - no public name
        eager,
    )
    options = {"is_causal": False, **options}
    if borders.pairs is None:
        whole = (one.transpose(0, 1)[None] for one in (query, key, value))
        mask = borders.mask
        if is_flash(layer.config):  # before 5.15, see `TowerLayer.takes_longest`
            options |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), borders.cu_seqlens)
            options |= dict.fromkeys(("max_length_q", "max_length_k"), borders.longest)
        elif mask is None:  # float32 on CUDA: the kernel does not take it
            mask = _block_mask(borders.cu_seqlens, query, layer.config)
        output: torch.Tensor = attend(layer, *whole, attention_mask=mask, **options)[0]
        return output.reshape(len(query), -1), None
    return _attend_pairs(attend, layer, (query, key, value), borders.pairs, options)


def _attend_pairs(
    attend: Any, layer: Any, heads: tuple[torch.Tensor, ...], pairs: Pairs, options: NewColumns
) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
    """Attend with one call for adjacent segments of equal length.

    transformers makes a call for each segment: 256 frames of equal size in 24 layers are 6,144
    calls there, and 24 here.
    """
    outputs: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []
    # torch.split needs host ints. From a device tensor they would be read back in every layer.
    sizes = [count * length for count, length in pairs]
    pieces = (torch.split(tensor, sizes) for tensor in heads)
    for (count, length), *piece in zip(pairs, *pieces, strict=True):
        # Equal segments become a batch dimension, so that no mask is needed to keep them apart.
        batched = (one.unflatten(0, (count, length)).transpose(1, 2) for one in piece)
        output, shares = attend(layer, *batched, attention_mask=None, **options)
        outputs.append(output.reshape(count * length, -1))
        weights += [] if shares is None else shares.split(1)
    return torch.cat(outputs), weights or None


def tower_borders(
    tower: Any,
    patches: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    lengths: list[int] | None,
) -> Borders | None:
    """Return what a tower takes as `cu_seqlens`, or None where it must be the tensor.

    Args:
        tower: with the attribute `mrope_attention` that `attach` sets.
        patches: (N, ...), what the tower is run on; N is read with fixed shapes only.
        cu_seqlens: borders of the segments, on the device.
        longest: length of the longest segment.
        lengths: of the segments, in order; None: the batch has fixed shapes.

    Returns:
        None under flash attention, whose kernel reads the borders on the device, and where the
        tower's forwards are not transformers' own: they know the tensor alone.
    """
    if is_flash(tower.config) or tower.mrope_attention == "own":
        return None
    varlen = tower.mrope_attention == "varlen"
    pairs = mask = None
    if lengths is not None:
        pairs = tuple((len(list(equal)), length) for length, equal in groupby(lengths))
    elif not varlen or not patches.is_cuda:
        mask = _block_mask(cu_seqlens, patches, tower.config)
    return Borders(cu_seqlens, longest, pairs, mask, varlen)


def _block_mask(cu_seqlens: torch.Tensor, places: torch.Tensor, config: Any) -> torch.Tensor:
    """Return which pairs of N places are in one segment: borders 0 2 3 give 110 110 001.

    (1, 1, N, N), bool; under eager attention, which adds it to the scores, 0 and minus infinity.
    """
    place = torch.arange(places.shape[0], device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    segment = torch.bucketize(place, cu_seqlens[1:], right=True)
    mask = (segment[:, None] == segment)[None, None]
    if config._attn_implementation != "eager":  # noqa: SLF001 - no public name
        return mask
    return torch.zeros_like(mask, dtype=places.dtype).masked_fill(~mask, float("-inf"))


def attend_text(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within the examples of a flattened row, in one call; else as sdpa does.

    A transformers attention function. It takes query (1, heads, T, dimension), and borders from
    `cu_seq_lens_q` and `max_length_q`, which text layers pass on.

    Raises:
        MRopeError: the attention implementation of the text model was changed after `attach`.
    """
    model_config, implementation = module.mrope_attached
    if model_config._attn_implementation != implementation:  # noqa: SLF001 - no public name
        raise MRopeError(
            "set_attn_implementation does not reach the text layers of an attached model: detach "
            "it first, and attach it again"
        )
    if kwargs.pop(ONLY_CAUSAL, False):
        attention_mask = None
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    dropout = kwargs.get("dropout") or 0.0
    if cu_seqlens is None or attention_mask is not None or dropout or not can_attend(query):
        sdpa: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
        output: tuple[torch.Tensor, None] = sdpa(
            module, query, key, value, attention_mask, **kwargs
        )
        return output
    query, key, value = (one[0].transpose(0, 1) for one in (query, key, value))
    longest, scale = kwargs["max_length_q"], kwargs["scaling"]
    window = kwargs.get("sliding_window")
    attended = attend_varlen(query, key, value, cu_seqlens, longest, scale, True, window)
    return attended[None], None


# On import, not in `attach`: a new process that unpickles an attached model imports this module.
ALL_ATTENTION_FUNCTIONS.register(TEXT_ATTENTION, attend_text)


def use_varlen(attention: Any) -> None:
    """Let an attention layer of a text model call `attend_text`.

    Only the layer gets another config: the text model itself makes masks by its own.
    """
    if "mrope_attached" in vars(attention):  # shared with another attached model
        return
    config = attention.config
    # `set_attn_implementation` writes to the model's config, which the layer no longer reads.
    attention.mrope_attached = config, config._attn_implementation  # noqa: SLF001
    attention.config = copy.copy(config)
    attention.config._attn_implementation = TEXT_ATTENTION  # noqa: SLF001


def undo_varlen(module: torch.nn.Module) -> None:
    """Undo `use_varlen`, if the module is a layer for which it was called."""
    attached = vars(module).pop("mrope_attached", None)
    if attached is not None:
        module.config = attached[0]


def is_flash(config: Any) -> bool:
    """Whether a model runs under flash attention."""
    return "flash" in (config._attn_implementation or "")  # noqa: SLF001 - no public name


def has_layers(config: object, *kinds: str) -> bool:
    """Whether the config of a text model lists layers of one of these kinds."""
    return not set(kinds).isdisjoint(getattr(config, "layer_types", None) or ())


def modelling_of(layer: object) -> Any:
    """Return the module of transformers that defines the layer's forward."""
    return module_of_forward(type(layer))


_MODULES: dict[type, Any] = {}


# A constant under torch.compile, which cannot trace the search; it would warn of an lru_cache.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def module_of_forward(layer_class: type) -> Any:
    """Return the module of transformers that defines the forward of a class of layers."""
    if layer_class not in _MODULES:
        _MODULES[layer_class] = _find_module(layer_class)
    return _MODULES[layer_class]


def _find_module(layer_class: type) -> Any:
    # Not the module of the class: a user's subclass is defined elsewhere, and so is FSDP2's.
    owner = next(one for one in layer_class.__mro__ if "forward" in vars(one))
    return sys.modules[owner.__module__]

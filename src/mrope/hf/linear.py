"""Linear attention over a flattened row in one call, which is told where the segments lie.

Of Qwen3.5 and its kin: gated delta nets behind a short convolution. What they read of a row comes
from the worker, see `mrope.collate.linear_columns`: no length of a segment is asked of the device,
and as many operators run for many segments as for few.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn import functional

from mrope.columns import LINEAR_KEYS, NewColumns
from mrope.errors import MRopeError
from mrope.hf import fused
from mrope.hf.attention import modelling_of
from mrope.hf.methods import foreign_on_class

# The borders of the whole row; a layer that is given borders raises where it has no kernels.
_BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
# The log of a decay that leaves nothing of a state, and whose exponential is 0 and not a NaN.
_FORGET = -1e4


def mix_segments(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Run a layer of gated delta nets, each segment of a row on its own; replaces its `forward`.

    Args:
        hidden_states: (B, S, hidden).
        kwargs: those of the layer's own forward, to which rows go that have no segments; and what
            `mrope.collate.linear_columns` adds for those that have.

    Raises:
        MRopeError: a forward of another library, which runs segment by segment, and no list of
            their lengths.
    """
    sizes = kwargs.pop("segment_sizes", None)
    segments = {name: kwargs.pop(name, None) for name in LINEAR_KEYS}
    borders = {name: kwargs.pop(name) for name in _BORDERS if name in kwargs}
    if segments["linear_slots"] is None:
        if _compiles_apart(self, kwargs):
            masked = _mask_padding(hidden_states, kwargs.get("attention_mask"))
            return _mix(self, masked, {})
        return _own(self, hidden_states, **kwargs, **borders)
    if _foreign_forward(type(self)) is not None:
        return _mix_one_by_one(self, hidden_states, sizes, kwargs)
    return _mix(self, hidden_states, {**segments, "cu_seqlens": borders.get("cu_seq_lens_q")})


def _own(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    mixed: torch.Tensor = type(self).forward(self, hidden_states, **kwargs)
    return mixed


def _mix_one_by_one(
    self: object, hidden_states: torch.Tensor, sizes: list[int] | None, kwargs: NewColumns
) -> torch.Tensor:
    if sizes is None:
        raise MRopeError(
            f"{_foreign_forward(type(self))}, not transformers' own: it runs segment by segment, "
            "and shapes with packing='flatten' has no list of their lengths; pad the batches"
        )
    segments = torch.split(hidden_states, sizes, dim=1)
    return torch.cat([_own(self, segment, **kwargs) for segment in segments], dim=1)


# A constant under torch.compile, which cannot trace the search.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _foreign_forward(cls: type) -> str | None:
    return foreign_on_class(cls, "forward")


def _compiles_apart(self: object, kwargs: NewColumns) -> bool:
    """Whether to compile whole rows as segments are: a graph cannot hold the layer's own kernels.

    flash-linear-attention's functions are marked as not to be compiled.
    """
    return (
        torch.compiler.is_compiling()
        and kwargs.get("cache", kwargs.get("cache_params")) is None
        and _foreign_forward(type(self)) is None
    )


def _mask_padding(hidden_states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return hidden_states if mask is None else (hidden_states * mask[:, :, None]).to(hidden_states)


def _mix(self: Any, hidden_states: torch.Tensor, segments: NewColumns) -> torch.Tensor:
    """Compute what the layer's own forward does, with segments kept apart.

    Args:
        hidden_states: (B, S, hidden); with segments (1, T, hidden).
        segments: what `linear_columns` adds, and `cu_seqlens`; empty: each row is one.
    """
    shape = hidden_states.shape[:2]
    mixed = _convolve(self, self.in_proj_qkv(hidden_states), segments)
    query, key, value = torch.split(mixed, [self.key_dim, self.key_dim, self.value_dim], dim=-1)
    query, key = (one.reshape(*shape, -1, self.head_k_dim) for one in (query, key))
    value = value.reshape(*shape, -1, self.head_v_dim)
    beta = self.in_proj_b(hidden_states).sigmoid()
    gate = self.in_proj_a(hidden_states).float()
    decay = -self.A_log.float().exp() * _softplus(gate + self.dt_bias)
    parts = (query, key, value, decay, beta)
    if fused.can_run(hidden_states):
        out = fused.delta_rule(*parts, segments)
    else:
        out = _reference_rule(self, parts, segments)
    z = self.in_proj_z(hidden_states)
    normed = self.norm(out.reshape(-1, self.head_v_dim), z.reshape(-1, self.head_v_dim))
    result: torch.Tensor = self.out_proj(normed.reshape(*shape, -1))
    return result


def _softplus(values: torch.Tensor) -> torch.Tensor:
    """Return log(1 + exp(values)).

    In a graph not by torch's operator, whose backward lays out its result otherwise than the graph
    is told: without decompositions (`backend="aot_eager"`) a view of it fails.
    """
    if torch.compiler.is_compiling():
        return torch.logaddexp(values, torch.zeros_like(values))
    return functional.softplus(values)


def _convolve(self: Any, states: torch.Tensor, segments: NewColumns) -> torch.Tensor:
    """Return the layer's short convolution of states (B, S, channels), with its activation."""
    convolution = self.conv1d
    weight, bias = convolution.weight.squeeze(1), convolution.bias
    if fused.can_convolve(states, self.activation):
        return fused.convolve(states, weight, bias, self.activation, segments)
    # Rounded before the activation, as transformers' own convolution is.
    mixed = _taps(states, weight, bias, segments.get("linear_places")).to(states.dtype)
    result: torch.Tensor = modelling_of(self).ACT2FN[self.activation](mixed)
    return result


def _taps(
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    places: torch.Tensor | None,
) -> torch.Tensor:
    """Convolve (B, S, channels) by weights (channels, K), looking over no border.

    In float32, as a convolution adds up its taps.
    """
    wide = states.float()
    last = weight.shape[1] - 1
    mixed = wide * weight[:, last]
    for back in range(1, last + 1):
        before = functional.pad(wide, (0, 0, back, 0))[:, : wide.shape[1]]
        if places is not None:
            before = torch.where((places >= back)[..., None], before, 0)
        mixed = mixed + before * weight[:, last - back]
    return mixed if bias is None else mixed + bias


def _reference_rule(
    self: object, parts: tuple[torch.Tensor, ...], segments: NewColumns
) -> torch.Tensor:
    """Return the gated delta rule by transformers' reference, in one padded call.

    Args:
        parts: query and key (B, S, key heads, d), value (B, S, heads, d), decay and beta
            (B, S, heads); of one row where it has segments.
    """
    query, key, value, decay, beta = parts
    sharing = value.shape[2] // key.shape[2]
    if sharing > 1:  # releases before 5.24 do so in front of their reference
        query, key = (one.repeat_interleave(sharing, dim=2) for one in (query, key))
    slots = segments.get("linear_slots")
    if slots is not None:
        rows, width = segments["linear_shape"]
        # Padding forgets the state before it, so that the next segment of a row begins with none.
        query, key, value, decay, beta = (
            _lay_out(one, slots, rows, width, fill)
            for one, fill in ((query, 0), (key, 0), (value, 0), (decay, _FORGET), (beta, 0))
        )
    rule = inspect.unwrap(modelling_of(self).torch_chunk_gated_delta_rule)
    out: torch.Tensor
    out, _ = rule(query, key, value, g=decay, beta=beta, use_qk_l2norm_in_kernel=True)
    return out if slots is None else out.flatten(0, 1).index_select(0, slots)[None]


def _lay_out(
    values: torch.Tensor, slots: torch.Tensor, rows: int, width: int, fill: float
) -> torch.Tensor:
    """Lay values (1, T, ...) out in rows of a padded call, (rows, width, ...)."""
    whole = values.new_full((rows * width, *values.shape[2:]), fill)
    return whole.index_copy(0, slots, values[0]).reshape(rows, width, *values.shape[2:])

"""Linear attention over a flattened row in one call, which is told where the segments lie.

Of Qwen3.5 and its kin: gated delta nets behind a short convolution; of GLM-5-Next: Kimi delta
attention behind one; and of LFM3, whose layers are short convolutions alone, and read positions in
1-D. What the others read of a row comes from the worker too, see `mrope.collate.linear_columns`: no
length of a segment is asked of the device, and as many operators run for many segments as for few.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn import functional

from mrope.collate.linear_columns import GAP
from mrope.columns import LINEAR_KEYS, NewColumns
from mrope.errors import MRopeError
from mrope.hf import fused
from mrope.hf.attention import modelling_of
from mrope.hf.delta_rule import gated_delta_rule
from mrope.hf.methods import foreign_on_class

# The borders of the whole row; a layer that is given borders raises where it has no kernels.
_BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
# The log of a decay that leaves nothing of a state, and whose exponential is 0 and not a NaN.
_FORGET = -1e4


def mix_segments(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Run a layer that carries a state, each segment of a row on its own; replaces its `forward`.

    Args:
        hidden_states: (B, S, hidden).
        kwargs: those of the layer's own forward, to which rows go that have no segments; and what
            `mrope.collate.linear_columns` adds for those that have; of LFM3 `linear_places` alone.

    Raises:
        MRopeError: a forward of another library, which runs segment by segment, and no list of
            their lengths.
    """
    sizes = kwargs.pop("segment_sizes", None)
    segments = {name: kwargs.pop(name, None) for name in LINEAR_KEYS}
    borders = {name: kwargs.pop(name) for name in _BORDERS if name in kwargs}
    if segments["linear_places"] is None:
        # LFM3's own forward is taken for whole rows: a graph holds it, and it is not slow.
        if not hasattr(self, "conv") and _computes_here(self, hidden_states, kwargs):
            masked = _mask_padding(hidden_states, kwargs.get("attention_mask"))
            return _mix_row(self, masked, {})
        return _own(self, hidden_states, **kwargs, **borders)
    if _foreign_forward(type(self)) is not None:
        return _mix_one_by_one(self, hidden_states, sizes, kwargs)
    return _mix_row(self, hidden_states, {**segments, "cu_seqlens": borders.get("cu_seq_lens_q")})


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


def lacks_kernels(states: torch.Tensor) -> bool:
    """Whether linear layers on this device run their slower rule, and ours is to replace it.

    On a CPU theirs runs all the same: a padded step equals the plain model's there to the last bit.
    """
    return states.is_cuda and not fused.can_run(states)


def _computes_here(self: object, hidden_states: torch.Tensor, kwargs: NewColumns) -> bool:
    """Whether to compute whole rows as segments are, not by the layer's own forward.

    A graph cannot hold the kernels of flash-linear-attention, whose functions are marked as not to
    be compiled; without kernels a gated delta net's own rule is slower than ours.
    """
    slow = hasattr(self, "in_proj_qkv") and lacks_kernels(hidden_states)
    return (
        (torch.compiler.is_compiling() or slow)
        and kwargs.get("cache", kwargs.get("cache_params")) is None
        and _foreign_forward(type(self)) is None
    )


def _decays_by_channel(self: object) -> bool:
    """Whether a layer is Kimi delta attention, not a gated delta net."""
    return hasattr(self, "forget_gate")


def _mask_padding(hidden_states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return hidden_states if mask is None else (hidden_states * mask[:, :, None]).to(hidden_states)


def _mix_row(self: Any, hidden_states: torch.Tensor, segments: NewColumns) -> torch.Tensor:
    """Compute what the layer's own forward does, with segments kept apart.

    Args:
        hidden_states: (B, S, hidden); with segments (1, T, hidden).
        segments: what `linear_columns` adds, and `cu_seqlens`; empty: each row is one.
    """
    if hasattr(self, "in_proj_qkv"):
        return _mix(self, hidden_states, segments)
    if _decays_by_channel(self):
        return _mix_by_channel(self, hidden_states, segments)
    # LFM3's: a convolution between two gates, without an activation.
    before, behind, states = self.in_proj(hidden_states).chunk(3, dim=-1)
    weight, bias = self.conv.weight.squeeze(1), self.conv.bias
    mixed = _taps(before * states, weight, bias, segments.get("linear_places"))
    result: torch.Tensor = self.out_proj(behind * mixed.to(states.dtype))
    return result


def _mix(self: Any, hidden_states: torch.Tensor, segments: NewColumns) -> torch.Tensor:
    """Return `_mix_row` of gated delta nets."""
    states = self.in_proj_qkv(hidden_states)
    beta = self.in_proj_b(hidden_states).sigmoid()
    gate = self.in_proj_a(hidden_states).float()
    decay = -self.A_log.float().exp() * _softplus(gate + self.dt_bias)
    if fused.can_run(hidden_states):
        mixed = _convolve(self, states, segments)
        out = fused.delta_rule(*_split(self, mixed), decay, beta, segments)
    else:
        out = _mix_padded(self, states, decay, beta, segments)
    z = self.in_proj_z(hidden_states)
    normed = self.norm(out.reshape(-1, self.head_v_dim), z.reshape(-1, self.head_v_dim))
    result: torch.Tensor = self.out_proj(normed.reshape(*hidden_states.shape[:2], -1))
    return result


def _mix_by_channel(self: Any, hidden_states: torch.Tensor, segments: NewColumns) -> torch.Tensor:
    """Return `_mix_row` of Kimi delta attention."""
    projections = (self.q_proj, self.k_proj, self.v_proj)
    states = torch.cat([project(hidden_states) for project in projections], dim=-1)
    decay, beta = self.forget_gate(hidden_states), self.b_proj(hidden_states).sigmoid()
    out = _mix_padded(self, states, decay, beta, segments)
    gate = self.g_b_proj(self.g_a_proj(hidden_states)).reshape(out.shape)
    result: torch.Tensor = self.o_proj(self.o_norm(out, gate).flatten(2))
    return result


def _mix_padded(
    self: Any,
    states: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    segments: NewColumns,
) -> torch.Tensor:
    """Run convolution and rule, the segments of a row in one padded call.

    Args:
        states: (B, S, channels), the projected queries, keys and values.
        decay: (B, S, heads), or by channel (B, S, heads, d).
        beta: (B, S, heads).
        segments: as in `_mix`.
    """
    slots = segments.get("linear_slots")
    if slots is None:
        return _run_rule(self, states, decay, beta)
    if self.conv1d.kernel_size[0] - 1 > GAP:
        raise MRopeError(
            f"packing='flatten' is not supported for convolutions of {self.conv1d.kernel_size[0]} "
            f"tokens without flash-linear-attention: segments are {GAP} tokens apart; pad"
        )
    # An empty slot forgets the state before it, and writes nothing to it.
    rows, width = segments["linear_shape"]
    states, decay, beta = (
        _lay_out(one, slots, rows, width, fill)
        for one, fill in ((states, 0), (decay, _FORGET), (beta, 0))
    )
    out = _run_rule(self, states, decay, beta)
    return out.flatten(0, 1).index_select(0, slots)[None]


def _run_rule(
    self: Any, states: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """Run convolution and rule on rows of one segment each; arguments as in `_mix_padded`."""
    parts = _split(self, _convolve(self, states, {}))
    if not _decays_by_channel(self):
        return gated_delta_rule(*parts, decay, beta)
    rule = modelling_of(self).chunk_kimi_delta_attention
    # Where flash-linear-attention is installed, transformers' function calls its kernel. That takes
    # no list of chunks, and would ask the device for one if it were given borders.
    rule = rule if fused.can_call(states) else inspect.unwrap(rule)
    out: torch.Tensor = rule(*parts, g=decay, beta=beta, use_qk_l2norm_in_kernel=True)[0]
    return out


def _split(self: Any, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and value (B, S, heads, d) of what the convolution gives."""
    if _decays_by_channel(self):
        heads = (*mixed.shape[:2], -1, self.head_dim)
        query, key, value = (one.reshape(heads) for one in mixed.chunk(3, dim=-1))
        return query, key, value
    query, key, value = torch.split(mixed, [self.key_dim, self.key_dim, self.value_dim], dim=-1)
    rows = mixed.shape[:2]
    query, key = (one.reshape(*rows, -1, self.head_k_dim) for one in (query, key))
    return query, key, value.reshape(*rows, -1, self.head_v_dim)


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
    convolution, places = self.conv1d, segments.get("linear_places")
    weight, bias = convolution.weight.squeeze(1), convolution.bias
    # What it runs in: the weights of Kimi delta attention stay float32 in half precision.
    kind = states.dtype if torch.is_autocast_enabled(states.device.type) else weight.dtype
    if kind == states.dtype and fused.can_convolve(states, self.activation):
        return fused.convolve(states, weight, bias, self.activation, segments)
    if places is None and not torch.compiler.is_compiling():
        mixed = convolution(states.mT.to(weight.dtype))[..., : states.shape[1]].mT
    else:
        # Rounded before the activation, as transformers' own convolution is.
        mixed = _taps(states, weight, bias, places).to(kind)
    result: torch.Tensor = modelling_of(self).ACT2FN[self.activation](mixed)
    return result.to(states.dtype)


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


def _lay_out(
    values: torch.Tensor, slots: torch.Tensor, rows: int, width: int, fill: float
) -> torch.Tensor:
    """Lay values (1, T, ...) out in rows of a padded call, (rows, width, ...)."""
    whole = values.new_full((rows * width, *values.shape[2:]), fill)
    return whole.index_copy(0, slots, values[0]).reshape(rows, width, *values.shape[2:])

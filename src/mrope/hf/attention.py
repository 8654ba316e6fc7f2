"""Attention of towers within segments, and of text layers within flattened rows."""

from __future__ import annotations

import sys
from itertools import groupby
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def attend_segments(
    self: Any,
    hidden_states: torch.Tensor,
    cu_seqlens: tuple[tuple[int, int], ...] | torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    max_seqlen: int | None = None,
    segments: tuple[tuple[int, int], ...] | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Attend within each segment of a tower's patches; stands in for the tower's attention.

    Segments of one length that stand side by side, such as the frames of a clip, are one call of
    the attention function, where transformers makes a call for each: 256 frames in 24 layers are
    24 calls instead of 6,144.

    Args:
        cu_seqlens: the segments as (how many, patches of each), on the host; borders as a tensor,
            which flash attention takes, go to the tower's own attention.
        segments: the same on the host, from towers that need the borders for themselves.
    """
    cu_seqlens = cu_seqlens if segments is None else segments
    if isinstance(cu_seqlens, torch.Tensor):
        own = type(self).forward
        result: torch.Tensor = own(
            self, hidden_states, cu_seqlens, position_embeddings, max_seqlen, **kwargs
        )
        return result
    patches = len(hidden_states)
    query, key, value = self.qkv(hidden_states).reshape(patches, 3, self.num_heads, -1).unbind(1)
    modelling: Any = sys.modules[type(self).__module__]
    query, key = modelling.apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    attended: torch.Tensor = self.proj(attend_runs(self, query, key, value, cu_seqlens, **kwargs))
    return attended


def attend_raster(
    self: Any,
    hidden_states: torch.Tensor,
    cu_seqlens: tuple[tuple[int, int], ...] | torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    max_seqlen: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Do what `attend_segments` does in PaddleOCR-VL's tower, whose attention returns a pair."""
    if isinstance(cu_seqlens, torch.Tensor):
        own = type(self).forward
        result: tuple[torch.Tensor, None] = own(
            self, hidden_states, cu_seqlens, position_embeddings, max_seqlen, **kwargs
        )
        return result
    patches = len(hidden_states)
    query, key, value = (
        project(hidden_states).view(patches, self.num_heads, -1)
        for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    modelling: Any = sys.modules[type(self).__module__]
    query, key = modelling.apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    return self.out_proj(attend_runs(self, query, key, value, cu_seqlens, **kwargs)), None


def attend_runs(
    self: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: tuple[tuple[int, int], ...],
    **kwargs: Any,
) -> torch.Tensor:
    """Attend within segments, equal ones that stand side by side in one call.

    Args:
        self: the attention layer, with `scaling`, `attention_dropout` and `config`.
        query, key, value: (N, heads, dimension).
        segments: (how many, length of each), on the host; N in all.

    Returns:
        (N, heads * dimension).
    """
    modelling: Any = sys.modules[type(self).__module__]
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation,  # noqa: SLF001 - no public name
        modelling.eager_attention_forward,
    )
    outputs = []
    sizes = [count * size for count, size in segments]
    parts = (torch.split(tensor, sizes) for tensor in (query, key, value))
    for (count, size), *run in zip(segments, *parts, strict=True):
        batched = (one.unflatten(0, (count, size)).transpose(1, 2) for one in run)
        output, _ = attend(
            self,
            *batched,
            attention_mask=None,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            is_causal=False,
            **kwargs,
        )
        outputs.append(output.reshape(count * size, -1))
    return torch.cat(outputs)


def as_runs(sizes: list[int]) -> tuple[tuple[int, int], ...]:
    """Return how many segments of one length stand side by side: 4 4 2 gives (2, 4), (1, 2)."""
    return tuple((len(list(run)), size) for size, run in groupby(sizes))


def mix_segments(
    self: Any, hidden_states: torch.Tensor, segment_sizes: list[int] | None = None, **kwargs: Any
) -> torch.Tensor:
    """Run a linear attention layer on each segment; stands in for the layer's forward.

    Its state and its convolution run along the row, over borders. transformers leaves them to
    kernels that take borders, and raises where these are not installed; lengths on the host need
    none, and no wait.

    Args:
        hidden_states: (1, T, hidden).
        segment_sizes: tokens of each segment; None: the layer's own forward, on the whole rows.
    """
    own = type(self).forward
    if segment_sizes is None:
        whole: torch.Tensor = own(self, hidden_states, **kwargs)
        return whole
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"):
        kwargs.pop(name, None)
    segments = torch.split(hidden_states, segment_sizes, dim=1)
    return torch.cat([own(self, segment, **kwargs) for segment in segments], dim=1)


def is_flash(config: Any) -> bool:
    """Return whether a model or tower attends by a flash kernel, which takes borders as tensors."""
    return "flash" in (config._attn_implementation or "")  # noqa: SLF001 - no public name

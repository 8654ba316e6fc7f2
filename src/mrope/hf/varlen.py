"""Attention over segments of different lengths in one call: torch's variable-length kernel."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch

_HALF = (torch.float16, torch.bfloat16)


@lru_cache(maxsize=1)
def find_kernel() -> Any | None:
    """Return `torch.nn.attention.varlen.varlen_attn`, or None before torch 2.10."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@lru_cache(maxsize=1)
def _causal_options() -> dict[str, Any]:
    """Return how this torch is told to mask causally: by a window since 2.11, by a flag before."""
    known = inspect.signature(find_kernel()).parameters  # type: ignore[arg-type]
    return {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}


@lru_cache(maxsize=1)
def _shares_heads() -> bool:
    """Whether the kernel lets several query heads share one of keys and values."""
    return "enable_gqa" in inspect.signature(find_kernel()).parameters  # type: ignore[arg-type]


def can_attend(tensor: torch.Tensor) -> bool:
    """Whether the kernel takes what a layer computes from this tensor: half precision, on CUDA.

    Read from the tensor's type alone, without a sync; a constant of a compiled graph.
    """
    if not tensor.is_cuda or find_kernel() is None:
        return False
    if torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda") in _HALF
    return tensor.dtype in _HALF


def attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scale: float,
    causal: bool = False,
) -> torch.Tensor:
    """Attend within segments, in one call of the kernel.

    Args:
        query: (N, heads, dimension).
        key, value: (N, key heads, dimension); `heads` is a multiple of the key heads.
        cu_seqlens: int32 (segments + 1,), borders of the segments; they cover all N places.
        longest: length of the longest segment. The kernel's grid grows with it.
        scale: factor of the scores.
        causal: whether a place attends to none behind it.

    Returns:
        (N, heads, dimension).
    """
    kernel: Any = find_kernel()
    options = dict(_causal_options()) if causal else {}
    if key.shape[1] != query.shape[1]:
        if _shares_heads():
            options["enable_gqa"] = True
        else:
            groups = query.shape[1] // key.shape[1]
            key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
    # The kernel takes rows of any stride, but the last dimension must be dense.
    parts = (one.contiguous() for one in (query, key, value))
    attended: torch.Tensor = kernel(
        *parts, cu_seqlens, cu_seqlens, longest, longest, scale=scale, **options
    )
    return attended

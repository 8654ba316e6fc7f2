"""Attention over segments of different lengths in one call: torch's variable-length kernel."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch

try:
    from torch.nn.attention import SDPBackend, sdpa_kernel, varlen
except ImportError:  # before torch 2.10
    _KERNEL: Any = None
    _PARAMETERS: frozenset[str] = frozenset()
    _ASKS = _TAKES_CUDNN = False
else:
    _KERNEL = varlen.varlen_attn
    _PARAMETERS = frozenset(inspect.signature(_KERNEL).parameters)
    # Flash attention's kernel was the only one up to 2.13. 2.14 takes cuDNN's where segments are
    # longer than 128 and there is no window; 2.15 wherever it can, unless it is asked not to.
    _ASKS = hasattr(varlen, "_select_backend")
    _TAKES_CUDNN = hasattr(varlen, "_can_use_cudnn") and not _ASKS

HAS_KERNEL = _KERNEL is not None
_HALF = (torch.float16, torch.bfloat16)
TAKES_WINDOW = "window_size" in _PARAMETERS
"""Whether places may attend to a number of places alone: since 2.11."""
# How this torch is told to mask causally: by a window since 2.11, by a flag before.
_CAUSAL: dict[str, Any] = {"window_size": (-1, 0)} if TAKES_WINDOW else {"is_causal": True}
# Whether several query heads may share one of keys and values: since 2.12.
_SHARES_HEADS = "enable_gqa" in _PARAMETERS


def can_attend(tensor: torch.Tensor) -> bool:
    """Whether the kernel takes what a layer computes from this tensor: half precision, on CUDA.

    Read from the tensor's type alone, without a sync; a constant of a compiled graph.
    """
    if not (HAS_KERNEL and tensor.is_cuda):
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
    window: int | None = None,
) -> torch.Tensor:
    """Attend within segments, in one call of the kernel.

    Args:
        query: (N, heads, dimension).
        key, value: (N, key heads, dimension); `heads` is a multiple of the key heads.
        cu_seqlens: int32 (segments + 1,), borders of the segments; they cover all N places.
        longest: length of the longest segment. The kernel's grid grows with it.
        scale: factor of the scores.
        causal: whether a place attends to none behind it.
        window: with `causal`, to how many places one attends, itself among them; None: to all.

    Returns:
        (N, heads, dimension).
    """
    options = dict(_CAUSAL) if causal else {}
    if window is not None:
        options["window_size"] = (window - 1, 0)
    if _TAKES_CUDNN and not causal:
        # A window of the whole segment, which is none to flash attention and its backward.
        options["window_size"] = (longest, longest)
    if key.shape[1] != query.shape[1]:
        if _SHARES_HEADS:
            options["enable_gqa"] = True
        else:
            groups = query.shape[1] // key.shape[1]
            key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
    # The kernel takes rows of any stride, but the last dimension must be dense.
    parts = tuple(one.contiguous() for one in (query, key, value))
    arguments = (*parts, cu_seqlens, cu_seqlens, longest, longest)
    # Of cuDNN's kernel nothing was run here: segments of no length, as the borders of a rung are,
    # or what building its graph for each batch costs the host.
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if _ASKS else nullcontext():
        attended: torch.Tensor = _KERNEL(*arguments, scale=scale, **options)
    return attended

"""A stand-in for the flash_attn package: transformers' own flash attention path, another kernel.

On a CPU each segment is attended to for itself, from the very borders that transformers passes;
on CUDA torch's variable length kernel is called. So a test can tell which borders reach attention
where the package cannot be installed.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from typing import Any
from unittest import mock

import torch
import transformers
from transformers import modeling_flash_attention_utils as utils


class Calls(list[dict[str, Any]]):
    """What the kernel was called with: borders, as lists, and lengths."""


@contextmanager
def flash_attention() -> Iterator[Calls]:
    """Let models be built with attn_implementation="flash_attention_2" until the end."""
    calls = Calls()

    # transformers reads these signatures to know what a kernel takes.
    def varlen(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> torch.Tensor:
        if q.is_cuda:
            lengths = (max_seqlen_q, max_seqlen_k)
            borders = cu_seqlens_q, cu_seqlens_k
            return _on_cuda(q, k, v, *borders, *lengths, causal, softmax_scale, window_size[0])
        calls.append({"borders": cu_seqlens_q.tolist(), "longest": max_seqlen_q})
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        sizes = cu_seqlens_q.diff().tolist()
        return by_segment(q, k, v, sizes, causal, softmax_scale, window_size[0])

    def dense(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> torch.Tensor:
        rows, width = q.shape[:2]
        borders = torch.arange(0, (rows + 1) * width, width, dtype=torch.int32, device=q.device)
        q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
        options = dropout_p, softmax_scale, causal, window_size
        output = varlen(q, k, v, borders, borders, width, width, *options)
        return output.reshape(rows, width, *output.shape[1:])

    package: Any = types.ModuleType("flash_attn")
    package.__spec__ = ModuleSpec("flash_attn", None)
    package.flash_attn_func, package.flash_attn_varlen_func = dense, varlen
    package.flash_attn_with_kvcache = None
    padding: Any = types.ModuleType("flash_attn.bert_padding")
    padding.pad_input, padding.unpad_input = utils._pad_input, utils._unpad_input
    loaded = ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn")
    with (
        _importable({"flash_attn": package, "flash_attn.bert_padding": padding}),
        mock.patch.object(utils, "is_flash_attn_2_available", return_value=True),
        mock.patch.object(
            transformers.PreTrainedModel, "_flash_attn_can_dispatch", return_value=True
        ),
        mock.patch.dict(vars(utils), {name: None for name in loaded if hasattr(utils, name)}),
    ):
        yield calls


@contextmanager
def _importable(modules: dict[str, Any]) -> Iterator[None]:
    """Let modules be imported. Others that are imported meanwhile stay, unlike with `mock.patch.dict`."""
    before = {name: sys.modules.pop(name, None) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def by_segment(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sizes: list[int],
    causal: bool,
    scale: float | None,
    before: int = -1,
) -> torch.Tensor:
    """Attend within segments; with `causal` to at most `before` places before one's own."""
    parts = (torch.split(tensor.transpose(0, 1), sizes, dim=1) for tensor in (query, key, value))
    attend = torch.nn.functional.scaled_dot_product_attention
    outputs = []
    for q, k, v in zip(*parts, strict=True):
        place = torch.arange(q.shape[1])
        ago = place[:, None] - place
        seen = ago >= 0 if before < 0 else (ago >= 0) & (ago <= before)
        mask = seen if causal else None
        outputs.append(
            attend(q[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=True)[0]
        )
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _on_cuda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders_q: torch.Tensor,
    borders_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    causal: bool,
    scale: float | None,
    before: int,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    how: dict[str, Any] = {"window_size": (before, 0) if causal else (-1, -1)}
    if "is_causal" in inspect.signature(varlen_attn).parameters:
        how = {"is_causal": causal}  # torch before 2.12
    lengths = (longest_q, longest_k)
    output: Any = varlen_attn(query, key, value, borders_q, borders_k, *lengths, scale=scale, **how)
    attended: torch.Tensor = output
    return attended

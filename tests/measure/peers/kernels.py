"""Put torch's own copy of FlashAttention 2 behind the names of the flash_attn package.

`torch.nn.attention.varlen` has the same kernels, and the attached model calls them too. Grouped heads are
read as they are where this torch allows it, as flash_attn does. On a CPU, for tests, a mask of segments.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

import torch
import torch.nn.functional as F

VERSION = "2.8.3"


def provide_flash_attn() -> None:
    """Let this process import flash_attn. Call it before transformers is imported."""
    package: Any = _module("flash_attn", is_package=True)
    package.__version__ = VERSION
    package.flash_attn_func, package.flash_attn_varlen_func = (
        flash_attn_func,
        flash_attn_varlen_func,
    )
    package.flash_attn_with_kvcache = None
    padding: Any = _module("flash_attn.bert_padding")
    padding.index_first_axis, padding.unpad_input = _index_first_axis, _unpad_input
    padding.index_put_first_axis, padding.pad_input = _index_put_first_axis, _pad_input
    if importlib.util.find_spec("einops") is not None:
        padding.rearrange = importlib.import_module("einops").rearrange
    package.bert_padding = padding
    _declare()


def _module(name: str, is_package: bool = False) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=is_package)
    if is_package:
        module.__path__ = []
    sys.modules[name] = module
    return module


def _declare() -> None:
    """Let the package have a version, and transformers take it on a CPU too."""
    metadata: Any = importlib.metadata
    version, packages = metadata.version, metadata.packages_distributions

    def with_flash(name: str) -> str:
        found: str = VERSION if name.replace("_", "-") == "flash-attn" else version(name)
        return found

    metadata.version = with_flash
    metadata.packages_distributions = lambda: {**packages(), "flash_attn": ["flash-attn"]}
    import transformers
    from transformers import modeling_flash_attention_utils as utils
    from transformers.utils import import_utils

    for module in (transformers.utils, import_utils, utils):
        vars(module)["is_flash_attn_2_available"] = lambda: True
    for name in ("_flash_attn_can_dispatch", "_flash_attn_2_can_dispatch"):
        if hasattr(transformers.PreTrainedModel, name):
            setattr(transformers.PreTrainedModel, name, lambda *_, **__: True)


# transformers reads these signatures to find out what a kernel takes.
def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Any:
    if dropout_p or softcap or tuple(window_size) != (-1, -1):
        raise NotImplementedError("dropout, softcap and windows")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if not q.is_cuda:
        return _masked(q, k, v, cu_seqlens_q, causal, scale)
    if k.shape[1] != q.shape[1] and not _reads_groups():
        k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for one in (k, v))
    longest = (int(max_seqlen_q), int(max_seqlen_k))
    return _varlen(q, k, v, (cu_seqlens_q, cu_seqlens_k), longest, bool(causal), scale)


def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Any:
    rows, width = q.shape[:2]
    borders = torch.arange(0, (rows + 1) * width, width, dtype=torch.int32, device=q.device)
    q, k, v = (one.flatten(0, 1) for one in (q, k, v))
    more = (dropout_p, softmax_scale, causal, window_size, softcap)
    out = flash_attn_varlen_func(q, k, v, borders, borders, width, width, *more)
    return out.reshape(rows, width, *out.shape[1:])


def _varlen(
    q: Any, k: Any, v: Any, borders: Any, longest: tuple[int, int], causal: bool, scale: float
) -> Any:
    import torch.nn.attention.varlen  # registers the operator

    # The operator itself: the public function refuses grouped heads unless told, in 2.12 and later.
    operator: Any = torch.ops.torch_attn._varlen_attn
    known = {one.name for one in operator.default._schema.arguments}
    words = [q, k, v, *borders, *longest, causal, scale]
    if "window_size" in known:
        words.append([-1, 0] if causal else [-1, -1])
    if "enable_gqa" in known:
        words.append(k.shape[1] != q.shape[1])
    return operator(*words)[0]


@functools.cache
def _reads_groups() -> bool:
    """Return whether two heads of keys serve four of queries, forward and backward, as if repeated."""
    draw = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    borders = (torch.tensor([0, 40, 96], dtype=torch.int32, device="cuda"),) * 2
    leaves = [draw(96, heads, 64) for heads in (4, 2, 2)]
    found: list[list[Any]] = []
    for repeat in (1, 2):
        query, key, value = mine = [one.clone().requires_grad_() for one in leaves]
        key, value = (one.repeat_interleave(repeat, dim=1) for one in (key, value))
        try:
            out = _varlen(query, key, value, borders, (56, 56), True, 0.125)
            out.float().square().sum().backward()
        except (RuntimeError, ValueError):
            return False
        found.append([out.detach(), *(one.grad for one in mine)])
    return all(
        bool((one - two).float().norm() < 1e-2 * two.float().norm())
        for one, two in zip(*found, strict=True)
    )


def _masked(q: Any, k: Any, v: Any, borders: Any, causal: bool, scale: float) -> Any:
    at = torch.arange(len(q))
    segment = torch.bucketize(at, borders[1:].to(at.dtype), right=True)
    mask = segment[:, None] == segment
    if causal:
        mask = mask & (at[:, None] >= at)
    q, k, v = (one.transpose(0, 1)[None] for one in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1).contiguous()


def _index_first_axis(values: Any, indices: Any) -> Any:
    return values.index_select(0, indices)


def _index_put_first_axis(values: Any, indices: Any, rows: int) -> Any:
    return values.new_zeros(rows, *values.shape[1:]).index_put((indices,), values)


def _unpad_input(hidden: Any, mask: Any, unused_mask: Any = None) -> Any:
    lengths = mask.sum(dim=-1, dtype=torch.int32)
    indices = mask.flatten().nonzero().flatten()
    borders = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    flat = hidden.flatten(0, 1).index_select(0, indices)
    return flat, indices, borders, lengths.max().item(), lengths


def _pad_input(hidden: Any, indices: Any, rows: int, width: int) -> Any:
    return _index_put_first_axis(hidden, indices, rows * width).unflatten(0, (rows, width))

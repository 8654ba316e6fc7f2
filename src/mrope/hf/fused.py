"""Kernels of flash-linear-attention, given borders and chunks, and as operators that compile.

The package marks its functions as not to be compiled, so that a graph would break at each layer.
As operators of a library of our own their kernels are one node each of a graph. An operator saves
its arguments alone: its backward runs the forward again, as each release saves something else. Both
call the two halves of the package's autograd function, since no autograd runs within an operator.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import warnings
from functools import cache
from typing import Any

import torch

_RULE = "fla.ops.gated_delta_rule", "chunk_gated_delta_rule"
_HALVES = "fla.ops.gated_delta_rule.chunk", "ChunkGatedDeltaRuleFunction"
_CONVOLUTION = "fla.modules.causal_conv1d", "causal_conv1d"
_ACTIVATIONS = ("silu", "swish")
# The package keeps what it computes from a tensor of borders by the tensor's identity. A CUDA graph
# would replay it for other borders, which are written to the same tensor.
_UNSAFE: dict[str, Any] = (
    {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
)


# A constant under torch.compile, which cannot trace an import.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has(function: tuple[str, str]) -> bool:
    return _find(function) is not None


@cache
def _find(function: tuple[str, str]) -> Any:
    """Return a function of the package; None where it is not installed, or fails to import."""
    module, name = function
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception:  # noqa: BLE001 - as transformers: whatever its Triton raises
        return None


def can_call(tensor: torch.Tensor) -> bool:
    """Whether functions of the package may be called as they are: in no graph, and on a GPU."""
    return tensor.is_cuda and not torch.compiler.is_compiling()


def can_run(tensor: torch.Tensor) -> bool:
    """Whether the package's delta rule takes what a layer computes from this tensor."""
    if not (tensor.is_cuda and _has(_RULE)):
        return False
    return not (torch.is_grad_enabled() and _is_refused())


# A constant under torch.compile, which cannot trace an import.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@cache
def _is_refused() -> bool:
    """Whether the package raises in the backward here; warn if it does."""
    why = find_refusal()
    if why is not None:
        warnings.warn(why, stacklevel=2)
    return why is not None


def find_refusal() -> str | None:
    """Return why the package, which is installed, does not train on this GPU, or None."""
    has_triton, has_tilelang = map(importlib.util.find_spec, ("triton", "tilelang"))
    if not has_triton or has_tilelang:
        return None
    triton: Any = importlib.import_module("triton")
    if not refuses(torch.cuda.get_device_capability(), triton.__version__):
        return None
    return (
        f"flash-linear-attention refuses to train on Hopper with Triton {triton.__version__}, for "
        "wrong gradients (its #640): attached linear layers run in torch; install Triton 3.7.1, or "
        "tilelang"
    )


def refuses(capability: tuple[int, int], triton: str) -> bool:
    """Whether gradients of the package's kernels are wrong: on Hopper, by Triton 3.4 to 3.7.0."""
    release = tuple(int(part) for part in re.findall(r"\d+", triton)[:3])
    return capability[0] == 9 and (3, 4) <= release < (3, 7, 1)


def can_convolve(tensor: torch.Tensor, activation: str) -> bool:
    """Whether its convolution does; a graph has the taps as one kernel of its own."""
    return can_call(tensor) and activation in _ACTIVATIONS and _has(_CONVOLUTION)


def convolve(
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    segments: dict[str, Any],
) -> torch.Tensor:
    """Convolve states (B, S, channels) by weights (channels, K) within segments."""
    mixed: torch.Tensor = _find(_CONVOLUTION)(
        states,
        weight.to(states.dtype),
        bias,
        activation=activation,
        cu_seqlens=segments.get("cu_seqlens"),
        chunk_indices=segments.get("linear_chunks"),
    )[0]
    return mixed


def delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    segments: dict[str, Any],
) -> torch.Tensor:
    """Return the gated delta rule within segments.

    Args:
        query, key: (B, S, key heads, d); normalized within.
        value: (B, S, heads, d).
        decay: (B, S, heads), float32, its log.
        beta: (B, S, heads).
        segments: `cu_seqlens` and `linear_chunks` of one row; empty: each row is one.
    """
    # Under autocast a projection is of half precision, and the rest may not be.
    parts = (query, key, value.to(query.dtype), decay, beta.to(query.dtype))
    borders = segments.get("cu_seqlens"), segments.get("linear_chunks")
    run = delta_rule_operator if torch.compiler.is_compiling() else _run
    result: torch.Tensor = run(*parts, *borders)
    return result


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    chunks: torch.Tensor | None,
) -> torch.Tensor:
    result: torch.Tensor = _find(_RULE)(
        query,
        key,
        value,
        g=decay,
        beta=beta,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=cu_seqlens,
        chunk_indices=chunks,
    )[0]
    return result


class _Context:
    """What an autograd function keeps between its halves."""

    saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: object) -> None:
        self.saved_tensors = tensors


def _run_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    chunks: torch.Tensor | None,
) -> tuple[_Context, torch.Tensor]:
    """Run the forward half alone; its arguments go by name, as their order differs by release."""
    given = {
        "q": query,
        "k": key,
        "v": value,
        "g": decay,
        "beta": beta,
        "scale": key.shape[-1] ** -0.5,
        "initial_state": None,
        "output_final_state": False,
        "use_qk_l2norm_in_kernel": True,
        "cu_seqlens": cu_seqlens,
        "chunk_indices": chunks,
    }
    context = _Context()
    return context, _find(_HALVES).forward(context, **given)[0]


@torch.library.custom_op("mrope::delta_rule", mutates_args=(), **_UNSAFE)
def delta_rule_operator(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    chunks: torch.Tensor | None,
) -> torch.Tensor:
    """Run `delta_rule` as one node of a graph."""
    return _run_forward(query, key, value, decay, beta, cu_seqlens, chunks)[1].contiguous()


@delta_rule_operator.register_fake
def _(_query: object, _key: object, value: torch.Tensor, *_others: object) -> torch.Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


@torch.library.custom_op("mrope::delta_rule_backward", mutates_args=(), **_UNSAFE)
def delta_rule_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    chunks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key, value, decay and beta."""
    context, _ = _run_forward(query, key, value, decay, beta, cu_seqlens, chunks)
    halves = _find(_HALVES)
    names = list(inspect.signature(halves.forward).parameters)[1:]  # without the context
    by_name = dict(zip(names, halves.backward(context, gradient.contiguous(), None), strict=True))
    first, second, third, fourth, fifth = (
        by_name[name].contiguous() for name in ("q", "k", "v", "g", "beta")
    )
    return first, second, third, fourth, fifth


@delta_rule_backward.register_fake
def _(_gradient: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    parts = arguments[:5]
    return tuple(torch.empty_like(one, memory_format=torch.contiguous_format) for one in parts)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (*delta_rule_backward(gradient, *ctx.saved_tensors), None, None)


delta_rule_operator.register_autograd(_backward, setup_context=_save)

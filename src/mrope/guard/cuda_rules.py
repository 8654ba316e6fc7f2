"""The operators that sync the host with a CUDA device.

The rules follow ATen's sources for CUDA; `tests/cuda/check_guard.py` compares them with a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mrope.guard.places import address_of

OnHost = Callable[[torch.Tensor], bool]

TO_DEVICE = "copy to the device"
FROM_DEVICE = "copy from the device"
INDEX_COPY = "copy of an index to the device"

# The host must know their result, or its size.
_ALWAYS = {
    "_linalg_check_errors": "error check",
    "_local_scalar_dense": "scalar read",
    "_unique": "unique",
    "_unique2": "unique",
    "allclose": "allclose",
    "bincount": "bincount",
    "equal": "equal",
    "masked_scatter_backward": "masked_select",
    "masked_select": "masked_select",
    "nonzero": "nonzero",
    "unique_consecutive": "unique",
    "unique_dim": "unique",
    "unique_dim_consecutive": "unique",
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# Their 0-d value becomes a kernel argument, so it is read if it is on the device; and the place of
# the index among their arguments. Called with a host index CUDA refuses; on a CPU they are what
# assigning a number dispatches, and its backward, where CUDA dispatches `index_put_`.
_VALUE_IS_READ = {"masked_fill": 1, "masked_fill_": 1, "index_fill": 2, "index_fill_": 2}
_MASKS = (torch.bool, torch.uint8)
# 0-d indices that CUDA kernels take as they are; it is not among the types of their targets.
_KEPT = (torch.int64, torch.int32)
_NO_TARGETS = (torch.uint16, torch.uint32, torch.uint64)


def syncs(func: Any, args: tuple[Any, ...], kwargs: Any, on_host: OnHost) -> Iterator[str]:
    """Yield a name for each sync of one operator on CUDA.

    Args:
        func, args, kwargs: a call as a dispatch mode gets it, with some tensor on the device.
        on_host: tells whether a tensor is on the host.
    """
    name = func.overloadpacket.__name__
    if name in _ALWAYS:
        yield _ALWAYS[name]
    elif name in _INDEXING:
        yield from _indexing(args, on_host)
    elif name == "copy_":
        yield from _copy(*args, **kwargs, on_host=on_host)
    elif name in _VALUE_IS_READ:
        index = args[_VALUE_IS_READ[name]]
        if on_host(index) and index.numel() and not on_host(args[0]):
            yield INDEX_COPY
        if isinstance(args[-1], torch.Tensor) and not on_host(args[-1]):
            yield "scalar read"
    elif name == "repeat_interleave":
        size = args[1] if len(args) > 1 else kwargs.get("output_size")
        if size is None:
            yield "repeat_interleave without output_size"


class _Names(TorchDispatchMode):
    """Keep the names of the operators that are dispatched."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _fills_numbers() -> bool:
    """Return whether assigning a number fills, or makes a tensor of it on the host first."""
    target = torch.zeros(1)
    with _Names() as seen:
        target[0] = 1.0
    return "lift_fresh" not in seen.names


FILLS_NUMBERS = _fills_numbers()
"""Whether `x[...] = 1.0` fills with the number, as since torch 2.15 (ATen's `TensorIndexing.h`)."""


def keeps_indices(target: torch.Tensor, value: object, on_host: OnHost) -> bool:
    """Return whether a 0-d index on the device is not read when this value is assigned."""
    if not FILLS_NUMBERS or on_host(target) or target.is_quantized or target.dtype in _NO_TARGETS:
        return False
    if not isinstance(value, torch.Tensor):
        return isinstance(value, bool | int | float | complex)
    same = value.ndim == 0 and not on_host(value) and value.dtype == target.dtype
    return same and _apart(value, target)


def assigning(
    target: torch.Tensor, index: tuple[Any, ...], value: object, on_host: OnHost
) -> Iterator[str]:
    """Yield the syncs of `target[index] = value` on CUDA, where `keeps_indices`.

    A CPU takes another way: it reads 0-d indices, and fills by an index that CUDA has to copy.
    """
    tensors = [one for one in index if isinstance(one, torch.Tensor)]
    bounds = [
        bound
        for one in index
        if isinstance(one, slice)
        for bound in (one.start, one.stop, one.step)
        if isinstance(bound, torch.Tensor)
    ]
    kept = []
    for one in tensors:
        if one.ndim or one.is_floating_point():
            kept.append(one)
        elif on_host(one):
            continue  # a number, which is not copied
        elif one.dtype in _KEPT and _apart(one, target):
            kept.append(one)
        else:
            bounds.append(one)
    for bound in bounds:
        if not on_host(bound):
            yield "scalar read"
    if any(on_host(one) and one.numel() for one in kept):
        yield INDEX_COPY
    masks = [one for one in kept if one.dtype in _MASKS and not on_host(one)]
    # A single mask and a number are one `masked_fill_`.
    if masks and (isinstance(value, torch.Tensor) or len(kept) > 1):
        yield "indexing by a mask"


def _apart(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether both have memory, and not the same."""
    addresses = address_of(one), address_of(other)
    return None not in addresses and addresses[0] != addresses[1]


def blocks(source: torch.Tensor, non_blocking: bool, from_host: bool, pinned: bool) -> bool:
    """Return whether a copy between the host and the device syncs.

    A blocking copy waits for the stream, pinned or not. A non-blocking one syncs only if the driver
    must first copy pageable memory into a pinned buffer.
    """
    pageable = from_host and not pinned
    return source.numel() > 0 and (pageable or not non_blocking)


def _copy(
    target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False, *, on_host: OnHost
) -> Iterator[str]:
    from_host = on_host(source)
    pinned = source.is_pinned()
    if from_host != on_host(target) and blocks(source, non_blocking, from_host, pinned):
        yield TO_DEVICE if from_host else FROM_DEVICE


def _indexing(args: tuple[Any, ...], on_host: OnHost) -> Iterator[str]:
    """Yield the syncs of `x[indices]` and, with a third argument, of `x[indices] = value`."""
    indices = [one for one in args[1] if one is not None]
    masks = [one for one in indices if one.dtype in _MASKS and not on_host(one)]
    if any(on_host(one) and one.numel() for one in indices):
        yield INDEX_COPY
    if len(args) > 2 and args[2].numel() == 1 and on_host(args[2]):
        # One number, known to the host: ATen turns it into masked_fill if a single mask is the
        # only index, and copies it to the device otherwise.
        if len(masks) == len(indices) == 1:
            return
        yield TO_DEVICE
    if masks:
        yield "indexing by a mask"

"""The operators that sync the host with a CUDA device.

The rules follow ATen's sources for CUDA; `tests/cuda/check_guard.py` compares them with a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

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
# Their 0-d value becomes a kernel argument, so it is read if it is on the device.
_VALUE_IS_READ = {"masked_fill", "masked_fill_", "index_fill", "index_fill_"}
_MASKS = (torch.bool, torch.uint8)


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
        if isinstance(args[-1], torch.Tensor) and not on_host(args[-1]):
            yield "scalar read"
    elif name == "repeat_interleave":
        size = args[1] if len(args) > 1 else kwargs.get("output_size")
        if size is None:
            yield "repeat_interleave without output_size"


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

"""What CUDA does: which operators make the host wait there, and CUDA's own verdict.

The rules follow ATen's sources for CUDA; `tests/cuda/check_guard.py` holds them against a device.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Frames = Iterable[tuple[str, int, str]]
OnHost = Callable[[torch.Tensor], bool]

TO_DEVICE = "copy to the device"
FROM_DEVICE = "copy from the device"
INDEX_COPY = "copy of an index to the device"

# Operators whose result, or whose result's size, the host must know.
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
# Their 0-d value becomes a kernel argument, so it is read if it lies on the device.
_VALUE_IS_READ = {"masked_fill", "masked_fill_", "index_fill", "index_fill_"}
_MASKS = (torch.bool, torch.uint8)
# Marks the autograd node of `x[...] = 1.0`: its backward makes a number on the host as well.
HOST_VALUE = "mrope.guard.sync_guard: value on the host"
_SYNCHRONIZES = "called a synchronizing CUDA operation"


def waits(func: Any, args: tuple[Any, ...], kwargs: Any, on_host: OnHost) -> Iterator[str]:
    """Yield what one operator waits for on CUDA.

    Args:
        func, args, kwargs: a call as a dispatch mode sees it, with some tensor on the device.
        on_host: tells whether a tensor lies on the host.
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


def blocks(source: torch.Tensor, non_blocking: bool, from_host: bool) -> bool:
    """Tell whether a copy between the host and the device waits.

    A blocking copy waits for the stream, pinned or not. Others wait only where the driver must
    stage pageable memory first.
    """
    staged = from_host and not source.is_pinned()
    return source.numel() > 0 and (staged or not non_blocking)


def _copy(
    target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False, *, on_host: OnHost
) -> Iterator[str]:
    from_host = on_host(source)
    if from_host != on_host(target) and blocks(source, non_blocking, from_host):
        yield TO_DEVICE if from_host else FROM_DEVICE


def _indexing(args: tuple[Any, ...], on_host: OnHost) -> Iterator[str]:
    """Yield the waits of `x[indices]` and, with a third argument, of `x[indices] = value`."""
    indices = [one for one in args[1] if one is not None]
    masks = [one for one in indices if one.dtype in _MASKS and not on_host(one)]
    if any(on_host(one) and one.numel() for one in indices):
        yield INDEX_COPY
    if len(args) > 2 and args[2].numel() == 1 and on_host(args[2]):
        # One number, known to the host: by a single mask it is filled in, else it is copied.
        if len(masks) == len(indices) == 1:
            return
        yield TO_DEVICE
    if masks:
        yield "indexing by a mask"


class Places:
    """Which tensors are on the host; everything else is on the device.

    Views share a storage, so that is what is remembered; it is kept alive until the block ends, or
    its address could be given to another tensor.

    Attributes:
        muted: do not count what is below a call that has been counted.
        factories: where a factory below the present call makes its tensors: True is the host, None
            is not known.
    """

    def __init__(self) -> None:
        self._storages: dict[int, Any] = {}
        self.muted = False
        self.factories: bool | None = None

    def on_host(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor is on the host."""
        return address_of(tensor) in self._storages

    def all_on_host(self, tensors: list[torch.Tensor]) -> bool:
        """A number of the host may stand beside a device tensor: 0-d tensors do not decide."""
        return all(map(self.on_host, [one for one in tensors if one.ndim] or tensors))

    def put(self, tensor: Any, *, on_host: bool) -> None:
        """Note where a tensor is, and with it all that share its storage."""
        address = address_of(tensor) if isinstance(tensor, torch.Tensor) else None
        if address is None:
            return
        if on_host:
            self._storages[address] = tensor.untyped_storage()
        else:
            self._storages.pop(address, None)

    @contextlib.contextmanager
    def below(self, *, muted: bool = False, factories: bool | None = None) -> Iterator[None]:
        """Set both attributes for the length of a call."""
        before = self.muted, self.factories
        self.muted, self.factories = muted, factories
        try:
            yield
        finally:
            self.muted, self.factories = before


def address_of(tensor: torch.Tensor) -> int | None:
    """Return the identity of a tensor's storage; None where it has none (under vmap, sparse)."""
    try:
        address: int = tensor.untyped_storage()._cdata  # noqa: SLF001 - no public identity
    except (NotImplementedError, RuntimeError):
        return None
    return address


class Operators(TorchDispatchMode):
    """Sees every operator that runs, in the backward too."""

    def __init__(self, found: Callable[[str], None], places: Places) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found
        self.places = places

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = list(tensors_in((args, kwargs)))
        if not self.places.muted and not all(map(self.places.on_host, inputs)):
            for op in waits(func, args, kwargs, self.places.on_host):
                self.found(op)
        result = func(*args, **kwargs)
        self._place(func, inputs, result)
        return result

    def _place(self, func: Any, inputs: list[torch.Tensor], result: Any) -> None:
        name = func.overloadpacket.__name__
        if name == "copy_":
            return  # its target stays where it is
        if name == "lift_fresh":  # data of Python's; as an index of a device tensor it is moved
            on_host = self.places.factories is not False or result.ndim == 0
        elif inputs:
            on_host = self.places.all_on_host(inputs)
        elif self.places.factories is not None:
            on_host = self.places.factories
        else:
            node = _node()
            on_host = node is not None and HOST_VALUE in node.metadata
        for tensor in tensors_in(result):
            self.places.put(tensor, on_host=on_host)


def _node() -> Any:
    return torch._C._current_autograd_node()  # noqa: SLF001 - no public name


def in_backward() -> str:
    """Return the autograd node that runs, in brackets; nothing outside a backward."""
    node = _node()
    return f" (backward of {node.name()})" if node is not None else ""


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested lists, tuples and dicts."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))


def is_used() -> bool:
    """Tell whether this process holds tensors on a CUDA device."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):  # type: ignore[no-untyped-call]
        return False
    return any(map(torch.cuda.memory_allocated, range(torch.cuda.device_count())))


@contextlib.contextmanager
def verdict(
    found: Callable[[str, Frames | None], None], mode: Literal["warn", "error"]
) -> Iterator[None]:
    """Let CUDA say where the host waits, and call `found` there.

    Its warnings of a backward come from the autograd thread, and reach Python when that is done.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def showwarning(message: Warning | str, *rest: Any, **named: Any) -> None:
            if _SYNCHRONIZES in str(message):
                found("CUDA synchronizes", None)
            else:
                show(message, *rest, **named)

        warnings.filterwarnings("always", message=f".*{_SYNCHRONIZES}")
        warnings.filterwarnings("ignore", message=".*Synchronization debug mode is a prototype")
        warnings.showwarning = showwarning
        torch.cuda.set_sync_debug_mode(mode)
        try:
            yield
        except RuntimeError as error:
            if _SYNCHRONIZES not in str(error):
                raise
            frames = reversed(traceback.extract_tb(error.__traceback__))
            found(
                "CUDA synchronizes", [(one.filename, one.lineno or 0, one.name) for one in frames]
            )
        finally:
            torch.cuda.set_sync_debug_mode(before)

"""Which tensors of a guarded block are on the host, on a machine where all of them are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


class Places:
    """Remember which tensors are on the host; every other tensor is on the device.

    Views share a storage and are always in one place, so that the storage is what is remembered. It
    is kept alive until the block ends: a freed address could be given to another tensor.

    Attributes:
        muted: do not count syncs below a call that has been counted.
        factories: where a factory below the present call makes its tensors: True is the host, False
            the device, None is unknown.
        cpu_is_device: `torch.device("cpu")` of the guarded code names the device, and `"cpu"` the
            host; see `is_host`.
    """

    def __init__(self) -> None:
        self._storages: dict[int, Any] = {}
        self._pinned: set[int] = set()
        self.cpu_is_device = False
        self.muted = False
        self.factories: bool | None = None

    def on_host(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is on the host."""
        return address_of(tensor) in self._storages

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Return whether a host tensor is in pinned memory, or would be on a machine with CUDA."""
        if address_of(tensor) in self._pinned:
            return True
        # Under vmap, as a graph of a packed mask runs it, torch cannot ask a tensor.
        return not torch._C._functorch.is_batchedtensor(tensor) and tensor.is_pinned()  # noqa: SLF001

    def all_on_host(self, tensors: list[torch.Tensor]) -> bool:
        """Return whether a result of these tensors is on the host."""
        # torch allows a 0-d host tensor beside device tensors, and the result is on the device:
        # 0-d tensors decide only where there are no others.
        return all(map(self.on_host, [one for one in tensors if one.ndim] or tensors))

    def put(self, tensor: Any, *, on_host: bool, pinned: bool = False) -> None:
        """Record where a tensor is, and with it all that share its storage.

        Args:
            tensor: any value; what is no tensor is ignored.
            on_host: whether it is on the host.
            pinned: count its memory as pinned, which torch can do only beside a device.
        """
        address = address_of(tensor) if isinstance(tensor, torch.Tensor) else None
        if address is None:
            return
        if on_host:
            self._storages[address] = tensor.untyped_storage()
        else:
            self._storages.pop(address, None)
        if pinned:
            self._pinned.add(address)
        else:
            self._pinned.discard(address)

    @contextlib.contextmanager
    def below(self, *, muted: bool = False, factories: bool | None = None) -> Iterator[None]:
        """Set both attributes while a call runs."""
        before = self.muted, self.factories
        self.muted, self.factories = muted, factories
        try:
            yield
        finally:
            self.muted, self.factories = before


def address_of(tensor: torch.Tensor) -> int | None:
    """Return the identity of a tensor's storage; None if it has none (under vmap, sparse)."""
    try:
        address: int = tensor.untyped_storage()._cdata  # noqa: SLF001 - no public identity
    except (NotImplementedError, RuntimeError):
        return None
    return address


def tensors_in(values: object) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested lists, tuples and dicts."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))

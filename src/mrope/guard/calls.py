"""Watch the calls of a guarded block that leave no trace in its operators.

On a machine with one device a move is no operator at all, and `tolist` reads memory without one.
A function mode gets the calls themselves.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode

from mrope.guard.cuda_rules import (
    FROM_DEVICE,
    INDEX_COPY,
    TO_DEVICE,
    assigning,
    blocks,
    keeps_indices,
)
from mrope.guard.devices import (
    DEVICE,
    HOST,
    call_on_host,
    goes_to_host,
    is_host,
)
from mrope.guard.operators import HOST_VALUE, Operators
from mrope.guard.places import Places, address_of, tensors_in
from mrope.guard.sites import TORCH

Found = Callable[[str], None]


class Calls(TorchFunctionMode):
    """Report each sync of a call to every guard that watches, and track where results are.

    Attributes:
        places: where tensors are.
    """

    def __init__(self) -> None:
        super().__init__()
        self._listeners: list[tuple[bool, Found]] = []
        self.places = Places()

    @contextlib.contextmanager
    def reporting(
        self, found: Found, *, raises: bool, host: Iterable[torch.Tensor]
    ) -> Iterator[None]:
        """Report the syncs of a block to `found` too.

        Args:
            found: called with the name of what syncs.
            raises: whether `found` raises.
            host: tensors that are on the host.
        """
        for tensor in host:
            self.places.put(tensor, on_host=True)
        listener = (raises, found)
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def found(self, op: str) -> None:
        """Report a sync to every listener."""
        # Those that raise come last, so that the others have counted it.
        for _, found in sorted(self._listeners, key=lambda listener: listener[0]):
            found(op)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.places.muted:
            return func(*args, **kwargs)
        handler: Callable[..., Any] = _HANDLERS.get(func, Calls.call)
        return handler(self, func, args, kwargs)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Any other call: a named device decides, else its tensors, else it is a host factory."""
        device = kwargs.get("device")
        if device is not None:
            on_host = is_host(device, self.places)
            kwargs = kwargs | {"device": HOST}
        else:
            on_host = self.places.all_on_host(list(tensors_in((args, kwargs))))
        with self.places.below(factories=on_host):
            result = func(*args, **kwargs)
        if device is not None:
            for tensor in tensors_in(result):
                self.places.put(tensor, on_host=on_host)
        return result

    def device(self, _func: Any, args: Any, _kwargs: Any) -> torch.device:
        """`x.device`: different for host and device tensors."""
        # Except for torch.utils.checkpoint, which compares what it read under this mode with what
        # it reads without.
        if self.places.on_host(args[0]) or _caller_file(2) == torch.utils.checkpoint.__file__:
            return HOST
        return DEVICE

    def read(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`tolist`, `numpy`, formatting: one sync, however many transfers it takes below."""
        if not self.places.on_host(args[0]):
            self.found(func.__name__.strip("_"))
        with self.places.below(muted=True):
            return func(*args, **kwargs)

    def move(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`to`, `cpu`, `cuda`: a copy if the place changes, and then a storage of its own."""
        from_host = self.places.on_host(args[0])
        to_host = goes_to_host(func, args, kwargs, self.places)
        if to_host and func is torch.Tensor.to and _caller_file(2).startswith(TORCH):
            # torch's own code read the device in C++, where host and device are not told apart.
            to_host = None
        with self.places.below(muted=True):
            result = call_on_host(func, args, kwargs)
        if to_host is None or to_host == from_host:
            self.places.put(result, on_host=from_host)
            return result
        flags = [one for one in args[1:] if isinstance(one, bool)]
        non_blocking = flags[0] if flags else kwargs.get("non_blocking", False)
        if blocks(args[0], non_blocking, from_host, self.places.is_pinned(args[0])):
            self._copied(from_host)
        return self._separate(result, args[0], to_host)

    def from_data(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`torch.tensor` and its like: made on the host, and copied if a device is named."""
        data = args[0] if args else next(iter(kwargs.values()))
        return self._made(func, args, kwargs, data, like=data)

    def new_tensor(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`x.new_tensor(data)`: made on the host, and copied if `x` is on the device."""
        return self._made(func, args, kwargs, args[1], like=args[0])

    def _made(self, func: Any, args: Any, kwargs: Any, data: Any, like: Any) -> Any:
        is_tensor = isinstance(data, torch.Tensor)
        from_host = not is_tensor or self.places.on_host(data)
        if kwargs.get("device") is not None:
            to_host = is_host(kwargs["device"], self.places)
        else:
            to_host = not isinstance(like, torch.Tensor) or self.places.on_host(like)
        # torch reads device tensors inside a list one by one.
        if not is_tensor and not all(map(self.places.on_host, tensors_in(data))):
            self.found("scalar read")
        with self.places.below(muted=True):
            result = call_on_host(func, args, kwargs)
        if from_host == to_host:
            self.places.put(result, on_host=to_host)
            return result
        if result.numel():
            self._copied(from_host)
        return self._separate(result, data, to_host)

    def _copied(self, from_host: bool) -> None:
        self.found(TO_DEVICE if from_host else FROM_DEVICE)

    def _separate(self, result: torch.Tensor, source: object, to_host: bool) -> torch.Tensor:
        """Return a copy that shares no storage with its source, and whose backward copies back."""
        # Places go by storage: a move that copied nothing here would move its source as well.
        if isinstance(source, torch.Tensor) and address_of(result) == address_of(source):
            with self.places.below(muted=True):
                result = result.clone()
        self.places.put(result, on_host=to_host)

        def copied_back(gradients: object, _: object) -> None:
            for gradient in tensors_in(gradients):
                self._copied(to_host)
                self.places.put(gradient, on_host=not to_host)

        if result.grad_fn is not None:
            result.grad_fn.register_hook(copied_back)
        return result

    def get_item(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`x[...]`: an index made of host numbers is copied to the device first."""
        on_host = self.places.on_host(args[0])
        if not on_host and any(map(_is_host_data, _parts(args[1]))):
            self.found(INDEX_COPY)
        with self.places.below(factories=on_host):
            return func(*args, **kwargs)

    def set_item(self, func: Any, args: Any, kwargs: Any) -> None:
        """`x[...] = value`: as CUDA does it, which is not the CPU's way since torch 2.15."""
        target, index, value = args
        if keeps_indices(target, value, self.places.on_host):
            parts = _parts(index)
            if any(map(_is_host_data, parts)):
                self.found(INDEX_COPY)
            for op in assigning(target, parts, value, self.places.on_host):
                self.found(op)
            with self.places.below(muted=True):
                func(*args, **kwargs)
            return
        self.get_item(func, args, kwargs)
        # A Python number stays on the host, in the backward as well.
        on_host = not isinstance(value, torch.Tensor) or self.places.on_host(value)
        if on_host and target.grad_fn is not None:
            target.grad_fn.metadata[HOST_VALUE] = True

    def one_hot(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`one_hot`: given the number of classes, only the CPU kernel reads the values."""
        classes = kwargs.get("num_classes", args[1] if len(args) > 1 else -1)
        on_host = self.places.on_host(args[0])
        if classes < 0 and not on_host:
            self.found("one_hot without num_classes")
        with self.places.below(muted=True, factories=on_host):
            return func(*args, **kwargs)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    torch.Tensor.device.__get__: Calls.device,
    torch.Tensor.tolist: Calls.read,
    torch.Tensor.numpy: Calls.read,
    torch.Tensor.__array__: Calls.read,
    torch.Tensor.__format__: Calls.read,
    torch.Tensor.__repr__: Calls.read,
    torch.Tensor.to: Calls.move,
    torch.Tensor.cpu: Calls.move,
    torch.Tensor.cuda: Calls.move,
    torch.Tensor.type_as: Calls.move,
    torch.tensor: Calls.from_data,
    torch.as_tensor: Calls.from_data,
    torch.asarray: Calls.from_data,
    torch.Tensor.new_tensor: Calls.new_tensor,
    torch.Tensor.__getitem__: Calls.get_item,
    torch.Tensor.__setitem__: Calls.set_item,
    torch.nn.functional.one_hot: Calls.one_hot,
}


def outer_calls() -> Calls | None:
    """Return the mode of a guard around this one; a second mode would hide devices from it."""
    modes: Callable[[], list[Any]] = torch.overrides._get_current_function_mode_stack  # noqa: SLF001
    return next((mode for mode in modes() if isinstance(mode, Calls)), None)


@contextlib.contextmanager
def watching() -> Iterator[Calls]:
    """Watch operators and calls for a block; what was compiled runs as it was before."""
    calls = Calls()
    # A graph is neither made nor entered under a dispatch mode, which torch's fullgraph raises for.
    stance = getattr(torch.compiler, "set_stance", None)  # torch before 2.6 has none
    uncompiled = stance("force_eager") if stance else contextlib.nullcontext()
    with uncompiled, Operators(calls.found, calls.places), calls, _patched(calls):
        yield calls


@contextlib.contextmanager
def _patched(calls: Calls) -> Iterator[None]:
    """Replace the functions of torch that no function mode can watch.

    `torch.from_numpy` and `torch.frombuffer` do not call modes. The autograd engine does, but the
    mode is off while it runs, and a checkpoint repeats its forward there.
    """
    own_backward = torch.autograd._engine_run_backward  # type: ignore[attr-defined]  # noqa: SLF001

    def on_host(own: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make(*args: object, **kwargs: object) -> torch.Tensor:
            tensor = own(*args, **kwargs)
            calls.places.put(tensor, on_host=True)
            return tensor

        return make

    def watched_backward(*args: Any, **kwargs: Any) -> Any:
        with calls.places.below(), calls:
            return own_backward(*args, **kwargs)

    with (
        mock.patch.object(torch, "from_numpy", on_host(torch.from_numpy)),
        mock.patch.object(torch, "frombuffer", on_host(torch.frombuffer)),
        mock.patch.object(torch.autograd, "_engine_run_backward", watched_backward),
    ):
        yield


def _parts(index: object) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _is_host_data(index: object) -> bool:
    """Return whether an index is made of numbers that are not in a tensor yet."""
    return isinstance(index, (list, range, np.ndarray)) and np.size(index) > 0


def _caller_file(depth: int) -> str:
    """Return the file of the frame `depth` above the caller's."""
    return sys._getframe(depth + 1).f_code.co_filename  # noqa: SLF001

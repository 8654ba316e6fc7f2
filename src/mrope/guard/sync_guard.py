"""Find every place where the host would wait for a CUDA device, without one.

A guarded block runs for real, on CPU tensors with real values, and torch's own modes watch it.
Every tensor stands for one on the device, except host tensors: those made inside the block without
a device (`torch.tensor([1])`, `torch.from_numpy`), those brought to the host (`.cpu()`), those that
are declared (`SyncGuard(host=[...])`), and what is computed from host tensors alone.

To tell `torch.zeros(3)` from `torch.zeros(3, device=x.device)` on a machine that has one device
only, a device tensor's `.device` reads `cpu:0` inside the block and a host tensor's `cpu`: torch
takes both for the same place, and the guard does not.

Where this process holds tensors on a CUDA device, `torch.cuda.set_sync_debug_mode` is the judge
instead.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode

from mrope.errors import MRopeError
from mrope.guard import cuda_rules as guard_cuda
from mrope.guard.cuda_rules import HOST_VALUE, Operators, Places, address_of, tensors_in

_HOST = torch.device("cpu")
_DEVICE = torch.device("cpu", 0)
_TORCH = str(Path(torch.__file__).parent) + os.sep
# Frames that are never the place to look at: torch, this guard, and how warnings reach it.
_HIDDEN = (
    _TORCH,
    __file__,
    guard_cuda.__file__,
    contextlib.__file__,
    warnings.__file__,
)


class HostSyncError(MRopeError):
    """The host would wait for the device here; raised under `SyncGuard(mode="error")`."""


@dataclass(frozen=True)
class Site:
    """A place in the code that waits.

    Attributes:
        file, line, function: innermost frame that is not torch's own.
        op: what waits there; in a backward with the name of the autograd node.
        count: how often it did.
    """

    file: str
    line: int
    function: str
    op: str
    count: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}: {self.op}, {self.count} times"


class SyncGuard:
    """Count the waits of a block of code, forward and backward.

    Args:
        mode: "warn" counts; "error" raises at the first wait.
        host: tensors that live on the host by design, such as a grid that is kept on the CPU.

    One wait is one read, copy or compression that user code or a library asks for, however many
    transfers it takes below (printing a tensor is one).

    Example:
        >>> x = torch.ones(3)
        >>> with SyncGuard() as guard:
        ...     y = (x * 2).sum()
        ...     if y > 5:
        ...         kept = x[x > 0]
        >>> guard.count, sorted(site.op for site in guard.sites)
        (2, ['indexing by a mask', 'scalar read'])
    """

    def __init__(
        self, mode: Literal["warn", "error"] = "warn", host: Iterable[torch.Tensor] = ()
    ) -> None:
        if mode not in ("warn", "error"):
            raise MRopeError(f"mode must be 'warn' or 'error', not {mode!r}")
        self.mode = mode
        self._found: Counter[tuple[str, int, str, str]] = Counter()
        self._declared = tuple(host)
        self._stack: contextlib.ExitStack | None = None

    def __enter__(self) -> SyncGuard:  # noqa: PYI034 - Self needs Python 3.11
        if self._stack is not None:
            raise MRopeError(
                "this SyncGuard watches a block already; make another for a block in it"
            )
        self._found.clear()
        with contextlib.ExitStack() as stack:
            if guard_cuda.is_used():
                stack.enter_context(guard_cuda.verdict(self.found, self.mode))
            else:
                calls = _outer_calls() or stack.enter_context(_watching())
                stack.enter_context(calls.telling(self, self._declared))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:  # noqa: PYI036 - handed on as it is
        assert self._stack is not None
        try:
            self._stack.__exit__(*exception)
        finally:
            self._stack = None
        if self.mode == "error" and self._found and exception[0] is not HostSyncError:
            raise self._error()  # the block caught it: `except ValueError` is common

    @property
    def count(self) -> int:
        """Waits in all."""
        return self._found.total()

    @property
    def sites(self) -> list[Site]:
        """The places that wait, most frequent first."""
        return [Site(*place, count) for place, count in self._found.most_common()]

    def report(self) -> str:
        """Return a line for each site, and the sum."""
        lines = [str(site) for site in self.sites]
        return "\n".join([*lines, f"{self.count} waits at {len(lines)} sites"])

    def found(self, op: str, frames: guard_cuda.Frames | None = None) -> None:
        """Record one wait, at the innermost of the given frames or of the present ones.

        Raises:
            HostSyncError: under `mode="error"`.
        """
        if self._stack is None:
            return  # a hook of the guard's in a backward that runs after the block
        op += guard_cuda.in_backward()
        place: tuple[str, int, str, str] = (*_site(_frames() if frames is None else frames), op)
        self._found[place] += 1
        if self.mode == "error":
            raise self._error()

    def _error(self) -> HostSyncError:
        file, line, function, op = next(iter(self._found))
        return HostSyncError(f"the host waits for the device at {file}:{line} {function}: {op}")


class _Calls(TorchFunctionMode):
    """Sees the calls that leave no trace in the operators of a machine with one device."""

    def __init__(self) -> None:
        super().__init__()
        self.guards: list[SyncGuard] = []
        self.places = Places()

    @contextlib.contextmanager
    def telling(self, guard: SyncGuard, host: Iterable[torch.Tensor]) -> Iterator[None]:
        """Tell a guard, too, what is found in a block, where these tensors are on the host."""
        for tensor in host:
            self.places.put(tensor, on_host=True)
        self.guards.append(guard)
        try:
            yield
        finally:
            self.guards.remove(guard)

    def found(self, op: str) -> None:
        """Tell every guard; last those that raise."""
        for guard in sorted(self.guards, key=lambda one: one.mode == "error"):
            guard.found(op)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.places.muted:
            return func(*args, **kwargs)
        handler: Callable[..., Any] = _HANDLERS.get(func, _Calls.call)
        return handler(self, func, args, kwargs)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Any other call: a named device decides, else its tensors, else it is a host factory."""
        device = kwargs.get("device")
        if device is not None:
            on_host = _is_host(device)
            kwargs = kwargs | {"device": _HOST}
        else:
            on_host = self.places.all_on_host(list(tensors_in((args, kwargs))))
        with self.places.below(factories=on_host):
            result = func(*args, **kwargs)
        if device is not None:
            for tensor in tensors_in(result):
                self.places.put(tensor, on_host=on_host)
        return result

    def device(self, _func: Any, args: Any, _kwargs: Any) -> torch.device:
        """`x.device`: tells both places apart.

        But not to `torch.utils.checkpoint`, which compares what it saw with this mode and without.
        """
        if self.places.on_host(args[0]) or _asked_by(2) == torch.utils.checkpoint.__file__:
            return _HOST
        return _DEVICE

    def read(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`tolist`, `numpy`, formatting: one wait, whatever it takes below."""
        if not self.places.on_host(args[0]):
            self.found(func.__name__.strip("_"))
        with self.places.below(muted=True):
            return func(*args, **kwargs)

    def move(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`to`, `cpu`, `cuda`: a copy where the place changes, and a new storage then."""
        from_host = self.places.on_host(args[0])
        to_host = _target(func, args, kwargs, self.places)
        if to_host and func is torch.Tensor.to and _asked_by(2).startswith(_TORCH):
            to_host = None  # a device that torch's own code read below Python, where it has no mark
        with self.places.below(muted=True):
            result = _on_this_machine(func, args, kwargs)
        if to_host is None or to_host == from_host:
            self.places.put(result, on_host=from_host)
            return result
        flags = [one for one in args[1:] if isinstance(one, bool)]
        non_blocking = flags[0] if flags else kwargs.get("non_blocking", False)
        if guard_cuda.blocks(args[0], non_blocking, from_host):
            self._copied(from_host)
        return self._apart(result, args[0], to_host)

    def from_data(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`torch.tensor` and its like: made on the host, and copied where a device is named."""
        data = args[0] if args else next(iter(kwargs.values()))
        return self._made(func, args, kwargs, data, like=data)

    def new_tensor(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`x.new_tensor(data)`: goes to where `x` is."""
        return self._made(func, args, kwargs, args[1], like=args[0])

    def _made(self, func: Any, args: Any, kwargs: Any, data: Any, like: Any) -> Any:
        is_tensor = isinstance(data, torch.Tensor)
        from_host = not is_tensor or self.places.on_host(data)
        if kwargs.get("device") is not None:
            to_host = _is_host(kwargs["device"])
        else:
            to_host = not isinstance(like, torch.Tensor) or self.places.on_host(like)
        if not is_tensor and not all(map(self.places.on_host, tensors_in(data))):
            self.found("scalar read")
        with self.places.below(muted=True):
            result = _on_this_machine(func, args, kwargs)
        if from_host == to_host:
            self.places.put(result, on_host=to_host)
            return result
        if result.numel():
            self._copied(from_host)
        return self._apart(result, data, to_host)

    def _copied(self, from_host: bool) -> None:
        self.found(guard_cuda.TO_DEVICE if from_host else guard_cuda.FROM_DEVICE)

    def _apart(self, result: torch.Tensor, source: Any, to_host: bool) -> torch.Tensor:
        """Return a copy that shares no storage with its source, whose backward copies back."""
        if isinstance(source, torch.Tensor) and address_of(result) == address_of(source):
            with self.places.below(muted=True):
                result = result.clone()
        self.places.put(result, on_host=to_host)

        def copied_back(gradients: Any, _: Any) -> None:
            for gradient in tensors_in(gradients):
                self._copied(to_host)
                self.places.put(gradient, on_host=not to_host)

        if result.grad_fn is not None:
            result.grad_fn.register_hook(copied_back)
        return result

    def get_item(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`x[...]`: an index made of host numbers is copied to the device first."""
        on_host = self.places.on_host(args[0])
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        if not on_host and any(map(_is_host_data, index)):
            self.found(guard_cuda.INDEX_COPY)
        with self.places.below(factories=on_host):
            return func(*args, **kwargs)

    def set_item(self, func: Any, args: Any, kwargs: Any) -> None:
        """`x[...] = value`: a Python number stays on the host, in the backward as well."""
        self.get_item(func, args, kwargs)
        target, _, value = args
        on_host = not isinstance(value, torch.Tensor) or self.places.on_host(value)
        if on_host and target.grad_fn is not None:
            target.grad_fn.metadata[HOST_VALUE] = True

    def one_hot(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`one_hot`: with a number of classes only the CPU kernel looks at the values."""
        classes = kwargs.get("num_classes", args[1] if len(args) > 1 else -1)
        on_host = self.places.on_host(args[0])
        if classes < 0 and not on_host:
            self.found("one_hot without num_classes")
        with self.places.below(muted=True, factories=on_host):
            return func(*args, **kwargs)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    torch.Tensor.device.__get__: _Calls.device,
    torch.Tensor.tolist: _Calls.read,
    torch.Tensor.numpy: _Calls.read,
    torch.Tensor.__array__: _Calls.read,
    torch.Tensor.__format__: _Calls.read,
    torch.Tensor.__repr__: _Calls.read,
    torch.Tensor.to: _Calls.move,
    torch.Tensor.cpu: _Calls.move,
    torch.Tensor.cuda: _Calls.move,
    torch.Tensor.type_as: _Calls.move,
    torch.tensor: _Calls.from_data,
    torch.as_tensor: _Calls.from_data,
    torch.asarray: _Calls.from_data,
    torch.Tensor.new_tensor: _Calls.new_tensor,
    torch.Tensor.__getitem__: _Calls.get_item,
    torch.Tensor.__setitem__: _Calls.set_item,
    torch.nn.functional.one_hot: _Calls.one_hot,
}


def _target(func: Any, args: Any, kwargs: Any, places: Places) -> bool | None:
    """Tell whether a move goes to the host; None where it only changes the dtype."""
    if func is torch.Tensor.cpu:
        return True
    if func is torch.Tensor.cuda:
        return False
    for value in (*args[1:], kwargs.get("device"), kwargs.get("other")):
        if isinstance(value, torch.Tensor):
            return places.on_host(value)
        if _names_a_device(value):
            return _is_host(value)
    return None


def _is_host(device: Any) -> bool:
    if isinstance(device, int):
        return False  # the ordinal of an accelerator
    return bool(torch.device(device) == _HOST)


def _on_this_machine(func: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """Make a call with the only device of this machine in place of the one that is named."""
    if func is torch.Tensor.cuda:  # refused by a torch that was built without CUDA
        form = kwargs.get("memory_format", torch.preserve_format)
        return torch.Tensor.to(args[0], _HOST, memory_format=form)
    data, *rest = args or [None]
    rest = [_HOST if _names_a_device(value) else value for value in rest]
    kwargs = {
        name: _HOST if name == "device" and value is not None else value
        for name, value in kwargs.items()
    }
    result: torch.Tensor = func(*([data, *rest] if args else []), **kwargs)
    return result


def _names_a_device(value: Any) -> bool:
    """Tell whether an argument is a device: an object, a name, or a number (a flag is none)."""
    if isinstance(value, str):
        return value.partition(":")[0] in ("cpu", "cuda")
    return isinstance(value, torch.device) or type(value) is int


def _is_host_data(index: Any) -> bool:
    """Tell whether an index is made of numbers that are not in a tensor yet."""
    return isinstance(index, (list, range, np.ndarray)) and np.size(index) > 0


def _outer_calls() -> _Calls | None:
    """Return the mode of a guard around this one: two would hide devices from each other."""
    modes: Callable[[], list[Any]] = torch.overrides._get_current_function_mode_stack  # noqa: SLF001
    return next((mode for mode in modes() if isinstance(mode, _Calls)), None)


@contextlib.contextmanager
def _watching() -> Iterator[_Calls]:
    calls = _Calls()
    with Operators(calls.found, calls.places), calls, _patched(calls):
        yield calls


@contextlib.contextmanager
def _patched(calls: _Calls) -> Iterator[None]:
    """Replace the functions of torch that no mode sees from within.

    `torch.from_numpy` and `torch.frombuffer` are no calls of torch's to a mode. The autograd engine
    is: but for its length the mode is off, and the forward of a checkpoint runs there once more.
    """
    own_run = torch.autograd._engine_run_backward  # type: ignore[attr-defined]  # noqa: SLF001

    def on_host(own: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = own(*args, **kwargs)
            calls.places.put(tensor, on_host=True)
            return tensor

        return make

    def run(*args: Any, **kwargs: Any) -> Any:
        with calls.places.below(), calls:
            return own_run(*args, **kwargs)

    with (
        mock.patch.object(torch, "from_numpy", on_host(torch.from_numpy)),
        mock.patch.object(torch, "frombuffer", on_host(torch.frombuffer)),
        mock.patch.object(torch.autograd, "_engine_run_backward", run),
    ):
        yield


def _asked_by(depth: int) -> str:
    """Return the file of the frame so many above the caller's."""
    return sys._getframe(depth + 1).f_code.co_filename  # noqa: SLF001


def _frames() -> Iterator[tuple[str, int, str]]:
    """Yield the present frames, innermost first."""
    frame: types.FrameType | None = sys._getframe(1)  # noqa: SLF001
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back


def _site(frames: guard_cuda.Frames) -> tuple[str, int, str]:
    """Return the innermost frame outside torch; for a helper of transformers name its model too."""
    visible = [frame for frame in frames if not frame[0].startswith(_HIDDEN)]
    if not visible:
        return "?", 0, "?"
    file, line, function = visible[0]
    if "/transformers/" in file and "/models/" not in file:
        model = next((frame for frame in visible if "/modeling_" in frame[0]), None)
        if model is not None:
            function += f" via {Path(model[0]).name}:{model[1]} {model[2]}"
    return file, line, function

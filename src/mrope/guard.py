"""Find every place where the host would wait for a CUDA device, without one.

A guarded block runs for real, on CPU tensors with real values, and torch's own modes watch it.
Every tensor stands for one on the device, except host tensors: those made inside the block without
a device (`torch.tensor([1])`, `torch.from_numpy`), those brought to the host (`.cpu()`), those that
are declared (`SyncGuard(host=[...])`), and what is computed from host tensors alone.

To tell `torch.zeros(3)` from `torch.zeros(3, device=x.device)` on a machine that has one device
only, a device tensor's `.device` reads `cpu:0` inside the block and a host tensor's `cpu`: torch
takes both for the same place, and the guard does not.

Where the block's tensors really are on CUDA, `torch.cuda.set_sync_debug_mode` is the judge instead.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mrope.errors import MRopeError

_HOST = torch.device("cpu")
_DEVICE = torch.device("cpu", 0)
_HIDDEN = (str(Path(torch.__file__).parent), __file__, contextlib.__file__, warnings.__file__)

# Operators whose result's size, or whose result itself, the host must read.
_WAITING = {
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
_MASKS = (torch.bool, torch.uint8)


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

    def __enter__(self) -> SyncGuard:
        self._found.clear()
        with contextlib.ExitStack() as stack:
            if torch.cuda.is_available():
                stack.enter_context(_cuda_verdict(self))
            else:
                places = _Places(self._declared)
                stack.enter_context(_Operators(self, places))
                stack.enter_context(_Calls(self, places))
                stack.enter_context(_from_numpy_is_host(places))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        assert self._stack is not None
        self._stack.__exit__(*exception)
        self._stack = None

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

    def found(self, op: str, frames: Iterable[tuple[str, int, str]] | None = None) -> None:
        """Record one wait, at the innermost of the given frames or of the present ones.

        Raises:
            HostSyncError: under `mode="error"`.
        """
        file, line, function = _site(_frames() if frames is None else frames)
        if self.mode == "error":
            raise HostSyncError(f"the host waits for the device at {file}:{line} {function}: {op}")
        self._found[file, line, function, op] += 1


class _Places:
    """Which tensors are on the host; everything else is on the device.

    Views share a storage, so that is what is remembered; it is kept alive until the block ends, or
    its address could be given to another tensor.
    """

    def __init__(self, host: Iterable[torch.Tensor]) -> None:
        self._storages: dict[int, Any] = {}
        self.muted = 0
        for tensor in host:
            self.put(tensor, on_host=True)

    def on_host(self, tensor: torch.Tensor) -> bool:
        return _address(tensor) in self._storages

    def put(self, tensor: Any, *, on_host: bool) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        if on_host:
            self._storages[_address(tensor)] = tensor.untyped_storage()
        else:
            self._storages.pop(_address(tensor), None)

    @contextlib.contextmanager
    def mute(self) -> Iterator[None]:
        """Do not count what is below a call that has been counted, or that CUDA does otherwise."""
        self.muted += 1
        try:
            yield
        finally:
            self.muted -= 1


def _address(tensor: torch.Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata  # noqa: SLF001 - the storage's identity
    return address


class _Operators(TorchDispatchMode):
    """Sees every operator that runs, in the backward too."""

    def __init__(self, guard: SyncGuard, places: _Places) -> None:
        super().__init__()
        self.guard = guard
        self.places = places

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = list(_tensors((args, kwargs)))
        op = _waits(func, args, kwargs)
        if op and not self.places.muted and not all(map(self.places.on_host, inputs)):
            self.guard.found(op + _node())
        result = func(*args, **kwargs)
        self._place(inputs, kwargs, result)
        return result

    def _place(self, inputs: list[torch.Tensor], kwargs: Any, result: Any) -> None:
        """Results of host tensors alone are on the host; so are those of factories without one."""
        if inputs:
            # A number of the host may stand beside a device tensor: 0-d tensors do not decide.
            deciding = [one for one in inputs if one.ndim] or inputs
            on_host = all(map(self.places.on_host, deciding))
        else:
            on_host = "device" in kwargs and kwargs["device"] in (None, _HOST)
        for tensor in _tensors(result):
            self.places.put(tensor, on_host=on_host)


def _waits(func: Any, args: tuple[Any, ...], kwargs: Any) -> str | None:
    """Return what an operator waits for, or None."""
    name = func.overloadpacket.__name__
    if name in _INDEXING:
        indices = args[1] if len(args) > 1 else kwargs.get("indices", ())
        masks = [one for one in indices if one is not None and one.dtype in _MASKS]
        return "indexing by a mask" if masks else None
    if name == "repeat_interleave":
        size = args[1] if len(args) > 1 else kwargs.get("output_size")
        return "repeat_interleave without output_size" if size is None else None
    return _WAITING.get(name)


def _node() -> str:
    node = torch._C._current_autograd_node()  # noqa: SLF001 - no public name
    return f" (backward of {node.name()})" if node is not None else ""


class _Calls(TorchFunctionMode):
    """Sees the calls that leave no trace in the operators of a machine with one device."""

    def __init__(self, guard: SyncGuard, places: _Places) -> None:
        super().__init__()
        self.guard = guard
        self.places = places

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is None or self.places.muted:
            return func(*args, **kwargs)
        return handler(self, func, args, kwargs)

    def device(self, func: Any, args: Any, kwargs: Any) -> torch.device:
        """`x.device`: tells both places apart."""
        return _HOST if self.places.on_host(args[0]) else _DEVICE

    def read(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`tolist`, `numpy`, formatting: one wait, whatever it takes below."""
        if not self.places.on_host(args[0]):
            self.guard.found(func.__name__.strip("_"))
        with self.places.mute():
            return func(*args, **kwargs)

    def move(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`to`, `cpu`, `cuda`: a copy where the place changes, and a new storage then."""
        source = args[0]
        target = _target(func, args, kwargs, self.places)
        was_host = self.places.on_host(source)
        with self.places.mute():
            result = func(*_without_place(args), **_without_place(kwargs))
        if target is None or (target == _HOST) == was_host:
            self.places.put(result, on_host=was_host)
            return result
        # Blocking copies wait; others only where the memory is not pinned, for the driver's staging.
        staged = was_host and not source.is_pinned()
        if source.numel() and (staged or not kwargs.get("non_blocking", False)):
            self.guard.found(f"copy {'to' if was_host else 'from'} the device")
        with self.places.mute():
            result = result.clone() if _address(result) == _address(source) else result
        self.places.put(result, on_host=not was_host)
        return result

    def from_data(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`torch.tensor`, `torch.as_tensor`: made on the host, and copied where a device is named."""
        data, device = args[0], kwargs.get("device")
        given_on_device = isinstance(data, torch.Tensor) and not self.places.on_host(data)
        with self.places.mute():
            result = func(*args, **_without_place(kwargs))
        to_device = device is not None and torch.device(device) != _HOST
        if to_device and not given_on_device and result.numel():
            self.guard.found("copy to the device")
        on_host = not to_device and not (device is None and given_on_device)
        if isinstance(data, torch.Tensor) and _address(result) == _address(data):
            return result
        self.places.put(result, on_host=on_host)
        return result

    def get_item(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`x[...]`: an index made of host numbers is copied to the device first."""
        self._index(args[0], args[1])
        return func(*args, **kwargs)

    def set_item(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`x[...] = value`: by one mask, a Python number is filled in without compressing it."""
        self._index(args[0], args[1])
        is_fill = isinstance(args[2], (int, float, complex)) and isinstance(args[1], torch.Tensor)
        if is_fill and args[1].dtype == torch.bool:
            with self.places.mute():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def unchecked(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`one_hot` with a number of classes: only the CPU kernel looks at the values."""
        classes = kwargs.get("num_classes", args[1] if len(args) > 1 else -1)
        if classes < 0:
            return func(*args, **kwargs)
        with self.places.mute():
            return func(*args, **kwargs)

    def _index(self, tensor: torch.Tensor, index: Any) -> None:
        if self.places.on_host(tensor):
            return
        for part in index if isinstance(index, tuple) else (index,):
            on_host = isinstance(part, torch.Tensor) and part.ndim and self.places.on_host(part)
            if isinstance(part, list) or on_host:
                self.guard.found("copy of an index to the device")


_HANDLERS: dict[Any, Callable[..., Any]] = {
    torch.Tensor.device.__get__: _Calls.device,  # type: ignore[attr-defined]
    torch.Tensor.tolist: _Calls.read,
    torch.Tensor.numpy: _Calls.read,
    torch.Tensor.__array__: _Calls.read,
    torch.Tensor.__format__: _Calls.read,
    torch.Tensor.__repr__: _Calls.read,
    torch.Tensor.to: _Calls.move,
    torch.Tensor.cpu: _Calls.move,
    torch.Tensor.cuda: _Calls.move,
    torch.tensor: _Calls.from_data,
    torch.as_tensor: _Calls.from_data,
    torch.Tensor.__getitem__: _Calls.get_item,
    torch.Tensor.__setitem__: _Calls.set_item,
    torch.nn.functional.one_hot: _Calls.unchecked,
}


def _target(func: Any, args: Any, kwargs: Any, places: _Places) -> torch.device | None:
    """Return where a move goes to; None where it only changes the dtype."""
    if func is torch.Tensor.cpu:
        return _HOST
    if func is torch.Tensor.cuda:
        return _DEVICE
    for value in (*args[1:], kwargs.get("device"), kwargs.get("other")):
        if isinstance(value, torch.Tensor):
            return _HOST if places.on_host(value) else _DEVICE
        if isinstance(value, (str, torch.device)):
            return _HOST if torch.device(value) == _HOST else _DEVICE
    return None


def _without_place(values: Any) -> Any:
    """Return arguments with every device replaced by the only one of this machine."""
    if isinstance(values, dict):
        return {name: _without_place((value,))[0] for name, value in values.items()}
    return tuple(
        _HOST if isinstance(value, torch.device) or _names_a_device(value) else value
        for value in values
    )


def _names_a_device(value: Any) -> bool:
    return isinstance(value, str) and value.partition(":")[0] in ("cpu", "cuda")


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


@contextlib.contextmanager
def _from_numpy_is_host(places: _Places) -> Iterator[None]:
    """Note what `torch.from_numpy` makes: it is the one factory that no mode sees."""
    own = torch.from_numpy

    def from_numpy(array: Any) -> torch.Tensor:
        tensor = own(array)
        places.put(tensor, on_host=True)
        return tensor

    torch.from_numpy = from_numpy
    try:
        yield
    finally:
        torch.from_numpy = own


@contextlib.contextmanager
def _cuda_verdict(guard: SyncGuard) -> Iterator[None]:
    """Let CUDA say where the host waits.

    Its warnings of a backward come from the autograd thread, and reach Python when that is done.
    """

    def showwarning(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            guard.found("CUDA synchronizes")

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=".*synchronizing CUDA operation")
        warnings.showwarning = showwarning
        torch.cuda.set_sync_debug_mode(guard.mode)
        try:
            yield
        except RuntimeError as error:
            if "synchronizing CUDA operation" not in str(error):
                raise
            frames = traceback.extract_tb(error.__traceback__)
            places = [(one.filename, one.lineno or 0, one.name) for one in reversed(frames)]
            guard.found("CUDA synchronizes", places)
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _frames() -> Iterator[tuple[str, int, str]]:
    """Yield the present frames, innermost first."""
    frame: types.FrameType | None = sys._getframe(1)  # noqa: SLF001
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back


def _site(frames: Iterable[tuple[str, int, str]]) -> tuple[str, int, str]:
    """Return the innermost frame outside torch; a transformers helper with the model that calls it."""
    visible = [frame for frame in frames if not frame[0].startswith(_HIDDEN)]
    if not visible:
        return "?", 0, "?"
    file, line, function = visible[0]
    if "/transformers/" in file and "/models/" not in file:
        model = next((frame for frame in visible if "/modeling_" in frame[0]), None)
        if model is not None:
            function += f" via {Path(model[0]).name}:{model[1]} {model[2]}"
    return file, line, function

"""Watch the operators of a guarded block, the backward included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mrope.guard.cuda_rules import syncs
from mrope.guard.places import Places, tensors_in

# Marks the autograd node of `x[...] = 1.0`: its backward makes a number on the host as well.
HOST_VALUE = "mrope.guard: value on the host"


class Operators(TorchDispatchMode):
    """Call `found` for each sync of an operator, and track where results are.

    Args:
        found: called with the name of what syncs.
        places: where tensors are.
    """

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
            for op in syncs(func, args, kwargs, self.places.on_host):
                self.found(op)
        result = func(*args, **kwargs)
        self._place(func, inputs, result)
        return result

    def _place(self, func: Any, inputs: list[torch.Tensor], result: Any) -> None:
        name = func.overloadpacket.__name__
        if name == "copy_":
            return  # its target does not move
        if name == "lift_fresh":
            # A tensor of Python numbers. As an index of a device tensor it is moved there, except
            # for a single number.
            on_host = self.places.factories is not False or result.ndim == 0
        elif inputs:
            on_host = self.places.all_on_host(inputs)
        elif self.places.factories is not None:
            on_host = self.places.factories
        else:
            # A factory in the backward, which no call of Python's surrounds.
            node = _node()
            on_host = node is not None and HOST_VALUE in node.metadata
        for tensor in tensors_in(result):
            self.places.put(tensor, on_host=on_host)


def in_backward() -> str:
    """Return the autograd node that runs, in brackets; an empty string outside a backward."""
    node = _node()
    return f" (backward of {node.name()})" if node is not None else ""


def _node() -> Any:
    return torch._C._current_autograd_node()  # noqa: SLF001 - no public name

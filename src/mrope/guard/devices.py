"""Read device arguments of calls, and run such calls on a machine with one device.

Inside a guarded block `x.device` is `DEVICE` for a device tensor and `HOST` for a host tensor.
torch treats `cpu:0` and `cpu` as one device, and the guard tells them apart.
"""

from __future__ import annotations

from typing import Any

import torch

from mrope.guard.places import Places

HOST = torch.device("cpu")
DEVICE = torch.device("cpu", 0)


def is_host(device: Any, places: Places) -> bool:
    """Return whether a device argument names the host.

    A training loop on a CPU keeps its device as `torch.device("cpu")`, and asks for the host by
    `.cpu()` or by the name "cpu": under `places.cpu_is_device` its object is the device.
    """
    if isinstance(device, int):
        return False  # the ordinal of an accelerator
    if places.cpu_is_device and isinstance(device, torch.device):
        # `x.device` of a host tensor is this very object, and an object of the loop never is.
        return device is HOST
    return bool(torch.device(device) == HOST)


def names_a_device(value: object) -> bool:
    """Return whether an argument is a device: an object, a name or an ordinal."""
    if isinstance(value, str):
        return value.partition(":")[0] in ("cpu", "cuda")
    # Not isinstance for int: a flag such as `non_blocking` is a bool, which is an int.
    return isinstance(value, torch.device) or type(value) is int


def goes_to_host(func: Any, args: Any, kwargs: Any, places: Places) -> bool | None:
    """Return whether a move goes to the host; None if it only changes the dtype."""
    if func is torch.Tensor.cpu:
        return True
    if func is torch.Tensor.cuda:
        return False
    for value in (*args[1:], kwargs.get("device"), kwargs.get("other")):
        if isinstance(value, torch.Tensor):
            return places.on_host(value)
        if names_a_device(value):
            return is_host(value, places)
    return None


def call_on_host(func: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """Call a function with every device argument replaced by this machine's only device."""
    if func is torch.Tensor.cuda:  # a torch that was built without CUDA refuses the call
        form = kwargs.get("memory_format", torch.preserve_format)
        return torch.Tensor.to(args[0], HOST, memory_format=form)
    data, *rest = args or [None]
    rest = [HOST if names_a_device(value) else value for value in rest]
    kwargs = {
        name: HOST if name == "device" and value is not None else value
        for name, value in kwargs.items()
    }
    result: torch.Tensor = func(*([data, *rest] if args else []), **kwargs)
    return result

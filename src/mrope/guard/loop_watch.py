"""Watch the steps of a training loop, whose batches come from the host and go to the device.

On a machine with a CUDA device, torch's sync debug mode reports. Without one the guard does, and
needs three facts that a loop on a CPU hides: batches of a DataLoader start on the host, the loop's
own `torch.device("cpu")` stands for the device, and an optimizer keeps its step counters on the
host.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal
from unittest import mock
from weakref import WeakKeyDictionary

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data.dataloader import _BaseDataLoaderIter

from mrope.guard import cuda_debug
from mrope.guard.calls import outer_calls, watching
from mrope.guard.operators import in_backward
from mrope.guard.places import Places, tensors_in
from mrope.guard.sites import Frames, present_frames

Judge = Literal["cuda", "guard"]
"""What reports the syncs: torch's sync debug mode, or the package's guard."""

Found = Callable[[str, list[tuple[str, int, str]]], None]

# Lightning copies with non_blocking=True except to the devices in a table that has the CPU.
_LIGHTNING = ("lightning.fabric.utilities.apply_func", "lightning_fabric.utilities.apply_func")


class LoaderRecord:
    """Remember what DataLoader iterators are asked for, and their latest batches.

    Without a device torch ignores `pin_memory=True`, and its iterators keep no trace of it. A
    trainer fetches one batch ahead: it is fetched before the watch begins, and copied in it.
    """

    def __init__(self) -> None:
        self._pins: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
        self._latest: WeakKeyDictionary[Any, list[torch.Tensor]] = WeakKeyDictionary()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record every iterator that is made in the block, and the batches fetched in it."""
        own_init, own_next = _BaseDataLoaderIter.__init__, _BaseDataLoaderIter.__next__

        def init(iterator: Any, loader: Any, *args: Any, **kwargs: Any) -> None:
            self._pins[iterator] = bool(loader.pin_memory)
            own_init(iterator, loader, *args, **kwargs)

        def next_batch(iterator: Any) -> Any:
            batch = own_next(iterator)
            self._latest[iterator] = _tensors_of(batch)
            return batch

        with (
            mock.patch.object(_BaseDataLoaderIter, "__init__", init),
            mock.patch.object(_BaseDataLoaderIter, "__next__", next_batch),
        ):
            yield
        self._latest.clear()

    def place_batches(self, places: Places) -> None:
        """Record that the latest batch of every iterator is on the host."""
        for iterator in list(self._latest):
            self.place_batch(places, iterator)

    def place_batch(self, places: Places, iterator: object) -> None:
        """Record that the latest batch of one iterator is on the host, pinned if asked for."""
        for tensor in self._latest.get(iterator, ()):
            places.put(tensor, on_host=True, pinned=self._pins.get(iterator, False))


@contextlib.contextmanager
def watching_loop(found: Found, loaders: LoaderRecord) -> Iterator[Judge]:
    """Call `found` for each sync of a block that runs whole steps of a training loop.

    Args:
        found: called with the name of what syncs, and with the stack's frames, innermost first.
        loaders: recording since before the loop made its DataLoader iterators.

    Yields:
        What reports the syncs.
    """

    def with_frames(op: str, frames: Frames | None = None) -> None:
        # A list: the frames of a generator would begin where it is first read.
        found(op + in_backward(), list(present_frames() if frames is None else frames))

    if cuda_debug.is_used():
        with cuda_debug.reporting(with_frames, "warn"):
            yield "cuda"
        return
    with contextlib.ExitStack() as stack:
        calls = outer_calls() or stack.enter_context(watching())
        stack.enter_context(calls.reporting(with_frames, raises=False, host=()))
        stack.enter_context(_as_beside_a_device(calls.places, loaders))
        yield "guard"


@contextlib.contextmanager
def _as_beside_a_device(places: Places, loaders: LoaderRecord) -> Iterator[None]:
    """Place batches, devices and step counters where a loop beside a CUDA device has them."""
    own = _BaseDataLoaderIter.__next__

    def next_batch(iterator: Any) -> Any:
        # Collating is the worker's work, on the host, also where num_workers is 0.
        with places.below(muted=True):
            batch = own(iterator)
        loaders.place_batch(places, iterator)
        return batch

    def put_counters(optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
        for group in optimizer.param_groups:
            if group.get("fused") or group.get("capturable"):
                continue  # these keep their counters on the device
            for parameter in group["params"]:
                step = optimizer.state.get(parameter, {}).get("step")
                places.put(step, on_host=True)

    loaders.place_batches(places)
    before, places.cpu_is_device = places.cpu_is_device, True
    hook = register_optimizer_step_pre_hook(put_counters)
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, places, "cpu_is_device", before)
        stack.callback(hook.remove)
        stack.enter_context(mock.patch.object(_BaseDataLoaderIter, "__next__", next_batch))
        for name in _LIGHTNING:
            if name in sys.modules:
                module = sys.modules[name]
                stack.enter_context(mock.patch.object(module, "_BLOCKING_DEVICE_TYPES", ()))
        yield


def _tensors_of(batch: Any) -> list[torch.Tensor]:
    # A batch may be a mapping of any class, and one element of a pair.
    if hasattr(batch, "keys"):
        batch = dict(batch)
    elif isinstance(batch, (tuple, list)):
        return [tensor for part in batch for tensor in _tensors_of(part)]
    return list(tensors_in(batch))

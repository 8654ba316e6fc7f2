"""Small pieces of code, and the syncs of each; the same list runs against CUDA.

A snippet takes a device, makes its tensors there, and returns the code to watch. It needs torch
alone, so that it runs wherever a GPU is.
"""

# ruff: noqa: PLW0108 - the site of a sync is the line of the lambda

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

Body = Callable[[], Any]


@dataclass(frozen=True)
class Snippet:
    """Code to watch.

    Attributes:
        make: makes the tensors on a device, and returns the code.
        syncs: how many syncs the guard counts, each named by an operator below.
        ops: the operators that it names, sorted.
        cuda: whether CUDA's own debug mode reports a sync; None: as the guard does. It differs only where
            the mode is known not to look.
    """

    name: str
    make: Callable[[str], Body]
    ops: tuple[str, ...] = ()
    cuda: bool | None = None

    @property
    def syncs(self) -> int:
        return len(self.ops)

    @property
    def cuda_syncs(self) -> bool:
        return bool(self.ops) if self.cuda is None else self.cuda


SNIPPETS: list[Snippet] = []


# `x[...] = 1.0` fills since torch 2.15. Before, the number was made a tensor on the host, and copied.
FILLS = torch.__version__ >= "2.15"


def snippet(
    *ops: str, cuda: bool | None = None, fills: tuple[str, ...] | None = None
) -> Callable[[Callable[[str], Body]], None]:
    """Add a function to the list.

    Args:
        ops: that sync.
        cuda: see `Snippet`.
        fills: that sync since torch 2.15; None: the same.
    """
    if FILLS and fills is not None:
        ops = fills

    def add(make: Callable[[str], Body]) -> None:
        name = make.__name__.replace("_", " ")
        SNIPPETS.append(Snippet(name, make, tuple(sorted(ops)), cuda))

    return add


def numbers(device: str, *shape: int, grad: bool = False) -> Any:
    """Return 0, 1, 2, ... as floats on a device."""
    count = 1
    for side in shape:
        count *= side
    made = torch.arange(count, dtype=torch.float32).reshape(shape).to(device)
    return made.requires_grad_(grad)


def pinned(device: str) -> torch.Tensor:
    """Return a host tensor in pinned memory; without CUDA it only says so."""
    made = torch.ones(4)
    if device == "cuda":
        return made.pin_memory()
    made.is_pinned = lambda: True  # type: ignore[method-assign,assignment,misc]
    return made


# Code that syncs.


@snippet("scalar read")
def item(device: str) -> Body:
    x = numbers(device, 1)
    return lambda: x.item()


@snippet("scalar read")
def if_tensor(device: str) -> Body:
    x = numbers(device, 3)
    return lambda: 1 if x.sum() > 2 else 0


@snippet("scalar read", "scalar read", "scalar read")
def int_float_and_bool(device: str) -> Body:
    x = numbers(device, 1)
    return lambda: (int(x), float(x), bool(x))


@snippet("scalar read")
def a_tensor_as_a_slice_bound(device: str) -> Body:
    x, n = numbers(device, 5), torch.tensor(3).to(device)
    return lambda: x[:n]


@snippet("scalar read")
def a_tensor_as_a_range(device: str) -> Body:
    n = torch.tensor(3).to(device)
    return lambda: list(range(n))


@snippet("scalar read")
def a_zero_dimensional_index(device: str) -> Body:
    x, at = numbers(device, 5), torch.tensor(3).to(device)
    return lambda: x[at]


@snippet("tolist")
def tolist(device: str) -> Body:
    x = numbers(device, 3)
    return lambda: x.tolist()


@snippet("tolist")
def split_by_the_values_of_a_tensor(device: str) -> Body:
    x, sizes = numbers(device, 5), torch.tensor([2, 3]).to(device)
    return lambda: x.split(sizes.tolist())


@snippet("format")
def a_scalar_in_a_message(device: str) -> Body:
    x = numbers(device, 3)
    return lambda: f"{x.sum()}"


@snippet("repr")
def printing(device: str) -> Body:
    x = numbers(device, 3)
    return lambda: repr(x)


@snippet("copy from the device")
def cpu(device: str) -> Body:
    x = numbers(device, 3)
    return lambda: x.cpu()


@snippet("copy from the device")
def to_cpu_and_numpy(device: str) -> Body:
    x = numbers(device, 3)
    return lambda: x.to("cpu").numpy().sum()


@snippet("copy from the device")
def read_often_after_one_copy(device: str) -> Body:
    x = numbers(device, 3)

    def body() -> list[float]:
        on_host = x.cpu()
        return [on_host[k].item() for k in range(3)]

    return body


@snippet("indexing by a mask")
def indexing_by_a_mask(device: str) -> Body:
    x = numbers(device, 4)
    return lambda: x[x > 1]


@snippet("indexing by a mask")
def assigning_a_tensor_by_a_mask(device: str) -> Body:
    x, values = numbers(device, 4), numbers(device, 2)

    def body() -> None:
        x[x > 1] = values

    return body


@snippet("indexing by a mask", "indexing by a mask (backward of IndexBackward0)")
def the_backward_of_indexing_by_a_mask(device: str) -> Body:
    x = numbers(device, 4, grad=True)
    return lambda: x[x > 1].sum().backward()


@snippet("nonzero")
def nonzero(device: str) -> Body:
    x = numbers(device, 4)
    return lambda: x.nonzero()


@snippet("nonzero")
def where_with_one_argument(device: str) -> Body:
    x = numbers(device, 4)
    return lambda: torch.where(x > 1)


@snippet("nonzero")
def argwhere(device: str) -> Body:
    x = numbers(device, 4)
    return lambda: torch.argwhere(x)


@snippet("masked_select")
def masked_select(device: str) -> Body:
    x = numbers(device, 4)
    return lambda: x.masked_select(x > 1)


@snippet("masked_select (backward of MaskedScatterBackward0)")
def the_backward_of_masked_scatter(device: str) -> Body:
    x, mask = numbers(device, 4), numbers(device, 4) > 1
    source = numbers(device, 4, grad=True)
    return lambda: x.masked_scatter(mask, source).sum().backward()


@snippet("unique")
def unique(device: str) -> Body:
    x = numbers(device, 4)
    return lambda: x.unique()


@snippet("unique")
def unique_consecutive(device: str) -> Body:
    x = numbers(device, 4)
    return lambda: x.unique_consecutive()


@snippet("repeat_interleave without output_size")
def repeat_interleave_by_a_tensor(device: str) -> Body:
    x, counts = numbers(device, 2), torch.tensor([1, 2]).to(device)
    return lambda: x.repeat_interleave(counts)


@snippet("equal")
def torch_equal(device: str) -> Body:
    x, y = numbers(device, 4), numbers(device, 4)
    return lambda: torch.equal(x, y)


@snippet("allclose")
def allclose(device: str) -> Body:
    x, y = numbers(device, 4), numbers(device, 4)
    return lambda: torch.allclose(x, y)


@snippet("bincount")
def bincount(device: str) -> Body:
    x = torch.tensor([0, 1, 1]).to(device)
    return lambda: x.bincount()


@snippet("copy to the device")
def a_tensor_of_python_numbers(device: str) -> Body:
    x = numbers(device, 4)
    return lambda: torch.tensor([1, 2], device=x.device)


@snippet("copy to the device")
def a_host_tensor_to_the_device(device: str) -> Body:
    x = numbers(device, 4)
    return lambda: torch.arange(3).to(x.device)


@snippet("copy to the device", "copy to the device")
def the_cuda_method(device: str) -> Body:
    x = numbers(device, 4)
    return lambda: (x.cuda(), torch.arange(3).cuda(), torch.tensor(5, device=x.cuda().device))


# The driver stages pageable memory before the call returns; the debug mode does not look there.
@snippet("copy to the device", cuda=False)
def a_host_tensor_to_the_device_without_pinning(device: str) -> Body:
    x = numbers(device, 4)
    return lambda: torch.arange(3).to(x.device, non_blocking=True)


@snippet("copy of an index to the device")
def indexing_by_a_python_list(device: str) -> Body:
    x = numbers(device, 4)
    return lambda: x[[0, 2]]


@snippet("copy of an index to the device")
def indexing_by_a_host_tensor(device: str) -> Body:
    x = numbers(device, 4)
    return lambda: x[torch.tensor([0, 2])]


@snippet("scalar read")
def split_by_a_tensor(device: str) -> Body:
    x, size = numbers(device, 4), torch.tensor(2).to(device)
    return lambda: x.split(size)


@snippet("scalar read")
def is_nonzero(device: str) -> Body:
    x = numbers(device, 1)
    return lambda: torch.is_nonzero(x)


@snippet("scalar read")
def contains(device: str) -> Body:
    x = numbers(device, 4)
    return lambda: 3.0 in x


@snippet("scalar read")
def a_tensor_of_device_scalars(device: str) -> Body:
    x = numbers(device, 4)
    return lambda: torch.tensor([x.sum(), x.max()])


@snippet("scalar read")
def masked_fill_by_a_device_scalar(device: str) -> Body:
    x, value = numbers(device, 4), torch.tensor(2.0).to(device)
    return lambda: x.masked_fill(x > 1, value)


@snippet("indexing by a mask")
def a_slice_and_a_mask(device: str) -> Body:
    x, mask = numbers(device, 2, 4), numbers(device, 4) > 1
    return lambda: x[:, mask]


@snippet(
    "indexing by a mask",
    "indexing by a mask (backward of IndexPutBackward0)",
    "indexing by a mask (backward of IndexPutBackward0)",
)
def the_backward_of_assigning_by_a_mask(device: str) -> Body:
    x, values = numbers(device, 4, grad=True), numbers(device, 2, grad=True)

    def body() -> None:
        y = x * 2
        y[x > 1] = values
        y.sum().backward()

    return body


@snippet("one_hot without num_classes")
def one_hot_without_its_number_of_classes(device: str) -> Body:
    x = torch.tensor([0, 2]).to(device)
    return lambda: torch.nn.functional.one_hot(x)


@snippet("error check")
def a_matrix_inverse(device: str) -> Body:
    x = torch.eye(3).to(device)
    return lambda: torch.linalg.inv(x)


@snippet("copy to the device")
def new_tensor(device: str) -> Body:
    x = numbers(device, 4)
    return lambda: x.new_tensor([1.0, 2.0])


@snippet("copy to the device")
def copying_a_host_tensor_into_a_device_tensor(device: str) -> Body:
    x = numbers(device, 4)
    return lambda: x.copy_(torch.arange(4.0))


@snippet("copy from the device")
def copying_a_device_tensor_into_a_host_tensor(device: str) -> Body:
    x = numbers(device, 4)
    return lambda: torch.empty(4).copy_(x).tolist()


@snippet("copy to the device")
def a_blocking_copy_of_pinned_memory(device: str) -> Body:
    x = numbers(device, 4)
    return lambda: pinned(device).to(x.device)


# Before 2.15 a single element has the shape of the number, which is then copied; a slice is filled.
@snippet("copy to the device", fills=())
def a_number_to_one_element(device: str) -> Body:
    x = numbers(device, 4)

    def body() -> None:
        x[0] = 1.0

    return body


@snippet("copy to the device", "copy to the device (backward of IndexPutBackward0)", fills=())
def a_number_at_device_indices_and_its_backward(device: str) -> Body:
    x, index = numbers(device, 4, grad=True), torch.tensor([2, 0]).to(device)

    def body() -> None:
        y = x * 2
        y[index] = 1.0
        y.sum().backward()

    return body


@snippet(
    "copy of an index to the device",
    "copy of an index to the device (backward of IndexPutBackward0)",
    "copy to the device",
    "copy to the device (backward of IndexPutBackward0)",
    fills=(
        "copy of an index to the device",
        "copy of an index to the device (backward of IndexFillBackward0)",
    ),
)
def a_number_at_a_host_index_and_its_backward(device: str) -> Body:
    x = numbers(device, 4, grad=True)

    def body() -> None:
        y = x * 2
        y[torch.tensor([0, 2])] = 1.0
        y.sum().backward()

    return body


@snippet(
    "copy of an index to the device",
    "copy of an index to the device (backward of IndexPutBackward0)",
    "copy to the device",
    "copy to the device (backward of IndexPutBackward0)",
    fills=(
        "copy of an index to the device",
        "copy of an index to the device (backward of MaskedFillBackward0)",
    ),
)
def a_number_at_a_host_mask_and_its_backward(device: str) -> Body:
    x = numbers(device, 4, grad=True)

    def body() -> None:
        y = x * 2
        y[torch.tensor([True, False, True, False])] = 1.0
        y.sum().backward()

    return body


@snippet(
    "copy of an index to the device",
    "copy to the device",
    fills=("copy of an index to the device",),
)
def a_number_at_a_slice_and_a_host_index(device: str) -> Body:
    x = numbers(device, 2, 4)

    def body() -> None:
        x[:, torch.tensor([0, 2])] = 1.0

    return body


@snippet(
    "copy of an index to the device",
    "copy to the device",
    fills=("copy of an index to the device",),
)
def a_number_at_a_python_list(device: str) -> Body:
    x = numbers(device, 4)

    def body() -> None:
        x[[0, 2]] = 1.0

    return body


@snippet("copy to the device", fills=())
def a_number_at_two_device_indices(device: str) -> Body:
    x, index = numbers(device, 3, 3), torch.tensor([2, 0]).to(device)

    def body() -> None:
        x[index, index] = 1.0

    return body


@snippet("copy to the device", fills=())
def a_number_at_an_int32_index(device: str) -> Body:
    x, index = numbers(device, 4), torch.tensor([2, 0], dtype=torch.int32).to(device)

    def body() -> None:
        x[index] = 1.0

    return body


@snippet("copy to the device", "indexing by a mask", fills=("indexing by a mask",))
def a_number_at_a_mask_and_an_index(device: str) -> Body:
    x, index = numbers(device, 3, 3), torch.tensor([2, 0]).to(device)
    mask = index.new_tensor([1, 0, 1]) > 0

    def body() -> None:
        x[mask, index] = 1.0

    return body


# Since 2.15 CUDA takes a 0-d index as it is, beside a number and beside a 0-d tensor of the same type.
@snippet("copy to the device", "scalar read", fills=())
def a_number_at_a_zero_dimensional_index(device: str) -> Body:
    x, at = numbers(device, 4), torch.tensor(2).to(device)

    def body() -> None:
        x[at] = 1.0

    return body


@snippet("scalar read", fills=())
def a_device_scalar_at_a_zero_dimensional_index(device: str) -> Body:
    x, at = numbers(device, 4), torch.tensor(2).to(device)
    value = torch.tensor(5.0).to(device)

    def body() -> None:
        x[at] = value

    return body


@snippet("scalar read")
def a_scalar_of_another_type_at_a_zero_dimensional_index(device: str) -> Body:
    x, at = numbers(device, 4), torch.tensor(2).to(device)
    value = torch.tensor(5).to(device)

    def body() -> None:
        x[at] = value

    return body


@snippet("copy to the device", "scalar read", fills=("scalar read",))
def a_number_at_a_zero_dimensional_index_of_one_byte(device: str) -> Body:
    x, at = numbers(device, 4), torch.tensor(2, dtype=torch.int8).to(device)

    def body() -> None:
        x[at] = 1.0

    return body


@snippet("scalar read")
def a_number_up_to_a_tensor(device: str) -> Body:
    x, stop = numbers(device, 4), torch.tensor(2).to(device)

    def body() -> None:
        x[:stop] = 1.0

    return body


@snippet("copy to the device")
def a_host_scalar_at_device_indices(device: str) -> Body:
    x, index = numbers(device, 4), torch.tensor([2, 0]).to(device)

    def body() -> None:
        x[index] = torch.tensor(1.0)

    return body


@snippet("indexing by a mask")
def a_device_scalar_by_a_mask(device: str) -> Body:
    x, value = numbers(device, 4), torch.tensor(1.0).to(device)

    def body() -> None:
        x[x > 1] = value

    return body


@snippet("copy of an index to the device")
def a_python_list_and_its_backward(device: str) -> Body:
    x = numbers(device, 4, grad=True)
    return lambda: x[[0, 2]].sum().backward()


@snippet(
    "copy of an index to the device",
    "copy of an index to the device (backward of IndexBackward0)",
)
def a_host_index_and_its_backward(device: str) -> Body:
    x = numbers(device, 4, grad=True)
    return lambda: x[torch.tensor([0, 2])].sum().backward()


@snippet("copy of an index to the device", "indexing by a mask")
def a_python_list_as_a_mask(device: str) -> Body:
    x = numbers(device, 3)
    return lambda: x[[True, False, True]]


@snippet("copy to the device", "copy from the device (backward of CloneBackward0)")
def the_backward_of_a_copy(device: str) -> Body:
    x = numbers(device, 4)

    def body() -> None:
        weight = torch.zeros(4, requires_grad=True)
        (weight.to(x.device) * x).sum().backward()

    return body


@snippet("tolist", "tolist (backward of ExpBackward0)")
def a_checkpoint_reads_twice(device: str) -> Body:
    x = numbers(device, 3, grad=True)

    def forward(y: torch.Tensor) -> torch.Tensor:
        y.tolist()
        return (y * torch.arange(3, device=y.device)).exp()

    run: Any = checkpoint
    return lambda: run(forward, x, use_reentrant=False).sum().backward()


# Code that does not.


@snippet()
def arithmetic_and_its_backward(device: str) -> Body:
    x = numbers(device, 3, 3, grad=True)
    return lambda: ((x @ x).softmax(-1) * 2).sum().backward()


@snippet()
def factories_on_the_device(device: str) -> Body:
    x = numbers(device, 4)
    return lambda: (
        torch.zeros(3, device=x.device) + torch.arange(3, device=x.device) + x.new_ones(3)
    )


@snippet()
def indexing_by_a_device_tensor(device: str) -> Body:
    x, index = numbers(device, 4, 2, grad=True), torch.tensor([2, 0]).to(device)
    return lambda: x[index].sum().backward()


@snippet()
def slices_by_python_ints(device: str) -> Body:
    x = numbers(device, 4, 4)
    return lambda: (x[1:3, 0], x[-1], x[:, None], x[..., 2])


@snippet()
def index_copy_and_index_add(device: str) -> Body:
    x, rows = numbers(device, 4, 2), numbers(device, 2, 2, grad=True)
    index = torch.tensor([2, 0]).to(device)
    return lambda: x.index_copy(0, index, rows).index_add(0, index, rows).sum().backward()


@snippet()
def masked_fill_and_three_armed_where(device: str) -> Body:
    x = numbers(device, 4, grad=True)
    choose: Any = torch.where
    return lambda: choose(x > 1, x, x.masked_fill(x > 2, 0.0)).sum().backward()


@snippet()
def filling_a_number_by_a_mask(device: str) -> Body:
    x = numbers(device, 4)

    def body() -> None:
        x[x > 1] = 0.0

    return body


@snippet()
def the_forward_of_masked_scatter(device: str) -> Body:
    x, mask = numbers(device, 4), numbers(device, 4) > 1
    return lambda: x.masked_scatter(mask, x)


@snippet()
def repeat_interleave_with_its_output_size(device: str) -> Body:
    x, counts = numbers(device, 2), torch.tensor([1, 2]).to(device)
    return lambda: x.repeat_interleave(counts, output_size=3)


@snippet()
def repeat_interleave_by_an_int(device: str) -> Body:
    x = numbers(device, 2)
    return lambda: x.repeat_interleave(3)


@snippet()
def split_by_python_ints(device: str) -> Body:
    x = numbers(device, 5)
    return lambda: x.split([2, 3])


@snippet()
def a_change_of_dtype(device: str) -> Body:
    x = numbers(device, 3)
    return lambda: (x.to(torch.float16), x.long(), x.to(x.device), x.type_as(x.double()))


@snippet()
def an_empty_tensor_on_the_device(device: str) -> Body:
    x = numbers(device, 3)
    return lambda: torch.tensor([], device=x.device)


@snippet()
def host_tensors_read_on_the_host(device: str) -> Body:
    grid = [[1, 4, 4], [2, 2, 2]]

    def body() -> list[int]:
        on_host = torch.tensor(grid)
        areas = on_host[:, 1] * on_host[:, 2]
        lengths = areas.repeat_interleave(on_host[:, 0])
        return [*lengths.cumsum(0).tolist(), int(areas.max()), *areas[areas > 4].tolist()]

    return body


@snippet()
def a_host_scalar_beside_a_device_tensor(device: str) -> Body:
    x = numbers(device, 3)
    return lambda: x * torch.tensor(2.0)


@snippet()
def shapes_and_devices(device: str) -> Body:
    x = numbers(device, 3, 2)
    return lambda: (x.shape[0] + len(x) + x.numel(), x.device == x.device, x.dtype)


@snippet()
def sdpa_and_its_backward(device: str) -> Body:
    x = numbers(device, 1, 1, 4, 8, grad=True)
    attend: Any = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(x, x, x, is_causal=True).sum().backward()


@snippet()
def cross_entropy_and_its_backward(device: str) -> Body:
    x, labels = numbers(device, 3, 4, grad=True), torch.tensor([1, -100, 2]).to(device)
    loss: Any = torch.nn.functional.cross_entropy
    return lambda: loss(x, labels).backward()


@snippet()
def filling_a_number_by_a_mask_and_its_backward(device: str) -> Body:
    x = numbers(device, 4, grad=True)

    def body() -> None:
        y = x * 2
        y[x > 1] = 0.0
        y.sum().backward()

    return body


@snippet()
def filling_a_number_by_a_slice_and_a_mask(device: str) -> Body:
    x, mask = numbers(device, 2, 4), numbers(device, 4) > 1

    def body() -> None:
        x[:, mask] = 0.0

    return body


@snippet()
def filling_a_host_scalar_by_a_mask(device: str) -> Body:
    x = numbers(device, 4)

    def body() -> None:
        x[x > 1] = torch.tensor(0.0)

    return body


@snippet()
def a_number_to_a_slice(device: str) -> Body:
    x = numbers(device, 4)

    def body() -> None:
        x[1:3] = 0.0

    return body


@snippet()
def copies_that_do_not_block(device: str) -> Body:
    x = numbers(device, 4)
    return lambda: (
        pinned(device).to(x.device, non_blocking=True),
        x.to("cpu", non_blocking=True),
    )


@snippet()
def one_hot_with_its_number_of_classes(device: str) -> Body:
    x = torch.tensor([0, 2]).to(device)
    return lambda: torch.nn.functional.one_hot(x, 3)


@snippet()
def padding_and_vmap(device: str) -> Body:
    x = numbers(device, 3, 2)
    pad: Any = torch.nn.utils.rnn.pad_sequence
    return lambda: (pad([x, x[:2]]), torch.vmap(lambda row: row + row.sum())(x))


@snippet()
def sampling_sorting_and_membership(device: str) -> Body:
    x = numbers(device, 4)
    return lambda: (torch.multinomial(x + 1, 2), x.sort(), x.topk(2), torch.isin(x, x[:2]))


@snippet()
def the_first_steps_of_an_optimizer(device: str) -> Body:
    x = numbers(device, 4, grad=True)
    optimizer = torch.optim.AdamW([x])

    def body() -> None:
        for _ in range(2):
            (x * x).sum().backward()
            torch.nn.utils.clip_grad_norm_([x], 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return body

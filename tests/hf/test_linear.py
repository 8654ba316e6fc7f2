"""Linear attention over a flattened row: one call a layer, by transformers' reference or by kernels."""

from __future__ import annotations

import copy
import inspect
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    causal_conv1d_fn,
    torch_chunk_gated_delta_rule,
)

from hf.test_one_graph import SHAPES, collate, examples_of, fresh_dynamo, model_of_depth, step
from hf.test_replaced_forwards import doubled
from mrope import MRopeError, Shapes
from mrope.collate.linear_columns import GAP
from mrope.hf import attach, compile_layers, fused, linear, text
from mrope.hf.delta_rule import gated_delta_rule
from mrope.hf.linear import _convolve, _mix_row
from mrope.spec import ONE_DIMENSIONAL
from support.models import PLAIN_FAMILIES, tiny_examples, tiny_model

# dynamo looks at the gradient of a layer's input, which is no leaf.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

FAMILY = "qwen3_5"
PLAIN = [one for one in PLAIN_FAMILIES if ONE_DIMENSIONAL[one].packs]
REFERENCE = inspect.unwrap(torch_chunk_gated_delta_rule)


RUNGS = replace(SHAPES, tokens=(512,), tokens_per_example=32)


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


def rows_of(lengths: list[int], family: str = FAMILY) -> list[dict[str, Any]]:
    """Examples of text, filled up by these lengths."""
    [first] = tiny_examples(family, images=False, videos=False, rows=1)
    examples = []
    for length in lengths:
        one = copy.deepcopy(first)
        ids = [*map(int, one["input_ids"]), *[9 + n % 50 for n in range(length)]]
        one["input_ids"] = torch.tensor(ids)
        one["labels"] = one["input_ids"].clone()
        if "mm_token_type_ids" in one:
            kinds = torch.zeros(len(ids), dtype=torch.long)
            given = torch.as_tensor(one["mm_token_type_ids"])
            kinds[: len(given)] = given
            one["mm_token_type_ids"] = kinds
        examples.append(one)
    return examples


# Segments of one chunk and of several, of a whole chunk, and of fewer tokens than taps.
LENGTHS = [1, 90, 2, 140, 40, 3]


@pytest.mark.parametrize("family", [FAMILY, *PLAIN])
def test_as_many_operators_for_thirty_examples_as_for_three(family: str) -> None:
    model: Any = attach(tiny_model(family).train())
    counts = []
    for examples in (3, 30):
        batch = collate(family, rows_of([4, 11, 30] * (examples // 3), family), "flatten", None)
        with Operators() as operators, torch.no_grad():
            model(**batch)
        counts.append(operators.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("shapes", [None, "fixed"])
@pytest.mark.parametrize("family", [FAMILY, "qwen3_5_moe", "qwen4_exp"])
def test_logits_loss_and_gradients_are_those_of_rows_alone(family: str, shapes: Any) -> None:
    examples = rows_of(LENGTHS) if family == FAMILY else examples_of(family)
    plain, model = model_of_depth(2, family), attach(model_of_depth(2, family))
    ladder = None if shapes is None else RUNGS
    compare_with_rows_alone(family, plain, model, examples, ladder)


@pytest.mark.parametrize("media", [True, False])
@pytest.mark.parametrize("family", PLAIN)
def test_so_they_are_with_positions_in_1_d(family: str, media: bool) -> None:
    examples = examples_of(family) if media else rows_of(LENGTHS, family)
    models = [tiny_model(family).train() for _ in range(2)]
    compare_with_rows_alone(family, models[0], attach(models[1]), examples, None)


def compare_with_rows_alone(
    family: str, plain: Any, model: Any, examples: Any, ladder: Shapes | None
) -> None:
    outputs = model(**dict(collate(family, examples, "flatten", ladder)))
    outputs.loss.backward()
    alone = [plain(**dict(collate(family, [one], None, None))) for one in examples]
    assert_as_rows_alone(outputs, alone, examples, model, plain)


def assert_as_rows_alone(
    outputs: Any, alone: list[Any], examples: Any, model: Any, plain: Any
) -> None:
    """A row's logits, loss and gradients are those that the plain model gives example by example.

    Gradients of the row are in `model`; those of `plain` are computed here.
    """
    logits, losses, learned = [], [], []
    for one, own in zip(examples, alone, strict=True):
        logits.append(own.logits[0])
        learned.append(int((one["labels"][1:] != -100).sum()))
        losses.append(own.loss * learned[-1])
    loss: Any = sum(losses) / sum(learned)
    loss.backward()
    expected = torch.cat(logits)
    assert (outputs.logits[0, : len(expected)] - expected).abs().max() < 1e-5
    assert (outputs.loss - loss).abs() < 1e-5
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if other.grad is not None and one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-5, msg=name)


def test_the_convolution_is_rounded_where_the_plain_model_rounds() -> None:
    layer = next(m for m in tiny_model(FAMILY).modules() if hasattr(m, "conv1d")).bfloat16()
    width: Any = layer.conv1d.weight.shape[0]
    states = torch.randn(1, 90, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight: Any = layer.conv1d.weight.squeeze(1)
    own = inspect.unwrap(causal_conv1d_fn)
    wanted = own(states.mT, weight, layer.conv1d.bias, layer.activation).mT
    apart = _convolve(layer, states, {"linear_places": torch.arange(90)[None]}) != wanted
    # Not 0 everywhere: float32 may add up the taps in another order.
    assert apart.float().mean() < 0.01


def test_padded_steps_can_run_the_rule_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU without kernels they do, where a step has no cache: the rule fills none."""
    ran: list[int] = []

    def rule(*parts: torch.Tensor) -> torch.Tensor:
        ran.append(1)
        return gated_delta_rule(*parts)

    model: Any = attach(tiny_model(FAMILY).train())
    batch = collate(FAMILY, examples_of(FAMILY), None, None)
    want, wanted = step(model, dict(batch))
    for module in (linear, text):
        monkeypatch.setattr(module, "lacks_kernels", lambda states: True)
    monkeypatch.setattr(linear, "gated_delta_rule", rule)
    loss, grads = step(model, dict(batch))
    assert ran
    assert (loss - want).abs() < 1e-6
    for name, grad in wanted.items():
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-6, msg=name)
    with torch.no_grad():
        assert model(**dict(batch), use_cache=True).past_key_values is not None


def test_a_gated_convolution_is_rounded_where_the_plain_model_rounds() -> None:
    torch.manual_seed(0)
    layer = next(
        m for m in tiny_model("lfm3_vl").modules() if type(m).__name__ == "Lfm3ShortConv"
    ).bfloat16()
    states = torch.randn(1, 90, 64).bfloat16()
    for mask in (None, torch.arange(90)[None] < 80):
        masked = states if mask is None else states * mask[..., None]
        apart = _mix_row(layer, masked, {}) != layer(states, attention_mask=mask)
        assert apart.float().mean() < 0.01


def test_a_foreign_forward_of_a_convolution_runs_segment_by_segment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family, examples = "lfm3_vl", rows_of(LENGTHS[:3], "lfm3_vl")
    model: Any = tiny_model(family)
    layer = next(m for m in model.modules() if type(m).__name__ == "Lfm3ShortConv")
    monkeypatch.setattr(type(layer), "forward", doubled(type(layer).forward))
    with torch.no_grad():
        alone = [model(**dict(collate(family, [one], None, None))).logits[0] for one in examples]
        logits = attach(model)(**collate(family, examples, "flatten", None)).logits[0]
    assert (logits - torch.cat(alone)).abs().max() < 1e-5


def test_a_foreign_forward_and_fixed_shapes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(FAMILY)
    layer = next(m for m in model.modules() if type(m).__name__ == "Qwen3_5GatedDeltaNet")
    monkeypatch.setattr(type(layer), "forward", doubled(type(layer).forward))
    attach(model)
    with pytest.raises(MRopeError, match="runs segment by segment"):
        model(**collate(FAMILY, examples_of(FAMILY), "flatten", SHAPES))


def test_a_convolution_that_looks_over_the_gap_is_refused() -> None:
    model = tiny_model(FAMILY)
    layer: Any = next(m for m in model.modules() if hasattr(m, "conv1d"))
    layer.conv1d.kernel_size = (GAP + 2,)
    with pytest.raises(MRopeError, match="convolutions of 10 tokens"):
        attach(model)(**collate(FAMILY, examples_of(FAMILY), "flatten", None))


def test_a_row_of_another_collator_is_refused() -> None:
    batch = collate(FAMILY, examples_of(FAMILY), "flatten", None)
    del batch["linear_slots"]
    with pytest.raises(MRopeError, match="has no linear_slots"):
        attach(tiny_model(FAMILY))(**batch)


def rule_by_chunks(
    query: Any, key: Any, value: Any, decay: Any, beta: Any, cu_seqlens: Any, chunks: Any
) -> Any:
    """Run the reference where the chunks say, as the kernels do: what no chunk names stays NaN."""
    if cu_seqlens is None:
        return REFERENCE(query, key, value, decay, beta, use_qk_l2norm_in_kernel=True)[0]
    out = torch.full_like(value, float("nan"))
    for segment in dict.fromkeys(chunks[:, 0].tolist()):
        begin, end = cu_seqlens[segment : segment + 2].tolist()
        part = slice(begin, end)
        parts = [one[:, part] for one in (query, key, value, decay, beta)]
        whole = REFERENCE(*parts, use_qk_l2norm_in_kernel=True)[0]
        for number in chunks[chunks[:, 0] == segment, 1].tolist():
            at = slice(begin + 64 * number, min(begin + 64 * (number + 1), end))
            out[:, at] = whole[:, 64 * number : 64 * number + max(0, at.stop - at.start)]
    return out


class Halves:
    """In place of the package's autograd function."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Any,
        k: Any,
        v: Any,
        g: Any,
        beta: Any,
        scale: float,
        initial_state: Any,
        output_final_state: bool,
        chunk_indices: Any = None,
        cu_seqlens: Any = None,
        use_qk_l2norm_in_kernel: bool = False,
    ) -> Any:
        assert use_qk_l2norm_in_kernel and scale == q.shape[-1] ** -0.5
        assert initial_state is None and not output_final_state
        ctx.save_for_backward(q, k, v, g, beta, cu_seqlens, chunk_indices)
        return rule_by_chunks(q, k, v, g, beta, cu_seqlens, chunk_indices), None

    @staticmethod
    def backward(ctx: Any, gradient: Any, _: Any) -> Any:
        # Within an operator no autograd runs, which the stand-in needs, unlike kernels.
        core: Any = torch._C
        excluded = core._dispatch_tls_local_exclude_set()
        for name in ("AutogradFunctionality", "ADInplaceOrView"):
            excluded = excluded.remove(getattr(core.DispatchKey, name))
        included = core._dispatch_tls_local_include_set()
        with core._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
            parts = [one.detach().requires_grad_() for one in ctx.saved_tensors[:5]]
            out = rule_by_chunks(*parts, *ctx.saved_tensors[5:])
            return (*torch.autograd.grad(out, parts, gradient), *[None] * 6)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand-ins for flash-linear-attention, on a CPU."""
    calls = SimpleNamespace(rule=0)

    def rule(q: Any, k: Any, v: Any, **options: Any) -> Any:
        calls.rule += 1
        assert options.pop("use_qk_l2norm_in_kernel")
        return rule_by_chunks(q, k, v, *options.values()), None

    monkeypatch.setattr(fused, "can_run", lambda tensor: True)
    monkeypatch.setattr(fused, "_find", lambda names: Halves if names == fused._HALVES else rule)
    return calls


@pytest.mark.parametrize("shapes", [None, "fixed"])
def test_kernels_take_borders_and_chunks(kernels: SimpleNamespace, shapes: Any) -> None:
    examples, ladder = rows_of(LENGTHS), None if shapes is None else RUNGS
    model: Any = attach(model_of_depth(2, FAMILY))
    batch = collate(FAMILY, examples, "flatten", ladder)
    loss, grads = step(model, dict(batch))
    assert kernels.rule > 0
    plain = model_of_depth(2, FAMILY)
    want, wanted = step(plain, collate(FAMILY, examples, None, None))
    assert (loss - want).abs() < 1e-5
    for name, grad in wanted.items():
        if grad is not None:
            torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("packing", [None, "flatten"])
def test_layers_with_kernels_compile(kernels: SimpleNamespace, packing: Any) -> None:
    model: Any = attach(model_of_depth(2, FAMILY))
    batch = collate(FAMILY, rows_of([20, 70]), packing, RUNGS)
    want, wanted = step(model, dict(batch))
    before = kernels.rule
    with fresh_dynamo() as counted:
        compile_layers(model, backend="aot_eager")
        loss, grads = step(model, dict(batch))
        assert not counted["graph_break"]
    assert kernels.rule == before  # the operator runs the halves
    assert (loss - want).abs() < 1e-5
    for name, grad in wanted.items():
        if grad is not None:
            torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("packing", [None, "flatten"])
def test_layers_compile_without_kernels(packing: Any) -> None:
    model: Any = attach(model_of_depth(2, FAMILY))
    batch = collate(FAMILY, rows_of([20, 40]), packing, replace(RUNGS, tokens=(128,)))
    want, wanted = step(model, dict(batch))
    with fresh_dynamo() as counted:
        compile_layers(model, backend="aot_eager")
        loss, grads = step(model, dict(batch))
        assert not counted["graph_break"]
    assert (loss - want).abs() < 1e-5
    for name, grad in wanted.items():
        if grad is not None:
            torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("has_kernels", [True, False])
def test_one_graph_more_where_an_example_is_wider(request: Any, has_kernels: bool) -> None:
    """Kernels read no rows of a padded call; without them each width of its rows has a graph."""
    if has_kernels:
        request.getfixturevalue("kernels")
    model: Any = attach(model_of_depth(2, FAMILY))
    rungs = replace(RUNGS, tokens=(2560,), tokens_per_example=640)
    shapes, graphs = [], []
    with fresh_dynamo() as counted, torch.no_grad():
        compile_layers(model, backend="eager")
        for lengths in ([40, 90], [60, 300], [1100, 20]):
            batch = collate(FAMILY, rows_of(lengths), "flatten", rungs)
            shapes.append(batch["linear_shape"])
            loss = model(**dict(batch)).loss
            graphs.append(counted["stats"]["unique_graphs"])
            plain = collate(FAMILY, rows_of(lengths), None, None)
            assert (loss - model_of_depth(2, FAMILY)(**plain).loss).abs() < 1e-5
    assert shapes[0] == shapes[1] != shapes[2]
    assert graphs[0] == graphs[1] == graphs[2] - (not has_kernels)


@pytest.mark.parametrize(
    ("capability", "triton", "refused"),
    [
        ((9, 0), "3.3.1", False),
        ((9, 0), "3.4.0", True),
        ((9, 0), "3.6.0+git1", True),
        ((9, 0), "3.7.0", True),
        ((9, 0), "3.7.1", False),
        ((9, 0), "3.10.0", False),
        ((8, 0), "3.6.0", False),
        ((10, 0), "3.6.0", False),
    ],
)
def test_where_the_package_refuses(
    capability: tuple[int, int], triton: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its gradients are wrong, training takes the rule in torch, and says so once."""
    monkeypatch.setattr(fused, "_find", lambda names: print)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=triton))
    has = {"triton": object()}.get
    monkeypatch.setattr(fused.importlib.util, "find_spec", has)  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    fused._is_refused.cache_clear()
    tensor: Any = SimpleNamespace(is_cuda=True)
    with pytest.warns(UserWarning, match="#640") if refused else nullcontext():
        assert fused.can_run(tensor) is not refused
    assert fused.can_run(tensor) is not refused
    with torch.no_grad():
        assert fused.can_run(tensor)
    fused._is_refused.cache_clear()


def test_the_operator_is_sound(kernels: SimpleNamespace) -> None:
    torch.manual_seed(0)
    query, key = (torch.randn(1, 9, 2, 4, requires_grad=True) for _ in range(2))
    value = torch.randn(1, 9, 4, 4, requires_grad=True)
    decay, beta = (-torch.rand(1, 9, 4)).requires_grad_(), torch.rand(1, 9, 4, requires_grad=True)
    borders = torch.tensor([0, 4, 9, 9], dtype=torch.int32)
    chunks = torch.tensor([[0, 0], [1, 0]], dtype=torch.int32)
    torch.library.opcheck(
        fused.delta_rule_operator, (query, key, value, decay, beta, borders, chunks)
    )

"""Adapted batches in the peers' own code, on the CPU.

All three peers ask for transformers older than what `make integration` has: 5.9.0 suits them all.
Where a peer, or that release, is missing, its tests are skipped: `make peers` sets them up.
"""

from __future__ import annotations

import importlib
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import mrope.collate.packing
from mrope import MRopeCollator, MRopeError, VisionSpec
from mrope.collate.padding import PaddingCollator
from mrope.hf import SyncReport, attach
from mrope.transforms import extend
from mrope.transforms.adapters import to_ms_swift, to_veomni, to_verl
from support.models import model_config, tiny_examples, tiny_spec

ATOL = 1e-5
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# Folder of VeOmni's patched model, and the prefix of its classes.
VEOMNI = {
    "qwen2_vl": ("qwen2_vl", "Qwen2VL"),
    "qwen2_5_vl": ("qwen2_5vl", "Qwen2_5_VL"),
    "qwen3_vl": ("qwen3_vl", "Qwen3VL"),
    "qwen3_vl_moe": ("qwen3_vl_moe", "Qwen3VLMoe"),
    "qwen3_5": ("qwen3_5", "Qwen3_5"),
}
# VeOmni's linear attention has no path for the CPU.
RUN_ON_CPU = [family for family in VEOMNI if family != "qwen3_5"]

# The peers' own calls of what others deprecate, and their notes on engines that are not there.
pytestmark = pytest.mark.filterwarnings("ignore")


def peer(module: str, pin: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            module,
            reason=f"{module} cannot be imported: needs {pin} and transformers 5.9.0",
            exc_type=ImportError,
        )


@pytest.fixture(autouse=True)
def _packing_with_the_peers_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collator packs only for releases it was compared in; here it is compared with peers."""
    monkeypatch.setattr(mrope.collate.packing, "borders_reach_the_tower", lambda _: False)
    monkeypatch.setattr(mrope.collate.packing, "prove_if_unknown", lambda *_: None)


def flattened(family: str, examples: list[dict[str, Any]], multiple: int = 1) -> dict[str, Any]:
    collate = MRopeCollator(None, tiny_spec(family), packing="flatten", pad_to_multiple_of=multiple)
    return dict(collate(examples))


def padded(family: str, examples: list[dict[str, Any]], side: Any = "right") -> dict[str, Any]:
    return dict(MRopeCollator(PaddingCollator(padding_side=side), tiny_spec(family))(examples))


def assert_same(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    else:
        assert found == wanted


# ms-swift -----------------------------------------------------------------------------------------


def swift_collator(family: str, padding_free: bool) -> Any:
    """ms-swift's template of the Qwen models, with no more set than its collator looks at."""
    qwen = peer("swift.template.templates.qwen", "ms-swift 4.6.0")
    from support.models import tiny_model

    template = qwen.Qwen2VLTemplate.__new__(qwen.Qwen2VLTemplate)
    model = tiny_model(family)
    state: dict[str, Any] = {
        "version": "v2_5" if family == "qwen2_5_vl" else "v2",
        "padding_free": padding_free,
        "padding_side": "right",
        "mode": "train",
        "use_megatron": False,
        "model_meta": SimpleNamespace(is_multimodal=False),
        "sequence_parallel_size": 1,
        "processor": SimpleNamespace(pad_token_id=0),
        "_get_get_rope_index": lambda: model.model.get_rope_index,
    }
    vars(template).update(state)
    template.init_env_args()
    return template._data_collator


def swift_examples(family: str) -> list[dict[str, Any]]:
    """The examples as ms-swift encodes them: lists of ids, tensors of everything else."""
    return [
        {
            name: value.tolist()
            if name in ("input_ids", "labels", "second_per_grid_ts")
            else torch.as_tensor(value)
            for name, value in example.items()
        }
        | {"length": len(example["input_ids"])}
        for example in tiny_examples(family)
    ]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_ms_swift_makes_the_same_batch(family: str, packing: bool) -> None:
    wanted = swift_collator(family, packing)(swift_examples(family))
    made = flattened if packing else padded
    found = to_ms_swift(made(family, tiny_examples(family)))
    names = ["input_ids", "position_ids", "text_position_ids"]
    names += ["cu_seq_lens_q", "cu_seq_lens_k"] if packing else ["attention_mask", "labels"]
    for name in names:
        assert_same(found[name], wanted[name])
    if packing:
        assert found["max_length_q"] == int(wanted["max_length_q"])


def test_ms_swift_counts_our_borders() -> None:
    mixin = peer("swift.trainers.mixin", "ms-swift 4.6.0")
    batch = to_ms_swift(flattened("qwen3_vl", tiny_examples("qwen3_vl"), multiple=32))
    borders = mixin.SwiftMixin.get_cu_seqlens(None, batch["text_position_ids"], None)
    assert len(borders) == 5
    assert_same(borders, batch["cu_seq_lens_q"])


# verl ---------------------------------------------------------------------------------------------


def verl_micro_batch(batch: dict[str, Any], **options: Any) -> Any:
    """The padded batch as verl's engines get it: nested tensors without padding."""
    padding = peer("verl.workers.utils.padding", "verl 0.9.1")
    tensordict = importlib.import_module("tensordict")
    tools = importlib.import_module("verl.utils.tensordict_utils")
    names = ("input_ids", "attention_mask", "position_ids")
    data = tensordict.TensorDict(
        {name: batch[name] for name in names} | {"response_mask": batch["attention_mask"]},
        batch_size=len(batch["input_ids"]),
    )
    data = padding.left_right_2_no_padding(data)
    tools.assign_non_tensor(data, temperature=1.0, **options)
    tools.maybe_fix_3d_position_ids(data)
    return data


def verl_model_inputs(batch: dict[str, Any], **options: Any) -> dict[str, Any]:
    data = verl_micro_batch(batch, **options)
    engine = peer("verl.workers.engine.fsdp.transformer_impl", "verl 0.9.1")
    state = SimpleNamespace(
        pad_to_length=False, use_ulysses_sp=False, _get_packed_pad_size=lambda length: 0
    )
    inputs: dict[str, Any] = engine.FSDPEngineWithLMHead.prepare_model_inputs(state, data)[0]
    return inputs


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_verl_packs_to_our_flattened_row(family: str, side: Any) -> None:
    examples = tiny_examples(family)
    inputs = verl_model_inputs(to_verl(padded(family, examples, side)), use_remove_padding=True)
    wanted = flattened(family, examples)
    assert_same(inputs["position_ids"], wanted["position_ids"])
    assert_same(inputs["input_ids"], wanted["input_ids"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_verl_pads_to_model_layout(side: Any) -> None:
    examples = tiny_examples("qwen3_vl")
    batch = to_verl(padded("qwen3_vl", examples, side))
    inputs = verl_model_inputs(batch, use_remove_padding=False)
    right = padded("qwen3_vl", examples)
    valid = right["attention_mask"].bool()
    assert inputs["position_ids"].shape == (4, *valid.shape)
    assert_same(inputs["position_ids"][1:][:, valid], right["position_ids"][:, valid])
    columns = torch.arange(valid.shape[1]).expand_as(valid)
    assert_same(inputs["position_ids"][0][valid], columns[valid])


# VeOmni -------------------------------------------------------------------------------------------


def veomni_model(family: str, attention: str = "sdpa") -> Any:
    """VeOmni's patched model of `family`, small, in evaluation mode."""
    folder, prefix = VEOMNI[family]
    name = f"veomni.models.transformers.{folder}.generated.patched_modeling_{family}_gpu"
    module = peer(name, "VeOmni 0.1.12")
    from transformers import AutoConfig

    config = dict(model_config(family))
    torch.manual_seed(0)
    live = AutoConfig.for_model(config.pop("model_type"), **config)
    kind = getattr(module, f"{prefix}ForConditionalGeneration")
    return kind._from_config(live, attn_implementation=attention).eval()


def adapted(family: str, examples: list[dict[str, Any]], multiple: int = 1) -> dict[str, Any]:
    vision = VisionSpec.from_config(model_config(family))
    return to_veomni(flattened(family, examples, multiple), tiny_spec(family), vision)


@torch.no_grad()
def logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    found: torch.Tensor = model(**inputs).logits[0]
    return found


@pytest.mark.parametrize("family", VEOMNI)
def test_veomni_makes_the_same_metadata(family: str) -> None:
    batch = adapted(family, tiny_examples(family))
    metadata = batch.pop("multimodal_metadata")
    veomni_model(family).get_metadata_collate_func()(batch, {})
    assert metadata.keys() == batch["multimodal_metadata"].keys()
    for name, value in batch["multimodal_metadata"].items():
        assert_same(metadata[name], value)


def test_veomni_makes_the_same_batch() -> None:
    family = "qwen2_5_vl"
    hook = veomni_model(family).get_metadata_collate_func()
    collators = importlib.import_module("veomni.data.data_collator")
    batch = adapted(family, tiny_examples(family))
    borders = batch["cu_seq_lens_q"].tolist()
    features: list[dict[str, Any]] = []
    for number, example in enumerate(tiny_examples(family)):
        part = slice(borders[number], borders[number + 1])
        names = ("input_ids", "image_mask", "video_mask")
        features.append(
            {name: torch.as_tensor(value) for name, value in example.items()}
            | {name: batch[name][0, part] for name in names}
            | {"position_ids": batch["position_ids"][1:, 0, part]}
        )
    wanted = collators.MainCollator(metadata_collate_func=hook)(features)
    assert_same(batch["position_ids"][1:].transpose(0, 1), wanted["position_ids"])
    for name in ("input_ids", "image_mask", "video_mask", "cu_seq_lens_q", "max_length_q"):
        assert_same(batch[name], wanted[name])
    assert_same(batch["labels"][:, 1:], wanted["labels"][:, 1:])
    assert batch["multimodal_metadata"].keys() == wanted["multimodal_metadata"].keys()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", RUN_ON_CPU)
def test_veomni_s_model_keeps_examples_apart(family: str, attention: str) -> None:
    model = veomni_model(family, attention)
    examples = tiny_examples(family)
    batch = adapted(family, examples, multiple=16)
    together = logits(model, batch)
    for number, example in enumerate(examples):
        start, stop = batch["cu_seq_lens_q"][number : number + 2].tolist()
        alone = logits(model, adapted(family, [example]))
        torch.testing.assert_close(together[start:stop], alone, rtol=0, atol=ATOL)


@pytest.mark.parametrize("family", RUN_ON_CPU)
def test_veomni_s_model_reads_the_metadata(family: str) -> None:
    """Without it the model computes the same; with other borders in it, something else."""
    model = veomni_model(family)
    batch = adapted(family, tiny_examples(family))
    wanted = logits(model, batch)
    metadata = batch.pop("multimodal_metadata")
    torch.testing.assert_close(logits(model, batch), wanted, rtol=0, atol=ATOL)
    borders = metadata["vit_video_cu_seqlens"][[0, -1]]
    other = batch | {"multimodal_metadata": metadata | {"vit_video_cu_seqlens": borders}}
    assert (logits(model, other) - wanted).abs().max() > 1e-3


def step_syncs(model: Any, batches: list[dict[str, Any]]) -> tuple[list[float], int]:
    """Losses of steps, and the syncs of the forward and backward of the last."""
    report, losses = SyncReport(1, len(batches) - 1, quiet=True), []
    with report:
        for batch in DataLoader(batches, batch_size=None, pin_memory=True):  # type: ignore[arg-type]
            inputs = {
                name: value.to("cpu", non_blocking=True) if torch.is_tensor(value) else value
                for name, value in batch.items()
            }
            labels = inputs.pop("labels")[0, 1:]
            # VeOmni's own loss needs the kernels that its launcher sets.
            loss = torch.nn.functional.cross_entropy(model(**inputs).logits[0, :-1], labels)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.item())
            report.step()
    return losses, report.by_kind()["model"]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_veomni_s_own_hook_leaves_us_nothing(family: str) -> None:
    """Its towers read the metadata alone, and its models cannot be attached."""
    model = veomni_model(family).train()
    ours = [adapted(family, tiny_examples(family, seed=seed)) for seed in range(3)]
    none = [
        {name: value for name, value in batch.items() if name != "multimodal_metadata"}
        for batch in ours
    ]
    theirs = [dict(batch) for batch in none]
    for batch in theirs:
        model.get_metadata_collate_func()(batch, {})
    without, with_theirs, with_ours = (step_syncs(model, one) for one in (none, theirs, ours))
    assert without[0] == with_theirs[0] == with_ours[0]
    assert without[1] > with_theirs[1] == with_ours[1] > 0
    with pytest.raises(MRopeError, match=r"Model\.forward is `wrapper`"):
        attach(model)


def verl_rollout(family: str) -> tuple[dict[str, Any], list[dict[str, Any]], Any]:
    """Prompts padded on the left and responses padded on the right, as verl holds them."""
    examples = tiny_examples(family)
    for example in examples:
        example.pop("labels", None)
    prompts = padded(family, examples, "left")
    answers = torch.tensor([[11, 12, 13, 14], [21, 22, 0, 0], [31, 32, 33, 0]])
    batch = {
        **{name: prompts[name] for name in prompts if "pixel" in name or "grid_thw" in name},
        "input_ids": torch.cat((prompts["input_ids"], answers), 1),
        "attention_mask": torch.cat((prompts["attention_mask"], (answers > 0).long()), 1),
        "response_mask": (answers > 0).long(),
    }
    positions, _ = extend(
        tiny_spec(family),
        prompts["position_ids"],
        prompts["rope_deltas"],
        (answers > 0).sum(1),
        attention_mask=prompts["attention_mask"],
        width=answers.shape[1],
    )
    return batch, examples, positions


def verl_positions(family: str, batch: dict[str, Any], examples: list[dict[str, Any]]) -> Any:
    """Return position ids (B, 4, S) as verl's agent loop computes them, row by row."""
    from support.models import tiny_model

    loop = peer("verl.experimental.agent_loop.agent_loop", "verl 0.9.1")
    spec = tiny_spec(family)
    holder = SimpleNamespace(
        processor=SimpleNamespace(
            get_rope_index=tiny_model(family).model.get_rope_index,
            image_token_id=spec.image_token_id,
            video_token_id=spec.video_token_id,
        )
    )
    rows = []
    for row, example in enumerate(examples):
        media = {
            name: torch.as_tensor(example[name]) for name in example if name.endswith("grid_thw")
        }
        rows.append(
            loop.AgentLoopWorker._compute_position_ids(
                holder,
                batch["input_ids"][row : row + 1],
                batch["attention_mask"][row : row + 1],
                {**media, "mm_token_type_ids": torch.zeros(1)},
            )
        )
    return torch.cat(rows)


def verl_update(family: str, batch: dict[str, Any]) -> tuple[float, float]:
    """Return loss and gradient norm of an actor's update with a reference, by verl's own losses."""
    from support.models import tiny_model

    algorithms = peer("verl.trainer.ppo.core_algos", "verl 0.9.1")
    functional = importlib.import_module("verl.utils.torch_functional")
    mask, width = batch["response_mask"], batch["response_mask"].shape[1]
    given = {name: batch[name] for name in batch if "pixel" in name or "grid_thw" in name}
    logprobs = []
    for seed in (0, 1):
        model = tiny_model(family, seed=seed)
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"].transpose(0, 1),
            **given,
        ).logits[:, -width - 1 : -1]
        labels = batch["input_ids"][:, -width:]
        logprobs.append(functional.logprobs_from_logits(logits, labels, inplace_backward=False))
        if seed == 0:
            actor = model
    penalty = algorithms.kl_penalty(logprobs[0], logprobs[1].detach(), "low_var_kl")
    loss = -(logprobs[0] * mask).sum() + (penalty * mask).sum()
    loss.backward()
    norms = [p.grad.norm() for p in actor.parameters() if p.grad is not None]
    return loss.item(), torch.stack(norms).norm().item()


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_verl_updates_its_actor_at_extended_positions(family: str) -> None:
    batch, examples, positions = verl_rollout(family)
    own = {**batch, "position_ids": verl_positions(family, batch, examples)}
    ours = to_verl({**batch, "position_ids": positions})
    assert_same(ours["position_ids"], own["position_ids"])
    assert verl_update(family, ours) == verl_update(family, own)

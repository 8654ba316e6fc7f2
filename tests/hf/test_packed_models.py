"""Examples in one row never see each other: each gives the logits that it gives alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf import test_omni_forwards as omni
from mrope import MRopeCollator, MRopeSpec
from mrope.collate.packing import Flatten
from mrope.hf import attach, attention, detach, text, varlen
from mrope.hf.rows import ROWS
from mrope.spec.families import Family, find_family
from mrope.towers import AudioSpec, VisionSpec
from mrope.training.step import guarded_step
from support.flash import by_segment
from support.models import (
    EAGER_FAMILIES,
    LIVE_FAMILIES,
    PLAIN_FAMILIES,
    media_of,
    model_config,
    tiny_examples,
    tiny_model,
    tiny_spec,
)

ATOL = 1e-4
LINEAR = ("qwen3_5", "qwen3_5_moe", "qwen4_exp", "lfm3_vl", "glm5_next")


def family_row(family: str) -> Family:
    row = find_family(family)
    assert row is not None
    return row


PACKED = [
    family
    for family in (*LIVE_FAMILIES, *PLAIN_FAMILIES, *EAGER_FAMILIES)
    if family_row(family).packs and family in ROWS
]
CASES = [(family, media) for family in PACKED for media in media_of(family)]
RUNS = [
    (family, media, attention)
    for family, media in CASES
    for attention in ("sdpa", "eager")
    if attention == "eager" or family not in EAGER_FAMILIES
]
Media = dict[str, bool]


def collator(family: str, **options: Any) -> MRopeCollator:
    vision = VisionSpec.from_config(model_config(family))
    if options.get("packing") == "flatten":
        options["attached"] = family_row(family).leaks
    return MRopeCollator(None, tiny_spec(family), vision, **options)


def model_of(family: str) -> Any:
    """Return a small model under sdpa, where it takes that."""
    return tiny_model(family, "eager" if family in EAGER_FAMILIES else "sdpa")


def mixed_examples(family: str, media: Media) -> list[dict[str, Any]]:
    """Three examples with images and clips, and one of text between them."""
    [text] = tiny_examples(family, images=False, videos=False, rows=1, seed=1)
    first, *rest = tiny_examples(family, **media)
    return [first, text, *rest]


def logits_alone(model: Any, family: str, examples: list[dict[str, Any]]) -> torch.Tensor:
    """Return the logits of each example, run alone and unpacked, one after another."""
    collate = collator(family)
    with torch.no_grad():
        return torch.cat([model(**collate([one])).logits[0] for one in examples])


def difference(model: Any, batch: Any, expected: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(**batch).logits[0]
    return float((logits[: len(expected)] - expected).abs().max())


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize(("family", "media", "attention"), RUNS)
def test_the_logits_are_those_of_each_example_alone(
    family: str, media: Media, attention: str, multiple: int
) -> None:
    examples = mixed_examples(family, media)
    batch = collator(family, packing="flatten", pad_to_multiple_of=multiple)(examples)
    assert batch["input_ids"].shape[1] % multiple == 0
    model = tiny_model(family, attention)
    expected = logits_alone(model, family, examples)
    if family in LINEAR:
        # Its linear layers need kernels that keep borders; without these it says so, and leaks not.
        with pytest.raises(ValueError, match="can't keep packed sequences apart"):
            model(**batch)
    else:
        assert difference(model, batch, expected) < ATOL
    attach(model)
    assert difference(model, batch, expected) < ATOL


@pytest.mark.parametrize(("family", "media", "attention"), RUNS)
def test_an_attached_model_does_not_sync(family: str, media: Media, attention: str) -> None:
    batch = collator(family, packing="flatten")(mixed_examples(family, media))
    guard = guarded_step(attach(tiny_model(family, attention).train()), batch)
    assert guard.count == 0, guard.report()


@pytest.mark.parametrize(("family", "media"), CASES)
def test_loss_and_gradients_are_those_of_the_padded_batch(family: str, media: Media) -> None:
    """The mean over tokens of a flattened batch is that of the padded one."""
    examples = mixed_examples(family, media)
    model = attach(model_of(family).train())
    steps = []
    for options in ({}, {"packing": "flatten"}):
        model.zero_grad()
        loss = model(**collator(family, **options)(examples)).loss
        loss.backward()
        gradients = torch.cat([p.grad.ravel() for p in model.parameters() if p.grad is not None])
        steps.append((loss.item(), gradients))
    (padded_loss, padded), (flat_loss, flat) = steps
    assert abs(padded_loss - flat_loss) < 1e-5
    torch.testing.assert_close(flat, padded, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "media"), CASES)
def test_a_leak_would_be_seen(family: str, media: Media) -> None:
    """Without the text row the unmodified model does not know where examples begin."""
    examples = mixed_examples(family, media)
    batch = dict(collator(family, packing="flatten")(examples))
    model = model_of(family)
    expected = logits_alone(model, family, examples)
    borders = [name for name in batch if name.startswith(("cu_seq_lens", "max_length", "seq_idx"))]
    for name in borders:
        del batch[name]
    positions = batch["position_ids"]
    plain = positions.ndim == 2  # 1-D
    batch["position_ids"] = torch.arange(positions.shape[1])[None] if plain else positions[1:]
    assert difference(model, batch, expected) > 100 * ATOL


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", omni.KINDS)
@pytest.mark.parametrize("family", omni.FAMILIES)
def test_thinkers_give_the_logits_of_the_padded_batch(
    family: str, kind: str, attention: str
) -> None:
    """A row of the padded batch is one example; audio, its length in videos too, goes along."""
    model = omni.make_model(family, attention).eval()
    plain, padded = omni.make_batches(family, kind, padded=True)
    config = model.config
    collate = MRopeCollator(
        lambda _: dict(plain),
        MRopeSpec.from_config(config),
        VisionSpec.from_config(config),
        audio=AudioSpec.from_config(config),
        packing=Flatten(pad_to_multiple_of=8),
    )
    batch = collate(None)
    assert batch["position_ids"].dtype == padded["position_ids"].dtype
    with torch.no_grad():
        expected = model(**padded).logits[padded["attention_mask"].bool()]
    assert difference(model, batch, expected) < ATOL
    attach(model)
    assert difference(model, batch, expected) < ATOL
    guard = guarded_step(model.train(), batch)
    assert guard.count == 0, guard.report()


@pytest.mark.parametrize("family", ["exaone4_5", "lfm3_vl"])
def test_windows_of_text_layers_are_left_to_the_kernel(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable-length kernel takes windows and borders, and no mask; on a CPU a stand-in."""
    windows = []

    def kernel(query: Any, key: Any, value: Any, borders: Any, *_: Any, **options: Any) -> Any:
        before, behind = options.get("window_size", (-1, -1))
        windows.append(before)
        sizes, causal = borders.diff().tolist(), behind == 0
        return by_segment(query, key, value, sizes, causal, options["scale"], before)

    examples = mixed_examples(family, media_of(family)[0])
    model = model_of(family)
    expected = logits_alone(model, family, examples)
    batch = collator(family, packing="flatten")(examples)
    monkeypatch.setattr(varlen, "_KERNEL", kernel)
    for module in (text, attention):
        monkeypatch.setattr(module, "can_attend", lambda tensor: True)
    assert difference(attach(model), batch, expected) < ATOL
    width = model.config.text_config.sliding_window
    assert width < batch["max_length_q"] and {*windows} == {-1, width - 1}


@pytest.mark.parametrize("what", ["use_cache", "positions", "mask"])
def test_each_part_of_the_batch_is_needed(what: str) -> None:
    """What the test above would see if a part were missing: the examples do leak into each other."""
    examples = mixed_examples("qwen2_vl", {"images": True, "videos": True})
    batch = dict(collator("qwen2_vl", packing="flatten")(examples))
    model = tiny_model("qwen2_vl")
    expected = logits_alone(model, "qwen2_vl", examples)
    if what == "use_cache":
        del batch["use_cache"]
    elif what == "positions":
        batch["position_ids"] = batch["position_ids"][1:]
    else:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    assert difference(model, batch, expected) > 100 * ATOL


@pytest.mark.parametrize("packing", [None, "flatten"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "qwen3_5"])
@pytest.mark.parametrize("rows", [3, 4])
def test_attached_models_take_either_layout(family: str, packing: Any, rows: int) -> None:
    """With 3 rows and with 4, where the shape does not tell the layouts apart."""
    examples = tiny_examples(family, rows=rows)
    model = attach(tiny_model(family))
    with torch.no_grad():
        expected = model(**collator(family, packing=packing)(examples)).logits
        batch = collator(family, packing=packing, layout="batch")(examples)
        assert len(batch["position_ids"]) == len(batch["input_ids"])
        assert torch.equal(model(**batch).logits, expected)


def test_a_text_only_batch_without_vision_tensors_keeps_its_borders() -> None:
    for family in ("qwen2_vl", "qwen3_5"):
        examples = tiny_examples(family, images=False, videos=False)
        batch = MRopeCollator(None, tiny_spec(family), packing="flatten")(examples)
        model = model_of(family)
        expected = logits_alone(model, family, examples)
        attach(model)
        assert difference(model, batch, expected) < ATOL
        detach(model)

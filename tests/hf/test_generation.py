"""Generation from batches of the stage: the tokens that the plain batch gives, attached or not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", "5.24")
peft = pytest.importorskip("peft")

from transformers import GenerationConfig, Seq2SeqTrainer, Seq2SeqTrainingArguments

from mrope import MRopeCollator, MRopeError, Shapes, VisionSpec
from mrope.collate.padding import PaddingCollator
from mrope.hf import attach, for_generate
from support.attachable import FAMILIES, make_model, without_labels
from support.models import media_of, model_config, tiny_examples, tiny_model, tiny_spec

Call = Callable[..., torch.Tensor]
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


def for_generation(model: Any) -> Any:
    model.config.pad_token_id = model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.eval()


def tokens(model: Any, batch: Any, call: Call) -> torch.Tensor:
    torch.manual_seed(0)
    return call(model, **batch)


def assert_same_tokens(model: Any, plain: Any, batch: Any, call: Call) -> None:
    right = tokens(model, plain, call)
    assert torch.equal(tokens(model, batch, call), right)
    attached = attach(copy.deepcopy(model))
    assert torch.equal(tokens(attached, batch, call), right)
    assert torch.equal(tokens(attached, plain, call), right)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedily(family: str) -> None:
    plain, batch = without_labels(family)
    model = for_generation(make_model(family))
    assert_same_tokens(model, plain, batch, lambda one, **given: one.generate(**given, **GREEDY))


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_omni_thinker", "lfm3_vl"])
def test_without_a_cache_pixels_and_sound_come_at_each_step(family: str) -> None:
    plain, batch = without_labels(family)
    model = for_generation(make_model(family))
    assert_same_tokens(
        model, plain, batch, lambda one, **given: one.generate(**given, use_cache=False, **GREEDY)
    )
    if family == "qwen2_5_omni_thinker":  # and after it, a batch without the stage is refused
        with pytest.raises(MRopeError, match="without audio_padded_feature"):
            attach(model)(**plain)


KINDS: dict[str, dict[str, Any]] = {
    "sequences of one prompt": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "a static cache": {"cache_implementation": "static", "do_sample": False},
    "a generation config": {
        "generation_config": GenerationConfig(max_new_tokens=4, pad_token_id=0)
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "hunyuan_vl"])
def test_kinds_of_generation(family: str, kind: str) -> None:
    plain, batch = without_labels(family)
    model = for_generation(make_model(family))
    length = {} if "generation_config" in KINDS[kind] else {"max_new_tokens": 4}
    options = {**KINDS[kind], **length}
    assert_same_tokens(model, plain, batch, lambda one, **given: one.generate(**given, **options))


def of_rows(family: str, side: Any, rows: int) -> tuple[Any, Any]:
    inner = PaddingCollator(padding_side=side)
    stage = MRopeCollator(inner, tiny_spec(family), VisionSpec.from_config(model_config(family)))
    examples = tiny_examples(family, rows=rows, **media_of(family)[0])
    return dict(inner(copy.deepcopy(examples))), dict(stage(copy.deepcopy(examples)))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_assisted(family: str) -> None:
    plain, batch = of_rows(family, "left", rows=1)
    model, assistant = (for_generation(tiny_model(family)) for _ in range(2))

    def assisted(one: Any, **given: Any) -> torch.Tensor:
        found: torch.Tensor = one.generate(**given, assistant_model=assistant, **GREEDY)
        return found

    def looked_up(one: Any, **given: Any) -> torch.Tensor:
        found: torch.Tensor = one.generate(**given, prompt_lookup_num_tokens=2, **GREEDY)
        return found

    for call in (assisted, looked_up):
        assert_same_tokens(model, plain, batch, call)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_token_ids_by_position_and_by_their_other_name(family: str, side: str) -> None:
    plain, batch = of_rows(family, side, rows=3)
    model = for_generation(tiny_model(family))

    def by_position(one: Any, input_ids: torch.Tensor, **given: Any) -> torch.Tensor:
        found: torch.Tensor = one.generate(input_ids, **given, **GREEDY)
        return found

    def as_inputs(one: Any, input_ids: torch.Tensor, **given: Any) -> torch.Tensor:
        found: torch.Tensor = one.generate(inputs=input_ids, **for_generate(given), **GREEDY)
        return found

    for call in (by_position, as_inputs):
        assert_same_tokens(model, plain, batch, call)


def test_through_peft() -> None:
    plain, batch = of_rows("qwen3_vl", "left", rows=3)
    config = peft.LoraConfig(target_modules=["q_proj", "qkv"], init_lora_weights=False)
    model = for_generation(peft.get_peft_model(tiny_model("qwen3_vl"), config))
    assert_same_tokens(model, plain, batch, lambda one, **given: one.generate(**given, **GREEDY))


@pytest.mark.parametrize("options", [{"packing": "flatten"}, {"shapes": Shapes((256,), (512,))}])
def test_rows_that_are_no_prompts_are_refused(options: dict[str, Any]) -> None:
    vision = VisionSpec.from_config(model_config("qwen3_vl"))
    collate = MRopeCollator(None, tiny_spec("qwen3_vl"), vision, **options)
    batch = collate(tiny_examples("qwen3_vl", rows=2))
    with pytest.raises(MRopeError, match="generate takes rows of one prompt each"):
        for_generate(batch)
    with pytest.raises(MRopeError, match="generate takes rows of one prompt each"):
        attach(for_generation(tiny_model("qwen3_vl"))).generate(**batch, **GREEDY)


def predictions(folder: Path, collate: Any, attached: bool, rows: Any, **options: Any) -> Any:
    """Return what `Seq2SeqTrainer` generates and measures."""
    model = for_generation(tiny_model("qwen3_vl"))
    arguments = Seq2SeqTrainingArguments(
        str(folder),
        predict_with_generate=True,
        generation_max_length=60,
        remove_unused_columns=False,
        per_device_eval_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    trainer = Seq2SeqTrainer(attach(model) if attached else model, arguments, data_collator=collate)
    found = trainer.predict(rows)
    return found.predictions, found.metrics["test_loss"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"generation_num_beams": 2}])
def test_evaluation_that_generates(side: Any, options: dict[str, Any], tmp_path: Path) -> None:
    rows = tiny_examples("qwen3_vl", rows=4, images=True, videos=False)
    inner = PaddingCollator(padding_side=side)
    vision = VisionSpec.from_config(model_config("qwen3_vl"))
    stage = MRopeCollator(inner, tiny_spec("qwen3_vl"), vision)
    right, loss = predictions(tmp_path, inner, False, rows, **options)
    for attached in (False, True):
        found, its = predictions(tmp_path, stage, attached, rows, **options)
        assert (found == right).all()
        assert its == pytest.approx(loss, abs=1e-5)

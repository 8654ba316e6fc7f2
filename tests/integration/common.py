"""What the trainers' tests share: the rows, and the same training with the stage off and on."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig, Qwen2VLImageProcessorPil, Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin

from mrope import MRopeCollator, VisionSpec
from mrope.collate.collator import Collate
from mrope.collate.padding import PaddingCollator
from mrope.hf import attach
from mrope.training.demo.tokenizer import CHAT_TEMPLATE, build_tokenizer
from support.models import model_config, tiny_examples, tiny_model, tiny_spec

STEPS = 6
BATCH = 3
# Off: transformers computes positions for itself. On: it is given them. Attached: it only reads.
STAGES = ("off", "on", "attached")
# As much of a processor as lmms-engine's collators look at.
TEXT_PROCESSOR = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0, padding_side="right"))

Train = Callable[[Any, Collate], list[float]]


def rows(family: str, count: int = 20) -> list[dict[str, Any]]:
    """Rows of unequal length: in turn images with a clip, text alone, a clip with an image."""
    made: list[dict[str, Any]] = []
    for seed in range(-(-count // 3)):
        made += tiny_examples(family, rows=3, seed=seed)
    return made[:count]


def collator(family: str, inner: Collate | None = None, **options: Any) -> MRopeCollator:
    vision = VisionSpec.from_config(model_config(family))
    return MRopeCollator(inner, tiny_spec(family), vision, **options)


def loader(dataset: Any, collate: Collate, kind: Any = DataLoader, **options: Any) -> Any:
    """Shuffled batches, the same for the same rows; collated in two workers."""
    shuffle = {} if "sampler" in options else {"shuffle": True, "generator": seeded()}
    return kind(
        dataset, batch_size=BATCH, num_workers=2, collate_fn=collate, **{**shuffle, **options}
    )


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def prepared(stage: str, family: str, inner: Collate | None = None) -> tuple[Any, Collate]:
    """Return a model, the same for each stage, and the collate function that goes with it."""
    model = tiny_model(family).train()
    if stage == "off":
        return model, inner or PaddingCollator()
    return attach(model) if stage == "attached" else model, collator(family, inner)


def count_own_positions(model: Any) -> list[int]:
    """Count from now on how often a model computes positions: a list of one number, which grows."""
    calls, own = [0], model.model.get_rope_index

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return own(*args, **kwargs)

    model.model.get_rope_index = counted
    return calls


def assert_equal_losses(train: Train, family: str, inner: Collate | None = None) -> None:
    """Train at each stage from the same weights: every loss must be equal, to the last bit."""
    losses = {}
    for stage in STAGES:
        model, collate = prepared(stage, family, inner)
        calls = count_own_positions(model)
        losses[stage] = train(model, collate)
        assert (calls[0] > 0) == (stage == "off"), f"{stage}: {calls[0]} calls of get_rope_index"
    assert len(losses["off"]) == STEPS and len(set(losses["off"])) == STEPS
    assert losses["on"] == losses["off"]
    assert losses["attached"] == losses["off"]


class _Processor(Qwen3VLProcessor):  # type: ignore[misc]
    """Qwen3-VL's processor without the one for videos, which cannot be had without torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str) -> None:
        names = ("image_pad", "video_pad", "vision_start", "vision_end")
        for name in names:
            attribute, token = f"{name.removesuffix('_pad')}_token", f"<|{name}|>"
            setattr(self, attribute, token)
            setattr(self, f"{attribute}_id", tokenizer.convert_tokens_to_ids(token))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def build_processor(family: str) -> Any:
    """Return a processor that takes text and images, with the demo's tokenizer."""
    vision = AutoConfig.for_model(**model_config(family)).vision_config
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
    )
    image_processor.size = {"shortest_edge": 32**2, "longest_edge": 256**2}
    return _Processor(image_processor, build_tokenizer(), CHAT_TEMPLATE)


def import_lmms_engine() -> Callable[[str], Any]:
    """Return a function that imports a module of lmms-engine; skip the test where there is none."""
    with warnings.catch_warnings():
        # Its imports call what other packages deprecate.
        warnings.simplefilter("ignore")
        pytest.importorskip("lmms_engine", reason="needs an environment of its own: make peers")
        importlib.import_module("lmms_engine.launch.cli")
    return lambda name: importlib.import_module(f"lmms_engine.{name}")

"""Build batches of every kind, and collect the keys that the package puts into them."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hf.test_crop_forwards import FAMILY as CROPS
from hf.test_crop_forwards import make_batches as make_crops
from hf.test_omni_forwards import FAMILIES as THINKERS
from hf.test_omni_forwards import KINDS as MEDIA
from hf.test_omni_forwards import make_batches
from mrope import MRopeCollator, Shapes, VisionSpec, shard_sequence
from mrope.collate.padding import PaddingCollator
from mrope.transforms import to_ms_swift, to_veomni, to_verl
from support.models import (
    LIVE_FAMILIES,
    PLAIN_FAMILIES,
    SIZED_FAMILIES,
    media_of,
    model_config,
    tiny_examples,
    tiny_spec,
)

# Type and number of dimensions of a value: ("int64", 3), ("int", 0), ("list", 1).
Kind = tuple[str, int]
Pair = tuple[Mapping[str, Any], Mapping[str, Any]]

SHAPES = Shapes(
    tokens=(128, 256), patches=(128, 512), longest=128, patches_per_segment=8, tokens_per_example=8
)
ON_RUNGS = ("qwen3_vl", "qwen2_5_vl", "paddleocr_vl", "lfm3_vl")


def collect_keys() -> dict[str, set[Kind]]:
    """Return each key that was added, or replaced by another value, and what it held."""
    found: dict[str, set[Kind]] = defaultdict(set)
    for before, after in _pairs():
        for name, value in after.items():
            if name not in before or _changed(before[name], value):
                found[name].add(kind_of(value))
    return dict(found)


def kind_of(value: Any) -> Kind:
    """Return type and number of dimensions; those of a list are how deep it is nested."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype).removeprefix("torch."), value.ndim
    if isinstance(value, list):
        return "list", 1 + (kind_of(value[0])[1] if value else 0)
    return type(value).__name__, 0


def _changed(old: Any, new: Any) -> bool:
    # Token columns in one row, or on a rung, are what they were.
    if isinstance(old, torch.Tensor):
        return bool(old.dtype != new.dtype or old.ndim != new.ndim)
    return False


def _pairs() -> Iterator[Pair]:
    """Yield batches without and with what was added."""
    for family in sorted({*LIVE_FAMILIES, *PLAIN_FAMILIES, *SIZED_FAMILIES} - {CROPS}):
        for media in media_of(family):
            yield _collate(family, media)
            if tiny_spec(family).family_row.packs:
                yield _collate(family, media, packing="flatten")
    for family in THINKERS:
        for kind in MEDIA:
            yield make_batches(family, kind, padded=True)
    for video in (False, True):
        yield make_crops(padded=True, video=video)
    yield _with_experts()
    yield _with_mask()
    for packing in (None, "flatten"):
        yield _collate("qwen3_vl", layout="batch", packing=packing)
        for family in ON_RUNGS:
            yield _collate(family, media_of(family)[0], packing=packing, shapes=SHAPES)
        yield from _parts(packing)
    yield from _adapted()


def _collate(family: str, media: Mapping[str, bool] | None = None, **options: Any) -> Pair:
    examples = tiny_examples(family, **(media or {}))
    return _both(family, examples, **options)


def _both(family: str, examples: Any, **options: Any) -> Pair:
    vision = VisionSpec.from_config(model_config(family))
    if options.get("packing") == "flatten":
        options["attached"] = True
    collate = MRopeCollator(None, tiny_spec(family), vision, **options)
    return PaddingCollator()(copy.deepcopy(examples)), collate(copy.deepcopy(examples))


def _with_experts() -> Pair:
    family = "ernie4_5_vl_moe"
    examples = tiny_examples(family)
    collate = MRopeCollator(
        lambda rows: _typed(PaddingCollator()(rows)),
        tiny_spec(family),
        VisionSpec.from_config(model_config(family)),
    )
    return _typed(PaddingCollator()(examples)), collate(examples)


def _typed(batch: dict[str, Any]) -> dict[str, Any]:
    return batch | {"moe_mm_token_type_ids": torch.zeros_like(batch["input_ids"])}


def _with_mask() -> Pair:
    (example,) = tiny_examples("video_llama_3", images=False, rows=1)
    example["video_compression_mask"] = torch.ones(sum(example["input_ids"] == 6), dtype=torch.bool)
    return _both("video_llama_3", [example])


def _parts(packing: Any) -> Iterator[Pair]:
    for shapes in (None, SHAPES):
        examples = tiny_examples("qwen3_vl")
        for example in examples:
            example["labels"] = torch.as_tensor(example["input_ids"]).clone()
        _, batch = _both("qwen3_vl", examples, packing=packing, shapes=shapes)
        yield batch, shard_sequence(batch, 0, 2)
    _, batch = make_batches(THINKERS[0], MEDIA[0], padded=True)
    yield batch, shard_sequence(batch, 0, 2)


def _adapted() -> Iterator[Pair]:
    vision = VisionSpec.from_config(model_config("qwen2_5_vl"))
    for packing in (None, "flatten"):
        _, batch = _collate("qwen2_5_vl", packing=packing)
        yield batch, to_ms_swift(batch)
        if packing is None:
            yield batch, to_verl(batch)
        else:
            yield batch, to_veomni(batch, tiny_spec("qwen2_5_vl"), vision)

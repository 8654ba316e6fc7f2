"""What happens to samples between a data set and a model: each kind of damage by its name.

`EXAMPLE` damages one example of a batch, in place; `ARGUMENTS` what a merged batch hands over. A
kind that finds nothing to damage says so by returning False.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np

from fuzz.samples import COUNTS, SIZES, TOKENS, Arguments, Example
from mrope import MRopeSpec
from mrope.spec.families import NO_TOKEN

HUGE = [2**15, 2**16, 2**16 + 2, 2**20, 2**31, 2**32, 2**40, 2**62, 2**63 - 1]
NOT_POSITIVE = [0, -1, -2, -4, -(2**31), -(2**63)]
SECONDS = [float("nan"), float("inf"), float("-inf"), -1.0, -1e-30, 0.0, 1e-45, 1e9, 1e30, 3e38]
DTYPES = ["int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool", "float16",
          "float32", "float64", "complex64", "object", "U8"]  # fmt: skip

OfExample = Callable[[random.Random, MRopeSpec, Example], Any]
OfArguments = Callable[[random.Random, MRopeSpec, Arguments], Any]


def special_tokens(spec: MRopeSpec) -> list[int]:
    ids = [spec.image_token_id, spec.video_token_id, spec.vision_start_token_id]
    ids += [int(value) for name, value in spec.extra.items() if name.endswith("_id")]
    return [token for token in ids if token != NO_TOKEN]


def _cut(rng: random.Random, example: Example, start: int | None, stop: int | None) -> bool:
    """Remove tokens `start` to `stop`; None: an end of the row."""
    length = len(example["input_ids"])
    where = slice(0 if start is None else start, length if stop is None else stop)
    for name in set(TOKENS) & set(example):
        example[name] = np.delete(example[name], where)
    return bool(length)


def truncated_right(rng: random.Random, spec: MRopeSpec, example: Example) -> Any:
    return _cut(rng, example, rng.randrange(len(example["input_ids"])), None)


def truncated_left(rng: random.Random, spec: MRopeSpec, example: Example) -> Any:
    return _cut(rng, example, None, rng.randrange(len(example["input_ids"])) + 1)


def cut_out(rng: random.Random, spec: MRopeSpec, example: Example) -> Any:
    ends = sorted(rng.randrange(len(example["input_ids"]) + 1) for _ in range(2))
    return _cut(rng, example, ends[0], ends[1])


def emptied(rng: random.Random, spec: MRopeSpec, example: Example) -> Any:
    if rng.random() < 0.5:
        for name in set(SIZES) & set(example):
            del example[name]
    return _cut(rng, example, None, None)


def repeated_tokens(rng: random.Random, spec: MRopeSpec, example: Example) -> Any:
    at = rng.randrange(len(example["input_ids"]))
    part = slice(at, at + rng.choice([1, 1, 2, 5]))
    for name in set(TOKENS) & set(example):
        example[name] = np.insert(example[name], at, example[name][part])


def stray_token(rng: random.Random, spec: MRopeSpec, example: Example) -> Any:
    """A special token that was typed or sampled; its type is right, or that of text."""
    at = rng.randrange(len(example["input_ids"]) + 1)
    token = rng.choice(special_tokens(spec))
    kind = {spec.image_token_id: 1, spec.video_token_id: 2}.get(token, 0)
    if "mm_token_type_ids" in example:
        types = example["mm_token_type_ids"]
        example["mm_token_type_ids"] = np.insert(types, at, rng.choice([kind, kind, 0]))
    example["input_ids"] = np.insert(example["input_ids"], at, token)


def replaced_token(rng: random.Random, spec: MRopeSpec, example: Example) -> Any:
    at = rng.randrange(len(example["input_ids"]))
    token = rng.choice([7, 0, -1, -7, 2**31, 2**62, *special_tokens(spec)])
    example["input_ids"][at] = token
    if "mm_token_type_ids" in example and rng.random() < 0.5:
        kind = {spec.image_token_id: 1, spec.video_token_id: 2}.get(token, 0)
        example["mm_token_type_ids"][at] = kind


def wrong_types(rng: random.Random, spec: MRopeSpec, example: Example) -> Any:
    if "mm_token_type_ids" not in example:
        return False
    at = rng.randrange(len(example["input_ids"]))
    example["mm_token_type_ids"][at] = rng.choice([0, 1, 2, 3, -1, 255, 2**40])
    return None


def _sizes(rng: random.Random, example: Example, least: int = 1, axes: int = 1) -> str | None:
    names = [name for name in SIZES if name in example and len(example[name]) >= least]
    names = [name for name in names if example[name].ndim >= axes]
    return rng.choice(names) if names else None


def lost_size(rng: random.Random, spec: MRopeSpec, example: Example) -> Any:
    if (name := _sizes(rng, example)) is None:
        return False
    example[name] = np.delete(example[name], rng.randrange(len(example[name])), axis=0)
    return None


def doubled_size(rng: random.Random, spec: MRopeSpec, example: Example) -> Any:
    if (name := _sizes(rng, example)) is None:
        return False
    at = rng.randrange(len(example[name]))
    example[name] = np.insert(example[name], at, example[name][at], axis=0)
    return None


def swapped_sizes(rng: random.Random, spec: MRopeSpec, example: Example) -> Any:
    if (name := _sizes(rng, example, least=2)) is None:
        return False
    one, two = rng.sample(range(len(example[name])), 2)
    example[name][[one, two]] = example[name][[two, one]]
    return None


def turned_size(rng: random.Random, spec: MRopeSpec, example: Example) -> Any:
    """Height for width: as many tokens, and other positions."""
    if (name := _sizes(rng, example, axes=2)) is None:
        return False
    at = rng.randrange(len(example[name]))
    example[name][at, -2:] = example[name][at, -2:][::-1].copy()
    return None


def _changed(rng: random.Random, example: Example, value: Callable[[int], int]) -> Any:
    names = [name for name in SIZES if name in example and example[name].dtype.kind in "iu"]
    names = [name for name in names if example[name].size]
    if not names:
        return False
    flat = example[rng.choice(names)].reshape(-1)
    at = rng.randrange(len(flat))
    flat[at] = value(int(flat[at]))
    return None


def other_size(rng: random.Random, spec: MRopeSpec, example: Example) -> Any:
    step = rng.choice([-spec.spatial_merge_size, -1, 1, spec.spatial_merge_size])
    return _changed(rng, example, lambda value: value + step)


def huge_size(rng: random.Random, spec: MRopeSpec, example: Example) -> Any:
    return _changed(rng, example, lambda _: rng.choice(HUGE))


def size_below_one(rng: random.Random, spec: MRopeSpec, example: Example) -> Any:
    return _changed(rng, example, lambda _: rng.choice(NOT_POSITIVE))


def bad_seconds(rng: random.Random, spec: MRopeSpec, example: Example) -> Any:
    if not len(example.get("second_per_grid_ts", ())):
        return False
    seconds = example["second_per_grid_ts"]
    seconds[rng.randrange(len(seconds))] = rng.choice(SECONDS)
    return None


EXAMPLE: dict[str, OfExample] = {
    "truncated on the right": truncated_right,
    "truncated on the left": truncated_left,
    "a stretch cut out": cut_out,
    "no token left": emptied,
    "tokens repeated": repeated_tokens,
    "stray special token": stray_token,
    "token replaced": replaced_token,
    "wrong token type": wrong_types,
    "size lost": lost_size,
    "size doubled": doubled_size,
    "sizes swapped": swapped_sizes,
    "height for width": turned_size,
    "another size": other_size,
    "huge size": huge_size,
    "size below 1": size_below_one,
    "bad seconds": bad_seconds,
}


def _array(rng: random.Random, arguments: Arguments) -> str:
    return rng.choice([k for k, v in arguments.items() if isinstance(v, np.ndarray)])


def other_dtype(rng: random.Random, spec: MRopeSpec, arguments: Arguments) -> Any:
    name = _array(rng, arguments)
    arguments[name] = arguments[name].astype(rng.choice(DTYPES))


def as_lists(rng: random.Random, spec: MRopeSpec, arguments: Arguments) -> Any:
    for name, value in arguments.items():
        if isinstance(value, np.ndarray) and rng.random() < 0.5:
            arguments[name] = value.tolist()


def ragged(rng: random.Random, spec: MRopeSpec, arguments: Arguments) -> Any:
    """Lists of unequal length, or with a hole, or with something that is no number."""
    name = _array(rng, arguments)
    values: list[Any] = arguments[name].tolist()
    if not values:
        return False
    at = rng.randrange(len(values))
    if isinstance(values[at], list) and values[at] and rng.random() < 0.6:
        values[at] = values[at][: rng.randrange(len(values[at]))]
    else:
        values[at] = rng.choice([None, "7", [], [7, 7], {}, 1.5])
    arguments[name] = values
    return None


def other_mask(rng: random.Random, spec: MRopeSpec, arguments: Arguments) -> Any:
    mask = arguments["attention_mask"]
    way = rng.choice(
        ["holes", "values", "bool", "none valid", "all valid", "width", "rows", "lost"]
    )
    if way == "lost":
        arguments["attention_mask"] = None
    elif way == "bool":
        arguments["attention_mask"] = mask != 0
    elif way in ("none valid", "all valid"):
        arguments["attention_mask"] = np.full_like(mask, way == "all valid")
    elif way in ("width", "rows"):
        arguments["attention_mask"] = mask[:, 1:] if way == "width" else mask[1:]
    else:
        flat = mask.reshape(-1)
        for _ in range(rng.choice([1, 1, 3]) if mask.size else 0):
            flat[rng.randrange(len(flat))] = 0 if way == "holes" else rng.choice([2, -1, 255, 3])


def other_shape(rng: random.Random, spec: MRopeSpec, arguments: Arguments) -> Any:
    name = _array(rng, arguments)
    value = arguments[name]
    shapes = [value[None], value[..., None], value.reshape(-1), value.T, value[:0], value[..., :0]]
    shapes += [value[..., 1:], value[1:], np.array(value.size)]
    arguments[name] = rng.choice(shapes).copy()


def other_counts(rng: random.Random, spec: MRopeSpec, arguments: Arguments) -> Any:
    rows = len(arguments["input_ids"])
    names = set(COUNTS) & set(arguments) if spec.family_row.custom_index else COUNTS
    if not names:
        return False
    values = [0, 0, 1, 1, 2, 3, -1, 2**31, 2**63 - 1, -(2**63)]
    length = rng.choice([rows, rows, rows, rows - 1, rows + 1, 0])
    arguments[rng.choice(sorted(names))] = np.array(
        [rng.choice(values) for _ in range(length)], np.int64
    )
    return None


def other_seconds(rng: random.Random, spec: MRopeSpec, arguments: Arguments) -> Any:
    clips = len(arguments.get("video_grid_thw", ()))
    length = rng.choice([clips, clips, clips + 1, max(clips - 1, 0)])
    value: list[Any] = [rng.choice([0, 1, 2, 0.5, 1 / 3, *SECONDS, 10**30]) for _ in range(length)]
    arguments["second_per_grid_ts"] = rng.choice(
        [value, [value], ["1.0"] * clips, [None] * clips, 0.5]
    )


def lost_argument(rng: random.Random, spec: MRopeSpec, arguments: Arguments) -> Any:
    names = [name for name in arguments if name != "input_ids"]
    arguments[rng.choice(names)] = None


def other_flag(rng: random.Random, spec: MRopeSpec, arguments: Arguments) -> Any:
    if "use_audio_in_video" not in arguments:
        return False
    now = arguments["use_audio_in_video"]
    arguments["use_audio_in_video"] = rng.choice([not now, [now], [now, not now], 1, "yes", None])
    return None


ARGUMENTS: dict[str, OfArguments] = {
    "another dtype": other_dtype,
    "lists for arrays": as_lists,
    "ragged or not a number": ragged,
    "another mask": other_mask,
    "another shape": other_shape,
    "wrong counts": other_counts,
    "other seconds": other_seconds,
    "argument lost": lost_argument,
    "another flag": other_flag,
}

"""One row in every form in which data sets hold it, alone and beside others, in all three readers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mrope import MRopeCollator, MRopeError
from mrope.collate.padding import PaddingCollator
from mrope.collate.read import read_sample
from support.rows import FAMILIES, Row, assert_same_batch, errors_of, row_of
from support.specs import example_spec

pandas = pytest.importorskip("pandas")

EMPTY: dict[str, Any] = {
    "None": None,
    "NaN": float("nan"),
    "NaN of numpy": np.float64("nan"),
    "NA of pandas": pandas.NA,
    "list": [],
    "nested": [[]],
    "two nested": [[], []],
    "nulls": [None],
    "nulls in a list": [[None, None, None]],
    "tensor": torch.empty(0, 3),
    "flat tensor": torch.empty(0),
    "array": np.zeros((0, 3)),
    "integers": np.zeros((0, 3), np.int64),
    "objects": np.array([], object),
    "object None": np.array([None], object),
    "object of arrays": np.array([np.array([], object), None], object)[:1],
    "list of tensors": [torch.empty(0, 3)],
    "null of Arrow": pa.scalar(None, pa.list_(pa.list_(pa.int64()))),
    "empty in Arrow": pa.scalar([], pa.list_(pa.list_(pa.int64()))),
    "null in Arrow": pa.scalar([None], pa.list_(pa.list_(pa.int64()))),
}
COLUMNS = (
    "image_grid_thw",
    "video_grid_thw",
    "pixel_values",
    "pixel_values_videos",
    "second_per_grid_ts",
    "video_second_per_grid",
    "mm_token_type_ids",
    "attention_mask",
)
AUDIO = ("audio_seqlens", "feature_attention_mask", "input_features")


@pytest.mark.parametrize("form", EMPTY)
@pytest.mark.parametrize("family", FAMILIES)
def test_empty_columns_are_as_if_absent(family: str, form: str) -> None:
    spec = example_spec(family)
    columns = COLUMNS + (AUDIO if spec.family_row.custom_index else ())
    text = row_of(family)
    empty = text | dict.fromkeys(columns, EMPTY[form])
    assert set(errors_of(family, empty).values()) == {None}
    full = row_of(family, ((2, 4),), (2, 4, 4))
    for rows in itertools.permutations((0, 1, 2)):
        ours = [[empty, full, empty][row] for row in rows]
        theirs = [[text, full, text][row] for row in rows]
        expected = MRopeCollator(None, spec)(theirs)
        assert_same_batch(MRopeCollator(None, spec)(ours), expected)
        skipping = MRopeCollator(None, spec, on_error="skip", count_key="dropped")
        batch = skipping(ours)
        assert batch.pop("dropped") == 0
        assert_same_batch(batch, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_types_on_some_rows(family: str, side: Any) -> None:
    """Zeros where a row has no placeholder, else the types of its tokens: it is good alone."""
    spec = example_spec(family)
    rows = [row_of(family), row_of(family, ((2, 4),)), row_of(family, ((4, 4),), (2, 2, 2))]
    typed = PaddingCollator(padding_side=side)([one | {"mm_token_type_ids": types_of(family, one)}
                                                for one in rows])  # fmt: skip
    for lacking in ({0}, {1}, {2}, {0, 1}, {0, 2}, {1, 2}):
        examples = [
            one if row in lacking else one | {"mm_token_type_ids": types_of(family, one)}
            for row, one in enumerate(rows)
        ]
        batch = MRopeCollator(PaddingCollator(padding_side=side), spec)(examples)
        expected = typed["mm_token_type_ids"].clone()
        if spec.family_row.custom_index:  # its types do not follow from the placeholders
            expected[[row in lacking for row in range(3)]] = 0
        assert torch.equal(batch["mm_token_type_ids"], expected)
        skipping = MRopeCollator(None, spec, on_error="skip", count_key="dropped")
        assert skipping(examples)["dropped"] == 0


def types_of(family: str, row: Row) -> torch.Tensor:
    from mrope.positions.spans import token_types

    return torch.from_numpy(token_types(example_spec(family), row["input_ids"].numpy()))


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_types_that_are_there_must_still_agree(family: str) -> None:
    zeros = row_of(family, ((2, 4),))
    zeros["mm_token_type_ids"] = torch.zeros_like(zeros["input_ids"])
    typed = row_of(family, ((2, 4),))
    typed["mm_token_type_ids"] = types_of(family, typed)
    with pytest.raises(MRopeError, match="row 1, valid token 3: mm_token_type_ids says 0"):
        MRopeCollator(None, example_spec(family))([typed, zeros, row_of(family)])


@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_a_video_without_seconds_is_numbered_as_if_alone(family: str) -> None:
    collate = MRopeCollator(None, example_spec(family))
    timed, bare = row_of(family, (), (3, 2, 2)), row_of(family, (), (3, 2, 2))
    del bare["second_per_grid_ts"]
    alone = collate([bare])["position_ids"][:, 0]
    for rows, row in (([timed, bare, timed], 1), ([bare, timed], 0)):
        batch = collate(rows)
        assert torch.equal(batch["position_ids"][:, row], alone)
        assert len(batch["second_per_grid_ts"]) == len(rows)
        assert batch["second_per_grid_ts"][row] == 1.0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("empty", [None, [], np.array([], object)])
def test_labels_on_some_rows_stay_an_error(family: str, empty: Any) -> None:
    rows = [row_of(family, ((2, 4),)), row_of(family) | {"labels": empty}]
    with pytest.raises(MRopeError, match="row 1: no labels, which other rows of the batch have"):
        MRopeCollator(None, example_spec(family))(rows)


# One row in other forms.


def objects(value: torch.Tensor) -> Any:
    """Return what pandas and Ray make of a list of lists."""
    out = np.empty(len(value), object)
    for place, one in enumerate(value.numpy()):
        out[place] = one
    return out


def frozen(value: torch.Tensor) -> Any:
    array = value.numpy().copy()
    array.flags.writeable = False
    return array


def as_arrow(value: torch.Tensor) -> Any:
    kind = pa.float32() if value.is_floating_point() else pa.int64()
    for _ in range(value.ndim):
        kind = pa.list_(kind)
    return pa.scalar(value.tolist(), kind)


FORMS: dict[str, Callable[[torch.Tensor], Any]] = {
    "lists": lambda value: value.tolist(),
    "array": lambda value: value.numpy(),
    "read-only array": frozen,
    "objects": objects,
    "list of tensors": list,
    "list of arrays": lambda value: list(value.numpy()),
    "one tensor in a list": lambda value: [value],
    "Arrow": as_arrow,
    "Arrow of numbers": lambda value: (
        as_arrow(value) if value.ndim > 1 else pa.array(value.numpy())
    ),
    "series": lambda value: pandas.Series(list(value.numpy())),
    "other byte order": lambda value: value.numpy().astype(value.numpy().dtype.newbyteorder(">")),
    "backwards": lambda value: value.numpy()[::-1].copy()[::-1],
    "every other": lambda value: value.repeat_interleave(2, 0)[::2],
}
# Dtypes that hold the sizes and the tokens of these rows, and are not the model's own.
SMALL = ("int16", "int32", "uint8", "uint16", "uint32", "uint64")
SINGLE: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda value: value[0],
    "array": lambda value: value[0].numpy(),
    "list": lambda value: value[0].tolist(),
    "Arrow": lambda value: as_arrow(value[0]),
}
SIZES = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_of_the_sizes_is_taken(family: str, form: str) -> None:
    row = row_of(family, ((2, 4), (4, 4)), (2, 4, 4))
    other = row | {name: FORMS[form](row[name]) for name in SIZES if name in row}
    assert_taken(family, other, row)


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_dtype_of_integers_is_taken(family: str, dtype: str) -> None:
    """The batch holds int64: 16 x 16 patches are none in uint8, where the model multiplies."""
    row = row_of(family, ((2, 4), (4, 4)), (2, 4, 4))
    sizes = [name for name in row if name.endswith("grid_thw")]
    for of in (torch.Tensor.numpy, lambda value: value):
        tokens = [] if dtype == "uint8" else ["input_ids"]
        cast = {name: row[name].to(getattr(torch, dtype)) for name in (*sizes, *tokens)}
        assert_taken(family, row | {name: of(value) for name, value in cast.items()}, row)


@pytest.mark.parametrize("form", SINGLE)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_size_may_come_without_its_axis(family: str, form: str) -> None:
    row = row_of(family, ((2, 4),), (2, 4, 4))
    assert_taken(
        family, row | {name: SINGLE[form](row[name]) for name in SIZES if name in row}, row
    )


@pytest.mark.parametrize("form", ["lists", "array", "read-only array", "list of tensors"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_of_the_pixels_is_taken(family: str, form: str) -> None:
    row = row_of(family, ((2, 4), (4, 4)), mark=0.5)
    assert_taken(family, row | {"pixel_values": FORMS[form](row["pixel_values"])}, row)
    apart = list(row["pixel_values"].split([8, 16]))
    assert_taken(family, row | {"pixel_values": apart}, row)


@pytest.mark.parametrize("form", [*FORMS, "row"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_of_the_tokens_is_taken(family: str, form: str) -> None:
    row = row_of(family, ((2, 4),))
    change: Any = FORMS.get(form, lambda value: value[None])
    names = ("input_ids", "labels")
    assert_taken(family, row | {name: change(row[name]) for name in names}, row)


def assert_taken(family: str, row: Row, plain: Row) -> None:
    """A row in another form is good in every reader, and makes the same batches."""
    assert set(errors_of(family, row).values()) == {None}
    collate, neighbour = MRopeCollator(None, example_spec(family)), row_of(family, ((4, 8),))
    for ours, theirs in (([row], [plain]), ([neighbour, row], [neighbour, plain])):
        assert_same_batch(collate(ours), collate(theirs))


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Row], Row]:
    return lambda row: row | {name: change(row[name])}


BAD: dict[str, tuple[Callable[[Row], Row], str]] = {
    "no tokens": (lambda row: row | {"input_ids": None}, "no input_ids"),
    "null tokens": (lambda row: row | {"input_ids": [None]}, "no input_ids"),
    "float tokens": (changed("input_ids", lambda ids: ids + 0.5), "input_ids must hold integers"),
    "one number for tokens": (
        changed("input_ids", lambda _: 5),
        "input_ids (must be .n,. or|is a row)",
    ),
    "a mask of no axis": (
        lambda row: row | {"attention_mask": torch.tensor(1)},
        "attention_mask must be .n,. or",
    ),
    "tokens beyond int64": (
        changed("input_ids", lambda ids: np.where(ids.numpy() == 0, 0, np.uint64(2**63 + 1))),
        "input_ids holds integers beyond int64",
    ),
    "float labels": (changed("labels", lambda one: one + 0.5), "labels must hold integers"),
    "text for labels": (changed("labels", lambda one: ["a"] * len(one)), "labels "),
    "float sizes": (
        changed("image_grid_thw", lambda grid: grid.float()),
        "image_grid_thw must hold integers",
    ),
    "bool sizes": (changed("image_grid_thw", lambda grid: grid > 0), "image_grid_thw must hold"),
    "tokens without memory": (
        changed("input_ids", lambda ids: ids.to("meta")),
        "input_ids is on meta",
    ),
    "sparse sizes": (
        changed("image_grid_thw", lambda grid: grid.to_sparse()),
        "image_grid_thw is on cpu, torch.sparse_coo",
    ),
    "two rows of tokens": (
        lambda row: {**row, "input_ids": torch.stack([row["input_ids"]] * 2)},
        "input_ids",
    ),
    "cut": (
        lambda row: {**row, "input_ids": row["input_ids"][:4], "labels": row["labels"][:4]},
        "found 1 placeholder token",
    ),
    "no grids": (changed("image_grid_thw", lambda _: []), "placeholder token"),
    "one label too few": (changed("labels", lambda labels: labels[1:]), "labels, but"),
    "a mask one token too long": (
        lambda row: row | {"attention_mask": torch.ones(len(row["input_ids"]) + 1).long()},
        "attention_mask has shape .* Likely cause: a token, such as EOS, was added",
    ),
    "half a mask": (
        lambda row: row | {"attention_mask": [1] * (len(row["input_ids"]) // 2)},
        "attention_mask has shape .* Likely cause: one of them was truncated or padded without",
    ),
    "an inverted mask": (
        lambda row: row | {"attention_mask": [0] * len(row["input_ids"])},
        "the mask is inverted",
    ),
    "a batch axis": (
        changed("image_grid_thw", lambda grid: grid[None]),
        r"image_grid_thw must have shape \(N, 3\), not \(1, 1, 3\). Likely cause: the grids of several",
    ),
    "two numbers": (
        changed("image_grid_thw", lambda grid: grid[:, :2]),
        "image_grid_thw must have",
    ),
    "an odd height": (changed("image_grid_thw", lambda grid: grid + 1), "image_grid_thw.0. = "),
    "a grid with a null": (changed("image_grid_thw", lambda _: [[1, None, 4]]), "image_grid_thw"),
    "too few patches": (changed("pixel_values", lambda one: one[:-2]), "has 6 patches.*needs 8"),
    "too many patches": (
        changed("pixel_values", lambda one: torch.cat([one, one])),
        "has 16 patches.*needs 8",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_bad_in_one_reader_is_bad_in_all(family: str, case: str) -> None:
    change, words = BAD[case]
    row = change(row_of(family, ((2, 4),)))
    errors = errors_of(family, row)
    for reader in ("collator", "precheck", "check"):
        error = errors[reader]
        assert error is not None, reader
        assert re.search(words, error), (reader, error)
    good = row_of(family, ((4, 4),), mark=1.0)
    collate = MRopeCollator(None, example_spec(family), on_error="skip", count_key="dropped")
    with pytest.warns(UserWarning, match="an example was dropped"):
        batch = collate([row, good])
    assert batch.pop("dropped") == 1
    assert_same_batch(batch, MRopeCollator(None, example_spec(family))([good]))


HALVES: dict[str, Callable[[float], Any]] = {
    "number of numpy": np.float16,
    "numbers of numpy": lambda one: [np.float16(one)],
    "array": lambda one: np.array([one], np.float16),
    "bfloat16": lambda one: torch.tensor([one], dtype=torch.bfloat16),
    "numbers of torch": lambda one: [torch.tensor(one, dtype=torch.bfloat16)],
    "Arrow": lambda one: pa.scalar([np.float16(one)], pa.list_(pa.float16())),
}


@pytest.mark.parametrize("form", HALVES)
@pytest.mark.parametrize("name", ["second_per_grid_ts", "video_second_per_grid"])
def test_half_precision_seconds_are_refused_beside_float32_too(name: str, form: str) -> None:
    """A tensor that is joined with one of float32 becomes float32, and what was lost is hidden."""
    row = row_of("qwen2_5_vl", (), (2, 4, 4))
    seconds = {name: row.pop("second_per_grid_ts")}
    half = row | {name: HALVES[form](0.7)}
    assert all("too coarse" in str(error) for error in errors_of("qwen2_5_vl", half).values())
    with pytest.raises(MRopeError, match=f"row 1: {name} is b?float16, too coarse"):
        MRopeCollator(None, example_spec("qwen2_5_vl"))([row | seconds, half])


def timed_row(clips: int, **seconds: object) -> Row:
    """Return a row of Qwen2.5-VL with clips of four frames."""
    row = row_of("qwen2_5_vl", (), (4, 2, 4))
    del row["second_per_grid_ts"]
    return {name: torch.cat([value] * clips) for name, value in row.items()} | seconds


@pytest.mark.parametrize("packing", [None, "flatten"])
def test_seconds_may_have_another_name_in_each_row(packing: Any) -> None:
    """Rows of two processors, interleaved."""
    rows = [
        timed_row(1, second_per_grid_ts=2.0),
        timed_row(2, video_second_per_grid=[0.5, 3.0], second_per_grid_ts=None),
        timed_row(1),
    ]
    collate = MRopeCollator(None, example_spec("qwen2_5_vl"), packing=packing)
    for order in itertools.permutations(rows):
        found = collate(order)
        for name in ("second_per_grid_ts", "video_second_per_grid"):
            assert len(found[name]) == 4
        alone = [collate([row])["position_ids"] for row in order]
        if packing:
            assert torch.equal(found["position_ids"], torch.cat(alone, 2))
            continue
        for row, own in enumerate(alone):
            assert torch.equal(found["position_ids"][:, row, : own.shape[2]], own[:, 0])


def test_seconds_of_another_row_are_refused() -> None:
    """As many as the batch has clips, and yet each clip would have those of another."""
    collate = MRopeCollator(None, example_spec("qwen2_5_vl"))
    moved = [
        timed_row(1, second_per_grid_ts=[1.0, 2.0]),
        timed_row(2, second_per_grid_ts=[3.0]),
    ]
    with pytest.raises(MRopeError, match="row 0: second_per_grid_ts has 2 values, but the row 1"):
        collate(moved)
    differ = timed_row(1, second_per_grid_ts=1.0, video_second_per_grid=2.0)
    with pytest.raises(MRopeError, match="row 1: second_per_grid_ts and video_second_per_grid are"):
        collate([timed_row(1), differ])


@pytest.mark.parametrize("null", [np.array([np.nan], np.float32), torch.tensor([np.nan])])
def test_a_null_among_seconds_is_none_in_every_format_of_datasets(null: Any) -> None:
    """`[None]` of a column of floats, as numpy's and torch's format show it."""
    row = timed_row(1, second_per_grid_ts=null)
    assert set(errors_of("qwen2_5_vl", row).values()) == {None}
    collate = MRopeCollator(None, example_spec("qwen2_5_vl"))
    assert_same_batch(collate([row]), collate([timed_row(1)]))


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("second_per_grid_ts", [-1.0], r"second_per_grid_ts\[1\] = -1.0: must be finite"),
        ("video_grid_thw", [[4, 3, 4]], r"video_grid_thw\[1\] = \[4, 3, 4\]: height and width"),
        ("video_grid_thw", [[4, 0, 4]], r"video_grid_thw\[1\] = \[4, 0, 4\]: every size"),
    ],
)
def test_an_error_of_one_clip_names_its_row(column: str, value: Any, words: str) -> None:
    """The clip's place in the batch alone would have to be counted out."""
    rows = [timed_row(1, second_per_grid_ts=1.0), row_of("qwen2_5_vl"), timed_row(1)]
    bad = rows[2] | {"second_per_grid_ts": [1.0], column: value}
    with pytest.raises(MRopeError, match=f"^row 2: {words}"):
        MRopeCollator(None, example_spec("qwen2_5_vl"))([*rows[:2], bad])
    assert re.match(words.replace("[1", "[0"), str(errors_of("qwen2_5_vl", bad)["check"]))


NO_TOKENS: list[Any] = [[], [[]], np.array([], object), torch.empty(0), torch.empty(1, 0)]


@pytest.mark.parametrize("empty", NO_TOKENS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_without_a_token_is_a_row(family: str, empty: Any) -> None:
    row: Row = {"input_ids": empty, "labels": empty}
    assert {errors_of(family, row)[name] for name in ("collator", "precheck", "check")} == {None}
    batch = MRopeCollator(None, example_spec(family))([row, row_of(family, ((2, 4),))])
    assert batch["attention_mask"][0].sum() == 0


def test_other_columns_stay_as_they_are() -> None:
    given = {"input_ids": [7], "id": None, "names": [], "weight": float("nan")}
    sample = read_sample(given)
    assert sample["id"] is None and sample["names"] == [] and list(sample) == list(given)
    batch = PaddingCollator()([given, {"input_ids": [8], "names": ["a"]}])
    assert batch["names"] == [[], ["a"]] and batch["id"] == [None, None]


# Columns of single families.


def audio_row(frames: tuple[int, ...], **more: Any) -> Row:
    from twins.omni import audio_length

    spec = example_spec("qwen2_5_omni_thinker")
    start, token = (int(spec.extra[f"audio_{name}token_id"]) for name in ("start_", ""))
    tokens = [7]
    for count in frames:
        tokens += [start, *[token] * audio_length(spec, count), 97]
    return {"input_ids": [*tokens, 8], **more}


def test_audio_on_some_rows() -> None:
    spec = example_spec("qwen2_5_omni_thinker")
    lengths, mask = (40, 100), np.zeros((2, 100), np.int64)
    mask[0, :40], mask[1] = 1, 1
    rows: list[Row] = [
        audio_row(lengths, feature_attention_mask=mask, input_features=torch.ones(2, 5, 100)),
        audio_row((), feature_attention_mask=[], input_features=None, use_audio_in_video=None),
        audio_row((60,), feature_attention_mask=[1] * 60, input_features=torch.ones(5, 60),
                  use_audio_in_video=False),
    ]  # fmt: skip
    for row in rows:
        assert set(errors_of("qwen2_5_omni_thinker", row).values()) == {None}
    for order in itertools.permutations(rows):
        batch = MRopeCollator(None, spec)(order)
        assert batch["feature_attention_mask"].shape == (3, 100)
        assert sorted(batch["feature_attention_mask"].sum(1).tolist()) == [40, 60, 100]
        assert batch["input_features"].shape == (3, 5, 100)
        assert batch["use_audio_in_video"] is False
    lone = [
        audio_row((40,), audio_seqlens=40),
        audio_row(()),
        audio_row(lengths, audio_seqlens=lengths),
    ]
    for order in itertools.permutations(lone):
        assert sorted(MRopeCollator(None, spec)(order)["audio_seqlens"].tolist()) == [40, 40, 100]


def test_features_of_another_row_are_refused() -> None:
    """As many features as masks in the batch, and yet an audio would have those of another."""
    one, mask = torch.ones(1, 5, 40), np.ones((1, 40), np.int64)
    two, none, short = torch.cat([one, one]), None, one[..., :20]
    collate = MRopeCollator(None, example_spec("qwen2_5_omni_thinker"))
    for features, words in (
        ((two, none), r"row 0: input_features has shape \(2, 5, 40\), but .*mask \(1, 40\)"),
        ((none, two), r"row 0: input_features has shape \(\), but .*mask \(1, 40\)"),
        ((one, short), r"row 1: input_features has shape \(1, 5, 20\), but .*mask \(1, 40\)"),
    ):
        rows = [
            audio_row((40,), feature_attention_mask=mask, input_features=own) for own in features
        ]
        with pytest.raises(MRopeError, match=words):
            collate(rows)
        with pytest.raises(MRopeError, match="the batch, row unknown|row 0: input_features"):
            MRopeCollator(
                lambda rows: {**PaddingCollator()(rows), "input_features": torch.ones(3, 5, 40)},
                example_spec("qwen2_5_omni_thinker"),
            )([audio_row((40,), feature_attention_mask=mask)] * 2)
    errors = errors_of("qwen2_5_omni_thinker", rows[1])
    assert all(errors[reader] for reader in ("collator", "precheck", "check"))


@pytest.mark.parametrize("flag", [1, 0, "x", 1.0, np.array([1]), {}, [True, None]], ids=repr)
def test_a_flag_that_is_no_bool_is_refused_by_every_reader(flag: Any) -> None:
    row = audio_row((40,), feature_attention_mask=np.ones((1, 40)).astype(int))
    errors = errors_of("qwen2_5_omni_thinker", row | {"use_audio_in_video": flag})
    for reader in ("collator", "precheck", "check"):
        assert "use_audio_in_video must be one bool" in str(errors[reader]), errors
    with pytest.raises(MRopeError, match="row 1: use_audio_in_video must be one bool"):
        PaddingCollator()([row, row | {"use_audio_in_video": flag}])


def test_flags_that_differ_become_one_for_each_clip() -> None:
    clips = {"video_grid_thw": [[1, 2, 2]] * 2}
    rows = [
        audio_row((), use_audio_in_video=None),
        audio_row((), use_audio_in_video=True, **clips),
        audio_row((), use_audio_in_video=[True, False], **clips),
    ]
    flags = PaddingCollator()(rows)["use_audio_in_video"]
    assert flags.tolist() == [True, True, True, False]
    same = [audio_row((), use_audio_in_video=flag, **clips) for flag in (True, [True, True])]
    assert PaddingCollator()(same)["use_audio_in_video"] is True
    wrong = [same[0], audio_row((), use_audio_in_video=[True, False, True], **clips)]
    with pytest.raises(MRopeError, match="row 1: use_audio_in_video has 3 values, but the row 2"):
        PaddingCollator()(wrong)


def test_crops_on_some_rows() -> None:
    spec = example_spec("minicpmv4_7")
    start, end = spec.vision_start_token_id, int(spec.extra["image_end_id"])
    side = spec.spatial_merge_size
    image = {"input_ids": [7, start, *[spec.image_token_id] * 2, end, 8],
             "target_sizes": torch.tensor([[side, 2 * side]])}  # fmt: skip
    forms: list[Row] = [image, image | {"target_sizes": [side, 2 * side], "downsample_mode": None},
                        image | {"target_sizes": [torch.tensor([side, 2 * side])]}]  # fmt: skip
    text: Row = {"input_ids": [7, 8], "target_sizes": [], "target_sizes_videos": [[]]}
    for row in (*forms, text):
        assert set(errors_of("minicpmv4_7", row).values()) == {None}
        for rows in ([row, image], [image, text, row]):
            batch = MRopeCollator(None, spec)(rows)
            assert len(batch["target_sizes"]) == sum(one is not text for one in rows)
            alone = MRopeCollator(None, spec)([row])["position_ids"]
            place = next(i for i, one in enumerate(rows) if one is row)
            assert torch.equal(batch["position_ids"][:, place, : alone.shape[2]], alone[:, 0])

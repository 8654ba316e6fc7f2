"""Pixels are compared with grids: by row where the examples tell, over the batch otherwise."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mrope import MRopeCollator, MRopeError, SpanMismatchError
from mrope.collate import read_rejects
from mrope.collate.padding import PaddingCollator
from mrope.prepare import Precheck
from support.rows import FAMILIES, Row, assert_same_batch, errors_of, row_of
from support.specs import example_spec

KINDS = {
    "pixel_values": ("image", "image_grid_thw"),
    "pixel_values_videos": ("video", "video_grid_thw"),
}
CHANGES = {"too few": -4, "one too few": -1, "too many": 4, "none": -32}


def rows_of(family: str) -> list[Row]:
    """Return rows with 32 patches of images and of a video, with 48 of both, and with text."""
    return [
        row_of(family, ((4, 4), (2, 8)), (2, 4, 4), mark=1),
        row_of(family, ((6, 8),), (3, 4, 4), mark=2),
        row_of(family),
    ]


def resized(row: Row, name: str, patches: int) -> Row:
    return row | {name: row[name][:1].repeat(patches, 1)}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_row_and_both_counts_are_named(family: str, name: str, change: str) -> None:
    found = 32 + CHANGES[change]
    bad, good, text = rows_of(family)
    bad = resized(bad, name, found)
    modality, grids = KINDS[name]
    for order in itertools.permutations((bad, good, text)):
        row = next(place for place, one in enumerate(order) if one is bad)
        with pytest.raises(SpanMismatchError) as caught:
            MRopeCollator(None, example_spec(family))(order)
        error = caught.value
        assert str(error).startswith(
            f"row {row}: {name} has {found} patches, but {grids} {bad[grids].tolist()} needs 32. "
            "Likely cause: "
        )
        assert (error.row, error.modality, error.found, error.needed) == (row, modality, found, 32)
        assert error.cause is not None and error.cause in str(error)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_skip_drops_that_row_and_leaves_the_others_exact(
    family: str, name: str, tmp_path: Path
) -> None:
    spec = example_spec(family)
    bad, good, text = rows_of(family)
    bad = resized(bad, name, 31)
    skipping = MRopeCollator(
        None, spec, on_error="skip", count_key="dropped", rejects=tmp_path / "rejects.jsonl"
    )
    with pytest.warns(UserWarning, match="an example was dropped, SpanMismatchError: row 0: pixel"):
        batch = skipping([good, bad, text])
    assert batch.pop("dropped") == 1
    assert_same_batch(batch, MRopeCollator(None, spec)([good, text]))
    (line,) = read_rejects(tmp_path / "rejects.jsonl")
    assert (line["place"], line["found"], line["needed"]) == (1, 31, 32)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_rows(family: str, name: str) -> None:
    """The sums agree; equal counts cannot be seen."""
    spec = example_spec(family)
    first, second, text = rows_of(family)
    swapped = [first | {name: second[name]}, text, second | {name: first[name]}]
    with pytest.raises(SpanMismatchError, match="row 0: .* has 48 .*and those of row 2 were swap"):
        MRopeCollator(None, spec)(swapped)
    skipping = MRopeCollator(None, spec, on_error="skip", count_key="dropped")
    with pytest.warns(UserWarning, match="an example was dropped"):
        batch = skipping(swapped)
    assert batch["dropped"] == 2 and batch["input_ids"].shape[0] == 1
    equal = [row_of(family, ((4, 4),), mark=mark) for mark in (1.0, 2.0)]
    MRopeCollator(None, spec)(
        [equal[0] | {"pixel_values": equal[1]["pixel_values"]}, equal[1], text]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_without_grids_and_grids_without_pixels(family: str) -> None:
    spec = example_spec(family)
    good, text = row_of(family, ((2, 4),)), row_of(family)
    stray = text | {"pixel_values": torch.zeros(5, 6)}
    with pytest.raises(SpanMismatchError, match="row 1: .* has 5 patches, but there is no image_g"):
        MRopeCollator(None, spec)([good, stray])
    bare = {name: value for name, value in good.items() if name != "pixel_values"}
    # Positions alone need no pixels; beside a row with pixels the tower would be short of some.
    MRopeCollator(None, spec)([bare, bare, text])
    with pytest.raises(SpanMismatchError, match="row 1: pixel_values has 0 patches, but .*needs 8"):
        MRopeCollator(None, spec)([good, bare])


@pytest.mark.parametrize("family", FAMILIES)
def test_without_examples_the_sums_are_compared(family: str) -> None:
    spec = example_spec(family)
    rows = rows_of(family)
    batch = PaddingCollator()(rows)
    MRopeCollator(lambda _: dict(batch), spec)(None)
    short = batch | {"pixel_values": batch["pixel_values"][1:]}
    with pytest.raises(SpanMismatchError) as caught:
        MRopeCollator(lambda _: dict(short), spec)(None)
    assert str(caught.value).startswith(
        "the batch, row unknown: pixel_values has 79 patches, but image_grid_thw "
        "[[1, 4, 4], [1, 2, 8], [1, 6, 8]] needs 80."
    )
    assert caught.value.row is None
    # The inner function loads pixels that the examples do not have.
    bare = [{k: v for k, v in row.items() if not k.startswith("pixel")} for row in rows]
    MRopeCollator(lambda _: dict(batch), spec)(bare)


@pytest.mark.parametrize("shape", [(1, 3, 6), (2, 8, 6), (1, 1, 3, 14, 14), (5,)])
def test_other_layouts_are_not_compared(shape: tuple[int, ...]) -> None:
    row = row_of("qwen3_vl", ((2, 4),)) | {"pixel_values": torch.zeros(shape)}
    batch = PaddingCollator()([row])
    assert batch["pixel_values"].shape == shape
    MRopeCollator(None, example_spec())([row])
    MRopeCollator(lambda _: dict(batch), example_spec())(None)


def test_images_in_a_list_are_counted_together() -> None:
    row = row_of("qwen3_vl", ((2, 4), (4, 4)))
    images = row["pixel_values"].split([8, 16])
    MRopeCollator(None, example_spec())([row | {"pixel_values": list(images)}])
    with pytest.raises(SpanMismatchError, match="row 0: pixel_values has 16 patches.*needs 24"):
        MRopeCollator(None, example_spec())([row | {"pixel_values": [images[1]]}])


def test_patches_that_are_not_flattened() -> None:
    """PaddleOCR-VL's processor gives (patches, 3, 14, 14)."""
    spec = example_spec("paddleocr_vl")
    row = row_of("paddleocr_vl", ((2, 4),)) | {"pixel_values": torch.zeros(8, 3, 14, 14)}
    MRopeCollator(None, spec)([row])
    with pytest.raises(SpanMismatchError, match="row 1: pixel_values has 7 patches.*needs 8"):
        MRopeCollator(None, spec)([row, row | {"pixel_values": torch.zeros(7, 3, 14, 14)}])


@pytest.mark.parametrize("form", ["lists", "array", "table", "tensor"])
def test_precheck_counts_patches_in_every_form(form: str) -> None:
    good = row_of("qwen3_vl", ((4, 4),), (2, 4, 4))
    for name, patches in (("pixel_values", 12), ("pixel_values_videos", 40)):
        bad = resized(good, name, patches)
        columns: Any = {key: [good[key].tolist(), bad[key].tolist()] for key in good}
        if form == "table":
            columns = pa.table(columns)
        elif form != "lists":
            make = np.asarray if form == "array" else torch.tensor
            columns = {key: list(map(make, value)) for key, value in columns.items()}
        with pytest.raises(MRopeError, match=f"row 6 of the data.*{name} has {patches} patches"):
            Precheck(example_spec())(columns, [5, 6])


@pytest.mark.parametrize("form", [None, "arrow", "numpy"])
def test_precheck_counts_patches_in_a_map(form: str | None) -> None:
    datasets = pytest.importorskip("datasets")
    good = row_of("qwen3_vl", ((4, 4),))
    rows = [{name: value.tolist() for name, value in row.items()}
            for row in (good, row_of("qwen3_vl") | {"pixel_values": torch.empty(0, 6)},
                        resized(good, "pixel_values", 12))]  # fmt: skip
    rows[1] |= {"image_grid_thw": []}
    table = datasets.Dataset.from_list(rows).with_format(form)
    table.select([0, 1]).map(Precheck(example_spec()), batched=True)
    with pytest.raises(MRopeError, match="row 2 of the dataset: pixel_values has 12 patches"):
        table.map(Precheck(example_spec()), batched=True, with_indices=True)


def test_it_takes_no_time_of_the_pixels() -> None:
    """Shapes are read, of 200 MB as of nothing."""
    row = row_of("qwen3_vl", ((256, 256),))
    row["pixel_values"] = torch.empty(256 * 256, 768)
    batch = PaddingCollator()([row])
    collate = MRopeCollator(lambda _: dict(batch), example_spec())
    bare = {name: value for name, value in batch.items() if name != "pixel_values"}
    alone = MRopeCollator(lambda _: dict(bare), example_spec())

    def seconds(one: MRopeCollator) -> float:
        start = time.perf_counter()
        one([row])
        return time.perf_counter() - start

    extra = min(seconds(collate) for _ in range(9)) - min(seconds(alone) for _ in range(9))
    assert extra < 0.001


def test_all_readers_agree() -> None:
    for family in FAMILIES:
        for name in KINDS:
            bad = resized(rows_of(family)[0], name, 28)
            errors = errors_of(family, bad)
            assert all(error is not None for key, error in errors.items() if key != "flatten")

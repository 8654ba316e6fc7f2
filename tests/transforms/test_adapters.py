"""Adapters, number by number; tests/integration/test_adapters.py runs the peers' own code on them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from mrope import MRopeCollator, MRopeError, to_model_layout
from mrope.collate.layouts import to_batch_layout
from mrope.collate.padding import PaddingCollator
from mrope.towers import VisionSpec
from mrope.transforms import to_ms_swift, to_veomni, to_verl
from support.specs import example_spec

SPEC = example_spec()
PLAIN = VisionSpec(spatial_merge_size=2)
WINDOWS = VisionSpec(spatial_merge_size=2, window_side=1)
TABLE = VisionSpec(spatial_merge_size=2, table_side=8)
IMAGE, VIDEO = SPEC.image_token_id, SPEC.video_token_id

Adapter = Callable[[dict[str, Any]], dict[str, Any]]
ADAPTERS: list[Adapter] = [to_ms_swift, to_verl, partial(to_veomni, spec=SPEC, vision=PLAIN)]
EXAMPLES: list[dict[str, Any]] = [
    {"input_ids": [7, IMAGE, IMAGE], "labels": [7, -100, -100], "image_grid_thw": [[1, 2, 4]]},
    {"input_ids": [8, 9], "labels": [8, 9]},
]


def padded(side: Any = "right") -> dict[str, Any]:
    """An example with an image of two tokens, and one of text, which is a token shorter."""
    batch: dict[str, Any] = MRopeCollator(PaddingCollator(padding_side=side), SPEC)(EXAMPLES)
    return batch


def flattened() -> dict[str, Any]:
    """The same examples in one row, with a tail of one; written out, as any release takes it."""
    borders = torch.tensor([0, 3, 5, 6], dtype=torch.int32)
    return {
        "input_ids": torch.tensor([[7, IMAGE, IMAGE, 8, 9, 0]]),
        "labels": torch.tensor([[-100, -100, -100, -100, 9, -100]]),
        "image_grid_thw": torch.tensor([[1, 2, 4]]),
        "position_ids": torch.tensor(
            [[[0, 1, 2, 0, 1, 0]], [[0, 1, 1, 0, 1, 0]], [[0, 1, 1, 0, 1, 0]], [[0, 1, 2, 0, 1, 0]]]
        ),
        "rope_deltas": torch.tensor([[0], [0]]),
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders.clone(),
        "max_length_q": 3,
        "max_length_k": 3,
        "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 2]], dtype=torch.int32),
        "use_cache": False,
    }


def test_ms_swift_takes_the_text_row_apart() -> None:
    batch = flattened()
    out = to_ms_swift(batch)
    assert out["text_position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]
    assert out["text_position_ids"].dtype == torch.int64
    assert torch.equal(out["position_ids"], batch["position_ids"][1:])
    assert out.keys() - batch.keys() == {"text_position_ids"}
    assert out["cu_seq_lens_q"] is batch["cu_seq_lens_q"]
    assert type(out["max_length_q"]) is int


def test_ms_swift_counts_columns_of_a_padded_batch() -> None:
    batch = padded("left")
    out = to_ms_swift(batch)
    assert out["text_position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert torch.equal(out["position_ids"], batch["position_ids"])
    assert out.keys() - batch.keys() == {"text_position_ids"}


@pytest.mark.parametrize(
    ("side", "text"),
    [("right", [[0, 1, 2], [0, 1, 1]]), ("left", [[0, 1, 2], [1, 0, 1]])],
)
def test_verl_gets_the_text_row_first(side: Any, text: list[list[int]]) -> None:
    batch = padded(side)
    out = to_verl(batch)
    assert out["position_ids"].shape == (2, 4, 3) and out["position_ids"].dtype == torch.int64
    assert out["position_ids"].is_contiguous()
    assert out["position_ids"][:, 0].tolist() == text
    assert torch.equal(out["position_ids"][:, 1:], batch["position_ids"].transpose(0, 1))
    assert torch.equal(to_model_layout(out)["position_ids"][1:], batch["position_ids"])
    assert out["attention_mask"] is batch["attention_mask"]


def test_verl_takes_a_mask_of_bools() -> None:
    batch = padded("left")
    marked = batch | {"attention_mask": batch["attention_mask"].bool()}
    assert torch.equal(to_verl(marked)["position_ids"], to_verl(batch)["position_ids"])


def test_veomni_gets_what_its_towers_read() -> None:
    batch = flattened() | {"video_grid_thw": torch.tensor([[2, 2, 2], [1, 4, 2]])}
    out = to_veomni(batch, SPEC, TABLE)
    metadata = out["multimodal_metadata"]
    tensors = {name: value for name, value in metadata.items() if torch.is_tensor(value)}
    assert {name: value.tolist() for name, value in tensors.items()} == {
        "vit_image_cu_seqlens": [0, 8],
        "vit_video_cu_seqlens": [0, 4, 8, 16],
    }
    assert {value.dtype for value in tensors.values()} == {torch.int32}
    assert {name: metadata[name] for name in metadata.keys() - tensors.keys()} == {
        "image_grid_thw_list": [[1, 2, 4]],
        "vit_image_max_seqlen": 8,
        "video_grid_thw_list": [[2, 2, 2], [1, 4, 2]],
        "vit_video_max_seqlen": 8,
    }
    assert type(metadata["vit_image_max_seqlen"]) is int
    assert out["image_mask"].tolist() == [[False, True, True, False, False, False]]
    assert out["video_mask"].tolist() == [[False] * 6]
    assert out["position_ids"] is batch["position_ids"]


def test_veomni_gets_windows_where_the_tower_has_them() -> None:
    metadata = to_veomni(flattened(), SPEC, WINDOWS)["multimodal_metadata"]
    assert metadata["vit_image_window_index"].tolist() == [0, 1]
    assert metadata["vit_image_window_index"].dtype == torch.int64
    assert metadata["vit_image_cu_window_seqlens"].tolist() == [0, 4, 8]
    assert metadata["vit_image_cu_window_seqlens"].dtype == torch.int32
    assert metadata["vit_image_win_max_seqlen"] == 4
    assert not [name for name in metadata if "video" in name]


@pytest.mark.parametrize("grid", [None, torch.empty((0, 3), dtype=torch.int64)])
def test_veomni_has_no_metadata_without_pixels(grid: Any) -> None:
    batch = flattened() | {"image_grid_thw": grid}
    out = to_veomni(batch, SPEC, WINDOWS)
    assert "multimodal_metadata" not in out and "video_mask" in out


@pytest.mark.parametrize(
    ("adapter", "made"),
    [(to_ms_swift, padded), (to_ms_swift, flattened), (to_verl, padded), (ADAPTERS[2], flattened)],
)
def test_the_batch_is_not_written_to(adapter: Adapter, made: Callable[[], dict[str, Any]]) -> None:
    batch = made()
    before = copy.deepcopy(dict(batch))
    out = adapter(batch)
    assert out is not batch and type(out) is dict
    assert batch.keys() == before.keys()
    for name, value in before.items():
        same = torch.equal(batch[name], value) if torch.is_tensor(value) else batch[name] == value
        assert same, name


def test_the_collator_s_own_batches_are_taken() -> None:
    collate = MRopeCollator(None, SPEC, packing="flatten", pad_to_multiple_of=6)
    batch = collate(EXAMPLES)
    for name, value in to_veomni(flattened(), SPEC, PLAIN).items():
        found = to_veomni(batch, SPEC, PLAIN)[name]
        assert torch.equal(found, value) if torch.is_tensor(value) else str(found) == str(value)
    assert torch.equal(to_ms_swift(batch)["text_position_ids"], batch["position_ids"][0])


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("made", [padded, flattened])
def test_batch_layout_is_refused(adapter: Adapter, made: Callable[[], dict[str, Any]]) -> None:
    with pytest.raises(MRopeError, match=r"takes model layout.*batch layout.*to_model_layout"):
        adapter(to_batch_layout(made()))


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("made", [padded, flattened])
@pytest.mark.parametrize("positions", [None, torch.zeros(2, 6), torch.zeros(2, 1, 6)])
def test_positions_of_another_kind_are_refused(
    adapter: Adapter, made: Callable[[], dict[str, Any]], positions: Any
) -> None:
    with pytest.raises(MRopeError, match=r"needs the position_ids \([34], "):
        adapter(made() | {"position_ids": positions})


@pytest.mark.parametrize("adapter", [to_ms_swift, to_verl])
def test_an_adapted_batch_is_refused(adapter: Adapter) -> None:
    made = padded() if adapter is to_verl else flattened()
    with pytest.raises(MRopeError):
        adapter(adapter(made))


def test_verl_refuses_a_flattened_batch() -> None:
    with pytest.raises(MRopeError, match=r"to_verl takes padded batches.*packing='flatten'"):
        to_verl(flattened())


def test_veomni_refuses_a_padded_batch() -> None:
    with pytest.raises(MRopeError, match=r"to_veomni takes flattened batches.*packing='flatten'"):
        to_veomni(padded(), SPEC, PLAIN)


def test_verl_needs_a_mask_of_zeros_and_ones() -> None:
    batch = dict(padded())
    with pytest.raises(MRopeError, match=r"counts up to 2: several examples in a row"):
        to_verl(batch | {"attention_mask": torch.tensor([[1, 1, 2], [1, 1, 0]])})
    with pytest.raises(MRopeError, match=r"needs attention_mask \(B, S\)"):
        to_verl({name: value for name, value in batch.items() if name != "attention_mask"})


@pytest.mark.parametrize("form", ["lists", "array", "backwards"])
def test_veomni_gets_masks_of_ids_in_every_form(form: str) -> None:
    batch = flattened()
    ids = batch["input_ids"].numpy()
    forms = {"lists": ids.tolist(), "array": ids, "backwards": ids[:, ::-1].copy()[:, ::-1]}
    found = to_veomni(batch | {"input_ids": forms[form]}, SPEC, PLAIN)
    right = to_veomni(batch, SPEC, PLAIN)
    for name in ("image_mask", "video_mask"):
        assert torch.equal(found[name], right[name])

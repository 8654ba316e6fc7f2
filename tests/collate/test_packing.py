"""Padding-free batches: borders, labels, positions of each example alone, and nothing seen over a border."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fuzz.samples import Merge, draw_examples, merged
from mrope import MRopeCollator, MRopeError, MRopeSpec, SpanMismatchError, rope_index
from mrope.collate.padding import PaddingCollator
from mrope.spec.families import FAMILIES
from mrope.spec.spec import example_config
from mrope.towers import VisionSpec
from support.batches import Row, _random_row, merge_rows

SPEC = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
START, IMAGE, VIDEO = 101, 102, 103
PACKED = tuple(name for name, row in FAMILIES.items() if row.packs and row.custom_index is None)
THINKERS = tuple(
    name for name, row in FAMILIES.items() if row.packs and row.custom_index is not None
)


def flat(spec: MRopeSpec = SPEC, **options: Any) -> MRopeCollator:
    return MRopeCollator(options.pop("inner", None), spec, packing="flatten", **options)


def test_a_small_batch_in_full() -> None:
    """Three tokens with an image of two, and two of text; a tail of three."""
    examples: list[dict[str, Any]] = [
        {
            "input_ids": [7, IMAGE, IMAGE],
            "labels": [7, -100, -100],
            "image_grid_thw": [[1, 2, 4]],
            "pixel_values": torch.rand(8, 3),
        },
        {"input_ids": [8, 9], "labels": [8, 9]},
    ]
    batch = flat(pad_to_multiple_of=4, pad_token_id=5)(examples)
    assert batch["input_ids"].tolist() == [[7, IMAGE, IMAGE, 8, 9, 5, 5, 5]]
    assert batch["labels"].tolist() == [[-100, -100, -100, -100, 9, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [
        [[0, 1, 2, 0, 1, 0, 1, 2]],
        [[0, 1, 1, 0, 1, 0, 1, 2]],
        [[0, 1, 1, 0, 1, 0, 1, 2]],
        [[0, 1, 2, 0, 1, 0, 1, 2]],
    ]
    assert batch["rope_deltas"].tolist() == [[0], [0]]
    for side in "qk":
        borders = batch[f"cu_seq_lens_{side}"]
        assert borders.dtype == torch.int32 and borders.tolist() == [0, 3, 5, 8]
        assert type(batch[f"max_length_{side}"]) is int and batch[f"max_length_{side}"] == 3
    assert batch["cu_seq_lens_q"].data_ptr() != batch["cu_seq_lens_k"].data_ptr()
    assert batch["seq_idx"].dtype == torch.int32
    assert batch["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert batch["use_cache"] is False
    assert "attention_mask" not in batch
    assert torch.equal(batch["pixel_values"], examples[0]["pixel_values"])


def test_the_examples_are_not_written_to() -> None:
    labels = torch.tensor([[7, 8]])
    batch = flat(inner=lambda _: {"input_ids": torch.tensor([[7, 8]]), "labels": labels})(None)
    assert batch["labels"].tolist() == [[-100, 8]] and labels.tolist() == [[7, 8]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_column_of_tokens_follows_and_nothing_else(side: Any) -> None:
    inner = PaddingCollator(padding_side=side)
    examples = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}]

    def with_more(rows: Any) -> dict[str, Any]:
        batch = inner(rows)
        mask = batch["attention_mask"]
        extra = {
            "advantages": batch["input_ids"] * 0.5,
            "embeddings": batch["input_ids"][..., None] * torch.ones(2),
            "pixel_values": torch.zeros(mask.shape),
            "rewards": torch.tensor([1.0, 2.0]),
            "names": ["a", "b"],
        }
        return batch | extra

    batch = flat(inner=with_more)(examples)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4]]
    assert batch["advantages"].tolist() == [[0.5, 1.0, 1.5, 2.0]]
    assert batch["embeddings"].shape == (1, 4, 2) and batch["embeddings"][0, :, 1].tolist() == [1, 2, 3, 4]  # fmt: skip
    assert batch["pixel_values"].shape == (2, 3)
    assert batch["rewards"].tolist() == [1.0, 2.0] and batch["names"] == ["a", "b"]


@pytest.mark.parametrize("how", ["seq_lengths in examples", "seq_lengths in the batch", "mask"])
def test_examples_that_are_packed_already_keep_their_borders(how: str) -> None:
    packed: dict[str, Any] = {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5]}
    single: dict[str, Any] = {"input_ids": [6, 7], "labels": [6, 7]}
    inner: Any = PaddingCollator()
    if how == "mask":
        packed["attention_mask"], single["attention_mask"] = [1, 1, 2, 2, 2], [1, 1]
    else:
        packed["seq_lengths"], single["seq_lengths"] = [2, 3], torch.tensor([2])
    if how == "seq_lengths in examples":
        inner = _without_lengths
    batch = flat(inner=inner)([packed, single])
    assert batch["cu_seq_lens_q"].tolist() == [0, 2, 5, 7]
    assert batch["position_ids"][:, 0].tolist() == [[0, 1, 0, 1, 2, 0, 1]] * 4
    assert batch["labels"].tolist() == [[-100, 2, -100, 4, 5, -100, 7]]
    assert batch["rope_deltas"].tolist() == [[0], [0], [0]]
    assert "seq_lengths" not in batch


def _without_lengths(examples: Any) -> dict[str, Any]:
    kept = [{k: v for k, v in one.items() if k != "seq_lengths"} for one in examples]
    return PaddingCollator()(kept)


def test_packed_rows_without_flatten_are_refused() -> None:
    examples = [{"input_ids": [1]}, {"input_ids": [1, 2, 3]}]
    with_lengths = [
        {**one, "seq_lengths": n} for one, n in zip(examples, ([1], [2, 1]), strict=True)
    ]
    with pytest.raises(MRopeError, match=r"row 1 holds 2 examples .* packing='flatten' keeps"):
        MRopeCollator(None, SPEC)(with_lengths)
    assert MRopeCollator(None, SPEC)(with_lengths[:1])["input_ids"].tolist() == [[1]]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([[3], [1]], r"row 0: seq_lengths \[3\] add up to 3 tokens, but the row has 2.*truncation"),
        ([[2], [1, 1]], r"row 1: seq_lengths \[1, 1\] add up to 2 tokens, but the row has 1"),
        ([[2], [0, 1]], "seq_lengths must be integers of at least 1"),
        ([[2], [0.5, 0.5]], "seq_lengths must be integers of at least 1"),
        ([[2], None], "row 1: no seq_lengths, which other rows of the batch have"),
        ([[2]], "seq_lengths has 1 rows, but input_ids 2"),
    ],
)
def test_lengths_that_do_not_fit_are_named(lengths: Any, message: str) -> None:
    def inner(rows: Any) -> dict[str, Any]:
        return PaddingCollator()(rows) | {"seq_lengths": lengths}

    with pytest.raises(MRopeError, match=message):
        flat(inner=inner)([{"input_ids": [1, 2]}, {"input_ids": [1]}])


def test_an_image_over_a_border_is_refused() -> None:
    example = {
        "input_ids": [1, IMAGE, IMAGE, 2],
        "image_grid_thw": [[1, 2, 4]],
        "seq_lengths": [2, 2],
    }
    with pytest.raises(SpanMismatchError, match="row 0, image 0"):
        flat()([example])


def test_errors_name_the_row_of_the_batch_before_it_was_flattened() -> None:
    good = {"input_ids": [1, IMAGE, 2], "image_grid_thw": [[1, 2, 2]]}
    bad = {"input_ids": [1, IMAGE, IMAGE], "image_grid_thw": [[1, 2, 2]]}
    with pytest.raises(SpanMismatchError, match="row 1, image") as error:
        flat()([good, bad])
    assert error.value.row == 1


def test_a_batch_without_tokens_and_columns_of_another_width_are_refused() -> None:
    def inner(batch: Any) -> Any:
        return dict(batch)

    empty = {"input_ids": torch.tensor([[0]]), "attention_mask": torch.tensor([[0]])}
    with pytest.raises(MRopeError, match="without a valid token"):
        flat(inner=inner)(empty)
    uneven = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[1]])}
    with pytest.raises(MRopeError, match=r"labels has shape \(1, 1\), but input_ids \(1, 2\)"):
        flat(inner=inner)(uneven)


def test_what_the_constructor_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        (
            {"packing": "pack"},
            r"packing must be one of None, 'flatten', Flatten\(...\), not 'pack'",
        ),
        ({"layout": "rows"}, "layout must be one of 'model', 'batch', not 'rows'"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of belongs to packing"),
        ({"packing": "flatten", "pad_to_multiple_of": 0}, "must be at least 1, not 0"),
        ({"packing": "flatten", "pad_token_id": IMAGE}, "102 is a placeholder"),
    ):
        with pytest.raises(ValueError, match=message):
            MRopeCollator(None, SPEC, **options)
    aero = MRopeSpec.from_config(example_config("aero_realtime"), "transformers-5.23")
    with pytest.raises(MRopeError, match="refused for aero_realtime: nobody has compared"):
        flat(aero)
    for version in ("5.17.0", "4.57.6", "5.22.2"):
        monkeypatch.setattr(
            "mrope.collate.packing.installed_transformers", lambda version=version: version
        )
        with pytest.raises(MRopeError, match=f"refused with transformers {version}"):
            flat()
    monkeypatch.setattr("mrope.collate.packing.installed_transformers", lambda: None)
    flat()
    with pytest.raises(MRopeError, match="refused with transformers 4.57"):
        flat(MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-4.57"))


def test_it_goes_through_workers_and_pickles() -> None:
    dataset = [{"input_ids": list(range(1, n + 1))} for n in (3, 1, 2, 2)]
    collate = pickle.loads(pickle.dumps(flat(pad_to_multiple_of=4)))
    loader: DataLoader[Any] = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size=2,
        collate_fn=collate,
        num_workers=2,
        multiprocessing_context="fork",
    )
    borders = [batch["cu_seq_lens_q"].tolist() for batch in loader]
    assert borders == [[0, 3, 4], [0, 2, 4]]


def _random_rows(seed: int, spec: MRopeSpec) -> list[Row]:
    rng = random.Random(seed)
    return [_random_row(rng, spec, True, True, False) for _ in range(rng.choice([1, 2, 3, 5]))]


def _one_batch(rows: list[Row], seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    return merge_rows(rng, rows, padding=rng.choice(["left", "right", "ragged"]))


def _collated(spec: MRopeSpec, batch: dict[str, Any], **options: Any) -> Any:
    given: dict[str, Any] = {k: torch.as_tensor(v) for k, v in batch.items() if v is not None}
    if isinstance(batch["second_per_grid_ts"], list):
        given["second_per_grid_ts"] = batch["second_per_grid_ts"]
    return flat(spec, inner=lambda _: given, **options)(None)


@settings(max_examples=1000, deadline=None)
@given(seed=st.integers(0, 2**32), family=st.sampled_from(PACKED), multiple=st.sampled_from([1, 8]))
def test_each_example_is_numbered_as_if_it_were_alone(
    seed: int, family: str, multiple: int
) -> None:
    """By transformers, where it is installed: its own function, called for one example at a time."""
    peer = pytest.importorskip("mrope.hf.get_rope_index", exc_type=ImportError)
    spec = MRopeSpec.from_config(example_config(family), "transformers-5.23")
    if peer.installed_reference() != spec.reference:
        pytest.skip("another release is installed")
    rows = _random_rows(seed, spec)
    whole = _one_batch(rows, seed)
    batch = _collated(spec, whole, pad_to_multiple_of=multiple)
    borders = batch["cu_seq_lens_q"].tolist()
    videos = 0
    for number, row in enumerate(rows):
        alone = _one_row(row)
        seconds = whole["second_per_grid_ts"]
        if seconds is not None and row.videos:
            alone["second_per_grid_ts"] = seconds[videos : videos + len(row.videos)]
        videos += len(row.videos)
        expected, delta = peer.reference_rope_index(spec, alone)
        part = batch["position_ids"][:, :, borders[number] : borders[number + 1]]
        np.testing.assert_array_equal(part[1:].numpy(), expected, strict=True)
        assert part[0, 0].tolist() == list(range(len(row.tokens)))
        assert batch["rope_deltas"][number].tolist() == delta[0].tolist()


@pytest.mark.parametrize("family", THINKERS)
@pytest.mark.parametrize("seed", range(100))
def test_thinkers_number_each_example_as_if_it_were_alone(family: str, seed: int) -> None:
    """Of a batch with an example in each row, and of a row that holds them all."""
    spec = MRopeSpec.from_config(example_config(family), "transformers-5.23")
    rng = random.Random(f"{family} {seed}")
    examples = draw_examples(rng, spec, rng.choice([1, 2, 3]))
    alone = [rope_index(spec, **merged([example])) for example in examples]
    ids = np.concatenate([positions for positions, _ in alone], axis=2)
    deltas = np.concatenate([delta for _, delta in alone])
    batch = MRopeCollator(Merge(spec), spec, packing="flatten")(examples)
    np.testing.assert_array_equal(batch["position_ids"][1:].numpy(), ids, strict=True)
    np.testing.assert_array_equal(batch["rope_deltas"].numpy(), deltas, strict=True)
    lengths = [len(example["input_ids"]) for example in examples]
    assert batch["position_ids"][0, 0].tolist() == [n for length in lengths for n in range(length)]

    row = np.concatenate([example["input_ids"] for example in examples])[None]
    sizes = {k: v for k, v in merged(examples).items() if k not in ("input_ids", "attention_mask")}
    one = rope_index(spec, row, np.ones_like(row), seq_lengths=[lengths], **sizes)
    for ours, theirs in zip(one, (ids, deltas), strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)


def _one_row(row: Row) -> dict[str, Any]:
    return {
        "input_ids": np.array([row.tokens]),
        "mm_token_type_ids": np.array([row.types]),
        "attention_mask": np.ones((1, len(row.tokens)), np.int64),
        "image_grid_thw": np.array(row.images) if row.images else None,
        "video_grid_thw": np.array(row.videos) if row.videos else None,
        "second_per_grid_ts": None,
    }


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), cut=st.integers(0, 10**6))
def test_an_example_cut_at_any_token_never_moves_another(seed: int, cut: int) -> None:
    """Either the cut is inside a span and is refused, naming its row, or the others stay as they are."""
    rows = [row for row in _random_rows(seed, SPEC) if row.tokens]
    victim = seed % len(rows)
    length = cut % len(rows[victim].tokens) + 1
    examples = [_example(row) for row in rows]
    whole = flat()(examples)
    examples[victim]["input_ids"] = rows[victim].tokens[:length]
    examples[victim]["mm_token_type_ids"] = rows[victim].types[:length]
    try:
        batch = flat()(examples)
    except SpanMismatchError as error:
        refused: int | None = error.row
        batch = None
    if batch is None:
        assert refused == victim
        return
    ours, before = batch["cu_seq_lens_q"].tolist(), whole["cu_seq_lens_q"].tolist()
    for number in range(len(rows)):
        now = batch["position_ids"][..., ours[number] : ours[number + 1]]
        then = whole["position_ids"][..., before[number] : before[number + 1]]
        size = length if number == victim else then.shape[-1]
        assert torch.equal(now, then[..., :size])


def _example(row: Row) -> dict[str, Any]:
    example: dict[str, Any] = {"input_ids": row.tokens, "mm_token_type_ids": row.types}
    if row.images:
        example["image_grid_thw"] = row.images
    if row.videos:
        example["video_grid_thw"] = row.videos
    return example


def test_rope_index_numbers_packed_rows_of_a_padded_batch() -> None:
    ids, deltas = rope_index(
        SPEC,
        [[IMAGE, IMAGE, 1, 2, 0], [3, 4, 5, 6, 7]],
        attention_mask=[[1, 1, 1, 1, 0], [1] * 5],
        image_grid_thw=[[1, 2, 4]],
        seq_lengths=[[3, 1], [1, 4]],
    )
    assert ids[2].tolist() == [[0, 1, 2, 0, 0], [0, 0, 1, 2, 3]]
    assert deltas.tolist() == [[0], [0], [0], [0]]


def test_vision_tensors_are_those_of_the_padded_batch_and_features_go_to_the_one_row() -> None:
    config = {
        "model_type": "qwen2_vl",
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_config": {"spatial_merge_size": 2, "model_type": "qwen2_vl"},
    }
    spec = MRopeSpec.from_config(config, "transformers-5.23")
    vision = VisionSpec.from_config(config)
    examples = [
        {"input_ids": [1, START, IMAGE, IMAGE], "image_grid_thw": [[1, 2, 4]]},
        {"input_ids": [START, IMAGE], "image_grid_thw": [[1, 2, 2]]},
    ]
    batch = flat(spec, vision=vision)(examples)
    padded = MRopeCollator(None, spec, vision)(examples)
    assert batch["image_scatter_index"].tolist() == [2, 3, 5]
    assert batch["has_padding"] is False and padded["has_padding"] is True
    for name in ("image_cu_seqlens", "image_position_ids"):
        assert torch.equal(batch[name], padded[name])

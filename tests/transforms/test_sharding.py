"""Parts of a sequence: each rank's tokens with the positions that they have in the whole."""

from __future__ import annotations

import importlib.util
import pickle
import socket
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.nn
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from mrope import (
    MRopeCollator,
    MRopeError,
    MRopeSpec,
    Shapes,
    gather_sequence,
    shard_sequence,
)
from mrope.spec.spec import example_config
from mrope.towers import VisionSpec
from support.specs import example_spec

SPEC = example_spec()
VISION = VisionSpec(spatial_merge_size=2, table_side=16)
START, IMAGE = 101, 102
SCHEMES: Any = ("contiguous", "zigzag")


def text(*lengths: int) -> list[dict[str, Any]]:
    """Examples whose ids and labels count on from example to example: 10 11 12, 20 21 ..."""
    rows = [[10 * (n + 1) + i for i in range(length)] for n, length in enumerate(lengths)]
    return [{"input_ids": row, "labels": row} for row in rows]


def pictures(*images: int) -> list[dict[str, Any]]:
    """An example for each number of images, of 2 tokens each, with text between."""
    made = []
    for count in images:
        ids = [7, *[START, IMAGE, IMAGE, 8] * count, 9]
        made.append(
            {"input_ids": ids, "labels": [one if one < 100 else -100 for one in ids]}
            | ({"image_grid_thw": [[1, 2, 4]] * count} if count else {})
        )
    return made


def parts(batch: Any, ranks: int, scheme: Any = "contiguous", **options: Any) -> list[Any]:
    return [shard_sequence(batch, rank, ranks, scheme, **options) for rank in range(ranks)]


def test_a_padded_batch_in_equal_parts() -> None:
    batch = MRopeCollator(None, SPEC)(text(5, 3))
    first, second = parts(batch, 2, pad_token_id=99)
    assert first["input_ids"].tolist() == [[10, 11, 12], [20, 21, 22]]
    assert second["input_ids"].tolist() == [[13, 14, 99], [0, 0, 99]]
    assert second["attention_mask"].tolist() == [[1, 1, 0], [0, 0, 0]]
    assert second["labels"].tolist() == [[13, 14, -100], [-100, -100, -100]]
    assert first["shift_labels"].tolist() == [[11, 12, 13], [21, 22, -100]]
    assert second["shift_labels"].tolist() == [[14, -100, -100], [-100] * 3]
    assert second["position_ids"][0].tolist() == [[3, 4, 0], [0, 0, 0]]
    assert torch.equal(first["rope_deltas"], batch["rope_deltas"])


def test_a_padded_batch_in_zigzag() -> None:
    batch = MRopeCollator(None, SPEC)(text(7, 8))
    first, second = parts(batch, 2, "zigzag")
    assert first["input_ids"].tolist() == [[10, 11, 16, 0], [20, 21, 26, 27]]
    assert second["input_ids"].tolist() == [[12, 13, 14, 15], [22, 23, 24, 25]]
    assert first["position_ids"][2].tolist() == [[0, 1, 6, 0], [0, 1, 6, 7]]
    assert first["shift_labels"].tolist() == [[11, 12, -100, -100], [21, 22, 27, -100]]


def test_a_flattened_row_in_equal_parts() -> None:
    """The row of 3 + 4 tokens gets a tail, a segment of its own; borders are those of the whole."""
    batch = MRopeCollator(None, SPEC, packing="flatten")(text(3, 4))
    first, second = parts(batch, 2)
    assert first["input_ids"].tolist() == [[10, 11, 12, 20]]
    assert second["input_ids"].tolist() == [[21, 22, 23, 0]]
    assert second["position_ids"][:, 0].tolist() == [[1, 2, 3, 0]] * 4
    assert second["seq_idx"].tolist() == [[1, 1, 1, 2]]
    for part in (first, second):
        assert part["cu_seq_lens_q"].tolist() == [0, 3, 7, 8] == part["cu_seq_lens_k"].tolist()
        assert part["cu_seq_lens_q"].dtype == torch.int32
        assert part["max_length_q"] == part["max_length_k"] == 4
        assert part["use_cache"] is False and "attention_mask" not in part
    # The first label of the second example belongs to nobody.
    assert first["shift_labels"].tolist() == [[11, 12, -100, 21]]


def test_a_tail_that_is_there_grows() -> None:
    batch = MRopeCollator(None, SPEC, packing="flatten", pad_to_multiple_of=5)(text(3, 5))
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 8, 10]
    last = parts(batch, 4)[3]
    assert last["cu_seq_lens_q"].tolist() == [0, 3, 8, 12]
    assert last["position_ids"][:, 0].tolist() == [[1, 2, 3]] * 4
    assert last["seq_idx"].tolist() == [[2, 2, 2]]


def test_a_flattened_row_in_zigzag_cuts_each_example() -> None:
    """3 tokens are padded to 4; the padding counts on behind them, and nobody learns it."""
    batch = MRopeCollator(None, SPEC, packing="flatten")(text(3, 8))
    first, second = parts(batch, 2, "zigzag")
    assert first["input_ids"].tolist() == [[10, 0, 20, 21, 26, 27]]
    assert second["input_ids"].tolist() == [[11, 12, 22, 23, 24, 25]]
    assert first["position_ids"][:, 0].tolist() == [[0, 3, 0, 1, 6, 7]] * 4
    assert first["shift_labels"].tolist() == [[11, -100, 21, 22, 27, -100]]
    for part in (first, second):
        assert part["cu_seq_lens_q"].tolist() == [0, 2, 6]
        assert part["max_length_k"] == 4
        assert part["seq_idx"].tolist() == [[0, 0, 1, 1, 1, 1]]


@settings(max_examples=200, deadline=None)
@given(
    images=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    ranks=st.integers(1, 4),
    scheme=st.sampled_from(SCHEMES),
    packing=st.sampled_from([None, "flatten"]),
    multiple=st.sampled_from([1, 3]),
)
def test_the_parts_together_are_the_whole(
    images: list[int], ranks: int, scheme: Any, packing: Any, multiple: int
) -> None:
    multiple = multiple if packing else 1
    collate = MRopeCollator(None, SPEC, VISION, packing=packing, pad_to_multiple_of=multiple)
    batch = collate(pictures(*images))
    cut = parts(batch, ranks, scheme)
    assert len({part["input_ids"].shape for part in cut}) == 1
    whole = gather_sequence(cut, scheme)
    # Padding may stand between segments: what is no padding is the row, in its order.
    real = torch.ones_like(whole["input_ids"], dtype=torch.bool)
    if packing:
        sizes = batch["cu_seq_lens_q"].diff().tolist()
        borders = (cut[0]["cu_seq_lens_q"] * (ranks if scheme == "zigzag" else 1)).tolist()
        real[:] = False
        for start, size in zip(borders, sizes, strict=False):
            real[0, start : start + size] = True
    else:
        real[:, batch["input_ids"].shape[1] :] = False
    for name in ("input_ids", "labels", "position_ids", *(["seq_idx"] if packing else [])):
        kept = whole[name][..., real[0]]
        assert torch.equal(kept, batch[name]), name
        assert name != "labels" or whole[name][:, ~real[0]].eq(-100).all()
    _features_go_where_they_went(batch, cut)


def _features_go_where_they_went(batch: Any, cut: list[Any]) -> None:
    if "image_scatter_index" not in batch:
        assert "image_feature_index" not in cut[0]
        return
    features = torch.arange(len(batch["image_scatter_index"])) + 1
    taken = torch.cat([part["image_feature_index"] for part in cut])
    assert taken.sort().values.tolist() == (features - 1).tolist()
    for part in cut:
        places = torch.zeros(part["input_ids"].numel(), dtype=torch.int64)
        places[part["image_scatter_index"]] = features[part["image_feature_index"]]
        # The k-th placeholder of the whole batch takes the k-th feature, wherever it stands.
        assert torch.equal(places.view_as(part["input_ids"]) > 0, part["input_ids"] == IMAGE)
    whole = torch.zeros(batch["input_ids"].numel(), dtype=torch.int64)
    whole[batch["image_scatter_index"]] = features
    marked = {**batch, "marks": whole.view_as(batch["input_ids"])}
    for rank, part in enumerate(cut):
        for scheme in SCHEMES:
            again = shard_sequence(marked, rank, len(cut), scheme)
            flat = again["marks"].ravel()[again["image_scatter_index"]]
            assert torch.equal(flat, features[again["image_feature_index"]])
        assert part.keys() >= {"image_grid_thw", "image_cu_seqlens", "image_position_ids"}
        assert not part.keys() & {"image_split_sizes", "has_padding", "segment_sizes"}


# Fixed shapes.

SHAPES = Shapes((64, 128), (96, 192), longest=16, patches_per_segment=8, tokens_per_example=16)
SIZED = VisionSpec(spatial_merge_size=2, table_side=16, patch_shape=(6,))


def fixed_batch(images: list[int], packing: Any) -> Any:
    examples = pictures(*images)
    for example in examples:
        if "image_grid_thw" in example:
            patches = 8 * len(example["image_grid_thw"])
            example["pixel_values"] = torch.randn(patches, 6)
    return MRopeCollator(None, SPEC, SIZED, packing=packing, shapes=SHAPES)(examples)


def described(part: Any) -> dict[str, Any]:
    """Shapes of tensors, and every other value: what a graph is compiled for."""
    return {
        name: tuple(value.shape) if torch.is_tensor(value) else value
        for name, value in part.items()
    }


@settings(max_examples=100, deadline=None)
@given(
    images=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    ranks=st.integers(1, 4),
    scheme=st.sampled_from(SCHEMES),
    packing=st.sampled_from([None, "flatten"]),
)
def test_parts_of_fixed_shapes_together_are_the_whole(
    images: list[int], ranks: int, scheme: Any, packing: Any
) -> None:
    batch = fixed_batch(images, packing)
    features = len(batch["pixel_values"]) // 4
    cut = parts(batch, ranks, scheme)
    assert all(described(part) == described(cut[0]) for part in cut)
    # The feature row that each token takes, and -1 where it takes none.
    rows = batch["vision_feature_index"].view_as(batch["input_ids"])
    taken = torch.where(batch["vision_feature_mask"], rows, -1)
    for part in cut:
        index = part.pop("vision_feature_index").view_as(part["input_ids"])
        assert index.min() >= 0 and index.max() < features
        part["taken"] = torch.where(part["vision_feature_mask"], index, -1)
        # At placeholders, and nowhere else.
        assert torch.equal(part["taken"] >= 0, part["input_ids"] == IMAGE)
    whole = gather_sequence(cut, scheme)
    kept, real = whole["input_ids"] != 0, batch["input_ids"] != 0
    for name, was in {**batch, "taken": taken}.items():
        if name in ("input_ids", "labels", "position_ids", "taken"):
            assert torch.equal(whole[name][..., kept], was[..., real]), name
    assert whole["labels"][~kept].eq(-100).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("packing", [None, "flatten"])
def test_parts_of_one_pair_of_rungs_have_one_description(packing: Any, scheme: Any) -> None:
    """Examples of many lengths; each rank compiles one graph for each pair of rungs."""
    found = {
        str(described(part))
        for images in ([0], [1], [3], [1, 2], [2, 0, 1], [1, 1, 1])
        for part in parts(fixed_batch(images, packing), 2, scheme)
        if fixed_batch(images, packing)["input_ids"].shape[1] == 64
    }
    rows = 1 if packing else 3  # padded batches have their number of rows
    assert len(found) <= rows


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("packing", [None, "flatten"])
def test_parts_of_one_rung_of_tokens_have_one_description(packing: Any, scheme: Any) -> None:
    """Rungs of tokens alone: a row still has one shape, whatever examples are in it."""
    shapes = Shapes((64,), tokens_per_example=16)
    collate = MRopeCollator(None, SPEC, VISION, packing=packing, shapes=shapes)
    batches = [collate(text(*lengths)) for lengths in ((5, 3), (1, 9), (20, 21))]
    cut = [part for batch in batches for part in parts(batch, 2, scheme)]
    assert all(described(part) == described(cut[0]) for part in cut)


def test_a_flattened_row_of_fixed_shapes_in_zigzag() -> None:
    """Segments of 7 and 3 tokens, 54 of padding and 3 empty ones, cut into 4 each."""
    shapes = Shapes((64,), (16,), longest=16, patches_per_segment=8, tokens_per_example=16)
    batch = MRopeCollator(None, SPEC, SIZED, packing="flatten", shapes=shapes)(text(7, 3))
    first, second = parts(batch, 2, "zigzag")
    # Whatever the examples, 64 + 5 * 3 tokens hold their padding: 76 is the next multiple below.
    assert first["input_ids"].shape == second["input_ids"].shape == (1, 38)
    assert first["cu_seq_lens_q"].tolist() == [0, 4, 6, 34, 34, 38]
    assert first["max_length_q"] == 38
    assert first["input_ids"][0, :6].tolist() == [10, 11, 16, 0, 20, 0]
    assert second["input_ids"][0, :6].tolist() == [12, 13, 14, 15, 21, 22]


# Other kinds of batches.


def test_arrays_and_lists_of_a_padded_batch() -> None:
    inner = {"input_ids": np.array([[10, 11, 12]]), "labels": [[10, 11, 12]]}
    first, second = parts(MRopeCollator(lambda _: dict(inner), SPEC)(None), 2)
    assert first["input_ids"].tolist() == [[10, 11]] and second["input_ids"].tolist() == [[12, 0]]
    assert first["shift_labels"].tolist() == [[11, 12]]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_positions_on_one_axis(scheme: Any) -> None:
    spec = MRopeSpec.from_config(example_config("lfm3_vl"))
    batch = MRopeCollator(None, spec)(text(8, 5))
    whole = gather_sequence(parts(batch, 2, scheme), scheme)
    for name in ("input_ids", "position_ids", "labels"):
        assert torch.equal(whole[name], batch[name]), name


def test_positions_on_one_axis_of_a_flattened_row() -> None:
    """They count on in padding, of which each example has some in zigzag, and in a tail."""
    spec = MRopeSpec.from_config(example_config("exaone4_5"))
    batch = MRopeCollator(None, spec, packing="flatten")(text(3, 4))
    first, second = parts(batch, 2)
    assert first["position_ids"].tolist() == [[0, 1, 2, 0]]
    assert second["position_ids"].tolist() == [[1, 2, 3, 0]]
    assert first["cu_seq_lens_q"].tolist() == [0, 3, 7, 8] and first["max_length_q"] == 4
    first, second = parts(batch, 2, "zigzag")
    assert first["position_ids"].tolist() == [[0, 3, 0, 3]]
    assert second["position_ids"].tolist() == [[1, 2, 1, 2]]
    assert first["cu_seq_lens_q"].tolist() == [0, 2, 4] and first["max_length_q"] == 2


def test_indices_of_audio_and_of_tokens() -> None:
    """Audio goes by its index, as images do; indices of the whole batch are dropped."""
    batch = MRopeCollator(None, SPEC)(text(4))
    batch |= {"audio_scatter_index": torch.tensor([1, 2]), "audio_split_sizes": [2]}
    batch |= {"moe_text_index": torch.arange(4), "moe_vision_index": torch.arange(0)}
    first, second = parts(batch, 2)
    kinds = ("scatter", "feature")
    found = [part[f"audio_{name}_index"].tolist() for part in (first, second) for name in kinds]
    assert found == [[1], [0], [0], [1]]
    assert not {"audio_split_sizes", "moe_text_index", "moe_vision_index"} & first.keys()


def test_features_that_video_llama_3_leaves_out() -> None:
    """Index of a feature among all that the tower returns, not among those that are kept."""
    batch = MRopeCollator(None, SPEC)(text(4))
    batch |= {"video_scatter_index": torch.tensor([1, 2, 3])}
    batch |= {"video_feature_index": torch.tensor([0, 4, 5])}
    first, second = parts(batch, 2)
    assert first["video_feature_index"].tolist() == [0]
    assert second["video_scatter_index"].tolist() == [0, 1]
    assert second["video_feature_index"].tolist() == [4, 5]


def test_the_batch_is_not_written_to_and_the_stage_pickles() -> None:
    batch = MRopeCollator(None, SPEC, VISION, packing="flatten")(pictures(2, 1))
    before = pickle.loads(pickle.dumps(batch))
    stage = pickle.loads(pickle.dumps(partial(shard_sequence, rank=1, world_size=2)))
    stage(batch)
    assert batch.keys() == before.keys()
    for name, value in batch.items():
        same = torch.equal(value, before[name]) if torch.is_tensor(value) else value == before[name]
        assert same, name


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"rank": 2}, "rank 2 is not one of world_size=2 ranks"),
        ({}, {"rank": 0, "world_size": 0}, "world_size=0"),
        ({}, {"scheme": "ring"}, "scheme must be 'contiguous' or 'zigzag', not 'ring'"),
        ({"position_ids": None}, {}, "without position_ids: .* MRopeCollator"),
        ({"batch_first": torch.ones(1)}, {}, r"call to_model_layout\(batch\) first"),
    ],
)
def test_what_is_refused(change: dict[str, Any], options: dict[str, Any], message: str) -> None:
    batch = {**MRopeCollator(None, SPEC)(text(4)), **change}
    with pytest.raises(MRopeError, match=message):
        shard_sequence(batch, **{"rank": 0, "world_size": 2, **options})


def test_an_attached_model_refuses_a_part() -> None:
    models = pytest.importorskip("support.models", exc_type=ImportError)
    from mrope.hf import attach

    vision = VisionSpec.from_config(models.model_config("qwen2_vl"))
    batch = MRopeCollator(None, models.tiny_spec("qwen2_vl"), vision)(
        models.tiny_examples("qwen2_vl")
    )
    model = attach(models.tiny_model("qwen2_vl"))
    with pytest.raises(MRopeError, match="without .*split_sizes"):
        model(**shard_sequence(batch, 0, 2))
    shapes = Shapes((128,), (256,), 128, patches_per_segment=8)
    fixed = MRopeCollator(None, models.tiny_spec("qwen2_vl"), vision, shapes=shapes)(
        models.tiny_examples("qwen2_vl")
    )
    with pytest.raises(MRopeError, match="without has_padding"):
        model(**shard_sequence(fixed, 0, 2))


# Two processes.


Job = tuple[Any, tuple[Any, ...]]


def run_in_two(folder: Path, jobs: list[Job]) -> dict[Job, list[Any]]:
    """Run each `function(rank, *arguments)` in the same two gloo processes; return both results."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(  # type: ignore[attr-defined, no-untyped-call]
        _one_of_two, (port, str(folder), jobs), nprocs=2, join=True
    )
    found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
    return {job: list(results) for job, *results in zip(jobs, *found, strict=True)}


def _one_of_two(rank: int, port: int, folder: str, jobs: list[Job]) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=2)
    results = [function(rank, *arguments) for function, arguments in jobs]
    torch.save(results, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


GATHERED = [(scheme, packing) for scheme in SCHEMES for packing in (None, "flatten")]
ON_PARTS = [
    (family, packing) for family in ("qwen2_vl", "qwen2_5_vl") for packing in (None, "flatten")
]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[Job, list[Any]]:
    """Results of two processes, which are started once: that takes longer than what they do."""
    jobs: list[Job] = [(gathered_parts, case) for case in GATHERED]
    if importlib.util.find_spec("transformers") is not None:
        jobs += [(run_on_a_part, case) for case in ON_PARTS]
    return run_in_two(tmp_path_factory.mktemp("two"), jobs)


def gathered_parts(rank: int, scheme: Any, packing: Any) -> dict[str, torch.Tensor]:
    batch = MRopeCollator(None, SPEC, packing=packing)(pictures(2, 0, 3))
    own = shard_sequence(batch, rank, 2, scheme)
    everyones: list[Any] = [None, None]
    torch.distributed.all_gather_object(everyones, own)
    return gather_sequence(everyones, scheme)


@pytest.mark.parametrize(("scheme", "packing"), GATHERED)
def test_parts_gathered_from_two_processes(of_two: Any, scheme: Any, packing: Any) -> None:
    batch = MRopeCollator(None, SPEC, packing=packing)(pictures(2, 0, 3))
    expected = gather_sequence(parts(batch, 2, scheme), scheme)
    for whole in of_two[gathered_parts, (scheme, packing)]:
        assert whole.keys() == expected.keys()
        assert all(torch.equal(whole[name], expected[name]) for name in whole)
        if packing is None and scheme == "contiguous":
            width = batch["input_ids"].shape[1]
            assert torch.equal(whole["position_ids"][..., :width], batch["position_ids"])


def gathered_attention(
    module: Any, query: Any, key: Any, value: Any, *_: Any, **options: Any
) -> Any:
    """Attend from a rank's tokens to those of all ranks before them, in their own segment."""
    keys, values = (
        torch.distributed.nn.all_gather(one)  # type: ignore[no-untyped-call]
        for one in (key, value)
    )
    whole_key, whole_value = torch.cat(keys, dim=2), torch.cat(values, dim=2)
    width, start = query.shape[2], torch.distributed.get_rank() * query.shape[2]
    place = torch.arange(whole_key.shape[2])
    mask = place[None] <= (start + torch.arange(width))[:, None]
    if (borders := options.get("cu_seq_lens_q")) is not None:
        segment = torch.bucketize(place, borders[1:-1].long(), right=True)
        mask &= segment[None] == segment[start : start + width, None]
    output = torch.nn.functional.scaled_dot_product_attention(
        query, whole_key, whole_value, attn_mask=mask, scale=options["scaling"], enable_gqa=True
    )
    return output.transpose(1, 2), None


def run_on_a_part(rank: int, family: str, packing: Any) -> dict[str, Any]:
    """Embed the whole sequence, as Ulysses trainers do, then run the layers on this rank's part."""
    from transformers import AttentionInterface

    from mrope.hf.attaching import base_model
    from support import models

    AttentionInterface.register("gathered", gathered_attention)
    batch = _model_batch(models, family, packing)
    model = models.tiny_model(family, "sdpa")
    base = base_model(model)
    embeds = _embed(base, batch)
    part = shard_sequence({**batch, "embeds": embeds}, rank, 2)
    model.set_attn_implementation({"text_config": "gathered"})
    borders = {name: part[name] for name in ("cu_seq_lens_q", "cu_seq_lens_k") if name in part}
    with torch.no_grad():
        hidden = base.language_model(
            inputs_embeds=part["embeds"],
            position_ids=part["position_ids"][-3:],
            use_cache=False,
            **borders,
        ).last_hidden_state
        logits = model.lm_head(hidden)
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), part["shift_labels"].flatten(), reduction="sum", ignore_index=-100
        )
    return {"logits": logits, "loss": losses, "tokens": part["shift_labels"].ne(-100).sum()}


def _model_batch(models: Any, family: str, packing: Any) -> Any:
    vision = VisionSpec.from_config(models.model_config(family))
    examples = models.tiny_examples(family, rows=3)
    return MRopeCollator(None, models.tiny_spec(family), vision, packing=packing)(examples)


def _embed(base: Any, batch: Any) -> torch.Tensor:
    """Return the token embeddings of the whole sequence with the features in their places."""
    embeds = base.get_input_embeddings()(batch["input_ids"]).flatten(0, 1)
    with torch.no_grad():
        for modality, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            grid = batch[f"{modality}_grid_thw"]
            features = base.visual(batch[pixels], grid_thw=grid).pooler_output
            embeds = embeds.index_copy(0, batch[f"{modality}_scatter_index"], features)
    whole: torch.Tensor = embeds.view(*batch["input_ids"].shape, -1).detach()
    return whole


@pytest.mark.parametrize(("family", "packing"), ON_PARTS)
def test_a_model_on_two_parts_gives_what_it_gives_on_the_whole(
    of_two: Any, family: str, packing: Any
) -> None:
    models = pytest.importorskip("support.models", exc_type=ImportError)
    batch = _model_batch(models, family, packing)
    with torch.no_grad():
        whole = models.tiny_model(family)(**batch)
    found = of_two[run_on_a_part, (family, packing)]
    logits = torch.cat([one["logits"] for one in found], dim=1)[:, : batch["input_ids"].shape[1]]
    valid = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    torch.testing.assert_close(logits[valid], whole.logits[valid], rtol=0, atol=1e-4)
    loss = sum(one["loss"] for one in found) / sum(one["tokens"] for one in found)
    assert loss.item() == pytest.approx(whole.loss.item(), abs=1e-5)

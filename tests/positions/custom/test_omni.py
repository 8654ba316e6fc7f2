"""The Omni thinkers against a twin, the installed transformers, and what batches suffer on the way;
and their audio towers' tensors against the live towers."""

from __future__ import annotations

import importlib
import random
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrope import MRopeError, MRopeSpec, rope_index
from mrope.towers import AudioSpec, audio_tensors, audio_tokens, padded_features
from support.specs import example_spec
from twins.omni import (
    AUDIO_END,
    FAMILIES,
    Maker,
    processor_batch,
    random_maker,
    slow_omni_index,
)

BATCHES = 300
MELS, BINS = 340, 16
families = pytest.mark.parametrize("family", FAMILIES)


def assert_equal(actual: tuple[Any, Any], expected: tuple[Any, Any], what: str = "") -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs, what, strict=True)


@families
@settings(max_examples=BATCHES, deadline=None)
@given(rng=st.randoms(use_true_random=False))
def test_equal_to_the_twin(family: str, rng: random.Random) -> None:
    spec = example_spec(family)
    batch = processor_batch(rng, spec)
    assert_equal(rope_index(spec, **batch), slow_omni_index(spec, batch))


@families
def test_equal_to_the_installed_release(family: str) -> None:
    reference = live_reference()
    spec, rng = example_spec(family), random.Random(5)
    for number in range(BATCHES):
        batch = processor_batch(rng, spec, masked=True)
        assert_equal(rope_index(spec, **batch), reference(spec, batch), f"batch {number}")


def live_reference() -> Any:
    pytest.importorskip("transformers", "5.6")
    return importlib.import_module("mrope.hf.get_rope_index").reference_rope_index


@families
def test_what_is_not_refused_is_numbered_like_the_reference(family: str) -> None:
    """No stray token, lost grid or cut row passes with other numbers, or ends in another error."""
    reference = live_reference()
    spec, rng = example_spec(family), random.Random(6)
    refused = 0
    for number in range(BATCHES):
        batch = spoil(rng, spec, processor_batch(rng, spec, masked=True))
        try:
            actual = rope_index(spec, **batch)
        except MRopeError:
            refused += 1
            continue
        assert_equal(actual, reference(spec, batch), f"batch {number}")
    assert refused > BATCHES // 3


def spoil(rng: random.Random, spec: MRopeSpec, batch: dict[str, Any]) -> dict[str, Any]:
    """Change one thing of a well-formed batch, as truncation, collating or a typo would."""
    batch = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in batch.items()}
    ids = batch["input_ids"]
    row, column = rng.randrange(len(ids)), rng.randrange(ids.shape[1])
    special = [spec.vision_start_token_id, spec.image_token_id, spec.video_token_id, AUDIO_END]
    special += [int(spec.extra["audio_token_id"]), int(spec.extra["audio_start_token_id"])]
    sizes = [
        name
        for name in ("image_grid_thw", "video_grid_thw", "audio_seqlens")
        if batch[name] is not None
    ]
    name = rng.choice(sizes) if sizes else None
    change = rng.choice(
        ["token", "token", "shift", "cut", "flag", "lost", "swapped", "size", "size"]
    )
    if change == "flag":
        batch["use_audio_in_video"] = not batch["use_audio_in_video"]
    elif change == "shift":
        ids[row, column:] = np.append(ids[row, column + 1 :], 7)
    elif change == "cut":
        batch["input_ids"] = ids[:, : column + 1]
        batch["attention_mask"] = batch["attention_mask"][:, : column + 1]
        batch["attention_mask"][:, 0] = 1  # the reference cannot number a row without a token
    elif change == "token" or name is None:
        ids[row, column] = rng.choice(special)
    elif change == "lost":
        batch[name] = batch[name][:-1]
    elif change == "swapped":
        batch[name] = batch[name][::-1].copy()
    else:
        sizes_N = batch[name].reshape(len(batch[name]), -1)
        sizes_N[rng.randrange(len(sizes_N)), rng.randrange(sizes_N.shape[1])] = rng.choice(
            [-2, 0, 1, 2, 4, 6, 1000, 2**40]
        )
    return batch


@families
def test_counts_of_a_row_are_checked(family: str) -> None:
    spec, rng = example_spec(family), random.Random(7)
    for kind, name in enumerate(("images_per_sample", "videos_per_sample", "audios_per_sample")):
        maker = random_maker(rng, spec)
        while len(maker.rows) < 2 or not maker.counts[0][kind]:
            maker = random_maker(rng, spec)
        batch = maker.batch("right", masked=True)
        counts = [row[kind] for row in maker.counts]
        told: dict[str, Any] = batch | {name: counts}
        assert_equal(rope_index(spec, **told), rope_index(spec, **batch))
        moved = [counts[0] - 1, counts[1] + 1, *counts[2:]]
        with pytest.raises(MRopeError, match="row 0.*carries"):
            rope_index(spec, **(told | {name: moved}))


@families
@pytest.mark.parametrize("seconds", [1e38, 1e30, 3e6, 2**23 / 50])
def test_endless_clips(family: str, seconds: float) -> None:
    inputs: dict[str, Any] = {"video_grid_thw": [[2, 2, 2]], "second_per_grid_ts": [seconds]}
    with pytest.raises(MRopeError, match=r"second_per_grid_ts\[0\] = .*: 2 frames would end at"):
        rope_index(example_spec(family), [[101, 103, 103, 98]], **inputs)


TOWERS = {
    "qwen2_5_omni_thinker": {"n_window": 20},
    "qwen3_omni_moe_thinker": {"n_window_infer": 200, "downsample_hidden_size": 8},
}


@lru_cache
def tiny_thinker(family: str) -> Any:
    """Return a thinker with random weights and the token ids of `example_config`."""
    transformers = pytest.importorskip("transformers", "5.23")
    text: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    audio = {
        "num_mel_bins": BINS,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "d_model": 32,
        "output_dim": 64,
        "max_source_positions": 100,
    }
    vision: dict[str, Any] = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
    }
    if family == "qwen3_omni_moe_thinker":
        text |= {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    config = transformers.AutoConfig.for_model(
        family,
        text_config=text,
        audio_config=audio | TOWERS[family],
        vision_config=vision | {"out_hidden_size": 64},
        audio_start_token_id=105,
        vision_start_token_id=101,
    )
    config.image_token_id, config.video_token_id, config.audio_token_id = 102, 103, 104
    torch.manual_seed(0)
    return thinker_class(family)._from_config(config, attn_implementation="sdpa").eval()


def tower_module(family: str) -> Any:
    pytest.importorskip("transformers", "5.23")
    name = family.removesuffix("_thinker")
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def thinker_class(family: str) -> Any:
    classes = vars(tower_module(family)).items()
    return next(one for name, one in classes if name.endswith("ThinkerForConditionalGeneration"))


def as_tensors(spec: AudioSpec, lengths: list[int]) -> dict[str, Any]:
    tensors = audio_tensors(spec, lengths)
    assert tuple(tensors) == spec.keys
    return {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in tensors.items()
    }


@families
def test_audio_tensors_are_what_the_tower_computes(family: str) -> None:
    module, rng = tower_module(family), random.Random(8)
    pooled = family == "qwen2_5_omni_thinker"
    for _ in range(200):
        window = rng.choice([4, 20, 100]) if pooled else 50
        spec = AudioSpec(window, None if pooled else rng.choice([1, 2, 8]))
        most = rng.choice([9, 220, 3000])
        lengths = [rng.randrange(1, most) for _ in range(rng.choice([1, 2, 5]))]
        frames = torch.tensor(lengths)
        features = torch.randn(len(lengths), 2, max(lengths) + rng.randrange(3))
        flat = torch.cat([one[:, :n] for one, n in zip(features, lengths, strict=True)], dim=1)
        padded, chunks = module.chunk_and_pad_features(flat, frames, window)
        ours = as_tensors(spec, lengths)
        expected = {"chunk_lengths": chunks}
        if pooled:
            expected["valid_indices"] = module.get_valid_indices(chunks)
            expected["pool_indices"] = module.get_pool_indices(frames)
            expected["cu_seqlens"] = module.get_audio_cu_seqlens(chunks)
            tokens = len(expected["pool_indices"])
        else:
            infer = 2 * window * int(spec.chunks_attended or 0) + rng.randrange(2 * window)
            expected["valid_indices"] = module.get_valid_indices(chunks, window)
            expected["cu_seqlens"] = module.get_audio_cu_seqlens(chunks, frames, infer, window)
            tokens = len(expected["valid_indices"])
        for name, tensor in expected.items():
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0, msg=name)
        assert {*ours} == {*expected, "max_seqlen"}
        assert type(ours["max_seqlen"]) is int
        assert ours["max_seqlen"] == expected["cu_seqlens"].diff().max()
        assert audio_tokens(spec, np.array(lengths)).sum() == tokens
        cut = padded_features(spec, features, lengths)
        torch.testing.assert_close(cut, padded, rtol=0, atol=0)
        assert cut.stride() == padded.stride()


def call(family: str, lengths: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a batch with a row for each audio, and its audio tensors."""
    model = tiny_thinker(family)
    spec = AudioSpec.from_config(model.config)
    tokens = audio_tokens(spec, np.array(lengths)).tolist()
    rows = [[7, 105, *[104] * count, AUDIO_END] for count in tokens]
    width = max(map(len, rows))
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(len(lengths), BINS, MELS, generator=generator)
    batch = {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        "input_features": features,
        "feature_attention_mask": (torch.arange(MELS) < torch.tensor(lengths)[:, None]).long(),
    }
    tensors = {f"audio_{name}": value for name, value in as_tensors(spec, lengths).items()}
    return batch, tensors | {"audio_padded_feature": padded_features(spec, features, lengths)}


@families
@torch.no_grad()
def test_logits_are_the_same_with_audio_tensors(family: str) -> None:
    """Bit for bit; and every tensor is read: a wrong one changes the logits."""
    batch, tensors = call(family, [95, 333, 200])
    model = tiny_thinker(family)
    logits = model(**batch).logits
    assert torch.equal(model(**batch, **tensors).logits, logits)
    # `max_seqlen` is for flash attention; Qwen3-Omni needs chunks' lengths for the others alone.
    unread = {"audio_max_seqlen"}
    unread |= {"audio_chunk_lengths"} if family == "qwen3_omni_moe_thinker" else set()
    for name in tensors.keys() - unread:
        wrong = tensors[name][[0, -1]] if name == "audio_cu_seqlens" else tensors[name].flip(0)
        assert not torch.equal(model(**batch, **(tensors | {name: wrong})).logits, logits), name


def test_the_spec_is_found_in_every_config() -> None:
    audio = {"model_type": "qwen2_5_omni_audio_encoder", "n_window": 100}
    thinker = {"model_type": "qwen2_5_omni_thinker", "audio_config": audio}
    for config in (audio, thinker, {"model_type": "qwen2_5_omni", "thinker_config": thinker}):
        assert AudioSpec.from_config(config) == AudioSpec(100)
    new = {"model_type": "qwen3_omni_moe_audio_encoder", "n_window": 50, "n_window_infer": 800}
    assert AudioSpec.from_config(new) == AudioSpec(50, 8)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "qwen2_vl"}, "'qwen2_vl' has no audio tower"),
        ({}, "None has no audio tower"),
        ({"model_type": "qwen2_5_omni_thinker", "audio_config": 3}, "must be a section, not 3"),
        (
            {"model_type": "qwen2_5_omni_audio_encoder", "n_window": None},
            "the config has no n_window",
        ),
        (
            {"model_type": "qwen3_omni_moe_audio_encoder", "n_window": 50, "n_window_infer": 99},
            "n_window_infer must be an integer >= 100",
        ),
    ],
)
def test_a_config_without_a_tower(config: dict[str, Any], message: str) -> None:
    with pytest.raises(MRopeError, match=message):
        AudioSpec.from_config(config)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([30, 0], r"audio_seqlens\[1\] = 0: must be at least 1"),
        ([[30]], r"must have shape \(audios,\), not \(1, 1\)"),
        ([3.5], "must hold integers"),
    ],
)
def test_lengths_that_are_none(lengths: Any, message: str) -> None:
    with pytest.raises(MRopeError, match=message):
        audio_tensors(AudioSpec(100), lengths)


def test_no_audio_no_tensors() -> None:
    assert audio_tensors(AudioSpec(100), None) == audio_tensors(AudioSpec(100), []) == {}


@pytest.mark.parametrize("lengths", [[30], [30, 41], [30, 30, 30]])
def test_features_of_other_lengths(lengths: list[int]) -> None:
    with pytest.raises(MRopeError, match=r"do not fit input_features of shape \(2, 4, 40\)"):
        padded_features(AudioSpec(100), torch.zeros(2, 4, 40), lengths)


@families
def test_each_clip_may_have_its_audio_inside_or_not(family: str) -> None:
    """Rows of both kinds are those of a batch of each; a row of both kinds is the twin's."""
    spec, rng = example_spec(family), random.Random(f"{family} clips")
    for _ in range(100):
        maker = Maker(rng, spec, together=False)
        flags: list[bool] = []
        for _ in range(rng.choice([1, 2, 3])):
            row: list[int] = []
            for kind in rng.choices("iva", k=rng.choice([1, 2, 4])):
                maker.together = rng.random() < 0.5
                flags += [maker.together] * (kind == "v")
                row += (
                    maker.text(0, 1)
                    + {"i": maker.image, "v": maker.video, "a": maker.audio}[kind]()
                )
            maker.rows.append([*row, 7])
        batch = maker.batch("right", masked=True)
        expected = slow_omni_index(spec, batch)
        actual = rope_index(spec, **(batch | {"use_audio_in_video": np.array(flags, bool)}))
        for ours, theirs in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs, strict=True)
        if len(set(flags)) > 1:
            with pytest.raises(MRopeError):
                rope_index(spec, **(batch | {"use_audio_in_video": True}))
            with pytest.raises(MRopeError, match="or one for each of its"):
                rope_index(spec, **(batch | {"use_audio_in_video": [*flags, True, False]}))

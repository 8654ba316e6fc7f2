"""Attached models with 1-D positions: results of the unmodified model, and no syncs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from torch.nn import functional

from mrope import MRopeCollator, MRopeError, SpanMismatchError, VisionSpec, rope_index
from mrope.collate.padding import PaddingCollator
from mrope.hf import attach
from mrope.hf.features import convolve_frames
from mrope.spec import ONE_DIMENSIONAL
from mrope.towers.vision import neighbour_offsets, to_frames
from mrope.training.step import guarded_step
from support.models import (
    CONFIGS,
    PLAIN_FAMILIES,
    model_config,
    tiny_examples,
    tiny_model,
    tiny_spec,
)
from support.steps import (
    MEDIA,
    assert_same_step,
    logits_of,
    make_batches,
    step,
    tensor_collator,
)


def test_these_are_the_families() -> None:
    assert set(PLAIN_FAMILIES) == set(ONE_DIMENSIONAL)


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_positions_are_those_of_a_text_and_only_the_collator_gives_them(family: str) -> None:
    spec, examples = tiny_spec(family), tiny_examples(family)
    batch: Any = MRopeCollator(None, spec, layout="batch")(examples)
    rows, width = batch["input_ids"].shape
    assert batch["position_ids"].tolist() == [list(range(width))] * rows
    assert "rope_deltas" not in batch
    with pytest.raises(MRopeError, match=f"{family} numbers its tokens in 1-D"):
        rope_index(spec, [[7, 8]])
    flatten: Any = {"packing": "flatten", "pad_to_multiple_of": 64}
    if not spec.family_row.packs:
        with pytest.raises(MRopeError, match=f"refused for {family}"):
            MRopeCollator(None, spec, **flatten)
        return
    batch = MRopeCollator(None, spec, **flatten, attached=True)(examples)
    lengths = batch["cu_seq_lens_q"].diff().tolist()
    assert len(lengths) == rows + 1
    assert batch["position_ids"].tolist() == [[n for length in lengths for n in range(length)]]
    assert "rope_deltas" not in batch


def test_an_unmodified_model_that_leaks_gets_no_flattened_rows() -> None:
    with pytest.raises(MRopeError, match="refused for an unmodified lfm3_vl, whose layers look"):
        MRopeCollator(None, tiny_spec("lfm3_vl"), packing="flatten")


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_wrong_tensors_would_be_seen(family: str) -> None:
    _, batch = make_batches(family, MEDIA["images"], padded=True)
    model = attach(tiny_model(family))
    with torch.no_grad():
        right = model(**batch).logits
        # GLM-5-Next has no positions in its text at all.
        for name in ("image_position_ids", "position_ids")[: 1 if family == "glm5_next" else 2]:
            wrong = model(**batch | {name: batch[name].flip(0, 1)}).logits
            assert not torch.equal(wrong, right), name


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_the_counts_in_the_docs_are_what_is_counted(family: str) -> None:
    plain, batch = make_batches(family, MEDIA["images"], padded=False)
    model = tiny_model(family).train()
    counts = [guarded_step(model, one).count for one in (plain, batch)]
    counts.append(guarded_step(attach(model), batch).count)
    page = (CONFIGS.parent / "docs" / "families.md").read_text(encoding="utf-8")
    (row,) = (line for line in page.splitlines() if line.startswith(f"| `{family}` |"))
    assert row.split("|")[3].strip() == ", ".join(map(str, counts))


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_a_second_thread_runs_in_the_middle_of_a_forward(family: str) -> None:
    """As in a server: the text model's config is another one for as long as a forward runs."""
    _, batch = make_batches(family)
    model = attach(tiny_model(family))
    text = model.model.language_model
    config = text.config
    expected = logits_of(model, batch)
    with ThreadPoolExecutor() as pool:

        def run_beside(*_: Any) -> None:
            hook.remove()
            assert torch.equal(pool.submit(logits_of, model, batch).result(), expected)

        hook = text.layers[0].register_forward_pre_hook(run_beside)
        assert torch.equal(logits_of(model, batch), expected)
    assert text.config is config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tower_convolves_frames_of_all_sizes_by_one_index(dtype: torch.dtype) -> None:
    """What fixed shapes take in place of sizes on the host; padding of a rung stays 0."""
    model = tiny_model("lfm3_vl")
    layer = next(
        one for one in model.modules() if type(one).__name__ == "Lfm3VlVisionShortConv"
    ).to(dtype)
    grids = [[1, 2, 6], [3, 4, 2], [1, 8, 8]]
    frames = to_frames(grids, 2)
    offsets = torch.from_numpy(neighbour_offsets(frames, 2, 3)["neighbour_offsets"])
    states = torch.randn(len(offsets), 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = layer(states, grid_thw=grids)
    states = functional.pad(states, (0, 0, 0, 5))
    found = convolve_frames(layer, states, [], functional.pad(offsets, (0, 0, 0, 5)))
    assert not found[-5:].any()
    apart = (found[:-5] - want).abs() > 1e-6
    # Of half precision some are rounded otherwise, as taps may be added up in another order.
    assert apart.float().mean() < (0.01 if dtype == torch.bfloat16 else 1e-9)


def test_an_adapter_in_place_of_a_tower_convolution_is_refused_with_fixed_shapes() -> None:
    examples = tiny_examples("lfm3_vl")
    vision = VisionSpec.from_config(model_config("lfm3_vl"))
    shapes = {"tokens": (128,), "patches": (512,), "longest": 128, "patches_per_segment": 8}
    batch = MRopeCollator(None, tiny_spec("lfm3_vl"), vision, shapes=shapes)(examples)
    model = attach(tiny_model("lfm3_vl"))
    assert guarded_step(model, dict(batch)).count == 0
    layer = next(one for one in model.modules() if hasattr(one, "spatial_conv"))
    layer.spatial_conv = torch.nn.Sequential(layer.spatial_conv)
    with pytest.raises(MRopeError, match="Sequential in place of a convolution of the tower"):
        model(**batch)


def test_audio_is_left_to_the_models_own_forward() -> None:
    _, batch = make_batches("dots3_note", MEDIA["text"], padded=False)
    model = attach(tiny_model("dots3_note"))
    with pytest.raises(MRopeError, match="an attached dots3_note takes no audio"):
        model(**batch, input_features=torch.zeros(1, 16, 8))


def test_tokens_that_video_llama_3_leaves_out() -> None:
    """Its processor keeps of a video what changes; the mask says which tokens that is."""
    (example,) = tiny_examples("video_llama_3", images=False, rows=1)
    (places,) = (example["input_ids"] == 6).nonzero()
    mask = torch.ones(len(places), dtype=torch.bool)
    mask[1] = False
    keep = np.delete(np.arange(len(example["input_ids"])), places[1])
    example |= {name: example[name][keep] for name in ("input_ids", "labels", "mm_token_type_ids")}
    example["video_compression_mask"] = mask
    plain, batch = PaddingCollator()([example]), tensor_collator("video_llama_3")([example])
    model = tiny_model("video_llama_3").train()
    theirs = step(model, plain)
    attach(model)
    assert_same_step(step(model, batch), theirs)
    assert guarded_step(model, batch).count == 0
    example["video_compression_mask"] = ~mask
    with pytest.raises(SpanMismatchError, match=f"{len(places) - 1} video tokens, .* need 1"):
        tensor_collator("video_llama_3")([example])
    example["video_merge_sizes"] = [1]
    with pytest.raises(MRopeError, match="video_compression_mask has shape"):
        tensor_collator("video_llama_3")([example])
    example["video_merge_sizes"] = [0]
    with pytest.raises(MRopeError, match="video_merge_sizes must hold one size"):
        tensor_collator("video_llama_3")([example])

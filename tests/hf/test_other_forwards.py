"""Attached models of the families without a shipped config: results of the unmodified model, and no syncs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForImageTextToText

from mrope import MRopeCollator, MRopeError, Shapes, VisionSpec
from mrope.hf import attach
from mrope.hf.attaching import detach
from mrope.hf.rows import ROWS
from mrope.towers import block_index, pair_index
from support.models import (
    TINY_FAMILIES,
    media_of,
    model_config,
    tiny_examples,
    tiny_model,
    tiny_spec,
)
from support.steps import MEDIA, assert_attached_as_plain, make_batches, tensor_collator

FAMILIES = [family for family in TINY_FAMILIES if family in ROWS]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.startswith("glm")])
def test_images_and_videos_go_together_where_the_model_is_attached(family: str) -> None:
    """transformers takes frames for images in such a batch, and refuses it. Rows are independent:
    each gives what it gives in a batch of its own kind."""
    image, video = (tiny_examples(family, **media, rows=1)[0] for media in media_of(family))
    collate = tensor_collator(family)
    model = attach(tiny_model(family))
    with torch.no_grad():
        both = model(**collate([image, video])).logits
        for row, example in enumerate((image, video)):
            alone = model(**collate([example])).logits[0]
            torch.testing.assert_close(both[row, : len(alone)], alone, rtol=0, atol=1e-5)


def test_blocks_of_a_raster() -> None:
    assert block_index([[1, 2, 4]], 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert block_index([[2, 2, 2], [1, 2, 2]], 2).tolist() == list(range(12))


def test_pairs_of_frames() -> None:
    """Those of the resampler's own loop, for images, even clips, and odd ones."""
    grids = [[1, 2, 4], [4, 4, 2], [3, 2, 2], [1, 2, 2], [2, 4, 4]]
    tokens = sum(t * h * w for t, h, w in grids) // 4
    own = tiny_model("ernie4_5_vl_moe").model.resampler_model
    places = torch.arange(tokens)[:, None]
    halves = own._temporal_slicing(places, torch.tensor(grids)).T
    assert pair_index(grids, 2).tolist() == halves.tolist()


def with_ngrams() -> Any:
    """A tiny Qwen4-Exp whose first layer embeds n-grams of token ids."""
    live = tiny_model("qwen4_exp").config
    text = live.text_config
    text.ple_layer_ids, text.ple_embed_dim, text.eos_token_id = [1], 32, 1
    text.ngram_vocab_size_base, text.number_of_conv_states = 1000, 3
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(live, attn_implementation="sdpa").train()
    # The convolution begins with zeros.
    torch.nn.init.normal_(model.model.language_model.layers[0].ple.conv1d.weight)
    return model


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
def test_ngrams_of_token_ids(padded: bool) -> None:
    plain, batch = make_batches("qwen4_exp", MEDIA["both"], padded)
    assert_attached_as_plain(with_ngrams(), plain, batch)


def test_ngrams_would_cross_the_borders_of_a_flattened_row() -> None:
    vision = VisionSpec.from_config(model_config("qwen4_exp"))
    collate = MRopeCollator(None, tiny_spec("qwen4_exp"), vision, packing="flatten")
    batch = collate(tiny_examples("qwen4_exp"))
    with pytest.raises(MRopeError, match="not supported for qwen4_exp with ple_layer_ids"):
        attach(with_ngrams())(**batch)


def test_experts_by_index_and_by_type_are_the_same() -> None:
    """Without the token types of ERNIE's processor, all tokens go to the text experts."""
    plain, batch = make_batches("ernie4_5_vl_moe", MEDIA["both"])
    model = attach(tiny_model("ernie4_5_vl_moe"))
    with torch.no_grad():
        right = model(**batch).logits
        for one in (plain, batch):
            for name in [name for name in one if name.startswith("moe_")]:
                del one[name]
        text_alone = model(**batch).logits
        assert torch.equal(text_alone, detach(model)(**plain).logits)
        assert not torch.allclose(text_alone, right)


@pytest.mark.parametrize("family", ["ernie4_5_vl_moe", "cosmos3_edge"])
def test_towers_with_sizes_on_the_host_have_no_fixed_shapes(family: str) -> None:
    vision = VisionSpec.from_config(model_config(family))
    with pytest.raises(MRopeError, match=f"shapes is not supported for {family}: its features"):
        MRopeCollator(None, tiny_spec(family), vision, shapes=Shapes(tokens=(64,), patches=(64,)))

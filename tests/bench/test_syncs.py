"""What removes which syncs, and the table of counts in the docs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from mrope.bench.syncs import count_row, markdown
from mrope.guard import SyncGuard
from mrope.hf import attach
from mrope.training.config import load_config
from mrope.training.step import guarded_step
from support.models import CONFIGS, MODEL_FAMILIES, tiny_model
from support.steps import make_batches


def test_the_sites_of_a_plain_model_are_those_known() -> None:
    plain_batch, _ = make_batches("qwen3_vl")
    report = guarded_step(tiny_model("qwen3_vl").train(), plain_batch).report()
    for function in (
        "get_rope_index: tolist",
        "get_placeholder_mask: format",
        "get_image_features: tolist",
        "_deepstack_process: indexing by a mask",
        "_ignore_causal_mask_sdpa via modeling_qwen3_vl.py",
        "get_vision_position_ids via modeling_qwen3_vl.py",
        "masked_select (backward of MaskedScatterBackward0)",
    ):
        assert function in report


@pytest.mark.parametrize(
    ("dropped", "site"),
    [
        ("image_split_sizes", "tolist"),
        ("has_padding", "_ignore_causal_mask_sdpa"),
        ("_deepstack_process", "_deepstack_process"),
    ],
)
def test_without_one_of_its_parts_the_attached_model_syncs(dropped: str, site: str) -> None:
    _, batch = make_batches("qwen3_vl")
    model = attach(tiny_model("qwen3_vl").train(), strict=False)
    text = model.model.language_model
    if dropped in batch:
        del batch[dropped]
    else:
        del text._deepstack_process
        mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        index = batch["image_scatter_index"]
        mask.view(-1)[index] = True
        with SyncGuard() as guard:
            text._deepstack_process(torch.zeros(*mask.shape, 4), mask, torch.zeros(len(index), 4))
        assert site in guard.report()
        return
    assert site in guarded_step(model, batch).report()


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_the_table_in_the_docs_is_what_is_counted(family: str) -> None:
    """Count two rows of each family; `mrope bench syncs` counts all, and writes the table."""
    page = (CONFIGS.parent / "docs/contributors/guard.md").read_text(encoding="utf-8")
    for attention, media, padded in (("sdpa", "both", True), ("eager", "images", False)):
        cfg = load_config(CONFIGS / f"{family}.yaml", [f"model.attn_implementation={attention}"])
        row = count_row(cfg, media, padded)
        # Position ids and vision tensors each remove syncs.
        assert row["plain"] > row["+ positions"] > row["+ vision tensors"] > 0 == row["attached"]
        assert markdown([row]).splitlines()[-1] in page

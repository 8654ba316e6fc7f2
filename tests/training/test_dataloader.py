"""The columns of a tokenized dataset that training keeps, by family."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

pytest.importorskip("transformers")

from mrope.proof.tiny_examples import tiny_examples
from mrope.spec import MRopeSpec
from mrope.training.dataloader import TensorRows, _tokenized
from support.models import model_config
from support.specs import NEWEST

TEXT = {"input_ids", "labels", "mm_token_type_ids"}


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("qwen3_vl", {"image_grid_thw"}),
        # Without it ERNIE's forward sends images to the experts of text, and raises no error.
        ("ernie4_5_vl_moe", {"image_grid_thw", "moe_mm_token_type_ids"}),
        ("video_llama_3", {"image_grid_thw", "image_merge_sizes"}),
        ("minicpmv4_7", {"target_sizes"}),
    ],
)
def test_what_the_family_s_model_reads_is_kept(family: str, own: set[str]) -> None:
    config = model_config(family)
    spec = MRopeSpec.from_config(config, NEWEST)
    (example,) = tiny_examples(config, spec, rows=1, videos=False)
    columns: dict[str, Any] = {name: [value.tolist()] for name, value in example.items()}
    table = datasets.Dataset.from_dict(columns | {"url": ["a.png"]})
    row = TensorRows(_tokenized(table, spec))[0]
    assert set(row) == {*TEXT, "pixel_values", *own}

"""Every reader of rows says the same of a row: no list of columns can escape these tests."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch

from mrope.columns import COLUMNS
from mrope.spec.families import FAMILIES, ONE_DIMENSIONAL
from support.fresh import run_python
from support.readers import agree, good_row, positions_said, sizes_said, spec_of, text_row

EVERY = (*FAMILIES, *ONE_DIMENSIONAL)
# A family whose row has the column, for columns that all its readers need.
READ_BY = {
    name: next(family for family in EVERY if name in good_row(family))
    for name in (
        "input_ids",
        "labels",
        "mm_token_type_ids",
        "image_grid_thw",
        "video_grid_thw",
        "pixel_values",
        "target_sizes",
        "target_sizes_videos",
        "second_per_grid_ts",
        "image_merge_sizes",
        "video_merge_sizes",
        "feature_attention_mask",
        "use_audio_in_video",
    )
}


@pytest.mark.parametrize("family", EVERY)
def test_readers_agree_on_a_good_row(family: str) -> None:
    agree(family)


@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", "video_llama_3", "ernie4_5_vl_moe", "qwen2_5_omni_thinker"]
)
def test_rows_of_a_training_run_agree_too(family: str) -> None:
    from mrope import MRopeCollator
    from mrope.training.rows import Rows

    row = good_row(family)
    plain = {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in row.items()
    }
    table = datasets.Dataset.from_list([plain, text_row(plain)])
    rows, spec = Rows(table, spec_of(family)), spec_of(family)
    positions = MRopeCollator(None, spec)([rows[0], rows[1]])["position_ids"]
    said = positions_said(family, row)["padded"]
    ours = positions[0] if positions.ndim == 2 else positions[:, 0]
    assert torch.equal(ours[..., : said.shape[-1]], said)
    size = rows.count(0)
    assert {(size.tokens, size.patches)} == set(sizes_said(family, row).values())


@pytest.mark.parametrize("name", READ_BY)
def test_a_column_that_the_table_lacks_is_missed(name: str) -> None:
    """What is said above has to depend on the table: without a line of it a reader disagrees."""
    assert name in COLUMNS
    code = f"import sys; sys.path[:0] = {['src', 'tests']}\n"
    code += f"import mrope.columns as table; del table.COLUMNS[{name!r}]\n"
    code += f"from support.readers import agree; agree({READ_BY[name]!r})\n"
    done = run_python(code)
    assert done.returncode == 1 and "Error" in done.stderr

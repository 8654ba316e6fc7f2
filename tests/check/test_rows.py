"""Rows of families whose rule reads more than tokens and grids: audio, crops, counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

datasets = pytest.importorskip("datasets")
pytest.importorskip("transformers")

from mrope import MRopeSpec
from mrope.check.source import check_config, open_rows
from mrope.prepare import Precheck
from mrope.proof.random_batches import random_arguments
from mrope.spec import FAMILIES, example_config
from support.specs import NEWEST

TOKENS = ("input_ids", "attention_mask", "mm_token_type_ids")


def rows_of(spec: MRopeSpec, count: int) -> list[dict[str, Any]]:
    """Return random rows in the form of a table; what is absent is null."""
    rng = np.random.default_rng(1)
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        batch = random_arguments(spec, rng)
        if len(batch["input_ids"]) == 1:
            row = {name: value for name, value in batch.items() if not name.endswith("_per_sample")}
            row |= {name: row[name][0] for name in TOKENS if row.get(name) is not None}
            arrays = {name: one for name, one in row.items() if isinstance(one, np.ndarray)}
            rows.append(row | {name: one.tolist() for name, one in arrays.items()})
    return rows


def masks_of(lengths: list[int] | None) -> list[list[int]] | None:
    """Return the masks of padded mel frames, as a processor gives them in place of lengths."""
    if lengths is None:
        return None
    return [[1] * length + [0] * (max(lengths) - length) for length in lengths]


@pytest.mark.parametrize(
    ("family", "masked"),
    [
        (name, masked)
        for name, row in FAMILIES.items()
        for masked in (False, True)
        if ("audio_seqlens" in row.inputs if masked else row.inputs)
    ],
)
def test_good_rows_are_good_and_compared(family: str, masked: bool, tmp_path: Path) -> None:
    config = example_config(family)
    spec = MRopeSpec.from_config(config, NEWEST)
    rows = rows_of(spec, 12)
    if masked:
        rows = [
            {"feature_attention_mask": masks_of(row.pop("audio_seqlens")), **row} for row in rows
        ]
    names = {name for row in rows for name in row}
    columns = {name: [row.get(name) for row in rows] for name in names}
    assert Precheck(spec)(columns)["mrope_length"].tolist() == [
        len(row["input_ids"]) for row in rows
    ]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    file = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_dict(columns).to_parquet(file)
    checked = open_rows(
        check_config(None, str(tmp_path / "config.json"), file, reference=NEWEST), compare=True
    )
    found = [checked[index] for index in range(len(rows))]
    assert [one.message for one in found if one.cause is not None] == []
    # Published rules have no function to compare with.
    compared = spec.family_row.source is None
    assert all(one.compared == compared for one in found)

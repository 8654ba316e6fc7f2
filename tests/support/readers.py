"""One good row for each family, with every column that its rule or tower reads, and what each reader says of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mrope import MRopeCollator, MRopeSpec, Shapes
from mrope.check.rows import CheckedRows
from mrope.collate.padding import PaddingCollator
from mrope.columns import columns
from mrope.positions.custom.omni import omni_tokens
from mrope.prepare import Precheck
from mrope.proof.tiny_examples import tiny_examples
from mrope.spec.spec import example_config
from mrope.towers import AudioSpec, audio_tokens
from mrope.transforms import shard_sequence

Row = dict[str, Any]

NEWEST = "transformers-5.23"
_MEL = 100
# Pixels that MiniCPM-V's own collate function joins along another axis.
_APART = "crops"


def spec_of(family: str) -> MRopeSpec:
    """Return the spec of a family by its example config."""
    return MRopeSpec.from_config(example_config(family), NEWEST)


def good_row(family: str) -> Row:
    """Return a row with two images and a clip as far as the family takes them, and an audio of an Omni."""
    spec = spec_of(family)
    tower = spec.family_row.tower
    videos = spec.family_row.has_videos
    config = {"vision_config": {"patch_size": 2}}
    (row,) = tiny_examples(
        config, spec, rows=1, videos=videos and "audio_seqlens" not in spec.family_row.inputs
    )
    if tower is not None and tower.sizes == _APART:
        row = {name: value for name, value in row.items() if name not in PIXELS}
    if "audio_seqlens" in spec.family_row.inputs:
        row = _with_audio(spec, row)
    if "pairs" not in getattr(tower, "tensors", ()):
        row.pop("moe_mm_token_type_ids", None)
    return row


PIXELS = tuple(name for name in columns("patch") if name.startswith("pixel"))


def _with_audio(spec: MRopeSpec, row: Row) -> Row:
    window = spec.extra.get("n_window")
    tower = AudioSpec(int(window or 1), None if window is None else 1)
    audio = int(audio_tokens(tower, np.array([_MEL]))[0])
    tokens = [7, *omni_tokens(spec, 3 * 4, 0, 9), 7, *omni_tokens(spec, 0, audio, 9), 8]
    ids = np.concatenate((row["input_ids"], tokens))
    merge = spec.spatial_merge_size
    types = np.concatenate((row["mm_token_type_ids"], np.zeros(len(tokens), np.int64)))
    types[ids == spec.video_token_id] = 2
    return {
        **row,
        "input_ids": ids,
        "labels": ids,
        "mm_token_type_ids": types,
        "video_grid_thw": np.array([[3, 2 * merge, 2 * merge]]),
        "pixel_values_videos": np.zeros((12 * merge**2, 12), np.float32),
        "second_per_grid_ts": np.array([0.5], np.float32),
        "feature_attention_mask": np.ones((1, _MEL), np.int64),
        "input_features": np.zeros((1, 4, _MEL), np.float32),
        "use_audio_in_video": False,
    }


def text_row(row: Row) -> Row:
    """Return a row of text whose other columns are null, as a table has it."""
    ids = np.array([7, 8, 9])
    tokens = {
        "input_ids": ids,
        "labels": ids,
        "mm_token_type_ids": ids * 0,
        "moe_mm_token_type_ids": ids * 0,
    }
    return {name: tokens.get(name) for name in row}


def positions_said(family: str, row: Row, neighbour: Row | None = None) -> dict[str, Any]:
    """Return the position ids that each reader gives to the tokens of a row, (A, n)."""
    spec, rows = spec_of(family), [row] if neighbour is None else [row, neighbour]
    tokens = len(row["input_ids"])
    padded = MRopeCollator(None, spec)([dict(one) for one in rows])
    said = {"padded": _of_first_row(padded, tokens)}
    given = PaddingCollator()([dict(one) for one in rows])
    alone = MRopeCollator(lambda _: dict(given), spec)(None) if neighbour is None else padded
    said["without examples"] = _of_first_row(alone, tokens)
    said["a part of one rank"] = _of_first_row(shard_sequence(padded, 0, 1), tokens)
    if spec.family_row.packs:
        collate = MRopeCollator(None, spec, packing="flatten", attached=True)
        said["flattened"] = _of_first_row(collate([dict(one) for one in rows]), tokens)
    if spec.family_row.custom_index is None and not spec.family_row.one_dimensional:
        rung = MRopeCollator(None, spec, shapes=Shapes(tokens=(1024,)))([dict(one) for one in rows])
        said["rung"] = _of_first_row(rung, tokens)
    return said


def _of_first_row(batch: Mapping[str, Any], tokens: int) -> torch.Tensor:
    positions: torch.Tensor = batch["position_ids"]
    if positions.ndim == 2:
        return positions[0, :tokens]
    return positions[-3:, 0, :tokens]  # without the text row of a flattened batch


def sizes_said(family: str, row: Row, neighbour: Row | None = None) -> dict[str, tuple[int, int]]:
    """Return the tokens and the patches that each reader counts in a row."""
    spec, rows = spec_of(family), [row] if neighbour is None else [row, neighbour]
    table = {name: [one[name] for one in rows] for name in row}
    counted = Precheck(spec)(table)
    check = CheckedRows(rows, spec)[0]
    assert check.message is None, check.message
    said = {
        "Precheck": (int(counted["mrope_length"][0]), int(counted["mrope_patches"][0])),
        "mrope check": (check.tokens, check.patches),
    }
    batch = MRopeCollator(None, spec)([dict(row)])
    pixels = [batch[name] for name in PIXELS if name in batch]
    sizes = getattr(spec.family_row.tower, "sizes", "grids")
    if pixels and sizes in ("grids", "merged_in_batch"):
        said["the batch"] = (batch["input_ids"].numel(), sum(map(len, pixels)))
    return said


def agree(family: str) -> None:
    """Raise AssertionError unless all readers say the same of the family's row, alone and beside a row of nulls."""
    row = good_row(family)
    batch = PaddingCollator()([row, text_row(row)])
    for name, value in batch.items():  # what is not known stays a list
        assert isinstance(value, torch.Tensor) or name == "use_audio_in_video", name
    for neighbour in (None, text_row(row)):
        first, *others = positions_said(family, row, neighbour).values()
        assert len(first[0] if first.ndim > 1 else first) == len(row["input_ids"])
        for other in others:
            assert torch.equal(first, other)
        assert len(set(sizes_said(family, row, neighbour).values())) == 1

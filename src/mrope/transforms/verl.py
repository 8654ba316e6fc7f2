"""The stage in verl: a dataset for multi-turn SFT that `data.custom_cls` names.

Written for verl 0.9.1, whose rows carry their own positions.
"""

from __future__ import annotations

from unittest import mock

import torch
from transformers import AutoConfig
from verl.utils.dataset import multiturn_sft_dataset

from mrope.collate.collator import MRopeCollator
from mrope.columns import Columns, NewColumns
from mrope.spec.spec import MRopeSpec
from mrope.transforms.adapters import to_verl


class MultiTurnSFTDataset(multiturn_sft_dataset.MultiTurnSFTDataset):  # type: ignore[misc]
    """verl's dataset, with the positions of the model's own rule in its rows.

    The model's config is read where the tokenizer was loaded from.

    Raises:
        MRopeError: an unknown family.
        OSError: no config there.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        config = AutoConfig.from_pretrained(self.tokenizer.name_or_path)
        self.mrope_collate = MRopeCollator(_as_batch, MRopeSpec.from_config(config))

    def __getitem__(self, item: int) -> NewColumns:
        """Return verl's row, with `position_ids` int64 (4, S), the text row first.

        Raises:
            MRopeError: placeholders and grids do not fit together, as in a row that was truncated
                within an image.
        """
        with mock.patch.object(multiturn_sft_dataset, "get_rope_index", _unnumbered):
            row: Columns = super().__getitem__(item)
        return {**row, "position_ids": to_verl(self.mrope_collate(row))["position_ids"][0]}


def _as_batch(row: Columns) -> NewColumns:
    """Return a batch of one row: tokens, and the grids and pixels of its media."""
    tokens = row["input_ids"][None]
    mask = row["attention_mask"][None] if "attention_mask" in row else torch.ones_like(tokens)
    return {"input_ids": tokens, "attention_mask": mask, **row.get("multi_modal_inputs", {})}


def _unnumbered(_processor: object, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
    """Stand in for verl's `get_rope_index`, which knows the rule of Qwen2.5-VL alone."""
    return input_ids.new_zeros(3, len(input_ids))

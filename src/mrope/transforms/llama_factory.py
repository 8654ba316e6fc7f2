"""Start LLaMA-Factory with the stage in the trainer of its fine-tuning, by `equip`.

    torchrun ... -m mrope.transforms.llama_factory train.yaml

is LLaMA-Factory's own entry, `run_exp`, with another trainer: its callbacks are not given the one
that it makes. Nothing else in this package imports this module: it imports LLaMA-Factory. Read from
LLaMA-Factory 0.9.5: `llamafactory/train/tuner.py`, `llamafactory/train/sft/workflow.py`,
`llamafactory/data/collator.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from unittest import mock

from llamafactory.train import tuner
from llamafactory.train.sft import workflow

from mrope.columns import Batch, NewColumns
from mrope.errors import MRopeError
from mrope.hf.equip import equip

if TYPE_CHECKING:
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask
    from llamafactory.hparams import DataArguments, FinetuningArguments
    from transformers import TrainerCallback


def run_exp(
    args: NewColumns | list[str] | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **options: object,
) -> None:
    """Run LLaMA-Factory's `run_exp` with a trainer that is equipped once it is made.

    Args:
        args, callbacks: as of LLaMA-Factory's `run_exp`.
        options: keywords of `mrope.hf.equip`.

    Raises:
        MRopeError: a stage other than sft, packed rows, or a launcher that makes the trainer in
            another process. And whatever `equip` raises.
    """

    class EquippedTrainer(workflow.CustomSeq2SeqTrainer):  # type: ignore[misc]
        def __init__(
            self, data_collator: SFTDataCollatorWith4DAttentionMask, **arguments: object
        ) -> None:
            super().__init__(data_collator=UnnumberedCollator(data_collator), **arguments)
            equip(self, **keywords)

    keywords: NewColumns = options
    given = tuner.read_args(args)
    if tuner.get_ray_args(given).use_ray:
        raise MRopeError(
            "LLaMA-Factory's use_ray makes its trainer in other processes: turn it off"
        )
    parse = tuner.get_train_args

    def parsed(read: NewColumns | list[str]) -> Sequence[object]:
        made: Sequence[object] = parse(read)
        _refuse(made[1], made[3])
        return made

    with (
        mock.patch.object(tuner, "get_train_args", parsed),
        mock.patch.object(workflow, "CustomSeq2SeqTrainer", EquippedTrainer),
    ):
        tuner.run_exp(given, callbacks)


def _refuse(data: DataArguments, tuning: FinetuningArguments) -> None:
    """Raise for a workflow that makes another trainer, or packs rows."""
    if tuning.stage != "sft" or tuning.use_mca or tuning.use_hyper_parallel:
        raise MRopeError(
            "LLaMA-Factory's trainer is equipped in the stage sft, without use_mca and "
            f"use_hyper_parallel; not in the stage {tuning.stage}"
        )
    if data.packing or data.neat_packing:
        raise MRopeError(
            "LLaMA-Factory numbers the tokens of rows that it packs: turn packing and neat_packing "
            "off, and give run_exp packing='flatten'"
        )


class UnnumberedCollator:
    """LLaMA-Factory's collator without its numbering of tokens, and its blank image as an image.

    A batch without pictures gets a blank one behind its first row, so that the tower runs on every
    rank. Its tokens are masked, and the mask would hide them from the stage; behind the row they
    are seen by no other token, and their labels count for nothing, so that they may stand in it.
    """

    def __init__(self, inner: SFTDataCollatorWith4DAttentionMask) -> None:
        self.inner = inner
        inner.get_rope_func = inner.model = None

    def __call__(self, features: list[NewColumns]) -> Batch:
        """Return the inner collator's batch; see the class.

        Raises:
            MRopeError: a blank image before a row, where rows are padded on the left.
        """
        length = len(features[0]["input_ids"])
        batch: Batch = self.inner(features)
        end = len(features[0]["input_ids"])
        if end > length and self.inner.tokenizer.padding_side != "right":
            raise MRopeError("LLaMA-Factory put a blank image before a row: pad on the right")
        batch["attention_mask"][0, length:end] = 1
        return batch


if __name__ == "__main__":
    run_exp()

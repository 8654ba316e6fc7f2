"""ms-swift's plug-in: a callback named `mrope`, which calls `equip` on its trainer.

A file of two lines is what ms-swift's `--external_plugins` takes, beside `--callbacks mrope`:

    from mrope.transforms.ms_swift import register
    register()

Nothing else in this package imports it: it imports ms-swift. Read from ms-swift 4.6.0:
`swift/trainers/mixin.py`, `swift/template/base.py`, `swift/template/templates/qwen.py`,
`swift/model/models/qwen.py`, `swift/dataloader/shard.py`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from swift.callbacks import TrainerCallback, callbacks_map
from swift.dataloader import shard
from swift.template.templates.qwen import Qwen3VLTemplate
from swift.utils import is_deepspeed_enabled, to_device

from mrope.columns import NewColumns
from mrope.errors import MRopeError
from mrope.hf.attaching import base_model
from mrope.hf.equip import equip

if TYPE_CHECKING:
    from swift.template import Template
    from swift.trainers import Trainer, TrainingArguments


def register(**options: object) -> None:
    """Let ms-swift know the callback `mrope`, which `--callbacks mrope` switches on.

    Args:
        options: keywords of `mrope.hf.equip`.
    """
    callbacks_map["mrope"] = partial(MRopeCallback, options=options)


class MRopeCallback(TrainerCallback):  # type: ignore[misc]
    """Put the stage into ms-swift's trainer once it is made, before its model is wrapped."""

    def __init__(self, args: TrainingArguments, trainer: Trainer, options: NewColumns) -> None:
        super().__init__(args, trainer)
        self.options = options

    def on_init_end(self, *_: object, **_kwargs: object) -> None:
        """Let the collator leave numbers to the stage, and the model its own forward; `equip`.

        Raises:
            MRopeError: the template runs the tower outside the model, packs rows itself, or pads
                them on the left; or DeepSpeed is used. And whatever `equip` raises.
        """
        template = self.trainer.template
        _refuse_template(template)
        template._get_position_ids = _leave_positions  # noqa: SLF001
        _restore_forwards(self.trainer)
        equip(self.trainer, **self.options)
        # Its own loader copies a batch itself, and waits for each tensor.
        shard.to_device = partial(to_device, non_blocking=True)


def _refuse_template(template: Template) -> None:
    """Raise for a template that does more to a batch than the stage and the model can take over."""
    name = template.template_meta.template_type
    if type(template)._post_encode is not Qwen3VLTemplate._post_encode:  # noqa: SLF001
        raise MRopeError(
            f"ms-swift's template {name} runs the tower outside the model's forward, which reads "
            "the tensors of the batch: only that of qwen3_vl leaves it to the model"
        )
    if template.padding_free or template.packing or template.padding_side != "right":
        raise MRopeError(
            "ms-swift numbers the tokens of rows that it packs or pads on the left: turn "
            "padding_free and packing off, with padding_side right"
        )
    if is_deepspeed_enabled():
        raise MRopeError(f"under DeepSpeed ms-swift replaces the forward of {name}: turn it off")


def _leave_positions(_batch: NewColumns) -> NewColumns:
    """Return no columns, where the template would number the tokens of a padded batch."""
    return {}


def _restore_forwards(trainer: Trainer) -> None:
    """Remove what ms-swift puts before the forwards of the model, its text and its tower.

    Without DeepSpeed it only drops the text's borders from the keywords of the tower, which an
    attached model never gives it, and adds the tower's deep features by the mask.
    """
    base = base_model(trainer.model)
    for module in (base, base.visual, base.language_model):
        for name in ("forward", "origin_forward", "_deepstack_process"):
            vars(module).pop(name, None)

"""`equip(trainer)`: the stage in a trainer object, in one call."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
import transformers

from mrope.collate.collator import Collate, MRopeCollator
from mrope.columns import Columns, NewColumns
from mrope.errors import MRopeError
from mrope.hf.attaching import attach, base_model, explain_attention, is_attached
from mrope.hf.attention_choice import Attention
from mrope.hf.patches import embeds_by_itself
from mrope.hf.thinkers import text_model
from mrope.spec.spec import MRopeSpec
from mrope.towers import AudioSpec, VisionSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, Trainer

AnyTrainer = TypeVar("AnyTrainer")


def equip(
    trainer: AnyTrainer, *, attention: Attention = "auto", quiet: bool = False, **stage: object
) -> AnyTrainer:
    """Put the stage into a transformers `Trainer` or a subclass, before `trainer.train()`.

    - Its collator is wrapped in a `MRopeCollator`, with tensors for the towers that the model has.
      transformers' default one, which stacks rows of equal length, gives way to a padding one.
    - Its model is attached, and its reference model, if it has one: see `mrope.hf.attach`.
    - Settings that make it sync are changed: batches are copied without blocking, losses are not
      searched for NaN, and batches of an iterable dataset are not dispatched by one rank.

    What was done, and what is left that syncs, is printed in five lines by the first rank.

    Args:
        trainer: made, but not trained yet.
        attention: as of `attach`.
        quiet: do not print.
        stage: options of `MRopeCollator`: `packing`, `shapes`, `on_error`.

    Returns:
        `trainer` itself.

    Raises:
        MRopeError: positions would be computed twice, or otherwise than the model does: the trainer
            makes its batches behind its collator, or a new model when it trains; its collator,
            dataset or processor gives position_ids, or the collator is a `MRopeCollator` for
            another model; the model numbers tokens in 1-D; batches are cut on their first
            dimension. And whatever `attach` refuses.
    """
    made: Trainer = trainer
    _refuse_trainer(made)
    base = base_model(made.model)
    _refuse_late(made)
    _refuse_head(made.model)
    inner = made.data_collator
    collate = _make_collator(made, base.config, stage)
    _refuse_numbered(made, collate)
    models = list(_models(made))
    for model in models:
        if not is_attached(model):
            attach(model, attention=attention)
    made.data_collator = collate
    if getattr(made, "eval_data_collator", None) is not None:  # of axolotl's trainers
        made.eval_data_collator = collate
    changed = _apply_settings(made)
    if not quiet and made.is_world_process_zero():
        print(_describe(made, inner, models, changed, list(_left(made, base))))
    return trainer


def _models(trainer: Trainer) -> Iterator[torch.nn.Module]:
    """Yield the model that is trained, and the frozen one that TRL's trainers compare it with."""
    yield trainer.model
    reference = getattr(trainer, "ref_model", None)
    if reference is not None and reference is not trainer.model:
        yield reference


def _refuse_trainer(trainer: Trainer) -> None:
    """Raise for a trainer whose batches, or whose model, are not those that it holds."""
    name = type(trainer).__name__
    if not isinstance(trainer, transformers.Trainer):
        raise MRopeError(f"equip takes a transformers Trainer or a subclass, not {name}")
    if hasattr(trainer, "_generate_and_score_completions"):
        raise MRopeError(
            f"{name} makes its batches behind its collator, from what the model answers: number "
            "them there, by mrope.extend"
        )
    if trainer.model_init is not None:
        raise MRopeError(
            f"{name} makes a new model by model_init when it trains: attach it in that function, "
            "and wrap the collator by MRopeCollator"
        )


def _refuse_late(trainer: Trainer) -> None:
    if trainer.model_wrapped is not trainer.model:
        raise MRopeError(
            f"too late: {type(trainer).__name__} has wrapped its model already; call equip before "
            "train"
        )
    if trainer.is_in_train:  # its loader is made, over the collator that it had
        raise MRopeError(f"too late: {type(trainer).__name__} is training; call equip before train")
    loader = trainer.accelerator.dataloader_config
    if trainer.args.n_gpu > 1 or loader.split_batches or loader.dispatch_batches:
        raise MRopeError(
            "batches would be cut on their first dimension, which positions have axes on: start "
            "one process for each GPU, without split_batches and dispatch_batches"
        )


def _refuse_head(model: PreTrainedModel) -> None:
    """Raise for a head that gives its base model embeddings alone, which get 1-D positions."""
    heads = [type(one).__name__ for one in model.modules() if embeds_by_itself(one)]
    if heads:
        raise MRopeError(
            f"{heads[0]} numbers tokens in 1-D, and from a batch of the stage it takes M-RoPE's "
            "positions: if that is what you want, attach the model and wrap the collator yourself"
        )


def _refuse_numbered(trainer: Trainer, collate: MRopeCollator) -> None:
    """Raise for a collate function whose batches the stage does not take, by one row of the data.

    Where that cannot be asked, as of a stream, the first batch of training raises.
    """
    rows, inner = trainer.train_dataset, collate.inner_collate
    if not hasattr(rows, "__getitem__"):
        return
    batch: Columns = {}
    with _same_random_numbers(), suppress(Exception):  # whatever it raises, training raises too
        batch = inner([rows[0]])
    if "position_ids" in batch:
        raise MRopeError(
            f"batches of {_name(inner)} have position_ids already, from it, from the processor or "
            "from the dataset: they would be computed twice; remove them there, or do without the "
            "stage"
        )
    if batch and "input_ids" not in batch:
        raise MRopeError(
            f"batches of {_name(inner)} have no input_ids, by which tokens are numbered, but "
            f"{', '.join(list(batch)[:4])}: they are not supported"
        )


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Leave the random numbers of the process as they were."""
    state, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - what others draw
    try:
        with torch.random.fork_rng(devices=()):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(of_numpy)  # noqa: NPY002


def _make_collator(trainer: Trainer, config: PreTrainedConfig, stage: NewColumns) -> MRopeCollator:
    """Return the trainer's collator within the stage; one that is a stage already as it is."""
    spec, vision = MRopeSpec.from_config(config), VisionSpec.from_config(config)
    has_audio = "audio_seqlens" in spec.family_row.inputs
    audio = AudioSpec.from_config(config) if has_audio else None
    inner: Collate | None = trainer.data_collator
    if isinstance(inner, MRopeCollator):
        _refuse_other_model(inner, (spec, vision, audio), stage)
        return inner
    if getattr(inner, "return_position_ids", False) or getattr(inner, "padding_free", False):
        raise MRopeError(
            f"{_name(inner)} numbers tokens itself: turn its padding_free off, and give equip "
            "packing='flatten'"
        )
    inner = None if inner is transformers.default_data_collator else inner
    if stage.get("packing") == "flatten":
        stage = {**stage, "attached": True}
    return MRopeCollator(inner, spec, vision, audio=audio, **stage)


def _refuse_other_model(
    collate: MRopeCollator,
    wanted: tuple[MRopeSpec, VisionSpec, AudioSpec | None],
    stage: NewColumns,
) -> None:
    """Raise for a stage of the user's that does not give what the model takes."""
    if stage:
        raise MRopeError(
            f"the trainer's collator is a MRopeCollator already: give {', '.join(stage)} to that"
        )
    given = (collate.spec, collate.vision, collate.audio)
    for name, one, other in zip(("spec", "vision", "audio"), given, wanted, strict=True):
        if one != other:
            raise MRopeError(
                f"the trainer's collator is a MRopeCollator whose {name} is not the model's: give "
                f"it {name}={other and type(other).__name__ + '.from_config(model.config)'}, or "
                f"give equip the collate function alone; it has {one}, the model {other}"
            )


def _apply_settings(trainer: Trainer) -> list[str]:
    """Change what makes a trainer sync; return the settings as they are now."""
    loader, args = trainer.accelerator.dataloader_config, trainer.args
    changed = []
    if not loader.non_blocking:
        loader.non_blocking = args.accelerator_config.non_blocking = True
        changed.append("accelerator_config.non_blocking=True")
    if args.logging_nan_inf_filter:
        args.logging_nan_inf_filter = False
        changed.append("logging_nan_inf_filter=False")
    iterable = torch.utils.data.IterableDataset
    if loader.dispatch_batches is None and isinstance(trainer.train_dataset, iterable):
        loader.dispatch_batches = args.accelerator_config.dispatch_batches = False
        changed.append("accelerator_config.dispatch_batches=False")
    return changed


def _left(trainer: Trainer, base: PreTrainedModel) -> Iterator[str]:
    """Yield what still syncs and is the user's to change."""
    args = trainer.args
    if args.use_cpu and not args.dataloader_pin_memory:
        yield "use_cpu=True turned pinning off: leave it out where you count syncs"
    elif not args.dataloader_pin_memory:
        yield "dataloader_pin_memory=False makes each copy of a tensor wait"
    if args.logging_steps < 10:
        yield f"logging_steps={args.logging_steps:g} reads two numbers at each log"
    if args.include_num_input_tokens_seen not in ("no", False):
        yield "include_num_input_tokens_seen reads a number at each step"
    if type(trainer).compute_loss is not transformers.Trainer.compute_loss:
        owner = next(one for one in type(trainer).__mro__ if "compute_loss" in vars(one))
        yield f"compute_loss of {owner.__name__} may read metrics at each step"
    flash = text_model(base).mrope_attention == "flash"
    if flash and trainer.data_collator.packing is None:
        yield (
            "flash attention unpads rows that are padded in front by a mask: pad behind, or give "
            "equip packing='flatten'"
        )


def _describe(
    trainer: Trainer,
    inner: Collate | None,
    models: list[torch.nn.Module],
    changed: list[str],
    left: list[str],
) -> str:
    """Return five lines: the trainer, and what was done to its collator, model and settings."""
    collate = trainer.data_collator
    towers = "vision and audio" if collate.audio else "vision"
    names = " and ".join(dict.fromkeys(type(one).__name__ for one in models))
    parts: dict[str, list[str]] = {}
    for line in explain_attention(trainer.model).splitlines():
        part, how = line.split(": ", 1)
        parts.setdefault(how, []).append(part)
    attention = "; ".join(f"{' and '.join(those)} {how}" for how, those in parts.items())
    return "\n".join(
        (
            f"mrope.hf.equip: {type(trainer).__name__}",
            f"  collator: {_name(inner)}, with positions of {collate.spec.family} as "
            f"{collate.spec.reference} and tensors of the {towers} tower",
            f"  model: {names} attached; {attention}",
            f"  settings: {', '.join(changed) or 'none changed'}",
            f"  still syncs: {'; '.join(left) or 'nothing known'}",
        )
    )


def _name(collate: Collate | None) -> str:
    return getattr(collate, "__name__", type(collate).__name__)

"""Build transformers' `TrainingArguments` and peft's `LoraConfig` from a config's sections.

Both are validated by the fields of the installed release, so that this package lists none.
"""

from __future__ import annotations

import dataclasses
import typing
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from mrope.errors import MRopeError
from mrope.spec.references import nearest
from mrope.training.sections import Config, ConfigError, errors_of, problems_error

# Where we differ from the Trainer: nothing syncs with the device, rows keep all columns, evaluation
# computes the loss alone, and nothing is reported to a service that the user did not name.
_DEFAULTS: dict[str, Any] = {
    "logging_nan_inf_filter": False,
    "remove_unused_columns": False,
    "prediction_loss_only": True,
    "dataloader_drop_last": True,
    "report_to": "none",
}
# Fields of `TrainingArguments` that the section `dataloader` has under its own name.
_OF_LOADER = {
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "batch_size",
    "dataloader_num_workers": "num_workers",
    "dataloader_pin_memory": "pin_memory",
    "dataloader_multiprocessing_context": "start_method",
    "dataloader_persistent_workers": "persistent_workers",
    "dataloader_prefetch_factor": "prefetch_factor",
}
# Arguments that a DataLoader without workers refuses.
_OF_WORKERS = ("start_method", "persistent_workers", "prefetch_factor")


def training_arguments(cfg: Config, **changes: object) -> Any:
    """Return the `TrainingArguments` of a config.

    Args:
        cfg: a training config; its section `trainer` wins over `dataloader`.
        changes: fields that win over both.

    Raises:
        ConfigError: an unknown field or a value of a wrong type, all of them listed; a field that
            both sections give, with different values; or transformers refuses the values.
        MRopeError: accelerate is not installed.
    """
    from transformers import TrainingArguments
    from transformers.utils import is_accelerate_available

    if not is_accelerate_available():
        raise MRopeError("transformers' Trainer needs accelerate; pip install accelerate")
    given = checked_fields("trainer", cfg.trainer, TrainingArguments)
    if cfg.peft is not None:
        lora_config(cfg)  # raises before rows are opened and weights are loaded
    ours = {**_DEFAULTS, **_loader_fields(cfg, given)}
    # An older release lacks some, such as the start method of workers.
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    fields = {name: ours[name] for name in ours if name in known} | given | changes
    copies = fields.get("accelerator_config")
    if copies is None or isinstance(copies, dict):
        fields["accelerator_config"] = {"non_blocking": True, **(copies or {})}
    if fields.get("use_cpu") is False and not torch.cuda.is_available():
        raise MRopeError(
            "trainer.use_cpu is false, but torch sees no CUDA device: set it to true, or install a "
            "CUDA build of torch"
        )
    with errors_of("trainer", ValueError, TypeError, ImportError):
        arguments = TrainingArguments(**fields)
    _require_rows(cfg, arguments)
    # `use_cpu` turns it off, with which the report would count syncs that a GPU would not have.
    arguments.dataloader_pin_memory = fields["dataloader_pin_memory"]
    _warn_of_bfloat16(cfg, arguments)
    return arguments


def lora_config(cfg: Config) -> Any:
    """Return the `LoraConfig` of a config's section `peft`; raises as `training_arguments`."""
    from peft import LoraConfig

    given = checked_fields("peft", cfg.peft or {}, LoraConfig)
    with errors_of("peft", ValueError, TypeError):
        return LoraConfig(**given)


def checked_fields(section: str, given: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """Return the fields of a section, or raise a `ConfigError` of all that a dataclass refuses."""
    known = [field.name for field in dataclasses.fields(kind) if field.init]
    hints = typing.get_type_hints(kind)
    problems = []
    for name, value in given.items():
        if name not in known:
            hint = nearest(name, known) or f"; known: the fields of {kind.__name__}"
            problems.append(f"{section}.{name}: unknown key{hint}")
        elif error := _type_error(hints[name], value):
            problems.append(f"{section}.{name}: {error}, not {value!r} ({type(value).__name__})")
    if problems:
        raise problems_error(section, problems)
    return dict(given)


def _type_error(hint: Any, value: Any) -> str | None:
    """Return what is wrong with the type of a number or switch; None if nothing is."""
    # Other hints are not true: `fsdp`, a str, takes a bool. The library checks those values itself.
    if not {hint, *typing.get_args(hint)} & {int, float, bool} or str in typing.get_args(hint):
        return None
    try:
        TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        return error.errors()[0]["msg"].replace("Input should be", "must be", 1)
    return None


def _loader_fields(cfg: Config, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that the section `dataloader` decides; `trainer` must not contradict."""
    section = cfg.dataloader
    workers = given.get("dataloader_num_workers", section.num_workers)
    fields = {}
    for field, key in _OF_LOADER.items():
        value = getattr(section, key)
        # Evaluation may take other batches than training.
        twice = key in section.model_fields_set and given.get(field, value) != value
        if twice and field != "per_device_eval_batch_size":
            raise ConfigError(
                f"trainer.{field}: {given[field]!r}, but dataloader.{key} is {value!r}; "
                "they are one setting: remove one"
            )
        if workers or key not in _OF_WORKERS:
            fields[field] = value
    return fields


def _require_rows(cfg: Config, arguments: Any) -> None:
    if arguments.eval_strategy != "no" and cfg.data.eval_source is None:
        raise ConfigError("trainer.eval_strategy needs data.eval_source: the rows to evaluate on")
    if cfg.dataloader.buffer_size is not None and arguments.max_steps <= 0:
        raise ConfigError("dataloader.buffer_size needs trainer.max_steps: a stream has no length")


def _warn_of_bfloat16(cfg: Config, arguments: Any) -> None:
    if arguments.device.type == "cpu" and (arguments.bf16 or cfg.model.dtype == "bfloat16"):
        warnings.warn(
            "bfloat16 on a CPU is several times slower than float32: use model.dtype: float32, and "
            "no trainer.bf16",
            UserWarning,
            stacklevel=3,
        )

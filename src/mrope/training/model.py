"""Build the model that a training config names; needs transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mrope.training.arguments import lora_config
from mrope.training.config import model_table
from mrope.training.sections import Config, ConfigError, errors_of

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def load_model_config(cfg: Config) -> Any:
    """Return `model.config` as a live transformers config; a `ConfigError` without a class."""
    from transformers import CONFIG_MAPPING, AutoConfig

    table = dict(model_table(cfg.model.config))
    own_code = _may_run_own_code(cfg, table)
    # transformers' own error lists all of its models, but not what to do.
    if table.get("model_type") not in CONFIG_MAPPING and not own_code:
        raise ConfigError(_describe_missing_class(table))
    if isinstance(cfg.model.config, str):
        # Without `local_files_only` transformers may ask the hub.
        return AutoConfig.from_pretrained(
            cfg.model.config, local_files_only=True, trust_remote_code=own_code
        )
    return AutoConfig.for_model(**table)


def build_model(cfg: Config) -> torch.nn.Module:
    """Build the model in training mode, with the weights of its folder, or random ones."""
    from transformers import AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText
    options: dict[str, Any] = {
        "attn_implementation": cfg.model.attn_implementation,
        "dtype": getattr(torch, cfg.model.dtype),
        "trust_remote_code": _may_run_own_code(cfg, model_table(cfg.model.config)),
    }
    # `from_pretrained` of a folder without weights raises.
    if _has_weights(cfg.model.config):
        model = auto.from_pretrained(cfg.model.config, local_files_only=True, **options)
    else:
        model = auto.from_config(load_model_config(cfg), **options)
    trained: torch.nn.Module = model.train()
    return trained


def add_adapter(cfg: Config, model: torch.nn.Module) -> torch.nn.Module:
    """Return the model with the LoRA adapter that `peft` describes, or as it is."""
    if cfg.peft is None:
        return model
    from peft import get_peft_model

    options = lora_config(cfg)
    with errors_of("peft", ValueError):
        adapted: torch.nn.Module = get_peft_model(model, options)
    return adapted


def attach_and_compile(cfg: Config, model: torch.nn.Module) -> torch.nn.Module:
    """Attach the model and compile it, as the config asks, and return it.

    It is compiled in place: a model that `torch.compile` wraps has other names of its weights,
    which `from_pretrained` would not find in a checkpoint.
    """
    if not cfg.model.attach or not cfg.rope.enabled:
        return model
    from mrope.hf import attach, compile_layers
    from mrope.hf.compiling import one_graph_a_shape

    attach(model, attention=cfg.model.attention)
    if not cfg.model.compile:
        return model
    # Most trainings are short, or wrap layers: by FSDP2, or gradient checkpointing.
    if cfg.model.compile in (True, "layers"):
        return compile_layers(model)
    model.compile(**one_graph_a_shape())
    return model


def _may_run_own_code(cfg: Config, table: Mapping[str, Any]) -> bool:
    folder = isinstance(cfg.model.config, str) and Path(cfg.model.config).is_dir()
    return folder and cfg.model.trust_remote_code and "auto_map" in table


def _describe_missing_class(table: Mapping[str, Any]) -> str:
    import transformers

    if "auto_map" in table:
        hint = "its folder has one: set model.trust_remote_code: true to run that code"
    else:
        hint = (
            "train with a framework that has it (build_collator(cfg) returns the collator for it), "
            "or name a folder that holds the class"
        )
    return (
        f"model.config: transformers {transformers.__version__} has no class for model_type "
        f"{table.get('model_type')!r}; {hint}"
    )


def _has_weights(config: object) -> bool:
    if not isinstance(config, str) or not Path(config).is_dir():
        return False
    return any(next(Path(config).glob(pattern), None) for pattern in _WEIGHTS)

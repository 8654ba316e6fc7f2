"""Load a training config: a YAML file with overrides, validated as a whole before anything runs.

Needs the `cli` extra (pydantic, OmegaConf); no worker imports it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ValidationError,
)
from yaml import YAMLError

from mrope.collate.collator import Collate, MRopeCollator
from mrope.collate.padding import PaddingCollator
from mrope.spec.references import nearest
from mrope.training.sections import Config, ConfigError


def load_config(path: str | PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read a training config.

    Args:
        path: YAML file. Relative paths in it, and in the overrides, start at its folder.
        overrides: `key.of.section=value` strings; a value is read as YAML, as in the file.

    Raises:
        ConfigError: the file cannot be read, or holds unknown keys, wrong types or wrong values.
            All of them are listed, each with its dotted key, what it is and what is allowed.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "run.yaml"
        >>> _ = file.write_text("model: {config: {model_type: qwen3_vl}}")
        >>> load_config(file, ["train.steps=3"]).train.steps
        3
    """
    file = Path(path)
    table = _read(file, overrides)
    return as_config(table, file.parent, f"{file}{_with(overrides)}")


def as_config(table: Mapping[str, Any], folder: Path, name: str) -> Config:
    """Check a mapping of sections.

    Args:
        table: as the file would hold it.
        folder: where relative paths start.
        name: what the error calls it.

    Raises:
        ConfigError: as `load_config` does.
    """
    try:
        return Config.model_validate(table, context={"folder": folder})
    except ValidationError as error:
        problems = [_problem(dict(entry)) for entry in error.errors()]
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    listed = "".join(f"\n  {problem}" for problem in problems)
    raise ConfigError(f"{name}: {count}{listed}")


def build_collator(cfg: Config, inner_collate: Collate | None = None) -> Collate:
    """Return the collate function that a config asks for.

    Args:
        cfg: a training config.
        inner_collate: collate function that makes the batch; None: a `PaddingCollator` that pads
            with the `pad_token_id` of the model's config, or with 0.

    Returns:
        An `MRopeCollator` around `inner_collate`; with `rope.enabled: false` that function alone.

    Raises:
        ConfigError: the model's config has no M-RoPE family that is known.
    """
    pad_token_id = _pad_token_id(cfg.model.config)
    if inner_collate is None:
        inner_collate = PaddingCollator(pad_token_id=pad_token_id)
    if not cfg.rope.enabled:
        return inner_collate
    return MRopeCollator(
        inner_collate,
        cfg.spec(),
        cfg.vision_spec(),
        packing=cfg.rope.packing,
        layout=cfg.rope.layout,
        pad_to_multiple_of=cfg.rope.pad_to_multiple_of,
        pad_token_id=pad_token_id,
        on_error=cfg.rope.on_error,
        rejects=cfg.rope.rejects,
        max_rejects=cfg.rope.max_rejects,
    )


def model_table(config: Mapping[str, Any] | str) -> Mapping[str, Any]:
    """Return `model.config` as a mapping, read from its file where it is a path.

    Raises:
        ConfigError: the file is not a JSON object.
    """
    if isinstance(config, Mapping):
        return config
    path = Path(config)
    file = path / "config.json" if path.is_dir() else path
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.config: {file} cannot be read: {error}") from error
    if not isinstance(table, dict):
        raise ConfigError(f"model.config: {file} holds no JSON object")
    return table


def _pad_token_id(config: Mapping[str, Any] | str) -> int:
    table = model_table(config)
    text = table.get("text_config")
    for source in (table, text if isinstance(text, Mapping) else {}):
        if isinstance(source.get("pad_token_id"), int):
            return int(source["pad_token_id"])
    return 0


def _read(file: Path, overrides: Sequence[str]) -> Mapping[str, Any]:
    """Return the file's mapping of sections with the overrides merged in."""
    for override in overrides:
        if not re.match(r"\w+(\.\w+)*=", override):
            raise ConfigError(f"override {override!r}: must be key.of.section=value")
    try:
        table = OmegaConf.load(file)
        merged = OmegaConf.merge(table, OmegaConf.from_dotlist(list(overrides)))
        sections = OmegaConf.to_container(merged, resolve=True)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(f"{file}{_with(overrides)}: cannot be understood: {error}") from error
    if not isinstance(sections, dict):
        raise ConfigError(f"{file}: must be a mapping of sections, not a {type(sections).__name__}")
    return {str(key): value for key, value in sections.items()}


def _with(overrides: Sequence[str]) -> str:
    return f" with {' '.join(overrides)}" if overrides else ""


def _problem(entry: Mapping[str, Any]) -> str:
    """Say in one line what is wrong at which key, from an entry of pydantic's error list."""
    keys = [str(part) for part in entry["loc"]]
    name = ".".join(keys)
    if entry["type"] in ("extra_forbidden", "missing"):
        known = _known_keys(keys[:-1])
        if entry["type"] == "missing":
            return f"{name}: missing; it has no default"
        return f"{name}: unknown key{nearest(keys[-1], known)}; known: {', '.join(known)}"
    if entry["type"] == "model_type":
        return f"{name}: must be a section with the keys {', '.join(_known_keys(keys))}"
    if entry["type"] == "value_error":
        given = "" if isinstance(entry["input"], dict) else f" (is {entry['input']!r})"
        return f"{name}: {entry['ctx']['error']}{given}".removeprefix(": ")
    allowed = str(entry["msg"]).replace("Input should be", "must be", 1)
    return f"{name}: {allowed}, not {entry['input']!r} ({type(entry['input']).__name__})"


def _known_keys(sections: Sequence[str]) -> list[str]:
    """Return the keys of a section, or with an empty sequence those of the file."""
    kind: type[BaseModel] = Config
    for section in sections:
        annotation = kind.model_fields[section].annotation
        (kind,) = (one for one in (annotation, *get_args(annotation)) if _is_section(one))
    return list(kind.model_fields)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)

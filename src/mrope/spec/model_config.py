"""Read a model's config: a mapping, a path, or a live `PretrainedConfig`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mrope.errors import MRopeError


def model_section(table: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """Return `model_type` and config of the model that numbers tokens: an Omni's thinker."""
    inner = table.get("thinker_config")
    table = inner if isinstance(inner, Mapping) else table
    return table.get("model_type"), table


def as_mapping(config: Any) -> Mapping[str, Any]:
    """Return a model's config as a mapping, from whatever `MRopeSpec.from_config` takes."""
    if isinstance(config, Mapping):
        return config
    if isinstance(config, (str, os.PathLike)):
        return _read_json(Path(config))
    if callable(getattr(config, "to_dict", None)):
        table = config.to_dict()
        if isinstance(table, Mapping):
            return table
    raise MRopeError(
        f"cannot read a model config from {type(config).__name__}; "
        "give a dict, a path to config.json or its folder, or a PretrainedConfig"
    )


def _read_json(path: Path) -> Mapping[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MRopeError(f"no model config at {file}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MRopeError(f"cannot read the model config {file}: {error}") from error
    if not isinstance(table, Mapping):
        raise MRopeError(f"{file} holds no model config: its top level is not an object")
    return table


def read_int(table: Mapping[str, Any], keys: tuple[str, ...], where: str, minimum: int = 0) -> int:
    """Read the one value that `keys`, names of the same thing, have in `table`."""
    found = {key: table[key] for key in keys if table.get(key) is not None}
    if not found:
        raise MRopeError(f"{where}: the config has no {' or '.join(keys)}")
    for key, value in found.items():
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or value < minimum:
            raise MRopeError(f"{where}: {key} must be an integer >= {minimum}, not {value!r}")
    if len(set(found.values())) > 1:
        raise MRopeError(f"{where}: the config contradicts itself: {found}")
    return int(next(iter(found.values())))

"""Read a model's config: a mapping, a path, or a live `PretrainedConfig`.

`MRopeSpec`, `VisionSpec` and `AudioSpec` all read their values through these functions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mrope.errors import MRopeError


def read_model(config: Any) -> tuple[Any, Mapping[str, Any]]:
    """Return `model_type` and config of the model that takes position ids.

    For a whole Omni that is its thinker, read from `thinker_config`.

    Args:
        config: a dict, the path of a `config.json` or of its folder, or an object with `to_dict`.

    Raises:
        MRopeError: no such file, or not a config.
    """
    table = as_mapping(config)
    thinker = table.get("thinker_config")
    table = thinker if isinstance(thinker, Mapping) else table
    return table.get("model_type"), table


def read_tower(
    table: Mapping[str, Any], section: str, model_type: object
) -> tuple[Mapping[str, Any], str]:
    """Return a tower's config, and what errors call it.

    Args:
        table: a model's config, or the tower's own.
        section: where a model's config holds the tower's, such as "vision_config".
        model_type: named in errors.
    """
    tower = table.get(section, table)
    if not isinstance(tower, Mapping):
        raise MRopeError(f"{model_type}: {section} must be a section, not {tower!r}")
    return tower, f"{model_type} {section}"


def read_int(table: Mapping[str, Any], keys: tuple[str, ...], where: str, minimum: int = 0) -> int:
    """Read the one integer that `table` holds under any of `keys`.

    Args:
        table: a section of a config.
        keys: alternative names of one value.
        where: names the section in errors.
        minimum: smallest value allowed.

    Raises:
        MRopeError: no key is there, a value is not an integer, or two keys disagree.
    """
    found = {key: table[key] for key in keys if table.get(key) is not None}
    if not found:
        raise MRopeError(f"{where}: the config has no {' or '.join(keys)}")
    for key, value in found.items():
        # Configs written by other tools hold 2.0 for 2.
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or value < minimum:
            raise MRopeError(f"{where}: {key} must be an integer >= {minimum}, not {value!r}")
    if len(set(found.values())) > 1:
        raise MRopeError(f"{where}: the config contradicts itself: {found}")
    return int(next(iter(found.values())))


def read_dotted(table: Mapping[str, Any], dotted: str, where: str) -> int:
    """Read an integer at a dotted key, or the length of a list there.

    Args:
        table: a model's config.
        dotted: sections and key, each with its alternative names separated by bars.
        where: names the config in errors.

    Example:
        >>> read_dotted({"rope_scaling": {"mrope_section": [16, 24, 24]}},
        ...             "rope_parameters|rope_scaling.mrope_section", "model")
        3
    """
    *sections, key = dotted.split(".")
    for section in sections:
        named = [table.get(name) for name in section.split("|")]
        found = [inner for inner in named if isinstance(inner, Mapping)]
        if not found:
            raise MRopeError(f"{where}: the config has no {section.replace('|', ' or ')} section")
        table = found[0]
    keys = tuple(key.split("|"))
    lengths = {
        name: len(table[name]) for name in keys if isinstance(table.get(name), (list, tuple))
    }
    return read_int({**table, **lengths}, keys, " ".join((where, *sections)))


def as_mapping(config: Any) -> Mapping[str, Any]:
    """Return a model's config as a mapping, with a whole Omni's sections as they are.

    Args:
        config: as `read_model` takes it.

    Raises:
        MRopeError: no such file, or not a config.
    """
    if isinstance(config, Mapping):
        return config
    if isinstance(config, (str, os.PathLike)):
        return _read_json(Path(config))
    # A live `PretrainedConfig`, recognised without importing transformers.
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

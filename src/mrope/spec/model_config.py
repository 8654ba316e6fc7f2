"""Read a model's config: a mapping, a path, a JSON text, or a live `PretrainedConfig`.

`MRopeSpec`, `VisionSpec` and `AudioSpec` all read their values through these functions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mrope.errors import MRopeError
from mrope.spec.class_defaults import CLASS_DEFAULTS, WRAPPERS, fill_defaults

Table = Mapping[str, Any]
"""A config, or one of its sections, as JSON holds it."""

_WRAPPED_SECTIONS = tuple(dict.fromkeys(section for section, _ in WRAPPERS.values()))


def read_model(config: object) -> tuple[Any, Table]:
    """Return `model_type` and config of the model that takes position ids.

    For a whole Omni that is its thinker, read from `thinker_config`; for ColQwen2 the model in
    `vlm_config`.

    Args:
        config: a dict, the path of a `config.json` or of its folder, a JSON text, or an object with
            `to_dict`.

    Raises:
        MRopeError: no such file, or not a config.
    """
    table = as_mapping(config)
    wrapper = WRAPPERS.get(str(table.get("model_type")))
    for section in _WRAPPED_SECTIONS:
        inner = table.get(section)
        if isinstance(inner, Mapping):
            # transformers writes the inner `model_type`, but does not need it to read the file.
            return read_model({"model_type": wrapper[1], **inner} if wrapper else inner)
    if wrapper:
        return read_model({"model_type": wrapper[1]} if table.get(wrapper[0]) is None else table)
    return table.get("model_type"), table


def with_class_defaults(table: Table, model_type: str) -> Table:
    """Return a model's config with the defaults of transformers' class where it has no value.

    See `mrope.spec.class_defaults`.
    """
    return fill_defaults(table, CLASS_DEFAULTS.get(model_type, {}))


def read_tower(table: Table, section: str, model_type: object, family: str) -> tuple[Table, str]:
    """Return a tower's config with its class's defaults, and what errors call it.

    Args:
        table: a model's config, or the tower's own.
        section: where a model's config holds the tower's, such as "vision_config".
        model_type: named in errors.
        family: key of `CLASS_DEFAULTS`.
    """
    # Without the section this is the tower's own config: transformers 4.57 gives both one name.
    tower = table.get(section, table)
    # A null section is built from its class.
    tower = {} if tower is None else tower
    if not isinstance(tower, Mapping):
        raise MRopeError(f"{model_type}: {section} must be a section, not {tower!r}")
    defaults = CLASS_DEFAULTS.get(family, {}).get(section, {})
    return fill_defaults(tower, defaults), f"{model_type} {section}"


def read_int(table: Table, keys: tuple[str, ...], where: str, minimum: int = 0) -> int:
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


def read_dotted(table: Table, dotted: str, where: str) -> int:
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
        # Checkpoints older than `text_config` have its values at the top, and are read so.
        if section == "text_config" and table.get(section) is None:
            continue
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


def as_mapping(config: object) -> Table:
    """Return a model's config as a mapping, with a whole Omni's sections as they are.

    Args:
        config: as `read_model` takes it.

    Raises:
        MRopeError: no such file, or not a config.
    """
    table = _as_plain(config)
    if isinstance(table, Mapping):
        return table
    # `PretrainedConfig.to_json_string` returns the file's text. No path starts with a brace.
    if isinstance(config, str) and config.lstrip().startswith("{"):
        return _parse_json(config, "the JSON text")
    if isinstance(config, (str, os.PathLike)):
        return _read_json(Path(config))
    raise MRopeError(
        f"cannot read a model config from {type(config).__name__}; "
        "give a dict, a path to config.json or its folder, a JSON text, or a PretrainedConfig"
    )


def _as_plain(config: Any) -> Any:
    """Return a config whose sections are mappings too; anything else is returned unchanged."""
    # A live `PretrainedConfig`, recognised without importing transformers.
    if not isinstance(config, Mapping) and callable(getattr(config, "to_dict", None)):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        return config
    return {key: _as_plain(value) for key, value in config.items()}


def _read_json(path: Path) -> Table:
    file = path / "config.json" if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MRopeError(
            f"no model config at {file}; give model.config, or the local folder of a model "
            "(nothing is downloaded from a hub)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise MRopeError(f"cannot read the model config {file}: {error}") from error
    return _parse_json(text, str(file))


def _parse_json(text: str, where: str) -> Table:
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise MRopeError(f"cannot read the model config {where}: {error}") from error
    if not isinstance(table, Mapping):
        raise MRopeError(f"{where} holds no model config: its top level is not an object")
    return table

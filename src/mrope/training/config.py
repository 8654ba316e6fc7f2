"""Load a training config, a YAML file with overrides, and build the collator that it asks for.

Needs the `cli` extra (pydantic, OmegaConf); no worker imports it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from mrope.collate.collator import Collate, MRopeCollator
from mrope.collate.skip_bad import BadExampleFilter, SkipBad
from mrope.errors import MRopeError
from mrope.spec.model_config import as_mapping
from mrope.spec.references import nearest
from mrope.training.rows import PadRows
from mrope.training.sections import Config, ConfigError, errors_of, problems_error


def load_config(path: str | PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read a training config.

    Args:
        path: YAML file. Relative paths in it and in the overrides are relative to its folder.
        overrides: `key.of.section=value` strings; values are parsed as YAML, as in the file.

    Raises:
        ConfigError: the file cannot be read, or holds unknown keys, wrong types or wrong values.
            The message lists all of them, each with its dotted key, its value and what is allowed.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "run.yaml"
        >>> _ = file.write_text("model: {config: {model_type: qwen3_vl}}")
        >>> load_config(file, ["trainer.max_steps=3"]).trainer
        {'max_steps': 3}
    """
    file = Path(path)
    table = _read(file, overrides)
    return as_config(table, file.parent, f"{file}{_with(overrides)}")


def as_config(table: Mapping[str, Any], folder: Path, name: str) -> Config:
    """Check a mapping of sections, as a YAML file holds them; raises as `load_config` does.

    Relative paths in it are relative to `folder`; `name` is that of its source, for errors.
    """
    try:
        return Config.model_validate(table, context={"folder": folder})
    except ValidationError as error:
        # pydantic's own message spans several lines for each problem, and names its types.
        problems = [_problem(dict(entry)) for entry in error.errors()]
    raise problems_error(name, problems)


def build_collator(cfg: Config, inner_collate: Collate | None = None) -> Collate:
    """Build the collate function that a config asks for.

    Args:
        cfg: a training config.
        inner_collate: collate function that makes the batch; None: a `PaddingCollator` that pads
            with the `pad_token_id` of the model's config, or with 0.

    Returns:
        An `MRopeCollator` around `inner_collate`; with `rope.enabled: false` that function alone,
        without the rows that it cannot collate if `rope.on_error` is "skip".

    Raises:
        ConfigError: the model's config is not of a known M-RoPE family.
        MRopeError, OSError: as `MRopeCollator` does.
    """
    pad_token_id = _pad_token_id(model_table(cfg.model.config))
    if inner_collate is None:
        fixed = cfg.rope.enabled and cfg.rope.shapes is not None and cfg.rope.shapes.patches
        inner_collate = PadRows(pad_token_id=pad_token_id, join_pixels=not fixed)
    on_error = cfg.rope.skip_bad()
    if not cfg.rope.enabled:
        if not isinstance(on_error, SkipBad):
            return inner_collate
        return partial(BadExampleFilter(on_error).collate, inner_collate)
    return MRopeCollator(
        inner_collate,
        cfg.spec(),
        cfg.vision_spec(),
        packing=cfg.rope.flatten(pad_token_id, attached=cfg.model.attach),
        layout=cfg.rope.layout,
        shapes=None if cfg.rope.shapes is None else cfg.rope.shapes.ladder(pad_token_id),
        on_error=on_error,
    )


def model_table(config: Mapping[str, Any] | str) -> Mapping[str, Any]:
    """Return `model.config` as a mapping, read from its file if it is a path."""
    with errors_of("model.config", MRopeError):
        return as_mapping(config)


def _pad_token_id(table: Mapping[str, Any]) -> int:
    """Return the id that a model pads with, or 0 if its config does not name one."""
    text = table.get("text_config")
    # Some configs have the key at the top, others in the text model's section.
    for source in (table, text if isinstance(text, Mapping) else {}):
        if isinstance(source.get("pad_token_id"), int):
            return int(source["pad_token_id"])
    return 0


def _read(file: Path, overrides: Sequence[str]) -> Mapping[str, Any]:
    """Return the file's sections, with the overrides merged into them."""
    # OmegaConf reads `key` as `key=null` and `a..b=1` as an empty key, and fails on `[=1`.
    for override in overrides:
        if not re.match(r"\w+(\.\w+)*=", override):
            raise ConfigError(f"override {override!r}: must be key.of.section=value")
    try:
        table = OmegaConf.load(file)
        merged = OmegaConf.merge(table, OmegaConf.from_dotlist(list(overrides)))
        sections = OmegaConf.to_container(merged, resolve=True)
    except IsADirectoryError as error:
        raise ConfigError(
            f"{file}: cannot be read: a folder; give a YAML file, whose model.config names the "
            "folder of a model"
        ) from error
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
    """Describe one entry of pydantic's error list in a line: key, what is allowed, value."""
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
        said = str(entry["ctx"]["error"])
        if said.startswith("must be") and not isinstance(entry["input"], dict):
            said += f", not {entry['input']!r}"
        # A section's own check names its keys in full.
        return said if not name or said.startswith(f"{name}.") else f"{name}: {said}"
    allowed = str(entry["msg"]).replace("Input should be", "must be", 1)
    return f"{name}: {allowed}, not {entry['input']!r} ({type(entry['input']).__name__})"


def _known_keys(sections: Sequence[str]) -> list[str]:
    """Return the keys of a section, given by its path; an empty path is the whole file."""
    kind: type[BaseModel] = Config
    for section in sections:
        # An optional section is annotated as a union with None.
        annotation = kind.model_fields[section].annotation
        kind = next(
            one for one in (annotation, *get_args(annotation)) if hasattr(one, "model_fields")
        )
    return list(kind.model_fields)

"""Read an `MRopeSpec` from a model's config: every value that position ids depend on."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mrope.errors import MRopeError
from mrope.spec.families import (
    FAMILIES,
    NO_TOKEN,
    ONE_DIMENSIONAL,
    ConfigValue,
    Family,
    find_family,
    rules_of,
)
from mrope.spec.model_config import read_dotted, read_int, read_model, with_class_defaults
from mrope.spec.references import (
    REFERENCES,
    Reference,
    nearest,
    prove_if_unknown,
    resolve_reference,
)


@dataclass(frozen=True)
class MRopeSpec:
    """Values of a model that position ids depend on: plain data, picklable, comparable.

    Attributes:
        family: `model_type` of the config, a key of `FAMILIES` or `ONE_DIMENSIONAL`.
        reference: release whose position ids are computed, a key of `REFERENCES`.
        image_token_id, video_token_id, vision_start_token_id: token ids of the model; `NO_TOKEN`
            if the family has no such token.
        spatial_merge_size: patches along each side that the vision tower merges into one token.
        tokens_per_second: temporal positions per second; None in families without timed videos.
        extra: `Family.extra` as read from the config, by name.
    """

    family: str
    reference: str
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    spatial_merge_size: int
    tokens_per_second: int | None = None
    extra: Mapping[str, int | float] = field(default_factory=dict, hash=False)

    # Looked up once: a batch asks for them some twenty times.
    @cached_property
    def family_row(self) -> Family:
        """The family's row of `FAMILIES`, or of `ONE_DIMENSIONAL`."""
        return FAMILIES[self.family] if self.family in FAMILIES else ONE_DIMENSIONAL[self.family]

    @cached_property
    def conventions(self) -> Reference:
        """The reference's row of `REFERENCES`."""
        return REFERENCES[self.reference]

    def frame_tokens(self, height: int, width: int) -> int:
        """Return how many placeholder tokens a frame of `height` x `width` patches has."""
        merge = self.spatial_merge_size
        return height // merge * (width // merge + self.family_row.newlines)

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | str | os.PathLike[str] | Any,
        reference: str | None = "auto",
        rule: str | None = None,
    ) -> MRopeSpec:
        """Read a spec from a model's config.

        A key that the config lacks has the default of transformers' config class, as if
        transformers had read the file; see `mrope.spec.class_defaults`.

        Args:
            config: a dict, the path of a `config.json` or of the folder that holds it, a JSON text,
                or a live `PretrainedConfig` (anything with `to_dict`). Sections of a dict may be
                live too.
            reference: see `resolve_reference`; None: "auto".
            rule: which of several published rules, for a family in which they disagree; also read
                from the config's `mrope_rule`.

        Raises:
            MRopeError: no such file, not a config, an unknown `model_type`, a key that is missing
                and has no default, of the wrong type, or given twice with two values; token ids
                that are not distinct; a reference that the family was not compared with.

        Example:
            >>> MRopeSpec.from_config({
            ...     "model_type": "qwen2_vl", "image_token_id": 5, "video_token_id": 6,
            ...     "vision_start_token_id": 4, "vision_config": {"spatial_merge_size": 2},
            ... }, reference="transformers-5.23").spatial_merge_size
            2
        """
        name, table = read_model(config)
        name = _with_rule(name, rule or table.get("mrope_rule"))
        family = find_family(name)
        if family is None:
            raise MRopeError(_describe_unknown_family(name))
        by_release = reference in (None, "auto")
        reference = resolve_reference(reference or "auto")
        if reference not in family.references:
            raise MRopeError(
                f"{name} was not compared with {reference}; known: {', '.join(family.references)}"
            )
        table = with_class_defaults(table, name)
        vision = table.get(family.section) if family.section else table
        if not isinstance(vision, Mapping):
            raise MRopeError(f"{name}: the config has no {family.section} section")
        where = f"{name} {family.section}".rstrip()
        timed = read_int(vision, ("tokens_per_second",), where, 1) if family.timed else None
        spec = cls(
            family=name,
            reference=reference,
            image_token_id=_read_token(table, family.image_keys, name),
            video_token_id=_read_token(table, family.video_keys, name),
            vision_start_token_id=_read_token(table, family.start_keys, name),
            spatial_merge_size=_read_merge(table, vision, family, where),
            tokens_per_second=timed,
            extra={value.name: _read_extra(table, value, name) for value in family.extra},
        )
        _refuse_equal_tokens(spec)
        if by_release and not family.one_dimensional:
            prove_if_unknown("positions", spec)
        return spec


def example_config(family: str) -> dict[str, Any]:
    """Return the smallest valid config of `family`, with made-up token ids, for examples and tests.

    Raises:
        MRopeError: an unknown family.

    Example:
        >>> example_config("qwen3_vl")["vision_config"]
        {'spatial_merge_size': 2}
    """
    row = find_family(family)
    if row is None:
        raise MRopeError(_describe_unknown_family(family))
    name, _, rule = family.partition("@")
    vision = {} if row.merges is not None else dict.fromkeys(row.merge_keys[:1], 2)
    vision |= {"tokens_per_second": 2} if row.timed else {}
    config: dict[str, Any] = {"model_type": name} | ({"mrope_rule": rule} if rule else {})
    config |= {row.section: vision} if row.section else vision
    for keys, token in ((row.start_keys, 101), (row.image_keys, 102), (row.video_keys, 103)):
        config |= dict.fromkeys(keys[:1], token)
    if row.merges is not None:
        config["downsample_mode"] = next(iter(row.merges))
    for value in row.extra:
        *sections, key = value.key.split(".")
        section = config
        for name in sections:
            section = section.setdefault(name.split("|")[0], {})
        section[key.split("|")[0]] = value.example
    return config


def _with_rule(name: object, rule: str | None) -> Any:
    """Return the key of the family's row, once it is known which rule is meant."""
    rules = rules_of(name)
    if rules and rule not in rules:
        raise MRopeError(
            f"the published rules of {name} disagree: name the one that your model was trained "
            f"with, by rule= or the config's mrope_rule, one of {', '.join(rules)}, not {rule!r}"
        )
    return f"{name}@{rule}" if rules else name


def _read_token(table: Mapping[str, Any], keys: tuple[str, ...], where: str) -> int:
    return read_int(table, keys, where) if keys else NO_TOKEN


def _read_merge(
    table: Mapping[str, Any], vision: Mapping[str, Any], family: Family, where: str
) -> int:
    merges = family.merges
    if merges is None:
        return read_int(vision, family.merge_keys, where, 1) if family.merge_keys else 1
    mode = str(table.get("downsample_mode"))
    if mode not in merges:
        name = table["model_type"]
        raise MRopeError(f"{name}: downsample_mode must be one of {', '.join(merges)}, not {mode}")
    return merges[mode]


def _read_extra(table: Mapping[str, Any], value: ConfigValue, name: str) -> int:
    section = value.key.split(".")[0]
    if value.default is not None and table.get(section) is None:
        return value.default
    return read_dotted(table, value.key, name)


def _refuse_equal_tokens(spec: MRopeSpec) -> None:
    tokens = {
        "image": spec.image_token_id,
        "video": spec.video_token_id,
        "vision start": spec.vision_start_token_id,
        **{name: int(value) for name, value in spec.extra.items() if name.endswith("_id")},
    }
    names: dict[int, str] = {}
    for name, token in tokens.items():
        # Equal ids would give every placeholder two kinds, and the first match would win silently.
        if token != NO_TOKEN and token in names:
            raise MRopeError(
                f"{spec.family}: token id {token} stands for two tokens, {names[token]} and {name}"
            )
        names[token] = name


def _describe_unknown_family(name: object) -> str:
    known = f"known: {', '.join(FAMILIES)}"
    if not isinstance(name, str):
        return f"the config has no model_type, so its family cannot be told; {known}"
    # The usual mistake: `config.text_config` instead of the config.
    if re.search(r"_(text|vision)$", name):
        return f"model_type {name!r} is a part of a model; give the whole model's config; {known}"
    return f"unknown model_type {name!r}{nearest(name, FAMILIES)}; {known}"

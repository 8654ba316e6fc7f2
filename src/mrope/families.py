"""What each model family and each reference is: plain data; and the spec, read from a config.

A family is a row of `FAMILIES`, keyed by `config.model_type`; a reference is a row of `REFERENCES`,
named after the transformers release whose `get_rope_index` it equals. Nothing else in the package
asks for a model type or a version.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mrope.errors import MRopeError


@dataclass(frozen=True)
class Family:
    """How a model family lays out its tokens, and where its config keeps the numbers.

    Attributes:
        frames_apart: every frame of a video is a span of its own, as if it were an image (Qwen3-VL
            and its kin, whose processors write a timestamp before each frame).
        timed: the temporal step of a video is `tokens_per_second * second_per_grid_ts`.
        packs: its examples were seen to be kept apart in one row (see `mrope.packing`).
        image_keys, video_keys, start_keys: names under which a config may hold the token ids of the
            image placeholder, the video placeholder and the vision start marker.
    """

    frames_apart: bool
    timed: bool = False
    packs: bool = True
    image_keys: tuple[str, ...] = ("image_token_id",)
    video_keys: tuple[str, ...] = ("video_token_id",)
    start_keys: tuple[str, ...] = ("vision_start_token_id",)


FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(frames_apart=False),
    "qwen2_5_vl": Family(frames_apart=False, timed=True),
    "qwen3_vl": Family(frames_apart=True),
    "qwen3_vl_moe": Family(frames_apart=True),
    "qwen3_5": Family(frames_apart=True),
    "qwen3_5_moe": Family(frames_apart=True),
    # LMMs-Lab's config exposes every id under two names; a hand-written one may have either.
    "aero_realtime": Family(
        frames_apart=True,
        packs=False,
        image_keys=("image_token_index", "image_token_id"),
        video_keys=("video_token_index", "video_token_id"),
        start_keys=("vision_start_token_index", "vision_start_token_id"),
    ),
}


@dataclass(frozen=True)
class Reference:
    """What one era of transformers' `get_rope_index` does where the releases differ.

    Attributes:
        fill: position written at padding.
        delta_over_padded: `rope_deltas` is max + 1 - S with the padded S, instead of the row's own
            number of valid tokens.
        text_batch_fill_in_delta: in a batch without any grid the maximum is taken over the fill at
            padding too.
        advance_over_time: text goes on after the largest position of a span, time included, instead
            of after its larger spatial side.
        whole_seconds: `second_per_grid_ts` is truncated to an integer before it is multiplied.
        start_required: a span is found by the vision start marker in front of it; without one its
            placeholders are taken for text.
        binary_mask: only mask values of 1 are valid, so that a mask with other values has no
        meaning.
        timed_image_step: temporal step of an image in the families with timed videos.
    """

    fill: int
    delta_over_padded: bool
    text_batch_fill_in_delta: bool
    advance_over_time: bool
    whole_seconds: bool
    start_required: bool
    binary_mask: bool
    timed_image_step: int


REFERENCES: dict[str, Reference] = {
    "transformers-4.57": Reference(
        fill=1,
        delta_over_padded=True,
        text_batch_fill_in_delta=True,
        advance_over_time=True,
        whole_seconds=True,
        start_required=True,
        binary_mask=True,
        timed_image_step=0,
    ),
    "transformers-5.17": Reference(
        fill=0,
        delta_over_padded=False,
        text_batch_fill_in_delta=False,
        advance_over_time=False,
        whole_seconds=True,
        start_required=False,
        binary_mask=False,
        timed_image_step=1,
    ),
    "transformers-5.23": Reference(
        fill=0,
        delta_over_padded=False,
        text_batch_fill_in_delta=False,
        advance_over_time=False,
        whole_seconds=False,
        start_required=False,
        binary_mask=False,
        timed_image_step=1,
    ),
}

# First and last release (major, minor) of each era. 5.0 to 5.5 stand in no row: they number clips
# wrongly. The era of 5.23 begins with 5.18, the first wheel in which seconds are not truncated.
_ERAS: tuple[tuple[tuple[int, int], tuple[int, int], str], ...] = (
    ((4, 57), (4, 57), "transformers-4.57"),
    ((5, 6), (5, 17), "transformers-5.17"),
    ((5, 18), (5, 23), "transformers-5.23"),
)


def resolve_reference(name: str = "auto", installed: str | None = None) -> str:
    """Turn a reference's name, or "auto", into a key of `REFERENCES`.

    Args:
        name: a key of `REFERENCES`, or "auto": the era of the transformers that is installed, and
            "transformers-5.23" where none is. Its version is read from the package's metadata;
            transformers is not imported.
        installed: version to use for "auto" instead of the installed one.

    Raises:
        MRopeError: unknown name, or "auto" with a release that has no tested rule.

    Warns:
        UserWarning: "auto" with a release newer than any that was tested.

    Example:
        >>> resolve_reference("auto", installed="5.12.0")
        'transformers-5.17'
    """
    if name != "auto":
        if name not in REFERENCES:
            raise MRopeError(
                f"unknown reference {name!r}{nearest(name, REFERENCES)}; "
                f"known: auto, {', '.join(REFERENCES)}"
            )
        return name
    version = installed if installed is not None else installed_transformers()
    if version is None:
        return _ERAS[-1][2]
    parsed = re.match(r"(\d+)\.(\d+)", version)
    if parsed is None:
        raise MRopeError(f"cannot read transformers' version {version!r}; name a reference")
    release = (int(parsed[1]), int(parsed[2]))
    for first, last, reference in _ERAS:
        if first <= release <= last:
            return reference
    if release > _ERAS[-1][1]:
        warnings.warn(
            f"transformers {version} is newer than any release that mrope was tested against; "
            f"reference='auto' uses {_ERAS[-1][2]!r}",
            UserWarning,
            stacklevel=3,
        )
        return _ERAS[-1][2]
    why = "releases 5.0 to 5.5 number clips wrongly" if release[0] == 5 else "it was not tested"
    raise MRopeError(
        f"reference='auto' has no rule for transformers {version}: {why}; "
        f"install 4.57 or 5.6 and later, or name one of: {', '.join(REFERENCES)}"
    )


def installed_transformers() -> str | None:
    """Return the version of the installed transformers, from its metadata; None without it."""
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class MRopeSpec:
    """All that the kernel needs to know of a model: plain numbers, picklable, comparable.

    Attributes:
        family: `model_type` of the config, a key of `FAMILIES`.
        reference: the release whose numbers are computed, a key of `REFERENCES`.
        image_token_id, video_token_id, vision_start_token_id: token ids of the model.
        spatial_merge_size: patches that the vision tower merges along each side.
        tokens_per_second: temporal positions in a second; None in families without timed videos.
        numbers: what else the family's rule reads of the config, by name.
    """

    family: str
    reference: str
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    spatial_merge_size: int
    tokens_per_second: int | None = None
    numbers: Mapping[str, int | float] = field(default_factory=dict, hash=False)

    @property
    def traits(self) -> Family:
        """The family's row of the table."""
        return FAMILIES[self.family]

    @property
    def rule(self) -> Reference:
        """The reference's row of the table."""
        return REFERENCES[self.reference]

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | str | os.PathLike[str] | Any, reference: str = "auto"
    ) -> MRopeSpec:
        """Read a spec from a model's config.

        Args:
            config: a dict, the path of a `config.json` or of the folder that holds it, or a live
                `PretrainedConfig` (anything with `to_dict`).
            reference: see `resolve_reference`.

        Raises:
            MRopeError: no such file, not a config, an unknown `model_type`, a key that is missing,
                of the wrong type, or given twice with two values; token ids that are not distinct.

        Example:
            >>> MRopeSpec.from_config({
            ...     "model_type": "qwen2_vl", "image_token_id": 5, "video_token_id": 6,
            ...     "vision_start_token_id": 4, "vision_config": {"spatial_merge_size": 2},
            ... }, reference="transformers-5.23").spatial_merge_size
            2
        """
        table = as_mapping(config)
        name = table.get("model_type")
        if name not in FAMILIES:
            raise MRopeError(_unknown_family(name))
        family = FAMILIES[name]
        vision = table.get("vision_config")
        if not isinstance(vision, Mapping):
            raise MRopeError(f"{name}: the config has no vision_config section")
        keys = (family.image_keys, family.video_keys, family.start_keys)
        image, video, start = (read_int(table, key, name) for key in keys)
        if len({image, video, start}) < 3:
            twice = video if video in (image, start) else image
            raise MRopeError(
                f"{name}: token id {twice} stands for two of the image, video and vision start "
                "tokens"
            )
        return cls(
            family=name,
            reference=resolve_reference(reference),
            image_token_id=image,
            video_token_id=video,
            vision_start_token_id=start,
            spatial_merge_size=read_int(
                vision, ("spatial_merge_size",), f"{name} vision_config", 1
            ),
            tokens_per_second=read_int(
                vision, ("tokens_per_second",), f"{name} vision_config", minimum=1
            )
            if family.timed
            else None,
        )


def example_config(family: str) -> dict[str, Any]:
    """Return a smallest config of `family`, with made-up token ids, to show or test its numbering.

    Example:
        >>> example_config("qwen3_vl")["vision_config"]
        {'spatial_merge_size': 2}
    """
    if family not in FAMILIES:
        raise MRopeError(_unknown_family(family))
    row = FAMILIES[family]
    vision = {"spatial_merge_size": 2} | ({"tokens_per_second": 2} if row.timed else {})
    return {
        "model_type": family,
        row.start_keys[0]: 101,
        row.image_keys[0]: 102,
        row.video_keys[0]: 103,
        "vision_config": vision,
    }


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


def _unknown_family(name: object) -> str:
    known = f"known: {', '.join(FAMILIES)}"
    if not isinstance(name, str):
        return f"the config has no model_type, so its family cannot be told; {known}"
    if re.search(r"_(text|vision)$", name):
        return f"model_type {name!r} is a part of a model; give the whole model's config; {known}"
    return f"unknown model_type {name!r}{nearest(name, FAMILIES)}; {known}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint at the known name that is most like `name`; nothing where none is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""

"""What each model family is: plain data; and the spec, read from a config.

A family is a row of `FAMILIES`, keyed by `config.model_type`. Nothing else in the package asks for
a model type. What a release does is in `mrope.references`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from mrope.errors import MRopeError
from mrope.references import REFERENCES, Reference, nearest, resolve_reference

NO_TOKEN = -1
"""Stands for the id of a token that a family does not have."""


@dataclass(frozen=True)
class Tower:
    """What a family's vision tower takes beside its pixels: see `mrope.vision`.

    Attributes:
        videos: it takes videos too.
        positions: it takes its patches' positions.
        windows: most layers attend within square windows (Qwen2.5-VL).
        table: a square table of learned positions is stretched to each frame (Qwen3-VL and kin).
        raster: patches are numbered row by row over the whole frame, not by merged blocks, and the
            table's edges, not its corners' centres, meet the frame's (PaddleOCR-VL).
    """

    videos: bool = True
    positions: bool = True
    windows: bool = False
    table: bool = False
    raster: bool = False


class Number(NamedTuple):
    """A further number that a family's rule reads of the config.

    Attributes:
        name: of the number in `MRopeSpec.numbers`.
        key: where the config has it, with dots between sections, and bars between other names of
            the same. Where there is a list, its length is the number.
        example: a value for `example_config`.
    """

    name: str
    key: str
    example: int | list[int]


@dataclass(frozen=True)
class Family:
    """How a model family lays out its tokens, and where its config keeps the numbers.

    Attributes:
        rule: name of a function of `mrope.rules` that numbers the tokens; None: `mrope.positions`.
        inputs: what that function takes of a batch beside tokens, mask and grids.
        frames_apart: every frame of a video is a span of its own, as if it were an image (Qwen3-VL
            and its kin, whose processors write a timestamp before each frame).
        frames_as_images: a frame's placeholders are those of images, and stand between a video's
            start and end marker (GLM-V).
        merges: patches that share a token along each side, by the config's `downsample_mode`; None:
            `vision_config.spatial_merge_size`.
        timed: the temporal step of a video is `tokens_per_second * second_per_grid_ts`.
        packs: its examples were seen to be kept apart in one row (see `mrope.packing`).
        references: those whose numbers it was compared with.
        image_keys, video_keys, start_keys: names under which a config may hold the token ids of the
            image placeholder, the video placeholder and the vision start marker; none: the family
            has no such token.
        numbers: further ones of the config: `temporal_merge_size`, frames of a video that share
            their tokens; `video_start_token_id`, `video_end_token_id`, with `frames_as_images`.
        tower: its vision tower; None: transformers' does not take anything from outside.
    """

    rule: str | None = None
    inputs: tuple[str, ...] = ()
    frames_apart: bool = False
    frames_as_images: bool = False
    merges: Mapping[str, int] | None = None
    timed: bool = False
    packs: bool = True
    references: tuple[str, ...] = tuple(REFERENCES)
    image_keys: tuple[str, ...] = ("image_token_id",)
    video_keys: tuple[str, ...] = ("video_token_id",)
    start_keys: tuple[str, ...] = ("vision_start_token_id",)
    numbers: tuple[Number, ...] = ()
    tower: Tower | None = None


# 4.57 has some of the later families, with functions of their own that were not compared.
_SINCE_5_6 = ("transformers-5.17", "transformers-5.23")
_STRETCHED = Tower(table=True)
_COUNTS = ("images_per_sample", "videos_per_sample")


def _tokens(*names: str) -> tuple[Number, ...]:
    """Return token ids that stand in the config under their own names."""
    return tuple(Number(name, name, 104 + place) for place, name in enumerate(names))


_GLM = Family(
    frames_apart=True,
    frames_as_images=True,
    packs=False,
    references=_SINCE_5_6,
    start_keys=("image_start_token_id",),
    numbers=_tokens("video_start_token_id", "video_end_token_id"),
    tower=Tower(),
)
_AUDIO = ("second_per_grid_ts", "audio_seqlens", "use_audio_in_video", "audios_per_sample")
_OMNI = Family(
    inputs=(*_AUDIO, *_COUNTS),
    packs=False,
    image_keys=("image_token_id", "image_token_index"),
    video_keys=("video_token_id", "video_token_index"),
)
_OMNI_NUMBERS = (
    Number("audio_token_id", "audio_token_id|audio_token_index", 104),
    Number("audio_start_token_id", "audio_start_token_id", 105),
    Number("position_id_per_seconds", "position_id_per_seconds", 25),
)
_CROPS = ("target_sizes", "target_sizes_videos", "downsample_mode")
_SECTIONS = "text_config.rope_parameters|rope_scaling.mrope_section|xdrope_section"

FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(tower=Tower()),
    "qwen2_5_vl": Family(timed=True, tower=Tower(windows=True)),
    "qwen3_vl": Family(frames_apart=True, tower=_STRETCHED),
    "qwen3_vl_moe": Family(frames_apart=True, tower=_STRETCHED),
    "qwen3_5": Family(frames_apart=True, tower=_STRETCHED),
    "qwen3_5_moe": Family(frames_apart=True, tower=_STRETCHED),
    "qwen4_exp": Family(frames_apart=True, packs=False, references=_SINCE_5_6, tower=_STRETCHED),
    # LMMs-Lab's config exposes every id under two names; a hand-written one may have either.
    "aero_realtime": Family(
        frames_apart=True,
        packs=False,
        image_keys=("image_token_index", "image_token_id"),
        video_keys=("video_token_index", "video_token_id"),
        start_keys=("vision_start_token_index", "vision_start_token_id"),
    ),
    "glm4v": _GLM,
    "glm4v_moe": _GLM,
    "glm46v": _GLM,
    "glm_ocr": _GLM,
    "ernie4_5_vl_moe": Family(
        packs=False,
        references=_SINCE_5_6,
        start_keys=("image_start_token_id",),
        numbers=(Number("temporal_merge_size", "vision_config.temporal_merge_size", 2),),
        tower=Tower(),
    ),
    "paddleocr_vl": Family(
        packs=False,
        references=_SINCE_5_6,
        tower=Tower(videos=False, table=True, raster=True),
    ),
    "cohere_compass": Family(
        frames_apart=True, packs=False, references=_SINCE_5_6, tower=_STRETCHED
    ),
    "cosmos3_omni": Family(frames_apart=True, packs=False, references=_SINCE_5_6, tower=_STRETCHED),
    "cosmos3_edge": Family(
        frames_apart=True, packs=False, references=_SINCE_5_6, tower=Tower(positions=False)
    ),
    "qwen2_5_omni_thinker": replace(
        _OMNI,
        rule="omni_2_5",
        numbers=(*_OMNI_NUMBERS, Number("seconds_per_chunk", "seconds_per_chunk", 2)),
        tower=Tower(windows=True),
    ),
    # 4.57 counts audio tokens for windows of 50 alone.
    "qwen3_omni_moe_thinker": replace(
        _OMNI,
        rule="omni_3",
        references=_SINCE_5_6,
        numbers=(*_OMNI_NUMBERS, Number("n_window", "audio_config.n_window", 50)),
        tower=_STRETCHED,
    ),
    "glm_image": Family(
        rule="glm_image",
        inputs=("images_per_sample",),
        packs=False,
        references=_SINCE_5_6,
        video_keys=(),
        start_keys=("image_start_token_id",),
        numbers=(Number("image_end_token_id", "image_end_token_id", 103),),
        tower=Tower(videos=False),
    ),
    "hunyuan_vl": Family(
        rule="hunyuan",
        inputs=("mm_token_type_ids", "images_per_sample"),
        packs=False,
        references=_SINCE_5_6,
        video_keys=(),
        start_keys=(),
        numbers=(Number("axes", _SECTIONS, [2, 2, 2, 2]),),
    ),
    "minicpmv4_7": Family(
        rule="minicpm",
        inputs=(*_CROPS, "mm_token_type_ids", *_COUNTS),
        merges={"4x": 2, "16x": 4},
        packs=False,
        references=("transformers-5.23",),
        start_keys=("image_start_id",),
        numbers=_tokens("image_end_id", "slice_start_id", "slice_end_id", "newline_id"),
    ),
}

ONE_DIMENSIONAL: dict[str, Tower | None] = {
    "exaone4_5": Tower(windows=True),
    "hyperclovax_vision_v2": Tower(windows=True),
    "video_llama_3": None,
}
"""Vision-language models whose tokens transformers 5.23 numbers in 1-D, and their towers."""


@dataclass(frozen=True)
class MRopeSpec:
    """All that the kernel needs to know of a model: plain numbers, picklable, comparable.

    Attributes:
        family: `model_type` of the config, a key of `FAMILIES`.
        reference: the release whose numbers are computed, a key of `REFERENCES`.
        image_token_id, video_token_id, vision_start_token_id: token ids of the model; `NO_TOKEN`
            where the family has no such token.
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
        name, table = model_section(as_mapping(config))
        if name not in FAMILIES:
            raise MRopeError(_unknown_family(name))
        family = FAMILIES[name]
        reference = resolve_reference(reference)
        if reference not in family.references:
            raise MRopeError(
                f"{name} was not compared with {reference}; known: {', '.join(family.references)}"
            )
        vision = table.get("vision_config")
        if not isinstance(vision, Mapping):
            raise MRopeError(f"{name}: the config has no vision_config section")
        where = f"{name} vision_config"
        spec = cls(
            family=name,
            reference=reference,
            image_token_id=_read_token(table, family.image_keys, name),
            video_token_id=_read_token(table, family.video_keys, name),
            vision_start_token_id=_read_token(table, family.start_keys, name),
            spatial_merge_size=read_int(vision, ("spatial_merge_size",), where, 1)
            if family.merges is None
            else _read_merge(table, family.merges, name),
            tokens_per_second=read_int(vision, ("tokens_per_second",), where, 1)
            if family.timed
            else None,
            numbers={number.name: _read_number(table, number, name) for number in family.numbers},
        )
        _refuse_equal_tokens(spec)
        return spec


def example_config(family: str) -> dict[str, Any]:
    """Return a smallest config of `family`, with made-up token ids, to show or test its numbering.

    Example:
        >>> example_config("qwen3_vl")["vision_config"]
        {'spatial_merge_size': 2}
    """
    if family not in FAMILIES:
        raise MRopeError(_unknown_family(family))
    row = FAMILIES[family]
    vision = {} if row.merges is not None else {"spatial_merge_size": 2}
    vision |= {"tokens_per_second": 2} if row.timed else {}
    config: dict[str, Any] = {"model_type": family, "vision_config": vision}
    for keys, token in ((row.start_keys, 101), (row.image_keys, 102), (row.video_keys, 103)):
        config |= dict.fromkeys(keys[:1], token)
    if row.merges is not None:
        config["downsample_mode"] = next(iter(row.merges))
    for number in row.numbers:
        *sections, key = number.key.split(".")
        section = config
        for part in sections:
            section = section.setdefault(part.split("|")[0], {})
        section[key.split("|")[0]] = number.example
    return config


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


def _read_token(table: Mapping[str, Any], keys: tuple[str, ...], where: str) -> int:
    return read_int(table, keys, where) if keys else NO_TOKEN


def _read_number(table: Mapping[str, Any], number: Number, name: str) -> int:
    """Read a number at its dotted key: "vision_config.temporal_merge_size"."""
    *sections, key = number.key.split(".")
    for section in sections:
        inner = [table.get(one) for one in section.split("|")]
        found = [one for one in inner if isinstance(one, Mapping)]
        if not found:
            raise MRopeError(f"{name}: the config has no {section.replace('|', ' or ')} section")
        table = found[0]
    keys = tuple(key.split("|"))
    sizes = {one: len(table[one]) for one in keys if isinstance(table.get(one), (list, tuple))}
    return read_int({**table, **sizes}, keys, " ".join((name, *sections)))


def _read_merge(table: Mapping[str, Any], merges: Mapping[str, int], name: str) -> int:
    mode = str(table.get("downsample_mode"))
    if mode not in merges:
        raise MRopeError(f"{name}: downsample_mode must be one of {', '.join(merges)}, not {mode}")
    return merges[mode]


def _refuse_equal_tokens(spec: MRopeSpec) -> None:
    tokens = {
        "image": spec.image_token_id,
        "video": spec.video_token_id,
        "vision start": spec.vision_start_token_id,
        **{name: int(value) for name, value in spec.numbers.items() if name.endswith("_id")},
    }
    names: dict[int, str] = {}
    for name, token in tokens.items():
        if token != NO_TOKEN and token in names:
            raise MRopeError(
                f"{spec.family}: token id {token} stands for two tokens, {names[token]} and {name}"
            )
        names[token] = name


def _unknown_family(name: object) -> str:
    known = f"known: {', '.join(FAMILIES)}"
    if not isinstance(name, str):
        return f"the config has no model_type, so its family cannot be told; {known}"
    if re.search(r"_(text|vision)$", name):
        return f"model_type {name!r} is a part of a model; give the whole model's config; {known}"
    if name in ONE_DIMENSIONAL:
        return (
            f"transformers 5.23 numbers the tokens of {name} in 1-D, as those of a text: there is "
            f"nothing to compute; {known}"
        )
    return f"unknown model_type {name!r}{nearest(name, FAMILIES)}; {known}"

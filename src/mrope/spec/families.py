"""Describe each model family as a row of plain data in `FAMILIES`, keyed by `config.model_type`.

Code reads the values of a row and never compares a model type, so a new family is a new row.
Differences between releases are in `mrope.spec.references`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from mrope.columns import columns, count_key
from mrope.spec.references import REFERENCES

NO_TOKEN = -1
"""Token id in the spec of a family that has no such token."""


@dataclass(frozen=True)
class Tower:
    """Inputs of a family's vision tower beside pixels.

    Attributes:
        tensors: keys of `mrope.towers.PRODUCTS`: what the tower, or an attached model behind it,
            reads. A tensor that needs a value of the config (the side of a window or of the table)
            is left out of a `VisionSpec` without that value.
        sizes: what is computed from. "grids": of images and clips. "crops": height and width of
            each crop, in place of grids (MiniCPM-V). "without_last": without the last grid of each
            row, of an image that is to be drawn and has no pixels (GLM-Image). "merged_in_batch":
            grids, and by how many patches they are merged stands in the batch, not in the config
            (VideoLLaMA 3).
        fixed: what it reads in batches of fixed shapes, in place of `tensors`; None: the same.
        videos: the tower takes videos too, not only images.
        patch: how the pixels of a patch lie: "flat", in one axis, or as an "image", (channels,
            side, side).
    """

    tensors: tuple[str, ...] = ("borders", "positions", "windows", "table")
    sizes: Literal["grids", "crops", "without_last", "merged_in_batch"] = "grids"
    fixed: tuple[str, ...] | None = None
    videos: bool = True
    patch: Literal["flat", "image"] = "flat"


class ConfigValue(NamedTuple):
    """An integer of the config that only some families need.

    Attributes:
        name: key in `MRopeSpec.extra`.
        key: dotted path in the config, with bars between alternative names. If the config holds a
            list there, the value is its length.
        example: value in `example_config`.
        default: value of a config that lacks the key; None: such a config is refused.
    """

    name: str
    key: str
    example: int | list[int]
    default: int | None = None


@dataclass(frozen=True)
class Family:
    """How a model family lays out its tokens, and where its config holds the values.

    Attributes:
        custom_index: name of the function of `mrope.positions.custom` that computes the position
            ids; None: the kernel of `mrope.positions`.
        inputs: what that function reads from a batch beside tokens, mask and grids.
        frames_apart: each frame of a video is a span of its own, as if it were an image (Qwen3-VL
            and its kin, whose processors write a timestamp before each frame).
        frames_as_images: frames have the placeholder of images, between a video's start and end
            marker (GLM-V).
        frame_gap: tokens between two frames of a clip, where the rule counts on so many
            (openPangu-VL: an end and a start marker); None: any text.
        newlines: each line of a frame ends with one more placeholder, a newline token, which counts
            as a column; each frame, of an image too, is a span of its own (HunYuan V4 VL).
        planes_at_zero: rows and columns of an image count from 0, not from its position, and text
            goes on 1 after its time (Isaac).
        still_images: an image of more than one frame is refused, as nothing says how to compute
            its position ids.
        ends_in_time: text goes on behind the largest time of an image, whatever its rows and
            columns are.
        counts_images: positions hold the number of an image, which counts over the whole batch.
        merges: patches merged along each side, by the config's `downsample_mode`; None: read from
            `vision_config`, under one of `merge_keys`; 1 without any.
        section: section of the config that holds the merge size; empty: its top.
        timed: the temporal step of a video is `tokens_per_second * second_per_grid_ts`.
        one_dimensional: the model itself numbers tokens 0, 1, 2 ..., padding included, on one axis:
            position ids are (B, S), and only the towers' tensors are worth computing.
        packs: packing verified: no attention across examples (see `mrope.collate.packing`).
        leaks: an unmodified model looks over the borders of examples in one row, and says nothing:
            only attached models are packed.
        linear: the text model has layers of linear attention, whose state runs along the row.
        references: keys of `REFERENCES` that the family was compared with. With a `source`: those
            whose conventions for padding and rope deltas it can have.
        source: where the rule is published, for a family without a class in transformers: its
            position ids were compared with `tests/twins/published.py`, which is written from that.
        image_keys, video_keys, start_keys: alternative names in the config of the token ids of the
            image placeholder, the video placeholder and the vision start marker; empty: the family
            has no such token.
        extra: further values of the config: `temporal_merge_size`, frames of a video that are
            merged into one; `video_start_token_id` and `video_end_token_id`, with
            `frames_as_images`.
        tower: the vision tower; None: transformers' tower takes no precomputed tensors.
    """

    custom_index: str | None = None
    inputs: tuple[str, ...] = ()
    frames_apart: bool = False
    frames_as_images: bool = False
    frame_gap: int | None = None
    newlines: bool = False
    planes_at_zero: bool = False
    still_images: bool = False
    ends_in_time: bool = False
    counts_images: bool = False
    merges: Mapping[str, int] | None = None
    merge_keys: tuple[str, ...] = ("spatial_merge_size",)
    section: str = "vision_config"
    timed: bool = False
    one_dimensional: bool = False
    packs: bool = True
    leaks: bool = False
    linear: bool = False
    references: tuple[str, ...] = tuple(REFERENCES)
    source: str | None = None
    image_keys: tuple[str, ...] = ("image_token_id",)
    video_keys: tuple[str, ...] = ("video_token_id",)
    start_keys: tuple[str, ...] = ("vision_start_token_id",)
    extra: tuple[ConfigValue, ...] = ()
    tower: Tower | None = None

    @property
    def has_videos(self) -> bool:
        """Whether rows can hold videos: there is a token for them, and the tower takes them."""
        return bool(self.video_keys) and (self.tower is None or self.tower.videos)


# transformers 4.57 has some of these families too, with other functions, which were not compared.
_SINCE_5_6 = ("transformers-5.17", "transformers-5.23")

_ROTARY = Tower(("borders", "positions"))
_WINDOWED = Tower(("borders", "positions", "windows"))
_INTERPOLATED = Tower(("borders", "positions", "table"))
# The tower reads its grids on the host, whatever else it is given.
_ON_HOST = Tower(("borders", "positions", "host_grids"))

_DELTA = Family(frames_apart=True, linear=True, tower=_INTERPOLATED)

_COUNTS = tuple(map(count_key, ("image", "video")))
_IMAGE_START = ("image_start_token_id",)


def _tokens(*names: str) -> tuple[ConfigValue, ...]:
    """Return one `ConfigValue` per token id that the config holds under the same name."""
    return tuple(ConfigValue(name, name, 104 + index) for index, name in enumerate(names))


def _either(name: str) -> tuple[str, str]:
    """Return the names of a token id in configs that may have either."""
    return f"{name}_token_id", f"{name}_token_index"


_GLM = Family(
    frames_apart=True,
    frames_as_images=True,
    references=_SINCE_5_6,
    start_keys=_IMAGE_START,
    extra=_tokens("video_start_token_id", "video_end_token_id"),
    tower=_ROTARY,
)

_AUDIO = ("second_per_grid_ts", "audio_seqlens", "use_audio_in_video", "audios_per_sample")

_OMNI = Family(
    inputs=(*_AUDIO, *_COUNTS),
    image_keys=_either("image"),
    video_keys=_either("video"),
)

_OMNI_VALUES = (
    ConfigValue("audio_token_id", "audio_token_id|audio_token_index", 104),
    ConfigValue("audio_start_token_id", "audio_start_token_id", 105),
    ConfigValue("position_id_per_seconds", "position_id_per_seconds", 25),
)

# Served by vLLM, trained with code of their own. None of these rules looks for a start marker.
_SERVED = Family(frames_apart=True, still_images=True, packs=False, start_keys=())

_CENTRED = replace(
    _SERVED,
    custom_index="centred",
    inputs=("mm_token_type_ids", *_COUNTS),
    frames_apart=False,
    ends_in_time=True,
    references=_SINCE_5_6,
)

_CROPS = ("target_sizes", "target_sizes_videos", "downsample_mode")

# A list with one entry per position axis; its length is the value.
_SECTIONS = "text_config.rope_parameters|rope_scaling.mrope_section|xdrope_section"


FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(tower=_ROTARY),
    "qwen2_5_vl": Family(timed=True, tower=_WINDOWED),
    "qwen3_vl": Family(frames_apart=True, tower=_INTERPOLATED),
    "qwen3_vl_moe": Family(frames_apart=True, tower=_INTERPOLATED),
    "qwen3_5": _DELTA,
    "qwen3_5_moe": _DELTA,
    "qwen4_exp": replace(_DELTA, references=_SINCE_5_6),
    # LMMs-Lab's config class exposes each id under two names; a hand-written one may have either.
    "aero_realtime": Family(
        frames_apart=True,
        packs=False,
        image_keys=_either("image")[::-1],
        video_keys=_either("video")[::-1],
        start_keys=("vision_start_token_index", "vision_start_token_id"),
    ),
    "glm4v": _GLM,
    "glm4v_moe": _GLM,
    "glm46v": _GLM,
    "glm_ocr": _GLM,
    "ernie4_5_vl_moe": Family(
        references=_SINCE_5_6,
        start_keys=_IMAGE_START,
        extra=(ConfigValue("temporal_merge_size", "vision_config.temporal_merge_size", 2),),
        tower=Tower(("borders", "positions", "pairs")),
    ),
    "paddleocr_vl": Family(
        references=_SINCE_5_6,
        tower=Tower(
            ("borders", "raster_positions", "raster_table", "blocks"), videos=False, patch="image"
        ),
    ),
    "cohere_compass": Family(frames_apart=True, references=_SINCE_5_6, tower=_INTERPOLATED),
    "cosmos3_omni": Family(frames_apart=True, references=_SINCE_5_6, tower=_INTERPOLATED),
    "cosmos3_edge": Family(
        frames_apart=True,
        references=_SINCE_5_6,
        tower=Tower(("borders", "host_grids")),
    ),
    "qwen2_5_omni_thinker": replace(
        _OMNI,
        custom_index="omni_2_5",
        extra=(*_OMNI_VALUES, ConfigValue("seconds_per_chunk", "seconds_per_chunk", 2)),
        tower=_WINDOWED,
    ),
    # 4.57 counts audio tokens correctly only for n_window = 50.
    "qwen3_omni_moe_thinker": replace(
        _OMNI,
        custom_index="omni_3",
        references=_SINCE_5_6,
        extra=(*_OMNI_VALUES, ConfigValue("n_window", "audio_config.n_window", 50)),
        tower=_INTERPOLATED,
    ),
    # The talkers number `talker_input_ids` and `input_text_ids`, the thinkers' tokens.
    "qwen2_5_omni_talker": replace(
        _OMNI,
        custom_index="omni_2_5",
        packs=False,
        references=_SINCE_5_6,
        section="",
        extra=(*_OMNI_VALUES, ConfigValue("seconds_per_chunk", "seconds_per_chunk", 2)),
    ),
    # Its class counts audio tokens by a section that it does not declare.
    "qwen3_omni_moe_talker": replace(
        _OMNI,
        custom_index="omni_3_talker",
        packs=False,
        references=_SINCE_5_6,
        section="",
        extra=(*_OMNI_VALUES, ConfigValue("n_window", "audio_config.n_window", 50, 50)),
    ),
    "glm_image": Family(
        custom_index="glm_image",
        inputs=_COUNTS[:1],
        packs=False,
        references=_SINCE_5_6,
        video_keys=(),
        start_keys=_IMAGE_START,
        extra=(ConfigValue("image_end_token_id", "image_end_token_id", 103),),
        tower=Tower(
            ("borders", "positions", "source_grids", "host_grids"), "without_last", videos=False
        ),
    ),
    "hunyuan_vl": Family(
        custom_index="hunyuan",
        inputs=("mm_token_type_ids", _COUNTS[0]),
        still_images=True,
        counts_images=True,
        packs=False,
        references=_SINCE_5_6,
        video_keys=(),
        start_keys=(),
        extra=(ConfigValue("axes", _SECTIONS, [2, 2, 2, 2]),),
        tower=Tower(("borders", "host_grids"), videos=False),
    ),
    "minicpmv4_7": Family(
        custom_index="minicpm",
        inputs=(*_CROPS, "mm_token_type_ids", *_COUNTS),
        merges={"4x": 2, "16x": 4},
        packs=False,
        references=("transformers-5.23",),
        start_keys=("image_start_id",),
        extra=_tokens("image_end_id", "slice_start_id", "slice_end_id", "newline_id"),
        tower=Tower(("borders", "nearest", "crop_windows", "crop_blocks"), "crops"),
    ),
    # transformers 5.24 is the first release that has it.
    "hy_v4_vl": Family(
        frames_apart=True,
        newlines=True,
        references=("transformers-5.23",),
        start_keys=(),
        tower=Tower(("borders", "host_grids")),
    ),
    "KeyeVL": replace(_SERVED, source="vLLM, keye.py (cab63df)"),
    "KeyeVL1_5": replace(_SERVED, source="vLLM, keye_vl1_5.py (03c11e7)"),
    "openpangu_vl": replace(_SERVED, frame_gap=2, source="vLLM, openpangu_vl.py (00d1d4c)"),
    "bailing_moe_v3_vl@vllm": replace(_SERVED, source="vLLM, bailing_moe_v3_vl.py (54fc980)"),
    "bailing_moe_v3_vl@sglang": replace(_CENTRED, source="SGLang 0.5.23, bailing_mrope.py"),
    "bailingmm_moe_v2_lite@ming": replace(
        _CENTRED, frames_apart=True, source="Ming-flash-omni 2.0, modeling_bailing_moe_v2.py"
    ),
    "bailingmm_moe_v2_lite@vllm_omni": replace(_SERVED, source="vLLM-Omni, get_rope_index"),
    "colqwen3": replace(_SERVED, source="vLLM 0.33, configs/colqwen3.py: Qwen3-VL"),
    "ops_colqwen3": replace(_SERVED, source="vLLM 0.33, configs/colqwen3.py: Qwen3-VL"),
    "qwen3_vl_nemotron_embed": replace(_SERVED, source="vLLM 0.33, configs/colqwen3.py: Qwen3-VL"),
    "interns1_pro": replace(_SERVED, source="vLLM 0.33, interns1_pro.py: Qwen3-VL"),
    "neo_chat": replace(
        _SERVED,
        custom_index="planes",
        ends_in_time=True,
        inputs=("mm_token_type_ids", *_COUNTS),
        references=_SINCE_5_6,
        source="NEO, modeling_neo_chat.py",
        video_keys=(),
        start_keys=("img_start_token_id",),
        image_keys=("img_context_token_id",),
    ),
    "hunyuan_image_3_moe": replace(
        _SERVED,
        custom_index="middle",
        inputs=("mm_token_type_ids", *_COUNTS),
        references=_SINCE_5_6,
        source="HunyuanImage-3.0, build_2d_rope",
        video_keys=(),
        section="",
        merge_keys=(),
    ),
    "intern_s2_preview": replace(_SERVED, source="vLLM, interns2_preview.py (fb73c46)"),
    "interns2_mobius": replace(_SERVED, source="SGLang, mrope_rope_index.py (0a8037d)"),
    "isaac": replace(
        _SERVED,
        planes_at_zero=True,
        source="Perceptron, modular_isaac.py",
        video_keys=(),
        merge_keys=("pixel_shuffle_scale_factor",),
    ),
}


_PLAIN = Family(
    one_dimensional=True,
    references=_SINCE_5_6,
    start_keys=(),
    tower=_ROTARY,
)

ONE_DIMENSIONAL: dict[str, Family] = {
    "dots3_note": _PLAIN,
    "exaone4_5": replace(_PLAIN, tower=_WINDOWED),
    "glm5_next": replace(
        _GLM,
        one_dimensional=True,
        leaks=True,
        linear=True,
        references=_PLAIN.references,
    ),
    "hyperclovax_vision_v2": replace(_PLAIN, tower=_WINDOWED),
    "lfm3_vl": replace(
        _PLAIN,
        frames_apart=True,
        leaks=True,
        tower=replace(_ON_HOST, fixed=("borders", "positions", "neighbours")),
    ),
    "video_llama_3": replace(
        _PLAIN,
        custom_index="counted",
        merge_keys=(),
        inputs=(*columns("item", means="merge"), *columns("patch", means="kept")),
        tower=replace(_ON_HOST, sizes="merged_in_batch"),
    ),
}
"""Vision-language models with 1-D positions, as they are in transformers 5.24.

A table of their own: whatever computes M-RoPE positions goes by `FAMILIES`, and a model is here
only because its own forward numbers its tokens on one axis.
"""


def rules_of(name: object) -> list[str]:
    """Return the names of the rules of a family whose published rules disagree.

    Each is a row, `model_type@rule`: none of them is taken for the model's own.

    Example:
        >>> rules_of("bailing_moe_v3_vl")
        ['vllm', 'sglang']
    """
    return [key.partition("@")[2] for key in FAMILIES if key.startswith(f"{name}@")]


def find_family(name: object) -> Family | None:
    """Return the row of a `model_type` in either table; None: it is in neither."""
    return FAMILIES.get(str(name)) or ONE_DIMENSIONAL.get(str(name))

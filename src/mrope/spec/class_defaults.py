"""Values that transformers' config classes assume where a config has none.

transformers reads a `config.json` that lacks a key, as older releases and other tools write it,
with the default of its config class. `CLASS_DEFAULTS` holds those defaults that a spec or a
`WorkModel` is read from, so that workers read such a file equally, without transformers.

Source: the config class of each `model_type` in transformers 5.24. Releases 4.57, 5.17 and 5.23
have the same values for the families that they have. `tests/spec/test_class_defaults.py` compares
them with the installed release.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Defaults = Mapping[str, Any]
"""Values by key. A key may list alternative names, separated by bars; a mapping is a section."""
Section = dict[str, Any]
"""Values that a function below makes: of a config, or of one of its sections."""


def fill_defaults(table: Defaults, defaults: Defaults) -> Defaults:
    """Return a config with the defaults of the keys that it lacks, section by section.

    A null is a value of its own, except for a section, which transformers then builds from its
    class.

    Example:
        >>> fill_defaults({"id": 5, "vision": None}, {"token|id": 1, "vision": {"merge": 2}})
        {'id': 5, 'vision': {'merge': 2}}
    """
    filled = dict(table)
    for key, default in defaults.items():
        names = key.split("|")
        if isinstance(default, Mapping):
            section = filled.get(key)
            if section is None or isinstance(section, Mapping):
                filled[key] = fill_defaults(section or {}, default)
        elif not any(name in table for name in names):
            filled[names[0]] = default
    return filled


def _tokens(**ids: int) -> Section:
    """Return token ids under their usual names: `image=5` is `image_token_id`."""
    return {f"{name}_token_id": token for name, token in ids.items()}


def _ids(image: int, video: int, start: int) -> Section:
    """Return the token ids that most families have."""
    return _tokens(image=image, video=video, vision_start=start)


def _indices(image: int, video: int, audio: int) -> Section:
    """Return the token ids that the classes of Qwen2.5-Omni know under two names."""
    ids = {"image": image, "video": video, "audio": audio}
    return {f"{name}_token_index|{name}_token_id": token for name, token in ids.items()}


def _tower(patch: int, **others: object) -> Section:
    """Return the section of a vision tower, with what most towers have in common."""
    common = {"in_channels": 3, "temporal_patch_size": 2, "spatial_merge_size": 2}
    return {"vision_config": common | {"patch_size": patch} | others}


def _plain_tower(patch: int, **others: int) -> Section:
    """Return the section of a tower whose class says `num_channels` and has no temporal patches."""
    return {"vision_config": {"num_channels": 3, "patch_size": patch, **others}}


def _text(
    hidden: int, layers: int, heads: int, groups: int, vocabulary: int, **others: object
) -> Section:
    """Return the section of a text model; `groups` are its key and value heads."""
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
    }
    return {"text_config": {**sizes, **others}}


def _experts(key: str, experts: int, width: int, chosen: int, **others: int) -> dict[str, int]:
    """Return the values of a text model's experts: their number, their width, how many act."""
    return {key: experts, "moe_intermediate_size": width, "num_experts_per_tok": chosen, **others}


def _glm(image: int, image_start: int, video_start: int, **sizes: int) -> Section:
    """Return the defaults of a GLM-V class, whose ids are numbered in pairs."""
    clips = {"video": image + 1, "video_start": video_start, "video_end": video_start + 1}
    return _tokens(image=image, image_start=image_start, **clips) | _tower(14, **sizes)


_QWEN = _ids(151655, 151656, 151652)
_QWEN2_TEXT = _text(8192, 80, 64, 8, 152064, intermediate_size=29568)

_QWEN3_SIZES: Section = {
    "num_position_embeddings": 2304,
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "out_hidden_size": 3584,
}
_QWEN3_TOWER = _tower(16, **_QWEN3_SIZES, deepstack_visual_indexes=[8, 16, 24])

_QWEN3_EXPERTS = _experts("num_local_experts|num_experts", 60, 1408, 4)

_QWEN3_5 = _ids(248056, 248057, 248053) | _tower(16, **_QWEN3_SIZES)
_LINEAR = {
    "head_dim": 256,
    "linear_num_value_heads": 32,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}

_QWEN3_5_EXPERTS = _experts(
    "num_experts|num_local_experts", 256, 512, 8, shared_expert_intermediate_size=512
)

_GLM_SIZES = {"depth": 24, "hidden_size": 1536, "intermediate_size": 13696, "out_hidden_size": 4096}
_GLM_TEXT = _text(4096, 40, 32, 2, 151552, intermediate_size=13696)
_GLM_EXPERTS = _experts("n_routed_experts", 128, 1408, 8)

# The classes declare no `vision_start_token_id`: it is in the files of released checkpoints.
_OMNI = {**_tokens(audio_start=151647), "position_id_per_seconds": 25}


CLASS_DEFAULTS: dict[str, Defaults] = {
    "qwen2_vl": _QWEN | _QWEN2_TEXT | _tower(14, depth=32, embed_dim=1280, hidden_size=3584),
    # Released checkpoints have 2 tokens per second, and say so in their files.
    "qwen2_5_vl": _QWEN
    | _QWEN2_TEXT
    | _tower(
        14,
        window_size=112,
        tokens_per_second=4,
        depth=32,
        hidden_size=3584,
        intermediate_size=3420,
        out_hidden_size=3584,
        fullatt_block_indexes=[7, 15, 23, 31],
    ),
    "qwen3_vl": _QWEN
    | _QWEN3_TOWER
    | _text(4096, 32, 32, 32, 151936, head_dim=128, intermediate_size=22016),
    "qwen3_vl_moe": _QWEN
    | _QWEN3_TOWER
    | _text(2048, 24, 16, 16, 151936, head_dim=128, intermediate_size=5632, **_QWEN3_EXPERTS),
    "qwen3_5": _QWEN3_5 | _text(4096, 32, 16, 4, 248320, intermediate_size=12288, **_LINEAR),
    "qwen3_5_moe": _QWEN3_5 | _text(2048, 40, 16, 2, 248320, **_LINEAR, **_QWEN3_5_EXPERTS),
    "qwen4_exp": _QWEN3_5,
    "glm4v": _glm(151343, 151339, 151341, **_GLM_SIZES) | _GLM_TEXT,
    "glm4v_moe": _glm(151363, 151339, 151341, **_GLM_SIZES)
    | _text(4096, 46, 96, 8, 151424, intermediate_size=10944, **_GLM_EXPERTS),
    "glm46v": _glm(151343, 151339, 151361, **_GLM_SIZES) | _GLM_TEXT,
    "glm_ocr": _glm(59280, 59256, 59258),
    "ernie4_5_vl_moe": {
        **_tokens(image=100295, video=103367, image_start=101304),
        "vision_config": {
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_merge_size": 2,
        },
    },
    "paddleocr_vl": _ids(100295, 100296, 101305)
    | _plain_tower(14, spatial_merge_size=2, image_size=384),
    "cohere_compass": _ids(255031, 255032, 255028) | _QWEN3_TOWER,
    "cosmos3_omni": _QWEN | _QWEN3_TOWER,
    "cosmos3_edge": _ids(19, 18, 20) | _plain_tower(16, spatial_merge_size=2),
    "qwen2_5_omni_thinker": {
        **_indices(151655, 151656, 151646),
        "seconds_per_chunk": 2,
        "audio_config": {"n_window": 100},
        **_OMNI,
        **_tower(14, window_size=112),
    },
    "qwen2_5_omni_talker": {
        **_indices(151655, 151656, 151646),
        **_tokens(vision_start=151652),
        **_OMNI,
        "seconds_per_chunk": 2,
        "spatial_merge_size": 2,
    },
    "qwen3_omni_moe_talker": _ids(151655, 151656, 151652)
    | _tokens(audio=151646, audio_start=151669)
    | {"position_id_per_seconds": 25},
    "qwen3_omni_moe_thinker": {
        **_tokens(image=151655, video=151656, audio=151646),
        "audio_config": {"n_window": 50, "n_window_infer": 800},
        **_OMNI,
        **_QWEN3_TOWER,
    },
    "glm_image": {
        **_tokens(image=167855, image_start=16384, image_end=16385),
        "vision_config": {"in_channels": 3, "patch_size": 16, "spatial_merge_size": 1},
    },
    # The rotary sections, whose number is the number of axes, have no default.
    "hunyuan_vl": _tokens(image=120120)
    | _plain_tower(16, spatial_merge_size=2, temporal_patch_size=1),
    "hy_v4_vl": _tokens(image=120120, video=120124) | _plain_tower(16, spatial_merge_size=2),
    # All token ids are null by default.
    "minicpmv4_7": {"downsample_mode": "16x"} | _plain_tower(16, image_size=224),
    "dots3_note": _tokens(image=151660, video=151680) | _plain_tower(14, spatial_merge_size=2),
    "exaone4_5": _tokens(image=67, video=68) | _tower(14, window_size=112),
    "glm5_next": _glm(154854, 154830, 154832),
    "hyperclovax_vision_v2": _tokens(image=128060, video=128061) | _tower(14, window_size=112),
    "lfm3_vl": _tokens(image=125030, video=125029) | _tower(16, conv_kernel_size=3),
    "video_llama_3": _tokens(image=151655, video=151656) | _plain_tower(16),
}
"""Defaults by `model_type`. A family of `FAMILIES` without a class in transformers has no entry."""

WRAPPERS: dict[str, tuple[str, str]] = {
    "qwen2_5_omni": ("thinker_config", "qwen2_5_omni_thinker"),
    "qwen3_omni_moe": ("thinker_config", "qwen3_omni_moe_thinker"),
    "colqwen2": ("vlm_config", "qwen2_vl"),
}
"""Models around another one that takes position ids: its section, and the class's `model_type`."""

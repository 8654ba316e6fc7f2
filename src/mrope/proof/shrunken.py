"""Build a small model of a class of transformers: two layers, small widths, random weights, CPU.

What decides how a model reads its inputs stays as in the config: head size and rotary sections of
the text, patch and window sizes, merges, kinds of layers, tied weights.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch

from mrope.columns import Columns
from mrope.proof.tiny_examples import TEXT_IDS

_LAYERS, _HEADS, _TOWER_WIDTH = 2, 2, 64
# Large enough that positions matter: with the usual 0.02 attention is almost uniform.
_SPREAD = 0.1
_VOCABULARY = 512

_TEXT: Columns = {
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "mlp_only_layers": [],
    "linear_num_heads": _HEADS,
    "linear_num_key_heads": _HEADS,
    "linear_num_value_heads": 2 * _HEADS,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "vocab_size": _VOCABULARY,
    "vision_vocab_size": _VOCABULARY,
    "initializer_range": _SPREAD,
}
_TOWER: Columns = {
    "depth": _LAYERS,
    "num_hidden_layers": _LAYERS,
    "num_heads": _HEADS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "hidden_size": _TOWER_WIDTH,
    "intermediate_size": 2 * _TOWER_WIDTH,
    "moe_intermediate_size": 32,
    "num_local_experts": 4,
    "adapter_in_dim": _TOWER_WIDTH,
    "deepstack_visual_indexes": [0, 1],
    # The first layer attends within windows, the second over whole frames.
    "fullatt_block_indexes": [1],
    "initializer_range": _SPREAD,
}
_AUDIO: Columns = {
    "num_hidden_layers": _LAYERS,
    "encoder_layers": _LAYERS,
    "encoder_attention_heads": _HEADS,
    "encoder_ffn_dim": _TOWER_WIDTH,
    "d_model": _TOWER_WIDTH,
    "downsample_hidden_size": 8,
    "initializer_range": _SPREAD,
}


def shrink_config(config: Any) -> Any:
    """Return a small copy of a multimodal config.

    Token ids are renumbered into a vocabulary of 512, equal ones equally, distinct ones distinctly,
    and none into the ids of `TEXT_IDS`.

    Args:
        config: live `PretrainedConfig` with `text_config`, `vision_config` and for Omni thinkers
            `audio_config`.
    """
    small = copy.deepcopy(config)
    vars(small).pop("quantization_config", None)
    text, vision = small.text_config, small.vision_config
    for section in (text, vision):
        # dots3-note's layers have sizes of their own; those of a small model are alike.
        vars(section).pop("_heterogeneity_spec", None)
    ids: dict[int, int] = {}
    for section in (small, text):
        _renumber_tokens(section, ids)
    hidden = _shrink_text(text)
    _set(vision, _TOWER)
    # Qwen2-VL's tower calls its own width `embed_dim`, and that of its output `hidden_size`.
    _set(vision, {"out_hidden_size": hidden, "text_hidden_size": hidden, "adapter_out_dim": hidden})
    if hasattr(vision, "embed_dim"):
        vision.embed_dim, vision.hidden_size = _TOWER_WIDTH, hidden
    # MiniCPM-V's tower merges windows behind this layer.
    for section in (small, vision):
        _set(section, {"insert_layer_id": 0})
    if getattr(small, "vq_config", None) is not None:
        # Of GLM-Image: codes are token ids.
        _set(small.vq_config, {"latent_channels": _TOWER_WIDTH, "embed_dim": 32})
        _set(small.vq_config, {"num_embeddings": TEXT_IDS.start})
    if getattr(small, "audio_config", None) is not None:
        _set(small.audio_config, {**_AUDIO, "output_dim": hidden})
    return small


def build_model(model_class: Any, config: Any, attention: str) -> Any:
    """Return a model in training mode, float32 on the CPU, the same for the same config."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model = model_class._from_config(  # noqa: SLF001 - what AutoModel.from_config calls
            config, attn_implementation=attention, dtype=torch.float32
        )
    return model.train()


def _renumber_tokens(section: object, ids: dict[int, int]) -> None:
    for name, value in list(vars(section).items()):
        if not re.search(r"(_token_(id|index)|(_start|_end|^newline)_id)$", name):
            continue
        tokens = [token for token in _as_list(value) if isinstance(token, int)]
        for token in tokens:
            ids.setdefault(token, TEXT_IDS.stop + 20 + len(ids))
        if tokens:
            setattr(section, name, ids[tokens[0]])


def _shrink_text(text: Any) -> int:
    """Make the config of a text model small; return its new width."""
    heads, groups = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    # A class's defaults need not fit together (73 in Qwen3-Omni's, 42 in GLM-4.5V's): kernels of
    # half precision take multiples of 8 alone. Rotary sections of a real config fit its head size.
    if not _has_sections(text) and head_dim > 8:
        head_dim -= head_dim % 8
    for name in ("layer_types", "mlp_layer_types"):
        kinds = list(dict.fromkeys(getattr(text, name, None) or ()))
        if kinds:
            setattr(text, name, (kinds * _LAYERS)[:_LAYERS])
    _set(text, _TEXT)
    if groups is not None:
        text.num_key_value_heads = _HEADS if groups == heads else 1
    text.hidden_size = _HEADS * head_dim
    _set(text, {"head_dim": head_dim})
    _give_sections(text, head_dim)
    _give_indexer(text, head_dim)
    return int(text.hidden_size)


def _has_sections(text: object) -> bool:
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    tables = rope.values() if isinstance(rope, dict) else ()
    return any("mrope_section" in one for one in (rope or {}, *tables) if isinstance(one, dict))


def _give_sections(text: Any, head_dim: int) -> None:
    """Set rotary sections where a default config, which no checkpoint has, lacks them."""
    rope = getattr(text, "rope_parameters", None)
    if rope == {}:
        # Cohere Compass has a table for each kind of layer, and by default none.
        kinds = dict.fromkeys(text.layer_types)
        rope.update({kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in kinds})
    rope = rope or getattr(text, "rope_scaling", None)
    if not isinstance(rope, dict):
        return
    for table in [one for one in rope.values() if isinstance(one, dict)] or [rope]:
        if not table.get("mrope_section"):
            half = -(-int(head_dim * table.get("partial_rotary_factor", 1.0)) // 2)
            # ERNIE interleaves the first two, which must be equal.
            table["mrope_section"] = [half // 3, half // 3, half - 2 * (half // 3)]


def _give_indexer(text: Any, head_dim: int) -> None:
    """Set an indexer with a budget below the rows' lengths.

    Qwen4-Exp's default config, which no checkpoint has, lacks one.
    """
    if getattr(text, "indexer_n_heads", 0) is None:
        # Enough heads that no two blocks of keys score the same; GLM-5-Next has 32.
        text.indexer_n_heads, text.indexer_kv_heads, text.indexer_head_dim = 8, 1, head_dim
        text.indexer_budget, text.indexer_compress_ratio = 8, 4
    # Below the rows' lengths.
    _set(text, {"index_topk": 8, "index_kpool": 4})


def _set(section: object, values: Columns) -> None:
    for name, value in values.items():
        if hasattr(section, name):
            old = getattr(section, name)
            # ERNIE has a width for each of its kinds of experts.
            many = isinstance(old, list) and not isinstance(value, list)
            setattr(section, name, [value] * len(old) if many else copy.copy(value))


def _as_list(value: object) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]

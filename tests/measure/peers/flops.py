"""Count the floating point operations of a Qwen3-VL's training step: real tokens and patches, no padding.

A product of (m, k) and (k, n) counts 2 m k n. The backward counts twice the forward. Text attention is
causal, so that a row of S tokens has S * (S + 1) / 2 pairs; an image or frame of P patches has P * P.
Norms, activations, rotary embeddings and the softmax are left out, and nothing counts for recomputation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Dense bfloat16 of an H100 and H200 (SXM), by the vendor's data sheet.
PEAK_TFLOPS = 989.0
_PASSES = 3
_CHANNELS = 3


def step_tflop(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the operations of forward and backward of a batch, in 1e12.

    Args:
        config: of the model, as its config.json.
        rows: of one batch, with `input_ids` and grids.
    """
    tokens = [len(row["input_ids"]) for row in rows]
    frames = [
        int(height) * int(width)
        for row in rows
        for name in ("image_grid_thw", "video_grid_thw")
        for times, height, width in row.get(name, ())
        for _ in range(int(times))
    ]
    return _PASSES * (_text(config, tokens) + _tower(config["vision_config"], frames)) / 1e12


def utilisation(tflop: float, milliseconds: float) -> float:
    """Return the share of the peak at which a step's operations were done."""
    return tflop / (milliseconds / 1e3) / PEAK_TFLOPS


def _text(config: Mapping[str, Any], tokens: Iterable[int]) -> float:
    text = config["text_config"]
    hidden, layers, side = (text[name] for name in ("hidden_size", "num_hidden_layers", "head_dim"))
    heads, kept = text["num_attention_heads"], text["num_key_value_heads"]
    projections = 2 * hidden * side * (heads + kept)  # query and output, key and value
    each = layers * (projections + 3 * hidden * text["intermediate_size"])
    each += hidden * text["vocab_size"]  # LM head, on every token
    pairs = sum(count * (count + 1) / 2 for count in tokens)
    total: float = 2 * each * sum(tokens) + layers * 4 * heads * side * pairs
    return total


def _tower(vision: Mapping[str, Any], frames: Sequence[int]) -> float:
    hidden, depth, merge = (vision[name] for name in ("hidden_size", "depth", "spatial_merge_size"))
    patches = sum(frames)
    pixels = _CHANNELS * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    each = depth * (4 * hidden**2 + 2 * hidden * vision["intermediate_size"]) + pixels * hidden
    wide = hidden * merge**2
    mergers = (
        (1 + len(vision["deepstack_visual_indexes"])) * wide * (wide + vision["out_hidden_size"])
    )
    pairs = sum(count**2 for count in frames)
    total: float = 2 * (each * patches + mergers * patches / merge**2) + depth * 4 * hidden * pairs
    return total

"""Describe what differs between base models to an attached forward: one row for each.

Keyed by the base model's `config.model_type`. A family whose tower and text model are of known
kinds is one more line of `ROWS`; a part that differs in kind is a function that its row names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch

from mrope.hf.experts import give_experts, give_ngrams
from mrope.hf.features import (
    Counts,
    Features,
    behind,
    evenly,
    evenly_in_pairs,
    first,
    kept,
    pooled,
    with_newlines,
)
from mrope.hf.inputs import Tensors
from mrope.hf.outputs import Encoded
from mrope.hf.scatter import Places
from mrope.hf.text import run_plain, run_pooled, run_rope, run_searched
from mrope.hf.towers import encode, encode_audio, encode_codes, encode_crops


class Row(NamedTuple):
    """Say how an attached forward runs a base model.

    Attributes:
        features: how features leave the vision tower, a function of `mrope.hf.features`.
        counts: how many of the features each image or clip has, likewise.
        grids: where the tower takes its grids: "device", as the batch has them; "host", for a tower
            that reads them whatever else it is given; "frames", on the device, one for each frame.
        reads_borders: the tower computes with `cu_seqlens` beside passing it to its layers.
        passes_on: the base model's own forward passes on to the tower which outputs are asked for.
        batched: the tower takes pixels as a batch of one.
        before: what is done with a batch before the tokens are embedded; returns the outputs of
            towers that it ran, by modality.
        audio: the audio tower takes tensors of the stage.
        encode: runs the vision tower on a modality.
        text: runs the text model.
    """

    features: Features = pooled
    counts: Counts = evenly
    grids: Literal["device", "host", "frames"] = "device"
    reads_borders: bool = False
    passes_on: bool = True
    batched: bool = False
    before: Callable[[Any, Tensors], dict[str, Encoded]] | None = None
    audio: bool = False
    encode: Callable[[Any, Row, str, Tensors], tuple[Places, Encoded]] = encode
    text: Callable[[Any, torch.Tensor, Tensors], Any] = run_rope


_ROW = Row()
_FRAMES = Row(grids="frames", reads_borders=True)
_OMNI = Row(before=encode_audio, audio=True)
_ONE = Row(first, with_newlines, grids="host")
_PLAIN = Row(text=run_plain)

ROWS: dict[str, Row] = {
    "qwen2_vl": _ROW,
    "qwen2_5_vl": _ROW,
    "qwen3_vl": _ROW,
    "qwen3_vl_moe": _ROW,
    "qwen3_5": _ROW,
    "qwen3_5_moe": _ROW,
    "qwen4_exp": Row(before=give_ngrams),
    "glm4v": _FRAMES,
    "glm4v_moe": _FRAMES,
    "glm46v": _FRAMES,
    "glm_ocr": _ROW,
    "cohere_compass": _ROW,
    "cosmos3_omni": _ROW,
    "paddleocr_vl": Row(behind("projector", image_grid_thw="block_index"), batched=True),
    "ernie4_5_vl_moe": Row(
        behind("resampler_model", pairs="pair_index"), evenly_in_pairs, before=give_experts
    ),
    "cosmos3_edge": Row(behind("projector"), grids="host", text=run_searched),
    "qwen2_5_omni_thinker": _OMNI,
    "qwen3_omni_moe_thinker": _OMNI,
    "dots3_note": _PLAIN,
    "exaone4_5": _PLAIN,
    "glm5_next": _PLAIN._replace(text=run_pooled),
    "hyperclovax_vision_v2": _PLAIN._replace(features=behind("projector", of="pooler_output")),
    "lfm3_vl": _PLAIN._replace(features=behind("multi_modal_projector"), grids="host"),
    "video_llama_3": _PLAIN._replace(features=kept, grids="host"),
    "glm_image": Row(before=encode_codes),
    "hunyuan_vl": _ONE._replace(passes_on=False),
    "hy_v4_vl": _ONE,
    "minicpmv4_7": Row(behind("merger", blocks="block_index"), encode=encode_crops),
}


def row_of(model_type: str) -> Row:
    """Return the row of a base model by its `config.model_type`."""
    return ROWS[model_type]

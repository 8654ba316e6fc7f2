"""Compare rules of `positions/custom/centred.py` with SGLang's own functions, row by row.

    PYTHONPATH=src:tests python tests/measure/engine_rules.py FOLDER

FOLDER holds the unpacked wheel of SGLang. Its packages want a GPU to be imported: the functions, which are
plain torch, are taken out of their files by name.
"""

from __future__ import annotations

import ast
import random
import sys
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from mrope import rope_index
from support.specs import example_spec
from support.turns import random_sample

ROPE = "sglang/srt/layers/rotary_embedding/bailing_mrope.py"
IMAGE = "sglang/multimodal_gen/runtime/models/dits/hunyuan_image3_utils.py"
START, CLIP_START = 90, 91
ROWS = 500


def taken(file: Path, names: set[str], last: str = "") -> dict[str, Any]:
    """Return functions of a file; `last` names a variable in whose place `all_pos` is returned."""
    found = [
        node
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name in names
    ]
    for function in found:
        function.decorator_list = []
        for number, part in enumerate(function.body):
            if isinstance(part, ast.Assign) and getattr(part.targets[0], "id", "") == last:
                function.body = [*function.body[:number], *ast.parse("return all_pos").body]
                break
    module = ast.fix_missing_locations(ast.Module([*found], []))
    space: dict[str, Any] = {**vars(typing), "torch": torch, "PretrainedConfig": object}
    exec(compile(module, str(file), "exec"), space)
    return space


def compare_centred(folder: Path, family: str, interleaved: bool) -> int:
    """Return how many rows with images or clips are equal; AssertionError: one is not."""
    name = "bailing_3drope_get_input_positions_tensor"
    function = taken(folder / ROPE, {name})[name]
    spec, rng, seen = example_spec(family), random.Random(family), 0
    text = SimpleNamespace(
        image_patch_token=spec.image_token_id,
        video_patch_token=spec.video_token_id,
        image_start_token=START,
        video_start_token=CLIP_START,
        use_interleaved_frame_timestamp=interleaved,
    )
    vision = SimpleNamespace(spatial_merge_size=spec.spatial_merge_size)
    cls = SimpleNamespace(_text_config=lambda _: text, _validate_position_bounds=lambda *_: None)
    for _ in range(ROWS):
        sample = random_sample(rng, spec, True, True)
        tokens: list[int] = []
        for token in sample["input_ids"].tolist():
            if token in (spec.image_token_id, spec.video_token_id) and tokens[-1:] != [token]:
                of_image = token == spec.image_token_id or interleaved
                tokens.append(START if of_image else CLIP_START)
            tokens.append(token)
        sizes = {key: sample[key] for key in sample if key.endswith("grid_thw")}
        grids: dict[str, Any] = dict.fromkeys(("image_grid_thw", "video_grid_thw"))
        grids |= {key: torch.tensor(value) for key, value in sizes.items()}
        theirs, delta = function(
            cls, torch.tensor(tokens), SimpleNamespace(vision_config=vision), **grids
        )
        ours, deltas = rope_index(spec, [tokens], **sizes)
        np.testing.assert_array_equal(ours, theirs.numpy())
        np.testing.assert_array_equal(deltas, delta.numpy())
        seen += bool(sizes)
    return seen


def compare_middle(folder: Path) -> int:
    """Return how many rows with images of HunyuanImage-3.0 are equal."""
    function = taken(folder / IMAGE, {"build_2d_rope"}, "idx_theta")["build_2d_rope"]
    spec, rng, seen = example_spec("hunyuan_image_3_moe"), random.Random(1), 0
    for _ in range(ROWS):
        sample = random_sample(rng, spec, True, True)
        tokens, grids, at = sample["input_ids"].tolist(), sample.get("image_grid_thw", ()), 0
        spans = []
        for _, height, width in np.asarray(grids).tolist():
            at = tokens.index(spec.image_token_id, at)
            spans.append((slice(at, at + height * width), (height, width)))
            at += height * width
        theirs = function(len(tokens), 8, spans)[:, 0].T.numpy()
        ours, _ = rope_index(spec, [tokens], image_grid_thw=grids if spans else None)
        np.testing.assert_array_equal(ours[:, 0], theirs)
        seen += bool(spans)
    return seen


def main(words: list[str]) -> int:
    folder = Path(words[0])
    for family, apart in (
        ("bailing_moe_v3_vl@sglang", False),
        ("bailingmm_moe_v2_lite@ming", True),
    ):
        print(family, compare_centred(folder, family, apart), "rows with images or clips equal")
    print("hunyuan_image_3_moe", compare_middle(folder), "rows with images equal")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

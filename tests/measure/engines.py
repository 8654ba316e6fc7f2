"""Print how vLLM numbers random rows, beside `mrope`: for the table in docs/families.md.

    PYTHONPATH=src:tests python tests/measure/engines.py FOLDER

FOLDER holds the unpacked wheel of vLLM, whose package cannot be imported without its compiled parts: the
methods that number tokens are plain numpy, and are taken out of their files by name.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from mrope import MRopeSpec, rope_index
from mrope.check.engine import random_rows
from mrope.spec import example_config

MODELS = {
    "qwen2_vl": ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
    "qwen2_5_vl": ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
    "glm4v": ("glm4_1v", "Glm4vForConditionalGeneration"),
    "ernie4_5_vl_moe": ("ernie45_vl", "Ernie4_5_VLMoeForConditionalGeneration"),
    "paddleocr_vl": ("paddleocr_vl", "PaddleOCRVLForConditionalGeneration"),
    "cohere_compass": ("cohere_compass", "CohereCompassForConditionalGeneration"),
}
END = 99


def numbering(folder: Path, family: str) -> Any:
    """Return the class of a model with the methods alone that number tokens."""
    file, name = MODELS[family]
    tree = ast.parse((folder / f"vllm/model_executor/models/{file}.py").read_text("utf-8"))
    methods: list[Any] = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            methods = [
                one
                for one in node.body
                if "mm_grid" in ast.dump(one)[:90] or "mrope_input" in ast.dump(one)[:90]
            ]
    kept = [one for one in methods if isinstance(one, ast.FunctionDef)]
    cls = ast.ClassDef(name, [], [], [*kept], [])
    module = ast.Module([cls], [])
    for part in ast.walk(module):
        if isinstance(part, ast.FunctionDef):
            part.returns = None
            for one in (*part.args.args, *part.args.kwonlyargs):
                one.annotation = None
    space: dict[str, Any] = {"np": np, "torch": torch, "MultiModalFeatureSpec": None, "Any": Any}
    exec(compile(ast.fix_missing_locations(module), str(file), "exec"), space)
    return space[name]


def features(spec: MRopeSpec, ids: list[int], sizes: dict[str, Any]) -> list[Any]:
    """Return what vLLM knows of each image and clip: where it is, and its grid."""
    found, at = [], 0
    frames = spec.image_token_id if spec.family_row.frames_as_images else spec.video_token_id
    for modality, token in (("image", spec.image_token_id), ("video", frames)):
        at = 0
        seconds = sizes.get("second_per_grid_ts")
        for number, grid in enumerate(sizes.get(f"{modality}_grid_thw", ())):
            area = spec.frame_tokens(*grid[1:].tolist()) * int(grid[0])
            first = ids.index(token, at)
            taken, last = 0, first
            while taken < area:
                taken += ids[last] == token
                last += 1
            data = {f"{modality}_grid_thw": SimpleNamespace(data=torch.as_tensor(grid))}
            if modality == "video" and seconds is not None:
                data["second_per_grid_ts"] = SimpleNamespace(data=torch.as_tensor(seconds[number]))
            # A clip whose frames stand apart begins, for vLLM, with the start marker of its first.
            apart = modality == "video" and spec.family_row.frames_apart
            place = SimpleNamespace(
                offset=first - apart, length=last - first + apart, is_embed=None
            )
            place.extract_embeds_range = lambda first=first, last=last: [(first, last - 1)]
            found.append(SimpleNamespace(modality=modality, mm_position=place, data=data))
            at = last
    return found


def closed(spec: MRopeSpec, tokens: list[int]) -> list[int]:
    """Put an end marker behind each run of placeholders, which vLLM looks for."""
    placeholders = {spec.image_token_id, spec.video_token_id}
    out: list[int] = []
    for token in tokens:
        if out and out[-1] in placeholders and token not in placeholders:
            out.append(END)
        out.append(token)
    return out


def verdict(folder: Path, family: str, reference: str, clips: bool) -> str:
    spec = MRopeSpec.from_config(example_config(family), reference)
    numbers = SimpleNamespace(
        spatial_merge_size=spec.spatial_merge_size, tokens_per_second=spec.tokens_per_second or 1.0
    )
    config = SimpleNamespace(
        image_token_id=spec.image_token_id,
        video_token_id=spec.video_token_id,
        vision_end_token_id=END,
        vision_start_token_id=spec.vision_start_token_id,
        vision_config=numbers,
        spatial_conv_size=2,
        temporal_conv_size=2,
        **spec.extra,
    )
    model = numbering(folder, family)()
    model.config = config
    count = 0
    for row, sizes in random_rows(spec, clips):
        tokens = closed(spec, row[0].tolist())
        theirs, _ = model.get_mrope_input_positions(tokens, features(spec, tokens, sizes))
        ours, _ = rope_index(spec, [tokens], **sizes)
        if not np.array_equal(ours[:, 0], theirs.numpy()):
            axis, token = np.argwhere(ours[:, 0] != theirs.numpy())[0]
            return f"differs: token {token}, {theirs[axis, token]} there and {ours[axis, 0, token]} here, {sizes}"
        count += 1
    return f"equal ({count})"


def main(words: list[str]) -> int:
    for family in MODELS:
        for reference in ("transformers-5.23", "transformers-4.57"):
            for clips in (False, True):
                try:
                    text = verdict(Path(words[0]), family, reference, clips)
                except (AttributeError, IndexError, TypeError, ValueError) as error:
                    text = f"{type(error).__name__}: {error}"
                print(family, reference, "clips" if clips else "images", text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""A Qwen3-VL with random weights in a folder, and photographs in files, as trainers read them."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText

from mrope.training.demo.dataset import photographs
from mrope.training.demo.tokenizer import CHAT_TEMPLATE, build_tokenizer
from support.models import model_config

# The config of `make demo`, whose token ids are those of the demo's tokenizer.
FAMILY = "demo"


def save_model(
    folder: Path,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    longest: int = 256,
) -> Path:
    """Save a model of `FAMILY` with its processor, the same for the same sizes.

    Args:
        text, vision: what differs from the demo's config.
        longest: pixels are scaled to at most this side, squared.
    """
    config: dict[str, Any] = deepcopy(model_config(FAMILY))
    config["text_config"] |= text or {}
    config["vision_config"] |= vision or {}
    torch.manual_seed(0)
    live = AutoConfig.for_model(config.pop("model_type"), **config)
    model = AutoModelForImageTextToText.from_config(live)
    model.save_pretrained(folder)
    tower = model.config.vision_config
    sizes = {
        "patch_size": tower.patch_size,
        "temporal_patch_size": tower.temporal_patch_size,
        "merge_size": tower.spatial_merge_size,
        "size": {"shortest_edge": 32**2, "longest_edge": longest**2},
    }
    # Named at run time, since a release without torchvision has only one of them.
    image = transformers.Qwen2VLImageProcessor(**sizes)
    video = transformers.Qwen3VLVideoProcessor(**sizes)
    tokenizer = build_tokenizer()
    processor = transformers.Qwen3VLProcessor(image, tokenizer, video, chat_template=CHAT_TEMPLATE)
    processor.save_pretrained(folder)
    return folder


def save_rows(folder: Path, count: int = 30, scale: int = 1) -> tuple[Path, Path]:
    """Save conversations about one photograph, several and none.

    Args:
        count: how many there are with those about clips, which are left out.
        scale: photographs are enlarged by this factor.

    Returns:
        Two files of JSON lines: with paths among the parts of a message, as axolotl reads them; and
        with `<image>` in its text and paths beside it, as ms-swift and LLaMA-Factory do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = photographs(count).filter(lambda row: not row["videos"])
    parts: list[dict[str, Any]] = []
    marks: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        paths = []
        for place, image in enumerate(row["images"]):
            paths.append(str(folder / f"{number}-{place}.png"))
            image.resize((scale * image.width, scale * image.height)).save(paths[-1])
        left = iter(paths)
        messages = [
            {
                "role": message["role"],
                "content": [
                    {"type": "image", "path": next(left)} if part["type"] == "image" else part
                    for part in message["content"]
                ],
            }
            for message in row["messages"]
        ]
        flat = [
            {
                "role": message["role"],
                "content": "".join(part.get("text") or "<image>" for part in message["content"]),
            }
            for message in messages
        ]
        parts.append({"messages": messages})
        marks.append({"messages": flat, "images": paths})
    files = folder / "parts.jsonl", folder / "marks.jsonl"
    for file, lines in zip(files, (parts, marks), strict=True):
        file.write_text("\n".join(map(json.dumps, lines)) + "\n", "utf-8")
    return files


def save_dataset(folder: str) -> None:
    """Save the rows that the guides read."""
    rows = photographs(30).filter(lambda row: not row["videos"]).remove_columns(["videos", "fps"])
    rows.save_to_disk(folder)


if __name__ == "__main__":
    save_model(Path("small"))
    save_dataset("train")

"""Pictures, clips, processors and a training YAML for lmms-engine's launcher, in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from integration.common import BATCH, STEPS
from mrope.training.demo.tokenizer import CHAT_TEMPLATE, build_tokenizer
from support.models import model_config

# Tokens of Aero Realtime beyond the demo tokenizer's, and the keys of its config.
SOUND = ("audio", "audio_start", "audio_end", "rt_start", "rt_pad", "rt_speak", "rt_end")
KINDS = {"qwen3_vl": "qwen3_vl", "aero_realtime": "aero_realtime_iterable"}


def write_recipe(folder: Path, family: str) -> dict[str, Any]:
    """Write data and processor to `folder`, and return the YAML's content, with the stage off."""
    config = write_processor(folder / "processor", family)
    # Aero Realtime's processor refuses conversations without a clip.
    rows = write_rows(folder, clips_only=family == "aero_realtime")
    (folder / "rows.json").write_text(json.dumps(rows))
    kind = config.pop("model_type")
    return {
        "trainer_type": "hf_trainer",
        "dataset_config": {
            "dataset_type": KINDS[family],
            "dataset_format": "yaml",
            "datasets": [
                {"path": str(folder / "rows.json"), "data_folder": str(folder), "data_type": "json"}
            ],
            "processor_config": {
                "processor_type": family,
                "processor_name": str(folder / "processor"),
            },
            "filter_overlong_workers": 1,
            "video_max_pixels": 64 * 96,
            "video_min_pixels": 32 * 32,
            "fps": 2,
        },
        "model_config": {
            "load_from_config": {"model_type": kind, "config": config},
            # Liger's kernels need a GPU.
            "monkey_patch_kwargs": {"rope": False, "rms_norm": False, "swiglu": False},
        },
        "trainer_args": {
            "use_cpu": True,
            # Liger's switch also selects Qwen3-VL's padding-free forward, but not Aero Realtime's.
            "use_liger_kernel": family == "qwen3_vl",
            "use_rmpad": True,
            "per_device_train_batch_size": BATCH,
            "max_steps": STEPS,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "remove_unused_columns": False,
            "dataloader_num_workers": 2,
            # accelerate would cut the pixels of an iterable dataset's batch as if they were rows.
            "accelerator_config": {"dispatch_batches": False},
        },
    }


def save(recipe: dict[str, Any], file: Path) -> Path:
    file.write_text(yaml.safe_dump(recipe))
    return file


# Data ---------------------------------------------------------------------------------------------


def write_rows(folder: Path, clips_only: bool) -> list[dict[str, Any]]:
    """Write conversations: text alone, one or two pictures, a clip, and pictures beside a clip."""
    draws = np.random.default_rng(0)
    return [
        conversation(folder, row, pictures=row % 3, clip=clips_only or row % 2 == 1, draws=draws)
        for row in range(BATCH * STEPS)
    ]


def conversation(
    folder: Path, row: int, pictures: int, clip: bool, draws: np.random.Generator
) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    for number in range(pictures):
        name = f"{row}-{number}.png"
        pixels = draws.integers(0, 255, (40 + 8 * row, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        content.append({"type": "image_url", "image_url": {"url": name}})
    if clip:
        write_clip(folder / f"{row}.mp4", frames=4 + 2 * (row % 3), draws=draws)
        content.append({"type": "video_url", "video_url": {"url": f"{row}.mp4"}})
    content.append({"type": "text", "text": "what is it? " * (row % 5 + 1)})
    answer = [{"type": "text", "text": "a thing " * (7 - row % 7)}]
    return {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    }


def write_clip(file: Path, frames: int, draws: np.random.Generator) -> None:
    """Write two frames a second, without sound: Aero Realtime's dataset takes silence for it."""
    import av

    with av.open(str(file), "w") as out:
        stream = out.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(frames):
            pixels = draws.integers(0, 255, (64, 96, 3), dtype=np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())


# Processors and models ----------------------------------------------------------------------------


def write_processor(folder: Path, family: str) -> dict[str, Any]:
    """Save a processor and, beside it, the config of a small model, which is returned."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    tokenizer = build_tokenizer()
    config = dict(model_config("qwen3_vl"))
    names = ("patch_size", "temporal_patch_size")
    sizes = {name: config["vision_config"][name] for name in names}
    sizes["merge_size"] = config["vision_config"]["spatial_merge_size"]
    limits = {"shortest_edge": 32**2, "longest_edge": 96**2}
    images = Qwen2VLImageProcessor(**sizes, size=limits)
    videos = Qwen3VLVideoProcessor(**sizes, size=limits)
    if family == "aero_realtime":
        config, processor = aero_parts(config, images, videos, tokenizer)
    else:
        for name in ("image_pad", "video_pad", "vision_start", "vision_end"):
            setattr(tokenizer, f"{name.removesuffix('_pad')}_token", f"<|{name}|>")
        processor = Qwen3VLProcessor(images, tokenizer, videos, chat_template=CHAT_TEMPLATE)
    processor.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return config


def aero_parts(base: dict[str, Any], images: Any, videos: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Return the config and the processor of a small Aero Realtime with a tower for sound."""
    from lmms_engine.models.aero_realtime import AeroRealtimeProcessor
    from transformers import WhisperFeatureExtractor

    tokens = {name: f"<|{'audio_pad' if name == 'audio' else name}|>" for name in SOUND}
    tokenizer.add_tokens(list(tokens.values()), special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(list(tokens.values()))
    config = {
        "model_type": "aero_realtime",
        "text_config": {**base["text_config"], "vocab_size": len(tokenizer)},
        "vision_config": base["vision_config"],
        "audio_config": {
            "model_type": "aero_realtime_audio_encoder",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 16,
            "num_mel_bins": 16,
        },
        "image_token_index": base["image_token_id"],
        "video_token_index": base["video_token_id"],
        "vision_start_token_index": base["vision_start_token_id"],
        **{f"{name}_token_index": token for name, token in zip(tokens, ids, strict=True)},
    }
    sound = WhisperFeatureExtractor(feature_size=16)
    return config, AeroRealtimeProcessor(images, videos, sound, tokenizer)

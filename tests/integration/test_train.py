"""`mrope train` on conversations with the real processors of Qwen3-VL and Qwen2.5-VL, which need torchvision."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

pytest.importorskip("torchvision")

from mrope import MRopeError
from mrope.training.compare import compare_runs
from mrope.training.dataloader import load_rows
from mrope.training.demo.tokenizer import CHAT_TEMPLATE, build_tokenizer
from mrope.training.rows import Rows
from mrope.training.trainer import train
from training.runs import config

PROCESSORS = {
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor", 16),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", 14),
}
FAMILIES = list(PROCESSORS)
RNG = np.random.default_rng(0)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 255, (height, width, 3), np.uint8))


def said(*items: Any, answer: str = "A cat.") -> list[dict[str, Any]]:
    question = {"type": "text", "text": "What is it?"}
    return [
        {"role": "user", "content": [*items, question]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


IMAGE, VIDEO = {"type": "image"}, {"type": "video"}
ROWS: dict[str, dict[str, Any]] = {
    "two images": {"messages": said(IMAGE, IMAGE), "images": [picture(90, 70), picture(64, 128)]},
    "odd clip": {
        "messages": said(VIDEO),
        "videos": [[picture(64, 64) for _ in range(5)]],
        "fps": [3.0],
    },
    "text": {"messages": said()},
    "two clips and an image": {
        "messages": said(VIDEO, IMAGE, VIDEO),
        "images": [picture(64, 64)],
        "videos": [[picture(64, 64)] * 2, [picture(96, 64)] * 3],
        "fps": [2.0, 1.0],
    },
    "uneven": {
        "messages": said(VIDEO),
        "videos": [[picture(64, 64)] * 4],
        "fps": [10.0],
        "frame_indices": [[0, 7, 30, 90]],
    },
}


def save_processor(folder: Path, family: str) -> Any:
    kind, videos, patch = PROCESSORS[family]
    sides = {"patch_size": patch, "temporal_patch_size": 2, "merge_size": 2}
    size = {"shortest_edge": 1024, "longest_edge": 64 * 1024}
    processor = getattr(transformers, kind)(
        transformers.Qwen2VLImageProcessor(size=size, **sides),
        build_tokenizer(),
        getattr(transformers, videos)(size=size, **sides),
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    return processor


def png(image: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def write(folder: Path, *names: str) -> Path:
    text = datasets.Value("string")
    item = {"type": text, "text": text}
    features = datasets.Features(
        messages=datasets.List({"role": text, "content": datasets.List(item)}),
        images=datasets.List(datasets.Image()),
        videos=datasets.List(datasets.List(datasets.Image())),
        fps=datasets.List(datasets.Value("float64")),
        frame_indices=datasets.List(datasets.List(datasets.Value("int64"))),
    )
    rows = [{name: ROWS[row].get(name) for name in features} for row in names]
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def made(tmp_path: Path, family: str, *names: str, **data: Any) -> tuple[Any, Any]:
    processor = save_processor(tmp_path / "processor", family)
    source = {"source": str(write(tmp_path, *names)), "processor": str(tmp_path / "processor")}
    return config(tmp_path, family, data=source | data), processor


@pytest.mark.parametrize("family", FAMILIES)
def test_columns_are_the_processors_own_and_counted_by_sizes(family: str, tmp_path: Path) -> None:
    cfg, processor = made(tmp_path, family, *ROWS)
    rows = load_rows(cfg)
    assert isinstance(rows, Rows)
    for index, row in enumerate(ROWS.values()):
        images, videos = row.get("images"), row.get("videos")
        metadata = None
        if videos:
            metadata = [
                {
                    "fps": fps,
                    "frames_indices": [*row.get("frame_indices", [range(len(clip))] * 9)[place]],
                    "total_num_frames": 120 if "frame_indices" in row else len(clip),
                }
                for place, (clip, fps) in enumerate(zip(videos, row["fps"], strict=True))
            ]
        expected = processor(
            text=[processor.apply_chat_template(row["messages"], tokenize=False)],
            images=images,
            videos=videos,
            return_tensors="pt",
            **({"video_metadata": metadata, "do_sample_frames": False} if metadata else {}),
        )
        columns = rows.prepare(index)
        assert columns.keys() - {"labels"} == expected.keys()
        for name, value in expected.items():
            ours = columns[name] if columns[name].ndim == value.ndim else columns[name][None]
            torch.testing.assert_close(ours, torch.as_tensor(value), rtol=0, atol=0)
        counted = rows.count(index)
        assert counted.tokens == len(columns["input_ids"])
        grids = [columns[name] for name in ("image_grid_thw", "video_grid_thw") if name in columns]
        assert counted.patches == sum(int(grid.prod(1).sum()) for grid in grids)
        assert counted.segments == sum(int(grid[:, 0].sum()) for grid in grids)


@pytest.mark.parametrize("family", FAMILIES)
def test_conversations_train_on_and_off_the_stage(family: str, tmp_path: Path) -> None:
    """By tokens, flattened; labels of the answers alone."""
    cfg, _ = made(tmp_path, family, *ROWS, loss="answers")
    cfg = cfg.model_copy(
        update={
            "rope": cfg.rope.model_copy(update={"packing": "flatten"}),
            "dataloader": cfg.dataloader.model_copy(update={"max_tokens": 400}),
        }
    )
    on, off = compare_runs(cfg)
    assert on.losses == pytest.approx(off.losses, abs=1e-4) and len(set(on.losses)) == 4
    assert on.rope_index_calls == 0 and off.rope_index_calls


def test_checkpoints_hold_the_processor(tmp_path: Path) -> None:
    cfg, processor = made(tmp_path, "qwen3_vl", "two images", "text", "odd clip")
    result = train(cfg)
    assert result.checkpoint is not None
    for folder in (tmp_path / "out", Path(result.checkpoint)):
        again = transformers.AutoProcessor.from_pretrained(folder)
        assert type(again) is type(processor)
        assert again.chat_template == processor.chat_template
        assert dict(again.video_processor.size) == dict(processor.video_processor.size)


def test_a_folder_that_is_no_processor(tmp_path: Path) -> None:
    (tmp_path / "processor").mkdir()
    source = {"source": str(write(tmp_path, "text")), "processor": str(tmp_path / "processor")}
    with pytest.raises(MRopeError, match="no processor can be loaded from"):
        load_rows(config(tmp_path, "qwen3_vl", data=source))
    save_processor(tmp_path / "processor", "qwen2_5_vl")
    with pytest.raises(MRopeError, match="has patch_size=14, but the model's config says 16"):
        load_rows(config(tmp_path, "qwen3_vl", data=source))

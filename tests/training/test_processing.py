"""Conversations become columns: the settings of processors, and the items of messages."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from mrope import MRopeError, load_config
from mrope.training.demo.messages import in_order, read_messages
from mrope.training.demo.processing import Processing, build_processing
from mrope.training.demo.tokenizer import build_tokenizer
from mrope.training.loop import load_run_rows
from mrope.training.model import load_model_config

CONFIGS = Path(__file__).parents[2] / "configs"
# Patches of 16, 14, 14 and 16 pixels; the first and the last have frames apart.
FAMILIES = ["demo", "qwen2_vl", "qwen2_5_vl", "qwen3_5"]
PATCH = {"demo": 16, "qwen2_vl": 14, "qwen2_5_vl": 14, "qwen3_5": 16}
WHITE = Image.new("RGB", (256, 256), "white")
TEXT = {"type": "text", "text": "A cat?"}


def processing(name: str, folder: Path | None, **options: Any) -> Processing:
    cfg = load_config(CONFIGS / f"{name}.yaml")
    place = None if folder is None else str(folder)
    return build_processing(cfg.spec(), load_model_config(cfg), folder=place, **options)


def user(*items: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(items)}


def settings(name: str, **changes: Any) -> dict[str, Any]:
    """Return one section as transformers saves it, nulls included."""
    size = {"shortest_edge": 1024, "longest_edge": 4096}
    patches = {"patch_size": PATCH[name], "temporal_patch_size": 2, "merge_size": 2}
    section = {"size": size, **patches, "image_mean": [0.25] * 3, "image_std": [0.5] * 3}
    return section | {"crop_size": None, "device": None} | changes


def model_folder(place: Path, files: dict[str, Any]) -> Path:
    place.mkdir(exist_ok=True)
    build_tokenizer().save_pretrained(place)
    for name, table in files.items():
        (place / name).write_text(json.dumps(table))
    return place


IMAGE_ROW = {"messages": [user({"type": "image"}, TEXT)], "images": [WHITE]}
CLIP_ROW = {"messages": [user({"type": "video"}, TEXT)], "videos": [[WHITE] * 4]}


# Settings of the processors.


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("nested", [True, False])
def test_settings_of_either_file_are_used(name: str, nested: bool, tmp_path: Path) -> None:
    section = settings(name)
    files = {"processor_config.json": {"processor_class": "P", "image_processor": section}}
    folder = model_folder(tmp_path, files if nested else {"preprocessor_config.json": section})
    columns = processing(name, folder)(IMAGE_ROW, 0)
    assert columns["image_grid_thw"].tolist() == [[1, 4, 4]]
    # White is 1.0, and (1.0 - 0.25) / 0.5 with the folder's mean and deviation.
    assert np.allclose(columns["pixel_values"], 1.5)
    plain = processing(name, None)(IMAGE_ROW, 0)
    assert plain["image_grid_thw"].tolist() == [[1, *[256 // PATCH[name] // 2 * 2] * 2]]


def test_the_newer_file_wins(tmp_path: Path) -> None:
    files = {
        "processor_config.json": {"image_processor": settings("demo")},
        "preprocessor_config.json": settings("demo", image_mean=[0.5] * 3),
    }
    columns = processing("demo", model_folder(tmp_path, files))(IMAGE_ROW, 0)
    assert np.allclose(columns["pixel_values"], 1.5)


CLIP_SIZE = {"shortest_edge": 1024, "longest_edge": 16384}


@pytest.mark.parametrize(
    ("name", "side"),
    # The limit is that of all four frames, 4096 pixels each, or of every frame.
    [("demo", 4), ("qwen3_5", 4), ("qwen2_vl", 8), ("qwen2_5_vl", 8)],
)
@pytest.mark.parametrize("nested", [True, False])
def test_clips_have_settings_of_their_own(
    name: str, side: int, nested: bool, tmp_path: Path
) -> None:
    image, video = settings(name), settings(name, size=CLIP_SIZE, image_mean=[0.5] * 3, fps=2)
    files = (
        {"processor_config.json": {"image_processor": image, "video_processor": video}}
        if nested
        else {"preprocessor_config.json": image, "video_preprocessor_config.json": video}
    )
    process = processing(name, model_folder(tmp_path, files))
    columns = process(CLIP_ROW, 0)
    assert columns["video_grid_thw"].tolist() == [[2, side, side]]
    assert np.allclose(columns["pixel_values_videos"], 1.0)
    assert process(IMAGE_ROW, 0)["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert np.allclose(process(IMAGE_ROW, 0)["pixel_values"], 1.5)


def test_clips_are_scaled_like_images_without_settings_of_their_own(tmp_path: Path) -> None:
    files = {"processor_config.json": {"image_processor": settings("demo")}}
    columns = processing("demo", model_folder(tmp_path, files))(CLIP_ROW, 0)
    assert columns["video_grid_thw"].tolist() == [[2, 4, 4]]
    assert np.allclose(columns["pixel_values_videos"], 1.5)


@pytest.mark.parametrize("name", FAMILIES)
def test_limits_of_the_config_win_and_are_those_of_a_frame(name: str, tmp_path: Path) -> None:
    both = {"image_processor": settings(name), "video_processor": settings(name, size=CLIP_SIZE)}
    folder = model_folder(tmp_path, {"processor_config.json": both})
    process = processing(name, folder, min_pixels=1024, max_pixels=4096)
    assert process(CLIP_ROW, 0)["video_grid_thw"].tolist() == [[2, 4, 4]]
    larger = processing(name, folder, max_pixels=16384)
    side = 128 // PATCH[name] // 2 * 2
    assert larger(CLIP_ROW, 0)["video_grid_thw"].tolist() == [[2, side, side]]
    assert larger(IMAGE_ROW, 0)["image_grid_thw"].tolist() == [[1, side, side]]


def test_missing_settings_of_clips_are_those_of_their_class(tmp_path: Path) -> None:
    for name, white in (("demo", (1 - 0.5) / 0.5), ("qwen2_vl", (1 - 0.48145466) / 0.26862954)):
        both = {"image_processor": settings(name), "video_processor": {"patch_size": PATCH[name]}}
        folder = model_folder(tmp_path / name, {"processor_config.json": both})
        pixels = processing(name, folder)(CLIP_ROW, 0)["pixel_values_videos"]
        assert pixels[0, 0] == pytest.approx(white, abs=1e-5)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, r"neither preprocessor_config\.json, nor processor_config\.json with an image_proc"),
        ({"processor_config.json": {"processor_class": "P"}}, "neither preprocessor_config"),
        ({"video_preprocessor_config.json": settings("demo")}, "neither preprocessor_config"),
        ({"processor_config.json": [1]}, "its top level is not an object"),
        ({"processor_config.json": {"image_processor": 3}}, "must be a section, not 3"),
        (
            {"processor_config.json": {"image_processor": settings("demo", patch_size=14)}},
            "has patch_size=14, but the model's config says 16: they belong to different models",
        ),
        (
            {"preprocessor_config.json": settings("demo", merge_size=4)},
            "preprocessor_config.json has merge_size=4, but the model's config says 2",
        ),
        (
            {"preprocessor_config.json": settings("demo", size={"longest_edge": 4096})},
            "size must have shortest_edge and longest_edge",
        ),
    ],
)
def test_settings_that_are_refused(files: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(MRopeError, match=words):
        processing("demo", model_folder(tmp_path, files))


def test_settings_that_are_no_json(tmp_path: Path) -> None:
    (model_folder(tmp_path, {}) / "processor_config.json").write_text("{")
    with pytest.raises(MRopeError, match=r"cannot read the processor settings .*processor_config"):
        processing("demo", tmp_path)


# Items of messages.


def picture(side: int) -> Image.Image:
    return Image.new("RGB", (side, side), (side, 0, 0))


def data_url(side: int) -> str:
    file = io.BytesIO()
    picture(side).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def grids(row: dict[str, Any], folder: Path, name: str = "demo") -> list[list[int]]:
    columns = processing(name, None, pictures=folder, min_pixels=1024)(row, 4)
    return list(columns["image_grid_thw"].tolist())


@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_of_items_are_read_in_their_order(name: str, tmp_path: Path) -> None:
    sides = [PATCH[name] * 2 * count for count in (2, 3, 4, 5, 6)]
    picture(sides[1]).save(tmp_path / "a b.png")
    path = tmp_path / "a b.png"
    items = [
        {"type": "image_url", "image_url": {"url": data_url(sides[0]), "detail": "low"}},
        {"type": "image_url", "image_url": "a b.png"},
        {"type": "image_url", "image_url": {"url": path.as_uri()}},
        {"type": "image"},
        {"type": "image", "image": str(path)},
        TEXT,
        {"type": "image", "url": data_url(sides[4]), "image": None},
    ]
    row = {"messages": [user(*items)], "images": [picture(sides[3])]}
    found = grids(row, tmp_path, name)
    assert found == [[1, 2 * n, 2 * n] for n in (2, 3, 3, 5, 3, 6)]


def test_pictures_of_the_column_may_be_urls_too(tmp_path: Path) -> None:
    row = {"messages": [user({"type": "image"}, TEXT)], "images": [data_url(64)]}
    assert grids(row, tmp_path) == [[1, 4, 4]]


def test_clips_of_items_are_read(tmp_path: Path) -> None:
    clip = {"type": "video", "video": [picture(64)] * 2}
    columns = processing("demo", None, pictures=tmp_path)({"messages": [user(clip, TEXT)]}, 0)
    assert columns["video_grid_thw"].tolist() == [[1, 4, 4]]


def test_items_of_a_table_have_the_keys_of_all(tmp_path: Path) -> None:
    """In Arrow, every struct has every key, null where the row did not have it."""
    items = [{"type": "image_url", "image_url": {"url": data_url(64)}}, TEXT]
    lines = [{"messages": [user(*items)]}, {"messages": [user(TEXT)]}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = [f"data.source={file}", "data.rows=null", "dataloader.num_workers=0"]
    rows = load_run_rows(load_config(CONFIGS / "demo.yaml", options))
    assert rows[0]["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert "image_grid_thw" not in rows[1]


KNOWN = "; known: text, image, image_url, video"


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"type": "input_image", "image_url": "a.png"}, f"unknown type 'input_image'{KNOWN}"),
        ({"type": "input_text", "text": "hello"}, f"unknown type 'input_text'{KNOWN}"),
        ({"type": "audio", "audio": "a.wav"}, f"unknown type 'audio'{KNOWN}"),
        ({"type": "input_audio", "input_audio": {"data": ""}}, "unknown type 'input_audio'"),
        ({"type": "video_url", "video_url": {"url": "a.mp4"}}, "unknown type 'video_url' .video f"),
        ({"type": "Image"}, "unknown type 'Image'"),
        ({"type": 3}, "unknown type 3"),
        ({"text": "hello"}, f"item 1 has no type{KNOWN}"),
        ({"type": None, "image": "a.png"}, "item 1 has no type"),
        ({}, "item 1 has no type"),
        (None, "item 1 must be a mapping with a type, not null"),
        ("hello", "item 1 must be a mapping with a type, not str 'hello'"),
        ({"type": "text"}, "item 1: text must be a text, not null"),
        ({"type": "text", "text": ["a"]}, "item 1: text must be a text, not list"),
        ({"type": "image_url"}, "image_url must hold a path or a data: URL, not null"),
        ({"type": "image_url", "image_url": None}, "not null"),
        ({"type": "image_url", "image_url": {"url": None}}, "not null"),
        ({"type": "image", "image": None}, "messages show 1 images, but its column holds 0"),
        ({"type": "image_url", "image_url": "gone.png"}, "cannot read a picture: .*gone.png"),
        (
            {"type": "image_url", "image_url": "https://a.b/c.png"},
            "'https://a.b/c.png' is not read",
        ),
        ({"type": "image_url", "image_url": {"url": "HTTP://a.b/c"}}, "nothing is downloaded"),
        ({"type": "image", "image": "s3://bucket/c.png"}, "nothing is downloaded"),
        (
            {"type": "image", "image": "data:image/png,abc"},
            "must hold base64, not 'data:image/png'",
        ),
        ({"type": "image", "image": "data:image/png;base64,%%%"}, "cannot read a picture"),
        ({"type": "image", "image": "data:image/png;base64,AAAA"}, "cannot read a picture"),
        ({"type": "image", "image": 5}, "a picture must be an image or a path, not int"),
        ({"type": "video", "video": "a.mp4"}, "video files are not decoded"),
    ],
)
def test_an_item_that_is_not_understood_is_an_error(item: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(MRopeError, match=f"row 4 of the dataset: .*{words}"):
        grids({"messages": [user(TEXT, item)]}, tmp_path)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (None, "messages must be a list, not null"),
        ("hello", "messages must be a list, not str"),
        ([None], "message 0 must have role and content, not be null"),
        ([{"content": "hello"}], "message 0: unknown role None; known: system, user, assistant"),
        ([user(TEXT), {"role": "human", "content": "a"}], "message 1: unknown role 'human'"),
        ([{"role": "user"}], "message 0: content must be a text or a list of items, not null"),
        ([{"role": "user", "content": {"type": "text"}}], "content must be a text or a list"),
        ([{"from": "human", "value": "hello"}], "unknown role None"),
    ],
)
def test_a_message_that_is_not_understood_is_an_error(
    messages: Any, words: str, tmp_path: Path
) -> None:
    with pytest.raises(MRopeError, match=f"row 4 of the dataset: .*{words}"):
        grids({"messages": messages}, tmp_path)


def test_texts_pass_as_they_are() -> None:
    messages = [{"role": "system", "content": "Be brief."}, user(TEXT)]
    assert read_messages(messages).messages == messages


def test_a_truncated_picture_is_an_error_of_its_row(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    row = {"messages": [user({"type": "image"}, TEXT)], "images": ["a.jpg"]}
    with pytest.raises(MRopeError, match="row 4 .*cannot read a picture: image file is truncated"):
        grids(row, tmp_path)


def test_items_and_column_must_fit_together() -> None:
    assert in_order([None, "a", None], ["x", "y"]) == ["x", "a", "y"]
    assert in_order([None, None], ["x"]) == ["x"]  # counted later, against the whole text
    for column in ([], ["x"], ["x", "y", "z"]):
        with pytest.raises(MRopeError, match="1 items .* own, and 2 do not, but its column holds"):
            in_order([None, "a", None], column)


def test_images_of_a_dataset_are_read_as_datasets_holds_them(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([{"image": picture(64)}])
    row = {"messages": [user({"type": "image"})], "images": [table[0]["image"]]}
    assert grids(row, tmp_path) == [[1, 4, 4]]

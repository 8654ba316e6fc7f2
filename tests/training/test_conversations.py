"""Rows of conversations become columns: items of messages, pictures, clips, labels, and their sizes."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from mrope import MRopeError, load_config
from mrope.training.conversations import Conversations
from mrope.training.dataloader import open_conversations
from mrope.training.demo.dataset import photographs
from mrope.training.messages import in_order, read_messages
from mrope.training.model import load_model_config
from mrope.training.pictures import read_picture
from mrope.training.sizes import count_columns

CONFIGS = Path(__file__).parents[2] / "configs"
# Patches of 16, 14, 14 and 16 pixels; the first and the last have frames apart.
FAMILIES = ["demo", "qwen2_vl", "qwen2_5_vl", "qwen3_5"]
PATCH = {"demo": 16, "qwen2_vl": 14, "qwen2_5_vl": 14, "qwen3_5": 16}
TEXT = {"type": "text", "text": "A cat?"}
ANSWER = {"role": "assistant", "content": "Yes."}


def conversations(name: str, folder: Path = Path(), **data: Any) -> Conversations:
    """Return what prepares rows with the demo's processor, of transformers' own classes."""
    cfg = load_config(CONFIGS / f"{name}.yaml")
    made = open_conversations(cfg, cfg.spec(), load_model_config(cfg))
    made.data, made.pictures = cfg.data.model_copy(update=data), folder
    made._loaded = None
    return made


def user(*items: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(items)}


def ask(*kinds: str) -> list[dict[str, Any]]:
    return [user(*({"type": kind} for kind in kinds), TEXT), ANSWER]


def clip(frames: int, side: int = 64) -> list[Image.Image]:
    return [picture(side)] * frames


@pytest.mark.parametrize("name", FAMILIES)
def test_columns_fit_together_and_are_counted_by_sizes(name: str) -> None:
    made = conversations(name)
    merge = made.spec.spatial_merge_size**2
    for index, row in enumerate(photographs(5)):
        columns = made.prepare(row, index)
        types, ids = columns["mm_token_type_ids"], columns["input_ids"]
        for kind, grid, pixels in (
            (1, "image_grid_thw", "pixel_values"),
            (2, "video_grid_thw", "pixel_values_videos"),
        ):
            patches = columns[grid].prod(dim=1).sum() if grid in columns else 0
            assert len(columns.get(pixels, ())) == patches
            assert (types == kind).sum() == patches // merge
        assert (columns["labels"] == ids.masked_fill(types > 0, -100)).all()
        assert made.count(row, index) == count_columns(made.spec, columns)


def test_the_text_of_a_clip_is_timed_where_frames_stand_apart() -> None:
    """By transformers' own function; the last of an odd number of frames counts twice."""
    made = conversations("demo")
    own = type(made.processor)._calculate_timestamps
    for frames, fps in ((1, 2.0), (3, 2.0), (5, 1.0), (4, 2.0), (194, 50.0)):
        row = {"messages": ask("video"), "videos": [clip(frames, 32)], "fps": fps}
        text = made.processor.tokenizer.decode(made.prepare(row, 0)["input_ids"])
        expected = [f"{time:.1f}" for time in own(None, [*range(frames)], fps, 2)]
        assert re.findall(r"<([\d.]+) seconds>", text) == expected


def test_frames_taken_unevenly_have_their_own_times() -> None:
    made = conversations("demo")
    row = {"messages": ask("video"), "videos": [clip(4)], "fps": 10.0}
    for column in ({"frame_indices": [[0, 7, 30, 90]]}, {"frame_times": [[0.0, 0.7, 3.0, 9.0]]}):
        text = made.processor.tokenizer.decode(made.prepare(row | column, 0)["input_ids"])
        assert re.findall(r"<([\d.]+) seconds>", text) == ["0.3", "6.0"]
        assert made.count(row | column, 0).tokens == len(made.prepare(row | column, 0)["input_ids"])
    item = {"type": "video", "video": clip(4), "frame_times": [0.0, 1.0, 2.0, 3.0], "fps": None}
    text = made.processor.tokenizer.decode(
        made.prepare({"messages": [user(item, TEXT)]}, 0)["input_ids"]
    )
    assert re.findall(r"<([\d.]+) seconds>", text) == ["0.5", "2.5"]
    timed = conversations("qwen2_5_vl").prepare(row | {"frame_indices": [[0, 7, 30, 90]]}, 0)
    assert timed["second_per_grid_ts"] == pytest.approx([2 * 90 / 3 / 10])


def test_seconds_belong_to_the_family_that_reads_them() -> None:
    row = {"messages": ask("video", "video"), "videos": [clip(2), clip(2)], "fps": [3.0, 1.0]}
    assert "second_per_grid_ts" not in conversations("qwen2_vl").prepare(row, 0)
    made = conversations("qwen2_5_vl", fps=5.0)
    assert made.prepare(row, 0)["second_per_grid_ts"] == pytest.approx([2 / 3, 2])
    assert made.prepare(row | {"fps": None}, 0)["second_per_grid_ts"] == pytest.approx([0.4] * 2)
    assert made.prepare(row | {"fps": 4.0}, 0)["second_per_grid_ts"] == pytest.approx([0.5] * 2)


@pytest.mark.parametrize(
    ("column", "words"),
    [
        *(
            ({"fps": fps}, "clip 0: fps must be a number above 0")
            for fps in (-1.0, 0, "fast", True)
        ),
        ({"fps": float("nan")}, "clip 0: fps must be a number above 0, not nan"),
        ({"fps": [2.0, float("inf")]}, "fps has 2 entries, but the row has 1 clips"),
        ({"fps": [float("inf")]}, "clip 0: fps must be a number above 0, not inf"),
        ({"frame_indices": [[0, 1]]}, r"clip 0: frame_indices has shape \(2,\), but there are 3"),
        ({"frame_times": [[0.0, 2.0, 1.0]]}, "clip 0: frame_times must ascend, from 0 or more"),
        ({"frame_times": [[0.0, 1.0, "x"]]}, "clip 0: frame_times must hold numbers"),
        ({"frame_indices": 3}, "frame_indices must be a list for each clip, not 3"),
    ],
)
def test_times_that_are_none_are_errors_of_their_row(column: Any, words: str) -> None:
    row = {"messages": ask("video"), "videos": [clip(3)]} | column
    for function in (conversations("demo").prepare, conversations("demo").count):
        with pytest.raises(MRopeError, match=f"row 17 of the dataset: {words}"):
            function(row, 17)


def test_pixel_limits_reach_the_processor() -> None:
    made = conversations("demo", min_pixels=1024, max_pixels=2048)
    columns = made.prepare(photographs(5)[4], 0)
    assert 4 <= columns["image_grid_thw"].prod() <= 8
    assert 4 <= columns["video_grid_thw"][0, 1:].prod() <= 8


def test_a_clip_is_cut_as_its_frames_lie() -> None:
    """A patch holds both frames of its pair, one after another within each channel."""
    made = conversations("demo")
    frames = photographs(5)[2]["videos"][0][:3]
    columns = made.prepare({"messages": ask("video"), "videos": [frames]}, 0)
    time, height, width = columns["video_grid_thw"][0].tolist()
    assert time == 2
    patches = columns["pixel_values_videos"].reshape(time, height * width, 3, 2, 16, 16)
    one = made.processor.image_processor
    for place, frame in {(0, 0): 0, (0, 1): 1, (1, 0): 2, (1, 1): 2}.items():
        alone = one(images=[frames[frame]], return_tensors="pt")["pixel_values"]
        expected = alone.reshape(height * width, 3, 2, 16, 16)[:, :, 0]
        assert torch.equal(patches[place[0], :, :, place[1]], expected)


# Labels.


TURNS = [
    user({"type": "image"}, {"type": "text", "text": "What?"}),
    {"role": "assistant", "content": "A cat."},
    user({"type": "video"}, TEXT),
    {"role": "assistant", "content": [{"type": "text", "text": "Two cats."}]},
]
MARKED = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content if m.content is string else m.content[0].text }}<|im_end|>{% endgeneration %}
{% else %}{% for i in m.content %}{% if i.type == 'text' %}{{ i.text }}{% else %}<|vision_start|><|{{ i.type }}_pad|><|vision_end|>{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}"""


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("name", ["demo", "qwen2_5_vl"])
def test_answers_alone_have_labels(name: str, marked: bool) -> None:
    made = conversations(name, loss="answers")
    if marked:
        made.processor.chat_template = MARKED
    row = {"messages": TURNS, "images": [picture(64)], "videos": [clip(3)]}
    columns = made.prepare(row, 0)
    kept = columns["labels"][columns["labels"] != -100]
    end = "<|im_end|>" if marked else "<|im_end|>\n"
    assert made.processor.tokenizer.decode(kept) == f"A cat.{end}Two cats.{end}"
    everything = conversations(name).prepare(row, 0) if not marked else None
    assert everything is None or torch.equal(everything["input_ids"], columns["input_ids"])


def test_turns_that_a_template_does_not_tell_are_an_error() -> None:
    made = conversations("demo", loss="answers")
    row = {"messages": [user(TEXT)]}
    with pytest.raises(MRopeError, match="row 3 .*the row has no turn of the assistant"):
        made.prepare(row, 3)
    # As templates that leave out the thoughts of earlier turns.
    last = "{% for m in messages %}{{ m.role }}{{ m.content if loop.last else '' }}{% endfor %}"
    made.processor.chat_template = last
    with pytest.raises(MRopeError, match="row 3 .*does not tell where message 0 stands"):
        made.prepare({"messages": [*TURNS[1:2], ANSWER, user(TEXT)]}, 3)


# Pictures.


def turned(folder: Path) -> Path:
    """Write a picture that lies on its side, with an EXIF tag that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (192, 64), (200, 40, 40)).save(folder / "a.jpg", exif=exif)
    return folder / "a.jpg"


def test_photographs_of_phones_are_turned(tmp_path: Path) -> None:
    made = conversations("demo", tmp_path)
    data = turned(tmp_path).read_bytes()
    url = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    values: list[Any] = ["a.jpg", data, {"bytes": data, "path": None}, {"bytes": data}]
    values += [{"path": "a.jpg"}, url, url.partition(",")[2], Image.open(tmp_path / "a.jpg")]
    values.append(datasets.Dataset.from_list([{"i": {"bytes": data, "path": None}}])[0]["i"])
    for value in values:
        row = {"messages": ask("image"), "images": [value]}
        assert made.prepare(row, 0)["image_grid_thw"].tolist() == [[1, 12, 4]]
        assert made.count(row, 0).patches == 48


def test_rows_that_cannot_be_prepared_are_errors_that_name_them(tmp_path: Path) -> None:
    bad: dict[str, dict[str, Any]] = {
        "thin picture": {"messages": ask("image"), "images": [Image.new("RGB", (2000, 5))]},
        "no messages": {"messages": []},
        "broken bytes": {"messages": ask("image"), "images": [{"bytes": b"\x89PNG", "path": None}]},
        "no bytes": {"messages": ask("image"), "images": [{"bytes": None, "path": None}]},
        "lone surrogate": {"messages": [user({"type": "text", "text": "\ud800"}), ANSWER]},
        "gone": {"messages": ask("image"), "images": ["gone.png"]},
        "a null": {"messages": ask("image"), "images": [None]},
        "sizes differ": {"messages": ask("video"), "videos": [[picture(64), picture(32)]]},
    }
    made = conversations("demo", tmp_path)
    for row in bad.values():
        with pytest.raises(MRopeError, match="row 17 of the dataset: "):
            made.prepare(row, 17)
    alone = {"messages": ask("image"), "images": picture(64)}  # a picture, and no list of one
    assert made.prepare(alone, 17)["image_grid_thw"].tolist() == [[1, 4, 4]]


def test_nothing_is_downloaded_unless_the_config_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    picture(64).save(file, "PNG")

    class Answer:
        content = file.getvalue()

    monkeypatch.setattr("transformers.image_utils.httpx.get", lambda url, **_: Answer())
    with pytest.raises(MRopeError, match="or set data.download: true"):
        read_picture("https://a.b/c.png", Path())
    assert read_picture("https://a.b/c.png", Path(), download=True).size == (64, 64)

    def fail(url: str, **_: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("transformers.image_utils.httpx.get", fail)
    with pytest.raises(MRopeError, match="'https://a.b/c.png' cannot be downloaded: no route"):
        read_picture("https://a.b/c.png", Path(), download=True)


# Items of messages.


def picture(side: int) -> Image.Image:
    return Image.new("RGB", (side, side), (side, 0, 0))


def data_url(side: int) -> str:
    file = io.BytesIO()
    picture(side).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def grids(row: dict[str, Any], folder: Path, name: str = "demo") -> list[list[int]]:
    columns = conversations(name, folder, min_pixels=1024).prepare(row, 4)
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
    columns = conversations("demo", tmp_path).prepare({"messages": [user(clip, TEXT)]}, 0)
    assert columns["video_grid_thw"].tolist() == [[1, 4, 4]]


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
        ({"type": "image_url", "image_url": "gone.png"}, "cannot read a picture: .*gone"),
        (
            {"type": "image_url", "image_url": "https://a.b/c.png"},
            "'https://a.b/c.png' is not read",
        ),
        ({"type": "image_url", "image_url": {"url": "HTTP://a.b/c"}}, "nothing is downloaded"),
        ({"type": "image", "image": "s3://bucket/c.png"}, "is not read: give a path"),
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

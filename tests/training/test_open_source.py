"""Datasets as users keep them: files, folders of files, and what `save_to_disk` writes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from mrope import MRopeError, load_config
from mrope.training.dataloader import load_rows
from mrope.training.open_source import open_source, split_source
from support.checked import Folder

CONFIGS = Path(__file__).parents[2] / "configs"
ROWS = [{"input_ids": [7, 8, row], "labels": [7, 8, row]} for row in range(4)]
TABLE = datasets.Dataset.from_list(ROWS)


def parquet(file: Path, rows: list[Any] = ROWS) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(str(file))


def text_of(rows: list[Any] = ROWS) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def zipped(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(text.encode()))


def shards(folder: Path, names: list[str]) -> Path:
    """Write one row into each of the named files."""
    for row, name in zip(ROWS, names, strict=False):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            parquet(file, [row])
        elif name.endswith(".gz"):
            zipped(file, text_of([row]))
        else:
            file.write_text(text_of([row]))
    return folder


WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.parquet": parquet,
    "rows.jsonl": lambda file: file.write_text(text_of()),
    "rows.json": lambda file: file.write_text(json.dumps(ROWS)),
    "lines.json": lambda file: file.write_text(text_of()),
    "rows.jsonl.gz": lambda file: zipped(file, text_of()),
    "rows.json.gz": lambda file: zipped(file, json.dumps(ROWS)),
    "saved": lambda folder: TABLE.save_to_disk(str(folder)),
    "splits": lambda folder: datasets.DatasetDict(test=TABLE).save_to_disk(str(folder)),
    "shards": lambda folder: shards(folder, [f"part-{row}.parquet" for row in range(4)]),
    "numbered": lambda folder: shards(
        folder, [f"data/train-0000{row}-of-00004.parquet" for row in range(4)]
    ),
    "lines": lambda folder: shards(folder, [f"{row}.jsonl" for row in range(4)]),
    "gz": lambda folder: shards(folder, [f"{row}.jsonl.gz" for row in range(4)]),
    "a: b, 'c'": lambda folder: shards(folder, [f"{row}.parquet" for row in range(4)]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_form_gives_the_rows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITERS[name](tmp_path / name)
    assert open_source(str(tmp_path / name)).to_list() == ROWS
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert open_source(f"../{name}").to_list() == ROWS


@pytest.mark.parametrize("name", WRITERS)
def test_every_form_is_trained_on_and_checked(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / name
    WRITERS[name](place)
    source = f"data.source={json.dumps(str(place))}"
    cfg = load_config(CONFIGS / "demo.yaml", [source, "data.rows=3"])
    rows = load_rows(cfg)
    assert [int(rows[row]["input_ids"][2]) for row in range(len(rows))] == [0, 1, 2]
    folder = Folder(tmp_path / "..", capsys)
    words = ("check", "--model", str(folder.model), "--dataset", str(place), "--workers", "0")
    assert folder.run(*words) == 0
    assert folder.said("rows") == "4, 0 bad"


SPLITS: dict[str, Callable[[Path], object]] = {
    "saved": lambda folder: datasets.DatasetDict(
        train=TABLE.select([0, 1]), validation=TABLE.select([2, 3])
    ).save_to_disk(str(folder)),
    "files": lambda folder: shards(
        folder,
        ["train-0.parquet", "train-1.parquet", "validation-0.parquet", "validation-1.parquet"],
    ),
    "folders": lambda folder: shards(
        folder, ["train/a.jsonl", "train/b.jsonl", "val/a.jsonl", "val/b.jsonl"]
    ),
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_is_named_behind_a_colon(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / name
    SPLITS[name](place)
    assert open_source(f"{place}:train").to_list() == ROWS[:2]
    assert open_source(f"{place}:validation").to_list() == ROWS[2:]
    with pytest.raises(
        MRopeError, match=rf"holds the splits train, validation; name one.*{name}:train$"
    ):
        open_source(str(place))
    with pytest.raises(MRopeError, match="has no split 'test'; it has train, validation"):
        open_source(f"{place}:test")
    folder = Folder(tmp_path, capsys)
    words = ("check", "--model", str(folder.model), "--workers", "0", "--dataset")
    assert folder.run(*words, f"{place}:validation") == 0
    assert folder.said("rows") == "2, 0 bad"
    assert folder.run(*words, str(place)) == 2
    assert "holds the splits train, validation" in " ".join(folder.err.split())


def test_a_config_names_a_split_by_a_relative_path(tmp_path: Path) -> None:
    SPLITS["saved"](tmp_path / "rows")
    (tmp_path / "run.yaml").write_text(
        'model: {config: {model_type: qwen3_vl}}\ndata: {source: "rows:validation"}'
    )
    assert open_source(load_config(tmp_path / "run.yaml").data.source).to_list() == ROWS[2:]


def test_a_path_may_hold_a_colon(tmp_path: Path) -> None:
    parquet(tmp_path / "a:train" / "rows.parquet")
    assert split_source(str(tmp_path / "a:train")) == (tmp_path / "a:train", None)
    assert open_source(str(tmp_path / "a:train")).to_list() == ROWS
    assert split_source(str(tmp_path / "gone:train")) == (tmp_path / "gone:train", None)


def test_pictures_and_notes_beside_shards_are_left_alone(tmp_path: Path) -> None:
    shards(tmp_path, ["rows-0.parquet", "rows-1.parquet"])
    (tmp_path / "images").mkdir()
    for number in range(5):
        Image.new("RGB", (32, 32)).save(tmp_path / "images" / f"test_{number}.png")
    (tmp_path / "README.md").write_text("# Rows")
    (tmp_path / "stats.json").write_text('{"rows": 2}')
    (tmp_path / ".cache").mkdir()
    parquet(tmp_path / ".cache" / "old.parquet")
    with pytest.raises(MRopeError, match="rows-0.parquet belongs to no split"):
        open_source(str(tmp_path))
    for file in (tmp_path / "images").iterdir():
        file.rename(file.with_name(file.name.replace("test_", "")))
    assert open_source(str(tmp_path)).to_list() == ROWS[:2]


def test_pictures_of_a_split_are_relative_to_the_dataset(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A cat?"}]}
    line = json.dumps({"messages": [message], "images": ["a.png"]})
    (tmp_path / "train.jsonl").write_text(line)
    (tmp_path / "test.jsonl").write_text(line)
    options = [f"data.source={tmp_path}:train", "data.rows=null"]
    rows: Any = load_rows(load_config(CONFIGS / "demo.yaml", options))
    assert rows.prepare(0)["image_grid_thw"].tolist() == [[1, 4, 4]]


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda folder: None, "cannot be read: it holds no dataset written by save_to_disk"),
        (lambda folder: (folder / "a.csv").write_text("a"), r"no files that end in \.parquet"),
        (lambda folder: shards(folder, ["a.parquet", "b.jsonl"]), "holds Parquet and JSON lines"),
        (
            lambda folder: shards(folder, ["train-0.parquet", "rest.parquet"]),
            "rest.parquet belongs to no split; .* are train",
        ),
        (lambda folder: (folder / "a.parquet").write_text("a"), "cannot be read"),
    ],
)
def test_folders_that_are_refused(
    write: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    write(tmp_path)
    with pytest.raises(MRopeError, match=f"data.source: {tmp_path}.*{words}"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl.gz", "saved"])
def test_what_has_no_splits_has_none_to_name(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    with pytest.raises(MRopeError, match="has no splits, so there is no 'train'"):
        open_source(f"{tmp_path / name}:train")


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.json", "empty.jsonl.gz"])
def test_a_file_without_rows(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    text = "[]" if name == "empty.json" else ""
    zipped(file, text) if name.endswith(".gz") else file.write_text(text)
    with pytest.raises(MRopeError, match="has no rows|cannot be read"):
        open_source(str(file))

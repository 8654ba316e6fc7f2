"""Rows of a config: columns as they are, conversations prepared when a batch needs them, bad ones skipped."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from mrope import MRopeCollator, MRopeError, build_collator, load_config
from mrope.collate.process_files import read_rejects
from mrope.collate.skip_bad import RejectWarning
from mrope.prepare.with_accelerate import EpochsInTurn
from mrope.training import rows as rows_module
from mrope.training.config import as_config
from mrope.training.dataloader import load_rows, make_loader, make_sampler
from mrope.training.rows import FAILED, Rows
from mrope.training.sizes import FOLDER
from support.models import model_config, tiny_examples
from training.runs import config, table_of

CONFIGS = Path(__file__).parents[2] / "configs"
FLAT = {"vision": True, "packing": "flatten"}


def opened(cfg: Any) -> Rows:
    rows = load_rows(cfg)
    assert isinstance(rows, Rows)
    return rows


def written(folder: Path, rows: list[dict[str, Any]], **features: Any) -> dict[str, str]:
    """Write rows, and return the section `data` that reads them."""
    kinds = {"features": datasets.Features(features)} if features else {}
    datasets.Dataset.from_list(rows, **kinds).to_parquet(folder / "rows.parquet")
    return {"source": str(folder / "rows.parquet")}


# Columns.


def test_columns_are_collated_as_the_table_has_them(tmp_path: Path) -> None:
    """No row is read twice or written anywhere; missing types are made from the ids."""
    table = table_of("qwen3_vl").remove_columns("mm_token_type_ids")
    table.to_parquet(tmp_path / "rows.parquet")
    cfg = config(tmp_path, data={"source": str(tmp_path / "rows.parquet")})
    rows = opened(cfg)
    collate = build_collator(cfg)
    whole = table_of("qwen3_vl").with_format("torch")
    ours, theirs = collate([rows[0], rows[1]]), collate([whole[0], whole[1]])
    assert ours.keys() == theirs.keys()
    for name in ("input_ids", "pixel_values", "mm_token_type_ids", "position_ids"):
        assert torch.equal(ours[name], theirs[name])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


def test_seconds_as_one_number_reach_the_collator(tmp_path: Path) -> None:
    ids = [7, 3, *[6] * 12, 8]
    pixels = np.zeros((48, 1176), np.float32).tolist()
    clip = {"input_ids": ids, "labels": ids, "video_grid_thw": [[3, 4, 4]]}
    clip |= {"pixel_values_videos": pixels}
    for seconds in (
        {"second_per_grid_ts": 2.0},
        {"second_per_grid_ts": [2.0]},
        {"video_second_per_grid": 2.0},
    ):
        row = clip | seconds
        cfg = config(tmp_path, "qwen2_5_vl", data=written(tmp_path, [row]))
        right = MRopeCollator(None, cfg.spec())([row])["position_ids"]
        assert right[0, 0].tolist()[2:14:4] == [2, 6, 10]
        assert torch.equal(build_collator(cfg)([opened(cfg)[0]])["position_ids"], right)
    with pytest.warns(UserWarning, match="has clips but no second_per_grid_ts: one second a step"):
        opened(config(tmp_path, "qwen2_5_vl", data=written(tmp_path, [clip])))[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once in a process
        opened(config(tmp_path, "qwen2_5_vl", data=written(tmp_path, [clip])))[0]
    rows_module._warned = False


# Budgets.


def test_epochs_of_the_trainer_take_the_sampler_s_batches_in_turn(tmp_path: Path) -> None:
    """Whatever the lengths of the sampler's epochs; a run that starts later starts at its batch."""
    cfg = config(tmp_path, dataloader={"max_tokens": 150}, rope=FLAT)
    sampler = make_sampler(cfg, load_rows(cfg), 150)
    chained: list[Any] = []
    for epoch in range(8):
        plan = sampler.plan(epoch)
        chained += [plan.batch(step, 0) for step in range(len(plan.grid_SR))]
    turns = EpochsInTurn(sampler)
    taken = []
    for epoch in range(5):
        turns.set_epoch(epoch)
        taken += [*turns]
    assert len(taken) == 5 * len(turns) and taken == chained[: len(taken)]
    late = EpochsInTurn(sampler)
    late.set_epoch(3)
    assert [*late] == chained[3 * len(late) : 4 * len(late)]


def test_every_worker_of_a_stream_reads_its_own_rows(tmp_path: Path) -> None:
    loader = {"max_tokens": 150, "buffer_size": 3, "num_workers": 2, "start_method": "fork"}
    cfg = config(tmp_path, dataloader=loader, rope=FLAT)
    rows = opened(cfg)
    batches = iter(make_loader(cfg, rows, build_collator(cfg)))
    lengths: list[int] = []
    while len(lengths) < 2 * len(rows):
        lengths += next(batches)["cu_seq_lens_q"].diff().tolist()
    assert set(lengths) == set(rows.sizes()["tokens"].tolist())


# Conversations.


def png(side: int = 64) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG")
    return file.getvalue()


def talk(picture: Any = None, text: str = "What?") -> dict[str, Any]:
    shown = [] if picture is None else [{"type": "image", "text": None}]
    content = [*shown, {"type": "text", "text": text}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    images = [] if picture is None else [picture]
    return {"messages": [{"role": "user", "content": content}, answer], "images": images}


def talks(folder: Path, rows: list[dict[str, Any]]) -> dict[str, str]:
    text = datasets.Value("string")
    item = {"type": text, "text": text}
    messages = datasets.List({"role": text, "content": datasets.List(item)})
    return written(folder, rows, messages=messages, images=datasets.List(datasets.Image()))


WHOLE, BROKEN = {"bytes": png(), "path": None}, {"bytes": png()[:60], "path": None}


def test_sizes_are_counted_once_and_nothing_else_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = talks(tmp_path, [talk(WHOLE), talk(), talk({"bytes": png(128), "path": None})])
    options = {"dataloader": {"max_tokens": 100}, "rope": FLAT}
    cfg = config(tmp_path, "qwen3_vl", data=data, **options)
    rows = opened(cfg)
    sizes = rows.sizes()
    prepared = [len(rows.prepare(index)["input_ids"]) for index in range(3)]
    assert sizes["tokens"].tolist() == prepared and sizes["patches"].tolist() == [16, 0, 64]
    (file,) = (tmp_path / FOLDER).iterdir()
    assert file.stat().st_size < 300
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "count", None)  # read from the file, by another process too
        assert opened(cfg).sizes()["tokens"].tolist() == prepared
    # Other settings of the processor, or another dataset, have a file of their own.
    other = config(tmp_path, "qwen3_vl", data=data | {"max_pixels": 2048}, **options)
    assert (
        opened(other).sizes()["patches"].tolist() == [8, 0, 8]
        or len([*(tmp_path / FOLDER).iterdir()]) == 2
    )
    talks(tmp_path, [talk(), talk()])
    assert opened(cfg).sizes()["patches"].tolist() == [0, 0]


def test_rows_that_cannot_be_prepared_are_skipped_and_recorded(tmp_path: Path) -> None:
    rows = [talk(WHOLE), talk(BROKEN), talk(), {"messages": [], "images": []}, talk(WHOLE)]
    data = talks(tmp_path, rows)
    skip = FLAT | {"on_error": "skip", "rejects": str(tmp_path / "rejects.jsonl")}
    loader = {"max_tokens": 200, "num_workers": 0}
    cfg = config(tmp_path, data=data, rope=skip, dataloader=loader)
    with pytest.warns(RejectWarning):
        batches = [*make_loader(cfg, load_rows(cfg), build_collator(cfg))]
    assert sum(len(batch["cu_seq_lens_q"]) - 1 for batch in batches) == 3
    records = read_rejects(tmp_path / "rejects.jsonl")
    assert sorted(record["index"] for record in records) == [1, 3]
    plain = config(tmp_path, data=data, rope=skip | {"enabled": False}, dataloader=loader)
    with pytest.warns(RejectWarning):
        batches = [*make_loader(plain, load_rows(plain), build_collator(plain))]
    assert sum(len(batch["input_ids"]) for batch in batches) == 3
    assert all("of the dataset: " in record["message"] for record in records)
    failed = opened(cfg)[3]
    assert "row 3 of the dataset: messages is empty" in str(failed[FAILED])
    # Without skipping, the row is named: before training if its sizes cannot be told, else by the worker.
    strict = config(tmp_path, data=data, rope=FLAT, dataloader=loader)
    with pytest.raises(MRopeError, match="row 3 of the dataset: messages is empty"):
        make_loader(strict, load_rows(strict), build_collator(strict))
    whole = config(tmp_path, data=data, dataloader={"batch_size": 5})
    with pytest.raises(MRopeError, match=r"row [13] of the dataset"):
        next(iter(make_loader(whole, load_rows(whole), build_collator(whole))))


@pytest.mark.filterwarnings("ignore::mrope.collate.skip_bad.RejectWarning")
@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_rejects": 3}, "more rejects than max_rejects=3: .* dropped 4 of 4 examples"),
        ({"max_rejects_in_a_row": 3}, "more rejects in a row than max_rejects_in_a_row=3"),
    ],
)
def test_a_broken_disk_is_no_bad_row(limits: Any, words: str, tmp_path: Path) -> None:
    data = talks(tmp_path, [talk(BROKEN) for _ in range(8)])
    rope = {"on_error": "skip", **limits}
    cfg = config(tmp_path, data=data, rope=rope, dataloader={"batch_size": 4})
    with pytest.raises(MRopeError, match=words):
        [*make_loader(cfg, load_rows(cfg), build_collator(cfg))]


def test_good_rows_between_rejects_end_their_run(tmp_path: Path) -> None:
    data = talks(tmp_path, [talk(BROKEN), talk(BROKEN), talk()] * 4)
    rope = {"on_error": "skip", "max_rejects_in_a_row": 2}
    cfg = config(tmp_path, data=data, rope=rope)
    rows = load_rows(cfg)
    loader = DataLoader(rows, batch_size=3, collate_fn=build_collator(cfg))
    with pytest.warns(RejectWarning):
        assert len([*loader]) == 4


def test_a_worker_prepares_rows_and_the_loop_does_not(tmp_path: Path) -> None:
    data = talks(tmp_path, [talk(WHOLE)] * 4)
    cfg = config(tmp_path, data=data, dataloader={"num_workers": 1, "start_method": "fork"})
    rows = opened(cfg)
    assert rows.conversations is not None
    collate = build_collator(cfg)
    batch = next(iter(make_loader(cfg, rows, collate)))
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4]] * 2
    state = json.dumps(sorted(rows.conversations.__getstate__()))
    assert "_loaded" in state and rows.conversations.__getstate__()["_loaded"] is None


def test_a_demo_row_without_images_has_no_key_for_them() -> None:
    rows = opened(load_config(CONFIGS / "demo.yaml", ["data.rows=5"]))
    names = {"input_ids", "attention_mask", "labels", "mm_token_type_ids"}
    assert rows[3].keys() == names
    assert rows[0]["pixel_values"].dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("qwen3_vl", {"image_grid_thw"}),
        # Without it ERNIE's forward sends images to the experts of text, and raises no error.
        ("ernie4_5_vl_moe", {"image_grid_thw", "moe_mm_token_type_ids"}),
        ("video_llama_3", {"image_grid_thw", "image_merge_sizes"}),
        ("minicpmv4_7", {"target_sizes"}),
    ],
)
def test_what_the_family_s_model_reads_is_kept(family: str, own: set[str], tmp_path: Path) -> None:
    made = model_config(family)
    (example,) = tiny_examples(family, rows=1, videos=False)
    row = {name: torch.as_tensor(value).tolist() for name, value in example.items()}
    data = written(tmp_path, [row | {"url": "a.png"}])
    table = {"model": {"config": made}, "data": data}
    kept = opened(as_config(table, tmp_path, "the test's config"))[0]
    assert kept.keys() == {"input_ids", "labels", "mm_token_type_ids", "pixel_values", *own}

"""The training loop: the demo's rows, the columns made from them, and runs with the stage on and off."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from rich.console import Console

from mrope import MRopeError, build_collator, load_config
from mrope.training.dataloader import TensorRows, make_loader
from mrope.training.demo.dataset import photographs
from mrope.training.demo.processing import Processing, build_processing
from mrope.training.loop import PACKED_TOLERANCE, compare, compare_runs, load_run_rows, train
from mrope.training.model import build_model, load_model_config
from mrope.training.result import TrainResult
from mrope.training.sections import Config, ConfigError
from mrope.training.step import endless

CONFIGS = Path(__file__).parents[2] / "configs"
TRAINED = [file.stem for file in sorted(CONFIGS.glob("*_*.yaml")) if file.stem != "aero_realtime"]
FAST = ["dataloader.num_workers=0", "data.rows=10", "train.steps=2", "train.device=cpu"]


def config(name: str = "demo", *changes: str) -> Config:
    return load_config(CONFIGS / f"{name}.yaml", [*FAST, *changes])


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def runs(cfg: Config) -> tuple[TrainResult, TrainResult]:
    return compare_runs(cfg, silent())


def processing(name: str, **changes: Any) -> Processing:
    cfg = config(name)
    return build_processing(cfg.spec(), load_model_config(cfg), **changes)


# The rows and the columns.


def test_the_demo_rows_are_the_same_for_the_same_seed() -> None:
    one, same, other = photographs(5, 1), photographs(5, 1), photographs(5, 2)
    assert [row["messages"] for row in one] == [row["messages"] for row in same]
    assert one[0]["images"][0].tobytes() == same[0]["images"][0].tobytes()
    assert one[0]["images"][0].tobytes() != other[0]["images"][0].tobytes()


def test_any_five_demo_rows_are_of_five_kinds() -> None:
    kinds = [
        (min(len(row["images"]), 2), len(row["videos"]), row["fps"] is None)
        for row in photographs(10)
    ]
    assert set(kinds[3:8]) == {
        (1, 0, True),
        (2, 0, True),
        (0, 1, False),
        (0, 0, True),
        (1, 1, False),
    }


@pytest.mark.parametrize("name", TRAINED)
def test_columns_fit_together(name: str) -> None:
    process = processing(name)
    merge = process.spec.spatial_merge_size**2
    for index, row in enumerate(photographs(5)):
        columns = process(row, index)
        types, ids = columns["mm_token_type_ids"], columns["input_ids"]
        for kind, grid, pixels in (
            (1, "image_grid_thw", "pixel_values"),
            (2, "video_grid_thw", "pixel_values_videos"),
        ):
            patches = columns[grid].prod(axis=1).sum()
            assert len(columns[pixels]) == patches
            assert (types == kind).sum() == patches // merge
        assert (columns["labels"][types > 0] == -100).all()
        assert (columns["labels"][types == 0] == ids[types == 0]).all()


def test_the_text_of_a_clip_is_timed_where_frames_stand_apart() -> None:
    row = photographs(5)[2]
    frames, fps = len(row["videos"][0]), row["fps"]
    apart = decoded(processing("qwen3_vl"), row)
    pairs = -(-frames // 2)
    times = [f"<{(2 * pair + 0.5) / fps:.1f} seconds>" for pair in range(pairs)]
    assert re.findall(r"<[\d.]+ seconds>", apart) == times
    assert apart.count("<|vision_start|><|video_pad|>") == pairs
    whole = decoded(processing("qwen2_vl"), row)
    assert whole.count("<|vision_start|><|video_pad|>") == 1
    assert "seconds" not in whole


def decoded(process: Processing, row: dict[str, Any]) -> str:
    return str(process.tokenizer.decode(process(row, 0)["input_ids"]))


def test_seconds_belong_to_the_family_that_reads_them() -> None:
    row = photographs(5)[2]
    assert "second_per_grid_ts" not in processing("qwen2_vl")(row, 0)
    assert processing("qwen2_5_vl")(row | {"fps": 3.0}, 0)["second_per_grid_ts"] == [2 / 3]
    assert processing("qwen2_5_vl", fps=5.0)(row | {"fps": None}, 0)["second_per_grid_ts"] == [0.4]


def test_a_clip_is_cut_as_its_frames_lie() -> None:
    """A patch holds both frames of its pair, one after another within each channel."""
    process = processing("qwen3_vl")
    frames = photographs(5)[2]["videos"][0][:3]
    row = {"messages": [{"role": "user", "content": [{"type": "video"}]}], "videos": [frames]}
    columns = process(row, 0)
    time, height, width = columns["video_grid_thw"][0]
    assert time == 2
    patches = columns["pixel_values_videos"].reshape(time, height * width, 3, 2, 16, 16)
    for place, frame in {(0, 0): 0, (0, 1): 1, (1, 0): 2, (1, 1): 2}.items():
        pixels = normalised(process, frames[frame], int(height) * 16, int(width) * 16)
        # Patches of a frame come block by block of 2 x 2, blocks in reading order.
        for number in range(height * width):
            block, corner = divmod(number, 4)
            top = 32 * (block // (width // 2)) + 16 * (corner // 2)
            left = 32 * (block % (width // 2)) + 16 * (corner % 2)
            expected = pixels[:, top : top + 16, left : left + 16]
            np.testing.assert_allclose(
                patches[place[0], number, :, place[1]], expected, rtol=0, atol=1e-6
            )


def normalised(process: Processing, frame: Any, height: int, width: int) -> np.ndarray:
    """Return a frame scaled and normalised with PIL and numpy alone, (3, height, width)."""
    from PIL import Image

    scaled = np.asarray(frame.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    processor = process.image_processor
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    pixels: np.ndarray = ((scaled / 255 - mean) / std).transpose(2, 0, 1)
    return pixels


def test_pixel_limits_reach_the_image_processor() -> None:
    row = photographs(5)[0]
    small = processing("qwen3_vl", min_pixels=1024, max_pixels=2048)(row, 0)
    assert 4 <= small["image_grid_thw"].prod() <= 8


def test_a_row_without_images_has_no_key_for_them() -> None:
    rows = load_run_rows(config())
    assert set(rows[3]) == {"input_ids", "attention_mask", "labels", "mm_token_type_ids"}
    assert rows[0]["pixel_values"].dtype == torch.float32
    assert rows[0]["image_grid_thw"].shape == (1, 3)


# The runs.


@pytest.mark.parametrize("name", TRAINED)
def test_losses_are_equal_and_only_the_switched_off_model_computes(name: str) -> None:
    on, off = runs(config(name))
    assert on.losses == off.losses
    assert (on.rope_index_calls, off.rope_index_calls) == (0, 2)
    assert [step.attached for step in (*on.steps, *off.steps)] == [True] * 2 + [False] * 2
    assert np.isfinite(on.losses).all()
    assert on.losses[0] != on.losses[1]


@pytest.mark.parametrize("name", ["demo", "qwen2_5_vl", "qwen3_5"])
def test_flattened_batches_have_the_losses_of_padded_ones(name: str) -> None:
    """With the stage off, the same batches are padded; the budget fills both alike."""
    keys = ["rope.packing=flatten", "rope.vision=true", "model.attach=true"]
    cfg = config(name, *keys, "dataloader.max_tokens=400", "train.steps=4")
    on, off = runs(cfg)
    assert on.losses == pytest.approx(off.losses, abs=PACKED_TOLERANCE)
    assert on.syncs == 0 and on.rope_index_calls == 0
    assert max(step.tokens for step in on.steps) <= 400
    console = silent()
    assert compare(cfg, console)
    assert "4 of 4 losses are equal within 0.0001" in printed(console)


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_batched_as_a_stream(workers: int) -> None:
    cfg = config(
        "demo",
        "rope.packing=flatten",
        f"dataloader={{max_tokens: 400, buffer_size: 6, num_workers: {workers}}}",
    )
    rows = load_run_rows(cfg)
    loader = make_loader(cfg, rows, build_collator(cfg))
    batches = endless(loader)
    lengths: list[int] = []
    while len(lengths) < len(rows):
        batch, _ = next(batches)
        assert batch["input_ids"].shape[1] <= 400
        lengths += batch["cu_seq_lens_q"].diff().tolist()
    # Every row once; then the loop goes on with the next epoch.
    assert sorted(lengths) == sorted(rows.lengths().tolist())
    next(batches)
    assert loader.dataset.epoch == 1  # type: ignore[attr-defined]


def test_a_model_that_is_not_attached_takes_batch_layout_from_the_loop() -> None:
    on, off = runs(config("demo", "rope.layout=batch", "model.attach=false"))
    assert on.losses == off.losses


def test_another_rule_gives_other_losses() -> None:
    """The comparison can fail: text after a clip has other positions under 4.57 than under 5.23."""
    console = silent()
    assert not compare(config("qwen2_vl", "rope.reference=transformers-4.57"), console)
    assert re.search(r"[01] of 2 losses are equal", printed(console))
    assert "no, by" in printed(console)


def test_the_closing_table() -> None:
    console = silent()
    assert compare(config(), console)
    text = printed(console)
    assert "2 of 2 losses are equal to the last bit" in text
    assert f"the loop's own process, pid {os.getpid()} (no workers)" in text
    assert "model.forward, 0 calls of get_rope_index" in text
    assert "model.forward, 2 calls of get_rope_index" in text
    assert "forward, median ms" in text


@pytest.mark.parametrize("name", ["demo", "qwen2_vl", "qwen3_vl_moe", "qwen3_5"])
def test_padded_text_batches_have_equal_losses(name: str, tmp_path: Path) -> None:
    """The model ignores the mask of such a batch; with padding on the right that makes no difference."""
    turns = ["Yes.", "A picture has two directions, and a film has three.", "No, not yet.", "So?"]
    lines = [{"messages": [{"role": "user", "content": turn}]} for turn in turns]
    file = jsonl(tmp_path, lines)
    on, off = runs(config(name, f"data.source={file}", "data.rows=null"))
    assert on.losses == off.losses
    assert off.rope_index_calls == 0


def jsonl(folder: Path, lines: list[dict[str, Any]]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_positions_come_from_workers() -> None:
    on, _ = runs(config("demo", "dataloader.num_workers=2", "dataloader.batch_size=2"))
    workers = {step.worker for step in on.steps}
    assert len(workers) == 2
    assert os.getpid() not in workers


PROBE = """
import sys

def collate(_):
    return [name for name in ("transformers", "pydantic", "mrope.training.demo") if name in sys.modules]
"""


def test_a_worker_imports_neither_transformers_nor_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    monkeypatch.syspath_prepend(str(tmp_path))
    collate = importlib.import_module("probe").collate
    cfg = config("demo", "dataloader.num_workers=1", "dataloader.persistent_workers=false")
    found, worker = next(iter(make_loader(cfg, load_run_rows(cfg), collate)))
    assert worker != os.getpid()
    assert found == []


def test_the_order_of_the_rows_is_the_seeds() -> None:
    rows = load_run_rows(config())

    def first(seed: int) -> torch.Tensor:
        cfg = config("demo", f"train.seed={seed}")
        batch, _ = next(iter(make_loader(cfg, rows, build_collator(cfg))))
        ids: torch.Tensor = batch["input_ids"]
        return ids

    assert torch.equal(first(0), first(0))
    assert first(0).shape != first(1).shape or not torch.equal(first(0), first(1))


def test_the_loop_is_plain_training_with_adamw() -> None:
    cfg = config("demo", "train.steps=3", "data.rows=12", "train.weight_decay=0.5")
    torch.manual_seed(0)
    model: Any = build_model(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.5)
    losses = []
    for batch, _ in make_loader(cfg, load_run_rows(cfg), build_collator(cfg)):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert train(cfg, silent()).losses == losses


def test_more_steps_than_batches_go_through_the_rows_again() -> None:
    result = train(config("demo", "train.steps=3", "data.rows=4"), silent())
    assert len(result.steps) == 3
    assert len({step.tokens for step in result.steps}) == 1


def test_a_step_is_logged_as_a_line(tmp_path: Path) -> None:
    compare(config("demo", f"train.log_file={tmp_path}/logs/run.jsonl"), silent())
    on, off = (
        [json.loads(line) for line in (tmp_path / f"logs/run.{end}.jsonl").read_text().splitlines()]
        for end in ("on", "off")
    )
    assert [line["step"] for line in on] == [1, 2]
    assert [line["loss"] for line in on] == [line["loss"] for line in off]
    assert [line["attached"] for line in (*on, *off)] == [True, True, False, False]


def test_bfloat16_trains_too() -> None:
    on, off = runs(config("demo", "train.dtype=bfloat16"))
    assert on.losses == off.losses


# Other data than the demo's.


def save_columns(cfg: Config, folder: Path, *without: str) -> Path:
    rows = load_run_rows(cfg)
    assert isinstance(rows, TensorRows)
    table = rows.columns.remove_columns(list(without))
    table.save_to_disk(str(folder))
    return folder


def test_a_saved_dataset_of_columns_trains_as_the_rows_that_it_was_made_of(tmp_path: Path) -> None:
    cfg = config()
    saved = save_columns(cfg, tmp_path / "columns")
    again = config("demo", f"data.source={saved}")
    assert train(again, silent()).losses == train(cfg, silent()).losses


def test_missing_token_types_are_made_from_the_ids(tmp_path: Path) -> None:
    cfg = config()
    saved = save_columns(cfg, tmp_path / "columns", "mm_token_type_ids")
    on, off = runs(config("demo", f"data.source={saved}"))
    assert on.losses == off.losses
    assert off.rope_index_calls == 2


def test_parquet_conversations_with_images_and_clips(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    photographs(10, 0).to_parquet(str(file))
    cfg = config("qwen2_5_vl", f"data.source={file}", "data.rows=8")
    assert len(load_run_rows(cfg)) == 8
    on, off = runs(cfg)
    assert on.losses == off.losses


def test_jsonl_conversations_with_paths_of_pictures(tmp_path: Path) -> None:
    photographs(1)[0]["images"][0].save(tmp_path / "a.png")
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    row = {"messages": [{"role": "user", "content": content}], "images": ["a.png"]}
    rows = load_run_rows(config("demo", f"data.source={jsonl(tmp_path, [row])}", "data.rows=null"))
    assert rows[0]["image_grid_thw"].shape == (1, 3)


CAT = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A cat?"}]}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"text": "hello"}, "columns text; a dataset needs input_ids and labels, or messages"),
        ({"input_ids": [1]}, "no labels"),
        ({"input_ids": [1], "labels": [1], "pixel_values": [[0.5]]}, "pixel_values but no image_g"),
        ({"messages": [CAT], "images": []}, "row 0 .* show 1 images, but its column holds 0"),
        ({"messages": [CAT], "images": ["gone.png"]}, "row 0 .*cannot read a picture: .*gone.png"),
        ({"messages": [CAT], "videos": ["a.mp4"]}, "video files are not decoded"),
    ],
)
def test_data_that_is_refused(line: dict[str, Any], words: str, tmp_path: Path) -> None:
    cfg = config("demo", f"data.source={jsonl(tmp_path, [line])}", "data.rows=null")
    with pytest.raises(MRopeError, match=words):
        load_run_rows(cfg)


def test_folders_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MRopeError, match="cannot be read"):
        load_run_rows(config("demo", f"data.source={tmp_path}"))
    splits = tmp_path / "splits"
    datasets.DatasetDict(train=photographs(1), test=photographs(1)).save_to_disk(str(splits))
    with pytest.raises(MRopeError, match="holds the splits train, test; name one of them"):
        load_run_rows(config("demo", f"data.source={splits}"))


def test_fewer_rows_than_a_batch() -> None:
    cfg = config("demo", "data.rows=3")
    with pytest.raises(MRopeError, match="batch_size is 4, but there are only 3 rows"):
        train(cfg, silent())


def test_a_tokenizer_of_another_model() -> None:
    with pytest.raises(
        MRopeError, match=r"has <\|image_pad\|> as 5, but the model's config says 7"
    ):
        load_run_rows(config("demo", "model.config.image_token_id=7"))
    with pytest.raises(MRopeError, match="has 512 entries, but vocab_size is 300"):
        load_run_rows(config("demo", "model.config.text_config.vocab_size=300"))


# Other models than the demo's.


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder as a user has it: weights, config, tokenizer, settings of the image processor."""
    folder = tmp_path / "model"
    torch.manual_seed(5)
    model: Any = build_model(config())
    model.save_pretrained(folder)
    process = processing("demo")
    process.tokenizer.save_pretrained(folder)
    process.image_processor.image_mean = [0.5, 0.5, 0.5]
    process.image_processor.save_pretrained(folder)
    return folder


def test_a_model_folder_gives_weights_tokenizer_and_image_processor(model_folder: Path) -> None:
    cfg = config("demo", f"model.config={model_folder}")
    torch.manual_seed(5)
    expected = build_model(config()).state_dict()
    loaded = build_model(cfg).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in expected.items())
    here = load_run_rows(cfg)[0]
    assert torch.equal(here["input_ids"], load_run_rows(config())[0]["input_ids"])
    assert not torch.equal(here["pixel_values"], load_run_rows(config())[0]["pixel_values"])
    on, off = runs(cfg)
    assert on.losses == off.losses


def test_a_config_json_alone_gives_random_weights(model_folder: Path) -> None:
    cfg = config("demo", f"model.config={model_folder / 'config.json'}")
    assert train(cfg, silent()).losses == train(config(), silent()).losses


def test_a_model_that_transformers_does_not_have() -> None:
    with pytest.raises(
        ConfigError, match="has no class for model_type 'aero_realtime'; train with"
    ):
        train(config("aero_realtime"), silent())


CARRIED = """
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

class AeroConfig(Qwen3VLConfig):
    model_type = "aero_realtime"

class Aero(Qwen3VLForConditionalGeneration):
    config_class = AeroConfig
"""


def test_a_folder_that_carries_its_class(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.dynamic_module_utils as dynamic

    cache = model_folder.parent / "modules"
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(str(cache))
    (model_folder / "modeling_aero.py").write_text(CARRIED)
    (model_folder / "model.safetensors").unlink()
    table = json.loads((model_folder / "config.json").read_text()) | {
        "model_type": "aero_realtime",
        "auto_map": {
            "AutoConfig": "modeling_aero.AeroConfig",
            "AutoModelForImageTextToText": "modeling_aero.Aero",
        },
    }
    (model_folder / "config.json").write_text(json.dumps(table))
    named = f"model.config={model_folder}"
    with pytest.raises(ConfigError, match=r"set model\.trust_remote_code: true to run that code"):
        train(config("demo", named), silent())
    unattached = ("model.attach=false", "rope.vision=false")
    on, off = runs(config("demo", named, "model.trust_remote_code=true", *unattached))
    assert on.losses == off.losses
    assert on.syncs > 0


def test_cuda_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MRopeError, match="torch sees no CUDA device"):
        train(config("demo", "train.device=cuda"), silent())


def test_the_demo_attaches_its_model_and_counts_the_syncs_of_both_runs() -> None:
    cfg = config("demo")
    assert cfg.model.attach
    console = silent()
    assert compare(cfg, console)
    (row,) = (line for line in printed(console).splitlines() if "host syncs in a step" in line)
    on, off = (int(cell) for cell in row.replace("┃", "│").split("│")[2:4])
    assert on == 0 < off

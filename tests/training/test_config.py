"""The training config: what is accepted, what is refused and in which words, and its collator."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mrope import MRopeCollator, MRopeError, build_collator, load_config, rope_index
from mrope.collate.padding import PaddingCollator
from mrope.collate.process_files import read_rejects
from mrope.collate.skip_bad import INDEX, RejectWarning
from mrope.spec.spec import example_config
from mrope.training.dataloader import make_loader
from mrope.training.sections import Config, ConfigError
from mrope.training.synthetic import SyntheticRows

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
REFERENCE = "transformers-5.23"


def write(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def minimal(folder: Path, *, model: Any = None, extra: str = "") -> Path:
    config = json.dumps(model or example_config("qwen3_vl"))
    rope = "" if "rope:" in extra else f"rope: {{reference: {REFERENCE}}}\n"
    return write(folder, f"model: {{config: {config}}}\n{rope}{extra}")


def message(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_gives_a_collator(name: str) -> None:
    cfg = load_config(CONFIGS / f"{name}.yaml")
    collate = build_collator(cfg)
    assert isinstance(collate, MRopeCollator)
    assert collate.spec.family == ("qwen3_vl" if name == "demo" else name)


def test_defaults(tmp_path: Path) -> None:
    cfg = load_config(minimal(tmp_path))
    assert (cfg.model.attn_implementation, cfg.data.source) == ("sdpa", "demo")
    assert (cfg.dataloader.start_method, cfg.rope.enabled) == ("spawn", True)


def test_all_problems_are_listed_at_once_with_key_value_and_what_is_allowed(tmp_path: Path) -> None:
    text = """
model: {config: {model_type: qwen3_vl}, attn_implementation: flash}
data: {sorce: demo}
dataloader: {batch_size: "4", num_workers: -1, start_method: spwan, pin_memory: 1}
rope: {enable: true, reference: transformers-5.22}
tran: {steps: 3}
trainer: 5
"""
    allowed = "'sdpa', 'eager' or 'flash_attention_2'"
    assert message(tmp_path, text).splitlines() == [
        f"{tmp_path}/run.yaml: 10 problems",
        f"  model.attn_implementation: must be {allowed}, not 'flash' (str)",
        "  data.sorce: unknown key (did you mean 'source'?); known: source, eval_source, shape, rows, "
        "processor, min_pixels, max_pixels, fps, loss, download",
        "  dataloader.batch_size: must be a valid integer, not '4' (str)",
        "  dataloader.num_workers: must be greater than or equal to 0, not -1 (int)",
        "  dataloader.pin_memory: must be a valid boolean, not 1 (int)",
        "  dataloader.start_method: must be 'spawn', 'fork' or 'forkserver', not 'spwan' (str)",
        "  rope.reference: must be one of auto, transformers-4.57, transformers-5.17, "
        "transformers-5.23 (did you mean 'transformers-5.23'?), not 'transformers-5.22'",
        "  rope.enable: unknown key (did you mean 'enabled'?); known: enabled, reference, vision, packing, layout, shapes, pad_to_multiple_of, on_error, rejects, max_rejects, max_rejects_in_a_row",
        "  trainer: must be a valid dictionary, not 5 (int)",
        "  tran: unknown key (did you mean 'trainer'?); known: model, data, dataloader, rope, "
        "trainer, peft",
    ]


def test_a_missing_key(tmp_path: Path) -> None:
    assert "  model: missing" in message(tmp_path, "trainer: {max_steps: 3}")
    assert "  model.config: missing" in message(tmp_path, "model: {}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1\nb: 2", "cannot be understood"),
        ("a: 1\na: 2", "duplicate key a"),
        ("- 1\n- 2", "cannot be understood"),
        ("model: ${oc.env:MROPE_NO_SUCH_VARIABLE}", "MROPE_NO_SUCH_VARIABLE"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, text: str, words: str) -> None:
    found = message(tmp_path, text)
    assert found.startswith(f"{tmp_path}/run.yaml: ")
    assert words in found


def test_no_file_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "gone.yaml")
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be understood"):
        load_config(tmp_path / "run.yaml")


def test_overrides_are_read_as_yaml(tmp_path: Path) -> None:
    file = minimal(tmp_path, extra="trainer: {max_steps: 7}")
    changes = ["rope.enabled=false", "trainer.learning_rate=1e-4", "dataloader.batch_size=2"]
    cfg = load_config(file, changes)
    assert (cfg.rope.enabled, cfg.dataloader.batch_size) == (False, 2)
    assert cfg.trainer == {"max_steps": 7, "learning_rate": 1e-4}


@pytest.mark.parametrize("override", ["rope.enabled", "=3", "rope..enabled=1", "[=3"])
def test_an_override_of_a_wrong_form(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"override .*: must be key\.of\.section=value"):
        load_config(minimal(tmp_path), [override])


def test_a_wrong_override_is_named_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal(tmp_path), ["rope.visio=3"])
    assert str(caught.value).startswith(f"{tmp_path}/run.yaml with rope.visio=3: 1 problem\n")
    assert "did you mean 'vision'?" in str(caught.value)


def test_relative_paths_start_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(example_config("qwen2_vl")))
    (tmp_path / "rows.jsonl").write_text("")
    text = """
model: {config: model}
data: {source: rows.jsonl, processor: model}
rope: {reference: transformers-5.23}
trainer: {output_dir: out, resume_from_checkpoint: out/checkpoint-3}
"""
    file = write(tmp_path, text)
    monkeypatch.chdir("/")
    cfg = load_config(file)
    assert cfg.model.config == str(tmp_path / "model")
    assert cfg.data.source == str(tmp_path / "rows.jsonl")
    assert cfg.data.processor == str(tmp_path / "model")
    assert cfg.trainer["output_dir"] == str(tmp_path / "out")
    assert cfg.trainer["resume_from_checkpoint"] == str(tmp_path / "out" / "checkpoint-3")
    assert cfg.spec().family == "qwen2_vl"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {config: Qwen/Qwen3-VL-4B}", "nothing is downloaded from a hub"),
        ("model: {config: 3}", "model.config: must be a mapping"),
        ("data: {source: gone}", "data.source: nothing at"),
        ("data: {source: run.yaml}", "data.source: cannot read run.yaml"),
        ("data: {processor: gone}", "data.processor: no folder at"),
    ],
)
def test_a_path_that_is_not_there(tmp_path: Path, text: str, words: str) -> None:
    assert words in message(tmp_path, text)


def test_a_config_cannot_be_changed(tmp_path: Path) -> None:
    cfg = load_config(minimal(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        cfg.peft = {}


def test_an_unknown_family_names_the_key(tmp_path: Path) -> None:
    cfg = load_config(minimal(tmp_path, model={"model_type": "qwen3_v"}))
    with pytest.raises(ConfigError, match=r"model\.config: unknown model_type 'qwen3_v'.*qwen3_vl"):
        build_collator(cfg)


def test_a_config_json_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    file = write(tmp_path, "model: {config: .}\nrope: {reference: transformers-5.23}")
    for switch in ("true", "false"):
        with pytest.raises(ConfigError, match=r"model\.config: "):
            build_collator(load_config(file, [f"rope.enabled={switch}"]))


def example() -> dict[str, Any]:
    # Ids of `example_config`: an image of 2 x 2 merged tokens between text.
    return {"input_ids": [7, 101, 102, 102, 102, 102, 8], "image_grid_thw": [[1, 4, 4]]}


def test_switched_on_it_attaches_what_rope_index_computes(tmp_path: Path) -> None:
    cfg = load_config(minimal(tmp_path))
    batch = build_collator(cfg)([example(), {"input_ids": [7]}])
    expected, deltas = rope_index(
        cfg.spec(), batch["input_ids"], batch["attention_mask"], batch["image_grid_thw"]
    )
    np.testing.assert_array_equal(batch["position_ids"], expected)
    np.testing.assert_array_equal(batch["rope_deltas"], deltas)


def test_switched_off_it_adds_nothing(tmp_path: Path) -> None:
    cfg = load_config(minimal(tmp_path), ["rope.enabled=false"])
    batch = build_collator(cfg)([example()])
    assert set(batch) == {"input_ids", "attention_mask", "image_grid_thw"}
    inner = PaddingCollator()
    assert build_collator(cfg, inner) is inner


def test_a_given_inner_collate_makes_the_batch(tmp_path: Path) -> None:
    def inner(_: Any) -> dict[str, Any]:
        return {"input_ids": torch.tensor([[7, 8]]), "mine": "kept"}

    batch = build_collator(load_config(minimal(tmp_path)), inner)(None)
    assert batch["mine"] == "kept"
    assert batch["position_ids"].shape == (3, 1, 2)


@pytest.mark.parametrize(
    ("keys", "pad"),
    [({"pad_token_id": 9}, 9), ({"text_config": {"pad_token_id": 8}}, 8), ({}, 0)],
)
def test_padding_takes_the_models_own_id(tmp_path: Path, keys: dict[str, Any], pad: int) -> None:
    cfg = load_config(minimal(tmp_path, model=example_config("qwen3_vl") | keys))
    batch = build_collator(cfg)([{"input_ids": [7, 7]}, {"input_ids": [7]}])
    assert batch["input_ids"].tolist() == [[7, 7], [7, pad]]


def test_the_collator_pickles(tmp_path: Path) -> None:
    collate = build_collator(load_config(minimal(tmp_path)))
    again = pickle.loads(pickle.dumps(collate))
    assert torch.equal(again([example()])["position_ids"], collate([example()])["position_ids"])


def test_neither_config_nor_collator_imports_transformers() -> None:
    code = (
        "import sys; from mrope import build_collator, load_config;"
        f"build_collator(load_config({str(CONFIGS / 'demo.yaml')!r}));"
        "assert not {'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_config_error_is_an_mrope_error() -> None:
    assert issubclass(ConfigError, MRopeError)
    assert set(Config.model_fields) == {
        "model",
        "data",
        "dataloader",
        "rope",
        "trainer",
        "peft",
    }


def test_an_attached_model_needs_the_vision_tensors(tmp_path: Path) -> None:
    file = minimal(tmp_path)
    cfg = load_config(file, ["model.attach=true", "rope.vision=true"])
    assert cfg.model.attach
    with pytest.raises(ConfigError, match=r"model.attach: true needs rope.vision: true"):
        load_config(file, ["model.attach=true"])
    load_config(file, ["model.attach=true", "rope.enabled=false"])  # the model computes for itself


def test_vision_tensors_are_switched_on_by_one_key() -> None:
    off = build_collator(load_config(CONFIGS / "qwen3_vl.yaml"))
    on = build_collator(load_config(CONFIGS / "qwen3_vl.yaml", ["rope.vision=true"]))
    assert isinstance(off, MRopeCollator)
    assert isinstance(on, MRopeCollator)
    assert off.vision is None
    assert on.vision is not None
    assert on.vision.table_side == 16


@pytest.mark.parametrize("file", sorted((CONFIGS / "bench").glob("*.yaml")), ids=lambda f: f.stem)
def test_the_bench_configs_are_valid_and_their_rows_fit(file: Path) -> None:
    cfg = load_config(file)
    assert cfg.data.shape is not None
    rows = SyntheticRows(cfg.spec(), cfg.data.shape, rows=1, patch_shape=(4,), dtype=torch.float32)
    batch = build_collator(load_config(file, ["rope.vision=true"]))([rows[0]])
    if cfg.rope.packing is None:
        assert batch["position_ids"].shape == (3, 1, cfg.data.shape.width)
        assert not batch["has_padding"]
    else:
        assert cfg.rope.shapes is not None
        assert batch["position_ids"].shape == (4, 1, cfg.rope.shapes.tokens[0])


def test_the_shape_of_synthetic_rows_is_checked(tmp_path: Path) -> None:
    file = minimal(tmp_path)
    with pytest.raises(ConfigError, match="data.shape is required with data.source: synthetic"):
        load_config(file, ["data.source=synthetic"])
    with pytest.raises(ConfigError, match="data.shape.widht: unknown key .did you mean 'width'"):
        load_config(file, ["data.source=synthetic", "data.shape.widht=3"])
    cfg = load_config(file, ["data.source=synthetic", "data.shape={width: 8, images: 1}"])
    assert cfg.data.shape is not None
    with pytest.raises(MRopeError, match="take 65 tokens, more than width=8"):
        SyntheticRows(cfg.spec(), cfg.data.shape, rows=1, patch_shape=(4,), dtype=torch.float32)
    with pytest.raises(
        ConfigError, match=r"image_sides: must be least and largest side, not \[4, 2"
    ):
        load_config(file, ["data.source=synthetic", "data.shape={width: 8, image_sides: [4, 2]}"])
    with pytest.raises(ConfigError, match="least_width: must be at most width=8, not 9"):
        load_config(file, ["data.source=synthetic", "data.shape={width: 8, least_width: 9}"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("dataloader.max_tokens=64", "dataloader.max_tokens needs rope.packing: flatten"),
        ("dataloader.buffer_size=64", "dataloader.buffer_size needs dataloader.max_tokens"),
        (
            "dataloader={max_tokens: 64, buffer_size: 8, balance: work}",
            "dataloader.balance needs the sampler: remove dataloader.buffer_size",
        ),
        ("rope.pad_to_multiple_of=8", "rope.pad_to_multiple_of needs rope.packing: flatten"),
        (
            "rope={packing: flatten, pad_to_multiple_of: 0}",
            "rope: pad_to_multiple_of must be at least 1, not 0",
        ),
        ("rope.packing=pack", "rope.packing: must be 'flatten', not 'pack'"),
        ("rope.layout=rows", "rope.layout: must be 'model' or 'batch', not 'rows'"),
    ],
)
def test_packing_keys_that_make_no_sense(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(CONFIGS / "demo.yaml", [override])


def test_packing_keys_reach_the_collator() -> None:
    keys = ["rope.packing=flatten", "rope.pad_to_multiple_of=8", "rope.layout=batch"]
    collate = build_collator(load_config(CONFIGS / "demo.yaml", keys))
    batch = collate([{"input_ids": [7, 8, 9]}, {"input_ids": [7]}])
    assert batch["position_ids"].shape == (1, 4, 8)
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 4, 8]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rope.on_error=ignore", "rope.on_error: must be 'raise' or 'skip', not 'ignore'"),
        ("rope.rejects=x.jsonl", "rope.rejects needs rope.on_error: skip"),
        ("rope.max_rejects=3", "rope.max_rejects needs rope.on_error: skip"),
        (
            "rope={on_error: skip, max_rejects: 1.0}",
            "rope: max_rejects must be a count .* or a share",
        ),
        (
            "rope={on_error: skip, max_rejects: -1}",
            "rope: max_rejects must be a count .* or a share",
        ),
        (
            "rope={on_error: skip, max_rejects: '3'}",
            "max_rejects.*must be a valid integer, not '3'",
        ),
    ],
)
def test_skipping_keys_that_make_no_sense(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(CONFIGS / "demo.yaml", [override])


@pytest.mark.parametrize("limit", [0, 7, 0.01])
def test_skipping_keys_reach_the_collator(tmp_path: Path, limit: float) -> None:
    file = tmp_path / "rejects.jsonl"
    keys = ["rope.on_error=skip", f"rope.rejects={file}", f"rope.max_rejects={limit}"]
    collate = build_collator(load_config(CONFIGS / "demo.yaml", keys))
    assert isinstance(collate, MRopeCollator) and collate.on_error is not None
    assert (collate.on_error.rejects, collate.on_error.max_rejects) == (str(file), limit)
    assert type(collate.on_error.max_rejects) is type(limit)


def test_dropped_rows_of_a_config_are_on_file_by_their_number(tmp_path: Path) -> None:
    keys = ["rope.on_error=skip", f"rope.rejects={tmp_path / 'rejects.jsonl'}"]
    cfg = load_config(CONFIGS / "demo.yaml", [*keys, "dataloader={num_workers: 0, batch_size: 3}"])
    rows: Any = [
        {"input_ids": [7, 8]},
        {"input_ids": [7, cfg.spec().image_token_id]},
        {"input_ids": [9]},
    ]
    with pytest.warns(RejectWarning, match="has no grid"):
        (batch,) = make_loader(cfg, rows, build_collator(cfg))
    assert len(batch["input_ids"]) == 2 and INDEX not in batch
    (record,) = read_rejects(tmp_path / "rejects.jsonl")
    assert record["index"] == 1

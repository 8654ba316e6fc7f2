"""verl's own SFT trainer on the CPU, and the positions of its dataset's rows, with and without ours.

A process of its own: verl replaces methods of transformers' classes for good.
"""

from __future__ import annotations

import importlib
import io
import json
import re
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image
from transformers import AutoProcessor

from integration.common import BATCH, build_processor
from mrope import MRopeError
from mrope.hf import SyncReport, attach
from mrope.hf.get_rope_index import reference_rope_index
from support.guides import MODEL, make_workspace
from support.models import model_config, tiny_examples, tiny_model, tiny_spec

REASON = "verl cannot be imported: needs verl 0.9.1 and transformers 5.9.0"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # engines that are not installed
    sft_trainer: Any = pytest.importorskip(
        "verl.trainer.sft_trainer", reason=REASON, exc_type=ImportError
    )
    theirs: Any = importlib.import_module("verl.utils.dataset.multiturn_sft_dataset")
    platform: Any = importlib.import_module("verl.plugin.platform")
    tensordict_utils: Any = importlib.import_module("verl.utils.tensordict_utils")
    hydra: Any = importlib.import_module("hydra")

PAGE = Path(__file__).parents[2] / "docs" / "frameworks.md"
STEPS, WATCHED = 4, 2
IMAGES, CLIPS = {"images": True, "videos": False}, {"images": False, "videos": True}
# What is to be seen of the rows of verl's own dataset: whether they are transformers' 5.9.
EXPECTED = {
    ("qwen2_vl", "images"): "equal",
    ("qwen2_vl", "clips"): "other",  # twice the time
    ("qwen2_5_vl", "images"): "equal",
    ("qwen2_5_vl", "clips"): "other",  # a rule of its own
    ("qwen3_vl", "images"): "equal",
    ("qwen3_vl", "clips"): "IndexError",
    ("qwen3_5", "images"): "equal",
    ("qwen3_5", "clips"): "IndexError",
    ("glm4v", "images"): "1-D",
    ("glm46v", "images"): "1-D",
}
pytestmark = pytest.mark.filterwarnings("ignore")


# The rows of the dataset --------------------------------------------------------------------------


@pytest.fixture
def _processed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the dataset take rows that a processor has made, in place of files with messages."""

    def begin(dataset: Any, rows: Any, tokenizer: Any, config: Any, processor: Any) -> None:
        dataset.rows, dataset.tokenizer, dataset.processor = rows, tokenizer, processor
        dataset.dataframe = pd.DataFrame({"number": range(len(rows))})
        dataset.tools = dataset.enable_thinking = dataset.enable_thinking_default = None
        dataset.pad_mode, dataset.max_length = config.pad_mode, config.max_length
        dataset.truncation = "error"

    def process(_dataset: Any, message: dict[str, Any], **_: Any) -> Any:
        media = {name: torch.as_tensor(np.asarray(value)) for name, value in message.items()}
        ids = media.pop("input_ids")
        media.pop("labels", None)
        return ids, torch.ones_like(ids), torch.ones_like(ids), media

    kind = theirs.MultiTurnSFTDataset
    monkeypatch.setattr(kind, "__init__", begin)
    monkeypatch.setattr(kind, "_build_messages", lambda self, row: [self.rows[row["number"]]])
    monkeypatch.setattr(kind, "_process_single_message", process)
    monkeypatch.setattr(kind, "sanity_check", lambda *_: None)
    monkeypatch.setattr(theirs, "print_assembled_message", lambda *_: None)


def numbered(kind: Any, family: str, examples: list[dict[str, Any]], **options: Any) -> Any:
    """The dataset over examples of a family, whose config lies in the current folder."""
    config = model_config(family)
    Path("config.json").write_text(json.dumps(config))
    special = {
        "<|image_pad|>": config["image_token_id"],
        "<|video_pad|>": config["video_token_id"],
        "<|vision_start|>": config.get("vision_start_token_id"),
    }
    # verl decides by the class's name, and its own rule asks for the rest.
    name = "Glm4vImageProcessor" if "glm" in family else "Qwen2VLImageProcessor"
    processor = SimpleNamespace(
        image_processor=type(name, (), {"merge_size": 2})(),
        tokenizer=SimpleNamespace(convert_tokens_to_ids=special.__getitem__),
    )
    tokenizer = SimpleNamespace(name_or_path=str(Path.cwd()), pad_token_id=0)
    section = {"pad_mode": "no_padding", "max_length": 4096, "custom_cls": {}}
    return kind(examples, tokenizer, OmegaConf.create({**section, **options}), processor=processor)


def transformers_own(family: str, example: dict[str, Any]) -> torch.Tensor:
    """The positions of transformers' model, int64 (3, S)."""
    spec, ids = tiny_spec(family), np.asarray(example["input_ids"])[None]
    types = np.select([ids == spec.image_token_id, ids == spec.video_token_id], [1, 2], 0)
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "mm_token_type_ids": types}
    media = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    given |= {name: np.asarray(example[name]) for name in media if name in example}
    return torch.as_tensor(reference_rope_index(spec, given)[0][:, 0])


def seen(dataset: Any, family: str, examples: list[dict[str, Any]]) -> str:
    """What the rows of a dataset are, compared with transformers' own."""
    equal = []
    for number, example in enumerate(examples):
        try:
            found = dataset[number]["position_ids"]
        except IndexError:
            return "IndexError"
        if found.ndim == 1:
            return "1-D"
        assert found[0].tolist() == list(range(len(found[0])))
        equal.append(torch.equal(found[1:], transformers_own(family, example)))
    return "equal" if all(equal) else "other"


@pytest.mark.usefixtures("_processed")
@pytest.mark.parametrize(("family", "media"), EXPECTED)
def test_rows_have_the_positions_of_the_model(
    family: str, media: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mrope.transforms import verl

    monkeypatch.chdir(tmp_path)
    examples = tiny_examples(family, rows=6, **(IMAGES if media == "images" else CLIPS))
    examples = [one for one in examples if any("grid" in name for name in one)]
    assert len(examples) > 2
    own = numbered(theirs.MultiTurnSFTDataset, family, examples)
    assert seen(own, family, examples) == EXPECTED[family, media]
    assert seen(numbered(verl.MultiTurnSFTDataset, family, examples), family, examples) == "equal"


@pytest.mark.usefixtures("_processed")
def test_padded_rows_are_as_verl_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mrope.transforms import verl

    monkeypatch.chdir(tmp_path)
    examples = tiny_examples("qwen3_vl", rows=6, **IMAGES)
    own, ours = (
        numbered(kind, "qwen3_vl", examples, pad_mode="right", max_length=64)
        for kind in (theirs.MultiTurnSFTDataset, verl.MultiTurnSFTDataset)
    )
    for number, example in enumerate(examples):
        count = len(example["input_ids"])
        wanted, found = own[number]["position_ids"], ours[number]["position_ids"]
        assert found.shape == wanted.shape == (4, 64)
        assert torch.equal(found[:, :count], wanted[:, :count])


# Training -----------------------------------------------------------------------------------------


class Host(platform.PlatformRegistry.get("nvidia")):  # type: ignore[misc]
    """verl's platform of CUDA, on the CPU."""

    device_name = "cpu"
    device_module = SimpleNamespace(
        **vars(torch.cpu),
        get_device_name=lambda: "H100",
        mem_get_info=lambda: (0, 0),
        **{
            f"{most}memory_{kind}": lambda: 0
            for most in ("", "max_")
            for kind in ("allocated", "reserved")
        },
    )

    def current_device(self) -> str:
        return "cpu"

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def empty_cache(self) -> None:
        pass


@pytest.fixture
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    make_workspace(tmp_path, monkeypatch)
    write_rows()
    processor = build_processor("demo")
    # verl looks at the name of the class.
    processor.__class__ = type("Qwen3VLProcessor", (type(processor),), {})
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    monkeypatch.setattr(theirs, "process_image", lambda image, **_: opened(image))
    monkeypatch.setattr(sft_trainer, "aggressive_empty_cache", lambda **_: None)
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    # Engines are registered for CUDA and NPUs.
    for name, value in {**ranks, "MASTER_PORT": free_port(), "VERL_ENGINE_DEVICE": "cuda"}.items():
        monkeypatch.setenv(name, value)
    platform.set_platform(Host())
    torch.distributed.init_process_group("gloo")
    yield
    torch.distributed.destroy_process_group()


def write_rows() -> None:
    """Write the guides' rows with images as verl reads them. It cannot mix in rows of text."""
    rows = []
    for row in datasets.load_from_disk("train"):
        files = [io.BytesIO() for _ in row["images"]]
        for image, file in zip(row["images"], files, strict=True):
            image.save(file, "PNG")
        turns = [{"role": turn["role"], "content": text_of(turn)} for turn in row["messages"]]
        if files:
            images = [{"bytes": file.getvalue()} for file in files]
            rows.append({"messages": turns, "images": images})
    pd.DataFrame(rows).to_parquet("train.parquet")


def text_of(turn: dict[str, Any]) -> str:
    items = turn["content"]
    return "".join("<image>" if one["type"] == "image" else one["text"] for one in items)


def opened(image: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(image["bytes"])).convert("RGB")


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def train(*lines: str) -> tuple[list[float], SyncReport, Any]:
    """Train by verl's SFT trainer and its config; its losses, syncs, and the trainer."""
    precision = "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}"
    overrides = [
        f"model.path={Path(MODEL).resolve()}",
        "+model.override_config.attn_implementation=sdpa",
        "model.enable_gradient_checkpointing=False",
        "engine.strategy=fsdp2",
        "engine.use_torch_compile=False",
        f"+engine.mixed_precision={precision}",
        "data.train_files=train.parquet",
        f"data.train_batch_size={BATCH}",
        f"data.micro_batch_size_per_gpu={BATCH}",
        "data.use_dynamic_bsz=False",
        "data.num_workers=2",
        "data.ignore_input_ids_mismatch=True",
        "trainer.device=cpu",
        "trainer.logger=[]",
        "trainer.resume_mode=disable",
        f"trainer.total_training_steps={STEPS}",
        *lines,
    ]
    folder = Path(sft_trainer.__file__).parent / "config"
    with hydra.initialize_config_dir(str(folder), version_base=None):
        trainer = sft_trainer.SFTTrainer(hydra.compose("sft_trainer_engine", overrides=overrides))
    own, losses, syncs = trainer.training_client.train_batch, [], SyncReport(WATCHED, 1, quiet=True)

    def watched(data: Any) -> Any:
        result = own(data=data)
        losses.append(tensordict_utils.get(result, "metrics")["loss"])
        syncs.step()
        return result

    trainer.training_client.train_batch = watched
    trainer.ckpt_handler.save_checkpoint = lambda **_: None
    with syncs:
        trainer.fit()
    assert len(losses) == len(set(losses)) == STEPS and syncs.watched == WATCHED
    return losses, syncs, trainer


def lines_of_the_page() -> list[str]:
    """The overrides of the YAML that the page tells its readers to write."""
    (block,) = re.findall(r"```yaml\n(data:.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)
    section = yaml.safe_load(block)["data"]["custom_cls"]
    return [f"data.custom_cls.{name}={value}" for name, value in section.items()]


@pytest.mark.usefixtures("_on_the_cpu")
def test_losses_are_equal_and_syncs_stay() -> None:
    off, before, _ = train()
    on, after, trainer = train(*lines_of_the_page())
    assert type(trainer.train_dataset).__module__ == "mrope.transforms.verl"
    assert on == off
    assert before.by_kind()["model"] == after.by_kind()["model"] > 0
    with pytest.raises(
        MRopeError, match=r"Qwen3VLModel\.forward is `qwen3_vl_base_forward` of verl"
    ):
        attach(tiny_model("qwen3_vl"))

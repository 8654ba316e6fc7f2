"""NeMo Automodel's own recipe by a YAML, with the stage off, on, and with an attached model.

Automodel 0.7 pins transformers 5.18: `make peers` sets its environment up. It asks torch for a CUDA
device in six places; those are replaced here, and its models are built on the CPU.
"""

from __future__ import annotations

import json
import logging
import os
import re
import runpy
import socket
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.multiprocessing as mp
import yaml

from integration.common import BATCH, STEPS, build_processor, count_own_positions
from mrope import MRopeError
from mrope.hf import SyncReport
from support.guides import MODEL, make_workspace

finetune: Any = pytest.importorskip(
    "nemo_automodel.recipes.vlm.finetune",
    reason="nemo_automodel cannot be imported: needs NeMo Automodel 0.7.0 and transformers 5.18",
    exc_type=ImportError,
)

PAGE = Path(__file__).parents[2] / "docs" / "frameworks.md"
WATCHED = 2
# Automodel's own calls of what others deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")


def processor(family: str) -> Any:
    return build_processor(family)


def conversations(folder: str) -> list[dict[str, Any]]:
    """The rows of the guides, with each image within its message, as Automodel's datasets have."""
    made = []
    for row in datasets.load_from_disk(folder):
        images = iter(row["images"])
        made.append(
            [
                {
                    "role": turn["role"],
                    "content": [with_image(item, images) for item in turn["content"]],
                }
                for turn in row["messages"]
            ]
        )
    return [{"conversation": conversation} for conversation in made]


def with_image(item: dict[str, Any], images: Iterator[Any]) -> dict[str, Any]:
    return {"type": "image", "image": next(images)} if item["type"] == "image" else dict(item)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    place_on_the_cpu(monkeypatch)
    make_workspace(tmp_path, monkeypatch)
    yield
    logging.disable(logging.NOTSET)


def place_on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    from nemo_automodel._transformers import auto_model

    logging.disable()
    cpu = torch.device("cpu")
    build, barrier = auto_model.apply_model_infrastructure, torch.distributed.barrier
    begin, move = finetune.initialize_distributed, finetune._move_to_device
    replaced: list[tuple[Any, str, Any]] = [
        (torch.cuda, "reset_peak_memory_stats", lambda: None),
        (torch.cuda, "max_memory_allocated", lambda: 0),
        (torch.cuda, "current_device", lambda: 0),
        (torch.distributed, "barrier", lambda group=None, **_: barrier(group)),
        (
            auto_model,
            "apply_model_infrastructure",
            lambda **given: build(**given | {"device": cpu}),
        ),
        (finetune, "initialize_distributed", lambda **given: replace(begin(**given), device=cpu)),
        # A copy to a CUDA device is contiguous, and its loss relies on that.
        (finetune, "_move_to_device", lambda value, to: contiguous(move(value, to))),
        (finetune, "setup_logging", lambda: None),
    ]
    for owner, name, value in replaced:
        patch.setattr(owner, name, value)


def contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, torch.Tensor) else value


def recipe(*changes: dict[str, Any]) -> dict[str, Any]:
    """The YAML's content, with the stage off; sections of `changes` are updated in it."""
    made: dict[str, Any] = {
        "recipe": "nemo_automodel.recipes.vlm.finetune.FinetuneRecipeForVLM",
        "step_scheduler": {
            "global_batch_size": BATCH,
            "local_batch_size": BATCH,
            "max_steps": STEPS,
            "num_epochs": 3,
        },
        "dist_env": {"backend": "gloo"},
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForImageTextToText.from_pretrained",
            "pretrained_model_name_or_path": MODEL,
            "torch_dtype": "float32",
            "attn_implementation": "sdpa",
            "use_liger_kernel": False,
        },
        "checkpoint": {"enabled": False, "checkpoint_dir": "checkpoints"},
        "distributed": {"strategy": "fsdp2"},
        "loss_fn": {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"},
        "processor": {"_target_": "integration.test_nemo.processor", "family": "demo"},
        "dataset": {"_target_": "integration.test_nemo.conversations", "folder": "train"},
        "dataloader": {"num_workers": 2},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-3},
    }
    for change in changes:
        for name, section in change.items():
            made[name] = {**made[name], **section} if isinstance(section, dict) else section
    return made


def lines_of_the_page() -> dict[str, Any]:
    """The YAML that the page tells its readers to write."""
    (block,) = re.findall(r"```yaml\n(recipe:.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)
    lines: dict[str, Any] = yaml.safe_load(block)
    return lines


def _run_rank(rank: int, contents: list[dict[str, Any]], port: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        for name, value in {"MASTER_ADDR": "127.0.0.1", **ranks}.items():
            patch.setenv(name, str(value))
        warnings.simplefilter("ignore")
        place_on_the_cpu(patch)
        runs = [run(content, patch) for content in contents]
    if rank == 0:
        found = [(one.losses, one.model_syncs()) for one in runs]
        Path("result.json").write_text(json.dumps(found))


def run_two_ranks(contents: list[dict[str, Any]]) -> Any:
    """Run recipes on two gloo ranks, over which FSDP2 shards the model; losses and syncs."""
    for content in contents:
        content["step_scheduler"]["global_batch_size"] = 2 * BATCH
        # Workers of a spawned process would import Automodel anew, for half a minute.
        content["dataloader"]["num_workers"] = 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn: Any = mp.spawn  # type: ignore[attr-defined]
    spawn(_run_rank, (contents, port), nprocs=2)
    return json.loads(Path("result.json").read_text())


def write(content: dict[str, Any]) -> str:
    file = Path(f"train-{os.getpid()}.yaml")  # ranks write at the same time
    file.write_text(yaml.safe_dump(content))
    return str(file)


class Watch:
    """What a run of a recipe did: its losses, its syncs, and how often it computed positions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.losses: list[float] = []
        self.syncs = SyncReport(WATCHED, 2, quiet=True)
        self.calls = [0]
        setup, step = (
            finetune.FinetuneRecipeForVLM.setup,
            finetune.FinetuneRecipeForVLM._run_train_optim_step,
        )

        def set_up(made: Any) -> None:
            setup(made)
            self.calls = count_own_positions(made.model_parts[0])

        def watched(made: Any, *args: Any) -> Any:
            result = step(made, *args)
            self.losses.append(result.metrics["loss"])
            self.syncs.step()
            return result

        monkeypatch.setattr(finetune.FinetuneRecipeForVLM, "setup", set_up)
        monkeypatch.setattr(finetune.FinetuneRecipeForVLM, "_run_train_optim_step", watched)

    def model_syncs(self) -> float:
        return self.syncs.by_kind().get("model", 0) / WATCHED

    def copies(self) -> int:
        return sum(n for one, n in self.syncs.places.items() if one.function == "_move_to_device")


def run(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Run a recipe as Automodel's launcher does in one process."""
    from nemo_automodel.components.config._arg_parser import parse_args_and_load_config
    from nemo_automodel.components.launcher.interactive import resolve_recipe_cls

    with monkeypatch.context() as patch:
        watch = Watch(patch)
        made = resolve_recipe_cls(content["recipe"])(
            parse_args_and_load_config(write(content), argv=[])
        )
        made.setup()
        with watch.syncs:
            made.run_train_validation_loop()
    assert len(watch.losses) == len(set(watch.losses)) == STEPS
    assert watch.syncs.watched == WATCHED
    return watch


def test_losses_are_equal_and_syncs_go(monkeypatch: pytest.MonkeyPatch) -> None:
    page = lines_of_the_page()
    off = run(recipe(), monkeypatch)
    on = run(recipe({"dataloader": page["dataloader"]}), monkeypatch)
    attached = run(recipe(page), monkeypatch)
    assert on.losses == off.losses
    assert attached.losses == off.losses
    assert off.calls[0] > 0 and on.calls == attached.calls == [0]
    assert off.model_syncs() > on.model_syncs() > attached.model_syncs() == 0
    assert off.copies() > 0 and attached.copies() == 0


def test_an_attached_model_is_sharded() -> None:
    (losses, syncs), attached = run_two_ranks([recipe(), recipe(lines_of_the_page())])
    assert syncs > 0
    assert attached == [losses, 0]


def test_the_file_of_the_recipe_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The `automodel` command runs it by torchrun where there are several GPUs."""
    from mrope.transforms import nemo

    watch = Watch(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["nemo.py", "-c", write(recipe(lines_of_the_page()))])
    with watch.syncs:
        runpy.run_path(str(nemo.__file__), run_name="__main__")
    assert len(watch.losses) == STEPS and watch.calls == [0]
    assert watch.model_syncs() == 0


def test_a_model_of_automodel_s_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_automodel.components.models.qwen3_5.model import Qwen3_5ForConditionalGeneration
    from transformers import AutoConfig

    from mrope.hf import attach
    from support.models import model_config

    config = dict(model_config("qwen3_5"))
    live = AutoConfig.for_model(config.pop("model_type"), **config)
    with pytest.raises(MRopeError, match=r"Qwen3_5Model\.forward is `forward` of nemo_automodel"):
        attach(Qwen3_5ForConditionalGeneration(live))

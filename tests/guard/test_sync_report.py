"""`SyncReport`: what it counts, by part of the loop; when it watches; what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import _global_optimizer_pre_hooks
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from transformers import Trainer, TrainingArguments

from mrope import MRopeCollator, MRopeError, VisionSpec
from mrope.collate.padding import PaddingCollator
from mrope.guard import cuda_debug
from mrope.guard.calls import outer_calls
from mrope.guard.sync_places import find_place
from mrope.hf import SyncReport, attach
from support.models import model_config, tiny_examples, tiny_model, tiny_spec

FAMILY, STEPS, WARMUP = "qwen3_vl", 3, 2
RECIPE: dict[str, Any] = {
    "accelerator_config": {"non_blocking": True},
    "logging_nan_inf_filter": False,
}
CPU = torch.device("cpu")


def collator() -> MRopeCollator:
    return MRopeCollator(None, tiny_spec(FAMILY), VisionSpec.from_config(model_config(FAMILY)))


def report(**options: Any) -> SyncReport:
    return SyncReport(STEPS, WARMUP, **{"quiet": True, **options})


def train(watch: SyncReport, folder: Path, *, attached: bool = True, **options: Any) -> SyncReport:
    """Train with transformers' Trainer and the report as a callback."""
    model = tiny_model(FAMILY).train()
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": WARMUP + STEPS + 1,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        # Not `use_cpu`: it turns `dataloader_pin_memory` off.
    }
    Trainer(
        model=attach(model) if attached else model,
        args=TrainingArguments(**{**arguments, **options}),
        train_dataset=tiny_examples(FAMILY, rows=4),
        data_collator=collator() if attached else PaddingCollator(),
        callbacks=[watch],
    ).train()
    return watch


def tensors_per_step() -> int:
    batch = collator()(tiny_examples(FAMILY, rows=2))
    return sum(isinstance(value, torch.Tensor) for value in batch.values())


def test_the_trainer_copies_and_filters_by_default(tmp_path: Path) -> None:
    watch = train(report(), tmp_path)
    assert watch.judge == "guard"
    assert watch.watched == STEPS
    kinds = watch.by_kind()
    assert kinds["trainer"] == 2 * STEPS  # isnan and isinf
    assert kinds.keys() == {"copy", "trainer"}
    assert kinds["copy"] >= STEPS * (tensors_per_step() - 2)
    advice = {place.kind: place.advice for place in watch.places}
    assert "non_blocking" in advice["copy"]
    assert advice["trainer"] == "logging_nan_inf_filter=False"


def test_the_recipe_leaves_nothing(tmp_path: Path) -> None:
    watch = train(report(), tmp_path, **RECIPE)
    assert (watch.watched, watch.count) == (STEPS, 0)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"dataloader_pin_memory": False}, "dataloader_pin_memory=True"),
        ({"use_cpu": True}, "no use_cpu=True, which turns pinning off"),
    ],
)
def test_copies_of_pageable_memory_stay(
    options: dict[str, Any], advice: str, tmp_path: Path
) -> None:
    watch = train(report(), tmp_path, **RECIPE, **options)
    assert watch.by_kind().keys() == {"copy"}
    assert {place.advice for place in watch.places} == {advice}


def test_the_model_is_told_from_the_rest(tmp_path: Path) -> None:
    kinds = train(report(), tmp_path, attached=False).by_kind()
    assert kinds["model"] > 20 * STEPS
    assert kinds["trainer"] == 2 * STEPS


def test_settings_that_read_at_each_step_are_named(tmp_path: Path) -> None:
    options: dict[str, Any] = {"logging_steps": 1, "include_num_input_tokens_seen": "non_padding"}
    watch = train(report(), tmp_path, **RECIPE, **options)
    assert {place.function: place.advice for place in watch.places} == {
        "_maybe_log_save_evaluate": "a larger logging_steps",
        "_track_num_input_tokens": 'include_num_input_tokens_seen="no"',
    }
    # Loss and norm; the sum of one process is read once.
    assert watch.per_step == 3


def test_a_step_is_an_optimizer_step(tmp_path: Path) -> None:
    watch = train(report(), tmp_path, gradient_accumulation_steps=2)
    assert watch.watched == STEPS
    assert watch.by_kind()["trainer"] == 2 * 2 * STEPS


def test_training_that_is_too_short_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = SyncReport(steps=50, warmup=WARMUP)
    train(watch, tmp_path, max_steps=WARMUP + 1)
    assert watch.watched == 1
    assert "syncs in 1 optimizer step, " in capsys.readouterr().out
    assert train(report(), tmp_path, max_steps=1).judge is None
    assert (
        str(train(report(), tmp_path, max_steps=1)) == "no step watched: 1 step, 2 of them warm-up"
    )


def test_a_second_run_counts_anew(tmp_path: Path) -> None:
    watch = report()
    first = train(watch, tmp_path).as_dict()
    assert train(watch, tmp_path).as_dict() == first


class Net(torch.nn.Module):
    """A model whose forward syncs once, if asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.reads = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x).mean()
        if self.reads:
            out.item()
        return out


def loop(watch: SyncReport, net: Net, *, pin: bool, fails_at: int | None = None) -> None:
    optimizer = torch.optim.AdamW(net.parameters())
    rows: Any = [torch.ones(3)] * 40
    loader: Any = DataLoader(rows, batch_size=4, pin_memory=pin)
    with watch:
        for number, batch in enumerate(loader):
            x = batch.to(CPU, non_blocking=True)
            net(x).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if number == fails_at:
                raise ValueError("stop")
            watch.step()


def test_a_plain_loop_with_pinned_memory_has_none() -> None:
    watch = report()
    loop(watch, Net(), pin=True)
    assert (watch.watched, watch.count) == (STEPS, 0)


def test_a_plain_loop_shows_its_copies_and_its_model() -> None:
    watch, net = report(), Net()
    net.reads = True
    loop(watch, net, pin=False)
    assert {(place.kind, place.op): n for place, n in watch.places.items()} == {
        ("loop", "copy to the device"): STEPS,
        ("model", "scalar read"): STEPS,
    }
    assert all(place.file == __file__ for place in watch.places)


def test_without_warm_up_all_is_watched() -> None:
    watch = SyncReport(STEPS, warmup=0, quiet=True)
    loop(watch, Net(), pin=False)
    assert (watch.watched, watch.count) == (STEPS, STEPS)


def patched() -> tuple[Any, ...]:
    """Return what a watch replaces while it runs."""
    kind = _BaseDataLoaderIter
    return kind.__init__, kind.__next__, getattr(torch.autograd, "_engine_run_backward")  # noqa: B009


@pytest.mark.parametrize("fails_at", [0, WARMUP + 1])
def test_nothing_stays_on_when_the_loop_raises(
    fails_at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    own = patched()
    watch = SyncReport(STEPS, WARMUP)
    with pytest.raises(ValueError, match="stop"):
        loop(watch, Net(), pin=False, fails_at=fails_at)
    assert capsys.readouterr().out == ""
    assert outer_calls() is None
    assert patched() == own
    assert torch.ones(1).device == CPU
    assert not _global_optimizer_pre_hooks


class FakeCuda:
    """torch.cuda's debug mode, which a test sets off by a warning."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mode: Any = 1
        monkeypatch.setattr(cuda_debug, "is_used", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set)

    def set(self, mode: Any) -> None:
        self.mode = mode


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def sync() -> None:
    import warnings

    warnings.warn("called a synchronizing CUDA operation", stacklevel=2)


@pytest.mark.filterwarnings("ignore:called a synchronizing")
def test_cuda_s_own_mode_reports_and_is_set_back(cuda: FakeCuda) -> None:
    with report() as watch:
        for _ in range(WARMUP + STEPS + 1):
            sync()
            watch.step()
            assert cuda.mode == ("warn" if WARMUP <= watch._done < WARMUP + STEPS else 1)
    assert (watch.judge, watch.count) == ("cuda", STEPS)
    ((place, _),) = watch.places.items()
    assert (place.kind, place.function, place.op) == ("loop", "sync", "CUDA synchronizes")


@pytest.mark.filterwarnings("ignore:called a synchronizing")
def test_cuda_s_mode_is_set_back_when_the_loop_raises(cuda: FakeCuda) -> None:
    watch, modes = report(), []

    def loop_that_raises() -> None:
        with watch:
            for _ in range(WARMUP + 1):
                watch.step()
                modes.append(cuda.mode)
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        loop_that_raises()
    assert modes == [1, "warn", "warn"]
    assert cuda.mode == 1


def test_json_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "made" / "syncs.json"
    watch = SyncReport(STEPS, WARMUP, json_file=file)
    loop(watch, Net(), pin=False)
    data = json.loads(file.read_text("utf-8"))
    assert data["by_kind"] == {"loop": STEPS}
    assert data["per_step"] == 1
    assert data["places"][0]["count"] == STEPS
    printed = capsys.readouterr().out
    assert "3 syncs in 3 optimizer steps, by the guard on a CPU" in printed
    assert str(watch).splitlines()[-1] == watch._title()


def test_advice_stands_whole_below_a_table_of_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    watch = SyncReport(STEPS, WARMUP)
    train(watch, tmp_path, attached=False)
    printed = capsys.readouterr().out
    below = " ".join(printed[printed.rindex("┘") :].split())
    for advice in {place.advice for place in watch.places}:
        assert f": {advice}" in below


@pytest.mark.parametrize(("steps", "warmup"), [(0, 3), (1, -1)])
def test_counts_that_make_no_sense(steps: int, warmup: int) -> None:
    with pytest.raises(MRopeError, match="steps must be at least 1 and warmup 0"):
        SyncReport(steps, warmup)


def place_of(*frames: tuple[str, str]) -> tuple[str, str]:
    place = find_place("?", [(file, 7, function) for file, function in frames])
    return place.kind, place.advice


def test_places_are_told_by_the_innermost_known_frame() -> None:
    torch_module = ("site/torch/nn/modules/module.py", "_call_impl")
    epoch = ("site/transformers/trainer.py", "_run_epoch")
    assert place_of(epoch)[1] == "logging_nan_inf_filter=False"
    assert place_of(("mine.py", "forward"), torch_module, epoch)[0] == "model"
    assert place_of(("mine.py", "on_step_end"), epoch) == ("trainer", "")
    assert place_of(("mine.py", "main")) == ("loop", "")
    assert place_of(("c:\\site\\torch\\optim\\adam.py", "step"), epoch)[1].endswith("fused=True")

"""What a new user meets first: one line for each fault, and nothing loaded that is not needed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mrope import MRopeError
from mrope.check import slow_steps
from mrope.check.slow_steps import list_slow_parts
from mrope.cli import main
from mrope.errors import counted
from mrope.guard.sync_places import place_cells

ROOT = Path(__file__).parents[1]
RUN = "from mrope.cli import main; main({words!r})"


def run(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, with folders in front of the path."""
    code = f"import sys; sys.path[:0] = {[*map(str, paths), str(ROOT / 'src')]!r}\n{code}"
    words = [sys.executable, "-c", code]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_version_loads_no_torch() -> None:
    code = (
        "import mrope.cli\ntry:\n    mrope.cli.main(['--version'])\nexcept SystemExit:\n    pass\n"
    )
    ended = run(f"{code}print('torch' in sys.modules)")
    assert ended.stdout.split() == ["mrope", "0.1.0", "False"]


@pytest.mark.parametrize("words", [["doctor"], ["check", "--config", "configs/demo.yaml"]])
def test_a_broken_torchvision_is_one_line(words: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "torchvision"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')\n")
    metadata = tmp_path / "torchvision-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n")
    ended = run(RUN.format(words=words), tmp_path)
    assert ended.returncode == 2
    lines = [line for line in ended.stderr.splitlines() if line.startswith("mrope: ")]
    (line,) = lines
    assert "torchvision" in line and "operator nms does not exist" in line
    assert torch.__version__ in line and "Traceback" not in ended.stderr


def test_another_fault_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from mrope.check import doctor

    def broken(*_: object) -> bool:
        raise RuntimeError("something else")

    monkeypatch.setattr(doctor, "compare_families", broken)
    with pytest.raises(RuntimeError, match="something else"):
        main(["doctor"])


class Batches:
    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> int:
        raise MRopeError(f"row {index}: too large.\nGive a higher rung")


def test_an_error_of_a_worker_is_the_workers_own_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mrope.training import trainer

    def train(*_: object, **__: object) -> Any:
        loader: Any = torch.utils.data.DataLoader(Batches(1), num_workers=1)  # type: ignore[arg-type]
        return list(loader)

    monkeypatch.setattr(trainer, "train", train)
    with pytest.raises(SystemExit) as ended:
        main(["train", "configs/demo.yaml"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "mrope: row 0: too large.\nGive a higher rung\n"


PLACES = [
    "qwen3_5_moe/modeling_qwen3_5_moe.py:1905 get_vision_position_ids",
    "transformers/vision_utils.py:112 get_index via qwen3_vl/modeling_qwen3_vl.py:691 forward",
]


def test_places_keep_their_line_in_a_narrow_terminal() -> None:
    assert place_cells(PLACES, 160) == PLACES
    assert place_cells(PLACES, 80) == [
        "modeling_qwen3_5_moe.py:1905\nget_vision_position_ids",
        "vision_utils.py:112\nget_index\nvia modeling_qwen3_vl.py:691\nforward",
    ]
    assert place_cells([], 80) == []


def test_tables_of_syncs_have_whole_places_at_80_columns() -> None:
    from collections import Counter

    from rich.console import Console

    from mrope.guard.sync_places import SyncPlace
    from mrope.hf import SyncReport

    report = SyncReport(quiet=True)
    where = ("/x/qwen3_omni_moe/modeling_qwen3_omni_moe.py", 2905, "get_placeholder_mask")
    advice = "non_blocking=True with pinned memory"
    report.places = Counter({SyncPlace("model", *where, "nonzero", advice): 3})
    console = Console(width=80)
    with console.capture() as captured:
        console.print(report.table(console.width))
    text = captured.get()
    assert "modeling_qwen3_omni_moe.py:2905 " in text and "get_placeholder_mask" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("fla", "flash-linear-attention is not installed"),
        ("torch 2.9", "runs the Conv3d of patch embeddings slowly"),
        ("kernel", "no variable-length attention kernel"),
        ("pin", "memory cannot be pinned"),
        ("gradients", "refuses to train on Hopper"),
    ],
)
def test_doctor_names_what_makes_steps_slow(
    missing: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tensor:
        def pin_memory(self) -> None:
            if missing == "pin":
                raise RuntimeError("limit of locked memory")

    fake = SimpleNamespace(
        __version__="2.9.1" if missing == "torch 2.9" else "2.13.0",
        cuda=SimpleNamespace(is_available=lambda: True),
        empty=lambda _: Tensor(),
    )
    monkeypatch.setattr(slow_steps, "torch", fake)
    monkeypatch.setattr(slow_steps, "HAS_KERNEL", missing != "kernel")
    refusal = "it refuses to train on Hopper" if missing == "gradients" else None
    monkeypatch.setattr(slow_steps, "find_refusal", lambda: refusal)
    found = None if missing == "fla" else object()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: found)
    (line,) = list_slow_parts()
    assert words in line


def test_doctor_reads_the_settings_of_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    from mrope import load_config

    pinned: Any = SimpleNamespace(pin_memory=lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda _: pinned)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    words = ["dataloader.pin_memory=false"]
    lines = list(list_slow_parts(load_config("configs/qwen3_5.yaml", words)))
    assert any("linear layers" in line for line in lines)
    assert any("dataloader.pin_memory is false" in line for line in lines)
    lines = list(list_slow_parts(load_config("configs/qwen3_vl.yaml")))
    assert not any("linear layers" in line or "pin_memory" in line for line in lines)


def test_counts_and_nouns_agree() -> None:
    assert [counted(number, "video") for number in (0, 1, 2)] == ["0 videos", "1 video", "2 videos"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-size", "2"], "--batch-size requires --shapes"),
        (["--shapes", "--batch-size", "2", "--max-tokens", "64"], "not both"),
    ],
)
def test_sizes_of_batches_need_shapes(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["check", "--config", "configs/demo.yaml", *words])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("size", [2, 5])
def test_the_size_of_batches_is_that_of_the_option(size: int) -> None:
    from mrope.check.source import check_config

    cfg = check_config(ROOT / "configs/demo.yaml", None, None, batch_size=size)
    assert cfg.dataloader.batch_size == size and cfg.dataloader.max_tokens is None

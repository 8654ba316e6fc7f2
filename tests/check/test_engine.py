"""`mrope doctor --engine`: an engine's own function beside ours, family by family."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from mrope import MRopeError, cli
from mrope.check.engine import compare_engine

# A twin, in our words, of what SGLang 0.5.23's file has: a block starts 1 behind the largest position of
# what stands before it, time included, and a clip's frames are apart in Qwen3-VL and its kin.
TWIN = """
import torch

def get_rope_index(input_ids, image_token_id, video_token_id, vision_start_token_id, model_type,
                   spatial_merge_size, tokens_per_second, image_grid_thw=None, video_grid_thw=None,
                   second_per_grid_ts=None):
    if model_type not in ("qwen2_vl", "qwen3_vl"):
        raise RuntimeError(f"Unimplemented model type: {model_type}")
    grids = {image_token_id: [], video_token_id: []}
    for token, given in ((image_token_id, image_grid_thw), (video_token_id, video_grid_thw)):
        for t, h, w in [] if given is None else given.tolist():
            sides = h // spatial_merge_size, w // spatial_merge_size
            apart = model_type == "qwen3_vl" and token == video_token_id
            grids[token] += [(1, *sides)] * t if apart else [(t, *sides)]
    tokens, numbers = input_ids[0].tolist(), []
    while len(numbers) < len(tokens):
        start = 1 + max(map(max, numbers), default=-1)
        token = tokens[len(numbers)]
        if token not in grids:
            numbers.append((start,) * 3)
            continue
        t, h, w = grids[token].pop(0)
        numbers += [(start + f, start + y, start + x) for f in range(t) for y in range(h) for x in range(w)]
    return torch.tensor(numbers).T[:, None], None
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "sglang/srt/layers/rotary_embedding/mrope_rope_index.py"
    file.parent.mkdir(parents=True)
    file.write_text(TWIN)
    (tmp_path / "sglang/__init__.py").write_text("raise ImportError('needs a GPU')\n")
    (tmp_path / "sglang-0.5.23.dist-info").mkdir()
    (tmp_path / "sglang-0.5.23.dist-info/METADATA").write_text("Name: sglang\nVersion: 0.5.23\n")
    monkeypatch.syspath_prepend(tmp_path)
    return file


def test_families_are_compared_without_importing_the_package(engine: Path) -> None:
    found = compare_engine("sglang", "transformers-5.23")
    assert set(found) == {"qwen2_vl", "qwen3_vl"}
    assert found["qwen3_vl"] == {"images": "equal", "clips": "equal"}
    assert found["qwen2_vl"]["images"] == "equal"
    assert "on axis 0, here at" in found["qwen2_vl"]["clips"]
    # That release goes on behind the largest time too.
    old = compare_engine("sglang", "transformers-4.57")
    assert old["qwen2_vl"] == {"images": "equal", "clips": "equal"}


def test_the_command_prints_a_table(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--engine", "sglang"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "sglang 0.5.23" in printed and "qwen3_vl" in printed


def test_without_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--engine", "sglang"])
    assert ended.value.code == 0
    assert "sglang is not installed" in capsys.readouterr().out
    with pytest.raises(MRopeError, match="--engine must be one of sglang, not 'vllm'"):
        compare_engine("vllm")

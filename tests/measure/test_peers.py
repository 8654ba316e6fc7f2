"""The peers' table: operations are counted as torch counts them, and cells are those that were written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from measure.peers import rows
from measure.peers.cell import stepper
from measure.peers.flops import step_tflop, utilisation
from measure.peers.kernels import flash_attn_func, flash_attn_varlen_func
from measure.peers.ours import build, collated, padded
from measure.peers.table import CASES, MARKS, PEERS, read_cells, read_lines, table

SHAPE = "{width: 96, images: 2, image_sides: [4, 8], videos: 1, frames: 2, frame: [4, 6]}"
TEXT = {
    "model_type": "qwen3_vl_text",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rope_parameters": {"rope_type": "default", "mrope_section": [6, 5, 5], "rope_theta": 1e6},
}
VISION = {
    "model_type": "qwen3_vl_vision",
    "depth": 3,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_heads": 2,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}
MODEL = {
    "model_type": "qwen3_vl",
    "image_token_id": 91,
    "video_token_id": 92,
    "vision_start_token_id": 93,
    "vision_end_token_id": 94,
    "text_config": TEXT,
    "vision_config": VISION,
}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Write and read a case of small rows, as the peers do."""
    import yaml

    folder = tmp_path_factory.mktemp("peers")
    shapes = {"tokens": [96], "patches": [512], "longest": 64}
    table = {
        "model": {"dtype": "float32", "config": MODEL, "attach": True},
        "data": {"source": "synthetic", "rows": 16, "shape": yaml.safe_load(SHAPE)},
        "dataloader": {"batch_size": 2, "num_workers": 0},
        "rope": {"vision": True, "shapes": shapes},
    }
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(table), encoding="utf-8")
    rows.write_case(folder, str(file))
    return rows.load_case(folder, str(file)) | {"file": str(file)}


def test_operations_are_those_that_torch_counts(case: dict[str, Any]) -> None:
    model, batch = build(case, "eager"), padded(case)[0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch)
    width = batch["input_ids"].shape[1]
    # Under eager, since torch counts no sdpa on a CPU; it counts text attention without its mask.
    masked = 2 * (width**2 - width * (width + 1) / 2) * 4 * 4 * 32 * TEXT["num_hidden_layers"]
    counted = counter.get_total_flops() - masked
    assert step_tflop(MODEL, case["batches"][0]) * 1e12 == pytest.approx(3 * counted, rel=2e-3)


def test_utilisation_is_the_share_of_989_tflops() -> None:
    assert utilisation(98.9, 200) == pytest.approx(0.5)


def test_plain_and_attached_take_the_same_step(case: dict[str, Any]) -> None:
    from mrope.hf import attach

    losses = []
    change: Any
    for batches, change in (
        (padded(case), lambda model: model),
        (collated(case, fixed=False), attach),
        (collated(case, fixed=True), attach),
    ):
        model = change(build(case, "sdpa"))
        one_step = stepper(model, model, batches)
        losses.append([one_step(number) for number in range(2)])
        assert all(parameter.grad is None for parameter in model.parameters())
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0])


def test_the_stand_in_attends_within_segments_and_causally() -> None:
    torch.manual_seed(0)
    query, (key, value) = torch.randn(10, 4, 8), torch.randn(2, 10, 2, 8)
    borders = torch.tensor([0, 4, 10], dtype=torch.int32)
    out = flash_attn_varlen_func(query, key, value, borders, borders, 6, 6, causal=True)
    for first, end in ((0, 4), (4, 10)):
        q, k, v = (one[None, first:end] for one in (query, key, value))
        torch.testing.assert_close(flash_attn_func(q, k, v, causal=True)[0], out[first:end])
    q, k, v = (one[4:].transpose(0, 1)[None] for one in (query, key, value))
    attend = torch.nn.functional.scaled_dot_product_attention
    real = attend(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    torch.testing.assert_close(out[4:], real)


def test_the_table_has_every_cell_but_one() -> None:
    cells = read_cells()
    missing = [(case, peer) for case in CASES for peer in PEERS if (case, peer) not in cells]
    assert missing == [("2b-s4k", "torchtitan 169545712, no autotune")]
    lines = "".join(table(PEERS))
    for (_, peer), cell in cells.items():
        if peer in PEERS:
            assert f"| {PEERS[peer]}{MARKS[cell.run]} |" in lines
    assert Counter(cell.run for (_, peer), cell in cells.items() if peer in PEERS) == {
        0: 12,
        1: 12,
        2: 2,
    }
    assert {cells[case, "attached"].syncs for case in CASES} == {0}


def test_the_runs_of_the_table_are_alike() -> None:
    """What both ran differs by less than what the table shows; plain steps wait for a shared host."""
    first, second = (
        {row["peer"]: row for row in read_lines(run) if row["case"] == "2b-mixed8"}
        for run in (0, 1)
    )
    assert second["attached"]["ms"] / first["attached"]["ms"] == pytest.approx(1, abs=0.05)
    assert second["attached"]["losses"] == first["attached"]["losses"]


def test_scripts_of_peers_name_their_parts() -> None:
    from measure.peers import run

    folder = Path(run.__file__).parent
    for environment, module, _ in run.PARTS.values():
        assert (folder / f"{module}.py").exists() and environment in run.SITES

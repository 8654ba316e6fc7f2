"""Check the simulated ranks, and that the mix's rows are what its counts say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from measure.__main__ import app
from measure.balance import QWEN3_VL_2B, WAYS, Counts, Steps, imbalance, simulate
from measure.mix import MixRows, make_mix
from mrope import MRopeCollator, MRopeSpec, VisionSpec
from mrope.prepare import WorkModel

ROOT = Path(__file__).parents[2]
CONFIG = json.loads((ROOT / "configs/bench/models/2b.json").read_text(encoding="utf-8"))
COUNTS = Counts.of(make_mix(6000), QWEN3_VL_2B)


def test_imbalance_is_the_slowest_ranks_work_over_the_mean() -> None:
    assert imbalance(np.array([[1.0, 3.0], [2.0, 2.0]])) == 5 / 4
    # Of a step without any work, such as a tower's on text alone, there is nothing to wait for.
    assert imbalance(np.array([[1.0, 3.0], [0.0, 0.0]])) == 3 / 2


def test_sums_are_of_each_step_and_rank() -> None:
    steps = Steps(np.array([2, 0, 1]), np.array([0, 1, 3]), np.array([[1, 0]]))
    assert steps.sums(np.array([1, 10, 100])).tolist() == [[11, 100]]


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("ranks", [1, 8])
def test_every_way_uses_every_example_once_within_the_budget(name: str, ranks: int) -> None:
    steps = WAYS[name](COUNTS, ranks)
    assert sorted(steps.examples_N) == list(range(6000))
    assert sorted(steps.grid_SR.ravel()) == list(range(len(steps.borders) - 1))
    assert steps.sums(COUNTS.tokens_N).max() <= 16384


def test_batches_by_work_balance_it_and_the_others_do_not() -> None:
    case = simulate(COUNTS, 8)
    ways = case["ways"]
    assert ways["work"]["total"] < 1.01 and ways["work"]["fill"] > 0.97
    assert all(ways[name]["total"] > 1.05 for name in ways if name != "work")
    assert ways["tokens only"]["tokens"] < 1.01
    for way in ways.values():
        assert way["total"] <= way["in_turn"] and way["fill"] <= case["fill_ceiling"]
    assert 0.45 < case["tower_share"] < 0.55


def test_the_work_is_that_of_qwen3_vl_2b() -> None:
    assert WorkModel.from_config(CONFIG) == QWEN3_VL_2B


def test_shares_of_text_images_and_clips() -> None:
    mix = make_mix(6000)
    grids_N = np.diff(mix.borders)
    images_N = grids_N[(grids_N > 0) & ~mix.clip_N]
    assert np.mean(grids_N == 0) == pytest.approx(0.3, abs=0.02)
    assert mix.clip_N.mean() == pytest.approx(0.2, abs=0.02)
    assert sorted(set(images_N)) == [1, 2, 3, 4] and set(grids_N[mix.clip_N]) == {1}


@pytest.mark.parametrize("budget", [256, 1024, 16384])
def test_no_example_is_above_the_budget(budget: int) -> None:
    mix = make_mix(3000, budget)
    assert mix.text_N.min() > 0 and mix.tokens().max() <= budget
    assert mix.grids_G3.min() > 0


def test_rows_have_the_tokens_and_patches_of_the_mix() -> None:
    spec, vision = MRopeSpec.from_config(CONFIG), VisionSpec.from_config(CONFIG)
    mix = make_mix(40, 512)
    rows = MixRows(mix, spec, torch.zeros(int(mix.patches().max()), 1536))
    samples = [rows[index] for index in range(len(rows))]
    assert [len(row["input_ids"]) for row in samples] == mix.tokens().tolist()
    grids = [row.get("image_grid_thw", row.get("video_grid_thw")) for row in samples]
    assert [0 if one is None else int(one.prod(1).sum()) for one in grids] == mix.patches().tolist()
    batch = MRopeCollator(None, spec, vision, packing="flatten")(samples)
    assert batch["input_ids"].shape == (1, mix.tokens().sum())


def test_the_command_prints_tables_and_writes_json(tmp_path: Path) -> None:
    file = tmp_path / "balance.json"
    result = CliRunner().invoke(
        app, ["balance", "--quick", "--examples", "10000", "--json", str(file)]
    )
    assert result.exit_code == 0, result.output
    assert "512 ranks, 10,000 examples" in result.output and "visual tokens" in result.output
    report = json.loads(file.read_text(encoding="utf-8"))
    assert [case["ranks"] for case in report["cases"]] == [8, 64, 512]
    assert set(report["cases"][0]["ways"]) == set(WAYS)

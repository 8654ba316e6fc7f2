"""Check that the benchmarks' rivals compute equal results, and that their helpers are correct."""

from __future__ import annotations

import json
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from mrope import MRopeError, MRopeSpec, load_config
from mrope.bench.harness import interleaved_medians, one_thread
from mrope.bench.step import Measured, bench_step, step_table
from mrope.bench.trace import DeviceEvent, covered_length, profile_steps
from mrope.hf import compile_layers
from mrope.spec.spec import example_config
from mrope.training.dataloader import load_rows, make_loader

SPEC = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")


def test_busy_time_counts_overlaps_once() -> None:
    assert covered_length([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


def test_medians_are_per_call_and_every_function_runs_in_each_round() -> None:
    calls: list[str] = []
    contenders = {name: partial(calls.append, name) for name in ("one", "other")}
    medians = interleaved_medians(contenders, repeats=3)
    assert list(medians) == ["one", "other"] and all(value > 0 for value in medians.values())
    order = [name for name, _ in groupby(calls)]
    # The first call of each sizes its turns; then three interleaved rounds.
    assert order == ["one", "other"] * 4


def test_one_thread_is_restored() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_the_table_of_steps_reads_what_is_measured() -> None:
    measured = Measured(host=[1, 2, 3], step=[4, 5, 6], stage=[0, 1, 2], syncs=7)
    measured.device = {"gpu_idle_share": 0.5, "gpu_busy_ms": 9.0, "products_share": 0.25}
    measured.tflop = 50.0
    table = step_table("name", {"plain": measured.summary()})
    cells = [next(iter(column.cells)) for column in table.columns]
    timings = [
        "2000.0 (1000.0 to 3000.0)",
        "5000.0",
        "1.000",
        "20.0 %",
        "50.0 %",
        "9.0",
        "25.0 %",
        "10",
    ]
    assert cells == ["plain", "7", *timings]


def test_sites_of_a_report_carry_no_folder_of_the_machine() -> None:
    measured = Measured(host=[1, 2], step=[1, 2], stage=[1, 2])
    measured.sites = "/home/me/.venv/lib/site-packages/torch/x.py:3 f: tolist\n4 waits at 1 sites"
    assert measured.summary()["sites"] == [
        "site-packages/torch/x.py:3 f: tolist",
        "4 waits at 1 sites",
    ]


def test_products_are_told_from_attention_whose_kernels_name_their_types(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ms = 1_000_000
    events = [
        DeviceEvent("nvjet_sm90_tst_128x256", 0, 2 * ms),
        DeviceEvent("pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", 2 * ms, 5 * ms),
        DeviceEvent("nvjet_sm90_tst_128x256", 6 * ms, 9 * ms),
    ]
    monkeypatch.setattr("mrope.bench.trace.trace_steps", lambda step, batches: events)
    found = profile_steps(print, range(2))
    assert found["products_share"] == 5 / 8 and found["gpu_idle_share"] == 1 - 8 / 9
    assert [*found["longest_kernels_ms"].values()] == [2.5, 1.5]


BENCH = Path(__file__).parents[2] / "configs/bench"
LINEAR = sorted(file.stem for file in BENCH.glob("qwen3_5-*.yaml"))


def tiny(case: str, tmp_path: Path) -> tuple[Path, list[str]]:
    """Return a config of configs/bench and overrides that make its model and rows small."""
    cfg = load_config(BENCH / f"{case}.yaml")
    config: Any = json.loads(Path(str(cfg.model.config)).read_text(encoding="utf-8"))
    config["text_config"] |= {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 4}
    config["text_config"] |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    linear = {"num_key_heads": 2, "num_value_heads": 2, "key_head_dim": 16, "value_head_dim": 16}
    config["text_config"] |= {f"linear_{name}": value for name, value in linear.items()}
    config["text_config"]["rope_parameters"]["mrope_section"] = [4, 2, 2]
    tower = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    config["vision_config"] |= {**tower, "out_hidden_size": 64, "num_position_embeddings": 64}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config |= {name: 151 + number for number, name in enumerate(names)}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    return BENCH / f"{case}.yaml", [
        f"model.config={file}",
        "model.dtype=float32",
        "data.rows=40",
        "data.shape={least_width: 40, width: 90, images: 1, image_sides: [4, 8]}",
        "dataloader={max_tokens: 256, max_patches: 256, num_workers: 0, pin_memory: false}",
        "rope.shapes={tokens: [256], patches: [256], longest: 64, tokens_per_example: 32}",
    ]


@pytest.mark.parametrize("case", LINEAR)
def test_cases_of_linear_layers_have_batches_within_their_rungs(case: str) -> None:
    cfg = load_config(BENCH / f"{case}.yaml", ["dataloader.num_workers=0"])
    rows, shapes = load_rows(cfg), cfg.rope.shapes
    sampler: Any = make_loader(cfg, rows, len).batch_sampler
    batches, sizes = list(sampler), rows.sizes()
    assert shapes is not None and shapes.patches is not None and shapes.longest is not None
    assert max(sizes["tokens"][batch].sum() for batch in batches) <= shapes.tokens[0]
    assert max(sizes["patches"][batch].sum() for batch in batches) <= shapes.patches[0]
    assert sizes["longest"].max() <= shapes.longest
    typical = sorted(len(batch) for batch in batches)[len(batches) // 2]
    assert typical == {"qwen3_5-long": 4}.get(case, 16)


# dynamo looks at the gradient of a layer's input, which is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_variants_of_a_flattened_config_have_equal_losses_and_no_syncs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mrope.bench.step.compile_layers", partial(compile_layers, backend="aot_eager")
    )
    path, overrides = tiny("qwen3_5-short", tmp_path)
    file = tmp_path / "step.json"
    chosen = ["layers", "fixed", "flattened", "plain"]
    bench_step([path], overrides, "cpu", 2, file, None, variants=chosen)
    case = json.loads(file.read_text(encoding="utf-8"))["cases"]["qwen3_5-short"]
    assert [*case] == ["plain", "flattened", "fixed", "layers"]
    for variant, found in case.items():
        assert found["losses"] == pytest.approx(case["plain"]["losses"], abs=1e-4)
        assert (found["syncs"] == 0) is found["passed_error_mode"] is (variant != "plain")
        assert found["tflop"] == case["plain"]["tflop"] > 0
    with pytest.raises(MRopeError, match="variants of this config: plain, .*; not 'whole'"):
        bench_step([path], overrides, "cpu", 2, None, None, variants=["whole"])

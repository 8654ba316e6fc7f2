"""The run of an 8B model: a small one trains alike as it is, equipped, and without padding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from measure.eight_b import BATCH, Bench, run
from measure.test_peers import MODEL, TEXT


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("eight_b")
    model = folder / "small.json"
    model.write_text(json.dumps({**MODEL, "text_config": {**TEXT, "vocab_size": 512}}))
    return Bench(folder, model)


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
def test_runs_train_alike(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out.jsonl"
    monkeypatch.setenv("PEERS_OUT", str(file))
    for name in ("full-plain", "full-equipped", "full-flattened", "lora-equipped"):
        run(bench, name)
    lines: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    plain, equipped, flattened, _ = (line["loss"] for line in lines)
    assert equipped == plain and flattened == pytest.approx(plain, abs=1e-4)
    assert all(
        line["samples_per_s"] == pytest.approx(1e3 * BATCH / line["ms"], rel=0.1) for line in lines
    )


def test_the_ladder_holds_each_batch(bench: Bench) -> None:
    ladder = bench.ladder()
    assert len(ladder.shapes.tokens) == len(ladder.shapes.patches) == 1
    tokens = [len(row["input_ids"]) for row in bench.sizes]
    batches = [sum(tokens[at : at + BATCH]) for at in range(0, len(tokens), BATCH)]
    assert ladder.shapes.tokens[0] >= max(batches)

"""`mrope check --shapes`: the proposed ladder holds the dataset's batches, with little padding."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest
import yaml

from mrope import Shapes
from mrope.check.fit_shapes import propose_ladder
from mrope.check.summary import Summary
from mrope.spec import example_config
from mrope.training.config import build_collator, load_config
from mrope.training.dataloader import load_rows, make_loader
from support.checked import CUT, GOOD, Folder

DEMO = str(Path(__file__).parents[2] / "configs" / "demo.yaml")


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Folder:
    return Folder(tmp_path, capsys)


def proposed(folder: Folder, *words: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the command on the demo; return the YAML that it prints, and its JSON."""
    file = folder.path / "found.json"
    words = ("check", "--config", DEMO, "--workers", "0", "--json", str(file), "--shapes", *words)
    assert folder.run(*words) == 0, folder.err
    text = folder.out[folder.out.index("rope:") : folder.out.index("80 rows, none bad")]
    return yaml.safe_load(text), json.loads(file.read_text(encoding="utf-8"))["shapes"]


def test_the_demo_pads_less_than_eight_percent_in_eight_graphs(folder: Folder) -> None:
    printed, found = proposed(folder, "--max-tokens", "512")
    assert printed["rope"]["shapes"] == found["rope.shapes"]
    in_code = folder.out.partition("# in code: ")[2].splitlines()[0]
    assert eval(in_code, {"Shapes": Shapes}) == Shapes(**printed["rope"]["shapes"])
    assert found["token_padding"] < 0.08
    assert found["patch_padding"] < 0.08
    assert found["graphs"] <= 8
    assert folder.said("padding of tokens") == f"{found['token_padding']:.1%}"
    assert "flattened batches of up to 512 tokens" in folder.out


@pytest.mark.parametrize("words", [(), ("--max-tokens", "256")])
def test_every_batch_of_the_demo_is_below_the_top_rungs(folder: Folder, words: Any) -> None:
    printed, found = proposed(folder, *words)
    changes = [f"rope.shapes={json.dumps(printed['rope']['shapes'])}", "dataloader.num_workers=0"]
    if words:
        changes += ["rope.packing=flatten", "dataloader.max_tokens=256"]
    cfg = load_config(Path(DEMO), changes)
    collate = build_collator(cfg)
    loader = make_loader(cfg, load_rows(cfg), collate)
    shapes = {
        (batch["input_ids"].shape[1], len(batch["pixel_values"]))
        for _ in range(2)
        for batch in loader
    }
    assert len(shapes) <= 8
    rungs = found["rope.shapes"]
    assert {width for width, _ in shapes} <= {*rungs["tokens"]}
    assert {patches for _, patches in shapes} <= {*rungs["patches"]}


def test_batches_are_those_of_the_config(tmp_path: Path) -> None:
    changes = ["rope.packing=flatten", "dataloader.max_tokens=512", "dataloader.max_patches=1024"]
    cfg = load_config(Path(DEMO), [*changes, "dataloader.balance=work"])
    summary = Summary(of=60)
    summary.lengths, summary.patches = (
        array("q", [40, 90, 200] * 20),
        array("q", [0, 256, 512] * 20),
    )
    summary.segments, summary.largest = array("q", [0, 1, 2] * 20), 256
    proposal = propose_ladder(cfg, summary)
    assert proposal.batches == "flattened batches of up to 512 tokens and 1,024 patches"
    assert proposal.ladder.shapes.patches[-1] <= 1024
    without = cfg.model_copy(
        update={
            "dataloader": cfg.dataloader.model_copy(
                update={"max_patches": None, "balance": "tokens"}
            )
        }
    )
    assert propose_ladder(without, summary).ladder.shapes.patches[-1] > 1024


def test_bad_rows_do_not_count(folder: Folder) -> None:
    config = example_config("qwen3_vl")
    config["vision_config"] |= {"patch_size": 2, "num_position_embeddings": 16}
    folder.model.write_text(json.dumps(config), encoding="utf-8")
    words = ("--workers", "0", "--shapes", "--max-tokens", "64")
    assert folder.check([CUT, GOOD], *words) == 1
    # 22 tokens, 48 patches: an image and two frames of 16.
    assert (folder.said("rungs of tokens"), folder.said("rungs of patches")) == ("24", "48")
    assert "    longest: 16\n" in folder.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-tokens", "64"), "--max-tokens requires --shapes"),
        (("--shapes",), "dataloader.batch_size is 4, but there are only 1 good rows"),
    ],
)
def test_what_cannot_be_proposed(folder: Folder, words: tuple[str, ...], message: str) -> None:
    config = example_config("qwen3_vl")
    config["vision_config"] |= {"patch_size": 2, "num_position_embeddings": 16}
    folder.model.write_text(json.dumps(config), encoding="utf-8")
    assert folder.check([GOOD], "--workers", "0", *words) == 2
    assert message in folder.err


def test_a_model_without_fixed_shapes_is_refused_before_the_check(folder: Folder) -> None:
    folder.model.write_text(json.dumps(example_config("minicpmv4_7")), encoding="utf-8")
    assert folder.check([GOOD], "--workers", "0", "--shapes") == 2
    assert "minicpmv4_7" in folder.err
    assert "rows" not in folder.out

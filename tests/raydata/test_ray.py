"""`Precheck` in `map_batches`, and the collator in `iter_torch_batches`, on a real Ray."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from sybil.document import Document
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

from mrope import MRopeCollator, MRopeSpec, VisionSpec
from mrope.collate.padding import PaddingCollator
from mrope.prepare import Precheck
from mrope.prepare.precheck import LENGTH, PATCH_PAIRS, PATCHES, SEGMENTS
from mrope.prepare.ray import RayCollator
from mrope.spec.spec import example_config
from support.samples import columns_of_samples, plain_samples

ROOT = Path(__file__).parents[2]
SPEC = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
VISION = VisionSpec(2, table_side=16)
ROWS = 24
BATCH = 5
FORMATS = ("numpy", "pyarrow")
ADDED = (LENGTH, PATCHES, SEGMENTS, PATCH_PAIRS)

# What Ray warns of itself by.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`use_.*` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning"),
]


def samples() -> list[dict[str, Any]]:
    return plain_samples(ROWS)


def dataset(rows: list[dict[str, Any]]) -> Any:
    """Return rows in four blocks, of which the first holds text only: Ray infers types by block."""
    return ray.data.from_items(rows, override_num_blocks=4)


def batches(examples: list[dict[str, Any]], collate: MRopeCollator) -> list[Any]:
    """Return the batches of a list of examples, nulls left out as a loader would."""
    rows = [{k: v for k, v in example.items() if v is not None} for example in examples]
    return [collate(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]


def require_equal(ours: Any, theirs: Any) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name
        else:
            assert ours[name] == value, name


@pytest.mark.parametrize("form", FORMATS)
def test_map_batches_adds_what_precheck_returns(form: str) -> None:
    expected = Precheck(SPEC)(columns_of_samples(samples()))
    mapped = dataset(samples()).map_batches(Precheck(SPEC), batch_size=4, batch_format=form)
    rows = mapped.take_all()
    assert [row["id"] for row in rows] == expected["id"]
    for name in ADDED:
        assert [row[name] for row in rows] == expected[name].tolist()
    assert [np.asarray(row["input_ids"]).tolist() for row in rows] == expected["input_ids"]


def test_through_parquet(tmp_path: Path) -> None:
    mapped = dataset(samples()).map_batches(Precheck(SPEC), batch_format="pyarrow")
    mapped.write_parquet(str(tmp_path))
    again = ray.data.read_parquet(str(tmp_path)).sort("id").take_all()
    expected = sorted(mapped.take_all(), key=lambda row: row["id"])
    assert again == expected and {*ADDED} <= set(again[0])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_those_of_a_list_of_examples(form: str, side: Any) -> None:
    collate = MRopeCollator(PaddingCollator(padding_side=side), SPEC, VISION)
    mapped = dataset(samples()).map_batches(Precheck(SPEC), batch_format=form)
    mapped = mapped.drop_columns([*ADDED])
    got = list(mapped.iter_torch_batches(batch_size=BATCH, collate_fn=RayCollator(collate)))
    expected = batches(samples(), collate)
    assert len(got) == len(expected) == 5
    for ours, theirs in zip(got, expected, strict=True):
        require_equal(ours, theirs)


def test_flattened_batches() -> None:
    collate = MRopeCollator(None, SPEC, packing="flatten")
    got = dataset(samples()).iter_torch_batches(batch_size=BATCH, collate_fn=RayCollator(collate))
    for ours, theirs in zip(got, batches(samples(), collate), strict=True):
        require_equal(ours, theirs)


def test_many_batches_by_several_threads() -> None:
    """Ray collates on threads; batches of all lengths share the counting array of `mrope.positions`."""
    rows: list[dict[str, Any]] = [{"input_ids": [7] * (1 + 97 * n % 9001)} for n in range(400)]
    collate = RayCollator(MRopeCollator(None, SPEC))
    table = ray.data.from_items(rows, override_num_blocks=8)
    widths = []
    for batch in table.iter_torch_batches(batch_size=2, collate_fn=collate, prefetch_batches=8):
        positions = batch["position_ids"]
        longest = int(batch["attention_mask"].sum(dim=1).argmax())
        assert torch.equal(positions[0, longest], torch.arange(positions.shape[-1]))
        widths.append(positions.shape[-1])
    assert len(widths) == 200


def test_a_bad_row_stops_the_run_by_its_name() -> None:
    rows = samples()
    rows[17]["input_ids"] = rows[17]["input_ids"][:-4]
    mapped = dataset(rows).map_batches(Precheck(SPEC), batch_format="pyarrow")
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        mapped.materialize()
    assert "SpanMismatchError: the row with id sample-17: image 1: found" in str(caught.value)


def test_the_adapter_pickles() -> None:
    adapter = pickle.loads(pickle.dumps(RayCollator(MRopeCollator(None, SPEC))))
    batch = adapter({"input_ids": np.array([[7, 8], [8, 9]])})
    assert batch["position_ids"].shape == (3, 2, 2)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Blocks marked `py` need Ray; tests/test_docs.py runs the others of the page.
    parser = CodeBlockParser(language="py", evaluator=PythonEvaluator())
    document = Document.parse(str(ROOT / "docs/precheck.md"), parser)
    examples = list(document.examples())
    assert len(examples) == document.text.count("```py\n") > 0
    for example in examples:
        example.evaluate()

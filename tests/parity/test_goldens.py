"""Ring 3, from goldens: bit for bit equal to the releases that `make parity` runs."""

from __future__ import annotations

import json

import pytest

from mrope import rope_index
from parity.goldens import FOLDER, digest, golden_batches
from support.batches import ROWS


@pytest.mark.parametrize(("family", "reference"), ROWS)
def test_equal_to_the_release(family: str, reference: str) -> None:
    golden = json.loads((FOLDER / f"{reference}.json").read_text(encoding="utf-8"))
    assert golden["transformers"].startswith(reference.removeprefix("transformers-"))
    expected = golden["families"][family]
    for number, (spec, batch) in enumerate(golden_batches(family, reference)):
        assert digest(batch) == expected["inputs"][number], "the batches changed: make parity"
        outputs = rope_index(spec, **batch)
        assert digest(outputs) == expected["outputs"][number], f"batch {number}"

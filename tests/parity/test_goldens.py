"""Ring 3, from goldens: bit for bit equal to the releases that `make parity` runs."""

from __future__ import annotations

import json

import pytest

from mrope import rope_index
from mrope.families import FAMILIES, REFERENCES
from parity.goldens import FOLDER, digest, golden_batches


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_release(family: str, reference: str) -> None:
    golden = json.loads((FOLDER / f"{reference}.json").read_text(encoding="utf-8"))
    assert golden["transformers"].startswith(reference.removeprefix("transformers-"))
    expected = golden["families"][family]
    for number, (spec, batch) in enumerate(golden_batches(family, reference)):
        assert digest(batch) == expected["inputs"][number], "the batches changed: make parity"
        outputs = rope_index(spec, **batch)
        assert digest(outputs) == expected["outputs"][number], f"batch {number}"

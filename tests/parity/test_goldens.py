"""Ring 3, from goldens: bit for bit equal to the releases that `make parity` runs."""

from __future__ import annotations

import json

import pytest

from mrope import rope_index
from mrope.spec import FAMILIES, resolve_reference
from parity.goldens import FOLDER, digest, golden_batches, golden_file
from support.batches import RELEASED_ROWS

RELEASES = ("4.57.6", "5.17.0", "5.23.0", "5.24.0")
GOLDENS = {release: json.loads(golden_file(release).read_text("utf-8")) for release in RELEASES}
# A family that a release does not have yet is not in its file.
CASES = [
    (family, resolve_reference("auto", release), release)
    for release, golden in GOLDENS.items()
    for family in golden["families"]
]


def test_every_file_and_every_reference_is_compared() -> None:
    assert {golden_file(release) for release in RELEASES} == set(FOLDER.glob("*.json"))
    assert {(family, reference) for family, reference, _ in CASES} == set(RELEASED_ROWS)
    lacking = {release: set(FAMILIES) - set(GOLDENS[release]["families"]) for release in RELEASES}
    assert lacking["5.23.0"] - lacking["5.24.0"] == {"hy_v4_vl"}


@pytest.mark.parametrize(("family", "reference", "release"), CASES)
def test_equal_to_the_release(family: str, reference: str, release: str) -> None:
    golden = GOLDENS[release]
    assert golden["transformers"] == release
    expected = golden["families"][family]
    for number, (spec, batch) in enumerate(golden_batches(family, reference)):
        assert digest(batch) == expected["inputs"][number], "the batches changed: make parity"
        outputs = rope_index(spec, **batch)
        assert digest(outputs) == expected["outputs"][number], f"batch {number}"

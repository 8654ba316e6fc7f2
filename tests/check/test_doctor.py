"""`mrope doctor`: a table of every family, the differences below it, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from mrope import cli
from mrope.check import doctor
from mrope.proof.comparisons import Verdict
from mrope.spec.families import FAMILIES, ONE_DIMENSIONAL


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", *words])
    return int(ended.value.code or 0)


def test_every_family_is_equal_under_the_installed_release(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "doctor.json"
    assert run("--json", str(file)) == 0
    families = json.loads(file.read_text(encoding="utf-8"))["families"]
    assert families.keys() == FAMILIES.keys() | ONE_DIMENSIONAL.keys()
    # Its positions are 1-D, and its convolutions carry a state along the row.
    assert {"attach", "flatten"} == families["lfm3_vl"].keys()
    # Families that this release lacks are not compared, under an older one of the parity tests.
    assert all(one["equal"] is not False for row in families.values() for one in row.values())
    for feature in doctor.FEATURES:
        assert families["qwen3_vl"][feature]["equal"], families["qwen3_vl"][feature]["detail"]
    assert "attach" not in families["aero_realtime"]
    assert "qwen3_vl_moe" in capsys.readouterr().out


@pytest.mark.parametrize(("equal", "code"), [(True, 0), (False, 1), (None, 0)])
def test_a_difference_is_printed_and_ends_with_1(
    equal: bool | None,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    verdict = Verdict(equal, "position_ids differ at (0, 0, 1)")
    monkeypatch.setattr(doctor, "compare", lambda feature, subject: verdict)
    monkeypatch.setattr(doctor, "COMPARED", {"qwen3_vl": FAMILIES["qwen3_vl"]})
    assert run() == code
    printed = capsys.readouterr().out
    assert ("qwen3_vl positions: position_ids differ at (0, 0, 1)" in printed) == (not equal)

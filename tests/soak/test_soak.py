"""The soak of `make soak`, short: what it measures is measured, and what it looks for would show."""

from __future__ import annotations

from pathlib import Path

import pytest

psutil = pytest.importorskip("psutil")

from mrope import MRopeCollator
from soak import soak as soaking


def test_a_short_soak_holds_no_files_and_repeats_itself() -> None:
    looks, first = soaking.soak(batches=80, every=8)
    _, second = soaking.soak(batches=80, every=40)
    assert first == second
    assert [len(one.resident) for one in looks] == [soaking.WORKERS] * 10
    early, late = soaking.most(looks, 16, lambda one: one.main_files)
    assert late <= early * 1.5 + 4


def test_growth_is_found() -> None:
    """A worker that keeps a megabyte for every thousand batches, beside one that keeps nothing."""
    looks = [
        soaking.Look(batches, [1, 2], [2**20 * batches // 1000, 5 * 2**20], [4, 4], 9)
        for batches in range(0, 8000, 100)
    ]
    growth, flat = soaking.slopes(looks, after=1000)
    assert growth == pytest.approx(2**20, rel=1e-3)
    assert flat == pytest.approx(0, abs=1)


def test_batches_differ_in_size_and_are_told_apart() -> None:
    rows = [soaking.Samples(4)[index] for index in range(4)]
    assert len({len(row["input_ids"]) for row in rows}) == 4
    batch = MRopeCollator(None, soaking.SPEC, soaking.VISION)(rows)
    changed = {**batch, "position_ids": batch["position_ids"] + 1}
    assert soaking.digest(batch) != soaking.digest(changed)
    assert Path(soaking.__file__).parent.name == "soak"

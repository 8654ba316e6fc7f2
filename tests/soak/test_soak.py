"""Run the soak of `make soak` briefly, and check that each of its measures detects growth."""

from __future__ import annotations

import pytest

psutil = pytest.importorskip("psutil")

from mrope import MRopeCollator
from soak import elastic
from soak import soak as soaking


def test_a_short_soak_leaves_no_files_and_repeats_itself() -> None:
    looks, first = soaking.soak(batches=80, every=8)
    _, second = soaking.soak(batches=80, every=40)
    assert first == second
    assert [one.batches for one in looks] == list(range(8, 81, 8))
    assert [len(one.resident) for one in looks] == [soaking.WORKERS] * 10
    # Open files are not judged here: how many batches are in flight depends on the machine's load.
    assert soaking.left_in_shared_memory(looks) == 0


def test_growth_of_memory_is_found() -> None:
    """One worker keeps a megabyte per thousand batches, the other nothing."""
    looks = made_up_looks()
    growth, flat = soaking.slopes(looks, after=1000)
    assert growth == pytest.approx(2**20, rel=1e-3)
    assert flat == pytest.approx(0, abs=1)


def test_growth_of_open_files_is_found() -> None:
    """The second worker keeps a file per thousand batches, the main process nothing."""
    looks = made_up_looks()
    assert soaking.most(looks, 1000, lambda one: max(one.open_files)) == (8, 11)
    assert soaking.most(looks, 1000, lambda one: one.main_files) == (9, 9)


def made_up_looks() -> list[soaking.Look]:
    return [
        soaking.Look(
            batches,
            workers=[1, 2],
            resident=[2**20 * batches // 1000, 5 * 2**20],
            open_files=[4, 4 + batches // 1000],
            main_files=9,
        )
        for batches in range(0, 8000, 100)
    ]


def test_batches_differ_in_size_and_in_digest() -> None:
    rows = [soaking.Samples(4)[index] for index in range(4)]
    assert len({len(row["input_ids"]) for row in rows}) == 4
    batch = MRopeCollator(None, soaking.SPEC, soaking.VISION)(rows)
    changed = {**batch, "position_ids": batch["position_ids"] + 1}
    assert soaking.digest(batch) == soaking.digest({**batch})
    assert soaking.digest(batch) != soaking.digest(changed)


def test_a_short_run_survives_a_lost_worker_and_a_lost_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    phases = (
        elastic.Phase(2, 1, 0.5, "a worker is killed"),
        elastic.Phase(1, 2, 1.0, "the epoch ends"),
    )
    monkeypatch.setattr(elastic, "PHASES", phases)
    for found in elastic.soak(rows=200, epochs=1).values():
        assert (found["lost"], found["taken_twice"]) == (0, 0)
        assert found["accidents"]["a worker is killed: DataLoader worker"] == 1

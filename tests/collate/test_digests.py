"""Digests of batches: what changes them, where they are kept, and how two runs are compared."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from typer.testing import CliRunner

from mrope import MRopeCollator, MRopeError, Shapes, TokenBudgetSampler
from mrope.check.replay import Parting, Run, Worker, compare, read_run, replay, shared_rows
from mrope.cli import app
from mrope.collate import BatchDigest, DigestCollator
from mrope.collate.digests import digest_batch
from support.rows import row_of
from support.specs import example_spec

SPEC = example_spec("qwen3_vl")
Row = dict[str, Any]


def rows(count: int) -> list[Row]:
    """Return rows of different lengths and token ids, two of three with images."""
    made = []
    for number in range(count):
        row: Any = row_of("qwen3_vl", ((4, 4), (4, 8))[: number % 3], text=number % 5, mark=number)
        row["input_ids"][0] = 200 + number
        made.append(row)
    return made


def digest(examples: list[Row], **options: Any) -> BatchDigest:
    return digest_batch(MRopeCollator(None, SPEC, **options)(examples))


# What a digest is of


def test_a_row_has_one_digest_in_every_batch() -> None:
    table = rows(6)
    alone = [digest([row]).rows[0] for row in table]
    assert len(set(alone)) == 6
    # Padding, on either side, and neighbours do not matter; a flattened row has other positions.
    assert digest(table).rows == tuple(alone)
    flat = digest(table, packing="flatten")
    assert [row[:16] for row in flat.rows] == [row[:16] for row in alone]
    assert flat.rows[3:] == digest(table[3:], packing="flatten").rows
    assert digest(table, layout="batch").rows == tuple(alone)


@pytest.mark.parametrize(
    "key, change",
    [
        ("input_ids", lambda ids: ids.index_fill(1, torch.tensor([0]), 9)),
        ("position_ids", lambda ids: ids + (torch.arange(ids.shape[1]) == 1)[:, None]),
        ("image_grid_thw", lambda grids: grids.flip(1)),
        ("attention_mask", lambda mask: mask.index_fill(1, torch.tensor([0]), 0)),
    ],
)
def test_what_the_model_is_told_changes_the_digest(key: str, change: Any) -> None:
    batch = MRopeCollator(None, SPEC)(rows(3))
    before, after = digest_batch(batch), digest_batch({**batch, key: change(batch[key])})
    assert before == digest_batch(pickle.loads(pickle.dumps(batch)))
    assert before != after
    changed = [one != other for one, other in zip(before.rows, after.rows, strict=True)]
    expected = {
        "position_ids": [False, True, False],
        "image_grid_thw": [False, False, False],
        "input_ids": [True, True, True],
        "attention_mask": [True, True, True],
    }
    assert changed == expected[key]


def test_a_rung_is_padding_too() -> None:
    table, shapes = rows(6), Shapes(tokens=(128,), tokens_per_example=16)
    found = digest(table, packing="flatten", shapes=shapes)
    assert found.shape == (1, 128)
    # One more for what fills the rung.
    assert found.rows[:6] == digest(table, packing="flatten").rows
    assert len(found.rows) == 7


def test_a_batch_without_positions_has_a_digest() -> None:
    found: list[BatchDigest] = []
    collate = DigestCollator(lambda ids: {"input_ids": torch.tensor(ids)}, found.append)
    assert collate([[7, 8]])["input_ids"].tolist() == [[7, 8]]
    assert found[0].shape == (1, 2)


# Runs


def run(path: Path, table: Any, workers: int = 2, **options: Any) -> list[Any]:
    collate = DigestCollator(options.pop("collate", MRopeCollator(None, SPEC)), path)
    sampler = TokenBudgetSampler([len(row["input_ids"]) for row in table], 60, **options)
    return list(DataLoader(table, batch_sampler=sampler, collate_fn=collate, num_workers=workers))


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    run(tmp_path / "whole.jsonl", rows(40))
    return tmp_path / "whole.jsonl"


def test_two_equal_runs_are_equal(whole: Path, tmp_path: Path) -> None:
    batches = run(tmp_path / "again.jsonl", rows(40))
    found = compare(read_run(whole), read_run(tmp_path / "again.jsonl"))
    assert found.compared == len(batches)
    assert found.parting is None
    assert (max(found.only), max(found.shared)) == (0, 0)
    assert len(list(tmp_path.glob("again.worker[01]-pid*.jsonl"))) == 2
    printed = CliRunner().invoke(
        app, ["check", "--replay", str(whole), str(tmp_path / "again.jsonl")]
    )
    assert (printed.exit_code, printed.output) == (0, f"Equal: {len(batches)} batches.\n")


class OtherPositions(MRopeCollator):
    """Gives the third row of one batch other positions."""

    def __call__(self, examples: Any) -> Any:
        batch = super().__call__(examples)
        place = [int(ids[0]) for ids in batch["input_ids"]]
        if 227 in place:
            batch["position_ids"][:, place.index(227), 1:] += 1
        return batch


def test_the_first_step_and_row_that_differ_are_named(whole: Path, tmp_path: Path) -> None:
    table, path = rows(40), tmp_path / "other.jsonl"
    batches = run(path, table, collate=OtherPositions(None, SPEC))
    step, row = next(
        (step, batch["input_ids"][:, 0].tolist().index(227))
        for step, batch in enumerate(batches)
        if 227 in batch["input_ids"][:, 0]
    )
    found = compare(read_run(whole), read_run(path))
    what = "the same token ids at other positions"
    assert found.parting == Parting(step, Worker(0, step % 2), row, what)
    printed = CliRunner().invoke(
        app,
        ["check", "--replay", str(whole), str(path), "--json", str(tmp_path / "found.json")],
    )
    assert printed.exit_code == 1
    assert (
        f"The runs part at step {step} of rank 0, a batch of worker {step % 2}, row {row}: {what}."
        in printed.output
    )
    assert "rows 0 are in" in printed.output
    assert json.loads((tmp_path / "found.json").read_text())["parting"][0] == step


def test_a_changed_row_is_told_from_a_changed_grid(whole: Path, tmp_path: Path) -> None:
    table = rows(40)
    table[7]["input_ids"][-1] = 55
    run(tmp_path / "ids.jsonl", table)
    parting = compare(read_run(whole), read_run(tmp_path / "ids.jsonl")).parting
    assert parting is not None
    assert (parting.row is not None, parting.what) == (True, "other token ids")
    run_of = read_run(whole)
    batches = {**run_of.batches}
    first = batches[Worker(0, 1)][0]
    grids = {"image_grid_thw": (*first.items["image_grid_thw"][:-1], "0" * 8)}
    batches[Worker(0, 1)] = [first._replace(items=grids), *batches[Worker(0, 1)][1:]]
    parting = compare(run_of, run_of._replace(batches=batches)).parting
    last = len(first.items["image_grid_thw"]) - 1
    assert parting == Parting(1, Worker(0, 1), None, f"entry {last} of image_grid_thw")


def test_other_orders_and_lengths_are_told_apart(whole: Path, tmp_path: Path) -> None:
    run(tmp_path / "seed.jsonl", rows(40), seed=1)
    found = compare(read_run(whole), read_run(tmp_path / "seed.jsonl"))
    assert found.parting is not None
    assert (found.parting.step, found.only) == (0, (0, 0))
    run(tmp_path / "alone.jsonl", rows(38), workers=0)
    found = compare(read_run(whole), read_run(tmp_path / "alone.jsonl"))
    assert (found.parting, found.same_workers, found.only) == (None, False, (2, 0))
    assert not replay(whole, tmp_path / "alone.jsonl")


def test_a_run_that_was_resumed_is_compared_as_one(whole: Path, tmp_path: Path) -> None:
    """Workers had made batches ahead when the run stopped; the next ones make them again."""
    path, state = tmp_path / "resumed.jsonl", None
    for take in (5, 100):
        table = rows(40)
        sampler = TokenBudgetSampler([len(row["input_ids"]) for row in table], 60)
        loader: Any = StatefulDataLoader(
            table,
            batch_sampler=sampler,
            collate_fn=DigestCollator(MRopeCollator(None, SPEC), path),
            num_workers=2,
        )
        if state is not None:
            loader.load_state_dict(state)
        for _, _batch in zip(range(take), loader, strict=False):
            state = loader.state_dict()
        del loader
    assert len(list(tmp_path.glob("resumed.*.jsonl"))) == 4
    found = compare(read_run(whole), read_run(path))
    assert (found.parting, found.only) == (None, (0, 0))
    lengths = [sum(map(len, read_run(one).batches.values())) for one in (whole, path)]
    assert lengths[0] == lengths[1] == found.compared


def test_epochs_of_one_run_follow_one_another(tmp_path: Path) -> None:
    path = tmp_path / "epochs.jsonl"
    table: Any = rows(12)
    collate = DigestCollator(MRopeCollator(None, SPEC), path)
    loader: Any = DataLoader(table, batch_size=3, collate_fn=collate, num_workers=1)
    for _ in range(2):
        list(loader)
    found = read_run(path)
    assert len(found.batches[Worker(0, 0)]) == 8
    assert compare(found, found).shared == (0, 0)


class Everything(IterableDataset[Row]):
    """A dataset that knows nothing of workers, as webdataset without a splitter."""

    def __iter__(self) -> Iterator[Row]:
        yield from rows(24)


def test_a_dataset_that_gives_every_worker_all_rows_is_named(tmp_path: Path) -> None:
    for workers in (2, 0):
        collate = DigestCollator(MRopeCollator(None, SPEC), tmp_path / f"{workers}.jsonl")
        list(DataLoader(Everything(), batch_size=3, num_workers=workers, collate_fn=collate))
    found = read_run(tmp_path / "2.jsonl")
    assert compare(found, found).shared == (0.5, 0.5)
    printed = CliRunner().invoke(
        app, ["check", "--replay", *[str(tmp_path / f"{workers}.jsonl") for workers in (2, 0)]]
    )
    assert printed.exit_code == 1
    assert (
        "2.jsonl: 50% of the rows of the first epoch had been given to another worker"
        in printed.output
    )
    assert "gives every worker all rows unless" in printed.output
    assert "Of 48 rows 24 are in" in printed.output


def test_rows_that_a_dataset_has_twice_are_no_sign_of_that() -> None:
    """A quarter of the rows come twice, in any worker; a rung's padding is in every batch."""
    order = np.random.default_rng(0).permutation([*range(3000), *range(1000)])
    batches: dict[Worker, list[BatchDigest]] = {Worker(0, number): [] for number in range(4)}
    for step, batch in enumerate(order.reshape(-1, 4)):
        names = tuple(f"{row:016x}{0:08x}" for row in (*batch, 99_999))
        batches[Worker(0, step % 4)].append(BatchDigest(names, {}, (5, 1)))
    made = Run("twice", 4, batches)
    assert shared_rows(made) < 0.05
    everyone = {worker: [one for each in batches.values() for one in each] for worker in batches}
    assert shared_rows(made._replace(batches=everyone)) > 0.4


def test_rank_and_worker_name_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        run(tmp_path / "ranks.jsonl", rows(20), workers=0, rank=rank, num_replicas=2)
    assert len(list(tmp_path.glob("ranks.rank[01]-main-pid*.jsonl"))) == 2
    found = read_run(tmp_path / "ranks.jsonl")
    assert list(found.batches) == [Worker(0, 0), Worker(1, 0)]
    assert compare(found, found).shared == (0, 0)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        MRopeError, match=r"no digests at .*; DigestCollator\(collate, 'none.jsonl'\)"
    ):
        read_run(tmp_path / "none.jsonl")
    (tmp_path / "bad.main-pid1-00000000.jsonl").write_text('{"event": "rejected"}\n')
    with pytest.raises(MRopeError, match=r"the files at .*bad.jsonl are not of digests"):
        read_run(tmp_path / "bad.jsonl")
    with pytest.raises(IsADirectoryError, match="the path of a file is needed"):
        DigestCollator(list, tmp_path)

"""Bad examples are dropped, the others are exact, every drop is recorded, and ranks stay in step."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import pickle
import re
import signal
import time
import warnings
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mrope import MRopeCollator, MRopeError, MRopeSpec
from mrope.collate import Indexed, RejectWarning, SkipBad, read_rejects
from mrope.collate.padding import PaddingCollator
from mrope.collate.process_files import append_record, process_file
from mrope.collate.skip_bad import INDEX
from mrope.spec.spec import example_config
from mrope.towers import VisionSpec

START, IMAGE = 101, 102
SPEC = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
quiet = pytest.mark.filterwarnings("ignore::mrope.collate.skip_bad.RejectWarning")


def good(number: int, images: int = 1) -> dict[str, Any]:
    """An example with text of its own and images of 2 tokens, 8 patches each."""
    tokens = [10 + number, *[START, IMAGE, IMAGE] * images, 20 + number]
    return {
        "input_ids": tokens,
        "labels": tokens,
        "image_grid_thw": np.array([[1, 2, 4]] * images, np.int64).reshape(-1, 3),
        "pixel_values": torch.full((8 * images, 3), float(number)),
        "id": f"row-{number}",
    }


def truncated(number: int) -> dict[str, Any]:
    """The same, cut within its image."""
    example = good(number)
    return {**example, "input_ids": example["input_ids"][:3], "labels": example["labels"][:3]}


def skipping(inner: Any = None, **options: Any) -> MRopeCollator:
    return MRopeCollator(inner, SPEC, on_error=SkipBad(**options))


def assert_same(ours: Any, theirs: Any) -> None:
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(ours[name], value) and ours[name].dtype == value.dtype
        else:
            assert ours[name] == value


@quiet
@pytest.mark.parametrize("options", [{}, {"packing": "flatten"}, {"layout": "batch"}])
def test_the_others_are_collated_as_if_the_bad_ones_had_not_been_there(options: Any) -> None:
    vision = VisionSpec(spatial_merge_size=2, table_side=4)
    examples = [good(0, images=2), truncated(1), good(2), {"labels": [1]}, good(3, images=0)]
    ours = MRopeCollator(None, SPEC, vision, on_error="skip", **options)(examples)
    theirs = MRopeCollator(None, SPEC, vision, **options)([examples[i] for i in (0, 2, 4)])
    assert_same(ours, theirs)
    assert ours["pixel_values"][:, 0].unique().tolist() == [0, 2]


def test_a_good_batch_is_collated_once_and_is_the_same() -> None:
    calls = []

    def inner(examples: Any) -> Any:
        calls.append(len(examples))
        return PaddingCollator()(examples)

    examples = [good(0), good(1)]
    assert_same(skipping(inner)(examples), MRopeCollator(None, SPEC)(examples))
    assert calls == [2]


@quiet
def test_whatever_the_inner_function_raises_is_an_examples_fault() -> None:
    def inner(examples: Any) -> Any:
        if any(example["id"] == "row-1" for example in examples):
            raise KeyError("a file that is not there")
        return PaddingCollator()(examples)

    batch = skipping(inner)([good(0), good(1), good(2)])
    assert batch["id"] == ["row-0", "row-2"]


@quiet
def test_examples_that_are_good_alone_but_not_together_are_dropped_by_majority() -> None:
    odd = good(0)
    del odd["labels"]
    assert skipping()([odd, good(1), good(2)])["id"] == ["row-1", "row-2"]
    assert skipping()([good(1), odd, good(2), odd])["id"] == ["row-1", "row-2"]
    wide = {**good(3), "pixel_values": torch.zeros(8, 5)}
    assert skipping()([good(1), wide, good(2)])["id"] == ["row-1", "row-2"]


@quiet
def test_an_inner_function_that_empties_its_examples_may_be_called_again() -> None:
    def inner(examples: Any) -> Any:
        return PaddingCollator()([{name: one.pop(name) for name in list(one)} for one in examples])

    examples = [good(0), truncated(1)]
    assert skipping(inner)(examples)["id"] == ["row-0"]
    assert examples[0]["id"] == "row-0"


def test_each_kind_is_warned_of_once_and_every_drop_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    collate = skipping()
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.INFO):
        warnings.simplefilter("always")
        for number in range(3):
            collate([good(0), truncated(number), {"labels": [1]}])
    said = [str(warning.message) for warning in caught if warning.category is RejectWarning]
    assert len(said) == len(caught) == 2
    assert "SpanMismatchError: row 0, image 0: found 1 placeholder token" in said[0]
    assert "MRopeError: row 0: the example has no input_ids" in said[1]
    assert sum("rejected example" in record.message for record in caplog.records) == 6


@quiet
def test_a_line_says_which_example_and_why(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rejects.jsonl"
    collate = skipping(rejects=file)
    assert list(file.parent.iterdir()) == [] == read_rejects(file)
    before = time.time()
    collate([good(0), truncated(7)])
    collate([{"input_ids": "x", "index": torch.tensor(5)}, good(1), {INDEX: 9}])
    first, second, third = read_rejects(file)
    moment = first.pop("time")
    assert moment > "2026" and moment.endswith("+00:00") and before <= time.time()
    cause = "the row ends inside it: truncated at max_length after the processor ran"
    assert first == {
        "rank": os.environ.get("RANK"),
        "worker": None,
        "process": os.getpid(),
        "event": "rejected",
        "id": "row-7",
        "place": 1,
        "error": "SpanMismatchError",
        "row": 0,
        "span": 0,
        "modality": "image",
        "found": 1,
        "needed": 2,
        "cause": cause,
        "message": "row 0, image 0: found 1 placeholder token, but its grid [1, 2, 4], merged by "
        f"2, needs 2. Likely cause: {cause}.",
    }
    assert (second["index"], second["place"], second["error"]) == (5, 0, "MRopeError")
    assert (third["index"], third["place"], third["cause"]) == (9, 2, None)


@quiet
def test_the_index_of_a_dataset_does_not_reach_the_batch() -> None:
    dataset = Indexed([good(0), good(1)])
    assert len(dataset) == 2 and dataset[1][INDEX] == 1
    assert_same(skipping()([dataset[0], dataset[1]]), MRopeCollator(None, SPEC)([good(0), good(1)]))


@quiet
def test_the_batch_holds_the_count_under_the_key_that_was_asked_for() -> None:
    collate = skipping(count_key="dropped")
    assert collate([good(0), good(1)])["dropped"] == 0
    assert collate([good(0), truncated(1), truncated(2)])["dropped"] == 2
    assert collate([truncated(1), truncated(2)])["dropped"] == 2
    with pytest.raises(MRopeError, match="already gave dropped"):
        skipping(
            lambda examples: {**PaddingCollator()(examples), "dropped": 1}, count_key="dropped"
        )([good(0)])


@quiet
@pytest.mark.parametrize("limit", [0, 2])
def test_a_count_of_rejects_stops_the_run_with_a_summary(limit: int) -> None:
    collate = skipping(max_rejects=limit)
    for number in range(limit):
        collate([good(0), truncated(number)])
    with pytest.raises(MRopeError) as caught:
        collate([good(0), {"labels": [1]}])
    message = str(caught.value)
    assert f"max_rejects={limit}: process {os.getpid()} dropped {limit + 1} of" in message
    assert "1 x MRopeError: row 0: the example has no input_ids" in message
    assert limit == 0 or "2 x SpanMismatchError: the row ends inside it: truncated at" in message


@quiet
def test_a_share_of_rejects_is_looked_at_from_the_hundredth_example_on() -> None:
    collate = skipping(max_rejects=0.25)
    for _ in range(33):
        collate([good(0), truncated(1), truncated(2)])
    with pytest.raises(MRopeError, match="max_rejects=0.25: .* dropped 68 of 102 examples"):
        collate([good(0), truncated(1), truncated(2)])
    few = skipping(max_rejects=0.5)
    for _ in range(100):
        few([good(0), truncated(1)])


@quiet
def test_rejects_in_a_row_stop_the_run_and_one_good_example_between_them_does_not() -> None:
    bad = [truncated(number) for number in range(4)]
    collate = skipping(max_rejects_in_a_row=4)
    for _ in range(3):
        collate([*bad[:3], good(0), *bad[:1]])
        collate([good(0)])
    collate([good(0), *bad])
    with pytest.raises(MRopeError, match=r"max_rejects_in_a_row=4, which is no matter of single"):
        collate([bad[0], good(0)])
    # A broken disk ends the run by default, although its share of a long run is small.
    collate = skipping(max_rejects=0.5)
    collate([good(0)] * 300)
    for _ in range(25):
        collate(bad)
    with pytest.raises(MRopeError, match="max_rejects_in_a_row=100, .* dropped 101 of 401"):
        collate(bad[:1])
    collate = skipping(max_rejects_in_a_row=None, stand_in=[good(0)])
    for _ in range(30):
        collate(bad)
    with pytest.raises(ValueError, match=r"max_rejects_in_a_row must be a count .* not 0.5"):
        skipping(max_rejects_in_a_row=0.5)


@pytest.mark.parametrize("limit", [-1, 1.0, 0.0, 1.5, True, float("nan"), "3"])
def test_other_limits_are_refused(limit: Any) -> None:
    with pytest.raises(ValueError, match="max_rejects must be a count .* or a share"):
        skipping(max_rejects=limit)


def test_the_short_forms_of_on_error() -> None:
    options = SkipBad(max_rejects=3)
    assert MRopeCollator(None, SPEC).on_error is None
    assert MRopeCollator(None, SPEC, on_error="skip").on_error == SkipBad()
    assert MRopeCollator(None, SPEC, on_error="skip", max_rejects=3).on_error == options
    assert MRopeCollator(None, SPEC, on_error=options).on_error is options
    message = r"on_error must be one of 'raise', 'skip', SkipBad\(\.\.\.\), not 'ignore'"
    with pytest.raises(ValueError, match=message):
        MRopeCollator(None, SPEC, on_error="ignore")  # type: ignore[arg-type]


@quiet
def test_the_options_are_frozen_and_pickle() -> None:
    options = SkipBad("rejects.jsonl", 0.1, "dropped", [{"input_ids": [7]}])
    assert pickle.loads(pickle.dumps(options)) == options
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.max_rejects = 3  # type: ignore[misc]


def test_a_file_that_cannot_be_written_is_found_at_once(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=f"{tmp_path} is a folder"):
        skipping(rejects=tmp_path)
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="taken"):
        skipping(rejects=tmp_path / "taken" / "rejects.jsonl")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_found_at_once(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        skipping(rejects=tmp_path / "rejects.jsonl")
    tmp_path.chmod(0o700)


def test_what_cannot_be_taken_apart_raises() -> None:
    with pytest.raises(MRopeError, match="found 1 placeholder token"):
        skipping(lambda example: PaddingCollator()([example]))(truncated(1))
    with pytest.raises(MRopeError, match="without examples"):
        skipping()([])


class TestNothingLeft:
    @quiet
    def test_the_last_good_batch_is_repeated_and_written_down(self, tmp_path: Path) -> None:
        file = tmp_path / "rejects.jsonl"
        collate = skipping(rejects=file)
        collate([good(0)])
        last = collate([good(1), truncated(2), good(3)])
        assert_same(collate([truncated(4), truncated(5)]), last)
        assert_same(collate([truncated(6)]), last)
        events = [
            (line["event"], line.get("dropped"), line.get("repeated"))
            for line in read_rejects(file)
        ]
        assert events == [
            ("rejected", None, None),
            *[("rejected", None, None)] * 2,
            ("nothing left", 2, "the last good batch"),
            ("rejected", None, None),
            ("nothing left", 1, "the last good batch"),
        ]

    def test_it_is_warned_of_once(self) -> None:
        collate = skipping()
        collate([good(0)])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            collate([truncated(1)])
            collate([truncated(2)])
        assert len(caught) == 2
        assert "none of the 1 examples of a batch is good; used in its place: the last" in str(
            caught[1].message
        )

    @quiet
    def test_before_the_first_good_batch_the_stand_in_is_taken(self, tmp_path: Path) -> None:
        file = tmp_path / "rejects.jsonl"
        collate = skipping(rejects=file, stand_in=[good(8)])
        assert collate([truncated(1)])["id"] == ["row-8"]
        assert read_rejects(file)[1]["repeated"] == "stand_in"
        assert collate([good(2), truncated(1)])["id"] == ["row-2"]
        assert collate([truncated(1)])["id"] == ["row-2"]

    @quiet
    def test_labels_stay_since_a_mean_over_no_label_is_nan(self) -> None:
        collate = skipping()
        collate([good(0)])
        labels = collate([truncated(1)])["labels"].flatten()
        logits = torch.zeros(len(labels), 128)
        assert torch.nn.functional.cross_entropy(logits, labels).isfinite()
        muted = torch.full_like(labels, -100)
        assert torch.nn.functional.cross_entropy(logits, muted).isnan()

    @quiet
    def test_without_any_good_example_it_raises(self) -> None:
        with pytest.raises(
            MRopeError, match=r"no earlier batch to repeat; pass .*SkipBad.stand_in=.* 2 x Span"
        ):
            skipping()([truncated(1), truncated(2)])


class Table(Dataset[Any]):
    """Rows 0 to `length`, of which `bad` are truncated; fetching `deadly` kills the process."""

    def __init__(self, length: int, bad: Sequence[int], deadly: int = -1) -> None:
        self.length, self.bad, self.deadly = length, frozenset(bad), deadly

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == self.deadly:
            # Batches that a dead worker has not handed over yet would be another error.
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        return truncated(index % 20) if index in self.bad else good(index % 20)


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield truncated(1)
        yield good(2)


def loader(table: Any, collate: Any, **options: Any) -> Any:
    return DataLoader(
        table, collate_fn=collate, num_workers=2, multiprocessing_context="fork", **options
    )


@quiet
class TestWorkers:
    def test_a_worker_without_a_good_batch_takes_the_datasets_first_good_example(
        self, tmp_path: Path
    ) -> None:
        file = tmp_path / "rejects.jsonl"
        table = Indexed(Table(8, bad=[0, 1, 2, 3]))
        batches = list(loader(table, skipping(rejects=file), batch_size=2))
        assert [batch["id"] for batch in batches] == [
            ["row-4"], ["row-4"], ["row-4", "row-5"], ["row-6", "row-7"]]  # fmt: skip
        written = read_rejects(file)
        assert sorted(line["index"] for line in written if "index" in line) == [0, 1, 2, 3]
        assert [line["repeated"] for line in written if "repeated" in line] == ["the dataset"] * 2
        assert {line["worker"] for line in written} == {0, 1}
        assert len({line["process"] for line in written} | {os.getpid()}) == 3

    def test_a_forked_process_counts_for_itself(self) -> None:
        collate = skipping(max_rejects=4, count_key="dropped")
        with pytest.warns(RejectWarning):
            collate([good(0), *map(truncated, range(4))])
        table = Table(8, bad=[0, 2, 4, 6])
        assert sum(batch["dropped"] for batch in loader(table, collate, batch_size=2)) == 4

    def test_it_pickles_without_what_the_process_has_seen(self) -> None:
        collate = skipping()
        small = len(pickle.dumps(collate))
        collate([good(0), truncated(1)])
        assert len(pickle.dumps(collate)) == small
        with pytest.raises(MRopeError, match="no earlier batch"):
            pickle.loads(pickle.dumps(collate))([truncated(1)])

    def test_a_stream_needs_the_stand_in(self) -> None:
        with pytest.raises(MRopeError, match="no earlier batch to repeat"):
            list(loader(Streamed(), skipping()))
        assert len(list(loader(Streamed(), skipping(stand_in=[good(3)])))) == 4

    def test_max_rejects_stops_the_loader(self) -> None:
        table = Table(40, bad=range(1, 40, 2))
        with pytest.raises(MRopeError, match=r"max_rejects=3: worker \d dropped 4 of 8 examples"):
            list(loader(table, skipping(max_rejects=3), batch_size=2))

    def test_a_killed_worker_is_the_loaders_error_and_the_file_is_whole(
        self, tmp_path: Path
    ) -> None:
        file = tmp_path / "rejects.jsonl"
        table = Indexed(Table(400, bad=range(0, 400, 2), deadly=301))
        numbers = enumerate(loader(table, skipping(rejects=file), batch_size=2), start=1)
        taken: deque[tuple[int, Any]] = deque(maxlen=1)
        with pytest.raises(RuntimeError, match=r"worker \(pid.*(killed by signal|exited)"):
            taken.extend(numbers)
        written = [line["index"] for line in read_rejects(file)]
        assert len(set(written)) == len(written) >= taken[0][0] > 100
        assert set(range(0, 2 * taken[0][0], 2)) <= set(written)


class TestTheFiles:
    def test_each_process_has_its_own_named_by_rank_and_worker(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "rejects.jsonl"
        monkeypatch.delenv("RANK", raising=False)
        pattern = rf"rejects\.main-pid{os.getpid()}-[0-9a-f]{{8}}\.jsonl"
        assert re.fullmatch(pattern, process_file(path).name)
        monkeypatch.setenv("RANK", "3")
        pattern = rf"rejects\.rank3-main-pid{os.getpid()}-[0-9a-f]{{8}}\.jsonl"
        assert re.fullmatch(pattern, process_file(path).name)
        # A process that was restarted with the same id, as in a container, begins another file.
        assert process_file(path) != process_file(path)

    @quiet
    def test_workers_of_all_passes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "1")
        path = tmp_path / "rejects.jsonl"
        numbered = Indexed(Table(8, bad=[0, 3]))
        batches = loader(numbered, skipping(rejects=path), batch_size=2)
        for _ in range(2):
            list(batches)
        names = sorted(file.name.split("-pid")[0] for file in tmp_path.iterdir())
        assert names == ["rejects.rank1-worker0"] * 2 + ["rejects.rank1-worker1"] * 2
        assert sorted(line["index"] for line in read_rejects(path)) == [0, 0, 3, 3]

    def test_they_are_read_in_the_order_of_time(self, tmp_path: Path) -> None:
        path = tmp_path / "rejects.jsonl"
        files = [process_file(path), process_file(path)]
        for number in range(6):
            append_record(files[number % 2], {"id": number})
        assert [line["id"] for line in read_rejects(path)] == list(range(6))

    def test_files_of_other_names_are_not_read(self, tmp_path: Path) -> None:
        for name in ("rejects.jsonl", "other.jsonl", "rejects.json", "rejects"):
            append_record(process_file(tmp_path / name), {"id": name})
        for name in ("rejects.jsonl", "rejects.old.jsonl", "rejects.main-pid1-notes.jsonl"):
            (tmp_path / name).write_text("no JSON\n")
        for name in ("rejects.jsonl", "other.jsonl", "rejects.json", "rejects"):
            assert [line["id"] for line in read_rejects(tmp_path / name)] == [name]
        with pytest.raises(FileNotFoundError):
            read_rejects(tmp_path / "no" / "rejects.jsonl")

    def test_a_torn_last_line_is_skipped_and_other_damage_is_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "rejects.jsonl"
        file = process_file(path)
        append_record(file, {"id": 1})
        whole = file.read_bytes()
        file.write_bytes(whole + whole[:-7])
        assert [line["id"] for line in read_rejects(path)] == [1]
        file.write_bytes(whole[:-7] + b"\n" + whole)
        with pytest.raises(MRopeError, match=f"{file.name} holds a line that is not JSON"):
            read_rejects(path)
        file.write_bytes(whole[:7])
        assert read_rejects(path) == []


def _write_for_ever(path: str, name: int) -> None:
    file = process_file(Path(path))
    for number in range(1 << 30):
        append_record(file, {"id": [name, number], "message": "x" * (number % 7000)})


def test_writers_that_are_killed_at_any_moment_lose_their_last_line_at_most(
    tmp_path: Path,
) -> None:
    """Lines of up to two pages from four processes, each killed as it writes, twice."""
    path = tmp_path / "rejects.jsonl"
    context = multiprocessing.get_context("fork")
    counts: dict[int, int] = {}
    for name in range(2):
        running = [
            context.Process(target=_write_for_ever, args=(str(path), 4 * name + i))
            for i in range(4)
        ]
        for process in running:
            process.start()
        # On a slow machine too, each has written several hundred lines before it is killed.
        while _large_files(tmp_path) < 4 * (name + 1):
            time.sleep(0.001)
        for process in running:
            process.kill()
            process.join()
    for line in sorted(read_rejects(path), key=lambda line: list(line["id"])):
        name, number = line["id"]
        assert number == counts.get(name, 0)  # none is missing within what a process wrote
        counts[name] = number + 1
    assert len(counts) == 8 and min(counts.values()) > 100


def _large_files(folder: Path) -> int:
    """Count files above 64 KiB: line n has n bytes of text, so that these have over 100 lines."""
    return sum(file.stat().st_size > 2**16 for file in folder.iterdir())


class Model(torch.nn.Module):
    """Reads tokens, pixels and positions; its loss is the mean over labels."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(128, 8)
        self.pixels = torch.nn.Linear(3, 8)
        self.out = torch.nn.Linear(8, 128)

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        hidden = self.tokens(batch["input_ids"]) + batch["position_ids"].sum(0)[..., None] * 0.01
        hidden = hidden + self.pixels(batch["pixel_values"]).mean(0)
        return torch.nn.functional.cross_entropy(
            self.out(hidden).flatten(0, 1), batch["labels"].flatten()
        )


def _train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    model = DistributedDataParallel(Model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # Rank 1: its first batch and the fourth to sixth have no good example; rank 0 has one bad row.
    table = Indexed(Table(24, bad=[0, 1, 6, 7, 8, 9, 10, 11] if rank else [3]))
    collate = skipping(rejects=f"{folder}/rejects.jsonl", stand_in=[good(9)] if rank else None)
    losses = []
    for batch in DataLoader(table, batch_size=2, collate_fn=collate):
        loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    torch.save((losses, weights), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(120)
def test_ranks_stay_in_step_when_one_has_batches_with_nothing_left(tmp_path: Path) -> None:
    spawn: Any = mp.spawn  # type: ignore[attr-defined]
    spawn(_train, (str(tmp_path),), nprocs=2)
    (first, weights), (second, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(first) == len(second) == 12
    assert np.isfinite(first).all() and np.isfinite(second).all()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights, others, strict=True))
    written = read_rejects(tmp_path / "rejects.jsonl")
    found = {(line["rank"], line["index"]) for line in written if line["event"] == "rejected"}
    assert found == {("0", 3)} | {("1", index) for index in (0, 1, 6, 7, 8, 9, 10, 11)}
    sources = [line["repeated"] for line in written if line["event"] == "nothing left"]
    assert sources == ["stand_in", *["the last good batch"] * 3]

"""Batch layout survives what cuts dim 0; model layout, and pixels, refuse to be cut."""

from __future__ import annotations

import copy
import os
import pickle
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from mrope import (
    MRopeCollator,
    MRopeError,
    MRopeSpec,
    rope_index,
    to_batch_layout,
    to_model_layout,
)
from mrope.collate.layouts import CheckedBatch
from mrope.collate.padding import PaddingCollator
from mrope.spec.spec import example_config

SPEC = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
IMAGE = 102
COLUMNS = ("input_ids", "attention_mask", "position_ids", "rope_deltas")


def rows(count: int, images: bool = False) -> list[dict[str, Any]]:
    """Rows of up to 7 tokens, each of another length."""
    made: list[dict[str, Any]] = [{"input_ids": [7] * (n % 7 + 1)} for n in range(count)]
    for number, row in enumerate(made if images else []):
        row["input_ids"] = [IMAGE, IMAGE, *row["input_ids"]]
        row |= {"image_grid_thw": [[1, 2, 4]], "pixel_values": torch.full((8, 2), float(number))}
    return made


def collator(layout: Any, **options: Any) -> MRopeCollator:
    inner = PaddingCollator(padding_side="left", pad_to_multiple_of=8)
    return MRopeCollator(inner, SPEC, layout=layout, **options)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_the_layouts_hold_the_same_numbers(size: int) -> None:
    model, batch = (collator(layout)(rows(size)) for layout in ("model", "batch"))
    assert batch["position_ids"].shape == (size, 3, 8) and batch["position_ids"].is_contiguous()
    assert batch["batch_first"].tolist() == [True] * size
    back = to_model_layout(batch)
    assert torch.equal(back["position_ids"], model["position_ids"])
    assert back.keys() == model.keys()
    assert to_model_layout(back) == back  # nothing to do
    again = to_batch_layout(back)
    assert torch.equal(again["position_ids"], batch["position_ids"])
    assert torch.equal(to_batch_layout(again)["position_ids"], batch["position_ids"])


def test_flattened_rows_have_four() -> None:
    batch = collator("batch", packing="flatten")(rows(3))
    assert batch["position_ids"].shape == (1, 4, 6)
    assert batch["position_ids"][0, 0].tolist() == [0, 0, 1, 0, 1, 2]


@pytest.mark.parametrize("part", [slice(0, 2), slice(2, 4), slice(1, 2)])
def test_a_batch_in_batch_layout_is_cut_like_any_other(part: slice) -> None:
    whole = collator("batch")(rows(4))
    cut = CheckedBatch({name: value[part] for name, value in whole.items()})
    expected = rope_index(SPEC, cut["input_ids"], cut["attention_mask"])[0]
    assert torch.equal(to_model_layout(cut)["position_ids"], torch.from_numpy(expected))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("parts", [2, 3])
def test_model_layout_refuses_to_be_cut_or_joined(size: int, parts: int) -> None:
    whole = collator("model")(rows(size))
    with pytest.raises(
        MRopeError, match=r"do not fit input_ids .* MRopeCollator\(layout='batch'\)"
    ):
        CheckedBatch({name: torch.cat([value] * parts) for name, value in whole.items()})
    for start in range(size if size > 1 else 0):
        with pytest.raises(MRopeError, match=r"\(rope.layout: batch\), or dispatch_batches=False"):
            CheckedBatch({name: value[start : start + 1] for name, value in whole.items()})


def test_a_model_does_not_take_cut_pixels_either() -> None:
    """Whoever cuts them without accelerate gets the error of the model."""
    models = pytest.importorskip("support.models", exc_type=ImportError)
    inner = PaddingCollator()
    whole = MRopeCollator(inner, models.tiny_spec("qwen2_vl"), layout="batch")(
        models.tiny_examples("qwen2_vl", videos=False, rows=4)
    )
    cut = CheckedBatch({name: value[:2] for name, value in whole.items()})
    with pytest.raises((RuntimeError, ValueError)):
        models.tiny_model("qwen2_vl")(**to_model_layout(cut))


def test_a_batch_that_is_whole_is_copied_pickled_and_moved_without_a_word() -> None:
    for layout in ("model", "batch"):
        whole = collator(layout)(rows(2, images=True))
        for made in (
            copy.copy(whole),
            pickle.loads(pickle.dumps(whole)),
            type(whole)({name: value.to("meta") for name, value in whole.items()}),
        ):
            assert type(made) is CheckedBatch and made.keys() == whole.keys()


class Stream(IterableDataset[dict[str, Any]]):
    def __init__(self, images: bool) -> None:
        self.rows = rows(8, images)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


def dispatch(rank: int, port: int, layout: str, split: bool, images: bool, folder: str) -> None:
    """One of two processes: run accelerate's dispatcher; write what came, or the error."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DataLoaderConfiguration

    # The process is forked: what tests before left in it does not count.
    AcceleratorState._reset_state(reset_partial_state=True)
    configuration = DataLoaderConfiguration(dispatch_batches=True, split_batches=split)
    accelerator = Accelerator(cpu=True, dataloader_config=configuration)
    loader: Any = DataLoader(Stream(images), batch_size=4, collate_fn=collator(layout))
    loader = accelerator.prepare(loader)
    found: Any = []
    try:
        for batch in loader:
            found.append({name: batch[name].clone() for name in batch})
    except Exception as error:  # noqa: BLE001 - whatever it is, the test looks at it
        found = f"{type(error).__name__}: {error}"
    torch.save(found, Path(folder) / f"{rank}.pt")
    os._exit(0)  # the other process may wait in a broadcast that nobody will make


def dispatched(tmp_path: Path, layout: str, *, split: bool = True, images: bool = False) -> Any:
    """Return what each of two processes got."""
    pytest.importorskip("accelerate")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, layout, split, images, str(tmp_path))
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=dispatch, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("split", [True, False], ids=["one batch is cut", "two are joined and cut"])
def test_accelerate_dispatches_batch_layout(tmp_path: Path, split: bool) -> None:
    pytest.importorskip("accelerate")
    received = dispatched(tmp_path, "batch", split=split)
    lengths = []
    for batches in received:
        assert len(batches) == (2 if split else 1)
        for batch in batches:
            expected, deltas = rope_index(SPEC, batch["input_ids"], batch["attention_mask"])
            positions = to_model_layout(batch)["position_ids"]
            assert torch.equal(positions, torch.from_numpy(expected))
            assert torch.equal(batch["rope_deltas"], torch.from_numpy(deltas))
            lengths += batch["attention_mask"].sum(dim=1).tolist()
    assert sorted(lengths) == sorted(len(row["input_ids"]) for row in rows(8))


@pytest.mark.parametrize(
    ("layout", "images", "message"),
    [
        ("model", False, r"position_ids \(2, 4, 8\) do not fit input_ids \(2, 8\).*layout='batch'"),
        (
            "batch",
            True,
            "about to dispatch a batch with pixel_values.*dispatch_batches=False",
        ),
    ],
)
def test_accelerate_is_refused_what_it_would_tear(
    tmp_path: Path, layout: str, images: bool, message: str
) -> None:
    """In both processes; or the other one loses its peer in the middle of a broadcast."""
    found = dispatched(tmp_path, layout, images=images)
    assert all(isinstance(error, str) for error in found), found
    named = [error for error in found if error.startswith("MRopeError: ")]
    assert named and all(re.search(message, error) for error in named), found

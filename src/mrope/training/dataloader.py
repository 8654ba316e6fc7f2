"""Prepare the rows that a config's `data` section names, and make the DataLoader over them.

All preparation runs in the main process; workers read finished columns. They import this module
when they unpickle the dataset, so that it imports nothing heavier than torch at its top.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from mrope.collate.collator import Collate, MRopeCollator
from mrope.collate.read import PIXELS
from mrope.collate.skip_bad import Indexed
from mrope.columns import COLUMNS, columns
from mrope.errors import MRopeError
from mrope.positions.spans import token_types
from mrope.prepare.sampler import TokenBudgetSampler
from mrope.prepare.streams import TokenBudgetStream
from mrope.prepare.work import WorkModel
from mrope.training.open_source import open_source, split_source
from mrope.training.synthetic import SyntheticRows, patch_shape

if TYPE_CHECKING:
    import datasets

    from mrope.spec.spec import MRopeSpec
    from mrope.training.demo.processing import Processing
    from mrope.training.sections import Config, DataSection

_DEMO_ROWS = 80
GRIDS = tuple(name for name in columns("item", means="size") if COLUMNS[name].sides == 3)
CROPS = tuple(name for name in columns("item", means="size") if COLUMNS[name].sides == 2)
_COLUMNS = ("input_ids", "attention_mask", "labels", "mm_token_type_ids", *PIXELS, *GRIDS)
_SECONDS, _EXPERT_TYPES = "second_per_grid_ts", "moe_mm_token_type_ids"


class TensorRows(Dataset[dict[str, torch.Tensor]]):
    """Rows of a `datasets.Dataset` as tensors, each without the columns that are empty in it.

    A table has every column in every row, null or an empty list in rows without images. A batch
    without images must not have the key at all.

    Args:
        columns: of the rows.
    """

    def __init__(self, columns: datasets.Dataset) -> None:
        # The format is applied when a row is read, in the worker; the table stays memory-mapped.
        self.columns = columns.with_format("torch")

    def __len__(self) -> int:
        return len(self.columns)

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each row, int64 (N,)."""
        return np.array([len(ids) for ids in self.columns.with_format("numpy")["input_ids"]])

    def patches(self) -> npt.NDArray[np.int64]:
        """Return the number of patches of each row, images and clips together, int64 (N,)."""
        return np.array([grids.prod(axis=1).sum() for grids in self._grids()], np.int64)

    def patch_pairs(self) -> npt.NDArray[np.int64]:
        """Return the sum of squared patches over the images and frames of each row, int64 (N,)."""
        pairs = (grids[:, 0] @ grids[:, 1:].prod(axis=1) ** 2 for grids in self._grids())
        return np.array([*pairs], np.int64)

    def segments(self) -> npt.NDArray[np.int64]:
        """Return the number of images and frames of each row, int64 (N,)."""
        return np.array([grids[:, 0].sum() for grids in self._grids()], np.int64)

    def _grids(self) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the grids of each row, images and clips together, int64 (grids, 3)."""
        names = [name for name in GRIDS if name in self.columns.column_names]
        columns = self.columns.with_format("numpy").select_columns(names)
        none = np.empty((0, 3), np.int64)
        for row in columns if names else [{}] * len(self):
            # A null in a column of arrays comes back as one NaN of no dimension.
            given = (grid for grid in row.values() if np.ndim(grid) == 2)
            yield np.concatenate([none, *given])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.columns[index]
        # A null in a column of arrays comes back as one NaN of no dimension.
        return {
            name: value
            for name, value in row.items()
            if isinstance(value, torch.Tensor) and value.ndim and len(value)
        }


RowDataset = TensorRows | SyntheticRows


class RowStream(IterableDataset[dict[str, Any]]):
    """Read the rows of a map-style dataset in order, every worker its own ones.

    Args:
        rows: map-style dataset.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index in range(first, len(self.rows), step):
            yield self.rows[index]


def measure_row(row: Mapping[str, Any]) -> tuple[int, int]:
    """Return tokens and patches of a row."""
    return len(row["input_ids"]), sum(int(row[name].prod(1).sum()) for name in GRIDS if name in row)


class WithProcessId:
    """Collate with `collate`, and return (batch, id of the process that collated it).

    Args:
        collate: any collate function.
    """

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, examples: Any) -> tuple[Any, int]:
        """Return the batch of `examples`, and the id of this process."""
        return self.collate(examples), os.getpid()


def prepare_rows(cfg: Config, spec: MRopeSpec, model_config: Any) -> RowDataset:
    """Open or make the dataset that a config names, and turn it into columns.

    Args:
        cfg: the training config.
        spec: of the model.
        model_config: the model's live transformers config.

    Raises:
        MRopeError: the dataset cannot be read, or has neither token columns nor conversations.
    """
    if cfg.data.shape is not None:
        vision = model_config.vision_config
        dtype = getattr(torch, cfg.train.dtype)
        rows = cfg.data.rows or _DEMO_ROWS
        return SyntheticRows(spec, cfg.data.shape, rows, patch_shape(spec, vision), dtype)
    table = open_table(cfg)
    if "input_ids" in table.column_names:
        return TensorRows(_tokenized(table, spec))
    return TensorRows(_processed(table, cfg, spec, model_config))


def open_table(cfg: Config) -> datasets.Dataset:
    """Open or make the table that a config names, without processing its rows.

    Raises:
        MRopeError: the table cannot be read, or has neither `input_ids` nor `messages`.
    """
    if cfg.data.source == "demo":
        # Imports datasets and PIL, which workers do without.
        from mrope.training.demo.dataset import photographs

        table = photographs(cfg.data.rows or _DEMO_ROWS, cfg.train.seed)
    else:
        table = _open(cfg.data)
    names = table.column_names
    if not {"input_ids", "messages"} & set(names):
        raise MRopeError(
            f"data.source: {cfg.data.source} has the columns {', '.join(names)}; a dataset needs "
            "input_ids and labels, or messages"
        )
    return table


def make_loader(cfg: Config, rows: RowDataset, collate: Collate) -> DataLoader[Any]:
    """Make the DataLoader of a config, which yields (batch, id of the process that collated it).

    Rows are shuffled by `train.seed`. Without `dataloader.max_tokens` an incomplete last batch is
    dropped.

    Args:
        cfg: a training config.
        rows: as `prepare_rows` returns them.
        collate: makes the batches.

    Raises:
        MRopeError: fewer rows than one batch takes, or a row above the token budget.
    """
    options = cfg.dataloader
    # The index of a row, under which the rejects file names it, is known to the dataset alone.
    skips = isinstance(collate, MRopeCollator) and collate.on_error is not None
    table = Indexed(rows) if skips else rows
    if options.max_tokens is not None and options.buffer_size is not None:
        stream = _make_stream(cfg, table, options.max_tokens, options.buffer_size)
        return DataLoader(stream, batch_size=None, **_loader_options(cfg, collate))
    if options.max_tokens is not None:
        sampler = make_sampler(cfg, rows, options.max_tokens)
        return DataLoader(table, batch_sampler=sampler, **_loader_options(cfg, collate))
    if len(rows) < options.batch_size:
        raise MRopeError(
            f"dataloader.batch_size is {options.batch_size}, but there are only {len(rows)} rows"
        )
    return DataLoader(
        table,
        batch_size=options.batch_size,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(cfg.train.seed),
        **_loader_options(cfg, collate),
    )


def make_sampler(cfg: Config, rows: RowDataset, max_tokens: int) -> TokenBudgetSampler:
    """Make the batch sampler of a config with `dataloader.max_tokens`.

    Raises:
        MRopeError: a row is above a budget, or the work of the model's tower cannot be counted.
    """
    shapes = cfg.rope.shapes
    ladder = shapes.ladder() if shapes is not None and cfg.rope.enabled else None
    has_rungs = ladder is not None and bool(ladder.patches)
    counts: dict[str, Any] = {}
    # Reading all grids takes time, and is needed by these alone.
    if needs_patches(cfg) or has_rungs:
        counts["patches"] = rows.patches()
    if has_rungs:
        counts["segments"] = rows.segments()
    if cfg.dataloader.balance == "work":
        counts["patch_pairs"] = rows.patch_pairs()
    return TokenBudgetSampler(
        rows.lengths(), max_tokens, **counts, **sampler_options(cfg), shapes=ladder
    )


def needs_patches(cfg: Config) -> bool:
    """Return whether the sampler of a config counts patches, whatever its ladder."""
    return cfg.dataloader.max_patches is not None or cfg.dataloader.balance == "work"


def sampler_options(cfg: Config) -> dict[str, Any]:
    """Return the arguments of a config's sampler that neither rows nor ladder decide.

    Raises:
        MRopeError: the work of the model's tower cannot be counted.
    """
    by_work = cfg.dataloader.balance == "work"
    return {
        "max_patches": cfg.dataloader.max_patches,
        "cost": WorkModel.from_config(cfg.model.config) if by_work else None,
        # The filled-up row must fit into the budget too.
        "pad_to_multiple_of": cfg.rope.pad_to_multiple_of,
        "seed": cfg.train.seed,
    }


def _make_stream(cfg: Config, rows: Any, max_tokens: int, buffer_size: int) -> TokenBudgetStream:
    """Make the stream of batches of a config with `dataloader.buffer_size`."""
    return TokenBudgetStream(
        RowStream(rows),
        max_tokens,
        max_patches=cfg.dataloader.max_patches,
        pad_to_multiple_of=cfg.rope.pad_to_multiple_of,
        buffer_size=buffer_size,
        size=measure_row,
        seed=cfg.train.seed,
        presharded=True,
    )


def _loader_options(cfg: Config, collate: Collate) -> dict[str, Any]:
    """Return the arguments of a DataLoader that do not depend on how batches are sampled."""
    options = cfg.dataloader
    workers: dict[str, Any] = {}
    # A DataLoader without workers raises if it is given any of these.
    if options.num_workers:
        workers = {
            "multiprocessing_context": options.start_method,
            "persistent_workers": options.persistent_workers,
            "prefetch_factor": options.prefetch_factor,
        }
    return {
        "num_workers": options.num_workers,
        "pin_memory": options.pin_memory,
        "collate_fn": WithProcessId(collate),
        **workers,
    }


def _open(section: DataSection) -> datasets.Dataset:
    table = open_source(section.source)
    return table.select(range(min(section.rows or len(table), len(table))))


def _processed(
    table: datasets.Dataset, cfg: Config, spec: MRopeSpec, model_config: Any
) -> datasets.Dataset:
    process = row_processing(cfg, spec, model_config)
    return table.map(
        process,
        with_indices=True,
        remove_columns=table.column_names,
        features=process.features(),
        desc="Preparing rows",
    )


def row_processing(cfg: Config, spec: MRopeSpec, model_config: Any) -> Processing:
    """Return the processing that turns rows of `messages` into columns, as a config asks.

    Raises:
        MRopeError: the tokenizer is not that of the model.
    """
    from mrope.training.demo.processing import build_processing

    source, _ = split_source(cfg.data.source)
    return build_processing(
        spec,
        model_config,
        folder=cfg.data.processor or _tokenizer_folder(cfg.model.config),
        min_pixels=cfg.data.min_pixels,
        max_pixels=cfg.data.max_pixels,
        fps=cfg.data.fps,
        pictures=source if source.is_dir() else source.parent,
    )


def _tokenizer_folder(config: Mapping[str, Any] | str) -> str | None:
    """Return the model's folder if it holds a tokenizer, else None."""
    if isinstance(config, str) and (Path(config) / "tokenizer_config.json").is_file():
        return config
    return None


def _tokenized(table: datasets.Dataset, spec: MRopeSpec) -> datasets.Dataset:
    """Check the columns of a tokenized dataset, and keep those that the model reads."""
    names = set(table.column_names)
    if "labels" not in names:
        raise MRopeError(
            "data.source: the dataset has input_ids but no labels, so there is no loss"
        )
    crops = spec.family_row.tower is not None and spec.family_row.tower.sizes == "crops"
    # Checked here, once: the collator would raise the same for every row.
    for pixels, grid in zip(PIXELS, CROPS if crops else GRIDS, strict=True):
        if (pixels in names) != (grid in names):
            have, lack = (pixels, grid) if pixels in names else (grid, pixels)
            raise MRopeError(f"data.source: the dataset has {have} but no {lack}")
    if "mm_token_type_ids" not in names:
        table = table.map(_add_types, fn_kwargs={"spec": spec}, desc="Marking placeholders")
    # A model's forward refuses keywords that it does not know.
    wanted = dict.fromkeys(model_columns(spec))
    return table.select_columns([name for name in wanted if name in table.column_names])


def model_columns(spec: MRopeSpec) -> tuple[str, ...]:
    """Return the names of the columns that a model of the family reads."""
    row = spec.family_row
    own = [name for name in row.inputs if not name.endswith("_per_sample")]
    if row.timed:
        own.append(_SECONDS)
    if row.tower is not None and "pairs" in row.tower.tensors:
        # Without it ERNIE's forward sends images to the experts of text, without an error.
        own.append(_EXPERT_TYPES)
    return (*_COLUMNS, *own)


def _add_types(row: Mapping[str, Any], spec: MRopeSpec) -> dict[str, Any]:
    # Without this column transformers' own forward raises, or falls back to 1-D positions.
    return {"mm_token_type_ids": token_types(spec, np.asarray(row["input_ids"]))}

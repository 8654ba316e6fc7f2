"""From the config's `data` section to a DataLoader.

Everything is prepared in the main process. Workers read finished columns; they unpickle this module
and the dataset, so that nothing heavier than torch is imported at its top.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from mrope.collate.collator import Collate, MRopeCollator
from mrope.collate.skip_bad import Indexed
from mrope.errors import MRopeError
from mrope.positions.spans import token_types
from mrope.prepare.sampler import TokenBudgetSampler
from mrope.training.synthetic import SyntheticRows, patch_values

if TYPE_CHECKING:
    import datasets

    from mrope.spec.spec import MRopeSpec
    from mrope.training.demo.processing import Processing
    from mrope.training.sections import Config, DataSection

_DEMO_ROWS = 80
_GRIDS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
_COLUMNS = ("input_ids", "attention_mask", "labels", "mm_token_type_ids", *_GRIDS, *_GRIDS.values())
_SECONDS = "second_per_grid_ts"


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Rows of a `datasets.Dataset` as tensors, without the columns that a row does not use.

    A table has every column in every row; a row without images holds a null or an empty list there,
    and a batch must not have the key at all when none of its rows do.
    """

    def __init__(self, columns: datasets.Dataset) -> None:
        self.columns = columns.with_format("torch")

    def __len__(self) -> int:
        return len(self.columns)

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the tokens of each row, (N,)."""
        return np.array([len(ids) for ids in self.columns.with_format("numpy")["input_ids"]])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.columns[index]
        # A null in a column of arrays comes back as one NaN without a dimension.
        return {
            name: value
            for name, value in row.items()
            if isinstance(value, torch.Tensor) and value.ndim and len(value)
        }


RowDataset = Rows | SyntheticRows


class Stamped:
    """A collate function that says in which process it ran: it returns (batch, process id)."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, examples: Any) -> tuple[Any, int]:
        """Return the batch of `examples`, and the id of this process."""
        return self.collate(examples), os.getpid()


def load_rows(cfg: Config, spec: MRopeSpec, model_config: Any) -> RowDataset:
    """Open or make the dataset that a config names, and bring it into columns.

    Args:
        cfg: the training config.
        spec: the model's numbers.
        model_config: the model's live transformers config.

    Raises:
        MRopeError: the dataset cannot be read, or has neither token columns nor conversations.
    """
    if cfg.data.shape is not None:
        vision = model_config.vision_config
        dtype = getattr(torch, cfg.train.dtype)
        rows = cfg.data.rows or _DEMO_ROWS
        return SyntheticRows(spec, cfg.data.shape, rows, patch_values(vision), dtype)
    table = open_table(cfg)
    if "input_ids" in table.column_names:
        return Rows(_tokenized(table, spec))
    return Rows(_processed(table, cfg, spec, model_config))


def open_table(cfg: Config) -> datasets.Dataset:
    """Open or make the table that a config names, as it is: nothing is processed.

    Raises:
        MRopeError: it cannot be read, or has neither `input_ids` nor `messages`.
    """
    if cfg.data.source == "demo":
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
    """Return the DataLoader of a config: shuffled by the seed; by rows, whole batches only.

    Raises:
        MRopeError: there are fewer rows than one batch takes, or a row is beyond the token budget.
    """
    options = cfg.dataloader
    skips = isinstance(collate, MRopeCollator) and collate.rejects is not None
    table = Indexed(rows) if skips else rows
    if options.max_tokens is not None:
        sampler = TokenBudgetSampler(
            rows.lengths(),
            options.max_tokens,
            pad_to_multiple_of=cfg.rope.pad_to_multiple_of,
            seed=cfg.train.seed,
        )
        return DataLoader(table, batch_sampler=sampler, **_common(cfg, collate))
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
        **_common(cfg, collate),
    )


def _common(cfg: Config, collate: Collate) -> dict[str, Any]:
    """Return the arguments of a DataLoader that do not say which rows make a batch."""
    options = cfg.dataloader
    workers: dict[str, Any] = {}
    if options.num_workers:
        workers = {
            "multiprocessing_context": options.start_method,
            "persistent_workers": options.persistent_workers,
            "prefetch_factor": options.prefetch_factor,
        }
    return {
        "num_workers": options.num_workers,
        "pin_memory": options.pin_memory,
        "collate_fn": Stamped(collate),
        **workers,
    }


def _open(section: DataSection) -> datasets.Dataset:
    import datasets

    path = Path(section.source)
    try:
        if path.is_dir():
            table = datasets.load_from_disk(str(path))
        elif path.suffix == ".parquet":
            table = datasets.Dataset.from_parquet(str(path))
        else:
            table = datasets.Dataset.from_json(str(path))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise MRopeError(f"data.source: {path} cannot be read: {error}") from error
    except (IndexError, StopIteration) as error:  # how an empty folder and an empty file fail
        raise MRopeError(f"data.source: {path} has no rows") from error
    if not isinstance(table, datasets.Dataset):
        raise MRopeError(
            f"data.source: {path} holds the splits {', '.join(table)}; name the folder of one"
        )
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
    """Return what turns a row of `messages` into columns, as a config asks for it.

    Raises:
        MRopeError: the tokenizer and the model's config do not fit together.
    """
    from mrope.training.demo.processing import build_processing

    source = Path(cfg.data.source)
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
    """Return the model's folder if it holds a tokenizer too."""
    if isinstance(config, str) and (Path(config) / "tokenizer_config.json").is_file():
        return config
    return None


def _tokenized(table: datasets.Dataset, spec: MRopeSpec) -> datasets.Dataset:
    """Check the columns of a tokenized dataset, and keep those that a model reads."""
    names = set(table.column_names)
    if "labels" not in names:
        raise MRopeError(
            "data.source: the dataset has input_ids but no labels, so there is no loss"
        )
    for pixels, grid in _GRIDS.items():
        if (pixels in names) != (grid in names):
            have, lack = (pixels, grid) if pixels in names else (grid, pixels)
            raise MRopeError(f"data.source: the dataset has {have} but no {lack}")
    if "mm_token_type_ids" not in names:
        table = table.map(_add_types, fn_kwargs={"spec": spec}, desc="Marking placeholders")
    wanted = model_columns(spec)
    return table.select_columns([name for name in wanted if name in table.column_names])


def model_columns(spec: MRopeSpec) -> tuple[str, ...]:
    """Return the names of the columns that a model of this family reads."""
    return (*_COLUMNS, _SECONDS) if spec.family_row.timed else _COLUMNS


def _add_types(row: Mapping[str, Any], spec: MRopeSpec) -> dict[str, Any]:
    # Without this column transformers' own forward raises, or falls back to 1-D positions.
    return {"mm_token_type_ids": token_types(spec, np.asarray(row["input_ids"]))}

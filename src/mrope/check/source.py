"""Open the dataset of a config, to check its rows one at a time.

Unlike training, rows are processed on access, so that one bad row does not stop the others from
being checked. Workers unpickle this module.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mrope.check.rows import CheckedRows, Examples
from mrope.collate.read import PIXELS
from mrope.columns import Columns, NewColumns
from mrope.errors import MRopeError
from mrope.training.dataloader import load_rows, model_columns, open_table
from mrope.training.rows import Rows

if TYPE_CHECKING:
    from mrope.training.sections import Config

# Other columns that an input of a family's rule is read from.
_ALSO = {
    "audio_seqlens": "feature_attention_mask",
    "second_per_grid_ts": "video_second_per_grid",
}
# A dataset that is generated: not a path.
_DEMO = "demo"
# The words by which the command line was called, for errors in the keys that they set.
_OPTIONS = {
    "model.config": "--model",
    "data.source": "--dataset",
    "rope.reference": "--reference",
}


@dataclass(frozen=True)
class MessageRows:
    """Rows of `messages`, each prepared on access; one that cannot be raises its error."""

    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Columns:
        return self.rows.prepare(index)


def check_config(
    config: Path | None,
    model: str | None,
    dataset: str | None,
    *,
    reference: str | None = None,
    rows: int | None = None,
    max_tokens: int | None = None,
    batch_size: int | None = None,
) -> Config:
    """Build a training config from the options of the command line.

    Args:
        config: a training config, whose values the other options override; None: use only those.
        model: `model.config`, relative to the working directory.
        dataset: `data.source`, relative to the working directory, or "demo".
        reference: `rope.reference`.
        rows: `data.rows`, how many of the first rows to use.
        max_tokens: `dataloader.max_tokens`, with flattened batches.
        batch_size: `dataloader.batch_size`, in place of a config's `max_tokens`.

    Raises:
        ConfigError: a value is invalid.
    """
    from mrope.training.config import as_config, load_config
    from mrope.training.sections import ConfigError

    given: dict[str, str | int | None] = {
        "model.config": model,
        "data.source": dataset,
        "rope.reference": reference,
        "data.rows": rows,
        "dataloader.max_tokens": max_tokens,
        "dataloader.batch_size": batch_size,
        "rope.packing": None if max_tokens is None else "flatten",
    }
    if config is not None:
        # Overrides resolve relative paths against the config's folder, not the working directory.
        if model is not None:
            given["model.config"] = str(Path(model).absolute())
        if dataset is not None and dataset != _DEMO:
            given["data.source"] = str(Path(dataset).absolute())
        # Overrides are parsed as YAML, of which JSON is a subset: quoting keeps odd paths intact.
        words = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
        if batch_size is not None:
            words.append("dataloader.max_tokens=null")
        return load_config(config, words)
    table: dict[str, NewColumns] = {}
    for key, value in given.items():
        if value is not None:
            section, _, name = key.partition(".")
            table.setdefault(section, {})[name] = value
    try:
        return as_config(table, Path(), "the command line")
    except ConfigError as error:
        message = str(error)
        for key, option in _OPTIONS.items():
            message = message.replace(f"\n  {key}:", f"\n  {option}:")
        raise ConfigError(message) from None


def open_rows(cfg: Config, *, compare: bool = False) -> CheckedRows:
    """Open the dataset of a config as `CheckedRows`.

    Args:
        cfg: a training config; packing and layout do not affect the check of a single row.
        compare: see `CheckedRows`.

    Raises:
        MRopeError: the dataset cannot be read or has no rows, or the model's config is not usable.
    """
    return CheckedRows(_examples(cfg), cfg.spec(), cfg.vision_spec(), compare=compare)


def _examples(cfg: Config) -> Examples:
    if cfg.data.shape is not None:
        raise MRopeError(
            f"data.source: {cfg.data.source} rows are made up; there are none to check"
        )
    spec = cfg.spec()
    table = open_table(cfg)
    if "input_ids" not in table.column_names:
        made = load_rows(cfg)
        assert isinstance(made, Rows)
        return MessageRows(made)
    wanted = {*model_columns(spec)}
    wanted |= {also for name, also in _ALSO.items() if name in spec.family_row.inputs}
    # Pixels are most of a row's bytes, and position ids do not depend on them.
    wanted -= {*PIXELS}
    columns = table.select_columns([name for name in table.column_names if name in wanted])
    rows: Examples = columns.with_format("numpy")
    return rows

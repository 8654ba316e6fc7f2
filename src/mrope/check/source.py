"""From a config to the rows that `mrope check` and `mrope explain` look at, one at a time.

Unlike in training nothing is prepared ahead: a row that cannot be processed must not keep the
others from being looked at. Workers unpickle this module.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrope.check.rows import CheckedRows, Examples
from mrope.errors import MRopeError
from mrope.training.dataloader import model_columns, open_table, row_processing

if TYPE_CHECKING:
    import datasets

    from mrope.training.demo.processing import Processing
    from mrope.training.sections import Config

# Rows that are made, not kept anywhere: no path.
_DEMO = "demo"


@dataclass(frozen=True)
class MessageRows:
    """Rows of `messages`, each processed when it is asked for."""

    table: datasets.Dataset
    process: Processing

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.process(self.table[index], index)


def check_config(
    config: Path | None,
    model: str | None,
    dataset: str | None,
    *,
    reference: str | None = None,
    rows: int | None = None,
) -> Config:
    """Return a training config with what the command line says in place of its own.

    Args:
        config: a training config; None: `model` and `dataset` are all there is.
        model: what `model.config` is, a path seen from here.
        dataset: what `data.source` is, a path seen from here or "demo".
        reference: what `rope.reference` is.
        rows: what `data.rows` is, how many of the first rows to use.

    Raises:
        ConfigError: one of them is not usable.
    """
    from mrope.training.config import as_config, load_config

    given: dict[str, str | int | None] = {
        "model.config": model,
        "data.source": dataset,
        "rope.reference": reference,
        "data.rows": rows,
    }
    if config is not None:
        # Relative paths in overrides start at the config's folder.
        if model is not None:
            given["model.config"] = str(Path(model).absolute())
        if dataset is not None and dataset != _DEMO:
            given["data.source"] = str(Path(dataset).absolute())
        # An override is read as YAML; JSON is YAML, and keeps a path with odd characters whole.
        words = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
        return load_config(config, words)
    table: dict[str, dict[str, Any]] = {}
    for key, value in given.items():
        if value is not None:
            section, _, name = key.partition(".")
            table.setdefault(section, {})[name] = value
    return as_config(table, Path(), "the command line")


def load_rows(cfg: Config, *, compare: bool = False) -> CheckedRows:
    """Return the rows of a config's dataset, to be looked at.

    Args:
        cfg: a training config; its packing and layout make no difference to a single row.
        compare: see `CheckedRows`.

    Raises:
        MRopeError: the dataset cannot be read or has no rows, or the model's config is not usable.
    """
    return CheckedRows(_examples(cfg), cfg.spec(), cfg.vision_spec(), compare=compare)


def _examples(cfg: Config) -> Examples:
    if cfg.data.shape is not None:
        raise MRopeError(f"data.source: {cfg.data.source} rows are made up; there is none to check")
    spec = cfg.spec()
    table = open_table(cfg)
    if "input_ids" not in table.column_names:
        from mrope.training.model import load_model_config

        return MessageRows(table, row_processing(cfg, spec, load_model_config(cfg)))
    # Pixels are most of a row's bytes, and no position depends on them.
    wanted = [name for name in model_columns(spec) if not name.startswith("pixel_values")]
    columns = table.select_columns([name for name in wanted if name in table.column_names])
    rows: Examples = columns.with_format("numpy")
    return rows

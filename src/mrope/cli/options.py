"""Define the options and arguments that several commands share."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


def split_words(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Separate config paths from `KEY=VALUE` overrides."""
    configs = [Path(word) for word in words if "=" not in word]
    return configs, [word for word in words if "=" in word]


def _in_a_folder(file: Path | None) -> Path | None:
    """Require the folder of an output file to exist, before a long run starts."""
    if file is not None and not file.parent.is_dir():
        raise typer.BadParameter(f"no folder {file.parent}")
    return file


def as_page(file: Path | None) -> Path | None:
    """Require the package that HTML reports need, and the folder of the report."""
    if file is not None:
        importlib.import_module("jinja2")
    return _in_a_folder(file)


def _plottable(file: Path | None) -> Path | None:
    """Require matplotlib, a format that it writes, and the folder of the plot."""
    if file is not None:
        formats = importlib.import_module("matplotlib.backend_bases").FigureCanvasBase.filetypes
        if file.suffix[1:].lower() not in formats:
            raise typer.BadParameter(f"cannot write a plot to {file}; give a name like plot.png")
    return _in_a_folder(file)


class Device(str, Enum):
    """Device of a training run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="Training config (YAML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Values to override, such as trainer.max_steps=3."
    ),
]
ConfigsAndOverrides = Annotated[
    list[str],
    typer.Argument(metavar="CONFIG... [KEY=VALUE]...", help="Training configs, and overrides."),
]
DeviceName = Annotated[Device, typer.Option(help="auto: CUDA if available.")]
TimedSteps = Annotated[int, typer.Option(min=2, help="Timed steps after a warm-up.")]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", callback=_in_a_folder, help="Write the result as JSON."),
]
PlotFile = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE.png", callback=_plottable, help="Save a plot."),
]
Repeats = Annotated[
    int, typer.Option(min=1, help="Interleaved rounds; published figures take 15 or more.")
]
ReferenceName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="transformers-4.57, -5.17 or -5.23: the release to follow; auto: the installed one.",
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="FOLDER_OR_CONFIG",
        help="Local folder of a model, or its config.json; nothing is downloaded.",
    ),
]
DatasetName = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        metavar="PATH",
        help="Folder written by save_to_disk, or a file or folder of Parquet or JSON lines; "
        "PATH:SPLIT names one of several splits.",
    ),
]
RunConfig = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="CONFIG", help="Training config (YAML) for all other settings."
    ),
]
Quick = Annotated[bool, typer.Option("--quick", help="Run only the smallest cases.")]

EngineName = Annotated[
    str | None,
    typer.Option(
        "--engine", help="Compare with a serving engine in place of transformers: sglang."
    ),
]

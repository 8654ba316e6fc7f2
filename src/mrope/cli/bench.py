"""Define the commands of `mrope bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mrope.cli.options import (
    ConfigsAndOverrides,
    Device,
    DeviceName,
    JsonFile,
    PlotFile,
    Quick,
    Repeats,
    TimedSteps,
    split_words,
)

bench_app = typer.Typer(
    help="Time mrope against transformers, on your model and data; save JSON or a plot.",
    no_args_is_help=True,
)


@bench_app.command()
def positions(
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    repeats: Repeats = 15,
    quick: Quick = False,
) -> None:
    """Time position ids against transformers and a copy of the output."""
    from mrope.bench.positions import bench_positions

    bench_positions(repeats, quick, json_file, plot_file)


@bench_app.command()
def stage(
    words: ConfigsAndOverrides,
    json_file: JsonFile = None,
    repeats: Repeats = 15,
) -> None:
    """Time what the collator adds to a worker's batch: positions, vision tensors, flattening."""
    configs, overrides = split_words(words)
    if not configs:
        raise typer.BadParameter("give at least one CONFIG")
    from mrope.bench.stage import bench_stage

    bench_stage(configs, overrides, repeats, json_file)


@bench_app.command()
def step(
    words: ConfigsAndOverrides,
    device: DeviceName = Device.auto,
    steps: TimedSteps = 20,
    variants: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="Only these, such as plain,attached.")
    ] = None,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """Time training steps of a model: plain, with the stage, attached, flattened, compiled."""
    configs, overrides = split_words(words)
    if not configs:
        raise typer.BadParameter("give at least one CONFIG")
    from mrope.bench.step import bench_step

    chosen = None if variants is None else variants.split(",")
    bench_step(configs, overrides, device.value, steps, json_file, plot_file, variants=chosen)


@bench_app.command("syncs")
def sync_counts(
    configs: Annotated[
        list[Path], typer.Argument(metavar="CONFIG...", help="Training configs, one per family.")
    ],
    json_file: JsonFile = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE.md", help="Page to update.")
    ] = None,
) -> None:
    """Count host syncs per step: plain, with position ids, with vision tensors, attached."""
    from mrope.bench.syncs import bench_syncs

    bench_syncs(configs, json_file, markdown_file)

"""Define the commands of `mrope bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mrope.cli.options import Device, JsonFile, PlotFile, Quick, Repeats, split_words

bench_app = typer.Typer(
    help="Time mrope against transformers and other implementations; save JSON or a plot.",
    no_args_is_help=True,
)


@bench_app.command()
def positions(
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    repeats: Repeats = 15,
    quick: Quick = False,
) -> None:
    """Time position ids against transformers, a loop over spans, and a copy of the output."""
    from mrope.bench.positions import bench_positions

    bench_positions(repeats, quick, json_file, plot_file)


@bench_app.command()
def vision(
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    repeats: Repeats = 15,
    quick: Quick = False,
) -> None:
    """Time vision tensors against transformers and a copy of the output."""
    from mrope.bench.vision import bench_vision

    bench_vision(repeats, quick, json_file, plot_file)


@bench_app.command()
def packing(
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    repeats: Repeats = 15,
    quick: Quick = False,
) -> None:
    """Time the stage on padded and flattened batches, and a worker's batch with fixed shapes."""
    from mrope.bench.packing import bench_packing

    bench_packing(repeats, quick, json_file, plot_file)


@bench_app.command()
def omni(json_file: JsonFile = None, repeats: Repeats = 15) -> None:
    """Time position ids of videos with audio (Omni) against transformers."""
    from mrope.bench.omni import bench_omni

    bench_omni(repeats, json_file)


@bench_app.command()
def balance(
    json_file: JsonFile = None,
    examples: Annotated[
        int, typer.Option(min=10_000, help="Examples of the simulated epoch.")
    ] = 60_000,
    repeats: Annotated[int, typer.Option(min=1, help="Timed plans of a million examples.")] = 5,
    quick: Quick = False,
) -> None:
    """Simulate 8, 64 and 512 ranks on batches by tokens, length, visual tokens and work."""
    from mrope.bench.balance import bench_balance

    bench_balance(examples, repeats, quick, json_file)


@bench_app.command()
def step(
    words: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG... [KEY=VALUE]...", help="Training configs, and overrides."),
    ],
    device: Annotated[Device, typer.Option(help="auto: CUDA if available.")] = Device.auto,
    steps: Annotated[int, typer.Option(min=2, help="Timed steps after a warm-up.")] = 20,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """Time training steps of a model with and without the stage, and attached."""
    configs, overrides = split_words(words)
    if not configs:
        raise typer.BadParameter("give at least one CONFIG")
    from mrope.bench.step import bench_step

    bench_step(configs, overrides, device.value, steps, json_file, plot_file)


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

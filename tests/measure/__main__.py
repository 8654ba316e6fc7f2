"""Run a measurement that proves a claim of the docs: `PYTHONPATH=src:tests python -m measure NAME`.

What a user measures on a model and data of their own is `mrope bench`. The scripts for a GPU, and those that
compare two checkouts, are modules of their own: `python -m measure.one_graph`, `python -m measure.stage`.
"""

from __future__ import annotations

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

app = typer.Typer(no_args_is_help=True)


@app.command()
def positions(
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    repeats: Repeats = 15,
    quick: Quick = False,
) -> None:
    """Time position ids as `mrope bench positions` does, and a loop over spans."""
    from measure.rivals import per_span_rope_index
    from mrope.bench.positions import bench_positions

    bench_positions(repeats, quick, json_file, plot_file, {"loop": per_span_rope_index})


@app.command()
def step(
    words: ConfigsAndOverrides,
    device: DeviceName = Device.auto,
    steps: TimedSteps = 20,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """Time training steps as `mrope bench step` does, and positions row by row."""
    from measure.step import measure_steps

    measure_steps(*split_words(words), device.value, steps, json_file, plot_file)


@app.command()
def vision(
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    repeats: Repeats = 15,
    quick: Quick = False,
) -> None:
    """Time vision tensors against transformers and a copy of the output."""
    from measure.vision import bench_vision

    bench_vision(repeats, quick, json_file, plot_file)


@app.command()
def packing(
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    repeats: Repeats = 15,
    quick: Quick = False,
) -> None:
    """Time the stage on padded and flattened batches, and a worker's batch with fixed shapes."""
    from measure.packing import bench_packing

    bench_packing(repeats, quick, json_file, plot_file)


@app.command()
def omni(json_file: JsonFile = None, repeats: Repeats = 15) -> None:
    """Time position ids of videos with audio (Omni) against transformers."""
    from measure.omni import bench_omni

    bench_omni(repeats, json_file)


@app.command()
def balance(
    json_file: JsonFile = None,
    examples: Annotated[
        int, typer.Option(min=10_000, help="Examples of the simulated epoch.")
    ] = 60_000,
    repeats: Annotated[int, typer.Option(min=1, help="Timed plans of a million examples.")] = 5,
    quick: Quick = False,
) -> None:
    """Simulate 8, 64 and 512 ranks on batches by tokens, length, visual tokens and work."""
    from measure.balance import bench_balance

    bench_balance(examples, repeats, quick, json_file)


if __name__ == "__main__":
    app()

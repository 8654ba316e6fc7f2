"""The command line: `mrope train`, `check`, `explain`, `bench` and `syncs`.

Each command imports what it needs when it runs, so that `mrope explain` works without transformers.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as missing:
    sys.stderr.write(f"mrope: no module {missing.name!r}; pip install 'mrope[cli]'\n")
    raise SystemExit(2) from missing

from mrope import __version__
from mrope.errors import MRopeError

if TYPE_CHECKING:
    from mrope.check.explain import Numbered

# Packages that a command may find missing, by import name, and the extra that brings each.
_EXTRAS = {
    "pydantic": "cli",
    "omegaconf": "cli",
    "yaml": "cli",
    "typing_extensions": "cli",
    "jinja2": "cli",
    "transformers": "hf",
    "datasets": "train",
    "PIL": "train",
    "skimage": "train",
    "sklearn": "train",
    "tokenizers": "train",
    "matplotlib": "plot",
}

app = typer.Typer(
    name="mrope",
    help="M-RoPE positions in the DataLoader's workers: train, look, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(
    help="Measure, print a table, and keep the result as JSON or as a picture.",
    no_args_is_help=True,
)
app.add_typer(bench_app, name="bench")


def _in_a_folder(file: Path | None) -> Path | None:
    """Refuse a file that could not be written in the end, before anything is measured."""
    if file is not None and not file.parent.is_dir():
        raise typer.BadParameter(f"no folder {file.parent}")
    return file


def _as_page(file: Path | None) -> Path | None:
    if file is not None:
        importlib.import_module("jinja2")
    return _in_a_folder(file)


def _plottable(file: Path | None) -> Path | None:
    if file is not None:
        importlib.import_module("matplotlib")
    return _in_a_folder(file)


class Device(str, Enum):
    """Where `mrope bench step` runs the model."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A training config, YAML.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values in place of the config's."),
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", callback=_in_a_folder, help="Write the result as JSON."),
]
PlotFile = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE.png", callback=_plottable, help="Save a picture."),
]
Repeats = Annotated[
    int, typer.Option(min=1, help="Turns of each function; 15 or more for figures to keep.")
]
ReferenceName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The release to follow; auto: the installed one."),
]
ModelName = Annotated[
    str | None,
    typer.Option("--model", metavar="FOLDER_OR_CONFIG", help="A model's folder or config.json."),
]
DatasetName = Annotated[
    str | None,
    typer.Option("--dataset", metavar="PATH", help="What data.source takes; see the docs."),
]
RunConfig = Annotated[
    Path | None,
    typer.Option("--config", metavar="CONFIG", help="A training config, YAML, for all the rest."),
]
Quick = Annotated[bool, typer.Option("--quick", help="The smallest cases only, to try it out.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the entry point of `mrope`.

    Args:
        arguments: words after `mrope`; None: those of the process.

    Raises:
        SystemExit: always. 0: done; 1: compared losses differ, or a row is bad; 2: wrong usage or
            wrong input, said in one red message on standard error; 130: Ctrl-C ended a check.
    """
    try:
        app(args=None if arguments is None else list(arguments))
    except MRopeError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        message = f"no module {package!r}; pip install 'mrope[{_EXTRAS[package]}]'"
    Console(stderr=True, soft_wrap=True).print(
        f"mrope: {message}", style="red", markup=False, highlight=False
    )
    raise SystemExit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mrope {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Train twice from one seed, positions from the workers and from the model; exit "
            "with 1 unless every loss is equal.",
        ),
    ] = False,
) -> None:
    """Train as a config says."""
    from mrope.training.config import load_config

    cfg = load_config(config, overrides or ())
    from mrope.training import loop

    if not compare:
        loop.train(cfg)
    elif not loop.compare(cfg):
        raise typer.Exit(1)


@app.command()
def check(
    model: ModelName = None,
    dataset: DatasetName = None,
    config: RunConfig = None,
    reference: ReferenceName = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Look at the first rows only.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that look at rows; without it, the config's number."),
    ] = None,
    json_file: JsonFile = None,
    report_file: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="FILE.html", callback=_as_page, help="Write a page for a browser."
        ),
    ] = None,
) -> None:
    """Look at every row of a dataset before you train; exit with 1 if one is bad."""
    _require_dataset(model, dataset, config)
    from mrope.check.commands import run
    from mrope.check.source import check_config
    from mrope.check.summary import INTERRUPTED

    cfg = check_config(config, model, dataset, reference=reference, rows=limit)
    summary = run(cfg, workers, json_file, report_file)
    if summary.stopped == INTERRUPTED:
        raise typer.Exit(130)
    if summary.stopped is not None:
        raise MRopeError(f"the check stopped after {summary.rows} rows: {summary.stopped}")
    if summary.bad:
        raise typer.Exit(1)


@app.command()
def explain(
    spans: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SPAN]...",
            help="text:N in tokens; image:HxW and video:TxHxW in patches, as in *_grid_thw: "
            "image:4x6 has 2x3 tokens, since 2x2 patches make one.",
        ),
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="The config's model_type; goes with spans.")
    ] = None,
    row: Annotated[
        int | None, typer.Option(min=0, help="A row of a dataset in place of spans, from 0.")
    ] = None,
    model: ModelName = None,
    dataset: DatasetName = None,
    config: RunConfig = None,
    reference: ReferenceName = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="Seconds between two temporal positions of a video (qwen2_5_vl)."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Show every token of long spans.")
    ] = False,
    plot_file: PlotFile = None,
) -> None:
    """Show the positions of a sample: mrope explain --family qwen3_vl text:3 image:4x6 text:2.

    Or of a row of a dataset: mrope explain --model FOLDER --dataset PATH --row 7. Of a bad row,
    where it goes wrong; exit with 1.
    """
    from mrope.check.explain import number, plot, show

    numbered: Numbered | None
    if row is None:
        if not spans or family is None or model or dataset or config:
            raise typer.BadParameter("give SPANs and --family, or --row and a dataset")
        numbered = number(spans, family, reference or "auto", seconds)
    else:
        if spans or family is not None or seconds is not None:
            raise typer.BadParameter("--row takes no SPAN, no --family and no --seconds")
        numbered = _numbered_row(row, model, dataset, config, reference)
    if numbered is None:
        raise typer.Exit(1)
    show(numbered, Console(), everything)
    if plot_file is not None:
        plot(numbered, plot_file)


def _numbered_row(
    row: int, model: str | None, dataset: str | None, config: Path | None, reference: str | None
) -> Numbered | None:
    _require_dataset(model, dataset, config)
    from mrope.check.commands import number_row
    from mrope.check.source import check_config

    return number_row(check_config(config, model, dataset, reference=reference), row)


@bench_app.command()
def positions(
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    repeats: Repeats = 15,
    quick: Quick = False,
) -> None:
    """Time the positions against transformers, a loop over spans, and a copy of the output."""
    from mrope.bench.positions import run

    run(repeats, quick, json_file, plot_file)


@bench_app.command()
def vision(
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    repeats: Repeats = 15,
    quick: Quick = False,
) -> None:
    """Time the vision tensors against transformers and a copy of the output."""
    from mrope.bench.vision import run

    run(repeats, quick, json_file, plot_file)


@bench_app.command()
def packing(
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    repeats: Repeats = 15,
    quick: Quick = False,
) -> None:
    """Time the collator's stage on padded and on flattened batches, 2k to 128k tokens."""
    from mrope.bench.packing import run

    run(repeats, quick, json_file, plot_file)


@bench_app.command()
def omni(json_file: JsonFile = None, repeats: Repeats = 15) -> None:
    """Time the positions of videos with audio, against transformers' own."""
    from mrope.bench.omni import run

    run(repeats, json_file)


@bench_app.command()
def step(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG... [KEY=VALUE]...", help="Training configs, and values in their place."
        ),
    ],
    device: Annotated[Device, typer.Option(help="auto: CUDA where there is one.")] = Device.auto,
    steps: Annotated[int, typer.Option(min=2, help="Steps to time, after a warm-up.")] = 20,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """Time whole training steps."""
    configs, overrides = _split(words)
    if not configs:
        raise typer.BadParameter("give at least one CONFIG")
    from mrope.bench.step import run

    run(configs, overrides, device.value, steps, json_file, plot_file)


@bench_app.command()
def waits(
    configs: Annotated[list[Path], typer.Argument(help="Training configs, a family each.")],
    json_file: JsonFile = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", help="Page whose table is replaced.")
    ] = None,
) -> None:
    """Count the host waits of a step: plain, with positions, with vision tensors, attached."""
    from mrope.bench.waits import run

    run(configs, json_file, markdown_file)


@app.command()
def syncs(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help="A training config, and overrides."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="FOLDER_OR_CONFIG", help="A model, in place of a training config."),
    ] = None,
) -> None:
    """Count what makes the host wait for the device."""
    configs, overrides = _split(words or [])
    if len(configs) + (model is not None) != 1:
        raise typer.BadParameter("give one CONFIG, or --model")
    from mrope.check.syncs import run

    run(configs[0] if configs else None, overrides, model)


def _require_dataset(model: str | None, dataset: str | None, config: Path | None) -> None:
    if config is None and (model is None or dataset is None):
        raise typer.BadParameter("give --model and --dataset, or --config")


def _split(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Tell configs from overrides: `KEY=VALUE` is an override, every other word a path."""
    configs = [Path(word) for word in words if "=" not in word]
    return configs, [word for word in words if "=" in word]

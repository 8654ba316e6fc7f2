"""Define the command line: `mrope train`, `check`, `explain`, `syncs`, `doctor` and `bench`.

Each command imports its modules when it runs, so that `mrope explain` works without transformers.
"""

from __future__ import annotations

import atexit
import importlib.util
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as missing:
    package = (missing.name or "").partition(".")[0]
    sys.stderr.write(f"mrope: no module {package!r}; pip install 'mrope[cli]'\n")
    raise SystemExit(2) from missing

from mrope import __version__
from mrope.cli.bench import bench_app
from mrope.cli.options import (
    ConfigFile,
    DatasetName,
    Device,
    EngineName,
    JsonFile,
    ModelName,
    Overrides,
    PlotFile,
    ReferenceName,
    RunConfig,
    as_page,
    split_words,
)
from mrope.errors import MRopeError

if TYPE_CHECKING:
    from mrope.check.explain import SamplePositions

# Optional packages by import name, and the extra that installs each; named in the error message.
_EXTRAS = {
    "pydantic": "cli",
    "omegaconf": "cli",
    "yaml": "cli",
    "typing_extensions": "cli",
    "jinja2": "cli",
    "transformers": "train",
    "accelerate": "train",
    "peft": "train",
    "datasets": "train",
    "PIL": "train",
    "skimage": "train",
    "sklearn": "train",
    "tokenizers": "train",
    "matplotlib": "plot",
}

_WORKER_TRACEBACK = "Original Traceback (most recent call last):"

app = typer.Typer(
    name="mrope",
    help="Compute M-RoPE position ids in DataLoader workers: check data, train, benchmark.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the entry point of `mrope`.

    Args:
        arguments: words after `mrope`; None: those of the process.

    Raises:
        SystemExit: always. 0: success; 1: losses of `train --compare` differ, a row is bad, or
            `doctor` found a difference; 2: invalid usage or input, with one message on standard
            error; 130: Ctrl-C ended training or a check.
    """
    try:
        app(args=None if arguments is None else list(arguments))
    except MRopeError as error:
        message = _own_words(error)
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        described = _describe_missing(error) or _describe_torchvision(error)
        if described is None:
            raise
        message = described
    Console(stderr=True, soft_wrap=True).print(
        f"mrope: {message}", style="red", markup=False, highlight=False
    )
    raise SystemExit(2)


def _own_words(error: MRopeError) -> str:
    """Return an error's message; of one that a worker raised, without the worker's traceback."""
    # DataLoader raises a worker's error again, with the text of its traceback as the message.
    text = str(error)
    return re.split(r"\n[\w.]+Error: ", text)[-1].strip() if _WORKER_TRACEBACK in text else text


def _describe_missing(error: Exception) -> str | None:
    """Name the extra that installs a missing package; None if the error is another."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package not in _EXTRAS:
        return None
    if importlib.util.find_spec(package) is not None:  # one of its modules is missing
        return None
    return f"no module {package!r}; pip install 'mrope[{_EXTRAS[package]}]'"


def _describe_torchvision(error: BaseException) -> str | None:
    """Say what to do if an error comes from a torchvision that cannot be imported; else None."""
    # transformers imports it wherever it is installed, and hides why that failed.
    causes = []
    at: BaseException | None = error
    while at is not None:
        causes.append(at)
        at = at.__cause__ or at.__context__
    frames = [frame.filename for one in causes for frame in traceback.extract_tb(one.__traceback__)]
    if not any("torchvision" in text for text in (*map(str, causes), *frames)):
        return None
    import torch

    reason = str(causes[-1]).partition("\n")[0]
    return (
        f"torchvision is installed but cannot be imported ({reason}): install its release for "
        f"torch {torch.__version__}, or uninstall it"
    )


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
            help="Run with and without MRopeCollator; exit with 1 unless every loss is equal.",
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue from the last checkpoint in trainer.output_dir."),
    ] = False,
    device: Annotated[
        Device | None,
        typer.Option(help="cpu is short for trainer.use_cpu=true; auto: CUDA if available."),
    ] = None,
) -> None:
    """Train a model from a config: mrope train configs/demo.yaml trainer.max_steps=3.

    Ctrl-C saves a checkpoint and exits with 130.
    """
    from mrope.training.config import load_config

    on_device = {"cpu": ["trainer.use_cpu=true"], "cuda": ["trainer.use_cpu=false"]}
    added = [] if device is None else on_device.get(device.value, [])
    cfg = load_config(config, [*(overrides or ()), *added])
    if compare:
        from mrope.training.compare import compare as compare_losses

        if not compare_losses(cfg):
            raise typer.Exit(1)
        return
    from mrope.training import trainer

    atexit.register(_leave_group)
    if trainer.train(cfg, resume=resume).stopped:
        raise typer.Exit(130)


def _leave_group() -> None:
    """Destroy the process group before Python ends: its threads abort a rank that goes first."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@app.command()
def check(
    model: ModelName = None,
    dataset: DatasetName = None,
    config: RunConfig = None,
    reference: ReferenceName = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Number of rows to check, from the first.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Worker processes; 0 is faster for few rows. Default: as in the config, else 2.",
        ),
    ] = None,
    json_file: JsonFile = None,
    report_file: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="FILE.html", callback=as_page, help="Write an HTML report."
        ),
    ] = None,
    shapes: Annotated[
        bool,
        typer.Option("--shapes", help="Propose a ladder of fixed shapes (rope.shapes)."),
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --shapes: for flattened batches of up to so many tokens; default: batches "
            "as in the config.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="With --shapes: for batches of so many rows."),
    ] = None,
    replay: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="A B",
            help="Compare the batches of two runs instead, by the digests that they recorded.",
        ),
    ] = None,
) -> None:
    """Check every row of a dataset before training; exit with 1 if any row is bad.

    mrope check --model FOLDER --dataset PATH --report report.html

    mrope check --replay first.jsonl second.jsonl
    """
    if replay is not None:
        from mrope.check.replay import replay as replay_runs

        if not replay_runs(*replay, json_file=json_file):
            raise typer.Exit(1)
        return
    _require_dataset(model, dataset, config)
    from mrope.check.commands import check_dataset
    from mrope.check.source import check_config
    from mrope.check.summary import INTERRUPTED

    sizes = {"--max-tokens": max_tokens, "--batch-size": batch_size}
    given = [name for name, value in sizes.items() if value is not None]
    if given and not shapes:
        raise typer.BadParameter(f"{given[0]} requires --shapes")
    if len(given) > 1:
        raise typer.BadParameter("give --max-tokens or --batch-size, and not both")
    cfg = check_config(
        config,
        model,
        dataset,
        reference=reference,
        rows=limit,
        max_tokens=max_tokens,
        batch_size=batch_size,
    )
    summary = check_dataset(cfg, workers, json_file, report_file, shapes=shapes)
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
            help="text:N in tokens; image:HxW and video:TxHxW in patches, as in *_grid_thw. With "
            "2x2 patches per token, image:4x6 has 2x3 tokens.",
        ),
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="model_type of the config; required with SPANs.")
    ] = None,
    row: Annotated[
        int | None, typer.Option(min=0, help="Dataset row to show instead of SPANs, from 0.")
    ] = None,
    model: ModelName = None,
    dataset: DatasetName = None,
    config: RunConfig = None,
    reference: ReferenceName = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="Seconds per temporal grid step of a video (qwen2_5_vl)."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Print every token of long spans.")
    ] = False,
    plot_file: PlotFile = None,
) -> None:
    """Print the position ids of a made-up sample or of a dataset row.

    mrope explain --family qwen3_vl text:3 image:4x6 text:2

    mrope explain --model FOLDER --dataset PATH --row 7

    For a bad row, print the first span that does not fit and exit with 1.
    """
    from mrope.check.explain import compute_positions, print_positions, save_plot

    numbered: SamplePositions | None
    if row is None:
        if not spans or family is None or model or dataset or config:
            raise typer.BadParameter("give SPANs and --family, or --row with --model and --dataset")
        numbered = compute_positions(spans, family, reference or "auto", seconds)
    else:
        if spans or family is not None or seconds is not None:
            raise typer.BadParameter("--row takes no SPAN, no --family and no --seconds")
        numbered = _explain_row(row, model, dataset, config, reference)
    if numbered is None:
        raise typer.Exit(1)
    print_positions(numbered, Console(), everything)
    if plot_file is not None:
        save_plot(numbered, plot_file)


def _explain_row(
    row: int, model: str | None, dataset: str | None, config: Path | None, reference: str | None
) -> SamplePositions | None:
    _require_dataset(model, dataset, config)
    from mrope.check.commands import explain_row
    from mrope.check.source import check_config

    return explain_row(check_config(config, model, dataset, reference=reference), row)


@app.command()
def syncs(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help="Training config, and overrides."),
    ] = None,
    model: ModelName = None,
    trainer: Annotated[
        bool,
        typer.Option(
            "--trainer",
            help="Run transformers' Trainer instead, attached, with its defaults and with the "
            "settings that avoid syncs.",
        ),
    ] = False,
) -> None:
    """List the lines of code where one training step syncs, plain and attached.

    --model builds the whole model in memory. A CONFIG may have fewer layers.
    """
    configs, overrides = split_words(words or [])
    if len(configs) + (model is not None) != 1:
        raise typer.BadParameter("give one CONFIG, or --model, and not both")
    from mrope.check.syncs import print_step_syncs, print_trainer_syncs

    print_syncs = print_trainer_syncs if trainer else print_step_syncs
    print_syncs(configs[0] if configs else None, overrides, model)


@app.command()
def doctor(json_file: JsonFile = None, engine: EngineName = None, config: RunConfig = None) -> None:
    """Compare every family with the installed transformers, and name what makes steps slow here.

    Exits with 1 if a family differs.
    """
    from mrope.check.doctor import compare_families, print_engine

    if engine is not None:
        print_engine(engine)
        return
    from mrope.training.config import load_config

    if not compare_families(json_file, None if config is None else load_config(config)):
        raise typer.Exit(1)


def _require_dataset(model: str | None, dataset: str | None, config: Path | None) -> None:
    if config is None and (model is None or dataset is None):
        raise typer.BadParameter("give --model and --dataset, or --config")

"""Time a training step with and without the stage: `mrope bench step CONFIG`.

The same steps of the same model run in several variants, one after another in one process:

- plain: transformers computes everything in its forward;
- positions: the DataLoader's workers compute the position ids;
- vision: they compute the vision tower's tensors too;
- attached: as vision, and the patched forward reads every tensor from the batch;
- layers, compiled, captured: as attached, with fixed shapes, compiled layer by layer, as one graph,
  and replayed as CUDA graphs (`mode="reduce-overhead"`). Only of configs with `rope.shapes`.

Host time: from the call of the forward until it returns, starting with an idle device. Step time:
from one step, forward and backward, to the next; the benchmark adds no sync in between. Syncs are
counted by `mrope.guard`.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from mrope.bench.harness import (
    conditions,
    figure_file,
    make_console,
    one_line,
    write_json,
)
from mrope.bench.trace import profile_steps
from mrope.columns import Columns, NewColumns
from mrope.guard import SyncGuard
from mrope.hf import attach, compile_layers, detach
from mrope.hf.attaching import base_model
from mrope.hf.compiling import is_compiled
from mrope.spec.spec import MRopeSpec
from mrope.training.config import build_collator, load_config
from mrope.training.dataloader import RowDataset, load_rows, make_loader
from mrope.training.model import build_model
from mrope.training.sections import Config
from mrope.training.step import choose_device, finish, guarded_step, to_device

VARIANTS = ("positions", "vision", "attached")
_MODES = {"layers": None, "compiled": None, "captured": "reduce-overhead"}
_WARM_UP = 3
_PROFILED = 3
Rival = Callable[[MRopeSpec], Callable[..., Any]]
_FOLDERS = re.compile(r"^.*/(?=site-packages/|src/mrope/)")


@dataclass
class Measured:
    """Measurements of one variant: seconds per step, losses, and the syncs of one step."""

    host: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    stage: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    syncs: int = 0
    sites: str = ""
    passed_error_mode: bool = False
    batch_bytes: int = 0
    device: dict[str, float] = field(default_factory=dict)

    def summary(self) -> NewColumns:
        """Return medians and quartiles in milliseconds, and the counts, for JSON."""
        table: NewColumns = {
            "syncs": self.syncs,
            "passed_error_mode": self.passed_error_mode,
            "batch_bytes": self.batch_bytes,
            "losses": self.loss[:3],
            # Without the folders of this machine.
            "sites": [_FOLDERS.sub("", line) for line in self.sites.splitlines()],
            **self.device,
        }
        for name in ("host", "step", "stage"):
            seconds = getattr(self, name)
            low, middle, high = statistics.quantiles(seconds, n=4)
            table[f"{name}_ms"] = 1e3 * middle
            table[f"{name}_quartiles_ms"] = [1e3 * low, 1e3 * high]
        return table


def bench_step(
    configs: list[Path],
    overrides: list[str],
    device: str,
    steps: int,
    json_file: Path | None,
    plot_file: Path | None,
    rivals: Mapping[str, Rival] | None = None,
) -> None:
    """Measure every config in every variant; print tables, and write JSON and a picture if given.

    Args:
        configs: training configs; each variant sets `rope` and attaches the model itself.
        overrides: `KEY=VALUE`, as for `load_config`.
        device: auto, cpu or cuda.
        steps: timed steps of each variant after 3 warm-up steps, at least 2. Host time is measured
            in `steps // 4` further steps, at least 2.
        rivals: further variants, by name: each returns, for a spec, what stands in place of the
            plain model's `get_rope_index`.
    """
    choose_device(device)
    console = make_console()
    report: NewColumns = {
        "conditions": _conditions(device),
        "steps": steps,
        "cases": {},
    }
    console.print(one_line(report["conditions"]))
    for path in configs:
        cfg = load_config(path, overrides)
        case = _measure_case(cfg, device, steps, rivals or {})
        report["cases"][path.stem] = case
        console.print(step_table(path.stem, case))
        write_json(report, json_file)  # after each case, so that a failure keeps the earlier ones
    if plot_file is not None:
        plot_cases(report["cases"], plot_file)


def _measure_case(cfg: Config, device: str, steps: int, rivals: Mapping[str, Rival]) -> NewColumns:
    where = torch.device("cuda" if _on_cuda(device) else "cpu")
    torch.manual_seed(cfg.seed)
    rows = load_rows(cfg)
    with where:  # initialising large models on the CPU takes minutes
        model = build_model(cfg)
    case = {}
    fixed = () if cfg.rope.shapes is None else tuple(_MODES)
    for variant in ("plain", *rivals, *VARIANTS, *fixed):
        with _prepared(cfg, model, variant, rivals.get(variant)) as (prepared, run):
            case[variant] = _measure(prepared, model, run, rows, where, steps).summary()
    return case


@contextmanager
def _prepared(
    cfg: Config, model: torch.nn.Module, variant: str, rival: Rival | None
) -> Iterator[tuple[Config, Any]]:
    """Patch the model for a variant within the block.

    Yields the config of its collator, and what the step calls: the model, or a compiled one.
    """
    attached = variant == "attached" or variant in _MODES
    rope: NewColumns = {
        "enabled": attached or variant in VARIANTS,
        "vision": variant == "vision" or attached,
        "shapes": cfg.rope.shapes if variant in _MODES else None,
    }
    section = cfg.rope.model_copy(update=rope)
    base = base_model(model)
    run: Any = model
    if attached:
        attach(model)
    elif rival is not None:
        base.get_rope_index = rival(cfg.spec())
    if variant == "layers":
        compile_layers(model)
    elif variant in _MODES:
        run = torch.compile(model, fullgraph=True, dynamic=False, mode=_MODES[variant])
    try:
        yield cfg.model_copy(update={"rope": section}), run
    finally:
        if attached:
            detach(model)
        elif rival is not None:
            del base.get_rope_index


def _measure(
    cfg: Config, model: Any, run: Any, rows: RowDataset, where: torch.device, steps: int
) -> Measured:
    """Measure a variant: `run` is what its step calls, and syncs are found in `model`."""
    measured = Measured()
    loader = make_loader(cfg, rows, build_collator(cfg))
    batches = (to_device(batch, where) for batch in _endless(loader))
    # The first steps load kernels and fill the allocator.
    for batch in islice(batches, _WARM_UP):
        _step(run, batch)
    # A compiled graph has no functions left to time, and would be compiled anew for the wrappers.
    eager = run is model and not is_compiled(model)
    timed = _stage_in_forward(model) if eager else nullcontext(_Stopwatch())
    with timed as stopwatch:
        for batch in islice(batches, max(2, steps // 4)):
            stopwatch.seconds = 0.0
            host, loss = _host_time(run, batch, where)
            measured.host.append(host)
            measured.stage.append(stopwatch.seconds)
            measured.loss.append(loss)
    measured.step = _step_times(run, islice(batches, steps + 1), where)
    batch = next(batches)
    measured.batch_bytes = sum(
        value.nbytes for value in batch.values() if isinstance(value, torch.Tensor)
    )
    guard = guarded_step(model, batch)
    measured.syncs, measured.sites = guard.count, guard.report()
    if not measured.syncs:
        with SyncGuard(mode="error"):  # on CUDA, torch's own debug mode confirms the count
            _step(model, batch)
        measured.passed_error_mode = True
    if where.type == "cuda":
        measured.device = profile_steps(partial(_step, run), islice(batches, _PROFILED))
    return measured


def _endless(loader: Any) -> Iterator[Any]:
    """Yield batches, epoch after epoch."""
    for epoch in count():
        if hasattr(loader.batch_sampler, "set_epoch"):
            loader.batch_sampler.set_epoch(epoch)
        yield from loader


def _host_time(model: torch.nn.Module, batch: Columns, where: torch.device) -> tuple[float, float]:
    """Return the seconds until a forward on an idle device returns, and the loss."""
    model.zero_grad()
    # The host would block on work left in the queue, and its time would include the device's.
    finish(where)
    start = time.perf_counter()
    loss = model(**batch).loss
    host = time.perf_counter() - start
    loss.backward()
    return host, loss.item()


def _step_times(
    model: torch.nn.Module, batches: Iterator[NewColumns], where: torch.device
) -> list[float]:
    """Return seconds from each step to the next.

    Measured by events on CUDA, so that the host can run ahead of the device as in a trainer.
    """
    marks = []
    finish(where)
    for batch in batches:
        marks.append(_mark(where))
        _step(model, batch)
    finish(where)
    if where.type == "cuda":
        return [one.elapsed_time(other) / 1e3 for one, other in pairwise(marks)]
    return [other - one for one, other in pairwise(marks)]


def _mark(where: torch.device) -> Any:
    if where.type != "cuda":
        return time.perf_counter()
    kind: Any = torch.cuda.Event
    event = kind(enable_timing=True)
    event.record()
    return event


def _step(model: torch.nn.Module, batch: Columns) -> None:
    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
    model.zero_grad()
    model(**batch).loss.backward()


@dataclass
class _Stopwatch:
    """Adds up the seconds spent in wrapped functions."""

    seconds: float = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: object, **kwargs: object) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


@contextmanager
def _stage_in_forward(model: torch.nn.Module) -> Iterator[_Stopwatch]:
    """Time the host's work in the forward that the stage can do in workers.

    Wraps `get_rope_index` and the functions of `transformers.vision_utils` that the modelling
    module imports. If the batch has their result, those functions return it at once.
    """
    stopwatch = _Stopwatch()
    base = base_model(model)
    # With a rival the model has an instance attribute, which has to be put back.
    own = vars(base).get("get_rope_index")
    module = sys.modules[type(base.visual).__module__]
    helpers = {
        name: value
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == "transformers.vision_utils"
    }
    base.get_rope_index = stopwatch.wrap(base.get_rope_index)
    for name, function in helpers.items():
        setattr(module, name, stopwatch.wrap(function))
    try:
        yield stopwatch
    finally:
        for name, function in helpers.items():
            setattr(module, name, function)
        del base.get_rope_index
        if own is not None:
            base.get_rope_index = own


def _on_cuda(device: str) -> bool:
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def _conditions(device: str) -> dict[str, str]:
    found = conditions()
    if _on_cuda(device):
        found["device"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
    return found


def step_table(name: str, case: Mapping[str, Columns]) -> Table:
    """Return a table of `Measured.summary` for each variant; GPU columns only on CUDA."""
    columns = ["syncs", "host in forward, ms", "step, ms", "step / plain", "stage in forward"]
    on_device = "gpu_idle_share" in case["plain"]
    table = Table("", *columns, *(["GPU idle", "GPU busy, ms"] if on_device else []), title=name)
    for variant, entry in case.items():
        low, high = entry["host_quartiles_ms"]
        cells = [
            str(entry["syncs"]),
            f"{entry['host_ms']:.1f} ({low:.1f} to {high:.1f})",
            f"{entry['step_ms']:.1f}",
            f"{entry['step_ms'] / case['plain']['step_ms']:.3f}",
            f"{100 * entry['stage_ms'] / entry['step_ms']:.1f} %",
        ]
        if on_device:
            cells += [
                f"{100 * entry['gpu_idle_share']:.1f} %",
                f"{entry['gpu_busy_ms']:.1f}",
            ]
        table.add_row(variant, *cells)
    return table


def plot_cases(cases: Columns, file: Path) -> None:
    """Draw step and host time of every variant, one chart per case, four in a row."""
    columns = min(len(cases), 4)
    rows = -(-len(cases) // columns)
    size = (4 * columns, 3.6 * rows)
    with figure_file(file, size, rows, columns, squeeze=False) as (figure, axes):
        for axis, (name, case) in zip(axes.flat, cases.items(), strict=False):
            variants = list(case)
            steps = [case[variant]["step_ms"] for variant in variants]
            hosts = [case[variant]["host_ms"] for variant in variants]
            axis.bar(variants, steps, color="#c6d3e8", label="step")
            axis.bar(variants, hosts, width=0.45, color="#2f5d9b", label="host in forward")
            axis.set(title=name, ylabel="milliseconds")
            axis.tick_params(axis="x", rotation=30)
        handles = axes[0][0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper center", ncols=2)

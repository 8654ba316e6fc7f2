"""Time a training step with and without the stage: `mrope bench step CONFIG`.

The same steps of the same model run in several variants, one after another in one process:

- plain: transformers computes everything in its forward;
- positions: the DataLoader's workers compute the position ids;
- vision: they compute the vision tower's tensors too;
- attached: as vision, and the patched forward reads every tensor from the batch;
- flattened: as attached, on flattened rows. Only of configs with `rope.packing: flatten`, and this
  variant and those below alone have flattened rows then;
- fixed, layers, compiled: as attached or flattened, with fixed shapes; compiled layer by layer; as
  one graph. Only of configs with `rope.shapes`.

Host time: from the call of the forward until it returns, starting with an idle device. Step time:
from one step, forward and backward, to the next; the benchmark adds no sync in between. Syncs are
counted by `mrope.guard`, on CUDA by torch's own debug mode. Operations: of the model, on real
tokens and patches, by `WorkModel`.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
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
from mrope.collate.collator import Collate
from mrope.columns import Columns, NewColumns
from mrope.errors import MRopeError
from mrope.guard import SyncGuard
from mrope.hf import attach, compile_layers, detach
from mrope.hf.attaching import base_model
from mrope.hf.compiling import is_compiled, one_graph_a_shape
from mrope.prepare.work import WorkModel
from mrope.spec.spec import MRopeSpec
from mrope.training.config import build_collator, load_config
from mrope.training.dataloader import GRIDS, RowDataset, load_rows, make_loader
from mrope.training.model import build_model
from mrope.training.sections import Config
from mrope.training.step import choose_device, finish, guarded_step, to_device

VARIANTS = ("positions", "vision", "attached")
FIXED = ("fixed", "layers", "compiled")
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
    warm_up: float = 0.0
    tflop: float | None = None
    passed_error_mode: bool = False
    batch_bytes: int = 0
    device: NewColumns = field(default_factory=dict)

    def summary(self) -> NewColumns:
        """Return medians and quartiles in milliseconds, and the counts, for JSON."""
        table: NewColumns = {
            "syncs": self.syncs,
            "passed_error_mode": self.passed_error_mode,
            "batch_bytes": self.batch_bytes,
            "losses": self.loss[:3],
            "warm_up_s": self.warm_up,
            # Without the folders of this machine.
            "sites": [_FOLDERS.sub("", line) for line in self.sites.splitlines()],
            **self.device,
        }
        for name in ("host", "step", "stage"):
            seconds = getattr(self, name)
            low, middle, high = statistics.quantiles(seconds, n=4)
            table[f"{name}_ms"] = 1e3 * middle
            table[f"{name}_quartiles_ms"] = [1e3 * low, 1e3 * high]
        if self.tflop is not None:
            mean = statistics.fmean(self.step)
            table |= {"tflop": self.tflop, "tflop_per_s": self.tflop / mean}
        return table


def bench_step(
    configs: list[Path],
    overrides: list[str],
    device: str,
    steps: int,
    json_file: Path | None,
    plot_file: Path | None,
    rivals: Mapping[str, Rival] | None = None,
    variants: list[str] | None = None,
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
        variants: those to measure, by name; None: all that a config has.

    Raises:
        MRopeError: a variant that a config does not have.
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
        case = report["cases"][path.stem] = {}
        for variant, found in _measure_case(cfg, device, steps, rivals or {}, variants):
            case[variant] = found
            console.print(f"{variant}: {found['step_ms']:.1f} ms, losses {found['losses']}")
            write_json(report, json_file)  # each time, so that a failure keeps the earlier ones
        console.print(step_table(path.stem, case))
    if plot_file is not None:
        plot_cases(report["cases"], plot_file)


def _measure_case(
    cfg: Config,
    device: str,
    steps: int,
    rivals: Mapping[str, Rival],
    variants: list[str] | None,
) -> Iterator[tuple[str, NewColumns]]:
    chosen = _choose(cfg, rivals, variants)
    where = torch.device("cuda" if _on_cuda(device) else "cpu")
    torch.manual_seed(cfg.seed)
    rows = load_rows(cfg)
    with where:  # initialising large models on the CPU takes minutes
        model = build_model(cfg)
    tflop = _count_tflop(cfg, rows, steps)
    for variant in chosen:
        with _prepared(cfg, model, variant, rivals.get(variant)) as (collate, run):
            loader = make_loader(cfg, rows, collate)
            measured = _measure(loader, model, run, where, steps)
        measured.tflop = tflop
        yield variant, measured.summary()


def _choose(cfg: Config, rivals: Mapping[str, Rival], variants: list[str] | None) -> list[str]:
    flattened = ["flattened"] * (cfg.rope.packing is not None)
    fixed = FIXED * (cfg.rope.shapes is not None)
    known = ["plain", *rivals, *VARIANTS, *flattened, *fixed]
    for variant in variants or ():
        if variant not in known:
            raise MRopeError(f"variants of this config: {', '.join(known)}; not {variant!r}")
    return [name for name in known if variants is None or name in variants]


def _count_tflop(cfg: Config, rows: RowDataset, steps: int) -> float | None:
    """Return the mean operations of the timed batches, in 1e12; None: of an unknown tower."""
    try:
        work = WorkModel.from_config(cfg.model.config)
    except MRopeError:
        return None
    plain = cfg.rope.model_copy(update={"enabled": False})
    loader = make_loader(cfg, rows, build_collator(cfg.model_copy(update={"rope": plain})))
    first = _WARM_UP + _host_steps(steps)
    counts = []
    for batch in islice(_endless(loader), first, first + steps):
        size_NK = np.concatenate([np.asarray(batch.get(name, ())).reshape(-1, 3) for name in GRIDS])
        frame_N = size_NK[:, 1:].prod(1)
        patches = (size_NK[:, 0] * frame_N).sum(), (size_NK[:, 0] * frame_N**2).sum()
        counts.append(work.text(batch["attention_mask"].sum(1)).sum() + work.tower(*patches))
    return float(np.mean(counts)) / 1e12


@contextmanager
def _prepared(
    cfg: Config, model: torch.nn.Module, variant: str, rival: Rival | None
) -> Iterator[tuple[Collate, Any]]:
    """Patch the model for a variant within the block.

    Yields its collate function, and what the step calls: the model, or a compiled one.
    """
    attached = variant in ("attached", "flattened", *FIXED)
    rope: NewColumns = {
        "enabled": attached or variant in VARIANTS,
        "vision": variant == "vision" or attached,
        "shapes": cfg.rope.shapes if variant in FIXED else None,
        "packing": cfg.rope.packing if variant in ("flattened", *FIXED) else None,
    }
    collate = build_collator(cfg.model_copy(update={"rope": cfg.rope.model_copy(update=rope)}))
    base = base_model(model)
    run: Any = model
    if attached:
        attach(model)
    elif rival is not None:
        base.get_rope_index = rival(cfg.spec())
    if variant == "layers":
        compile_layers(model)
    elif variant == "compiled":
        run = torch.compile(model, **one_graph_a_shape())
    try:
        yield collate, run
    finally:
        if attached:
            detach(model)
        elif rival is not None:
            del base.get_rope_index


def _measure(loader: Any, model: Any, run: Any, where: torch.device, steps: int) -> Measured:
    """Measure a variant: `run` is what its step calls, the model or a compiled one."""
    measured = Measured()
    batches = (to_device(batch, where) for batch in _endless(loader))
    # The first steps compile, load kernels and fill the allocator.
    start = time.perf_counter()
    for batch in islice(batches, _WARM_UP):
        _step(run, batch)
    finish(where)
    measured.warm_up = time.perf_counter() - start
    # A compiled graph has no functions left to time, and would be compiled anew for the wrappers.
    eager = run is model and not is_compiled(model)
    timed = _stage_in_forward(model) if eager else nullcontext(_Stopwatch())
    with timed as stopwatch:
        for batch in islice(batches, _host_steps(steps)):
            stopwatch.seconds = 0.0
            host, loss = _host_time(run, batch, where)
            measured.host.append(host)
            measured.stage.append(stopwatch.seconds)
            measured.loss.append(loss)
    measured.step = step_times(partial(_step, run), islice(batches, steps + 1), where)
    # The package's guard watches calls from Python, of which a compiled graph has none.
    on_cuda = where.type == "cuda"
    stance = nullcontext() if on_cuda or eager else torch.compiler.set_stance("force_eager")
    with stance:
        _count_syncs(measured, run if on_cuda else model, next(batches))
    if on_cuda:
        measured.device = profile_steps(partial(_step, run), islice(batches, _PROFILED))
    return measured


def _host_steps(steps: int) -> int:
    return max(2, steps // 4)


def _count_syncs(measured: Measured, model: torch.nn.Module, batch: NewColumns) -> None:
    measured.batch_bytes = sum(
        value.nbytes for value in batch.values() if isinstance(value, torch.Tensor)
    )
    guard = guarded_step(model, batch)
    measured.syncs, measured.sites = guard.count, guard.report()
    if not measured.syncs:
        with SyncGuard(mode="error"):  # on CUDA, torch's own debug mode confirms the count
            _step(model, batch)
        measured.passed_error_mode = True


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


def step_times(
    step: Callable[[Any], object], batches: Iterable[Any], where: torch.device
) -> list[float]:
    """Return seconds from each step to the next, one less than there are batches.

    Measured by events on CUDA, so that the host can run ahead of the device as in a trainer.
    """
    marks = []
    finish(where)
    for batch in batches:
        marks.append(_mark(where))
        step(batch)
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
    on_device = any("gpu_idle_share" in entry for entry in case.values())
    further = ["GPU idle", "GPU busy, ms", "products", "TFLOP/s"] if on_device else []
    table = Table("", *columns, *further, title=name)
    for variant, entry in case.items():
        low, high = entry["host_quartiles_ms"]
        cells = [
            str(entry["syncs"]),
            f"{entry['host_ms']:.1f} ({low:.1f} to {high:.1f})",
            f"{entry['step_ms']:.1f}",
            f"{entry['step_ms'] / case['plain']['step_ms']:.3f}" if "plain" in case else "",
            f"{100 * entry['stage_ms'] / entry['step_ms']:.1f} %",
        ]
        if on_device:
            cells += [
                f"{100 * entry['gpu_idle_share']:.1f} %",
                f"{entry['gpu_busy_ms']:.1f}",
                f"{100 * entry['products_share']:.1f} %",
                f"{entry['tflop_per_s']:.0f}" if "tflop" in entry else "",
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

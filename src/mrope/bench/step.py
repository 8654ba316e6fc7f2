"""What does a training step cost with the stage, and without? `mrope bench step CONFIG`.

Five ways to run the same steps of the same model, one after another in one process:

- plain: transformers computes everything in its forward;
- rows: the known fix, which numbers row by row in numpy inside the forward;
- positions: the workers number the tokens;
- vision: they compute the vision tower's tensors too;
- attached: and the model only reads them.

Host time is from the call of the forward until it returns, with an idle device before it; on CUDA
the step is timed by events, forward and backward. Waits are counted by `mrope.guard`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mrope.bench.conditions import conditions
from mrope.bench.known_fix import RowsOnHost
from mrope.config import Config, build_collator, load_config
from mrope.data import RowDataset, make_loader
from mrope.guard import SyncGuard
from mrope.hf import attach, detach
from mrope.train import build_model, load_run_rows, to_device

VARIANTS = ("plain", "rows", "positions", "vision", "attached")
_WARM_UP = 5
_PROFILED = 3


@dataclass
class Measured:
    """Seconds of each step of one variant, and what was counted."""

    host: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    stage: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    waits: int = 0
    sites: str = ""
    batch_bytes: int = 0
    device: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return medians, quartiles and counts as JSON takes them."""
        table: dict[str, Any] = {
            "waits": self.waits,
            "batch_bytes": self.batch_bytes,
            "losses": self.loss[:3],
            "sites": self.sites.splitlines(),
            **self.device,
        }
        for name in ("host", "step", "stage"):
            seconds = getattr(self, name)
            low, middle, high = statistics.quantiles(seconds, n=4)
            table[f"{name}_ms"] = 1e3 * middle
            table[f"{name}_quartiles_ms"] = [1e3 * low, 1e3 * high]
        return table


def run(
    configs: list[Path],
    overrides: list[str],
    device: str,
    steps: int,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Measure every config in every variant; print a table for each, and write JSON and a plot.

    Args:
        configs: training configs; `rope` and `model.attach` are set by the variants.
        overrides: as `load_config` takes them.
        device: auto, cpu or cuda.
        steps: timed steps of each variant, after 5 to warm up.
    """
    console = Console(width=None if sys.stdout.isatty() else 150)
    report: dict[str, Any] = {"conditions": _conditions(device), "steps": steps, "cases": {}}
    console.print(", ".join(f"{key} {value}" for key, value in report["conditions"].items()))
    for path in configs:
        cfg = load_config(path, [*overrides, f"train.device={device}"])
        case = _measure_case(cfg, steps)
        report["cases"][path.stem] = case
        console.print(_table(path.stem, case))
        if json_file is not None:
            json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if plot_file is not None:
        _plot(report, plot_file)


def _measure_case(cfg: Config, steps: int) -> dict[str, Any]:
    where = torch.device("cuda" if _on_cuda(cfg.train.device) else "cpu")
    torch.manual_seed(cfg.train.seed)
    rows = load_run_rows(cfg)
    model = build_model(cfg).to(where)
    case = {}
    for variant in VARIANTS:
        with _prepared(cfg, model, variant) as prepared:
            case[variant] = _measure(prepared, model, rows, where, steps).summary()
    return case


@contextmanager
def _prepared(cfg: Config, model: torch.nn.Module, variant: str) -> Iterator[Config]:
    """Set the model up for a variant, and yield the config with the collator's switches set."""
    rope = {
        "enabled": variant not in ("plain", "rows"),
        "vision": variant in ("vision", "attached"),
    }
    section = cfg.rope.model_copy(update=rope)
    base: Any = next(part for part in reversed(list(model.modules())) if hasattr(part, "visual"))
    if variant == "attached":
        attach(model)
    elif variant == "rows":
        base.get_rope_index = RowsOnHost(cfg.spec())
    try:
        yield cfg.model_copy(update={"rope": section})
    finally:
        if variant == "attached":
            detach(model)
        elif variant == "rows":
            del base.get_rope_index


def _measure(
    cfg: Config, model: torch.nn.Module, rows: RowDataset, where: torch.device, steps: int
) -> Measured:
    measured = Measured()
    loader = make_loader(cfg, rows, build_collator(cfg))
    batches = (to_device(batch, where) for batch, _ in _endless(loader))
    with ExitStack() as stack:
        stopwatch = stack.enter_context(_stage_in_forward(model))
        for number, batch in enumerate(islice(batches, _WARM_UP + steps)):
            stopwatch.seconds = 0.0
            host, step, loss = _timed_step(model, batch, where)
            if number >= _WARM_UP:
                measured.host.append(host)
                measured.step.append(step)
                measured.stage.append(stopwatch.seconds)
                measured.loss.append(loss)
    batch = next(batches)
    measured.batch_bytes = sum(
        value.nbytes for value in batch.values() if isinstance(value, torch.Tensor)
    )
    with SyncGuard() as guard:
        _step(model, batch)
    measured.waits, measured.sites = guard.count, guard.report()
    if where.type == "cuda":
        measured.device = _profile(model, batches)
    return measured


def _timed_step(
    model: torch.nn.Module, batch: Mapping[str, Any], where: torch.device
) -> tuple[float, float, float]:
    """Return seconds of the host in the forward, seconds of the step, and the loss."""
    model.zero_grad()
    cuda = where.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        begin, end = _events()
        begin.record()
    start = time.perf_counter()
    loss = model(**batch).loss
    host = time.perf_counter() - start
    loss.backward()
    step = time.perf_counter() - start
    if cuda:
        end.record()
        torch.cuda.synchronize()
        step = begin.elapsed_time(end) / 1e3
    return host, step, loss.item()


def _events() -> tuple[Any, Any]:
    event: Any = torch.cuda.Event
    return event(enable_timing=True), event(enable_timing=True)


def _step(model: torch.nn.Module, batch: Mapping[str, Any]) -> None:
    model(**batch).loss.backward()


def _profile(model: torch.nn.Module, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
    """Return what the device did in a few steps, by the profiler: busy time and copies to it."""
    from torch.profiler import ProfilerActivity, profile

    ready = list(islice(batches, _PROFILED))
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        for batch in ready:
            model.zero_grad()
            _step(model, batch)
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
    spans = []
    copies = 0
    for event in profiler.events():
        if event.device_type.name == "CUDA":
            spans.append((event.time_range.start, event.time_range.end))
            copies += event.name.startswith("Memcpy HtoD")
    first, last = min(spans)[0], max(end for _, end in spans)
    busy = _union(spans)
    return {
        "gpu_idle_share": 1 - busy / (last - first),
        "gpu_busy_ms": busy / 1e3 / _PROFILED,
        "profiled_step_ms": 1e3 * wall / _PROFILED,
        "copies_to_device_per_step": copies / _PROFILED,
    }


def _union(spans: list[tuple[float, float]]) -> float:
    """Return the length that intervals cover: (0, 2), (1, 3) and (5, 6) cover 4."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


@dataclass
class _Stopwatch:
    seconds: float = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


@contextmanager
def _stage_in_forward(model: torch.nn.Module) -> Iterator[_Stopwatch]:
    """Time, on the host, what the forward spends on the stage's own work.

    That is `get_rope_index`, and transformers' functions of the grids, whose names in the modelling
    module are replaced until the end. Where a key is precomputed they only look it up.
    """
    stopwatch = _Stopwatch()
    base: Any = next(part for part in reversed(list(model.modules())) if hasattr(part, "visual"))
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


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _on_cuda(device: str) -> bool:
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def _conditions(device: str) -> dict[str, str]:
    found = conditions()
    if _on_cuda(device):
        found["device"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
    return found


def _table(name: str, case: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = ["waits", "host in forward, ms", "step, ms", "step / plain", "stage in forward"]
    on_device = "gpu_idle_share" in case["plain"]
    table = Table("", *columns, *(["GPU idle", "copies"] if on_device else []), title=name)
    for variant, entry in case.items():
        low, high = entry["host_quartiles_ms"]
        cells = [
            str(entry["waits"]),
            f"{entry['host_ms']:.1f} ({low:.1f} to {high:.1f})",
            f"{entry['step_ms']:.1f}",
            f"{entry['step_ms'] / case['plain']['step_ms']:.3f}",
            f"{100 * entry['stage_ms'] / entry['step_ms']:.1f} %",
        ]
        if on_device:
            cells += [
                f"{100 * entry['gpu_idle_share']:.1f} %",
                f"{entry['copies_to_device_per_step']:.0f}",
            ]
        table.add_row(variant, *cells)
    return table


def _plot(report: Mapping[str, Any], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    cases = report["cases"]
    figure, axes = plt.subplots(
        1, len(cases), figsize=(4 * len(cases), 3.6), layout="constrained", squeeze=False
    )
    for axis, (name, case) in zip(axes[0], cases.items(), strict=True):
        steps = [case[variant]["step_ms"] for variant in VARIANTS]
        hosts = [case[variant]["host_ms"] for variant in VARIANTS]
        axis.bar(VARIANTS, steps, color="#c6d3e8", label="step")
        axis.bar(VARIANTS, hosts, width=0.45, color="#2f5d9b", label="host in forward")
        axis.set(title=name, ylabel="milliseconds")
        axis.tick_params(axis="x", rotation=30)
    axes[0][0].legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)

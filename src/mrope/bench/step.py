"""What does a training step cost with the stage, and without? `mrope bench step CONFIG`.

Five ways to run the same steps of the same model, one after another in one process:

- plain: transformers computes everything in its forward;
- rows: the known fix, which numbers row by row in numpy inside the forward;
- positions: the workers number the tokens;
- vision: they compute the vision tower's tensors too;
- attached: and the model only reads them.

Host time is from the call of the forward until it returns, with an idle device before it. Step time
is forward and backward from one step to the next, with nothing waiting in between but what the
variant itself waits for. Waits are counted by `mrope.guard.sync_guard`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mrope.bench.conditions import conditions
from mrope.bench.known_fix import RowsOnHost
from mrope.bench.on_device import time_on_device
from mrope.collate.padding import PaddingCollator
from mrope.guard.sync_guard import SyncGuard
from mrope.hf import attach, detach
from mrope.hf.attach import base_model
from mrope.training.config import build_collator, load_config
from mrope.training.dataloader import RowDataset, make_loader
from mrope.training.loop import load_run_rows
from mrope.training.model import build_model
from mrope.training.sections import Config
from mrope.training.step import endless, finish, guarded_step, to_device

VARIANTS = ("plain", "rows", "positions", "vision", "attached")
_WARM_UP = 3
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
    passed_error_mode: bool = False
    batch_bytes: int = 0
    device: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return medians, quartiles and counts as JSON takes them."""
        table: dict[str, Any] = {
            "waits": self.waits,
            "passed_error_mode": self.passed_error_mode,
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
        steps: timed steps of each variant, after 3 to warm up; at least 2. Host time is taken in
            a quarter as many steps of their own.
    """
    console = Console(width=None if sys.stdout.isatty() else 150)
    report: dict[str, Any] = {
        "conditions": _conditions(device),
        "steps": steps,
        "cases": {},
        "positions_on_device": {},
    }
    console.print(", ".join(f"{key} {value}" for key, value in report["conditions"].items()))
    for path in configs:
        cfg = load_config(path, [*overrides, f"train.device={device}"])
        case = _measure_case(cfg, steps)
        report["cases"][path.stem] = case
        if _on_cuda(device) and {"image", "video"} <= _modalities(cfg):
            report["positions_on_device"][path.stem] = _measure_on_device(cfg)
        console.print(_table(path.stem, case))
        if json_file is not None:
            json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if plot_file is not None:
        plot(report["cases"], plot_file)


def _measure_case(cfg: Config, steps: int) -> dict[str, Any]:
    where = torch.device("cuda" if _on_cuda(cfg.train.device) else "cpu")
    torch.manual_seed(cfg.train.seed)
    rows = load_run_rows(cfg)
    with where:  # random weights are drawn where they will be: minutes faster for large models
        model = build_model(cfg)
    case = {}
    for variant in VARIANTS:
        with _prepared(cfg, model, variant) as prepared:
            case[variant] = _measure(prepared, model, rows, where, steps).summary()
    return case


def _measure_on_device(cfg: Config) -> dict[str, float]:
    """Return how long the alternative takes: positions by torch operations on the GPU."""
    rows = load_run_rows(cfg)
    batch = PaddingCollator()([rows[index] for index in range(cfg.dataloader.batch_size)])
    return time_on_device(cfg.spec(), to_device(batch, torch.device("cuda")))


@contextmanager
def _prepared(cfg: Config, model: torch.nn.Module, variant: str) -> Iterator[Config]:
    """Set the model up for a variant, and yield the config with the collator's switches set."""
    rope = {
        "enabled": variant not in ("plain", "rows"),
        "vision": variant in ("vision", "attached"),
    }
    section = cfg.rope.model_copy(update=rope)
    base = base_model(model)
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
    batches = (to_device(batch, where) for batch, _ in endless(loader))
    for batch in islice(batches, _WARM_UP):
        _step(model, batch)
    with _stage_in_forward(model) as stopwatch:
        for batch in islice(batches, max(2, steps // 4)):
            stopwatch.seconds = 0.0
            host, loss = _host_time(model, batch, where)
            measured.host.append(host)
            measured.stage.append(stopwatch.seconds)
            measured.loss.append(loss)
    measured.step = _step_times(model, islice(batches, steps + 1), where)
    batch = next(batches)
    measured.batch_bytes = sum(
        value.nbytes for value in batch.values() if isinstance(value, torch.Tensor)
    )
    guard = guarded_step(model, batch)
    measured.waits, measured.sites = guard.count, guard.report()
    if not measured.waits:
        with SyncGuard(mode="error"):  # a step without waits must not be stopped either
            _step(model, batch)
        measured.passed_error_mode = True
    if where.type == "cuda":
        measured.device = _profile(model, islice(batches, _PROFILED))
    return measured


def _host_time(
    model: torch.nn.Module, batch: Mapping[str, Any], where: torch.device
) -> tuple[float, float]:
    """Return seconds until the forward returns, from an idle device on, and the loss."""
    model.zero_grad()
    finish(where)
    start = time.perf_counter()
    loss = model(**batch).loss
    host = time.perf_counter() - start
    loss.backward()
    return host, loss.item()


def _step_times(
    model: torch.nn.Module, batches: Iterator[dict[str, Any]], where: torch.device
) -> list[float]:
    """Return seconds from one step to the next, as a trainer has them: nothing waits in between.

    On CUDA by events on the stream; the host runs ahead as far as the forward lets it.
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


def _step(model: torch.nn.Module, batch: Mapping[str, Any]) -> None:
    model.zero_grad()
    model(**batch).loss.backward()


def _profile(model: torch.nn.Module, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
    """Return what the device did in a few steps, by the profiler: busy time and copies to it.

    Only the device's activity is recorded, so that the host is hardly slowed down.
    """
    from torch.profiler import ProfilerActivity, profile

    ready = list(batches)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for batch in ready:
            _step(model, batch)
        torch.cuda.synchronize()
    result: Any = profiler.profiler
    events = [one for one in result.kineto_results.events() if one.duration_ns()]
    on_device = [one for one in events if one.device_type().name == "CUDA"]
    spans = [(one.start_ns(), one.start_ns() + one.duration_ns()) for one in on_device]
    busy = _union(spans)
    wall = max(end for _, end in spans) - min(start for start, _ in spans)
    copies = sum(one.name().startswith("Memcpy HtoD") for one in on_device)
    return {
        "gpu_idle_share": 1 - busy / wall,
        "gpu_busy_ms": busy / 1e6 / len(ready),
        "profiled_step_ms": wall / 1e6 / len(ready),
        "kernels_per_step": len(spans) / len(ready),
        "copies_in_step": copies / len(ready),
    }


def _union(spans: list[tuple[int, int]]) -> float:
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
    base = base_model(model)
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


def _modalities(cfg: Config) -> set[str]:
    shape = cfg.data.shape
    given = {"image": shape and shape.images, "video": shape and shape.videos}
    return {modality for modality, count in given.items() if count}


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
    table = Table("", *columns, *(["GPU idle", "GPU busy, ms"] if on_device else []), title=name)
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
                f"{entry['gpu_busy_ms']:.1f}",
            ]
        table.add_row(variant, *cells)
    return table


def plot(cases: Mapping[str, Any], file: Path) -> None:
    """Draw step and host time of every variant: an axis for each case, four in a row."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(len(cases), 4)
    rows = -(-len(cases) // columns)
    size = (4 * columns, 3.6 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis, (name, case) in zip(axes.flat, cases.items(), strict=False):
        steps = [case[variant]["step_ms"] for variant in VARIANTS]
        hosts = [case[variant]["host_ms"] for variant in VARIANTS]
        axis.bar(VARIANTS, steps, color="#c6d3e8", label="step")
        axis.bar(VARIANTS, hosts, width=0.45, color="#2f5d9b", label="host in forward")
        axis.set(title=name, ylabel="milliseconds")
        axis.tick_params(axis="x", rotation=30)
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2)
    figure.savefig(file, dpi=120)
    plt.close(figure)

"""Tables printed at the end of a training run."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table

from mrope.training.result import TrainResult


def table_of_run(result: TrainResult) -> Group:
    """Return the table of one run: a line for each step, then a summary."""
    table = Table("step", "loss", "tokens", "data ms", "forward ms")
    for step in result.steps:
        table.add_row(
            str(step.step),
            f"{step.loss:.6f}",
            str(step.tokens),
            _ms(step.data_seconds),
            _ms(step.forward_seconds),
        )
    return Group(table, _summary([result]))


def count_equal_losses(on: TrainResult, off: TrainResult, tolerance: float) -> int:
    """Return how many losses of two runs differ by no more than `tolerance`."""
    return sum(
        abs(one - other) <= tolerance for one, other in zip(on.losses, off.losses, strict=True)
    )


def table_of_two_runs(on: TrainResult, off: TrainResult, tolerance: float = 0.0) -> Group:
    """Return both runs side by side, and how many losses are equal within `tolerance`."""
    table = Table("step", "tokens", "loss on", "loss off", "equal?")
    for one, other in zip(on.steps, off.steps, strict=True):
        difference = abs(one.loss - other.loss)
        mark = "[green]yes[/]" if difference <= tolerance else f"[red]no, by {difference:.3g}[/]"
        table.add_row(str(one.step), str(one.tokens), f"{one.loss:.6f}", f"{other.loss:.6f}", mark)
    equal = count_equal_losses(on, off, tolerance)
    exactness = f"within {tolerance:g}" if tolerance else "to the last bit"
    verdict = f"{equal} of {len(on.steps)} losses are equal {exactness}"
    colour = "green" if equal == len(on.steps) else "red"
    return Group(table, _summary([on, off]), f"[bold {colour}]{verdict}[/]")


def source_of_positions(result: TrainResult) -> str:
    """Describe where the position ids of a run were computed, by what was counted in the run."""
    calls = result.rope_index_calls
    if calls is None:
        inside = "model.forward, not counted: the model has no get_rope_index"
    else:
        inside = f"model.forward, {calls} calls of get_rope_index"
    # From the batches, not the config: a collator that is never called attaches nothing.
    pids = sorted({step.worker for step in result.steps if step.attached})
    if not pids:
        return inside
    if pids == [result.loop_pid]:
        return f"the loop's own process, pid {pids[0]} (no workers); {inside}"
    return f"DataLoader workers, pid {', '.join(map(str, pids))}; {inside}"


def _summary(results: list[TrainResult]) -> Table:
    table = Table("", *(f"rope {'on' if result.rope_enabled else 'off'}" for result in results))
    table.add_row("positions from", *map(source_of_positions, results))
    table.add_row("host syncs in a step", *(str(result.syncs) for result in results))
    table.add_row("data, median ms", *(_ms(result.data_median) for result in results))
    table.add_row("forward, median ms", *(_ms(result.forward_median) for result in results))
    table.add_row("parameters", *(f"{result.parameters:,}" for result in results))
    return table


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"

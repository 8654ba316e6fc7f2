"""Report where the steps of a training loop sync, and what removes each sync."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from mrope.errors import MRopeError
from mrope.guard import Judge, LoaderRecord, watching_loop
from mrope.guard.sync_places import (
    ACCELERATE,
    Kind,
    Stack,
    SyncPlace,
    find_place,
    place_cells,
    unpinned,
)

if TYPE_CHECKING:
    from rich.table import Table

_JUDGES: dict[Judge, str] = {
    "cuda": "by CUDA's sync debug mode",
    "guard": "by the guard on a CPU, as beside a CUDA device",
}


_MOST_ROWS = 8  # of one part; `as_dict` has all


def _steps(count: int, kind: str = "") -> str:
    return f"{count} {kind}step{'' if count == 1 else 's'}"


class SyncReport(TrainerCallback):  # type: ignore[misc]
    """Count the syncs of some training steps by place, print them, and name what removes each.

    A callback of transformers' `Trainer`, and so of TRL's trainers, and a context manager for any
    other loop, which calls `step` after each optimizer step:

        Trainer(..., callbacks=[SyncReport()])

        with SyncReport() as report:
            for batch in loader:
                ...
                optimizer.step()
                report.step()

    It watches from the end of the last warm-up step to the end of the last watched one, with all
    that lies between: copies of batches, logging, and evaluation and saving if they fall there.
    With gradient accumulation a step is an optimizer step and has several forwards. If tensors are
    on a CUDA device, torch's sync debug mode reports, and is then set back to what it was; else the
    guard does, as `mrope.guard.watching_loop` says.

    Not reported: the warm-up; `torch.cuda.synchronize` and waits for events; collectives; other
    threads; on a CPU also code that runs on CUDA alone, and batches of no torch DataLoader.

    Args:
        steps: number of optimizer steps to watch.
        warmup: number of optimizer steps before; 0 watches from the start, with its set-up.
        json_file: where to write the report as JSON; None: nowhere.
        quiet: do not print; `table`, `as_dict` and `str` give the report.

    Attributes:
        judge: what reported: "cuda", "guard", or None if no step was watched.
        watched: number of steps that were watched to their end.
        places: number of syncs of each place.

    Raises:
        MRopeError: `steps` below 1, or `warmup` below 0.

    A `Trainer` does not tell its callbacks that training raised. Put `with report:` around
    `trainer.train()` to end the watch there too; else it stays on until the report is used again.
    """

    def __init__(
        self,
        steps: int = 10,
        warmup: int = 3,
        *,
        json_file: Path | str | None = None,
        quiet: bool = False,
    ) -> None:
        if steps < 1 or warmup < 0:
            raise MRopeError(f"steps must be at least 1 and warmup 0, not {steps} and {warmup}")
        self.steps, self.warmup = steps, warmup
        self.json_file = None if json_file is None else Path(json_file)
        self.quiet = quiet
        self.judge: Judge | None = None
        self.watched = 0
        self.places: Counter[SyncPlace] = Counter()
        self._done = 0
        # Two: what is recorded from the start on outlives the watch, which begins after warm-up.
        self._armed, self._watch = ExitStack(), ExitStack()
        self._loaders = LoaderRecord()

    def __enter__(self) -> SyncReport:  # noqa: PYI034 - Self needs Python 3.11
        self._arm()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()
        else:
            self._close()

    def step(self) -> None:
        """Count one optimizer step: begin or end the watch if it is the last of its part."""
        self._done += 1
        if self.judge is not None:
            self.watched = min(self._done - self.warmup, self.steps)
        if self._done == self.warmup:
            self._begin()
        elif self._done == self.warmup + self.steps:
            self._finish()

    def on_train_begin(self, args: Any, state: Any, *_: Any, **_kwargs: Any) -> None:
        """Start anew; called by the `Trainer`."""
        self._arm()
        self._pinning = unpinned(args) if args.accelerator_config.non_blocking else None
        self._prints = state.is_world_process_zero

    def on_step_end(self, *_: object, **_kwargs: object) -> None:
        """Count an optimizer step; called by the `Trainer` before it logs."""
        self.step()

    def on_train_end(self, *_: object, **_kwargs: object) -> None:
        """Report the steps watched so far, if training was shorter; called by the `Trainer`."""
        self._finish()

    def _arm(self) -> None:
        self._close()
        self.judge, self.watched, self._done = None, 0, 0
        self.places.clear()
        self._prints = self._pending = True
        self._pinning = None
        self._loaders = LoaderRecord()
        self._armed.enter_context(self._loaders.recording())
        if self.warmup == 0:
            self._begin()

    def _begin(self) -> None:
        self.judge = self._watch.enter_context(watching_loop(self._found, self._loaders))

    def _found(self, op: str, stack: Stack) -> None:
        place = find_place(op, stack)
        if self._pinning and place.advice == ACCELERATE:
            place = replace(place, advice=self._pinning)
        self.places[place] += 1

    def _close(self) -> None:
        self._watch.close()
        self._armed.close()

    def _finish(self) -> None:
        """End the watch and give the report, once."""
        self._close()
        if not self._pending:
            return
        self._pending = False
        if self._prints and not self.quiet:
            self.print()
        if self._prints and self.json_file is not None:
            self.json_file.parent.mkdir(parents=True, exist_ok=True)
            self.json_file.write_text(json.dumps(self.as_dict(), indent=1) + "\n", "utf-8")

    @property
    def count(self) -> int:
        """Number of syncs in all watched steps."""
        return self.places.total()

    @property
    def per_step(self) -> float:
        """Syncs per optimizer step; 0 if none was watched."""
        return self.count / max(self.watched, 1)

    def by_kind(self) -> dict[Kind, int]:
        """Return the number of syncs of each part of the loop that has any."""
        kinds: Counter[Kind] = Counter()
        for place, count in self.places.items():
            kinds[place.kind] += count
        return dict(kinds.most_common())

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data, places with most syncs first."""
        return {
            "judge": self.judge,
            "warmup": self.warmup,
            "steps": self.watched,
            "syncs": self.count,
            "per_step": self.per_step,
            "by_kind": self.by_kind(),
            "places": [
                place.as_dict() | {"count": count} for place, count in self.places.most_common()
            ],
        }

    def __str__(self) -> str:
        """Return one line for each place, and the sum."""
        lines = [
            f"{place.kind}: {place.where}: {place.op}, {count} times. {place.advice}".rstrip(". ")
            for place, count in self.places.most_common()
        ]
        return "\n".join([*lines, self._title()])

    def _title(self) -> str:
        if self.judge is None:
            return f"no step watched: {_steps(self._done)}, {self.warmup} of them warm-up"
        return f"{self.count} syncs in {_steps(self.watched, 'optimizer ')}, {_JUDGES[self.judge]}"

    def table(self, width: int = 80) -> Table:
        """Return a rich table: the parts of the loop, and the places of each with most syncs.

        What removes them stands below, a line for each number in the last column.

        Args:
            width: columns of the terminal; in a narrow one a place takes two lines.
        """
        from rich.table import Table

        table = Table(title=self._title(), caption_justify="left", caption_style="none")
        for heading in ("part", "where", "what", "per step", "removed by"):
            # Folded, not cut: logs are 80 columns wide, and names of settings must stay whole.
            table.add_column(heading, overflow="fold", no_wrap=heading == "where")
        advice: dict[str, str] = {}
        rows = [(kind, row) for kind in self.by_kind() for row in self._rows(kind, advice)]
        table.caption = "\n".join(f"{number}: {one}" for one, number in advice.items())
        cells = place_cells([row[1] for _, row in rows], width)
        for kind, total in self.by_kind().items():
            for (of, (part, _, *rest)), cell in zip(rows, cells, strict=True):
                if of == kind:
                    table.add_row(part, cell, *rest)
            table.add_row(kind, "in all", "", self._each(total), "", end_section=True)
        table.add_row("in all", "", "", self._each(self.count), "")
        return table

    def _rows(self, kind: Kind, advice: dict[str, str]) -> Iterator[tuple[str, ...]]:
        """Yield the rows of a part of the loop, and give each advice a number in `advice`."""
        places = [(place, n) for place, n in self.places.most_common() if place.kind == kind]
        for place, count in places[:_MOST_ROWS]:
            if place.advice:
                advice.setdefault(place.advice, str(len(advice) + 1))
            number = advice.get(place.advice, "")
            yield kind, place.where, place.op, self._each(count), number
        rest = places[_MOST_ROWS:]
        if rest:
            each = self._each(sum(count for _, count in rest))
            yield kind, f"{len(rest)} more places", "", each, ""

    def _each(self, count: int) -> str:
        return f"{count / max(self.watched, 1):.3g}"

    def print(self) -> None:
        """Print the table; without rich, which is in the extra "cli", the lines of `str`."""
        try:
            from rich.console import Console
        except ModuleNotFoundError:
            print(self)
            return
        console = Console()
        console.print(self.table(console.width))

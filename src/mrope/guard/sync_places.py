"""Name the part of a training loop that syncs, from its stack, and the setting that removes it.

The rows of `KNOWN` were read in the sources of transformers 5.24, accelerate 1.15, TRL 1.16,
Lightning 2.6 and torch 2.13. A row matches a stack frame by the end of its file's path and by its
function, so that a release which moves a line changes nothing here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mrope.guard import innermost

Kind = Literal["model", "copy", "trainer", "loop"]
"""Forward and backward; copies of the batch; the trainer, its optimizer and metrics; other code."""

Stack = Sequence[tuple[str, int, str]]
"""(file, line, function) of stack frames, innermost first."""


# Columns beside a place that stay readable: the part of the loop, what syncs, how often, advice.
_OTHER_COLUMNS = 64


@dataclass(frozen=True)
class SyncPlace:
    """A line of a training loop that syncs.

    Attributes:
        kind: the part of the loop.
        file, line, function: innermost frame outside torch.
        op: what syncs there; on CUDA only that something does.
        advice: what removes it; empty if the place is not a known one.
    """

    kind: Kind
    file: str
    line: int
    function: str
    op: str
    advice: str

    @property
    def where(self) -> str:
        """Return the last two parts of the path, the line and the function."""
        short = "/".join(self.file.replace("\\", "/").rsplit("/", 2)[-2:])
        return f"{short}:{self.line} {self.function}"

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes by name."""
        return asdict(self)


def place_cells(places: Sequence[str], width: int) -> list[str]:
    """Return a table's cells of places, `file:line` always whole.

    Args:
        places: "folder/file:line function", maybe with "via file:line function" behind.
        width: columns of the terminal. If it is too narrow for the longest place and four more
            columns, the folder is left out and the function gets a line of its own.
    """
    if max(map(len, places), default=0) + _OTHER_COLUMNS <= width:
        return list(places)
    bare = [re.sub(r"\S*/", "", place).replace(" via ", "\nvia ") for place in places]
    return [re.sub(r"(:\d+) ", r"\1\n", place) for place in bare]


@dataclass(frozen=True)
class KnownPlace:
    """A row of the table of places.

    Attributes:
        path: end of the file's path, or a part of it that ends with "/".
        function: the frame's function; empty: any.
        kind, advice: see `SyncPlace`.
        direct: only if this is the innermost frame outside torch. Such a function also calls the
            model, the optimizer or the user's code.
    """

    path: str
    function: str
    kind: Kind
    advice: str
    direct: bool = False

    def matches(self, file: str, function: str) -> bool:
        """Return whether a stack frame is at this place."""
        here = self.path in file if self.path.endswith("/") else file.endswith(self.path)
        return here and self.function in ("", function)


_TRAINER, _SFT = "transformers/trainer.py", "trl/trainer/sft_trainer.py"
_NAN = "logging_nan_inf_filter=False"
_LOG = "a larger logging_steps"
_TOKENS = 'include_num_input_tokens_seen="no"'
_SFT_METRICS = "compute_loss = Trainer.compute_loss in a subclass: gives up TRL's metrics"
_BARS = "prog_bar=False in self.log, a larger log_every_n_steps"
ACCELERATE = (
    'non_blocking=True (Trainer: accelerator_config={"non_blocking": True}) with pinned memory'
)
_ATTACH = "attach(model), with the stage as collate function"

KNOWN = (
    # Copies of the batch.
    KnownPlace("accelerate/utils/operations.py", "send_to_device", "copy", ACCELERATE),
    KnownPlace(_TRAINER, "_prepare_input", "copy", "let accelerate copy: see send_to_device"),
    KnownPlace("utilities/apply_func.py", "batch_to", "copy", "DataLoader(pin_memory=True)"),
    KnownPlace("mrope/training/step.py", "to_device", "copy", "dataloader.pin_memory: true"),
    # transformers' Trainer. In 4.57 its loop is one function, which counts tokens too.
    KnownPlace(_TRAINER, "_run_epoch", "trainer", _NAN, direct=True),
    KnownPlace(_TRAINER, "_inner_training_loop", "trainer", f"{_NAN}, {_TOKENS}", direct=True),
    KnownPlace(_TRAINER, "_maybe_log_save_evaluate", "trainer", _LOG, direct=True),
    KnownPlace(_TRAINER, "_track_num_input_tokens", "trainer", _TOKENS),
    KnownPlace(_TRAINER, "_get_grad_norm", "trainer", "DeepSpeed's norm is read at every step"),
    KnownPlace(_TRAINER, "_evaluate", "trainer", "a larger eval_steps"),
    KnownPlace(_TRAINER, "_save_checkpoint", "trainer", "a larger save_steps"),
    # Other trainers.
    KnownPlace(_SFT, "compute_loss", "trainer", _SFT_METRICS),
    KnownPlace("utilities/apply_func.py", "to_item", "trainer", _BARS),
    KnownPlace("logger_connector/result.py", "", "trainer", _BARS),
    KnownPlace("core/module.py", "__to_tensor", "trainer", "self.log a tensor, not a number"),
    KnownPlace("loops/utilities.py", "check_finite_loss", "trainer", "detect_anomaly=False"),
    # torch.
    KnownPlace("torch/amp/grad_scaler.py", "", "trainer", "bf16 in place of fp16: no loss scale"),
    KnownPlace("nn/utils/clip_grad.py", "", "trainer", "error_if_nonfinite=False"),
    KnownPlace("torch/optim/", "", "trainer", "an optimizer with fused=True"),
    KnownPlace("torch/autograd/", "_engine_run_backward", "model", _ATTACH),
    KnownPlace("torch/nn/modules/module.py", "_call_impl", "model", _ATTACH),
)
# A place in none of the rows is the trainer's if a frame is in one of these packages.
_TRAINERS = (
    "/transformers/trainer",
    "/accelerate/",
    "/trl/",
    "/lightning/",
    "/pytorch_lightning/",
)


def unpinned(args: Any) -> str | None:
    """Return what lets transformers' Trainer pin its batches, which its arguments keep it from.

    `use_cpu=True` turns `dataloader_pin_memory` off, beside no GPU as well.
    """
    if args.dataloader_pin_memory:
        return None
    return (
        "no use_cpu=True, which turns pinning off" if args.use_cpu else "dataloader_pin_memory=True"
    )


def find_place(op: str, stack: Stack) -> SyncPlace:
    """Return the place of one sync.

    The innermost frame that a row of `KNOWN` matches decides: a read in a metric that the model's
    forward calls belongs to the model, one that the trainer makes afterwards to the trainer.
    """
    site = innermost(stack)
    for file, line, function in stack:
        path = file.replace("\\", "/")
        for known in KNOWN:
            if known.matches(path, function) and (not known.direct or (file, line) == site[:2]):
                return SyncPlace(known.kind, *site, op, known.advice)
    files = [file.replace("\\", "/") for file, _, _ in stack]
    ours = any(part in file for file in files for part in _TRAINERS)
    return SyncPlace("trainer" if ours else "loop", *site, op, "")

"""Run every attached family on a device: no sync, and loss and gradients of the plain model.

    PYTHONPATH=src:tests python tests/cuda/check_families.py OUT.json [FAMILY ...]

Models are the small ones of `mrope doctor`, with head sizes that the variable-length kernel takes.
Each runs forward and backward in float32 and in bfloat16, on padded batches and, where packing is
verified, on flattened ones; attached once with a call for each run of equal segments ("segments",
under sdpa) and, in bfloat16, once with the variable-length kernel ("varlen"). On CUDA the step runs
under `torch.cuda.set_sync_debug_mode("error")`; on a CPU under `SyncGuard`, and without the kernel.

A case passes without a sync and with loss and gradients near the plain model's on the padded batch.
The kernel rounds in another order than sdpa. Where the plain model's own gradients move further than
the limit when its tower's attention is rounded anew (experts are then chosen differently), up to twice
that is allowed, and the report says so ("own").
In float32 a mixture of experts may sync on CUDA: `torch.nn.functional.grouped_mm` reads its groups
back there, for the plain model too. Prints a line for each case; exits with 1 if any fails.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mrope import MRopeCollator
from mrope.bench.harness import conditions
from mrope.collate.packing import Flatten
from mrope.hf import attach, detach
from mrope.hf.rows import ROWS
from mrope.proof.small_models import _media, _plain_batch, _specs, default_model
from mrope.proof.tiny_examples import tiny_examples
from mrope.training.step import to_device
from support.models import PLAIN_FAMILIES, tiny_model
from support.no_syncs import no_syncs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Largest relative differences of loss and gradients: rounding, far below what a wrong frame,
# position or mask makes.
MOST = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (5e-3, 5e-2)}
EXPECTED = "grouped_mm in float32"
ROUNDINGS, HALF_ULP = 4, 2.0**-9  # of bfloat16, relative

Batch = dict[str, Any]
Case = dict[str, Any]


class Subject:
    """A small model of a family on the device, and the batches to run it on."""

    def __init__(self, family: str, dtype: torch.dtype) -> None:
        self.model = small_model(family)
        self.specs = _specs(self.model)
        self.dtype = dtype
        names = {type(one).__name__ for one in self.model.modules()}
        self.has_experts = any("Experts" in name for name in names)
        self.config = self.model.config.to_dict()
        self.model.to(DEVICE, dtype)

    def batches(self) -> Iterator[tuple[str, Batch, Batch]]:
        """Yield a name, the plain model's batch, and the same examples from the stage.

        A flattened row is compared with a batch padded on the right: on the left, the last token of
        the padding predicts the first of the row, which counts in the loss.
        """
        spec, vision, audio = self.specs
        for media in _media(spec):
            name = "+".join(kind for kind, wanted in media.items() if wanted)
            plain = _plain_batch(self.model, self.specs, media)
            stage = MRopeCollator(partial(copied, plain), spec, vision, audio=audio)
            yield f"{name} padded", self.on_device(plain), self.on_device(stage(None))
            if spec.family_row.packs and audio is None:
                examples = tiny_examples(self.config, spec, **media)
                right = MRopeCollator(None, spec, vision)(examples)
                packing = Flatten(attached=True)
                flat = MRopeCollator(None, spec, vision, packing=packing)(examples)
                yield f"{name} flattened", self.on_device(right), self.on_device(flat)

    def on_device(self, batch: Batch) -> Batch:
        """Return the batch on the device; pixels and audio in the dtype that some layers need."""
        # Training needs no cache, and one of sliding windows copies their width to the device.
        moved = dict(to_device(batch, DEVICE)) | {"use_cache": False}
        inputs = [name for name in moved if name.startswith("pixel_values")]
        for name in (*inputs, "input_features", "audio_padded_feature"):
            if name in moved:
                moved[name] = moved[name].to(self.dtype)
        return moved

    def step(self, batch: Batch) -> torch.Tensor:
        """Run forward and backward; return the loss, which stays on the device."""
        self.model.zero_grad()
        output = self.model(**batch)
        loss: torch.Tensor = output[0] if output.get("loss") is None else output.loss
        loss = loss if loss.ndim == 0 else loss.float().square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def own_difference(self, plain: Batch, wanted: dict[str, torch.Tensor]) -> float:
        """Return how far the plain model's gradients move when its tower's attention is rounded anew."""
        layers = [one for one in self.model.modules() if is_tower_attention(one)]
        furthest = 0.0
        for seed in range(ROUNDINGS):
            random = torch.Generator(DEVICE).manual_seed(seed)
            handles = [one.register_forward_hook(partial(round_anew, random)) for one in layers]
            self.step(plain)
            for handle in handles:
                handle.remove()
            furthest = max(furthest, relative(self.gradients(), wanted))
        return furthest

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradients of the last step, in float64."""
        named = self.model.named_parameters()
        return {name: one.grad.double() for name, one in named if one.grad is not None}


def copied(batch: Batch, _: None) -> Batch:
    """Return a copy of a batch: a collate function for examples that are collated already."""
    return dict(batch)


def small_model(family: str) -> Any:
    """Return the small model of `mrope doctor`; of families with 1-D positions that of the tests.

    Two layers of their default configs need not hold every kind that the family has.
    """
    return tiny_model(family).train() if family in PLAIN_FAMILIES else default_model(family)


def is_tower_attention(module: torch.nn.Module) -> bool:
    """Return whether a module is an attention layer of a vision tower."""
    name = type(module).__name__
    return "Vision" in name and name.endswith("Attention")


def round_anew(random: torch.Generator, _: Any, __: Any, output: Any) -> Any:
    """Return a layer's output as another order of the same additions may round it."""
    if isinstance(output, tuple):
        return tuple(round_anew(random, None, None, one) for one in output)
    if not isinstance(output, torch.Tensor):
        return output
    noise = torch.randn(output.shape, generator=random, device=output.device)
    return (output.float() * (1 + HALF_ULP * noise)).to(output.dtype)


def compare(subject: Subject, attention: Any, staged: Batch, wanted: Any) -> Case:
    """Return the differences of an attached step to the plain one, and the sync that it met."""
    attach(subject.model, attention=attention)
    try:
        loss = subject.step(dict(staged))  # what is set up once may sync
        gradients = subject.gradients()
        try:
            with no_syncs(DEVICE):
                subject.step(dict(staged))
            sync = None
        except Exception as error:  # noqa: BLE001 - both modes raise their own
            sync = described(error)
    finally:
        detach(subject.model)
    own_loss, own_gradients = wanted
    missing = sorted(own_gradients.keys() ^ gradients.keys())
    return {
        "loss": float((loss - own_loss).abs() / own_loss.abs()),
        "gradients": relative(gradients, own_gradients),
        "missing": missing,
        "sync": sync,
    }


def relative(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return the norm of the difference of all gradients, relative to the norm of theirs."""
    both = ours.keys() & theirs.keys()
    apart = sum(float((ours[name] - theirs[name]).square().sum()) for name in both)
    return float((apart / sum(float(theirs[name].square().sum()) for name in both)) ** 0.5)


def described(error: BaseException) -> str:
    """Return what raised, and the innermost places of the package and of transformers."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{Path(one.filename).name}:{one.lineno} {one.name}" for one in frames]
    return (
        f"{type(error).__name__}: {error}".splitlines()[0][:200]
        + " at "
        + " < ".join(reversed(places[-4:]))
    )


def verdict(case: Case) -> str:
    """Return "ok", the expected sync, or what failed."""
    if "error" in case:
        return f"FAILED {case['error']}"
    loss, gradients = MOST[getattr(torch, case["dtype"])]
    gradients = max(gradients, 2 * case.get("own", 0.0))
    # Not `>`, which a nan passes.
    if case["missing"] or not (case["loss"] <= loss and case["gradients"] <= gradients):
        return "FAILED differs"
    if case["sync"] is None:
        return "ok"
    expected = DEVICE.type == "cuda" and case["experts"] and case["dtype"] == "float32"
    return f"ok, {EXPECTED}" if expected else f"FAILED sync {case['sync']}"


def check(family: str, dtype: torch.dtype) -> Iterator[Case]:
    """Yield the cases of a family in one dtype; one with an error where something was raised."""
    head: Case = {"family": family, "dtype": str(dtype).removeprefix("torch.")}
    try:
        subject = Subject(family, dtype)
        head["experts"] = subject.has_experts
        for name, plain, staged in subject.batches():
            wanted = subject.step(plain), subject.gradients()
            varlen = DEVICE.type == "cuda" and dtype is torch.bfloat16
            for attention in ("segments", "varlen") if varlen else ("segments",):
                known = head | {"batch": name, "attention": attention}
                try:
                    found = compare(subject, attention, staged, wanted)
                    if attention == "varlen" and found["gradients"] > MOST[dtype][1]:
                        found["own"] = subject.own_difference(plain, wanted[1])
                    yield known | found
                except Exception as error:  # noqa: BLE001 - the other cases are still to be run
                    yield known | {"error": described(error)}
    except Exception as error:  # noqa: BLE001 - so are the other families
        yield head | {"error": described(error)}


def main(file: Path, families: list[str]) -> int:
    """Check the families, print and write every case; return 1 where one fails."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    report: dict[str, Any] = {"conditions": conditions(), "device": name, "cases": []}
    start = time.perf_counter()
    for family in families or ROWS:
        for dtype in MOST:
            for case in check(family, dtype):
                case["verdict"] = verdict(case)
                numbers = [
                    f"{case[key]:.1e}" for key in ("loss", "gradients", "own") if key in case
                ]
                labels = (family, case["dtype"], case.get("batch"), case.get("attention"))
                print(*labels, *numbers, case["verdict"], flush=True)
                report["cases"].append(case)
            file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    bad = sum(str(case["verdict"]).startswith("FAILED") for case in report["cases"])
    seconds = time.perf_counter() - start
    print(f"{len(report['cases'])} cases on {name} in {seconds:.0f} s, {bad} failed")
    return min(bad, 1)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2:]))

"""On a CUDA device: flattened batches leak nothing, and attached models do not sync.

    python tests/cuda/check_packing.py OUT.json

Under sdpa in float32 each example's logits are those that it gives alone. Under flash attention, in
bfloat16, the same within its rounding; the kernel is flash_attn's where it is installed, else torch's
own for variable lengths (`tests/support/flash.py`). Attached steps run under CUDA's own
set_sync_debug_mode("error").
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "src")]

from hf.test_packed_models import LINEAR, PACKED, collator, mixed_examples
from mrope.bench.harness import conditions
from mrope.hf import attach, detach
from mrope.training.step import to_device
from support.flash import flash_attention
from support.models import media_of, tiny_model
from support.no_syncs import no_syncs

CUDA = torch.device("cuda")


def check(family: str, attention: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the largest differences to each example alone, and the sync of an attached step, if any."""
    examples = mixed_examples(family, media_of(family)[0])
    model = tiny_model(family, attention).to(CUDA, dtype)

    def logits(packing: Any, rows: Any) -> torch.Tensor:
        batch = to_device(collator(family, packing=packing)(rows), CUDA)
        with torch.no_grad():
            result: torch.Tensor = model(**batch).logits[0].float()
        return result

    alone = torch.cat([logits(None, [one]) for one in examples])
    found: dict[str, Any] = {"family": family, "attention": attention, "dtype": str(dtype)}
    found["largest logit"] = float(alone.abs().max())
    if family not in LINEAR:
        found["unmodified"] = float((logits("flatten", examples) - alone).abs().max())
    attach(model)
    found["attached"] = float((logits("flatten", examples) - alone).abs().max())
    found["attached waits"] = find_sync(
        model, to_device(collator(family, packing="flatten")(examples), CUDA)
    )
    detach(model)
    return found


def find_sync(model: Any, batch: Any) -> str:
    """Return what CUDA says of a step, forward and backward: "none", or the error."""
    model.train()
    model(**batch).loss.backward()  # whatever is set up once
    try:
        with no_syncs(CUDA):
            model(**batch).loss.backward()
    except RuntimeError as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{Path(last.filename).name}:{last.lineno} {last.name}: {error}"
    return "none"


def main(file: Path) -> None:
    """Check every family, print it and write it down; fail where something leaks or syncs."""
    torch.backends.cuda.matmul.allow_tf32 = False
    own = importlib.util.find_spec("flash_attn") is not None
    report: dict[str, Any] = {
        "conditions": conditions(),
        "device": torch.cuda.get_device_name(),
        "flash kernel": "flash_attn" if own else "torch.nn.attention.varlen",
        "checks": [],
    }
    for family in PACKED:
        for attention in ("sdpa", "eager"):
            for dtype in (torch.float32, torch.bfloat16):
                report["checks"].append(check(family, attention, dtype))
        with contextlib.nullcontext() if own else flash_attention():
            try:
                report["checks"].append(check(family, "flash_attention_2", torch.bfloat16))
            except Exception as error:  # noqa: BLE001 - the other families are still to be checked
                report["checks"].append(
                    {"family": family, "attention": "flash", "error": str(error)}
                )
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    bad = [one for one in report["checks"] if not passed(one)]
    for one in report["checks"]:
        print(one, "" if passed(one) else "FAILED")
    sys.exit(bool(bad))


def passed(one: dict[str, Any]) -> bool:
    """Whether nothing leaked (float32: 1e-4; bfloat16: 0.05, a leak is 0.2 and more) or synced.

    Syncs count in bfloat16: in float32 torch's grouped matrix product, which mixtures of experts
    use, has no kernel of its own and reads its groups back.
    """
    if "error" in one:
        return False
    whole = one["dtype"] == "torch.float32"
    most = 1e-4 if whole else 0.05
    worst: float = max(one.get("unmodified", 0.0), one["attached"])
    return worst < most and (whole or one["attached waits"] == "none")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

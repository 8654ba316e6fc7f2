"""Run the guard's snippets on a GPU, and compare what the guard expects with CUDA's own verdict.

    PYTHONPATH=src:tests python tests/cuda/check_guard.py RESULT.json

Exit code 1 where they disagree. Needs torch, numpy and a CUDA device.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from mrope.guard import HostSyncError, SyncGuard
from support.snippets import SNIPPETS


def main(result: Path) -> int:
    """Return the number of disagreements, at most 1."""
    rows = []
    anchor = torch.ones(1, device="cuda")  # a device that holds tensors is the judge
    # An error raised inside a recomputation leaves hooks behind in torch 2.11: such snippets go last.
    for snippet in sorted(SNIPPETS, key=lambda one: "checkpoint" in one.name):
        try:
            snippet.make("cuda")()  # first use of a kernel may wait for other reasons
        except Exception as error:  # noqa: BLE001 - the rest of the list is still worth its time
            print(f"NOT {snippet.name}: {error!r}"[:200])
            rows.append({"snippet": snippet.name, "error": repr(error), "agree": False})
            continue
        torch.cuda.synchronize()
        body = snippet.make("cuda")
        with SyncGuard() as guard:
            body()
        torch.cuda.synchronize()
        raised = False
        body = snippet.make("cuda")
        try:
            with SyncGuard(mode="error"):
                body()
        except HostSyncError:
            raised = True
        seen = guard.count > 0
        agree = seen == raised == snippet.cuda_syncs
        rows.append(
            {
                "snippet": snippet.name,
                "guard_on_cpu": snippet.syncs,
                "expected_on_cuda": snippet.cuda_syncs,
                "cuda_warnings": guard.count,
                "cuda_error": raised,
                "agree": agree,
            }
        )
        print(f"{'ok ' if agree else 'NOT'} {snippet.name}: {rows[-1]}")
    report = {
        "device": torch.cuda.get_device_name(anchor.device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "snippets": rows,
    }
    result.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    bad = sum(not row["agree"] for row in rows)
    print(f"{len(rows)} snippets, {bad} disagree")
    return min(bad, 1)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))

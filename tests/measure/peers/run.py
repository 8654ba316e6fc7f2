"""Measure every peer, one process after another, each in an environment of its own.

    PYTHONPATH=src:tests python -m measure.peers.run OUT [--wheels FOLDER] [--cases 2b-mixed8,2b-crops64] [--parts ours,veomni]

OUT gets results.jsonl, a line for each cell, and a log of each process. FOLDER has a folder of wheels for each
environment, which pip installs into folders of their own: what the machine of the raw output lacked.

- `main`: transformers 5.24.0, omegaconf, pydantic with pydantic-core, annotated-types and typing-inspection
- `veomni`: veomni 0.1.12, transformers 5.9.0, tokenizers 0.22.2, torchdata 0.11.0
- `lmms`: lmms-engine 0.1.4, transformers 5.8.1, loguru
- `liger`: liger-kernel 0.8.5, transformers 5.22.2, since no release of Liger up to 0.8.5 imports for Qwen3-VL under 5.23 and
  later, which lack the class of outputs that it extends

Without `--wheels` all run in this environment. Graphs compile side by side, while nothing is measured; a process that
fails stops no other.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

CASES = "2b-mixed8,2b-crops64,2b-s4k"
# A part: its environment, its module, and the words that follow rows and cases.
PARTS = {
    "plain": ("main", "ours", "plain"),
    "attached": ("main", "ours", "attached"),
    "graph": ("main", "ours", "graph"),
    "veomni": ("veomni", "veomni_step", ""),
    "lmms": ("lmms", "lmms_step", ""),
    "liger": ("liger", "ours", "liger"),
    "layers": ("main", "ours", "layers"),
}
# Installed over each other, the first wins.
SITES = {
    "main": ("main",),
    "veomni": ("veomni", "liger", "main"),
    "lmms": ("lmms", "veomni", "liger", "main"),
    "liger": ("liger", "main"),
}


class Runner:
    """Starts the processes of a run, and says when each began."""

    def __init__(self, out: Path, wheels: Path | None, cases: str) -> None:
        self.out, self.wheels, self.cases = out, wheels, cases
        self.began = time.monotonic()
        self.rows, self.sites = out.parent / "peer_rows", out.parent / "peer_sites"
        out.mkdir(parents=True, exist_ok=True)

    def install(self, folder: str) -> subprocess.Popen[bytes] | None:
        """Start pip on a folder of wheels."""
        if self.wheels is None:
            return None
        files = [str(file) for file in sorted((self.wheels / folder).glob("*.whl"))]
        words = [
            "-m",
            "pip",
            "install",
            "-q",
            "--no-index",
            "--no-deps",
            "--no-compile",
            "--no-cache-dir",
            "--target",
        ]
        return subprocess.Popen([sys.executable, *words, str(self.sites / folder), *files])

    def start(
        self, name: str, environment: str, module: str, *words: str
    ) -> subprocess.Popen[bytes]:
        print(f"{time.monotonic() - self.began:4.0f} s: {name}", flush=True)
        sites = [str(self.sites / site) for site in SITES[environment]] if self.wheels else []
        paths = [*sites, os.environ.get("PYTHONPATH", "")]
        more = {
            "PYTHONPATH": os.pathsep.join(paths),
            "PEERS_OUT": str(self.out / "results.jsonl"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.out.parent / "peer_inductor"),
            "HF_HUB_OFFLINE": "1",
        }
        with (self.out / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", f"measure.peers.{module}", str(self.rows), *words],
                env={**os.environ, **more},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def part(self, name: str) -> None:
        environment, module, word = PARTS[name]
        if name == "graph":
            self.warm()
        # Liger patches whole modules, which the next case would find patched.
        for cases in self.cases.split(",") if name == "liger" else [self.cases]:
            words = [cases, word] if word else [cases]
            code = self.start(name, environment, module, *words).wait()
            if code:
                end = (self.out / f"{name}.log").read_text(errors="replace").splitlines()[-12:]
                print(f"{name}: exit {code}", *end, sep="\n")

    def warm(self) -> None:
        """Compile the graph of each case, side by side."""
        started = [
            self.start(f"warm-{number}", "main", "ours", case, "warm")
            for number, case in enumerate(self.cases.split(","))
        ]
        for process in started:
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--parts", default=",".join(PARTS))
    given = parser.parse_args()
    runner = Runner(given.out.resolve(), given.wheels, given.cases)
    installs = [runner.install(site) for site in SITES]
    if installs[0] is not None:
        installs[0].wait()
    runner.start("rows", "main", "rows", runner.cases).wait()
    for process in installs[1:]:
        if process is not None:
            process.wait()
    for name in given.parts.split(","):
        runner.part(name)
    print(f"{time.monotonic() - runner.began:4.0f} s: done")


if __name__ == "__main__":
    main()

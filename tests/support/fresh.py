"""Run code in a Python that has imported torch and nothing else, without waiting for that import.

`run_python` is `python -c` for the tests that ask what is imported, or run without a package. A process
that has imported torch, which `mrope` imports anyway, is forked for each.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

_SERVER = """
import json, os, sys, traceback
import torch

for line in sys.stdin:
    code, folder = json.loads(line)
    child = os.fork()
    if not child:
        sys.stdin.close()
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), stream)
        ended = 0
        try:
            exec(compile(code, "<fresh>", "exec"), {"__name__": "__main__"})
        except SystemExit as error:
            ended = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
            ended = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.communicate)  # closes its input, at which it ends
    return server


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Return exit code, output and errors of code that runs in a process of its own."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        server.stdin.write(json.dumps([code, folder]) + os.linesep)
        server.stdin.flush()
        ended = int(server.stdout.readline())
        out, err = (Path(folder, name).read_text(encoding="utf-8") for name in ("out", "err"))
    return subprocess.CompletedProcess([code], ended, out, err)

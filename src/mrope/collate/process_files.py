"""Append records to a JSON-lines file of each process, and read all files of a run together.

A file has one writer, so that no lock is needed and no process can damage another one's lines. A
killed process leaves at most a torn last line, which the reader skips.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch.utils.data import get_worker_info

from mrope.columns import NewColumns
from mrope.errors import MRopeError


def require_writable(path: Path) -> None:
    """Make the folder of `path`, and check that files can be written there.

    Otherwise the first bad example would raise, perhaps days into a run.

    Raises:
        OSError: the folder cannot be made or written to, or `path` is a folder itself.
    """
    if path.is_dir():
        raise IsADirectoryError(f"the path of a file is needed, but {path} is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def process_file(path: Path) -> Path:
    """Return a new name for the file of this process, beside `path`; no file is made.

    rejects.jsonl gives rejects.rank0-worker1-pid1234-5f0c9a1e.jsonl. Without `RANK` in the
    environment the rank is left out; outside of DataLoader workers it is "main" for the worker.
    """
    rank, worker = os.environ.get("RANK"), get_worker_info()
    words = [
        *([] if rank is None else [f"rank{rank}"]),
        "main" if worker is None else f"worker{worker.id}",
        f"pid{os.getpid()}",
        # Process ids repeat: after a restart, and on several machines that share a folder.
        secrets.token_hex(4),
    ]
    return path.with_name(f"{path.stem}.{'-'.join(words)}{path.suffix}")


def append_record(file: Path, record: NewColumns) -> None:
    """Append a line with the time, rank, worker and process id, and then `record`.

    Raises:
        OSError: the file cannot be written.
    """
    worker = get_worker_info()
    line = {
        "time": datetime.now(timezone.utc).isoformat(),
        "rank": os.environ.get("RANK"),
        "worker": None if worker is None else worker.id,
        "process": os.getpid(),
        **record,
    }
    # Opened for each line: workers are killed without a chance to flush or close a file.
    with file.open("ab") as handle:
        handle.write(json.dumps(line, default=str).encode() + b"\n")


def read_rejects(path: str | os.PathLike[str]) -> list[NewColumns]:
    """Read the rejects files of all processes together, in the order of time.

    Args:
        path: what was given as `SkipBad(rejects=...)`.

    Returns:
        A dict for each line; an empty list if nothing was rejected. A last line without its end,
        as a killed process may leave, is skipped.

    Raises:
        OSError: the folder does not exist or cannot be read.
        MRopeError: any other line is not JSON.
    """
    records = [record for lines in read_files(path) for record in lines]
    return sorted(records, key=lambda record: str(record["time"]))


def read_files(path: str | os.PathLike[str]) -> list[list[Any]]:
    """Read the lines of each file that processes derived from a path, in the order of names.

    Raises:
        OSError: the folder does not exist or cannot be read.
        MRopeError: a line is not JSON; a last line without its end is skipped.
    """
    path = Path(path).absolute()
    name = re.compile(
        rf"{re.escape(path.stem)}\.(rank.+-)?(worker\d+|main)-pid\d+-[0-9a-f]{{8}}"
        rf"{re.escape(path.suffix)}"
    )
    files = sorted(file for file in path.parent.iterdir() if name.fullmatch(file.name))
    return [_read_lines(file) for file in files]


def _read_lines(file: Path) -> list[Any]:
    *lines, _ = file.read_bytes().split(b"\n")
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise MRopeError(f"{file} holds a line that is not JSON: {error}") from error

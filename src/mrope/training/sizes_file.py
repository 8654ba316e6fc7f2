"""Keep the counts of a dataset's rows in a file beside it, so that they are counted once."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mrope.training.open_source import DATA_FILES

FOLDER = ".mrope_sizes"
_TABLES = (*DATA_FILES, ".arrow")


@dataclass(frozen=True)
class SizesFile:
    """A file of counts, int64 (N, fields), whose name says what they were counted from.

    A file of another dataset, processor or release has another name. One that cannot be written,
    in a folder that is not the user's, is left out without an error.

    Attributes:
        path: in a folder `FOLDER` beside the dataset.
    """

    path: Path

    @classmethod
    def beside(cls, source: Path, words: Sequence[object]) -> SizesFile:
        """Return the file for a dataset at a path.

        Args:
            source: a file, or a folder of files; sizes and times of those with rows are part of the
                name.
            words: whatever else the counts depend on.
        """
        folder = source if source.is_dir() else source.parent
        files = sorted(source.rglob("*")) if source.is_dir() else [source]
        digest = hashlib.blake2b(digest_size=12)
        for file in files:
            # Not pictures, which may stand beside the rows by the million.
            if file.name.endswith(_TABLES):
                stat = file.stat()
                digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        digest.update(repr(words).encode())
        return cls(folder / FOLDER / f"{digest.hexdigest()}.npy")

    def read(self, rows: int, fields: int) -> npt.NDArray[np.int64] | None:
        """Return the counts; None if there are none for so many rows."""
        try:
            table: npt.NDArray[np.int64] = np.load(self.path)
        except (OSError, ValueError):
            return None
        return table if table.shape == (rows, fields) else None

    def write(self, table_NF: npt.NDArray[np.int64]) -> None:
        """Write the counts, if the folder can be written to."""
        try:
            self.path.parent.mkdir(exist_ok=True)
            # Renamed when whole: ranks and other runs read it at the same time.
            with tempfile.NamedTemporaryFile(dir=self.path.parent, delete=False) as file:
                np.save(file, table_NF)
            os.replace(file.name, self.path)  # noqa: PTH105 - of a name, not of a Path
        except OSError:
            return

"""Open the dataset that `data.source` names: a file, a folder of files, or a saved dataset.

Reading is left to the `datasets` library, and so are the splits: by the names of files and folders,
as `load_dataset` finds them. It is imported when a dataset is opened, since workers do without.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mrope.errors import MRopeError

if TYPE_CHECKING:
    import datasets

# In order of precedence: .json files beside others describe them more often than they hold rows.
_KINDS = ((".parquet",), (".jsonl", ".jsonl.gz"), (".json", ".json.gz"))
DATA_FILES = tuple(ending for kind in _KINDS for ending in kind)
"""How the names of files end that a dataset is read from."""

# Written by `save_to_disk`: of one dataset, and of a DatasetDict.
_SAVED = ("state.json", "dataset_dict.json")
_SPLIT = re.compile(r"(.+):(\w+(?:\.\w+)*)")

Value = TypeVar("Value")


def split_source(source: str) -> tuple[Path, str | None]:
    """Return the path in `data.source`, and the split named behind a colon; None: none is named.

    Example:
        >>> split_source(".:train")[1]
        'train'
    """
    found = _SPLIT.fullmatch(source)
    # A path may hold a colon itself.
    if found is None or Path(source).exists() or not Path(found[1]).exists():
        return Path(source), None
    return Path(found[1]), found[2]


def open_source(source: str) -> datasets.Dataset:
    """Open the dataset at a path, or the split of it that `PATH:SPLIT` names.

    Args:
        source: a file that ends in one of `DATA_FILES`, a folder of such files, or a folder written
            by `save_to_disk`. A folder's only split need not be named.

    Raises:
        MRopeError: a path that cannot be read, no rows, a split that is not there, or several
            splits of which none is named.
    """
    import datasets

    path, split = split_source(source)
    with _errors_named(path):
        # The name "" stands for no splits.
        if any((path / name).is_file() for name in _SAVED):
            saved = datasets.load_from_disk(str(path))
            one = isinstance(saved, datasets.Dataset)
            return _choose({"": saved} if one else saved, split, path)
        splits = {"": [str(path)]} if path.is_file() else _files_by_split(path)
        files = _choose(splits, split, path)
        parquet = files[0].endswith(_KINDS[0])
        reader = datasets.Dataset.from_parquet if parquet else datasets.Dataset.from_json
        table: datasets.Dataset = reader(files)
    return table


def _files_by_split(folder: Path) -> dict[str, list[str]]:
    """Return the files of each split of a folder, by the rules of `load_dataset`.

    Raises:
        MRopeError: no data files, or some that belong to no split.
    """
    from datasets.data_files import DataFilesDict, get_data_patterns

    base = folder.resolve()
    files, kind = _data_files(base, folder)
    found = DataFilesDict.from_patterns(
        get_data_patterns(str(base)), base_path=str(base), allowed_extensions=[kind[0]]
    )
    splits = {str(name): list(files) for name, files in found.items() if files}
    # A file without the name of a split, beside others with one, would be left out silently.
    used = {Path(name) for files in splits.values() for name in files}
    unused = [file for file in files if file not in used]
    if unused:
        raise MRopeError(
            f"data.source: {folder}: {unused[0].name} belongs to no split; those that the names of "
            f"files and folders make are {', '.join(splits)}"
        )
    return splits


def _data_files(base: Path, folder: Path) -> tuple[list[Path], tuple[str, ...]]:
    """Return a folder's data files and their endings, without hidden ones, as `load_dataset`."""
    from datasets.data_files import FILES_TO_IGNORE

    seen = [
        file
        for file in sorted(base.rglob("*"))
        if file.name not in FILES_TO_IGNORE
        and not any(part.startswith((".", "__")) for part in file.relative_to(base).parts)
    ]
    kinds = [([file for file in seen if file.name.endswith(kind)], kind) for kind in _KINDS]
    if kinds[0][0] and kinds[1][0]:
        raise MRopeError(
            f"data.source: {folder} holds Parquet and JSON lines; name the files of one"
        )
    for files, kind in kinds:
        if files:
            return files, kind
    raise MRopeError(
        f"data.source: {folder} cannot be read: it holds no dataset written by save_to_disk, "
        f"and no files that end in {', '.join(DATA_FILES)}"
    )


def _choose(splits: Mapping[str, Value], split: str | None, path: Path) -> Value:
    """Return the one split, or the one that is named."""
    known = ", ".join(splits)
    if split is not None and split not in splits:
        lacks = f"has no split {split!r}; it has {known}"
        raise MRopeError(
            f"data.source: {path} "
            + (lacks if known else f"has no splits, so there is no {split!r}")
        )
    if split is None and len(splits) > 1:
        raise MRopeError(
            f"data.source: {path} holds the splits {known}; name one of them behind a colon: "
            f"{path}:{next(iter(splits))}"
        )
    return splits[next(iter(splits)) if split is None else split]


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Raise errors of the `datasets` library as `MRopeError`, with the path."""
    import datasets

    try:
        yield
    except MRopeError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # "An error occurred while generating the dataset" says nothing; its cause does.
        reason = error.__cause__ or error
        raise MRopeError(f"data.source: {path} cannot be read: {reason}") from error
    except (IndexError, StopIteration) as error:  # raised for an empty folder, an empty file
        raise MRopeError(f"data.source: {path} has no rows") from error

"""The table of the batch's keys has each key that a batch has, with its type and dimensions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

batch_keys = pytest.importorskip("support.batch_keys", exc_type=ImportError)

PAGE = Path(__file__).parents[1] / "docs" / "batch.md"
TYPES = r"\b(int32|int64|float32|bool|int|list|dict)\b"
# `*` stands for these.
PREFIXES = ("image", "video", "vision")
Row = tuple[set[str], set[str], set[int]]


def rows() -> list[Row]:
    """Return keys, types and numbers of dimensions of each row of the table."""
    table = PAGE.read_text(encoding="utf-8").split("\n| key | shape |")[1].split("\n\n")[0]
    found: list[Row] = []
    for line in table.splitlines()[2:]:
        name, shape, kind = (cell.strip() for cell in line[1:-1].split("|")[:3])
        keys = {key for cell in re.findall(r"`(.*?)`", name) for key in expand(cell)}
        if not name:
            # Another shape of the key above.
            found[-1][2].update(dimensions(shape, kind))
        elif keys:
            # "that of the features", which are float32 in what is tested.
            types = set(re.findall(TYPES, kind)) or {"float32"}
            found.append((keys, types, dimensions(shape, kind)))
    return found


def expand(key: str) -> list[str]:
    return [key.replace("*", prefix) for prefix in PREFIXES] if "*" in key else [key]


def dimensions(shape: str, kind: str) -> set[int]:
    """Return the lengths of the tuples in a cell; a list is as deep as its brackets."""
    if kind == "list":
        return {2 if "[" in shape else 1}
    tuples = [re.findall(r"[^,\s][^,]*", inside) for inside in re.findall(r"\((.*?)\)", shape)]
    return set(map(len, tuples)) or {0}


def test_the_table_is_what_batches_hold() -> None:
    found = batch_keys.collect_keys()
    table = rows()
    assert set(found) == {key for keys, _, _ in table for key in keys}
    for keys, types, sizes in table:
        kinds = {kind for key in keys for kind in found[key]}
        assert {name for name, _ in kinds} == types, keys
        assert {size for _, size in kinds} == sizes, keys


def test_a_key_stands_in_one_row() -> None:
    keys = [key for row in rows() for key in row[0]]
    assert sorted(keys) == sorted(set(keys))

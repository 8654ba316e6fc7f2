"""Check what the package's code measures: functions of one call, `Any`, names of columns.

    python tests/limits.py [SRC/MROPE] [--list]

Prints the measures, each with its limit, and exits with 1 if one is above; with --list, the functions that
are entered, too:

- entered: the functions, and files, of the package that `MRopeCollator` enters to collate two rows with
  an image each, for a model with a vision tower, by the collator's own padding. Counted by
  `sys.setprofile` in the second call, when all caches are filled. A function is a `def`;
  comprehensions, generator expressions and lambdas belong to the function that they stand in, since
  releases of Python differ in whether they are entered.
- any: how often the name `Any` stands in code, imports aside, per 1,000 lines of code. A line of code
  is one with a token other than a comment or a docstring.
- columns: lines with a string that begins with a modality and an underscore (`"image_grid_thw"`,
  `"videos_per_sample"`), or an f-string that begins with a value and an underscore
  (`f"{modality}_grid_thw"`), outside `columns.py`, the table of columns. Docstrings and comments are not
  code. Keys of a model's config that begin so, as `"image_token_id"`, count too.

Lower a limit when the code is below it; never raise one.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

# None may rise.
MOST = {
    "functions entered": 55,
    "files entered": 15,
    "Any per 1,000 lines of code": 35.0,
    "lines that spell a column": 90,
}
TABLE = "columns.py"
_COLUMN = re.compile(r"""["'](image|video|audio)s?_|f["']\{[^}]+\}_""")


def measure(package: Path) -> dict[str, float]:
    """Return the measures of a package, by the names of `MOST`."""
    files = {file: file.read_text(encoding="utf-8") for file in sorted(package.rglob("*.py"))}
    code = {file: [*code_lines(source)] for file, source in files.items()}
    entered = entered_functions(package)
    lines = sum(map(len, code.values()))
    return {
        "functions entered": len(entered),
        "files entered": len({file for file, _, _ in entered}),
        "Any per 1,000 lines of code": 1000 * sum(map(count_any, files.values())) / lines,
        "lines that spell a column": sum(
            bool(_COLUMN.search(line))
            for file in files
            if file.relative_to(package) != Path(TABLE)
            for line in code[file]
        ),
    }


def code_lines(source: str) -> Iterator[str]:
    """Yield the lines that hold code: without comments, blank lines and docstrings."""
    without = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node) is not None
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    blank = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    found: dict[int, list[str]] = {}
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (*blank, tokenize.COMMENT):
            for line in range(token.start[0], token.end[0] + 1):
                found.setdefault(line, []).append(token.string)
    for line in sorted(found.keys() - without):
        yield lines[line - 1]


def count_any(source: str) -> int:
    """Count the names `Any` of a module, imports aside; strings are not looked into."""
    return sum(
        getattr(node, "id", getattr(node, "attr", None)) == "Any"
        for node in ast.walk(ast.parse(source))
    )


def entered_functions(package: Path) -> set[tuple[str, str, int]]:
    """Return file, name and first line of each function that one collate call enters."""
    sys.path.insert(0, str(package.parent))
    collate, rows = _collator_and_rows()
    collate(rows)
    return enter(lambda: collate(rows), package)


def enter(call: Callable[[], Any], folder: Path) -> set[tuple[str, str, int]]:
    """Return file, name and first line of each function below a folder that a call enters."""
    found: set[tuple[str, str, int]] = set()

    def profile(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        inside = event == "call" and Path(code.co_filename).is_relative_to(folder)
        if inside and not code.co_name.startswith("<"):
            found.add((code.co_filename, code.co_name, code.co_firstlineno))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def _collator_and_rows() -> tuple[Any, list[dict[str, Any]]]:
    import torch

    from mrope import MRopeCollator, MRopeSpec, VisionSpec
    from mrope.spec.spec import example_config

    config = example_config("qwen3_vl")
    config["vision_config"] |= {"patch_size": 2, "num_position_embeddings": 16}
    spec = MRopeSpec.from_config(config, "transformers-5.23")
    image = [spec.vision_start_token_id, *[spec.image_token_id] * 4]
    rows = [
        {
            "input_ids": torch.tensor([*image, *[7] * length]),
            "labels": torch.tensor([*[-100] * len(image), *[7] * length]),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "pixel_values": torch.zeros(16, 24),
        }
        for length in (3, 5)
    ]
    return MRopeCollator(None, spec, VisionSpec.from_config(config)), rows


def main(words: list[str]) -> int:
    given = [word for word in words if word != "--list"]
    package = Path(given[0] if given else Path(__file__).parents[1] / "src" / "mrope").resolve()
    if given != words:
        for file, name, line in sorted(
            entered_functions(package), key=lambda one: (one[0], one[2])
        ):
            print(f"{Path(file).relative_to(package)}:{line}: {name}")
    found = measure(package)
    for name, value in found.items():
        print(f"{name}: {value:.4g}, at most {MOST[name]:g}")
    return int(any(value > MOST[name] for name, value in found.items()))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

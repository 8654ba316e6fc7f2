"""Check the limits of the package's layout: files at its root, lengths of functions, parameters.

    python tests/house.py [SRC/MROPE]

Prints every violation, then the share of comment lines of each wing. Exits with 1 on a violation.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT_FILES = {"__init__.py", "__main__.py", "arrays.py", "columns.py", "errors.py", "py.typed"}
MOST_BODY_LINES, MOST_PARAMETERS = 40, 8

Function = ast.FunctionDef | ast.AsyncFunctionDef


def violations(package: Path) -> Iterator[str]:
    """Yield one line for each violation in the package, in the order of its files."""
    for file in sorted(package.iterdir()):
        if file.is_file() and file.name not in ROOT_FILES:
            yield f"{file.name}: belongs into a wing; the root has {', '.join(sorted(ROOT_FILES))}"
    for file in sorted(package.rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        name = file.relative_to(package)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, Function):
                for problem in function_problems(node):
                    yield f"{name}:{node.lineno}: {node.name} has {problem}"


def function_problems(function: Function) -> Iterator[str]:
    """Yield what is above a limit; public functions with keywords may have more parameters."""
    lines = body_lines(function)
    if lines > MOST_BODY_LINES:
        yield f"{lines} body lines, more than {MOST_BODY_LINES}"
    count = len(parameters(function))
    if count > MOST_PARAMETERS and not (is_public(function) and has_keywords(function)):
        yield f"{count} parameters, more than {MOST_PARAMETERS}"


def body_lines(function: Function) -> int:
    """Count the lines of a body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def parameters(function: Function) -> list[str]:
    given = function.args
    names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def is_public(function: Function) -> bool:
    return not function.name.startswith("_") or function.name in ("__init__", "__call__")


def has_keywords(function: Function) -> bool:
    return bool(function.args.kwonlyargs or function.args.defaults)


def comment_shares(package: Path) -> dict[str, float]:
    """Return the share of lines with a comment, by wing; files of the root count as "mrope"."""
    comments: dict[str, int] = {}
    lines: dict[str, int] = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).parts
        wing = parts[0] if len(parts) > 1 else package.name
        source = file.read_text(encoding="utf-8")
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        found = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
        comments[wing] = comments.get(wing, 0) + len(found)
        lines[wing] = lines.get(wing, 0) + len(source.splitlines())
    return {wing: comments[wing] / max(lines[wing], 1) for wing in sorted(lines)}


def main(words: list[str]) -> int:
    package = Path(words[0]) if words else Path(__file__).parents[1] / "src" / "mrope"
    found = list(violations(package))
    for line in found:
        print(line)
    print(
        "comment lines:",
        *(f"{wing} {share:.1%}" for wing, share in comment_shares(package).items()),
    )
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

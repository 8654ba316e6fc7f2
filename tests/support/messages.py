"""Collect the messages of all errors that the package raises, from its source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "mrope"
ANY = "…"
# Not for users: Python's protocol for attributes, and what another line of the package catches.
INTERNAL = ("AttributeError", "AssertionError", "LookupError", "ModuleNotFoundError")


def collect_messages() -> dict[str, list[str]]:
    """Return each message, with `ANY` for what differs from case to case, and where it is made.

    A message without words of its own, such as "row …: …" around another error, is left out.
    """
    found: dict[str, list[str]] = {}
    for file in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        functions = {
            node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
        }
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
        for call in filter(_makes_error, calls):
            for message in _messages(call, functions):
                if len(re.findall(r"[a-z]{2,}", message.replace(ANY, " "))) > 1:
                    where = f"{file.relative_to(SOURCE)}:{call.lineno}"
                    found.setdefault(message, []).append(where)
    return found


def _makes_error(call: ast.Call) -> bool:
    name = ast.unparse(call.func).rpartition(".")[2]
    return name.endswith(("Error", "BadParameter")) and name not in INTERNAL


def _messages(call: ast.Call, functions: dict[str, ast.FunctionDef]) -> Iterator[str]:
    if not call.args:
        return
    first = call.args[0]
    if isinstance(first, ast.Call) and isinstance(first.func, ast.Name):
        # A function that only words the message: its strings are what it may return.
        describe = functions.get(first.func.id)
        for node in ast.walk(describe) if describe else ():
            if isinstance(node, ast.Return):
                yield _template(node.value)
    else:
        yield _template(first)


def _template(node: ast.AST | None) -> str:
    return re.sub(f"{ANY}({ANY}| )*{ANY}", ANY, " ".join(_text(node).split()))


def _text(node: ast.AST | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return ANY

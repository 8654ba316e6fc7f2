"""`tests/house.py` fails on each kind of violation, and passes on a package without any."""

from __future__ import annotations

from pathlib import Path

import pytest

from house import comment_shares, main, violations

MANY = ", ".join(f"p{index}" for index in range(9))
FORTY = "\n".join(["    x = 1"] * 40)
BAD = {
    "a module at the root": ("helpers.py", "", "helpers.py: belongs into a wing"),
    "a long file": ("wing/a.py", "x = 1\n" * 401, "wing/a.py: 401 lines"),
    "a long body": (
        "wing/a.py",
        f'def f():\n    """Do."""\n{FORTY}\n    x = 2\n',
        "wing/a.py:1: f has 41 body lines",
    ),
    "many parameters": ("wing/a.py", f"def f({MANY}): ...\n", "f has 9 parameters"),
    "many private keywords": ("wing/a.py", f"def _f(*, {MANY}): ...\n", "_f has 9 parameters"),
}
GOOD = f'''# A comment.
def f():
    """Do.

    At length.
    """
{FORTY}


class C:
    def call(self, {MANY.removesuffix(", p8")}): ...
    def __init__(self, *, {MANY}): ...
'''


def write(package: Path, name: str, source: str) -> None:
    (package / name).parent.mkdir(exist_ok=True)
    (package / name).write_text(source, encoding="utf-8")


@pytest.mark.parametrize("case", BAD)
def test_a_violation_is_found(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, source, message = BAD[case]
    write(tmp_path, name, source)
    assert main([str(tmp_path)]) == 1
    assert message in capsys.readouterr().out


def test_the_limits_themselves_are_allowed(tmp_path: Path) -> None:
    write(tmp_path, "__init__.py", "")
    write(tmp_path, "wing/a.py", GOOD)
    assert list(violations(tmp_path)) == []
    assert comment_shares(tmp_path)["wing"] == 1 / len(GOOD.splitlines())

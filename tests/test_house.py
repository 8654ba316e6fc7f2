"""`tests/house.py` and `tests/limits.py` find each kind of violation, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from house import comment_shares, main, violations
from limits import code_lines, count_any, enter, measure

MANY = ", ".join(f"p{index}" for index in range(9))
FORTY = "\n".join(["    x = 1"] * 40)
BAD = {
    "a module at the root": ("helpers.py", "", "helpers.py: belongs into a wing"),
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


SPELLED = '''"""Doc: "image_grid_thw"."""
NAMES = ("image_grid_thw", 'videos_per_sample')  # "audio_seqlens"
def f(modality: str):
    """Read `f"{modality}_x"`."""

    return f"{modality}_grid_thw", "the image_grid_thw", "imagery"
'''


def test_code_is_measured_without_comments_and_docstrings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("limits.entered_functions", lambda package: {("a.py", "f", 1)})
    write(tmp_path, "wing/a.py", SPELLED)
    write(tmp_path, "columns.py", SPELLED + "x: Any = 1\n")
    assert [line[:5] for line in code_lines(SPELLED)] == ["NAMES", "def f", "    r"]
    assert measure(tmp_path) == {
        "functions entered": 1,
        "files entered": 1,
        "Any per 1,000 lines of code": 1000 / 7,
        "lines that spell a column": 2,
    }


def test_any_is_counted_wherever_it_is_used() -> None:
    assert count_any("from typing import Any\nx: dict[Any, typing.Any] = cast('Any', 1)\n") == 2


def test_functions_of_one_folder_are_counted_once_each() -> None:
    def one() -> list[int]:
        return [two(number) for number in range(3)]

    def two(number: int) -> int:
        return len(Path(str(number)).name)

    found = enter(one, Path(__file__).parent)
    assert sorted(name for _, name, _ in found) == ["one", "two"]

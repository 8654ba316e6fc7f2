"""Fix what the terminal and the environment decide about printed output."""

from __future__ import annotations

import pytest

# Read by rich and typer; each forces colours or another width, in CI as on a desktop.
TERMINAL = ("FORCE_COLOR", "NO_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TERMINAL_WIDTH")


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every test print on 80 columns without colours, whatever it runs in."""
    monkeypatch.setenv("COLUMNS", "80")
    for name in TERMINAL:
        monkeypatch.delenv(name, raising=False)

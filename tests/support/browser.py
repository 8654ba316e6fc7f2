"""Find and start the Chromium that tests look at pages with.

    python tests/support/browser.py

Prints the program's path; exits with 1 if there is none, which `make browser` then installs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """Return the path of a Chromium on the PATH, or of the one that playwright installed."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    cache = os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or Path.home() / ".cache/ms-playwright"
    for pattern in ("*/*/chrome-headless-shell", "*/*/headless_shell", "chromium-*/*/chrome"):
        if files := sorted(Path(cache).glob(pattern)):
            return str(files[-1])
    return None


@contextmanager
def open_browser() -> Iterator[Any]:
    """Start a Chromium; skip the test if there is none, except in CI, where that is a failure."""
    program = find_browser()
    if program is None:
        message = "no Chromium: run `make browser`"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as play:
        # Chromium's sandbox refuses to run as root, which CI is; the pages are our own.
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


if __name__ == "__main__":
    path = find_browser()
    print(path or "no Chromium found")
    raise SystemExit(0 if path else 1)

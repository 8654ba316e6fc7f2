"""The built site in a browser: nothing scrolls sideways that need not, search finds, no other host is asked."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.browser import open_browser

ROOT = Path(__file__).parents[1]
WIDE, NARROW = 1280, 390
# Elements that hold more than they show: code, and the frames that the theme puts around tables.
OVERFULL = """
() => [...document.querySelectorAll("pre > code, .md-typeset__scrollwrap, .md-typeset__table")]
  .filter(element => element.scrollWidth > element.clientWidth + 1)
  .map(element => element.innerText.slice(0, 60))
"""
# Pictures whose file did not load, and those that are wider than the text.
BAD_PICTURES = """
() => [...document.querySelectorAll(".md-content img")]
  .filter(img => !img.naturalWidth || img.getBoundingClientRect().right > innerWidth)
  .map(img => img.src)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site once; `make docs` builds it strictly."""
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    subprocess.run(words, cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


def pages(site: Path) -> list[Path]:
    found = sorted(file for file in site.rglob("*.html") if file.name != "404.html")
    assert len(found) > 15
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_pages_fit(site: Path, browser: Any, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    problems = []
    for file in pages(site):
        page.goto(file.as_uri())
        name = str(file.relative_to(site))
        if page.evaluate("document.documentElement.scrollWidth") > width:
            problems.append(f"{name} scrolls sideways")
        if width == WIDE:
            problems += [f"{name}: {text!r} is cut" for text in page.evaluate(OVERFULL)]
        problems += [f"{name}: {source} is broken" for source in page.evaluate(BAD_PICTURES)]
    page.close()
    assert problems == []
    assert [url for url in asked if not url.startswith("file:")] == []


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_search_finds_a_key_of_the_batch(site: Path, browser: Any, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto((site / "index.html").as_uri())
    box = page.locator(".md-search__input")
    if width == NARROW:  # the box opens from a button
        page.locator("label.md-header__button[for=__search]").click()
    assert box.is_visible()
    box.press_sequentially("rope_deltas")  # the theme listens to keys
    page.locator(".md-search-result__item").first.wait_for()
    assert re.match(r"\d+ matching documents", page.locator(".md-search-result__meta").inner_text())
    page.close()

"""The page of `mrope check --report`: its pictures, its parts, and how a browser shows it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from mrope.check.html_page import draw_histogram, draw_row, write_page
from mrope.check.report import Check
from mrope.check.row_layout import Misfit, RowLayout, TokenRun, lay_out
from mrope.check.rows import RowCheck
from mrope.check.summary import EXAMPLES, Summary
from support.browser import open_browser
from support.checked import CUT, GOOD, SPEC, STRAY, Folder, Row
from support.malformed import image


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Folder:
    return Folder(tmp_path, capsys)


# Layouts and pictures.


def test_a_row_is_cut_into_runs_without_its_padding() -> None:
    row = {"input_ids": [[0, 0, 7, *image(4), 0]], "attention_mask": [[0, 0, *[1] * 7, 0]]}
    layout = lay_out(SPEC, row)
    runs = [("text", 0, 2), ("image", 2, 4), ("text", 6, 1)]
    assert layout == RowLayout(tuple(TokenRun(*run) for run in runs))
    assert layout.tokens == 7
    assert lay_out(SPEC, {"input_ids": [[0]], "attention_mask": [[0]]}).runs == ()


def test_pictures_are_to_scale() -> None:
    runs = (TokenRun("text", 0, 60), TokenRun("image", 60, 20))
    picture = draw_row(RowLayout(runs, Misfit(60, 20, 60)))
    scale = picture.width / 120  # what is needed goes on after the row
    spans = {box.kind: (box.x / scale, box.width / scale) for box in picture.boxes}
    assert spans == {"text": (0, 60), "image": (60, 20), "misfit": (60, 20), "needed": (60, 60)}
    assert picture.pointer is not None
    assert picture.pointer.x == 70 * scale
    assert picture.pointer.text == "tokens 60 to 79; its grid needs 60"
    labels = {box.kind: box.label for box in picture.boxes}
    assert labels == {"text": "text 60", "image": "image 20", "misfit": "", "needed": "needs 60"}
    plain = draw_row(RowLayout(runs))
    assert (plain.pointer, [box.x for box in plain.boxes]) == (None, [0, 720])
    assert plain.boxes[-1].x + plain.boxes[-1].width == plain.width


@pytest.mark.parametrize(
    ("misfit", "text", "kinds"),
    [
        (Misfit(80, 0, 20), "nothing at 80; its grid needs 20", ["text", "needed"]),
        (Misfit(3, 1, 0), "token 3; no grid", ["text", "misfit"]),
        (Misfit(3, 1, None), "token 3", ["text", "misfit"]),
    ],
)
def test_what_does_not_fit_is_pointed_at(misfit: Misfit, text: str, kinds: list[str]) -> None:
    picture = draw_row(RowLayout((TokenRun("text", 0, 80),), misfit))
    assert picture.pointer is not None
    assert picture.pointer.text == text
    assert [box.kind for box in picture.boxes] == kinds


def test_a_token_of_a_long_row_can_be_seen() -> None:
    picture = draw_row(RowLayout((TokenRun("text", 0, 10**6),), Misfit(10**6 - 1, 1, 0)))
    box = picture.boxes[-1]
    assert box.width >= 1
    assert box.x + box.width <= picture.width
    assert picture.pointer is not None and picture.pointer.anchor == "end"


def test_the_histogram_has_every_row_once() -> None:
    lengths = [5, 5, 6, 200, 1000, 1000, 1000]
    picture = draw_histogram(lengths)
    rows = [int(str(box.title).rpartition(": ")[2].split()[0]) for box in picture.boxes]
    assert sum(rows) == len(lengths)
    assert picture.caption == "tallest bar: 3 rows"
    assert max(box.height for box in picture.boxes) == picture.height
    assert picture.boxes[-1].height == picture.height  # the three longest
    few = draw_histogram([5, 5, 6])
    assert [box.title for box in few.boxes] == ["5 to 5 tokens: 2 rows", "6 to 6 tokens: 1 row"]
    assert draw_histogram([]).boxes == []


# The page.


class Page(HTMLParser):
    """Reads a page: its elements must be closed in turn, and ask for nothing from outside."""

    VOID = ("meta", "rect", "line")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.count: dict[str, int] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        assert not {"src", "href", "xlink:href", "onload", "style"} & set(names)
        self.count[tag] = self.count.get(tag, 0) + 1
        self.ids += [str(names["id"])] if "id" in names else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)


def page_of(folder: Folder, rows: list[Row]) -> str:
    file = folder.path / "page.html"
    folder.check(rows, "--workers", "0", "--report", str(file))
    return file.read_text(encoding="utf-8")


def test_the_page_is_whole_and_asks_for_nothing(folder: Folder) -> None:
    text = page_of(folder, [GOOD, *[CUT] * 7, STRAY, {"input_ids": None}])
    page = Page(text)
    assert page.ids == ["lengths", *(f"row-{row}" for row in (1, 2, 3, 4, 5, 8, 9))]
    assert page.count["svg"] == 1 + EXAMPLES + 1  # a row without tokens has no picture
    assert "9 of 10 rows are bad" in text
    assert "And rows 6, 7." in text
    assert "script" not in page.count and "http:" not in text and "https:" not in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        width = float(ET.fromstring(svg).attrib["viewBox"].split()[2])
        for rect in ET.fromstring(svg).iter("rect"):
            assert 0 <= float(rect.attrib["x"]) <= width - float(rect.attrib["width"]) + 0.011


def test_the_page_of_good_rows_has_no_pictures_but_the_histogram(folder: Folder) -> None:
    page = Page(page_of(folder, [GOOD, GOOD]))
    assert page.count["svg"] == 1
    assert page.ids == ["lengths"]


def test_what_stands_in_a_dataset_cannot_break_the_page(tmp_path: Path) -> None:
    summary = Summary(of=1)
    evil = "</div><script>alert(1)</script>"
    summary.add(RowCheck(0, cause=evil, message=evil))
    file = tmp_path / "page.html"
    write_page(Check(evil, SPEC, False, "not compared", summary, 0.0), file)
    text = file.read_text(encoding="utf-8")
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    Page(text)


def test_a_page_that_cannot_be_written_is_one_message(folder: Folder) -> None:
    (folder.path / "page.html").mkdir()
    rows = [GOOD]
    assert folder.check(rows, "--workers", "0", "--report", str(folder.path / "page.html")) == 2
    assert "cannot write" in folder.err
    assert "1 row, none bad" in folder.out  # what was found is said before


@pytest.mark.parametrize("width", [1200, 400])
def test_the_page_in_a_browser(folder: Folder, width: int) -> None:
    page_of(folder, [GOOD, *[CUT] * 7, STRAY])
    asked: list[str] = []
    said: list[str] = []
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto((folder.path / "page.html").as_uri())
        assert page.locator(".verdict").inner_text() == "8 of 9 rows are bad"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        box = "#row-1 rect.{}"
        text, image_, misfit, needed = (
            page.locator(box.format(kind)).bounding_box()
            for kind in ("text", "image", "misfit", "needed")
        )
        # Four tokens, of which two are an image's; its grid needs four.
        assert needed["width"] == pytest.approx(2 * image_["width"], rel=0.05)
        assert text["width"] == pytest.approx(image_["width"], rel=0.05)
        assert misfit["x"] == pytest.approx(image_["x"], abs=3)
        assert needed["y"] > image_["y"] + image_["height"] - 1
        colours = page.eval_on_selector_all(
            "#row-1 rect", "boxes => boxes.map(box => getComputedStyle(box).fill)"
        )
        assert len(set(colours)) == 4
        bars = page.locator("#lengths rect.bar")
        assert bars.count() == 1 and bars.first.bounding_box()["height"] > 20
    assert asked == [(folder.path / "page.html").as_uri()]
    assert said == []

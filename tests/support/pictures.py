"""Draw the pictures of the docs as SVG.

    PYTHONPATH=src:tests python tests/support/pictures.py

Writes docs/pictures/: positions.svg, ladder.svg, peers.svg of the table of `measure.peers`, and
timeline-NAME.svg for every docs/benchmarks/timeline-NAME.json of that run. Text stays text, and colours
follow the reader's light or dark page.
"""

from __future__ import annotations

import json
import math
from html import escape
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from measure.peers.table import CASES, MARKS, PEERS, read_cells
from mrope import MRopeSpec, Shapes, rope_index
from mrope.spec import example_config
from mrope.training.config import load_config
from mrope.training.dataloader import load_rows

DOCS = Path(__file__).parents[2] / "docs"
FOLDER = DOCS / "pictures"
# Of the drawing, whose text is large enough for a phone; and of the picture on a wide page, in pixels.
WIDTH, SHOWN = 560, 680
BATCHES = 2000
# The ladder's benchmark: its batches, and its one rung of patches.
CASE, MEASURED = "2b-mixed8", 8
STYLE = """
text { font: 16px sans-serif; fill: #333 }
.small { font-size: 15px; fill: #666 }
@media (min-width: 500px) {
  text { font-size: 11px }
  .small { font-size: 10px }
}
.axis { stroke: #999; fill: none }
.band { fill: #8883 }
.text { stroke: #888; fill: #888 }
.time { stroke: #0060b0; fill: #0060b0 }
.height { stroke: #c84e00; fill: #c84e00 }
.width { stroke: #00805c; fill: #00805c }
.line { fill: none !important }
.peer { fill: #8a97a8 }
.host { fill: #3f6fb5 }
.back { fill: #b9a3d9 }
.sync { fill: #d43a2f }
.gpu { fill: #00805c }
@media (prefers-color-scheme: dark) {
  text { fill: #ddd }
  .small { fill: #aaa }
  .time { stroke: #5cb3f5; fill: #5cb3f5 }
  .height { stroke: #f59350; fill: #f59350 }
  .width { stroke: #3fcf9f; fill: #3fcf9f }
  .peer { fill: #77859a }
  .host { fill: #6f9fe0 }
  .back { fill: #7d63a8 }
  .sync { fill: #ff6b5e }
  .gpu { fill: #3fcf9f }
}
"""


class Picture:
    """Collects shapes of a picture; coordinates are rounded to tenths."""

    def __init__(self, height: int, title: str) -> None:
        self.height, self.title = height, title
        self.parts: list[str] = []

    def add(self, tag: str, css: str, content: str = "", **numbers: Any) -> None:
        given = {name.replace("_", "-"): _short(value) for name, value in numbers.items()}
        listed = "".join(f' {name}="{value}"' for name, value in given.items())
        self.parts.append(f'<{tag} class="{css}"{listed}>{escape(content)}</{tag}>')

    def rect(self, css: str, x: float, y: float, width: float, height: float, **more: Any) -> None:
        self.add("rect", css, x=x, y=y, width=width, height=height, **more)

    def text(self, x: float, y: float, words: str, css: str = "", anchor: str = "start") -> None:
        self.add("text", css, words, x=x, y=y, text_anchor=anchor)

    def line(
        self, css: str, *points: tuple[float, float], stroke: float = 1, dash: str = ""
    ) -> None:
        drawn = " ".join(f"{_short(x)},{_short(y)}" for x, y in points)
        more = {"stroke_dasharray": dash} if dash else {}
        self.add("polyline", css, points=drawn, stroke_width=stroke, **more)

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" '
            f'width="{SHOWN}" height="{self.height * SHOWN // WIDTH}" role="img">\n'
            f"<title>{self.title}</title>\n"
        )
        return head + f"<style>{STYLE}</style>\n" + "\n".join(self.parts) + "\n</svg>\n"


def _short(value: Any) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def draw_positions() -> Picture:
    """Draw time, height and width of text, an image and a clip, as `rope_index` computes them."""
    config = example_config("qwen2_5_vl")
    config["vision_config"] |= {"tokens_per_second": 2}
    spec = MRopeSpec.from_config(config, "transformers-5.23")
    start, image, video = spec.vision_start_token_id, spec.image_token_id, spec.video_token_id
    # 3 x 4 merged tokens, then three frames of 2 x 3, half a second, which is one position, apart.
    ids = [7, 7, 7, start, *[image] * 12, 7, 7, 7, start, *[video] * 18, 7, 7, 7, 7]
    position_ids, _ = rope_index(
        spec,
        [ids],
        image_grid_thw=[[1, 6, 8]],
        video_grid_thw=[[3, 4, 6]],
        second_per_grid_ts=[0.5],
    )
    position_3S = position_ids[:, 0]
    picture = Picture(330, "Time, height and width positions of text, an image and a clip")
    left, bottom, step = 34.0, 272.0, 520 / len(ids)
    rise = 190 / position_3S.max()

    def place(token: float, position: float) -> tuple[float, float]:
        return left + (token + 0.5) * step, bottom - position * rise

    tops = {image: ("an image,", "3 x 4 tokens"), video: ("a clip, 3 frames", "of 2 x 3 tokens")}
    kinds = [token if token in tops else None for token in ids]
    at = 0
    for kind, run in groupby(kinds):
        count = len(list(run))
        if kind is not None:
            picture.rect("band", left + at * step, 42.0, count * step, bottom - 42)
            for row, words in enumerate(tops[kind]):
                picture.text(
                    left + (at + count / 2) * step, 60 + 16 * row, words, "small", "middle"
                )
            _draw_axes(picture, position_3S[:, at : at + count], at, place)
        else:
            points = [place(at + n, position_3S[0, at + n]) for n in range(count)]
            picture.line("text line", *points, stroke=2)
            for x, y in points:
                picture.add("circle", "text", cx=x, cy=y, r=2.5)
        at += count
    _draw_frame(picture, left, bottom, len(ids), int(position_3S.max()), place)
    return picture


def _draw_axes(picture: Picture, span_3T: Any, at: int, place: Any) -> None:
    for css, stroke, row in (("time", 5.0, 0), ("height", 2.5, 1), ("width", 1.5, 2)):
        points = [place(at + n, value) for n, value in enumerate(span_3T[row])]
        picture.line(f"{css} line", *points, stroke=stroke)
        for x, y in points if css == "width" else []:
            picture.add("circle", css, cx=x, cy=y, r=2.0)


def _draw_frame(
    picture: Picture, left: float, bottom: float, tokens: int, top: int, place: Any
) -> None:
    picture.line("axis", (left, 42.0), (left, bottom), (left + 520, bottom))
    for position in range(0, top + 1, 5):
        picture.text(left - 6, place(0, position)[1] + 4, str(position), "small", "end")
    for token in range(0, tokens, 10):
        picture.text(place(token, 0)[0], bottom + 17, str(token), "small", "middle")
    picture.text(left + 520, bottom + 36, "token of the row", "small", "end")
    picture.text(2, 34, "position", "small")
    x = left
    for css, words in (
        ("time", "time"),
        ("height", "height"),
        ("width", "width"),
        ("text", "all three"),
    ):
        picture.line(f"{css} line", (x, 14.0), (x + 22, 14.0), stroke=4)
        picture.text(x + 28, 19, words)
        x += 50 + 9 * len(words)


def draw_ladder() -> Picture:
    """Draw the patches of batches like those of a benchmark, a ladder for them, and the benchmark's rung."""
    # Eight images a row, two rows; each side 16 to 28 patches, in steps of a merged token.
    sides = 2 * np.random.default_rng(0).integers(8, 15, (BATCHES, 16, 2))
    patches = sides.prod(axis=2).sum(axis=1)
    tokens, segments = np.full(BATCHES, 2560), np.full(BATCHES, 16)
    ladder = Shapes.fit(tokens=tokens, patches=patches, segments=segments, longest=784, graphs=3)
    rungs = ladder.shapes.patches
    rung, padding = _measured_rung()
    picture = Picture(324, "Patches of batches, and the rungs that hold them")
    left, bottom, width, height = 20.0, 270.0, 520.0, 160.0
    first = min(patches) // 1000 * 1000
    scale = width / (rungs[-1] - first)
    picture.text(2, 18, "Batches of two rows, eight images of many sizes each")
    shares = f"{len(rungs)} rungs: {100 * ladder.patch_padding:.0f} % of the patches are padding"
    picture.text(2, 42, f"{shares}, {ladder.graphs} graphs", "small")
    one = f"the benchmark's one rung, {rung:,} (dashed): {100 * padding:.0f} %, one graph"
    picture.text(2, 64, one, "small")
    _draw_rungs(picture, (first, *rungs), (left, bottom, height), scale)
    _draw_counts(picture, patches, (left, bottom, width, height), (first, rungs[-1]))
    x = left + (rung - first) * scale
    picture.line("axis", (x, bottom - height), (x, bottom), stroke=2, dash="5 4")
    picture.line("axis", (left, bottom), (left + width, bottom))
    for value in range(first, rungs[-1], 1000):
        picture.text(left + (value - first) * scale, bottom + 18, f"{value:,}", "small", "middle")
    picture.text(left + width, bottom + 40, "patches of a batch", "small", "end")
    return picture


def _measured_rung() -> tuple[int, float]:
    """Return a benchmark's rung of patches, and the share of padding in the batches that are measured."""
    cfg = load_config(f"configs/bench/{CASE}.yaml", ["dataloader.num_workers=0"])
    rows: Any = load_rows(cfg)
    count = MEASURED * cfg.dataloader.batch_size
    patches = sum(int(rows[row]["image_grid_thw"].prod(dim=1).sum()) for row in range(count))
    shapes: Any = cfg.rope.shapes
    (rung,) = shapes.patches
    return rung, 1 - patches / (MEASURED * rung)


def _draw_rungs(picture: Picture, borders: Any, at: Any, scale: float) -> None:
    left, bottom, height = at
    top = bottom - height
    for number, (below, rung) in enumerate(pairwise(borders)):
        x = left + (rung - borders[0]) * scale
        if number % 2 == 0:
            picture.rect("band", x - (rung - below) * scale, top, (rung - below) * scale, height)
        picture.line("height line", (x, top - 4), (x, bottom), stroke=2)
        picture.text(x, top - 8, f"{rung:,}", "small", "end")


def _draw_counts(picture: Picture, patches: Any, at: Any, ends: Any, bins: int = 48) -> None:
    left, bottom, width, height = at
    counts, edges = np.histogram(patches, bins=bins, range=ends)
    for count, edge in zip(counts, edges, strict=False):
        if count:
            tall = float(count / counts.max() * (height - 10))
            x = float(left + (edge - ends[0]) * width / (ends[1] - ends[0]))
            picture.rect("gpu", x, bottom - tall, width / bins - 1, tall)


def _ticks(last: float) -> list[int]:
    """Return round numbers from 0 on, four or more of them."""
    unit = 10 ** int(math.log10(last))
    step = next(
        unit * share // 100 for share in (100, 50, 25, 20) if last >= 3 * unit * share / 100
    )
    return list(range(0, int(last) + 1, step))


# A variant of the recorded timeline, and what a reader calls it.
_LABELS = {
    "transformers, sdpa": "transformers 5.24, sdpa",
    "attached": "attached",
    "attached, one graph": "attached, one graph",
}


def draw_timeline(table: dict[str, Any]) -> Picture:
    """Draw, for each variant, what host and GPU did in the recorded steps, all on one scale."""
    variants = table["variants"]
    last = max(one["gpu"][-1][1] for one in variants.values())
    title = "Host and GPU in training steps, with syncs and without"
    picture = Picture(70 + 96 * len(variants), title)
    left, wide = 44.0, WIDTH - 50
    scale = wide / last
    x = left
    for css, words in (
        ("host", "host: forward"),
        ("back", "host: backward"),
        ("sync", "sync"),
        ("gpu", "GPU computes"),
    ):
        picture.rect(css, x, 6.0, 14.0, 14.0)
        picture.text(x + 20, 18, words)
        x += 34 + 8.5 * len(words)
    y = 36.0
    for name, one in variants.items():
        idle = f"{one['step_ms']:.0f} ms a step, GPU idle {100 * one['gpu_idle_share']:.0f} %"
        picture.text(left, y + 16, f"{_LABELS[name]}: {idle}")
        picture.text(left - 6, y + 40, "host", "small", "end")
        picture.text(left - 6, y + 68, "GPU", "small", "end")
        for start, end, what in one["host"]:
            css = "back" if what == "backward" else "host"
            picture.rect(css, left + start * scale, y + 24, max((end - start) * scale, 1.0), 22.0)
        # Syncs may be much shorter than a pixel, and are to be seen.
        _draw_shares(picture, "sync", one["syncs"], (left, y + 24), scale, least=4)
        end = one["gpu"][-1][1]
        picture.rect("band", left, y + 52, end * scale, 22.0)
        # Most gaps between kernels are too short to draw: they lower the lane.
        drawn = sum(stop - start for start, stop, _ in one["gpu"]) / end
        height = 22 * min(1.0, (1 - one["gpu_idle_share"]) / drawn)
        corner = (left, y + 74 - height)
        _draw_shares(picture, "gpu", one["gpu"], corner, scale, least=1, height=height)
        y += 96
    picture.line("axis", (left, y - 8), (left + wide, y - 8))
    for at in _ticks(last):
        picture.text(left + at * scale, y + 9, str(at), "small", "middle")
    picture.text(left + wide, y + 28, "milliseconds", "small", "end")
    return picture


def _draw_shares(
    picture: Picture,
    css: str,
    intervals: list[Any],
    at: Any,
    scale: float,
    least: int,
    height: float = 22.0,
) -> None:
    """Draw a lane in columns of a pixel, as opaque as the share of its time that is covered."""
    covered = np.zeros(WIDTH)
    for start, end, _ in intervals:
        first, stop = start * scale, min(end * scale, WIDTH - 1.0)
        for column in range(int(first), int(stop) + 1):
            covered[column] += max(0.0, min(stop, column + 1) - max(first, column))
    levels = np.where(covered > 0, np.clip(np.ceil(covered * 10), least, 10), 0).astype(int)
    (left, y), column = at, 0
    for level, run in groupby(levels.tolist()):
        count = len(list(run))
        if level:
            picture.rect(css, left + column, y, float(count), height, opacity=level / 10)
        column += count


def draw_peers() -> Picture:
    """Draw the milliseconds of a step of each peer on each case, ours in colour."""
    cells = read_cells()
    most = max(cells[case, peer].ms for case in CASES for peer in PEERS if (case, peer) in cells)
    picture = Picture(34 + len(CASES) * (44 + 21 * len(PEERS)), "Milliseconds of a step")
    left, top = 204.0, 34.0
    scale = (WIDTH - left - 90) / most
    picture.text(2, 18, "Milliseconds of a training step, in brackets its syncs")
    for case, words in CASES.items():
        picture.text(2, top + 24, words)
        top += 34
        for peer, name in PEERS.items():
            cell = cells.get((case, peer))
            picture.text(left - 8, top + 14, name, "small", "end")
            if cell is None:
                picture.text(left + 4, top + 14, "not run", "small")
            else:
                css = "gpu" if peer.startswith("attached") else "peer"
                picture.rect(css, left, top + 2, cell.ms * scale, 16.0)
                text = f"{cell.ms:.0f} ({cell.syncs}){MARKS[cell.run][-1:]}"
                picture.text(left + cell.ms * scale + 6, top + 14, text, "small")
            top += 21
        top += 10
    return picture


def draw_all() -> dict[str, Picture]:
    """Return every picture by the name of its file."""
    found = {"positions.svg": draw_positions(), "ladder.svg": draw_ladder()}
    found["peers.svg"] = draw_peers()
    for file in sorted(DOCS.glob("benchmarks/timeline-*.json")):
        table = json.loads(file.read_text(encoding="utf-8"))
        found[f"{file.stem}.svg"] = draw_timeline(table)
    return found


if __name__ == "__main__":
    for name, picture in draw_all().items():
        (FOLDER / name).write_text(picture.svg(), encoding="utf-8")

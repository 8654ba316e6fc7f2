"""Write the table of `docs/families.md`: from the table of families, and from results of tests.

    PYTHONPATH=src:tests python tests/support/families_page.py

Releases are those with goldens under `tests/parity/data`, which `make parity` compares with the
releases themselves; syncs are those that `mrope bench syncs` and the scripts beside it counted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mrope.hf.rows import ROWS
from mrope.spec.families import FAMILIES, Family
from mrope.spec.references import as_release
from mrope.towers import VisionSpec

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "families.md"
MARKS = "<!-- families -->", "<!-- /families -->"
HEAD = ("`model_type`", "rule", "compared with", "inputs", "vision keys", "syncs")


def rendered(page: str) -> str:
    """Return the page with its table as it must be now."""
    before, _, rest = page.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    lines = [HEAD, ("---",) * len(HEAD), *(cells(name, row) for name, row in FAMILIES.items())]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{before}{MARKS[0]}\n\n{table}\n\n{MARKS[1]}{after}"


def cells(name: str, row: Family) -> tuple[str, ...]:
    line = (
        f"`{name}`",
        rule(row),
        references(name, row),
        inputs(row),
        vision_keys(row),
        syncs(name, row),
    )
    assert all(line), f"an empty cell: {line}"
    return line


CUSTOM_INDICES = {
    "omni_2_5": "spans in seconds, audio, in chunks",
    "omni_3": "spans in seconds, audio, by time",
    "omni_3_talker": "the thinker's, on its tokens",
    "centred": "images around their time",
    "planes": "images on planes of their own",
    "middle": "images around their middle, two axes",
    "glm_image": "images by markers",
    "hunyuan": "images counted",
    "minicpm": "canvas of slices",
}


def rule(row: Family) -> str:
    if row.custom_index is not None:
        return CUSTOM_INDICES[row.custom_index]
    if row.frames_as_images:
        return "frames apart, as images between markers"
    if row.planes_at_zero:
        return "images, rows and columns from 0"
    if row.frames_apart:
        return "frames apart, with newline tokens" if row.newlines else "frames apart"
    merged = any(number.name == "temporal_merge_size" for number in row.extra)
    return "clips in seconds" if row.timed else "clips, frames merged" if merged else "clips"


def references(name: str, row: Family) -> str:
    """Return the releases of transformers, or where the rule that the twin is written from stands."""
    if row.source is not None:
        return f"a twin of {row.source}"
    found = [
        file.stem.removeprefix("transformers-")
        for file in (ROOT / "tests/parity/data").glob("transformers-*.json")
        if name in json.loads(file.read_text("utf-8"))["families"]
    ]
    return f"transformers {', '.join(sorted(found, key=as_release))}" if found else ""


def inputs(row: Family) -> str:
    names = ["image_grid_thw"] + ["video_grid_thw"] * bool(row.video_keys)
    names += ["second_per_grid_ts"] * row.timed
    names += [name for name in row.inputs if not name.endswith("_per_sample")]
    return ", ".join(f"`{name}`" for name in names)


def vision_keys(row: Family) -> str:
    tower = row.tower
    if tower is None:
        return "none"
    spec = VisionSpec(
        spatial_merge_size=2,
        window_side=4,
        table_side=16,
        tower=tower,
    )
    keys = [key for key in spec.keys if not key.startswith("max_")]
    return ", ".join(f"`{key}`" for key in keys) + ("" if tower.videos else " (images)")


def syncs(name: str, row: Family) -> str:
    """Return the syncs of a step on images: plain, with all that a collator gives, attached."""
    if row.source is not None or name == "aero_realtime":
        return "no model in transformers"
    if not row.section:
        return "a talker, not attached"
    found: list[dict[str, Any]] = []
    for file in ("syncs.json", "syncs-thinkers.json", "syncs-plain.json"):
        found += json.loads((ROOT / "docs/benchmarks" / file).read_text("utf-8"))["rows"]
    case = {"family": name, "media": "images", "padding": "no"}
    by_attention = {one["attention"]: one for one in found if case.items() <= one.items()}
    attention = "sdpa" if "sdpa" in by_attention else "eager"
    counted = by_attention[attention]
    assert (counted["attached"] is not None) == (name in ROWS)
    counts = (counted["plain"], counted["+ vision tensors"], counted["attached"])
    cell = ", ".join("not attached" if count is None else str(count) for count in counts)
    return cell if attention == "sdpa" else f"{cell} (eager)"


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text("utf-8")), encoding="utf-8")

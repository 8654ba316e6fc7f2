"""Every malformed sample that users of the field report, and what a user is told.

`test_malformed.py` checks the messages, and that `docs/trouble.md` shows them word for word.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

START, IMAGE, VIDEO, STOP = 101, 102, 103, 99
SMALL, LARGE = [1, 4, 4], [1, 8, 8]  # 4 and 16 tokens


def image(tokens: int) -> list[int]:
    """Return the tokens of one image as the processors write it."""
    return [START, *[IMAGE] * tokens, STOP]


def video(tokens: int) -> list[int]:
    """Return the tokens of one frame, or of a clip in one piece."""
    return [START, *[VIDEO] * tokens, STOP]


@dataclass(frozen=True)
class Malformed:
    """Arguments of `rope_index`, and the error that they are."""

    name: str
    what: str
    arguments: dict[str, Any]
    message: str
    row: int | None = 0
    span: int | None = 0
    modality: str | None = "image"
    found: int | None = None
    needed: int | None = None
    family: str = "qwen3_vl"
    reference: str = "transformers-5.23"
    types: list[list[int]] | None = field(default=None)


def case(name: str, what: str, rows: list[list[int]], message: str, **rest: Any) -> Malformed:
    """Return a case; rows are padded on the right with 0, arguments and facts told apart by name."""
    width = max(map(len, rows))
    arguments: dict[str, Any] = {
        "input_ids": [row + [0] * (width - len(row)) for row in rows],
        "attention_mask": [[1] * len(row) + [0] * (width - len(row)) for row in rows],
    }
    facts = {key: rest.pop(key) for key in list(rest) if key in Malformed.__dataclass_fields__}
    return Malformed(name, what, arguments | rest, message, **facts)


MALFORMED = [
    case(
        "truncated inside an image",
        "`max_length` cut the row after the processor ran, inside its second image.",
        [[7, *image(4), 8, START, *[IMAGE] * 10]],
        "row 0, image 1: found 10 placeholder tokens, but its grid [1, 8, 8], merged by 2, needs 16. "
        "Likely cause: the row ends inside it: truncated at max_length after the processor ran.",
        image_grid_thw=[SMALL, LARGE],
        span=1,
        found=10,
        needed=16,
    ),
    case(
        "truncated before an image",
        "The second image was cut away with its tokens, and both grids were kept.",
        [[7, *image(4), 8]],
        "row 0, image 1: found 0 placeholder tokens, but its grid [1, 8, 8], merged by 2, needs 16. "
        "Likely cause: its tokens were truncated away and its grid was kept, or the grid is another "
        "sample's.",
        image_grid_thw=[SMALL, LARGE],
        span=1,
        found=0,
        needed=16,
    ),
    case(
        "truncated on the left",
        "The row was cut from the left, inside its first image.",
        [[*[IMAGE] * 3, STOP, 8, *image(16)]],
        "row 0, image 0: found 3 placeholder tokens, but its grid [1, 4, 4], merged by 2, needs 4. "
        "Likely cause: the row starts inside it: truncated on the left.",
        image_grid_thw=[SMALL, LARGE],
        found=3,
        needed=4,
    ),
    case(
        "one grid missing",
        "The tokens have two images, the batch one grid.",
        [[*image(4), *image(16)]],
        "row 0, image 1: found 16 placeholder tokens, but has no grid. Likely cause: a placeholder "
        "token that was typed or sampled as text, or a grid that was lost on the way.",
        image_grid_thw=[SMALL],
        span=1,
        found=16,
        needed=0,
    ),
    case(
        "stray image placeholder",
        "Somebody typed the placeholder of an image into the text.",
        [[7, IMAGE, 8, *image(4)]],
        "row 0, image 0: found 1 placeholder token, but its grid [1, 4, 4], merged by 2, needs 4. "
        "Likely cause: a grid of another sample or processor, or the spec of another model family.",
        image_grid_thw=[SMALL],
        found=1,
        needed=4,
    ),
    case(
        "sampled video placeholder",
        "A policy sampled the placeholder of a video in its answer; the row has no video.",
        [[*image(4), 7, VIDEO, 8]],
        "row 0, video 0: found 1 placeholder token, but has no grid. Likely cause: a placeholder "
        "token that was typed or sampled as text, or a grid that was lost on the way.",
        image_grid_thw=[SMALL],
        modality="video",
        found=1,
        needed=0,
    ),
    case(
        "one row lost an image, rows counted",
        "Row 0 lost its second image to truncation and kept the grid; row 1 is correct. The batch has "
        "the number of images of each row.",
        [[7, *image(4), 8], [7, *image(4), 8]],
        "row 0, image 1: found 0 placeholder tokens, but its grid [1, 4, 4], merged by 2, needs 4. "
        "Likely cause: its tokens were truncated away and its grid was kept, or the grid is another "
        "sample's.",
        image_grid_thw=[SMALL] * 3,
        images_per_sample=[2, 1],
        span=1,
        found=0,
        needed=4,
    ),
    case(
        "one row lost an image, rows not counted",
        "The same, in a batch without these numbers: the row is unknown, and the message shows the counts "
        "of all rows.",
        [[7, *image(4), 8], [7, *image(4), 8]],
        "image grid 2 of the batch, row unknown (rows [0, 1] have tokens for [1, 1] images; give "
        "images_per_sample to check each row on its own): found 0 placeholder tokens, but its grid "
        "[1, 4, 4], merged by 2, needs 4. Likely cause: its tokens were truncated away and its grid was "
        "kept, or the grid is another sample's.",
        image_grid_thw=[SMALL] * 3,
        row=None,
        span=None,
        found=0,
        needed=4,
    ),
    case(
        "two rows swapped grids of one size",
        "Each row has as many tokens as there are grids, but the counts say that a grid is another row's.",
        [[7, *image(4), *image(4)], [7, 8]],
        "row 0, image 1: found 4 placeholder tokens, but has no grid. Likely cause: a placeholder "
        "token that was typed or sampled as text, or a grid that was lost on the way.",
        image_grid_thw=[SMALL] * 2,
        images_per_sample=[1, 1],
        span=1,
        found=4,
        needed=0,
    ),
    case(
        "one token per patch",
        "The placeholders were written by code that does not merge patches.",
        [[7, *image(16), 8]],
        "row 0, image 0: found 16 placeholder tokens, but its grid [1, 4, 4], merged by 2, needs 4. "
        "Likely cause: placeholders were not merged: one token per patch instead of one per merged "
        "patch.",
        image_grid_thw=[SMALL],
        found=16,
        needed=4,
    ),
    case(
        "video frames that do not match",
        "The grid has three frames, the tokens two.",
        [[7, *video(4), 8, *video(4), 9]],
        "row 0, video 2: found 0 placeholder tokens, but its grid [1, 4, 4], merged by 2, needs 4. "
        "Likely cause: its tokens were truncated away and its grid was kept, or the grid is another "
        "sample's.",
        video_grid_thw=[[3, 4, 4]],
        modality="video",
        span=2,
        found=0,
        needed=4,
    ),
    case(
        "types and tokens disagree",
        "`mm_token_type_ids` calls a token text that is an image placeholder.",
        [[7, *image(4)]],
        "row 0, valid token 3: mm_token_type_ids says 0 (text), but token id 102 is image. Likely "
        "cause: a placeholder token that was typed or sampled as text, or types of another batch.",
        image_grid_thw=[SMALL],
        mm_token_type_ids=[[0, 0, 1, 0, 1, 1, 0]],
        span=None,
        modality="text",
    ),
    case(
        "no vision start in front, transformers 4.57",
        "That release finds spans by the marker, and gives others positions of text, without an error.",
        [[7, *[IMAGE] * 4, 8]],
        "row 0, image 0: no vision start token 101 stands before its placeholder tokens, without "
        "which transformers-4.57 numbers them as text. Likely cause: a stray placeholder in text, or "
        "a reference that does not fit: transformers-4.57.",
        image_grid_thw=[SMALL],
        reference="transformers-4.57",
    ),
    case(
        "a clip whose frames stand in two rows",
        "Row 0 lost the last frame of its clip, and row 1 has one too many: over the batch they add up.",
        [[7, *video(4), *video(4)], [7, *video(4), *video(4), *video(4)]],
        "row 0, video 0: found 8 placeholder tokens, but its grid has 3 frames of 4 tokens, and needs "
        "12. Likely cause: a grid of another sample; grids were matched over the whole batch: give "
        "videos_per_sample to check each row on its own.",
        video_grid_thw=[[3, 4, 4], [2, 4, 4]],
        modality="video",
        found=8,
        needed=12,
    ),
    case(
        "a token between frames repeated, openPangu-VL",
        "Its rule counts on an end and a start marker between two frames, and nothing else.",
        [[7, *[VIDEO] * 4, STOP, STOP, START, *[VIDEO] * 4, 9]],
        "row 0, video 0: 3 tokens stand between frames 0 and 1, but openpangu_vl has 2 there, an end "
        "and a start marker. Likely cause: tokens were added, lost or repeated inside the clip, or "
        "another processor's layout.",
        video_grid_thw=[[2, 4, 4]],
        modality="video",
        found=3,
        needed=2,
        family="openpangu_vl",
    ),
]

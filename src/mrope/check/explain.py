"""Show the position ids of one sample, given as words or as a dataset row, in a table or a plot."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from mrope.check.row_layout import Misfit, RowLayout, lay_out, valid_tokens
from mrope.check.rows import RowCheck
from mrope.columns import Columns
from mrope.errors import MRopeError
from mrope.positions.rope_index import rope_index
from mrope.positions.sample_rows import Medium, medium_tokens, refuse_custom_layouts
from mrope.positions.spans import token_types
from mrope.spec.spec import MRopeSpec, example_config

COLOURS = {"text": "white", "start": "yellow", "image": "cyan", "video": "magenta"}
"""Colour of each kind of token in the table."""

# By type of token, as in `mm_token_type_ids`.
_KINDS = ("text", "image", "video")
_INK = {"text": "0.35", "start": "goldenrod", "image": "teal", "video": "darkmagenta"}
# How many sizes a word of each kind has.
_SIZES = {"text": 1, "image": 2, "video": 3}
_TEXT_ID = 7
_MOST_TOKENS = 2**20
# Words longer than _LONG tokens print only their first and last tokens.
_LONG, _FIRST, _LAST = 12, 6, 4


@dataclass(frozen=True)
class Sample:
    """Token ids and grids of one row, made from words.

    Attributes:
        input_ids: token ids.
        grids: frames, height and width in patches of each image and of each video.
        lengths: tokens of each word, markers included.
    """

    input_ids: list[int]
    grids: dict[str, list[tuple[int, int, int]]]
    lengths: list[int]


@dataclass(frozen=True)
class SamplePositions:
    """Position ids of a sample, with the kind of each token.

    Attributes:
        spec: the model's values and the reference.
        kinds: a key of `COLOURS` for each of the S tokens.
        lengths: tokens of each word, in order; their sum is S.
        position_ids: int64 (3, S): time, height, width.
        rope_delta: largest position + 1 - S.
    """

    spec: MRopeSpec
    kinds: list[str]
    lengths: list[int]
    position_ids: npt.NDArray[np.int64]
    rope_delta: int


def compute_positions(
    words: Sequence[str], family: str, reference: str = "auto", seconds: float | None = None
) -> SamplePositions:
    """Compute the position ids of a sample that is given in words.

    Args:
        words: spans in order: `text:N` tokens, `image:HxW` or `video:TxHxW` patches. With the merge
            size of 2, `image:4x6` has 2 x 3 tokens.
        family: a key of `FAMILIES`.
        reference: see `resolve_reference`.
        seconds: seconds between two temporal positions of every video; None: 1.

    Raises:
        MRopeError: a word that cannot be read, a grid that the merge size does not divide, an
            unknown family or reference, seconds for a family that ignores them; a family whose
            tokens are laid out by a rule of their own.

    Example:
        >>> sample = compute_positions(["text:2", "image:4x4"], "qwen3_vl", "transformers-5.23")
        >>> sample.position_ids.tolist()
        [[0, 1, 2, 3, 3, 3, 3], [0, 1, 2, 3, 3, 4, 4], [0, 1, 2, 3, 4, 3, 4]]
    """
    spec = MRopeSpec.from_config(example_config(family), reference)
    if seconds is not None and not spec.family_row.timed:
        raise MRopeError(f"{family} does not read seconds: its processor writes them as text")
    sample = to_sample(words, spec)
    images, videos = sample.grids["image"], sample.grids["video"]
    position_ids, rope_deltas = rope_index(
        spec,
        [sample.input_ids],
        image_grid_thw=images or None,
        video_grid_thw=videos or None,
        second_per_grid_ts=None if seconds is None else [seconds] * len(videos),
    )
    ids = np.array(sample.input_ids)
    kinds = [_KINDS[kind] for kind in token_types(spec, ids).tolist()]
    for token in (ids == spec.vision_start_token_id).nonzero()[0]:
        kinds[token] = "start"
    return SamplePositions(spec, kinds, sample.lengths, position_ids[:, 0], int(rope_deltas[0, 0]))


def compute_row_positions(spec: MRopeSpec, batch: Columns) -> SamplePositions:
    """Read the position ids of a collated batch of one row, without its padding.

    Args:
        spec: the model's values.
        batch: result of `MRopeCollator`, with one row.
    """
    runs = lay_out(spec, batch).runs
    kinds = [run.kind for run in runs for _ in range(run.tokens)]
    for token in (valid_tokens(batch) == spec.vision_start_token_id).nonzero()[0]:
        kinds[token] = "start"
    valid = batch.get("attention_mask")
    position_ids = batch["position_ids"][:, 0]
    if valid is not None:
        position_ids = position_ids[:, valid[0] != 0]
    delta = int(batch["rope_deltas"][0, 0])
    return SamplePositions(spec, kinds, [run.tokens for run in runs], position_ids.numpy(), delta)


def to_sample(words: Sequence[str], spec: MRopeSpec) -> Sample:
    """Make the tokens and grids of a sample from words.

    Images and clips have the tokens of `mrope.positions.sample_rows`, start markers among them.

    Raises:
        MRopeError: a word that cannot be read, more than 2 ** 20 tokens, or a family whose tokens
            are laid out by a rule of their own.
    """
    sample = Sample([], {"image": [], "video": []}, [])
    for word in words:
        kind, size = _read(word)
        frames = size[0] if kind == "video" else 1
        count = size[0] if kind == "text" else frames * spec.frame_tokens(*size[-2:])
        if len(sample.input_ids) + count > _MOST_TOKENS:
            raise MRopeError(f"the sample has more than {_MOST_TOKENS:,} tokens, too many to show")
        if kind == "text":
            tokens = [_TEXT_ID] * count
        else:
            refuse_custom_layouts(spec)
            medium = Medium(kind, (frames, size[-2], size[-1]))
            sample.grids[kind].append(medium.size)
            tokens = medium_tokens(spec, medium)
        sample.input_ids.extend(tokens)
        sample.lengths.append(len(tokens))
    return sample


def _read(word: str) -> tuple[str, tuple[int, ...]]:
    kind, _, size = word.partition(":")
    numbers = size.split("x")
    sound = all(re.fullmatch("[1-9][0-9]{0,8}", number) for number in numbers)
    if len(numbers) != _SIZES.get(kind) or not sound:
        raise MRopeError(
            f"cannot read {word!r}: a span is text:N in tokens, image:HxW or video:TxHxW in "
            "patches, with sizes of at least 1"
        )
    return kind, tuple(map(int, numbers))


def print_positions(numbered: SamplePositions, console: Console, everything: bool = False) -> None:
    """Print a table with one line per token, and the rope delta below it.

    Args:
        numbered: result of `compute_positions`.
        console: where to print.
        everything: print all tokens of long words too.
    """
    spec = numbered.spec
    table = Table(title=f"{spec.family}, {spec.reference}")
    for heading in ("token", "kind", "t", "h", "w"):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    for token, ends_word in _shown_tokens(numbered.lengths, everything):
        if isinstance(token, range):
            table.add_row("...", f"{len(token):,} more", *["..."] * 3, style="dim")
            continue
        kind = numbered.kinds[token]
        cells = (str(token), kind, *map(str, numbered.position_ids[:, token].tolist()))
        table.add_row(*cells, style=COLOURS[kind], end_section=ends_word)
    console.print(table)
    tokens = len(numbered.kinds)
    console.print(
        f"delta {numbered.rope_delta}: the next token, number {tokens}, has position "
        f"{tokens + numbered.rope_delta}; {spec.spatial_merge_size} x {spec.spatial_merge_size} "
        "patches make a token",
        highlight=False,
    )


def print_bad_row(found: RowCheck, spec: MRopeSpec, console: Console) -> None:
    """Print the runs of a bad row, mark the one that does not fit its grid, and print the error."""
    if found.layout is not None:
        console.print(_runs(found.layout, f"{spec.family}, {spec.reference}, row {found.row}"))
    console.print(
        f"row {found.row}: {found.message}",
        style="red",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _runs(layout: RowLayout, title: str) -> Table:
    table = Table("first", "last", "kind", "tokens", "", title=title)
    misfit = layout.misfit
    for run in layout.runs:
        end = run.start + run.tokens
        inside = misfit is not None and run.start <= misfit.start < end
        style = "red" if inside else COLOURS[run.kind]
        cells = (str(run.start), str(end - 1), run.kind, str(run.tokens))
        table.add_row(*cells, describe_misfit(misfit) if misfit and inside else "", style=style)
    if misfit is not None and misfit.start >= layout.tokens:
        table.add_row(str(misfit.start), "", "missing", "0", describe_misfit(misfit), style="red")
    return table


def describe_misfit(misfit: Misfit) -> str:
    """Describe a misfit in a few words: tokens found, where, and how many its grid needs."""
    which = f"{misfit.found} from {misfit.start}"
    if misfit.needed is None:
        return f"wrong: {which}"
    return f"{which}: {f'its grid needs {misfit.needed}' if misfit.needed else 'no grid'}"


def _shown_tokens(lengths: Sequence[int], everything: bool) -> Iterator[tuple[int | range, bool]]:
    """Yield each token to print, or the range of omitted ones, and whether a word ends there."""
    start = 0
    for length in lengths:
        stop = start + length
        hidden = range(start + _FIRST, stop - _LAST)
        for token in range(start, stop):
            if everything or length <= _LONG or token not in hidden:
                yield token, token == stop - 1
            elif token == hidden.start:
                yield hidden, False
        start = stop


def save_plot(numbered: SamplePositions, file: Path) -> None:
    """Plot time, height and width over the tokens, and save the figure.

    Args:
        numbered: result of `compute_positions`.
        file: its suffix selects the format, such as `.png`.

    Raises:
        MRopeError: the file cannot be written.
    """
    # Not through pyplot, which would select a backend for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, sharey=True)
    kinds = np.array(numbered.kinds)
    for axis, name, row in zip(
        axes, ("time", "height", "width"), numbered.position_ids, strict=True
    ):
        axis.plot(row, color="0.85", linewidth=1, zorder=1)
        for kind in dict.fromkeys(numbered.kinds):
            tokens = (kinds == kind).nonzero()[0]
            axis.scatter(tokens, row[tokens], s=14, color=_INK[kind], label=kind, zorder=2)
        axis.set_ylabel(name)
    axes[-1].set_xlabel("token")
    spec = numbered.spec
    figure.suptitle(f"{spec.family}, {spec.reference}, delta {numbered.rope_delta}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise MRopeError(f"cannot write the plot {file}: {error}") from error

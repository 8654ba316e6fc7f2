"""MiniCPM-V 4.7: every image or video frame is a canvas, with a thumbnail and its slices on it.

A frame is a thumbnail, the slices that follow it, and the markers around them. All its tokens stand
at one time, and their rows and columns count over one canvas: the slices side by side as the image
was cut, the thumbnail stretched over all of them, markers at corners and edges. Text around frames
counts on by 1, and a frame takes the longer side of its canvas and one more.

Source: `get_rope_index` of `minicpmv4_7`, transformers 5.23. It also groups frames with only
markers between them; as it numbers them, a group is the same as its frames one after another.

Shape suffixes: T tokens of the stream, D documents, V crops (thumbnails and slices), F frames,
C slices, I tokens of all crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.arrays import BoolArray, IntArray, starts
from mrope.columns import COLUMNS, columns
from mrope.errors import MRopeError, SpanMismatchError
from mrope.positions.custom.shared import (
    Spans,
    find_spans,
    largest,
    misfit,
    number_cells,
    refuse_counts,
)
from mrope.positions.grids import spans_of_rows
from mrope.positions.inputs import BatchInputs, Media
from mrope.positions.located import Located
from mrope.positions.stream import IMAGE, VIDEO, Stream, documents_of
from mrope.spec.spec import MRopeSpec

Array = npt.NDArray[Any]

_COLUMNS = {
    str(COLUMNS[name].modality): name
    for name in columns("item", means="size")
    if COLUMNS[name].sides == 2
}
_MARKERS = ("image_end_id", "slice_start_id", "slice_end_id", "newline_id")
# A closing and an opening marker stand between two slices of a line; a newline makes it more.
_BETWEEN_SLICES = 2
# What no image has; the products of smaller sizes stay in int64.
_MOST_PATCHES = 1 << 20
_OTHER = "sizes of another sample, truncation, or a processor with another downsample_mode"
_NO_OPENING = "truncation on the left, or a placeholder token that was typed or sampled as text"


class _Crops(NamedTuple):
    """Thumbnails and slices in the order of the stream.

    Attributes:
        start_V, length_V: where each starts in the stream, and its tokens.
        document_V: the document that it stands in.
        size_2V: merged height and width.
        slice_V: which are slices.
        frame_V: the frame that each belongs to.
    """

    start_V: IntArray
    length_V: IntArray
    document_V: IntArray
    size_2V: IntArray
    slice_V: BoolArray
    frame_V: IntArray


class _Frames(NamedTuple):
    """Frames in the order of the stream.

    Attributes:
        start_F, end_F: from the opening marker to behind the last of the closing ones.
        thumb_F: the crop that is the thumbnail.
        columns_F: slices in a line; 1 without slices.
        tile_2F: merged height and width of the first slice, and so of every place for one.
        canvas_2F: merged height and width of the canvas.
    """

    start_F: IntArray
    end_F: IntArray
    thumb_F: IntArray
    columns_F: IntArray
    tile_2F: IntArray
    canvas_2F: IntArray


def number_minicpm(spec: MRopeSpec, located: Located) -> tuple[Array, Array]:
    """Number the tokens of a MiniCPM-V 4.7 batch.

    Args:
        spec: with `vision_start_token_id`, the config's `image_start_id`; `numbers` image_end_id,
            slice_start_id, slice_end_id and newline_id; and as `spatial_merge_size` the patches
            that share a token along each side: 2 if the config's `downsample_mode` is "4x", else 4.
        located: the batch. The family has sizes instead of grids: `target_sizes`, (N, 2) height and
            width in patches of every crop of the images (a thumbnail, then its slices line by
            line), and `target_sizes_videos`, (M, 2), the same for the frames of videos.
            `downsample_mode`, "4x" or "16x", stands in place of the config's. `images_per_sample`
            and `videos_per_sample` count the N and M crops.

    Returns:
        Positions (3, T) and ends (D,), both int64.

    Raises:
        SpanMismatchError: a crop of other tokens than its size needs; a crop without a size or a
            size without a crop; a thumbnail without the image start in front; a slice without its
            thumbnail; types that are not those of the tokens.
        MRopeError: an argument of a wrong shape, dtype or value.

    Example:
        An image of 1 x 2 merged patches between its markers 1 and 2, then text.

        >>> numbers = {"image_end_id": 2, "slice_start_id": 3, "slice_end_id": 4, "newline_id": 5}
        >>> spec = MRopeSpec("minicpmv4_7", "transformers-5.23", 9, 8, 1, 4, extra=numbers)
        >>> from mrope import rope_index
        >>> positions, delta = rope_index(spec, [[7, 1, 9, 9, 2, 6]], target_sizes=[[4, 8]])
        >>> positions[:, 0].tolist()
        [[0, 1, 1, 1, 1, 4], [0, 0, 1, 1, 2, 4], [0, 0, 1, 2, 3, 4]]
        >>> delta.tolist()
        [[-1]]
    """
    inputs, stream, kind_T = located.inputs, located.stream, located.kind_T
    _refuse_grids(spec, inputs)
    images = find_spans(stream, kind_T, IMAGE, "image")
    videos = find_spans(stream, kind_T, VIDEO, "video")
    sizes = _match(located, images), _match(located, videos)
    marker_T = _markers(spec, stream)
    crops = _to_crops(spec, stream, marker_T, (images, videos), sizes)
    positions_3T = _number(stream, crops, _lay_out(stream, crops, marker_T))
    return positions_3T, largest(positions_3T, stream)


def _refuse_grids(spec: MRopeSpec, inputs: BatchInputs) -> None:
    for modality, media in inputs.media.items():
        if len(media.size_N3) and media.name != _COLUMNS[modality]:
            raise MRopeError(
                f"{spec.family} has {' and '.join(_COLUMNS.values())}, height and width in patches "
                f"of every crop, instead of {media.name}"
            )


def _match(located: Located, spans: Spans) -> IntArray:
    """Return the merged height and width (2, V) of each span: the sizes in their order."""
    media = located.inputs.media[spans.modality]
    name = _COLUMNS[spans.modality]
    patches_N2 = _checked(media)
    size_2V: IntArray = patches_N2.T // media.merge
    needed_V = size_2V.prod(axis=0)
    count = min(len(needed_V), len(spans.start_V))
    wrong_V = spans.length_V[:count] != needed_V[:count]
    rows = located.inputs.shape[0]
    counts = spans_of_rows(media, spans.modality, rows)
    row_N = None if counts is None else np.arange(rows).repeat(counts)
    if row_N is not None or not wrong_V.any():
        refuse_counts(located.stream, spans, needed_V, row_N, name)
    if wrong_V.any():
        span = int(wrong_V.argmax())
        needed = int(needed_V[span])
        size = (
            f"{name}[{span}] = {patches_N2[span].tolist()}, merged by {media.merge}, needs {needed}"
        )
        raise misfit(located.stream, spans, span, needed, size, _OTHER)
    return size_2V


def _checked(media: Media) -> IntArray:
    """Return height and width of each crop, (N, 2), each of at least one token."""
    sizes: IntArray = media.size_N3[:, 1:]
    wrong_N = ((sizes < media.merge) | (sizes > _MOST_PATCHES)).any(axis=1)
    if wrong_N.any():
        crop = int(wrong_N.argmax())
        raise MRopeError(
            f"{media.name}[{crop}] = {sizes[crop].tolist()}: height and width must be "
            f"{media.merge} (one token) to {_MOST_PATCHES} patches"
        )
    return sizes


def _markers(spec: MRopeSpec, stream: Stream) -> BoolArray:
    marker_T: BoolArray = stream.tokens_T == spec.vision_start_token_id
    for name in _MARKERS:
        marker_T |= stream.tokens_T == spec.extra[name]
    return marker_T


def _to_crops(
    spec: MRopeSpec,
    stream: Stream,
    marker_T: BoolArray,
    spans: tuple[Spans, Spans],
    sizes: tuple[IntArray, IntArray],
) -> _Crops:
    """Put the crops of images and videos into one order, and tell slices from thumbnails."""
    start_V = np.concatenate([of.start_V for of in spans])
    order_V = start_V.argsort()
    start_V = start_V[order_V]
    length_V = np.concatenate([of.length_V for of in spans])[order_V]
    document_V = np.concatenate([of.document_V for of in spans])[order_V]
    video_V = order_V >= len(spans[0].start_V)
    before_V = stream.tokens_T[start_V - 1]
    slice_V = before_V == spec.extra["slice_start_id"]
    opened_V = slice_V | (before_V == spec.vision_start_token_id)
    opened_V &= start_V > stream.start_D[document_V]
    # A slice has only markers between itself and a crop of the same image before it.
    text_T = np.append(0, (~marker_T).cumsum())
    text_V = text_T[start_V[1:]] - text_T[(start_V + length_V)[:-1]]
    follows_V = (np.diff(document_V) == 0) & (video_V[1:] == video_V[:-1]) & (text_V == 0)
    opened_V[1:] &= follows_V | ~slice_V[1:]
    opened_V[:1] &= ~slice_V[:1]
    if not opened_V.all():
        raise _unopened(spans, stream, int(order_V[opened_V.argmin()]))
    size_2V = np.concatenate(sizes, axis=1)[:, order_V]
    frame_V = (~slice_V).cumsum() - 1
    return _Crops(start_V, length_V, document_V, size_2V, slice_V, frame_V)


def _unopened(spans: tuple[Spans, Spans], stream: Stream, crop: int) -> SpanMismatchError:
    """Return the error for a crop without what must stand in front; crops count images first."""
    images = len(spans[0].start_V)
    of, span = (spans[0], crop) if crop < images else (spans[1], crop - images)
    size = (
        "neither the image start nor, after a thumbnail of the same image and markers alone, the "
        "slice start stands in front of them"
    )
    return misfit(stream, of, span, int(of.length_V[span]), size, _NO_OPENING)


def _lay_out(stream: Stream, crops: _Crops, marker_T: BoolArray) -> _Frames:
    """Place the frames in the stream, and their slices on canvases.

    Slices 0 1 2 3 4 5 with a newline after 2 (and so a wider gap) are 2 lines of 3. Where lines are
    not of one length, all slices are one line.
    """
    thumb_F = (~crops.slice_V).nonzero()[0]
    slices_F = np.diff(thumb_F, append=len(crops.slice_V)) - 1
    columns_F = np.maximum(slices_F, 1)
    wide_V = _wide_gaps(crops)[::-1]
    # The first line break counts: of several values for a frame, the last that is written stays.
    columns_F[crops.frame_V[wide_V]] = wide_V - thumb_F[crops.frame_V[wide_V]] - 1
    ragged_F = np.maximum(slices_F, 1) % columns_F != 0
    columns_F[ragged_F] = slices_F[ragged_F]
    lines_F = np.maximum(slices_F, 1) // columns_F
    tile_2F = crops.size_2V[:, thumb_F + (slices_F > 0)]
    last_F = thumb_F + slices_F
    end_F = _skip_markers(stream, marker_T, (crops.start_V + crops.length_V)[last_F])
    return _Frames(
        start_F=crops.start_V[thumb_F] - 1,
        end_F=end_F,
        thumb_F=thumb_F,
        columns_F=columns_F,
        tile_2F=tile_2F,
        canvas_2F=tile_2F * np.stack((lines_F, columns_F)),
    )


def _wide_gaps(crops: _Crops) -> IntArray:
    """Return the slices that begin a line: more than two markers stand behind the slice before."""
    gap_V = crops.start_V[1:] - (crops.start_V + crops.length_V)[:-1]
    wide_V = (gap_V > _BETWEEN_SLICES) & crops.slice_V[1:] & crops.slice_V[:-1]
    return wide_V.nonzero()[0] + 1


def _skip_markers(stream: Stream, marker_T: BoolArray, token_F: IntArray) -> IntArray:
    """Return the first token from each of these on that is no marker, or its document's end."""
    other = np.append((~marker_T).nonzero()[0], len(marker_T))
    document_F = documents_of(stream, token_F - 1)
    document_end_F = (stream.start_D + stream.length_D)[document_F]
    end_F: IntArray = np.minimum(other[other.searchsorted(token_F)], document_end_F)
    return end_F


def _number(stream: Stream, crops: _Crops, frames: _Frames) -> IntArray:
    """Return positions (3, T). What is written later covers what was written before."""
    tokens = len(stream.tokens_T)
    begun_T = np.zeros(tokens + 1, np.int64)
    begun_T[frames.start_F] = 1
    depth_T = begun_T.copy()
    depth_T[frames.end_F] -= 1
    frame_T = begun_T[:tokens].cumsum() - 1
    text_T = depth_T[:tokens].cumsum() == 0
    step_T = text_T.astype(np.int64)
    step_T[frames.start_F] = frames.canvas_2F.max(axis=0) + 1
    base_T = starts(step_T)
    base_T -= base_T[stream.start_D].repeat(stream.length_D)
    origin_F = base_T[frames.start_F]
    base_T[~text_T] = origin_F[frame_T[~text_T]]
    positions_3T: IntArray = base_T[None].repeat(3, axis=0)
    plane_2T = positions_3T[1:]
    thumb_end_F = (crops.start_V + crops.length_V)[frames.thumb_F]
    closed_F = thumb_end_F < frames.end_F
    plane_2T[:, thumb_end_F[closed_F]] = (origin_F + frames.canvas_2F)[:, closed_F]
    place_2V = _places(crops, frames) + origin_F[crops.frame_V]
    _draw_crops(plane_2T, crops, frames, place_2V)
    _draw_slice_markers(plane_2T, crops, frames, place_2V)
    _draw_newlines(plane_2T, crops, frames, origin_F)
    plane_2T[:, frames.start_F] = np.maximum(origin_F - 1, 0)
    return positions_3T


def _places(crops: _Crops, frames: _Frames) -> IntArray:
    """Return where each crop's first line and column are on its canvas."""
    frame_V = crops.frame_V
    slice_V = np.arange(len(frame_V)) - frames.thumb_F[frame_V] - 1
    place_2V: IntArray = (
        np.stack(np.divmod(slice_V, frames.columns_F[frame_V])) * frames.tile_2F[:, frame_V]
    )
    place_2V[:, ~crops.slice_V] = 0
    return place_2V


def _draw_crops(plane_2T: IntArray, crops: _Crops, frames: _Frames, place_2V: IntArray) -> None:
    """Number the placeholders line by line; thumbnails are stretched over their canvas."""
    token_I, cell_I = number_cells(crops.start_V, crops.length_V)
    cells_2I = np.stack(np.divmod(cell_I, crops.size_2V[1].repeat(crops.length_V)))
    over_2V = crops.size_2V.copy()
    over_2V[:, frames.thumb_F] = frames.canvas_2F
    for axis in range(2):
        size_I, over_I, place_I = (
            of_2V[axis].repeat(crops.length_V) for of_2V in (crops.size_2V, over_2V, place_2V)
        )
        plane_2T[axis, token_I] = place_I + _stretch(cells_2I[axis], size_I, over_I)


def _stretch(cell_I: IntArray, size_I: IntArray, over_I: IntArray) -> IntArray:
    """Return cells of a side of `size` cells, spread evenly over a side of `over` and rounded.

    It is torch's linspace in float32: steps are added to the start in the first half, taken off the
    end in the second; halves are rounded to even. In float64 some cells would be rounded otherwise.
    """
    last_I = (over_I - 1).astype(np.float32)
    step_I = last_I / np.maximum(size_I - 1, 1).astype(np.float32)
    from_start_I = step_I * cell_I.astype(np.float32)
    from_end_I = last_I - step_I * (size_I - 1 - cell_I).astype(np.float32)
    first_half_I = (cell_I < size_I // 2) | (size_I == 1)
    return np.rint(np.where(first_half_I, from_start_I, from_end_I)).astype(np.int64)


def _draw_slice_markers(
    plane_2T: IntArray, crops: _Crops, frames: _Frames, place_2V: IntArray
) -> None:
    """Put the markers around a slice at its first and its last token.

    Where one marker stands between two slices, it is the second one's.
    """
    end_V = crops.start_V + crops.length_V
    closed_V = crops.slice_V & (end_V < frames.end_F[crops.frame_V])
    plane_2T[:, end_V[closed_V]] = (place_2V + crops.size_2V - 1)[:, closed_V]
    plane_2T[:, crops.start_V[crops.slice_V] - 1] = place_2V[:, crops.slice_V]


def _draw_newlines(plane_2T: IntArray, crops: _Crops, frames: _Frames, origin_F: IntArray) -> None:
    """Put what stands between the lines of slices behind the line's last column."""
    wide_V = _wide_gaps(crops)
    frame_V = crops.frame_V[wide_V]
    height_V, width_V = frames.tile_2F[:, frame_V]
    columns_V = frames.columns_F[frame_V]
    slice_V = wide_V - frames.thumb_F[frame_V] - 2  # the one before
    first_V = (crops.start_V + crops.length_V)[wide_V - 1] + 1
    tokens_V = crops.start_V[wide_V] - 1 - first_V
    token_I, _ = number_cells(first_V, tokens_V)
    line_end_2V = np.stack(((slice_V // columns_V + 1) * height_V - 1, columns_V * width_V))
    plane_2T[:, token_I] = (origin_F[frame_V] + line_end_2V).repeat(tokens_V, axis=1)


def minicpm_tokens(
    spec: MRopeSpec, placeholder: int, crops: Sequence[Sequence[Sequence[int]]]
) -> list[int]:
    """Return the tokens of an image or a frame as the processor lays them out.

    Args:
        placeholder: id of the image or the video token.
        crops: height and width in patches of the thumbnail, alone in the first line, and of the
            slices, line by line.
    """
    extra = {name: int(spec.extra[name]) for name in _MARKERS}
    around = (spec.vision_start_token_id, extra["image_end_id"])
    tokens: list[int] = []
    for number, line in enumerate(crops):
        if number > 1:
            tokens.append(extra["newline_id"])
        for size in line:
            start, end = around if number == 0 else (extra["slice_start_id"], extra["slice_end_id"])
            tokens += [start, *[placeholder] * spec.frame_tokens(*size), end]
    return tokens

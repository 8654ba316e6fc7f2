"""GLM-Image: images between a start and an end token, each token of an image a patch of its own.

Images that are there already (sources) have both tokens. A start without an end is where the model
begins to draw; it and what follows is text, and the grids of what is to be drawn stand last among
those of their row.

Training positions, and those of a prompt. The positions of drawn tokens, which the model keeps for
`generate`, are left to it: it computes them together with those of the prompt.

Source: `get_rope_index` of `glm_image`, transformers 5.23.

Shape suffixes: B rows of the batch, T tokens of the stream, D documents, M start and end tokens, V
images, G grids, I tokens of all images.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.arrays import BoolArray, IntArray, starts
from mrope.errors import MRopeError, SpanMismatchError
from mrope.positions.custom.shared import (
    Spans,
    id_dtype,
    misfit,
    number_cells,
)
from mrope.positions.grids import to_grids
from mrope.positions.inputs import BatchInputs
from mrope.positions.located import Located
from mrope.positions.stream import Stream, documents_of
from mrope.spec.spec import MRopeSpec

Array = npt.NDArray[Any]

_END = "image_end_token_id"
_NO_MASK = "truncation, or no attention_mask: GLM-Image's tokenizer pads with the end token"
_CUT = "truncation after the processor ran"
_LOST = "a grid that was lost on the way, or images_per_sample of another batch"
_OTHER = "a grid of another sample, or a processor whose merge_size is not 1"


class _Sizes(NamedTuple):
    """Grids of a batch.

    Attributes:
        size_3G: frames, height and width in patches.
        grids_B: how many each row has.
    """

    size_3G: IntArray
    grids_B: IntArray


def number_glm_image(spec: MRopeSpec, located: Located) -> tuple[Array, Array]:
    """Number the tokens of a GLM-Image batch.

    Text counts on by 1. The frames, rows and columns of an image count from the position after its
    start token, and its end token comes `max(height, width)` further on, in patches.

    Args:
        spec: with `vision_start_token_id`, the config's `image_start_token_id`, and `numbers`
            image_end_token_id. `spatial_merge_size` is not looked at: nothing is merged.
        located: the batch. Between start and end stand any ids: placeholders, or the image's own.
            `image_grid_thw` has for each row its sources, then what is to be drawn;
            `images_per_sample` can be left out if the batch has one row. (The reference then gives
            every row all grids.)

    Returns:
        Positions (3, T) and ends (D,), both int64; int32 where the ids are. An end is the number of
        the document's tokens: the reference's deltas are all 0.

    Raises:
        SpanMismatchError: an image of other tokens than its grid has patches; more images than
            grids in a row; more grids than images in a row that draws nothing; placeholders
            outside of an image; an end token without its start.
        MRopeError: grids of several rows without `images_per_sample`; an argument of a wrong
            shape, dtype or value.

    Example:
        Start 1, an image of 1 x 2 patches, end 2, text, and the start of what is drawn.

        >>> numbers = {"image_end_token_id": 2}
        >>> spec = MRopeSpec("glm_image", "transformers-5.23", 9, -1, 1, 1, extra=numbers)
        >>> grids = [[1, 1, 2], [1, 4, 4]]
        >>> from mrope import rope_index
        >>> positions, delta = rope_index(spec, [[1, 9, 9, 2, 7, 1]], image_grid_thw=grids)
        >>> positions[:, 0].tolist()
        [[0, 1, 1, 3, 4, 5], [0, 1, 1, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    """
    inputs, stream = located.inputs, located.stream
    sizes = _to_sizes(spec, inputs)
    images = _find_images(spec, stream)
    size_3V = _match(spec, stream, images, sizes)
    _refuse_strays(spec, stream, images, sizes)
    dtype = id_dtype(inputs.input_ids)
    return _number(stream, images, size_3V).astype(dtype), stream.length_D.astype(dtype)


def _number(stream: Stream, images: Spans, size_3V: IntArray) -> IntArray:
    """Return positions (3, T).

    An image of 2 x 3 patches takes 6 tokens, and what follows is moved back by 6 - 3.
    """
    tokens = len(stream.tokens_T)
    _, height_V, width_V = size_3V
    back_V = images.length_V - np.maximum(height_V, width_V)
    back_T = np.zeros(tokens + 1, np.int64)
    back_T[images.start_V + images.length_V] = back_V
    back_T = back_T[:tokens].cumsum()
    back_T -= back_T[stream.start_D].repeat(stream.length_D)
    own_T = np.arange(tokens) - stream.start_D.repeat(stream.length_D)
    positions_3T = (own_T - back_T)[None].repeat(3, axis=0)
    token_I, cell_I = number_cells(images.start_V, images.length_V)
    line_I, column_I = np.divmod(cell_I, width_V.repeat(images.length_V))
    frame_I, line_I = np.divmod(line_I, height_V.repeat(images.length_V))
    base_I = positions_3T[0, images.start_V].repeat(images.length_V)
    positions_3T[:, token_I] = base_I + np.stack((frame_I, line_I, column_I))
    return positions_3T


def _to_sizes(spec: MRopeSpec, inputs: BatchInputs) -> _Sizes:
    rows = inputs.shape[0]
    # Each token of an image is a patch of its own, whatever the tower merges later.
    grids = to_grids(replace(spec, spatial_merge_size=1), inputs)
    if grids.row_G is not None:
        return _Sizes(grids.size_3G, np.bincount(grids.row_G, minlength=rows))
    if rows > 1 and grids.images:
        raise MRopeError(
            f"a batch of {rows} rows and {grids.images} grids needs images_per_sample: "
            f"{spec.reference} would give every row all of the grids"
        )
    return _Sizes(grids.size_3G, np.full(rows, grids.images))


def _find_images(spec: MRopeSpec, stream: Stream) -> Spans:
    """Return what stands between the start and end tokens, which must take turns."""
    end_token = spec.extra[_END]
    starts_T = stream.tokens_T == spec.vision_start_token_id
    token_M = (starts_T | (stream.tokens_T == end_token)).nonzero()[0]
    open_M = starts_T[token_M]
    document_M = documents_of(stream, token_M)
    depth_M = np.where(open_M, 1, -1).cumsum()
    first_M = document_M.searchsorted(document_M)
    depth_M -= (depth_M - np.where(open_M, 1, -1))[first_M]
    wrong_M = ~open_M & (depth_M != 0)
    if wrong_M.any():
        raise _unpaired(stream, token_M, open_M, document_M, int(wrong_M.argmax()))
    end_V = (~open_M).nonzero()[0]
    start_V = token_M[end_V - 1] + 1
    return Spans("image", start_V, token_M[end_V] - start_V, document_M[end_V])


def _unpaired(
    stream: Stream, token_M: IntArray, open_M: Array, document_M: IntArray, wrong: int
) -> SpanMismatchError:
    document = int(document_M[wrong])
    before = open_M[: wrong + 1][document_M[: wrong + 1] == document]
    row = int(stream.row_D[document])
    first = int(token_M[wrong] - stream.start_D[document])
    starts, ends = int(before.sum()), int((~before).sum())
    return SpanMismatchError(
        f"row {row}, image {ends - 1} at valid token {first}: its end token is number {ends} of "
        f"the row, but {starts} start tokens stand before it. Likely cause: {_NO_MASK}.",
        row=row,
        span=ends - 1,
        modality="image",
        cause=_NO_MASK,
    )


def _match(spec: MRopeSpec, stream: Stream, images: Spans, sizes: _Sizes) -> IntArray:
    """Return the size of each image: the first ones of its row."""
    first_B = starts(sizes.grids_B)
    row_V = stream.row_D[images.document_V]
    ordinal_V = np.arange(len(row_V)) - row_V.searchsorted(row_V)
    surplus_V = ordinal_V >= sizes.grids_B[row_V]
    if surplus_V.any():
        image = int(surplus_V.argmax())
        row = row_V[image]
        counts = f"{np.sum(row_V == row)} images and {sizes.grids_B[row]} grids"
        size = f"there is no grid for it: row {row} has, by count, {counts}"
        raise misfit(stream, images, image, 0, size, _LOST)
    grid_V = first_B[row_V] + ordinal_V
    size_3V: IntArray = sizes.size_3G[:, grid_V]
    needed_V = size_3V.prod(axis=0)
    wrong_V = images.length_V != needed_V
    if wrong_V.any():
        image = int(wrong_V.argmax())
        needed = int(needed_V[image])
        size = f"image_grid_thw[{grid_V[image]}] = {size_3V[:, image].tolist()} needs {needed}"
        raise misfit(stream, images, image, needed, size, _OTHER)
    _refuse_undrawn(spec, stream, np.bincount(row_V, minlength=len(first_B)), sizes)
    return size_3V


def _refuse_undrawn(spec: MRopeSpec, stream: Stream, images_B: IntArray, sizes: _Sizes) -> None:
    """Refuse grids beyond a row's images if it has no further start token to draw them at."""
    starts_T = stream.tokens_T == spec.vision_start_token_id
    start_rows = stream.row_D[documents_of(stream, starts_T.nonzero()[0])]
    starts_B = np.bincount(start_rows, minlength=len(images_B))
    lost_B = (sizes.grids_B > images_B) & (starts_B == images_B)
    if lost_B.any():
        row = int(lost_B.argmax())
        found, given = int(images_B[row]), int(sizes.grids_B[row])
        grid = int(sizes.grids_B[:row].sum()) + found
        needed = int(sizes.size_3G[:, grid].prod())
        raise SpanMismatchError(
            f"row {row}, image {found}: found 0 tokens, but image_grid_thw[{grid}] needs {needed}: "
            f"the row has, by count, {found} images and {given} grids, and draws nothing. "
            f"Likely cause: {_CUT}.",
            row=row,
            span=found,
            modality="image",
            found=0,
            needed=needed,
            cause=_CUT,
        )


def _refuse_strays(spec: MRopeSpec, stream: Stream, images: Spans, sizes: _Sizes) -> None:
    """Refuse placeholders that do not stand between a start and an end token."""
    stray_T = stream.tokens_T == spec.image_token_id
    inside_I, _ = number_cells(images.start_V, images.length_V)
    stray_T[inside_I] = False
    if stray_T.any():
        raise _stray(stream, images, sizes, stray_T)


def _stray(stream: Stream, images: Spans, sizes: _Sizes, stray_T: BoolArray) -> SpanMismatchError:
    start = stray_T.nonzero()[0][:1]
    # The stretch ends at the next token that is none.
    length = (~np.append(stray_T[start[0] :], False)).nonzero()[0][:1]
    document = documents_of(stream, start)
    # It is named after the images of its row, whose next grid was to be its own.
    last = int(images.document_V.searchsorted(document[0], side="right"))
    spans = Spans(
        "image",
        np.append(images.start_V[:last], start),
        np.append(images.length_V[:last], length),
        np.append(images.document_V[:last], document),
    )
    row = int(stream.row_D[document[0]])
    ordinal = last - int(images.document_V.searchsorted(document[0]))
    grid = int(sizes.grids_B[:row].sum()) + ordinal
    needed = int(sizes.size_3G[:, grid].prod()) if ordinal < sizes.grids_B[row] else 0
    size = f"not between a start and an end token, and the row's next grid needs {needed}"
    return misfit(stream, spans, last, needed, size, _CUT)


def glm_image_tokens(spec: MRopeSpec, frames: int, height: int, width: int) -> list[int]:
    """Return the tokens of an image between its two markers: one for each patch."""
    placeholders = [spec.image_token_id] * (frames * height * width)
    return [spec.vision_start_token_id, *placeholders, int(spec.extra[_END])]

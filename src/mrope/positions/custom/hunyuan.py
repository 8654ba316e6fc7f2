"""HunYuan-VL: as many axes as the config has sections, text and images counted alike.

Every axis begins as the token's own number in its document. Within an image the last three axes
hold column, row and the image's ordinal instead; each line of an image ends with a newline token,
a column of its own. Nothing is compressed: text goes on with its own number.

Source: `get_rope_index` of `hunyuan_vl`, transformers 5.23.

Shape suffixes: T tokens of the stream, D documents, V spans of placeholders, I tokens of all
blocks, A axes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mrope.arrays import IntArray
from mrope.columns import columns
from mrope.errors import MRopeError
from mrope.positions.custom.shared import (
    Spans,
    find_spans,
    id_dtype,
    largest,
    misfit,
    number_cells,
    refuse_counts,
)
from mrope.positions.grids import Grids, to_grids
from mrope.positions.located import Located
from mrope.positions.stream import IMAGE, Stream
from mrope.spec.spec import MRopeSpec

Array = npt.NDArray[Any]

_WRAPPERS = 2
_GRIDS = next(columns("item", modality="image", means="size"))
_OTHER = "a grid of another sample or processor, truncation, or the spec of another model family"


def number_hunyuan(spec: MRopeSpec, located: Located) -> tuple[Array, Array]:
    """Number the tokens of a HunYuan-VL batch.

    The ordinal of an image counts over the whole batch, as the reference has it: a row's numbers
    depend on the rows before it, and its delta may too.

    Args:
        spec: with `numbers` axes, the length of `text_config.rope_parameters["mrope_section"]`.
        located: the batch; its images have one frame each.

    Returns:
        Positions (A, T) and ends (D,), both int64; int32 where the ids are.

    Raises:
        SpanMismatchError: an image of neither H * (W + 1) tokens (its merged height and width, and
            a newline for each line), nor these and 2 wrappers; an image without a grid, or a grid
            without an image; types that are not those of the tokens.
        MRopeError: less than 3 axes; an argument of a wrong shape, dtype or value.

    Example:
        Text, then an image of 1 x 2 merged patches and its newline, then text.

        >>> from mrope import rope_index
        >>> spec = MRopeSpec("hunyuan_vl", "transformers-5.23", 9, -1, -1, 2, extra={"axes": 3})
        >>> positions, delta = rope_index(spec, [[5, 9, 9, 9, 6]], image_grid_thw=[[1, 2, 4]])
        >>> positions[:, 0].tolist()
        [[0, 0, 1, 2, 4], [0, 0, 0, 0, 4], [0, 0, 0, 0, 4]]
        >>> delta.tolist()
        [[0]]
    """
    axes = _axes(spec)
    stream, kind_T = located.stream, located.kind_T
    grids = to_grids(spec, located.inputs)
    images = find_spans(stream, kind_T, IMAGE, "image")
    cells_V = _match(stream, images, grids)
    # An image's tokens include its two wrappers, or the processor leaves them to the text.
    first_V = images.start_V + (images.length_V - cells_V) // _WRAPPERS
    own_T = np.arange(len(kind_T)) - stream.start_D.repeat(stream.length_D)
    positions_AT = own_T[None].repeat(axes, axis=0)
    token_I, cell_I = number_cells(first_V, cells_V)
    wide_I = (grids.size_3G[2] + 1).repeat(cells_V)
    positions_AT[-3, token_I] = cell_I % wide_I
    positions_AT[-2, token_I] = cell_I // wide_I
    positions_AT[-1, token_I] = np.arange(len(cells_V)).repeat(cells_V)
    dtype = id_dtype(located.inputs.input_ids)
    return positions_AT.astype(dtype), largest(positions_AT, stream).astype(dtype)


def _axes(spec: MRopeSpec) -> int:
    axes = int(spec.extra["axes"])
    if axes < 3:
        raise MRopeError(
            f"{spec.family}: mrope_section has {axes} axes, but column, row and image take 3"
        )
    return axes


def _match(stream: Stream, images: Spans, grids: Grids) -> IntArray:
    """Return the cells of each image: its merged patches, and a newline for each line."""
    _, height_G, width_G = grids.size_3G
    cells_G: IntArray = height_G * (width_G + 1)
    count = min(len(cells_G), len(images.start_V))
    more_V = images.length_V[:count] - cells_G[:count]
    bad_V = (more_V != 0) & (more_V != _WRAPPERS)
    if grids.row_G is not None or not bad_V.any():
        refuse_counts(stream, images, cells_G + _WRAPPERS, grids.row_G, _GRIDS)
    if bad_V.any():
        image = int(bad_V.argmax())
        needed = int(cells_G[image]) + _WRAPPERS
        patches = [1, *(grids.size_3G[1:, image] * grids.merge).tolist()]
        size = (
            f"its grid {patches}, merged by {grids.merge}, needs {needed}, or {needed - _WRAPPERS} "
            "without wrappers"
        )
        raise misfit(stream, images, image, needed, size, _OTHER)
    return cells_G


def hunyuan_tokens(spec: MRopeSpec, frames: int, height: int, width: int) -> list[int]:
    """Return the tokens of an image as the processor lays them out, all of them placeholders.

    Each line ends with a newline, and the image has a wrapper in front and one behind.
    """
    tokens = spec.frame_tokens(height, width) + height // spec.spatial_merge_size
    return [spec.image_token_id] * (frames * tokens + _WRAPPERS)

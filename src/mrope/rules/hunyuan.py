"""HunYuan-VL: as many axes as the config has sections, text and images counted alike.

Every axis begins as the token's own number in its document. Within an image the last three axes
hold column, row and the image's ordinal instead; each line of an image ends with a newline token,
a column of its own. Nothing is compressed: text goes on with its own number.

Source: `get_rope_index` of `hunyuan_vl`, transformers 5.23.

Shape suffixes: B rows of the batch, S padded length, T tokens of the stream, D documents, V spans
of placeholders, I tokens of all blocks, A axes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.documents import IntArray, Stream, to_batch, to_stream
from mrope.errors import MRopeError, SpanMismatchError
from mrope.families import MRopeSpec
from mrope.grids import Grids, as_array, as_grid, as_integers, to_grids
from mrope.mismatch import IMAGE, TEXT, type_mismatch
from mrope.spans import token_kinds

Array = npt.NDArray[Any]

_WRAPPERS = 2
_OTHER = "a grid of another sample or processor, truncation, or the spec of another model family"
_NO_SIZE = "a placeholder token that was typed or sampled as text, or a grid that was lost"
_NO_TOKENS = "its tokens were truncated away and its grid was kept, or the grid is another sample's"


class Spans(NamedTuple):
    """Longest stretches of placeholders of one modality, in the order of the stream.

    Attributes:
        modality: "image" or "video".
        start_V: where each starts in the stream.
        length_V: its tokens.
        document_V: the document that it stands in.
    """

    modality: str
    start_V: IntArray
    length_V: IntArray
    document_V: IntArray


def hunyuan_index(
    spec: MRopeSpec,
    input_ids: npt.ArrayLike,
    attention_mask: npt.ArrayLike | None = None,
    image_grid_thw: npt.ArrayLike | None = None,
    video_grid_thw: npt.ArrayLike | None = None,
    *,
    mm_token_type_ids: npt.ArrayLike | None = None,
    images_per_sample: npt.ArrayLike | None = None,
) -> tuple[Array, Array]:
    """Number the tokens of a HunYuan-VL batch.

    The ordinal of an image counts over the whole batch, as the reference has it: a row's numbers
    depend on the rows before it, and its delta may too.

    Args:
        spec: with `numbers` axes, the length of `text_config.rope_parameters["mrope_section"]`.
        input_ids: (B, S) integers.
        attention_mask: (B, S), 0 at padding and 1 elsewhere, or bool. None: no padding.
        image_grid_thw: (N, 3) frames, height and width in patches; one frame each.
        video_grid_thw: the family has no videos: None or empty.
        mm_token_type_ids: (B, S), checked against the tokens; not needed.
        images_per_sample: (B,) how many of the N images each row has; with it every row is checked
            on its own.

    Returns:
        Positions (A, B, S), 0 at padding, and deltas (B, 1), both int64; int32 where the ids are.
        A delta is the largest position of the row + 1, less its tokens.

    Raises:
        SpanMismatchError: an image of neither H * (W + 1) tokens (its merged height and width, and
            a newline for each line), nor these and 2 wrappers; an image without a grid, or a grid
            without an image; types that are not those of the tokens.
        MRopeError: less than 3 axes; an argument of a wrong shape, dtype or value.

    Example:
        Text, then an image of 1 x 2 merged patches and its newline, then text.

        >>> spec = MRopeSpec("hunyuan_vl", "transformers-5.23", 9, -1, -1, 2, numbers={"axes": 3})
        >>> positions, delta = hunyuan_index(spec, [[5, 9, 9, 9, 6]], image_grid_thw=[[1, 2, 4]])
        >>> positions[:, 0].tolist()
        [[0, 0, 1, 2, 4], [0, 0, 0, 0, 4], [0, 0, 0, 0, 4]]
        >>> delta.tolist()
        [[0]]
    """
    axes = _axes(spec)
    ids_BS, stream = read_stream(input_ids, attention_mask)
    shape = ids_BS.shape
    grids = _to_images(spec, image_grid_thw, video_grid_thw, images_per_sample, shape)
    kind_T = read_kinds(spec, stream, shape, mm_token_type_ids)
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
    dtype = id_dtype(ids_BS)
    delta_B = np.zeros(shape[0], np.int64)
    delta_B[stream.row_D] = _ends(positions_AT, stream) - stream.length_D
    return to_batch(positions_AT.astype(dtype), stream, shape, 0), delta_B[:, None].astype(dtype)


def read_stream(
    input_ids: npt.ArrayLike, attention_mask: npt.ArrayLike | None
) -> tuple[IntArray, Stream]:
    """Return the ids as an array (B, S), and their stream.

    Raises:
        MRopeError: ids or a mask of a wrong shape, dtype or value.
    """
    ids_BS = as_integers("input_ids", input_ids, "token ids")
    if ids_BS.ndim != 2:
        raise MRopeError(f"input_ids must have shape (B, S), not {ids_BS.shape}")
    if attention_mask is None:
        return ids_BS, to_stream(ids_BS, None)
    mask = as_array("attention_mask", attention_mask, "a number for each token")
    if mask.shape != ids_BS.shape:
        raise MRopeError(f"attention_mask has shape {mask.shape}, but input_ids {ids_BS.shape}")
    # The references disagree about other values: valid, padding, or so many tokens.
    if mask.dtype.kind not in "biu" or (mask.size and not 0 <= mask.min() <= mask.max() <= 1):
        raise MRopeError(f"attention_mask must hold 0 and 1 only, or bool ({mask.dtype} given)")
    valid_BS = mask.astype(np.bool_)
    return ids_BS, to_stream(ids_BS, None if valid_BS.all() else valid_BS)


def id_dtype(ids_BS: IntArray) -> type[np.signedinteger[Any]]:
    """Return the dtype of positions where the reference takes that of the ids."""
    return np.int32 if ids_BS.dtype == np.int32 else np.int64


def read_kinds(
    spec: MRopeSpec,
    stream: Stream,
    shape: tuple[int, ...],
    mm_token_type_ids: npt.ArrayLike | None,
) -> npt.NDArray[np.uint8]:
    """Return TEXT, IMAGE or VIDEO for each token of the stream, read from the tokens.

    Raises:
        MRopeError: types of a wrong shape or dtype, or that say otherwise.
    """
    kind_T = token_kinds(spec, stream)
    if mm_token_type_ids is None:
        return kind_T
    types = as_integers("mm_token_type_ids", mm_token_type_ids, "0 text, 1 image, 2 video")
    if types.shape != shape:
        raise MRopeError(f"mm_token_type_ids has shape {types.shape}, but input_ids {shape}")
    types_T = types.ravel() if stream.valid_BS is None else types[stream.valid_BS]
    if not np.array_equal(kind_T, types_T):
        raise type_mismatch(stream, kind_T, types_T)
    return kind_T


def find_spans(stream: Stream, kind_T: npt.NDArray[np.uint8], kind: int, modality: str) -> Spans:
    """Cut out the longest stretches of one kind; none goes beyond a document.

    kinds 0 1 1 | 1 2 with documents at 0 and 3 give, for kind 1, starts 1 3 and lengths 2 1.
    """
    begins_T = np.diff(kind_T, prepend=np.uint8(TEXT)) != 0
    begins_T[stream.start_D] = True
    start_R = begins_T.nonzero()[0]
    length_R = np.diff(start_R, append=len(kind_T))
    of_kind_R = kind_T[start_R] == kind
    start_V = start_R[of_kind_R]
    return Spans(modality, start_V, length_R[of_kind_R], documents_of(stream, start_V))


def documents_of(stream: Stream, token_V: IntArray) -> IntArray:
    """Return the document of each of these tokens."""
    document_V: IntArray = stream.start_D.searchsorted(token_V, side="right") - 1
    return document_V


def number_cells(first_V: IntArray, cells_V: IntArray) -> tuple[IntArray, IntArray]:
    """Return the tokens of blocks, one block after the other, and each one's number in its block.

    blocks at tokens 3 and 9 of 2 and 3 cells: tokens 3 4 9 10 11, cells 0 1 0 1 2.
    """
    before_V = cells_V.cumsum() - cells_V
    count_I = np.arange(cells_V.sum())
    cell_I = count_I - before_V.repeat(cells_V)
    return cell_I + first_V.repeat(cells_V), cell_I


def misfit(
    stream: Stream, spans: Spans, span: int, needed: int, size: str, cause: str
) -> SpanMismatchError:
    """Return the error for a span whose tokens are not those that its size needs."""
    document = int(spans.document_V[span])
    row = int(stream.row_D[document])
    ordinal = span - int(spans.document_V.searchsorted(document))
    first = int(spans.start_V[span] - stream.start_D[document])
    found = int(spans.length_V[span])
    return SpanMismatchError(
        f"row {row}, {spans.modality} {ordinal} at valid token {first}: found {found} placeholder "
        f"token{'' if found == 1 else 's'}, but {size}. Likely cause: {cause}.",
        row=row,
        span=ordinal,
        modality=spans.modality,
        found=found,
        needed=needed,
        cause=cause,
    )


def refuse_counts(
    stream: Stream, spans: Spans, needed_G: IntArray, row_G: IntArray | None, what: str
) -> None:
    """Refuse spans that are not as many as their sizes: of each row where rows are known.

    Args:
        needed_G: tokens that each size needs, for the message.
        row_G: the row of the batch that each size belongs to, ascending.
        what: name of the sizes' array.
    """
    row_V = stream.row_D[spans.document_V]
    row = int(stream.row_D[0]) if len(stream.row_D) == 1 else None
    of_V, of_G = slice(0, len(row_V)), slice(0, len(needed_G))
    if row_G is not None:
        rows = int(max(row_V.max(initial=0), row_G.max(initial=0))) + 1
        uneven_B = np.bincount(row_V, minlength=rows) != np.bincount(row_G, minlength=rows)
        row = int(uneven_B.argmax())
        of_V, of_G = (slice(*of.searchsorted((row, row + 1)).tolist()) for of in (row_V, row_G))
    found, sizes = of_V.stop - of_V.start, of_G.stop - of_G.start
    if found != sizes:
        counts = f"{'the batch' if row is None else f'row {row}'} has {found} {spans.modality} "
        counts += f"span{'' if found == 1 else 's'} and {sizes} of {what}"
        if found > sizes:
            surplus = of_V.start + sizes
            raise misfit(stream, spans, surplus, 0, f"there is no size for it: {counts}", _NO_SIZE)
        raise _left_over(spans.modality, row, found, of_G.start + found, needed_G, what, counts)


def _left_over(
    modality: str,
    row: int | None,
    ordinal: int,
    size: int,
    needed_G: IntArray,
    what: str,
    counts: str,
) -> SpanMismatchError:
    """Return the error for the first size that no span asked for."""
    where = f"row {row}, {modality} {ordinal}"
    if row is None:
        where = f"row unknown (give {modality}s_per_sample to check each row on its own)"
    needed = int(needed_G[size])
    return SpanMismatchError(
        f"{where}: found 0 placeholder tokens, but {what}[{size}] needs {needed}: {counts}. "
        f"Likely cause: {_NO_TOKENS}.",
        row=row,
        span=None if row is None else ordinal,
        modality=modality,
        found=0,
        needed=needed,
        cause=_NO_TOKENS,
    )


def _axes(spec: MRopeSpec) -> int:
    axes = int(spec.numbers["axes"])
    if axes < 3:
        raise MRopeError(
            f"{spec.family}: mrope_section has {axes} axes, but column, row and image take 3"
        )
    return axes


def _to_images(
    spec: MRopeSpec,
    image_grid_thw: npt.ArrayLike | None,
    video_grid_thw: npt.ArrayLike | None,
    images_per_sample: npt.ArrayLike | None,
    shape: tuple[int, ...],
) -> Grids:
    rows, width = shape
    if len(as_grid("video_grid_thw", video_grid_thw)):
        raise MRopeError(f"{spec.family} has no videos, but video_grid_thw is given")
    grids = to_grids(spec, image_grid_thw, None, images_per_sample, None, (rows, width))
    clips = grids.size_3G[0] != 1
    if clips.any():
        image = int(clips.argmax())
        raise MRopeError(
            f"image_grid_thw[{image}] has {grids.size_3G[0, image]} frames, but an image of "
            f"{spec.family} has 1"
        )
    return grids


def _match(stream: Stream, images: Spans, grids: Grids) -> IntArray:
    """Return the cells of each image: its merged patches, and a newline for each line."""
    _, height_G, width_G = grids.size_3G
    cells_G: IntArray = height_G * (width_G + 1)
    count = min(len(cells_G), len(images.start_V))
    more_V = images.length_V[:count] - cells_G[:count]
    bad_V = (more_V != 0) & (more_V != _WRAPPERS)
    if grids.row_G is not None or not bad_V.any():
        refuse_counts(stream, images, cells_G + _WRAPPERS, grids.row_G, "image_grid_thw")
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


def _ends(positions_AT: IntArray, stream: Stream) -> IntArray:
    """Return the largest position of each document + 1."""
    if not len(stream.start_D):
        return np.empty(0, np.int64)
    ends_D: IntArray = np.maximum.reduceat(positions_AT.max(axis=0), stream.start_D) + 1
    return ends_D

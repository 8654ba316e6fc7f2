"""Read what stands behind prompts: sampled tokens, and turns of tools with their images.

Shape suffixes: B rows, R width of the responses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mrope.arrays import IntArray, as_array, as_integers
from mrope.collate.read import read_column
from mrope.columns import COLUMNS, Columns, NewColumns, columns, count_key
from mrope.errors import MRopeError, counted
from mrope.positions.inputs import SECONDS
from mrope.spec.families import NO_TOKEN
from mrope.spec.spec import MRopeSpec

Array = npt.NDArray[Any]


class Turns(NamedTuple):
    """The responses of a batch.

    Attributes:
        ids_BR: tokens, text where a policy's placeholder counts as text; None: lengths are known
            alone.
        length_B: tokens of each row.
        width: R.
        have_spans: whether any turn that was given as a dict has placeholders, or sizes.
        media: sizes of all images, clips and audios, by the names of `rope_index`.
        counts: how many of each a row has, (B,), by the names of `rope_index`.
    """

    ids_BR: IntArray | None
    length_B: torch.Tensor
    width: int
    have_spans: bool
    media: NewColumns
    counts: dict[str, Array]


def read_turns(
    spec: MRopeSpec, responses: Any, rows: int, placeholders: str, width: int | None
) -> Turns:
    """Check responses in any form that `extend` takes.

    Raises:
        MRopeError: another number of rows, a width below a length, a sampled placeholder, or
            sizes that are none.
    """
    if placeholders not in ("refuse", "text"):
        raise MRopeError(f"placeholders must be 'refuse' or 'text', not {placeholders!r}")
    if len(responses) != rows:
        raise MRopeError(f"{len(responses)} responses, but position_ids have {rows} rows")
    if _are_lengths(responses):
        return _read_lengths(torch.as_tensor(responses), width)
    read = [_read_row(spec, row, turns, placeholders) for row, turns in enumerate(responses)]
    length_B = torch.tensor([len(ids) for ids, _ in read])
    known = _checked_width(length_B, width)
    ids_BR = np.full((rows, known), text_id(spec))
    for row, (ids, _) in enumerate(read):
        ids_BR[row, : len(ids)] = ids
    media, counts = _join([media for _, media in read])
    spans = np.isin(ids_BR, list(placeholder_ids(spec))).any()
    return Turns(ids_BR, length_B, known, bool(spans or counts), media, counts)


def as_text(spec: MRopeSpec, tokens: object, replacement: int | None = None) -> Any:
    """Replace sampled placeholders, for which a model would look for features of an image.

    Args:
        tokens: ids of a response, of any shape: an array, or a tensor, for which there is no sync.
        replacement: the id that stands in their place; None: the lowest that is no placeholder.
    """
    new = text_id(spec) if replacement is None else replacement
    ids = tokens if isinstance(tokens, torch.Tensor) else np.array(tokens)
    for token in placeholder_ids(spec):
        ids = ids + (ids == token) * (new - token)
    return ids


def placeholder_ids(spec: MRopeSpec) -> dict[int, str]:
    """Return the token ids that a response of text cannot have, with what each stands for.

    Markers are among them where the family's rule looks for them.
    """
    row = spec.family_row
    names = {"image": spec.image_token_id, "video": spec.video_token_id}
    by_markers = row.custom_index is not None or row.frames_as_images
    if by_markers:
        names["vision start"] = spec.vision_start_token_id
    for name, value in spec.extra.items():
        if name.endswith("_id") and (by_markers or name == "audio_token_id"):
            names[name.removesuffix("_id").replace("_", " ")] = int(value)
    return {token: name for name, token in names.items() if token != NO_TOKEN}


def text_id(spec: MRopeSpec) -> int:
    """Return the lowest token id that is neither a placeholder nor a marker."""
    extra = [int(value) for name, value in spec.extra.items() if name.endswith("_id")]
    taken = {spec.image_token_id, spec.video_token_id, spec.vision_start_token_id, *extra}
    return next(token for token in range(len(taken) + 1) if token not in taken)


def with_turns(inputs: Columns, turns: Turns, rows: int) -> NewColumns:
    """Put the sizes of the turns behind those of each prompt.

    sizes a b of rows of 1 and 1, and c of a turn of row 0: a c b, with counts 2 1.

    Raises:
        MRopeError: sizes of several prompts without counts for each row.
    """
    own = {name: value for name, value in inputs.items() if value is not None}
    for name in {**own, **turns.media}:
        column = COLUMNS[name]
        if column.modality is None or column.kind == "row":
            continue
        count = count_key(column.modality)
        given = inputs.get(count)
        values = np.asarray(own.get(name, [] if column.kind == "item" else False))
        if given is None and rows > 1 and values.size and column.kind == "item":
            raise MRopeError(f"{name} of {rows} prompts need {count}: turns stand between them")
        counts_B = np.zeros(rows, np.int64)
        counts_B[:] = (len(values) if values.ndim and rows == 1 else 0) if given is None else given
        values = np.broadcast_to(values, int(counts_B.sum())) if column.kind == "batch" else values
        added_B = turns.counts.get(count, np.zeros(rows, np.int64))
        at = counts_B.cumsum().repeat(added_B)
        if name in turns.media:
            new = np.asarray(turns.media[name])
            own[name] = np.insert(values, at, new, axis=0) if len(values) else new
    totals = {key: np.asarray(own.get(key, 0)) + value for key, value in turns.counts.items()}
    return {**own, **totals}


def on_host(*tensors: torch.Tensor) -> bool:
    """Whether tensors can be read without a sync."""
    return all(tensor.device.type == "cpu" for tensor in tensors)


def _are_lengths(responses: Any) -> bool:
    if isinstance(responses, (np.ndarray, torch.Tensor)):
        return responses.ndim == 1 and responses.dtype != object
    return len(responses) > 0 and all(isinstance(one, (int, np.integer)) for one in responses)


def _read_lengths(length_B: torch.Tensor, width: int | None) -> Turns:
    if length_B.dtype.is_floating_point or length_B.dtype == torch.bool:
        raise MRopeError(f"lengths of responses must be integers, not {length_B.dtype}")
    if on_host(length_B):
        width = _checked_width(length_B, width)
    elif width is None:
        raise MRopeError("lengths on a device need width: to read the longest would be a sync")
    return Turns(None, length_B, width, False, {}, {})


def _checked_width(length_B: torch.Tensor, width: int | None) -> int:
    longest = int(length_B.max()) if len(length_B) else 0
    if width is not None and width < longest:
        raise MRopeError(f"width is {width}, but the longest response has {longest} tokens")
    if len(length_B) and int(length_B.min()) < 0:
        raise MRopeError(
            f"row {int(length_B.argmin())}: a response of {int(length_B.min())} tokens"
        )
    return longest if width is None else width


def _read_row(
    spec: MRopeSpec, row: int, turns: object, placeholders: str
) -> tuple[IntArray, dict[str, list[Any]]]:
    """Return the tokens behind one prompt, and sizes by name, a list for all of its turns."""
    ids: list[IntArray] = [np.empty(0, np.int64)]
    media: dict[str, list[Any]] = {}
    for turn in _turns_of(turns):
        given = isinstance(turn, Mapping)
        tokens = as_integers("input_ids", turn["input_ids"] if given else turn, "token ids")
        if tokens.ndim != 1:
            raise MRopeError(f"row {row}: the tokens of a turn must be 1-D, not {tokens.shape}")
        if not given:
            if placeholders == "refuse":
                _refuse_sampled(spec, row, tokens, sum(map(len, ids)))
            tokens = as_text(spec, tokens)
        ids.append(tokens)
        for name, value in _media_of(spec, row, turn).items() if given else ():
            media.setdefault(name, []).append(value)
    return np.concatenate(ids), media


def _media_of(spec: MRopeSpec, row: int, turn: Columns) -> NewColumns:
    """Return the sizes of a turn by name, and flags that each clip may have for itself.

    Raises:
        MRopeError: an item that `read_column` refuses, or other seconds or flags than clips.
    """
    media = {name: turn[name] for name in columns("item", "batch") if turn.get(name) is not None}
    try:
        for name in media.keys() & set(columns("item")):
            value = read_column(name, media[name])
            if value is None and np.ndim(media[name]) == 0:
                del media[name]  # a null
                continue
            # An empty table stays: the batch has images then, if none in this turn.
            media[name] = as_array(name, media[name] if value is None else value, "numbers")
    except MRopeError as error:
        raise MRopeError(f"row {row}: {error}") from None
    clips = sum(len(media.get(one, ())) for one in columns("item", modality="video", means="size"))
    for name in columns("batch", modality="video"):
        if name in spec.family_row.inputs:
            flags = np.asarray(media.get(name, False))
            media[name] = flags if flags.ndim else flags.repeat(clips)
    of_clips = {*spec.family_row.inputs, *((SECONDS,) if spec.family_row.timed else ())}
    for name in (SECONDS, *columns("batch", modality="video")):
        if name in media.keys() & of_clips and len(media[name]) != clips:
            raise MRopeError(
                f"row {row}: {name} has {len(media[name])} values, but the turn has "
                f"{counted(clips, 'clip')}"
            )
    return media


def _turns_of(turns: Any) -> Iterator[Any]:
    """Yield the turns of a row that may be one turn itself."""
    many = isinstance(turns, (list, tuple)) and any(
        isinstance(one, Mapping) or np.ndim(one) > 0 for one in turns
    )
    yield from turns if many else [turns]


def _refuse_sampled(spec: MRopeSpec, row: int, tokens: IntArray, before: int) -> None:
    names = placeholder_ids(spec)
    sampled = np.isin(tokens, list(names))
    if sampled.any():
        place = int(sampled.argmax())
        token = int(tokens[place])
        raise MRopeError(
            f"row {row}, response token {before + place}: {token}, the {names[token]} token of "
            f"{spec.family}, was sampled as text. placeholders='text' numbers it as text, and "
            "as_text replaces it for the model; a turn with images is a dict with their sizes."
        )


def _join(rows: list[dict[str, list[Any]]]) -> tuple[NewColumns, dict[str, Array]]:
    """Concatenate the sizes of all rows, and count the images, clips and audios of each."""
    media: NewColumns = {}
    counts: dict[str, Array] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        parts = [row.get(name, []) for row in rows]
        flat = [np.asarray(one) for row in parts for one in row]
        column = COLUMNS[name]
        try:
            media[name] = np.concatenate(flat) if column.modality else flat[0].item()
        except ValueError as error:
            raise MRopeError(f"{name} of the turns cannot be concatenated: {error}") from error
        if column.means == "size":
            counts[count_key(str(column.modality))] = np.array(
                [sum(len(one) for one in row) for row in parts]
            )
    return media, counts

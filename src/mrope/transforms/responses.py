"""Number responses behind prompts: `extend` continues `position_ids` and `rope_deltas`.

In RL an engine answers a prompt whose positions the worker computed. The trainer needs those of
prompt and response together, as `get_rope_index` computes them on the concatenation. Text counts on
from the prompt's last number; images of a tool's answer are numbered apart and moved behind it.

Shape suffixes: A axes, B rows, P width of the prompts, R width of the responses, N their sum, D
prompts of a flattened row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mrope.columns import NewColumns
from mrope.errors import MRopeError
from mrope.positions.rope_index import padding_of, rope_index
from mrope.spec.spec import MRopeSpec
from mrope.transforms.turns import Turns, on_host, read_turns, text_id, with_turns

Array = npt.NDArray[Any]


class _Rows(NamedTuple):
    """Padded rows, on any device: positions, which tokens are valid, and token ids if known."""

    positions_ABN: torch.Tensor
    valid_BN: torch.Tensor
    ids_BN: torch.Tensor | None = None


def extend(
    spec: MRopeSpec,
    position_ids: object,
    rope_deltas: object,
    responses: object,
    *,
    attention_mask: object = None,
    seq_lengths: Sequence[int] | None = None,
    input_ids: object = None,
    placeholders: Literal["refuse", "text"] = "refuse",
    width: int | None = None,
    **inputs: object,
) -> tuple[Any, Any]:
    """Compute positions and deltas of prompts and responses from those of the prompts.

    They equal those of `rope_index` on `cat((prompts, responses), 1)`, bit for bit.

    Args:
        spec: of the model.
        position_ids: of the prompts, (A, B, P), padding anywhere; or flattened, (A, 1, T) or
            (A + 1, 1, T) with the text row in front. An array, or a tensor on any device.
        rope_deltas: (B, 1) of the prompts; (D, 1) if flattened. On the host they are compared.
        responses: (B,) integers, how many tokens of text each response has. Or for each row what
            stands behind its prompt: 1-D token ids, or a list of turns. A turn is token ids that a
            policy sampled, or, of a tool or a user, a dict of `input_ids` with the sizes of its
            images and clips under the names of `rope_index`.
        attention_mask: (B, P) of the prompts, non-zero where a token is valid; None: all are.
        seq_lengths: of flattened prompts: tokens of each, on the host.
        input_ids: (B, P) tokens of the prompts. Required where positions may be fractions
            (Qwen3-Omni), whose rounding depends on where the last text began, and where a turn's
            images change what stands before (HunYuan-VL).
        placeholders: what to do with placeholder tokens that a policy sampled: "refuse", or number
            them as "text". The model still takes features for them: give it `as_text` of the ids.
        width: R, of the responses; None: that of the longest. With lengths on a device, and a
            width, nothing is read back: there is no sync.
        inputs: sizes of the prompts' own images and clips, by the names of `rope_index`, with
            counts for each row; read where `input_ids` is required and turns have images.

    Returns:
        `position_ids` (A, B, P + R), each response at the left of its R places, and `rope_deltas`
        (B, 1). Flattened: (A or A + 1, 1, T + all responses), each response behind its prompt.
        Arrays or tensors, as `position_ids` are.

    Raises:
        MRopeError: a sampled placeholder, by row and place; a family that does not decode text, or
            one with 1-D positions; arguments that do not fit together.
        SpanMismatchError: placeholders of a turn that do not fit its sizes.

    Example:
        A prompt of text and an image, a response of two tokens:

        >>> from mrope.spec.spec import example_config
        >>> spec = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
        >>> tokens = [[7, 102, 102, 102, 102, 8]]
        >>> ids, deltas = rope_index(spec, tokens, image_grid_thw=[[1, 4, 4]])
        >>> ids, deltas = extend(spec, ids, deltas, [[5, 6]])
        >>> ids[:, 0].tolist()[0], deltas.tolist()
        ([0, 1, 1, 1, 1, 3, 4, 5], [[-2]])
    """
    _refuse_family(spec)
    positions, deltas = _as_tensor(position_ids), _as_tensor(rope_deltas)
    lengths = None if seq_lengths is None else np.asarray(seq_lengths, np.int64)
    prompts = _read_prompts(spec, positions, attention_mask, lengths, input_ids)
    seen = _check_deltas(spec, prompts, deltas, lengths is None)
    turns = read_turns(spec, responses, prompts.valid_BN.shape[0], placeholders, width)
    row = spec.family_row
    if turns.have_spans and (row.counts_images or positions.is_floating_point()):
        both, delta_B1 = _number_whole(spec, prompts, turns, inputs)
    else:
        seen = seen | any(f"{one}s_per_sample" in turns.counts for one in ("image", "video"))
        both = _continue(spec, prompts, turns, seen)
        delta_B1 = _deltas(spec, both, seen, lengths is None).to(deltas.dtype)
    ids = both.positions_ABN
    if lengths is not None:
        ids = _flatten(both, len(positions) > len(ids))
    if isinstance(position_ids, torch.Tensor):
        return ids.to(positions.device), delta_B1.to(positions.device)
    return ids.numpy(), delta_B1.numpy()


def _refuse_family(spec: MRopeSpec) -> None:
    row = spec.family_row
    if row.one_dimensional:
        raise MRopeError(
            f"{spec.family} numbers its tokens in 1-D, prompt and response alike: there is nothing "
            "to extend"
        )
    # A talker reads audio, and has no section of a tower.
    speaks = not row.section and "audio_seqlens" in row.inputs
    if speaks or (row.tower is not None and row.tower.sizes == "without_last"):
        raise MRopeError(
            f"{spec.family} numbers what it draws or speaks itself: extend continues text"
        )


def _as_tensor(values: object) -> torch.Tensor:
    return values if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values))


def _read_prompts(
    spec: MRopeSpec,
    positions: torch.Tensor,
    attention_mask: object,
    lengths: Array | None,
    input_ids: object,
) -> _Rows:
    """Check shapes, and bring flattened prompts into rows."""
    axes = len(_steps(spec))
    wanted = (axes,) if lengths is None else (axes, axes + 1)
    if positions.ndim != 3 or len(positions) not in wanted:
        raise MRopeError(
            f"position_ids of prompts must have shape ({axes}, B, P) in model layout, not "
            f"{(*positions.shape,)}"
        )
    given = (None if one is None else _as_tensor(one) for one in (input_ids, attention_mask))
    ids, mask = (None if one is None else one.to(positions.device) for one in given)
    for name, values in (("input_ids", ids), ("attention_mask", mask)):
        if values is not None and values.shape != positions.shape[1:]:
            raise MRopeError(
                f"{name} has shape {(*values.shape,)}, but position_ids {(*positions.shape,)}"
            )
    positions = positions[-axes:]
    if lengths is None:
        valid = positions.new_ones(positions.shape[1:], dtype=torch.bool)
        return _Rows(positions, valid if mask is None else mask != 0, ids)
    if lengths.sum() != positions.shape[2]:
        raise MRopeError(
            f"seq_lengths add up to {lengths.sum()}, but position_ids have {positions.shape[2]}"
        )
    # lengths 3 1: places [[0, 1, 2], [3, 3, 3]], valid [[1, 1, 1], [1, 0, 0]].
    valid_DP = np.arange(lengths.max(initial=0)) < lengths[:, None]
    place_DP = (lengths.cumsum() - lengths)[:, None] + np.arange(valid_DP.shape[1]) * valid_DP
    place, valid = (torch.from_numpy(one).to(positions.device) for one in (place_DP, valid_DP))
    return _Rows(positions[:, 0][:, place], valid, None if ids is None else ids[0][place])


@lru_cache(maxsize=64)
def _steps(spec: MRopeSpec) -> tuple[int, ...]:
    """Return by how much text counts on, on each axis: 1, or 0 where it stands still."""
    positions, _ = rope_index(spec, np.full((1, 2), text_id(spec)), np.ones((1, 2), np.int64))
    return tuple(int(step) for step in positions[:, 0, 1] - positions[:, 0, 0])


def _check_deltas(
    spec: MRopeSpec, prompts: _Rows, deltas: torch.Tensor, padded: bool
) -> torch.Tensor:
    """Refuse deltas that are not those of the positions; on a device to look would be a sync.

    Returns:
        Whether the batch has images or clips, a bool on the prompts' device. Without the tokens of
        the prompts these are found by axes that part, or by deltas that no batch of text has.
    """
    positions_ABP, valid_BP, ids_BP = prompts
    rows = len(valid_BP)
    if deltas.shape != (rows, 1):
        raise MRopeError(f"rope_deltas has shape {(*deltas.shape,)}, but there are {rows} prompts")
    media_BP = (positions_ABP != positions_ABP[:1]).any(0)
    if ids_BP is not None:
        media_BP = (ids_BP == spec.image_token_id) | (ids_BP == spec.video_token_id)
    seen = (media_BP & valid_BP).any()
    if not on_host(deltas, valid_BP):
        return seen
    for have in (seen, ~seen):
        own = _deltas(spec, prompts, have, padded)
        if torch.equal(own.to(deltas.dtype), deltas):
            return have
    row = int((own != deltas).to(torch.uint8).argmax())
    raise MRopeError(
        f"row {row}: rope_deltas has {deltas[row].item()}, but by its position_ids it is "
        f"{own[row].item()}. Likely cause: an attention_mask that was lost, or positions of "
        "another batch, family or release."
    )


def _deltas(spec: MRopeSpec, rows: _Rows, has_media: torch.Tensor, padded: bool) -> torch.Tensor:
    """Return each row's largest position + 1, less its length, (B, 1)."""
    positions_ABN, valid_BN, _ = rows
    tokens_B = valid_BN.sum(1)
    counting_ABN = positions_ABN[:1] if spec.family_row.ends_in_time else positions_ABN
    end_B = tokens_B.to(positions_ABN.dtype)
    if valid_BN.shape[1]:
        # Below every position, and exact in float32.
        end_B = counting_ABN.masked_fill(~valid_BN, -(1 << 24)).amax((0, 2)) + 1
    if not padded:
        return (end_B - tokens_B)[:, None]
    text, seen = (padding_of(spec, media) for media in (False, True))
    end_B = torch.where(tokens_B > 0, end_B, seen.empty_end)
    if text.fill_counts:
        least = torch.where(has_media, seen.empty_end, text.fill + 1).to(end_B.dtype)
        end_B = torch.where(valid_BN.all(1), end_B, torch.maximum(end_B, least))
    return (end_B - (valid_BN.shape[1] if seen.over_padded else tokens_B))[:, None]


def _continue(spec: MRopeSpec, prompts: _Rows, turns: Turns, has_media: torch.Tensor) -> _Rows:
    """Number the responses from each prompt's last number, and put them behind the prompts."""
    positions_ABP, valid_BP, _ = prompts
    dtype, device = positions_ABP.dtype, positions_ABP.device
    length_B = turns.length_B.to(device, non_blocking=True)
    count_R = torch.arange(turns.width, device=device)
    base_B, before_B = _bases(spec, prompts)
    if turns.have_spans:
        apart = (one.to(device, non_blocking=True) for one in _number_apart(spec, turns))
        from_0_ABR, step_ABR = apart
        answer_ABR = from_0_ABR + step_ABR * base_B[:, None]
    else:
        counted_BR = base_B[:, None] + (before_B[:, None] + count_R).to(dtype)
        answer_ABR = torch.stack([counted_BR * step for step in _steps(spec)])
    valid_BN = torch.cat((valid_BP, count_R < length_B[:, None]), 1)
    positions_ABN = torch.cat((positions_ABP, answer_ABR.to(dtype)), 2)
    text, seen = (padding_of(spec, media).fill for media in (False, True))
    fill = torch.where(has_media, seen, text).to(dtype)
    return _Rows(torch.where(valid_BN, positions_ABN, fill), valid_BN)


def _number_apart(spec: MRopeSpec, turns: Turns) -> tuple[torch.Tensor, torch.Tensor]:
    """Number turns with images behind one token of text, and behind two.

    Returns:
        What each number would be behind nothing, (A, B, R), and by how much it grows with each
        number before it, 1 or 0, likewise.
    """
    assert turns.ids_BR is not None  # with images there are tokens
    mask_BR = np.arange(turns.width) < turns.length_B.numpy()[:, None]
    numbered = []
    for before in (1, 2):
        around = ((0, 0), (before, 0))
        ids = np.pad(turns.ids_BR, around, constant_values=text_id(spec))
        mask = np.pad(mask_BR, around, constant_values=True)
        try:
            positions, _ = rope_index(spec, ids, mask, **turns.media, **turns.counts)
        except MRopeError as error:
            error.args = (f"turns, whose valid token 0 is their prompt's last: {error}",)
            raise
        numbered.append(positions[:, :, before:])
    step_ABR = numbered[1] - numbered[0]
    return torch.from_numpy(numbered[0] - step_ABR), torch.from_numpy(step_ABR)


def _bases(spec: MRopeSpec, prompts: _Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a number of each prompt from which text counts on, and the tokens since, (B,) each.

    Integers count from the last token's. Fractions are rounded at each token as their text began:
    they count from its first.
    """
    positions_ABP, valid_BP, ids_BP = prompts
    tokens_B = valid_BP.sum(1)
    zero_B = torch.zeros_like(tokens_B)
    if not valid_BP.shape[1]:
        return zero_B.to(positions_ABP.dtype), zero_B
    if not positions_ABP.is_floating_point():
        count_P = torch.arange(valid_BP.shape[1], device=valid_BP.device)
        last_B1 = torch.where(valid_BP, count_P, 0).amax(1)[:, None]
        last_AB = positions_ABP.gather(2, last_B1.expand(len(positions_ABP), -1, 1))[..., 0]
        row = spec.family_row
        over_time = row.custom_index or spec.conventions.advance_over_time
        counting = (
            slice(0, 1) if row.planes_at_zero or row.ends_in_time else slice(not over_time, None)
        )
        next_B = last_AB[counting].amax(0) + 1
        return torch.where(tokens_B > 0, next_B, 0), zero_B
    if ids_BP is None:
        raise MRopeError(
            f"{spec.family} needs the input_ids of the prompts: its positions may be fractions, "
            "rounded from where the last text began"
        )
    # Valid tokens first, whatever the padding.
    order_BP = (~valid_BP).to(torch.uint8).argsort(dim=1, stable=True)
    number_BP = positions_ABP[0].gather(1, order_BP)
    since_B = tokens_B - _last_text(spec, ids_BP.gather(1, order_BP), tokens_B)
    at_B1 = (tokens_B - since_B.clamp(min=1)).clamp(min=0)[:, None]
    base_B = number_BP.gather(1, at_B1)[:, 0] + (since_B == 0)
    return torch.where(tokens_B > 0, base_B, 0), since_B


def _last_text(spec: MRopeSpec, ids_BP: torch.Tensor, tokens_B: torch.Tensor) -> torch.Tensor:
    """Return where the text behind an Omni prompt's last span begins, in valid tokens.

    A span ends with one marker behind its placeholders, and with two where it begins with two.
    """
    count_P = torch.arange(ids_BP.shape[1], device=ids_BP.device)
    audio, start = (int(spec.extra[name]) for name in ("audio_token_id", "audio_start_token_id"))
    inside_BP = (ids_BP == spec.image_token_id) | (ids_BP == spec.video_token_id)
    inside_BP = (inside_BP | (ids_BP == audio)) & (count_P < tokens_B[:, None])
    last_B1 = torch.where(inside_BP, count_P, -1).amax(1)[:, None]
    before_B1 = torch.where(~inside_BP & (count_P < last_B1), count_P, 0).amax(1)[:, None]
    opens_B1 = ids_BP.gather(1, before_B1) == start
    outer_B1 = ids_BP.gather(1, (before_B1 - 1).clamp(min=0)) == spec.vision_start_token_id
    markers_B1 = 1 + (opens_B1 & outer_B1 & (before_B1 > 0)).long()
    first_B1 = torch.where(last_B1 >= 0, last_B1 + 1 + markers_B1, 0)
    return torch.minimum(first_B1[:, 0], tokens_B)


def _number_whole(
    spec: MRopeSpec, prompts: _Rows, turns: Turns, inputs: NewColumns
) -> tuple[_Rows, torch.Tensor]:
    """Number prompts and responses anew, from all tokens and sizes."""
    if prompts.ids_BN is None:
        raise MRopeError(
            f"{spec.family} needs the input_ids of the prompts, and the sizes of their images: an "
            "image of a turn is not numbered apart from what stands before it"
        )
    assert turns.ids_BR is not None  # with images there are tokens
    prompt_BP = prompts.ids_BN.cpu().numpy()
    answered_BR = torch.arange(turns.width) < turns.length_B[:, None]
    ids_BN = np.concatenate((prompt_BP, turns.ids_BR.astype(prompt_BP.dtype)), axis=1)
    valid_BN = torch.cat((prompts.valid_BN.cpu(), answered_BR), 1)
    sizes = with_turns(inputs, turns, len(ids_BN))
    positions_ABN, deltas_B1 = rope_index(spec, ids_BN, valid_BN.numpy(), **sizes)
    return _Rows(torch.from_numpy(positions_ABN), valid_BN), torch.from_numpy(deltas_B1)


def _flatten(rows: _Rows, text_row: bool) -> torch.Tensor:
    """Drop the padding: each response follows its prompt, in one row."""
    positions_ABN, valid_BN, _ = rows
    if text_row:
        own_BN = (valid_BN.cumsum(1) - 1).to(positions_ABN.dtype)
        positions_ABN = torch.cat((own_BN[None], positions_ABN))
    return positions_ABN[:, valid_BN][:, None]

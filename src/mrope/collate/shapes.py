"""Fixed shapes from a short ladder, so that one compiled graph serves batches of all sizes.

Every tensor of the batch is padded up to the next rung: tokens, patches, and the borders of
segments. Padding belongs to segments of its own, that no real token or patch attends to, and its
features are gathered by no token, so that it reaches neither loss nor gradients. Images and clips
share one call of the tower, and a batch of text alone has a rung of padding patches: each rank then
runs its tower in every step, as FSDP and ZeRO-3 need.

Shape suffixes: T tokens of a row or of the batch, P patches, M merged tokens of the tower, G
borders of segments, F frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mrope.arrays import IntArray
from mrope.collate.ladder import Shapes
from mrope.collate.packing import Flatten, fill_of, flatten, is_column, refuse_placeholder
from mrope.collate.pixels import take_pixels
from mrope.collate.samples import GRIDS, SECONDS
from mrope.errors import MRopeError
from mrope.positions.located import Located
from mrope.positions.stream import IMAGE, TEXT
from mrope.spec.spec import MRopeSpec
from mrope.towers.vision import block_index, vision_tensors
from mrope.towers.vision_spec import VisionSpec

# A frame whose sides are no multiples of a window's has smaller windows at two of its edges, and so
# more windows than its patches would fill: with released sides of 4 tokens at most so many times
# as many, and one.
_CUT_WINDOWS = 4


def check_shapes(spec: MRopeSpec, vision: VisionSpec | None, shapes: Shapes) -> None:
    """Refuse a ladder that the model's batches cannot be padded to.

    Raises:
        ValueError: rungs of patches without a vision spec, a rung that does not consist of whole
            tokens, or a token id of padding that is a placeholder.
        MRopeError: as `check_family`.
    """
    refuse_placeholder(spec, shapes.pad_token_id)
    if not shapes.patches:
        check_positions(spec)
        return
    if vision is None:
        raise ValueError("shapes needs vision=VisionSpec(...): padding goes through the tower")
    check_family(spec, vision)
    unit = vision.spatial_merge_size**2
    for rung in shapes.patches:
        if rung % unit:
            raise ValueError(f"shapes: {rung} patches are not whole tokens of {unit} patches")


def check_family(spec: MRopeSpec, vision: VisionSpec) -> None:
    """Refuse a model whose batches cannot have fixed shapes.

    Raises:
        MRopeError: as `check_positions`; or a tower whose features depend on more than its patches,
            or whose patches have an unknown size.
    """
    check_positions(spec)
    if vision.pairs or vision.host_grids:
        raise MRopeError(
            f"shapes is not supported for {spec.family}: its features depend on the sizes of "
            "frames behind or before the tower's layers, which differ from batch to batch"
        )
    if vision.patch_shape is None:
        raise MRopeError(
            f"shapes needs the size of a patch, to make patches for batches of text: the config "
            f"of {spec.family} has no patch_size"
        )


def check_positions(spec: MRopeSpec) -> None:
    """Refuse a family whose tokens cannot be padded to a rung.

    Raises:
        MRopeError: a family that takes audio or crops, or with 1-D positions.
    """
    if spec.family_row.custom_index is not None:
        raise MRopeError(f"shapes is not supported for {spec.family}: audio and crops vary in size")
    if spec.family_row.one_dimensional:
        raise MRopeError(f"shapes is not supported for {spec.family}, which has 1-D positions")


def choose_rung(
    name: str,
    rungs: Sequence[int],
    needed: int,
    per_row: Sequence[int],
    has_borders: Callable[[int], bool] = bool,
) -> int:
    """Return the first rung that holds `needed` and has borders enough.

    Args:
        name: "tokens" or "patches", for the message.
        per_row: what each row of the batch needs, for the message.
        has_borders: whether a rung has borders for the batch. If none has, the top rung is returned
            all the same: whoever sets the borders says how many are too many.

    Raises:
        MRopeError: the batch is above the top rung.
    """
    holding = [rung for rung in rungs if needed <= rung]
    if holding:
        return next((rung for rung in holding if has_borders(rung)), holding[-1])
    heaviest = sorted(range(len(per_row)), key=lambda row: -per_row[row])[:3]
    listed = ", ".join(f"row {row} with {per_row[row]}" for row in heaviest)
    raise MRopeError(
        f"the batch has {needed} {name}, above the top rung {rungs[-1]} of shapes.{name}; the "
        f"largest: {listed}. Give a higher rung, or let the sampler make smaller batches: "
        f"TokenBudgetSampler(shapes.sampler_lengths(tokens, patches), max_tokens=...) keeps them "
        f"below both top rungs"
    )


def flatten_to_rung(
    batch: MutableMapping[str, Any],
    located: Located,
    position_ids: npt.NDArray[np.int64],
    options: Flatten,
    shapes: Shapes,
) -> dict[str, Any]:
    """Do what `flatten` does, with a row and borders of fixed shapes.

    Returns:
        As `flatten`, but `cu_seq_lens_q` and `cu_seq_lens_k` have empty segments at the end,
        `max_length_q` and `max_length_k` are the rung, and there is no list of lengths.

    Raises:
        MRopeError: above the top rung, or more examples than the rung has borders for.
    """
    lengths_B = np.bincount(located.stream.row_D, located.stream.length_D).astype(int).tolist()
    examples = len(located.stream.row_D)
    rung = choose_rung(
        "tokens",
        shapes.tokens,
        sum(lengths_B),
        lengths_B,
        lambda rung: examples < shapes.examples(rung),
    )
    row = flatten(batch, located, position_ids, options, rung)
    del row["segment_sizes"]
    most = shapes.examples(rung)
    if examples >= most:  # one more is the padding
        raise MRopeError(
            f"the batch has {examples} examples, but its rung of shapes.tokens has borders for "
            f"{most - 1}; give Shapes a smaller tokens_per_example"
        )
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        empty = np.full(most + 1 - len(row[name]), rung, np.int32)
        row[name] = np.append(row[name], empty)
    return row | {"max_length_q": rung, "max_length_k": rung}


def pad_to_rung(
    batch: MutableMapping[str, Any],
    located: Located,
    position_ids: npt.NDArray[np.int64],
    shapes: Shapes,
) -> dict[str, Any]:
    """Pad the token columns of a padded batch on the right to a rung, in place.

    The attention mask goes: under a causal mask no token attends to padding on its right, and the
    model's kernels need no mask then.

    Returns:
        `position_ids` (3, B, rung), 0 at what was added, and `use_cache` False: a training step
        needs no cache, and gradient checkpointing would break the graph to say so.

    Raises:
        MRopeError: above the top rung, or padding that is not on the right.
    """
    rows, width = located.inputs.shape
    valid_BS = located.stream.valid_BS
    lengths = [width] * rows if valid_BS is None else valid_BS.sum(axis=1).tolist()
    rung = choose_rung("tokens", shapes.tokens, width, lengths)
    if valid_BS is not None and (valid_BS[:, :-1] < valid_BS[:, 1:]).any():
        row = int((valid_BS[:, :-1] < valid_BS[:, 1:]).any(axis=1).argmax())
        raise MRopeError(
            f"row {row}: shapes needs padding on the right, where a causal mask hides it; give the "
            "inner collate function padding_side='right', or packing='flatten'"
        )
    batch.pop("attention_mask", None)
    for name in [one for one, value in batch.items() if is_column(one, value, (rows, width))]:
        column = torch.as_tensor(batch[name])
        wide = column.new_full((rows, rung, *column.shape[2:]), fill_of(name, shapes.pad_token_id))
        wide[:, :width] = column
        batch[name] = wide
    wide_ids = np.zeros((*position_ids.shape[:2], rung), position_ids.dtype)
    wide_ids[:, :, :width] = position_ids
    return {"position_ids": wide_ids, "use_cache": False}


def fixed_vision_tensors(
    vision: VisionSpec,
    located: Located,
    batch: MutableMapping[str, Any],
    shapes: Shapes,
    width: int,
) -> dict[str, Any]:
    """Return the tower's inputs for images and clips together, padded to a rung of patches.

    Takes pixels and grids out of `batch`.

    Args:
        width: tokens of a row of the batch as the model gets it: a rung.

    Returns:
        - `pixel_values` (P, ...): patches of images, then of clips, then zeros.
        - `vision_grid_thw` int64 (F, 3): a row for each frame; `vision_cu_seqlens` int32 (F + 1,),
          `vision_max_seqlen` int, and the tower's other tensors, as `vision_tensors` has them, each
          padded; `vision_block_index` int64 (P,) for towers in raster order.
        - `vision_feature_index` int64 (rows * width,), the feature row that each token takes, and
          `vision_feature_mask` bool (rows, width), which tokens take one. A token that takes none
          has an index too, so that the gradients of unused rows, all zero, are spread out.

    Raises:
        MRopeError: above the top rung; an image or frame longer than `shapes.longest`; more images
            and frames than the rung has borders for.
    """
    grid_N3 = np.concatenate((located.inputs.image_grid_thw, located.inputs.video_grid_thw))
    patches, frames = int(grid_N3.prod(axis=1).sum()), int(grid_N3[:, 0].sum())
    rung = choose_rung(
        "patches",
        shapes.patches,
        patches,
        _patches_of_rows(located),
        # The padding is cut into segments of at most `longest`.
        lambda rung: frames - (patches - rung) // shapes.longest <= shapes.borders(rung),
    )
    parts = take_pixels(batch, patches)
    for name in (*GRIDS, *SECONDS):
        # Their sizes differ from batch to batch, and position ids have taken the seconds up.
        batch.pop(name, None)
    fixed: dict[str, Any] = {"pixel_values": _fill_rung(parts, patches, rung, vision)}
    fixed["vision_grid_thw"] = _frames(grid_N3, vision, shapes.borders(rung))
    tensors: Mapping[str, Any] = vision_tensors(vision, grid_N3)
    padded = _padded(vision, tensors, shapes, rung)
    fixed |= {f"vision_{name}": value for name, value in padded.items()}
    if vision.raster:
        blocks = block_index(grid_N3, vision.spatial_merge_size) if patches else ()
        fixed["vision_block_index"] = _count_on(np.asarray(blocks, np.int64), rung)
    index_T, mask = _feature_index(located, width, rung // vision.spatial_merge_size**2)
    return fixed | {"vision_feature_index": index_T, "vision_feature_mask": mask}


def move_scatter_indices(tensors: dict[str, Any], width: int, rung: int) -> None:
    """Count indices into rows of `width` tokens in rows of `rung` tokens, in place.

    Row 1 of 4 tokens, index 6: its token 2, which has index 10 in rows of 8.
    """
    for name in [one for one in tensors if one.endswith("_scatter_index")]:
        row, column = np.divmod(tensors[name], width)
        tensors[name] = row * rung + column


def _patches_of_rows(located: Located) -> list[int]:
    """Return the patches of each row: its placeholders, times those that share one."""
    spans = located.spans
    assert spans is not None  # `check_shapes` refused the other families
    row_T = located.stream.row_D.repeat(located.stream.length_D)
    tokens_B = np.bincount(row_T[located.kind_T != TEXT], minlength=located.inputs.shape[0])
    patches: list[int] = (tokens_B * spans.grids.merge**2).tolist()
    return patches


def _fill_rung(
    parts: list[torch.Tensor], patches: int, rung: int, vision: VisionSpec
) -> torch.Tensor:
    """Write pixels, (patches, ...) in all, into (rung, ...), with zeros behind them."""
    assert vision.patch_shape is not None  # `check_family` refused it
    shape = parts[0].shape[1:] if parts else vision.patch_shape
    dtypes = [part.dtype for part in parts] or [torch.float32]
    filled = torch.empty((rung, *shape), dtype=reduce(torch.promote_types, dtypes))
    if parts:
        # Pixels are nearly all bytes of a batch: they are copied once, into their rung.
        torch.cat(parts, out=filled[:patches])
    filled[patches:] = 0
    return filled


def _frames(grid_N3: IntArray, vision: VisionSpec, most: int) -> npt.NDArray[np.int64]:
    """Return a grid (1, h, w) for each frame, and grids of one token for the padding."""
    frames_F3 = grid_N3.repeat(grid_N3[:, 0], axis=0)
    if len(frames_F3) > most:
        raise MRopeError(
            f"the batch has {len(frames_F3)} images and frames, but its rung of shapes.patches has "
            f"borders for {most}; give Shapes a smaller patches_per_segment"
        )
    merge = vision.spatial_merge_size
    rows_F3 = np.empty((most, 3), np.int64)
    rows_F3[:] = (1, merge, merge)
    rows_F3[: len(frames_F3), 1:] = frames_F3[:, 1:]
    return rows_F3


def _padded(
    vision: VisionSpec, tensors: Mapping[str, Any], shapes: Shapes, rung: int
) -> dict[str, Any]:
    """Pad the tensors of `vision_tensors`, or make those of a batch without pixels."""
    unit = vision.spatial_merge_size**2
    longest = {"cu_seqlens": shapes.longest}
    if vision.window_side is not None:
        longest["cu_window_seqlens"] = vision.window_side**2 * unit
    padded: dict[str, Any] = {}
    for name in vision.keys:
        value = tensors.get(name)
        if name in longest:
            most = shapes.borders(rung)
            if name != "cu_seqlens":
                most += _CUT_WINDOWS * -(-rung // longest[name])
            padded[name] = _pad_borders(name, value, longest[name], most, rung)
        elif name in ("max_seqlen", "max_window_seqlen"):
            padded[name] = longest[f"cu_{name.removeprefix('max_')}s"]
        elif name == "window_index":
            index = np.empty(0, np.int64) if value is None else value
            padded[name] = _count_on(index, rung // unit)
        else:
            padded[name] = _pad_rows(name, value, rung)
    return padded


def _pad_borders(
    name: str, borders: npt.NDArray[np.int32] | None, longest: int, most: int, rung: int
) -> npt.NDArray[np.int32]:
    """Cover the padding with segments of at most `longest`, and add empty ones up to `most`.

    borders 0 8 12, longest 8, most 6, rung 32:  0 8 12 20 28 32 32
    """
    real = np.zeros(1, np.int32) if borders is None else borders
    widest = int(np.diff(real).max(initial=0))
    if widest > longest:
        raise MRopeError(
            f"an image or frame of {widest} patches is longer than shapes.longest={longest}"
        )
    covering = np.arange(int(real[-1]) + longest, rung + longest, longest).clip(max=rung)
    covering = covering if real[-1] < rung else covering[:0]
    used = len(real) - 1 + len(covering)
    if used > most:
        raise MRopeError(
            f"the batch has {len(real) - 1} segments in {name}, but its rung of shapes.patches has "
            f"borders for {most - len(covering)}; give Shapes a smaller patches_per_segment"
        )
    filled: npt.NDArray[np.int32] = np.full(most + 1, rung, np.int32)
    filled[: len(real)] = real
    filled[len(real) : used + 1] = covering
    return filled


def _pad_rows(name: str, value: npt.NDArray[Any] | None, rung: int) -> npt.NDArray[Any]:
    width = {"position_ids": 2}.get(name, 4)
    dtype = np.float32 if name == "interp_weights" else np.int64
    rows = np.zeros((rung, width), dtype)
    if value is not None:
        rows[: len(value)] = value
    return rows


def _count_on(index: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
    """Continue a permutation by the identity: 1 0 up to 4 gives 1 0 2 3."""
    whole = np.arange(length)
    whole[: len(index)] = index
    return whole


def _feature_index(
    located: Located, width: int, features: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the feature row of each token, (rows * width,), and which tokens have one."""
    flattened = located.inputs.seq_lengths is not None
    rows = 1 if flattened else located.inputs.shape[0]
    place_T = np.arange(len(located.kind_T))
    if not flattened and located.stream.valid_BS is not None:
        place_T = np.flatnonzero(located.stream.valid_BS)
    if not flattened:
        row_T, column_T = np.divmod(place_T, located.inputs.shape[1])
        place_T = row_T * width + column_T
    index = np.arange(rows * width) % features
    mask = np.zeros(rows * width, np.bool_)
    # Rows of features: all images of the batch in order, then all clips.
    first = 0
    for of_kind_T in (located.kind_T == IMAGE, located.kind_T > IMAGE):
        place = place_T[of_kind_T]
        index[place] = np.arange(first, first + len(place))
        mask[place] = True
        first += len(place)
    return index, mask.reshape(rows, width)

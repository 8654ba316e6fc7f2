"""Images and clips in one call of the tower, padded to a rung, so that one graph serves all sizes.

Every tensor of the batch is padded up to the next rung: tokens, patches, and the borders of
segments. Padding belongs to segments of its own, that no real token or patch attends to, and its
features are gathered by no token, so that it reaches neither loss nor gradients. Images and clips
share one call of the tower, and a batch of text alone has a rung of padding patches: each rank then
runs its tower in every step, as FSDP and ZeRO-3 need.

Shape suffixes: N images and clips, P patches, M merged tokens of the tower, G borders of segments,
F frames.
"""

from __future__ import annotations

from functools import reduce

import numpy as np
import numpy.typing as npt
import torch

from mrope.arrays import Array, IntArray
from mrope.collate.ladder import Shapes, choose_rung
from mrope.collate.packing import refuse_placeholder
from mrope.collate.pixels import take_pixels
from mrope.collate.placement import Placement
from mrope.columns import Batch, Columns, NewColumns, columns, tower_key
from mrope.errors import MRopeError
from mrope.positions.located import Located
from mrope.positions.stream import IMAGE, TEXT
from mrope.spec.spec import MRopeSpec
from mrope.towers import PRODUCTS, VisionSpec, products_of, tower_tensors

# Their sizes differ from batch to batch; position ids have taken up what they say.
_TAKEN_UP = (*columns("item", means="size"), *columns("item", means="seconds"))

# A frame whose sides are no multiples of a window's has smaller windows at two of its edges, and so
# more windows than its patches would fill: with released sides of 4 tokens at most so many times
# as many, and one.
_CUT_WINDOWS = 4
_PERMUTATIONS = ("window_index", "block_index")


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
    if not all(PRODUCTS[tensor].fixed for tensor in vision.with_fixed_shapes.tower.tensors):
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
        MRopeError: a family that takes audio or crops.
    """
    row = spec.family_row
    if row.custom_index is not None and not row.one_dimensional:
        raise MRopeError(f"shapes is not supported for {spec.family}: audio and crops vary in size")


def one_tower_call(
    vision: VisionSpec,
    located: Located,
    batch: Batch,
    shapes: Shapes,
    placement: Placement,
) -> NewColumns:
    """Return the tower's inputs for images and clips together, padded to a rung of patches.

    Takes pixels and grids out of `batch`.

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
    vision, media = vision.with_fixed_shapes, located.inputs.media
    grid_N3 = np.concatenate((media["image"].size_N3, media["video"].size_N3))
    patches, frames = int(grid_N3.prod(axis=1).sum()), int(grid_N3[:, 0].sum())
    rung = choose_rung(
        "patches",
        shapes.patches,
        patches,
        _patches_of_rows(located, vision.spatial_merge_size),
        # The padding is cut into segments of at most `longest`.
        lambda rung: frames - (patches - rung) // shapes.longest <= shapes.borders(rung),
    )
    if grid_N3[:, 1:].prod(axis=1).max(initial=0) > shapes.longest:
        raise MRopeError(_describe_long(located, shapes.longest, vision.spatial_merge_size))
    parts = take_pixels(batch, patches)
    for name in _TAKEN_UP:
        batch.pop(name, None)
    tensors: NewColumns = {"grid_thw": _frames(grid_N3, vision, shapes.borders(rung), rung)}
    tensors |= _padded(vision, tower_tensors(vision, grid_N3), shapes, rung)
    index, mask = _feature_index(located, placement, rung // vision.spatial_merge_size**2)
    tensors |= {"feature_index": index, "feature_mask": mask}
    fixed = {tower_key("vision", name): value for name, value in tensors.items()}
    return fixed | {"pixel_values": _fill_rung(parts, patches, rung, vision), "has_padding": False}


def _patches_of_rows(located: Located, merge: int) -> list[int]:
    """Return the patches of each row: its placeholders, times those that share one."""
    row_T = located.stream.row_D.repeat(located.stream.length_D)
    tokens_B = np.bincount(row_T[located.kind_T != TEXT], minlength=located.inputs.shape[0])
    patches: list[int] = (tokens_B * merge**2).tolist()
    return patches


def _describe_long(located: Located, longest: int, merge: int) -> str:
    row_T = located.stream.row_D.repeat(located.stream.length_D)
    # The rows of all merged tokens, in the order of the grids: images, then clips.
    row_M = np.concatenate((row_T[located.kind_T == IMAGE], row_T[located.kind_T > IMAGE]))
    grid_N3 = np.concatenate([located.inputs.media[name].size_N3 for name in ("image", "video")])
    patch_N = grid_N3[:, 1:].prod(axis=1)
    widest, item = int(patch_N.max()), int(patch_N.argmax())
    row = row_M[grid_N3[:item].prod(axis=1).sum() // merge**2]
    return (
        f"row {row}: an image or frame of {widest} patches is longer than shapes.longest={longest};"
        f" give Shapes longest={widest} or more, or the processor a smaller max_pixels"
    )


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


def _frames(grid_N3: IntArray, vision: VisionSpec, most: int, rung: int) -> npt.NDArray[np.int64]:
    """Return a grid (1, h, w) for each frame, and grids of one token for the padding."""
    frames_F3 = grid_N3.repeat(grid_N3[:, 0], axis=0)
    if len(frames_F3) > most:
        raise MRopeError(
            f"the batch has {len(frames_F3)} images and frames, but its rung of shapes.patches has "
            f"borders for {most}; give Shapes a smaller patches_per_segment, "
            f"{rung // len(frames_F3)} or less"
        )
    merge = vision.spatial_merge_size
    rows_F3 = np.empty((most, 3), np.int64)
    rows_F3[:] = (1, merge, merge)
    rows_F3[: len(frames_F3), 1:] = frames_F3[:, 1:]
    return rows_F3


def _padded(vision: VisionSpec, tensors: Columns, shapes: Shapes, rung: int) -> NewColumns:
    """Pad the tensors of `vision_tensors`, or make those of a batch without pixels."""
    unit = vision.spatial_merge_size**2
    longest = {"cu_seqlens": shapes.longest}
    if vision.window_side is not None:
        longest["cu_window_seqlens"] = vision.window_side**2 * unit
    padded: NewColumns = {}
    for name in (key for product in products_of(vision) for key in product.keys):
        value = tensors.get(name)
        if name in longest:
            most = shapes.borders(rung)
            if name != "cu_seqlens":
                most += _CUT_WINDOWS * -(-rung // longest[name])
            padded[name] = _pad_borders(name, value, longest[name], most, rung)
        elif name in ("max_seqlen", "max_window_seqlen"):
            padded[name] = longest[f"cu_{name.removeprefix('max_')}s"]
        elif name in _PERMUTATIONS:
            index = np.empty(0, np.int64) if value is None else value
            padded[name] = _count_on(index, rung // unit if name == "window_index" else rung)
        else:
            padded[name] = _pad_rows(vision, name, value, rung)
    return padded


def _pad_borders(
    name: str, borders: npt.NDArray[np.int32] | None, longest: int, most: int, rung: int
) -> npt.NDArray[np.int32]:
    """Cover the padding with segments of at most `longest`, and add empty ones up to `most`.

    borders 0 8 12, longest 8, most 6, rung 32:  0 8 12 20 28 32 32
    """
    real = np.zeros(1, np.int32) if borders is None else borders
    covering = np.arange(int(real[-1]) + longest, rung + longest, longest).clip(max=rung)
    covering = covering if real[-1] < rung else covering[:0]
    used = len(real) - 1 + len(covering)
    if used > most:
        raise MRopeError(
            f"the batch has {len(real) - 1} segments in {name}, but its rung of shapes.patches has "
            f"borders for {most - len(covering)}; give Shapes a smaller patches_per_segment, "
            f"{rung // (len(real) - 1)} or less"
        )
    filled: npt.NDArray[np.int32] = np.full(most + 1, rung, np.int32)
    filled[: len(real)] = real
    filled[len(real) : used + 1] = covering
    return filled


def _pad_rows(vision: VisionSpec, name: str, value: Array | None, rung: int) -> Array:
    widths = {"position_ids": 2, "neighbour_offsets": (vision.convolution_side or 0) ** 2}
    dtypes = {"interp_weights": np.float32, "neighbour_offsets": np.int32}
    rows = np.zeros((rung, widths.get(name, 4)), dtypes.get(name, np.int64))
    if value is not None:
        rows[: len(value)] = value
    return rows


def _count_on(index: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
    """Continue a permutation by the identity: 1 0 up to 4 gives 1 0 2 3."""
    whole = np.arange(length)
    whole[: len(index)] = index
    return whole


def _feature_index(
    located: Located, placement: Placement, features: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the feature row of each token, (rows * width,), and which tokens have one."""
    size = placement.rows * placement.width
    index, mask = np.arange(size) % features, np.zeros(size, np.bool_)
    # Rows of features: all images of the batch in order, then all clips.
    first = 0
    for of_kind_T in (located.kind_T == IMAGE, located.kind_T > IMAGE):
        place = placement.places(of_kind_T)
        index[place] = np.arange(first, first + len(place))
        mask[place] = True
        first += len(place)
    return index, mask.reshape(placement.rows, placement.width)

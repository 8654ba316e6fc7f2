"""Run a tower on the pixels or the sound of a batch, with all that the stage computed for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mrope.columns import NewColumns
from mrope.hf.attention import module_of_forward, tower_borders
from mrope.hf.inputs import (
    PIXELS,
    SOUND,
    Tensors,
    asked_of_towers,
    take_added,
    take_sizes,
    token_embeddings,
)
from mrope.hf.outputs import Encoded
from mrope.hf.scatter import Gather, Places, scatter_features

if TYPE_CHECKING:
    from mrope.hf.rows import Row

# Where base models hold their vision tower.
VISION_TOWERS = ("visual", "vision_tower", "vision_model")

# Keywords of a tower with borders: the borders, their longest segment, and the lengths on the host.
_BORDERS = (
    ("cu_seqlens", "max_seqlen", "split_sizes"),
    ("cu_window_seqlens", "max_window_seqlen", "window_split_sizes"),
)
_VISION = (
    *(name for borders in _BORDERS for name in borders[:2]),
    "position_ids",
    "window_index",
    "interp_indices",
    "interp_weights",
    "neighbour_offsets",
)
_AUDIO = ("padded_feature", "chunk_lengths", "valid_indices", "pool_indices", "max_seqlen")
# Patches that a window of MiniCPM-V's tower merges.
_WINDOW = 4


class Call(NamedTuple):
    """A call of a vision tower.

    Attributes:
        pixels: (P, ...).
        keywords: of the tower.
        places: where the features go.
        taken: what else the stage added for the modality, by name.
        items: number of images or clips.
    """

    pixels: torch.Tensor
    keywords: NewColumns
    places: Places
    taken: NewColumns
    items: int


def vision_tower(self: object) -> Any:
    """Return the vision tower of a base model."""
    return getattr(self, next(name for name in VISION_TOWERS if hasattr(self, name)))


def encode(self: object, row: Row, modality: str, inputs: Tensors) -> tuple[Places, Encoded]:
    """Run the vision tower on a modality's pixels.

    Removes from `inputs` what it uses.

    Returns:
        Where the features go, and the tower's output.
    """
    call = _take_call(self, row, modality, inputs)
    output = vision_tower(self)(call.pixels, return_dict=True, **call.keywords)
    output.pooler_output = row.features(self, output, call.taken)
    return call.places, Encoded(output, _counts(self, row, output, call.taken, call.items))


def _counts(self: Any, row: Row, output: Any, taken: NewColumns, items: int) -> list[int] | None:
    """Return how many features each image or clip has; None where the host cannot tell."""
    segments = taken.get("split_sizes", ())
    sizes = taken.get("grid_sizes")
    if sizes is None and len(segments) == items:  # each of them is one frame
        sizes = [[1, 1, length] for length in segments]
    if sizes is None:
        return None
    total = len(output.pooler_output)
    counts = row.counts(self, sizes, total)
    return counts if sum(counts) == total else None


def _take_call(self: object, row: Row, modality: str, inputs: Tensors) -> Call:
    """Remove a modality from `inputs`, and return the tower's call."""
    tower = vision_tower(self)
    pixels = inputs.pop(PIXELS[modality]).type(tower.dtype)
    taken = take_added(inputs, modality)
    if modality == "vision":
        grid_thw = taken.pop("grid_thw")
        places: Places = Gather(taken.pop("feature_index"), inputs.pop("vision_feature_mask"))
    else:
        grid_thw, places = take_sizes(inputs, modality), taken.pop("scatter_index")
    keywords = {name: taken.pop(name) for name in _VISION if name in taken}
    keywords["grid_thw"] = _grids(row, grid_thw, keywords["cu_seqlens"], taken)
    if "merge_size" in taken:
        keywords["merge_sizes"] = torch.full((len(grid_thw),), taken.pop("merge_size"))
    for name, longest, lengths in _BORDERS:
        if name in keywords:
            cu_seqlens = keywords[name]
            borders = tower_borders(
                tower, pixels, cu_seqlens, keywords[longest], taken.get(lengths)
            )
            keywords[name] = given_borders(cu_seqlens, borders, row.reads_borders)
    keywords |= asked_of_towers(inputs) if row.passes_on else {}
    _name_as_read(tower, keywords)
    pixels = pixels[None] if row.batched else pixels
    return Call(pixels, keywords, places, taken, len(grid_thw))


def _name_as_read(tower: object, keywords: NewColumns) -> None:
    """Rename the interpolation for towers up to 5.14, which take a row for each corner."""
    if "interp_indices" in keywords and _reads_corners(type(tower)):
        for name in ("indices", "weights"):
            keywords[f"bilinear_{name}"] = keywords.pop(f"interp_{name}").t()


# A constant under torch.compile, which takes no module of Python's from such a function; before
# torch 2.12 it gives none of a model's modules to one either.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _reads_corners(tower: type) -> bool:
    return hasattr(module_of_forward(tower), "get_vision_bilinear_indices_and_weights")


def given_borders(cu_seqlens: torch.Tensor, borders: object, reads: bool) -> Any:
    """Return what a tower takes as `cu_seqlens`, through which its layers get the borders.

    Most towers pass it to their attention unread, so that `Borders` can take the tensor's place.

    Args:
        cu_seqlens: the tensor.
        borders: `Borders`, or None where it must be the tensor alone.
        reads: the tower computes with the tensor, which then carries the borders as an attribute.
    """
    if borders is None:
        return cu_seqlens
    if not reads:
        return borders
    cu_seqlens.mrope_borders = borders  # type: ignore[attr-defined]
    return cu_seqlens


def _grids(
    row: Row, grid_thw: torch.Tensor, cu_seqlens: torch.Tensor, taken: NewColumns
) -> torch.Tensor:
    """Return the grids as the tower takes them, int64 (images, 3), or (frames, 3)."""
    if row.grids == "host":
        # The tower asks its grids for values, which is no sync then. With fixed shapes there are
        # none, and its layers take other tensors.
        sizes = taken.get("grid_sizes", [])
        return torch.tensor(sizes, dtype=torch.int64).view(len(sizes), 3)
    frames = len(cu_seqlens) - 1
    if row.grids == "device" or frames == len(grid_thw):
        return grid_thw
    # Without `output_size`, repeat_interleave syncs to learn the length of its result.
    rows = torch.repeat_interleave(grid_thw, grid_thw[:, 0], dim=0, output_size=frames)
    return torch.cat((torch.ones_like(rows[:, :1]), rows[:, 1:]), dim=1)


def encode_crops(self: Any, row: Row, modality: str, inputs: Tensors) -> tuple[Places, Encoded]:
    """Run MiniCPM-V's tower on all crops of one modality, and merge what it returns by one index.

    The model's own forward passes no keywords on to its tower, which then asks the sizes of the
    crops for their values: for the learned positions, the windows, every attention layer and the
    last merger.
    """
    tower = vision_tower(self)
    mode = inputs.get("downsample_mode") or self.config.downsample_mode
    # Its own forward takes the first of the batch too: the processor makes one row of patches.
    pixels = inputs.pop(PIXELS[modality])[:1].to(tower.dtype)
    sizes, taken = take_sizes(inputs, modality), take_added(inputs, modality)
    names = ("position_ids", "max_seqlen", "window_index", "cu_window_seqlens")
    known = {name: taken[name] for name in names if name in taken}
    known |= _crop_borders(tower, pixels, taken)
    output = tower(
        pixels, target_sizes=sizes, use_vit_merger=mode != "4x", return_dict=True, **known
    )
    output.pooler_output = row.features(self, output, taken)
    counts = _counts(self, row, output, taken, len(sizes))
    return taken["scatter_index"], Encoded(output, counts, parts=list)


def _crop_borders(tower: object, pixels: torch.Tensor, taken: NewColumns) -> NewColumns:
    """Return the borders of crops and windows, as the layers of an attached tower take them.

    The tower computes the crops' own before and after it merges windows, and passes a keyword on
    to both; under flash attention it needs none.
    """
    crops, lengths, longest = (taken[name] for name in ("cu_seqlens", "split_sizes", "max_seqlen"))
    whole = tower_borders(tower, pixels, crops, longest, lengths)
    if whole is None:
        return {}
    by_places: dict[int, Any] = {sum(lengths): whole}
    windows = taken.get("cu_window_seqlens")
    if windows is not None:
        merged = [length // _WINDOW for length in lengths]
        by_places[sum(merged)] = tower_borders(
            tower, pixels, crops // _WINDOW, longest // _WINDOW, merged
        )
        windows.mrope_borders = tower_borders(
            tower, pixels, windows, taken["max_window_seqlen"], taken["window_split_sizes"]
        )
    crops.mrope_borders = by_places
    return {"cu_seqlens": crops}


def encode_codes(self: Any, inputs: Tensors) -> dict[str, Encoded]:
    """Turn GLM-Image's images into token ids, which replace their placeholders.

    The codebook takes the images one by one, by sizes on the host.
    """
    # What its own forward reads to tell the images with pixels from those to be drawn.
    if inputs.get(PIXELS["image"]) is None:
        return {}
    tower = vision_tower(self)
    pixels, taken = inputs.pop(PIXELS["image"]).type(tower.dtype), take_added(inputs, "image")
    known = {name: taken[name] for name in _VISION if name in taken}
    known |= asked_of_towers(inputs)
    cu_seqlens = known["cu_seqlens"]
    borders = tower_borders(tower, pixels, cu_seqlens, known["max_seqlen"], taken["split_sizes"])
    known["cu_seqlens"] = given_borders(cu_seqlens, borders, reads=True)
    output = tower(pixels, grid_thw=taken["source_grids"], return_dict=True, **known)
    sizes = taken["grid_sizes"]
    # The tower of releases before 5.15 returns what comes out of its layers alone.
    features = output.last_hidden_state if output.pooler_output is None else output.pooler_output
    patches = torch.split(features, [t * h * w for t, h, w in sizes])
    # (frames * hidden, height, width) of each image, as the codebook takes them.
    output.pooler_output = [
        one.view(*size, -1).permute(0, 3, 1, 2).flatten(0, 1).contiguous()
        for one, size in zip(patches, sizes, strict=True)
    ]
    output.image_tokens = [
        self.vqmodel.encode(one[None]).image_tokens for one in output.pooler_output
    ]
    ids = inputs["input_ids"]
    tokens = torch.cat(output.image_tokens).to(ids.dtype)
    inputs["input_ids"] = ids.flatten().index_copy(0, taken["scatter_index"], tokens).view_as(ids)
    return {"image": Encoded(output)}


def encode_audio(self: Any, inputs: Tensors) -> dict[str, Encoded]:
    """Replace the placeholders of audio of an Omni thinker by its features.

    The audio tower of transformers 5.23 picks frames by a boolean mask, counts tokens on the
    device, and reads its borders back in every layer. Here it takes chunks that the worker cut, and
    segment lengths that are host ints.
    """
    if inputs.get(SOUND) is None:
        return {}
    taken = take_added(inputs, "audio")
    known: NewColumns = {name: taken[name] for name in _AUDIO if name in taken}
    cu_seqlens, lengths = taken["cu_seqlens"], taken["split_sizes"]
    patches, longest = known["padded_feature"], known["max_seqlen"]
    borders = tower_borders(self.audio_tower, patches, cu_seqlens, longest, lengths)
    known["cu_seqlens"] = cu_seqlens if borders is None else borders
    features: torch.Tensor = self.audio_tower(return_dict=True, **known).last_hidden_state
    embeds = token_embeddings(self, inputs)
    inputs["inputs_embeds"] = scatter_features(embeds, taken["scatter_index"], features)
    return {}

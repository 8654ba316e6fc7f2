"""Map the tokens that an engine takes to those that a trainer takes, and back.

An engine such as vLLM takes one placeholder for each image, or frame that stands apart, and repeats
it itself. Log-probabilities, masks and rewards have an entry for each token of one of the two.

Shape suffixes: C compact tokens, E expanded ones, G images, clips, frames or audios.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from mrope.arrays import IntArray, as_integers
from mrope.columns import NewColumns
from mrope.errors import MRopeError
from mrope.positions.grids import to_grids
from mrope.positions.inputs import check_inputs
from mrope.positions.spans import token_kinds
from mrope.positions.stream import IMAGE, VIDEO, to_stream
from mrope.spec.spec import MRopeSpec
from mrope.towers import AudioSpec, audio_tokens

_AUDIO = VIDEO + 1
_NAMES = {IMAGE: "image", VIDEO: "video", _AUDIO: "audio"}


class TokenMap(NamedTuple):
    """How many tokens of a trainer's row each token of an engine's row stands for.

    Attributes:
        count_C: 1 for text, and for a placeholder the tokens of its image, clip, frame or audio.
    """

    count_C: IntArray

    @classmethod
    def of_compact(cls, spec: MRopeSpec, input_ids: object, **sizes: object) -> TokenMap:
        """Read the map off a row with one placeholder for each image.

        Args:
            spec: of the model.
            input_ids: (C,) tokens of one row.
            sizes: `image_grid_thw`, `video_grid_thw`, `audio_seqlens`, as `rope_index` takes them.

        Raises:
            MRopeError: another number of placeholders than sizes; audio inside of clips, or a
                family whose tokens are laid out by a rule of their own.

        Example:
            >>> from mrope.spec.spec import example_config
            >>> spec = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
            >>> tokens = TokenMap.of_compact(spec, [7, 102, 8], image_grid_thw=[[1, 4, 4]])
            >>> tokens.expand([7, 102, 8]).tolist()
            [7, 102, 102, 102, 102, 8]
            >>> tokens.expand([0.5, 0.0, 0.25], fill=0.0).tolist()
            [0.5, 0.0, 0.0, 0.0, 0.0, 0.25]
        """
        ids_C, kind_C, needed = _read(spec, input_ids, sizes)
        count_C = np.ones(len(ids_C), np.int64)
        for kind, needed_G in needed.items():
            found = int(np.count_nonzero(kind_C == kind))
            if found != len(needed_G):
                raise MRopeError(
                    f"{found} {_NAMES[kind]} placeholders, but {len(needed_G)} sizes: a compact "
                    "row has one for each image, clip, frame that stands apart, or audio"
                )
            count_C[kind_C == kind] = needed_G
        return cls(count_C)

    @classmethod
    def of_expanded(cls, spec: MRopeSpec, input_ids: object, **sizes: object) -> TokenMap:
        """Read the map off a row with as many placeholders as the model has features, (E,).

        Arguments and errors are those of `of_compact`.
        """
        ids_E, kind_E, needed = _read(spec, input_ids, sizes)
        count_E = np.ones(len(ids_E), np.int64)
        for kind, needed_G in needed.items():
            place = (kind_E == kind).nonzero()[0]
            first_G = needed_G.cumsum() - needed_G
            if (
                len(place) != needed_G.sum()
                or (place[first_G + needed_G - 1] - place[first_G] >= needed_G).any()
            ):
                raise MRopeError(
                    f"{len(place)} {_NAMES[kind]} placeholders do not stand together as sizes of "
                    f"{needed_G.tolist()} tokens ask"
                )
            count_E[place] = 0
            count_E[place[first_G]] = needed_G
        return cls(count_E[count_E > 0])

    def expand(self, values: object, fill: object = None) -> Any:
        """Return values of compact tokens, (C, ...), for the expanded ones, (E, ...).

        Args:
            values: array or tensor.
            fill: of an image's tokens behind its first; None: all have its value.
        """
        index_E = np.arange(len(self.count_C)).repeat(self.count_C)
        expanded = _pick(values, len(self.count_C), index_E)
        if fill is not None:
            behind_E = np.diff(index_E, prepend=-1) == 0
            expanded[_like(expanded, behind_E)] = fill
        return expanded

    def compact(self, values: object) -> Any:
        """Return values of expanded tokens, (E, ...), for the compact ones: an image's first."""
        return _pick(values, int(self.count_C.sum()), self.count_C.cumsum() - self.count_C)


def _pick(values: object, length: int, index: IntArray) -> Any:
    values = values if isinstance(values, torch.Tensor) else np.asarray(values)
    if len(values) != length:
        raise MRopeError(f"{len(values)} values, but the row has {length} tokens")
    return values[_like(values, index)]


def _like(values: object, index: object) -> Any:
    return torch.from_numpy(index) if isinstance(values, torch.Tensor) else index


def _read(
    spec: MRopeSpec, input_ids: Any, sizes: NewColumns
) -> tuple[IntArray, IntArray, dict[int, IntArray]]:
    """Return a row's tokens, the kind of each, and how many each image, clip and audio needs."""
    row = spec.family_row
    by_audio = "audio_seqlens" in row.inputs
    own_layout = row.custom_index is not None and not by_audio and row.source is None
    if own_layout or np.any(sizes.get("use_audio_in_video", False)):
        raise MRopeError(
            f"{spec.family}: a placeholder of an engine cannot be mapped where tokens are laid out "
            "by a rule of their own, or audio stands inside of clips"
        )
    ids = as_integers("input_ids", input_ids, "token ids of one row")
    inputs = check_inputs(spec, {"input_ids": ids[None], **sizes})
    grids = to_grids(spec, inputs)
    kinds = token_kinds(spec, to_stream(inputs.input_ids, None))
    needed_G = grids.size_3G.prod(axis=0)
    needed: dict[int, IntArray] = {IMAGE: needed_G[: grids.images], VIDEO: needed_G[grids.images :]}
    if by_audio:
        kinds[ids == spec.extra["audio_token_id"]] = _AUDIO
        window = spec.extra.get("n_window")
        tower = AudioSpec(int(window or 1), None if window is None else 1)
        needed[_AUDIO] = audio_tokens(tower, inputs.media["audio"].size_N3[:, 0])
    return ids, kinds, needed

"""VideoLLaMA 3: tokens are counted over the batch, and numbered in 1-D.

Its processors merge images and videos by sizes of their own, which stand in the batch and not in
the config, and leave out the tokens of a video that hardly differ from those of the frame before:
what a frame's grid needs is known only for the whole batch.

Source: `VideoLlama3Model.forward`, and its processors, transformers 5.24.

Shape suffixes: T tokens of the stream, D documents, N grids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mrope.errors import MRopeError, SpanMismatchError
from mrope.positions.inputs import Media
from mrope.positions.located import Located
from mrope.positions.stream import IMAGE, VIDEO
from mrope.spec.spec import MRopeSpec

Array = npt.NDArray[Any]

_CAUSE = "truncation, or sizes or a mask of another batch"


def number_counted(_spec: MRopeSpec, located: Located) -> tuple[Array, Array]:
    """Number the tokens of each document 0, 1, 2 ..., once they are as many as their features.

    Args:
        located: the batch; its media have one merge size each, and clips may say which of their
            features are kept.

    Returns:
        Positions (1, T) and ends (D,), int64.

    Raises:
        SpanMismatchError: more or fewer placeholders than features.
        MRopeError: merge sizes that do not divide a grid.
    """
    for modality, kind in (("image", IMAGE), ("video", VIDEO)):
        found = int(np.count_nonzero(located.kind_T == kind))
        needed = _features(located.inputs.media[modality])
        if found != needed:
            raise SpanMismatchError(
                f"the batch, row unknown: {found} {modality} tokens, but its grids need {needed}. "
                f"Likely cause: {_CAUSE}.",
                modality=modality,
                found=found,
                needed=needed,
                cause=_CAUSE,
            )
    stream = located.stream
    own_T = np.arange(len(located.kind_T)) - stream.start_D.repeat(stream.length_D)
    return own_T[None], stream.length_D


def _features(media: Media) -> int:
    grid_N3, merge = media.size_N3, media.merge
    if (grid_N3 < 1).any() or (grid_N3[:, 1:] % merge).any():
        raise MRopeError(
            f"{media.name}: sizes must be at least 1, height and width multiples of the merge "
            f"size, {merge}"
        )
    features = int(grid_N3.prod(axis=1).sum()) // merge**2
    if media.kept is None:
        return features
    if media.kept.shape != (features,):
        raise MRopeError(
            f"video_compression_mask has shape {media.kept.shape}, but the grids have {features} "
            "tokens"
        )
    return int(np.count_nonzero(media.kept))

"""What is known of a checked batch: its stream, the kind of each token, and every span's grid.

Shape suffixes: T tokens of the stream, R runs, R1 their borders, D1 borders of documents, G grids.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.arrays import BoolArray, IntArray
from mrope.positions.grids import Grids
from mrope.positions.inputs import BatchInputs
from mrope.positions.seconds import Steps
from mrope.positions.stream import Stream


class Runs(NamedTuple):
    """A stream cut into runs, each either text or one vision span; they cover every token.

    Attributes:
        border_R1: where each run starts in the stream, and T at the end.
        length_R: its tokens.
        first_D1: the first run of each document, and R at the end.
        vision_G: the run of each grid, in the order of `Grids.size_3G`.
        text_T: True where a token is text.
    """

    border_R1: IntArray
    length_R: IntArray
    first_D1: IntArray
    vision_G: IntArray
    text_T: BoolArray


class Spans(NamedTuple):
    """The vision spans of a batch.

    Attributes:
        grids: the size of each span, in the order of the batch's grids (G).
        runs: the stream cut into text runs and spans.
        step_G: temporal step of each span; None: 1 everywhere.
    """

    grids: Grids
    runs: Runs
    step_G: Steps | None


class Located(NamedTuple):
    """A batch that was checked, without padding, in which every span has its place.

    Attributes:
        inputs: the batch as it was given.
        stream: its valid tokens.
        kind_T: TEXT, IMAGE or VIDEO for each token of the stream.
        spans: None in families whose custom index finds its spans itself.
    """

    inputs: BatchInputs
    stream: Stream
    kind_T: npt.NDArray[np.uint8]
    spans: Spans | None

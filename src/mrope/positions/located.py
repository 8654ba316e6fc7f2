"""What is known of a checked batch: its stream, the kind of each token, and every span's grid."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.positions.grids import Grids
from mrope.positions.inputs import BatchInputs
from mrope.positions.seconds import Steps
from mrope.positions.spans import Runs
from mrope.positions.stream import Stream


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

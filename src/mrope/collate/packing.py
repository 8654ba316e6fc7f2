"""Padding-free batches: all examples of a batch in one row, with their borders and no padding.

Attention must not look over a border, and how a model learns of borders depends on its attention:
transformers' masks are cut where the text row of `position_ids` restarts (if there is no 2-D mask
and no cache), flash attention and linear attention read `cu_seq_lens_q`, the convolution in front
of linear attention reads `seq_idx`. A flattened batch carries all of them.

Shape suffixes: B rows and S width of the padded batch, T tokens of the one row, D examples, A axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from mrope.arrays import Array, IntArray, within
from mrope.collate.ladder import Shapes, choose_rung
from mrope.collate.linear_columns import linear_columns
from mrope.collate.placement import Placement, token_columns
from mrope.columns import IGNORED_LABEL, Batch, NewColumns, fill_of
from mrope.errors import MRopeError
from mrope.positions.located import Located
from mrope.spec.references import (
    borders_reach_the_tower,
    describe_known,
    installed_transformers,
    is_flattened,
    prove_if_unknown,
)
from mrope.spec.spec import MRopeSpec


@dataclass(frozen=True)
class Flatten:
    """Options of padding-free batches: `MRopeCollator(packing=Flatten(...))`.

    Plain data: it pickles, and `packing="flatten"` is short for `Flatten()`.

    Args:
        pad_to_multiple_of: the row is filled up to a multiple of this, by a segment of its own.
        pad_token_id: token id of that segment.
        attached: the batches go to attached models alone. To be said for a family whose unmodified
            model would mix examples (`Family.leaks`); and with transformers before 5.23, whose
            unmodified models let patches attend within the text's borders under flash attention.

    Raises:
        ValueError: `pad_to_multiple_of` is below 1.
    """

    pad_to_multiple_of: int = 1
    pad_token_id: int = 0
    attached: bool = False

    def __post_init__(self) -> None:
        if self.pad_to_multiple_of < 1:
            raise ValueError(
                f"pad_to_multiple_of must be at least 1, not {self.pad_to_multiple_of}"
            )


def check_packing(spec: MRopeSpec, options: Flatten) -> None:
    """Refuse a model whose examples would attend to each other in one row.

    Raises:
        MRopeError: the family's modelling code was not compared, or the installed release of
            transformers lets examples attend to each other.
        ValueError: the token id of padding is a placeholder.
    """
    refuse_placeholder(spec, options.pad_token_id)
    if not spec.family_row.packs:
        raise MRopeError(
            f"packing='flatten' is refused for {spec.family}: nobody has compared what its "
            "examples see of each other in one row"
        )
    if spec.family_row.leaks and not options.attached:
        raise MRopeError(
            f"packing='flatten' is refused for an unmodified {spec.family}, whose layers look over "
            "the borders of examples; attach the model and say attached=True, or pad"
        )
    version = installed_transformers() or spec.reference.removeprefix("transformers-")
    if not is_flattened(spec.family, version):
        raise MRopeError(
            f"packing='flatten' is refused for {spec.family} with transformers {version}, whose "
            f"gradients are NaN; install {describe_known('flatten')}, or pad"
        )
    if borders_reach_the_tower(version) and not options.attached:
        raise MRopeError(
            f"packing='flatten' is refused with transformers {version}: under flash attention the "
            "vision tower of an unmodified model would take the borders of the text; attach the "
            f"model and say attached=True, install {describe_known('flatten')}, or pad"
        )
    prove_if_unknown("flatten", spec)


def refuse_placeholder(spec: MRopeSpec, pad_token_id: int) -> None:
    """Refuse padding that would be taken for a token of an image or video.

    Raises:
        ValueError: the token id is a placeholder.
    """
    if pad_token_id in (spec.image_token_id, spec.video_token_id):
        raise ValueError(f"pad_token_id {pad_token_id} is a placeholder of images or videos")


@dataclass(frozen=True)
class OneRow:
    """All examples in one row without padding, or with padding up to a rung behind them.

    Attributes:
        options: see `Flatten`.
        shapes: the ladder; None: the row is as long as its tokens, and up to a multiple.
        linear: add what layers of linear attention read.
    """

    options: Flatten
    shapes: Shapes | None = None
    linear: bool = False

    # Rows may hold several examples, which are kept apart.
    apart: ClassVar[bool] = True

    @property
    def has_deltas(self) -> bool:
        """Whether `rope_deltas` are added: one for each example, whose number has no fixed shape.

        Decoding, which would need them, takes no flattened rows.
        """
        return self.shapes is None

    def place(self, located: Located) -> Placement:
        """Return where tokens stand: one after another.

        Raises:
            MRopeError: no valid token at all; above the top rung.
        """
        stream = located.stream
        tokens, examples = len(stream.tokens_T), len(stream.row_D)
        if not tokens:
            raise MRopeError("cannot flatten a batch without a valid token")
        if self.shapes is None:
            tail = -tokens % self.options.pad_to_multiple_of
        else:
            per_row = np.bincount(stream.row_D, stream.length_D).astype(int).tolist()
            most = self.shapes.examples
            rung = choose_rung(
                "tokens", self.shapes.tokens, tokens, per_row, lambda rung: examples < most(rung)
            )
            tail = rung - tokens
        return Placement(1, tokens + tail, tail=tail)

    def lay_out(self, batch: Batch, located: Located, placement: Placement) -> NewColumns:
        """Bring the token columns of a padded batch into one row, in place.

        Columns are `input_ids` and whatever else has the first two dimensions (B, S); pixels, sizes
        and vision tensors stay as they are, since rows keep their order. The attention mask goes.

        Returns:
            - `cu_seq_lens_q`, `cu_seq_lens_k` int32 (D + 1,), `max_length_q`, `max_length_k` ints,
              `seq_idx` int32 (1, T): the borders, from lengths. Two arrays, since a model may write
              to one.
            - `segment_sizes`: the same as a list of ints, for attached models (`mrope.hf.attach`).
            - `use_cache` False: with a cache transformers masks as if there were no borders.
            - with `linear` what `linear_columns` returns.

            With a ladder the borders have empty segments at the end, `max_length_q` and
            `max_length_k` are the rung, and there is no list of lengths.

        Example: rows of 3 and 2 tokens, a multiple of 4

            cu_seq_lens [0, 3, 5, 8]    text row [0 1 2 0 1 0 1 2]    seq_idx [0 0 0 1 1 2 2 2]

            The tail of 3 is a segment of its own, so that no example sees it; it has no border
            inside.

        Raises:
            MRopeError: a token column of another shape; more examples than the rung has borders
                for.
        """
        batch.pop("attention_mask", None)
        batch.pop("seq_lengths", None)
        valid_BS = located.stream.valid_BS
        cells = None if valid_BS is None else torch.from_numpy(np.flatnonzero(valid_BS))
        for name, column in token_columns(batch, located.inputs.shape).items():
            tokens = column.flatten(0, 1)
            tokens = tokens if cells is None else tokens.index_select(0, cells)
            batch[name] = placement.put(tokens, fill_of(name, self.options.pad_token_id))
        if batch.get("labels") is not None:
            # The model shifts labels by one: this is the target of the example before.
            batch["labels"] = batch["labels"].clone()
            batch["labels"][:, located.stream.start_D] = IGNORED_LABEL
        return self._borders(located, placement)

    def _borders(self, located: Located, placement: Placement) -> NewColumns:
        length_D, border_D1 = located.stream.length_D, located.stream.border_D1
        if placement.tail:
            length_D = np.append(length_D, placement.tail)
            border_D1 = np.append(border_D1, placement.width)
        borders = border_D1.astype(np.int32)
        added: NewColumns = {
            "seq_idx": np.arange(len(length_D), dtype=np.int32).repeat(length_D)[None],
            "use_cache": False,
        }
        if self.shapes is None:
            longest = int(length_D.max())
            added["segment_sizes"] = length_D.tolist()
        else:
            longest = placement.width
            borders = self._fixed(borders, len(located.stream.row_D), longest)
        if self.linear:
            most = None if self.shapes is None else len(borders) - 1
            added |= linear_columns(located.stream.length_D, placement.tail, most)
        return added | {
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders.copy(),
            "max_length_q": longest,
            "max_length_k": longest,
        }

    def _fixed(
        self, borders: npt.NDArray[np.int32], examples: int, rung: int
    ) -> npt.NDArray[np.int32]:
        """Return as many borders as the rung has, the last ones of empty segments."""
        assert self.shapes is not None  # the caller asked
        most = self.shapes.examples(rung)
        if examples >= most:  # one more is the padding
            raise MRopeError(
                f"the batch has {examples} examples, but its rung of shapes.tokens has borders for "
                f"{most - 1}; give Shapes a smaller tokens_per_example, "
                f"{rung // examples} or less"
            )
        return np.append(borders, np.full(most + 1 - len(borders), rung, np.int32))

    def position_ids(
        self, positions_AT: Array, _fill: int, located: Located, placement: Placement
    ) -> Array:
        """Return (A + 1, 1, T): the text row, which restarts at every example, then the axes."""
        tokens = positions_AT.shape[1]
        # Qwen3-Omni's are float32, which holds the text row exactly up to 2 ** 24 tokens.
        rows = np.empty((len(positions_AT) + 1, placement.width), positions_AT.dtype)
        rows[0] = self.count(located, placement)
        rows[1:, :tokens] = positions_AT
        rows[1:, tokens:] = np.arange(placement.tail)
        return rows[:, None]

    def count(self, located: Located, placement: Placement) -> IntArray:
        """Return (1, T): tokens counted from 0 in every example, and in the tail, a segment too."""
        return within(np.append(located.stream.length_D, placement.tail))[None]

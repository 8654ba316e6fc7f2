"""Who reads what of a stream: shards of a source, dealt to the workers of all ranks.

A sample's place is its shard and its position there, whoever reads it. What is left of an epoch can
therefore be told from the states of the workers that began it, and be dealt to any others.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mrope.columns import Columns

Left = tuple[int, int]
"""A position, and the low byte of its tokens; -1 where no one has measured it yet."""

Snapshot = tuple[int, Any]
"""A position of a shard, and the source's state there; None: the shard's start."""


@dataclass(frozen=True)
class Share:
    """One worker of one rank, among all of them."""

    rank: int
    ranks: int
    worker: int
    workers: int

    @property
    def number(self) -> int:
        """Its number among all shares."""
        return self.rank * self.workers + self.worker

    @property
    def count(self) -> int:
        """How many shares there are."""
        return self.ranks * self.workers


class Part(NamedTuple):
    """What is left of a shard: single positions, and all from `start` on.

    Attributes:
        shard: its number in the source.
        start: the first position that nobody has read; None: all were read.
        left: positions below that are left nevertheless, ascending.
        snapshot: where reading may begin.
    """

    shard: int
    start: int | None = 0
    left: tuple[Left, ...] = ()
    snapshot: Snapshot = (0, None)

    def split(self, step: int, offset: int) -> Lane:
        """Return the lane of one of `step` readers."""
        left = self.left[offset::step]
        return Lane(self.shard, step, offset, self.start, left, self.snapshot)


class Lane(NamedTuple):
    """What one worker reads of a shard, in the order of positions.

    Attributes:
        shard: its number in the source.
        step, offset: from `start` on, the positions with `position % step == offset`.
        start: None: there are none of these.
        left: single positions before them, ascending.
        snapshot: where reading may begin.
    """

    shard: int
    step: int = 1
    offset: int = 0
    start: int | None = 0
    left: tuple[Left, ...] = ()
    snapshot: Snapshot = (0, None)

    def next(self, position: int) -> Left | None:
        """Return the first position of the lane at or above `position`; None if there is none."""
        at = bisect_left(self.left, (position, -1))
        if at < len(self.left):
            return self.left[at]
        if self.start is None:
            return None
        first = max(self.start, position)
        return first + (self.offset - first) % self.step, -1

    def pack(self) -> list[Any]:
        """Return the lane as JSON holds it, without the defaults at its end."""
        values = [*self]
        while len(values) > 1 and values[-1] == _DEFAULTS[len(values) - 1]:
            values.pop()
        return values

    @classmethod
    def unpack(cls, values: Sequence[Any]) -> Lane:
        """Return the lane that `pack` was called on."""
        lane = cls(*values)
        left = tuple((position, check) for position, check in lane.left)
        return lane._replace(left=left, snapshot=tuple(lane.snapshot))


_DEFAULTS = (*Lane(0),)


def deal(parts: Iterable[Part], share: Share, *, by_shard: bool) -> list[Lane]:
    """Return what one share reads.

    Args:
        parts: what is left of each shard.
        share: the worker.
        by_shard: a rank takes whole shards, and shares sample by sample what is left over when
            their number is divided by that of ranks; its workers take the rank's shards in turn.
            False: every worker reads every shard, and takes its share of the samples.
    """
    parts = list(parts)
    if not by_shard:
        lanes = [part.split(share.count, share.number) for part in parts]
    else:
        # Apart: a shard of which little is left is no fair share for one that nobody has begun.
        fresh = [part for part in parts if part.start == 0 and not part.left]
        begun = [part for part in parts if part.start != 0 or part.left]
        lanes = [
            *_of_rank(begun, share.rank, share.ranks),
            *_of_rank(fresh, share.rank, share.ranks),
        ][share.worker :: share.workers]
    return [lane for lane in lanes if lane.start is not None or lane.left]


def _of_rank(parts: Sequence[Part], rank: int, ranks: int) -> list[Lane]:
    whole = len(parts) // ranks * ranks
    return [
        *(part.split(1, 0) for part in parts[rank:whole:ranks]),
        *(part.split(ranks, rank) for part in parts[whole:]),
    ]


class _Remains(NamedTuple):
    """What one worker leaves of a lane.

    Attributes:
        lane: from the first position on that it has not read.
        waiting: positions that it has read and not put into a batch.
        end: number of samples of the shard, if it has read up to there.
    """

    lane: Lane
    waiting: list[Left]
    end: int | None


def what_is_left(states: Iterable[Columns]) -> list[Part]:
    """Return what is left of each shard, from the states of all workers of all ranks."""
    remains = defaultdict(list)
    for state in states:
        for one in _remains_of(state):
            remains[one.lane.shard].append(one)
    parts = [_join(shard, remains[shard]) for shard in sorted(remains)]
    return [part for part in parts if part.start is not None or part.left]


def _remains_of(state: Columns) -> Iterable[_Remains]:
    waiting = defaultdict(list)
    for number, positions, checks in state["waiting"]:
        waiting[number] = list(zip(positions, bytes.fromhex(checks), strict=True))
    at, position, source_state = state["source"]
    for number, values in enumerate(state["lanes"]):
        lane = Lane.unpack(values)
        end = state["ends"][number] if number < len(state["ends"]) else None
        if number == at:
            lane = lane._replace(snapshot=(position, source_state))
        if number <= len(state["ends"]):
            read = state["read"] if end is None else end
            lane = lane._replace(
                start=None if lane.start is None else max(lane.start, read),
                left=tuple(one for one in lane.left if one[0] >= read) if end is None else (),
            )
        yield _Remains(lane, waiting[number], end)


def _join(shard: int, remains: Sequence[_Remains]) -> Part:
    """Return what all workers together leave of a shard."""
    left = [one for each in remains for one in (*each.lane.left, *each.waiting)]
    open_lanes = [each for each in remains if each.lane.start is not None]
    ends = [each.end for each in open_lanes if each.end is not None]
    # Below this some have read further than others; beyond it nobody has read, or nothing is.
    top = max((each.lane.start or 0 for each in open_lanes), default=0)
    for each in open_lanes:
        lane, first = each.lane, each.lane.next(each.lane.start or 0)
        if each.end is None and first is not None:
            left += [(position, -1) for position in range(first[0], top, lane.step)]
    start = top if open_lanes and not ends else None
    left.sort()
    lowest = min([position for position, _ in left[:1]] + ([] if start is None else [start]) or [0])
    snapshots = [each.lane.snapshot for each in remains if each.lane.snapshot[0] <= lowest]
    return Part(
        shard, start, tuple(left), max(snapshots, key=lambda one: one[0], default=(0, None))
    )

"""Read the lanes of one worker, and return to an earlier place of them exactly.

Snapshots of the source's own state are only a short cut: whatever they hold, a position is reached
by reading up to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from mrope.errors import MRopeError
from mrope.prepare.lanes import Lane
from mrope.prepare.shards import ShardPass, Shards

Place = tuple[int, int]
"""The number of a lane, and a position of its shard."""

# Snapshots cost a copy of the source's state each; resuming reads so many samples more at most.
_SNAPSHOT_EVERY = 32


class Read(NamedTuple):
    """A sample that was read: its place, and the low byte of its tokens if known, else -1."""

    place: Place
    sample: Any
    check: int


class StreamReader:
    """Read the samples of lanes, one lane after another.

    Args:
        shards: those of the source.
        lanes: what to read.
        epoch: passed to the source's `set_epoch`, if it has one.

    Attributes:
        ends: of each lane that is read, the number of samples of its shard.
        place: the lane that is read, and the position before which all of it was read.
    """

    def __init__(self, shards: Shards, lanes: Sequence[Lane], epoch: int) -> None:
        self._shards = shards
        self.lanes = lanes
        self._epoch = epoch
        self._pass: ShardPass | None = None
        self._snapshots: deque[tuple[Place, Any]] = deque()
        self.ends: list[int] = []
        self.place: Place = (0, 0)

    def read(self) -> Read | None:
        """Return the next sample; None at the end of the last lane.

        Raises:
            MRopeError: a sample that was left to be read is no longer there.
        """
        while self.place[0] < len(self.lanes):
            number, position = self.place
            lane = self.lanes[number]
            shard = self._pass or self._open(lane)
            following = lane.next(position)
            if following is not None:
                try:
                    sample = self._sample_at(shard, following[0])
                except StopIteration:
                    if lane.start is None or following[0] < lane.start:
                        raise MRopeError(
                            f"cannot resume: sample {following[0]} of shard {lane.shard} is no "
                            "longer there; the source changed since the state was saved"
                        ) from None
                else:
                    self.place = number, following[0] + 1
                    return Read((number, following[0]), sample, following[1])
            self.ends.append(shard.position)
            self.place, self._pass = (number + 1, 0), None
        return None

    def snapshot_before(self, place: Place) -> tuple[Place, Any]:
        """Return the last snapshot at or before a place: its own place, and a state or None.

        Earlier ones are dropped, so that later calls must not ask for an earlier place.
        """
        while len(self._snapshots) > 1 and self._snapshots[1][0] <= place:
            self._snapshots.popleft()
        return self._snapshots[0] if self._snapshots else ((0, 0), None)

    def return_to(self, place: Place, state: object, ends: Sequence[int]) -> None:
        """Go on from a snapshot.

        Args:
            place, state: as `snapshot_before` returned them.
            ends: of the lanes before.
        """
        self.place, self.ends = place, list(ends[: place[0]])
        self._snapshots.clear()
        self._pass = None
        if place[0] < len(self.lanes):
            self._open(self.lanes[place[0]]._replace(snapshot=(place[1], state)))

    def _open(self, lane: Lane) -> ShardPass:
        self._pass = self._shards.open(lane.shard, self._epoch, lane.snapshot)
        # What the source could not return to is read again from its start.
        state = lane.snapshot[1] if self._pass.position else None
        self._snapshots.append(((self.place[0], self._pass.position), state))
        return self._pass

    def _sample_at(self, shard: ShardPass, position: int) -> Any:
        shard.jump(position)
        while True:
            at = shard.position
            number, latest = self._snapshots[-1][0]
            if at - latest >= _SNAPSHOT_EVERY and (taken := shard.snapshot()) is not None:
                self._snapshots.append(((number, at), taken[1]))
            sample = shard.read()
            if at == position:
                return sample

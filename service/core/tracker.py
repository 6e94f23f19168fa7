"""The tracker: messages finish out of order, offsets are committed in order.

Rules of this file: only offsets that were *delivered* are tracked, never their arithmetic
neighbours (compaction, transaction markers and aborted messages leave holes). What may be
committed is the smallest delivered offset that is not finished, else the position, which steps
over markers. What is finished beyond it travels with it, as the completed map. Only unfinished
offsets are remembered: behind one that never finishes, any number may finish.
"""

from collections import deque
from dataclasses import dataclass
from enum import Enum

from service.core.completed import Runs, runs_of

UNCLEAN_ENDS_MAX = 3
"""So many deaths at one next offset may be anybody's fault; after them it is the messages'."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a partition is, as Kafka keeps it for whoever has the partition next.

    `runs` is the completed map: what is finished beyond `next_offset`. `unclean_ends` counts the
    times that its holder has come to no clean end at this very next offset, the present holder's
    included for as long as it has finished nothing. `alone` is the offset of the message that runs
    by itself because of these: at the next death it is the one to blame.
    """

    next_offset: int
    runs: Runs = ()
    unclean_ends: int = 0
    alone: int | None = None


@dataclass(frozen=True, slots=True)
class Given:
    """A partition as a source gives it: under which epoch, and from where it goes on.

    `progress` is what Kafka holds of it now; `unclean_ends` has this holder's own in it, in
    advance. Of a partition that keeps its epoch it says nothing new.
    """

    epoch: int
    progress: Progress


class Delivery(Enum):
    """What a delivered message is to a tracker."""

    NEW = "new"
    KNOWN = "known"  # fetched again after a rebalance
    FINISHED = "finished"  # by an earlier holder, as the completed map says


class PartitionTracker:
    """The delivered offsets of one partition under one epoch.

    Memory, and the time of `progress`, are bounded by the unfinished offsets and the finished
    ranges that others have left, however many offsets have finished between them.
    """

    __slots__ = (
        "_finished_before",
        "_last_finished",
        "_looked_at",
        "_position",
        "_unfinished",
        "last_delivered",
    )

    def __init__(self, next_offset: int, finished_before: tuple[range, ...] = ()) -> None:
        # Offset to timestamp_ms. A dict keeps the order of insertion, which is that of offsets.
        self._unfinished: dict[int, int] = {}
        self._finished_before = deque(finished_before)  # by others; what is not delivered yet
        self._position = next_offset
        self.last_delivered = next_offset - 1
        # The largest finished offset, by whomever: beyond it there is nothing for the map.
        self._last_finished = finished_before[-1].stop - 1 if finished_before else next_offset - 1
        # What `progress` has said last, and of which `finishing`; None once something has changed.
        self._looked_at: tuple[frozenset[int], tuple[int, Runs]] | None = None

    def deliver(self, offset: int, timestamp_ms: int) -> Delivery:
        """Track a message, unless it is known already; what others have finished is finished."""
        if offset <= self.last_delivered:
            return Delivery.KNOWN
        self.last_delivered = offset
        self._looked_at = None
        before = self._finished_before
        while before and before[0].stop <= offset:
            before.popleft()
        if before and offset in before[0]:
            return Delivery.FINISHED
        self._unfinished[offset] = timestamp_ms
        return Delivery.NEW

    def advance(self, position: int) -> None:
        """Take over the consumer's position, as it was after everything delivered so far.

        It only moves forward: a kept partition is fetched again from an earlier offset.
        """
        if position > self._position:
            self._position = position
            self._looked_at = None

    def finish(self, offset: int) -> None:
        """The outcome of this delivered offset is acknowledged; each offset finishes once."""
        try:
            del self._unfinished[offset]
        except KeyError:
            delivered = offset <= self.last_delivered
            why = "finished twice, or is a hole" if delivered else "was never delivered"
            raise AssertionError(f"{offset} {why}") from None
        self._looked_at = None
        if offset > self._last_finished:
            self._last_finished = offset

    @property
    def next_offset(self) -> int:
        """What may be committed: everything delivered below it is finished."""
        return next(iter(self._unfinished), self._beyond)

    @property
    def _beyond(self) -> int:
        """The offset behind everything that was delivered, or never will be."""
        return max(self._position, self.last_delivered + 1)

    def progress(self, finishing: frozenset[int] = frozenset()) -> tuple[int, Runs]:
        """Next offset and completed map, as they are once `finishing` has finished too.

        Between two delivered offsets everything else is a hole, never to be delivered: it counts
        as finished, which keeps the map short. The map ends with the last finished offset, so
        that it grows only by what finishes. A second question in a row costs nothing.
        """
        if self._looked_at is None or self._looked_at[0] != finishing:
            self._looked_at = finishing, self._look(finishing)
        return self._looked_at[1]

    def _look(self, finishing: frozenset[int]) -> tuple[int, Runs]:
        beyond = self._beyond
        left: int | None = None
        next_offset = beyond
        finished: list[range] = []
        map_end = max(self._last_finished, max(finishing, default=-1)) + 1
        for offset in self._unfinished:
            if offset in finishing:
                continue
            if left is None:
                next_offset = offset
            elif left + 1 < offset:
                finished.append(range(left + 1, min(offset, map_end)))
            left = offset
            if offset >= map_end:
                break
        else:
            if left is not None and left + 1 < min(beyond, map_end):
                finished.append(range(left + 1, min(beyond, map_end)))
        for before in self._finished_before:
            if before.stop > beyond:
                finished.append(range(max(before.start, beyond), before.stop))
        if finished and finished[0].start == next_offset:  # others have finished what comes now
            next_offset = finished.pop(0).stop
        return next_offset, runs_of(next_offset, finished)

    @property
    def span(self) -> int:
        """How many offsets the map reaches over at most, whatever finishes of those delivered."""
        return max(self._last_finished, self.last_delivered) + 1 - self.next_offset

    @property
    def runs_max(self) -> int:
        """How many runs the map has at most, whatever finishes of those delivered: each finished
        one stands behind an unfinished one, or is of others."""
        return 2 * (len(self._unfinished) + len(self._finished_before))

    @property
    def unfinished(self) -> int:
        """How many delivered messages are not finished."""
        return len(self._unfinished)

    @property
    def oldest_unfinished_ms(self) -> int | None:
        """Timestamp of the message that holds the next offset."""
        return next(iter(self._unfinished.values()), None)

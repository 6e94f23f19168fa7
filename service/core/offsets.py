"""The tracker: messages finish out of order, offsets are committed in order.

Rules of this file: only offsets that were *delivered* are tracked, never their arithmetic
neighbours (compaction, transaction markers and aborted messages leave holes). What may be
committed is the smallest delivered offset that is not finished, else the position, which steps
over markers. What is finished beyond it travels with it, as the completed map.
"""

import itertools
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

    Memory is bounded by the messages between the next offset and the last delivered one.
    """

    __slots__ = ("_finished", "_finished_before", "_last_delivered", "_pending", "_position")

    def __init__(self, next_offset: int, finished_before: tuple[range, ...] = ()) -> None:
        self._pending: deque[tuple[int, int]] = deque()  # (offset, timestamp_ms), in order
        self._finished: set[int] = set()  # finished ones that are still in _pending
        self._finished_before = deque(finished_before)  # by others; what is not delivered yet
        self._position = next_offset
        self._last_delivered = next_offset - 1

    def deliver(self, offset: int, timestamp_ms: int) -> Delivery:
        """Track a message, unless it is known already; what others have finished is finished."""
        if offset <= self._last_delivered:
            return Delivery.KNOWN
        self._last_delivered = offset
        before = self._finished_before
        while before and before[0].stop <= offset:
            before.popleft()
        finished = bool(before) and offset in before[0]
        if not finished:
            self._pending.append((offset, timestamp_ms))
            return Delivery.NEW
        if self._pending:
            self._pending.append((offset, timestamp_ms))
            self._finished.add(offset)
        return Delivery.FINISHED

    def advance(self, position: int) -> None:
        """Take over the consumer's position, as it was after everything delivered so far.

        It only moves forward: a kept partition is fetched again from an earlier offset.
        """
        self._position = max(self._position, position)

    def finish(self, offset: int) -> None:
        """The outcome of this delivered offset is acknowledged; each offset finishes once."""
        assert offset <= self._last_delivered, f"{offset} was never delivered"
        assert offset not in self._finished, f"{offset} finished twice"
        self._finished.add(offset)
        while self._pending and self._pending[0][0] in self._finished:
            self._finished.remove(self._pending.popleft()[0])

    @property
    def next_offset(self) -> int:
        """What may be committed: everything delivered below it is finished."""
        return self._pending[0][0] if self._pending else self._beyond

    @property
    def _beyond(self) -> int:
        """The offset behind everything that was delivered, or never will be."""
        return max(self._position, self._last_delivered + 1)

    def progress(self, finishing: frozenset[int] = frozenset()) -> tuple[int, Runs]:
        """Next offset and completed map, as they are once `finishing` has finished too.

        Between two delivered offsets everything else is a hole, never to be delivered: it counts
        as finished, which keeps the map short.
        """
        beyond = self._beyond
        done = self._finished | finishing
        unfinished = [offset for offset, _ in self._pending if offset not in done]
        finished = [
            range(left + 1, right)
            for left, right in itertools.pairwise([*unfinished, beyond])
            if left + 1 < right
        ]
        next_offset = unfinished[0] if unfinished else beyond
        for before in self._finished_before:
            if before.stop > beyond:
                finished.append(range(max(before.start, beyond), before.stop))
        if finished and finished[0].start == next_offset:  # others have finished what comes now
            next_offset = finished.pop(0).stop
        return next_offset, runs_of(next_offset, finished)

    @property
    def unfinished(self) -> int:
        """How many delivered messages are not finished."""
        return len(self._pending) - len(self._finished)

    @property
    def oldest_unfinished_ms(self) -> int | None:
        """Timestamp of the message that holds the next offset."""
        return self._pending[0][1] if self._pending else None

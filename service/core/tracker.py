"""The tracker: messages finish out of order, offsets are committed in order.

Rules of this file: only offsets that were *delivered* are tracked, never their arithmetic
neighbours (compaction, transaction markers and aborted messages leave holes). What may be
committed is the smallest delivered offset that is not finished, else the position, which steps
over markers. What is finished beyond it travels with it, as the completed map. Only unfinished
offsets are remembered, so that memory stays bounded however many messages finish behind one that
does not.
"""

from collections import deque
from dataclasses import dataclass
from enum import Enum

from service.core.admission.accounts import Account
from service.core.completed import Runs, runs_of

UNCLEAN_ENDS_MAX = 3
"""How often holders may die at one next offset before the messages in flight there become suspects.
Up to this number the cause may as well lie elsewhere."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a partition is, as Kafka stores it for the partition's next holder.

    `runs` is the completed map: what is finished beyond `next_offset`. `unclean_ends` counts the
    holders that have ended without a clean stop while this was the next offset. The present holder
    is counted in advance, until the next offset has moved or it lets go in order. `alone` is
    the offset of the suspect that runs by itself: if the process dies now, that message is to
    blame.
    """

    next_offset: int
    runs: Runs = ()
    unclean_ends: int = 0
    alone: int | None = None
    spent: Account = ()
    """The partition's account: what was spent on it in the last hour."""


@dataclass(frozen=True, slots=True)
class Given:
    """A partition as a source gives it: its epoch, and where to go on.

    `progress` is what Kafka holds of it now; its `unclean_ends` counts the new holder already.
    Where the partition keeps its epoch, `progress` is not used.
    """

    epoch: int
    progress: Progress


class Delivery(Enum):
    """What a tracker knows of a message when it is delivered."""

    NEW = "new"
    KNOWN = "known"  # fetched again after a rebalance
    FINISHED = "finished"  # by an earlier holder, as the completed map says


class PartitionTracker:
    """The delivered offsets of one partition under one epoch.

    Memory and the time that `progress` takes grow only with the unfinished offsets and with the
    finished ranges that earlier holders have left, not with the offsets that have finished.
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
        # Ranges that earlier holders have finished and that are not delivered yet.
        self._finished_before = deque(finished_before)
        self._position = next_offset
        self.last_delivered = next_offset - 1
        # The largest offset that we or others have finished: the map ends there.
        self._last_finished = finished_before[-1].stop - 1 if finished_before else next_offset - 1
        # The last answer of `progress`, and for which `finishing`; None after any change.
        self._looked_at: tuple[frozenset[int], tuple[int, Runs]] | None = None

    def deliver(self, offset: int, timestamp_ms: int) -> Delivery:
        """Track a message, unless it is known already or an earlier holder has finished it."""
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
        """The offset that may be committed: everything delivered below it is finished."""
        return next(iter(self._unfinished), self._beyond)

    @property
    def _beyond(self) -> int:
        """The first offset that may still be delivered."""
        return max(self._position, self.last_delivered + 1)

    def progress(self, finishing: frozenset[int] = frozenset()) -> tuple[int, Runs]:
        """Next offset and completed map, as they are once `finishing` has finished too.

        An offset between two delivered ones that was not delivered is a hole and never will be: it
        counts as finished, which keeps the map short. The map ends with the last finished offset,
        so that it grows only when messages finish. Asking twice in a row costs nothing.
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
        if finished and finished[0].start == next_offset:  # an earlier holder has these
            next_offset = finished.pop(0).stop
        return next_offset, runs_of(next_offset, finished)

    @property
    def span(self) -> int:
        """How many offsets the map may reach over, whichever delivered messages finish next."""
        return max(self._last_finished, self.last_delivered) + 1 - self.next_offset

    @property
    def runs_max(self) -> int:
        """How many runs the map may have, whichever delivered messages finish next: each finished
        run stands behind an unfinished offset or was left by an earlier holder."""
        return 2 * (len(self._unfinished) + len(self._finished_before))

    @property
    def unfinished(self) -> int:
        """How many delivered messages are not finished."""
        return len(self._unfinished)

    @property
    def oldest_unfinished_ms(self) -> int | None:
        """Timestamp of the message that holds the next offset."""
        return next(iter(self._unfinished.values()), None)

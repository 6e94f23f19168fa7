"""The tracker: messages finish out of order, offsets are committed in order.

Rules of this file: only offsets that were *delivered* are tracked, never their arithmetic
neighbours (compaction, transaction markers and aborted messages leave holes). What may be
committed is the smallest delivered offset that is not finished, else the position, which steps
over markers.
"""

from collections import deque


class PartitionTracker:
    """The delivered offsets of one partition under one epoch.

    Memory is bounded by the messages between the next offset and the last delivered one.
    """

    __slots__ = ("_finished", "_last_delivered", "_pending", "_position")

    def __init__(self) -> None:
        self._pending: deque[tuple[int, int]] = deque()  # (offset, timestamp_ms), in order
        self._finished: set[int] = set()  # finished ones that are still in _pending
        self._position: int | None = None
        self._last_delivered = -1

    def deliver(self, offset: int, timestamp_ms: int) -> bool:
        """Track a message; False if it is known already (fetched again after a rebalance)."""
        if offset <= self._last_delivered:
            return False
        self._pending.append((offset, timestamp_ms))
        self._last_delivered = offset
        return True

    def advance(self, position: int) -> None:
        """Take over the consumer's position, as it was after everything delivered so far.

        It only moves forward: a kept partition is fetched again from an earlier offset.
        """
        if self._position is None or position > self._position:
            self._position = position

    def finish(self, offset: int) -> None:
        """The outcome of this delivered offset is acknowledged; each offset finishes once."""
        assert offset <= self._last_delivered, f"{offset} was never delivered"
        assert offset not in self._finished, f"{offset} finished twice"
        self._finished.add(offset)
        while self._pending and self._pending[0][0] in self._finished:
            self._finished.remove(self._pending.popleft()[0])

    @property
    def next_offset(self) -> int | None:
        """What may be committed: everything delivered below it is finished. None: not known."""
        if self._pending:
            return self._pending[0][0]
        if self._position is None:
            return None
        return max(self._position, self._last_delivered + 1)

    @property
    def unfinished(self) -> int:
        """How many delivered messages are not finished."""
        return len(self._pending) - len(self._finished)

    @property
    def finished_ahead(self) -> frozenset[int]:
        """Finished offsets beyond the next offset: a crash repeats them unless they are stored."""
        return frozenset(self._finished)

    @property
    def oldest_unfinished_ms(self) -> int | None:
        """Timestamp of the message that holds the next offset."""
        return self._pending[0][1] if self._pending else None

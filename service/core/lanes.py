"""Lanes: which outcome may be handed to the producer next.

Rules of this file: a lane hands out its offsets in input order, each once it is answered,
without waiting for acknowledgements. After a failed hand-over it stops until everything it had
handed out is settled; what failed then comes first again, in order.
"""

from collections import deque
from collections.abc import Hashable
from typing import Literal

from service.core.messages import Message

Ordering = Literal["key", "partition", "none"]


def lane_id(ordering: Ordering, message: Message) -> Hashable:
    """Which lane of its partition a message belongs to; without a key, one of its own."""
    if ordering == "partition":
        return None
    if ordering == "key" and message.key is not None:
        return message.key
    return message.offset


class Lane:
    """The offsets of one lane, from entering to acknowledgement."""

    __slots__ = ("_answered", "_failed", "_handed", "_waiting")

    def __init__(self) -> None:
        self._waiting: deque[int] = deque()  # not handed over, in order
        self._answered: set[int] = set()  # those of _waiting that have an outcome
        self._handed: set[int] = set()  # handed over, not settled
        self._failed: list[int] = []  # settled badly, while others are not settled yet

    def enter(self, offset: int) -> None:
        """A message of this lane was taken; offsets come in order."""
        assert not self._waiting or offset > self._waiting[-1], f"{offset} out of order"
        self._waiting.append(offset)

    def answer(self, offset: int) -> None:
        """It has its outcome."""
        self._answered.add(offset)

    def hand_over(self) -> int | None:
        """The offset to publish now, which counts as handed over; None: nothing may go yet."""
        if self._failed or not self._waiting or self._waiting[0] not in self._answered:
            return None
        offset = self._waiting.popleft()
        self._answered.remove(offset)
        self._handed.add(offset)
        return offset

    def acknowledge(self, offset: int) -> bool:
        """Settled well. True: the lane had stopped, and may now be tried again."""
        self._handed.remove(offset)
        return self._reopen()

    def fail(self, offset: int) -> bool:
        """Settled badly or unknown: the lane stops. True: it may be tried again at once."""
        self._handed.remove(offset)
        self._failed.append(offset)
        return self._reopen()

    def _reopen(self) -> bool:
        if not self._failed or self._handed:
            return False
        self._failed.sort()
        self._waiting.extendleft(reversed(self._failed))
        self._answered.update(self._failed)
        self._failed.clear()
        return True

    @property
    def ready(self) -> bool:
        """`hand_over` would give an offset."""
        return not self._failed and bool(self._waiting) and self._waiting[0] in self._answered

    @property
    def empty(self) -> bool:
        """Nothing waits, nothing is unsettled: the lane can be forgotten."""
        return not (self._waiting or self._handed or self._failed)

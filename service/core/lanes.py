"""Lanes: which outcome may be handed to the producer next.

Rules of this file: a lane hands out its offsets in input order, each once it is answered,
without waiting for acknowledgements. After a failed hand-over it stops until everything it had
handed out is settled; then the outcomes that failed come first again, in order.
"""

from collections import deque
from collections.abc import Hashable
from typing import Literal

from service.core.messages import Message

Ordering = Literal["key", "partition", "none"]


def lane_id(ordering: Ordering, message: Message) -> Hashable:
    """Which lane of its partition a message belongs to. With `ordering: key` a message without a
    key has a lane of its own."""
    if ordering == "partition":
        return None
    if ordering == "key" and message.key is not None:
        return message.key
    return message.offset


class Lane:
    """The offsets of one lane, from the moment they are taken until they are acknowledged."""

    __slots__ = ("_answered", "_failed", "_handed", "_waiting")

    def __init__(self) -> None:
        self._waiting: deque[int] = deque()  # not handed over, in order
        self._answered: set[int] = set()  # those of _waiting that have an outcome
        self._handed: set[int] = set()  # handed over, not settled
        self._failed: list[int] = []  # not acknowledged; waits until the others are settled

    def enter(self, offset: int) -> None:
        """A message of this lane was taken; offsets come in order."""
        assert not self._waiting or offset > self._waiting[-1], f"{offset} out of order"
        self._waiting.append(offset)

    def answer(self, offset: int) -> None:
        """The message at this offset has its outcome."""
        self._answered.add(offset)

    def hand_over(self) -> int | None:
        """The offset to publish now, which counts as handed over from here on; None: nothing may
        be published yet."""
        if self._failed or not self._waiting or self._waiting[0] not in self._answered:
            return None
        offset = self._waiting.popleft()
        self._answered.remove(offset)
        self._handed.add(offset)
        return offset

    def acknowledge(self, offset: int) -> bool:
        """The outcome is acknowledged. True: the lane had stopped, and may now be tried again."""
        self._handed.remove(offset)
        return self._reopen()

    def fail(self, offset: int) -> bool:
        """The outcome is not acknowledged, or it is not known whether it is: the lane stops. True:
        it may be tried again at once."""
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
        """Whether `hand_over` would return an offset."""
        return not self._failed and bool(self._waiting) and self._waiting[0] in self._answered

    @property
    def empty(self) -> bool:
        """Whether nothing waits and nothing is unsettled, so that the lane can be forgotten."""
        return not (self._waiting or self._handed or self._failed)

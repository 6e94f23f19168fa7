"""What waits for the next transaction of one input partition, in order and bounded.

What the completed map could not hold yet waits longer: it is *held back*. Of everything that waits
then, the lowest offsets go first, so that no outcome overtakes an earlier one of its lane.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aiokafka import TopicPartition

from service.core.errors import PublishFailed
from service.kafka.sending.queues import Handover, OutputQueue, Waiting

TRANSACTION_MESSAGES_MAX = 1_000
"""One transaction holds at most this many messages: an abort repeats little, and readers wait for
the whole of it."""
TRANSACTION_MAX_BYTES = 4 * 1024 * 1024
"""One transaction holds outputs of at most this size; the outputs of one message always stay
together."""


@dataclass(frozen=True, slots=True, eq=False)
class Outgoing:
    """The outputs of one message; without an offset it is a wish: a request to store the ledger."""

    offset: int | None
    handover: Handover
    outputs: list[tuple[TopicPartition, Waiting]]
    since_s: float

    @property
    def size_bytes(self) -> int:
        return sum(each.output.size_bytes for _, each in self.outputs)

    @property
    def withdrawn(self) -> bool:
        """Whether somebody has cancelled it, or it has failed already."""
        return self.handover.future.done()


class Outbox:
    """First in, first out; what is put back goes before all others."""

    def __init__(self) -> None:
        self._queue: deque[Outgoing] = deque()
        self._held_back: list[Outgoing] = []  # by offset
        self._size_bytes = self._wishes = 0
        self._went = False  # something that was held back has gone, so that more may fit now

    def __bool__(self) -> bool:
        return bool(self._queue or self._held_back)

    @property
    def ready(self) -> bool:
        """Whether there may be something for a transaction.

        What is held back alone waits for one of the messages that are not handed over yet.
        """
        return bool(self._queue) or self._went

    @property
    def since_s(self) -> float:
        """Since when the first one waits."""
        return (self._queue or self._held_back)[0].since_s

    @property
    def urgent(self) -> bool:
        """Whether it fills a transaction, or somebody waits for the ledger to be stored."""
        return (
            len(self._queue) >= TRANSACTION_MESSAGES_MAX
            or self._size_bytes >= TRANSACTION_MAX_BYTES
            or self._wishes > 0
            or self._went
        )

    def append(self, outgoing: Outgoing) -> None:
        self._queue.append(outgoing)
        self._count(outgoing, 1)

    def next_transaction(self, fitting: Callable[[Sequence[int]], int]) -> list[Outgoing]:
        """The next transaction's; what was withdrawn meanwhile is left out.

        `fitting` says how many of these offsets, ascending, may finish in it; wishes always go.
        """
        self._went = False
        taken = self._take_queued()
        if not self._held_back:
            offsets = sorted(each.offset for each in taken if each.offset is not None)
            if fitting(offsets) == len(offsets):
                return taken
        wishes = [each for each in taken if each.offset is None]
        taken = [each for each in (*self._held_back, *taken) if each.offset is not None]
        waiting = [each for each in sorted(taken, key=_offset) if not each.withdrawn]
        bounded = waiting[: _bounded(waiting)]
        count = fitting([_offset(each) for each in bounded])
        self._held_back = waiting[count:]
        self._went = bool(count and self._held_back)
        return wishes + waiting[:count]

    def _take_queued(self) -> list[Outgoing]:
        taken: list[Outgoing] = []
        size = 0
        while self._queue:
            first = self._queue[0]
            if not first.withdrawn:
                size += first.size_bytes
                full = len(taken) >= TRANSACTION_MESSAGES_MAX or size > TRANSACTION_MAX_BYTES
                if taken and full:
                    break
                taken.append(first)
            self._count(self._queue.popleft(), -1)
        return taken

    def put_back(self, those: Sequence[Outgoing]) -> None:
        """Before all others, in the order they had."""
        for each in reversed(those):
            self._queue.appendleft(each)
            self._count(each, 1)

    def take_all(self) -> list[Outgoing]:
        """Everything, to be failed."""
        those = [*self._held_back, *self._queue]
        self._queue.clear()
        self._held_back.clear()
        self._size_bytes = self._wishes = 0
        self._went = False
        return those

    def _count(self, outgoing: Outgoing, sign: int) -> None:
        self._size_bytes += sign * outgoing.size_bytes
        self._wishes += sign * (outgoing.offset is None)


def _offset(outgoing: Outgoing) -> int:
    assert outgoing.offset is not None, "a wish has no place among offsets"
    return outgoing.offset


def _bounded(those: Sequence[Outgoing]) -> int:
    """How many of them one transaction takes, and one at least."""
    size = 0
    for count, each in enumerate(those[:TRANSACTION_MESSAGES_MAX]):
        size += each.size_bytes
        if count and size > TRANSACTION_MAX_BYTES:
            return count
    return min(len(those), TRANSACTION_MESSAGES_MAX)


def by_output_partition(those: Sequence[Outgoing]) -> dict[TopicPartition, OutputQueue]:
    """Their outputs, those of each output partition in order."""
    queues: dict[TopicPartition, OutputQueue] = {}
    for each in those:
        for where, waiting in each.outputs:
            queues.setdefault(where, OutputQueue()).waiting.append(waiting)
    return queues


def fail(those: Sequence[Outgoing], why: str) -> None:
    """In order; what is settled already stays as it is."""
    for each in those:
        each.handover.fail(PublishFailed(why))

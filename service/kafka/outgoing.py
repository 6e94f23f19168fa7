"""What waits for the next transaction of one input partition, in order and bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from aiokafka import TopicPartition

from service.core.errors import PublishFailed
from service.kafka.sending import Handover, OutputQueue, Waiting

TRANSACTION_MESSAGES_MAX = 1_000
"""More go into the next one: an abort repeats little, and readers wait for the whole of it."""
TRANSACTION_MAX_BYTES = 4 * 1024 * 1024
"""Of outputs in one transaction; the outputs of one message always stay together."""


@dataclass(frozen=True, slots=True, eq=False)
class Outgoing:
    """The outputs of one message; without an offset a wish that the ledger be stored."""

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
        self._size_bytes = self._wishes = 0

    def __bool__(self) -> bool:
        return bool(self._queue)

    @property
    def first(self) -> Outgoing:
        return self._queue[0]

    @property
    def urgent(self) -> bool:
        """Whether it fills a transaction, or somebody waits for the ledger to be stored."""
        return (
            len(self._queue) >= TRANSACTION_MESSAGES_MAX
            or self._size_bytes >= TRANSACTION_MAX_BYTES
            or self._wishes > 0
        )

    def append(self, outgoing: Outgoing) -> None:
        self._queue.append(outgoing)
        self._count(outgoing, 1)

    def take(self) -> list[Outgoing]:
        """The next transaction's; what was withdrawn meanwhile is left out."""
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
        those = list(self._queue)
        self._queue.clear()
        self._size_bytes = self._wishes = 0
        return those

    def _count(self, outgoing: Outgoing, sign: int) -> None:
        self._size_bytes += sign * outgoing.size_bytes
        self._wishes += sign * (outgoing.offset is None)


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

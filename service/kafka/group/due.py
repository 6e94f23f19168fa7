"""Messages of the retry topic are handed on once they are due; until then their partition is
closed.

They stand in the order in which they came, so that the first one that is not due holds those
behind it, which are hardly due before. Nothing of it is kept: it is fetched again when it is time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from aiokafka.structs import ConsumerRecord

from service.core.history import History
from service.core.messages import Partition


class DueTimes:
    """Which partitions of `topic` are closed, and until when, by the clock `wall_ms`."""

    def __init__(self, topic: str | None, wall_ms: Callable[[], int]) -> None:
        self._topic, self._wall_ms = topic, wall_ms
        self._due_ms: dict[Partition, int] = {}

    def open(self, partition: Partition) -> bool:
        """Whether its next message may be due."""
        return self._due_ms.get(partition, 0) <= self._wall_ms()

    def first_not_due(self, partition: Partition, records: Sequence[ConsumerRecord]) -> int | None:
        """Which of them has to wait, and closes the partition; None: all are due."""
        if partition.topic != self._topic:
            return None
        now_ms = self._wall_ms()
        for index, record in enumerate(records):
            history = History.of(tuple(record.headers))
            if history is not None and history.due_ms > now_ms:
                self._due_ms[partition] = history.due_ms
                return index
        return None

"""The idempotent producer in use, and its replacement once it cannot be trusted any more.

aiokafka gives every batch of a partition the next sequence numbers and never takes them back: a
batch that failed for good leaves a gap, after which the broker refuses all later ones or, where
it knows none yet, lets them overtake. It also retries without end, and its `stop()` waits for
that. So a producer that has failed once gets no more batches: others that it holds may end, a
new one takes over at once.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError, UnknownTopicOrPartitionError

from service import clock
from service.core.errors import PublishFailed, WrongSettings
from service.core.events import ClientReplaced, Observe, StopForced
from service.kafka.client.private import drop_connections, fail_batches, tasks_of

CLOSE_TIMEOUT_S = 5.0
"""Closing a producer may take this long. It takes longer only where the connection hangs, and then
waiting does not help."""
OPEN_PAUSE_S = 1.0
"""After a failed start the next try waits this long; sends meanwhile fail at once."""
BATCH_MAX_BYTES = 131_072
"""Records of one partition travel together up to this size; a larger record travels alone."""

log = logging.getLogger(__name__)


class Output(NamedTuple):
    """One Kafka record to be written; `timestamp_ms` None means the time of writing.

    `size_bytes` is what it takes alone in a record batch: what a topic's limit is about. What
    `must_fit` (a dead letter) is never given up for its size: it is tried again, smaller.
    """

    topic: str
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]
    timestamp_ms: int | None
    size_bytes: int
    must_fit: bool = False


class Producer:
    """One started producer; `trusted` until something failed."""

    def __init__(self, client: AIOKafkaProducer, observe: Observe) -> None:
        self._client, self._observe = client, observe
        self.trusted = True
        self.closing = False
        self.batches = 0  # handed over, not settled

    def partitions(self, topic: str) -> Sequence[int]:
        """The topic's partitions as far as the metadata is known here."""
        return sorted(self._client.client.cluster.partitions_for_topic(topic) or ())

    async def discover(self, topic: str) -> None:
        """Fetch a topic's metadata; retries within the request timeout, then raises."""
        await self._client.partitions_for(topic)

    def knows(self, where: TopicPartition) -> bool:
        """Whether it can be sent to without looking anything up."""
        return where.partition in (
            self._client.client.cluster.partitions_for_topic(where.topic) or ()
        )

    async def enqueue(
        self, where: TopicPartition, outputs: Sequence[Output]
    ) -> asyncio.Future[Any]:
        """Give the client a batch; the future ends when all in-sync replicas have it, or with
        `KafkaError`, which this itself may raise.

        The caller must have no other batch of this partition under way, in any producer.
        """
        if where.partition not in await self._client.partitions_for(where.topic):
            raise UnknownTopicOrPartitionError
        batch = self._batch(outputs)
        sent: asyncio.Future[Any] = await self._client.send_batch(
            batch, where.topic, partition=where.partition
        )
        return sent

    def _batch(self, outputs: Sequence[Output]) -> Any:
        batch = self._client.create_batch()
        for each in outputs:
            appended = batch.append(
                timestamp=each.timestamp_ms, key=each.key, value=each.value, headers=each.headers
            )
            assert appended is not None, "a batch was cut for less than it holds"
        batch.close()
        return batch

    async def close(self) -> None:
        """Flush and close, within `CLOSE_TIMEOUT_S`; what hangs then is cut off."""
        with suppress(TimeoutError, KafkaError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._client.stop()
                return
        log.warning("the producer does not close in order: it is cut off")
        self._observe(StopForced("producer"))
        await self.cut_off()

    async def cut_off(self) -> None:
        """Close without flushing: batches that are not acknowledged fail.

        What already left this process may still be written, as a repetition of what is sent
        again. `stop()` of the client would retry for as long as the broker is away, so its parts
        are ended here one by one; the order matters: failing the batches before the tasks that
        send them have ended breaks the client's own bookkeeping.
        """
        client = self._client
        drop_connections(client)
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                while tasks := tasks_of(client):
                    for task in tasks:
                        task.cancel()
                    await asyncio.wait(tasks, timeout=0.5)
                await client.client.close()
        fail_batches(client)
        with suppress(TimeoutError, KafkaError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await client.stop()


class Producers:
    """Hands out the producer in use; closes those that are not trusted any more.

    Must be used within the task group that it is given: closing takes place in the background.
    """

    def __init__(
        self,
        create: Callable[[], AIOKafkaProducer],
        open_timeout_s: float,
        group: asyncio.TaskGroup,
        observe: Observe,
    ) -> None:
        self._create, self._observe = create, observe
        self._open_timeout_s = open_timeout_s
        self._group = group
        self._current: Producer | None = None
        self._opening = asyncio.Lock()
        self._not_before_s = 0.0
        self._partitions: dict[str, Sequence[int]] = {}

    async def open(self) -> Producer:
        """The producer in use, started where there is none; raises `PublishFailed`."""
        if self._current is not None and self._current.trusted:
            return self._current
        async with self._opening:
            if self._current is None or not self._current.trusted:
                self._current = await self._start()
            return self._current

    def partitions(self, topic: str) -> Sequence[int]:
        """The topic's partitions, from the producer in use or as they were last known."""
        if self._current is not None and (found := self._current.partitions(topic)):
            self._partitions[topic] = found
        return self._partitions.get(topic, ())

    def distrust(self, producer: Producer, why: str) -> None:
        """No more batches for it; those that it holds may end."""
        if producer.trusted:
            producer.trusted = False
            log.warning("the producer is replaced: %s", why)
            self._observe(ClientReplaced("producer"))

    def release(self, producer: Producer) -> None:
        """Batches of it have ended: closes it where they were the last before its replacement."""
        if not producer.trusted and not producer.batches and not producer.closing:
            producer.closing = True
            self._group.create_task(producer.close())

    def cut_off(self, producer: Producer, why: str) -> None:
        """No more batches for it, and those that it holds fail now."""
        self.distrust(producer, why)
        if not producer.closing:
            producer.closing = True
            self._group.create_task(producer.cut_off())

    async def close(self, *, flush: bool) -> None:
        """Close the one in use, within a bounded time; without `flush` what it holds fails."""
        if self._current is not None and not self._current.closing:
            self._current.trusted, self._current.closing = False, True
            await (self._current.close() if flush else self._current.cut_off())

    async def _start(self) -> Producer:
        if clock.now_s() < self._not_before_s:
            raise PublishFailed("no producer: the last try to open one has just failed")
        try:
            return await self._started(self._create())
        except (KafkaError, TimeoutError, OSError, WrongSettings) as error:
            # A file with credentials may be missing for a moment while it is renewed.
            self._not_before_s = clock.now_s() + OPEN_PAUSE_S
            raise PublishFailed(f"no producer: {type(error).__name__}") from error

    async def _started(self, client: AIOKafkaProducer) -> Producer:
        """A producer with its id from the broker; closed again where it gets none in time."""
        started = False
        try:
            async with asyncio.timeout(self._open_timeout_s):
                await client.start()
            started = True
            return Producer(client, self._observe)
        finally:
            if not started:
                await Producer(client, self._observe).close()

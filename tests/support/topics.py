"""What tests do to topics and groups from outside: create, produce, read to the end, look up."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import TopicAlreadyExistsError, for_code

_numbers = itertools.count()


def unique_name(word: str) -> str:
    """A name for a topic or group that no other test has."""
    return f"{word}-{os.getpid()}-{next(_numbers)}-{os.urandom(3).hex()}"


@dataclass(frozen=True, slots=True)
class Read:
    """One Kafka record as it stands in a topic."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()
    timestamp_ms: int = 0

    @property
    def header(self) -> dict[str, str]:
        """Headers as text; of a name that comes twice the last one."""
        return {name: (value or b"").decode(errors="replace") for name, value in self.headers}


@asynccontextmanager
async def admin(servers: str) -> AsyncIterator[AIOKafkaAdminClient]:
    client = AIOKafkaAdminClient(bootstrap_servers=servers, request_timeout_ms=10_000)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def producer(servers: str, **options: Any) -> AsyncIterator[AIOKafkaProducer]:
    options = {"acks": "all", "linger_ms": 0, "max_request_size": 20_000_000, **options}
    client = AIOKafkaProducer(bootstrap_servers=servers, **options)
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


async def create_topic(
    servers: str,
    name: str,
    partitions: int = 6,
    *,
    replication: int = 1,
    config: Mapping[str, str] | None = None,
) -> None:
    """Creates a topic on a real Kafka (the embedded broker has its own `create_topic`)."""
    async with admin(servers) as client:
        for _ in range(100):
            response = await client.create_topics(
                [NewTopic(name, partitions, replication, topic_configs=dict(config or {}))]
            )
            error = for_code(response.topic_errors[0][1])
            if not error.errno:
                break
            if error is TopicAlreadyExistsError:
                break
            # A broker that has just started answers before it may hold replicas.
            await asyncio.sleep(0.1)
        else:
            raise error()
        await _until_it_has_leaders(client, name, partitions)


async def _until_it_has_leaders(client: AIOKafkaAdminClient, name: str, partitions: int) -> None:
    for _ in range(100):
        (topic,) = await client.describe_topics([name])
        if sum(p["error_code"] == 0 for p in topic["partitions"]) == partitions:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"{name} got no leaders")


Sent = bytes | None | tuple[bytes | None, bytes | None]
"""A value, or a key and a value."""


async def produce(
    servers: str,
    topic: str,
    messages: Iterable[Sent],
    *,
    partition: int | None = None,
    headers: Sequence[tuple[str, bytes]] = (),
    timestamp_ms: int | None = None,
) -> list[tuple[int, int]]:
    """Sends them in order; returns (partition, offset) of each."""
    async with producer(servers) as client:
        waiting = []
        for message in messages:
            key, value = message if isinstance(message, tuple) else (None, message)
            waiting.append(
                await client.send(
                    topic,
                    value,
                    key,
                    partition=partition,
                    headers=list(headers),
                    timestamp_ms=timestamp_ms,
                )
            )
        sent = [await each for each in waiting]
    return [(each.partition, each.offset) for each in sent]


async def produce_transaction(
    servers: str,
    topic: str,
    messages: Iterable[Sent],
    *,
    partition: int = 0,
    abort: bool = False,
) -> None:
    """Sends them in one transaction and commits or aborts it (needs a real Kafka)."""
    name = unique_name("transaction")
    async with producer(servers, transactional_id=name) as client:
        await client.begin_transaction()
        for message in messages:
            key, value = message if isinstance(message, tuple) else (None, message)
            await client.send_and_wait(topic, value, key, partition=partition)
        await (client.abort_transaction() if abort else client.commit_transaction())


async def read_topic(servers: str, topic: str, *, committed_only: bool = True) -> list[Read]:
    """Everything that stands in a topic now, by partition and offset."""
    found = [read async for read in scan_topic(servers, topic, committed_only=committed_only)]
    return sorted(found, key=lambda each: (each.partition, each.offset))


async def scan_topic(
    servers: str, topic: str, *, committed_only: bool = True
) -> AsyncIterator[Read]:
    """Everything that stands in a topic now, each partition in its order, none held in memory."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=servers,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        isolation_level="read_committed" if committed_only else "read_uncommitted",
        max_partition_fetch_bytes=20_000_000,
    )
    await consumer.start()
    try:
        partitions = [TopicPartition(topic, each) for each in await _partitions(consumer, topic)]
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        while any([await consumer.position(each) < ends[each] for each in partitions]):
            for messages in (await consumer.getmany(timeout_ms=200)).values():
                for m in messages:
                    yield Read(
                        m.topic,
                        m.partition,
                        m.offset,
                        m.key,
                        m.value,
                        tuple(m.headers),
                        m.timestamp,
                    )
    finally:
        await consumer.stop()


async def _partitions(consumer: AIOKafkaConsumer, topic: str) -> set[int]:
    for _ in range(100):
        consumer._client.add_topic(topic)
        await consumer._client.force_metadata_update()
        partitions = consumer.partitions_for_topic(topic)
        if partitions:
            return partitions
        await asyncio.sleep(0.05)
    raise AssertionError(f"there is no topic {topic}")


async def end_offsets(servers: str, topic: str, *, committed_only: bool = True) -> dict[int, int]:
    """partition -> last stable offset; else the end, open transactions included."""
    level = "read_committed" if committed_only else "read_uncommitted"
    consumer = AIOKafkaConsumer(bootstrap_servers=servers, isolation_level=level)
    await consumer.start()
    try:
        partitions = [TopicPartition(topic, each) for each in await _partitions(consumer, topic)]
        ends = await consumer.end_offsets(partitions)
        return {each.partition: end for each, end in ends.items()}
    finally:
        await consumer.stop()


async def committed(
    servers: str, group: str, topic: str, partitions: int
) -> dict[int, tuple[int, str]]:
    """partition -> (next offset, metadata), for the partitions that have one."""
    async with admin(servers) as client:
        asked = [TopicPartition(topic, each) for each in range(partitions)]
        found = await client.list_consumer_group_offsets(group, partitions=asked)
    return {
        each.partition: (stored.offset, stored.metadata)
        for each, stored in found.items()
        if stored.offset >= 0
    }

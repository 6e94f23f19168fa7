"""How often an offset that is read right behind a transaction's commit is the earlier one.

    python -m tests.bench.read_behind_commit [--servers HOST:PORT] [--rounds 300]

Three ways: as any client reads, behind the answer to the commit; the same behind the start of the
next producer (the fence); and stable, as `service/kafka/client/stable_offsets.py` asks. Without
`--servers` it starts the tests' own broker.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.structs import OffsetAndMetadata

from service.core.messages import Partition
from service.kafka.client.stable_offsets import UnstableOffset, stable_offsets
from tests.support.kafka import find_broker
from tests.support.topics import admin, create_topic, unique_name

Read = Callable[[], Awaitable[int]]


class Rounds:
    """One input partition, one transaction a round."""

    def __init__(self, servers: str, client: AIOKafkaAdminClient) -> None:
        self._servers, self._client = servers, client
        self._group, self._id = unique_name("g"), unique_name("id")
        self.input, self.output = Partition(unique_name("in"), 0), unique_name("out")
        self._offset = 0

    async def producer(self) -> AIOKafkaProducer:
        made = AIOKafkaProducer(
            bootstrap_servers=self._servers, transactional_id=self._id, acks="all", linger_ms=0
        )
        await made.start()
        return made

    async def as_it_is(self) -> int:
        where = TopicPartition(*self.input)
        found = await self._client.list_consumer_group_offsets(self._group, partitions=[where])
        return int(found[where].offset)

    async def stable(self) -> int:
        while True:
            try:
                found = await stable_offsets(self._client, self._group, {self.input})
            except UnstableOffset:
                continue
            at = found[self.input]
            return -1 if at is None else at.offset

    async def play(self, rounds: int, read: Read, *, fenced: bool) -> str:
        """In how many rounds the first read was too early, and for how long at most."""
        early, longest_s = 0, 0.0
        producer = await self.producer()
        for _ in range(rounds):
            await self._commit(producer)
            if fenced:
                await producer.stop()
                producer = await self.producer()
            began_s = time.monotonic()
            if await read() != self._offset:
                early += 1
                while await read() != self._offset:
                    pass
                longest_s = max(longest_s, time.monotonic() - began_s)
        await producer.stop()
        return f"{early} of {rounds} too early, for {longest_s * 1000:.1f} ms at most"

    async def _commit(self, producer: AIOKafkaProducer) -> None:
        self._offset += 1
        at = {TopicPartition(*self.input): OffsetAndMetadata(self._offset, "")}
        async with producer.transaction():
            await producer.send_and_wait(self.output, b"1", partition=0)
            await producer.send_offsets_to_transaction(at, self._group)


async def measure(servers: str, rounds: int) -> None:
    """Prints one line for each way to read."""
    async with admin(servers) as client:
        each = Rounds(servers, client)
        await create_topic(servers, each.input.topic, 1)
        await create_topic(servers, each.output, 1)
        print("behind the commit:", await each.play(rounds, each.as_it_is, fenced=False))
        print("behind the fence: ", await each.play(rounds, each.as_it_is, fenced=True))
        print("stable:           ", await each.play(rounds, each.stable, fenced=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--servers")
    parser.add_argument("--rounds", type=int, default=300)
    given = parser.parse_args()
    if given.servers:
        asyncio.run(measure(given.servers, given.rounds))
        return
    broker = find_broker()
    broker.start()
    try:
        asyncio.run(measure(broker.bootstrap_servers, given.rounds))
    finally:
        broker.remove()


if __name__ == "__main__":
    main()

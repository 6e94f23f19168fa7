"""A worker in exactly-once mode without source and pipeline: a ledger, and lanes that try again.

It does with `Transactions` what source and pipeline do: fence, then read, then publish what the
ledger does not know as finished; a failed send goes again in the order of its lane.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.client import ConnectionGroup
from aiokafka.errors import KafkaError, NodeNotReadyError

from service.core.errors import PublishFailed
from service.core.messages import Partition
from service.kafka.client.stored import Stored
from service.kafka.sending.producers import BATCH_MAX_BYTES, Output
from service.kafka.sending.sizes import size_alone
from service.kafka.transactions.transactions import Transactions, transactional_options
from tests.support.topics import admin

Answer = Callable[[], Awaitable[Any]]
Interfere = Callable[[Any, Answer], Awaitable[Any]]


@dataclass
class Page:
    """What a ledger knows of one partition."""

    known: Stored | None
    finished: set[int] = field(default_factory=set)


class Ledger:
    """Keeps to the contract, and sees on every call that transactions keep to theirs.

    What is stored: the smallest offset that is not finished, and all finished ones as JSON.
    """

    def __init__(self) -> None:
        self.pages: dict[Partition, Page] = {}
        self.asked = 0
        self.attempts: list[Stored] = []
        self.lost: list[Partition] = []  # those that were fenced
        self.doubtful: set[str] = set()
        self.read: Callable[[Partition], Awaitable[Stored | None]] = self._as_known

    def takes(self, partition: Partition) -> bool:
        return partition in self.pages

    def to_store(self, partition: Partition, finishing: frozenset[int]) -> Stored | None:
        self.asked += 1
        page = self.pages.get(partition)
        if page is None or self.doubts(partition):
            return None
        assert not finishing & page.finished, "finished before its transaction was committed"
        finished = page.finished | finishing
        assert finished >= finished_in(page.known), "less is to be stored than was"
        next_offset = next(n for n in range(len(finished) + 1) if n not in finished)
        stored = Stored(next_offset, json.dumps(sorted(finished)))
        if finishing:
            self.attempts.append(stored)
        return stored

    def doubts(self, partition: Partition) -> bool:
        return partition.topic in self.doubtful

    def fitting(self, partition: Partition, offsets: Sequence[int]) -> int:
        assert list(offsets) == sorted(offsets), "the lowest go first"
        return len(offsets)

    def has_room(self, partition: Partition) -> bool:
        return True

    def known(self, partition: Partition) -> Stored | None:
        page = self.pages.get(partition)
        return None if page is None else page.known

    def stored(self, partition: Partition, stored: Stored) -> None:
        page = self.pages.get(partition)
        if page is not None:
            page.known = stored

    async def read_back(self, partition: Partition) -> Stored | None:
        return await self.read(partition)

    def fenced(self, partition: Partition) -> None:
        self.lost.append(partition)

    async def _as_known(self, partition: Partition) -> Stored | None:
        return self.known(partition)


def finished_in(stored: Stored | None) -> set[int]:
    """The offsets that count as finished by what Kafka holds."""
    return set() if stored is None else set(json.loads(stored.metadata))


def output(topic: str, value: bytes, key: bytes = b"k", **more: Any) -> Output:
    return Output(topic, key, value, [], None, size_alone(key, value, []), **more)


class Worker:
    """One process as far as Kafka can tell; made by `worker`."""

    def __init__(
        self,
        servers: str,
        group_id: str,
        reader: AIOKafkaAdminClient,
        tasks: asyncio.TaskGroup,
        options: Mapping[str, Any],
    ) -> None:
        self.servers, self.group_id, self._reader = servers, group_id, reader
        self.ledger = Ledger()
        self.ledger.read = self.read
        self.fenced = self.ledger.lost
        self.refused: list[tuple[str, int]] = []
        self.clients: list[AIOKafkaProducer] = []
        self.failed: dict[Partition, set[int]] = defaultdict(set)  # as LaneFailures keeps them
        self.interfere: Interfere | None = None
        self.client_options: dict[str, Any] = {}
        own: dict[str, Any] = {
            "batch_max_bytes": lambda topic: BATCH_MAX_BYTES,
            "interval_s": 0.02,
            "deadline_s": 10.0,
            "open_timeout_s": 10.0,
            **options,
        }
        self.deadline_s = own["deadline_s"]
        self.transactions = Transactions(
            self.create,
            group_id=group_id,
            observe=lambda _: None,
            refused=lambda topic, size: self.refused.append((topic, size)),
            group=tasks,
            **own,
        )
        self.transactions.ask(self.ledger)

    def create(self, transactional_id: str) -> AIOKafkaProducer:
        client = AIOKafkaProducer(
            bootstrap_servers=self.servers,
            transactional_id=transactional_id,
            **transactional_options(self.deadline_s) | self.client_options,
            acks="all",
            request_timeout_ms=10_000,
            max_batch_size=2 * BATCH_MAX_BYTES,
            linger_ms=0,
        )
        self.clients.append(client)
        send = client.client.send

        async def interfered(
            node: int, request: Any, *, group: ConnectionGroup = ConnectionGroup.DEFAULT
        ) -> Any:
            def go_on() -> Awaitable[Any]:
                return send(node, request, group=group)

            if self.interfere is None:
                return await go_on()
            return await self.interfere(request, go_on)

        client.client.send = interfered
        return client

    async def read(self, partition: Partition) -> Stored | None:
        where = TopicPartition(*partition)
        found = await self._reader.list_consumer_group_offsets(self.group_id, partitions=[where])
        if where not in found:
            raise NodeNotReadyError("the group's coordinator gave no offsets")
        at = found[where]
        return Stored(at.offset, at.metadata or "") if at.offset >= 0 else None

    async def own(self, *partitions: Partition) -> None:
        """Fence, and only then read: what a restore does."""
        await self.transactions.fence(frozenset(partitions))
        for partition in partitions:
            found = await self._read_patiently(partition)
            self.ledger.pages[partition] = Page(found, finished_in(found))
            self.failed.pop(partition, None)

    async def _read_patiently(self, partition: Partition) -> Stored | None:
        """A broker that has just started has no place for groups yet."""
        for _ in range(100):
            with suppress(KafkaError):
                return await self.read(partition)
            await asyncio.sleep(0.1)
        raise AssertionError("the group has no coordinator")

    def lose(self, *partitions: Partition) -> None:
        """What the source does when it hears that they are another's."""
        for partition in partitions:
            self.ledger.pages.pop(partition, None)
        self.transactions.drop(partitions)

    def send(
        self, partition: Partition, offset: int, outputs: Iterable[tuple[int, Output]]
    ) -> asyncio.Future[None]:
        """Hand one over; with its commit it counts as finished, in a callback as the pipeline's."""
        page = self.ledger.pages[partition]

        def settled(future: asyncio.Future[None]) -> None:
            if not future.cancelled() and future.exception() is None:
                page.finished.add(offset)

        future = self.transactions.hand_over(
            partition, offset, list(outputs), lambda: self.failed[partition].add(offset)
        )
        future.add_done_callback(settled)
        return future

    async def publish(
        self,
        partition: Partition,
        offsets: Iterable[int],
        outputs: Callable[[int], list[tuple[int, Output]]],
        pause_s: float = 0.0,
    ) -> int:
        """One lane: all are handed over before the first is looked at; returns what failed.

        Those that the ledger knows as finished are left out. Ends early where the partition is
        lost.
        """
        failures = 0
        lane = [each for each in offsets if each not in self.ledger.pages[partition].finished]
        while lane and self.transactions.holds(partition) | (failures == 0):
            sent = []
            for offset in lane:
                sent.append(self.send(partition, offset, outputs(offset)))
                await asyncio.sleep(pause_s)
            ends = await asyncio.gather(*sent, return_exceptions=True)
            assert all(end is None or isinstance(end, PublishFailed) for end in ends), ends
            lane = [which for which, end in zip(lane, ends, strict=True) if end is not None]
            failures += len(lane)
            await asyncio.sleep(0.05 if lane else 0)
        return failures


@asynccontextmanager
async def worker(
    servers: str, group_id: str, *, stops: bool = True, **options: Any
) -> AsyncIterator[Worker]:
    """A worker within a task group of its own. `stops`: in order; else as if it was killed."""
    async with admin(servers) as reader, asyncio.TaskGroup() as tasks:
        made = Worker(servers, group_id, reader, tasks, options)
        try:
            yield made
        finally:
            if stops:
                await made.transactions.stop(5.0)
            else:
                await kill(made)


async def kill(worker: Worker) -> None:
    """Its connections end and it says nothing more: what others see of a `kill -9`."""
    writers = worker.transactions._writers
    producers = [writer.stop() for writer in writers.values()]
    writers.clear()
    for producer in producers:
        if producer is not None:
            await producer.cut_off()


def hangs_at(kind: type[Any], *, arrives: bool, times: int = 1) -> tuple[Interfere, asyncio.Event]:
    """The next requests of a kind are never answered, whether they arrive or not.

    The event is set once the first of them is under way (and has arrived, where it does).
    """
    reached = asyncio.Event()
    left = times

    async def interfere(request: Any, go_on: Answer) -> Any:
        nonlocal left
        if not isinstance(request, kind) or left == 0:
            return await go_on()
        left -= 1
        if arrives:
            await go_on()
        reached.set()
        return await asyncio.Event().wait()

    return interfere, reached


def pauses_at(kind: type[Any]) -> tuple[Interfere, asyncio.Event, asyncio.Event]:
    """Requests of a kind wait for the second event; the first says that one does."""
    reached, gate = asyncio.Event(), asyncio.Event()

    async def interfere(request: Any, go_on: Answer) -> Any:
        if isinstance(request, kind):
            reached.set()
            await gate.wait()
        return await go_on()

    return interfere, reached, gate

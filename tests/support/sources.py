"""Where sources read from, for the contract suite: a Kafka, or the fake that stands for one.

`Kafka` and `Fake` offer the same steps (make a topic, send, look up what is committed, be a member
of a group), so that a claim is written once and holds for both.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition

from service.core.completed import finished_ranges
from service.core.events import Event
from service.core.messages import Batch, Message, Partition
from service.core.tracker import Given, Progress
from service.demo.broker import EmbeddedBroker
from service.kafka.client.private import Membership
from service.kafka.group.group_offsets import GroupOffsets
from service.kafka.source import KafkaSource
from service.ports import Source
from service.settings import Settings
from tests.support import topics
from tests.support.fakes import FakeBroker, FakeSource

PATIENCE_S = 20.0
"""Longer than anything here takes on a busy machine."""

FAKE_POLL_WAIT_S = 0.02

S = TypeVar("S", bound=Source)


@dataclass
class Member(Generic[S]):
    """A source with the pipeline's side of it: checks on every poll what must always hold."""

    source: S
    told: list[Event] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    epochs: dict[Partition, int] = field(default_factory=dict)
    assignments: list[dict[Partition, int]] = field(default_factory=list)
    positions: dict[Partition, int] = field(default_factory=dict)
    ends: dict[Partition, int] = field(default_factory=dict)
    when_revoked: Callable[[], Awaitable[None]] | None = None
    before_commit: Callable[[Mapping[Partition, Progress]], None] = lambda _: None
    revokes: int = 0
    wanted: dict[Partition, Progress] = field(default_factory=dict)
    given: dict[Partition, Given] = field(default_factory=dict)
    stored_last: dict[Partition, Progress] = field(default_factory=dict)
    next: dict[tuple[Partition, int], int] = field(default_factory=dict)
    lags: Mapping[Partition, int | None] = field(default_factory=dict)

    async def revoked(self) -> None:
        self.revokes += 1
        if self.when_revoked is not None:
            await self.when_revoked()

    def assigned(self, given: Mapping[Partition, Given]) -> None:
        self.given = dict(given)
        self.epochs = {partition: each.epoch for partition, each in given.items()}
        self.assignments.append(dict(self.epochs))

    def progress(
        self, partition: Partition, finishing: frozenset[int] = frozenset()
    ) -> Progress | None:
        return self.wanted.get(partition)

    def has_room(self, partition: Partition) -> bool:
        return False  # what would be in the map is looked at

    def seen(self, lags: Mapping[Partition, int | None]) -> None:
        self.lags = lags

    def stored(self, partition: Partition, progress: Progress) -> None:
        self.stored_last[partition] = progress

    async def poll(self, limit: int = 100, closed: AbstractSet[Partition] = frozenset()) -> Batch:
        batch = await self.source.poll(limit, closed)
        assert len(batch.messages) <= limit
        for message in batch.messages:
            self._check(message, closed)
        for partition, position in batch.positions.items():
            key = partition, self.epochs[partition]
            assert position >= self.next.get(key, 0), "a position behind what was delivered"
            self.next[key] = position  # nothing may come from before it
        self.messages += batch.messages
        self.positions |= batch.positions
        self.ends |= batch.ends
        return batch

    def _check(self, message: Message, closed: AbstractSet[Partition]) -> None:
        assert message.partition not in closed
        assert message.epoch == self.epochs[message.partition], "before its restore, or late"
        key = message.partition, message.epoch
        assert message.offset >= self.next.get(key, 0), "out of order, twice, or passed over"
        self.next[key] = message.offset + 1

    async def commit(self, offsets: Mapping[Partition, int | Progress]) -> None:
        """Store these, as a pipeline that has come as far would."""
        self.wanted = {
            partition: at if isinstance(at, Progress) else Progress(at)
            for partition, at in offsets.items()
        }
        self.before_commit(self.wanted)
        await self.source.commit(offsets.keys())

    async def until(
        self,
        reached: Callable[[], bool],
        limit: int = 100,
        closed: AbstractSet[Partition] = frozenset(),
    ) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not reached():
                await self.poll(limit, closed)

    async def turn(self, polls: int = 4) -> None:
        """A few polls, in which nothing is expected."""
        for _ in range(polls):
            await self.poll()

    @property
    def texts(self) -> list[str]:
        return [(message.value or b"").decode() for message in self.messages]

    def heard(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.told if isinstance(event, kind)]


class HeldUp:
    """A step that stands still, once it is `asked` for, until its `gate` is opened."""

    def __init__(self) -> None:
        self.asked, self.gate = asyncio.Event(), asyncio.Event()

    async def wait(self) -> None:
        self.asked.set()
        await self.gate.wait()


@dataclass
class Kafka:
    """A broker under test; the embedded one has neither transactions nor groups of several."""

    servers: str
    embedded: EmbeddedBroker | None = None

    async def topic(self, partitions: int = 1) -> str:
        name = topics.unique_name("in")
        if self.embedded is not None:
            self.embedded.create_topic(name, partitions)
        else:
            await topics.create_topic(self.servers, name, partitions)
        return name

    async def send(self, topic: str, *texts: str, partition: int | None = 0) -> None:
        await topics.produce(
            self.servers, topic, [text.encode() for text in texts], partition=partition
        )

    async def produce(
        self,
        topic: str,
        messages: Iterable[topics.Sent],
        headers: Sequence[tuple[str, bytes]] = (),
        timestamp_ms: int | None = None,
    ) -> None:
        await topics.produce(
            self.servers, topic, messages, partition=0, headers=headers, timestamp_ms=timestamp_ms
        )

    async def transaction(self, topic: str, *texts: str, abort: bool = False) -> None:
        """One that ends with a marker, which takes an offset."""
        values = [text.encode() for text in texts]
        await topics.produce_transaction(self.servers, topic, values, abort=abort)

    async def committed(self, group: str, topic: str, partitions: int = 1) -> dict[int, int]:
        found = await topics.committed(self.servers, group, topic, partitions)
        return {partition: offset for partition, (offset, _) in found.items()}

    async def store(
        self, group: str, topic: str, offsets: dict[int, int], metadata: str = ""
    ) -> None:
        """What another program would have stored for the group."""
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.servers, group_id=group, enable_auto_commit=False
        )
        await consumer.start()
        try:
            consumer.assign([TopicPartition(topic, number) for number in offsets])
            await consumer.commit(
                {TopicPartition(topic, number): (at, metadata) for number, at in offsets.items()}
            )
        finally:
            await consumer.stop()

    def hold_up_restores(self, monkeypatch: pytest.MonkeyPatch) -> HeldUp:
        """Assignments stand still before the group's offsets are read."""
        held_up, stored = HeldUp(), GroupOffsets.stored

        async def slow(offsets: GroupOffsets) -> object:
            await held_up.wait()
            return await stored(offsets)

        monkeypatch.setattr(GroupOffsets, "stored", slow)
        return held_up

    def hold_up_commits(self, monkeypatch: pytest.MonkeyPatch) -> HeldUp:
        """Commits stand still before they are sent."""
        held_up, find = HeldUp(), Membership.find_coordinator

        async def slow(membership: Membership) -> None:
            await held_up.wait()
            await find(membership)

        monkeypatch.setattr(Membership, "find_coordinator", slow)
        return held_up

    @asynccontextmanager
    async def member(
        self, topic: str, group: str, /, *, start_over: bool = False, **sections: dict[str, object]
    ) -> AsyncIterator[Member[KafkaSource]]:
        told: list[Event] = []
        given = settings(self, topic, group, **sections)
        source = KafkaSource(given, told.append, start_over=start_over)
        one = Member(source, told)
        await source.start(one)
        try:
            yield one
        finally:
            await source.stop()


class Fake:
    """Fake brokers, one for each topic, whose members share out the partitions among them."""

    def __init__(self) -> None:
        self._brokers: dict[str, FakeBroker] = {}
        self._groups: dict[str, str] = {}
        self._members: dict[str, list[FakeSource]] = {}
        self._restores: HeldUp | None = None
        self._rebalancing = asyncio.Lock()
        self._rebalances: list[asyncio.Task[None]] = []

    async def topic(self, partitions: int = 1) -> str:
        name = topics.unique_name("in")
        self._brokers[name], self._members[name] = FakeBroker(partitions, name), []
        return name

    async def send(self, topic: str, *texts: str, partition: int = 0) -> None:
        for text in texts:
            self._brokers[topic].append(text, number=partition)

    async def produce(
        self,
        topic: str,
        messages: Iterable[topics.Sent],
        headers: Sequence[tuple[str, bytes]] = (),
        timestamp_ms: int = 0,
    ) -> None:
        for message in messages:
            key, value = message if isinstance(message, tuple) else (None, message)
            log = self._brokers[topic].logs[part(topic)]
            log.append(value, key, tuple(headers), timestamp_ms)

    async def transaction(self, topic: str, *texts: str, abort: bool = False) -> None:
        log = self._brokers[topic].logs[part(topic)]
        for text in texts:
            if abort:
                log.hole()
            else:
                log.append(text.encode())
        log.hole()

    async def committed(self, group: str, topic: str, partitions: int = 1) -> dict[int, int]:
        assert self._groups[topic] == group, "a fake broker knows one group"
        found = self._brokers[topic].committed.items()
        return {where.partition: offset for where, offset in found}

    async def store(self, group: str, topic: str, offsets: dict[int, int]) -> None:
        stored = {part(topic, number): Progress(offset) for number, offset in offsets.items()}
        self._brokers[topic].stored.update(stored)

    def hold_up_restores(self, monkeypatch: pytest.MonkeyPatch) -> HeldUp:
        self._restores = HeldUp()
        return self._restores

    def hold_up_commits(self, monkeypatch: pytest.MonkeyPatch) -> HeldUp:
        """Those of the members that are there."""
        held_up = HeldUp()
        for members in self._members.values():
            for member in members:
                member.before_storing = held_up.wait
        return held_up

    @asynccontextmanager
    async def member(self, topic: str, group: str, /) -> AsyncIterator[Member[FakeSource]]:
        assert self._groups.setdefault(topic, group) == group, "a fake broker knows one group"
        broker = self._brokers[topic]

        def acknowledge(wanted: Mapping[Partition, Progress]) -> None:
            # The fake takes no commit before the outcomes, and here nobody publishes any.
            for where, at in wanted.items():
                for each in (range(at.next_offset), *finished_ranges(at.next_offset, at.runs)):
                    broker.acknowledged[where].update(each)

        source = FakeSource(broker, poll_wait_s=FAKE_POLL_WAIT_S)
        one = Member(source, before_commit=acknowledge)
        source.assignment = one
        self._members[topic].append(source)
        self._rebalance(topic)
        try:
            yield one
        finally:
            self._members[topic].remove(source)
            self._rebalance(topic)

    async def settle(self) -> None:
        """Until no rebalance runs; raises what one has raised."""
        async with asyncio.timeout(PATIENCE_S):  # a test that fails may leave a gate shut
            while self._rebalances:
                await self._rebalances.pop()

    def _rebalance(self, topic: str) -> None:
        self._rebalances.append(asyncio.create_task(self._share_out(topic)))

    async def _share_out(self, topic: str) -> None:
        """Eager and sticky, as the group does it: all is revoked, most of it comes back."""
        async with self._rebalancing:
            members = tuple(self._members[topic])
            held = [sorted(member.epochs) for member in members]
            for member in members:
                await member.revoke()
            if self._restores is not None:
                await self._restores.wait()
            everything = sorted(self._brokers[topic].logs)
            kept = [mine[: self._quota(i, members, everything)] for i, mine in enumerate(held)]
            left = [each for each in everything if not any(each in mine for mine in kept)]
            for i, member in enumerate(members):
                room = self._quota(i, members, everything) - len(kept[i])
                fresh, left = left[:room], left[room:]
                member.hold(keep=set(kept[i]), fresh=set(fresh))

    def _quota(self, index: int, members: Sequence[object], everything: Sequence[object]) -> int:
        share, rest = divmod(len(everything), len(members))
        return share + (index < rest)


Broker: TypeAlias = Kafka | Fake


def settings(kafka: Kafka, topic: str, group: str, /, **sections: dict[str, object]) -> Settings:
    given: dict[str, dict[str, object]] = {
        "kafka": {
            "bootstrap_servers": kafka.servers,
            "group_id": group,
            # The embedded broker lets a group wait for members that have left until shortly
            # before their session would time out.
            "session_timeout_s": 2.0 if kafka.embedded else 6.0,
            "request_timeout_s": 10.0,
        },
        "input": {"topics": topic},
    }
    for section, values in sections.items():
        given[section] = {**given.get(section, {}), **values}
    return Settings.model_validate(given)


def member(
    broker: Broker, topic: str, group: str, /, **sections: dict[str, object]
) -> AbstractAsyncContextManager[Member]:
    """A member of the group while the context is open; it leaves at the end."""
    return broker.member(topic, group, **sections)


async def both(first: Member, second: Member, reached: Callable[[], bool]) -> None:
    """Two members poll side by side until it is so."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(first.until(reached))
        tasks.create_task(second.until(reached))


def part(topic: str, number: int = 0) -> Partition:
    return Partition(topic, number)

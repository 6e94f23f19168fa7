"""Real holdings, transactions and writers of one worker; Kafka's clients alone are stand-ins."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from types import SimpleNamespace
from typing import Any

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from service.core.errors import PublishFailed
from service.core.messages import Partition
from service.core.tracker import Progress
from service.kafka.client.stable_offsets import UnstableOffset
from service.kafka.client.stored import Stored
from service.kafka.group.group_offsets import GroupOffsets
from service.kafka.group.holdings import Remembered
from service.kafka.group.member import Member as GroupMember
from service.kafka.group.starts import LogRange
from service.kafka.transactions.producer import TransactionalProducer
from service.kafka.transactions.transactions import Transactions
from tests.support.sources import HeldUp, Kafka, Member, settings
from tests.support.transactions import output

POLL_S = 0.2
TOPIC = "in"
P, Q = Partition(TOPIC, 0), Partition(TOPIC, 1)


class Group:
    """A place in a group, and what Kafka holds for the group."""

    def __init__(self) -> None:
        self.member_id, self.generation = "member", 1
        self.stored: dict[Partition, Stored] = {}
        self.reassignment_in_progress = False
        self.assignment = None
        self._coordinator = self._subscription = self.subscription = self

    def pause(self, *_: TopicPartition) -> None: ...

    def seek(self, _: TopicPartition, offset: int) -> None: ...

    def resume(self, _: TopicPartition) -> None: ...


class Offsets(GroupOffsets):
    """What Kafka answers about them.

    `stale` holds what the next reads of a partition say instead; for as many of them as `unstable`
    says, a read that asks for what is stable is refused.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self.stale: dict[Partition, list[Stored | None]] = defaultdict(list)
        self.unstable: dict[Partition, int] = defaultdict(int)
        self.ends: dict[Partition, int] = defaultdict(lambda: 100)
        self.reads = 0
        self.before_reading: HeldUp | None = None
        self.before_bounds: HeldUp | None = None

    async def stored(self) -> dict[Partition, Stored | None]:
        self.reads += 1
        if self.before_reading is not None:
            await self.before_reading.wait()
        return await self.stored_of({P, Q})

    async def stored_of(self, asked: AbstractSet[Partition]) -> dict[Partition, Stored | None]:
        await asyncio.sleep(0)
        return {each: self._read(each) for each in asked}

    async def stable_of(self, asked: AbstractSet[Partition]) -> dict[Partition, Stored | None]:
        await asyncio.sleep(0)
        for each in asked:
            if self.unstable[each]:
                self.unstable[each] -= 1
                raise UnstableOffset
        return {each: self._group.stored.get(each) for each in asked}

    async def topic_ids(self) -> dict[str, str]:
        return {}

    async def bounds(self, partitions: AbstractSet[Partition]) -> dict[Partition, LogRange]:
        if self.before_bounds is not None:
            await self.before_bounds.wait()
        return {each: LogRange(0, self.ends[each]) for each in partitions}

    async def chosen(
        self, start: object, bounds: Mapping[Partition, LogRange]
    ) -> dict[Partition, int]:
        return dict.fromkeys(bounds, 0)

    def _read(self, partition: Partition) -> Stored | None:
        stale = self.stale[partition]
        return stale.pop(0) if stale else self._group.stored.get(partition)


class Producer(TransactionalProducer):
    """Commits at once what it is given, unless it is told to fail or is held up."""

    def __init__(self, one: OneWorker, partition: Partition) -> None:
        self._one, self._partition = one, partition
        self.used = False

    async def begin(self) -> None:
        self.used = True
        await asyncio.sleep(0)

    async def send(self, batches: object) -> dict[TopicPartition, Any]:
        await asyncio.sleep(0)
        self._fail()
        return {}

    async def store(self, group_id: str, partition: Partition, stored: Stored) -> None:
        self._storing = stored
        await asyncio.sleep(0)

    async def commit(self) -> None:
        if (held_up := self._one.slow_commits.get(self._partition)) is not None:
            await held_up.wait()
        self._fail()
        self._one.group.stored[self._partition] = self._storing
        if self._partition in self._one.loses_answers:
            raise KafkaError("no answer")

    def _fail(self) -> None:
        if (error := self._one.fails.pop(self._partition, None)) is not None:
            raise error

    async def abort(self) -> None: ...

    async def end(self) -> None: ...

    async def cut_off(self) -> None: ...


class OneWorker:
    """A member of a group with P and Q to read, in the task group that it is given."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.group = Group()
        self.offsets = Offsets(self.group)
        self.pipeline: Member[Any] = Member(None)
        self.fails: dict[Partition, Exception] = {}
        self.loses_answers: set[Partition] = set()  # of commits that have succeeded
        self.slow_commits: dict[Partition, HeldUp] = {}
        self.slow_opens: HeldUp | None = None
        self.opened: list[Partition] = []
        self.doubtful: set[str] = set()
        self.remembered = Remembered()
        self.transactions = Transactions(
            lambda _: None,
            group_id="g",
            refused=lambda *_: None,
            observe=lambda _: None,
            batch_max_bytes=lambda _: 10**6,
            interval_s=0.0,
            deadline_s=5.0,
            open_timeout_s=5.0,
            group=tasks,
        )
        self.transactions._open = self._open  # type: ignore[method-assign]
        self.join()

    def join(self) -> None:
        """Another client takes the place of the one before, as in the source."""
        self.member = GroupMember(
            settings(Kafka("127.0.0.1:1"), TOPIC, "g"),
            self.group,
            self.offsets,
            self.pipeline,
            self.pipeline.told.append,
            SimpleNamespace(on_generation_assignment=lambda _: None),
            self.transactions,
            remembered=self.remembered,
            doubtful=lambda: self.doubtful,
        )
        self.holdings = self.member.holdings
        self.transactions.ask(self.holdings)

    async def given(self, *partitions: Partition) -> None:
        await self.member.on_assigned({TopicPartition(*each) for each in partitions})

    async def publish(self, partition: Partition, offset: int) -> str:
        """Returns ok, or why it was not published."""
        self.pipeline.wanted[partition] = Progress(offset + 1)
        outputs = [(0, output("out", b"1"))]
        try:
            await self.transactions.hand_over(partition, offset, outputs, lambda: None)
        except PublishFailed as failure:
            return str(failure)
        return "ok"

    async def poll_for(self, seconds: float) -> None:
        """What polls do about what is given and not held; each sees that none is forgotten."""
        for _ in range(round(seconds / POLL_S)):
            await self.member.see_to_the_rest()
            self.holdings.assert_whole()
            await asyncio.sleep(POLL_S)

    async def _open(self, partition: Partition) -> TransactionalProducer:
        if self.slow_opens is not None:
            await self.slow_opens.wait()
        self.opened.append(partition)
        await asyncio.sleep(0)
        return Producer(self, partition)

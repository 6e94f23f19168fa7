"""Looks at topics and at the client's progress from outside of the client, for ever.

A consumer can fall silent without an error: its fetching hangs, its metadata is stale, it does
not learn of new partitions, or its topic is not the one it was. None of that shows from within,
so it is asked for through another connection, and compared. What to do is decided in
kafka/group/watchdog.py; the source does it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError, NoError, UnknownTopicOrPartitionError

from service import clock
from service.core.errors import CannotRun, WrongSettings
from service.core.messages import Partition
from service.kafka.client.connection import METADATA_MAX_AGE_MS, client_options
from service.kafka.client.deadlines import STOP_S, briefly, within
from service.kafka.client.log_ends import ends_at
from service.kafka.client.topics_seen import FoundTopic, find_topics
from service.kafka.group.watchdog import SILENT_S, SilenceWatch, Standing, TopicSeen, TopicsWatch
from service.settings import KafkaSettings

log = logging.getLogger(__name__)

LOOK_EVERY_S = 10.0
"""The pause between two looks. Each look costs a request to one broker and one to each leader."""

LOOK_S = 10.0
"""One look may take this long, the way to the brokers included."""


class Supervised(Protocol):
    """The client that is looked after."""

    def standing(self) -> Mapping[Partition, int]:
        """The offset behind what was returned, of each partition that is held."""

    def knows(self, topic: str) -> int:
        """How many partitions of the topic its own metadata has."""

    def lags_seen(self, lags: Mapping[Partition, int | None]) -> None:
        """All partitions of the topics, and how far the group is behind in each, if known."""

    def broker_answered(self) -> None:
        """A broker has answered a look."""

    def replace(self, reason: str) -> None:
        """Give the client up for another; raises `CannotRun` where that was done too often."""


class Supervision:
    """What the looks have found; `run` takes them. For one event loop.

    `found` is what brokers told of the topics before reading began.
    """

    def __init__(
        self, kafka: KafkaSettings, found: Mapping[str, FoundTopic], *, lags: bool = False
    ) -> None:
        """With `lags`, a look asks for the lag of all partitions too, whoever holds them."""
        self._kafka, self._asks_lags = kafka, lags
        # A request that hangs is given up by the client itself after its timeout, and repeated.
        self._silence = SilenceWatch(max(SILENT_S, kafka.request_timeout_s + LOOK_EVERY_S))
        self._topics = TopicsWatch(
            {topic: each.id for topic, each in found.items()},
            behind_s=2 * METADATA_MAX_AGE_MS / 1000,
        )
        self.partitions = {topic: each.partitions for topic, each in found.items()}
        self._asked: set[Partition] = set()
        self._excused: set[Partition] = set()
        self._looked_at_s: float | None = None
        self._look_now = asyncio.Event()

    @property
    def doubtful(self) -> AbstractSet[str]:
        """Topics that are gone, or not those that were read: nothing may be committed for them."""
        return self._topics.doubtful

    @property
    def look_age_s(self) -> float:
        """Since the last look ended, well or badly; 0 while none are taken."""
        return 0.0 if self._looked_at_s is None else clock.now_s() - self._looked_at_s

    def asked(self, partition: Partition) -> None:
        """It was polled for messages."""
        self._asked.add(partition)

    def excuse(self, partitions: Iterable[Partition]) -> None:
        """These gave an error, which is seen to elsewhere: no silence."""
        self._excused.update(partitions)

    def doubt(self, topics: Iterable[str]) -> None:
        """A broker does not know one of these: nothing is committed for them until a look, which
        comes at once, has found the same topics."""
        self._topics.doubt(topics)
        self._look_now.set()

    def forget(self) -> None:
        """Another client starts with no blame."""
        self._silence.forget()
        self._topics.forget()
        self._asked.clear()

    async def run(self, client: Supervised) -> None:
        """Look until cancelled. No failure of Kafka's ends it.

        Raises `CannotRun` where a topic is gone or another, or where replacing does not help.
        """
        lookout = Lookout(self._kafka, lags=self._asks_lags)
        try:
            while True:
                self._looked_at_s = clock.now_s()
                await self._until_the_next_look()
                look = await lookout.look(list(self.partitions), client.standing().keys())
                if look is not None:
                    client.broker_answered()
                    self._judge(look, client)
                    client.lags_seen(self.lags(look.lags))
        finally:
            self._looked_at_s = None
            await lookout.close()

    async def _until_the_next_look(self) -> None:
        with suppress(TimeoutError):
            await within(LOOK_EVERY_S, self._look_now.wait())
        self._look_now.clear()

    def lags(self, known: Mapping[Partition, int]) -> dict[Partition, int | None]:
        """Every partition of the topics, with its lag where that is known."""
        everything = [
            Partition(topic, number)
            for topic, partitions in self.partitions.items()
            for number in range(partitions)
        ]
        return {each: known.get(each) for each in everything}

    def _judge(self, look: Look, client: Supervised) -> None:
        now_s = clock.now_s()
        seen = {
            topic: _seen(found, client.knows(topic))
            for topic, found in look.topics.items()
            if found.error in (NoError, UnknownTopicOrPartitionError)
        }
        doubted = self.doubtful | set()
        end = self._topics.judge(now_s, seen)
        if end is not None:
            raise CannotRun(end)
        for topic in self.doubtful - doubted:
            log.warning("brokers don't know topic %s any more: they are asked again", topic)
        self._count(seen)
        reason = self._silent(now_s, look, client) or self._topics.behind(now_s, seen)
        if reason is not None:
            client.replace(reason)

    def _silent(self, now_s: float, look: Look, client: Supervised) -> str | None:
        asked = self._asked - self._excused
        self._asked, self._excused = set(), set()
        standing = {
            partition: Standing(position, look.ends[partition])
            for partition, position in client.standing().items()
            if partition in look.ends
        }
        return self._silence.judge(now_s, LOOK_EVERY_S, standing, asked)

    def _count(self, seen: Mapping[str, TopicSeen | None]) -> None:
        for topic, each in seen.items():
            if each is not None and each.partitions != self.partitions[topic]:
                log.info("topic %s has now %d partitions", topic, each.partitions)
                self.partitions[topic] = each.partitions


def _seen(found: FoundTopic, known: int) -> TopicSeen | None:
    return TopicSeen(found.id, found.partitions, known) if found.error is NoError else None


# --- the other connection ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Look:
    """What brokers say now; `ends` (last stable offsets) only of partitions whose leader told."""

    topics: Mapping[str, FoundTopic]
    ends: Mapping[Partition, int]
    lags: Mapping[Partition, int] = field(default_factory=dict)
    """Messages between what the group has stored and the end, of all partitions, where known."""


class Lookout:
    """A client of its own, opened anew after each failure: it begins at the bootstrap servers,
    which lead to the brokers also when all of them have moved."""

    def __init__(self, kafka: KafkaSettings, *, lags: bool = False) -> None:
        self._kafka, self._asks_lags = kafka, lags
        self._admin: AIOKafkaAdminClient | None = None
        self._failing = False

    async def look(self, topics: list[str], held: AbstractSet[Partition]) -> Look | None:
        """What brokers say, within `LOOK_S` and a little; None, with a warning, if they don't."""
        try:
            look = await within(LOOK_S, self._ask_brokers(topics, held))
        except (KafkaError, OSError, TimeoutError, WrongSettings) as error:
            if not self._failing:
                log.warning("brokers do not tell about the topics: %s", type(error).__name__)
            self._failing = True
            await self.close()
            return None
        self._failing = False
        return look

    async def close(self) -> None:
        """Close the connections, bounded; a second call does nothing."""
        admin, self._admin = self._admin, None
        if admin is not None:
            await briefly(admin.close, STOP_S)

    async def _ask_brokers(self, topics: list[str], held: AbstractSet[Partition]) -> Look:
        if self._admin is None:
            self._admin = AIOKafkaAdminClient(**client_options(self._kafka))
            await self._admin.start()
        found = await find_topics(self._admin, topics)
        asked = _all_partitions(found) if self._asks_lags else held
        ends = await self._ends(self._admin, _by_leader(found, asked))
        lags = await self._lags(self._admin, ends) if self._asks_lags else {}
        return Look(found, {each: end for each, end in ends.items() if each in held}, lags)

    async def _lags(
        self, admin: AIOKafkaAdminClient, ends: Mapping[Partition, int]
    ) -> dict[Partition, int]:
        """A partition of which the group has stored nothing has no lag that we know of."""
        stored = await admin.list_consumer_group_offsets(
            self._kafka.group_id, partitions=[TopicPartition(*each) for each in ends]
        )
        offsets = {Partition(*each): at.offset for each, at in stored.items() if at.offset >= 0}
        return {each: max(0, ends[each] - at) for each, at in offsets.items()}

    async def _ends(
        self, admin: AIOKafkaAdminClient, by_leader: Mapping[int, Mapping[str, list[int]]]
    ) -> dict[Partition, int]:
        async with asyncio.TaskGroup() as tasks:
            told = [
                tasks.create_task(ends_at(admin, leader, partitions))
                for leader, partitions in by_leader.items()
            ]
        return {partition: end for each in told for partition, end in each.result().items()}


def _all_partitions(found: Mapping[str, FoundTopic]) -> frozenset[Partition]:
    return frozenset(
        Partition(topic, number) for topic, each in found.items() for number in each.leaders
    )


def _by_leader(
    found: Mapping[str, FoundTopic], held: AbstractSet[Partition]
) -> dict[int, dict[str, list[int]]]:
    by_leader: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for topic, number in held:
        leader = found[topic].leaders.get(number, -1) if topic in found else -1
        if leader >= 0:
            by_leader[leader][topic].append(number)
    return by_leader

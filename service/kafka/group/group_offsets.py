"""What Kafka knows of the input topics and of the group's progress in them."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from datetime import datetime

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import NodeNotReadyError, NoError

from service.core.messages import Partition
from service.kafka.client.epoch_ends import epoch_ends
from service.kafka.client.stable_offsets import stable_offsets
from service.kafka.client.stored import Stored
from service.kafka.client.topics_seen import find_topics, topic_ids
from service.kafka.group.starts import LogRange
from service.settings import Start


class GroupOffsets:
    """Reads, and nothing else. Every call raises `KafkaError` and may wait without end."""

    def __init__(
        self,
        admin: AIOKafkaAdminClient,
        consumer: AIOKafkaConsumer,
        topics: tuple[str, ...],
        group_id: str,
    ) -> None:
        self._admin, self._consumer = admin, consumer
        self._topics, self._group_id = topics, group_id

    async def partitions(self) -> frozenset[Partition]:
        """All partitions of the input topics."""
        found = await find_topics(self._admin, list(self._topics))
        for topic in found.values():
            if topic.error is not NoError:
                raise topic.error(topic.name)
        return frozenset(
            Partition(topic.name, number) for topic in found.values() for number in topic.leaders
        )

    async def stored(self) -> dict[Partition, Stored | None]:
        """What the group has stored, for all partitions of the topics; None where nothing is."""
        return await self.stored_of(await self.partitions())

    async def stored_of(self, asked: AbstractSet[Partition]) -> dict[Partition, Stored | None]:
        """What the group has stored for these; None where nothing is.

        The admin client returns metadata too, which the consumer drops; but it takes an answer
        that refuses the whole group (its coordinator moved, or still loads) for one without
        partitions. So a partition that is missing in it is a failure, not a start from nothing.
        """
        found = await self._admin.list_consumer_group_offsets(
            self._group_id, partitions=[TopicPartition(*each) for each in asked]
        )
        if found.keys() != asked:
            raise NodeNotReadyError("the group's coordinator gave no offsets")
        return {
            Partition(*each): Stored(at.offset, at.metadata or "") if at.offset >= 0 else None
            for each, at in found.items()
        }

    async def stable_of(self, asked: AbstractSet[Partition]) -> dict[Partition, Stored | None]:
        """As `stored_of`; raises `UnstableOffset` while a transaction may still change it."""
        return await stable_offsets(self._admin, self._group_id, asked)

    async def topic_ids(self) -> dict[str, str]:
        """The id of each input topic, which a topic made again under its name has not; without
        those whose brokers are too old to tell."""
        found = await topic_ids(self._admin, list(self._topics))
        return {topic: each for topic, each in found.items() if each is not None}

    async def epoch_ends(self, epochs: Mapping[Partition, int]) -> dict[Partition, int]:
        """Where an epoch ends in each partition's log: see client/epoch_ends.py."""
        return await epoch_ends(self._admin, epochs) if epochs else {}

    async def bounds(self, partitions: AbstractSet[Partition]) -> dict[Partition, LogRange]:
        """First offset and last stable offset of each."""
        asked = [TopicPartition(*each) for each in partitions]
        begins = await self._consumer.beginning_offsets(asked)
        ends = await self._consumer.end_offsets(asked)
        return {Partition(*each): LogRange(begins[each], ends[each]) for each in asked}

    async def ends(self) -> dict[Partition, int]:
        """The last stable offset of every partition of the input topics."""
        asked = [TopicPartition(*each) for each in await self.partitions()]
        return {
            Partition(*each): end for each, end in (await self._consumer.end_offsets(asked)).items()
        }

    async def chosen(
        self, start: Start, bounds: Mapping[Partition, LogRange]
    ) -> dict[Partition, int]:
        """Where `input.start` says that a new group starts; a time that is to come: at the end."""
        if start == "earliest":
            return {partition: found.begin for partition, found in bounds.items()}
        ends = {partition: found.end for partition, found in bounds.items()}
        if not isinstance(start, datetime) or not bounds:
            return ends
        at_ms = int(start.timestamp() * 1000)
        found = await self._consumer.offsets_for_times(
            {TopicPartition(*each): at_ms for each in bounds}
        )
        later = {Partition(*each): at.offset for each, at in found.items() if at is not None}
        return ends | later

"""Messages out of one client: what it has fetched of held partitions, and what goes wrong with it.

Positions are read in the same breath as the messages.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import (
    CorruptRecordException,
    KafkaError,
    OffsetOutOfRangeError,
    RecordTooLargeError,
    UnsupportedCodecError,
)
from aiokafka.structs import ConsumerRecord

from service import clock
from service.core.messages import Batch, Message, Partition
from service.kafka.client.deadlines import within
from service.kafka.client.meaning import is_lasting, stop_for
from service.kafka.client.private import FencedInstanceIdError
from service.kafka.group.due import DueTimes
from service.kafka.group.member import Member
from service.kafka.group.supervision import Supervision
from service.settings import KafkaSettings

log = logging.getLogger(__name__)

POLL_WAIT_S = 0.2
"""A poll waits at most this long for its first message."""

POLL_RECORDS_MAX = 500
"""One poll returns at most this many messages."""

FAILING_S = 60.0
"""A client that only raises for this long is replaced."""

UNREADABLE = (
    CorruptRecordException,
    RecordTooLargeError,
    UnicodeDecodeError,
    UnsupportedCodecError,
)
"""These are errors of one partition's messages; the client raises the same again and again."""

NOWHERE = TopicPartition("", -1)
"""No partition: `getmany()` without one would mean all. So it counts as a poll, takes nothing
and leaves the buffers alone; a pause would throw away what is prefetched and ends unnoticed at
each rebalance."""


class Fetching:
    """The polls of one client."""

    def __init__(
        self,
        kafka: KafkaSettings,
        consumer: AIOKafkaConsumer,
        member: Member,
        due: DueTimes,
        supervision: Supervision,
        replace: Callable[[str], None],
    ) -> None:
        """`replace` has the client replaced; it raises `CannotRun` after too many."""
        self._kafka, self._consumer, self._member = kafka, consumer, member
        self._holdings, self._positions = member.holdings, member.positions
        self._membership = member.membership
        self._due, self._supervision, self._replace = due, supervision, replace
        self._turns = itertools.count()  # which partition a poll begins with
        self._failure: tuple[list[TopicPartition], Exception] | None = None  # of the last fetch
        self._failing_since_s: float | None = None

    async def poll(self, limit: int, closed: AbstractSet[Partition]) -> Batch:
        """At most `limit` messages of partitions that are readable, due and not in `closed`."""
        open_ = [
            partition
            for partition in self._positions.readable
            if partition not in closed and self._due.open(partition)
        ]
        messages = await self._polled(open_, limit)
        # No wait from here on: positions belong to these messages.
        return Batch(tuple(messages), self._where_held_stand(), self._ends())

    async def see_to_the_last_failure(self) -> None:
        """What the last poll has met is seen to; raises `CannotRun` where waiting has no use."""
        failure, self._failure = self._failure, None
        if failure is None:
            self._failing_since_s = None
        else:
            await self._see_to(failure)

    async def _polled(self, open_: list[Partition], limit: int) -> list[Message]:
        if not open_ or limit == 0:
            await self._get([NOWHERE], 0.0 if limit == 0 else POLL_WAIT_S, 1)
            return []
        share = -(-min(limit, POLL_RECORDS_MAX) // len(open_))
        first = next(self._turns) % len(open_)
        messages: list[Message] = []
        self._hear_what_failed()
        if self._failure is not None:
            return []
        with self._membership.polling():
            # Without a wait nothing can happen to what is already taken.
            for partition in open_[first:] + open_[:first]:
                if wanted := min(share, limit - len(messages)):
                    self._supervision.asked(partition)
                    messages += self._fetched(TopicPartition(*partition), wanted)
        if messages or self._failure is not None:
            return messages
        any_of_them = [TopicPartition(*partition) for partition in open_]
        return await self._get(any_of_them, POLL_WAIT_S, min(share, limit))

    def _fetched(self, partition: TopicPartition, limit: int) -> list[Message]:
        """What the client holds of it already; an error as in `_get`."""
        try:
            records = self._membership.fetched(partition, limit)
        except (KafkaError, UnicodeDecodeError) as error:
            self._rewind([partition])
            self._failure = [partition], error
            return []
        return self._messages(records) if records else []

    async def _get(
        self, partitions: list[TopicPartition], wait_s: float, limit: int
    ) -> list[Message]:
        """`getmany` with a bound; an error skips nothing, and is seen to by the next poll."""
        try:
            # The limit is for a rebalance, during which getmany ignores its own. It raises in
            # this task, where getmany waits: never between its taking messages and returning
            # them. (wait_for would run it in another task, which can end while we are cancelled.)
            async with asyncio.timeout(wait_s + 1.0):
                with self._membership.polling():
                    found = await self._consumer.getmany(
                        *partitions, timeout_ms=int(wait_s * 1000), max_records=limit
                    )
        except TimeoutError:
            return []
        except (KafkaError, UnicodeDecodeError) as error:
            self._rewind(partitions)
            self._failure = partitions, error
            return []
        return [message for records in found.values() for message in self._messages(records)]

    def _messages(self, records: list[ConsumerRecord]) -> list[Message]:
        partition = Partition(records[0].topic, records[0].partition)
        holding = self._holdings.held.get(partition)
        if holding is None:  # fetched before its restore, which seeks
            return []
        if not self._positions.may_be_read(partition):  # found while we waited; mending it seeks
            return []
        if (wait := self._due.first_not_due(partition, records)) is not None:
            # If it stayed in the buffer, it would be returned next, whatever else is due by then.
            holding.next = records[wait].offset
            self._rewind([TopicPartition(*partition)])
            self._supervision.excuse([partition])
            records = records[:wait]
        else:
            holding.next = records[-1].offset + 1
        return [
            Message(
                partition=partition,
                offset=record.offset,
                epoch=holding.given.epoch,
                key=record.key,
                value=record.value,
                headers=tuple(record.headers),
                timestamp_ms=record.timestamp,
                topic_id=holding.topic_id,
            )
            for record in records
        ]

    def _where_held_stand(self) -> dict[Partition, int]:
        """Behind the messages returned, and behind markers and aborted messages after them."""
        for partition in self._positions.readable:
            position = self._membership.position(partition)
            if position is not None:
                self._holdings.held[partition].next = position
        return {partition: holding.next for partition, holding in self._holdings.held.items()}

    def _ends(self) -> dict[Partition, int]:
        ends = {partition: self._membership.end(partition) for partition in self._holdings.held}
        return {partition: end for partition, end in ends.items() if end is not None}

    def _rewind(self, partitions: Iterable[TopicPartition]) -> None:
        """Back to behind what was returned: the client may have gone on before it failed."""
        for partition in partitions:
            holding = self._holdings.held.get(Partition(*partition))
            if holding is not None and not self._membership.reassigning:
                self._consumer.seek(partition, holding.next)

    async def _see_to(self, failure: tuple[list[TopicPartition], Exception]) -> None:
        partitions, error = failure
        self._supervision.excuse(Partition(*partition) for partition in partitions)
        if isinstance(error, FencedInstanceIdError):
            raise self._member.name.put_out
        if isinstance(error, OffsetOutOfRangeError):
            for partition in error.args[0]:
                self._positions.cannot_read(Partition(*partition))
        elif isinstance(error, UNREADABLE):
            if len(partitions) == 1:
                self._unreadable(Partition(*partitions[0]), error)
            else:  # which of them it is shows when they are polled again one by one
                await asyncio.sleep(POLL_WAIT_S)
        elif is_lasting(error):
            raise stop_for(error, self._kafka) from error
        else:
            await self._failing(error)

    def _unreadable(self, partition: Partition, error: Exception) -> None:
        holding = self._holdings.held.get(partition)
        if holding is not None:
            self._positions.cannot_read(
                partition,
                f"What stands in {partition} at offset {holding.next} or shortly after cannot be "
                f"read ({type(error).__name__}): if that lasts, stop every worker and set the "
                f"offset of the group {self._kafka.group_id} behind it with "
                "kafka-consumer-groups --reset-offsets.",
            )

    async def _failing(self, error: Exception) -> None:
        """A client that fails again and again is replaced. The short wait keeps polls from
        spinning."""
        now_s = clock.now_s()
        self._failing_since_s = self._failing_since_s or now_s
        log.warning("fetching failed: %s", type(error).__name__)
        if now_s - self._failing_since_s > FAILING_S:
            self._replace(f"it has failed for {FAILING_S:.0f} s ({type(error).__name__})")
        await asyncio.sleep(POLL_WAIT_S)

    async def wait_for_the_restore(self, limit: int) -> None:
        self._hear_what_failed()
        if self._failure is not None:
            return
        with self._membership.polling():
            try:
                await within(POLL_WAIT_S if limit else 0.0, self._holdings.restored.wait())
            except TimeoutError:
                return

    def _hear_what_failed(self) -> None:
        """What the group's own task waits to tell."""
        try:
            self._membership.raise_what_failed()
        except KafkaError as error:
            self._failure = [], error

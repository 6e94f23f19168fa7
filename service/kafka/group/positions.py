"""Where held partitions are read from, and those that cannot be read from where they stand.

A position can lie outside the log: messages were deleted before they were read, or the log was
cut. The first is counted and passed over; the second is held out until a person has decided.
"""

from __future__ import annotations

import asyncio
import logging

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from service import clock
from service.core.errors import CommitFailed
from service.core.events import Observe, OffsetsMissing
from service.core.messages import Partition
from service.kafka.client.deadlines import within
from service.kafka.client.private import Membership
from service.kafka.group.group_offsets import GroupOffsets
from service.kafka.group.holdings import HeldPartition, Holdings, Remembered
from service.kafka.group.starts import LogRange, log_was_cut
from service.kafka.transactions.transactions import Transactions

log = logging.getLogger(__name__)

MEND_S = 5.0
"""One look at the logs' bounds, and one commit of what it has found, may take this long each."""

MEND_AGAIN_S = 1.0
"""The pause between two looks at a partition that cannot be read from where it stands."""


class Positions:
    """Seeks, and mends what lies outside of a log. `unreadable` holds a sentence for each
    partition that is held and is not read; an empty one while nobody has to know."""

    def __init__(
        self,
        consumer: AIOKafkaConsumer,
        membership: Membership,
        offsets: GroupOffsets,
        holdings: Holdings,
        remembered: Remembered,
        transactions: Transactions | None,
        observe: Observe,
    ) -> None:
        self._consumer, self._membership, self._offsets = consumer, membership, offsets
        self._holdings, self._remembered = holdings, remembered
        self._transactions, self._observe = transactions, observe
        self.unreadable: dict[Partition, str] = {}
        self.mend_at_s = 0.0
        """When the next look at these is due."""

    @property
    def readable(self) -> list[Partition]:
        """Partitions that are held and stand where there is something to read."""
        return [partition for partition in self._holdings.held if self.may_be_read(partition)]

    def may_be_read(self, partition: Partition) -> bool:
        """Whether what has been fetched of it stands behind what was read before."""
        return partition in self._holdings.held and partition not in self.unreadable

    def cannot_read(self, partition: Partition, problem: str = "") -> None:
        """It cannot be read from where it stands; it is looked at again in a moment."""
        if partition in self._holdings.held:
            if problem and self.unreadable.get(partition) != problem:
                log.error("%s", problem)
            self.unreadable[partition] = problem

    def fetched(self, partition: Partition, offset: int, batches: bytes) -> None:
        """A fetch has brought these; where another leader has written them it is not read on
        before it is known that the log was not cut in between."""
        holding = self._holdings.held.get(partition)
        if holding is None or offset < holding.next:
            return  # of an assignment before
        if holding.trail.fetched(offset, batches):
            self.cannot_read(partition, self.unreadable.get(partition, ""))

    def open(self, partition: Partition, holding: HeldPartition, bounds: LogRange) -> None:
        """Fetch from behind what was returned, or from the log's start where that is gone; of a log
        that was cut, fetch nothing."""
        if holding.cut_at is not None:
            self.unreadable[partition] = log_was_cut(
                partition, holding.next, holding.cut_at, bounds.end
            )
            return
        if holding.trail.unverified is not None:
            self.unreadable[partition] = ""
            return
        if holding.next < bounds.begin:
            missing = bounds.begin - holding.next
            log.warning(
                "%s: the log starts at %d, so %d offsets that were never read are gone",
                partition,
                bounds.begin,
                missing,
            )
            self._observe(OffsetsMissing(missing))
            holding.next = bounds.begin
        self._consumer.seek(TopicPartition(*partition), holding.next)
        self._consumer.resume(TopicPartition(*partition))

    async def mend(self) -> None:
        """Look at positions outside the log: those before its start go on there, those beyond its
        end wait."""
        self.mend_at_s = clock.now_s() + MEND_AGAIN_S
        try:
            async with asyncio.timeout(MEND_S):
                unverified = self._unverified()
                ends = await self._offsets.epoch_ends({p: at[1] for p, at in unverified.items()})
                bounds = await self._offsets.bounds(self.unreadable.keys())
        except (KafkaError, TimeoutError) as error:
            log.warning("the log's bounds cannot be read: %s", type(error).__name__)
            return
        for partition in self.unreadable.keys() & self._holdings.held.keys() & bounds.keys():
            holding, found = self._holdings.held[partition], bounds[partition]
            if partition in unverified and holding.trail.unverified == unverified[partition]:
                offset, holding.trail.unverified = unverified[partition][0], None
                if (end := ends.get(partition, offset)) < offset:
                    holding.cut(end)
            if holding.trail.unverified is not None:
                continue  # it came in between: verified with the next look
            if holding.next > found.end or holding.cut_at is not None:
                cut_at = holding.cut(min(holding.next, found.end))
                self._remembered.cuts[partition] = cut_at
                self.cannot_read(partition, log_was_cut(partition, holding.next, cut_at, found.end))
                continue
            # What is in the window stays there: it is gone from the log.
            self.open(partition, holding, found)
            del self.unreadable[partition]
        await self._store_traces()

    def _unverified(self) -> dict[Partition, tuple[int, int]]:
        """The partitions that another leader has written on: up to which offset they were read
        before, and under which epoch."""
        trails = {
            each: self._holdings.held[each].trail
            for each in self.unreadable.keys() & self._holdings.held.keys()
        }
        found = {each: trail.unverified for each, trail in trails.items()}
        return {each: at for each, at in found.items() if at is not None}

    async def _store_traces(self) -> None:
        """Store that logs were cut, so that they stay held out for whoever has them next. Where it
        fails, it is tried again with the next look."""
        traceless = {each: at for each, at in self._holdings.held.items() if at.traceless}
        stored = (
            {each: self._holdings.to_store(each) for each in traceless} if self._settled else {}
        )
        wanted = {each: at for each, at in stored.items() if at is not None}
        if not wanted:
            return
        try:
            if self._transactions is None:
                await within(MEND_S, self._membership.commit_once(wanted))
                for each, at in wanted.items():
                    self._holdings.stored(each, at)
            else:
                await within(MEND_S, self._transactions.commit(wanted.keys()))
        except (KafkaError, TimeoutError, CommitFailed) as error:
            log.warning("that a log was cut is not stored yet: %s", type(error).__name__)

    @property
    def _settled(self) -> bool:
        return self._holdings.restored.is_set() and not self._membership.reassigning

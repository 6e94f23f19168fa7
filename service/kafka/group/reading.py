"""What Kafka stores of the partitions that the group has given, and which of them can be kept.

A partition is kept where nobody else can have had it in between and Kafka holds what this process
has left there. With transactions all others are fenced before what is read of them counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from aiokafka.errors import StaleMetadata

from service import clock
from service.core.messages import Partition
from service.kafka.client.private import Membership
from service.kafka.client.stable_offsets import UnstableOffset
from service.kafka.client.stored import Stored, read
from service.kafka.group.group_offsets import GroupOffsets
from service.kafka.group.holdings import HeldPartition, Holdings, Remembered, Unrestored
from service.kafka.transactions.transactions import Transactions

STALE_S = 1.0
"""An offset that is older than our last commit is read again for this long. A coordinator answers a
commit before the offset can be read; measured: milliseconds."""

STALE_PAUSE_S = 0.05
"""The pause between two reads of an offset that is not to be relied on yet."""


class Overtaken(Exception):
    """What a restore works on has been taken away, or given anew, meanwhile."""


@dataclass(frozen=True, slots=True)
class FromKafka:
    """What was read: offsets and ids for all partitions of the topics; `kept` are those that
    nobody can have had in between, `fresh` those that start anew."""

    stored: Mapping[Partition, Stored | None]
    topic_ids: Mapping[str, str]
    kept: Mapping[Partition, HeldPartition]
    fresh: frozenset[Partition]


class Reading:
    """Reads for the restore, as often as it takes until what is read can be relied on."""

    def __init__(
        self,
        membership: Membership,
        offsets: GroupOffsets,
        holdings: Holdings,
        remembered: Remembered,
        transactions: Transactions | None,
    ) -> None:
        self._membership, self._offsets, self._holdings = membership, offsets, holdings
        self._remembered, self._transactions = remembered, transactions

    async def read(self, given: Unrestored, limit_s: float) -> FromKafka:
        """What Kafka stores of what is given, and of the rest of the topics.

        With transactions, whoever had the latter before us may still end one: until he is fenced,
        what is read of them does not count. Raises `Overtaken` once they are in question again:
        then they may be another's, who must not be fenced.
        """
        stale_until_s = clock.now_s() + min(STALE_S, limit_s / 2)
        while True:
            stored = await self._offsets.stored()
            if not given.partitions <= stored.keys():
                # The group's leader asked another broker, which knows more partitions already.
                raise StaleMetadata("a partition that is given is not known yet")
            topic_ids = await self._offsets.topic_ids()
            if self._holdings.unrestored is not given or self._membership.reassigning:
                raise Overtaken
            ours = self._may_be_kept(given, topic_ids)
            if clock.now_s() < stale_until_s and any(
                self._is_stale(holding, stored[partition]) for partition, holding in ours.items()
            ):
                await asyncio.sleep(STALE_PAUSE_S)
                continue
            kept = {each: ours[each] for each in ours if ours[each].wrote(stored[each])}
            fresh = given.partitions - kept.keys() - self._holdings.held.keys()
            unfenced = fresh - given.fenced
            if self._transactions is None:
                return FromKafka(stored, topic_ids, kept, fresh)
            if not unfenced:
                stable = await self._stable(fresh)
                return FromKafka({**stored, **stable}, topic_ids, kept, fresh)
            # The fence gives each a new writer, which knows nothing of a transaction in doubt.
            given.anew.update(unfenced)
            await self._transactions.fence(unfenced)
            given.fenced.update(unfenced)

    async def _stable(self, fenced: frozenset[Partition]) -> dict[Partition, Stored | None]:
        """What Kafka holds of these, once the last commit of whoever was fenced can be read."""
        while fenced:
            with suppress(UnstableOffset):
                return await self._offsets.stable_of(fenced)
            await asyncio.sleep(STALE_PAUSE_S)
        return {}

    def _is_stale(self, holding: HeldPartition, stored: Stored | None) -> bool:
        """Whether an earlier commit of this process is read, or that from before its first.

        The coordinator answers a transaction's commit before the offset in it can be read. To
        take that for the truth would cancel every running call of the partition. Nobody else can
        have written it: our nonce is in it. A plain commit can be read once it is answered.
        """
        if self._transactions is None or holding.wrote(stored):
            return False
        found = None if stored is None else read(stored)
        return stored is None or (found is not None and found[1].nonce == self._remembered.nonce)

    def _may_be_kept(
        self, given: Unrestored, topic_ids: Mapping[str, str]
    ) -> dict[Partition, HeldPartition]:
        """Partitions that nobody can have had in between, if Kafka holds what we left there."""
        before = self._holdings.before
        if before is None or not before.member_id:
            return {}
        if (before.member_id, before.generation + 1) != (given.member_id, given.generation):
            return {}
        return {
            partition: holding
            for partition, holding in before.held.items()
            if partition in given.partitions - given.anew
            and self._is_the_topic_it_was(partition.topic, topic_ids)
            and (self._transactions is None or self._transactions.holds(partition))
        }

    def _is_the_topic_it_was(self, topic: str, now: Mapping[str, str]) -> bool:
        """A commit of ours can be stored for a topic made again: its offset says nothing of it,
        and must not be stored under the new id."""
        before = self._holdings.topic_ids.get(topic)
        return before is None or now.get(topic, before) == before

"""Storing the progress of held partitions: a plain commit, or one in transactions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from collections.abc import Set as AbstractSet

from aiokafka.errors import (
    IllegalGenerationError,
    KafkaError,
    RebalanceInProgressError,
    UnknownMemberIdError,
    UnknownTopicOrPartitionError,
)

from service.core.errors import CommitFailed
from service.core.messages import Partition
from service.kafka.client.deadlines import within
from service.kafka.group.holdings import HeldPartition
from service.kafka.group.member import Member
from service.kafka.group.supervision import Supervision
from service.kafka.transactions.transactions import Transactions

COMMIT_S = 5.0
"""One commit may take this long, with what of it can be tried again."""

COMMIT_AGAIN_S = 0.1
"""The pause between two tries of a plain commit."""


class Committing:
    """The commits of one client."""

    def __init__(
        self, member: Member, supervision: Supervision, transactions: Transactions | None
    ) -> None:
        self._holdings, self._membership = member.holdings, member.membership
        self._supervision, self._transactions = supervision, transactions

    async def commit(self, partitions: AbstractSet[Partition]) -> None:
        """Store the progress of held partitions, within `COMMIT_S`; raises `CommitFailed`."""
        try:
            if self._transactions is not None:
                await within(COMMIT_S, self._transactions.commit(partitions))
            else:
                await within(COMMIT_S, self._commit_while_held(partitions))
        except TimeoutError as error:
            raise CommitFailed("timeout") from error
        except KafkaError as error:
            raise _commit_failed(error) from error

    async def _commit_while_held(self, partitions: AbstractSet[Partition]) -> None:
        held = self._held_of(partitions)
        asked = {partition: self._holdings.to_store(partition) for partition in partitions}
        wanted = {partition: stored for partition, stored in asked.items() if stored is not None}
        while True:
            await self._membership.find_coordinator()
            # Whoever has the partition now may be ourselves, as another holding.
            if held != self._held_of(held):
                raise CommitFailed("rebalance")
            try:
                await self._membership.commit_once(wanted)
            except UnknownTopicOrPartitionError:
                # Tried again, it could find another topic of the same name.
                self._supervision.doubt(partition.topic for partition in wanted)
                raise
            except KafkaError as error:
                if not error.retriable:
                    raise
                await asyncio.sleep(COMMIT_AGAIN_S)
                self._held_of(held)  # a client that was closed meanwhile finds no coordinator
            else:
                break
        for partition, stored in wanted.items():
            self._holdings.stored(partition, stored)

    def _held_of(self, partitions: Iterable[Partition]) -> dict[Partition, HeldPartition]:
        held, wanted = self._holdings.held, set(partitions)
        if any(partition.topic in self._supervision.doubtful for partition in wanted):
            raise CommitFailed("topic")  # it may be another by now
        if not wanted <= held.keys():
            raise CommitFailed("rebalance")
        return {partition: held[partition] for partition in wanted}


def _commit_failed(error: KafkaError) -> CommitFailed:
    if isinstance(error, UnknownMemberIdError | IllegalGenerationError | RebalanceInProgressError):
        return CommitFailed("rebalance")
    return CommitFailed(type(error).__name__)

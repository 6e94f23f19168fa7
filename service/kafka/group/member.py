"""One client's place in the group, from the revoke to the first message after it.

A rebalance in the client is eager: it takes everything away, forgets positions, buffers and
pauses, and then gives partitions again. So the revoke lets the pipeline finish and commit, and
the restore decides what is held from then on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.abc import ConsumerRebalanceListener

from service import clock
from service.core.events import Observe
from service.core.messages import Partition
from service.kafka.client.private import Membership
from service.kafka.group.group_offsets import GroupOffsets
from service.kafka.group.holdings import Before, Holdings, Remembered, Unrestored
from service.kafka.group.name import WorkerName
from service.kafka.group.positions import Positions
from service.kafka.group.restore import Restore
from service.kafka.transactions.transactions import Transactions
from service.ports import Assignment
from service.settings import Settings


class Member:
    """What the client calls at a rebalance, and the parts that answer it."""

    def __init__(
        self,
        settings: Settings,
        consumer: AIOKafkaConsumer,
        offsets: GroupOffsets,
        assignment: Assignment,
        observe: Observe,
        assignor: Any,
        transactions: Transactions | None = None,
        *,
        remembered: Remembered,
        doubtful: Callable[[], AbstractSet[str]] = frozenset,
    ) -> None:
        """`doubtful`: topics that may be others by now; nothing is stored for them."""
        self._consumer, self._assignor = consumer, assignor
        self._assignment, self._transactions = assignment, transactions
        self._remembered = remembered
        self._letting_go = asyncio.Lock()  # a revoke and a hand-back do not cut each other off
        self.offsets = offsets
        self.membership = membership = Membership(consumer)
        self.holdings = Holdings(offsets, assignment, remembered, doubtful)
        self.name = WorkerName(settings.kafka, membership, offsets, remembered.bearer)
        self.positions = Positions(
            consumer, membership, offsets, self.holdings, remembered, transactions, observe
        )
        self.restore = Restore(
            settings,
            membership,
            offsets,
            self.holdings,
            self.positions,
            remembered,
            transactions,
            assignment,
            observe,
        )

    @property
    def settled(self) -> bool:
        """Whether what is held is ours, and no rebalance is under way."""
        return self.holdings.restored.is_set() and not self.membership.reassigning

    @property
    def problem(self) -> str | None:
        """A sentence about what is not read, and what to do."""
        sentences = (
            *self.restore.held_out.values(),
            *self.positions.unreadable.values(),
            self.restore.problem,
            self.restore.taken_by_another,
            "" if self._transactions is None else self._transactions.problem,
        )
        return next(filter(None, sentences), None)

    async def see_to_the_rest(self) -> None:
        """A restore that failed, a position outside the log: tried again when it is time."""
        now_s = clock.now_s()
        if self.holdings.unrestored is not None and now_s >= self.holdings.restore_at_s:
            await self.restore.attempt()
        if self.positions.unreadable and now_s >= self.positions.mend_at_s:
            await self.positions.mend()

    async def on_revoked(self) -> None:
        """All partitions are in question: the pipeline finishes and commits, then we let go.

        Where another worker has taken our place in the group, they are not: nothing is finished
        or committed any more, and the client, which would join again behind this, waits here for
        its end.
        """
        if not self.membership.member_id and await self.name.is_put_out():
            self.holdings.let_go()
            self.holdings.restored.clear()
            self.holdings.fail(self.name.put_out)
            await asyncio.Event().wait()
        async with self._letting_go:
            self._overtake()
            self.holdings.restored.clear()
            if self.holdings.closed:
                # What is committed from here on could be in another's generation.
                self.holdings.let_go()
                return
            self._remembered.began_to_rebalance(clock.now_s())
            try:
                if self._transactions is not None:
                    self._transactions.hurry(on=True)
                if self.holdings.held:
                    await self._assignment.revoked()
                    self.holdings.before = Before(self.holdings.held, *self.holdings.held_as)
            finally:
                self.holdings.let_go()

    async def on_assigned(self, partitions: AbstractSet[TopicPartition]) -> None:
        """These are given: restored at once if that is quick, else by the next polls."""
        if self.holdings.closed:
            return
        membership = self.membership
        self.holdings.held = {}
        self.restore.held_out, self.positions.unreadable = {}, {}
        self._consumer.pause(*partitions)  # until it is known from where to fetch
        # The client forgets to tell it, and then an old claim counts as much as a new one.
        self._assignor.on_generation_assignment(membership.generation)
        given = self.holdings.assigned = frozenset(Partition(*each) for each in partitions)
        self.name.joined_as = membership.member_id, membership.generation
        self.holdings.unrestored = Unrestored(given, *self.name.joined_as)
        await self.restore.attempt()

    async def hand_back(self) -> None:
        """As at a revoke, and then for good: the pipeline finishes and commits, we let go.

        A revoke that is under way comes to its end first, and one that begins meanwhile waits: the
        client that ends would cancel the one, and the other would let the group go on before what
        is finished is committed.
        """
        self._overtake()
        async with self._letting_go:
            held, self.holdings.closed = self.holdings.restored.is_set(), True
            self._remembered.began_to_rebalance(clock.now_s())
            try:
                if self._transactions is not None:
                    self._transactions.hurry(on=True)
                if held:
                    await self._assignment.revoked()
            finally:
                self.holdings.close()

    def _overtake(self) -> None:
        """What is being restored is in question: its restore goes no further, and fences nobody;
        a writer in whose transaction a mark is opens no other producer for it."""
        self.holdings.unrestored = None
        self.holdings.marking.clear()
        if self._transactions is not None:
            self._transactions.stop_fencing()


class Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    """The client calls it during a rebalance, and only logs what it raises."""

    def __init__(self, member: Member) -> None:
        self._member = member

    async def on_partitions_revoked(self, revoked: AbstractSet[TopicPartition]) -> None:
        try:
            await self._member.on_revoked()
        except Exception as error:  # boundary: told to poll, which raises it
            self._member.holdings.fail(error)
            raise

    async def on_partitions_assigned(self, assigned: AbstractSet[TopicPartition]) -> None:
        try:
            await self._member.on_assigned(assigned)
        except Exception as error:  # boundary: told to poll, which raises it
            self._member.holdings.fail(error)
            raise

"""What is published for one input partition: one transaction after the other, in order.

A transaction takes what is queued; whatever is handed over meanwhile goes into the next. Whatever
goes wrong, the way out is the same: the producer is cut off, a new epoch ends what was open, and
what Kafka then holds says whether it was committed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from service import clock
from service.core.errors import PublishFailed, SluiceError
from service.core.events import ClientReplaced, Observe
from service.core.messages import Partition
from service.kafka.client.deadlines import within
from service.kafka.client.stored import Stored
from service.kafka.sending.producers import Output
from service.kafka.sending.queues import TOO_LARGE, Handover, OutputQueue, Waiting, after_refusal
from service.kafka.transactions.outbox import Outbox, Outgoing, by_output_partition, fail
from service.kafka.transactions.producer import Fenced, TransactionalProducer

READ_S = 5.0
"""Reading back what Kafka holds, after a new epoch, may take this long."""
HELD_BACK_S = 10.0
"""Outcomes for which the completed map has no room wait this long for others to be handed over."""
PAUSE_S = 0.1
PAUSE_MAX_S = 5.0
"""After a failure a writer pauses; the pause doubles with each failure that follows, up to this."""

log = logging.getLogger(__name__)


class Ledger(Protocol):
    """What Kafka holds, and is to hold, for each partition that is ours."""

    def takes(self, partition: Partition) -> bool:
        """Whether outcomes of it may be published: not before its restore has ended."""

    def to_store(self, partition: Partition, finishing: frozenset[int]) -> Stored | None:
        """Next offset and metadata once these offsets of it have finished too; never waits.

        None: the partition is not ours (any more). With `finishing` it differs from what is
        stored, or it could not be told afterwards whether it was.
        """

    def doubts(self, partition: Partition) -> bool:
        """Whether its topic may be another by now: until that is known `to_store` gives None,
        although the partition may be ours."""

    def fitting(self, partition: Partition, offsets: Sequence[int]) -> int:
        """How many of these, ascending, may finish in one transaction: what is stored with it has
        room for them. The rest waits; the message that holds the next offset never has to."""

    def has_room(self, partition: Partition) -> bool:
        """Whether everything may finish that was taken of it until now, in whatever order."""

    def known(self, partition: Partition) -> Stored | None:
        """What Kafka held when it was last known: at the restore, or as `stored` has said since."""

    def stored(self, partition: Partition, stored: Stored) -> None:
        """The transaction that held it is committed; the outcomes' futures end right after."""

    async def read_back(self, partition: Partition) -> Stored | None:
        """What Kafka holds now; raises `KafkaError`, and may wait without end."""

    def fenced(self, partition: Partition) -> None:
        """A newer epoch has taken over: if it is ours all the same, it is to be restored, beginning
        with a fence."""


@dataclass(frozen=True, slots=True)
class WriterContext:
    """What all writers share.

    `open` gives a new epoch within a bounded time, or raises, for those whose `turn` it is; `end`
    ends a producer in the background, as its second argument does.
    """

    turn: asyncio.Semaphore
    open: Callable[[Partition], Awaitable[TransactionalProducer]]
    end: Callable[[TransactionalProducer, Callable[[], Awaitable[None]]], None]
    ledger: Ledger
    batch_max_bytes: Callable[[str], int]
    refused: Callable[[str, int], None]
    observe: Observe
    group_id: str
    interval_s: float
    deadline_s: float
    group: asyncio.TaskGroup


class Became(Enum):
    """What has become of a transaction, as what Kafka holds behind a new epoch tells."""

    COMMITTED = auto()
    NOT_COMMITTED = auto()
    ANOTHER = auto()
    """Another owner was there, or Kafka has forgotten: only a restore may say what is right."""


def became(attempted: Stored | None, found: Stored | None, known: Stored | None) -> Became:
    """`attempted`: its commit was asked for, None where it was not; `known`: held before it."""
    if attempted is not None and found == attempted:
        return Became.COMMITTED
    return Became.NOT_COMMITTED if found == known else Became.ANOTHER


class _NotOurs(Exception):
    """The ledger knows the partition no more."""


class _Withdrawn(Exception):
    """An outcome of the transaction must not go before its commit was asked for: somebody has
    cancelled it, or there is no room for it any more."""


class _Refused(Exception):
    """The broker does not take these batches; each with its reason."""

    def __init__(self, batches: list[tuple[list[Waiting], TopicPartition, KafkaError]]) -> None:
        reasons = {f"{where.topic}: {type(error).__name__}" for _, where, error in batches}
        super().__init__(", ".join(sorted(reasons)))
        self.batches = batches


class Writer:
    """The transactions of one input partition, under epochs of its own.

    Once `lost` it takes nothing more: only a fence, and a restore behind it, can say what is
    still to be published.
    """

    def __init__(
        self, partition: Partition, producer: TransactionalProducer, context: WriterContext
    ) -> None:
        self._partition, self._context = partition, context
        self._producer: TransactionalProducer | None = producer  # None: it has failed
        self._fresh: TransactionalProducer | None = None  # its epoch is new; nothing read since
        self._outbox = Outbox()
        self._sending: list[Outgoing] = []  # taken into a transaction, not settled
        self._attempted: Stored | None = None  # its commit was asked for, nobody knows the answer
        self._leave = asyncio.Event()  # the next transaction need not gather any longer
        self._more = asyncio.Event()  # something was handed over
        self._task: asyncio.Task[None] | None = None
        self._failures = 0
        self._failed_by = ""  # the last of them
        self.hurried = False
        self.lost = False
        self.since_s: float | None = None
        """Since when a transaction has been under way, with all its tries."""

    @property
    def ledger(self) -> Ledger:
        """The one that it asks and tells."""
        return self._context.ledger

    @property
    def unused(self) -> bool:
        """Whether its epoch is as the fence has left it, and nothing waits."""
        if self.lost or self._outbox or self._producer is None:
            return False
        return not self._producer.used

    def stuck(self, for_s: float) -> str | None:
        """What it has failed by, where nothing was published for this long since."""
        if not self._failures or self.since_s is None or clock.now_s() - self.since_s < for_s:
            return None
        return self._failed_by

    @property
    def settled(self) -> bool:
        """Whether everything sent is settled, or in a transaction that may still end well."""
        return not self.lost and self._producer is not None

    @property
    def task(self) -> asyncio.Task[None] | None:
        """The one that works, while there is something to do."""
        return self._task

    def queue_up(
        self,
        offset: int | None,
        outputs: Sequence[tuple[int, Output]],
        on_failure: Callable[[], None],
    ) -> asyncio.Future[None]:
        """Queue it, without waiting; the future ends with the commit of its transaction."""
        handover = Handover(1, on_failure)
        if self.lost:
            handover.fail(PublishFailed(f"{self._partition} is not held"))
            return handover.future
        placed = [
            (TopicPartition(output.topic, partition), Waiting(output, handover))
            for partition, output in outputs
        ]
        self._outbox.append(Outgoing(offset, handover, placed, clock.now_s()))
        self._more.set()
        self.go_on()
        return handover.future

    def go_on(self) -> None:
        """Make sure that a task works while something is queued, and that it gathers no longer than
        it should."""
        if self.hurried or self._outbox.urgent:
            self._leave.set()
        if self._task is None and self._outbox:
            self._task = self._context.group.create_task(self._work())

    def drop(self) -> TransactionalProducer | None:
        """Withdraw everything at once, for good; the producer is the caller's to end."""
        for each in (*self._sending, *self._outbox.take_all()):
            each.handover.future.cancel()
        return self.stop()

    def stop(self) -> TransactionalProducer | None:
        """Fail everything; the producer is the caller's to end."""
        self.lost = True
        if self._task is not None:
            self._task.cancel()
        return self._fresh or self._producer

    # --- one transaction after the other ---------------------------------------------------------

    async def _work(self) -> None:
        try:
            while not self.lost and (self._outbox or self._producer is None):
                if self._producer is None:
                    await self._renew()
                elif not self._outbox.ready:
                    await self._wait_for_more()
                else:
                    await self._gather()
                    await self._try(self._producer)
                if not self._failures:
                    self.since_s = None
                # The ledger hears of what has finished through the callbacks of these futures.
                await asyncio.sleep(0)
        except BaseException:
            self.lost = True  # in the middle of something
            raise
        finally:
            self._task = self.since_s = None
            # Something is left only where the task was cancelled; as far as we know it was not
            # committed.
            fail((*self._sending, *self._outbox.take_all()), f"{self._partition}: stopped")

    async def _wait_for_more(self) -> None:
        """What is held back waits for a message that is not handed over yet, but not for ever:
        that one may itself wait until those behind it in its lane are settled."""
        self._more.clear()
        try:
            async with asyncio.timeout(HELD_BACK_S):
                await self._more.wait()
        except TimeoutError:
            if not self._outbox.ready:
                self._fail_from(0, f"{self._partition}: the completed map has no room")

    async def _gather(self) -> None:
        """Until what is queued first has waited for the interval, or there is enough."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._outbox.since_s + self._context.interval_s):
                await self._leave.wait()

    async def _try(self, producer: TransactionalProducer) -> None:
        """One transaction to its end; after it all is settled, in the queue again, or in doubt."""
        fitting = self._context.ledger.fitting
        self._sending = self._outbox.next_transaction(
            lambda offsets: fitting(self._partition, offsets)
        )
        self._leave.clear()
        self.go_on()
        if not self._sending:
            return
        self.since_s = self.since_s or clock.now_s()
        try:
            async with asyncio.timeout(self._context.deadline_s):
                try:
                    await self._transact(producer)
                except (_NotOurs, _Withdrawn):
                    await producer.abort()
                    raise
        except _Withdrawn:
            self._put_back()
        except _NotOurs:
            self._fail_from(0, f"{self._partition} is not held")
        except Fenced as error:
            self._fenced(type(error.__cause__).__name__)
        except _Refused as refusal:
            self._replace(producer, str(refusal))
            if self._blame(refusal):
                await self._pause()
        except (KafkaError, TimeoutError, OSError) as error:
            self._replace(producer, _why(error, self._context.deadline_s))
            if self._attempted is None:
                self._put_back()
            await self._pause()
        else:
            self._failures = 0

    async def _transact(self, producer: TransactionalProducer) -> None:
        await producer.begin()
        await self._send(producer)
        # A restore may have withdrawn what the ledger now knows as finished, by another's hand.
        self._see_that_all_stands()
        offsets = sorted(each.offset for each in self._sending if each.offset is not None)
        if self._context.ledger.fitting(self._partition, offsets) < len(offsets):
            raise _Withdrawn  # the holes of messages taken meanwhile have made the map longer
        finishing = frozenset(offsets)
        # Asked in the moment of sending: what was stored in between is in it.
        stored = self._context.ledger.to_store(self._partition, finishing)
        if stored is None:
            raise _NotOurs
        known = self._context.ledger.known(self._partition)
        assert not finishing or stored != known, "it could not be told whether it is committed"
        await producer.store(self._context.group_id, self._partition, stored)
        # No wait from here to the commit: nobody can withdraw any more.
        self._see_that_all_stands()
        self._attempted = stored
        await producer.commit()
        self._committed(stored)

    def _see_that_all_stands(self) -> None:
        if any(each.withdrawn for each in self._sending if each.offset is not None):
            raise _Withdrawn

    async def _send(self, producer: TransactionalProducer) -> None:
        """Batches of all output partitions side by side, those of one behind each other."""
        queues = by_output_partition(self._sending)
        while batches := self._next_batches(queues):
            outputs = {where: [each.output for each in batch] for where, batch in batches.items()}
            refused = await producer.send(outputs)
            if refused:
                raise _Refused([(batches[where], where, refused[where]) for where in refused])

    def _next_batches(
        self, queues: dict[TopicPartition, OutputQueue]
    ) -> dict[TopicPartition, list[Waiting]]:
        taken = {
            where: queue.next_batch(self._context.batch_max_bytes(where.topic))
            for where, queue in queues.items()
        }
        return {where: batch for where, batch in taken.items() if batch}

    def _committed(self, stored: Stored) -> None:
        """The ledger and everyone who waits are told without a wait in between."""
        self._attempted = None
        self._context.ledger.stored(self._partition, stored)
        done, self._sending = self._sending, []
        for each in done:
            each.handover.acknowledged()

    # --- when it goes wrong -----------------------------------------------------------------------

    def _replace(self, producer: TransactionalProducer, why: str) -> None:
        self._failed(f"a new producer takes over after {why}")
        self._context.observe(ClientReplaced("producer"))
        self._producer = None
        self._context.end(producer, producer.cut_off)

    async def _renew(self) -> None:
        """A new epoch of our own, and what became of the transaction before it.

        Writers take turns, so that not all of them connect at once when a broker is back. It
        happens only while the partition is ours: otherwise the epoch belongs to the new owner. If
        another worker owns the partition by now all the same, that one is fenced, restores it
        anew and fences us.
        """
        async with self._context.turn:
            await self._renew_now(self._context)
        if self._producer is None and not self.lost:
            await self._pause()

    async def _renew_now(self, context: WriterContext) -> None:
        if context.ledger.doubts(self._partition):
            self._failed("no new producer while its topic is in doubt")
            return
        if context.ledger.to_store(self._partition, frozenset()) is None:
            self._lose(f"{self._partition} is not held")
            return
        try:
            if self._fresh is None:
                self._fresh = await context.open(self._partition)
            # Not earlier: a transaction that is ending is not in the offsets yet.
            found = await within(READ_S, context.ledger.read_back(self._partition))
        except (PublishFailed, KafkaError, TimeoutError, OSError) as error:
            self._failed(f"no new producer: {_why(error, READ_S)}")
            return
        # No wait from here on: what was read decides.
        known = context.ledger.known(self._partition)
        match became(self._attempted, found, known):
            case Became.COMMITTED:
                assert self._attempted is not None, "nothing was attempted"
                self._committed(self._attempted)
            case Became.ANOTHER:
                self._fenced(f"Kafka holds {found}, we knew {known}")
                return
            case Became.NOT_COMMITTED:
                pass
        self._attempted = None
        self._put_back()
        self._producer, self._fresh = self._fresh, None

    def _blame(self, refusal: _Refused) -> bool:
        """Fail the messages that the broker does not take, try the others again.

        Returns whether some failed as ones that will be handed over again. What stands behind
        such a one fails with it: it may be of the same lane, and must not land before it.
        """
        failed: list[int] = []
        for batch, where, error in refusal.batches:
            if isinstance(error, TOO_LARGE):
                self._context.refused(where.topic, sum(each.output.size_bytes for each in batch))
            failure = after_refusal(batch, error)
            if isinstance(failure, PublishFailed):
                handovers = {each.handover for each in batch}
                each_at = enumerate(self._sending)
                failed.append(next(i for i, each in each_at if each.handover in handovers))
            elif failure is not None:
                batch[0].handover.fail(failure)
        if failed:
            self._fail_from(min(failed), "the broker refused it, or one before it")
        self._put_back()
        return bool(failed)

    def _fail_from(self, index: int, why: str) -> None:
        """Fail this one of the transaction and everything behind it."""
        failed, self._sending = self._sending[index:], self._sending[:index]
        fail((*failed, *self._outbox.take_all()), why)

    def _fenced(self, why: str) -> None:
        log.warning("%s: fenced (%s); it is to be restored before it goes on", self._partition, why)
        self._lose(f"{self._partition}: fenced")
        self._context.ledger.fenced(self._partition)

    def _lose(self, why: str) -> None:
        """Fail whatever was handed over: only a restore can tell what became of it."""
        self.lost = True
        for producer in (self._producer, self._fresh):
            if producer is not None:
                self._context.end(producer, producer.cut_off)
        self._producer = self._fresh = None
        self._fail_from(0, why)

    def _failed(self, what: str) -> None:
        """The first failure is a warning, later ones are for debugging: they may go on for as long
        as a broker is away."""
        self._failures += 1
        self._failed_by = what
        level = logging.WARNING if self._failures == 1 else logging.DEBUG
        log.log(level, "%s: %s", self._partition, what)

    async def _pause(self) -> None:
        await asyncio.sleep(min(PAUSE_MAX_S, PAUSE_S * 2 ** min(self._failures, 10)))

    def _put_back(self) -> None:
        """What was taken goes again, as it was; the outbox leaves out what has ended meanwhile."""
        again, self._sending = self._sending, []
        self._outbox.put_back(again)
        self._leave.set()


def _why(error: Exception, limit_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {limit_s:g} s"
    return str(error) if isinstance(error, SluiceError) else type(error).__name__

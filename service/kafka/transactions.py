"""Exactly once: outcomes, next offset and completed map of an input partition in one transaction.

A broker takes offsets into a transaction from anybody who knows the group's name; a member that has
lost a partition is told from its new owner by the transactional id alone. So each input partition
has a producer of its own, under an id that follows from group and partition. Whoever is given the
partition starts that producer anew (`fence`), and only then reads where to go on: from the fence
on, nobody before him can end a transaction, and what they had open is aborted.

Why nothing is published twice, whatever dies or hangs and when: an outcome is visible only if the
transaction that holds it is committed, and in the same moment Kafka holds that its message is
finished. Whether a transaction was committed is not always known (a timeout, a lost connection).
Then its producer is not used again; a new one under the same id makes the broker end what was
open, and what Kafka holds after that says which way it went. Until that is known, its messages are
neither finished nor sent again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Protocol

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import (
    InvalidTimestampError,
    KafkaError,
    MessageSizeTooLargeError,
    ProducerFenced,
    RecordListTooLargeError,
)
from aiokafka.structs import OffsetAndMetadata

from service.core.errors import CannotRun, CommitFailed, PublishFailed
from service.core.events import ClientReplaced, Observe
from service.core.messages import Partition
from service.kafka.producers import Output, Producer
from service.kafka.sending import Handover, too_large
from service.kafka.starts import Stored

log = logging.getLogger(__name__)

PREFIX = "sluice"
"""Of every transactional id; what follows it is the group, so that one ACL covers a group."""

PARTITIONS_MAX = 200
"""Input partitions of one worker: each has a client of its own."""

MESSAGES_MAX = 500
BYTES_MAX = 1024 * 1024
"""Of one transaction: short ones block readers for a moment only."""

STARTED_AT_ONCE = 8
"""Clients that are started side by side."""

RESOLVE_AGAIN_S = 1.0
"""Between two tries to find out how a transaction ended."""

ABORT_S = 3.0
"""For a partition that was lost: what is open blocks readers until it is aborted, or timed out."""

TIMEOUT_MARGIN_S = 30.0
"""A transaction that the broker has not seen end this long after our own deadline is aborted by
the broker itself: nobody of us is left who could."""

TOO_LARGE = (MessageSizeTooLargeError, RecordListTooLargeError)


def transactional_id(group_id: str, where: Partition) -> str:
    """The same for every owner of the partition, and for no other."""
    return f"{PREFIX}-{group_id}-{where.topic}-{where.partition}"


class Ledger(Protocol):
    """Who holds a partition, and what Kafka is to hold of it."""

    def holds(self, partition: Partition) -> bool:
        """Whether it is ours, as far as is known here."""

    def to_store(self, partition: Partition, finishing: frozenset[int]) -> Stored | None:
        """Next offset and metadata once `finishing` has finished too; None: it is not ours."""

    def stored(self, partition: Partition, stored: Stored) -> None:
        """Kafka holds it now."""

    async def read_back(self, partition: Partition) -> Stored | None:
        """What Kafka holds; raises `KafkaError`."""


class TransactionalProducer(Producer):
    """One started client; after anything that failed in it, it is of no further use."""

    async def begin(self) -> None:
        await self._client.begin_transaction()

    async def write(self, batches: Iterable[tuple[TopicPartition, Sequence[Output]]]) -> None:
        """Write batches, in order; returns when all replicas have them. Raises `KafkaError`."""
        sent: list[asyncio.Future[object]] = []
        try:
            for where, outputs in batches:
                batch = self._batch(outputs)
                sent.append(
                    await self._client.send_batch(batch, where.topic, partition=where.partition)
                )
        finally:
            if sent:
                await asyncio.wait(sent)
        for each in sent:
            each.result()

    async def end(self, where: Partition, stored: Stored, group_id: str) -> None:
        """Add the offset; what comes after it is `commit`, and then only the broker knows."""
        offsets = {TopicPartition(*where): OffsetAndMetadata(stored.offset, stored.metadata)}
        await self._client.send_offsets_to_transaction(offsets, group_id)

    async def commit(self) -> None:
        await self._client.commit_transaction()

    async def abandon(self) -> None:
        """Abort what is open, if that is quick, and close."""
        if self._client._txn_manager.is_in_transaction():
            try:
                async with asyncio.timeout(ABORT_S):
                    await self._client.abort_transaction()
            except (KafkaError, TimeoutError):
                await self.cut_off()
                return
        await self.close()


@dataclass(slots=True, eq=False)
class Waiting:
    """One message's outputs with their partitions; `alone` after a refusal, to find the cause."""

    offset: int
    outputs: list[tuple[int, Output]]
    handover: Handover
    alone: bool = False

    @property
    def size_bytes(self) -> int:
        return sum(output.size_bytes for _, output in self.outputs)


@dataclass(slots=True, eq=False)
class Owned:
    """The transactions of one input partition, one at a time."""

    where: Partition
    producer: TransactionalProducer | None  # None: a new one is needed
    waiting: deque[Waiting] = field(default_factory=deque)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    task: asyncio.Task[None] | None = None
    lost: bool = False

    def take(self) -> list[Waiting]:
        """The next transaction's messages, in order; what was withdrawn is left out."""
        taken: list[Waiting] = []
        size = 0
        while self.waiting and len(taken) < MESSAGES_MAX:
            each = self.waiting[0]
            if each.handover.future.done():
                self.waiting.popleft()
                continue
            size += each.size_bytes
            if taken and (each.alone or taken[0].alone or size > BYTES_MAX):
                break
            taken.append(self.waiting.popleft())
        return taken

    def put_back(self, taken: Sequence[Waiting]) -> None:
        """A refused batch says nothing of the single record: they go again one by one."""
        for each in reversed(taken):
            each.alone = True
            self.waiting.appendleft(each)


class Transactions:
    """The producers of all input partitions that are ours, and what is handed to them.

    Tasks are born in the group that it is given. `ledger` is set before the first use.
    """

    ledger: Ledger

    def __init__(
        self,
        create: Callable[[str, float], AIOKafkaProducer],
        group_id: str,
        *,
        interval_s: float,
        deadline_s: float,
        batch_max_bytes: Callable[[str], int],
        refused: Callable[[str, int], None],
        group: asyncio.TaskGroup,
        observe: Observe,
    ) -> None:
        """`create` makes a client, with its transactional id and the broker's patience in s."""
        self._create, self._group_id, self._group = create, group_id, group
        self._observe = observe
        self._interval_s, self._deadline_s = interval_s, deadline_s
        self._batch_max_bytes, self._refused = batch_max_bytes, refused
        self._owned: dict[Partition, Owned] = {}
        self.fenced: dict[Partition, float] = {}
        """Partitions whose producer was fenced, although nobody has told us that they are lost, and
        since when (seconds of the loop's clock): see to it that they are restored again."""

    # --- whose a partition is ------------------------------------------------------------------

    async def fence(self, partitions: AbstractSet[Partition]) -> None:
        """Start a producer for each, so that nobody before us can end a transaction any more.

        What was open is aborted when it returns. Raises `KafkaError` or `TimeoutError`, and
        `CannotRun` where they are too many for one worker.
        """
        if len(self._owned.keys() | partitions) > PARTITIONS_MAX:
            raise CannotRun(
                f"In delivery.mode exactly_once a worker holds at most {PARTITIONS_MAX} input "
                f"partitions, and it was given {len(self._owned.keys() | partitions)}: each takes "
                "a client of its own. Run more workers, or use at_least_once."
            )
        failures: list[Exception] = []
        gate = asyncio.Semaphore(STARTED_AT_ONCE)
        async with asyncio.TaskGroup() as tasks:
            for where in partitions:
                tasks.create_task(self._fence(where, gate, failures))
        if failures:
            raise failures[0]

    async def _fence(
        self, where: Partition, gate: asyncio.Semaphore, failures: list[Exception]
    ) -> None:
        if (before := self._owned.pop(where, None)) is not None:
            self._let_go(before)
        async with gate:
            try:
                producer = await self._start(where)
            except (KafkaError, OSError) as error:
                failures.append(error)
                return
        self._owned[where] = Owned(where, producer)
        self.fenced.pop(where, None)

    def keep_only(self, partitions: AbstractSet[Partition]) -> None:
        """All others are lost: nothing of them is committed any more."""
        for where in self._owned.keys() - partitions:
            self._let_go(self._owned.pop(where))
        for where in self.fenced.keys() - partitions:
            del self.fenced[where]

    def _let_go(self, owned: Owned) -> None:
        owned.lost = True
        if owned.task is not None:
            owned.task.cancel()
        _fail(owned.waiting, f"{owned.where} is not ours any more")
        owned.waiting.clear()
        self._retire(owned)

    async def stop(self, flush_timeout_s: float) -> bool:
        """Give what is handed over this long, then fail the rest; whether nothing was left."""
        tasks = {each.task for each in self._owned.values() if each.task is not None}
        left: set[asyncio.Task[None]] = set()
        if tasks:
            _, left = await asyncio.wait(tasks, timeout=flush_timeout_s)
        self.keep_only(frozenset())
        return not left

    # --- what is handed over ---------------------------------------------------------------------

    def hand_over(
        self,
        where: Partition,
        offset: int,
        outputs: Sequence[tuple[int, Output]],
        on_failure: Callable[[], None],
    ) -> asyncio.Future[None]:
        """Take a message's outputs with their partitions, in order, without waiting.

        The future ends when the transaction that holds them and the message's offset is
        committed, or with `PublishFailed` or `OutputTooLarge`. Cancelling it withdraws what has
        not left yet.
        """
        handover = Handover(1, on_failure)
        owned = self._owned.get(where)
        if owned is None:
            handover.fail(PublishFailed(f"{where} is not ours"))
            return handover.future
        owned.waiting.append(Waiting(offset, list(outputs), handover))
        if owned.task is None:
            owned.task = self._group.create_task(self._work(owned))
        return handover.future

    async def commit(self, partitions: AbstractSet[Partition]) -> None:
        """Store the progress of each, without outcomes; raises `CommitFailed`."""
        failures: list[CommitFailed] = []
        async with asyncio.TaskGroup() as tasks:
            for where in partitions:
                tasks.create_task(self._commit(where, failures))
        if failures:
            raise failures[0]

    async def _commit(self, where: Partition, failures: list[CommitFailed]) -> None:
        owned = self._owned.get(where)
        if owned is None:
            failures.append(CommitFailed("rebalance"))
            return
        async with owned.turn:
            try:
                await self._transact(owned, [])
            except PublishFailed as error:
                failures.append(CommitFailed(str(error)))

    # --- one partition ---------------------------------------------------------------------------

    async def _work(self, owned: Owned) -> None:
        try:
            await asyncio.sleep(self._interval_s)
            while owned.waiting:
                async with owned.turn:
                    taken = owned.take()
                    try:
                        if taken:
                            await self._transact(owned, taken)
                    except PublishFailed as error:
                        # Nothing handed over behind them may land before they are sent again.
                        _fail([*taken, *owned.waiting], str(error))
                        owned.waiting.clear()
                    finally:
                        _fail(taken, "the sink was stopped")  # those that are not settled
                if owned.waiting:
                    await asyncio.sleep(0 if owned.waiting[0].alone else self._interval_s)
        finally:
            owned.task = None

    async def _transact(self, owned: Owned, taken: list[Waiting]) -> None:
        """One transaction, to its known end; raises `PublishFailed` where it came to nothing.

        Refused records are settled or put back, without an exception. Cancelled, its producer is
        not used again.
        """
        finishing = frozenset(each.offset for each in taken)
        doubt: Stored | None = None
        try:
            async with asyncio.timeout(self._deadline_s):
                producer = owned.producer or await self._renew(owned)
                await producer.begin()
                await producer.write(self._batches(taken))
                # Asked now: nothing that finishes later may be forgotten by what is stored here.
                stored = self.ledger.to_store(owned.where, finishing)
                if stored is None or owned.lost:
                    raise PublishFailed("rebalance")
                await producer.end(owned.where, stored, self._group_id)
                doubt = stored
                await producer.commit()
        except ProducerFenced as error:
            self._was_fenced(owned)
            raise PublishFailed(f"{owned.where} is another's") from error
        except (KafkaError, OSError, TimeoutError, PublishFailed) as error:
            self._retire(owned)
            if doubt is None:
                await self._came_to_nothing(owned, taken, error)
                return
            if not await self._resolved(owned, doubt):
                raise PublishFailed(f"{owned.where}: {type(error).__name__}") from error
        except BaseException:
            self._retire(owned)
            raise
        self.ledger.stored(owned.where, doubt)
        for each in taken:
            each.handover.acknowledged()
        # Whoever asks the ledger next asks after those who wait for this have heard of it.
        await asyncio.sleep(0)

    def _batches(self, taken: Sequence[Waiting]) -> list[tuple[TopicPartition, list[Output]]]:
        """Outputs by partition, in order, in batches that the topics take."""
        batches: list[tuple[TopicPartition, list[Output]]] = []
        last: dict[TopicPartition, tuple[list[Output], int]] = {}
        for each in taken:
            for partition, output in each.outputs:
                where = TopicPartition(output.topic, partition)
                batch, size = last.get(where, ([], 0))
                if not batch or size + output.size_bytes > self._batch_max_bytes(where.topic):
                    batch, size = [], 0
                    batches.append((where, batch))
                batch.append(output)
                last[where] = batch, size + output.size_bytes
        return batches

    async def _came_to_nothing(self, owned: Owned, taken: list[Waiting], error: Exception) -> None:
        """It was not committed. What it left open blocks readers, so it is ended at once."""
        if self.ledger.holds(owned.where) and not owned.lost:
            try:
                async with asyncio.timeout(self._deadline_s):
                    await self._renew(owned)
            except (KafkaError, OSError, TimeoutError) as later:
                log.warning("no producer for %s yet: %s", owned.where, type(later).__name__)
        if isinstance(error, TOO_LARGE) and taken:
            self._settle_too_large(owned, taken)
        elif isinstance(error, InvalidTimestampError) and any(map(_is_dated, taken)):
            # The topic bounds how far a timestamp may lie from now, and input has others.
            if len(taken) == 1:
                taken[0].outputs = [(p, replace(o, timestamp_ms=None)) for p, o in taken[0].outputs]
            owned.put_back(taken)
            taken.clear()
        elif isinstance(error, PublishFailed):
            raise error
        else:
            raise PublishFailed(f"{owned.where}: {type(error).__name__}") from error

    def _settle_too_large(self, owned: Owned, taken: list[Waiting]) -> None:
        if len(taken) > 1:
            owned.put_back(taken)
        else:
            largest = max((output for _, output in taken[0].outputs), key=lambda o: o.size_bytes)
            self._refused(largest.topic, largest.size_bytes)
            taken[0].handover.fail(too_large(largest))
        taken.clear()

    async def _resolved(self, owned: Owned, doubt: Stored) -> bool:
        """Whether a transaction was committed of which only the broker knows.

        Waits until that is known. Where the partition is lost meanwhile it does not matter here.
        """
        while self.ledger.holds(owned.where) and not owned.lost:
            try:
                async with asyncio.timeout(self._deadline_s):
                    # The new one's start has ended what was open, one way or the other.
                    await self._renew(owned)
                    return await self.ledger.read_back(owned.where) == doubt
            except ProducerFenced:
                self._was_fenced(owned)
                return False
            except (KafkaError, OSError, TimeoutError) as error:
                log.warning(
                    "it is not known yet how a transaction of %s ended: %s",
                    owned.where,
                    type(error).__name__,
                )
            self._retire(owned)
            await asyncio.sleep(RESOLVE_AGAIN_S)
        return False

    # --- clients -------------------------------------------------------------------------------

    async def _renew(self, owned: Owned) -> TransactionalProducer:
        """A new producer in the place of one that is of no use any more."""
        self._retire(owned)
        owned.producer = await self._start(owned.where)
        log.warning("the producer of %s is replaced", owned.where)
        self._observe(ClientReplaced("producer"))
        return owned.producer

    async def _start(self, where: Partition) -> TransactionalProducer:
        patience_s = self._deadline_s + TIMEOUT_MARGIN_S
        client = self._create(transactional_id(self._group_id, where), patience_s)
        started = False
        try:
            await client.start()
            started = True
            return TransactionalProducer(client, self._observe)
        finally:
            if not started:
                self._group.create_task(TransactionalProducer(client, self._observe).cut_off())

    def _retire(self, owned: Owned) -> None:
        producer, owned.producer = owned.producer, None
        if producer is not None:
            self._group.create_task(producer.abandon() if owned.lost else producer.cut_off())

    def _was_fenced(self, owned: Owned) -> None:
        log.warning("%s was given to another worker: its transaction is void", owned.where)
        self._retire(owned)
        if self._owned.get(owned.where) is owned:
            del self._owned[owned.where]
            self.fenced[owned.where] = asyncio.get_running_loop().time()


def _is_dated(each: Waiting) -> bool:
    return any(output.timestamp_ms is not None for _, output in each.outputs)


def _fail(those: Iterable[Waiting], why: str) -> None:
    for each in those:
        each.handover.fail(PublishFailed(why))

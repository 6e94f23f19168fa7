"""Exactly once: for each input partition its outputs and its next offset in one transaction.

Why nothing is published twice, whatever dies, hangs or is fenced, in whatever order:

1. Outputs become visible together with the offset and the map in which their messages count as
   finished, or not at all. That is Kafka's transaction.
2. A transaction can be committed only under the newest epoch of its transactional id, and there
   is one id for an input partition. What older epochs sent may still arrive; it is refused.
3. Under an epoch a transaction begins only after what Kafka holds was read *behind* the start of
   that epoch: by the source's restore after `fence`, by the writer itself after an epoch of its
   own making. So the ledger knows everything that was ever committed, and nobody else can commit
   anything for as long as the epoch lasts.
4. What the ledger knows as finished is never handed over again. Where it is not known whether a
   transaction was committed, its outcomes stay unsettled until a newer epoch has ended it one way
   or the other and what Kafka holds was read: the one that was attempted (committed), the one
   from before (not committed: they go again), or something else: another owner was there, the
   writer is lost, and only a restore may begin anew.

It does not matter for this whether "is it ours?" was answered rightly. Two workers that both
think so fence each other; whoever is fenced has lost what was not committed, and publishes
nothing until it has restored.

What breaks it is Kafka itself where it forgets a commit that it has acknowledged: known of 4.3
for partitions without a leader, as when a broker that is alone shuts down in order
(KAFKA-20734). The writer finds out at its next epoch and asks for a restore: publishing twice is
better than not at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from collections.abc import Set as AbstractSet

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from service.core.errors import CannotRun, CommitFailed, PublishFailed, WrongSettings
from service.core.events import Observe
from service.core.messages import Partition
from service.core.words import how_many
from service.kafka.client.connection import client_options
from service.kafka.client.deadlines import briefly, within
from service.kafka.client.meaning import stop_for
from service.kafka.sending.producers import Output
from service.kafka.transactions.producer import TransactionalProducer, transactional_id
from service.kafka.transactions.writer import Ledger, Writer, WriterContext
from service.settings import KafkaSettings

PREFIX = "sluice"
"""All our transactional ids begin with this, so that permissions can be given for it."""
FENCES_AT_ONCE = 16
"""At most this many clients connect side by side; more of them are no faster in one process."""
PARTITIONS_MAX = 500
"""One worker takes at most this many partitions. Measured on one broker: 500 producers connect in 2
s and add 34 MB; each transaction takes 1 ms of CPU, so that one a second in each of them takes
half a core."""
CONNECTIONS_EACH = 5
"""One producer has this many connections with three brokers: to each as a leader, and to the
coordinators of its transactions and of the group."""
FILES_BESIDES = 200
"""A worker has this many other files open: connections to the model's provider, and the rest."""
TIMEOUT_MARGIN_S = 10.0
"""The coordinator aborts a transaction this long after our own deadline for it."""
STUCK_S = 10.0
"""A writer that has failed for this long is told of: a broker that moves is back sooner."""
TRY_S = 15.0
"""The first transactional producer has this long to start; the topic of their states is made with
it."""
CONNECTIONS_MAX_IDLE_MS = 60_000
METADATA_MAX_AGE_MS = 300_000
"""Partitions where nothing happens keep no connections, and asking for metadata would open one each
time. A leader that moved is found by its error, a new output partition by a new producer."""


def transactional_options(deadline_s: float) -> dict[str, int]:
    """What the client takes beside its other options.

    We give a transaction up before its coordinator does. Readers with `read_committed` wait that
    long for the transaction of a worker that is gone and that nobody follows.
    """
    return {
        "transaction_timeout_ms": int((deadline_s + TIMEOUT_MARGIN_S) * 1000),
        "connections_max_idle_ms": CONNECTIONS_MAX_IDLE_MS,
        "metadata_max_age_ms": METADATA_MAX_AGE_MS,
    }


async def try_transactions(kafka: KafkaSettings, deadline_s: float) -> None:
    """Whether brokers allow them, by an id of no partition; raises `Stop`."""
    client = AIOKafkaProducer(
        **client_options(kafka) | transactional_options(deadline_s),
        transactional_id=f"{PREFIX}-{kafka.group_id}:check",
    )
    try:
        await within(TRY_S, client.start())
    except (KafkaError, OSError, TimeoutError) as error:
        raise stop_for(error, kafka) from error
    finally:
        await briefly(client.stop, TRY_S)


def partitions_max(files_max: int) -> int:
    """How many input partitions one worker takes that may have so many files open."""
    return max(1, min(PARTITIONS_MAX, (files_max - FILES_BESIDES) // CONNECTIONS_EACH))


def too_many(partitions: int, limit: int) -> str:
    """A sentence for the person who runs a worker that got more partitions than it takes."""
    workers = -(-partitions // limit)
    files = ""
    if limit < PARTITIONS_MAX:
        files = f"let it have more files open (ulimit -n; {PARTITIONS_MAX} need "
        files += f"{PARTITIONS_MAX * CONNECTIONS_EACH + FILES_BESIDES}), "
    return (
        f"delivery.mode exactly_once needs a producer for each input partition. This worker got "
        f"{how_many(partitions, 'partition')} and takes {limit}: {files}see that at least "
        f"{workers} workers are up at any time, read topics with fewer partitions, or set "
        "delivery.mode to at_least_once."
    )


class Transactions:
    """The transactions of all input partitions of one worker.

    `create` makes a client for a transactional id, with `transactional_options(deadline_s)`;
    `refused` hears of batches that were too large, `observe` of producers that were replaced.
    Must be used within the task group that it is given.
    """

    def __init__(
        self,
        create: Callable[[str], AIOKafkaProducer],
        *,
        group_id: str,
        refused: Callable[[str, int], None],
        observe: Observe,
        batch_max_bytes: Callable[[str], int],
        interval_s: float,
        deadline_s: float,
        open_timeout_s: float,
        group: asyncio.TaskGroup,
        partitions_max: int = PARTITIONS_MAX,
    ) -> None:
        self._create, self._group_id = create, group_id
        self._refused, self._batch_max_bytes = refused, batch_max_bytes
        self._observe = observe
        self._interval_s, self._deadline_s = interval_s, deadline_s
        self._open_timeout_s = open_timeout_s
        self._group = group
        self._partitions_max = partitions_max
        self._writers: dict[Partition, Writer] = {}
        self._fencing: dict[Partition, asyncio.Task[Exception | None]] = {}
        self._turn = asyncio.Semaphore(FENCES_AT_ONCE)
        self._ending: dict[TransactionalProducer, asyncio.Task[None] | None] = {}
        self._hurried = self._stopped = False
        self._ledger: Ledger | None = None

    def ask(self, ledger: Ledger) -> None:
        """From now on this one says what Kafka holds and is to hold; told before the first fence,
        and again where another client takes the place of the one before."""
        self._ledger = ledger

    # --- whose a partition is --------------------------------------------------------------------

    async def fence(self, partitions: AbstractSet[Partition]) -> None:
        """A new epoch for each of these, and for those that are being fenced already.

        Afterwards no older producer can commit anything for them: only then may be read what
        Kafka holds. An outcome of before that was not settled may have been committed. An epoch
        under which nothing has begun is kept, so that an attempt after one that failed goes on
        with the rest. Raises `KafkaError` or `PublishFailed` for the first that failed, and
        `CannotRun` where there are too many. Cancelled, it goes on in the background.
        """
        if self._stopped:
            raise PublishFailed("the sink is stopped")
        held = len(partitions | self._writers.keys() | self._fencing.keys())
        if held > self._partitions_max:
            raise CannotRun(too_many(held, self._partitions_max))
        for partition in partitions:
            if partition not in self._fencing and not self._is_as_fenced(partition):
                self.drop([partition])
                self._fencing[partition] = self._group.create_task(self._fence_one(partition))
        tasks = [self._fencing[each] for each in partitions if each in self._fencing]
        if tasks:
            await asyncio.wait(tasks)
        for task in tasks:
            if task.cancelled():
                raise PublishFailed("a partition was taken away while it was fenced")
            if (failure := task.result()) is not None:
                raise failure

    def _is_as_fenced(self, partition: Partition) -> bool:
        """Whether a writer stands under an epoch without use, for the ledger of now: that of a
        client that was replaced knows no partition any more."""
        writer = self._writers.get(partition)
        return writer is not None and writer.unused and writer.ledger is self._ledger

    def stop_fencing(self) -> None:
        """Fences that are not done yet are left: the partitions may be another's by now."""
        self.drop(list(self._fencing))

    def holds(self, partition: Partition) -> bool:
        """Whether it can go on without a new fence: its epoch stands, nothing is in doubt."""
        writer = self._writers.get(partition)
        return writer is not None and writer.settled

    def drop(self, partitions: Iterable[Partition]) -> None:
        """They are lost: withdraw what is not committed, end what is open, in the background.

        A commit that has been asked for may still succeed; whoever has the partition next learns
        it from what Kafka holds.
        """
        for partition in list(partitions):
            if (task := self._fencing.pop(partition, None)) is not None:
                task.cancel()
            writer = self._writers.pop(partition, None)
            if writer is not None and (producer := writer.drop()) is not None:
                self._end(producer, producer.end)

    def keep_only(self, partitions: Collection[Partition]) -> None:
        """Drop all others."""
        self.drop((self._writers.keys() | self._fencing.keys()) - set(partitions))

    # --- what goes into transactions -------------------------------------------------------------

    def hand_over(
        self,
        partition: Partition,
        offset: int,
        outputs: Sequence[tuple[int, Output]],
        on_failure: Callable[[], None],
    ) -> asyncio.Future[None]:
        """Take the outputs of one message with their partitions, in order, without waiting.

        The future ends when the transaction that holds them and the offset is committed; or with
        `PublishFailed` (not committed, and nothing of this input partition that was handed over
        later is or will be before it is handed over again) or `OutputTooLarge`. Cancelling it
        withdraws it, unless its commit is asked for already.
        """
        writer = self._writers.get(partition)
        assert self._ledger is not None, "set before the first fence"
        # Late outcomes of an older assignment come while the new one is restored.
        if writer is not None and self._ledger.takes(partition):
            return writer.queue_up(offset, outputs, on_failure)
        on_failure()
        return _failed(PublishFailed(f"{partition} is not held"))

    def has_room(self, partition: Partition) -> bool:
        """Whether an outcome without outputs may finish by itself: the completed map surely holds
        it, and those of transactions that are under way. Otherwise it is to be handed over."""
        assert self._ledger is not None, "set before the first fence"
        return self._ledger.has_room(partition)

    async def commit(self, partitions: Collection[Partition]) -> None:
        """Store what the ledger says for these, each in its next transaction.

        What is queued for it goes along. Returns within twice the deadline; raises `CommitFailed`
        where one was not committed ("rebalance": it is not held any more), or not in time: that
        one may still be.
        """
        waiting = [self._wish(partition) for partition in partitions]
        try:
            if waiting:
                await asyncio.wait(waiting, timeout=2 * self._deadline_s)
        finally:
            for each in waiting:
                each.cancel()
        for each in waiting:
            if each.cancelled():
                raise CommitFailed("timeout")
        for partition, each in zip(partitions, waiting, strict=True):
            if (failure := each.exception()) is not None:
                why = "not committed" if self._is_held(partition) else "rebalance"
                raise CommitFailed(why) from failure

    def hurry(self, *, on: bool) -> None:
        """With `on`, transactions gather no longer (a rebalance or a stop: others wait for us)."""
        self._hurried = on
        for writer in self._writers.values():
            writer.hurried = on
            writer.go_on()

    @property
    def problem(self) -> str:
        """A sentence about a partition for which nothing can be published; empty if all is well."""
        for partition, writer in self._writers.items():
            if (why := writer.stuck(STUCK_S)) is not None:
                return (
                    f"What was extracted from {partition} cannot be published for {STUCK_S:.0f} s "
                    f"and longer ({why}): it waits and is tried again. See to the brokers."
                )
        return ""

    async def stop(self, flush_timeout_s: float) -> bool:
        """Give what is queued this long, fail the rest, close all; whether nothing was left."""
        self._stopped = True
        for fencing in self._fencing.values():
            fencing.cancel()
        self.hurry(on=True)
        working = [w.task for w in self._writers.values() if w.task is not None]
        left: set[asyncio.Task[None]] = set()
        if working:
            _, left = await asyncio.wait(working, timeout=flush_timeout_s)
        open_ = [writer.stop() for writer in self._writers.values()]
        self._writers.clear()
        # Tasks of a group that was cancelled have ended nothing.
        unended = [each for each, task in self._ending.items() if task is None or task.cancelling()]
        async with asyncio.TaskGroup() as ending:
            for producer in (*open_, *unended):
                if producer is not None:
                    ending.create_task(producer.end())
        return not left

    # --- fencing ----------------------------------------------------------------------------------

    async def _fence_one(self, partition: Partition) -> Exception | None:
        """A writer for it under a new epoch; returns what stood in the way."""
        try:
            async with self._turn:
                producer = await self._open(partition)
        except (PublishFailed, KafkaError) as error:
            return error
        finally:
            if self._fencing.get(partition) is asyncio.current_task():
                del self._fencing[partition]
        # No wait since the epoch: if it were dropped meanwhile, this task would be cancelled.
        writer = Writer(partition, producer, self._context())
        writer.hurried = self._hurried
        self._writers[partition] = writer
        return None

    async def _open(self, partition: Partition) -> TransactionalProducer:
        """A started producer; raises `PublishFailed`, or `KafkaError` where the broker refuses."""
        try:
            producer = TransactionalProducer(
                self._create(transactional_id(PREFIX, self._group_id, partition)), self._observe
            )
        except WrongSettings as error:
            # A file with credentials may be missing for a moment while it is renewed.
            raise PublishFailed(f"{partition}: no producer: {error}") from error
        started = False
        try:
            async with asyncio.timeout(self._open_timeout_s):
                await producer.start()
            started = True
        except TimeoutError as error:
            why = f"{partition}: no producer within {self._open_timeout_s:g} s"
            raise PublishFailed(why) from error
        except OSError as error:
            raise PublishFailed(f"{partition}: no producer: {type(error).__name__}") from error
        finally:
            if not started:
                self._end(producer, producer.cut_off)
        return producer

    def _end(self, producer: TransactionalProducer, how: Callable[[], Awaitable[None]]) -> None:
        """End a producer in the background; where the group ends itself, `stop` sees to it."""
        self._ending[producer] = None
        work = self._ended(producer, how)
        try:
            self._ending[producer] = self._group.create_task(work)
        except RuntimeError:
            work.close()

    async def _ended(
        self, producer: TransactionalProducer, how: Callable[[], Awaitable[None]]
    ) -> None:
        await how()
        del self._ending[producer]

    def _context(self) -> WriterContext:
        assert self._ledger is not None, "the source sets it at its start"
        return WriterContext(
            turn=self._turn,
            open=self._open,
            end=self._end,
            ledger=self._ledger,
            batch_max_bytes=self._batch_max_bytes,
            refused=self._refused,
            observe=self._observe,
            group_id=self._group_id,
            interval_s=self._interval_s,
            deadline_s=self._deadline_s,
            group=self._group,
        )

    def _is_held(self, partition: Partition) -> bool:
        writer = self._writers.get(partition)
        return writer is not None and not writer.lost

    def _wish(self, partition: Partition) -> asyncio.Future[None]:
        writer = self._writers.get(partition)
        if writer is None:
            return _failed(PublishFailed(f"{partition} is not held"))
        return writer.queue_up(None, (), lambda: None)


def _failed(error: Exception) -> asyncio.Future[None]:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    future.exception()  # read once, so that asyncio logs nothing where nobody waits
    return future

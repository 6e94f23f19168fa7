"""One member of the consumer group behind the pipeline's `Source`: poll, commit, status.

Messages come from held partitions alone, and a partition is held only after its restore (see
holdings.py), so that none comes before it. Positions are read in the same breath as the messages.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import (
    CorruptRecordException,
    IllegalGenerationError,
    KafkaError,
    NodeNotReadyError,
    NoError,
    OffsetOutOfRangeError,
    RebalanceInProgressError,
    RecordTooLargeError,
    RequestTimedOutError,
    UnknownMemberIdError,
    UnknownTopicOrPartitionError,
    UnsupportedCodecError,
)
from aiokafka.structs import ConsumerRecord

from service.core.errors import CannotRun, CommitFailed, WrongSettings
from service.core.events import ClientReplaced, Committed, Observe, StopForced
from service.core.messages import Batch, Message, Partition
from service.core.status import GroupStatus
from service.kafka.client.connection import client_options, reach
from service.kafka.client.deadlines import STOP_S, briefly, within
from service.kafka.client.instances import NameTaken
from service.kafka.client.meaning import is_lasting, stop_for
from service.kafka.client.private import FencedInstanceIdError, Membership
from service.kafka.client.topics_seen import FoundTopic, find_topics
from service.kafka.group.due import DueTimes
from service.kafka.group.group_offsets import GroupOffsets
from service.kafka.group.holdings import Holding, Holdings, Listener
from service.kafka.group.settling import SettlingClock
from service.kafka.group.supervision import Supervision
from service.kafka.group.watchdog import REPLACED_MAX, REPLACED_WITHIN_S, Replacements
from service.kafka.transactions.transactions import Transactions
from service.ports import Assignment
from service.settings import Settings

log = logging.getLogger(__name__)

POLL_WAIT_S = 0.2
"""The longest that a poll waits for its first message."""

COMMIT_S = 5.0
"""One commit, with what of it can be tried again."""

FAILING_S = 60.0
"""A client that only raises for this long is replaced."""

OPEN_AGAIN_S = 1.0
"""Between two tries to open the client that takes another's place."""

ANSWER_S = 5.0
"""Silence of all brokers after which one is asked whether it is there."""

POLL_RECORDS_MAX = 500
FETCH_MAX_BYTES = 16 * 1024 * 1024
FETCH_PARTITION_MAX_BYTES = 1024 * 1024
"""One fetch, and each partition's part of it; so much is buffered for each partition besides. A
larger message still comes, alone: brokers always return at least one."""

UNREADABLE = (
    CorruptRecordException,
    RecordTooLargeError,
    UnicodeDecodeError,
    UnsupportedCodecError,
)
"""Errors of one partition's messages; the client raises the same again and again."""

FETCH_WAIT_MS = 500
MAX_POLL_INTERVAL_MS = 300_000
"""Without a poll for this long the client leaves the group, so that others get its partitions."""

NOWHERE = TopicPartition("", -1)
"""No partition: `getmany()` without one would mean all. So it counts as a poll, takes nothing
and leaves the buffers alone; a pause would throw away what is prefetched and ends unnoticed at
each rebalance."""


class KafkaSource:
    """The input topics, as one member of the group reads them; for one event loop.

    `start`, then `poll` and `commit`, with `supervise` beside them, then `stop`. `observe` hears
    of rebalances, commits, missing offsets and replaced clients.
    """

    def __init__(
        self,
        settings: Settings,
        observe: Observe,
        transactions: Transactions | None = None,
        *,
        start_over: bool = False,
    ) -> None:
        """With `transactions`, in the sink's hands, progress is stored through them alone. With
        `start_over`, partitions that only a person can say of from where to read are read: each
        as it is first given, later ones wait as always."""
        self._settings, self._kafka, self._observe = settings, settings.kafka, observe
        self._transactions, self._start_over = transactions, start_over
        self._turns = itertools.count()  # which partition a poll begins with
        # Its state is in class attributes: a subclass each, or consumers in a process mix it up.
        self._assignor: Any = type("SluiceAssignor", (StickyPartitionAssignor,), {})
        self._consumer: AIOKafkaConsumer | None = None
        self._admin: AIOKafkaAdminClient | None = None
        self._holdings: Holdings | None = None
        self._failure: tuple[list[TopicPartition], Exception] | None = None  # of the last fetch
        self._failing_since_s: float | None = None
        self._due = DueTimes(settings.retries.topic, lambda: int(time.time() * 1000))
        self._clock = SettlingClock()
        self._supervision = Supervision(self._kafka, {})
        self._replacements = Replacements()
        self._replace_for: str | None = None  # why the client is to be replaced

    # --- start and stop ------------------------------------------------------------------------

    async def start(self, assignment: Assignment) -> None:
        """Connect, check the topics, ask to join; does not wait for an assignment.

        Raises `CannotRun` with a sentence, within seconds where no broker answers.
        """
        self._assignment = assignment
        await reach(self._kafka)
        try:
            self._admin = await self._open_admin()
            found = await within(self._kafka.request_timeout_s, self._check_topics(self._admin))
            lags = self._settings.limits.shared
            self._supervision = Supervision(self._kafka, found, lags=lags)
            assignment.seen(self._supervision.lags({}))  # before anything is called
            await self._join(self._admin)
        except (KafkaError, OSError, TimeoutError) as error:
            await self.stop()
            raise stop_for(error, self._kafka) from error
        except BaseException:
            await self.stop()
            raise

    async def _open_admin(self) -> AIOKafkaAdminClient:
        self._admin = AIOKafkaAdminClient(**client_options(self._kafka))
        await within(self._kafka.request_timeout_s, self._admin.start())
        return self._admin

    async def _join(self, admin: AIOKafkaAdminClient) -> None:
        consumer = AIOKafkaConsumer(**client_options(self._kafka), **self._consumer_options())
        self._consumer = consumer
        await within(self._kafka.request_timeout_s, consumer.start())
        self._clock.heard(_now_s())
        self._offsets = GroupOffsets(admin, consumer, self._topics, self._kafka.group_id)
        self._membership = Membership(consumer)
        holdings = Holdings(
            self._settings,
            consumer,
            self._offsets,
            self._assignment,
            self._observe,
            self._assignor,
            self._transactions,
            start_over=self._start_over,
        )
        holdings.doubtful = lambda: self._supervision.doubtful
        if self._transactions is not None:
            self._transactions.ledger = holdings
        if self._holdings is not None:
            holdings.follow(self._holdings)
        self._holdings = holdings
        self._membership.hear_fetches(holdings.fetched)
        await holdings.see_that_the_name_is_free()
        consumer.subscribe(list(self._topics), listener=Listener(holdings))

    async def stop(self) -> None:
        """Leave the group and close, within `STOP_S` and a little; a second call does nothing."""
        if self._holdings is not None:
            self._holdings.close()
        consumer, self._consumer = self._consumer, None
        put_out = self._holdings is not None and isinstance(self._holdings.fatal, NameTaken)
        if consumer is not None and not await Membership(consumer).leave(put_out=put_out):
            self._observe(StopForced("consumer"))
        admin, self._admin = self._admin, None
        if admin is not None:
            await briefly(admin.close, STOP_S)

    async def _check_topics(self, admin: AIOKafkaAdminClient) -> dict[str, FoundTopic]:
        topics = await find_topics(admin, list(self._topics))
        for topic, found in topics.items():
            # A topic between two leaders is there all the same.
            if is_lasting(found.error()):
                raise stop_for(found.error(), self._kafka, topic)
        try:
            # Needs a permission on the group; that there is no coordinator yet is no matter.
            await admin.find_coordinator(self._kafka.group_id)
        except KafkaError as error:
            if is_lasting(error):
                raise
        return topics

    def _consumer_options(self) -> dict[str, object]:
        session_ms = int(self._kafka.session_timeout_s * 1000)
        # A member may wait for its calls and then commit before it joins again.
        drain_s = self._settings.delivery.rebalance_drain_s + 2 * COMMIT_S
        return {
            "group_id": self._kafka.group_id,
            "group_instance_id": self._kafka.group_instance_id,
            "enable_auto_commit": False,
            "auto_offset_reset": "none",
            "isolation_level": "read_committed",
            "check_crcs": True,
            "partition_assignment_strategy": (self._assignor,),
            "session_timeout_ms": session_ms,
            # How soon a member hears of a rebalance, for which the whole group waits.
            "heartbeat_interval_ms": min(1000, session_ms // 3),
            "rebalance_timeout_ms": max(session_ms, int((drain_s + 10) * 1000)),
            "max_poll_interval_ms": MAX_POLL_INTERVAL_MS,
            "max_poll_records": POLL_RECORDS_MAX,
            "fetch_min_bytes": 1,
            "fetch_max_wait_ms": FETCH_WAIT_MS,
            "fetch_max_bytes": FETCH_MAX_BYTES,
            "max_partition_fetch_bytes": FETCH_PARTITION_MAX_BYTES,
            "consumer_timeout_ms": 200,
            "exclude_internal_topics": True,
        }

    # --- poll ----------------------------------------------------------------------------------

    async def poll(self, limit: int, closed: AbstractSet[Partition]) -> Batch:
        """At most `limit` messages of partitions that are held and not in `closed`.

        Waits up to `POLL_WAIT_S` for the first; with `limit` 0 not at all. Partitions take
        turns. Cancelling it loses nothing. Raises `CannotRun` where going on makes no sense.
        """
        self._tick()
        if self._holdings is not None and self._holdings.fatal is not None:
            raise self._holdings.fatal
        self._see_to_dead_clients()
        if self._replace_for is not None and (limit or not self._settled):
            await self._replace()
            return Batch()
        holdings = self._started
        await self._see_to_the_rest(holdings)
        if self._membership.reassigning or not holdings.restored.is_set():
            await self._wait_for_the_restore(holdings, limit)
            return Batch()
        open_ = [
            partition
            for partition in holdings.readable
            if partition not in closed and self._due.open(partition)
        ]
        messages = await self._take(open_, limit)
        # No wait from here on: positions belong to these messages.
        return Batch(tuple(messages), self._positions(holdings), self._ends(holdings))

    async def _take(self, open_: list[Partition], limit: int) -> list[Message]:
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
        assert self._consumer is not None
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
        holding = self._started.held.get(partition)
        if holding is None:  # fetched before its restore, which seeks
            return []
        if not self._started.may_be_read(partition):  # found while we waited; mending it seeks
            return []
        if (wait := self._due.first_not_due(partition, records)) is not None:
            # Buffered it would come next, whatever else is due by then.
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

    def _positions(self, holdings: Holdings) -> dict[Partition, int]:
        """Behind the messages returned, and behind markers and aborted messages after them."""
        for partition in holdings.readable:
            position = self._membership.position(partition)
            if position is not None:
                holdings.held[partition].next = position
        return {partition: holding.next for partition, holding in holdings.held.items()}

    def _ends(self, holdings: Holdings) -> dict[Partition, int]:
        ends = {partition: self._membership.end(partition) for partition in holdings.held}
        return {partition: end for partition, end in ends.items() if end is not None}

    # --- what goes wrong in a poll -------------------------------------------------------------

    def _rewind(self, partitions: Iterable[TopicPartition]) -> None:
        """Back to behind what was returned: the client may have gone on before it failed."""
        assert self._consumer is not None
        for partition in partitions:
            holding = self._started.held.get(Partition(*partition))
            if holding is not None and not self._membership.reassigning:
                self._consumer.seek(partition, holding.next)

    async def _see_to(self, failure: tuple[list[TopicPartition], Exception]) -> None:
        partitions, error = failure
        self._supervision.excuse(Partition(*partition) for partition in partitions)
        if isinstance(error, FencedInstanceIdError):
            raise self._started.put_out
        if isinstance(error, OffsetOutOfRangeError):
            for partition in error.args[0]:
                self._started.broken(Partition(*partition))
        elif isinstance(error, UNREADABLE):
            if len(partitions) == 1:
                self._unreadable(Partition(*partitions[0]), error)
            else:  # which of them it is shows when they are fetched again and asked one by one
                await asyncio.sleep(POLL_WAIT_S)
        elif is_lasting(error):
            raise stop_for(error, self._kafka) from error
        else:
            await self._failing(error)

    def _unreadable(self, partition: Partition, error: Exception) -> None:
        holding = self._started.held.get(partition)
        if holding is not None:
            self._started.broken(
                partition,
                f"What stands in {partition} at offset {holding.next} or shortly after cannot be "
                f"read ({type(error).__name__}): if that lasts, stop every worker and set the "
                f"offset of the group {self._kafka.group_id} behind it with "
                "kafka-consumer-groups --reset-offsets.",
            )

    async def _failing(self, error: Exception) -> None:
        """A client that fails again and again is replaced; a short wait, lest it spins."""
        now_s = _now_s()
        self._failing_since_s = self._failing_since_s or now_s
        log.warning("fetching failed: %s", type(error).__name__)
        if now_s - self._failing_since_s > FAILING_S:
            self.replace(f"it has failed for {FAILING_S:.0f} s ({type(error).__name__})")
        await asyncio.sleep(POLL_WAIT_S)

    async def _wait_for_the_restore(self, holdings: Holdings, limit: int) -> None:
        self._hear_what_failed()
        if self._failure is not None:
            return
        with self._membership.polling():
            try:
                await within(POLL_WAIT_S if limit else 0.0, holdings.restored.wait())
            except TimeoutError:
                return

    def _hear_what_failed(self) -> None:
        """What the group's own task waits to tell."""
        try:
            self._membership.raise_what_failed()
        except KafkaError as error:
            self._failure = [], error

    async def _see_to_the_rest(self, holdings: Holdings) -> None:
        failure, self._failure = self._failure, None
        if failure is None:
            self._failing_since_s = None
        else:
            await self._see_to(failure)
        await holdings.see_to_the_rest()
        if _now_s() - self._clock.heard_at_s > ANSWER_S:
            await self._ask_whether_anybody_is_there()

    def _see_to_dead_clients(self) -> None:
        if self._consumer is not None and not self._membership.fetching:
            self.replace("its task that fetches has ended")

    # --- another client in its place -----------------------------------------------------------

    async def supervise(self) -> None:
        """Look after the client and the topics until cancelled; what a poll doesn't see is found.

        A client that has fallen silent, or behind, is replaced. Raises `CannotRun` where a topic
        was deleted or made again, or where replacing the client did not help.
        """
        await self._supervision.run(self)

    def replace(self, reason: str) -> None:
        """One of the next polls replaces the client. Raises `CannotRun` after too many."""
        if self._replace_for is not None:
            return
        if not self._replacements.allow(_now_s()):
            raise CannotRun(
                f"Kafka's client was replaced {REPLACED_MAX} times within "
                f"{REPLACED_WITHIN_S / 60:.0f} minutes and needs it again ({reason}): the process "
                "ends, so that the next one starts afresh. Where that repeats, see to the brokers."
            )
        log.warning("Kafka's client is replaced: %s", reason)
        self._observe(ClientReplaced("consumer"))
        self._replace_for = reason

    async def _replace(self) -> None:
        """Give everything back as at a rebalance, close, and join anew; one try at each."""
        if self._consumer is not None and self._holdings is not None:
            if await self._holdings.is_put_out():
                raise self._holdings.put_out
            await self._holdings.hand_back()
        await self.stop()
        self._failure = self._failing_since_s = None
        try:
            await self._join(await self._open_admin())
        except NameTaken:
            raise
        except (KafkaError, OSError, TimeoutError, WrongSettings) as error:
            if is_lasting(error):
                raise stop_for(error, self._kafka) from error
            # A file with credentials may be missing for a moment while it is renewed.
            log.warning("no new client yet: %s", type(error).__name__)
            await asyncio.sleep(OPEN_AGAIN_S)
            return
        self._replace_for = None
        self._supervision.forget()

    def standing(self) -> Mapping[Partition, int]:
        """Of what is held: the offset behind what was returned."""
        held = {} if self._holdings is None else self._holdings.held
        return {partition: holding.next for partition, holding in held.items()}

    def knows(self, topic: str) -> int:
        """How many partitions of a topic the client's own metadata has."""
        return 0 if self._consumer is None else self._membership.knows(topic)

    def seen(self, lags: Mapping[Partition, int | None]) -> None:
        """A look has found all partitions; for shared budgets."""
        self._assignment.seen(lags)

    def heard(self) -> None:
        """A broker has answered."""
        self._clock.heard(_now_s())

    # --- commit --------------------------------------------------------------------------------

    async def commit(self, partitions: AbstractSet[Partition]) -> None:
        """Store the progress of held partitions, within `COMMIT_S`.

        Raises `CommitFailed`: "rebalance" where the partitions are in question, which is no
        fault; "topic" where it is not sure that a topic is still the one that was read; else a
        word for why. A commit that was not answered in time may still arrive; the
        one after it then says the same or more.
        """
        started_s = _now_s()
        try:
            await self._commit(partitions)
        except CommitFailed as failure:
            result = "refused" if failure.reason == "rebalance" else "failed"
            self._observe(Committed(result, _now_s() - started_s))  # type: ignore[arg-type]
            raise
        self._observe(Committed("ok", _now_s() - started_s))
        self._clock.heard(_now_s())

    async def _commit(self, partitions: AbstractSet[Partition]) -> None:
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
        holdings, held = self._holdings_of(partitions), self._started
        asked = {partition: held.to_store(partition) for partition in partitions}
        wanted = {partition: stored for partition, stored in asked.items() if stored is not None}
        while True:
            await self._membership.find_coordinator()
            # Whoever has the partition now has it under another holding.
            if holdings != self._holdings_of(holdings):
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
                await asyncio.sleep(0.1)
            else:
                break
        for partition, stored in wanted.items():
            held.stored(partition, stored)

    def _holdings_of(self, partitions: Iterable[Partition]) -> dict[Partition, Holding]:
        held = {} if self._holdings is None else self._holdings.held
        wanted = set(partitions)
        if any(partition.topic in self._supervision.doubtful for partition in wanted):
            raise CommitFailed("topic")  # it may be another by now
        if not wanted <= held.keys():
            raise CommitFailed("rebalance")
        return {partition: held[partition] for partition in wanted}

    # --- what it knows -------------------------------------------------------------------------

    async def ends(self) -> dict[Partition, int]:
        """The end of every partition of the input topics now (last stable offset).

        Raises `CannotRun` where no broker says so in time.
        """
        try:
            return await within(self._kafka.request_timeout_s, self._offsets.ends())
        except (KafkaError, TimeoutError) as error:
            raise stop_for(error, self._kafka) from error

    def group(self) -> GroupStatus:
        """Membership now: settled, whether brokers answer, what holds intake up."""
        self._tick()
        return GroupStatus(
            settled=self._settled,
            unsettled_s=self._clock.unsettled_s,
            broker_answers=self._clock.answers(_now_s()),
            problem=None if self._holdings is None else self._holdings.problem,
            look_age_s=self._supervision.look_age_s,
            topic_partitions=self._supervision.partitions,
        )

    @property
    def _settled(self) -> bool:
        if self._consumer is None or self._holdings is None:
            return False
        return self._holdings.restored.is_set() and not self._membership.reassigning

    def _tick(self) -> None:
        if self._holdings is None:
            return
        if self._consumer is not None:
            self._clock.fetched(self._membership.fetched_at_ms(), _now_s())
        self._clock.tick(_now_s(), settled=self._settled)

    async def _ask_whether_anybody_is_there(self) -> None:
        """Spares hold nothing to fetch, and a full window fetches nothing: so ask."""
        assert self._admin is not None
        try:
            await within(2.0, self._admin.find_coordinator(self._kafka.group_id))
        except (NodeNotReadyError, RequestTimedOutError, TimeoutError, OSError):
            return
        except KafkaError as error:
            if isinstance(error, NoError) or not error.retriable:
                return
        self._clock.heard(_now_s())

    @property
    def _started(self) -> Holdings:
        if self._holdings is None or self._consumer is None:
            raise CannotRun("The source is not running.")
        return self._holdings

    @property
    def _topics(self) -> tuple[str, ...]:
        return self._settings.topics_read


def _commit_failed(error: KafkaError) -> CommitFailed:
    if isinstance(error, UnknownMemberIdError | IllegalGenerationError | RebalanceInProgressError):
        return CommitFailed("rebalance")
    return CommitFailed(type(error).__name__)


def _now_s() -> float:
    return asyncio.get_running_loop().time()

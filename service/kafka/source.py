"""One member of the consumer group behind the pipeline's `Source`: poll, commit, status.

Messages come from held partitions alone, and a partition is held only after its restore (see
group/restore.py), so that none comes before it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import KafkaError, NodeNotReadyError, NoError, RequestTimedOutError

from service import clock
from service.core.errors import CannotRun, CommitFailed, WrongSettings
from service.core.events import ClientReplaced, Committed, Observe, StopForced
from service.core.messages import Batch, Partition
from service.core.status import GroupStatus
from service.kafka.client.connection import client_options, reach
from service.kafka.client.deadlines import STOP_S, briefly, within
from service.kafka.client.meaning import is_lasting, stop_for
from service.kafka.client.private import Membership
from service.kafka.client.topics_seen import FoundTopic, find_topics
from service.kafka.group.committing import Committing
from service.kafka.group.due import DueTimes
from service.kafka.group.fetching import POLL_RECORDS_MAX, Fetching
from service.kafka.group.group_offsets import GroupOffsets
from service.kafka.group.holdings import Remembered
from service.kafka.group.member import Listener, Member
from service.kafka.group.name import NameTaken
from service.kafka.group.settling import SettlingClock
from service.kafka.group.supervision import Supervision
from service.kafka.group.watchdog import REPLACED_MAX, REPLACED_WITHIN_S, Replacements
from service.kafka.transactions.transactions import Transactions
from service.ports import Assignment
from service.settings import Settings

log = logging.getLogger(__name__)

OPEN_AGAIN_S = 1.0
"""The pause between two tries to open the client that takes another's place."""

ANSWER_S = 5.0
"""When all brokers have been silent for this long, one is asked whether it is there."""

ANSWERED_S = 2.0
"""That broker has this long to answer."""

FETCH_MAX_BYTES = 16 * 1024 * 1024
FETCH_PARTITION_MAX_BYTES = 1024 * 1024
"""One fetch, and each partition's part of it, have at most this size; so much is buffered for each
partition besides. A larger message still comes, alone: brokers always return at least one."""

FETCH_WAIT_MS = 500
"""A broker that has nothing new answers a fetch after this long."""

MAX_POLL_INTERVAL_MS = 300_000
"""Without a poll for this long the client leaves the group, so that others get its partitions."""


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
        self._transactions = transactions
        self._remembered = Remembered(self._kafka.group_instance_id, start_over=start_over)
        # The assignor keeps its state in class attributes: with a subclass for each consumer those
        # of one process do not mix theirs up.
        self._assignor: Any = type("SluiceAssignor", (StickyPartitionAssignor,), {})
        self._assignment: Assignment | None = None
        self._admin: AIOKafkaAdminClient | None = None
        # The client and its parts; when it has ended, the parts are there and hold nothing.
        self._consumer: AIOKafkaConsumer | None = None
        self._member: Member | None = None
        self._fetching: Fetching | None = None
        self._committing: Committing | None = None
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
            await self._join(self._admin, assignment)
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

    async def _join(self, admin: AIOKafkaAdminClient, assignment: Assignment) -> None:
        consumer = AIOKafkaConsumer(**client_options(self._kafka), **self._consumer_options())
        self._consumer = consumer
        await within(self._kafka.request_timeout_s, consumer.start())
        self._clock.broker_answered(clock.now_s())
        member = Member(
            self._settings,
            consumer,
            GroupOffsets(admin, consumer, self._topics, self._kafka.group_id),
            assignment,
            self._observe,
            self._assignor,
            self._transactions,
            remembered=self._remembered,
            doubtful=lambda: self._supervision.doubtful,
        )
        if self._transactions is not None:
            self._transactions.ask(member.holdings)
        self._member = member
        self._fetching = Fetching(
            self._kafka, consumer, member, self._due, self._supervision, self.replace
        )
        self._committing = Committing(member, self._supervision, self._transactions)
        member.membership.hear_fetches(member.positions.fetched)
        await member.name.see_that_it_is_free()
        consumer.subscribe(list(self._topics), listener=Listener(member))

    async def stop(self) -> None:
        """Leave the group and close, within `STOP_S` and a little; a second call does nothing."""
        member, consumer = self._member, self._consumer
        if member is not None:
            member.holdings.close()
        self._consumer = None
        if consumer is not None and not await self._left(consumer):
            self._observe(StopForced("consumer"))
        admin, self._admin = self._admin, None
        if admin is not None:
            await briefly(admin.close, STOP_S)

    async def _left(self, consumer: AIOKafkaConsumer) -> bool:
        """Whether the client ended in order; also one that was never a member."""
        put_out = self._member is not None and isinstance(self._member.holdings.fatal, NameTaken)
        return await Membership(consumer).leave(put_out=put_out)

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
            # A member may wait for its calls and then commit before it joins again.
            "rebalance_timeout_ms": int(self._settings.rebalance_timeout_s * 1000),
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
        if self._member is not None and self._member.holdings.fatal is not None:
            raise self._member.holdings.fatal
        self._see_to_dead_clients()
        if self._replace_for is not None and (limit or not self._settled):
            await self._replace()
            return Batch()
        member, fetching = self._joined
        await fetching.see_to_the_last_failure()
        await member.see_to_the_rest()
        if clock.now_s() - self._clock.answered_at_s > ANSWER_S:
            await self._ask_whether_anybody_is_there()
        if not member.settled:
            await fetching.wait_for_the_restore(limit)
            return Batch()
        return await fetching.poll(limit, closed)

    def _see_to_dead_clients(self) -> None:
        if self._consumer is None or self._member is None:
            return
        if not self._member.membership.fetching:
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
        if not self._replacements.allow(clock.now_s()):
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
        if self._consumer is not None and self._member is not None:
            if await self._member.name.is_put_out():
                raise self._member.name.put_out
            await self._member.hand_back()
        await self.stop()
        assert self._assignment is not None, "a client was there to be replaced"
        try:
            await self._join(await self._open_admin(), self._assignment)
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
        held = {} if self._member is None else self._member.holdings.held
        return {partition: holding.next for partition, holding in held.items()}

    def knows(self, topic: str) -> int:
        """How many partitions of a topic the client's own metadata has."""
        if self._consumer is None or self._member is None:
            return 0
        return self._member.membership.knows(topic)

    def lags_seen(self, lags: Mapping[Partition, int | None]) -> None:
        """A look has found all partitions; for shared budgets."""
        if self._assignment is not None:
            self._assignment.seen(lags)

    def broker_answered(self) -> None:
        """A broker has answered."""
        self._clock.broker_answered(clock.now_s())

    # --- commit --------------------------------------------------------------------------------

    async def commit(self, partitions: AbstractSet[Partition]) -> None:
        """Store the progress of held partitions, within `COMMIT_S`.

        Raises `CommitFailed`: "rebalance" where the partitions are in question, which is no
        fault; "topic" where it is not sure that a topic is still the one that was read; else a
        word for why. A commit that was not answered in time may still arrive; the
        one after it then says the same or more.
        """
        started_s = clock.now_s()
        try:
            if self._committing is None:
                raise CommitFailed("rebalance")
            await self._committing.commit(partitions)
        except CommitFailed as failure:
            result = "refused" if failure.reason == "rebalance" else "failed"
            self._observe(Committed(result, clock.now_s() - started_s))  # type: ignore[arg-type]
            raise
        self._observe(Committed("ok", clock.now_s() - started_s))
        self._clock.broker_answered(clock.now_s())

    # --- what it knows -------------------------------------------------------------------------

    async def ends(self) -> dict[Partition, int]:
        """The end of every partition of the input topics now (last stable offset).

        Raises `CannotRun` where no broker says so in time.
        """
        try:
            return await within(self._kafka.request_timeout_s, self._joined[0].offsets.ends())
        except (KafkaError, TimeoutError) as error:
            raise stop_for(error, self._kafka) from error

    def group(self) -> GroupStatus:
        """Membership now: settled, whether brokers answer, what holds intake up."""
        self._tick()
        return GroupStatus(
            settled=self._settled,
            unsettled_s=self._clock.unsettled_s,
            broker_answers=self._clock.answers(clock.now_s()),
            problem=None if self._member is None else self._member.problem,
            look_age_s=self._supervision.look_age_s,
            topic_partitions=self._supervision.partitions,
        )

    @property
    def _settled(self) -> bool:
        return self._consumer is not None and self._member is not None and self._member.settled

    def _tick(self) -> None:
        if self._member is None:
            return
        now_s = clock.now_s()
        if self._consumer is not None:
            self._clock.fetched(self._member.membership.fetched_at_ms(), now_s)
        self._clock.tick(now_s, settled=self._settled)

    async def _ask_whether_anybody_is_there(self) -> None:
        """A member without partitions fetches nothing, and neither does a full window: so a broker
        is asked."""
        assert self._admin is not None
        try:
            await within(ANSWERED_S, self._admin.find_coordinator(self._kafka.group_id))
        except (NodeNotReadyError, RequestTimedOutError, TimeoutError, OSError):
            return
        except KafkaError as error:
            if isinstance(error, NoError) or not error.retriable:
                return
        self._clock.broker_answered(clock.now_s())

    @property
    def _joined(self) -> tuple[Member, Fetching]:
        """The client's parts while it runs; raises `CannotRun` where none does."""
        if self._member is None or self._fetching is None or self._consumer is None:
            raise CannotRun("The source is not running.")
        return self._member, self._fetching

    @property
    def _topics(self) -> tuple[str, ...]:
        return self._settings.topics_read

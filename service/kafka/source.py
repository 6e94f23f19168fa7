"""One member of the consumer group behind the pipeline's `Source`.

A rebalance in the client is eager: it takes everything away, forgets positions, buffers and
pauses, and then gives partitions again. So: `revoked` lets the pipeline finish and commit; the
*restore* then reads what Kafka stores, decides for each partition whether it is the one we had
(kept: same epoch, goes on where it was) or a fresh one (new epoch), seeks, and only then holds
it. Messages come from held partitions alone, so none comes before its restore. Everything that
depends on "is it still ours?" is done without a wait between the question and the act.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.abc import ConsumerRebalanceListener
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import (
    IllegalGenerationError,
    KafkaError,
    NodeNotReadyError,
    NoError,
    OffsetOutOfRangeError,
    RebalanceInProgressError,
    RecordTooLargeError,
    RequestTimedOutError,
    UnknownMemberIdError,
)
from aiokafka.structs import ConsumerRecord

from service.core.errors import CannotRun, CommitFailed
from service.core.events import Committed, Observe, OffsetsMissing, Rebalanced
from service.core.messages import Batch, Message, Partition
from service.core.status import GroupStatus
from service.kafka.connection import (
    client_options,
    is_lasting,
    reach,
    stop_for,
    topic_errors,
    within,
)
from service.kafka.membership import STOP_S, Membership, briefly
from service.kafka.offsets import GroupOffsets
from service.kafka.settling import SettlingClock
from service.kafka.starts import (
    Bounds,
    HeldOut,
    Start,
    Stored,
    all_gone,
    beyond_the_end,
    is_foreign,
    is_new,
    metadata_of,
    where_to_start,
)
from service.pipeline import Assignment
from service.settings import Settings

log = logging.getLogger(__name__)

POLL_WAIT_S = 0.2
"""The longest that a poll waits for its first message."""

COMMIT_S = 5.0
"""One commit, with what of it can be tried again."""

RESTORE_S = 5.0
"""One attempt at a restore; less where the session is short, for no heartbeat goes out in it."""

RESTORE_AGAIN_S = 1.0
"""Between two attempts at a restore that failed."""

LOOK_AGAIN_S = 10.0
"""Between two looks at partitions that are held out until a person has done something."""

FAILING_S = 60.0
"""A client that only raises for this long is given up: a new process gets a new one."""

ANSWER_S = 5.0
"""Silence of all brokers after which one is asked whether it is there."""

POLL_RECORDS_MAX = 500
FETCH_MAX_BYTES = 16 * 1024 * 1024
FETCH_PARTITION_MAX_BYTES = 1024 * 1024
"""One fetch, and each partition's part of it; so much is buffered for each partition besides. A
larger message still comes, alone: brokers always return at least one."""

FETCH_WAIT_MS = 500
MAX_POLL_INTERVAL_MS = 300_000
"""Without a poll for this long the client leaves the group, so that others get its partitions."""

NOWHERE = TopicPartition("", -1)
"""No partition: `getmany()` without one would mean all. So it counts as a poll, takes nothing
and leaves the buffers alone; a pause would throw away what is prefetched and ends unnoticed at
each rebalance."""


@dataclass(slots=True)
class _Holding:
    """One partition that is ours: `next` is the offset behind what poll has returned."""

    epoch: int
    next: int
    stored: Stored | None  # what Kafka is known to hold
    attempted: set[Stored] = field(default_factory=set)  # sent, and not known to have arrived

    def wrote(self, stored: Stored | None) -> bool:
        """Whether Kafka holds what this process left there."""
        return stored == self.stored or stored in self.attempted


@dataclass(frozen=True, slots=True)
class _Held:
    """What was held, and as whom: the only member and generation that it can follow from."""

    holdings: Mapping[Partition, _Holding]
    member_id: str
    generation: int


@dataclass(frozen=True, slots=True)
class _Given:
    """Partitions that the group has given us and that are not restored."""

    partitions: frozenset[Partition]
    member_id: str
    generation: int


class KafkaSource:
    """The input topics, as one member of the group reads them; for one event loop.

    `start`, then `poll` and `commit`, then `stop`. `observe` hears of rebalances, commits and
    missing offsets.
    """

    def __init__(self, settings: Settings, observe: Observe) -> None:
        self._settings, self._kafka, self._observe = settings, settings.kafka, observe
        self._nonce = secrets.token_hex(8)
        self._epochs = itertools.count(1)
        self._turns = itertools.count()  # which partition a poll begins with
        # Its state is in class attributes: a subclass each, or consumers in a process mix it up.
        self._assignor: Any = type("SluiceAssignor", (StickyPartitionAssignor,), {})
        self._consumer: AIOKafkaConsumer | None = None
        self._admin: AIOKafkaAdminClient | None = None
        self._assignment: Assignment | None = None
        self._held: dict[Partition, _Holding] = {}
        self._held_as = ("", -1)
        self._before: _Held | None = None  # what a rebalance has taken away
        self._given: _Given | None = None
        self._restored = asyncio.Event()
        self._restoring: _Given | None = None
        self._restore_at_s = self._mend_at_s = 0.0
        self._revoked_at_s: float | None = None
        self._began: int | None = None  # the generation in which the group was found new
        self._known = False  # this process has seen offsets of the group
        self._problems: dict[Partition, str] = {}
        self._broken: set[Partition] = set()  # positions outside the log
        self._restore_problem: str | None = None
        self._failing_since_s: float | None = None
        self._fatal: BaseException | None = None
        self._stopping = False
        self._clock = SettlingClock()

    # --- start and stop ------------------------------------------------------------------------

    async def start(self, assignment: Assignment) -> None:
        """Connect, check the topics, ask to join; does not wait for an assignment.

        Raises `CannotRun` with a sentence, within seconds where no broker answers.
        """
        self._assignment = assignment
        await reach(self._kafka)
        options = client_options(self._kafka)
        try:
            self._admin = AIOKafkaAdminClient(**options)
            await within(self._kafka.request_timeout_s, self._admin.start())
            await within(self._kafka.request_timeout_s, self._check_topics(self._admin))
            self._consumer = AIOKafkaConsumer(**options, **self._consumer_options())
            await within(self._kafka.request_timeout_s, self._consumer.start())
            self._offsets = GroupOffsets(
                self._admin, self._consumer, self._topics, self._kafka.group_id
            )
        except (KafkaError, OSError, TimeoutError) as error:
            await self.stop()
            raise stop_for(error, self._kafka) from error
        except BaseException:
            await self.stop()
            raise
        self._clock.heard(_now_s())
        self._consumer.subscribe(list(self._topics), listener=_Listener(self))

    async def stop(self) -> None:
        """Leave the group and close, within `STOP_S` and a little; a second call does nothing."""
        self._stopping = True
        self._held, self._given = {}, None
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await Membership(consumer).leave()
        admin, self._admin = self._admin, None
        if admin is not None:
            await briefly(admin.close, STOP_S)

    async def _check_topics(self, admin: AIOKafkaAdminClient) -> None:
        for topic, error in (await topic_errors(admin, list(self._topics))).items():
            # A topic between two leaders is there all the same.
            if is_lasting(error()):
                raise stop_for(error(), self._kafka, topic)
        try:
            # Needs a permission on the group; that there is no coordinator yet is no matter.
            await admin.find_coordinator(self._kafka.group_id)
        except KafkaError as error:
            if is_lasting(error):
                raise

    def _consumer_options(self) -> dict[str, object]:
        session_ms = int(self._kafka.session_timeout_s * 1000)
        # A member may wait for its calls and then commit before it joins again.
        drain_s = self._settings.delivery.rebalance_drain_s + 2 * COMMIT_S
        return {
            "group_id": self._kafka.group_id,
            "group_instance_id": None,
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
        self._raise_what_ended()
        self._tick()
        await self._see_to_the_rest()
        if self._membership.reassigning or not self._restored.is_set():
            await self._wait_for_the_restore(limit)
            return Batch()
        open_ = [each for each in self._held if each not in closed and each not in self._broken]
        messages = await self._take(open_, limit)
        self._failing_since_s = None if messages else self._failing_since_s
        # No wait from here on: positions belong to these messages.
        return Batch(tuple(messages), self._positions(), self._ends())

    async def _take(self, open_: list[Partition], limit: int) -> list[Message]:
        if not open_ or limit == 0:
            await self._get([NOWHERE], 0.0 if limit == 0 else POLL_WAIT_S, 1)
            return []
        share = -(-min(limit, POLL_RECORDS_MAX) // len(open_))
        first = next(self._turns) % len(open_)
        messages: list[Message] = []
        for partition in open_[first:] + open_[:first]:
            wanted = min(share, limit - len(messages))
            if wanted and not self._membership.reassigning:
                # Does not wait, so that nothing is held here while something else could fail.
                messages += await self._get([TopicPartition(*partition)], 0.0, wanted)
        if messages:
            return messages
        wanted_from = [TopicPartition(*partition) for partition in open_]
        return await self._get(wanted_from, POLL_WAIT_S, min(share, limit))

    async def _get(
        self, partitions: list[TopicPartition], wait_s: float, limit: int
    ) -> list[Message]:
        """`getmany` with a bound and with its errors told apart; a failed one skips nothing."""
        assert self._consumer is not None
        try:
            # The limit is for a rebalance, during which getmany ignores its own. It raises in
            # this task, where getmany waits: never between its taking messages and returning
            # them. (wait_for would run it in another task, which can end while we are cancelled.)
            async with asyncio.timeout(wait_s + 1.0):
                found = await self._consumer.getmany(
                    *partitions, timeout_ms=int(wait_s * 1000), max_records=limit
                )
        except TimeoutError:
            return []
        except (KafkaError, UnicodeDecodeError) as error:
            self._rewind(partitions)
            await self._trouble(error)
            return []
        return [message for records in found.values() for message in self._messages(records)]

    def _messages(self, records: list[ConsumerRecord]) -> list[Message]:
        partition = Partition(records[0].topic, records[0].partition)
        holding = self._held.get(partition)
        if holding is None:  # fetched before its restore, which seeks
            return []
        holding.next = records[-1].offset + 1
        return [
            Message(
                partition=partition,
                offset=record.offset,
                epoch=holding.epoch,
                key=record.key,
                value=record.value,
                headers=tuple(record.headers),
                timestamp_ms=record.timestamp,
            )
            for record in records
        ]

    def _rewind(self, partitions: Iterable[TopicPartition]) -> None:
        """Back to behind what was returned: an error may have come after messages were taken."""
        assert self._consumer is not None
        for partition in partitions:
            holding = self._held.get(Partition(*partition))
            if holding is not None and not self._membership.reassigning:
                self._consumer.seek(partition, holding.next)

    async def _trouble(self, error: Exception) -> None:
        """What to do about an error of `getmany`; a short wait, lest it comes without a pause."""
        if isinstance(error, OffsetOutOfRangeError):
            self._broken |= {Partition(*each) for each in error.args[0]} & self._held.keys()
            return
        if isinstance(error, RecordTooLargeError | UnicodeDecodeError):
            raise CannotRun(
                f"Kafka's client cannot read a message of {', '.join(self._topics)} "
                f"({type(error).__name__}): look at the next offsets of the group "
                f"{self._kafka.group_id}."
            ) from error
        if is_lasting(error):
            raise stop_for(error, self._kafka) from error
        now_s = _now_s()
        self._failing_since_s = self._failing_since_s or now_s
        log.warning("fetching failed: %s", type(error).__name__)
        if now_s - self._failing_since_s > FAILING_S:
            raise CannotRun(
                f"Kafka's client has failed for {FAILING_S:.0f} s ({type(error).__name__}): the "
                "process ends, so that the next one gets a new client."
            ) from error
        await asyncio.sleep(POLL_WAIT_S)

    def _positions(self) -> dict[Partition, int]:
        """Behind the messages returned, and behind markers and aborted messages after them."""
        for partition, holding in self._held.items():
            position = self._membership.position(partition)
            if position is not None and partition not in self._broken:
                holding.next = position
        return {partition: holding.next for partition, holding in self._held.items()}

    def _ends(self) -> dict[Partition, int]:
        ends = {partition: self._membership.end(partition) for partition in self._held}
        return {partition: end for partition, end in ends.items() if end is not None}

    async def _wait_for_the_restore(self, limit: int) -> None:
        with self._membership.polling():
            try:
                await within(POLL_WAIT_S if limit else 0.0, self._restored.wait())
            except TimeoutError:
                return

    async def _see_to_the_rest(self) -> None:
        """A restore that failed, a position outside the log, brokers that are silent."""
        now_s = _now_s()
        if self._given is not None and now_s >= self._restore_at_s:
            await self._restore()
        if self._broken and now_s >= self._mend_at_s:
            await self._mend_positions()
        if now_s - self._clock.heard_at_s > ANSWER_S:
            await self._ask_whether_anybody_is_there()

    def _raise_what_ended(self) -> None:
        if self._consumer is None or self._stopping:
            raise CannotRun("The source is stopped.")
        if self._fatal is not None:
            raise self._fatal
        if not self._membership.fetching:
            raise CannotRun(
                "Kafka's client has stopped fetching: the process ends, so that the next one gets "
                "a new client."
            )

    # --- commit --------------------------------------------------------------------------------

    async def commit(self, offsets: Mapping[Partition, int]) -> None:
        """Store next offsets of held partitions, within `COMMIT_S`.

        Raises `CommitFailed`: "rebalance" where the partitions are in question, which is no
        fault; else a word for why. A commit that was not answered in time may still arrive; the
        one after it then says the same or more.
        """
        started_s = _now_s()
        try:
            await self._commit(offsets)
        except CommitFailed as failure:
            result = "refused" if failure.reason == "rebalance" else "failed"
            self._observe(Committed(result, _now_s() - started_s))  # type: ignore[arg-type]
            raise
        self._observe(Committed("ok", _now_s() - started_s))
        self._clock.heard(_now_s())

    async def _commit(self, offsets: Mapping[Partition, int]) -> None:
        holdings = self._holdings_of(offsets)
        metadata = metadata_of(self._nonce, self._began)
        wanted = {each: Stored(offset, metadata) for each, offset in offsets.items()}
        for partition, holding in holdings.items():
            holding.attempted.add(wanted[partition])
        try:
            await within(COMMIT_S, self._commit_while_held(wanted, holdings))
        except TimeoutError as error:
            raise CommitFailed("timeout") from error
        except KafkaError as error:
            raise _commit_failed(error) from error
        for partition, holding in holdings.items():
            holding.stored = wanted[partition]
            holding.attempted.clear()

    async def _commit_while_held(
        self, wanted: Mapping[Partition, Stored], holdings: Mapping[Partition, _Holding]
    ) -> None:
        while True:
            await self._membership.find_coordinator()
            # Whoever has the partition now has it under another holding.
            if holdings != self._holdings_of(wanted):
                raise CommitFailed("rebalance")
            try:
                await self._membership.commit_once(wanted)
            except KafkaError as error:
                if not error.retriable:
                    raise
                await asyncio.sleep(0.1)
            else:
                return

    def _holdings_of(self, partitions: Iterable[Partition]) -> dict[Partition, _Holding]:
        wanted = set(partitions)
        if self._consumer is None or not wanted <= self._held.keys():
            raise CommitFailed("rebalance")
        return {partition: self._held[partition] for partition in wanted}

    # --- rebalance -----------------------------------------------------------------------------

    async def on_revoked(self) -> None:
        """All partitions are in question: the pipeline finishes and commits, then we let go."""
        if self._revoked_at_s is None:
            self._revoked_at_s = _now_s()
        self._given = None
        self._restored.clear()
        if self._stopping:
            return
        try:
            if self._held and self._assignment is not None:
                await self._assignment.revoked()
                self._before = _Held(self._held, *self._held_as)
        finally:
            self._held = {}

    async def on_assigned(self, partitions: AbstractSet[TopicPartition]) -> None:
        """These are given: restored at once if that is quick, else by the next polls."""
        if self._stopping or self._consumer is None:
            return
        membership = self._membership
        self._held = {}
        self._problems, self._broken = {}, set()
        self._consumer.pause(*partitions)  # until it is known from where to fetch
        self._assignor.on_generation_assignment(membership.generation)
        given = frozenset(Partition(*each) for each in partitions)
        self._given = _Given(given, membership.member_id, membership.generation)
        await self._restore()

    def fail(self, error: BaseException) -> None:
        """Something unforeseen in a callback, where the client only logs it: poll raises it."""
        self._fatal = error

    async def _restore(self) -> None:
        """One attempt at what is given; leaves it given where it fails or a person must act."""
        given = self._given
        if given is None or given is self._restoring:
            return
        self._restoring = given
        try:
            limit_s = min(RESTORE_S, self._kafka.session_timeout_s / 2)
            await within(limit_s, self._restore_all(given))
        except (KafkaError, TimeoutError) as error:
            if self._given is given:
                self._restore_failed(error)
        finally:
            if self._restoring is given:
                self._restoring = None

    def _restore_failed(self, error: Exception) -> None:
        log.warning("the group's offsets cannot be read: %s", type(error).__name__)
        self._restore_at_s = _now_s() + RESTORE_AGAIN_S
        if is_lasting(error):
            self._fatal = stop_for(error, self._kafka)
        self._restore_problem = (
            f"The offsets of the group {self._kafka.group_id} cannot be read "
            f"({type(error).__name__}); it is tried again."
        )

    async def _restore_all(self, given: _Given) -> None:
        stored = await self._offsets.stored()
        bounds = await self._offsets.bounds(given.partitions)
        kept = self._kept(given, stored)
        fresh = given.partitions - kept.keys() - self._held.keys()
        began = given.generation if is_new(stored, given.generation) else None
        chosen: Mapping[Partition, int] = {}
        if began is not None:
            start = self._settings.input.start
            chosen = await self._offsets.chosen(start, {each: bounds[each] for each in fresh})
        starts = self._starts(fresh, stored, bounds, chosen)
        pins = {
            partition: Stored(start.offset, metadata_of(self._nonce, began))
            for partition, start in starts.items()
            if isinstance(start, Start) and start.pin
        }
        if pins and self._given is given:
            await self._membership.commit_once(pins)
        # No wait from here on: if it is still the same assignment, it becomes the one we hold.
        if self._given is given and not self._membership.reassigning:
            self._began = began
            self._hold(given, kept, starts, {**stored, **pins}, bounds)

    def _kept(
        self, given: _Given, stored: Mapping[Partition, Stored | None]
    ) -> dict[Partition, _Holding]:
        """Partitions that nobody can have had in between."""
        before = self._before
        if before is None or not before.member_id:
            return {}
        if (before.member_id, before.generation + 1) != (given.member_id, given.generation):
            return {}
        return {
            partition: holding
            for partition, holding in before.holdings.items()
            if partition in given.partitions and holding.wrote(stored[partition])
        }

    def _starts(
        self,
        fresh: AbstractSet[Partition],
        stored: Mapping[Partition, Stored | None],
        bounds: Mapping[Partition, Bounds],
        chosen: Mapping[Partition, int],
    ) -> dict[Partition, Start | HeldOut]:
        if self._known and not any(stored.values()):
            return {each: HeldOut(all_gone(self._topics, self._kafka.group_id)) for each in fresh}
        for partition in fresh:
            found = stored[partition]
            if found is not None and found.metadata and is_foreign(found):
                log.info("the metadata stored for %s is not ours: its offset counts", partition)
        return {
            each: where_to_start(each, stored[each], bounds[each], chosen.get(each))
            for each in fresh
        }

    def _hold(
        self,
        given: _Given,
        kept: Mapping[Partition, _Holding],
        starts: Mapping[Partition, Start | HeldOut],
        stored: Mapping[Partition, Stored | None],
        bounds: Mapping[Partition, Bounds],
    ) -> None:
        """Seek, open, tell the pipeline; all at once."""
        held = dict(self._held)
        problems = {}
        for partition, holding in kept.items():
            self._known = True
            holding.stored = stored[partition]
            holding.attempted.clear()
            self._open(partition, holding, bounds[partition])
            held[partition] = holding
        for partition, start in starts.items():
            if isinstance(start, HeldOut):
                problems[partition] = start.problem
                continue
            holding = _Holding(next(self._epochs), start.offset, stored[partition])
            self._open(partition, holding, bounds[partition])
            held[partition] = holding
        self._known = self._known or any(stored.values())
        self._now_held(given, held, problems, kept=len(kept))

    def _open(self, partition: Partition, holding: _Holding, bounds: Bounds) -> None:
        """Fetch from behind what was returned, or from the log's start where that is gone."""
        assert self._consumer is not None
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

    def _now_held(
        self,
        given: _Given,
        held: dict[Partition, _Holding],
        problems: dict[Partition, str],
        kept: int,
    ) -> None:
        assert self._assignment is not None, "started"
        first, self._restore_problem = not self._restored.is_set(), None
        if problems != self._problems:
            for problem in set(problems.values()):
                log.error("%s", problem)
        self._problems, self._held, self._before = problems, held, None
        self._held_as = given.member_id, given.generation
        self._restore_at_s = _now_s() + LOOK_AGAIN_S
        self._given = given if problems else None
        self._restored.set()
        self._clock.heard(_now_s())
        self._assignment.assigned({each: holding.epoch for each, holding in held.items()})
        if first:
            self._tell_of_the_rebalance(len(given.partitions), kept)

    def _tell_of_the_rebalance(self, assigned: int, kept: int) -> None:
        took_s = 0.0 if self._revoked_at_s is None else _now_s() - self._revoked_at_s
        self._revoked_at_s = None
        log.info("assigned %d partitions, %d of them kept, in %.2f s", assigned, kept, took_s)
        self._observe(Rebalanced(assigned, kept, took_s))

    async def _mend_positions(self) -> None:
        """Positions outside the log: behind its start go on there, beyond its end wait."""
        self._mend_at_s = _now_s() + RESTORE_AGAIN_S
        try:
            bounds = await within(RESTORE_S, self._offsets.bounds(frozenset(self._broken)))
        except (KafkaError, TimeoutError) as error:
            log.warning("the log's bounds cannot be read: %s", type(error).__name__)
            return
        for partition in self._broken & self._held.keys() & bounds.keys():
            holding, found = self._held[partition], bounds[partition]
            if holding.next > found.end:
                self._problems[partition] = beyond_the_end(partition, holding.next, found.end)
                continue
            # Its messages in the window stay: they are gone from the log.
            self._open(partition, holding, found)
            self._broken.discard(partition)
            self._problems.pop(partition, None)

    async def ends(self) -> dict[Partition, int]:
        """The end of every partition of the input topics now (last stable offset).

        Raises `CannotRun` where no broker says so in time.
        """
        try:
            return await within(self._kafka.request_timeout_s, self._offsets.ends())
        except (KafkaError, TimeoutError) as error:
            raise stop_for(error, self._kafka) from error

    # --- what it says of itself ----------------------------------------------------------------

    def group(self) -> GroupStatus:
        """Membership now: settled, whether brokers answer, what holds intake up."""
        self._tick()
        return GroupStatus(
            settled=self._settled,
            unsettled_s=self._clock.unsettled_s,
            broker_answers=self._clock.answers(_now_s()),
            problem=next(iter(self._problems.values()), self._restore_problem),
        )

    @property
    def _settled(self) -> bool:
        if self._consumer is None:
            return False
        return self._restored.is_set() and not self._membership.reassigning

    def _tick(self) -> None:
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
    def _membership(self) -> Membership:
        assert self._consumer is not None
        return Membership(self._consumer)

    @property
    def _topics(self) -> tuple[str, ...]:
        return self._settings.input.topics


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    """The client calls it during a rebalance, and only logs what it raises."""

    def __init__(self, source: KafkaSource) -> None:
        self._source = source

    async def on_partitions_revoked(self, revoked: AbstractSet[TopicPartition]) -> None:
        try:
            await self._source.on_revoked()
        except Exception as error:  # boundary: told to poll, which raises it
            self._source.fail(error)
            raise

    async def on_partitions_assigned(self, assigned: AbstractSet[TopicPartition]) -> None:
        try:
            await self._source.on_assigned(assigned)
        except Exception as error:  # boundary: told to poll, which raises it
            self._source.fail(error)
            raise


def _commit_failed(error: KafkaError) -> CommitFailed:
    if isinstance(error, UnknownMemberIdError | IllegalGenerationError | RebalanceInProgressError):
        return CommitFailed("rebalance")
    return CommitFailed(type(error).__name__)


def _now_s() -> float:
    return asyncio.get_running_loop().time()

"""What the group has given this member, from the revoke to the first message after it.

A rebalance in the client is eager: it takes everything away, forgets positions, buffers and
pauses, and then gives partitions again. So: the revoke lets the pipeline finish and commit; the
*restore* then reads what Kafka stores, decides for each partition whether it is the one we had
(kept: same epoch, goes on where it was) or a fresh one (new epoch), seeks, and only then holds
it. Whatever depends on "is it still ours?" is done without a wait between question and act.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.abc import ConsumerRebalanceListener
from aiokafka.errors import KafkaError, StaleMetadata, UnknownTopicOrPartitionError

from service.core.errors import CannotRun, CommitFailed, PublishFailed
from service.core.events import ForeignMetadata, Observe, OffsetsMissing, Rebalanced
from service.core.messages import Partition
from service.core.offsets import Given, Progress
from service.kafka.connection import is_lasting, stop_for, within
from service.kafka.membership import Membership
from service.kafka.offsets import GroupOffsets
from service.kafka.starts import (
    NO_OTHERS,
    Bounds,
    HeldOut,
    Mark,
    Others,
    Stored,
    all_gone,
    beyond_the_end,
    is_new,
    others_to_keep,
    read,
    taken_over,
    to_store,
    where_to_start,
)
from service.kafka.transactions import Transactions
from service.pipeline import Assignment
from service.settings import Settings

log = logging.getLogger(__name__)

RESTORE_S = 5.0
"""One attempt at a restore; less where the session is short, for no heartbeat goes out in it."""

RESTORE_AGAIN_S = 1.0
"""Between two attempts at a restore that failed, or at a position that cannot be read from."""

FENCED_AGAIN_S = 3.0
"""From the fence of a partition to its restore: longer than a member that has lost it takes to
hear so by a heartbeat."""

ATTEMPTS_MAX = 100
"""Commits without an answer that are remembered: minutes, after which none is under way."""

LOOK_AGAIN_S = 10.0
"""Between two looks at partitions that are held out until a person has done something."""


@dataclass(slots=True, eq=False)
class Holding:
    """One partition that is ours: `next` is the offset behind what poll has returned."""

    given: Given
    next: int
    stored: Stored  # what Kafka is known to hold
    others: Others = NO_OTHERS  # what a newer version has stored besides
    attempted: dict[Stored, Progress] = field(default_factory=dict)  # may have arrived

    def attempt(self, stored: Stored, progress: Progress) -> None:
        """It is about to be sent; of many that were not answered only the last can still come."""
        self.attempted[stored] = progress
        if len(self.attempted) > ATTEMPTS_MAX:
            del self.attempted[next(iter(self.attempted))]

    def wrote(self, stored: Stored | None) -> bool:
        """Whether Kafka holds what this process left there."""
        return stored == self.stored or stored in self.attempted


@dataclass(frozen=True, slots=True)
class _Held:
    """What was held, and as whom: the only member and generation that it can follow from."""

    holdings: Mapping[Partition, Holding]
    member_id: str
    generation: int


@dataclass(frozen=True, slots=True)
class _Given:
    """Partitions that the group has given us and that are not restored."""

    partitions: frozenset[Partition]
    member_id: str
    generation: int
    fenced: set[Partition] = field(default_factory=set)


@dataclass(frozen=True, slots=True, eq=False)
class _Marking:
    """A mark of the restore that goes into a transaction, and what Kafka held before it."""

    known: Stored | None
    mark: Stored


class Holdings:
    """The partitions of one member of the group, and how it came to them.

    `held` changes only here. `restored` is set while what is held is known to be ours. `fatal` is
    what ends the process: the client only logs what its callbacks raise.
    """

    def __init__(
        self,
        settings: Settings,
        consumer: AIOKafkaConsumer,
        offsets: GroupOffsets,
        assignment: Assignment,
        observe: Observe,
        assignor: Any,
        transactions: Transactions | None = None,
    ) -> None:
        self._settings, self._kafka, self._observe = settings, settings.kafka, observe
        self._consumer, self._offsets, self._assignment = consumer, offsets, assignment
        self._membership = Membership(consumer)
        self._assignor, self._transactions = assignor, transactions
        self._nonce = secrets.token_hex(8)
        self._epochs = itertools.count(1)
        self.held: dict[Partition, Holding] = {}
        self.restored = asyncio.Event()
        self.fatal: BaseException | None = None
        self._held_as = ("", -1)
        self._before: _Held | None = None  # what a rebalance has taken away
        self._given: _Given | None = None
        self._marking: dict[Partition, _Marking] = {}
        self._restoring: _Given | None = None
        self._restore_at_s = self._mend_at_s = 0.0
        self._revoked_at_s: float | None = None
        self._began: int | None = None  # the generation in which the group was found new
        self._topic_ids: Mapping[str, str] = {}  # as of the last restore
        self._known = False  # this process has seen offsets of the group
        self._held_out: dict[Partition, str] = {}  # given, but only a person knows from where
        self._broken: dict[Partition, str] = {}  # held, but cannot be read from where they stand
        self._unread = ""  # why the restore failed
        self._closed = False
        self.doubtful: Callable[[], AbstractSet[str]] = frozenset
        """Topics that may be others by now: nothing is stored for them."""

    @property
    def readable(self) -> list[Partition]:
        """Held, and standing where there is something to read."""
        return [partition for partition in self.held if partition not in self._broken]

    def takes(self, partition: Partition) -> bool:
        """Whether outcomes of it may be published: not before its restore has ended."""
        return partition in self.held

    def known(self, partition: Partition) -> Stored | None:
        """What Kafka held when it was last known; None where the partition is not ours."""
        if (marking := self._marking.get(partition)) is not None:
            return marking.known
        holding = self.held.get(partition)
        return None if holding is None else holding.stored

    def fenced(self, partition: Partition) -> None:
        """Somebody has taken its producer's place. Either the group has given the partition to
        him, and tells us in a moment, or it is still ours and is restored anew."""
        held = self.held.pop(partition, None)
        if held is None or not self.restored.is_set():
            return  # in a rebalance it is the next assignment that says; who fences back, duels
        if self._given is None:
            everything = frozenset((*self.held, *self._held_out, partition))
            self._given = _Given(everything, *self._held_as)
        self._given.fenced.discard(partition)
        self._restore_at_s = _now_s() + FENCED_AGAIN_S

    async def read_back(self, partition: Partition) -> Stored | None:
        """What Kafka holds of it; raises `KafkaError`."""
        return (await self._offsets.stored_of({partition}))[partition]

    def to_store(
        self, partition: Partition, finishing: frozenset[int] = frozenset()
    ) -> Stored | None:
        """What Kafka is to hold once `finishing` has finished too; counted as tried from now on.

        None where the partition is not ours, or its topic may be another by now. While it is
        restored: the mark.
        """
        if partition.topic in self.doubtful():
            return None
        if (marking := self._marking.get(partition)) is not None:
            assert not finishing, "an outcome is published before the restore has ended"
            return marking.mark
        holding = self.held.get(partition)
        progress = self._assignment.progress(partition, finishing)
        if holding is None or progress is None:
            return None
        stored = to_store(progress, self._mark_of(partition.topic, holding.others))
        holding.attempt(stored, progress)
        return stored

    def stored(self, partition: Partition, stored: Stored) -> None:
        """Kafka holds it now; of a partition that is held by now under another epoch, nothing."""
        before = {} if self._before is None else self._before.holdings
        holding = self.held.get(partition) or before.get(partition)
        if holding is None or (progress := holding.attempted.get(stored)) is None:
            return
        holding.stored = stored
        holding.attempted.clear()
        self._assignment.stored(partition, progress)

    def _mark_of(self, topic: str, others: Others) -> Mark:
        return Mark(self._nonce, self._began, self._topic_ids.get(topic), others)

    def follow(self, before: Holdings) -> None:
        """Another client of the same process: epochs go on, what is known of the group stays."""
        self._nonce, self._epochs, self._known = before._nonce, before._epochs, before._known
        self._revoked_at_s = before._revoked_at_s

    def close(self) -> None:
        """Hold nothing any more; what the client still calls does nothing."""
        self._closed = True
        self.held, self._given = {}, None
        self.restored.clear()

    async def hand_back(self) -> None:
        """As at a revoke, and then for good: the pipeline finishes and commits, we let go."""
        held, self._closed, self._given = self.restored.is_set(), True, None
        if self._revoked_at_s is None:
            self._revoked_at_s = _now_s()
        try:
            if held:
                await self._assignment.revoked()
        finally:
            self.close()

    @property
    def problem(self) -> str | None:
        """A sentence about what is not read, and what to do."""
        sentences = (*self._held_out.values(), *self._broken.values(), self._unread)
        return next(filter(None, sentences), None)

    def broken(self, partition: Partition, problem: str = "") -> None:
        """It cannot be read from where it stands; looked at again in a moment."""
        if partition in self.held:
            if problem and self._broken.get(partition) != problem:
                log.error("%s", problem)
            self._broken[partition] = problem

    async def see_to_the_rest(self) -> None:
        """A restore that failed, a position outside the log: tried again when it is time."""
        now_s = _now_s()
        if self._given is not None and now_s >= self._restore_at_s:
            await self._restore()
        if self._broken and now_s >= self._mend_at_s:
            await self._mend_positions()

    # --- what the client calls -------------------------------------------------------------------

    async def on_revoked(self) -> None:
        """All partitions are in question: the pipeline finishes and commits, then we let go."""
        if self._revoked_at_s is None:
            self._revoked_at_s = _now_s()
        self._given = None
        self.restored.clear()
        if self._closed:
            self.held = {}  # what is committed from here on could be in another's generation
            return
        try:
            if self._transactions is not None:
                self._transactions.hurry(on=True)
            if self.held:
                await self._assignment.revoked()
                self._before = _Held(self.held, *self._held_as)
        finally:
            self.held = {}

    async def on_assigned(self, partitions: AbstractSet[TopicPartition]) -> None:
        """These are given: restored at once if that is quick, else by the next polls."""
        if self._closed:
            return
        membership = self._membership
        self.held = {}
        self._held_out, self._broken = {}, {}
        self._consumer.pause(*partitions)  # until it is known from where to fetch
        # The client forgets to tell it, and then an old claim counts as much as a new one.
        self._assignor.on_generation_assignment(membership.generation)
        given = frozenset(Partition(*each) for each in partitions)
        self._given = _Given(given, membership.member_id, membership.generation)
        await self._restore()

    def fail(self, error: BaseException) -> None:
        """Something unforeseen in a callback, where the client only logs it: poll raises it."""
        self.fatal = error

    # --- the restore -----------------------------------------------------------------------------

    async def _restore(self) -> None:
        """One attempt at what is given; leaves it given where it fails or a person must act."""
        given = self._given
        if given is None or given is self._restoring:
            return
        self._restoring = given
        try:
            limit_s = min(RESTORE_S, self._kafka.session_timeout_s / 2)
            await within(limit_s, self._restore_all(given))
        except (KafkaError, TimeoutError, PublishFailed, CommitFailed) as error:
            if self._given is given:
                self._restore_failed(error)
        except CannotRun as error:
            self.fatal = error
        finally:
            if self._restoring is given:
                self._restoring = None

    def _restore_failed(self, error: Exception) -> None:
        log.warning("the group's offsets cannot be read: %s", type(error).__name__)
        self._restore_at_s = _now_s() + RESTORE_AGAIN_S
        # A topic may be unknown to one broker for a moment; the supervision knows for how long.
        if is_lasting(error) and not isinstance(error, UnknownTopicOrPartitionError):
            self.fatal = stop_for(error, self._kafka)
        self._unread = (
            f"The offsets of the group {self._kafka.group_id} cannot be read "
            f"({type(error).__name__}); it is tried again."
        )

    async def _restore_all(self, given: _Given) -> None:
        stored, topic_ids, kept = await self._read(given)
        bounds = await self._offsets.bounds(given.partitions)
        fresh = given.partitions - kept.keys() - self.held.keys()
        began = given.generation if is_new(stored, given.generation) else None
        chosen: Mapping[Partition, int] = {}
        if began is not None:
            start = self._settings.input.start
            chosen = await self._offsets.chosen(start, {each: bounds[each] for each in fresh})
        starts = self._starts(fresh, stored, bounds, chosen, topic_ids)
        taken = {
            partition: self._taken_over(
                start, stored[partition], began, topic_ids.get(partition.topic)
            )
            for partition, start in starts.items()
            if isinstance(start, int)
        }
        if taken and self._given is given:
            await self._mark(given, stored, {each: new.stored for each, new in taken.items()})
        if self._transactions is not None and not all(map(self._transactions.holds, kept)):
            raise PublishFailed("a producer was lost during the restore")
        # No wait from here on: if it is still the same assignment, it becomes the one we hold.
        if self._given is given and not self._membership.reassigning:
            self._began, self._topic_ids = began, topic_ids
            self._known = self._known or any(stored.values()) or bool(kept)
            held_out = {each: at.problem for each, at in starts.items() if isinstance(at, HeldOut)}
            self._hold(given, kept, taken, held_out, bounds)

    async def _mark(
        self,
        given: _Given,
        stored: Mapping[Partition, Stored | None],
        marks: Mapping[Partition, Stored],
    ) -> None:
        """From here on it counts if we die; and a group that starts at `latest` and ends before
        its first commit would start at a later `latest`.

        With transactions it has to be one: a plain commit that arrives late could set back what
        later transactions have stored.
        """
        if self._transactions is None:
            await self._membership.commit_once(marks)
            return
        # Should it fail, nobody knows what Kafka holds: the next attempt begins with a fence.
        given.fenced.difference_update(marks)
        marking = {each: _Marking(stored[each], mark) for each, mark in marks.items()}
        self._marking.update(marking)
        try:
            await self._transactions.commit(marks.keys())
        finally:
            for each, mine in marking.items():
                if self._marking.get(each) is mine:
                    del self._marking[each]
        given.fenced.update(marks)

    async def _read(
        self, given: _Given
    ) -> tuple[dict[Partition, Stored | None], dict[str, str], dict[Partition, Holding]]:
        """What Kafka stores, for which topics, and the partitions that nobody can have had in
        between.

        With transactions, whoever had the others before us may still end one: until he is fenced,
        what is read of them does not count.
        """
        while True:
            stored = await self._offsets.stored()
            if not given.partitions <= stored.keys():
                # The group's leader asked another broker, which knows more partitions already.
                raise StaleMetadata("a partition that is given is not known yet")
            topic_ids = await self._offsets.topic_ids()
            kept = self._kept(given, stored, topic_ids)
            unfenced = given.partitions - kept.keys() - self.held.keys() - given.fenced
            if self._transactions is None or not unfenced:
                return stored, topic_ids, kept
            await self._transactions.fence(unfenced)
            given.fenced.update(unfenced)

    def _taken_over(
        self, offset: int, stored: Stored | None, began: int | None, topic_id: str | None
    ) -> Holding:
        progress = taken_over(offset, stored, self._nonce)
        others = others_to_keep(offset, stored)
        mark = Mark(self._nonce, began, topic_id, others)
        given = Given(next(self._epochs), progress)
        return Holding(given, offset, to_store(progress, mark), others)

    def _kept(
        self,
        given: _Given,
        stored: Mapping[Partition, Stored | None],
        topic_ids: Mapping[str, str],
    ) -> dict[Partition, Holding]:
        """Partitions that nobody can have had in between."""
        before = self._before
        if before is None or not before.member_id:
            return {}
        if (before.member_id, before.generation + 1) != (given.member_id, given.generation):
            return {}
        return {
            partition: holding
            for partition, holding in before.holdings.items()
            if partition in given.partitions
            and holding.wrote(stored[partition])
            and self._is_the_topic_it_was(partition.topic, topic_ids)
            and (self._transactions is None or self._transactions.holds(partition))
        }

    def _is_the_topic_it_was(self, topic: str, now: Mapping[str, str]) -> bool:
        """A commit of ours can be stored for a topic made again: its offset says nothing of it,
        and must not be stored under the new id."""
        before = self._topic_ids.get(topic)
        return before is None or now.get(topic, before) == before

    def _starts(
        self,
        fresh: AbstractSet[Partition],
        stored: Mapping[Partition, Stored | None],
        bounds: Mapping[Partition, Bounds],
        chosen: Mapping[Partition, int],
        topic_ids: Mapping[str, str],
    ) -> dict[Partition, int | HeldOut]:
        if self._known and not any(stored.values()):
            problem = all_gone(self._settings.topics_read, self._kafka.group_id)
            return {each: HeldOut(problem) for each in fresh}
        for partition in fresh:
            found = stored[partition]
            if found is not None and found.metadata and read(found) is None:
                log.warning("the metadata stored for %s is not ours: its offset counts", partition)
                self._observe(ForeignMetadata())
        return {
            each: where_to_start(
                each, stored[each], bounds[each], chosen.get(each), topic_ids.get(each.topic)
            )
            for each in fresh
        }

    def _hold(
        self,
        given: _Given,
        kept: Mapping[Partition, Holding],
        fresh: Mapping[Partition, Holding],
        held_out: dict[Partition, str],
        bounds: Mapping[Partition, Bounds],
    ) -> None:
        """Seek, open, tell the pipeline; all at once."""
        for partition, holding in (*kept.items(), *fresh.items()):
            self._open(partition, holding, bounds[partition])
        self._now_held(given, {**self.held, **kept, **fresh}, held_out, kept=len(kept))

    def _open(self, partition: Partition, holding: Holding, bounds: Bounds) -> None:
        """Fetch from behind what was returned, or from the log's start where that is gone."""
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
        held: dict[Partition, Holding],
        held_out: dict[Partition, str],
        kept: int,
    ) -> None:
        first, self._unread, self._before = not self.restored.is_set(), "", None
        for problem in set(held_out.values()) - set(self._held_out.values()):
            log.error("%s", problem)
        changed = held != self.held
        self.held, self._held_out = held, held_out
        self._held_as = given.member_id, given.generation
        self._restore_at_s = _now_s() + LOOK_AGAIN_S
        self._given = given if held_out else None
        self.restored.set()
        if self._transactions is not None:
            self._transactions.keep_only(held.keys())
            self._transactions.hurry(on=False)
        if first or changed:
            self._assignment.assigned({each: holding.given for each, holding in held.items()})
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
            bounds = await within(RESTORE_S, self._offsets.bounds(self._broken.keys()))
        except (KafkaError, TimeoutError) as error:
            log.warning("the log's bounds cannot be read: %s", type(error).__name__)
            return
        for partition in self._broken.keys() & self.held.keys() & bounds.keys():
            holding, found = self.held[partition], bounds[partition]
            if holding.next > found.end:
                self.broken(partition, beyond_the_end(partition, holding.next, found.end))
                continue
            # What is in the window stays there: it is gone from the log.
            self._open(partition, holding, found)
            del self._broken[partition]


class Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    """The client calls it during a rebalance, and only logs what it raises."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings

    async def on_partitions_revoked(self, revoked: AbstractSet[TopicPartition]) -> None:
        try:
            await self._holdings.on_revoked()
        except Exception as error:  # boundary: told to poll, which raises it
            self._holdings.fail(error)
            raise

    async def on_partitions_assigned(self, assigned: AbstractSet[TopicPartition]) -> None:
        try:
            await self._holdings.on_assigned(assigned)
        except Exception as error:  # boundary: told to poll, which raises it
            self._holdings.fail(error)
            raise


def _now_s() -> float:
    return asyncio.get_running_loop().time()

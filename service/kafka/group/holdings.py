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
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.abc import ConsumerRebalanceListener
from aiokafka.errors import KafkaError, StaleMetadata, UnknownTopicOrPartitionError

from service.core.completed import fits_for_sure
from service.core.errors import CannotRun, CommitFailed, PublishFailed
from service.core.events import ForeignMetadata, Observe, OffsetsMissing, Rebalanced
from service.core.messages import Partition
from service.core.tracker import Given, Progress
from service.core.window import MAP_CHARS_MAX
from service.kafka.client.deadlines import within
from service.kafka.client.instances import NameTaken, in_use, put_out, this_process
from service.kafka.client.meaning import is_lasting, stop_for
from service.kafka.client.private import Membership
from service.kafka.client.stable_offsets import UnstableOffset
from service.kafka.client.stored import (
    NO_OTHERS,
    Mark,
    Others,
    Stored,
    held_out_for_good,
    reached,
    read,
    to_store,
)
from service.kafka.group.group_offsets import GroupOffsets
from service.kafka.group.starts import (
    Bounds,
    HeldOut,
    all_gone,
    is_new,
    leader_epochs,
    log_was_cut,
    others_to_keep,
    started_over,
    starts,
    taken_over,
    without_offsets,
)
from service.kafka.group.trail import Trail
from service.kafka.transactions.transactions import Transactions
from service.ports import Assignment
from service.settings import Settings

log = logging.getLogger(__name__)

RESTORE_S = 5.0
"""One attempt at a restore; less where the session is short, for no heartbeat goes out in it."""

PUT_OUT_TRIES = 5
PUT_OUT_S = 3.0
PUT_OUT_AGAIN_S = 0.5
"""For the question whether another worker has taken our place, before we take his."""

RESTORE_AGAIN_S = 1.0
"""Between two attempts at a restore that failed, or at a position that cannot be read from."""

FENCED_AGAIN_S = 3.0
"""From the fence of a partition to its restore: longer than a member that has lost it takes to
hear so by a heartbeat."""

ATTEMPTS_MAX = 100
"""Commits without an answer that are remembered: minutes, after which none is under way."""

STALE_S = 1.0
"""How long an offset that is older than our last commit is read again. A coordinator answers a
commit before the offset can be read; measured: milliseconds."""

STALE_PAUSE_S = 0.05
"""Between two reads of an offset that is not to be relied on yet."""

LOOK_AGAIN_S = 10.0
"""Between two looks at partitions that are held out until a person has done something."""


@dataclass(slots=True, eq=False)
class Holding:
    """One partition that is ours: `next` is the offset behind what poll has returned."""

    given: Given
    next: int
    stored: Stored  # what Kafka is known to hold
    others: Others = NO_OTHERS  # what a newer version has stored besides
    topic_id: str = ""  # empty where brokers tell none
    attempted: dict[Stored, Progress] = field(default_factory=dict)  # may have arrived
    trail: Trail = field(default_factory=Trail)
    cut_at: int | None = None  # the log ended there, before what was read of it

    def attempt(self, stored: Stored, progress: Progress) -> None:
        """It is about to be sent; of many that were not answered only the last can still come."""
        self.attempted[stored] = progress
        if len(self.attempted) > ATTEMPTS_MAX:
            del self.attempted[next(iter(self.attempted))]

    def cut(self, end: int) -> int:
        """The log ends before what was read of it; where it has ended at the least."""
        self.cut_at = end if self.cut_at is None else min(self.cut_at, end)
        return self.cut_at

    @property
    def traceless(self) -> bool:
        """Whether its log was cut and Kafka does not hold that, for whoever has it next."""
        found = read(self.stored)
        return self.cut_at is not None and (found is None or found[1].cut_at != self.cut_at)

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


class _Overtaken(Exception):
    """What a restore works on has been taken away, or given anew, meanwhile."""


@dataclass(frozen=True, slots=True, eq=False)
class _Marking:
    """A mark of the restore that goes into a transaction, and what Kafka held before it."""

    known: Stored | None
    mark: Stored


class Holdings:
    """The partitions of one member of the group, and how it came to them.

    `held` changes only here. `restored` is set while what is held is known to be ours. `fatal` is
    what ends the process: the client only logs what its callbacks raise.

    Invariant: between an assignment and the next revoke each partition of it is held, or is among
    those that are still to be restored (`_given`), some of which are held out with a sentence.
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
        *,
        start_over: bool = False,
    ) -> None:
        """With `start_over`, what is held out is started over the first time it is given."""
        self._settings, self._kafka, self._observe = settings, settings.kafka, observe
        self._consumer, self._offsets, self._assignment = consumer, offsets, assignment
        self._membership = Membership(consumer)
        self._assignor, self._transactions = assignor, transactions
        self._nonce = secrets.token_hex(8)
        name = self._kafka.group_instance_id
        self._bearer = None if name is None else this_process(name)
        self._joined_as = ("", -1)  # member and generation of the last assignment
        self._epochs = itertools.count(1)
        self.held: dict[Partition, Holding] = {}
        self.assigned: frozenset[Partition] = frozenset()
        """What the group has given us last; empty from the revoke on."""
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
        self._cuts: dict[Partition, int] = {}  # where logs ended; Kafka may not hold the trace
        self._broken: dict[Partition, str] = {}  # held, but cannot be read from where they stand
        self._unread = ""  # why the restore failed
        self._closed = False
        self._letting_go = asyncio.Lock()  # a revoke and a hand-back do not cut each other off
        self._start_over = start_over
        self._had: set[Partition] = set()  # this process has held them: nothing to start over
        self.doubtful: Callable[[], AbstractSet[str]] = frozenset
        """Topics that may be others by now: nothing is stored for them."""

    @property
    def readable(self) -> list[Partition]:
        """Held, and standing where there is something to read."""
        return [partition for partition in self.held if self.may_be_read(partition)]

    def may_be_read(self, partition: Partition) -> bool:
        """Whether what has been fetched of it stands behind what was read before."""
        return partition in self.held and partition not in self._broken

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
            self._given = _Given(self.assigned, *self._held_as)
        self._given.fenced.discard(partition)
        self._restore_at_s = _now_s() + FENCED_AGAIN_S
        self._assert_whole()

    def _assert_whole(self) -> None:
        """No partition of the assignment is forgotten: neither held nor to be restored."""
        given = frozenset() if self._given is None else self._given.partitions
        forgotten = self.assigned - self.held.keys() - given
        assert not forgotten, f"forgotten: {sorted(forgotten)}"

    def doubts(self, partition: Partition) -> bool:
        """Whether its topic may be another by now: nothing is stored until that is known."""
        return partition.topic in self.doubtful()

    async def read_back(self, partition: Partition) -> Stored | None:
        """What Kafka holds of it once no transaction may change it; raises `KafkaError`."""
        return (await self._offsets.stable_of({partition}))[partition]

    def to_store(
        self, partition: Partition, finishing: frozenset[int] = frozenset()
    ) -> Stored | None:
        """What Kafka is to hold once `finishing` has finished too; counted as tried from now on.

        None where the partition is not ours, or its topic may be another by now. While it is
        restored: the mark.
        """
        if self.doubts(partition):
            return None
        if (marking := self._marking.get(partition)) is not None:
            assert not finishing, "an outcome is published before the restore has ended"
            return marking.mark
        holding = self.held.get(partition)
        progress = self._assignment.progress(partition, finishing)
        if holding is None or progress is None:
            return None
        stored = to_store(progress, self._mark_of(partition.topic, holding, progress))
        holding.attempt(stored, progress)
        return stored

    def has_room(self, partition: Partition) -> bool:
        """Whether everything may finish that was taken of it until now, in whatever order."""
        return self._assignment.has_room(partition)

    def fitting(self, partition: Partition, offsets: Sequence[int]) -> int:
        """How many of these, ascending, may finish in one transaction: its map must hold them all.

        What lies below the next offset needs no map. So the message that holds the next offset
        always may, and makes the map shorter: whatever else waits, waits for that at the longest.
        What is not ours (any more) may: the transaction finds out.
        """

        def fit(count: int) -> bool:
            progress = self._assignment.progress(partition, frozenset(offsets[:count]))
            return (
                progress is None
                or offsets[count - 1] < progress.next_offset
                or fits_for_sure(progress.runs, MAP_CHARS_MAX)
            )

        if not offsets or self.has_room(partition) or fit(len(offsets)):
            return len(offsets)
        fits, too_many = int(fit(1)), len(offsets)
        while 0 < fits < too_many - 1:
            tried = (fits + too_many) // 2
            fits, too_many = (tried, too_many) if fit(tried) else (fits, tried)
        return fits

    def stored(self, partition: Partition, stored: Stored) -> None:
        """Kafka holds it now; of a partition that is held by now under another epoch, nothing."""
        before = {} if self._before is None else self._before.holdings
        holding = self.held.get(partition) or before.get(partition)
        if holding is None or (progress := holding.attempted.get(stored)) is None:
            return
        holding.stored = stored
        holding.attempted.clear()
        self._assignment.stored(partition, progress)

    def _mark_of(self, topic: str, holding: Holding, progress: Progress) -> Mark:
        return Mark(
            self._nonce,
            self._began,
            self._topic_ids.get(topic),
            holding.others,
            holding.cut_at,
            self._bearer,
            holding.trail.before(reached(progress)),
        )

    def follow(self, before: Holdings) -> None:
        """Another client of the same process: epochs go on, what is known of the group stays."""
        self._nonce, self._epochs, self._known = before._nonce, before._epochs, before._known
        self._revoked_at_s, self._had = before._revoked_at_s, before._had
        self._cuts = before._cuts

    def close(self) -> None:
        """Hold nothing any more; what the client still calls does nothing."""
        self._closed = True
        self.held, self.assigned, self._given = {}, frozenset(), None
        self.restored.clear()

    async def hand_back(self) -> None:
        """As at a revoke, and then for good: the pipeline finishes and commits, we let go.

        A revoke that is under way comes to its end first, and one that begins meanwhile waits: the
        client that ends would cancel the one, and the other would let the group go on before what
        is finished is committed.
        """
        self._overtake()
        async with self._letting_go:
            held, self._closed = self.restored.is_set(), True
            if self._revoked_at_s is None:
                self._revoked_at_s = _now_s()
            try:
                if self._transactions is not None:
                    self._transactions.hurry(on=True)
                if held:
                    await self._assignment.revoked()
            finally:
                self.close()

    def _overtake(self) -> None:
        """What is being restored is in question: its restore goes no further, and fences nobody;
        a writer in whose transaction a mark is opens no other producer for it."""
        self._given = None
        self._marking.clear()
        if self._transactions is not None:
            self._transactions.stop_fencing()

    @property
    def problem(self) -> str | None:
        """A sentence about what is not read, and what to do."""
        sentences = (
            *self._held_out.values(),
            *self._broken.values(),
            self._unread,
            self._taken_by_another,
            "" if self._transactions is None else self._transactions.problem,
        )
        return next(filter(None, sentences), None)

    @property
    def _taken_by_another(self) -> str:
        """Before the first restore it is the rebalance that is waited for."""
        if self._given is None or not self.restored.is_set():
            return ""
        left = sorted(self._given.partitions - self.held.keys() - self._held_out.keys())
        if not left:
            return ""
        return (
            f"Another producer has taken the place of this worker's for {left[0]}, which the group "
            "has given to this worker: it is taken back in a few seconds, unless the group gives "
            "it to another. Where that repeats, see that no other group uses this kafka.group_id."
        )

    def broken(self, partition: Partition, problem: str = "") -> None:
        """It cannot be read from where it stands; looked at again in a moment."""
        if partition in self.held:
            if problem and self._broken.get(partition) != problem:
                log.error("%s", problem)
            self._broken[partition] = problem

    def fetched(self, partition: Partition, offset: int, batches: bytes) -> None:
        """A fetch has brought these; where another leader has written them it is not read on
        before it is known that the log was not cut in between."""
        holding = self.held.get(partition)
        if holding is None or offset < holding.next:
            return  # of an assignment before
        if holding.trail.fetched(offset, batches):
            self.broken(partition, self._broken.get(partition, ""))

    async def see_to_the_rest(self) -> None:
        """A restore that failed, a position outside the log: tried again when it is time."""
        now_s = _now_s()
        if self._given is not None and now_s >= self._restore_at_s:
            await self._restore()
        if self._broken and now_s >= self._mend_at_s:
            await self._mend_positions()

    # --- what the client calls -------------------------------------------------------------------

    async def on_revoked(self) -> None:
        """All partitions are in question: the pipeline finishes and commits, then we let go.

        Where another worker has taken our place in the group, they are not: nothing is finished
        or committed any more, and the client, which would join again behind this, waits here for
        its end.
        """
        if not self._membership.member_id and await self.is_put_out():
            self.held, self.assigned = {}, frozenset()
            self.restored.clear()
            self.fail(self.put_out)
            await asyncio.Event().wait()
        async with self._letting_go:
            if self._revoked_at_s is None:
                self._revoked_at_s = _now_s()
            self._overtake()
            self.restored.clear()
            if self._closed:
                # What is committed from here on could be in another's generation.
                self.held, self.assigned = {}, frozenset()
                return
            try:
                if self._transactions is not None:
                    self._transactions.hurry(on=True)
                if self.held:
                    await self._assignment.revoked()
                    self._before = _Held(self.held, *self._held_as)
            finally:
                self.held, self.assigned = {}, frozenset()

    @property
    def put_out(self) -> NameTaken:
        """What ends the process where another worker has taken our place."""
        return put_out(str(self._kafka.group_instance_id), self._kafka.group_id)

    async def see_that_the_name_is_free(self) -> None:
        """Raises `NameTaken` where a process of this machine bears our name and reads."""
        own = self._bearer
        if own is None:
            return
        try:
            stored = await within(RESTORE_S, self._offsets.stored())
        except (KafkaError, TimeoutError) as error:
            log.warning("it cannot be read who bears our name: %s", type(error).__name__)
            return
        for each in filter(None, stored.values()):
            by = None if (found := read(each)) is None else found[1].bearer
            if by is not None and by.shares_its_name_with(own) and by.lives_beside(own):
                name = str(self._kafka.group_instance_id)
                raise in_use(name, self._kafka.group_id, by.pid)

    async def is_put_out(self) -> bool:
        """Whether another worker has joined under our name since we did."""
        for _ in range(PUT_OUT_TRIES):
            try:
                return await within(PUT_OUT_S, self._membership.is_put_out(*self._joined_as))
            except (KafkaError, TimeoutError) as error:
                # Without a coordinator nobody joins anything either.
                log.warning("it cannot be asked who has our place: %s", type(error).__name__)
                await asyncio.sleep(PUT_OUT_AGAIN_S)
        return False

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
        given = self.assigned = frozenset(Partition(*each) for each in partitions)
        self._joined_as = membership.member_id, membership.generation
        self._given = _Given(given, *self._joined_as)
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
            await within(self._restore_s, self._restore_all(given))
        except (KafkaError, TimeoutError, PublishFailed, CommitFailed) as error:
            if self._given is given:
                self._restore_failed(error)
        except _Overtaken:
            pass  # the next assignment has its own restore
        except CannotRun as error:
            self.fatal = error
        finally:
            if self._restoring is given:
                self._restoring = None

    @property
    def _restore_s(self) -> float:
        return min(RESTORE_S, self._kafka.session_timeout_s / 2)

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
        stored, topic_ids, kept, fresh = await self._read(given)
        bounds = await self._offsets.bounds(given.partitions)
        began = given.generation if is_new(stored, given.generation) else None
        chosen: Mapping[Partition, int] = {}
        if began is not None:
            chosen = await self._chosen(fresh, bounds)
        epoch_ends = await self._offsets.epoch_ends(leader_epochs(fresh, stored))
        believed = self._with_cuts(stored)
        found = self._starts(fresh, believed, bounds, chosen, topic_ids, epoch_ends)
        held_out = {each: at for each, at in found.items() if isinstance(at, HeldOut)}
        progress = {
            each: taken_over(at, stored[each], self._nonce, self._bearer)
            for each, at in found.items()
            if isinstance(at, int)
        }
        if self._start_over:
            progress |= await self._started_over(held_out, stored, bounds)
        for each, at in held_out.items():
            if at.cut_at is not None:
                self._cuts[each] = at.cut_at
        taken = {
            each: self._taken_over(at, stored[each], began, topic_ids.get(each.topic))
            for each, at in progress.items()
        }
        marks = {each: new.stored for each, new in taken.items()}
        marks |= self._traces(held_out, stored)
        if marks and self._given is given:
            await self._mark(given, stored, marks)
        taken_up = (*kept, *taken)
        if self._transactions is not None and not all(map(self._transactions.holds, taken_up)):
            raise PublishFailed("a producer was lost during the restore")
        # No wait from here on: if it is still the same assignment, it becomes the one we hold.
        if self._given is given and not self._membership.reassigning:
            self._began, self._topic_ids = began, topic_ids
            self._known = self._known or any(stored.values()) or bool(kept)
            self._tell_of_starts(taken, stored, bounds)
            problems = {each: at.problem for each, at in held_out.items()}
            self._hold(given, kept, taken, problems, bounds)

    async def _chosen(
        self, partitions: AbstractSet[Partition], bounds: Mapping[Partition, Bounds]
    ) -> dict[Partition, int]:
        """Where the settings have a new group start."""
        wanted = {each: bounds[each] for each in partitions}
        return await self._offsets.chosen(self._settings.input.start, wanted)

    async def _started_over(
        self,
        held_out: dict[Partition, HeldOut],
        stored: Mapping[Partition, Stored | None],
        bounds: Mapping[Partition, Bounds],
    ) -> dict[Partition, Progress]:
        """Those that a person has said to start over, taken out of what is held out."""
        over = {each: held_out.pop(each) for each in held_out.keys() - self._had}
        chosen = await self._chosen(over.keys(), bounds) if over else {}
        found = {each: started_over(stored[each], at, chosen[each]) for each, at in over.items()}
        for partition, progress in found.items():
            log.warning(
                "%s is started over at %d, as --start-over says (stored was %s)",
                partition,
                progress.next_offset,
                None if (at := stored[partition]) is None else at.offset,
            )
        return {each: replace(progress, unclean_ends=1) for each, progress in found.items()}

    def _with_cuts(
        self, stored: Mapping[Partition, Stored | None]
    ) -> dict[Partition, Stored | None]:
        """What Kafka stores, with the traces of cuts that could not be stored: a producer was
        fenced, a commit was refused, and the log has grown since."""
        return {
            each: at
            if at is None or each not in self._cuts
            else held_out_for_good(at, self._cuts[each], self._nonce)
            for each, at in stored.items()
        }

    def _traces(
        self,
        held_out: Mapping[Partition, HeldOut],
        stored: Mapping[Partition, Stored | None],
    ) -> dict[Partition, Stored]:
        """That logs were cut, where Kafka does not hold it: new messages would make them seem
        whole again."""
        traces = {
            each: held_out_for_good(before, at.cut_at, self._nonce)
            for each, at in held_out.items()
            if at.cut_at is not None and (before := stored[each]) is not None
        }
        return {each: trace for each, trace in traces.items() if trace != stored[each]}

    def _tell_of_starts(
        self,
        taken: Mapping[Partition, Holding],
        stored: Mapping[Partition, Stored | None],
        bounds: Mapping[Partition, Bounds],
    ) -> None:
        """Where no offset says how far the group was: how much is read before the first call."""
        unknown = [each for each in taken if stored[each] is None]
        if not unknown:
            return
        messages = sum(bounds[each].end - taken[each].next for each in unknown)
        new = not any(stored.values())
        whence = str(self._settings.input.start) if new else "the log's start"
        where = f"{len(unknown)} of its partitions"
        say = log.warning if messages > 0 else log.info
        say("%s", without_offsets(self._kafka.group_id, where, whence, max(0, messages)))

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
    ) -> tuple[
        dict[Partition, Stored | None],
        dict[str, str],
        dict[Partition, Holding],
        frozenset[Partition],
    ]:
        """What Kafka stores, for which topics, the partitions that nobody can have had in between,
        and those that start anew.

        With transactions, whoever had the latter before us may still end one: until he is fenced,
        what is read of them does not count. Raises `_Overtaken` once they are in question again:
        then they may be another's, who must not be fenced.
        """
        stale_until_s = _now_s() + min(STALE_S, self._restore_s / 2)
        while True:
            stored = await self._offsets.stored()
            if not given.partitions <= stored.keys():
                # The group's leader asked another broker, which knows more partitions already.
                raise StaleMetadata("a partition that is given is not known yet")
            topic_ids = await self._offsets.topic_ids()
            if self._given is not given or self._membership.reassigning:
                raise _Overtaken
            ours = self._may_be_kept(given, topic_ids)
            if _now_s() < stale_until_s and any(
                self._is_stale(holding, stored[partition]) for partition, holding in ours.items()
            ):
                await asyncio.sleep(STALE_PAUSE_S)
                continue
            kept = {each: ours[each] for each in ours if ours[each].wrote(stored[each])}
            fresh = given.partitions - kept.keys() - self.held.keys()
            unfenced = fresh - given.fenced
            if self._transactions is None:
                return stored, topic_ids, kept, fresh
            if not unfenced:
                return {**stored, **await self._stable(fresh)}, topic_ids, kept, fresh
            await self._transactions.fence(unfenced)
            given.fenced.update(unfenced)

    async def _stable(self, fenced: frozenset[Partition]) -> dict[Partition, Stored | None]:
        """What Kafka holds of these, once the last commit of whoever was fenced can be read."""
        while fenced:
            with suppress(UnstableOffset):
                return await self._offsets.stable_of(fenced)
            await asyncio.sleep(STALE_PAUSE_S)
        return {}

    def _is_stale(self, holding: Holding, stored: Stored | None) -> bool:
        """Whether an earlier commit of this process is read, or that from before its first.

        The coordinator answers a transaction's commit before the offset in it can be read. To
        take that for the truth would cancel every running call of the partition. Nobody else can
        have written it: our nonce is in it. A plain commit can be read once it is answered.
        """
        if self._transactions is None or holding.wrote(stored):
            return False
        found = None if stored is None else read(stored)
        return stored is None or (found is not None and found[1].nonce == self._nonce)

    def _taken_over(
        self, progress: Progress, stored: Stored | None, began: int | None, topic_id: str | None
    ) -> Holding:
        others = others_to_keep(progress.next_offset, stored)
        trail = _trail_of(progress, stored)
        epoch = trail.before(reached(progress))
        mark = Mark(self._nonce, began, topic_id, others, bearer=self._bearer, leader_epoch=epoch)
        given = Given(next(self._epochs), progress)
        stored_now = to_store(progress, mark)
        return Holding(given, progress.next_offset, stored_now, others, topic_id or "", trail=trail)

    def _may_be_kept(self, given: _Given, topic_ids: Mapping[str, str]) -> dict[Partition, Holding]:
        """Partitions that nobody can have had in between, if Kafka holds what we left there."""
        before = self._before
        if before is None or not before.member_id:
            return {}
        if (before.member_id, before.generation + 1) != (given.member_id, given.generation):
            return {}
        return {
            partition: holding
            for partition, holding in before.holdings.items()
            if partition in given.partitions
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
        epoch_ends: Mapping[Partition, int],
    ) -> dict[Partition, int | HeldOut]:
        if self._known and not any(stored.values()):
            problem = all_gone(self._settings.topics_read, self._kafka.group_id)
            return {each: HeldOut(problem) for each in fresh}
        for partition in fresh:
            found = stored[partition]
            if found is not None and found.metadata and read(found) is None:
                log.warning("the metadata stored for %s is not ours: its offset counts", partition)
                self._observe(ForeignMetadata())
        return dict(starts(fresh, stored, bounds, chosen, topic_ids, epoch_ends))

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
        """Fetch from behind what was returned, or from the log's start where that is gone; of a
        log that was cut, nothing."""
        if holding.cut_at is not None:
            self._broken[partition] = log_was_cut(
                partition, holding.next, holding.cut_at, bounds.end
            )
            return
        if holding.trail.unverified is not None:
            self._broken[partition] = ""
            return
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
        # Some sentences name the log's end, which moves: told once all the same.
        for problem in {held_out[each] for each in held_out.keys() - self._held_out.keys()}:
            log.error("%s", problem)
        changed = held != self.held
        self._had |= held.keys()
        self.held, self._held_out = held, held_out
        self._held_as = given.member_id, given.generation
        left = given.partitions - held.keys()
        if left == set(held_out):  # else one was fenced meanwhile, which has set the time
            self._restore_at_s = _now_s() + LOOK_AGAIN_S
        self._given = given if left else None
        self._assert_whole()
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
            async with asyncio.timeout(RESTORE_S):
                unverified = self._unverified()
                ends = await self._offsets.epoch_ends({p: at[1] for p, at in unverified.items()})
                bounds = await self._offsets.bounds(self._broken.keys())
        except (KafkaError, TimeoutError) as error:
            log.warning("the log's bounds cannot be read: %s", type(error).__name__)
            return
        for partition in self._broken.keys() & self.held.keys() & bounds.keys():
            holding, found = self.held[partition], bounds[partition]
            if partition in unverified and holding.trail.unverified == unverified[partition]:
                offset, holding.trail.unverified = unverified[partition][0], None
                if (end := ends.get(partition, offset)) < offset:
                    holding.cut(end)
            if holding.trail.unverified is not None:
                continue  # it came in between: verified with the next look
            if holding.next > found.end or holding.cut_at is not None:
                cut_at = self._cuts[partition] = holding.cut(min(holding.next, found.end))
                self.broken(partition, log_was_cut(partition, holding.next, cut_at, found.end))
                continue
            # What is in the window stays there: it is gone from the log.
            self._open(partition, holding, found)
            del self._broken[partition]
        await self._store_traces()

    def _unverified(self) -> dict[Partition, tuple[int, int]]:
        """Of partitions that another leader has written on: up to where, under which epoch."""
        trails = {each: self.held[each].trail for each in self._broken.keys() & self.held.keys()}
        found = {each: trail.unverified for each, trail in trails.items()}
        return {each: at for each, at in found.items() if at is not None}

    async def _store_traces(self) -> None:
        """What was cut stays held out, also for whoever has it next; tried again with the next
        look where it fails."""
        traceless = {each: at for each, at in self.held.items() if at.traceless}
        stored = {each: self.to_store(each) for each in traceless} if self._settled else {}
        wanted = {each: at for each, at in stored.items() if at is not None}
        if not wanted:
            return
        try:
            if self._transactions is None:
                await within(RESTORE_S, self._membership.commit_once(wanted))
                for each, at in wanted.items():
                    self.stored(each, at)
            else:
                await within(RESTORE_S, self._transactions.commit(wanted.keys()))
        except (KafkaError, TimeoutError, CommitFailed) as error:
            log.warning("that a log was cut is not stored yet: %s", type(error).__name__)

    @property
    def _settled(self) -> bool:
        return self.restored.is_set() and not self._membership.reassigning


def _trail_of(progress: Progress, stored: Stored | None) -> Trail:
    """What is stored of leader epochs, where reading goes on at what is stored."""
    found = None if stored is None else read(stored)
    if found is None or found[0].next_offset != progress.next_offset:
        return Trail()
    return Trail(reached(found[0]), found[1].leader_epoch)


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

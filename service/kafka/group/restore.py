"""From what the group has given to what is held: the *restore*.

It reads what Kafka stores, decides for each partition whether it is the one we had (kept: same
epoch, goes on where it was) or a fresh one (new epoch), marks it as taken over, seeks, and only
then holds it. With transactions a fence comes before what is read counts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace

from aiokafka.errors import KafkaError, UnknownTopicOrPartitionError

from service import clock
from service.core.errors import CannotRun, CommitFailed, PublishFailed
from service.core.events import ForeignMetadata, Observe, Rebalanced
from service.core.messages import Partition
from service.core.tracker import Given, Progress
from service.core.words import how_many
from service.kafka.client.deadlines import within
from service.kafka.client.meaning import is_lasting, stop_for
from service.kafka.client.private import Membership
from service.kafka.client.stored import Mark, Stored, held_out_for_good, reached, read, to_store
from service.kafka.group.group_offsets import GroupOffsets
from service.kafka.group.holdings import HeldPartition, Holdings, Marking, Remembered, Unrestored
from service.kafka.group.positions import Positions
from service.kafka.group.reading import Overtaken, Reading
from service.kafka.group.starts import (
    HeldOut,
    LogRange,
    all_gone,
    is_new,
    leader_epochs,
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
"""One attempt at a restore may take this long; less where the session is short, for no heartbeat
goes out during it."""

RESTORE_AGAIN_S = 1.0
"""The pause between two attempts at a restore that failed."""

LOOK_AGAIN_S = 10.0
"""The pause between two looks at partitions that are held out until a person has done something."""


class Restore:
    """Attempts at what is given, one at a time. `held_out` has a sentence for each partition that
    is given and from which only a person can say where to read; `problem` says why the last
    attempt failed."""

    def __init__(
        self,
        settings: Settings,
        membership: Membership,
        offsets: GroupOffsets,
        holdings: Holdings,
        positions: Positions,
        remembered: Remembered,
        transactions: Transactions | None,
        assignment: Assignment,
        observe: Observe,
    ) -> None:
        self._settings, self._kafka = settings, settings.kafka
        self._membership, self._offsets = membership, offsets
        self._holdings, self._positions = holdings, positions
        self._remembered, self._transactions = remembered, transactions
        self._reading = Reading(membership, offsets, holdings, remembered, transactions)
        self._assignment, self._observe = assignment, observe
        self._restoring: Unrestored | None = None
        self._told: Mapping[Partition, Given] = {}  # what the pipeline knows as ours
        self.held_out: dict[Partition, str] = {}
        self.problem = ""

    async def attempt(self) -> None:
        """One attempt at what is given; leaves it given where it fails or a person must act."""
        given = self._holdings.unrestored
        if given is None or given is self._restoring:
            return
        self._restoring = given
        try:
            await within(self._restore_s, self._restore_all(given))
        except (KafkaError, TimeoutError, PublishFailed, CommitFailed) as error:
            if self._holdings.unrestored is given:
                self._restore_failed(error)
        except Overtaken:
            pass  # the next assignment has its own restore
        except CannotRun as error:
            self._holdings.fatal = error
        finally:
            if self._restoring is given:
                self._restoring = None

    @property
    def _restore_s(self) -> float:
        return min(RESTORE_S, self._kafka.session_timeout_s / 2)

    def _restore_failed(self, error: Exception) -> None:
        log.warning("the group's offsets cannot be read: %s", type(error).__name__)
        self._holdings.restore_at_s = clock.now_s() + RESTORE_AGAIN_S
        # A topic may be unknown to one broker for a moment; the supervision knows for how long.
        if is_lasting(error) and not isinstance(error, UnknownTopicOrPartitionError):
            self._holdings.fatal = stop_for(error, self._kafka)
        self.problem = (
            f"The offsets of the group {self._kafka.group_id} cannot be read "
            f"({type(error).__name__}); it is tried again."
        )

    @property
    def taken_by_another(self) -> str:
        """A sentence where another producer has fenced ours; empty before the first restore, for
        the rebalance is what is waited for then."""
        unrestored = self._holdings.unrestored
        if unrestored is None or not self._holdings.restored.is_set():
            return ""
        left = sorted(unrestored.partitions - self._holdings.held.keys() - self.held_out.keys())
        if not left:
            return ""
        return (
            f"Another producer has taken the place of this worker's for {left[0]}, which the group "
            "has given to this worker: it is taken back in a few seconds, unless the group gives "
            "it to another. Where that repeats, see that no other group uses this kafka.group_id."
        )

    async def _restore_all(self, given: Unrestored) -> None:
        found_there = await self._reading.read(given, self._restore_s)
        stored, topic_ids = found_there.stored, found_there.topic_ids
        kept, fresh = found_there.kept, found_there.fresh
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
            each: taken_over(at, stored[each], self._remembered.nonce, self._remembered.bearer)
            for each, at in found.items()
            if isinstance(at, int)
        }
        if self._remembered.start_over:
            progress |= await self._started_over(held_out, stored, bounds)
        for each, at in held_out.items():
            if at.cut_at is not None:
                self._remembered.cuts[each] = at.cut_at
        taken = {
            each: self._newly_held(at, stored[each], began, topic_ids.get(each.topic))
            for each, at in progress.items()
        }
        marks = {each: new.stored for each, new in taken.items()}
        marks |= self._traces(held_out, stored)
        if marks and self._holdings.unrestored is given:
            await self._mark(given, stored, marks)
        taken_up = (*kept, *taken)
        if self._transactions is not None and not all(map(self._transactions.holds, taken_up)):
            raise PublishFailed("a producer was lost during the restore")
        # No wait from here on: if it is still the same assignment, it becomes the one we hold.
        if self._holdings.unrestored is given and not self._membership.reassigning:
            self._holdings.began, self._holdings.topic_ids = began, topic_ids
            self._remembered.group_known |= any(stored.values()) or bool(kept)
            self._tell_of_starts(taken, stored, bounds)
            problems = {each: at.problem for each, at in held_out.items()}
            self._hold(given, kept, taken, problems, bounds)

    async def _chosen(
        self, partitions: AbstractSet[Partition], bounds: Mapping[Partition, LogRange]
    ) -> dict[Partition, int]:
        """Where the settings have a new group start."""
        wanted = {each: bounds[each] for each in partitions}
        return await self._offsets.chosen(self._settings.input.start, wanted)

    async def _started_over(
        self,
        held_out: dict[Partition, HeldOut],
        stored: Mapping[Partition, Stored | None],
        bounds: Mapping[Partition, LogRange],
    ) -> dict[Partition, Progress]:
        """Those that a person has said to start over, taken out of what is held out."""
        over = {each: held_out.pop(each) for each in held_out.keys() - self._remembered.had}
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
            if at is None or each not in self._remembered.cuts
            else held_out_for_good(at, self._remembered.cuts[each], self._remembered.nonce)
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
            each: held_out_for_good(before, at.cut_at, self._remembered.nonce)
            for each, at in held_out.items()
            if at.cut_at is not None and (before := stored[each]) is not None
        }
        return {each: trace for each, trace in traces.items() if trace != stored[each]}

    def _tell_of_starts(
        self,
        taken: Mapping[Partition, HeldPartition],
        stored: Mapping[Partition, Stored | None],
        bounds: Mapping[Partition, LogRange],
    ) -> None:
        """Where no offset says how far the group was, say before the first call how much is
        read."""
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
        given: Unrestored,
        stored: Mapping[Partition, Stored | None],
        marks: Mapping[Partition, Stored],
    ) -> None:
        """Store that these are taken over. From here on our death counts as an unclean end. And a
        group that starts at `latest` and ends before its first commit would start at a later
        `latest` without it.

        With transactions it has to be one: a plain commit that arrives late could set back what
        later transactions have stored.
        """
        if self._transactions is None:
            await self._membership.commit_once(marks)
            return
        # Should it fail, nobody knows what Kafka holds: the next attempt begins with a fence.
        given.fenced.difference_update(marks)
        marking = {each: Marking(stored[each], mark) for each, mark in marks.items()}
        self._holdings.marking.update(marking)
        try:
            await self._transactions.commit(marks.keys())
        finally:
            for each, mine in marking.items():
                if self._holdings.marking.get(each) is mine:
                    del self._holdings.marking[each]
        given.fenced.update(marks)

    def _newly_held(
        self, progress: Progress, stored: Stored | None, began: int | None, topic_id: str | None
    ) -> HeldPartition:
        others = others_to_keep(progress.next_offset, stored)
        trail = _trail_of(progress, stored)
        epoch = trail.before(reached(progress))
        own = self._remembered
        mark = Mark(own.nonce, began, topic_id, others, bearer=own.bearer, leader_epoch=epoch)
        given = Given(next(own.epochs), progress)
        stored_now = to_store(progress, mark)
        return HeldPartition(
            given, progress.next_offset, stored_now, others, topic_id or "", trail=trail
        )

    def _starts(
        self,
        fresh: AbstractSet[Partition],
        stored: Mapping[Partition, Stored | None],
        bounds: Mapping[Partition, LogRange],
        chosen: Mapping[Partition, int],
        topic_ids: Mapping[str, str],
        epoch_ends: Mapping[Partition, int],
    ) -> dict[Partition, int | HeldOut]:
        if self._remembered.group_known and not any(stored.values()):
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
        given: Unrestored,
        kept: Mapping[Partition, HeldPartition],
        fresh: Mapping[Partition, HeldPartition],
        held_out: dict[Partition, str],
        bounds: Mapping[Partition, LogRange],
    ) -> None:
        """Seek, open and tell the pipeline, without a wait in between."""
        for partition, holding in (*kept.items(), *fresh.items()):
            self._positions.open(partition, holding, bounds[partition])
        self._now_held(given, {**self._holdings.held, **kept, **fresh}, held_out, kept=len(kept))

    def _now_held(
        self,
        given: Unrestored,
        held: dict[Partition, HeldPartition],
        held_out: dict[Partition, str],
        kept: int,
    ) -> None:
        first, self.problem, self._holdings.before = not self._holdings.restored.is_set(), "", None
        # Some sentences name the log's end, which moves: told once all the same.
        for problem in {held_out[each] for each in held_out.keys() - self.held_out.keys()}:
            log.error("%s", problem)
        given_now = {each: holding.given for each, holding in held.items()}
        self._remembered.had |= held.keys()
        self._holdings.held, self.held_out = held, held_out
        self._holdings.held_as = given.member_id, given.generation
        left = given.partitions - held.keys()
        if left == set(held_out):  # else one was fenced meanwhile, which has set the time
            self._holdings.restore_at_s = clock.now_s() + LOOK_AGAIN_S
        self._holdings.unrestored = given if left else None
        self._holdings.assert_whole()
        self._holdings.restored.set()
        if self._transactions is not None:
            self._transactions.keep_only(held.keys())
            self._transactions.hurry(on=False)
        # A partition that was fenced has left `held` and nobody has told the pipeline. If it is
        # held out now, the pipeline must let it go, or its messages fill the window for good.
        if first or given_now != self._told:
            self._told = given_now
            self._assignment.assigned(given_now)
        if first:
            self._tell_of_the_rebalance(len(given.partitions), kept)

    def _tell_of_the_rebalance(self, assigned: int, kept: int) -> None:
        began_s, self._remembered.revoked_at_s = self._remembered.revoked_at_s, None
        took_s = 0.0 if began_s is None else clock.now_s() - began_s
        partitions = how_many(assigned, "partition")
        log.info("assigned %s, %d of them kept, in %.2f s", partitions, kept, took_s)
        self._observe(Rebalanced(assigned, kept, took_s))


def _trail_of(progress: Progress, stored: Stored | None) -> Trail:
    """What is stored of leader epochs, where reading goes on at what is stored."""
    found = None if stored is None else read(stored)
    if found is None or found[0].next_offset != progress.next_offset:
        return Trail()
    return Trail(reached(found[0]), found[1].leader_epoch)

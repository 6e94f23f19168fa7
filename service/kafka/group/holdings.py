"""What this member of the group holds, and what Kafka is to store for it.

Whatever depends on "is it still ours?" is done without a wait between question and act.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from service import clock
from service.core.completed import fits_for_sure
from service.core.messages import Partition
from service.core.tracker import Given, Progress
from service.core.window import MAP_CHARS_MAX
from service.kafka.client.instances import this_process
from service.kafka.client.stored import NO_OTHERS, Mark, Others, Stored, reached, read, to_store
from service.kafka.group.group_offsets import GroupOffsets
from service.kafka.group.trail import Trail
from service.ports import Assignment

FENCED_AGAIN_S = 3.0
"""A partition is restored this long after its fence: a member that has lost it learns so by a
heartbeat before."""

ATTEMPTS_MAX = 100
"""This many unanswered commits are remembered; at one a second, more minutes than any of them can
stay in flight."""


@dataclass(slots=True, eq=False)
class HeldPartition:
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
        """It is about to be sent. Of many unanswered ones only the last can still arrive."""
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
class Before:
    """What was held until the revoke, and as whom: the only member and generation after which a
    partition can be kept."""

    held: Mapping[Partition, HeldPartition]
    member_id: str
    generation: int


@dataclass(frozen=True, slots=True)
class Unrestored:
    """Partitions that the group has given us and that are not restored."""

    partitions: frozenset[Partition]
    member_id: str
    generation: int
    fenced: set[Partition] = field(default_factory=set)
    anew: set[Partition] = field(default_factory=set)
    """Those that cannot be kept any more, because their fence has dropped what was in doubt."""


@dataclass(frozen=True, slots=True, eq=False)
class Marking:
    """A mark of the restore that goes into a transaction, and what Kafka held before it."""

    known: Stored | None
    mark: Stored


class Remembered:
    """What this process knows of the group, whichever client it has at the moment."""

    def __init__(self, instance_id: str | None = None, *, start_over: bool = False) -> None:
        """`instance_id` is the worker's name (`kafka.group_instance_id`). With `start_over`, what
        is held out is started over the first time it is given."""
        self.nonce = secrets.token_hex(8)
        self.bearer = None if instance_id is None else this_process(instance_id)
        self.epochs = itertools.count(1)
        self.start_over = start_over
        self.group_known = False
        """Whether offsets of the group have been seen."""
        self.had: set[Partition] = set()
        """Partitions that were held once: there is nothing to start over."""
        self.cuts: dict[Partition, int] = {}
        """Where logs ended that were cut; Kafka may not hold the trace."""
        self.revoked_at_s: float | None = None
        """When the rebalance began that has not ended yet."""

    def began_to_rebalance(self, now_s: float) -> None:
        """Partitions are taken away; of several times before the next restore the first counts."""
        if self.revoked_at_s is None:
            self.revoked_at_s = now_s


class Holdings:
    """The partitions that are held; for the writers the ledger of what Kafka holds.

    `restored` is set while what is held is known to be ours. `fatal` is what ends the process:
    the client only logs what its callbacks raise.

    Invariant: between an assignment and the next revoke each partition of it is held, or is among
    those that are still to be restored (`unrestored`), some of which are held out with a sentence.
    """

    def __init__(
        self,
        offsets: GroupOffsets,
        assignment: Assignment,
        remembered: Remembered,
        doubtful: Callable[[], AbstractSet[str]],
    ) -> None:
        """`doubtful`: topics that may be others by now; nothing is stored for them."""
        self._offsets, self._assignment = offsets, assignment
        self._remembered, self._doubtful = remembered, doubtful
        self.held: dict[Partition, HeldPartition] = {}
        self.held_as = ("", -1)
        """The member and generation of what is held."""
        self.assigned: frozenset[Partition] = frozenset()
        """What the group has given us last; empty from the revoke on."""
        self.restored = asyncio.Event()
        self.fatal: BaseException | None = None
        self.closed = False
        self.before: Before | None = None
        """What a rebalance has taken away."""
        self.unrestored: Unrestored | None = None
        self.restore_at_s = 0.0
        """When the next attempt at a restore is due."""
        self.marking: dict[Partition, Marking] = {}
        self.began: int | None = None
        """The generation in which the group was found new."""
        self.topic_ids: Mapping[str, str] = {}
        """The topics' ids, as of the last restore."""

    def takes(self, partition: Partition) -> bool:
        """Whether outcomes of it may be published, which they may not before its restore has
        ended."""
        return partition in self.held

    def known(self, partition: Partition) -> Stored | None:
        """What Kafka held when it was last known; None where the partition is not ours."""
        if (marking := self.marking.get(partition)) is not None:
            return marking.known
        holding = self.held.get(partition)
        return None if holding is None else holding.stored

    def fenced(self, partition: Partition) -> None:
        """Another producer has taken the place of ours. Either the group has given the partition to
        its owner and tells us so in a moment, or it is still ours and is restored anew."""
        held = self.held.pop(partition, None)
        if held is None or not self.restored.is_set():
            # In a rebalance the next assignment decides. Fencing back would start a loop of two
            # owners fencing each other.
            return
        if self.unrestored is None:
            self.unrestored = Unrestored(self.assigned, *self.held_as)
        self.unrestored.fenced.discard(partition)
        self.restore_at_s = clock.now_s() + FENCED_AGAIN_S
        self.assert_whole()

    def assert_whole(self) -> None:
        """No partition of the assignment is forgotten: neither held nor to be restored."""
        given = frozenset() if self.unrestored is None else self.unrestored.partitions
        forgotten = self.assigned - self.held.keys() - given
        assert not forgotten, f"forgotten: {sorted(forgotten)}"

    def doubts(self, partition: Partition) -> bool:
        """Whether its topic may be another by now: nothing is stored until that is known."""
        return partition.topic in self._doubtful()

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
        if (marking := self.marking.get(partition)) is not None:
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
        What is not ours any more may too: the transaction finds out.
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
        before = {} if self.before is None else self.before.held
        holding = self.held.get(partition) or before.get(partition)
        if holding is None or (progress := holding.attempted.get(stored)) is None:
            return
        holding.stored = stored
        holding.attempted.clear()
        self._assignment.stored(partition, progress)

    def _mark_of(self, topic: str, holding: HeldPartition, progress: Progress) -> Mark:
        return Mark(
            self._remembered.nonce,
            self.began,
            self.topic_ids.get(topic),
            holding.others,
            holding.cut_at,
            self._remembered.bearer,
            holding.trail.before(reached(progress)),
        )

    def let_go(self) -> None:
        """Nothing is ours any more, until the next assignment."""
        self.held, self.assigned = {}, frozenset()

    def close(self) -> None:
        """Hold nothing any more; what the client still calls does nothing."""
        self.closed = True
        self.let_go()
        self.unrestored = None
        self.restored.clear()

    def fail(self, error: BaseException) -> None:
        """A callback met something unforeseen, which the client only logs: poll raises it."""
        self.fatal = error

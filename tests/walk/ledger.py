"""What must be true of the logs, checked whenever something lands in them or is stored.

It knows of each input record (named by its `uid`, for an offset can be given out twice) whether
its outcome stands in the logs, and compares that with what the group has stored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from aiokafka import TopicPartition

from service.core.completed import finished_ranges
from service.core.messages import Partition
from service.kafka.client.stored import Stored, read
from tests.walk.loop import Violation

LETTER = "__dlq.errors.topic"
OVERSTAYED = b"not answered within extraction.message_timeout_s"


class Life(NamedTuple):
    """A record where it stands; one that was postponed has several."""

    partition: Partition
    offset: int
    uid: int


@dataclass(slots=True)
class AnswerSet:
    """The records of one answer that are in the output."""

    life: Life
    worker: object
    indexes: set[int] = field(default_factory=set)
    count: int | None = None
    closed: bool = False

    @property
    def whole(self) -> bool:
        return self.count is not None and len(self.indexes) >= self.count


class Ledger:
    """`later_max`: so often a message may go to the retry topic; None: there is none."""

    def __init__(self, *, exactly_once: bool, ordering: str, later_max: int | None) -> None:
        self.exactly_once, self.ordering, self.later_max = exactly_once, ordering, later_max
        self.keys: dict[int, bytes | None] = {}
        self.lives: dict[int, list[Life]] = defaultdict(list)
        self.retries: dict[Life, int] = {}
        self.here: dict[Partition, dict[int, Life]] = defaultdict(dict)
        self.unfinished: dict[Partition, dict[int, Life]] = defaultdict(dict)
        self.shadowed: dict[Partition, set[Life]] = defaultdict(set)
        """Records under offsets that the group has passed before the log was cut."""
        self.done: set[Life] = set()
        self.said: set[Life] = set()  # done, and readers can see it
        self.fresh: dict[Partition, set[int]] = defaultdict(set)  # done, at or above what is stored
        self.sets: dict[bytes, AnswerSet] = {}
        self.abandoned: set[bytes] = set()  # answers whose call was cut off with its partition
        self.calls: dict[tuple[object, int], int] = defaultdict(int)
        self.outcomes = 0
        self.at_s = 0.0  # of the last record that landed
        self._delivered: dict[Partition, int] = defaultdict(int)
        self._passed: dict[Partition, int] = defaultdict(int)  # before the last cut
        self._cuts: dict[Partition, int] = defaultdict(int)
        self._next: dict[Partition, int] = defaultdict(int)
        self._mapped: dict[Partition, int] = defaultdict(int)  # the end of the stored map
        self._first: dict[tuple[object, ...], int] = {}
        self._seen: set[tuple[Life, TopicPartition]] = set()
        self._bent: set[int] = set()  # has had an outcome that is no record

    # --- the input -------------------------------------------------------------------------------

    def sent(self, partition: Partition, offset: int, uid: int, retries: int = 0) -> None:
        life = Life(partition, offset, uid)
        self.lives[uid].append(life)
        self.retries[life] = retries
        self.here[partition][offset] = life
        if offset < self._passed[partition]:
            self.shadowed[partition].add(life)
        else:
            self.unfinished[partition][offset] = life

    def read_to(self, partition: Partition, position: int) -> None:
        self._delivered[partition] = max(self._delivered[partition], position)

    def cut(self, partition: Partition, gone: Mapping[int, int], end: int) -> None:
        self.expired(partition, gone)
        self._passed[partition] = max(self._next[partition], self._delivered[partition])
        self._cuts[partition] += 1
        self.fresh[partition] = {offset for offset in self.fresh[partition] if offset < end}

    def expired(self, partition: Partition, gone: Mapping[int, int]) -> None:
        for offset in gone:
            self.unfinished[partition].pop(offset, None)
            life = self.here[partition].pop(offset)
            self.shadowed[partition].discard(life)

    def quiet_s(self, now_s: float) -> float:
        return now_s - self.at_s

    # --- the output ------------------------------------------------------------------------------

    def landed(
        self,
        where: TopicPartition,
        key: bytes | None,
        value: bytes | None,
        headers: Sequence[tuple[str, bytes | None]],
        worker: object,
    ) -> None:
        """One record of ours is there for readers."""
        said: dict[str, Any] = dict(headers)
        if LETTER in said:
            self._letter(said, int((value or b"").split()[0]), worker)
        elif where.topic == "later":
            self._postponed(int((value or b"").split()[0]), int(said["sluice.retry.count"]))
        elif "sluice.record.aborted" in said:
            self._aborted(said)
        else:
            self._record(where, said, int((value or b"").split()[0]), worker)

    def _life(self, said: Mapping[str, Any], uid: int, prefix: str) -> Life:
        topic = said[f"{prefix}topic"].decode()
        partition = Partition(topic, int(said[f"{prefix}partition"]))
        life = Life(partition, int(said[f"{prefix}offset"]), uid)
        if life not in self.retries:
            raise Violation(f"an outcome names {life}, where that message never stood")
        return life

    def _record(
        self, where: TopicPartition, said: Mapping[str, Any], uid: int, worker: object
    ) -> None:
        life = self._life(said, uid, "sluice.source.")
        answer = said["sluice.answer.id"]
        its = self.sets.get(answer)
        if its is None:
            its = self.sets[answer] = AnswerSet(life, worker)
        if its.closed:
            raise Violation(f"a record of {life} landed behind the marker that closed its answer")
        its.indexes.add(int(said["sluice.record.index"]))
        if "sluice.record.count" in said:
            its.count = int(said["sluice.record.count"])
        self._see_order(life, where)
        if its.whole:
            self._finish(life)

    def _see_order(self, life: Life, where: TopicPartition) -> None:
        """An elder of a lane is not seen for the first time behind a younger one."""
        key = self.keys[life.uid]
        if self.ordering == "none" or (self.ordering == "key" and key is None):
            return
        if (life, where) in self._seen:
            return
        self._seen.add((life, where))
        of_key = key if self.ordering == "key" else None
        lane = (life.partition, self._cuts[life.partition], of_key, where)
        last = self._first.get(lane, -1)
        if life.offset < last and life.uid not in self._bent:
            raise Violation(f"{life} landed in {where} behind offset {last} of its lane")
        self._first[lane] = max(last, life.offset)

    def bent(self, outputs: Sequence[Any]) -> None:
        """These are on their way to another topic, which has no order with the output: whoever
        comes next may answer them otherwise."""
        for output in outputs:
            self._bent.add(int((output.value or b"0").split()[0]))

    def _letter(self, said: Mapping[str, Any], uid: int, worker: object) -> None:
        life = self._life(said, uid, "__dlq.errors.")
        reason, detail = said["sluice.error.reason"], said["sluice.error.detail"] or b""
        if reason == b"exhausted":
            if self.later_max is not None and self.retries[life] < self.later_max:
                raise Violation(f"{life} was rejected instead of waiting in the retry topic")
            calls = self.calls[worker, uid]
            if calls and int(said["sluice.attempts"]) == 0:
                raise Violation(f"the letter of {life} says 0 attempts, and {calls} went out")
        if detail.startswith(OVERSTAYED):
            self._see_closed(life, worker)
        self._bent.add(uid)
        self._finish(life)

    def _see_closed(self, life: Life, worker: object) -> None:
        for answer, its in self.sets.items():
            ours = its.life == life and its.worker is worker and answer not in self.abandoned
            if ours and its.indexes and not its.whole and not its.closed:
                raise Violation(f"{life} was rejected and its answer {answer!r} not closed")

    def _aborted(self, said: Mapping[str, Any]) -> None:
        its = self.sets.get(said["sluice.answer.id"])
        if its is None:
            raise Violation("a marker closes an answer of which nothing had landed")
        if its.whole:
            raise Violation(f"a whole answer of {its.life} was closed as aborted")
        its.closed = True

    def _postponed(self, uid: int, retries: int) -> None:
        self._bent.add(uid)
        for life in self.lives[uid]:
            if self.retries[life] == retries - 1:
                self._finish(life)

    def nothing_to_say(self, uid: int) -> None:
        """An answer without records, a message that is skipped: no outcome can be seen."""
        for life in self.lives[uid]:
            self._finish(life, seen=False)

    def _finish(self, life: Life, *, seen: bool = True) -> None:
        if seen and self.exactly_once and life in self.said:
            raise Violation(f"{life} has two outcomes")
        if seen:
            self.said.add(life)
        if life in self.done:
            return
        self.done.add(life)
        self.outcomes += 1
        if self.here[life.partition].get(life.offset) == life:
            self.unfinished[life.partition].pop(life.offset, None)
            self.shadowed[life.partition].discard(life)
            if seen and life.offset >= self._next[life.partition]:
                self.fresh[life.partition].add(life.offset)

    # --- what is stored --------------------------------------------------------------------------

    def transaction(self, offsets: Mapping[Partition, Stored], outputs: Sequence[Any]) -> None:
        """The outputs are there, the offsets will be in this very step."""
        if outputs and not offsets:
            raise Violation("a transaction holds outcomes and no offset")

    def stored(self, partition: Partition, stored: Stored) -> None:
        """The group's next offset and map, as a broker has just taken them."""
        if len(stored.metadata) > 4096:
            raise Violation(f"{len(stored.metadata)} characters of metadata")
        found = read(stored)
        if found is None:
            raise Violation(f"what was stored cannot be read: {stored}")
        progress = found[0]
        maps = finished_ranges(progress.next_offset, progress.runs)
        finished = (range(progress.next_offset), *maps)
        for offset, life in self.unfinished[partition].items():
            if any(offset in each for each in finished):
                raise Violation(f"{life} counts as finished before its outcome: {stored}")
        if progress.next_offset < self._next[partition] and not self._cuts[partition]:
            before = self._next[partition]
            raise Violation(f"{partition}: {before} was stored, and now {progress.next_offset}")
        self._next[partition] = progress.next_offset
        self._mapped[partition] = maps[-1].stop if maps else 0
        fresh = self.fresh[partition]
        if not self.exactly_once:
            fresh.clear()
            return
        for offset in tuple(fresh):
            if offset < progress.next_offset:
                fresh.discard(offset)
            elif not any(offset in each for each in maps):
                raise Violation(
                    f"{partition}@{offset} has its outcome in a transaction, and what is stored "
                    f"does not say so: {stored}"
                )

    # --- the end ---------------------------------------------------------------------------------

    def open(self, partition: Partition) -> list[Life]:
        """What has no outcome yet, though somebody could read it."""
        return [*self.unfinished[partition].values(), *self.shadowed[partition]]

    def passed(self, partition: Partition) -> int:
        """Behind everything that was read, or counts as finished by what is stored."""
        stored = max(self._next[partition], self._mapped[partition])
        return max(stored, self._delivered[partition])

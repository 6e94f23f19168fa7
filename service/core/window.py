"""The window: every message that was taken and is not finished, and its stage.

Rules of this file: pure state, changed only by the pipeline between two of its awaits. An entry
belongs to one holding. A holding that is lost never comes back, and its entries are lost with it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Container, Hashable, Iterator, Mapping
from enum import Enum
from typing import Literal

from service.core.admission.route import Untroubled
from service.core.admission.suspicion import Suspicion
from service.core.completed import encode, finished_ranges, fullness
from service.core.lanes import Lane, Ordering, lane_id
from service.core.messages import Message, Outcome, Partition, Provenance
from service.core.status import PartitionStatus
from service.core.tracker import (
    UNCLEAN_ENDS_MAX,
    Delivery,
    Given,
    PartitionTracker,
    Progress,
)

MAP_CHARS_MAX = 3_700
"""How many characters a completed map may always use: what brokers accept as metadata (4,096 by
default), less the most that our other fields can take."""

MAP_FULL = 0.75
"""A partition takes no more messages when its map, plus one bit for each unfinished message, fills
this share of its room. In whatever order those messages finish, the map then needs about this much
at most. The last quarter is for the messages of one more poll, and for the forms of the codec that
need more than a bit a message."""

MAP_BITS = 6 * MAP_CHARS_MAX
"""How many bits the map has room for: one character of base64 holds six."""

SPAN_SURE = MAP_BITS - 16
"""How many offsets a map surely reaches over, in whatever order they finish. The map is then a
bitmap; 16 bits are set aside for its first character and its last byte."""

RUNS_SURE = SPAN_SURE // 8 // 5
"""How many runs a map surely holds, whatever their lengths: no run takes more than five bytes."""

MEASURE_AGAIN = 1_000
"""The map is measured again after this many offsets were taken or messages finished: 5 % of what it
holds. To measure a full map takes up to two milliseconds."""

FIRST_MAX = 3
"""A message with this many failed attempts no longer goes to the front of the queue."""


class Stage(Enum):
    """Where a message in the window stands."""

    QUEUED = "queued"  # waits for a slot
    CALLING = "calling"  # a call is running
    RETRYING = "retrying"  # waits for another attempt; holds nothing but its place
    ANSWERED = "answered"  # has its outcome; an earlier one of its lane may not
    HANDED = "handed"  # given to the producer, not acknowledged


class Entry:
    """One message in the window."""

    __slots__ = (
        "alone",
        "attempts",
        "attempts_that_count",
        "beside_usd",
        "calls_beside",
        "first_called_s",
        "first_failed_at_ms",
        "holding",
        "lane",
        "lane_id",
        "lane_wait_s",
        "message",
        "not_before_s",
        "outcome",
        "progress",
        "publish_attempts",
        "records_out",
        "route",
        "since_s",
        "spent",
        "stage",
        "suspicion",
        "taken_s",
        "text",
        "turn",
        "untroubled",
    )

    def __init__(self, message: Message, holding: Holding, identity: Hashable, now_s: float):
        self.message = message
        self.holding = holding
        self.lane_id = identity
        self.lane = holding.lane(identity)
        self.stage = Stage.QUEUED
        self.since_s = now_s  # when it came to this stage
        self.taken_s = now_s
        self.first_called_s: float | None = None
        self.not_before_s = now_s  # the provider asked us to wait until then
        self.spent: Provenance | None = None  # calls and cost until now, as far as they are known
        # Calls that `spent` does not count: the slower one of a hedged pair, one that was cut off.
        self.calls_beside = 0
        self.beside_usd = 0.0  # the cost of `calls_beside`, as far as it is known
        self.text = ""
        self.route = ""  # the route of its next call
        self.turn = 0  # its place in the queues: a lower number is called earlier
        self.suspicion: Suspicion | None = None  # None until a call for it has failed
        self.untroubled: Untroubled | None = None  # the state of its route before that failure
        self.outcome: Outcome | None = None
        self.attempts = 0  # failed attempts
        self.attempts_that_count = 0  # failed attempts that the message itself may have caused
        self.progress: object | None = None  # the extractor gets it back at the next attempt
        self.first_failed_at_ms: int | None = None
        self.lane_wait_s = 0.0  # from its outcome to the hand-over
        self.publish_attempts = 0  # failed attempts to publish
        self.records_out = 0  # records acknowledged while the model was writing
        self.alone = holding.next_is_suspect()  # it is a suspect and runs by itself

    @property
    def gone(self) -> bool:
        """The message has left the window: it is finished, was let go or was lost."""
        return self.message.offset not in self.holding.entries


class Holding:
    """One partition under one epoch: its tracker, its lanes, its part of the window."""

    __slots__ = (
        "alone",
        "committed",
        "end",
        "entries",
        "epoch",
        "given",
        "lanes",
        "lost",
        "map_fullness",
        "measured_at",
        "spent",
        "suspects",
        "tracker",
    )

    def __init__(self, given: Given, suspects: int) -> None:
        self.epoch, self.given = given.epoch, given.progress
        next_offset, runs = given.progress.next_offset, given.progress.runs
        self.tracker = PartitionTracker(next_offset, finished_ranges(next_offset, runs))
        self.lanes: dict[Hashable, Lane] = {}
        self.entries: dict[int, Entry] = {}  # by offset, in order
        self.spent = given.progress.spent
        self.committed = given.progress  # what Kafka is known to hold
        self.end: int | None = None
        self.lost = False
        self.map_fullness = 0.0  # of the completed map, when it was last measured
        # The last delivered offset and the number of unfinished messages at that measure.
        self.measured_at = (next_offset - 1, 0)
        self.alone: int | None = given.progress.alone
        """The offset of the message that runs by itself, or that did when an earlier holder
        died."""
        # The count includes this holder in advance, hence > and not >=.
        died = given.progress.unclean_ends > UNCLEAN_ENDS_MAX and self.alone is None
        self.suspects = suspects if died else 0  # how many of the next messages are suspects

    def next_is_suspect(self) -> bool:
        """Whether the message taken now is a suspect; if so, one suspect fewer is left."""
        if not self.suspects:
            return False
        self.suspects -= 1
        return True

    def progress(self, *, clean: bool, finishing: frozenset[int] = frozenset()) -> Progress:
        """What Kafka should hold of the partition; `clean` where we let go of it in order."""
        next_offset, runs = self.tracker.progress(finishing)
        unclean_ends = 0
        if next_offset == self.given.next_offset:
            unclean_ends = max(0, self.given.unclean_ends - clean)
        alone = self.alone
        if alone is not None and (alone < next_offset or (clean and alone != self.given.alone)):
            alone = None  # it is finished, or it was cancelled and the process did not die of it
        return Progress(next_offset, runs, unclean_ends, alone, self.spent)

    def measure(self) -> None:
        """Measure how full the completed map is."""
        _, runs = self.tracker.progress()
        self.map_fullness = fullness(runs, encode(runs, MAP_CHARS_MAX), MAP_CHARS_MAX)
        self.measured_at = self.tracker.last_delivered, self.tracker.unfinished

    def is_crowded(self) -> bool:
        """Whether the partition takes no more messages, because its map might not hold what then
        finishes.

        With nothing unfinished it is never crowded: only further messages can then make the map
        shorter.
        """
        last_delivered, unfinished = self.measured_at
        taken = self.tracker.last_delivered - last_delivered
        if max(taken, unfinished - self.tracker.unfinished) >= MEASURE_AGAIN:
            self.measure()
        unfinished = self.tracker.unfinished
        return unfinished > 0 and self.map_fullness + unfinished / MAP_BITS >= MAP_FULL

    def has_room(self) -> bool:
        """Whether the map surely has room, whichever of the messages taken until now finish. It
        takes no time: nothing is encoded."""
        return self.tracker.runs_max <= RUNS_SURE or self.tracker.span <= SPAN_SURE

    def lane(self, identity: Hashable) -> Lane:
        lane = self.lanes.get(identity)
        if lane is None:
            lane = self.lanes[identity] = Lane()
        return lane

    def status(self) -> PartitionStatus:
        next_offset = self.tracker.next_offset
        return PartitionStatus(
            next_offset=next_offset,
            lag=None if self.end is None else max(0, self.end - next_offset),
            unfinished=self.tracker.unfinished,
            oldest_unfinished_ms=self.tracker.oldest_unfinished_ms,
            map_ratio=self.map_fullness,
        )


class Window:
    """All holdings, and their entries by stage."""

    def __init__(self, ordering: Ordering, suspects: int) -> None:
        """`suspects` is how many messages of a partition become suspects after its holders have
        died at one next offset too often."""
        self._ordering, self._suspects = ordering, suspects
        self.held: dict[Partition, Holding] = {}
        self.messages = 0
        self.size_bytes = 0
        self.calling: dict[Entry, None] = {}  # the longest running first
        self.handed = 0
        self._queues: dict[str, deque[Entry]] = {}  # by route
        self._last_turn = self._first_turn = 0
        self._retries: list[tuple[float, int, Entry]] = []  # a heap by due time
        self._sequence = itertools.count()

    # --- partitions ----------------------------------------------------------------------------

    def assign(self, given: Mapping[Partition, Given]) -> list[Holding]:
        """Hold exactly these partitions; returns the holdings that are lost."""
        lost = [
            self._lose(partition)
            for partition, holding in tuple(self.held.items())
            if partition not in given or given[partition].epoch != holding.epoch
        ]
        if lost:
            self._forget_gone()
        for partition, each in given.items():
            if partition not in self.held:
                self.held[partition] = Holding(each, self._suspects)
        return lost

    def _forget_gone(self) -> None:
        """Lost entries leave queue and heap now. Else they would wait behind a live entry at the
        front and pile up with each rebalance."""
        for route, queue in self._queues.items():
            live = (each for each in queue if not self._gone(each, Stage.QUEUED))
            self._queues[route] = deque(live)
        self._retries = [each for each in self._retries if not self._gone(each[2], Stage.RETRYING)]
        heapq.heapify(self._retries)

    def _lose(self, partition: Partition) -> Holding:
        holding = self.held.pop(partition)
        holding.lost = True
        for entry in tuple(holding.entries.values()):
            self._remove(entry)
        return holding

    # --- one message's way -----------------------------------------------------------------------

    def take(self, message: Message, now_s: float) -> Entry | Literal["stale", "finished"]:
        """Enter a message, unless it is stale (known already, or fetched under an older epoch) or
        an earlier holder has finished it."""
        holding = self.held.get(message.partition)
        if holding is None or holding.epoch != message.epoch:
            return "stale"
        match holding.tracker.deliver(message.offset, message.timestamp_ms):
            case Delivery.KNOWN:
                return "stale"
            case Delivery.FINISHED:
                if holding.alone == message.offset:
                    holding.alone = None
                return "finished"
            case Delivery.NEW:
                return self._enter(message, holding, now_s)

    def _enter(self, message: Message, holding: Holding, now_s: float) -> Entry:
        entry = Entry(message, holding, lane_id(self._ordering, message), now_s)
        entry.lane.enter(message.offset)
        holding.entries[message.offset] = entry
        self.messages += 1
        self.size_bytes += message.size_bytes
        return entry

    def queue(self, entry: Entry) -> None:
        """Queue an entry behind all others."""
        self._last_turn += 1
        entry.turn = self._last_turn
        self._queue_of(entry).append(entry)

    def _queue_before_others(self, entry: Entry) -> None:
        self._first_turn -= 1
        entry.turn = self._first_turn
        self._queue_of(entry).appendleft(entry)

    def _queue_of(self, entry: Entry) -> deque[Entry]:
        queue = self._queues.get(entry.route)
        if queue is None:
            queue = self._queues[entry.route] = deque()
        return queue

    def next_queued(self, passing: Container[str] = ()) -> Entry | None:
        """The entry to call next; it stays in the queue. Entries for routes in `passing` are left
        out."""
        first: Entry | None = None
        for route, queue in self._queues.items():
            while queue and self._gone(queue[0], Stage.QUEUED):
                queue.popleft()
            if queue and route not in passing and (first is None or queue[0].turn < first.turn):
                first = queue[0]
        return first

    @property
    def waits_for_a_call(self) -> bool:
        """Whether a message is queued or waits for another attempt."""
        return self.next_queued() is not None or self.next_retry_s is not None

    def waiting_for(self, route: str, now_s: float) -> Entry | None:
        """The entry with the fewest attempts among those that wait for a slot or another attempt on
        a route. Suspects, which run by themselves, are left out, and entries that the provider
        asked to wait longer."""
        queued = self._queues.get(route, ())
        waiting = (
            *(each for each in queued if not self._gone(each, Stage.QUEUED)),
            *(each for _, _, each in self._retries if not self._gone(each, Stage.RETRYING)),
        )
        return min(
            (e for e in waiting if e.route == route and not e.alone and e.not_before_s <= now_s),
            key=lambda entry: entry.attempts,
            default=None,
        )

    def call(self, entry: Entry, now_s: float) -> Entry:
        """Take an entry out of the queue or the retries, for a call."""
        if entry.stage is Stage.RETRYING:
            self._retries = [each for each in self._retries if each[2] is not entry]
            heapq.heapify(self._retries)
        else:
            queue = self._queues[entry.route]
            if queue[0] is entry:
                queue.popleft()
            else:
                queue.remove(entry)
        self._move(entry, Stage.CALLING, now_s)
        if entry.first_called_s is None:
            entry.first_called_s = now_s
        self.calling[entry] = None
        return entry

    def call_ended(self, entry: Entry) -> None:
        del self.calling[entry]

    def retry(self, entry: Entry, now_s: float, due_s: float) -> None:
        self._move(entry, Stage.RETRYING, now_s)
        heapq.heappush(self._retries, (due_s, next(self._sequence), entry))

    def requeue_due(self, now_s: float, most: int) -> int:
        """Queue at most `most` retries that are due; returns how many.

        They go to the front of the queue, because later messages of their lanes wait for them. A
        message that has failed `FIRST_MAX` times goes to the end: where there is room for only one
        call at a time, it would take every one of them.
        """
        due: list[Entry] = []
        while len(due) < most and self._retries and self._retries[0][0] <= now_s:
            entry = heapq.heappop(self._retries)[2]
            if not self._gone(entry, Stage.RETRYING):
                self._move(entry, Stage.QUEUED, now_s)
                due.append(entry)
        for entry in reversed(due):
            if entry.attempts < FIRST_MAX:
                self._queue_before_others(entry)
        for entry in due:
            if entry.attempts >= FIRST_MAX:
                self.queue(entry)
        return len(due)

    def queue_first(self, entry: Entry, now_s: float) -> None:
        """Queue a message whose attempt has begun before all others."""
        self._move(entry, Stage.QUEUED, now_s)
        self._queue_before_others(entry)

    def wake_retries(self, now_s: float) -> None:
        """Make all retries due now, except where the provider asked us to wait. No retry becomes
        due later than before."""
        woken = [
            (min(due_s, max(now_s, entry.not_before_s)), number, entry)
            for due_s, number, entry in self._retries
        ]
        heapq.heapify(woken)
        self._retries = woken

    @property
    def next_retry_s(self) -> float | None:
        """When the next retry is due."""
        while self._retries and self._gone(self._retries[0][2], Stage.RETRYING):
            heapq.heappop(self._retries)
        return self._retries[0][0] if self._retries else None

    def answered(self, entry: Entry, outcome: Outcome, now_s: float) -> None:
        entry.outcome = outcome
        self._move(entry, Stage.ANSWERED, now_s)
        entry.lane.answer(entry.message.offset)

    def hand_over(self, holding: Holding, lane: Lane, now_s: float) -> Entry | None:
        """The lane's next outcome to publish, which counts as handed over from here on."""
        offset = lane.hand_over()
        if offset is None:
            return None
        entry = holding.entries[offset]
        if entry.stage is not Stage.HANDED:
            entry.lane_wait_s = now_s - entry.since_s
            self._move(entry, Stage.HANDED, now_s)
            self.handed += 1
        return entry

    def finish(self, entry: Entry) -> None:
        """The entry's outcome is acknowledged."""
        assert entry.stage is Stage.HANDED, f"finished while {entry.stage}"
        entry.holding.tracker.finish(entry.message.offset)
        if entry.holding.alone == entry.message.offset:
            entry.holding.alone = None
        self._remove(entry)
        if entry.lane.empty:
            entry.holding.lanes.pop(entry.lane_id, None)

    def let_go(self) -> None:
        """Forget messages for which nothing has to be paid again: they stay unfinished.

        These are the messages that wait for a slot or for another attempt and have no message
        behind them in their lane that is called or answered. Such an answer is paid for, and it
        could not be published without the messages before it.
        """
        for holding in self.held.values():
            needed: set[Lane] = set()
            for entry in reversed(tuple(holding.entries.values())):
                waits = entry.stage in (Stage.QUEUED, Stage.RETRYING)
                if waits and entry.lane not in needed:
                    self._remove(entry)
                else:
                    needed.add(entry.lane)

    # --- what it says of itself --------------------------------------------------------------

    def entries(self) -> Iterator[Entry]:
        for holding in self.held.values():
            yield from holding.entries.values()

    def lanes_waiting(self) -> int:
        """Lanes with an answer that waits for an earlier message; walks the window."""
        return len(
            {
                entry.lane
                for entry in self.entries()
                if entry.stage is Stage.ANSWERED and not entry.lane.ready
            }
        )

    def measure(self) -> None:
        """Measure all completed maps, also those that `is_crowded` has not measured lately."""
        for holding in self.held.values():
            holding.measure()

    def crowded(self) -> frozenset[Partition]:
        """Partitions that take no new messages, because their maps might not hold what finishes."""
        return frozenset(
            partition for partition, holding in self.held.items() if holding.is_crowded()
        )

    # --- inside ----------------------------------------------------------------------------------

    def _move(self, entry: Entry, stage: Stage, now_s: float) -> None:
        entry.stage, entry.since_s = stage, now_s

    def _gone(self, entry: Entry, stage: Stage) -> bool:
        """Whether an entry no longer belongs there. Queue and heap keep entries that were let go
        until they come to the front."""
        return entry.stage is not stage or entry.gone

    def _remove(self, entry: Entry) -> None:
        del entry.holding.entries[entry.message.offset]
        self.messages -= 1
        self.size_bytes -= entry.message.size_bytes
        if entry.stage is Stage.HANDED:
            self.handed -= 1

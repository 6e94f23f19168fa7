"""Verdicts over the evidence of a round: pure, without the service's code.

The words are those of the guarantees. An outcome is a whole set of records or a dead letter. A
call is a repeat if an earlier one for the same message was not failed by the provider, whether
or not its answer arrived anywhere: it was paid for.
"""

from __future__ import annotations

import bisect
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tests.chaos.evidence import Call, Evidence, Letter, Origin, Published, Sent, Struck, origin_of
from tests.chaos.reader import first_complete_sets

Decode = Callable[[int, str], Iterable[range]]
"""Next offset and stored metadata -> runs of offsets beyond it that are finished too."""

HELD_S = 5.0
"""A dead worker held the partitions whose messages it called within this time before."""
RATE_OVER_S = 10.0
"""A worker's rate is taken over this time before its death."""
DEAF_S = 10.0
"""For this long after it can hear again a worker may go on with what it had taken."""


def no_map(next_offset: int, metadata: str) -> Iterable[range]:
    """Metadata that says nothing."""
    return ()


@dataclass(frozen=True, slots=True)
class Limits:
    """What guarantee 2's bound is made of."""

    window: int
    commit_interval_s: float
    commit_s: float = 0.5
    """One commit."""


@dataclass(frozen=True, slots=True)
class Death:
    """A worker killed: what was asked again because of it, and how many that may be at most."""

    struck: Struck
    repeated: int
    bound: float


@dataclass
class Report:
    """Empty lists and zeros are as it should be."""

    messages: int = 0
    lost: list[Origin] = field(default_factory=list)
    """Without an outcome that a reader keeps."""
    foreign: list[str] = field(default_factory=list)
    """Outcomes of messages that are not in the input."""
    duplicates: int = 0
    """Outcomes beyond the first that the reader is left with."""
    raw_duplicates: int = 0
    """Records and dead letters beyond the first of their `sluice.id` of one topic."""
    out_of_order: list[str] = field(default_factory=list)
    """`sluice.id`s whose first appearance comes after a later one of their key."""
    mixed_up: list[str] = field(default_factory=list)
    """`sluice.id`s whose record or key is another message's."""
    repeated_messages: int = 0
    repeated_calls: int = 0
    repeated_after: Counter[str] = field(default_factory=Counter)
    """Repeated calls by the kind of the last fault that had begun before them."""
    retries: int = 0
    """Calls after one that the provider failed."""
    outside: list[Origin] = field(default_factory=list)
    """Called although Kafka had them stored as finished."""
    rewound: list[str] = field(default_factory=list)
    """Stored next offsets that went back."""
    deaths: list[Death] = field(default_factory=list)
    letters: Counter[str] = field(default_factory=Counter)
    recoveries: list[tuple[Struck, float]] = field(default_factory=list)
    """Seconds from a fault until each partition that it concerned had an outcome again."""
    stall_s: float = 0.0
    """The longest time in which a partition with backlog had no outcome."""
    stalled: tuple[int, float] | None = None
    """Which partition that was, and since when."""
    uncommitted: int = 0

    @property
    def recovery_s(self) -> float:
        return max((seconds for _, seconds in self.recoveries), default=0.0)

    @property
    def over_the_bound(self) -> list[Death]:
        return [death for death in self.deaths if death.repeated > death.bound]


def examine(evidence: Evidence, limits: Limits, decode: Decode = no_map) -> Report:
    """Everything that can be said of a round that has ended with lag 0."""
    sent = {message.origin: message for message in evidence.sent}
    sets = list(first_complete_sets(evidence.published))
    outcomes = _outcomes(sets, evidence.letters)
    repeats = _Repeats(evidence)
    report = Report(messages=len(sent), uncommitted=evidence.uncommitted)
    report.lost = sorted(sent.keys() - outcomes.keys())
    report.foreign = sorted(str(origin) for origin in outcomes.keys() - sent.keys())
    report.duplicates = sum(len(times) - 1 for times in outcomes.values())
    report.raw_duplicates = _raw_duplicates(evidence)
    report.out_of_order = [*_inversions(evidence.published), *_inversions(_in_sets(sets))]
    report.mixed_up = list(_mixed_up(evidence.published, sent))
    report.repeated_messages = len({call.text for call in repeats.calls})
    report.repeated_calls = len(repeats.calls)
    report.repeated_after = _last_fault(repeats.calls, evidence.struck)
    report.retries = repeats.retries
    report.outside = sorted(_outside(evidence, decode))
    report.rewound = list(_rewound(evidence))
    report.deaths = [repeats.death(each, limits) for each in evidence.struck if each.kind == "kill"]
    report.letters = Counter(letter.reason for letter in evidence.letters)
    progress = _Progress(evidence, outcomes)
    report.recoveries = [(each, progress.recovery_s(each)) for each in evidence.struck]
    report.stall_s, report.stalled = progress.longest_stall()
    return report


def _outcomes(
    sets: Iterable[Sequence[Published]], letters: Iterable[Letter]
) -> dict[Origin, list[float]]:
    """When each message had the outcomes that a reader keeps: sets by the recipe, and the first
    dead letter of each message."""
    found: dict[Origin, list[float]] = defaultdict(list)
    for records in sets:
        found[origin_of(records[0].header["sluice.id"])].append(max(r.at_s for r in records))
    first: dict[Origin, float] = {}
    for letter in letters:
        first[letter.origin] = min(letter.at_s, first.get(letter.origin, math.inf))
    for origin, at_s in first.items():
        found[origin].append(at_s)
    return found


def _raw_duplicates(evidence: Evidence) -> int:
    records = Counter(record.identity for record in evidence.published)
    letters = Counter((letter.topic_id, letter.origin) for letter in evidence.letters)
    return sum(n - 1 for n in records.values()) + sum(n - 1 for n in letters.values())


def _in_sets(sets: Iterable[Sequence[Published]]) -> Iterator[Published]:
    return (record for records in sets for record in records)


def _inversions(records: Iterable[Published]) -> Iterator[str]:
    """First appearances that come after a later one of their key: within a partition of the
    input, by offset and index."""
    latest: dict[tuple[int, int, bytes, str], tuple[int, int]] = {}
    seen: set[tuple[str, str]] = set()
    for record in records:
        topic_id, sluice_id = record.identity
        if record.key is None or record.identity in seen:
            continue
        seen.add(record.identity)
        origin = origin_of(sluice_id)
        lane = (record.partition, origin.partition, record.key, topic_id)
        place = (origin.offset, int(record.header["sluice.record.index"]))
        if place < latest.get(lane, (-1, -1)):
            yield sluice_id
        else:
            latest[lane] = place


def _mixed_up(records: Iterable[Published], sent: Mapping[Origin, Sent]) -> Iterator[str]:
    for record in records:
        message = sent.get(origin_of(record.header["sluice.id"]))
        if message is None:
            continue
        wanted = message.records
        index = int(record.header["sluice.record.index"])
        value = json.loads(record.value)
        if (
            int(record.header["sluice.record.count"]) != len(wanted)
            or (value["name"], value["age"]) != wanted[index]
            or record.key != message.key
        ):
            yield record.header["sluice.id"]


class _Repeats:
    """The calls of each message in their order, and which of them are repeats."""

    def __init__(self, evidence: Evidence) -> None:
        self.calls: list[Call] = []
        self.retries = 0
        self._before: dict[int, Call] = {}  # a repeat's id() -> the call before it
        self._by_worker: dict[str, list[float]] = defaultdict(list)
        last: dict[str, Call] = {}
        for call in evidence.calls:
            before = last.get(call.text)
            if before is not None and before.failed:
                self.retries += 1
            elif before is not None:
                self.calls.append(call)
                self._before[id(call)] = before
            last[call.text] = call
            self._by_worker[call.worker].append(call.began_s)

    def death(self, struck: Struck, limits: Limits) -> Death:
        """Messages that this worker called before it died, and somebody again after it."""
        repeated = {
            call.text
            for call in self.calls
            if self._before[id(call)].worker == struck.worker
            and self._before[id(call)].began_s <= struck.at_s < call.began_s
        }
        seconds = limits.commit_interval_s + limits.commit_s
        bound = limits.window + self._rate(struck) * seconds
        return Death(struck, len(repeated), bound)

    def _rate(self, struck: Struck) -> float:
        """Calls a second of the worker before its death."""
        began = self._by_worker[struck.worker or ""]
        if not began:
            return 0.0
        since_s = max(struck.at_s - RATE_OVER_S, began[0])
        calls = bisect.bisect(began, struck.at_s) - bisect.bisect_left(began, since_s)
        return calls / max(1.0, struck.at_s - since_s)


def _last_fault(calls: Iterable[Call], struck: Iterable[Struck]) -> Counter[str]:
    faults = sorted(struck, key=lambda each: each.at_s)
    began_s = [each.at_s for each in faults]
    places = (bisect.bisect(began_s, call.began_s) for call in calls)
    return Counter(faults[place - 1].kind if place else "none" for place in places)


def _outside(evidence: Evidence, decode: Decode) -> set[Origin]:
    """Messages called after Kafka had them stored as finished.

    The set of guarantee 2, held against every sample and not only against the one after a
    kill: whoever starts a call has read what was stored, or holds the partition alone. Who
    could not hear (stopped, or cut off) may go on for a moment with what it had taken.
    """
    known_s = _known_as_finished(evidence, decode)
    origins = {message.text: message.origin for message in evidence.sent}
    deaf = [each for each in evidence.struck if each.deaf]
    found = set()
    for call in evidence.calls:
        origin = origins.get(call.text)
        if origin is None or known_s.get(origin, math.inf) >= call.began_s:
            continue
        excused = any(
            each.worker in (None, call.worker)
            and each.at_s <= call.began_s <= each.over_s + DEAF_S
            and known_s[origin] > each.at_s
            for each in deaf
        )
        if not excused:
            found.add(origin)
    return found


def _known_as_finished(evidence: Evidence, decode: Decode) -> dict[Origin, float]:
    """When each message was first seen stored as finished."""
    known: dict[Origin, float] = {}
    highest: dict[int, int] = defaultdict(int)
    for sample in evidence.stored:
        for partition, (next_offset, metadata) in sample.offsets.items():
            runs = [range(highest[partition], next_offset), *decode(next_offset, metadata)]
            highest[partition] = max(highest[partition], next_offset)
            for offset in (offset for run in runs for offset in run):
                known.setdefault(Origin(partition, offset), sample.at_s)
    return known


def _rewound(evidence: Evidence) -> Iterator[str]:
    before: dict[int, int] = {}
    for sample in evidence.stored:
        for partition, (next_offset, _) in sample.offsets.items():
            if next_offset < before.get(partition, 0):
                yield f"partition {partition}: {before[partition]} -> {next_offset}"
            before[partition] = next_offset


class _Progress:
    """When outcomes came, partition by partition of the input."""

    def __init__(self, evidence: Evidence, outcomes: Mapping[Origin, Sequence[float]]) -> None:
        origins = {message.text: message.origin for message in evidence.sent}
        self._finished = {origin: min(times) for origin, times in outcomes.items()}
        self._sent_s: dict[int, list[float]] = defaultdict(list)
        for message in evidence.sent:
            self._sent_s[message.origin.partition].append(message.at_s)
        self._finished_s: dict[int, list[float]] = defaultdict(list)
        for origin, at_s in self._finished.items():
            self._finished_s[origin.partition].append(at_s)
        for times in (*self._sent_s.values(), *self._finished_s.values()):
            times.sort()
        self._calls = [(c, origins[c.text]) for c in evidence.calls if c.text in origins]
        self._began_s = [call.began_s for call, _ in self._calls]

    def recovery_s(self, struck: Struck) -> float:
        """From a fault's end (a kill: at once) until each partition concerned had an outcome of
        a call that began after it; infinite where that never came though there was backlog."""
        since_s = struck.over_s
        waiting = {each for each in self._concerned(struck) if self._backlog(each, since_s)}
        worst_s = 0.0
        for partition in waiting:
            worst_s = max(worst_s, self._first_after(partition, since_s) - since_s)
        return worst_s

    def _first_after(self, partition: int, since_s: float) -> float:
        best_s = math.inf
        # Calls end in another order than they begin: look at all that began before the best end.
        for place in range(bisect.bisect_left(self._began_s, since_s), len(self._calls)):
            call, origin = self._calls[place]
            if call.began_s > best_s:
                break
            at_s = self._finished.get(origin, math.inf)
            if origin.partition == partition and at_s >= call.began_s:
                best_s = min(best_s, at_s)
        return best_s

    def _concerned(self, struck: Struck) -> set[int]:
        """A dead worker's partitions; all where no single worker was hit."""
        if struck.worker is None:
            return set(self._sent_s)
        low = bisect.bisect_left(self._began_s, struck.at_s - HELD_S)
        high = bisect.bisect(self._began_s, struck.at_s)
        return {
            origin.partition
            for call, origin in self._calls[low:high]
            if call.worker == struck.worker
        }

    def _backlog(self, partition: int, at_s: float) -> int:
        """Messages that were there and not finished."""
        sent = bisect.bisect(self._sent_s[partition], at_s)
        return sent - bisect.bisect(self._finished_s[partition], at_s)

    def longest_stall(self) -> tuple[float, tuple[int, float] | None]:
        """Without an outcome while there was backlog: how long, which partition, since when."""
        worst: tuple[float, tuple[int, float] | None] = (0.0, None)
        for partition, sent_s in self._sent_s.items():
            finished_s = self._finished_s[partition]
            for since_s, until_s in zip([sent_s[0], *finished_s], finished_s, strict=False):
                begins_s = since_s
                if not self._backlog(partition, since_s):
                    at = bisect.bisect(sent_s, since_s)
                    begins_s = sent_s[at] if at < len(sent_s) else until_s
                if until_s - begins_s > worst[0]:
                    worst = (until_s - begins_s, (partition, begins_s))
            if len(finished_s) < len(sent_s):
                since_s = finished_s[-1] if finished_s else sent_s[0]
                if (left_s := sent_s[-1] - since_s) > worst[0]:
                    worst = (left_s, (partition, since_s))
        return worst

"""The only look into private parts of the service: named, so that a move of them is one edit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from itertools import chain
from typing import Any

import service.app  # everything that is patched below is imported with it
from service.core.completed import Runs, encode, finished_ranges
from service.core.messages import Partition
from service.core.tracker import Delivery, PartitionTracker
from service.core.window import Entry, Holding, Stage
from service.kafka.group.holdings import Holdings
from service.kafka.sink import KafkaSink
from service.kafka.source import KafkaSource
from service.pipeline import Pipeline
from tests.walk.loop import Violation

assert service.app

# --- what is put in the place of the client ---------------------------------------------------


def _places(name: str) -> list[tuple[Any, str]]:
    """Every module of the service that has it under this name."""
    return [
        (module, name)
        for path, module in tuple(sys.modules.items())
        if path.startswith("service.") and hasattr(module, name)
    ]


_CLIENTS = ("AIOKafkaConsumer", "AIOKafkaProducer", "AIOKafkaAdminClient", "reach")
_MAP_ROOM = ("MAP_CHARS_MAX", "MAP_BITS", "SPAN_SURE", "RUNS_SURE", "MEASURE_AGAIN")
_OTHERS = ("encode", "PartitionTracker", "RETRY_AFTER_MAX_S")
_PLACES = {name: _places(name) for name in (*_CLIENTS, *_MAP_ROOM, *_OTHERS)}


def map_room(chars: int) -> dict[str, Any]:
    """What follows from the room of a map, as core/window.py derives it; and a map never has
    more room than that, although other fields of the metadata would leave it some."""

    def narrow(runs: Runs, chars_max: int) -> str:
        return encode(runs, min(chars, chars_max))

    span = 6 * chars - 16
    sure = {"MAP_BITS": 6 * chars, "SPAN_SURE": span, "RUNS_SURE": span // 8 // 5}
    return {"MAP_CHARS_MAX": chars, "MEASURE_AGAIN": max(1, chars // 4), "encode": narrow, **sure}


@contextmanager
def replaced(**new: Any) -> Iterator[None]:
    """Names of the service stand for something else, wherever they were imported to."""
    before = [(module, name, getattr(module, name)) for n in new for module, name in _PLACES[n]]
    try:
        for module, name, _ in before:
            setattr(module, name, new[name])
        yield
    finally:
        for module, name, old in before:
            setattr(module, name, old)


# --- the pipeline ---------------------------------------------------------------------------------


def held_by(pipeline: Pipeline) -> Mapping[Partition, Holding]:
    return pipeline._window.held


def calling(pipeline: Pipeline) -> Mapping[Entry, None]:
    return pipeline._window.calling


def is_idle(pipeline: Pipeline) -> bool:
    """Nothing is in the window and no slot is taken, so that nobody can be stuck in there."""
    window = pipeline._window
    return not (window.messages or window.calling or pipeline._admission.busy)


def attempt_of(pipeline: Pipeline, entry: Entry) -> object:
    return pipeline._calls._turns.get(entry)


def busy(pipeline: Pipeline) -> int:
    """Slots that are taken."""
    return pipeline._admission.busy


def count_hedges(pipeline: Pipeline) -> Callable[[], int]:
    """How many second calls run, from now on: the one that is not the first of its attempt."""
    running = 0
    asked: dict[Entry, int] = {}
    asking = pipeline._calls._asking
    watched, once = asking._watched, asking._once

    async def counting(entry: Entry, turn: Any) -> Any:
        asked[entry] = 0
        try:
            return await watched(entry, turn)
        finally:
            del asked[entry]

    async def counted(entry: Entry) -> Any:
        nonlocal running
        second = asked.get(entry, 0) > 0
        if entry in asked:
            asked[entry] += 1
        running += second
        try:
            return await once(entry)
        finally:
            running -= second

    asking._watched = counting  # type: ignore[method-assign]
    asking._once = counted  # type: ignore[method-assign]
    return lambda: running


def retries_due_s(pipeline: Pipeline) -> Iterator[tuple[float, Entry]]:
    """When each message that waits for another attempt may be asked again."""
    for due_s, _, entry in pipeline._window._retries:
        if entry.stage is Stage.RETRYING and not entry.gone:
            yield due_s, entry


RETRY_AFTER_MAX_S = 90.0
"""Stands for the service's cap of a Retry-After: a quarter of an hour takes much CPU."""

RETRY_WAIT_MAX_S = 2 * RETRY_AFTER_MAX_S + 60.0
"""What a provider may ask for, the jitter upon it, and our own backoff."""


def sleeps_unwoken(pipeline: Pipeline, now_s: float) -> str | None:
    """A message could be called now, and nothing will see to it: says which."""
    calls = pipeline._calls
    if not pipeline._tasks.is_open or not pipeline._phase.may_call:
        return None
    admission, window = pipeline._admission, pipeline._window
    if calls._wake is not None and not calls._wake.cancelled():
        return None
    if admission.routes.probe_is_out:
        return None
    if not admission.routes.closed:
        waits = any(e.stage in (Stage.QUEUED, Stage.RETRYING) for e in window.entries())
        idle = not window.messages or (pipeline._phase.draining and not waits)
        return None if idle else "the circuit is open and no probe is due"
    if next(retries_due_s(pipeline), None) is not None and not window.next_queued():
        return "a message waits for another attempt and no timer is set"
    entry = window.next_queued()
    if entry is None or calls._alone is not None or (entry.alone and window.calling):
        return None
    if admission.full(now_s):
        return None if admission.busy else "no call runs, and no slot is free"
    return f"{entry.message.coordinates} waits for a call that nothing will begin"


def lanes_asleep(pipeline: Pipeline) -> str | None:
    """An outcome that could be handed over, and nobody does."""
    if not pipeline._tasks.is_open or not pipeline._phase.may_publish:
        return None
    at_work, resting = pipeline._publishing._at_work, pipeline._publishing._resting
    for holding in pipeline._window.held.values():
        for lane in holding.lanes.values():
            if lane.ready and lane not in at_work and lane not in resting:
                return f"a lane of {holding.given} has an outcome that nobody hands over"
    return None


def left_over(pipeline: Pipeline) -> list[str]:
    """What was not given back at the end of a run."""
    window, calls = pipeline._window, pipeline._calls
    parts = {
        "slots": pipeline._admission.busy,
        "calls": len(window.calling),
        "turns": len(calls._turns),
        "messages": window.messages,
        "bytes": window.size_bytes,
        "handed": window.handed,
        "tasks": len(pipeline._tasks._working),
        "outcomes with the sink": len(pipeline._publishing._sent),
        "lanes at work": len(pipeline._publishing._at_work),
        "streams": len(calls._asking._streaming._running),
        "waiters": len(pipeline._conditions._waiting),
    }
    return [f"{count} {name}" for name, count in parts.items() if count]


# --- the source and the sink -------------------------------------------------------------------


def holdings_of(source: KafkaSource) -> Holdings | None:
    return None if source._member is None else source._member.holdings


def consumer_of(source: KafkaSource) -> Any:
    return source._consumer


def set_wall_clock(source: KafkaSource, wall_s: Callable[[], float]) -> None:
    source._due._wall_ms = lambda: int(wall_s() * 1000)


def forgotten(source: KafkaSource, assigned: AbstractSet[Partition]) -> set[Partition]:
    """Partitions that the group has given and that are neither held, nor to be restored, nor held
    out with a sentence."""
    member = source._member
    if not assigned or member is None or member.holdings.closed or not member.settled:
        return set()
    holdings = member.holdings
    if assigned <= holdings.held.keys():
        return set()
    given = frozenset() if holdings.unrestored is None else holdings.unrestored.partitions
    return set(assigned - holdings.held.keys() - given - member.restore.held_out.keys())


def held_out(source: KafkaSource) -> set[Partition]:
    """Partitions of which a person has to say from where to read, and is told so."""
    member = source._member
    if member is None:
        return set()
    told = {each for each, problem in member.positions.unreadable.items() if problem}
    return told | member.restore.held_out.keys()


def sink_left_over(sink: KafkaSink) -> list[str]:
    left = [f"{len(sink._sending._tasks)} tasks of sending"] if sink._sending._tasks else []
    if sink.transactions is not None and sink.transactions._writers:
        left.append(f"{len(sink.transactions._writers)} writers")
    return left


# --- the tracker, against a model of sets --------------------------------------------------------

TRACKED_FOR_EACH = 6
"""Values that a tracker may keep for each unfinished offset, or run of what others finished."""


class CheckedTracker(PartitionTracker):
    """Each answer is compared with what sets of offsets say."""

    def __init__(self, next_offset: int, finished_before: tuple[range, ...] = ()) -> None:
        super().__init__(next_offset, finished_before)
        self.before = frozenset(chain(*finished_before))
        self.runs_before = len(finished_before)
        self.at = next_offset
        self.last = next_offset - 1
        self.open: set[int] = set()
        self.ended: set[int] = set()

    def deliver(self, offset: int, timestamp_ms: int) -> Delivery:
        known = offset <= self.last
        found = super().deliver(offset, timestamp_ms)
        by_others = offset in self.before
        right = Delivery.KNOWN if known else Delivery.FINISHED if by_others else Delivery.NEW
        if found is not right:
            raise Violation(f"offset {offset} is {right}, and the tracker says {found}")
        self.last = max(self.last, offset)
        if right is Delivery.NEW:
            self.open.add(offset)
        elif right is Delivery.FINISHED:
            self.ended.add(offset)
        self._see_size()
        return found

    def advance(self, position: int) -> None:
        super().advance(position)
        self.at = max(self.at, position)

    def finish(self, offset: int) -> None:
        super().finish(offset)
        if offset not in self.open:
            raise Violation(f"offset {offset} finished twice, or was never delivered")
        self.open.discard(offset)
        self.ended.add(offset)
        self._see_size()

    def progress(self, finishing: frozenset[int] = frozenset()) -> Any:
        next_offset, runs = super().progress(finishing)
        unfinished = self.open - finishing
        beyond = max(self.at, self.last + 1)
        first = min(unfinished, default=beyond)
        while not unfinished and first in self.before:
            first += 1
        if next_offset != first:
            raise Violation(f"next is {first}, and the tracker says {next_offset}")
        maps = finished_ranges(next_offset, runs)
        mapped = set(chain(*maps))
        for offset in range(first, max(beyond, maps[-1].stop if maps else 0)):
            in_map, by_others = offset in mapped, offset in self.before
            may = by_others if offset >= beyond else offset not in unfinished
            must = offset in self.ended or offset in finishing or (by_others and offset >= beyond)
            if in_map is not must and not (in_map and may):  # of a hole both are right
                raise Violation(f"offset {offset}: in the map {in_map}, finished {must}")
        return next_offset, runs

    def _see_size(self) -> None:
        slots = (getattr(self, name) for name in PartitionTracker.__slots__)
        size = sum(len(each) for each in slots if hasattr(each, "__len__"))
        if size > TRACKED_FOR_EACH * (len(self.open) + self.runs_before + 1):
            raise Violation(f"the tracker keeps {size} values for {len(self.open)} unfinished")

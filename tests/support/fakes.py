"""A broker, a model and a checker in memory, for pipeline tests under virtual time.

The fakes assert their invariants on every call: a check at the end of a run would miss a
publish that came after its commit. Source and sink stand under the same contract suites as the
Kafka adapters (tests/contract), so what they do is what Kafka does, and no more.
"""

import asyncio
import itertools
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from service.core.admission.budgets import Estimate
from service.core.completed import finished_ranges
from service.core.errors import CommitFailed, OutputTooLarge, PublishFailed
from service.core.lanes import Ordering
from service.core.messages import (
    Aborted,
    Batch,
    Extracted,
    Headers,
    Message,
    Part,
    Partition,
    Passed,
    Postponed,
    Provenance,
    Publishable,
    Reason,
    Record,
    Rejected,
)
from service.core.tracker import Given, Progress
from service.kafka.sending.lane_failures import LaneFailures
from service.ports import Assignment, Publish

PROVENANCE = Provenance("fake", "p", "s", calls=1)
TOPIC = "in"


def partition(number: int = 0) -> Partition:
    return Partition(TOPIC, number)


def extracted(text: str) -> Extracted:
    return Extracted((Record(text.encode()),), PROVENANCE, answer_id=text)


class Logged(NamedTuple):
    """What a log holds at one offset."""

    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int


@dataclass
class Log:
    """One partition: values by offset; a hole (marker, compacted) is an offset without one."""

    values: dict[int, Logged] = field(default_factory=dict)
    end: int = 0

    def append(
        self,
        value: bytes | None,
        key: bytes | None = None,
        headers: Headers = (),
        timestamp_ms: int = 0,
    ) -> int:
        offset, self.end = self.end, self.end + 1
        self.values[offset] = Logged(key, value, headers, timestamp_ms)
        return offset

    def hole(self) -> None:
        """A transaction marker, an aborted message, or one that compaction removed."""
        self.end += 1


class FakeBroker:
    """Logs, committed offsets and published outcomes, shared by any number of members."""

    def __init__(self, partitions: int = 1, topic: str = TOPIC) -> None:
        self.topic = topic
        self.logs = {Partition(topic, n): Log() for n in range(partitions)}
        self.stored: dict[Partition, Progress] = {}
        self.published: list[tuple[Message, Publishable]] = []
        self.acknowledged: dict[Partition, set[int]] = defaultdict(set)

    def append(self, text: str, key: str | None = None, number: int = 0) -> int:
        return self.logs[Partition(self.topic, number)].append(
            text.encode(), None if key is None else key.encode()
        )

    @property
    def committed(self) -> dict[Partition, int]:
        """Next offsets, of partitions of which something is finished."""
        return {where: at.next_offset for where, at in self.stored.items() if at.next_offset}

    def check_commit(self, where: Partition, progress: Progress) -> None:
        """Everything below a committed offset, or in its map, has an acknowledged outcome."""
        delivered = self.logs[where].values if where in self.logs else {}
        finished = (
            range(progress.next_offset),
            *finished_ranges(progress.next_offset, progress.runs),
        )
        missing = [
            offset
            for offset in delivered
            if offset not in self.acknowledged[where] and any(offset in each for each in finished)
        ]
        assert not missing, f"committed {where} {progress} before the outcomes of {missing}"

    def outcomes(self, number: int = 0) -> list[int]:
        """Offsets of one partition in the order of their first publish."""
        where = Partition(self.topic, number)
        return list(dict.fromkeys(m.offset for m, _ in self.published if m.partition == where))

    def texts(self) -> list[str]:
        """What was published, in order."""
        return [
            outcome.records[0].json.decode()
            for _, outcome in self.published
            if isinstance(outcome, Extracted)
        ]


class FakeSource:
    """One member of a group on a `FakeBroker`; rebalances when the test says so."""

    def __init__(self, broker: FakeBroker, *, poll_wait_s: float = 0.2) -> None:
        self.broker = broker
        self.poll_wait_s = poll_wait_s
        self.positions: dict[Partition, int] = {}
        self.given: dict[Partition, Given] = {}
        self.refuse_commits = 0
        self.exactly_once = False  # stores what holds when it stores it, not when it was asked
        self.commits: list[dict[Partition, Progress]] = []
        self.polls: list[int] = []
        self.assignment: Assignment | None = None
        self.commit_s = 0.001
        self.before_storing: Callable[[], Awaitable[None]] = self._reach_the_coordinator
        self._numbers = itertools.count(1)  # of epochs
        self._turns = itertools.count()  # which partition a poll begins with
        self._before: dict[Partition, Given] = {}  # what a revoke has taken away
        self._reassigning = False

    # --- what the group does to it -------------------------------------------------------------

    def assign(self, assignment: Assignment, numbers: range | None = None) -> None:
        """The first assignment."""
        self.assignment = assignment
        everything = self.broker.logs.keys()
        self.hold(fresh={p for p in everything if numbers is None or p.partition in numbers})

    async def rebalance(
        self,
        keep: AbstractSet[Partition] = frozenset(),
        fresh: AbstractSet[Partition] = frozenset(),
    ) -> None:
        """Revoke everything, then hold `keep` with their epochs and `fresh` with new ones."""
        await self.revoke()
        await asyncio.sleep(0.01)
        self.hold(keep, fresh)

    async def revoke(self) -> None:
        """Everything is in question: the pipeline may finish and commit, then nothing is held."""
        assert self.assignment is not None
        self._reassigning = True
        if self.given:
            await self.assignment.revoked()
        self._before, self.given = self.given, {}

    def hold(
        self,
        keep: AbstractSet[Partition] = frozenset(),
        fresh: AbstractSet[Partition] = frozenset(),
    ) -> None:
        """What comes after a revoke: `keep` go on where they were, `fresh` where Kafka says."""
        assert self.assignment is not None
        assert not keep & fresh
        self.given = {where: self._before[where] for where in sorted(keep)}
        for where in sorted(fresh):
            before = self.broker.stored.get(where, Progress(0))
            progress = replace(before, unclean_ends=before.unclean_ends + 1)
            self.given[where] = Given(next(self._numbers), progress)
            self.broker.stored[where] = progress
            self.positions[where] = progress.next_offset
        self._reassigning = False
        self.assignment.assigned(dict(self.given))

    def give_anew(self, where: Partition) -> None:
        """A partition that was fenced is restored and given again, without a revoke before it."""
        assert self.assignment is not None
        before = self.broker.stored[where]
        self.given = {**self.given, where: Given(next(self._numbers), before)}
        self.positions[where] = before.next_offset
        self.assignment.assigned(dict(self.given))

    @property
    def epochs(self) -> dict[Partition, int]:
        return {where: each.epoch for where, each in self.given.items()}

    def fetch_again(self) -> None:
        """Deliver once more what is not committed; no contract says that it never happens."""
        self.positions = {where: self.broker.committed.get(where, 0) for where in self.epochs}

    # --- Source --------------------------------------------------------------------------------

    async def poll(self, limit: int, closed: AbstractSet[Partition]) -> Batch:
        self.polls.append(limit)
        ready = any(self._behind(where) for where in self.epochs if where not in closed)
        waits = limit > 0 and (self._reassigning or not ready)
        await asyncio.sleep(self.poll_wait_s if waits else 0.0)
        if self._reassigning:
            return Batch()
        # No wait from here on: positions belong to these messages.
        messages = self._take([where for where in self.epochs if where not in closed], limit)
        positions = {p: self.positions[p] for p in self.epochs}
        ends = {p: self.broker.logs[p].end for p in self.epochs}
        return Batch(tuple(messages), positions, ends)

    def _behind(self, where: Partition) -> bool:
        return self.positions[where] < self.broker.logs[where].end

    def _take(self, open_: list[Partition], limit: int) -> list[Message]:
        """Partitions take turns, so that a small limit is filled from all of them."""
        if not open_ or not limit:
            return []
        share = -(-limit // len(open_))
        first = next(self._turns) % len(open_)
        messages: list[Message] = []
        for where in open_[first:] + open_[:first]:
            messages += self._fetch(where, min(share, limit - len(messages)))
        return messages

    def _fetch(self, where: Partition, limit: int) -> list[Message]:
        log, found = self.broker.logs[where], []
        while self._behind(where):
            offset = self.positions[where]
            if offset in log.values:
                if len(found) >= limit:
                    break
                found.append(Message(where, offset, self.epochs[where], *log.values[offset]))
            self.positions[where] += 1
        return found

    async def commit(self, partitions: AbstractSet[Partition]) -> None:
        assert self.assignment is not None
        progress = self._progress(partitions)
        held = self._held(partitions)
        if self.refuse_commits:
            self.refuse_commits -= 1
            raise CommitFailed("refused")
        await self.before_storing()
        if held != self._held(partitions):
            raise CommitFailed("rebalance")
        if self.exactly_once:
            progress = self._progress(partitions)
        for where, each in progress.items():
            before = self.broker.stored.get(where, Progress(0))
            assert each.next_offset >= before.next_offset, "an offset was moved back"
        self.broker.stored.update(progress)
        self.commits.append(progress)
        for where, each in progress.items():
            self.assignment.stored(where, each)

    def _progress(self, partitions: AbstractSet[Partition]) -> dict[Partition, Progress]:
        assert self.assignment is not None
        wanted = {
            # A transaction that has just ended is not forgotten, heard of or not.
            where: self.assignment.progress(
                where, frozenset(self.broker.acknowledged[where] if self.exactly_once else ())
            )
            for where in partitions
        }
        progress = {where: each for where, each in wanted.items() if each is not None}
        for where, each in progress.items():
            self.broker.check_commit(where, each)
        return progress

    async def _reach_the_coordinator(self) -> None:
        await asyncio.sleep(self.commit_s)

    def _held(self, wanted: Iterable[Partition]) -> dict[Partition, int]:
        if not set(wanted) <= self.epochs.keys():
            raise CommitFailed("rebalance")
        return {where: self.epochs[where] for where in wanted}


PROBE = "probe"
"""The text of a probe, for latencies."""


class FakeExtractor:
    """A model with latencies and scripted results; knows what is in flight."""

    def __init__(self, latency_s: Callable[[str], float] = lambda _: 0.1) -> None:
        self.latency_s = latency_s
        self.scripts: dict[str, list[BaseException | Rejected]] = defaultdict(list)
        self.always: BaseException | None = None
        self.calls: list[str] = []
        self.progress: list[object | None] = []
        self.in_flight: list[str] = []
        self.in_flight_max = 0
        self.cancelled: list[str] = []
        self.tokens: Callable[[str], int] = lambda _: 0  # of a call for this text
        self.probes = 0
        self.probe_fails: BaseException | None = None
        self.deadly: set[str] = set()  # texts on which the user's code takes the process down
        self.died = asyncio.Event()

    async def call(self, text: str, progress: object | None) -> Extracted | Rejected:
        self.calls.append(text)
        self.progress.append(progress)
        self.in_flight.append(text)
        self.in_flight_max = max(self.in_flight_max, len(self.in_flight))
        try:
            await asyncio.sleep(self.latency_s(text))
        except asyncio.CancelledError:
            self.cancelled.append(text)
            raise
        finally:
            self.in_flight.remove(text)
        if text in self.deadly:
            self.died.set()
            await asyncio.sleep(1e9)
        if self.always is not None:
            raise self.always
        if self.scripts[text]:
            result = self.scripts[text].pop(0)
            if isinstance(result, BaseException):
                raise result
            return result
        return extracted(text)

    def estimate(self, text: str, progress: object | None) -> Estimate:
        return Estimate(self.tokens(text), self.tokens(text))

    def route(self, progress: object | None) -> str:
        return ""

    async def probe(self, route: str = "") -> None:
        self.probes += 1
        await asyncio.sleep(self.latency_s(PROBE))
        failure = self.probe_fails or self.always
        if failure is not None:
            raise failure


class FakeStreams:
    """Writes a record each `record_s`; what happens to an answer half way is scripted."""

    def __init__(self, records: int = 4, record_s: float = 1.0) -> None:
        self.records, self.record_s = records, record_s
        self.breaks: list[tuple[int, BaseException | Rejected | None]] = []
        """For each answer: after how many records, and how; None asks the model again."""
        self.answers = itertools.count(1)
        self.cancelled = 0

    async def stream(
        self, text: str, progress: object | None, publish: Publish
    ) -> Extracted | Rejected:
        while True:
            answer = f"{text} {next(self.answers)}"
            after, how = self.breaks.pop(0) if self.breaks else (self.records, _WHOLE)
            try:
                await self._write(answer, after - (how is _WHOLE), publish)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            if how is _WHOLE:
                last = (Record(f"{answer} {after - 1}".encode()),) if after else ()
                return Extracted(last, PROVENANCE, answer, earlier=after - len(last))
            if isinstance(how, BaseException):
                raise how
            if how is not None:
                return how

    async def _write(self, answer: str, records: int, publish: Publish) -> None:
        for index in range(records):
            await asyncio.sleep(self.record_s)
            await publish(Part(Record(f"{answer} {index}".encode()), index, answer, PROVENANCE))
        await asyncio.sleep(self.record_s)


_WHOLE = Rejected(Reason.INVALID, "stands for an answer that ends as it should")


class FakeSink:
    """Acknowledges in order of hand-over after `ack_s`; can fail chosen sends.

    A failed send fails everything handed over and not settled yet, as a replaced producer does,
    and what comes later in its lane until it is sent again: nothing overtakes it.
    """

    def __init__(
        self,
        broker: FakeBroker,
        *,
        ordering: Ordering = "key",
        ack_s: float = 0.005,
        record_max_bytes: int | None = None,
        limit_known: bool = True,
    ) -> None:
        self.broker = broker
        self.ack_s = ack_s
        self.record_max_bytes = record_max_bytes
        self.limit_known = limit_known  # else it is met only when the broker refuses
        self.buffer_s = 0.0  # how long a hand-over waits for room
        self.failures: dict[int, list[Exception]] = defaultdict(list)  # by offset
        self.flaky: Callable[[], bool] = lambda: False
        self.loses_acknowledgement: Callable[[], bool] = lambda: False
        self.handed: list[int] = []
        self.down = False
        self.streaming = False  # records go out before their message has its outcome
        self._producer = 0
        self._failed = LaneFailures(ordering)
        self._pending: deque[tuple[Message, Publishable, asyncio.Future[None], int]] = deque()

    async def publish(self, message: Message, outcome: Publishable) -> asyncio.Future[None]:
        if self.buffer_s:
            await asyncio.sleep(self.buffer_s)
        loop = asyncio.get_running_loop()
        acknowledged: asyncio.Future[None] = loop.create_future()
        if not self._is_piece(outcome):
            self._check_streamed(message)
        if self.down:
            self._fail(message, acknowledged, PublishFailed("down"))
        elif not _has_output(outcome):
            self._land(message, outcome)
            self._acknowledge(message, outcome, acknowledged)
        elif self.limit_known and self._too_large(outcome):
            self._fail(message, acknowledged, OutputTooLarge())
        else:
            self._hand_over(message, outcome, acknowledged)
        return acknowledged

    def _check_streamed(self, message: Message) -> None:
        """An outcome comes behind all that was published while its answer was written."""
        pending = [p for m, p, future, _ in self._pending if m == message and not future.done()]
        landing = any(map(self._is_piece, pending))
        assert not landing, f"{message.coordinates} ended before its records had landed"

    def _is_piece(self, outcome: Publishable) -> bool:
        """It does not finish its message: more follows, be it an outcome without records."""
        if isinstance(outcome, Extracted):
            return self.streaming and bool(outcome.records)
        return isinstance(outcome, Part | Aborted)

    def forget(self) -> None:
        """The process has died: what had not landed never will."""
        self._pending.clear()

    def _hand_over(
        self, message: Message, outcome: Publishable, acknowledged: asyncio.Future[None]
    ) -> None:
        try:
            self._failed.let_pass(message)
        except PublishFailed as failure:
            self._fail(message, acknowledged, failure)
            return
        self.handed.append(message.offset)
        self._pending.append((message, outcome, acknowledged, self._producer))
        asyncio.get_running_loop().call_later(self.ack_s, self._settle)

    def _settle(self) -> None:
        # First in, first out: timers that are due at the same time come in no certain order.
        message, outcome, acknowledged, producer = self._pending.popleft()
        if acknowledged.done():
            return  # withdrawn
        failure = self._failure(message, outcome, producer)
        if failure is None:
            self._land(message, outcome)
            failure = PublishFailed("unknown") if self.loses_acknowledgement() else None
        if failure is None:
            self._acknowledge(message, outcome, acknowledged)
            return
        if isinstance(failure, PublishFailed) and producer == self._producer:
            self._producer += 1
        self._fail(message, acknowledged, failure)
        if isinstance(failure, PublishFailed) and (lane := self._failed.lane(message)):
            for behind, _, future, _ in self._pending:
                if self._failed.lane(behind) == lane and not future.done():
                    self._fail(behind, future, PublishFailed("behind a failed one"))

    def _failure(self, message: Message, outcome: Publishable, producer: int) -> Exception | None:
        if producer != self._producer or self.down:
            return PublishFailed("behind a failed one")
        if self.failures[message.offset]:
            failure = self.failures[message.offset].pop(0)
            # A dead letter is never too large: it shrinks, or it is held.
            held = isinstance(failure, OutputTooLarge) and isinstance(outcome, Rejected)
            return PublishFailed("held") if held else failure
        if self._too_large(outcome):
            return OutputTooLarge()
        return PublishFailed("flaky") if self.flaky() else None

    def _too_large(self, outcome: Publishable) -> bool:
        if self.record_max_bytes is None:
            return False
        if isinstance(outcome, Part):
            return len(outcome.record.json) > self.record_max_bytes
        if not isinstance(outcome, Extracted):
            return False
        return any(len(record.json) > self.record_max_bytes for record in outcome.records)

    def _land(self, message: Message, outcome: Publishable) -> None:
        self.broker.published.append((message, outcome))

    def _acknowledge(
        self, message: Message, outcome: Publishable, acknowledged: asyncio.Future[None]
    ) -> None:
        if not self._is_piece(outcome):
            self.broker.acknowledged[message.partition].add(message.offset)
        acknowledged.set_result(None)

    def _fail(
        self, message: Message, acknowledged: asyncio.Future[None], failure: Exception
    ) -> None:
        if isinstance(failure, PublishFailed):
            self._failed.add(message)
        acknowledged.set_exception(failure)
        acknowledged.exception()  # a lane that was dropped hears of it from nobody: no complaint


class FakeTransactions(FakeSink):
    """Lands an outcome together with the progress that it makes, or neither of them."""

    def __init__(self, source: FakeSource, *, ordering: Ordering = "key") -> None:
        super().__init__(source.broker, ordering=ordering)
        self._source = source
        source.exactly_once = True

    def _failure(self, message: Message, outcome: Publishable, producer: int) -> Exception | None:
        failure = super()._failure(message, outcome, producer)
        given = self._source.given.get(message.partition)
        if failure is None and (given is None or given.epoch != message.epoch):
            return PublishFailed("not ours")
        return failure

    def _land(self, message: Message, outcome: Publishable) -> None:
        super()._land(message, outcome)
        if not _has_output(outcome):
            return  # no transaction: its offset is stored with the next one
        assert self._source.assignment is not None
        where = message.partition
        self.broker.acknowledged[where].add(message.offset)
        finishing = frozenset(self.broker.acknowledged[where])
        progress = self._source.assignment.progress(where, finishing)
        assert progress is not None, "published for a partition that is not held"
        self.broker.check_commit(where, progress)
        self.broker.stored[where] = progress
        self._source.assignment.stored(where, progress)


def _has_output(outcome: Publishable) -> bool:
    """Skipped, or an answer without records, puts nothing into Kafka."""
    match outcome:
        case Extracted():
            return bool(outcome.records)
        case Passed() | Rejected() | Postponed() | Part() | Aborted():
            return True
        case _:
            return False

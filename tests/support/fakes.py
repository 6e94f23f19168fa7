"""A broker, a model and a checker in memory, for pipeline tests under virtual time.

The fakes assert their invariants on every call: a check at the end of a run would miss a
publish that came after its commit.
"""

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from service.core.errors import CommitFailed, PublishFailed
from service.core.messages import (
    Batch,
    Extracted,
    Message,
    Outcome,
    Partition,
    Provenance,
    Record,
    Rejected,
)
from service.pipeline import Assignment

PROVENANCE = Provenance("fake", "p", "s", calls=1)


def partition(number: int = 0) -> Partition:
    return Partition("in", number)


def extracted(text: str) -> Extracted:
    return Extracted((Record(text.encode()),), PROVENANCE, answer_id=text)


@dataclass
class Log:
    """One partition: values by offset; a hole (marker, compacted) is an offset without one."""

    values: dict[int, tuple[bytes | None, bytes | None]] = field(default_factory=dict)
    end: int = 0

    def append(self, value: bytes | None, key: bytes | None = None) -> int:
        offset, self.end = self.end, self.end + 1
        self.values[offset] = (key, value)
        return offset

    def hole(self) -> None:
        """A transaction marker, or a message that compaction removed."""
        self.end += 1


class FakeBroker:
    """Logs, committed offsets and published outcomes, shared by any number of members."""

    def __init__(self, partitions: int = 1) -> None:
        self.logs = {partition(n): Log() for n in range(partitions)}
        self.committed: dict[Partition, int] = {}
        self.published: list[tuple[Message, Outcome]] = []
        self.acknowledged: dict[Partition, set[int]] = defaultdict(set)

    def append(self, text: str, key: str | None = None, number: int = 0) -> int:
        return self.logs[partition(number)].append(
            text.encode(), None if key is None else key.encode()
        )

    def check_commit(self, where: Partition, offset: int) -> None:
        """Everything below a committed offset has an acknowledged outcome."""
        missing = [
            o for o in self.logs[where].values if o < offset and o not in self.acknowledged[where]
        ]
        assert not missing, f"committed {where}@{offset} before the outcomes of {missing}"

    def outcomes(self, number: int = 0) -> list[int]:
        """Offsets of one partition in the order of their first acknowledged publish."""
        seen = dict.fromkeys(
            m.offset for m, _ in self.published if m.partition == partition(number)
        )
        return list(seen)

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
        self.epochs: dict[Partition, int] = {}
        self.epoch = 0
        self.refuse_commits = 0
        self.commits: list[dict[Partition, int]] = []
        self.polls: list[int] = []
        self.assignment: Assignment | None = None
        self.commit_s = 0.001
        self._between = False

    def assign(self, assignment: Assignment, numbers: range | None = None) -> None:
        """The first assignment."""
        self.assignment = assignment
        chosen = self.broker.logs if numbers is None else [partition(n) for n in numbers]
        self._hold(dict.fromkeys(chosen))

    async def rebalance(
        self,
        keep: AbstractSet[Partition] = frozenset(),
        fresh: AbstractSet[Partition] = frozenset(),
    ) -> None:
        """Revoke everything, then hold `keep` with their epochs and `fresh` with new ones."""
        assert self.assignment is not None
        await self.assignment.revoked()
        self._between = True
        await asyncio.sleep(0.01)
        self._hold({**dict.fromkeys(fresh), **{p: self.epochs[p] for p in keep}})
        self._between = False

    def _hold(self, epochs: Mapping[Partition, int | None]) -> None:
        assert self.assignment is not None
        self.epochs = {}
        for where, known in epochs.items():
            if known is None:
                self.epoch += 1
            self.epochs[where] = self.epoch if known is None else known
            self.positions[where] = self.broker.committed.get(where, 0)
        self.assignment.assigned(dict(self.epochs))

    async def poll(self, limit: int, closed: AbstractSet[Partition]) -> Batch:
        self.polls.append(limit)
        while self._between:
            await asyncio.sleep(0.01)
        messages: list[Message] = []
        if not any(self.positions[p] < self.broker.logs[p].end for p in self.epochs) or not limit:
            await asyncio.sleep(self.poll_wait_s)
        for where in self.epochs:
            if where not in closed:
                messages += self._fetch(where, limit - len(messages))
        positions = {p: self.positions[p] for p in self.epochs}
        ends = {p: self.broker.logs[p].end for p in self.epochs}
        return Batch(tuple(messages), positions, ends)

    def _fetch(self, where: Partition, limit: int) -> list[Message]:
        log, found = self.broker.logs[where], []
        while self.positions[where] < log.end:
            offset = self.positions[where]
            if offset in log.values:
                if len(found) >= limit:
                    break
                key, value = log.values[offset]
                found.append(Message(where, offset, self.epochs[where], key, value, (), 0))
            self.positions[where] += 1
        return found

    async def commit(self, offsets: Mapping[Partition, int]) -> None:
        for where, offset in offsets.items():
            self.broker.check_commit(where, offset)
        if self._between or not offsets.keys() <= self.epochs.keys():
            raise CommitFailed("rebalance")
        if self.refuse_commits:
            self.refuse_commits -= 1
            raise CommitFailed("refused")
        await asyncio.sleep(self.commit_s)
        for where, offset in offsets.items():
            assert offset >= self.broker.committed.get(where, 0), "an offset was moved back"
        self.broker.committed.update(offsets)
        self.commits.append(dict(offsets))


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
        if self.always is not None:
            raise self.always
        if self.scripts[text]:
            result = self.scripts[text].pop(0)
            if isinstance(result, BaseException):
                raise result
            return result
        return extracted(text)


class FakeSink:
    """Acknowledges in order of hand-over after `ack_s`; can fail chosen sends.

    A failed send fails everything handed over and not settled yet, as a replaced producer does,
    so that nothing later overtakes it.
    """

    def __init__(self, broker: FakeBroker, *, ack_s: float = 0.005) -> None:
        self.broker = broker
        self.ack_s = ack_s
        self.buffer_s = 0.0  # how long a hand-over waits for room
        self.failures: dict[int, list[Exception]] = defaultdict(list)  # by offset
        self.flaky: Callable[[], bool] = lambda: False
        self.handed: list[int] = []
        self.down = False
        self._producer = 0
        self._pending: deque[tuple[Message, Outcome, asyncio.Future[None], int]] = deque()

    async def publish(self, message: Message, outcome: Outcome) -> asyncio.Future[None]:
        if self.buffer_s:
            await asyncio.sleep(self.buffer_s)
        if self.down:
            raise PublishFailed
        self.handed.append(message.offset)
        loop = asyncio.get_running_loop()
        acknowledged: asyncio.Future[None] = loop.create_future()
        self._pending.append((message, outcome, acknowledged, self._producer))
        loop.call_later(self.ack_s, self._settle)
        return acknowledged

    def _settle(self) -> None:
        # First in, first out: timers that are due at the same time come in no certain order.
        message, outcome, acknowledged, producer = self._pending.popleft()
        if acknowledged.done():
            return
        if self.failures[message.offset]:
            failure = self.failures[message.offset].pop(0)
            if isinstance(failure, PublishFailed):
                self._producer += 1
            acknowledged.set_exception(failure)
        elif producer != self._producer or self.down or self.flaky():
            self._producer += producer == self._producer
            acknowledged.set_exception(PublishFailed())
        else:
            self.broker.published.append((message, outcome))
            self.broker.acknowledged[message.partition].add(message.offset)
            acknowledged.set_result(None)

"""Kafka as its client sees it: a group, logs, offsets, producers, transactions, in memory.

A request leaves at the call and arrives a little later, whoever waits for it or not; a request of
one client never overtakes another of its own. What a broker does is done at the arrival. Faults
hold for a while (`Faults`); which request they hit is drawn.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from aiokafka import TopicPartition
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    IllegalGenerationError,
    IllegalStateError,
    KafkaConnectionError,
    KafkaError,
    MessageSizeTooLargeError,
    NodeNotReadyError,
    NotEnoughReplicasError,
    OffsetOutOfRangeError,
    OutOfOrderSequenceNumber,
    ProducerFenced,
    RebalanceInProgressError,
    RequestTimedOutError,
    UnknownMemberIdError,
    UnknownTopicOrPartitionError,
)
from aiokafka.producer.transaction_manager import TransactionState
from aiokafka.protocol.offset import OffsetRequest
from aiokafka.structs import ConsumerRecord, OffsetAndMetadata

from service.core.messages import Headers, Partition
from service.kafka.client.stable_offsets import UNSTABLE_OFFSET_COMMIT
from service.kafka.client.stored import Stored
from tests.walk.ledger import Ledger
from tests.walk.loop import Violation

LATENCIES_S = (0.0, 0.01, 0.01, 0.01, 0.02, 0.05)
"""Multiples of a hundredth: what happens at one moment is what races."""

ALIGNED_S = 0.4
"""So long a broker's answer waits for the end of a call at most, to come with it."""

REBALANCE_TIMEOUT_S = 40.0
"""A member that does not come back from its revoke by then is out of the group."""

OFFSET_FETCH = 9
"""Kafka's number of the request for a group's offsets."""

QUIET_S = 20.0
"""Without an outcome for so long nobody is in a hurry."""

OWNER: contextvars.ContextVar[Any] = contextvars.ContextVar("OWNER", default=None)
"""Whose process runs: clients belong to it."""

UNKNOWN_TOPIC = 3
"""Kafka's code for a topic that a broker does not know."""


@dataclass(frozen=True, slots=True)
class Logged:
    """One input record; `uid` names it for good, its offset only until the log is cut."""

    uid: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int


@dataclass(slots=True)
class Log:
    """One input partition: records by offset; holes are offsets without one."""

    records: dict[int, Logged] = field(default_factory=dict)
    begin: int = 0
    end: int = 0
    cut_seen: bool = True  # somebody has asked since the last cut

    def append(self, record: Logged | None) -> int:
        offset, self.end = self.end, self.end + 1
        if record is not None:
            self.records[offset] = record
        return offset


class Faults:
    """What goes wrong now: kind -> until when, and for which share of requests."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._now: dict[str, tuple[float, float]] = {}

    def start(self, kind: str, until_s: float, share: float) -> None:
        self._now[kind] = until_s, share

    def hit(self, kind: str) -> bool:
        until_s, share = self._now.get(kind, (0.0, 0.0))
        if until_s <= asyncio.get_running_loop().time():
            return False
        return share >= 1.0 or self._rng.random() < share

    def clear(self) -> None:
        self._now.clear()


class Client:
    """One connection: its requests arrive in order, unless its process is killed."""

    def __init__(self, wire: Wire) -> None:
        self.wire, self.worker = wire, OWNER.get()
        self._context = contextvars.copy_context()
        self.dead = False
        self._arrived_s = 0.0
        wire.clients.append(self)

    def request(
        self,
        arrive: Callable[[], Any],
        *,
        refused: Exception | None = None,
        lost: Exception | None = None,
        hangs: bool = False,
        late_s: float = 0.0,
    ) -> asyncio.Future[Any]:
        """`refused`: it never arrives; `lost`: it arrives and the answer is this; `hangs`: no
        answer comes; `late_s`: the answer takes so much longer. The future says what the client
        hears."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        if self.dead:
            answer.set_exception(KafkaConnectionError("killed"))
            return answer
        at_s = max(self._arrived_s + 1e-6, loop.time() + self.wire.latency_s())
        self._arrived_s = at_s
        loop.call_at(at_s, self._arrive, arrive, answer, refused, lost, hangs, late_s)
        return answer

    def _arrive(
        self,
        arrive: Callable[[], Any],
        answer: asyncio.Future[Any],
        refused: Exception | None,
        lost: Exception | None,
        hangs: bool,
        late_s: float,
    ) -> None:
        result, error = None, refused
        if error is None:
            try:
                result = arrive()
            except KafkaError as failure:
                error = failure
            except Exception as failure:
                self.wire.fail(failure)
                return
        if not hangs and not self.dead:
            loop = asyncio.get_running_loop()
            answer_s = self.wire.answer_s(loop.time()) + late_s
            loop.call_at(answer_s, _answer, answer, result, error or lost)


def _answer(answer: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if answer.done():
        return
    if error is None:
        answer.set_result(result)
    else:
        answer.set_exception(error)
        answer.exception()  # whoever has stopped waiting does not complain


class Wire:
    """The cluster: logs, the group, transactional ids, and what is asked of it."""

    def __init__(
        self,
        rng: random.Random,
        ledger: Ledger,
        partitions: int,
        outputs: int,
        *,
        later: bool,
        old: bool,
    ) -> None:
        """`old`: up to Kafka 3.9 a fence does not wait for what was committed before it."""
        self.rng, self.ledger, self.old = rng, ledger, old
        self.faults = Faults(rng)
        self.logs = {Partition("in", number): Log() for number in range(partitions)}
        self.later = Partition("later", 0) if later else None
        if self.later is not None:
            self.logs[self.later] = Log()
        self.partitions = {"in": partitions, "out": outputs, "dead": 1, "later": 1}
        self.sizes: dict[str, int] = {}  # max.message.bytes, where there is a limit
        self.tells_sizes = True
        self.ids: dict[str, int] = defaultdict(int)  # transactional id -> epoch
        self.pending: dict[str, set[Partition]] = {}  # id -> offsets of its open transaction
        self.clients: list[Client] = []
        self.under_way: dict[TopicPartition, int] = defaultdict(int)
        self.group = Group(self)
        self.fail: Callable[[Exception], None] = _raise
        self.next_moment_s: Callable[[float], float | None] = lambda _: None
        self.tasks: set[asyncio.Task[None]] = set()
        self.wall_offset_s = 0.0

    def latency_s(self) -> float:
        return self.rng.choice(LATENCIES_S)

    def answer_s(self, now_s: float) -> float:
        """When a broker's answer comes: now and then in the moment in which a call ends."""
        moment_s = self.next_moment_s(now_s)
        if moment_s is None or moment_s > now_s + ALIGNED_S or self.rng.random() < 0.2:
            return now_s + self.latency_s()
        return moment_s

    def wall_s(self) -> float:
        return 1_700_000_000.0 + asyncio.get_running_loop().time() + self.wall_offset_s

    def start(self, work: Any, context: contextvars.Context | None = None) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, context=context)
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error if isinstance(error, Exception) else Violation(repr(error)))

    def kill(self, worker: object) -> None:
        """Its process is gone: nobody hears it, and it hears nobody."""
        for client in self.clients:
            if client.worker is worker:
                client.dead = True
                if isinstance(client, Consumer):
                    client.end()
                    self.group.lose(client, 1.0 + self.rng.randrange(5))

    def cut(self, partition: Partition, end: int) -> None:
        """An unclean election: the log's tail is gone, and its offsets are given out anew."""
        log = self.logs[partition]
        if end >= log.end or end < log.begin:
            return
        gone = [offset for offset in log.records if offset >= end]
        self.ledger.cut(partition, {offset: log.records[offset].uid for offset in gone}, end)
        for offset in gone:
            del log.records[offset]
        log.end, log.cut_seen = end, False

    def expire(self, partition: Partition, begin: int) -> None:
        """Retention: the log starts later."""
        log = self.logs[partition]
        begin = min(begin, log.end)
        gone = [offset for offset in log.records if offset < begin]
        self.ledger.expired(partition, {offset: log.records[offset].uid for offset in gone})
        for offset in gone:
            del log.records[offset]
        log.begin = max(log.begin, begin)

    def fence(self, partition: Partition) -> None:
        """Somebody else takes the partition's transactional id, as a worker does that was away."""
        for each in self.ids:
            if each.endswith(f":{partition.topic}:{partition.partition}"):
                self.new_epoch(each)

    def new_epoch(self, transactional_id: str) -> int:
        """Ends what an older epoch had open."""
        self.pending.pop(transactional_id, None)
        self.ids[transactional_id] += 1
        return self.ids[transactional_id]

    def land(self, where: TopicPartition, outputs: Sequence[Any], worker: object) -> None:
        for output in outputs:
            self.ledger.at_s = asyncio.get_running_loop().time()
            self.ledger.landed(where, output.key, output.value, output.headers, worker)
            if self.later is not None and where.topic == self.later.topic:
                uid = int((output.value or b"0").split()[0])
                stamp_ms = int(self.wall_s() * 1000)
                record = Logged(uid, output.key, output.value, tuple(output.headers), stamp_ms)
                offset = self.logs[self.later].append(record)
                retries = int(dict(output.headers)["sluice.retry.count"])
                self.ledger.sent(self.later, offset, uid, retries)


def _raise(error: Exception) -> None:
    raise error


# --- the group ------------------------------------------------------------------------------------


class Group:
    """The coordinator of one group, with the eager protocol: each rebalance takes all away."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.members: list[Consumer] = []
        self.generation = 0
        self._numbers = 0
        self._wanted = False
        self._running: asyncio.Task[None] | None = None
        self._stored: dict[Partition, Stored] = {}
        self._before: dict[Partition, tuple[float, Stored | None]] = {}  # still read until then

    # offsets

    def read(self, partition: Partition) -> Stored | None:
        """What a read finds now, which right behind a transaction is what was before it."""
        until_s, before = self._before.get(partition, (0.0, None))
        if asyncio.get_running_loop().time() < until_s:
            return before
        return self._stored.get(partition)

    def settle(self, partition: Partition) -> None:
        """A fence ends only when what was committed before it can be read, of newer brokers."""
        if not self._wire.old:
            self._before.pop(partition, None)

    def is_stable(self, partition: Partition) -> bool:
        """No transaction may still change what is read."""
        until_s, _ = self._before.get(partition, (0.0, None))
        open_ = any(partition in each for each in self._wire.pending.values())
        return not open_ and asyncio.get_running_loop().time() >= until_s

    def store(self, offsets: Mapping[Partition, Stored], *, late_s: float = 0.0) -> None:
        now_s = asyncio.get_running_loop().time()
        for partition, stored in offsets.items():
            self._before[partition] = now_s + late_s, self._stored.get(partition)
            self._stored[partition] = stored
            self._wire.ledger.stored(partition, stored)

    def stored(self, partition: Partition) -> Stored | None:
        return self._stored.get(partition)

    # members

    def join(self, consumer: Consumer) -> None:
        if consumer not in self.members:
            self._numbers += 1
            consumer.coordinator.member_id = f"member-{self._numbers}"
            self.members.append(consumer)
            self.rebalance()

    def leave(self, consumer: Consumer) -> None:
        if consumer in self.members:
            self.members.remove(consumer)
            self.rebalance()

    def lose(self, consumer: Consumer, after_s: float) -> None:
        """Its session ends."""
        asyncio.get_running_loop().call_later(after_s, self.leave, consumer)

    def evict(self, consumer: Consumer, hears_after_s: float) -> None:
        """It was away for too long, and hears of it later than the others."""
        if consumer in self.members:
            self.leave(consumer)
            asyncio.get_running_loop().call_later(hears_after_s, consumer.rejoin)

    def rebalance(self) -> None:
        self._wanted = True
        if self._running is None or self._running.done():
            self._running = self._wire.start(self._rebalance())

    async def _rebalance(self) -> None:
        while self._wanted:
            await asyncio.sleep(self._wire.latency_s())
            self._wanted = False
            members = list(self.members)
            revokes = [self._wire.start(member.revoke()) for member in members]
            if revokes:
                await asyncio.wait(revokes, timeout=REBALANCE_TIMEOUT_S)
            for member, revoke in zip(members, revokes, strict=True):
                if not revoke.done():
                    self.evict(member, 1.0)
            if self._wanted:
                continue  # somebody has joined, or left, meanwhile
            self.generation += 1
            present = [member for member in members if member in self.members]
            for member, share in zip(present, self._shares(present), strict=True):
                member.assigned(self.generation, share)

    def _shares(self, members: list[Consumer]) -> list[set[Partition]]:
        """Sticky, with a few moves."""
        shares: list[set[Partition]] = [set() for _ in members]
        if not members:
            return shares
        for partition in self._wire.logs:
            had = [i for i, member in enumerate(members) if partition in member.had]
            stays = had and self._wire.rng.random() < 0.8
            shares[had[0] if stays else self._wire.rng.randrange(len(members))].add(partition)
        return shares


class _State:
    """One assigned partition in the client."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.position: int | None = None
        self.paused = False
        self.timestamp = 0

    @property
    def has_valid_position(self) -> bool:
        return self.position is not None

    @property
    def lso(self) -> int:
        return self._log.end

    @property
    def highwater(self) -> int:
        return self._log.end


class _Assignment:
    def __init__(self, states: dict[TopicPartition, _State]) -> None:
        self.states = states

    def state_value(self, where: TopicPartition) -> _State | None:
        return self.states.get(where)


class _Coordinator:
    """What is read of the client's own coordinator."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self.generation = -1
        self.member_id = ""
        self._group_instance_id = None
        self._pending_exception: BaseException | None = None
        self._coordination_task = self._heartbeat_task = self._commit_refresh_task = _Handle()

    def check_errors(self) -> None:
        return None

    async def _maybe_leave_group(self) -> None:
        self._consumer.wire.group.leave(self._consumer)

    async def ensure_coordinator_known(self) -> None:
        await self._consumer.request(lambda: None)

    async def _do_commit_offsets(self, _: object, offsets: Mapping[TopicPartition, Any]) -> None:
        consumer, wire = self._consumer, self._consumer.wire
        generation, member_id = self.generation, self.member_id
        wanted = {Partition(*each): Stored(at.offset, at.metadata) for each, at in offsets.items()}

        def arrive() -> None:
            if wire.faults.hit("topic_missing"):
                raise UnknownTopicOrPartitionError
            if consumer not in wire.group.members or member_id != self.member_id:
                raise UnknownMemberIdError
            if generation != wire.group.generation:
                raise IllegalGenerationError
            if consumer.subscription.reassignment_in_progress and wire.rng.random() < 0.2:
                raise RebalanceInProgressError
            wire.group.store(wanted)

        refused = None
        if wire.faults.hit("commits_refused"):
            refused = wire.rng.choice(
                [GroupCoordinatorNotAvailableError(), RebalanceInProgressError(), KafkaError()]
            )
        try:
            await consumer.request(arrive, refused=refused, hangs=wire.faults.hit("commits_hang"))
        except (UnknownMemberIdError, IllegalGenerationError):
            consumer.rejoin_soon()
            raise


class _Handle:
    def cancel(self) -> None:
        return None


class _Subscription:
    """What is read of the client's own subscription."""

    def __init__(self) -> None:
        self.reassignment_in_progress = True
        self.assignment: _Assignment | None = None
        self.subscription = self
        self._fetch_count = 0
        self._last_fetch_ended = 0.0

    @contextmanager
    def fetch_context(self) -> Iterator[None]:
        yield


class Consumer(Client):
    """`AIOKafkaConsumer`, as far as it is used."""

    def __init__(self, wire: Wire, **_: object) -> None:
        super().__init__(wire)
        self.coordinator = self._coordinator = _Coordinator(self)
        self.subscription = self._subscription = _Subscription()
        self._fetcher = SimpleNamespace(
            _records={}, _fetch_task=_Done(), close=_nothing, _wait_consume_future=None
        )
        self._client = SimpleNamespace(cluster=_Cluster(wire), close=_nothing, send=_nothing)
        self.had: set[Partition] = set()
        self._listener: Any = None
        self._coordination: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()
        self._ended = False
        self._rejoins = False

    # its life

    async def start(self) -> None:
        if self.wire.faults.hit("clients_fail"):
            raise KafkaConnectionError("no broker")
        await self.request(lambda: None)

    def subscribe(self, topics: list[str], listener: Any) -> None:
        self._listener = listener
        self.wire.group.join(self)

    async def stop(self) -> None:
        if self.wire.faults.hit("stops_hang"):
            await asyncio.sleep(3600)
        self.end()
        self.wire.group.leave(self)

    def end(self) -> None:
        self._ended = True
        self._settled.set()
        if self._coordination is not None:
            self._coordination.cancel()

    def die(self) -> None:
        """The task that fetches has ended, as it did without an error (aiokafka #1037)."""
        self._fetcher._fetch_task.ended = True

    # the group

    async def revoke(self) -> None:
        """Behind what it is about: the client's own task does one thing after the other."""
        if self._coordination is not None and not self._coordination.done():
            await asyncio.wait([self._coordination])
        if self._ended:
            return
        self._coordination = self.wire.start(self._revoked(), self._context)
        await asyncio.wait([self._coordination])

    async def _revoked(self) -> None:
        """The client says that it reassigns and calls the listener in one step."""
        self.subscription.reassignment_in_progress = True
        self._settled.clear()
        await self._listener.on_partitions_revoked(set())

    def assigned(self, generation: int, share: set[Partition]) -> None:
        if self._ended:
            return
        self.coordinator.generation = generation
        self.had = set(share)
        states = {TopicPartition(*each): _State(self.wire.logs[each]) for each in share}
        self.subscription.assignment = _Assignment(states)
        self.subscription.reassignment_in_progress = False
        self._settled.set()
        self._coordination = self.wire.start(
            self._listener.on_partitions_assigned(set(states)), self._context
        )

    def rejoin_soon(self) -> None:
        if not self._rejoins and self not in self.wire.group.members:
            self.wire.start(self._rejoin())

    def rejoin(self) -> None:
        self.rejoin_soon()

    async def _rejoin(self) -> None:
        self._rejoins = True
        try:
            self.coordinator.member_id, self.coordinator.generation = "", -1
            await self.revoke()
            if not self._ended:
                self.wire.group.join(self)
        finally:
            self._rejoins = False

    @property
    def given(self) -> set[Partition]:
        """What it has been assigned last; nothing before it was."""
        return self.had if self.subscription.assignment is not None else set()

    # reading

    def assignment(self) -> set[TopicPartition]:
        assignment = self.subscription.assignment
        return set() if assignment is None else set(assignment.states)

    def _state(self, where: TopicPartition) -> _State:
        assignment = self.subscription.assignment
        if assignment is None or where not in assignment.states:
            raise IllegalStateError(f"No current assignment for partition {where}")
        return assignment.states[where]

    def seek(self, where: TopicPartition, offset: int) -> None:
        self._state(where).position = offset

    def pause(self, *partitions: TopicPartition) -> None:
        for each in partitions:
            self._state(each).paused = True

    def resume(self, *partitions: TopicPartition) -> None:
        for each in partitions:
            self._state(each).paused = False

    async def getmany(
        self, *partitions: TopicPartition, timeout_ms: int, max_records: int
    ) -> dict[TopicPartition, list[ConsumerRecord]]:
        if self.subscription.reassignment_in_progress:
            await self._settled.wait()
        if self.wire.faults.hit("fetches_fail"):
            await asyncio.sleep(0)
            raise KafkaError("a broker is away")
        found = self._fetch(partitions, max_records)
        if not found:
            # Late where nothing has happened for long, as it is in a rebalance: hours cost less.
            idle = self.wire.ledger.quiet_s(asyncio.get_running_loop().time()) > QUIET_S
            await asyncio.sleep(1.0 if idle and timeout_ms else timeout_ms / 1000)
            found = self._fetch(partitions, max_records)
        return found

    def _fetch(
        self, partitions: Sequence[TopicPartition], limit: int
    ) -> dict[TopicPartition, list[ConsumerRecord]]:
        found: dict[TopicPartition, list[ConsumerRecord]] = {}
        assignment = self.subscription.assignment
        if assignment is None or self.subscription.reassignment_in_progress or self.dead:
            return found
        for where in partitions:
            state = assignment.states.get(where)
            if state is None or state.paused or state.position is None or limit <= 0:
                continue
            records = self._read(where, state, limit)
            if records:
                found[where] = records
                limit -= len(records)
        return found

    def _read(self, where: TopicPartition, state: _State, limit: int) -> list[ConsumerRecord]:
        log = self.wire.logs[Partition(*where)]
        position = state.position
        assert position is not None
        state.timestamp = int(asyncio.get_running_loop().time() * 1000) + 1
        if not log.begin <= position <= log.end:
            log.cut_seen = True
            raise OffsetOutOfRangeError({where: position})
        records: list[ConsumerRecord] = []
        while position < log.end:
            record = log.records.get(position)
            if record is not None:
                if len(records) >= limit:
                    break
                records.append(_record(where, position, record))
            position += 1
        self.wire.ledger.read_to(Partition(*where), position)
        state.position = position
        return records

    async def beginning_offsets(self, asked: list[TopicPartition]) -> dict[TopicPartition, int]:
        return await self.request(
            lambda: {each: self.wire.logs[Partition(*each)].begin for each in asked}
        )

    async def end_offsets(self, asked: list[TopicPartition]) -> dict[TopicPartition, int]:
        def ends() -> dict[TopicPartition, int]:
            for each in asked:
                self.wire.logs[Partition(*each)].cut_seen = True
            return {each: self.wire.logs[Partition(*each)].end for each in asked}

        return await self.request(ends)


def _record(where: TopicPartition, offset: int, record: Logged) -> ConsumerRecord:
    return ConsumerRecord(
        topic=where.topic,
        partition=where.partition,
        offset=offset,
        timestamp=record.timestamp_ms,
        timestamp_type=0,
        key=record.key,
        value=record.value,
        checksum=None,
        serialized_key_size=0,
        serialized_value_size=0,
        headers=record.headers,
    )


class _Done:
    """A task of the client that runs until it has ended."""

    ended = False

    def done(self) -> bool:
        return self.ended


class _Cluster:
    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def partitions_for_topic(self, topic: str) -> set[int] | None:
        count = self._wire.partitions.get(topic)
        return None if count is None else set(range(count))


async def _nothing(*_: object) -> None:
    return None


# --- the admin client -----------------------------------------------------------------------------


class Admin(Client):
    """`AIOKafkaAdminClient`, as far as it is used."""

    def __init__(self, wire: Wire, **_: object) -> None:
        super().__init__(wire)

    async def start(self) -> None:
        if self.wire.faults.hit("clients_fail"):
            raise KafkaConnectionError("no broker")
        await self.request(lambda: None)

    async def close(self) -> None:
        return None

    async def find_coordinator(self, _: str) -> int:
        await self.request(lambda: None)
        return 0

    async def list_consumer_group_offsets(
        self, _: str, partitions: list[TopicPartition]
    ) -> dict[TopicPartition, OffsetAndMetadata]:
        def arrive() -> dict[TopicPartition, OffsetAndMetadata]:
            found = {each: self.wire.group.read(Partition(*each)) for each in partitions}
            return {
                each: OffsetAndMetadata(-1, "") if at is None else OffsetAndMetadata(*_both(at))
                for each, at in found.items()
            }

        refused = NodeNotReadyError() if self.wire.faults.hit("reads_fail") else None
        return await self.request(arrive, refused=refused, hangs=self.wire.faults.hit("reads_hang"))

    async def _send_request(self, request: Any, *_: object) -> Any:
        def arrive() -> dict[str, Any]:
            if type(request).API_KEY == OFFSET_FETCH:
                return self._stable(request._by_topic)
            if isinstance(request, OffsetRequest):
                return {"topics": [self._ends(*each) for each in request._topics]}
            return {"topics": [self._topic(each) for each in request._topics]}

        asks = type(request).API_KEY == OFFSET_FETCH
        refused = NodeNotReadyError() if asks and self.wire.faults.hit("reads_fail") else None
        hangs = asks and self.wire.faults.hit("reads_hang")
        answer = await self.request(arrive, refused=refused, hangs=hangs)
        return SimpleNamespace(to_object=lambda: answer)

    def _stable(self, asked: Mapping[str, list[int]]) -> dict[str, Any]:
        """The group's offsets, where no transaction may still change them."""
        topics = [
            {"topic": topic, "partitions": [self._stable_one(Partition(topic, n)) for n in numbers]}
            for topic, numbers in asked.items()
        ]
        return {"error_code": 0, "topics": topics}

    def _stable_one(self, partition: Partition) -> dict[str, Any]:
        group, found = self.wire.group, self.wire.group.read(partition)
        code = 0 if group.is_stable(partition) else UNSTABLE_OFFSET_COMMIT
        offset, metadata = (-1, "") if found is None else _both(found)
        return {
            "partition": partition.partition,
            "error_code": code,
            "offset": offset,
            "metadata": metadata,
        }

    def _ends(self, topic: str, partitions: list[tuple[int, int]]) -> dict[str, Any]:
        ends = [
            {"partition": n, "error_code": 0, "offset": self.wire.logs[Partition(topic, n)].end}
            for n, _ in partitions
        ]
        return {"topic": topic, "partitions": ends}

    def _topic(self, topic: str) -> dict[str, Any]:
        missing = self.wire.faults.hit("topic_missing")
        numbers = [] if missing else range(self.wire.partitions[topic])
        return {
            "topic": topic,
            "error_code": UNKNOWN_TOPIC if missing else 0,
            "topic_id": topic.encode().ljust(16, b"-"),
            "partitions": [{"partition": n, "leader": 0} for n in numbers],
        }

    async def describe_configs(self, resources: Sequence[Any]) -> list[Any]:
        limit = self.wire.sizes.get(resources[0].name)
        await self.request(lambda: None)
        if limit is None or not self.wire.tells_sizes:
            raise KafkaError("nobody tells")
        entries = [("max.message.bytes", str(limit))]
        return [SimpleNamespace(resources=[(0, None, 2, resources[0].name, entries)])]


def _both(stored: Stored) -> tuple[int, str]:
    return stored.offset, stored.metadata


# --- producers ------------------------------------------------------------------------------------


class _Batch:
    def __init__(self) -> None:
        self.outputs: list[Any] = []

    def append(self, **output: Any) -> object:
        self.outputs.append(SimpleNamespace(**output))
        return self

    def close(self) -> None:
        return None

    @property
    def size_bytes(self) -> int:
        return sum(
            len(each.key or b"")
            + len(each.value or b"")
            + sum(len(name) + len(value or b"") for name, value in each.headers)
            for each in self.outputs
        )


class Producer(Client):
    """`AIOKafkaProducer`, idempotent, with or without a transactional id."""

    def __init__(self, wire: Wire, transactional_id: str | None = None, **_: object) -> None:
        super().__init__(wire)
        self._id = transactional_id
        self._epoch = 0
        self._gaps: set[TopicPartition] = set()  # a batch failed: its numbers are never taken back
        self._unanswered: dict[asyncio.Future[Any], None] = {}
        self._outputs: list[tuple[TopicPartition, Any]] = []  # of the open transaction
        self._offsets: dict[Partition, Stored] = {}
        self.client = SimpleNamespace(cluster=_Cluster(wire), close=_nothing, _conns={})
        self._sender = SimpleNamespace(sender_task=_Done())
        self._message_accumulator = SimpleNamespace(
            _batches={}, _pending_batches=set(), fail_all=self._fail_all
        )
        self._txn_manager = SimpleNamespace(
            state=TransactionState.UNINITIALIZED,
            _transaction_waiter=None,
            wait_for_transaction_end=self._transaction_end,
        )

    def _fail_all(self, error: Exception) -> None:
        unanswered, self._unanswered = self._unanswered, {}
        for each in unanswered:
            _answer(each, None, error)

    async def start(self) -> None:
        if self.wire.faults.hit("producers_hang"):
            await asyncio.sleep(3600)
        refused = None
        if self.wire.faults.hit("clients_fail") or self.wire.faults.hit("producers_fail"):
            refused = KafkaConnectionError("no broker")
        await self.request(self._fence, refused=refused)
        self._txn_manager.state = TransactionState.READY

    def _fence(self) -> None:
        if self._id is None:
            return
        self._epoch = self.wire.new_epoch(self._id)
        topic, number = self._id.split(":")[-2:]
        if number.isdigit():
            self.wire.group.settle(Partition(topic, int(number)))

    async def stop(self) -> None:
        if self._unanswered:
            await asyncio.wait(self._unanswered)

    async def partitions_for(self, topic: str) -> set[int]:
        return set(range(self.wire.partitions[topic]))

    def create_batch(self) -> _Batch:
        return _Batch()

    async def send_batch(self, batch: _Batch, topic: str, *, partition: int) -> asyncio.Future[Any]:
        where, faults, rng = TopicPartition(topic, partition), self.wire.faults, self.wire.rng
        if topic != "out":
            self.wire.ledger.bent(batch.outputs)
        refused: Exception | None = None
        if batch.size_bytes > self.wire.sizes.get(topic, 1 << 40):
            refused = MessageSizeTooLargeError()
        elif where in self._gaps:
            refused = OutOfOrderSequenceNumber()
        elif faults.hit("sends_refused") or faults.hit(f"out_refuses {partition}"):
            refused = NotEnoughReplicasError()
        lost = RequestTimedOutError() if faults.hit("sends_lost") else None
        hangs = faults.hit("sends_hang")
        if refused is None and hangs and rng.random() < 0.5:
            refused = KafkaError("never arrived")
        if refused is not None:
            self._gaps.add(where)
        if self._id is None and self.wire.under_way[where] and not self.dead:
            others = [
                each
                for each in self.wire.clients
                if isinstance(each, Producer)
                and each.worker is self.worker
                and each is not self
                and any(at == where for at in each._unanswered.values())
            ]
            if others:
                raise Violation(f"two producers have a batch for {where} under way")

        def arrive() -> None:
            if self._id is None:
                self.wire.land(where, batch.outputs, self.worker)
                return
            self._newest()
            self._outputs += [(where, each) for each in batch.outputs]

        late_s = rng.choice([0.05, 0.2, 0.4]) if faults.hit(f"out_is_slow {partition}") else 0.0
        answer = self.request(arrive, refused=refused, lost=lost, hangs=hangs, late_s=late_s)
        self._unanswered[answer] = where  # type: ignore[assignment]
        answer.add_done_callback(lambda done: self._unanswered.pop(done, None))
        await asyncio.sleep(0)
        return answer

    # transactions

    def _newest(self) -> None:
        assert self._id is not None
        if self.wire.ids[self._id] != self._epoch:
            self._txn_manager.state = TransactionState.FATAL_ERROR
            raise ProducerFenced

    async def begin_transaction(self) -> None:
        if self._txn_manager.state is not TransactionState.READY:
            raise Violation(f"a transaction begins while {self._txn_manager.state}")
        await asyncio.sleep(0)
        self._txn_manager.state = TransactionState.IN_TRANSACTION
        self._outputs, self._offsets = [], {}

    async def send_offsets_to_transaction(
        self, offsets: Mapping[TopicPartition, OffsetAndMetadata], _: str
    ) -> None:
        def arrive() -> None:
            self._newest()
            for each, at in offsets.items():
                self._offsets[Partition(*each)] = Stored(at.offset, at.metadata)
            assert self._id is not None
            self.wire.pending[self._id] = set(self._offsets)

        refused = KafkaError("no coordinator") if self.wire.faults.hit("txn_refused") else None
        await self.request(arrive, refused=refused, hangs=self.wire.faults.hit("txn_hang"))

    async def commit_transaction(self) -> None:
        self._txn_manager.state = TransactionState.COMMITTING_TRANSACTION
        faults = self.wire.faults
        refused = KafkaError("no coordinator") if faults.hit("txn_refused") else None
        lost = RequestTimedOutError() if faults.hit("txn_lost") else None
        await self._ending(self._commit, refused, lost, hangs=faults.hit("txn_hang"))

    def _commit(self) -> None:
        self._newest()
        outputs, self._outputs = self._outputs, []
        offsets, self._offsets = self._offsets, {}
        assert self._id is not None
        self.wire.pending.pop(self._id, None)
        for where, output in outputs:
            self.wire.land(where, [output], self.worker)
        self.wire.ledger.transaction(offsets, [each for _, each in outputs])
        late_s = self.wire.rng.choice((0.0, 0.0, 0.02, 0.1))
        self.wire.group.store(offsets, late_s=late_s)

    async def abort_transaction(self) -> None:
        self._txn_manager.state = TransactionState.ABORTING_TRANSACTION
        await self._ending(self._abort, None, None, hangs=self.wire.faults.hit("txn_hang"))

    def _abort(self) -> None:
        self._newest()
        assert self._id is not None
        self.wire.pending.pop(self._id, None)
        self._outputs, self._offsets = [], {}

    async def _ending(
        self,
        arrive: Callable[[], None],
        refused: Exception | None,
        lost: Exception | None,
        *,
        hangs: bool,
    ) -> None:
        answer = self.request(arrive, refused=refused, lost=lost, hangs=hangs)
        self._txn_manager._transaction_waiter = answer
        await asyncio.shield(answer)
        self._txn_manager.state = TransactionState.READY

    async def _transaction_end(self) -> None:
        await asyncio.shield(self._txn_manager._transaction_waiter)

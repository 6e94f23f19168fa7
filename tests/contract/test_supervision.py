"""What a client does not say of itself is found from outside, said, and healed or ended.

On a real Kafka, with clients that are broken on purpose.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions
from aiokafka.consumer.fetcher import FetchResult
from aiokafka.errors import (
    CorruptRecordException,
    IncompatibleBrokerVersion,
    KafkaError,
    UnknownTopicOrPartitionError,
)

from service.core.errors import CannotRun, CommitFailed
from service.core.events import ClientReplaced, Event, StopForced
from service.core.messages import Batch, Message, Outcome, Partition
from service.core.status import GroupStatus
from service.demo.broker import EmbeddedBroker
from service.kafka.client.private import Membership
from service.kafka.client.stored import Stored
from service.kafka.client.topics_seen import find_topics, topic_ids
from service.kafka.group.group_offsets import GroupOffsets
from service.kafka.group.supervision import Lookout
from service.kafka.sink import KafkaSink
from service.kafka.source import KafkaSource
from service.kafka.transactions.producer import TransactionalProducer
from service.pipeline import Bounds, Pipeline
from service.telemetry.probes import Patience
from tests.support import topics
from tests.support.fakes import FakeExtractor
from tests.support.sources import PATIENCE_S, HeldUp, Kafka, Member, both, member, part, settings

REQUEST_TIMEOUT_S = 3.0

pytestmark = pytest.mark.real_kafka


@pytest.fixture
def real(real_kafka: str) -> Kafka:
    return Kafka(real_kafka)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks follow each other as they would in half a minute."""
    monkeypatch.setattr("service.kafka.group.supervision.LOOK_EVERY_S", 0.3)
    monkeypatch.setattr("service.kafka.group.supervision.SILENT_S", 1.0)
    monkeypatch.setattr("service.kafka.group.watchdog.GONE_S", 1.0)


@asynccontextmanager
async def supervised(kafka: Kafka, topic: str, group: str) -> AsyncIterator[Member[KafkaSource]]:
    quick = {"request_timeout_s": REQUEST_TIMEOUT_S}
    async with member(kafka, topic, group, kafka=quick) as one, asyncio.TaskGroup() as tasks:
        watch = tasks.create_task(one.source.supervise())
        yield one
        watch.cancel()


async def end_of(kafka: Kafka, topic: str, group: str, act: Callable[[], object]) -> str:
    """The sentence with which supervision ends, after `act`, while the member polls."""
    quick = {"request_timeout_s": REQUEST_TIMEOUT_S}
    async with member(kafka, topic, group, kafka=quick) as one, asyncio.TaskGroup() as tasks:
        watch = tasks.create_task(_ending(one.source))
        await one.until(lambda: bool(one.messages))
        await act()  # type: ignore[misc]
        await one.until(watch.done)
        with pytest.raises(CommitFailed, match="topic"):
            await one.commit({part(topic): 1})
        return watch.result()


async def _ending(source: KafkaSource) -> str:
    with pytest.raises(CannotRun) as raised:
        await source.supervise()
    return str(raised.value)


# --- a client that gives nothing -----------------------------------------------------------------


def hang(consumer: AIOKafkaConsumer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetches are never answered."""

    async def never(*_: object) -> bool:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return False
        raise AssertionError

    monkeypatch.setattr(consumer._fetcher, "_proc_fetch_request", never)


def die(consumer: AIOKafkaConsumer, _: pytest.MonkeyPatch) -> None:
    """The task that fetches is gone."""
    consumer._fetcher._fetch_task.cancel()


def go_stale(consumer: AIOKafkaConsumer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its metadata names leaders that are none, and is never refreshed."""

    async def failing(*_: object) -> bool:
        return False

    monkeypatch.setattr(consumer._client, "_metadata_update", failing)
    for by_number in consumer._client.cluster._partitions.values():
        for number, found in by_number.items():
            by_number[number] = found._replace(leader=99)


def fail(consumer: AIOKafkaConsumer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises at every poll."""

    def raising() -> None:
        raise KafkaError("again")

    monkeypatch.setattr(consumer._coordinator, "check_errors", raising)
    monkeypatch.setattr("service.kafka.group.fetching.FAILING_S", 1.0)


def _consumer(one: Member[KafkaSource]) -> AIOKafkaConsumer:
    assert one.source._consumer is not None
    return one.source._consumer


Break = Callable[[AIOKafkaConsumer, pytest.MonkeyPatch], None]


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (hang, "silent: 1 partition gave nothing for"),
        (die, "its task that fetches has ended"),
        (go_stale, "silent: 1 partition gave nothing for"),
        (fail, "it has failed for 1 s (KafkaError)"),
    ],
)
async def test_a_client_that_gives_nothing_is_replaced(
    real: Kafka,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    how: Break,
    why: str,
) -> None:
    """Said with the reason, counted; everything comes back under new epochs; liveness stays."""
    topic, group = await real.topic(2), topics.unique_name("g")
    await real.send(topic, "a")

    async with supervised(real, topic, group) as one:
        await one.until(lambda: len(one.messages) == 1)
        await one.commit({part(topic): 1})
        before = dict(one.epochs)
        broken = _consumer(one)
        how(broken, monkeypatch)
        await asyncio.sleep(0.7)  # a fetch that was under way has ended
        await real.send(topic, "b")
        patience = Patience.of(settings(real, topic, group))
        async with asyncio.timeout(PATIENCE_S):
            while len(one.messages) < 2:
                await one.poll()
                assert one.source.group().look_age_s < patience.look_s
                assert one.source.group().unsettled_s < patience.unsettled_s
        assert one.source._consumer is not broken
        assert one.texts == ["a", "b"], "what was committed came again"
        assert one.revokes == 1
        assert min(one.epochs.values()) > max(before.values())
        await one.commit({part(topic): 2})
        assert one.heard(ClientReplaced) == [ClientReplaced("consumer")]
        await one.turn(10)
    assert one.heard(ClientReplaced) == [ClientReplaced("consumer")], "the new one was blamed"
    assert f"Kafka's client is replaced: {why}" in caplog.text


async def test_one_silent_partition_among_busy_ones_is_found(
    real: Kafka, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What others give does not hide it: each poll asks every partition."""
    topic, group = await real.topic(2), topics.unique_name("g")
    await real.send(topic, *map(str, range(500)), partition=1)

    async with supervised(real, topic, group) as one:
        await one.until(lambda: len(one.messages) == 2, limit=2)
        consumer = _consumer(one)
        go_stale(consumer, monkeypatch)
        by_number = consumer._client.cluster._partitions[topic]
        by_number[1] = by_number[1]._replace(leader=by_number[1].replicas[0])
        await asyncio.sleep(0.7)
        await real.send(topic, "a", partition=0)
        async with asyncio.timeout(PATIENCE_S):
            while not one.heard(ClientReplaced):
                before = len(one.messages)
                await one.poll(limit=2)
                assert len(one.messages) > before
                await asyncio.sleep(0.05)
        await one.until(lambda: "a" in one.texts)
    assert f"among them {topic}[0] at offset 0 of 1" in caplog.text


async def test_another_client_starts_with_no_blame(
    real: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held where the silent one stood, and not asked yet, it is not replaced in its turn."""
    topic, group = await real.topic(), topics.unique_name("g")
    looking, looks, look = asyncio.Event(), 0, Lookout.look

    async def looked(self: Lookout, *asked: Any) -> object:
        nonlocal looks
        await looking.wait()
        looks += 1
        return await look(self, *asked)

    monkeypatch.setattr(Lookout, "look", looked)
    looking.set()
    async with supervised(real, topic, group) as one:
        await one.until(lambda: bool(one.epochs))
        silent = _consumer(one)
        hang(silent, monkeypatch)
        await asyncio.sleep(0.7)
        await real.send(topic, "a")
        await one.until(lambda: bool(one.heard(ClientReplaced)))
        looking.clear()
        await one.until(lambda: one.source._consumer is not silent)
        await _take_nothing_until(one, lambda: one.source.group().settled)
        looking.set()
        before = looks
        await _take_nothing_until(one, lambda: looks > before + 1)
        assert one.heard(ClientReplaced) == [ClientReplaced("consumer")]
        await one.until(lambda: one.texts == ["a"])


async def _take_nothing_until(one: Member[KafkaSource], reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not reached():
            await one.poll(0)
            await asyncio.sleep(0.05)  # such a poll does not wait


async def test_an_idle_or_full_reader_is_left_alone(real: Kafka) -> None:
    """Nothing there, or nothing asked for: many looks blame nobody."""
    topic, group = await real.topic(2), topics.unique_name("g")
    await real.send(topic, "a")

    async with supervised(real, topic, group) as one:
        await one.until(lambda: len(one.messages) == 1)
        for limit in (100, 0):
            ends_s = time.monotonic() + 1.3 * REQUEST_TIMEOUT_S
            while time.monotonic() < ends_s:
                await one.poll(limit)
                await asyncio.sleep(0.1)
            await real.send(topic, "b", "c")
    assert one.heard(ClientReplaced) == []


async def test_what_cannot_be_read_is_no_silence(
    real: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is held and said on its own; another client would not read it either."""
    monkeypatch.setattr("service.kafka.group.positions.MEND_AGAIN_S", 0.0)
    topic, group = await real.topic(2), topics.unique_name("g")
    await real.send(topic, "a", partition=0)
    await real.send(topic, "b", partition=1)
    getall = FetchResult.getall

    def damaging(self: FetchResult, limit: int) -> object:
        if self._topic_partition.partition == 0:
            raise CorruptRecordException
        return getall(self, limit)

    monkeypatch.setattr(FetchResult, "getall", damaging)
    async with supervised(real, topic, group) as one:
        await one.until(lambda: one.texts == ["b"])
        ends_s = time.monotonic() + 2 * REQUEST_TIMEOUT_S
        await one.until(lambda: time.monotonic() > ends_s)
    assert one.heard(ClientReplaced) == []


async def test_replacing_that_does_not_help_is_an_end(
    real: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third within ten minutes: a sentence, and a new process."""
    topic, group = await real.topic(), topics.unique_name("g")

    async with member(real, topic, group) as one:
        for _ in range(2):
            await one.until(lambda: one.source.group().settled)
            broken = _consumer(one)
            die(broken, monkeypatch)
            await asyncio.sleep(0.1)
            await one.until(lambda was=broken: one.source._consumer is not was)  # type: ignore[misc]
        with pytest.raises(CannotRun, match="replaced 2 times within 10 minutes and needs it"):
            one.source.replace("the test says so")
    assert len(one.heard(ClientReplaced)) == 2


async def test_a_new_client_is_tried_for_until_there_is_one(
    real: Kafka, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Brokers that are away just then end nothing; polls go on returning meanwhile."""
    monkeypatch.setattr("service.kafka.source.OPEN_AGAIN_S", 0.1)
    topic, group = await real.topic(), topics.unique_name("g")
    await real.send(topic, "a")
    refused = 0

    def refusing(step: Callable[[Any], Awaitable[object]], times: int) -> object:
        async def refuse(self: object) -> object:
            nonlocal refused
            refused += 1
            if refused <= times:
                raise KafkaError("away")
            return await step(self)

        return refuse

    async with member(real, topic, group) as one:
        await one.until(lambda: len(one.messages) == 1)
        # Without any client first, then with one that does not start.
        monkeypatch.setattr(KafkaSource, "_open_admin", refusing(KafkaSource._open_admin, 1))
        monkeypatch.setattr(AIOKafkaConsumer, "start", refusing(AIOKafkaConsumer.start, 3))
        one.source.replace("the test says so")
        await one.poll(0)
        assert one.revokes == 0, "nothing is wanted: there is time"
        while refused < 5:
            assert await one.poll(0 if refused else 1) == Batch()
            with pytest.raises(CommitFailed, match="rebalance"):
                await one.commit({part(topic): 1})
        await one.until(lambda: len(one.messages) == 2)
    assert one.texts == ["a", "a"], "nothing was committed: it comes again"
    assert caplog.text.count("no new client yet: KafkaError") == 2


async def test_a_rebalance_waits_for_a_client_that_is_given_up(real: Kafka) -> None:
    """Its last commit is in its own generation; afterwards it gets nothing any more."""
    topic, group = await real.topic(2), topics.unique_name("g")
    async with member(real, topic, group) as one:
        await one.until(lambda: len(one.epochs) == 2)
        revoke = HeldUp()
        one.when_revoked = revoke.wait
        membership = Membership(_consumer(one))
        generation = membership.generation
        one.source.replace("the test says so")
        async with asyncio.TaskGroup() as tasks, member(real, topic, group) as two:
            giving_up = tasks.create_task(one.poll())
            await revoke.asked.wait()
            await two.until(lambda: membership.reassigning)
            await two.turn()
            assert (membership.generation, two.epochs) == (generation, {})
            await one.commit({part(topic, 0): 0, part(topic, 1): 0})
            revoke.gate.set()
            await giving_up
            await both(one, two, lambda: len(one.assignments) > 1 and len(one.epochs) == 1)


async def test_a_stop_that_hangs_is_forced_and_said(
    real: Kafka, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A client whose own stop never returns: cut off in time, counted, its tasks gone."""
    monkeypatch.setattr("service.kafka.client.private.STOP_S", 0.3)
    topic, group = await real.topic(), topics.unique_name("g")

    async with member(real, topic, group) as one:
        await one.until(lambda: bool(one.epochs))
        monkeypatch.setattr(_consumer(one)._coordinator, "close", HeldUp().wait)
    assert one.heard(StopForced) == [StopForced("consumer")]
    assert "the Kafka client does not end in order: TimeoutError" in caplog.text
    assert asyncio.all_tasks() == {asyncio.current_task()}


# --- nothing lost, nothing called twice ----------------------------------------------------------


@pytest.mark.parametrize("mode", ["at_least_once", "exactly_once"])
async def test_no_message_is_lost_or_called_twice_by_a_replacement(
    real: Kafka, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Under a pipeline: what is in flight is finished and committed before the client goes."""
    topic, group = await real.topic(3), topics.unique_name("g")
    output, letters = await real.topic(1), await real.topic(1)
    first, later = [f"t{n}" for n in range(60)], [f"t{n}" for n in range(60, 90)]
    await real.send(topic, *first, partition=None)
    told: list[Event] = []
    ours = settings(
        real,
        topic,
        group,
        kafka={"request_timeout_s": REQUEST_TIMEOUT_S},
        output={"topic": output},
        dead_letters={"topic": letters},
        delivery={"mode": mode, "commit_interval_s": 0.2},
    )
    sink = KafkaSink(ours, told.append)
    source = KafkaSource(ours, told.append, sink.transactions)
    extractor = FakeExtractor(latency_s=lambda _: 1.0)  # some are in flight when the client goes
    pipeline = Pipeline(
        source,
        extractor,
        sink,
        _decode,
        BOUNDS,
        observe=told.append,
        uniform=lambda low, high: high,
        wall_clock=lambda: 0.0,
    )
    await sink.start()
    await source.start(pipeline)
    try:
        async with asyncio.TaskGroup() as tasks:
            run = tasks.create_task(pipeline.run())
            watch = tasks.create_task(source.supervise())
            async with asyncio.timeout(60):
                while len(extractor.calls) < 20:
                    await asyncio.sleep(0.02)
                assert source._consumer is not None
                hang(source._consumer, monkeypatch)
                await real.send(topic, *later, partition=None)
                while len(set(extractor.calls)) < 90 or pipeline.status(GROUP).window_messages:
                    await asyncio.sleep(0.1)
            pipeline.stop()
            assert await run
            watch.cancel()
    finally:
        await source.stop()
        await sink.stop()

    assert ClientReplaced("consumer") in told
    assert Counter(extractor.calls) == Counter(first + later)
    published = [each.header["sluice.id"] for each in await topics.read_topic(real.servers, output)]
    assert len(published) == len(set(published)) == 90
    assert sum((await real.committed(group, topic, 3)).values()) == 90


@pytest.mark.parametrize("arrives", [True, False])
async def test_a_mark_in_doubt_is_fenced_before_it_is_made_again(
    real: Kafka, monkeypatch: pytest.MonkeyPatch, *, arrives: bool
) -> None:
    """The restore's mark is a transaction: one without an answer can set nothing back later."""
    topic, group = await real.topic(1), topics.unique_name("g")
    output, letters = await real.topic(1), await real.topic(1)
    await real.send(topic, "a", "b")
    told: list[Event] = []
    ours = settings(
        real,
        topic,
        group,
        kafka={"session_timeout_s": 8.0},
        output={"topic": output},
        dead_letters={"topic": letters},
        delivery={"mode": "exactly_once"},
    )
    commit, stored, fences = TransactionalProducer.commit, GroupOffsets.stored, 0
    seen: list[object] = []

    async def unanswered(producer: TransactionalProducer) -> None:
        if arrives:
            await commit(producer)
        monkeypatch.setattr(TransactionalProducer, "commit", commit)
        await asyncio.Event().wait()

    async def noted(offsets: GroupOffsets) -> Mapping[Partition, Stored | None]:
        found = await stored(offsets)
        seen.append((fences, found[part(topic)]))
        return found

    monkeypatch.setattr(TransactionalProducer, "commit", unanswered)
    monkeypatch.setattr(GroupOffsets, "stored", noted)
    sink = KafkaSink(ours, told.append)
    assert sink.transactions is not None
    fence = sink.transactions.fence

    async def counted(partitions: AbstractSet[Partition]) -> None:
        nonlocal fences
        await fence(partitions)
        fences += 1

    monkeypatch.setattr(sink.transactions, "fence", counted)
    source = KafkaSource(ours, told.append, sink.transactions)
    one = Member(source, told)
    await sink.start()
    await source.start(one)
    try:
        await one.until(lambda: len(one.messages) == 2)
    finally:
        await source.stop()
        await sink.stop()
    # Of each attempt: read, fence, read behind it. The mark that arrived is seen behind its own.
    assert [number for number, _ in seen] == [0, 1, 1, 2]
    assert arrives == (seen[-1][1] is not None)
    assert await real.committed(group, topic) == {0: 0}


GROUP = GroupStatus()

BOUNDS = Bounds(
    concurrency=8,
    window=32,
    window_bytes=1_000_000,
    ordering="key",
    attempts_max=3,
    call_deadline_s=60,
    commit_interval_s=0.5,
    drain_timeout_s=30,
    rebalance_drain_s=5,
)


def _decode(message: Message) -> str | Outcome:
    return (message.value or b"").decode()


# --- topics --------------------------------------------------------------------------------------


async def test_a_deleted_topic_is_an_end(real: Kafka, caplog: pytest.LogCaptureFixture) -> None:
    """After it was missing in several looks, with a sentence; nothing is committed from then on."""
    topic, group = await real.topic(), topics.unique_name("g")
    await real.send(topic, "a")

    async def delete() -> None:
        async with topics.admin(real.servers) as client:
            await client.delete_topics([topic])

    end = await end_of(real, topic, group, delete)
    assert end.startswith(f"Topic {topic} was deleted while it was being read")
    assert f"brokers don't know topic {topic} any more" in caplog.text


async def test_a_topic_made_again_is_an_end(real: Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its id, also where the new log is as long as the old; no offset is committed onto it."""
    monkeypatch.setattr("service.kafka.group.watchdog.GONE_S", 60.0)
    topic, group = await real.topic(), topics.unique_name("g")
    await real.send(topic, "a")

    async def make_again() -> None:
        async with topics.admin(real.servers) as client:
            await client.delete_topics([topic])
        await _until_it_is_gone(real, topic)
        await topics.create_topic(real.servers, topic, 1)
        await real.send(topic, "new", "new")

    end = await end_of(real, topic, group, make_again)
    assert end.startswith(f"Topic {topic} was deleted and made again while it was being read")
    assert await real.committed(group, topic) in ({}, {0: 0})


async def _until_it_is_gone(kafka: Kafka, topic: str) -> None:
    async with topics.admin(kafka.servers) as client, asyncio.timeout(PATIENCE_S):
        while (await topic_ids(client, [topic]))[topic] is not None:
            await asyncio.sleep(0.05)


async def test_a_commit_does_not_wait_for_a_topic_of_the_same_name(
    real: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that does not know the topic ends it, and none follows until a look, at once."""
    monkeypatch.setattr("service.kafka.group.supervision.LOOK_EVERY_S", 60.0)
    topic, group = await real.topic(), topics.unique_name("g")
    once, asked = Membership.commit_once, 0

    async def unknown(self: Membership, offsets: Mapping[Partition, Stored]) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise UnknownTopicOrPartitionError
        await once(self, offsets)

    async with member(real, topic, group) as one:
        await one.until(lambda: bool(one.epochs))
        monkeypatch.setattr(Membership, "commit_once", unknown)
        with pytest.raises(CommitFailed, match="UnknownTopic"):
            await one.commit({part(topic): 0})
        with pytest.raises(CommitFailed, match="topic"):
            await one.commit({part(topic): 0})
        assert asked == 1
        assert one.source._member.holdings.to_store(part(topic)) is None, (
            "for a transaction neither"
        )
        async with asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(one.source.supervise())
            await one.until(lambda: not one.source._supervision.doubtful)
            watch.cancel()
        await one.commit({part(topic): 0})


async def test_an_added_partition_is_read_from_its_start(
    real: Kafka, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By a group that is known, although it starts at the latest; said, and counted."""
    caplog.set_level(logging.INFO, "service")
    monkeypatch.setattr("service.kafka.client.connection.METADATA_MAX_AGE_MS", 500)
    topic, group = await real.topic(1), topics.unique_name("g")
    async with supervised(real, topic, group) as one:
        await one.until(lambda: len(one.epochs) == 1)
        await real.send(topic, "a")
        await one.until(lambda: len(one.messages) == 1)
        await one.commit({part(topic): 1})
        await _add_partition(real, topic)
        await real.send(topic, "b", partition=1)
        await one.until(lambda: len(one.messages) == 2)
        await one.until(lambda: one.source.group().topic_partitions == {topic: 2})
    assert one.texts == ["a", "b"]
    assert one.heard(ClientReplaced) == []
    assert f"topic {topic} has now 2 partitions" in caplog.text


async def test_a_client_that_does_not_learn_of_a_partition_is_replaced(
    real: Kafka, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its metadata is never refreshed: found although no partition that it holds is behind."""
    monkeypatch.setattr("service.kafka.group.supervision.METADATA_MAX_AGE_MS", 500)
    topic, group = await real.topic(1), topics.unique_name("g")
    async with supervised(real, topic, group) as one:
        await one.until(lambda: len(one.epochs) == 1)
        await one.commit({part(topic): 0})
        await _add_partition(real, topic)
        await real.send(topic, "b", partition=1)
        await one.until(lambda: len(one.messages) == 1)
    assert one.texts == ["b"]
    assert f"it knows 1 partition of topic {topic}, which has 2" in caplog.text


async def _add_partition(kafka: Kafka, topic: str) -> None:
    async with topics.admin(kafka.servers) as client:
        await client.create_partitions({topic: NewPartitions(2)})
        async with asyncio.timeout(PATIENCE_S):
            while len((await find_topics(client, [topic]))[topic].leaders) < 2:
                await asyncio.sleep(0.05)


# --- the looks themselves ------------------------------------------------------------------------


async def test_ids_are_those_that_kafka_prints(real: Kafka) -> None:
    """The same until a topic is made again; none for a topic that is not there."""
    topic = await real.topic()
    async with topics.admin(real.servers) as client:
        first = await topic_ids(client, [topic, "not-there"])
        assert first["not-there"] is None
        assert len(first[topic] or "") == 22
        assert await topic_ids(client, [topic]) == {topic: first[topic]}
        await client.delete_topics([topic])
        await _until_it_is_gone(real, topic)
        await topics.create_topic(real.servers, topic, 1)
        assert (await topic_ids(client, [topic]))[topic] not in (None, first[topic])


@pytest.mark.parametrize("newest", [4, 5, 9])
async def test_brokers_that_know_no_ids_tell_the_rest(
    mock_kafka: EmbeddedBroker, newest: int
) -> None:
    """They are asked as before ids."""
    mock_kafka.create_topic("texts", 2)
    async with topics.admin(mock_kafka.bootstrap_servers) as client:
        await topic_ids(client, ["texts"])
        for connection in client._client._conns.values():
            connection._versions[3] = (0, newest)
        found = await find_topics(client, ["texts", "not-there"])
    assert found["texts"].id is None
    assert len(found["texts"].leaders) == 2
    assert found["not-there"].leaders == {}


async def test_a_look_that_fails_is_a_warning_and_opens_anew(
    real: Kafka, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever a broker answers, and however long it takes; one warning for a series."""
    topic, group = await real.topic(), topics.unique_name("g")
    monkeypatch.setattr("service.kafka.group.supervision.LOOK_S", 0.5)
    lookout = Lookout(settings(real, topic, group).kafka)
    asked: list[AIOKafkaAdminClient] = []

    async def failing(client: AIOKafkaAdminClient, _: list[str]) -> object:
        asked.append(client)
        if len(asked) == 1:
            raise IncompatibleBrokerVersion
        return await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr("service.kafka.group.supervision.find_topics", failing)
        assert await lookout.look([topic], set()) is None
        assert await lookout.look([topic], set()) is None
    assert asked[0] is not asked[1]
    look = await lookout.look([topic], {part(topic), part("other")})
    await lookout.close()
    assert look is not None
    assert look.ends == {part(topic): 0}
    assert caplog.text.count("brokers do not tell about the topics") == 1


async def test_a_look_tells_the_lag_of_every_partition_whoever_holds_it(real: Kafka) -> None:
    """By what the group has stored; unknown where it has stored nothing; on request only."""
    topic, group = await real.topic(3), topics.unique_name("g")
    for number, messages in enumerate((3, 5, 2)):
        await real.send(topic, *map(str, range(messages)), partition=number)
    await real.store(group, topic, {0: 1, 1: 5})
    kafka = settings(real, topic, group).kafka
    for lags, expected in ((True, {part(topic, 0): 2, part(topic, 1): 0}), (False, {})):
        lookout = Lookout(kafka, lags=lags)
        look = await lookout.look([topic], {part(topic, 2)})
        await lookout.close()
        assert look is not None
        assert look.lags == expected
        assert look.ends == {part(topic, 2): 2}, "those that are held"


async def test_workers_hear_of_all_partitions_at_the_start(real: Kafka) -> None:
    """Before the first call, so that two that start together do not use two budgets."""
    topic, group = await real.topic(3), topics.unique_name("g")
    async with real.member(topic, group) as one:
        assert one.lags == {part(topic, number): None for number in range(3)}


async def test_an_outage_makes_no_liveness_fail(
    mock_kafka: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looks go on failing, each in time, and nothing is replaced: a restart would not help."""
    monkeypatch.setattr("service.kafka.group.supervision.LOOK_S", 1.0)
    kafka = Kafka(mock_kafka.bootstrap_servers, mock_kafka)
    topic, group = await kafka.topic(1), topics.unique_name("g")
    async with supervised(kafka, topic, group) as one:
        await one.until(lambda: bool(one.epochs))
        mock_kafka.stop()
        for _ in range(30):
            await one.poll()
            assert one.source.group().look_age_s < 5
    assert one.heard(ClientReplaced) == []


async def test_a_watchdog_that_hangs_is_seen(real: Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look without a bound would let the age grow, which liveness follows."""
    topic, group = await real.topic(), topics.unique_name("g")
    monkeypatch.setattr(Lookout, "look", lambda *_: HeldUp().wait())
    async with supervised(real, topic, group) as one:
        await one.until(lambda: one.source.group().look_age_s > 1.5)
    assert one.source.group().look_age_s == 0.0

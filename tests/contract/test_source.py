"""What every source keeps to, the fake among them; then what a real protocol is needed for.

Claims on `broker` run on the fake of the pipeline tests, on the embedded broker and on a real
Kafka: what the pipeline was tested against is what it meets.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from random import Random

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from aiokafka.consumer.fetcher import FetchError, FetchResult
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.errors import (
    CorruptRecordException,
    IllegalGenerationError,
    KafkaError,
    OffsetMetadataTooLargeError,
    OffsetOutOfRangeError,
    RebalanceInProgressError,
    UnknownMemberIdError,
)
from aiokafka.structs import TopicPartition
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from service.core.errors import CannotRun, CommitFailed
from service.core.events import Committed, ForeignMetadata, OffsetsMissing, Rebalanced
from service.core.messages import Batch, Partition
from service.core.tracker import Progress
from service.demo.broker import EmbeddedBroker
from service.kafka.client.private import Membership
from service.kafka.client.stored import Stored, read
from service.kafka.client.topics_seen import topic_ids
from service.kafka.group.group_offsets import GroupOffsets
from tests.support import topics
from tests.support.kafka import SASL_PASSWORD, SASL_USER, RealKafka, free_ports
from tests.support.sources import PATIENCE_S, Broker, Fake, HeldUp, Kafka, both, member, part

REAL = pytest.mark.real_kafka


@pytest.fixture(params=["fake", "mock_kafka", pytest.param("real_kafka", marks=REAL)])
async def broker(request: pytest.FixtureRequest) -> AsyncIterator[Broker]:
    """Whatever a source can read from."""
    async for each in _broker(request):
        yield each


@pytest.fixture(params=["fake", pytest.param("real_kafka", marks=REAL)])
async def group_broker(request: pytest.FixtureRequest) -> AsyncIterator[Broker]:
    """Without the embedded one, which has neither transactions nor groups of several: it completes
    an assignment as soon as the leader has sent it, and refuses those who ask for theirs later.
    """
    async for each in _broker(request):
        yield each


async def _broker(request: pytest.FixtureRequest) -> AsyncIterator[Broker]:
    if request.param == "fake":
        fake = Fake()
        yield fake
        await fake.settle()
    else:
        yield _kafka(request)


@pytest.fixture(params=["mock_kafka", pytest.param("real_kafka", marks=REAL)])
def kafka(request: pytest.FixtureRequest) -> Kafka:
    return _kafka(request)


def _kafka(request: pytest.FixtureRequest) -> Kafka:
    found = request.getfixturevalue(request.param)
    if isinstance(found, EmbeddedBroker):
        return Kafka(found.bootstrap_servers, found)
    return Kafka(found)


@pytest.fixture
def real(real_kafka: str) -> Kafka:
    return Kafka(real_kafka)


# --- reading -------------------------------------------------------------------------------------


async def test_messages_come_in_order_with_all_they_have(broker: Broker) -> None:
    """Key, value, headers and timestamp stay as they are; a message without a value too."""
    topic, group = await broker.topic(), topics.unique_name("g")
    await broker.produce(
        topic,
        [(b"k", b"one"), (None, b"two"), (b"k", None)],
        headers=[("h", b"\xff\x00"), ("h", b"")],
        timestamp_ms=1_700_000_000_123,
    )

    async with member(broker, topic, group) as one:
        await one.until(lambda: len(one.messages) == 3)

    assert [(m.offset, m.key, m.value) for m in one.messages] == [
        (0, b"k", b"one"),
        (1, None, b"two"),
        (2, b"k", None),
    ]
    assert one.messages[0].headers == (("h", b"\xff\x00"), ("h", b""))
    assert one.messages[0].timestamp_ms == 1_700_000_000_123
    assert one.positions == {part(topic): 3}


async def test_messages_name_the_id_of_their_topic(real: Kafka) -> None:
    """As Kafka's tools print it: one made again under the name has another."""
    topic, group = await real.topic(), topics.unique_name("g")
    await real.send(topic, "a")
    async with member(real, topic, group) as one, topics.admin(real.servers) as client:
        await one.until(lambda: len(one.messages) == 1)
        assert {topic: one.messages[0].topic_id} == await topic_ids(client, [topic])


async def test_positions_never_run_ahead_of_the_messages(broker: Broker) -> None:
    """With a limit of one, each position is the offset behind the one message; ends are known."""
    topic, group = await broker.topic(), topics.unique_name("g")
    await broker.send(topic, *"abcde")

    async with member(broker, topic, group) as one:
        seen = []
        while len(one.messages) < 5:
            batch = await one.poll(limit=1)
            if batch.messages:
                seen.append((batch.messages[0].offset, batch.positions[part(topic)]))

    assert seen == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert one.ends == {part(topic): 5}


async def test_partitions_take_turns(broker: Broker) -> None:
    """A window of few messages is filled from all partitions that have some."""
    topic, group = await broker.topic(4), topics.unique_name("g")
    for number in range(4):
        await broker.send(topic, *(f"{number}-{i}" for i in range(50)), partition=number)

    async with member(broker, topic, group) as one:
        await one.until(lambda: len(one.messages) > 0, limit=8)
        await asyncio.sleep(0.5)  # until every partition has its fetch
        batch = await one.poll(limit=8)

    assert {m.partition.partition for m in batch.messages} == {0, 1, 2, 3}
    assert len(batch.messages) == 8


async def test_a_closed_partition_gives_nothing_until_it_is_open_again(broker: Broker) -> None:
    """What is closed is not taken, and nothing of it is missed afterwards."""
    topic, group = await broker.topic(2), topics.unique_name("g")
    await broker.send(topic, "a0", "a1", partition=0)
    await broker.send(topic, "b0", "b1", partition=1)

    async with member(broker, topic, group) as one:
        closed = {part(topic, 1)}
        await one.until(lambda: len(one.messages) == 2, closed=closed)
        await one.poll(closed=closed)
        assert one.texts == ["a0", "a1"]
        all_closed = await one.poll(closed={part(topic, 0), part(topic, 1)})
        assert all_closed.messages == ()
        assert all_closed.positions == {part(topic, 0): 2, part(topic, 1): 0}

        await one.until(lambda: len(one.messages) == 4)
    assert one.texts[2:] == ["b0", "b1"]


async def test_limit_zero_takes_nothing_and_does_not_wait(broker: Broker) -> None:
    """It only counts as a poll; what came meanwhile is there afterwards."""
    topic, group = await broker.topic(), topics.unique_name("g")

    async with member(broker, topic, group) as one:
        await one.until(lambda: bool(one.epochs))
        await broker.send(topic, "a", "b")
        started = time.monotonic()
        for _ in range(20):
            await one.poll(limit=0)
        assert time.monotonic() - started < 1.0
        assert one.messages == []

        await one.until(lambda: len(one.messages) == 2)


async def test_a_long_pause_ends(kafka: Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking nothing for longer than the client lets a member be idle loses no partition."""
    monkeypatch.setattr("service.kafka.source.MAX_POLL_INTERVAL_MS", 1500)
    topic, group = await kafka.topic(), topics.unique_name("g")
    await kafka.send(topic, "a", "b", "c")

    async with member(kafka, topic, group) as one:
        await one.until(lambda: len(one.messages) == 1, limit=1)
        ends = time.monotonic() + 4
        while time.monotonic() < ends:
            await one.poll(limit=0)
            await asyncio.sleep(0.2)
        await one.until(lambda: len(one.messages) == 3)

    assert one.texts == ["a", "b", "c"]
    assert len(one.assignments) == 1, "it left the group in between"


async def test_a_cancelled_poll_loses_nothing(broker: Broker) -> None:
    """Whoever stops waiting gets the message with the next poll."""
    topic, group = await broker.topic(), topics.unique_name("g")

    async with member(broker, topic, group) as one:
        await one.until(lambda: bool(one.epochs))
        sending = asyncio.create_task(broker.send(topic, *(str(i) for i in range(200))))
        async with asyncio.timeout(PATIENCE_S):
            while len(one.messages) < 200:
                try:
                    async with asyncio.timeout(0.002):
                        await one.poll(limit=3)
                except TimeoutError:
                    pass
        await sending

    assert one.texts == [str(i) for i in range(200)]


async def test_an_error_of_the_client_skips_nothing(
    kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may come after the client has taken messages and moved on: they are fetched again."""
    topic, group = await kafka.topic(2), topics.unique_name("g")
    await kafka.send(topic, *"abc", partition=0)
    await kafka.send(topic, *"def", partition=1)
    getall, failed = FetchResult.getall, 0

    def failing(self: FetchResult, limit: int) -> object:
        nonlocal failed
        found = getall(self, limit)
        if found and failed < 3:
            failed += 1
            raise KafkaError("after the messages were taken")
        return found

    monkeypatch.setattr(FetchResult, "getall", failing)
    async with member(kafka, topic, group) as one:
        await one.until(lambda: len(one.messages) == 6, limit=2)
    assert sorted(one.texts) == list("abcdef")
    assert failed == 3


async def test_an_error_is_heard_without_a_wait(kafka: Kafka) -> None:
    """Beside a busy partition nobody ever waits, where `getmany` would raise it."""
    topic, group = await kafka.topic(), topics.unique_name("g")
    await kafka.send(topic, "a")
    async with member(kafka, topic, group) as one:
        await one.until(lambda: one.texts == ["a"])
        consumer, where = one.source._consumer, TopicPartition(topic, 0)
        assert consumer is not None
        error = OffsetOutOfRangeError({where: 1})
        consumer._fetcher._records[where] = FetchError(error=error, backoff=0)
        with pytest.raises(OffsetOutOfRangeError):
            one.source._member.membership.fetched(where, 1)
        assert where not in consumer._fetcher._records, "nothing of it would be fetched any more"
        await kafka.send(topic, "b")
        await one.until(lambda: one.texts == ["a", "b"])


async def test_what_cannot_be_read_holds_its_own_partition_only(
    kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others go on, the sentence says where it stands, and it is tried again."""
    monkeypatch.setattr("service.kafka.group.positions.MEND_AGAIN_S", 0.3)
    topic, group = await kafka.topic(2), topics.unique_name("g")
    await kafka.send(topic, "a", partition=0)
    await kafka.send(topic, "b", partition=1)
    getall, readable = FetchResult.getall, False

    def damaging(self: FetchResult, limit: int) -> object:
        if self._topic_partition.partition == 0 and not readable:
            raise CorruptRecordException
        return getall(self, limit)

    monkeypatch.setattr(FetchResult, "getall", damaging)
    async with member(kafka, topic, group) as one:
        await one.until(lambda: one.texts == ["b"] and one.source.group().problem is not None)
        assert f"{topic}[0] at offset 0" in (one.source.group().problem or "")
        readable = True
        await one.until(lambda: one.texts == ["b", "a"])
        assert one.source.group().problem is None


async def test_a_message_larger_than_a_fetch_comes_all_the_same(
    kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size of a fetch bounds memory, not messages."""
    monkeypatch.setattr("service.kafka.source.FETCH_MAX_BYTES", 20_000)
    monkeypatch.setattr("service.kafka.source.FETCH_PARTITION_MAX_BYTES", 10_000)
    topic, group = await kafka.topic(), topics.unique_name("g")
    await kafka.send(topic, "small", "x" * 900_000, "last")

    async with member(kafka, topic, group) as one:
        await one.until(lambda: len(one.messages) == 3)

    assert [len(text) for text in one.texts] == [5, 900_000, 4]


async def test_positions_step_over_markers_and_aborted_messages(group_broker: Broker) -> None:
    """A topic that ends in an aborted transaction is read to its end: position = end.

    The position comes with an empty batch, and what is sent later is delivered behind it.
    """
    topic, group = await group_broker.topic(), topics.unique_name("g")
    await group_broker.transaction(topic, "kept")
    await group_broker.transaction(topic, "gone", "gone", abort=True)

    async with member(group_broker, topic, group) as one:
        await one.until(lambda: one.positions.get(part(topic)) == 5)
        assert one.texts == ["kept"]
        assert one.ends == {part(topic): 5}
        assert await one.poll() == Batch((), {part(topic): 5}, {part(topic): 5})
        await group_broker.send(topic, "later")
        await one.until(lambda: len(one.messages) == 2)
    assert [message.offset for message in one.messages] == [0, 5]


async def test_the_end_of_a_topic_is_behind_its_last_marker(real: Kafka) -> None:
    """The last stable offset, as whoever asks for the ends sees it."""
    topic, group = await real.topic(), topics.unique_name("g")
    await real.transaction(topic, "gone", abort=True)

    async with member(real, topic, group) as one:
        assert await one.source.ends() == {part(topic): 2}


# --- committing ----------------------------------------------------------------------------------


async def test_the_next_process_goes_on_behind_what_is_committed(broker: Broker) -> None:
    """Committed offsets are where the group goes on, whoever reads."""
    topic, group = await broker.topic(), topics.unique_name("g")
    await broker.send(topic, "a", "b", "c")

    async with member(broker, topic, group) as one:
        await one.until(lambda: len(one.messages) == 3)
        await one.commit({part(topic): 2})
        assert await broker.committed(group, topic) == {0: 2}

    async with member(broker, topic, group) as two:
        await two.until(lambda: len(two.messages) == 1)
    assert two.texts == ["c"]


async def test_what_is_stored_names_the_process_that_wrote_it(kafka: Kafka) -> None:
    """The metadata is ASCII, carries a nonce of the process and leaves room."""
    topic, group = await kafka.topic(), topics.unique_name("g")
    nonces = set()
    for _ in range(2):
        async with member(kafka, topic, group) as one:
            await one.until(lambda: bool(one.epochs))
            await one.commit({part(topic): 0})
        ((_, metadata),) = (await topics.committed(kafka.servers, group, topic, 1)).values()
        assert metadata.isascii()
        assert metadata.startswith("sluice1:")
        assert len(metadata) < 64
        nonces.add(metadata.split(":")[1])
    assert len(nonces) == 2


async def test_the_next_holder_gets_the_completed_map(broker: Broker) -> None:
    """What is finished beyond the next offset travels with it; each holder's own end counts in
    advance, and one that let go in order has taken his back."""
    topic, group = await broker.topic(), topics.unique_name("g")
    await broker.send(topic, *"abcdefgh")
    left_behind = Progress(2, runs=(1, 3), unclean_ends=0)
    async with member(broker, topic, group) as one:
        await one.until(lambda: bool(one.given))
        assert one.given[part(topic)].progress == Progress(0, unclean_ends=1)
        await one.commit({part(topic): left_behind})
        assert one.stored_last == {part(topic): left_behind}
    for unclean_ends in (1, 2):
        async with member(broker, topic, group) as two:
            await two.until(lambda: bool(two.given))
            expected = replace(left_behind, unclean_ends=unclean_ends)
            assert two.given[part(topic)].progress == expected


async def test_a_map_longer_than_brokers_take_is_stored_as_far_as_it_goes(kafka: Kafka) -> None:
    """The commit succeeds, and nothing unfinished counts as finished."""
    topic, group = await kafka.topic(), topics.unique_name("g")
    await kafka.send(topic, "a")
    random = Random(7)
    runs = tuple(random.randrange(1, 300) for _ in range(20_000))
    async with member(kafka, topic, group) as one:
        await one.until(lambda: bool(one.given))
        await one.commit({part(topic): Progress(0, runs)})
        assert one.heard(Committed)[-1].result == "ok"
    at, metadata = (await topics.committed(kafka.servers, group, topic, 1))[0]
    stored = read(Stored(at, metadata))
    assert stored is not None
    found = stored[0].runs
    assert len(found) > 1000
    assert found == runs[: len(found)]


async def test_a_partition_that_is_not_held_is_not_committed(broker: Broker) -> None:
    """Neither before the first assignment nor another's partition, nor half of what was asked."""
    topic, group = await broker.topic(), topics.unique_name("g")
    await broker.send(topic, "a")

    async with member(broker, topic, group) as one:
        with pytest.raises(CommitFailed, match="rebalance"):
            await one.commit({part(topic): 1})
        await one.until(lambda: len(one.messages) == 1)
        with pytest.raises(CommitFailed, match="rebalance"):
            await one.commit({part(topic): 1, part("other"): 1})
        assert (await broker.committed(group, topic)).get(0, 0) == 0


# --- starting ------------------------------------------------------------------------------------


async def test_a_new_group_starts_at_the_earliest_message(kafka: Kafka) -> None:
    """The default: everything that is there."""
    topic, group = await kafka.topic(), topics.unique_name("g")
    await kafka.send(topic, "a", "b")

    async with member(kafka, topic, group) as one:
        await one.until(lambda: len(one.messages) == 2)


async def test_a_new_group_starts_at_the_latest_message_and_stays_there(kafka: Kafka) -> None:
    """`latest` is where the group began, also for a process that follows without any commit."""
    topic, group = await kafka.topic(), topics.unique_name("g")
    await kafka.send(topic, "old")

    async with member(kafka, topic, group, input={"start": "latest"}) as one:
        await one.until(lambda: bool(one.epochs))
        await one.turn(2)
        assert one.messages == []
    await kafka.send(topic, "new")
    async with member(kafka, topic, group, input={"start": "latest"}) as two:
        await two.until(lambda: len(two.messages) == 1)
    assert two.texts == ["new"]


async def test_two_members_of_a_new_group_both_start_at_the_latest(real: Kafka) -> None:
    """Whoever restores second does not take the group for one that is known."""
    topic, group = await real.topic(2), topics.unique_name("g")
    await real.send(topic, "old", partition=0)
    await real.send(topic, "old", partition=1)

    async with (
        member(real, topic, group, input={"start": "latest"}) as one,
        member(real, topic, group, input={"start": "latest"}) as two,
    ):
        await both(one, two, lambda: len(one.epochs) == len(two.epochs) == 1)
        await one.turn(2)
        await two.turn(2)
        assert one.messages == two.messages == []


async def test_a_new_group_starts_at_a_time(real: Kafka) -> None:
    """The first message at or after it; the end where there is none."""
    topic, group = await real.topic(2), topics.unique_name("g")
    for at_ms, text in ((1_700_000_000_000, "before"), (1_700_000_100_000, "after")):
        await topics.produce(real.servers, topic, [text.encode()], partition=0, timestamp_ms=at_ms)
    await topics.produce(
        real.servers, topic, [b"before"], partition=1, timestamp_ms=1_700_000_000_000
    )
    start = datetime.fromtimestamp(1_700_000_050, UTC).isoformat()

    async with member(real, topic, group, input={"start": start}) as one:
        await one.until(lambda: len(one.messages) == 1)
        await one.turn(2)
    assert one.texts == ["after"]


async def test_a_partition_new_to_a_known_group_is_read_from_its_start(kafka: Kafka) -> None:
    """`latest` is for new groups: a partition that was added is read in full."""
    topic, group = await kafka.topic(2), topics.unique_name("g")
    await kafka.send(topic, "a", partition=0)
    await kafka.send(topic, "b", partition=1)
    await kafka.store(group, topic, {0: 1})

    async with member(kafka, topic, group, input={"start": "latest"}) as one:
        await one.until(lambda: len(one.messages) == 1)
        await one.turn(2)
    assert one.texts == ["b"]


async def test_offsets_below_the_log_are_counted_as_missing(
    real: Kafka, caplog: pytest.LogCaptureFixture
) -> None:
    """Reading goes on at the log's start, and says how much is gone."""
    topic, group = await real.topic(), topics.unique_name("g")
    await real.send(topic, *"abcde")
    await real.store(group, topic, {0: 1})
    await _delete_before(real, topic, 3)

    async with member(real, topic, group) as one:
        await one.until(lambda: len(one.messages) == 2)
    assert one.texts == ["d", "e"]
    assert one.heard(OffsetsMissing) == [OffsetsMissing(2)]
    assert f"{topic}[0]: the log starts at 3, so 2 offsets" in caplog.text


async def test_a_log_cut_behind_a_running_reader_is_counted_as_missing(
    real: Kafka, caplog: pytest.LogCaptureFixture
) -> None:
    """Retention that overtakes: the epoch stays, for what is in the window is all there is."""
    topic, group = await real.topic(), topics.unique_name("g")
    await real.send(topic, "a")

    async with member(real, topic, group) as one:
        await one.until(lambda: len(one.messages) == 1)
        # Nothing is fetched while the buffer is full: it is what `closed` does.
        await real.send(topic, "b")
        await one.until(lambda: one.ends.get(part(topic)) == 2, closed={part(topic)})
        await real.send(topic, *"cdef")
        await _delete_before(real, topic, 5)
        await one.until(lambda: "f" in one.texts)

    assert one.texts == ["a", "b", "f"]
    assert one.heard(OffsetsMissing) == [OffsetsMissing(3)]
    assert f"{topic}[0]: the log starts at 5, so 3 offsets" in caplog.text
    assert len(one.assignments) == 1


async def test_offsets_beyond_the_log_hold_it_out_with_a_sentence(kafka: Kafka) -> None:
    """A topic that was made again is not read from the start as if nothing had been."""
    topic, group = await kafka.topic(2), topics.unique_name("g")
    await kafka.send(topic, "a", partition=0)
    await kafka.send(topic, "b", partition=1)
    await kafka.store(group, topic, {0: 7, 1: 0})

    async with member(kafka, topic, group) as one:
        await one.until(lambda: len(one.messages) == 1)
        await one.turn(2)
        assert one.texts == ["b"]
        problem = one.source.group().problem
        assert problem is not None
        assert f"{topic}[0] has been read up to offset 7, but the log ends at 1:" in problem
    assert await kafka.committed(group, topic, 2) == {0: 7, 1: 0}

    await kafka.send(topic, *"cdefghij", partition=0)
    async with member(kafka, topic, group) as next_one:
        await next_one.until(lambda: bool(next_one.epochs))
        assert part(topic) not in next_one.epochs, "a log that has grown again hides what is lost"
        assert "has grown since" in (next_one.source.group().problem or "")

    async with kafka.member(topic, group, start_over=True) as told:
        await told.until(lambda: len(told.messages) == 9)
        assert told.texts == [*"cdefghij", "b"] or told.texts == ["b", *"cdefghij"]
        assert told.source.group().problem is None
    assert await kafka.committed(group, topic, 2) == {0: 1, 1: 0}


async def test_the_leaders_epoch_is_stored_with_what_was_read(real: Kafka) -> None:
    """From the batches of a fetch; also after the map, and where nothing was read since."""
    topic, group = await real.topic(), topics.unique_name("g")
    await real.send(topic, "a", "b", "c")
    async with member(real, topic, group) as one:
        await one.until(lambda: len(one.messages) == 3)
        await one.commit({part(topic): Progress(1, (1, 1))})
        assert ":E0" in (await topics.committed(real.servers, group, topic, 1))[0][1]
        found = await one.source._member.offsets.epoch_ends({part(topic): 0})
        assert found == {part(topic): 3}
    async with member(real, topic, group) as another:
        await another.until(lambda: len(another.epochs) == 1)
    assert ":E0" in (await topics.committed(real.servers, group, topic, 1))[0][1]


async def test_a_broker_that_knows_no_epochs_is_read_all_the_same(
    mock_kafka: EmbeddedBroker,
) -> None:
    """What it cannot tell is not known, and no failure."""
    kafka = Kafka(mock_kafka.bootstrap_servers, mock_kafka)
    topic, group = await kafka.topic(), topics.unique_name("g")
    await kafka.send(topic, "a")
    async with member(kafka, topic, group) as one:
        await one.until(lambda: len(one.messages) == 1)
        assert await one.source._member.offsets.epoch_ends({part(topic): 0}) == {}


async def test_a_log_that_ends_before_its_reader_is_held_out_for_good(kafka: Kafka) -> None:
    """Who reads finds it too, stores it, and does not read on when the log has grown again."""
    topic, group = await kafka.topic(), topics.unique_name("g")
    await kafka.send(topic, "a", "b")
    async with member(kafka, topic, group) as one:
        await one.until(lambda: len(one.messages) == 2)
        await one.commit({part(topic): 2})
        of_group = one.source._member
        assert of_group is not None
        holdings = of_group.holdings
        holdings.held[part(topic)].next = 9  # as if seven more had been read
        of_group.positions.cannot_read(part(topic))
        await one.until(lambda: ":H2" in holdings.held[part(topic)].stored.metadata)
        await kafka.send(topic, *"cdefghijk")
        await one.turn()
        assert one.texts == ["a", "b"]
    found = await topics.committed(kafka.servers, group, topic, 1)
    assert found[0][0] == 2
    assert found[0][1].endswith(":H2")


async def test_foreign_metadata_is_ignored(kafka: Kafka) -> None:
    """Only the offset counts of what somebody else stored."""
    topic, group = await kafka.topic(), topics.unique_name("g")
    await kafka.send(topic, "a", "b")
    await kafka.store(group, topic, {0: 1}, metadata="sluice1:zz;\x7f")

    async with member(kafka, topic, group) as one:
        await one.until(lambda: len(one.messages) == 1)
    assert one.texts == ["b"]
    assert one.heard(ForeignMetadata) == [ForeignMetadata()]


async def test_an_unknown_topic_is_a_sentence(kafka: Kafka) -> None:
    """It names the topic and the command that makes it; nothing is created by asking."""
    topic = topics.unique_name("nowhere")
    for _ in range(2):
        with pytest.raises(CannotRun, match=f"no topic {topic} .*`sluice topics create`"):
            async with member(kafka, topic, "g"):
                pass


async def test_no_broker_is_a_sentence_within_seconds() -> None:
    """It names the address."""
    (port,) = free_ports(1)
    started = time.monotonic()
    with pytest.raises(CannotRun, match=f"No Kafka broker answers at 127.0.0.1:{port}"):
        async with member(Kafka(f"127.0.0.1:{port}"), "t", "g"):
            pass
    assert time.monotonic() - started < 15


def security(mechanism: str, password: str = SASL_PASSWORD) -> dict[str, object]:
    return {
        "security": {
            "protocol": "SASL_PLAINTEXT",
            "sasl_mechanism": mechanism,
            "username": SASL_USER,
            "password": password,
        }
    }


@pytest.fixture
def guarded(real_broker: RealKafka) -> Kafka:
    """The real Kafka's listener that asks for credentials."""
    if not hasattr(real_broker, "sasl_bootstrap_servers"):
        pytest.skip("this broker has no listener that asks for credentials")
    return Kafka(real_broker.sasl_bootstrap_servers)


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256"])
async def test_credentials_open_the_door_or_are_refused_with_a_sentence(
    real_broker: RealKafka, guarded: Kafka, mechanism: str
) -> None:
    """The right password reads; a wrong one names the user and the setting."""
    plain = Kafka(real_broker.bootstrap_servers)
    topic, group = await plain.topic(), topics.unique_name("g")
    await plain.send(topic, "a")

    async with member(guarded, topic, group, kafka=security(mechanism)) as one:
        await one.until(lambda: len(one.messages) == 1)
    with pytest.raises(CannotRun, match=f"refused the credentials of {SASL_USER}"):
        async with member(guarded, topic, group, kafka=security(mechanism, "wrong")):
            pass
    with pytest.raises(CannotRun, match=r"kafka.security.protocol \(PLAINTEXT\)"):
        async with member(guarded, topic, group):
            pass


@pytest.mark.parametrize("operation", ["ALL", "READ"])
@pytest.mark.parametrize("kind", ["TOPIC", "GROUP"])
async def test_a_missing_permission_is_a_sentence(
    real_broker: RealKafka, guarded: Kafka, kind: str, operation: str
) -> None:
    """At the start where it shows there, else by the poll that meets it; who, what, which."""
    plain = Kafka(real_broker.bootstrap_servers)
    topic, group = await plain.topic(), topics.unique_name("g")
    await plain.send(topic, "a")
    name = topic if kind == "TOPIC" else group
    await asyncio.to_thread(_deny, plain.servers, kind, name, operation)

    sentence = f"does not let {SASL_USER} use (topic|the group) {name}: give it READ"
    with pytest.raises(CannotRun, match=sentence):
        async with member(guarded, topic, group, kafka=security("PLAIN")) as one:
            await one.until(lambda: bool(one.messages))


def _deny(servers: str, kind: str, name: str, operation: str) -> None:
    binding = AclBinding(
        ResourceType[kind],
        name,
        ResourcePatternType.LITERAL,
        f"User:{SASL_USER}",
        "*",
        AclOperation[operation],
        AclPermissionType.DENY,
    )
    client = AdminClient({"bootstrap.servers": servers})
    for made in client.create_acls([binding]).values():
        made.result(10)


# --- the group -----------------------------------------------------------------------------------


async def test_a_member_that_stays_keeps_its_partitions_epochs(group_broker: Broker) -> None:
    """A second member takes some; the others go on under their epoch, with nothing twice."""
    topic, group = await group_broker.topic(4), topics.unique_name("g")
    for number in range(4):
        await group_broker.send(topic, "a", partition=number)

    async with member(group_broker, topic, group) as one:
        await one.until(lambda: len(one.messages) == 4)
        before = dict(one.epochs)
        async with member(group_broker, topic, group) as two:
            await both(one, two, lambda: len(one.epochs) == len(two.epochs) == 2)

            assert one.epochs.items() <= before.items()
            assert one.epochs.keys() | two.epochs.keys() == before.keys()
            assert one.revokes == 1
            for number in range(4):
                await group_broker.send(topic, "b", partition=number)
            await both(one, two, lambda: (one.texts + two.texts).count("b") == 4)
            assert one.texts.count("a") == 4, "fetched again what it had"
            assert two.texts.count("a") == 2, "nothing of it was committed"
        await one.until(lambda: len(one.epochs) == 4 and len(one.messages) == 10)

    # What came back anew is delivered again, from what is committed; what was kept is not.
    assert sorted(one.texts) == ["a"] * 6 + ["b"] * 4
    came_back = one.epochs.keys() - two.epochs.keys()
    assert all(one.epochs[each] == before[each] for each in came_back)
    assert all(one.epochs[each] > max(before.values()) for each in two.epochs)


async def test_a_static_member_that_comes_back_disturbs_nobody(real: Kafka) -> None:
    """Within its session it gets its partitions again, and the others hear of nothing."""
    topic, group = await real.topic(4), topics.unique_name("g")
    first, second = ({"group_instance_id": f"worker-{n}"} for n in range(2))
    async with member(real, topic, group, kafka=second) as two:
        async with member(real, topic, group, kafka=first) as one:
            await both(one, two, lambda: len(one.epochs) == len(two.epochs) == 2)
        had, revokes, told = one.epochs.keys(), two.revokes, len(two.assignments)
        async with member(real, topic, group, kafka=first) as again:
            await both(again, two, lambda: len(again.epochs) == 2)
            await both(again, two, lambda: len(again.positions) == 2)
        assert again.epochs.keys() == had
        assert (two.revokes, len(two.assignments)) == (revokes, told)


async def test_a_group_that_does_not_let_us_in_is_a_sentence(real: Kafka) -> None:
    """Another program shares the group's partitions in another way: said, not waited out."""
    topic, group = await real.topic(), topics.unique_name("g")
    other = AIOKafkaConsumer(topic, bootstrap_servers=real.servers, group_id=group)
    await other.start()
    try:
        with pytest.raises(CannotRun, match=f"group {group} has members that share"):
            async with member(real, topic, group) as one:
                await one.until(lambda: bool(one.assignments))
    finally:
        await other.stop()


async def test_what_is_revoked_can_be_committed_inside_and_not_after(group_broker: Broker) -> None:
    """The pipeline's last commit works; then nothing is, until it is known whose they are."""
    topic, group = await group_broker.topic(2), topics.unique_name("g")
    await group_broker.send(topic, "a", partition=0)
    await group_broker.send(topic, "a", partition=1)
    committed = {part(topic, 0): 1, part(topic, 1): 1}

    async with member(group_broker, topic, group) as one:
        await one.until(lambda: len(one.messages) == 2)

        async def commit() -> None:
            await one.commit(committed)

        one.when_revoked = commit
        async with member(group_broker, topic, group) as two:
            await both(one, two, lambda: len(one.epochs) == len(two.epochs) == 1)
            assert await group_broker.committed(group, topic, 2) == {0: 1, 1: 1}
            with pytest.raises(CommitFailed, match="rebalance"):
                await one.commit(committed)
            await two.turn(2)
            assert two.messages == []


async def test_nothing_is_read_or_committed_until_it_is_known_whose_it_is(
    group_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the revoke on no poll takes what is there; after it no commit does, until assigned."""
    topic, group = await group_broker.topic(2), topics.unique_name("g")
    await group_broker.send(topic, "a", partition=0)
    await group_broker.send(topic, "a", partition=1)

    async with member(group_broker, topic, group) as one:
        await one.until(lambda: len(one.messages) == 2)
        held_up = group_broker.hold_up_restores(monkeypatch)
        revoke = HeldUp()
        one.when_revoked = revoke.wait
        async with member(group_broker, topic, group) as two:
            await one.until(revoke.asked.is_set)
            await group_broker.send(topic, "b", partition=0)
            assert await one.poll() == Batch()
            revoke.gate.set()
            await one.until(held_up.asked.is_set)
            for _ in range(3):
                assert await one.poll() == Batch()
            with pytest.raises(CommitFailed, match="rebalance"):
                await one.commit({part(topic, 0): 1, part(topic, 1): 1})
            held_up.gate.set()
            await both(one, two, lambda: len(one.epochs) == len(two.epochs) == 1)


async def test_a_commit_does_not_outlive_its_assignment(
    group_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that waited through a rebalance is refused: another member may have the partitions."""
    topic, group = await group_broker.topic(2), topics.unique_name("g")
    await group_broker.send(topic, "a", partition=0)
    await group_broker.send(topic, "a", partition=1)

    async with member(group_broker, topic, group) as one:
        await one.until(lambda: len(one.messages) == 2)
        held_up = group_broker.hold_up_commits(monkeypatch)
        late = asyncio.create_task(one.commit({part(topic, 0): 1, part(topic, 1): 1}))
        await held_up.asked.wait()
        async with member(group_broker, topic, group) as two:
            await both(one, two, lambda: len(one.epochs) == len(two.epochs) == 1)
            held_up.gate.set()
            with pytest.raises(CommitFailed, match="rebalance"):
                await late
            assert not any((await group_broker.committed(group, topic, 2)).values())


async def test_a_commit_without_an_answer_fails_in_time(
    kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator that is not found does not hold the commit up for good, nor the next one.

    How each commit ended is told: a refusal is no failure.
    """
    monkeypatch.setattr("service.kafka.group.committing.COMMIT_S", 0.3)
    topic, group = await kafka.topic(), topics.unique_name("g")

    async def never(self: Membership) -> None:
        await asyncio.Event().wait()

    async with member(kafka, topic, group) as one:
        await one.until(lambda: bool(one.epochs))
        with monkeypatch.context() as patch:
            patch.setattr(Membership, "find_coordinator", never)
            with pytest.raises(CommitFailed, match="timeout"):
                await asyncio.wait_for(one.commit({part(topic): 0}), 10)
        await one.commit({part(topic): 0})
        with pytest.raises(CommitFailed, match="rebalance"):
            await one.commit({part("other"): 0})
        results = [event.result for event in one.heard(Committed)]  # type: ignore[union-attr]
        assert results == ["failed", "ok", "refused"]


@pytest.mark.parametrize(
    ("error", "reason", "result"),
    [
        (RebalanceInProgressError, "rebalance", "refused"),
        (IllegalGenerationError, "rebalance", "refused"),
        (UnknownMemberIdError, "rebalance", "refused"),
        (OffsetMetadataTooLargeError, "OffsetMetadataTooLargeError", "failed"),
    ],
)
async def test_a_refused_commit_is_neither_done_nor_an_end(
    mock_kafka: EmbeddedBroker,
    monkeypatch: pytest.MonkeyPatch,
    error: type[KafkaError],
    reason: str,
    result: str,
) -> None:
    """The pipeline hears why, and nothing of it as stored; polls go on, and so does the next one.

    A metric tells a refusal, which is no fault, from a failure.
    """
    kafka = Kafka(mock_kafka.bootstrap_servers, mock_kafka)
    topic, group = await kafka.topic(), topics.unique_name("g")
    await kafka.send(topic, "a", "b")

    async def refuse(*_: object) -> None:
        raise error

    async with member(kafka, topic, group) as one:
        await one.until(lambda: len(one.messages) == 1, limit=1)
        with monkeypatch.context() as patch:
            patch.setattr(GroupCoordinator, "_do_commit_offsets", refuse)
            with pytest.raises(CommitFailed, match=reason):
                await one.commit({part(topic): 1})
        assert one.stored_last == {}
        await one.until(lambda: len(one.messages) == 2)
        await one.commit({part(topic): 2})
        assert one.stored_last == {part(topic): Progress(2)}
        assert [event.result for event in one.heard(Committed)] == [result, "ok"]  # type: ignore[union-attr]
    assert await kafka.committed(group, topic) == {0: 2}


async def test_no_message_comes_before_its_restore(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the group's offsets are being read, polls return nothing and commits are refused."""
    topic, group = await broker.topic(), topics.unique_name("g")
    await broker.send(topic, "a", "b")
    await broker.store(group, topic, {0: 1})
    held_up = broker.hold_up_restores(monkeypatch)

    async with member(broker, topic, group) as one:
        await one.until(held_up.asked.is_set)
        for _ in range(5):
            assert await one.poll() == Batch()
        assert one.assignments == []
        with pytest.raises(CommitFailed, match="rebalance"):
            await one.commit({part(topic): 2})
        held_up.gate.set()
        await one.until(lambda: len(one.messages) == 1)
    assert one.texts == ["b"]


async def test_a_restore_that_fails_is_repeated(
    kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offsets that cannot be read are read again; nothing starts without them."""
    monkeypatch.setattr("service.kafka.group.restore.RESTORE_AGAIN_S", 0.3)
    topic, group = await kafka.topic(), topics.unique_name("g")
    await kafka.send(topic, "a", "b")
    await kafka.store(group, topic, {0: 1})
    answers = AIOKafkaAdminClient.list_consumer_group_offsets
    refused = 0

    async def refusing(self: AIOKafkaAdminClient, *args: object, **options: object) -> object:
        nonlocal refused
        refused += 1
        # The client makes an empty answer out of a coordinator that is still loading.
        return {} if refused <= 2 else await answers(self, *args, **options)

    monkeypatch.setattr(AIOKafkaAdminClient, "list_consumer_group_offsets", refusing)
    async with member(kafka, topic, group) as one:
        await one.until(lambda: refused == 2)
        assert "cannot be read" in (one.source.group().problem or "")
        assert one.messages == []
        await one.until(lambda: len(one.messages) == 1)
        assert one.source.group().problem is None
    assert one.texts == ["b"]


async def test_a_broker_that_lags_behind_a_new_partition_is_waited_for(
    kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group gives out a partition that the broker we ask has not heard of: asked again."""
    monkeypatch.setattr("service.kafka.group.restore.RESTORE_AGAIN_S", 0.3)
    topic, group = await kafka.topic(2), topics.unique_name("g")
    await kafka.send(topic, "a", partition=1)
    partitions = GroupOffsets.partitions
    asked = 0

    async def behind(self: GroupOffsets) -> frozenset[Partition]:
        nonlocal asked
        asked += 1
        return await partitions(self) - ({part(topic, 1)} if asked <= 2 else set())

    monkeypatch.setattr(GroupOffsets, "partitions", behind)
    async with member(kafka, topic, group) as one:
        await one.until(lambda: one.texts == ["a"])
    assert asked == 3


async def test_who_stops_polling_gives_its_partitions_up(
    real: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member whose polls have ceased leaves the group, also when its last one was cut off."""
    monkeypatch.setattr("service.kafka.source.MAX_POLL_INTERVAL_MS", 2000)
    topic, group = await real.topic(), topics.unique_name("g")
    async with member(real, topic, group) as one:
        await one.until(lambda: len(one.epochs) == 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(one.poll(), 0.05)
        async with member(real, topic, group) as two:
            await two.until(lambda: len(two.epochs) == 1)


async def test_a_member_that_stood_still_holds_nothing_of_before(real: Kafka) -> None:
    """As after SIGSTOP and SIGCONT: another has had its partitions and given them back. It commits
    nothing that it had, and starts anew behind what the other one has stored."""
    topic, group = await real.topic(2), topics.unique_name("g")
    quick = {"session_timeout_s": 2.0}
    both_parts = {part(topic, 0), part(topic, 1)}

    async def live() -> None:
        async with member(real, topic, group, kafka=quick) as two:
            await two.until(lambda: len(two.messages) == 4)
            await two.commit(dict.fromkeys(both_parts, 2))

    for number in (0, 1):
        await real.send(topic, "a", "b", partition=number)
    async with member(real, topic, group, kafka=quick) as one:
        await one.until(lambda: len(one.messages) == 4)
        before = dict(one.epochs)
        other = threading.Thread(target=lambda: asyncio.run(live()))
        other.start()
        other.join()  # which holds this loop up
        with pytest.raises(CommitFailed, match="rebalance"):
            await one.commit(dict.fromkeys(both_parts, 1))
        await one.until(lambda: len(one.assignments) == 2)
        assert all(one.epochs[each] > before[each] for each in both_parts)
        assert await real.committed(group, topic, 2) == {0: 2, 1: 2}
        await real.send(topic, "c", partition=0)
        await one.until(lambda: len(one.messages) > 4)
    assert one.texts[4:] == ["c"]


async def test_stop_leaves_the_group_at_once(real: Kafka) -> None:
    """Another member has the partitions long before the session would have timed out."""
    topic, group = await real.topic(2), topics.unique_name("g")
    slow = {"session_timeout_s": 30.0}

    async with member(real, topic, group, kafka=slow) as two:
        async with member(real, topic, group, kafka=slow) as one:
            await both(one, two, lambda: len(one.epochs) == len(two.epochs) == 1)
            started = time.monotonic()
        stopped = time.monotonic()
        await two.until(lambda: len(two.epochs) == 2)
        assert stopped - started < 3
        assert time.monotonic() - stopped < 5


async def test_a_spare_member_is_settled(real: Kafka) -> None:
    """A member without partitions knows that it has none, and that brokers answer."""
    topic, group = await real.topic(1), topics.unique_name("g")

    async with member(real, topic, group) as one:
        assert not one.source.group().settled
        await one.until(lambda: bool(one.epochs))
        async with member(real, topic, group) as two:
            await both(
                one,
                two,
                lambda: all(
                    each.source.group().settled and each.assignments for each in (one, two)
                ),
            )
            assert len(one.epochs) + len(two.epochs) == 1
            assert [each.kept for each in one.heard(Rebalanced)] == [0, 1]  # type: ignore[union-attr]
            for each in (one, two):
                status = each.source.group()
                assert status.settled
                assert status.broker_answers
                assert status.unsettled_s == 0.0
                assert status.problem is None


async def test_an_outage_is_not_unsettled_time(
    mock_kafka: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an answering broker `broker_answers` turns false, and polls go on returning."""
    monkeypatch.setattr("service.kafka.group.settling.SILENT_S", 2.0)
    monkeypatch.setattr("service.kafka.source.ANSWER_S", 1.0)
    kafka = Kafka(mock_kafka.bootstrap_servers, mock_kafka)
    topic, group = await kafka.topic(1), topics.unique_name("g")

    async with member(kafka, topic, group) as one:
        await one.until(lambda: bool(one.epochs))
        mock_kafka.stop()
        await one.until(lambda: not one.source.group().broker_answers)
        assert one.source.group().unsettled_s < 3


# --- from outside --------------------------------------------------------------------------------


async def _delete_before(kafka: Kafka, topic: str, offset: int) -> None:
    async with topics.admin(kafka.servers) as client:
        await client.delete_records({TopicPartition(topic, 0): RecordsToDelete(offset)})

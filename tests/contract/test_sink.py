"""What every sink keeps to, the fake among them; then what a real protocol is needed for.

Claims on `target` run on the fake of the pipeline tests, on the embedded broker and on a real
Kafka: what the pipeline was tested against is what it meets.
"""

import asyncio
import gc
import random
import socket
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import replace

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from service.core.errors import CannotRun, OutputTooLarge, PublishFailed
from service.core.events import ClientReplaced, StopForced
from service.core.messages import (
    Aborted,
    Extracted,
    Message,
    Outcome,
    Part,
    Partition,
    Passed,
    Provenance,
    Reason,
    Record,
    Rejected,
    Skipped,
)
from service.demo.broker import EmbeddedBroker
from service.kafka import sink as sink_module
from service.kafka.sending import sizes as sizes_module
from service.kafka.sending.sizes import size_alone
from service.kafka.sink import KafkaSink
from service.ports import Sink
from tests.conftest import hanging
from tests.support.kafka import Broker
from tests.support.sinks import Fake, Kafka, Output
from tests.support.topics import Read, admin, create_topic, produce, unique_name

PROVENANCE = Provenance("small", "p1", "s1", calls=1, tokens_input=10, tokens_output=4)
NOW_MS = int(time.time() * 1000)


async def real(servers: str, **config: str) -> Kafka:
    kafka = Kafka(servers, unique_name("records"), unique_name("dead"))
    limits = {name.replace("_", "."): value for name, value in config.items()}
    await create_topic(servers, kafka.output, 3, config=limits)
    await create_topic(servers, kafka.dead_letters, 2)
    return kafka


@pytest.fixture(params=["fake", "mock", pytest.param("real", marks=pytest.mark.real_kafka)])
async def target(request: pytest.FixtureRequest) -> Output:
    """Whatever a sink can write to."""
    return Fake() if request.param == "fake" else await _kafka(request)


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.real_kafka)])
async def small_target(request: pytest.FixtureRequest) -> Output:
    """One that takes no record above 3,000 bytes; the embedded broker takes any."""
    if request.param == "fake":
        return Fake(record_max_bytes=3_000)
    return await real(request.getfixturevalue("real_kafka"), max_message_bytes="3000")


@pytest.fixture(params=["mock", pytest.param("real", marks=pytest.mark.real_kafka)])
async def kafka(request: pytest.FixtureRequest) -> Kafka:
    return await _kafka(request)


async def _kafka(request: pytest.FixtureRequest) -> Kafka:
    if request.param == "real":
        return await real(request.getfixturevalue("real_kafka"))
    broker: EmbeddedBroker = request.getfixturevalue("mock_kafka")
    broker.create_topic("records", 3)
    broker.create_topic("dead", 2)
    return Kafka(broker.bootstrap_servers, "records", "dead")


def message(offset: int = 0, key: bytes | None = b"k", value: bytes | None = b"text") -> Message:
    return Message(Partition("in", 0), offset, 1, key, value, (("own", b"1"),), NOW_MS - 9_000)


def extracted(*values: bytes | Record) -> Extracted:
    records = tuple(v if isinstance(v, Record) else Record(v) for v in values)
    return Extracted(records, PROVENANCE, "answer-1")


async def publish_all(
    sink: Sink, pairs: Iterable[tuple[Message, Outcome]]
) -> list[BaseException | None]:
    """Hands all over without waiting, then says how each ended."""
    waiting = [await sink.publish(which, outcome) for which, outcome in pairs]
    return [await ending(each) for each in waiting]


async def ending(waiting: "asyncio.Future[None]") -> BaseException | None:
    try:
        await asyncio.wait_for(asyncio.shield(waiting), 30)
    except (PublishFailed, OutputTooLarge) as error:
        return error
    return None


def by_key(reads: Sequence[Read]) -> dict[bytes | None, list[int]]:
    """Source offsets of each key in the order of their first appearance."""
    found: dict[bytes | None, dict[int, None]] = defaultdict(dict)
    for read in reads:
        found[read.key].setdefault(int(read.header["sluice.source.offset"]))
    return {key: list(offsets) for key, offsets in found.items()}


# --- what is written ---------------------------------------------------------------------------


async def test_parts_and_their_closing_marker(kafka: Kafka) -> None:
    """A streamed record says its place but no count and no cost, the last one both; a marker lies
    behind its records, has no value, and a key that deletes nothing."""
    bare = replace(PROVENANCE, tokens_input=0, tokens_output=0)
    parts = [Part(Record(b"%d" % n), n, "answer-1", bare) for n in range(2)]
    last = Extracted((Record(b"2"),), PROVENANCE, "answer-1", earlier=2)
    aborted = [Aborted(f"answer-{n}", 5, bare) for n in range(2, 8)]
    async with kafka.sink() as sink:
        waiting = [await sink.publish(message(7), each) for each in (*parts, last, *aborted)]
        assert [await ending(each) for each in waiting] == [None] * 9
    outputs = await kafka.outputs()
    assert len({read.partition for read in outputs}) == 1, "a reader of one misses the markers"
    *records, marker = outputs[:4]
    assert [read.value for read in records] == [b"0", b"1", b"2"]
    assert [read.header["sluice.id"] for read in records] == [f"in:0:7:{n}" for n in range(3)]
    assert [read.header["sluice.record.index"] for read in records] == ["0", "1", "2"]
    assert {read.header["sluice.answer.id"] for read in records} == {"answer-1"}
    late = {"sluice.record.count": "3", "sluice.tokens.input": "10", "sluice.tokens.output": "4"}
    assert records[2].header.items() >= late.items()
    assert not any(name in read.header for read in records[:2] for name in late)
    assert (marker.key, marker.value) == (b"sluice.aborted:answer-2", None)
    assert marker.header["sluice.record.aborted"] == "5"
    assert marker.header["sluice.answer.id"] == "answer-2"
    assert marker.header["sluice.id"] == "in:0:7:aborted"
    assert "sluice.record.index" not in marker.header


async def test_records_arrive_with_key_headers_and_the_inputs_timestamp(kafka: Kafka) -> None:
    """Each record is the value as it is, keyed as the input, with its origin in headers."""
    async with kafka.sink() as sink:
        assert await publish_all(sink, [(message(7), extracted(b'{"a":1}', b'{"a":2}'))]) == [None]
    first, second = await kafka.outputs()
    assert (first.key, first.value) == (b"k", b'{"a":1}')
    assert (second.key, second.value) == (b"k", b'{"a":2}')
    assert first.headers[0] == ("own", b"1")
    assert first.timestamp_ms == NOW_MS - 9_000
    header = dict(second.headers)
    assert header["sluice.id"] == b"in:0:7:1"
    assert header["sluice.record.count"] == b"2"


async def test_the_timestamp_can_be_now(kafka: Kafka) -> None:
    """With `output.timestamp: now` it is the time of writing."""
    async with kafka.sink(output={"timestamp": "now"}) as sink:
        await publish_all(sink, [(message(), extracted(b"{}"))])
    (read,) = await kafka.outputs()
    assert abs(read.timestamp_ms - time.time() * 1000) < 60_000
    assert read.timestamp_ms > NOW_MS - 9_000


async def test_the_output_partition_follows_the_key_as_everywhere(kafka: Kafka) -> None:
    """The same key lands where any other client's default partitioner puts it."""
    keys = [b"key-%d" % n for n in range(12)]
    elsewhere = await produce(kafka.servers, kafka.output, [(key, b"{}") for key in keys])
    async with kafka.sink() as sink:
        await publish_all(sink, [(message(n, key), extracted(b"{}")) for n, key in enumerate(keys)])
    ours = {r.key: r.partition for r in await kafka.outputs() if r.headers}
    assert {key: partition for key, (partition, _) in zip(keys, elsewhere, strict=True)} == ours


async def test_a_records_own_key_goes_before_the_messages(kafka: Kafka) -> None:
    """With `output.key_field` each record has its own key; none means the message's."""
    outcome = extracted(Record(b"1", b"own"), Record(b"2"), Record(b"3", b""))
    async with kafka.sink() as sink:
        await publish_all(sink, [(message(), outcome)])
    assert {(b"own", b"1"), (b"k", b"2"), (b"", b"3")} == {
        (r.key, r.value) for r in await kafka.outputs()
    }


async def test_messages_without_a_key_are_spread_or_kept_by_partition(kafka: Kafka) -> None:
    """Keyless output spreads over partitions; with partition order it stays on one."""
    for ordering, partitions in (("key", {0, 1, 2}), ("partition", {0})):
        values = [f"{ordering}-{n}".encode() for n in range(9)]
        async with kafka.sink(delivery={"ordering": ordering}) as sink:
            await publish_all(
                sink, [(message(n, None), extracted(v)) for n, v in enumerate(values)]
            )
        assert partitions == {r.partition for r in await kafka.outputs() if r.value in values}


async def test_nothing_to_publish_is_done_at_once(target: Output) -> None:
    """Skipped and an empty list of records end without a Kafka record."""
    async with target.sink() as sink:
        for outcome in (Skipped(), extracted()):
            assert (await sink.publish(message(), outcome)).done()
    assert await target.outputs() == []


async def test_every_outcome_settles_and_stands_where_it_belongs(target: Output) -> None:
    """What is acknowledged can be read at that moment, and goes nowhere else."""
    async with target.sink() as sink:
        passed = await sink.publish(message(0, b"gone", None), Passed())
        rejected = await sink.publish(message(1, b"own", b"text"), Rejected(Reason.INVALID, "no"))
        assert not passed.done()
        assert not rejected.done()
        assert await ending(passed) is None
        assert [(read.key, read.value) for read in await target.outputs()] == [(b"gone", None)]
        assert await ending(rejected) is None
        assert [(read.key, read.value) for read in await target.letters()] == [(b"own", b"text")]
        others = [(message(2), Skipped()), (message(3), extracted(b"{}"))]
        assert await publish_all(sink, others) == [None, None]
        outputs = {(read.key, read.value) for read in await target.outputs()}
        assert outputs == {(b"gone", None), (b"k", b"{}")}


async def test_a_tombstone_is_handed_on(kafka: Kafka) -> None:
    """Passed writes the key without a value, with its origin, to the output topic."""
    async with kafka.sink() as sink:
        await publish_all(sink, [(message(value=None), Passed())])
    (read,) = await kafka.outputs()
    assert (read.key, read.value) == (b"k", None)
    assert read.header["sluice.id"] == "in:0:0:0"


async def test_a_dead_letter_is_the_message_and_why(kafka: Kafka) -> None:
    """Key, value and headers byte for byte, the reason in headers, the timestamp now."""
    which = replace(message(5, None, b"\xff\x00"), headers=(("own", b"\xff"), ("own", None)))
    async with kafka.sink() as sink:
        assert await publish_all(sink, [(which, Rejected(Reason.UNDECODABLE, "not UTF-8"))]) == [
            None
        ]
    (read,) = await kafka.letters()
    assert (read.key, read.value) == (None, b"\xff\x00")
    assert which.headers == read.headers[:2]
    header = dict(read.headers)
    assert header["sluice.error.reason"] == b"undecodable"
    assert header["__dlq.errors.offset"] == b"5"
    assert header["__dlq.errors.group"] == b"sluice"
    assert read.timestamp_ms > NOW_MS - 5_000
    assert await kafka.outputs() == []


async def test_a_redacted_dead_letter_repeats_nothing(kafka: Kafka) -> None:
    """Neither the model's answer nor a detail that can quote it; the message itself stays."""
    rejected = Rejected(Reason.INVALID, "quotes Ada", answer='{"name": "Ada"}')
    async with kafka.sink(dead_letters={"redacted": True}) as sink:
        assert await publish_all(sink, [(message(7, value=b"Ada"), rejected)]) == [None]
    (read,) = await kafka.letters()
    header = dict(read.headers)
    assert (read.value, header["sluice.error.reason"]) == (b"Ada", b"invalid")
    assert "sluice.answer" not in header
    assert not any(b"Ada" in (value or b"") for value in header.values())


async def test_a_rejected_tombstone_without_key_can_be_written_too(kafka: Kafka) -> None:
    """Neither key nor value is still a dead letter."""
    async with kafka.sink() as sink:
        rejected = Rejected(Reason.USER_CODE, "")
        assert await publish_all(sink, [(message(key=None, value=None), rejected)]) == [None]
    assert len(await kafka.letters()) == 1


# --- order -------------------------------------------------------------------------------------


async def test_order_within_a_key_with_many_lanes(target: Output) -> None:
    """Lanes that hand over without waiting keep their order, and nothing is doubled."""
    lanes = [[message(100 * lane + n, b"%d" % lane) for n in range(25)] for lane in range(40)]

    async def run(sink: Sink, lane: list[Message]) -> "list[asyncio.Future[None]]":
        waiting = []
        for which in lane:
            waiting.append(await sink.publish(which, extracted(b"1", b"2")))
            await asyncio.sleep(0)
        return waiting

    async with target.sink() as sink, asyncio.TaskGroup() as group:
        tasks = [group.create_task(run(sink, lane)) for lane in lanes]
        for task in tasks:
            for waiting in await task:
                assert await ending(waiting) is None
    found = await target.outputs()
    assert len(found) == 40 * 25 * 2
    assert {lane[0].key: [m.offset for m in lane] for lane in lanes} == by_key(found)


async def test_records_of_one_message_stand_together(target: Output) -> None:
    """Several records of a message are consecutive in their partition."""
    pairs = [(message(n, b"%d" % (n % 7)), extracted(b"0", b"1", b"2")) for n in range(60)]
    async with target.sink() as sink:
        await publish_all(sink, pairs)
    found = await target.outputs()
    assert [read.value for read in found] == [b"0", b"1", b"2"] * 60
    together = [
        {read.header["sluice.source.offset"] for read in found[i : i + 3]} for i in range(0, 180, 3)
    ]
    assert [len(offsets) for offsets in together] == [1] * 60


async def test_acknowledgements_come_in_order(target: Output) -> None:
    """Within a lane futures end in the order of the hand-overs, none before it has waited."""
    ended: list[int] = []
    async with target.sink() as sink:
        for n in range(50):
            waiting = await sink.publish(message(n), extracted(b"%d" % n))
            assert not waiting.done(), "acknowledged before anybody could have taken it"
            waiting.add_done_callback(lambda _, n=n: ended.append(n))
        assert await ending(waiting) is None
        assert ended == list(range(50))


async def test_a_failed_send_fails_what_was_handed_over_behind_it(
    target: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing later of its lane lands until it is sent again, whatever comes meanwhile."""
    lost = iter([True])
    target.break_sends(monkeypatch, lost=lambda: next(lost, False))
    lane = [(message(n), extracted(b"%d" % n)) for n in range(4)]
    async with target.sink() as sink:
        assert [PublishFailed] * 3 == [type(end) for end in await publish_all(sink, lane[:3])]
        assert [PublishFailed] == [type(end) for end in await publish_all(sink, lane[3:])]
        assert await target.outputs() == []
        assert await publish_all(sink, lane) == [None] * 4
    assert [read.value for read in await target.outputs()] == [b"0", b"1", b"2", b"3"]


async def test_cancelling_withdraws_what_has_not_left(target: Output) -> None:
    """A cancelled awaitable takes its message out of the queue; the others go on."""
    async with target.sink() as sink:
        first = await sink.publish(message(1), extracted(b"1"))
        second = await sink.publish(message(2), extracted(b"2"))
        second.cancel()
        third = await sink.publish(message(3), extracted(b"3"))
        assert [await ending(first), await ending(third)] == [None, None]
    assert [r.value for r in await target.outputs()] == [b"1", b"3"]


# --- size --------------------------------------------------------------------------------------


async def test_larger_than_the_setting_is_too_large_as_a_whole(target: Output) -> None:
    """One record above `output.message_max_bytes`: none of the message, all of the others."""
    async with target.sink(output={"message_max_bytes": 5_000}) as sink:
        ends = await publish_all(
            sink,
            [
                (message(0), extracted(b"a")),
                (message(1), extracted(b"b", b"x" * 6_000)),
                (message(2), extracted(b"c")),
            ],
        )
        again = await sink.publish(message(3), extracted(b"x" * 6_000))
        assert again.done(), "what is known to be too large is not handed over"
    assert [type(None), OutputTooLarge, type(None)] == [type(each) for each in ends]
    assert [r.value for r in await target.outputs()] == [b"a", b"c"]


@pytest.mark.real_kafka
async def test_the_topics_limit_is_met_to_the_byte(
    real_kafka: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What we count as the topic's limit the broker takes, and one byte more it refuses."""
    kafka = await real(real_kafka, max_message_bytes="3000")
    kafka.conceal_limit(monkeypatch)
    which = message(0)
    async with kafka.sink() as sink:
        await publish_all(sink, [(which, extracted(b""))])
        (probe,) = await kafka.outputs()
        room = 3_000 - size_alone(b"k", b"x" * 200, list(probe.headers)) + 200
        while size_alone(b"k", b"x" * room, list(probe.headers)) < 3_000:
            room += 1
        ends = await publish_all(
            sink, [(which, extracted(b"x" * room)), (which, extracted(b"x" * (room + 1)))]
        )
    assert [type(None), OutputTooLarge] == [type(each) for each in ends]


@pytest.mark.parametrize("told", [True, False])
async def test_only_the_guilty_one_is_too_large(
    small_target: Output, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """Whether the brokers told their limit or refuse a whole batch: one fails, all others land."""
    if not told:
        small_target.conceal_limit(monkeypatch)
    values = [b"%d" % n for n in range(30)]
    values[12] = b"x" * 4_000
    async with small_target.sink() as sink:
        ends = await publish_all(sink, [(message(n), extracted(v)) for n, v in enumerate(values)])
    assert [n for n, each in enumerate(ends) if isinstance(each, OutputTooLarge)] == [12]
    assert [n for n, each in enumerate(ends) if each is not None] == [12]
    assert values[:12] + values[13:] == [r.value for r in await small_target.outputs()]


@pytest.mark.real_kafka
@pytest.mark.parametrize("told", [True, False])
async def test_a_dead_letter_shrinks_and_then_is_held(
    real_kafka: str, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """First the answer goes, then the detail; what is still too large waits for a larger topic."""
    monkeypatch.setattr(sizes_module, "REFRESH_S", 0.2)
    kafka = await real(real_kafka)
    if not told:
        kafka.conceal_limit(monkeypatch)
    await set_limit(kafka.servers, kafka.dead_letters, 2_000)
    long = "x" * 1_700
    cases = {
        1: (message(1), Rejected(Reason.INVALID, "short", answer=long)),
        2: (message(2), Rejected(Reason.INVALID, long, answer=long)),
        3: (message(3, value=b"x" * 3_000), Rejected(Reason.INVALID, "short", answer="a")),
    }
    async with kafka.sink() as sink:
        for case in (1, 2):
            await until_published(sink, *cases[case])
        held = await publish_all(sink, [cases[3]] * 3)
        assert [PublishFailed] * 3 == [type(each) for each in held]
        await set_limit(kafka.servers, kafka.dead_letters, 9_000)
        await until_published(sink, *cases[3])
    letters = {r.header["__dlq.errors.offset"]: r for r in await kafka.letters()}
    assert "sluice.answer" not in letters["1"].header
    assert letters["1"].header["sluice.error.detail"] == "short"
    assert letters["2"].header["sluice.error.detail"] == ""
    assert letters["3"].header["sluice.answer"] == "a"
    assert letters["3"].value == b"x" * 3_000


async def until_published(sink: KafkaSink, which: Message, outcome: Outcome) -> None:
    """As the pipeline does: again and again, with a pause."""
    for _ in range(50):
        if await ending(await sink.publish(which, outcome)) is None:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("it was never published")


async def set_limit(servers: str, topic: str, size: int) -> None:
    config = {"max.message.bytes": str(size)}
    async with admin(servers) as client:
        await client.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, config)])


@pytest.mark.real_kafka
@pytest.mark.parametrize(("allowed_ms", "ahead_ms"), [("1000", 600_000), ("1000", 10**12)])
async def test_a_timestamp_that_the_topic_refuses_becomes_now(
    real_kafka: str, allowed_ms: str, ahead_ms: int
) -> None:
    """A message from the future does not hold its lane for ever, nor its neighbours."""
    kafka = await real(real_kafka, message_timestamp_after_max_ms=allowed_ms)
    future = replace(message(1), timestamp_ms=NOW_MS + ahead_ms)
    none = replace(message(3), timestamp_ms=-1)
    those = [message(0), future, message(2), none]
    async with kafka.sink() as sink:
        assert await publish_all(sink, [(w, extracted(b"1")) for w in those]) == [None] * 4
    found = await kafka.outputs()
    assert by_key(found)[b"k"] == [0, 1, 2, 3]
    for changed in (1, 3):
        assert NOW_MS - 5_000 < found[changed].timestamp_ms < NOW_MS + 500_000
    for kept in (0, 2):
        assert found[kept].timestamp_ms == NOW_MS - 9_000


async def test_a_sink_that_is_not_running_fails_sends(kafka: Kafka) -> None:
    """Before the start and after the stop a publish fails, as one that may be tried again."""
    sink = KafkaSink(kafka.settings(), kafka.told.append)
    before = await sink.publish(message(), extracted(b"1"))
    await sink.start()
    await sink.stop()
    after = await sink.publish(message(), extracted(b"1"))
    assert [PublishFailed] * 2 == [type(await ending(each)) for each in (before, after)]


# --- the start ---------------------------------------------------------------------------------


async def test_without_a_broker_it_cannot_run() -> None:
    """No broker: a sentence that names the address, within seconds, and nothing left behind."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        sink = KafkaSink(Kafka(address, "records", "dead").settings(), lambda _: None)
        with pytest.raises(CannotRun, match=address):
            await sink.start()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.real_kafka
@pytest.mark.parametrize("missing", ["output", "dead_letters"])
async def test_without_a_topic_it_cannot_run(
    real_kafka: str, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """A missing topic: its name and the command that creates it."""
    monkeypatch.setattr(sink_module, "DISCOVERY_TIMEOUT_S", 0.5)
    kafka = await real(real_kafka)
    sink = KafkaSink(kafka.settings(**{missing: {"topic": "not-there"}}), kafka.told.append)
    with pytest.raises(CannotRun, match=r"not-there.*sluice topics create"):
        await sink.start()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


# --- brokers that fail -------------------------------------------------------------------------


@pytest.fixture
async def complaints() -> AsyncIterator[None]:
    """Nothing ends in the event loop's complaints: unheard exceptions, broken callbacks."""
    heard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))
    yield
    gc.collect()
    assert heard == []


async def run_lane(
    sink: Sink,
    lane: Sequence[Message],
    pause_s: float,
    outcome: Callable[[Message], Outcome] = lambda _: extracted(b"{}"),
) -> int:
    """Publishes a lane as the pipeline does, only more eagerly: it notices failures late.

    Returns how many sends failed. All of a round are handed over before the first is looked at.
    """
    failures = 0
    while lane:
        waiting = []
        for which in lane:
            waiting.append(await sink.publish(which, outcome(which)))
            await asyncio.sleep(pause_s)
        ends = [await ending(each) for each in waiting]
        lane = [which for which, end in zip(lane, ends, strict=True) if end is not None]
        failures += len(lane)
        await asyncio.sleep(0.1 if lane else 0)
    return failures


async def test_no_order_changes_when_sends_are_lost(
    target: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sends or their acknowledgements lost, the broker well: nothing overtakes what failed."""
    draw = random.Random(7)
    target.break_sends(
        monkeypatch, lost=lambda: draw.random() < 0.1, unheard=lambda: draw.random() < 0.1
    )
    lanes = [[message(100 * lane + n, b"%d" % lane) for n in range(25)] for lane in range(10)]
    async with target.sink() as sink, asyncio.TaskGroup() as group:
        tasks = [group.create_task(run_lane(sink, lane, 0.01)) for lane in lanes]
    assert sum(task.result() for task in tasks) > 0
    found = await target.outputs()
    assert {lane[0].key: [m.offset for m in lane] for lane in lanes} == by_key(found)
    assert len(found) > 250, "no acknowledgement was lost"


async def test_no_order_changes_where_records_have_keys_of_their_own(
    target: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message's records go to several output partitions, and in each they stay in order, though
    the part for one of them is lost and the part for another is not."""
    draw = random.Random(11)
    target.break_sends(
        monkeypatch, lost=lambda: draw.random() < 0.2, unheard=lambda: draw.random() < 0.1
    )
    lanes = [[message(100 * lane + n, b"%d" % lane) for n in range(30)] for lane in range(8)]

    def records(which: Message) -> Outcome:
        lane, number = divmod(which.offset, 100)
        keys = [b"%d-%d" % (lane, (number + n) % 5) for n in range(3)]
        return extracted(*(Record(b"{}", key) for key in keys))

    async with target.sink() as sink, asyncio.TaskGroup() as group:
        tasks = [group.create_task(run_lane(sink, lane, 0, records)) for lane in lanes]
    assert sum(task.result() for task in tasks) > 0
    expected: dict[bytes | None, list[int]] = defaultdict(list)
    for which in (each for lane in lanes for each in lane):
        outcome = records(which)
        assert isinstance(outcome, Extracted)
        for record in outcome.records:
            expected[record.key].append(which.offset)
    assert expected == by_key(await target.outputs())


@pytest.mark.real_kafka
@pytest.mark.parametrize("how", ["hangs", "is killed"])
@pytest.mark.timeout(240)
@pytest.mark.usefixtures("complaints")
async def test_no_order_changes_when_the_broker_fails(own_broker: Broker, how: str) -> None:
    """A broker that goes away in the middle: all is published, in order of first appearance."""
    kafka = await real(own_broker.bootstrap_servers)
    lanes = [[message(100 * lane + n, b"%d" % lane) for n in range(60)] for lane in range(20)]
    async with kafka.sink(kafka={"request_timeout_s": 1}) as sink:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run_lane(sink, lane, 0.02)) for lane in lanes]
            await asyncio.sleep(0.4)
            if how == "hangs":
                with hanging(own_broker):
                    await asyncio.sleep(2.5)  # sends fail after 2 s, the rest finds it alive
            else:
                await asyncio.to_thread(own_broker.kill)
                await asyncio.sleep(3)
                await asyncio.to_thread(own_broker.start)
        assert sum(task.result() for task in tasks) > 0, "the broker came back too early"
    assert {lane[0].key: [m.offset for m in lane] for lane in lanes} == by_key(
        await kafka.outputs()
    )


@pytest.mark.real_kafka
@pytest.mark.usefixtures("complaints")
async def test_a_hanging_broker_fails_sends_and_stops_nobody(own_broker: Broker) -> None:
    """A send fails within twice the request timeout; stopping then is bounded and clean."""
    kafka = await real(own_broker.bootstrap_servers)
    sink = KafkaSink(kafka.settings(kafka={"request_timeout_s": 1}), kafka.told.append)
    await sink.start()
    with hanging(own_broker):
        began_s = time.monotonic()
        first = await sink.publish(message(0), extracted(b"{}"))
        behind = await sink.publish(message(1), extracted(b"{}"))
        await asyncio.sleep(0.5)
        assert not first.done()
        ends = [await ending(each) for each in (first, behind)]
        assert [PublishFailed, PublishFailed] == [type(each) for each in ends]
        assert 1.9 < time.monotonic() - began_s < 4
        assert kafka.told == [ClientReplaced("producer")]
        await sink.publish(message(0), extracted(b"{}"))
        began_s = time.monotonic()
        await sink.stop()
        assert time.monotonic() - began_s < 20
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_stop_that_hangs_is_forced_and_said(
    mock_kafka: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A producer whose own stop does not return is cut off in time, and counted."""
    monkeypatch.setattr("service.kafka.sending.producers.CLOSE_TIMEOUT_S", 0.3)
    kafka = Kafka(mock_kafka.bootstrap_servers, "records", "dead")
    for topic in (kafka.output, kafka.dead_letters):
        mock_kafka.create_topic(topic, 1)

    class Hanging(AIOKafkaProducer):  # type: ignore[misc]
        stops = 0

        async def stop(self) -> None:
            self.stops += 1
            if self.stops == 1:
                await asyncio.Event().wait()
            await super().stop()

    monkeypatch.setattr(sink_module, "AIOKafkaProducer", Hanging)
    async with kafka.sink():
        pass
    assert kafka.told == [StopForced("producer")]
    assert "does not close in order" in caplog.text
    assert asyncio.all_tasks() == {asyncio.current_task()}


class BrokenProducer(AIOKafkaProducer):  # type: ignore[misc]
    """Raises what nobody foresaw."""

    async def send_batch(self, batch: object, topic: str, *, partition: int) -> object:
        raise ZeroDivisionError


async def test_an_unforeseen_exception_ends_the_owner(
    mock_kafka: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cancels the task that started the sink, fails what was handed over, and is raised."""
    monkeypatch.setattr(sink_module, "AIOKafkaProducer", BrokenProducer)
    kafka = Kafka(mock_kafka.bootstrap_servers, "records", "dead")
    sink = KafkaSink(kafka.settings(), kafka.told.append)
    await sink.start()
    handed_over = await sink.publish(message(), extracted(b"1"))
    with pytest.raises(asyncio.CancelledError):
        await asyncio.sleep(10)
    with pytest.raises(BaseExceptionGroup) as raised:
        await sink.stop()
    assert raised.group_contains(ZeroDivisionError)
    assert isinstance(await ending(handed_over), PublishFailed)
    assert asyncio.all_tasks() == {asyncio.current_task()}

"""`sluice check` and `sluice topics create`, against the embedded broker and a real Kafka."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator

import pytest
from aiokafka.errors import NoError, TopicAuthorizationFailedError

from service.commands.check import check
from service.core.errors import CannotRun
from service.core.messages import Partition
from service.demo.broker import EmbeddedBroker
from service.kafka.client.groups_seen import look_at_group
from service.kafka.client.topics_seen import (
    FoundTopic,
    _found,
    look_at_topics,
    see_that_it_may_be_described,
)
from service.kafka.provisioning import DEAD_LETTER_ROOM_BYTES, create_topics
from service.kafka.sending.sizes import record_max_bytes
from service.settings import Settings
from tests.support.endpoint import MODEL, Endpoint, Step
from tests.support.sources import Kafka
from tests.support.topics import admin, committed, create_topic, produce, unique_name


@pytest.fixture
async def endpoint(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Endpoint]:
    """A model endpoint that is well."""
    async with Endpoint() as served:
        monkeypatch.setenv("OPENAI_BASE_URL", served.url)
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        yield served


def settings(servers: str, name: str = "", model: str = MODEL) -> Settings:
    """Topics and group of names that no other test has, where none is given."""
    name = name or unique_name("check")
    return Settings.model_validate(
        {
            "kafka": {"bootstrap_servers": servers, "group_id": name},
            "input": {"topics": f"{name}-in"},
            "output": {"topic": f"{name}-out"},
            "dead_letters": {"topic": f"{name}-dead"},
            "extraction": {"model": model},
        }
    )


async def checked(given: Settings, call: bool = False) -> tuple[int, dict[str, list[str]]]:
    """Exit code, and what is said about each thing, with its mark."""
    lines: list[str] = []
    code = await asyncio.to_thread(check, given, call=call, say=lines.append)
    said: dict[str, list[str]] = {}
    for line in lines:
        mark, name, text = line.split(maxsplit=2)
        said.setdefault(name, []).append(f"{mark} {text}")
    return code, said


@pytest.fixture
def dead_servers() -> str:
    """An address on this machine where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


# --- check ---


async def test_all_is_well(mock_kafka: EmbeddedBroker, endpoint: Endpoint) -> None:
    """A line with ✓ for each thing, exit code 0, and not one paid call."""
    given = settings(mock_kafka.bootstrap_servers, "all")
    for name in ("all-in", "all-out", "all-dead"):
        mock_kafka.create_topic(name, 2)
    code, said = await checked(given)
    assert code == 0
    assert list(said) == ["settings", "record", "broker", "topics", "permissions", "group", "model"]
    assert all(len(lines) == 1 and lines[0].startswith("✓ ") for lines in said.values())
    assert "all-in (2), all-out (2), all-dead (2)" in said["topics"][0]
    assert said["record"] == [f"✓ {given.extraction.record}, one for each message: name, age"]
    assert MODEL in said["model"][0]
    assert endpoint.total() == 0


async def test_missing_topics_are_named(mock_kafka: EmbeddedBroker, endpoint: Endpoint) -> None:
    """✗ with the missing names and the command that makes them; looking does not create them."""
    given = settings(mock_kafka.bootstrap_servers, "miss")
    mock_kafka.create_topic("miss-in", 1)
    for _ in range(2):
        code, said = await checked(given)
        assert code == 1
        assert said["topics"][0].startswith("✗ missing: miss-out, miss-dead. ")
        assert "sluice topics create" in said["topics"][0]


async def test_no_broker(dead_servers: str, endpoint: Endpoint) -> None:
    """✗ for the broker, what stands on it is left out, the model is still looked at."""
    code, said = await checked(settings(dead_servers))
    assert code == 1
    assert said["broker"][0].startswith(f"✗ No Kafka broker answers at {dead_servers}")
    for name in ("topics", "permissions", "group"):
        assert said[name] == ["- not checked: no broker"]
    assert said["model"][0].startswith("✓ ")


async def test_no_model_endpoint(
    mock_kafka: EmbeddedBroker, dead_servers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """✗ with the variable to look at."""
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://{dead_servers}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    code, said = await checked(settings(mock_kafka.bootstrap_servers))
    assert code == 1
    assert said["model"][0].startswith("✗ ")
    assert "OPENAI_BASE_URL" in said["model"][0]


async def test_unlisted_model(mock_kafka: EmbeddedBroker, endpoint: Endpoint) -> None:
    """A model that the endpoint does not list is something to know, not a failure."""
    _, said = await checked(settings(mock_kafka.bootstrap_servers, model="unheard-of"))
    assert said["model"][0].startswith("✓ ")
    assert said["model"][1].startswith("! ")
    assert "unheard-of" in said["model"][1]


async def test_wrong_record_is_a_wrong_setting(
    mock_kafka: EmbeddedBroker, endpoint: Endpoint
) -> None:
    """A record type that cannot be found gives 2, and the rest is looked at all the same."""
    given = settings(mock_kafka.bootstrap_servers)
    wrong = {**given.model_dump(), "extraction": {"record": "no.such.module:Model"}}
    code, said = await checked(Settings.model_validate(wrong))
    assert code == 2
    assert said["record"][0].startswith("✗ ")
    assert "extraction.record" in said["record"][0]
    assert said["model"] == ["- not checked: no record"]
    assert said["broker"][0].startswith("✓ ")


async def test_warnings_of_the_settings(mock_kafka: EmbeddedBroker, endpoint: Endpoint) -> None:
    """What works but probably not as meant is said, and is no failure by itself."""
    given = settings(mock_kafka.bootstrap_servers)
    hasty = {**given.model_dump(), "delivery": {"drain_timeout_s": 1}}
    _, said = await checked(Settings.model_validate(hasty))
    assert said["settings"][0] == "✓ understood: defaults"
    assert said["settings"][1].startswith("! delivery.drain_timeout_s is 1")


async def test_the_cache_is_looked_at_where_there_is_one(
    mock_kafka: EmbeddedBroker, endpoint: Endpoint, dead_servers: str
) -> None:
    """In memory it is well; a Redis that does not answer is a ✗ with the setting to look at."""
    given = settings(mock_kafka.bootstrap_servers).model_dump()
    _, said = await checked(Settings.model_validate({**given, "cache": {"mode": "memory"}}))
    assert said["cache"][0].startswith("✓ in this process, up to 67108864 bytes")
    redis = {"mode": "redis", "redis_url": f"redis://{dead_servers}"}
    code, said = await checked(Settings.model_validate({**given, "cache": redis}))
    assert code == 1
    assert said["cache"][0].startswith("✗ no store answers at cache.redis_url")


async def test_one_real_call(mock_kafka: EmbeddedBroker, endpoint: Endpoint) -> None:
    """--call makes one call and says what it cost."""
    _, said = await checked(settings(mock_kafka.bootstrap_servers), call=True)
    assert endpoint.total() == 1
    assert said["model"][0].startswith(f"✓ {MODEL} made 1 record of a sample in ")
    assert " tokens in, " in said["model"][0]


@pytest.mark.parametrize(
    ("script", "mark", "word"),
    [
        ("invalid", "✓", "its own fault"),
        ("refuse", "✓", "its own fault"),
        ("content_filter", "✓", "its own fault"),
        ("truncate", "✗", "longer than"),
        ("too_long", "✗", "maximum context length"),
        ("400", "✗", "without a reason"),
        ("403", "✗", "without a reason"),
        ("quota", "✗", "no quota left"),
    ],
)
async def test_a_real_call_is_well_only_for_an_answer(
    mock_kafka: EmbeddedBroker, endpoint: Endpoint, script: str, mark: str, word: str
) -> None:
    """Or where a sentence says that it may be the sample's own fault."""
    endpoint.script = lambda _: Step(script)
    code, said = await checked(settings(mock_kafka.bootstrap_servers), call=True)
    assert said["model"][0].startswith(mark)
    assert word in said["model"][0]
    assert code == 1  # its topics are missing, too


async def test_transactions_are_tried(
    real_kafka: str, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With exactly_once: ✓ where brokers allow them, ✗ where not for as long as they may take."""
    given = settings(real_kafka)
    for name in (*given.input.topics, given.output.topic, given.dead_letters.topic):
        await create_topic(real_kafka, name, 1)
    once = {**given.model_dump(), "delivery": {"mode": "exactly_once"}}
    _, said = await checked(Settings.model_validate(once))
    assert said["transactions"][0].startswith("✓ allowed to sluice-")
    monkeypatch.setattr(
        "service.commands.check.DEADLINE_FACTOR", 40
    )  # x 30 s; the broker's limit is 900
    code, said = await checked(Settings.model_validate(once))
    assert code == 1
    assert "transaction.max.timeout.ms" in said["transactions"][0]


# --- where a run would start ---


async def stored_by_a_run(servers: str, given: Settings) -> None:
    """A worker has read and committed the one message of the first partition."""
    (topic,) = given.input.topics
    kafka = Kafka(servers)
    async with kafka.member(topic, given.kafka.group_id) as one:
        await one.until(lambda: len(one.messages) == 1)
        await one.commit({Partition(topic, 0): 1})


async def ready(servers: str, *, partitions: int = 1) -> Settings:
    given = settings(servers)
    for name in (*given.input.topics, given.output.topic, given.dead_letters.topic):
        await create_topic(servers, name, partitions)
    return given


async def test_a_group_without_offsets_is_told_with_what_it_will_read(
    real_kafka: str, endpoint: Endpoint
) -> None:
    """New, or forgotten by brokers: the number of messages; where it goes on, no such line."""
    given = await ready(real_kafka)
    name = given.kafka.group_id
    await produce(real_kafka, given.input.topics[0], [b"a"])
    _, said = await checked(given)
    assert said["group"] == [
        f"✓ {name} has no offsets: it starts at earliest and reads what is there now, 1 message"
    ]
    await stored_by_a_run(real_kafka, given)
    _, said = await checked(given)
    assert said["group"] == [f"✓ {name} has no members now and goes on where it stopped"]


async def test_a_log_that_was_cut_is_told_as_a_run_would(
    real_kafka: str, endpoint: Endpoint
) -> None:
    """✗ with the sentence that keeps a run from reading; looking leaves no trace."""
    given = await ready(real_kafka)
    (topic,), group = given.input.topics, given.kafka.group_id
    await Kafka(real_kafka).store(group, topic, {0: 7})
    for _ in range(2):
        code, said = await checked(given)
        assert code == 1
        assert said["group"][0].startswith(f"✗ {topic}[0] has been read up to offset 7, but the ")
        assert "`sluice run --start-over`" in said["group"][0]
    assert await committed(real_kafka, group, topic, 1) == {0: (7, "")}


async def test_a_topic_made_again_is_told_as_a_run_would(
    real_kafka: str, endpoint: Endpoint
) -> None:
    """Where brokers still hold the old topic's offsets: also of a partition that has none."""
    given = await ready(real_kafka)
    (topic,), kafka = given.input.topics, Kafka(real_kafka)
    await kafka.send(topic, "a")
    await stored_by_a_run(real_kafka, given)
    (_, metadata) = (await committed(real_kafka, given.kafka.group_id, topic, 1))[0]
    async with admin(real_kafka) as client:
        await client.delete_topics([topic])
    await create_topic(real_kafka, topic, 2)
    await kafka.store(given.kafka.group_id, topic, {0: 0}, metadata)
    code, said = await checked(given)
    assert code == 1
    assert "has been deleted since" in said["group"][0]
    assert said["group"][0].endswith(" And 1 more partition.")
    async with kafka.member(topic, given.kafka.group_id) as one:
        await one.until(lambda: one.source.group().problem is not None)
        assert one.epochs == {}
        assert "has been deleted since" in (one.source.group().problem or "")
    async with kafka.member(topic, given.kafka.group_id, start_over=True) as one:
        await one.until(lambda: len(one.epochs) == 2)
    _, said = await checked(given)
    assert said["group"][0].startswith("✓ ")


# --- what brokers tell ---


async def test_real_kafka_tells_what_is_allowed(real_kafka: str) -> None:
    """Topics, their partitions and our rights, and a group that is not there yet."""
    given = settings(real_kafka)
    (name,) = given.input.topics
    await create_topic(real_kafka, name, 3)
    topics = await look_at_topics(given.kafka, (name, f"{name}-none"))
    every = frozenset({"READ", "WRITE", "DESCRIBE"})
    found = topics[name]
    assert (found.error, found.partitions, found.replicas, found.may) == (NoError, 3, 1, every)
    missing = topics[f"{name}-none"]
    assert (missing.partitions, missing.allows("READ")) == (0, True)
    group = await look_at_group(given.kafka)
    assert (group.state, group.members) == ("Dead", 0)
    assert group.may is not None
    assert "READ" in group.may


@pytest.mark.parametrize(
    ("bits", "reads", "writes"),
    [
        (1 << 3 | 1 << 8, True, False),
        (1 << 4 | 1 << 8, False, True),
        (0, False, False),
        (-(2**31), True, True),
    ],
)
def test_rights_are_read_from_their_bits(bits: int, reads: bool, writes: bool) -> None:
    """Bits are Kafka's codes of operations; where the broker does not tell, nothing is refused."""
    partition = {"partition": 0, "leader": 1, "replicas": [1, 2, 3]}
    found = {
        "topic": "texts",
        "error_code": 0,
        "partitions": [partition],
        "authorized_operations": bits,
    }
    topic = _found(found)
    assert (topic.allows("READ"), topic.allows("WRITE")) == (reads, writes)
    assert (topic.partitions, topic.replicas) == (1, 3)


def test_topic_that_may_not_be_described() -> None:
    """A refusal is not taken for a topic that is missing."""
    found = FoundTopic("texts", TopicAuthorizationFailedError)
    with pytest.raises(TopicAuthorizationFailedError, match="texts"):
        see_that_it_may_be_described(found)


# --- topics create ---


async def created(
    given: Settings, partitions: int | None = None, replication: int | None = None
) -> list[str]:
    return [line async for line in create_topics(given, partitions, replication)]


async def test_topics_are_made_like_the_input(real_kafka: str, endpoint: Endpoint) -> None:
    """As many partitions as the input; dead letters may be larger than the input's messages; made
    once only; and then the check is content."""
    given = settings(real_kafka)
    await create_topic(
        real_kafka, given.input.topics[0], 3, config={"max.message.bytes": "2000000"}
    )
    there, first, second = await created(given)
    assert there == f"topic {given.input.topics[0]} is there already (3 partitions)"
    assert first == f"topic {given.output.topic} is made with 3 partitions and 1 replica"
    assert second == f"topic {given.dead_letters.topic} is made with 3 partitions and 1 replica"
    letters = await record_max_bytes(given.kafka, given.dead_letters.topic)
    assert letters == 2_000_000 + DEAD_LETTER_ROOM_BYTES
    assert all("is there already" in line for line in await created(given))
    code, said = await checked(given)
    assert (code, len(said["topics"])) == (0, 1)


async def test_an_empty_kafka_needs_one_command(real_kafka: str, endpoint: Endpoint) -> None:
    """A missing input topic is made too, the others like it, and then the check is content."""
    given = settings(real_kafka)
    first, second, third = await created(given)
    (name,) = given.input.topics
    assert first == f"topic {name} is made with 6 partitions and the brokers' number of replicas"
    names = (name, given.output.topic, given.dead_letters.topic)
    async with asyncio.timeout(10):  # the broker that is asked hears of them from the controller
        while {one.partitions for one in (await look_at_topics(given.kafka, names)).values()} != {
            6
        }:
            await asyncio.sleep(0.05)
    topics = await look_at_topics(given.kafka, names)
    assert len({topic.replicas for topic in topics.values()}) == 1
    assert [line.split(" is made")[0] for line in (second, third)] == [
        f"topic {given.output.topic}",
        f"topic {given.dead_letters.topic}",
    ]
    code, said = await checked(given)
    assert (code, len(said["topics"])) == (0, 1)


async def test_numbers_can_be_named(real_kafka: str) -> None:
    """Every topic that is made has the numbers that were named."""
    given = settings(real_kafka)
    made = await created(given, 2, 1)
    assert len(made) == 3
    assert all(line.endswith(" is made with 2 partitions and 1 replica") for line in made)


async def test_too_many_replicas_is_a_sentence(real_kafka: str) -> None:
    """What the controller refuses comes with its own words."""
    if os.environ.get("KAFKA_BOOTSTRAP_SERVERS"):
        pytest.skip("the given Kafka may have brokers enough")
    with pytest.raises(CannotRun, match="cannot be made with 1 partition and 9 replicas: "):
        await created(settings(real_kafka), 1, 9)


async def test_small_dead_letter_topic_is_told(real_kafka: str, endpoint: Endpoint) -> None:
    """A dead letter topic that takes no more than the input does is something to know."""
    given = settings(real_kafka)
    for name in (given.input.topics[0], given.output.topic, given.dead_letters.topic):
        await create_topic(real_kafka, name, 1)
    code, said = await checked(given)
    assert code == 0
    assert said["topics"][1].startswith(f"! {given.dead_letters.topic} takes ")


async def test_embedded_broker_makes_no_topics(mock_kafka: EmbeddedBroker) -> None:
    """A broker without a controller is a sentence too."""
    mock_kafka.create_topic("some-in", 1)
    with pytest.raises(CannotRun, match="has no controller that could make some-out"):
        await created(settings(mock_kafka.bootstrap_servers, "some"))

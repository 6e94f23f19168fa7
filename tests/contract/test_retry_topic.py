"""The retry topic at both ends, on the embedded broker: what is written there, and when it is
read."""

import time
from collections.abc import Iterable

import pytest
from aiokafka import TopicPartition

from service.core.history import History
from service.core.messages import Message, Partition, Postponed
from service.demo.broker import EmbeddedBroker
from service.kafka.group.fetching import Fetching
from tests.support.sinks import Kafka as Outputs
from tests.support.sources import Kafka as Inputs
from tests.support.sources import member
from tests.support.topics import produce, read_topic

HISTORY = History(b"notes:3:41", 17, 3, 77, retries=1, due_ms=99)


def retries(topic: str) -> dict[str, dict[str, object]]:
    return {"retries": {"topic": topic}, "delivery": {"ordering": "none"}}


async def test_a_message_waits_as_it_came(mock_kafka: EmbeddedBroker) -> None:
    """Key, value and own headers byte for byte; the history of its last stay is replaced."""
    for name in ("records", "dead", "later"):
        mock_kafka.create_topic(name, 1)
    own = (("a", b"\xff"), ("a", None))
    headers = (*own, *History(b"notes:3:41", 17, 1, 77).headers)
    message = Message(Partition("notes", 3), 90, 1, b"k", b"\xff\x00", headers, 5)
    kafka = Outputs(mock_kafka.bootstrap_servers, "records", "dead")
    began_ms = int(time.time() * 1000)
    async with kafka.sink(**retries("later")) as sink:
        await (await sink.publish(message, Postponed(HISTORY.headers)))
    [waiting] = await read_topic(mock_kafka.bootstrap_servers, "later")
    assert (waiting.key, waiting.value) == (b"k", b"\xff\x00")
    assert waiting.headers == (*own, *HISTORY.headers)
    assert waiting.timestamp_ms >= began_ms - 1000, "retention would delete it at once"


async def test_it_comes_when_it_is_due_and_holds_nobody_up(
    mock_kafka: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the first one that is not due is due, its partition is left alone and others go on;
    what comes then is complete and in order."""
    rewinds: list[object] = []
    rewind = Fetching._rewind

    def counted(source: Fetching, partitions: Iterable[TopicPartition]) -> None:
        rewinds.append(partitions)
        rewind(source, partitions)

    monkeypatch.setattr(Fetching, "_rewind", counted)
    kafka = Inputs(mock_kafka.bootstrap_servers, mock_kafka)
    topic, later = await kafka.topic(), await kafka.topic()
    due_ms = int(time.time() * 1000) + 6_000
    for text, at_ms in ((b"due", 0), (b"waits", due_ms), (b"behind", 0)):
        headers = [
            (name, value or b"") for name, value in History(b"n:0:1", 1, 2, 3, due_ms=at_ms).headers
        ]
        await produce(kafka.servers, later, [text], partition=0, headers=headers)
    async with member(kafka, topic, "group", **retries(later)) as one:
        await one.until(lambda: len(one.messages) == 1)
        await kafka.send(topic, "another")
        await one.until(lambda: len(one.messages) == 2)
        assert time.time() * 1000 < due_ms, "the machine was too slow to tell"
        assert [each.value for each in one.messages] == [b"due", b"another"]
        assert one.positions[Partition(later, 0)] == 1
        await one.until(lambda: len(one.messages) == 4)
        assert time.time() * 1000 >= due_ms
        assert len(rewinds) <= 2, "it was fetched in vain again and again"
        assert [each.value for each in one.messages[2:]] == [b"waits", b"behind"]

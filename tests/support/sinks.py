"""Where sinks write to, for the contract suite: a Kafka, or the fake that stands for one.

`Kafka` and `Fake` offer the same steps (a sink, breaking its sends, reading what has landed), so
that a claim is written once and holds for both.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import NotLeaderForPartitionError

from service.core.events import Event
from service.core.messages import Extracted, Message, Outcome, Passed, Postponed, Rejected, Skipped
from service.kafka import sink as sink_module
from service.kafka.sink import KafkaSink
from service.settings import Settings
from tests.support.fakes import FakeBroker, FakeSink
from tests.support.topics import Read, read_topic

FAKE_BATCH = 8


@dataclass(frozen=True)
class Kafka:
    """A broker with topics for one test."""

    servers: str
    output: str
    dead_letters: str
    told: list[Event] = field(default_factory=list)

    def settings(self, **sections: dict[str, object]) -> Settings:
        own: dict[str, dict[str, object]] = {
            "kafka": {"bootstrap_servers": self.servers, "request_timeout_s": 5},
            "output": {"topic": self.output},
            "dead_letters": {"topic": self.dead_letters},
        }
        for name, section in sections.items():
            own[name] = {**own.get(name, {}), **section}
        return Settings.model_validate(own)

    @asynccontextmanager
    async def sink(self, **sections: dict[str, object]) -> AsyncIterator[KafkaSink]:
        sink = KafkaSink(self.settings(**sections), self.told.append)
        await sink.start()
        try:
            yield sink
        finally:
            await sink.stop()

    def break_sends(
        self,
        monkeypatch: pytest.MonkeyPatch,
        lost: Callable[[], bool],
        unheard: Callable[[], bool] = lambda: False,
    ) -> None:
        """Batches of sinks that start from now on are lost, or only their acknowledgement is."""

        class Breaking(AIOKafkaProducer):  # type: ignore[misc]
            async def send_batch(self, batch: object, topic: str, *, partition: int) -> object:
                if lost():
                    raise NotLeaderForPartitionError
                acknowledged = await super().send_batch(batch, topic, partition=partition)
                if unheard():
                    await acknowledged
                    raise NotLeaderForPartitionError
                return acknowledged

        monkeypatch.setattr(sink_module, "AIOKafkaProducer", Breaking)

    def conceal_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Brokers don't tell how large a record may be; they only refuse it."""

        async def tells_nothing(*_: object) -> None:
            return None

        monkeypatch.setattr(sink_module, "ask_broker", tells_nothing)

    async def outputs(self) -> list[Read]:
        return await read_topic(self.servers, self.output)

    async def letters(self) -> list[Read]:
        return await read_topic(self.servers, self.dead_letters)


class Fake:
    """What a `FakeSink` publishes, read as it would stand in Kafka."""

    def __init__(self, record_max_bytes: int | None = None) -> None:
        self._broker = FakeBroker()
        self._record_max_bytes = record_max_bytes
        self._limit_known = True
        self._lost: Callable[[], bool] = lambda: False
        self._unheard: Callable[[], bool] = lambda: False

    @asynccontextmanager
    async def sink(self, **sections: dict[str, object]) -> AsyncIterator[FakeSink]:
        limit = sections.get("output", {}).get("message_max_bytes", self._record_max_bytes)
        sink = FakeSink(self._broker, record_max_bytes=limit, limit_known=self._limit_known)
        sink.flaky, sink.loses_acknowledgement = self._lost, self._unheard
        yield sink

    def break_sends(
        self,
        monkeypatch: pytest.MonkeyPatch,
        lost: Callable[[], bool],
        unheard: Callable[[], bool] = lambda: False,
    ) -> None:
        # Not asked for every message: a fake sends each by itself, Kafka in batches.
        sends = itertools.count()
        self._lost = lambda: next(sends) % FAKE_BATCH == 0 and lost()
        self._unheard = lambda: next(sends) % FAKE_BATCH == 0 and unheard()

    def conceal_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._limit_known = False

    async def outputs(self) -> list[Read]:
        reads = []
        for message, outcome in self._broker.published:
            for key, value in _outputs(message, outcome):
                reads.append(_read("out", len(reads), message, key, value))
        return reads

    async def letters(self) -> list[Read]:
        rejected = [m for m, outcome in self._broker.published if isinstance(outcome, Rejected)]
        return [_read("dead", i, m, m.key, m.value) for i, m in enumerate(rejected)]


Output: TypeAlias = Kafka | Fake


def _outputs(message: Message, outcome: Outcome) -> list[tuple[bytes | None, bytes | None]]:
    match outcome:
        case Extracted():
            own = [(record.key, record.json) for record in outcome.records]
            return [(message.key if key is None else key, value) for key, value in own]
        case Passed():
            return [(message.key, None)]
        case Rejected() | Skipped() | Postponed():
            return []


def _read(
    topic: str, offset: int, message: Message, key: bytes | None, value: bytes | None
) -> Read:
    headers = (("sluice.source.offset", b"%d" % message.offset),)
    return Read(topic, 0, offset, key, value, headers, message.timestamp_ms)

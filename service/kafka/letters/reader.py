"""Dead letters, read back: which there are, what each says, which were sent again.

A reader takes the ends at its start for the topic's, reads each partition from its beginning up
to there, and stops. Nothing is committed, no group is joined, and only what is settled is seen.

Beside the letters stand *marks*: a redrive writes, in the transaction in which it sends letters
again, which ones these were. A mark lives as long as the letters before it, which a group's
offsets would not (brokers forget them after a week without a commit).
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError, UnknownTopicOrPartitionError
from aiokafka.structs import ConsumerRecord

from service.core.errors import CannotRun
from service.core.history import (
    ID_HEADER,
    TOPIC_ID_HEADER,
    History,
    is_origin,
    is_topic_id,
    own_part,
)
from service.core.messages import Coordinates, Headers
from service.kafka.client.connection import client_options
from service.kafka.client.deadlines import within
from service.kafka.client.meaning import stop_for
from service.kafka.client.topics_seen import look_at_topics
from service.kafka.letters.written import MARKER, original_headers
from service.settings import Settings

REDRIVEN = "sluice.redriven"
"""A mark has this header: offsets of its own partition, comma-separated."""

POLL_MS = 500
FETCH_PARTITION_MAX_BYTES = 4 * 1024 * 1024

_OFFSETS = re.compile(rb"\d{1,19}(,\d{1,19})*")


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter. What its headers do not say, or not in the form that is expected, is taken
    from the brokers' own headers (KIP-1191), or is nothing: other programs write letters too."""

    at: Coordinates
    written_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    _said: Mapping[str, bytes]

    @classmethod
    def of(cls, record: ConsumerRecord) -> Letter | None:
        """None where the record is no dead letter."""
        headers: Headers = tuple(record.headers)
        said = headers[len(original_headers(headers)) :]
        if not said:
            return None
        return cls(
            Coordinates(record.topic, record.partition, record.offset),
            record.timestamp,
            record.key,
            record.value,
            headers,
            {name: value or b"" for name, value in said},
        )

    def said(self, name: str) -> str:
        """One of the headers that say why; empty where it is not there."""
        return self._said.get(name, b"").decode("utf-8", "replace")

    def number(self, name: str) -> int | None:
        value = self._said.get(name, b"")
        return int(value) if re.fullmatch(rb"-?[0-9]{1,19}", value) else None

    @property
    def own_headers(self) -> Headers:
        """Those that the message first came in with."""
        return own_part(original_headers(self.headers))

    @property
    def origin(self) -> Coordinates:
        """Where the message first came in."""
        claimed = self._said.get(ID_HEADER)
        if claimed is not None and is_origin(claimed):
            topic, partition, offset = claimed.decode().split(":")
            return Coordinates(topic, int(partition), int(offset))
        return Coordinates(
            self.said(MARKER),
            self.number("__dlq.errors.partition") or 0,
            self.number("__dlq.errors.offset") or 0,
        )

    @property
    def reason(self) -> str:
        return self.said("sluice.error.reason")

    @property
    def detail(self) -> str:
        return self.said("sluice.error.detail") or self.said("__dlq.errors.message")

    @property
    def attempts(self) -> int:
        return self.number("sluice.attempts") or 0

    @property
    def redrives(self) -> int:
        """How often the message had been sent again before this letter."""
        before = History.of(original_headers(self.headers))
        return 0 if before is None else before.redrives

    @property
    def history(self) -> History:
        """What the message carries when it is sent again now."""
        topic_id = self._said.get(TOPIC_ID_HEADER, b"")
        first_ms = self.number("sluice.source.timestamp")
        failed_ms = self.number("sluice.first.failed.at")
        return History(
            "{}:{}:{}".format(*self.origin).encode(),
            -1 if first_ms is None else first_ms,
            self.attempts,
            self.written_ms if failed_ms is None else failed_ms,
            redrives=self.redrives + 1,
            topic_id=topic_id if is_topic_id(topic_id) else b"",
        )


@dataclass(frozen=True, slots=True)
class Selection:
    """Which letters are meant; what is not set leaves none out. Times are those of the letters,
    partition and topic those of the origin."""

    at: frozenset[tuple[int, int]] = frozenset()  # partition and offset of letters
    reasons: frozenset[str] = frozenset()
    since_ms: int | None = None
    until_ms: int | None = None
    partition: int | None = None
    topic: str | None = None
    text: str | None = None

    def takes(self, letter: Letter) -> bool:
        origin = letter.origin
        return (
            (not self.at or letter.at[1:] in self.at)
            and (not self.reasons or letter.reason in self.reasons)
            and (self.since_ms is None or letter.written_ms >= self.since_ms)
            and (self.until_ms is None or letter.written_ms < self.until_ms)
            and (self.partition is None or origin.partition == self.partition)
            and (self.topic is None or origin.topic == self.topic)
            and (self.text is None or self.text.encode() in (letter.value or b""))
        )


def mark(offsets: list[int]) -> tuple[str, bytes]:
    """The header that says that these letters of its partition were sent again."""
    return REDRIVEN, ",".join(map(str, offsets)).encode()


def marked(record: ConsumerRecord) -> list[int]:
    """The offsets that a mark is about; none where the record is no mark."""
    match record.headers:
        case ((name, bytes(value)),) if name == REDRIVEN and _OFFSETS.fullmatch(value):
            return [int(each) for each in value.split(b",")]
        case _:
            return []


@dataclass
class Redriven:
    """Which letters were sent again, and when: partition -> offset -> time of the last mark."""

    at_ms: dict[int, dict[int, int]] = field(default_factory=dict)

    def note(self, record: ConsumerRecord) -> None:
        for offset in marked(record):
            self.at_ms.setdefault(record.partition, {})[offset] = record.timestamp

    def when_ms(self, letter: Letter) -> int | None:
        return self.at_ms.get(letter.at.partition, {}).get(letter.at.offset)


class Reader:
    """Reads the dead letter topic up to the ends that it had when the reader was opened."""

    def __init__(
        self, consumer: AIOKafkaConsumer, ends: Mapping[TopicPartition, int], patience_s: float
    ) -> None:
        self._consumer, self._ends, self._patience_s = consumer, ends, patience_s

    async def redriven(self) -> Redriven:
        """What all marks say: one pass over the topic, as a mark stands behind its letters."""
        found = Redriven()
        async for record in self._records():
            found.note(record)
        return found

    async def letters(self, selection: Selection) -> AsyncIterator[Letter]:
        """Those that are meant, partition by partition, in order."""
        async for record in self._records():
            letter = Letter.of(record)
            if letter is not None and selection.takes(letter):
                yield letter

    async def letter(self, partition: int, offset: int) -> Letter | None:
        """The one that stands there, if one does."""
        async for record in self._records(partition, offset):
            return Letter.of(record) if record.offset == offset else None
        return None

    async def _records(
        self, only: int | None = None, start: int | None = None
    ) -> AsyncIterator[ConsumerRecord]:
        for where, end in self._ends.items():
            if only is not None and where.partition != only:
                continue
            self._consumer.assign([where])
            if start is None:
                await within(self._patience_s, self._consumer.seek_to_beginning(where))
            else:
                self._consumer.seek(where, start)
            while (records := await within(self._patience_s, self._next(where, end))) is not None:
                for record in records:
                    if record.offset < end:
                        yield record

    async def _next(self, where: TopicPartition, end: int) -> list[ConsumerRecord] | None:
        """What comes next, at least one; None at the end. Transaction markers move the position
        and bring nothing."""
        while await self._consumer.position(where) < end:
            found = await self._consumer.getmany(where, timeout_ms=POLL_MS)
            if found:
                return list(found[where])
        return None


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Reader]:
    """A reader; errors of the client, also of its use, become sentences."""
    kafka, topic = settings.kafka, settings.dead_letters.topic
    partitions = await _partitions(settings)
    consumer = AIOKafkaConsumer(
        **client_options(kafka),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        check_crcs=True,
        max_partition_fetch_bytes=FETCH_PARTITION_MAX_BYTES,
    )
    try:
        await within(kafka.request_timeout_s, consumer.start())
        consumer.assign(partitions)
        ends = await within(kafka.request_timeout_s, consumer.end_offsets(partitions))
        in_order = {each: ends[each] for each in partitions}
        yield Reader(consumer, in_order, kafka.request_timeout_s)
    except (KafkaError, OSError, TimeoutError) as error:
        raise stop_for(error, kafka, topic) from error
    finally:
        await consumer.stop()


async def _partitions(settings: Settings) -> list[TopicPartition]:
    name = settings.dead_letters.topic
    found = (await look_at_topics(settings.kafka, (name,)))[name]
    if not found.partitions:
        raise stop_for(UnknownTopicOrPartitionError(), settings.kafka, name)
    if not found.allows("READ"):
        raise CannotRun(f"Kafka does not let this client read topic {name}: give it READ.")
    return [TopicPartition(name, number) for number in range(found.partitions)]

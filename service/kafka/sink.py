"""Outcomes into Kafka: records to the output topic, rejected messages to the dead letters.

What is sent stands here; in which order and how safely in `sending.py` and `producers.py`.
"""

import asyncio
import functools
import logging
import resource
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import assert_never

from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError, UnknownTopicOrPartitionError
from aiokafka.partitioner import murmur2

from service.core.errors import OutputTooLarge, PublishFailed, SluiceError
from service.core.events import Observe
from service.core.history import first_timestamp_ms, own_part
from service.core.messages import (
    Aborted,
    Extracted,
    Message,
    Part,
    Passed,
    Postponed,
    Publishable,
    Record,
    Rejected,
    Skipped,
)
from service.kafka.client.connection import client_options, reach
from service.kafka.client.deadlines import within
from service.kafka.client.meaning import stop_for
from service.kafka.headers import (
    HeaderList,
    aborted_headers,
    part_headers,
    record_headers,
    tombstone_headers,
)
from service.kafka.letters.written import redacted, smaller
from service.kafka.sending.lane_failures import LaneFailures
from service.kafka.sending.producers import BATCH_MAX_BYTES, Output, Producers
from service.kafka.sending.queues import Sending
from service.kafka.sending.sizes import TopicSizes, ask_broker, size_alone
from service.kafka.transactions.transactions import (
    Transactions,
    partitions_max,
    transactional_options,
)
from service.settings import Settings

DISCOVERY_TIMEOUT_S = 3.0
"""At the start each topic's partitions are looked for this long: a topic that exists is found in
one answer."""
FLUSH_TIMEOUT_S = 5.0
"""At the stop what is queued has this long to be sent. The pipeline has drained before, so that
nothing is left as a rule."""
DEADLINE_FACTOR = 2
"""A send may take this many request timeouts: the client gives a request that hangs up and sends it
again once, safely. After that the producer is taken for wedged (aiokafka #1017) and replaced."""
FUTURE_MAX_MS = 3_600_000
"""Brokers refuse timestamps further ahead of their clock (`message.timestamp.after.max.ms`)."""
HELD_LOG_EVERY_S = 60.0
"""A dead letter that fits nowhere is tried for ever, and the log says so this often."""

HASHES_KEPT = 10_000
"""The hashes of this many keys are kept: in Python a hash of 36 bytes takes as long as the record's
headers."""

NO_OPTIONS: Mapping[str, int] = MappingProxyType({})

log = logging.getLogger(__name__)


class KafkaSink:
    """Publishes outcomes; each is acknowledged by all in-sync replicas or fails.

    `start` and `stop` belong to one task: between them a task group is open in it, and an
    exception that nobody foresaw cancels it. `observe` hears of producers that were replaced.
    """

    def __init__(self, settings: Settings, observe: Observe) -> None:
        self._settings = settings
        self._output_topic = settings.output.topic
        self._dead_letter_topic = settings.dead_letters.topic
        self._sizes = TopicSizes(lambda topic: ask_broker(topic, self._create_admin))
        self._failures = LaneFailures(settings.delivery.ordering)
        self._held_logged_s = -HELD_LOG_EVERY_S
        self._started = False
        self._group = asyncio.TaskGroup()
        request_timeout_s = settings.kafka.request_timeout_s
        self._producers = Producers(self._create_producer, request_timeout_s, self._group, observe)
        self._sending = Sending(
            self._producers,
            batch_max_bytes=lambda topic: min(BATCH_MAX_BYTES, self._sizes.known(topic)),
            refused=self._sizes.refused,
            deadline_s=DEADLINE_FACTOR * request_timeout_s,
            group=self._group,
        )
        self.transactions: Transactions | None = None
        """With delivery.mode exactly_once everything goes through these, offsets included; the
        other producer is there for its metadata alone."""
        if settings.delivery.mode == "exactly_once":
            self.transactions = Transactions(
                self._create_transactional,
                group_id=settings.kafka.group_id,
                batch_max_bytes=lambda topic: min(BATCH_MAX_BYTES, self._sizes.known(topic)),
                refused=self._sizes.refused,
                interval_s=settings.delivery.commit_interval_s,
                deadline_s=DEADLINE_FACTOR * request_timeout_s,
                open_timeout_s=request_timeout_s,
                partitions_max=partitions_max(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
                group=self._group,
                observe=observe,
            )

    async def start(self) -> None:
        """Connect and see that both topics are there; raises `CannotRun` within seconds.

        A broker that creates topics by itself may do so here: then they are there.
        """
        await self._group.__aenter__()
        self._started = True
        try:
            await self._find_topics()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Flush and close, within 20 s; what is not acknowledged by then has failed."""
        if not self._started:
            return
        self._started = False
        if self.transactions is not None:
            await self.transactions.stop(FLUSH_TIMEOUT_S)
        flushed = await self._sending.stop(FLUSH_TIMEOUT_S)
        await self._producers.close(flush=flushed)
        await self._group.__aexit__(None, None, None)

    async def publish(self, message: Message, outcome: Publishable) -> asyncio.Future[None]:
        """Hand an outcome over; waits only where a size has to be looked up.

        The future raises `PublishFailed` (nothing of this lane that was handed over later lands
        before it in the same output partition, however many it has records in) or
        `OutputTooLarge` (of a message with several records some may be there: brokers refuse
        what they did not tell before). Cancelling it withdraws what has not left yet; what has
        left may still land. `publish` itself cancelled has handed over nothing.
        """
        try:
            if not self._started:
                raise PublishFailed("the sink is not running")
            outputs = await self._outputs(message, outcome)
            if not outputs and self.transactions is None:
                return _settled(None)
            self._failures.let_pass(message)
            if not outputs and self._has_room(message):
                return _settled(None)
            # A marker goes where the records of its message go that have the message's key.
            of_message = isinstance(outcome, Aborted)
            placed = [
                (self._place(message, each.topic, message.key if of_message else each.key), each)
                for each in outputs
            ]
        except PublishFailed as error:
            self._failures.add(message)
            return _settled(error)
        except OutputTooLarge as error:
            return _settled(error)
        return self._hand_over(message, placed)

    def _has_room(self, message: Message) -> bool:
        return self.transactions is None or self.transactions.has_room(message.partition)

    def _hand_over(
        self, message: Message, placed: list[tuple[int, Output]]
    ) -> asyncio.Future[None]:
        def on_failure() -> None:
            self._failures.add(message)

        if self.transactions is None:
            lane = self._failures.lane(message) or message.coordinates
            return self._sending.hand_over(placed, on_failure, lane)
        return self.transactions.hand_over(message.partition, message.offset, placed, on_failure)

    async def _outputs(self, message: Message, outcome: Publishable) -> list[Output]:
        match outcome:
            case Extracted():
                return await self._fitting(self._records(message, outcome))
            case Part(record=record):
                headers = part_headers(message, outcome)
                return await self._fitting([self._record(message, record, headers)])
            case Aborted():
                # Without a value, as it is no record; under a key that nothing else has, so that
                # in a compacted topic it deletes nothing and goes away by itself.
                key = b"sluice.aborted:" + outcome.answer_id.encode()
                headers = aborted_headers(message, outcome)
                return await self._fitting([self._output(message, key, None, headers)])
            case Passed():
                headers = tombstone_headers(message)
                return await self._fitting([self._output(message, message.key, None, headers)])
            case Rejected():
                return [await self._dead_letter(message, outcome)]
            case Postponed():
                return await self._fitting([self._postponed(message, outcome)])
            case Skipped():
                return []
            case _:
                assert_never(outcome)

    def _records(self, message: Message, extracted: Extracted) -> list[Output]:
        return [
            self._record(message, record, record_headers(message, extracted, index))
            for index, record in enumerate(extracted.records)
        ]

    def _record(self, message: Message, record: Record, headers: HeaderList) -> Output:
        key = message.key if record.key is None else record.key
        return self._output(message, key, record.json, headers)

    def _output(
        self, message: Message, key: bytes | None, value: bytes | None, headers: HeaderList
    ) -> Output:
        size = size_alone(key, value, headers)
        return Output(self._output_topic, key, value, headers, self._timestamp_ms(message), size)

    def _postponed(self, message: Message, postponed: Postponed) -> Output:
        """The message as it first came in, and what it has been through; its own timestamp is
        now, so that retention does not delete it before it is due."""
        topic = self._settings.retries.topic
        assert topic is not None, "the settings see to it"
        headers = [*own_part(message.headers), *postponed.carries]
        size = size_alone(message.key, message.value, headers)
        return Output(topic, message.key, message.value, headers, None, size)

    def _timestamp_ms(self, message: Message) -> int | None:
        """The input's, where it has one (-1 says that it has none) that brokers will take."""
        now = self._settings.output.timestamp == "now"
        first_ms = first_timestamp_ms(message)
        known = 0 <= first_ms <= _now_ms() + FUTURE_MAX_MS
        return first_ms if known and not now else None

    async def _fitting(self, outputs: list[Output]) -> list[Output]:
        """All of them or none: a message is not published in part where sizes are known."""
        if not outputs:
            return outputs
        largest = max(each.size_bytes for each in outputs)
        topic = outputs[0].topic
        own_max = self._settings.output.message_max_bytes
        if largest > own_max:
            raise OutputTooLarge(
                f"a record of {largest} bytes; output.message_max_bytes is {own_max}"
            )
        if largest > self._sizes.known(topic) and largest > await self._sizes.fresh(topic):
            raise OutputTooLarge(
                f"a record of {largest} bytes; topic {topic} takes {self._sizes.known(topic)}"
            )
        return outputs

    async def _dead_letter(self, message: Message, rejected: Rejected) -> Output:
        """The largest that the topic takes; `output.message_max_bytes` is not asked here.

        A dead letter that is too large without answer and detail is held, never dropped.
        """
        topic = self._dead_letter_topic
        group = self._settings.kafka.group_id
        size = 0
        connect = self._settings.dead_letters.connect_headers
        if self._settings.dead_letters.redacted:
            rejected = redacted(rejected)
        for letter in smaller(message, rejected, group, _now_ms(), connect=connect):
            size = size_alone(letter.key, letter.value, letter.headers)
            if size <= self._sizes.known(topic) or size <= await self._sizes.fresh(topic):
                return Output(
                    topic, letter.key, letter.value, letter.headers, None, size, must_fit=True
                )
        self._complain_of_held(message, size)
        raise PublishFailed(f"a dead letter of {size} bytes does not fit topic {topic}")

    def _complain_of_held(self, message: Message, size: int) -> None:
        now_s = time.monotonic()
        if now_s - self._held_logged_s >= HELD_LOG_EVERY_S:
            self._held_logged_s = now_s
            log.error(
                "the dead letter of %s needs %d bytes and topic %s takes %d: it is held until"
                " max.message.bytes of that topic is raised",
                message.coordinates,
                size,
                self._dead_letter_topic,
                self._sizes.known(self._dead_letter_topic),
            )

    def _place(self, message: Message, topic: str, key: bytes | None) -> int:
        """The output partition: by key as Java's producers choose it, else spread evenly.

        Without a key, `ordering: partition` keeps an input partition together. The choice
        depends on the message alone, so that a repetition goes where it went before.
        """
        partitions = self._producers.partitions(topic)
        if not partitions:
            raise PublishFailed(f"the partitions of topic {topic} are not known now")
        if key is not None:
            return partitions[_key_hash(key) % len(partitions)]
        spread = message.partition.partition
        if self._settings.delivery.ordering != "partition":
            spread += message.offset
        return partitions[spread % len(partitions)]

    async def _find_topics(self) -> None:
        kafka = self._settings.kafka
        await reach(kafka)
        try:
            producer = await self._producers.open()
        except PublishFailed as error:
            raise stop_for(error.__cause__ or error, kafka) from error
        written = (self._output_topic, self._dead_letter_topic, self._settings.retries.topic)
        for topic in dict.fromkeys(filter(None, written)):
            try:
                await within(DISCOVERY_TIMEOUT_S, producer.discover(topic))
            except TimeoutError as error:
                raise stop_for(UnknownTopicOrPartitionError(), kafka, topic) from error
            except KafkaError as error:
                raise stop_for(error, kafka, topic) from error
            self._producers.partitions(topic)
            await self._sizes.fresh(topic)

    def _create_transactional(self, transactional_id: str) -> AIOKafkaProducer:
        deadline_s = DEADLINE_FACTOR * self._settings.kafka.request_timeout_s
        return self._create_producer(transactional_id, transactional_options(deadline_s))

    def _create_producer(
        self, transactional_id: str | None = None, options: Mapping[str, int] = NO_OPTIONS
    ) -> AIOKafkaProducer:
        return AIOKafkaProducer(
            **{**client_options(self._settings.kafka), **options},
            enable_idempotence=True,
            acks="all",
            transactional_id=transactional_id,
            key_serializer=None,
            value_serializer=None,
            # Sizes stay predictable: topics limit the compressed batch.
            compression_type=None,
            max_batch_size=2 * BATCH_MAX_BYTES,  # batches are cut by us, never here
            max_request_size=self._settings.output.message_max_bytes,
            linger_ms=0,  # `sending.py` lingers
        )

    def _create_admin(self) -> AIOKafkaAdminClient:
        return AIOKafkaAdminClient(**client_options(self._settings.kafka))


@functools.lru_cache(HASHES_KEPT)
def _key_hash(key: bytes) -> int:
    """As Java's producers have it, by which they choose the partition."""
    return int(murmur2(key)) & 0x7FFF_FFFF


def _now_ms() -> int:
    return int(time.time() * 1000)


def _settled(error: SluiceError | None) -> asyncio.Future[None]:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
        future.exception()  # read once: nobody may be waiting
    return future

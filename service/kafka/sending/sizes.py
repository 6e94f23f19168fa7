"""How large a record each topic takes: asked of the brokers, corrected by their refusals."""

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError

from service import clock
from service.core.errors import WrongSettings
from service.kafka.client.connection import client_options
from service.kafka.client.private import record_size, varint_size
from service.settings import KafkaSettings

UNKNOWN = sys.maxsize
"""Where nobody tells a limit, the broker's refusal decides."""
REFRESH_S = 30.0
"""A limit that stands in the way is asked for again this often: somebody may have raised it."""
ASK_TIMEOUT_S = 5.0
"""One question may take this long; without an answer what was known before holds."""
BATCH_HEADER_BYTES = 61
"""A record batch of version 2 begins with this many bytes."""

log = logging.getLogger(__name__)


def size_alone(
    key: bytes | None, value: bytes | None, headers: list[tuple[str, bytes | None]]
) -> int:
    """Bytes of a record batch that holds this record only, which is what topics limit.

    The record: attributes, timestamp and offset difference (one byte each, as the first of its
    batch), then key, value, headers; before it its length as a varint.
    """
    body: int = 3 + record_size(key, value, headers)
    length_bytes: int = varint_size(body)
    return BATCH_HEADER_BYTES + length_bytes + body


class TopicSizes:
    """`max.message.bytes` of each topic, in bytes of a record batch."""

    def __init__(self, ask: Callable[[str], Awaitable[int | None]]) -> None:
        self._ask = ask
        self._limits: dict[str, int] = {}
        self._asked_s: dict[str, float] = {}

    def known(self, topic: str) -> int:
        return self._limits.get(topic, UNKNOWN)

    async def fresh(self, topic: str) -> int:
        """The limit, asked for again where the last answer or refusal is old."""
        now_s = clock.now_s()
        if now_s - self._asked_s.get(topic, -REFRESH_S) >= REFRESH_S:
            self._asked_s[topic] = now_s
            answer = await self._ask(topic)
            self._limits[topic] = UNKNOWN if answer is None else answer
        return self.known(topic)

    def refused(self, topic: str, size: int) -> None:
        """A batch of at most this size was too large: the limit lies below."""
        self._asked_s[topic] = clock.now_s()
        self._limits[topic] = min(self.known(topic), size - 1)


async def record_max_bytes(kafka: KafkaSettings, topic: str) -> int | None:
    """The topic's `max.message.bytes`; None where brokers don't tell."""
    return await ask_broker(topic, lambda: AIOKafkaAdminClient(**client_options(kafka)))


async def ask_broker(topic: str, create: Callable[[], AIOKafkaAdminClient]) -> int | None:
    """The topic's `max.message.bytes`; None where brokers don't tell (too old, not allowed)."""
    try:
        async with asyncio.timeout(ASK_TIMEOUT_S):
            return await _describe(create, topic)
    except (KafkaError, TimeoutError, OSError, WrongSettings) as error:
        log.info("the largest record of topic %s is not known: %s", topic, type(error).__name__)
        return None


async def _describe(create: Callable[[], AIOKafkaAdminClient], topic: str) -> int | None:
    client = create()
    try:
        await client.start()
        name = "max.message.bytes"
        resource = ConfigResource(ConfigResourceType.TOPIC, topic, configs={name: None})
        (response,) = await client.describe_configs([resource])
    finally:
        await client.close()
    for error_code, _, _, _, entries in response.resources:
        if error_code == 0:
            for entry in entries:
                if entry[0] == name:
                    return int(entry[1])
    return None

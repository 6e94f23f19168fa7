"""The one metadata request: what brokers say of topics, with their ids and our permissions.

A topic that is deleted and made again is another topic, which only its id tells (KIP-516). The
client knows Metadata up to version 5, which names neither ids nor permissions; version 8 has the
permissions and version 10 both. Of the versions here the newest that the broker knows is sent.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, Literal, TypeAlias

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError, UnknownTopicOrPartitionError, for_code
from aiokafka.protocol.abstract import AbstractType
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.metadata import MetadataRequest_v4, MetadataRequest_v5
from aiokafka.protocol.types import (
    Array,
    Boolean,
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Schema,
    String,
    TaggedFields,
)

from service.kafka.client.connection import client_options, reach
from service.kafka.client.deadlines import within
from service.kafka.client.meaning import is_lasting, stop_for
from service.kafka.client.private import send
from service.settings import KafkaSettings

Operation: TypeAlias = Literal["READ", "WRITE", "DESCRIBE"]

LOOK_S = 20.0
"""One question about topics or a group may take this long, the way to the broker included."""

NO_ID = bytes(16)
"""These bytes stand for an id where there is none."""

_BITS: dict[Operation, int] = {"READ": 1 << 3, "WRITE": 1 << 4, "DESCRIBE": 1 << 8}
"""Each operation has a code in Kafka's access control; in `authorized_operations` the bit of that
number stands for it."""

_NOT_TOLD = -(2**31)
"""A broker sends this in the place of `authorized_operations` where it does not tell."""


@dataclass(frozen=True, slots=True)
class FoundTopic:
    """What a broker says of a topic now; one without partitions is missing.

    `error` is `NoError` where all is well. `leaders` maps each partition to its broker, -1 while
    it has none. `id` is None where the broker tells none. `may` holds what we are allowed to do
    with the topic, None where the broker does not tell or was not asked.
    """

    name: str
    error: type[KafkaError]
    id: str | None = None
    leaders: Mapping[int, int] = field(default_factory=dict)
    replicas: int = 0
    may: frozenset[Operation] | None = None

    @property
    def partitions(self) -> int:
        """How many partitions it has."""
        return len(self.leaders)

    def allows(self, operation: Operation) -> bool:
        """Whether nothing speaks against it."""
        return self.may is None or operation in self.may


async def find_topics(
    admin: AIOKafkaAdminClient, topics: list[str], *, with_permissions: bool = False
) -> dict[str, FoundTopic]:
    """topic -> what a broker says of it now; creates none.

    Raises `KafkaError` where no broker answers, and may wait as long as a request may.
    """
    answer = await send(admin, _Topics(topics, with_permissions=with_permissions))
    return {found["topic"]: _found(found) for found in answer.to_object()["topics"]}


async def topic_ids(admin: AIOKafkaAdminClient, topics: list[str]) -> dict[str, str | None]:
    """topic -> its id as Kafka's tools print it (22 characters of A-Z, a-z, 0-9, - and _).

    None for a topic that is not there, and where brokers are too old to tell. Raises as
    `find_topics` does.
    """
    return {topic: found.id for topic, found in (await find_topics(admin, topics)).items()}


async def look_at_topics(kafka: KafkaSettings, names: Iterable[str]) -> dict[str, FoundTopic]:
    """What brokers say of the topics, asked through a connection of its own; creates none.

    Raises `Stop` where no broker lets us in or we may not even ask.
    """
    wanted = list(dict.fromkeys(names))
    async with opened_admin(kafka) as admin:
        found = await within(LOOK_S, find_topics(admin, wanted, with_permissions=True))
        return {name: see_that_it_may_be_described(found[name]) for name in wanted}


def see_that_it_may_be_described(found: FoundTopic) -> FoundTopic:
    """The topic; raises `KafkaError` where an error of it will last: it is not missing then."""
    if found.error is not UnknownTopicOrPartitionError and is_lasting(found.error()):
        raise found.error(found.name)
    return found


@asynccontextmanager
async def opened_admin(kafka: KafkaSettings) -> AsyncIterator[AIOKafkaAdminClient]:
    """An admin client; its errors, also those of its use, become sentences (`Stop`)."""
    await reach(kafka)
    admin = AIOKafkaAdminClient(**client_options(kafka))
    try:
        await within(LOOK_S, admin.start())
        yield admin
    except (KafkaError, OSError, TimeoutError) as error:
        raise stop_for(error, kafka) from error
    finally:
        await admin.close()


def _found(found: Mapping[str, Any]) -> FoundTopic:
    raw, partitions = found.get("topic_id", NO_ID), found["partitions"]
    return FoundTopic(
        name=found["topic"],
        error=for_code(found["error_code"]),
        id=None if raw == NO_ID else base64.urlsafe_b64encode(raw).rstrip(b"=").decode(),
        leaders={each["partition"]: each["leader"] for each in partitions},
        replicas=len(partitions[0].get("replicas", ())) if partitions else 0,
        may=allowed(found),
    )


def allowed(found: Mapping[str, Any]) -> frozenset[Operation] | None:
    """What `authorized_operations` of a topic or a group allow us; None where it is not told."""
    bits = found.get("authorized_operations", _NOT_TOLD)
    if bits == _NOT_TOLD:
        return None
    return frozenset(operation for operation, bit in _BITS.items() if bits & bit)


# --- a request that the client does not have ----------------------------------------------------


class Uuid(AbstractType[bytes]):  # type: ignore[misc]
    """Sixteen bytes."""

    @classmethod
    def encode(cls, value: bytes) -> bytes:
        assert len(value) == len(NO_ID), "an id of another length"
        return value

    @classmethod
    def decode(cls, data: BytesIO) -> bytes:
        value = data.read(len(NO_ID))
        if len(value) != len(NO_ID):
            raise ValueError("an answer ends within an id")
        return value


class _Answer8(Response):  # type: ignore[misc]
    API_KEY = 3
    API_VERSION = 8
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "brokers",
            Array(
                ("node_id", Int32),
                ("host", String("utf-8")),
                ("port", Int32),
                ("rack", String("utf-8")),
            ),
        ),
        ("cluster_id", String("utf-8")),
        ("controller_id", Int32),
        (
            "topics",
            Array(
                ("error_code", Int16),
                ("topic", String("utf-8")),
                ("is_internal", Boolean),
                (
                    "partitions",
                    Array(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", Array(Int32)),
                        ("isr", Array(Int32)),
                        ("offline_replicas", Array(Int32)),
                    ),
                ),
                ("authorized_operations", Int32),
            ),
        ),
        ("cluster_authorized_operations", Int32),
    )


class _Request8(RequestStruct):  # type: ignore[misc]
    API_KEY = 3
    API_VERSION = 8
    RESPONSE_TYPE = _Answer8
    SCHEMA = Schema(
        ("topics", Array(String("utf-8"))),
        ("allow_auto_topic_creation", Boolean),
        ("include_cluster_authorized_operations", Boolean),
        ("include_topic_authorized_operations", Boolean),
    )


class _Answer10(Response):  # type: ignore[misc]
    API_KEY = 3
    API_VERSION = 10
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "brokers",
            CompactArray(
                ("node_id", Int32),
                ("host", CompactString("utf-8")),
                ("port", Int32),
                ("rack", CompactString("utf-8")),
                ("tags", TaggedFields),
            ),
        ),
        ("cluster_id", CompactString("utf-8")),
        ("controller_id", Int32),
        (
            "topics",
            CompactArray(
                ("error_code", Int16),
                ("topic", CompactString("utf-8")),
                ("topic_id", Uuid),
                ("is_internal", Boolean),
                (
                    "partitions",
                    CompactArray(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", CompactArray(Int32)),
                        ("isr", CompactArray(Int32)),
                        ("offline_replicas", CompactArray(Int32)),
                        ("tags", TaggedFields),
                    ),
                ),
                ("authorized_operations", Int32),
                ("tags", TaggedFields),
            ),
        ),
        ("cluster_authorized_operations", Int32),
        ("tags", TaggedFields),
    )


class _Request10(RequestStruct):  # type: ignore[misc]
    API_KEY = 3
    API_VERSION = 10
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = _Answer10
    SCHEMA = Schema(
        (
            "topics",
            CompactArray(
                ("topic_id", Uuid), ("topic", CompactString("utf-8")), ("tags", TaggedFields)
            ),
        ),
        ("allow_auto_topic_creation", Boolean),
        ("include_cluster_authorized_operations", Boolean),
        ("include_topic_authorized_operations", Boolean),
        ("tags", TaggedFields),
    )


class _Topics(Request[MetadataRequest_v4 | MetadataRequest_v5 | _Request8 | _Request10]):  # type: ignore[misc]
    """Metadata of named topics, none of which it creates."""

    API_KEY = 3

    def __init__(self, topics: list[str], *, with_permissions: bool) -> None:
        self._topics, self._with_permissions = topics, with_permissions

    def build(self, version: Any) -> Any:
        if version is _Request10:
            no_tags: dict[int, bytes] = {}
            topics = [(NO_ID, each, no_tags) for each in self._topics]
            return version(topics, False, False, self._with_permissions, no_tags)
        if version is _Request8:
            return version(self._topics, False, False, self._with_permissions)
        return version(self._topics, False)

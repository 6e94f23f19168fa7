"""Topics by their ids (KIP-516): a topic that is deleted and made again is another topic.

The client knows Metadata up to version 5, which names no ids; the request here is version 10,
the first that does. Brokers too old for it are asked as before, and their topics have no id.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError, for_code
from aiokafka.protocol.abstract import AbstractType
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.metadata import MetadataRequest_v4, MetadataRequest_v5
from aiokafka.protocol.types import (
    Boolean,
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Schema,
    TaggedFields,
)

NO_ID = bytes(16)
"""What stands for an id where there is none."""


@dataclass(frozen=True, slots=True)
class FoundTopic:
    """What a broker says of a topic now.

    `error` is `NoError` where all is well. `leaders` maps each partition to its broker, -1 while
    it has none. `id` is None where the broker tells none.
    """

    error: type[KafkaError]
    id: str | None
    leaders: Mapping[int, int]


async def topic_ids(admin: AIOKafkaAdminClient, topics: list[str]) -> dict[str, str | None]:
    """topic -> its id as Kafka's tools print it (22 characters of A-Z, a-z, 0-9, - and _).

    None for a topic that is not there, and where brokers are too old to tell. Creates nothing;
    raises `KafkaError` where no broker answers, and may wait as long as a request may.
    """
    return {topic: found.id for topic, found in (await find_topics(admin, topics)).items()}


async def find_topics(admin: AIOKafkaAdminClient, topics: list[str]) -> dict[str, FoundTopic]:
    """topic -> what a broker says of it now; creates nothing. Raises `KafkaError`."""
    answer = await admin._send_request(_Topics(topics))
    return {found["topic"]: _found(found) for found in answer.to_object()["topics"]}


def _found(found: Mapping[str, Any]) -> FoundTopic:
    raw = found.get("topic_id", NO_ID)
    return FoundTopic(
        error=for_code(found["error_code"]),
        id=None if raw == NO_ID else base64.urlsafe_b64encode(raw).rstrip(b"=").decode(),
        leaders={each["partition"]: each["leader"] for each in found["partitions"]},
    )


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


class _TopicsAnswer(Response):  # type: ignore[misc]
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


class _TopicsRequest(RequestStruct):  # type: ignore[misc]
    API_KEY = 3
    API_VERSION = 10
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = _TopicsAnswer
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


class _Topics(Request[MetadataRequest_v4 | MetadataRequest_v5 | _TopicsRequest]):  # type: ignore[misc]
    """Metadata of named topics, none of which it creates."""

    API_KEY = 3

    def __init__(self, topics: list[str]) -> None:
        self._topics = topics

    def build(self, version: Any) -> Any:
        if version is _TopicsRequest:
            return version([(NO_ID, each, {}) for each in self._topics], False, False, False, {})
        return version(self._topics, False)

"""A group's offsets once no transaction with one of them is under way (KIP-447).

A coordinator answers the commit of a transaction before the offset in it can be read, and up to
Kafka 3.9 it may give out the next epoch before that: what is read then is the offset of before,
and who goes on from there publishes again what is published. A request that asks for stable
offsets is refused for as long as that may be. The client knows OffsetFetch up to version 3; the
request here is version 7, the first that can ask so (Kafka 2.5). Older brokers are asked as before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Set as AbstractSet
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError, NodeNotReadyError, NoError, for_code
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.commit import OffsetFetchRequest_v3
from aiokafka.protocol.types import (
    Boolean,
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Int64,
    Schema,
    TaggedFields,
)

from service.core.messages import Partition
from service.kafka.client.private import send
from service.kafka.client.stored import Stored

UNSTABLE_OFFSET_COMMIT = 88
"""Kafka answers with this code, which the client does not know."""


class UnstableOffset(KafkaError):  # type: ignore[misc]
    """A transaction with an offset of these has not ended, or its end cannot be read yet."""

    retriable = True


async def stable_offsets(
    admin: AIOKafkaAdminClient, group_id: str, asked: AbstractSet[Partition]
) -> dict[Partition, Stored | None]:
    """What the group has stored for these, None where nothing is.

    Raises `UnstableOffset` where a transaction may still change it, and `KafkaError`; may wait as
    long as a request may.
    """
    coordinator = await admin.find_coordinator(group_id)
    answer = (await send(admin, _Offsets(group_id, asked), coordinator)).to_object()
    found = {
        Partition(topic["topic"], each["partition"]): each
        for topic in answer["topics"]
        for each in topic["partitions"]
    }
    for code in (answer["error_code"], *(each["error_code"] for each in found.values())):
        if code == UNSTABLE_OFFSET_COMMIT:
            raise UnstableOffset
        if (error := for_code(code)) is not NoError:
            raise error
    if found.keys() != asked:
        raise NodeNotReadyError("the group's coordinator gave no offsets")
    return {
        partition: Stored(each["offset"], each["metadata"] or "") if each["offset"] >= 0 else None
        for partition, each in found.items()
    }


# --- a request that the client does not have ----------------------------------------------------


class _StableAnswer(Response):  # type: ignore[misc]
    API_KEY = 9
    API_VERSION = 7
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "topics",
            CompactArray(
                ("topic", CompactString("utf-8")),
                (
                    "partitions",
                    CompactArray(
                        ("partition", Int32),
                        ("offset", Int64),
                        ("leader_epoch", Int32),
                        ("metadata", CompactString("utf-8")),
                        ("error_code", Int16),
                        ("tags", TaggedFields),
                    ),
                ),
                ("tags", TaggedFields),
            ),
        ),
        ("error_code", Int16),
        ("tags", TaggedFields),
    )


class _StableRequest(RequestStruct):  # type: ignore[misc]
    API_KEY = 9
    API_VERSION = 7
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = _StableAnswer
    SCHEMA = Schema(
        ("group_id", CompactString("utf-8")),
        (
            "topics",
            CompactArray(
                ("topic", CompactString("utf-8")),
                ("partitions", CompactArray(Int32)),
                ("tags", TaggedFields),
            ),
        ),
        ("require_stable", Boolean),
        ("tags", TaggedFields),
    )


class _Offsets(Request[OffsetFetchRequest_v3 | _StableRequest]):  # type: ignore[misc]
    """Offsets of a group for some partitions, stable where the broker knows the difference."""

    API_KEY = 9

    def __init__(self, group_id: str, partitions: AbstractSet[Partition]) -> None:
        self._group_id = group_id
        self._by_topic: dict[str, list[int]] = defaultdict(list)
        for topic, number in sorted(partitions):
            self._by_topic[topic].append(number)

    def build(self, version: Any) -> Any:
        if version is _StableRequest:
            no_tags: dict[int, bytes] = {}
            topics = [(topic, numbers, no_tags) for topic, numbers in self._by_topic.items()]
            return version(self._group_id, topics, True, no_tags)
        return version(self._group_id, list(self._by_topic.items()))

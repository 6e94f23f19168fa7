"""Where a leader's epoch ends in a log (KIP-320): request version 3, of brokers since 2.3."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import (
    IncompatibleBrokerVersion,
    LeaderNotAvailableError,
    NoError,
    TopicAuthorizationFailedError,
    UnsupportedVersionError,
    for_code,
)
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import Array, Int16, Int32, Int64, Schema, String

from service.core.messages import Partition
from service.kafka.client.private import send
from service.kafka.client.topics_seen import find_topics


async def epoch_ends(
    admin: AIOKafkaAdminClient, epochs: Mapping[Partition, int]
) -> dict[Partition, int]:
    """Where an epoch ends in each partition's log, in which later leaders may have written on.

    Without those whose log knows nothing of it any more, and without all where brokers are too
    old to tell or do not let us ask. Raises `KafkaError` where a partition has no leader now.
    """
    found = await find_topics(admin, list({each.topic for each in epochs}))
    by_leader: dict[int, dict[Partition, int]] = defaultdict(dict)
    for each, epoch in epochs.items():
        by_leader[found[each.topic].leaders.get(each.partition, -1)][each] = epoch
    ends: dict[Partition, int] = {}
    for leader, asked in by_leader.items():
        if leader < 0:
            raise LeaderNotAvailableError("a partition has no leader now")
        try:
            answer = await send(admin, EpochEnds(asked), leader)
        except (IncompatibleBrokerVersion, NotImplementedError):
            return {}  # the client's words for an API, and for a version, that is not there
        ends |= _ends_in(answer)
    return ends


def _ends_in(answer: Any) -> dict[Partition, int]:
    found = {}
    for topic in answer.to_object()["topics"]:
        for each in topic["partitions"]:
            error = for_code(each["error_code"])
            if error not in (NoError, TopicAuthorizationFailedError, UnsupportedVersionError):
                raise error(topic["topic"])
            if error is NoError and each["end_offset"] >= 0:
                found[Partition(topic["topic"], each["partition"])] = each["end_offset"]
    return found


# --- a request that the client does not have ----------------------------------------------------


class _EpochEndsAnswer(Response):  # type: ignore[misc]
    API_KEY = 23
    API_VERSION = 3
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "topics",
            Array(
                ("topic", String("utf-8")),
                (
                    "partitions",
                    Array(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader_epoch", Int32),
                        ("end_offset", Int64),
                    ),
                ),
            ),
        ),
    )


class _EpochEndsRequest(RequestStruct):  # type: ignore[misc]
    API_KEY = 23
    API_VERSION = 3
    RESPONSE_TYPE = _EpochEndsAnswer
    SCHEMA = Schema(
        ("replica_id", Int32),
        (
            "topics",
            Array(
                ("topic", String("utf-8")),
                (
                    "partitions",
                    Array(("partition", Int32), ("current_leader_epoch", Int32), ("epoch", Int32)),
                ),
            ),
        ),
    )


_NOT_A_REPLICA = _ANY_LEADER = -1


class EpochEnds(Request[_EpochEndsRequest]):  # type: ignore[misc]
    """Where each partition's given epoch ends in its leader's log."""

    API_KEY = 23

    def __init__(self, epochs: Mapping[Partition, int]) -> None:
        self._topics: dict[str, list[tuple[int, int, int]]] = {}
        for (topic, number), epoch in epochs.items():
            self._topics.setdefault(topic, []).append((number, _ANY_LEADER, epoch))

    def build(self, version: Any) -> Any:
        return version(_NOT_A_REPLICA, list(self._topics.items()))

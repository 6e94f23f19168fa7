"""What brokers say of a consumer group, with what we may do with it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    IncompatibleBrokerVersion,
    NoError,
    for_code,
)
from aiokafka.protocol.admin import (
    DescribeGroupsRequest_v2,
    DescribeGroupsRequest_v3,
    DescribeGroupsResponse_v3,
)
from aiokafka.protocol.api import Request

from service.kafka.client.deadlines import within
from service.kafka.client.meaning import stop_for
from service.kafka.client.private import send
from service.kafka.client.topics_seen import LOOK_S, Operation, allowed, opened_admin
from service.settings import KafkaSettings

AGAIN_S = 0.2
"""The pause between two questions for what takes brokers a moment."""


@dataclass(frozen=True, slots=True)
class Group:
    """What a broker says of the consumer group; None where it does not tell."""

    state: str
    members: int | None
    may: frozenset[Operation] | None


async def look_at_group(kafka: KafkaSettings) -> Group:
    """What brokers say of the group. Raises `Stop` where we may not even ask."""
    async with opened_admin(kafka) as admin:
        coordinator = await within(LOOK_S, _coordinator(admin, kafka.group_id))
        try:
            answer = await within(LOOK_S, send(admin, _Groups(kafka.group_id), coordinator))
        except IncompatibleBrokerVersion:  # brokers that only look like Kafka
            return Group("", None, None)
    (group,) = answer.to_object()["groups"]
    error = for_code(group["error_code"])
    if error is not NoError:
        raise stop_for(error(), kafka)
    return Group(group["state"], len(group["members"]), allowed(group))


async def _coordinator(admin: AIOKafkaAdminClient, group_id: str) -> int:
    """The broker that coordinates the group. A cluster that has never had a group needs a moment
    to find one."""
    while True:
        try:
            node: int = await admin.find_coordinator(group_id)
        except GroupCoordinatorNotAvailableError:
            await asyncio.sleep(AGAIN_S)
        else:
            return node


# --- a request that the client does not have ----------------------------------------------------


class _GroupsRequest(DescribeGroupsRequest_v3):  # type: ignore[misc]
    """The client's own reads the answer as version 2, which ends before what is asked for."""

    RESPONSE_TYPE = DescribeGroupsResponse_v3


class _Groups(Request[DescribeGroupsRequest_v2 | _GroupsRequest]):  # type: ignore[misc]
    """One consumer group."""

    API_KEY = 15

    def __init__(self, group_id: str) -> None:
        self._group_id = group_id

    def build(self, version: Any) -> Any:
        if version is _GroupsRequest:
            return version([self._group_id], True)
        return version([self._group_id])

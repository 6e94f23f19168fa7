"""Where logs end, as one leader tells it through the admin client, which has no call for it."""

from __future__ import annotations

from collections.abc import Mapping

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError, NoError, for_code
from aiokafka.protocol.offset import OffsetRequest, OffsetResetStrategy

from service.core.messages import Partition
from service.kafka.client.deadlines import within
from service.kafka.client.private import send

ENDS_S = 4.0
"""One leader has this long to answer; the others are judged without it."""

READ_COMMITTED = 1
"""With this isolation level, which the consumer has too, the end is that of settled
transactions."""

NOT_A_REPLICA = -1
"""Clients give this in the place of a replica's id."""


async def ends_at(
    admin: AIOKafkaAdminClient, leader: int, partitions: Mapping[str, list[int]]
) -> dict[Partition, int]:
    """The last stable offsets that one leader tells; nothing where it does not answer."""
    asked = [
        (topic, [(number, OffsetResetStrategy.LATEST) for number in numbers])
        for topic, numbers in partitions.items()
    ]
    request = OffsetRequest(NOT_A_REPLICA, READ_COMMITTED, asked)
    try:
        answer = await within(ENDS_S, send(admin, request, leader))
    except (KafkaError, TimeoutError):
        return {}
    return {
        Partition(topic["topic"], each["partition"]): each["offset"]
        for topic in answer.to_object()["topics"]
        for each in topic["partitions"]
        if for_code(each["error_code"]) is NoError
    }

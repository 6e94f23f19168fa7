"""Topics and group from outside: what is there, what we may do with it, and making what is missing.

For `sluice check` and `sluice topics create`; the service itself creates nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    IncompatibleBrokerVersion,
    KafkaError,
    NoError,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
    for_code,
)
from aiokafka.protocol.admin import (
    DescribeGroupsRequest_v2,
    DescribeGroupsRequest_v3,
    DescribeGroupsResponse_v3,
)
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.metadata import MetadataRequest_v4, MetadataRequest_v5
from aiokafka.protocol.types import Array, Boolean, Int16, Int32, Schema, String

from service.core.errors import CannotRun
from service.kafka.client.connection import client_options, is_lasting, reach, stop_for, within
from service.kafka.sending.sizes import ask_broker
from service.settings import KafkaSettings, Settings

Operation: TypeAlias = Literal["READ", "WRITE", "DESCRIBE"]

LOOK_S = 20.0
"""One look at topics or a group, the way to the broker included."""

AGAIN_S = 0.2
"""Between two questions for what takes brokers a moment."""

TELL_TRIES = 50
"""Questions for a topic that was made: ten seconds and more."""

CREATE_S = 30.0
"""Making one topic, until the controller says that it is done."""

INPUT_PARTITIONS = 6
"""Of an input topic that is made without a number: as many workers can share it, and adding some
later would move keys."""

BROKERS_CHOICE = -1
"""Kafka's way to ask for the brokers' default number of replicas."""

DEAD_LETTER_ROOM_BYTES = 131_072
"""What a dead letter is larger than its message: 16,384 characters of the model's answer and
4,096 of the reason, at most four bytes each, and the other headers, rounded up."""

HISTORY_ROOM_BYTES = 1_024
"""What a message that is sent again is larger than it was: the headers of core/history.py."""

_BITS: dict[Operation, int] = {"READ": 1 << 3, "WRITE": 1 << 4, "DESCRIBE": 1 << 8}
"""Codes of operations in Kafka's access control, as bits of `authorized_operations`."""

_NOT_TOLD = -(2**31)


@dataclass(frozen=True, slots=True)
class Topic:
    """What a broker says of a topic; one without partitions is missing.

    `may` holds what we are allowed to do with it, None where the broker does not tell.
    """

    name: str
    partitions: int
    replicas: int
    may: frozenset[Operation] | None

    def allows(self, operation: Operation) -> bool:
        """Whether nothing speaks against it."""
        return self.may is None or operation in self.may


@dataclass(frozen=True, slots=True)
class Group:
    """What a broker says of the consumer group; None where it does not tell."""

    state: str
    members: int | None
    may: frozenset[Operation] | None


async def look_at_topics(kafka: KafkaSettings, names: Iterable[str]) -> dict[str, Topic]:
    """What brokers say of the topics; creates none.

    Raises `Stop` where no broker lets us in or we may not even ask.
    """
    wanted = list(dict.fromkeys(names))
    async with _admin(kafka) as admin:
        answer = await within(LOOK_S, admin._send_request(_Topics(wanted)))
        found = {each["topic"]: each for each in answer.to_object()["topics"]}
        return {name: _topic(name, found[name]) for name in wanted}


async def look_at_group(kafka: KafkaSettings) -> Group:
    """What brokers say of the group. Raises `Stop` where we may not even ask."""
    async with _admin(kafka) as admin:
        coordinator = await within(LOOK_S, _coordinator(admin, kafka.group_id))
        try:
            answer = await within(LOOK_S, admin._send_request(_Groups(kafka.group_id), coordinator))
        except IncompatibleBrokerVersion:  # brokers that only look like Kafka
            return Group("", None, None)
    (group,) = answer.to_object()["groups"]
    error = for_code(group["error_code"])
    if error is not NoError:
        raise stop_for(error(), kafka)
    return Group(group["state"], len(group["members"]), _allowed(group))


async def _coordinator(admin: AIOKafkaAdminClient, group_id: str) -> int:
    """A cluster that has never had a group needs a moment to find a place for them."""
    while True:
        try:
            node: int = await admin.find_coordinator(group_id)
        except GroupCoordinatorNotAvailableError:
            await asyncio.sleep(AGAIN_S)
        else:
            return node


async def record_max_bytes(kafka: KafkaSettings, topic: str) -> int | None:
    """The topic's `max.message.bytes`; None where brokers don't tell."""
    return await ask_broker(topic, lambda: AIOKafkaAdminClient(**client_options(kafka)))


async def create_topics(
    settings: Settings, partitions: int | None = None, replication: int | None = None
) -> AsyncIterator[str]:
    """Make the topics that are missing; a sentence for each.

    Without numbers output and dead letters are like the first input topic. Dead letters may be
    larger than what that topic takes. Raises `Stop` with what stands in the way.
    """
    kafka, inputs = settings.kafka, settings.input.topics
    output, letters, retries = _written(settings)
    names = (*inputs, output, letters, *filter(None, (retries,)))
    topics = await look_at_topics(kafka, names)
    for name in inputs:
        numbers = (partitions or INPUT_PARTITIONS, replication or BROKERS_CHOICE)
        yield await _made(kafka, topics[name], numbers)
    model = await _told(kafka, inputs[0])
    numbers = (partitions or model.partitions, replication or model.replicas)
    yield await _made(kafka, topics[output], numbers)
    size = await record_max_bytes(kafka, model.name)
    yield await _made(kafka, topics[letters], numbers, size and size + DEAD_LETTER_ROOM_BYTES)
    if retries is not None:
        yield await _made(kafka, topics[retries], numbers, size and size + HISTORY_ROOM_BYTES)


def _written(settings: Settings) -> tuple[str, str, str | None]:
    return settings.output.topic, settings.dead_letters.topic, settings.retries.topic


async def _told(kafka: KafkaSettings, name: str) -> Topic:
    """What brokers say of a topic that is there; one just made takes them a moment."""
    for _ in range(TELL_TRIES):
        topic = (await look_at_topics(kafka, (name,)))[name]
        if topic.partitions:
            return topic
        await asyncio.sleep(AGAIN_S)
    raise CannotRun(f"Brokers don't tell of topic {name} yet: try again.")


async def _made(
    kafka: KafkaSettings, topic: Topic, numbers: tuple[int, int], record_max: int | None = None
) -> str:
    if topic.partitions:
        return f"topic {topic.name} is there already ({topic.partitions} partitions)"
    config = {} if record_max is None else {"max.message.bytes": str(record_max)}
    # The client takes the brokers' choice only beside an assignment, which may be empty.
    assignments: dict[int, list[int]] | None = {} if BROKERS_CHOICE in numbers else None
    new = NewTopic(topic.name, *numbers, assignments, config)
    async with _admin(kafka) as admin:
        await within(LOOK_S, admin._client.force_metadata_update())
        if admin._client.cluster.controller is None:  # brokers that only look like Kafka
            raise CannotRun(
                f"{kafka.bootstrap_servers} has no controller that could make {topic.name}."
            )
        answer = await within(CREATE_S, admin.create_topics([new]))
    # name, code, and since version 1 the broker's own words
    _, code, *words = answer.topic_errors[0]
    error = for_code(code)
    if error is TopicAlreadyExistsError:
        return f"topic {topic.name} is there already"
    if error is not NoError:
        why = ((words[0] if words else None) or error.__name__).rstrip(".")
        raise CannotRun(f"Topic {topic.name} cannot be made with {_counted(*numbers)}: {why}.")
    return f"topic {topic.name} is made with {_counted(*numbers)}"


def _counted(partitions: int, replicas: int) -> str:
    copies = "the brokers' number of" if replicas == BROKERS_CHOICE else replicas
    return f"{partitions} partitions and {copies} replicas"


@asynccontextmanager
async def _admin(kafka: KafkaSettings) -> AsyncIterator[AIOKafkaAdminClient]:
    """A client whose errors are our sentences."""
    await reach(kafka)
    admin = AIOKafkaAdminClient(**client_options(kafka))
    try:
        await within(LOOK_S, admin.start())
        yield admin
    except (KafkaError, OSError, TimeoutError) as error:
        raise stop_for(error, kafka) from error
    finally:
        await admin.close()


def _topic(name: str, found: Mapping[str, Any]) -> Topic:
    error = for_code(found["error_code"])
    if error is not UnknownTopicOrPartitionError and is_lasting(error()):
        raise error(name)
    partitions = found["partitions"]
    replicas = len(partitions[0]["replicas"]) if partitions else 0
    return Topic(name, len(partitions), replicas, _allowed(found))


def _allowed(found: Mapping[str, Any]) -> frozenset[Operation] | None:
    bits = found.get("authorized_operations", _NOT_TOLD)
    if bits == _NOT_TOLD:
        return None
    return frozenset(operation for operation, bit in _BITS.items() if bits & bit)


# --- requests that the client does not have: with what we are authorised to do -----------------


class _TopicsAnswer(Response):  # type: ignore[misc]
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


class _TopicsRequest(RequestStruct):  # type: ignore[misc]
    API_KEY = 3
    API_VERSION = 8
    RESPONSE_TYPE = _TopicsAnswer
    SCHEMA = Schema(
        ("topics", Array(String("utf-8"))),
        ("allow_auto_topic_creation", Boolean),
        ("include_cluster_authorized_operations", Boolean),
        ("include_topic_authorized_operations", Boolean),
    )


class _Topics(Request[MetadataRequest_v4 | MetadataRequest_v5 | _TopicsRequest]):  # type: ignore[misc]
    """Metadata of named topics, none of which it creates."""

    API_KEY = 3

    def __init__(self, topics: list[str]) -> None:
        self._topics = topics

    def build(self, version: Any) -> Any:
        if version is _TopicsRequest:
            return version(self._topics, False, False, True)
        return version(self._topics, False)


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

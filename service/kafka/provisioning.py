"""Making the topics that are missing, for `sluice topics create`; the service itself makes none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from aiokafka.admin import NewTopic
from aiokafka.errors import NoError, TopicAlreadyExistsError, for_code

from service.core.errors import CannotRun
from service.core.words import how_many
from service.kafka.client.deadlines import within
from service.kafka.client.private import has_controller
from service.kafka.client.topics_seen import LOOK_S, FoundTopic, look_at_topics, opened_admin
from service.kafka.sending.sizes import record_max_bytes
from service.settings import KafkaSettings, Settings

AGAIN_S = 0.2
"""The pause between two questions for a topic that brokers do not know yet."""

TELL_TRIES = 50
"""How many times brokers are asked for a topic that was made: ten seconds and more."""

CREATE_S = 30.0
"""Making one topic may take this long, until the controller says that it is done."""

INPUT_PARTITIONS = 6
"""An input topic that is made without a number gets this many: as many workers can share it, and
adding some later would move keys."""

BROKERS_CHOICE = -1
"""This number asks brokers for their default number of replicas."""

DEAD_LETTER_ROOM_BYTES = 131_072
"""A dead letter is at most this much larger than its message. The answer and the detail that it
keeps are bounded (letters/written.py); the rest is room for our other headers, whose size depends
on names that users choose."""

HISTORY_ROOM_BYTES = 1_024
"""A message that is sent again is at most this much larger: the headers of core/history.py."""


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


async def _told(kafka: KafkaSettings, name: str) -> FoundTopic:
    """What brokers say of a topic that is there; one just made takes them a moment."""
    for _ in range(TELL_TRIES):
        topic = (await look_at_topics(kafka, (name,)))[name]
        if topic.partitions:
            return topic
        await asyncio.sleep(AGAIN_S)
    raise CannotRun(f"Brokers don't tell of topic {name} yet: try again.")


async def _made(
    kafka: KafkaSettings, topic: FoundTopic, numbers: tuple[int, int], record_max: int | None = None
) -> str:
    if topic.partitions:
        return f"topic {topic.name} is there already ({how_many(topic.partitions, 'partition')})"
    config = {} if record_max is None else {"max.message.bytes": str(record_max)}
    # The client takes the brokers' choice only beside an assignment, which may be empty.
    assignments: dict[int, list[int]] | None = {} if BROKERS_CHOICE in numbers else None
    new = NewTopic(topic.name, *numbers, assignments, config)
    async with opened_admin(kafka) as admin:
        if not await within(LOOK_S, has_controller(admin)):
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
    copies = how_many(replicas, "replica")
    if replicas == BROKERS_CHOICE:
        copies = "the brokers' number of replicas"
    return f"{how_many(partitions, 'partition')} and {copies}"

"""Where a run would start, for `sluice check`: the same decision as in a restore, and no mark."""

from __future__ import annotations

from dataclasses import dataclass

from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from service.kafka.client.connection import client_options
from service.kafka.client.deadlines import STOP_S, briefly, within
from service.kafka.client.meaning import stop_for
from service.kafka.group.group_offsets import GroupOffsets
from service.kafka.group.starts import HeldOut, leader_epochs, starts
from service.settings import Settings

LOOK_S = 20.0
"""All questions together may take this long, the way to the brokers included."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a run would do with the partitions of its input.

    `problems` are sentences about partitions that it would not read. `unknown` partitions have no
    offset stored, and `messages` stand between their starts and their ends; `new`: all of them.
    """

    problems: tuple[str, ...]
    unknown: int
    messages: int
    new: bool


async def look_ahead(settings: Settings) -> Outlook:
    """Ask, and change nothing. Raises `Stop` where brokers do not answer or do not let us ask."""
    options = client_options(settings.kafka)
    admin = AIOKafkaAdminClient(**options)
    consumer = AIOKafkaConsumer(
        **options, isolation_level="read_committed", enable_auto_commit=False
    )
    try:
        return await within(LOOK_S, _look_ahead(settings, admin, consumer))
    except (KafkaError, OSError, TimeoutError) as error:
        raise stop_for(error, settings.kafka) from error
    finally:
        await briefly(consumer.stop, STOP_S)
        await briefly(admin.close, STOP_S)


async def _look_ahead(
    settings: Settings, admin: AIOKafkaAdminClient, consumer: AIOKafkaConsumer
) -> Outlook:
    await admin.start()
    await consumer.start()
    offsets = GroupOffsets(admin, consumer, settings.topics_read, settings.kafka.group_id)
    stored = await offsets.stored()
    bounds = await offsets.bounds(stored.keys())
    new = not any(stored.values())
    chosen = await offsets.chosen(settings.input.start, bounds) if new else {}
    topic_ids = await offsets.topic_ids()
    epoch_ends = await offsets.epoch_ends(leader_epochs(stored.keys(), stored))
    found = starts(stored.keys(), stored, bounds, chosen, topic_ids, epoch_ends)
    problems = [at.problem for _, at in sorted(found.items()) if isinstance(at, HeldOut)]
    unknown = {
        each: at for each, at in found.items() if stored[each] is None and isinstance(at, int)
    }
    messages = sum(max(0, bounds[each].end - at) for each, at in unknown.items())
    return Outlook(tuple(problems), len(unknown), messages, new)

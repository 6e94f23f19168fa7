"""The load of a round: what becomes of what it has sent."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError
from aiokafka.structs import RecordMetadata

from tests.chaos.scene import all_settled

DONE = RecordMetadata("input", 0, TopicPartition("input", 0), 7, 0, 0, 0)


async def test_every_failure_of_a_load_is_read() -> None:
    """One that failed does not leave those behind it to asyncio's "never retrieved"."""
    loop = asyncio.get_running_loop()
    unread: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: unread.append(context))
    sent: list[asyncio.Future[RecordMetadata]] = [loop.create_future() for _ in range(3)]
    errors = [KafkaError("first"), KafkaError("second")]
    sent[0].set_exception(errors[0])
    sent[1].set_result(DONE)
    sent[2].set_exception(errors[1])
    assert await all_settled(sent) == ([DONE], errors)
    sent.clear()
    gc.collect()
    assert unread == []


async def test_nothing_sent_is_settled_at_once() -> None:
    assert await all_settled([]) == ([], [])

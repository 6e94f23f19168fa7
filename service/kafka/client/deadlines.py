"""Deadlines around the client's calls, which can wait or retry without end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from aiokafka import errors

log = logging.getLogger(__name__)

T = TypeVar("T")

STOP_S = 8.0
"""Closing one client in order takes at most this long, leaving the group included."""


async def within(limit_s: float, work: Awaitable[T]) -> T:
    """The result of `work`; raises `TimeoutError` after `limit_s` seconds, with it cancelled.

    `work` runs in the caller's task.
    """
    async with asyncio.timeout(limit_s):
        return await work


async def briefly(step: Callable[[], Awaitable[None]], limit_s: float) -> bool:
    """Whether a step of an end came to its own end in time; raises nothing of the client's.

    While no broker answers, the client's own `stop` raises the cancellation of a task of its own.
    """
    try:
        async with asyncio.timeout(limit_s):
            await step()
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise  # it is we who are cancelled
        return False
    except (errors.KafkaError, OSError, TimeoutError) as error:
        log.warning("the Kafka client does not end in order: %s", type(error).__name__)
        return False
    return True

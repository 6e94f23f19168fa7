"""An extractor on the scripted endpoint, started and stopped, and what it told of its calls."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from service.core.events import Called, Event
from service.llm.extractor import OpenAIExtractor
from service.settings import Settings
from tests.support.endpoint import MODEL

ADA = "Ada Lovelace is 36"
Events = list[Event]


def settings(**extraction: Any) -> Settings:
    return Settings(extraction={"model": MODEL, "call_timeout_s": 5, **extraction})


@asynccontextmanager
async def started(
    events: Events | None = None, given: Settings | None = None, **extraction: Any
) -> AsyncIterator[OpenAIExtractor]:
    observe: Callable[[Event], None] = [].append if events is None else events.append
    extractor = OpenAIExtractor(given or settings(**extraction), observe)
    await extractor.start()
    try:
        yield extractor
    finally:
        await extractor.stop()


def calls(events: Events) -> list[Called]:
    return [event for event in events if isinstance(event, Called)]

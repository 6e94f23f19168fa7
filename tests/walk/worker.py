"""One worker: the real pipeline, source and sink, on the wire and the model of a walk."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

from service.app import bounds, limits
from service.core.admission.admission import Admission
from service.core.errors import Stop
from service.core.events import Event
from service.core.messages import Message, Outcome, Skipped
from service.kafka.sink import KafkaSink
from service.kafka.source import KafkaSource
from service.pipeline import Pipeline
from service.settings import Settings
from tests.walk import inside
from tests.walk.model import Model, Provider
from tests.walk.wire import OWNER, Wire


class Worker:
    """A process, as far as Kafka and the model can tell."""

    def __init__(self, number: int, settings: Settings, wire: Wire, provider: Provider) -> None:
        self.number, self.settings, self.wire = number, settings, wire
        self.ledger = provider.ledger
        self.events: dict[str, int] = defaultdict(int)
        self.admission = Admission(limits(settings), self._uniform)
        self.model = Model(provider, self, self.admission)
        self.sink = KafkaSink(settings, self._observe)
        self.source = KafkaSource(settings, self._observe, self.sink.transactions)
        inside.set_wall_clock(self.source, wire.wall_s)
        self.pipeline = Pipeline(
            self.source,
            self.model,
            self.sink,
            self._decode,
            bounds(settings),
            observe=self._observe,
            uniform=self._uniform,
            wall_clock=wire.wall_s,
            streams=self.model if settings.extraction.streaming else None,
            admission=self.admission,
        )
        self.hedges = inside.count_hedges(self.pipeline)
        self.up = self.stopping = self.killed = self.ended = False
        self.stopped_at_s = 0.0
        self.forced_at_s: float | None = None
        self.said: Stop | None = None  # with what sentence it ended
        self.task: asyncio.Task[None] | None = None

    def _uniform(self, low: float, high: float) -> float:
        return round(self.wire.rng.uniform(low, high), 2)

    def _observe(self, event: Event) -> None:
        self.events[type(event).__name__] += 1

    def _decode(self, message: Message) -> str | Outcome:
        if message.value is None:
            return Skipped()
        return message.value.decode()

    def entry_of(self, uid: int) -> Any:
        """The message in this process's hands; None: it is in no holding of it any more, or it
        is there twice, as the retry topic may have it, and nobody knows which one is meant."""
        begin = f"{uid} "
        found = [
            entry
            for holding in inside.held_by(self.pipeline).values()
            for entry in holding.entries.values()
            if entry.text.startswith(begin)
        ]
        return found[0] if len(found) == 1 else None

    def attempt_of(self, entry: Any) -> object:
        """The one that runs now: all calls of one attempt have it in common."""
        return inside.attempt_of(self.pipeline, entry)

    def is_lost(self, entry: Any) -> bool:
        return entry.holding.lost or self.killed

    async def run(self) -> None:
        """Start, work, stop, as the app does; a sentence for a person ends it too."""
        try:
            await self._live()
        except* Stop as stops:
            self.said = _first(stops)
        finally:
            self.ended = True

    async def _live(self) -> None:
        OWNER.set(self)
        await self.sink.start()
        try:
            await self.source.start(self.pipeline)
            try:
                self.up = True
                async with asyncio.TaskGroup() as tasks:
                    beside = tasks.create_task(self.source.supervise())
                    await self.pipeline.run()
                    self.pipeline_ended_at_s = asyncio.get_running_loop().time()
                    beside.cancel()
            finally:
                await self.source.stop()
        finally:
            await self.sink.stop()

    def stop(self) -> None:
        if self.up and not self.stopping:
            self.stopping = True
            self.stopped_at_s = asyncio.get_running_loop().time()
            self.pipeline.stop()

    def force(self) -> None:
        if self.up and self.forced_at_s is None:
            self.stop()
            self.forced_at_s = asyncio.get_running_loop().time()
            self.pipeline.force()

    def kill(self) -> None:
        """As `kill -9`: nothing of it reaches anybody any more."""
        self.killed = self.ended = True
        self.wire.kill(self)
        if self.task is not None:
            self.task.cancel()


def _first(group: BaseExceptionGroup[Stop]) -> Stop:
    for each in group.exceptions:
        return _first(each) if isinstance(each, BaseExceptionGroup) else each
    raise AssertionError("an empty group")

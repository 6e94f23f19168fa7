"""Attempts whose records are published while the model still writes the answer."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from functools import partial

from service import clock
from service.core.admission.retry import Backoff, Uniform
from service.core.errors import CallFailure, OutputTooLarge
from service.core.events import Observe, PublishRetried, Streamed
from service.core.messages import Extracted, Reason, Rejected
from service.core.phase import Phase
from service.core.window import Entry
from service.pipeline.publishing import Publishing
from service.pipeline.record_stream import RecordStream
from service.pipeline.tasks import Conditions
from service.ports import Piece, Streams

log = logging.getLogger(__name__)

CLOSE_S = 30.0
"""For how many seconds the marker that closes a cut-off answer may take. Where Kafka takes longer,
the message gets its outcome without it: readers drop a set that is never completed anyway."""


class Streaming:
    """Makes streaming attempts; owns the streams of those that run."""

    def __init__(
        self,
        streams: Streams | None,
        publishing: Publishing,
        phase: Phase,
        conditions: Conditions,
        *,
        observe: Observe,
        uniform: Uniform,
    ) -> None:
        """Without `streams`, nothing is published before its answer is complete."""
        self._streams, self._publishing = streams, publishing
        self._phase, self._conditions = phase, conditions
        self._observe, self._uniform = observe, uniform
        self._backoff = Backoff()
        self._running: dict[Entry, RecordStream] = {}

    @property
    def on(self) -> bool:
        return self._streams is not None

    async def ask(self, entry: Entry) -> Extracted | Rejected:
        """One attempt; returns when everything that it published is acknowledged."""
        stream = RecordStream(
            partial(self._send, entry), self._before_sending_again, partial(self._told, entry)
        )
        self._running[entry] = stream
        try:
            return await self._whole(entry, stream)
        finally:
            del self._running[entry]

    def of(self, entry: Entry) -> RecordStream | None:
        """The stream of the message's running call; None: none runs."""
        return self._running.get(entry)

    async def close_cut_off(self, entry: Entry, stream: RecordStream) -> None:
        """Close the answer of a call that was cut off, before the message gets its outcome. If the
        partition is lost meanwhile, the task is cancelled here."""
        self._running[entry] = stream
        try:
            async with asyncio.timeout(CLOSE_S):
                await stream.close()
        except TimeoutError:
            log.warning("Kafka did not take the marker that closes an answer that was cut off")
        finally:
            del self._running[entry]

    async def _whole(self, entry: Entry, stream: RecordStream) -> Extracted | Rejected:
        """The outcome of one attempt, without its records, which are published. Where the attempt
        fails, its answer is closed."""
        assert self._streams is not None, "asked for a stream of an extractor that has none"
        try:
            result = await self._streams.stream(entry.text, entry.progress, stream.publish)
            if isinstance(result, Extracted):
                await stream.complete(result)
                return replace(result, records=(), earlier=result.earlier + len(result.records))
        except CallFailure:
            await stream.close()
            raise
        except OutputTooLarge as failure:
            result = Rejected(Reason.OUTPUT_TOO_LARGE, str(failure), stream.provenance)
        await stream.close()
        return result

    async def _send(self, entry: Entry, piece: Piece) -> asyncio.Future[None]:
        """Send a piece once publishing is allowed: it waits during a rebalance. If the partition is
        lost by it, the task is cancelled here."""
        await self._conditions.until(lambda: self._phase.may_publish)
        return await self._publishing.send(entry, piece)

    async def _before_sending_again(self, attempts: int) -> None:
        self._observe(PublishRetried())
        await asyncio.sleep(self._backoff.delay_s(attempts, self._uniform))

    def _told(self, entry: Entry, records: int, first: bool) -> None:
        entry.records_out += records
        self._observe(Streamed(records, clock.now_s() - entry.since_s if first else None))
        self._conditions.moved_on()

    # --- what it says of itself ------------------------------------------------------------------

    def waited_s(self, entry: Entry, now_s: float) -> float:
        """How many seconds of a running call were spent waiting for Kafka."""
        stream = self._running.get(entry)
        return 0.0 if stream is None else stream.waited_s(now_s)

    def slowest_s(self, now_s: float) -> float:
        """For how many seconds a stream has been waiting for Kafka, at most; 0: none waits."""
        return max((stream.waits_s(now_s) for stream in self._running.values()), default=0.0)

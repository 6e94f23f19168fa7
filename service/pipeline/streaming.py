"""Records of a message that are published while the model still writes its answer."""

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
"""Seconds within which readers are told that a call was cut off whose records are out. Where Kafka
takes longer, the message ends without: a set that is never completed is dropped as well."""


class Streaming:
    """The streams of the calls that run."""

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
        """Without `streams` nothing is published before an answer is whole."""
        self._streams, self._publishing = streams, publishing
        self._phase, self._conditions = phase, conditions
        self._observe, self._uniform = observe, uniform
        self._backoff = Backoff()
        self._running: dict[Entry, RecordStream] = {}

    @property
    def on(self) -> bool:
        return self._streams is not None

    async def ask(self, entry: Entry) -> Extracted | Rejected:
        """One attempt; over when all that it published is acknowledged."""
        stream = RecordStream(
            partial(self._send, entry), self._before_sending_again, partial(self._told, entry)
        )
        self._running[entry] = stream
        try:
            return await self._whole(entry, stream)
        finally:
            del self._running[entry]

    def of(self, entry: Entry) -> RecordStream | None:
        """The stream of the call that runs for it, where one does."""
        return self._running.get(entry)

    async def close_cut_off(self, entry: Entry, stream: RecordStream) -> None:
        """Before the message has its outcome, and while its partition is ours: a call whose
        partition is lost is called off here as well."""
        self._running[entry] = stream
        try:
            async with asyncio.timeout(CLOSE_S):
                await stream.close()
        except TimeoutError:
            log.warning("Kafka did not take the end of an answer that was cut off")
        finally:
            del self._running[entry]

    async def _whole(self, entry: Entry, stream: RecordStream) -> Extracted | Rejected:
        """The outcome without its records, which are out; an answer that fails is closed."""
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
        """Not between a revoke and an assignment: one that is lost by it is called off here."""
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
        """How much of a running call's time Kafka has taken."""
        stream = self._running.get(entry)
        return 0.0 if stream is None else stream.waited_s(now_s)

    def slowest_s(self, now_s: float) -> float:
        """How long the stream that waits longest for Kafka has been waiting; 0: none does."""
        return max((stream.waits_s(now_s) for stream in self._running.values()), default=0.0)

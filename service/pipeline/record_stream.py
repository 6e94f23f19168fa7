"""The records of one message that are published while the model still writes its answer.

Rules of this file: a stream belongs to the task of one attempt and dies with it. Whatever stops
that task (a lost partition, the end of a drain) leaves the answer without its last record and
without a closing marker: readers drop a set that is never completed. Whatever else ends an answer
early closes it, and the attempt is over only when all of this is acknowledged.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

from service.core.errors import OutputTooLarge, PublishFailed
from service.core.messages import Aborted, Extracted, Part, Provenance
from service.ports import Piece

UNACKNOWLEDGED_MAX = 64
"""Records of one message that Kafka has not acknowledged; with more, the model's answer waits
unread. Some tens of milliseconds of the fastest models."""

Send: TypeAlias = Callable[[Piece], Awaitable[asyncio.Future[None]]]
"""Hands a piece to the sink, once that is allowed; the future is the sink's word."""


class RecordStream:
    """What one attempt has published so far.

    `rest` waits before what was not acknowledged is sent again, longer with each time; `told`
    hears of records that were acknowledged, and whether they are the attempt's first.
    """

    def __init__(
        self, send: Send, rest: Callable[[int], Awaitable[None]], told: Callable[[int, bool], None]
    ) -> None:
        self._send, self._rest, self._told = send, rest, told
        self._unacknowledged: deque[tuple[Piece, asyncio.Future[None]]] = deque()
        self._open: Part | Extracted | None = None  # of the answer under way
        self._refused: OutputTooLarge | None = None
        self._failures = 0  # one after the other
        self._answer_records = 0  # acknowledged
        self._first = True
        self._waits_since_s: float | None = None
        self._waited_s = 0.0

    async def publish(self, part: Part) -> None:
        """Hand a record over at once; waits only while too many are not acknowledged.

        Raises `OutputTooLarge` for this one or one before it: the answer cannot be completed.
        """
        await self._begin(part)
        await self._settle(UNACKNOWLEDGED_MAX)
        self._raise_refused()

    async def complete(self, extracted: Extracted) -> None:
        """Publish the records that are left, the last one among them; returns when all of the
        answer is acknowledged. Raises `OutputTooLarge`."""
        await self._begin(extracted)
        await self._settle(0)
        self._raise_refused()
        self._open, self._answer_records = None, 0

    async def close(self) -> None:
        """The answer under way, if there is one, will not be completed: say so to readers.

        Returns when that is acknowledged, and all that went out before it.
        """
        if self._open is None:
            return
        await self._settle(0)
        if self._answer_records:
            aborted = Aborted(self._open.answer_id, self._answer_records, self._open.provenance)
            await self._hand_over(aborted)
            await self._settle(0)
        # A marker that is too large goes missing: readers drop what is never completed.
        self._open, self._answer_records, self._refused = None, 0, None

    @property
    def completing(self) -> bool:
        """The answer has come to its end; what is left of it is on its way to Kafka."""
        return isinstance(self._open, Extracted)

    @property
    def provenance(self) -> Provenance | None:
        """Of the answer under way, as far as it is known."""
        return None if self._open is None else self._open.provenance

    def waited_s(self, now_s: float) -> float:
        """How much of the attempt's time Kafka has taken."""
        return self._waited_s + self.waits_s(now_s)

    def waits_s(self, now_s: float) -> float:
        """How long it has been waiting for Kafka now; 0 while it is not."""
        return 0.0 if self._waits_since_s is None else now_s - self._waits_since_s

    async def _begin(self, piece: Part | Extracted) -> None:
        if self._open is not None and self._open.answer_id != piece.answer_id:
            await self.close()  # the model was asked again
        self._open = piece
        if isinstance(piece, Part) or piece.records:
            await self._hand_over(piece)

    async def _hand_over(self, piece: Piece) -> None:
        """Behind whatever has failed, which the sink would let it overtake: it knows lanes of
        messages, not the order within one."""
        while any(_has_failed(future) for _, future in self._unacknowledged):
            await self._send_again()
        with self._waiting():
            future = await self._send(piece)
        future.add_done_callback(partial(self._acknowledged, piece))
        self._unacknowledged.append((piece, future))

    async def _settle(self, left_max: int) -> None:
        """Hear what the sink has said, and wait until at most so many pieces are left."""
        waiting = self._unacknowledged
        while waiting and (len(waiting) > left_max or waiting[0][1].done()):
            if await self._is_settled(*waiting[0]):
                waiting.popleft()
            else:
                await self._send_again()

    async def _send_again(self) -> None:
        """What has failed, in order, once it is known of all that are out."""
        pieces = tuple(self._unacknowledged)
        failed = [each[0] for each in pieces if not await self._is_settled(*each)]
        self._unacknowledged.clear()
        self._failures += 1
        with self._waiting():
            await self._rest(self._failures)
        for piece in failed:
            await self._hand_over(piece)

    async def _is_settled(self, piece: Piece, future: asyncio.Future[None]) -> bool:
        """The sink's word on one piece; False: it has to go again."""
        with self._waiting():
            await asyncio.wait((future,))
        match PublishFailed() if future.cancelled() else future.exception():
            case None:
                pass
            case OutputTooLarge() as refused:
                self._refused = refused
            case PublishFailed():
                return False
            case failure:
                raise failure
        return True

    def _acknowledged(self, piece: Piece, future: asyncio.Future[None]) -> None:
        """Counted when it is, not when somebody looks: the next record may be long in coming."""
        if future.cancelled() or future.exception() is not None:
            return
        self._failures = 0
        if isinstance(piece, Aborted):
            return
        records = 1 if isinstance(piece, Part) else len(piece.records)
        self._answer_records += records
        self._told(records, self._first)
        self._first = False

    def _raise_refused(self) -> None:
        if self._refused is not None:
            raise self._refused

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        self._waits_since_s = loop.time()
        try:
            yield
        finally:
            self._waited_s += loop.time() - self._waits_since_s
            self._waits_since_s = None


def _has_failed(future: asyncio.Future[None]) -> bool:
    if not future.done():
        return False
    return future.cancelled() or isinstance(future.exception(), PublishFailed)

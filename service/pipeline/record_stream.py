"""One attempt's stream: records that are published while the model still writes the answer.

Rules of this file: a stream belongs to the task of one attempt and ends with it. Where that task is
cancelled (a lost partition, the end of a drain), the answer stays without its last record and
without a closing marker: readers drop a set that is never completed. Where an answer ends early for
another reason, the stream closes it with a marker. The attempt is over only when everything that it
published is acknowledged.
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
"""How many records of one message may be unacknowledged. Beyond it, the model's answer is not read
on. The fastest models write this many in some tens of milliseconds."""

Send: TypeAlias = Callable[[Piece], Awaitable[asyncio.Future[None]]]
"""Hands a piece to the sink as soon as that is allowed; the future ends when the sink has settled
it."""


class RecordStream:
    """Publishes the records of one attempt and knows which of them are acknowledged.

    `rest` waits before failed pieces are sent again, longer after each failure in a row. `told` is
    called with the number of records acknowledged, and whether they are the attempt's first.
    """

    def __init__(
        self, send: Send, rest: Callable[[int], Awaitable[None]], told: Callable[[int, bool], None]
    ) -> None:
        self._send, self._rest, self._told = send, rest, told
        self._unacknowledged: deque[tuple[Piece, asyncio.Future[None]]] = deque()
        self._open: Part | Extracted | None = None  # the last piece of the answer under way
        self._refused: OutputTooLarge | None = None
        self._failures = 0  # in a row
        self._answer_records = 0  # acknowledged records of the answer under way
        self._first = True
        self._waits_since_s: float | None = None
        self._waited_s = 0.0

    async def publish(self, part: Part) -> None:
        """Hand a record over at once; waits only while too many are not acknowledged.

        Raises `OutputTooLarge` where this record or one before it is too large: the answer cannot
        be completed then.
        """
        await self._begin(part)
        await self._settle(UNACKNOWLEDGED_MAX)
        self._raise_refused()

    async def complete(self, extracted: Extracted) -> None:
        """Publish the remaining records, with the answer's last one; returns when the whole answer
        is acknowledged. Raises `OutputTooLarge`."""
        await self._begin(extracted)
        await self._settle(0)
        self._raise_refused()
        self._open, self._answer_records = None, 0

    async def close(self) -> None:
        """The answer under way, if there is one, will not be completed: publish a marker for
        readers.

        Returns when the marker and everything before it is acknowledged.
        """
        if self._open is None:
            return
        await self._settle(0)
        if self._answer_records:
            aborted = Aborted(self._open.answer_id, self._answer_records, self._open.provenance)
            await self._hand_over(aborted)
            await self._settle(0)
        # A marker that is too large is left out: readers drop a set that is never completed anyway.
        self._open, self._answer_records, self._refused = None, 0, None

    @property
    def completing(self) -> bool:
        """Whether the model's answer has ended and only its last records are on their way."""
        return isinstance(self._open, Extracted)

    @property
    def provenance(self) -> Provenance | None:
        """The provenance of the answer under way, as far as it is known; None: there is none."""
        return None if self._open is None else self._open.provenance

    def waited_s(self, now_s: float) -> float:
        """How many seconds of the attempt were spent waiting for Kafka."""
        return self._waited_s + self.waits_s(now_s)

    def waits_s(self, now_s: float) -> float:
        """For how many seconds the attempt is waiting for Kafka now; 0: it is not."""
        return 0.0 if self._waits_since_s is None else now_s - self._waits_since_s

    async def _begin(self, piece: Part | Extracted) -> None:
        if self._open is not None and self._open.answer_id != piece.answer_id:
            await self.close()  # the model was asked again
        self._open = piece
        if isinstance(piece, Part) or piece.records:
            await self._hand_over(piece)

    async def _hand_over(self, piece: Piece) -> None:
        """Hand a piece to the sink, after the failed ones before it are sent again. The sink keeps
        the order of messages in a lane, but not that of pieces of one message: it would let this
        piece overtake a failed one."""
        while any(_has_failed(future) for _, future in self._unacknowledged):
            await self._send_again()
        with self._waiting():
            future = await self._send(piece)
        future.add_done_callback(partial(self._acknowledged, piece))
        self._unacknowledged.append((piece, future))

    async def _settle(self, left_max: int) -> None:
        """Look at the pieces that are settled, and wait until at most `left_max` are left."""
        waiting = self._unacknowledged
        while waiting and (len(waiting) > left_max or waiting[0][1].done()):
            if await self._is_settled(*waiting[0]):
                waiting.popleft()
            else:
                await self._send_again()

    async def _send_again(self) -> None:
        """Wait until all pieces are settled; then send the failed ones again, in order."""
        pieces = tuple(self._unacknowledged)
        failed = [each[0] for each in pieces if not await self._is_settled(*each)]
        self._unacknowledged.clear()
        self._failures += 1
        with self._waiting():
            await self._rest(self._failures)
        for piece in failed:
            await self._hand_over(piece)

    async def _is_settled(self, piece: Piece, future: asyncio.Future[None]) -> bool:
        """Wait until the sink has settled a piece; False: it has to be sent again."""
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
        """Count a piece in the moment of its acknowledgement, not when `_settle` looks at it: the
        next record may take long to come."""
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

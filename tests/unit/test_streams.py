"""The pieces of one streamed answer: in which order they go to the sink."""

from __future__ import annotations

import asyncio

from service.core.errors import PublishFailed
from service.core.messages import Extracted, Part, Provenance, Record
from service.pipeline.record_stream import RecordStream
from service.ports import Piece
from tests.support import virtual_time

PROVENANCE = Provenance("small", "p1", "s1", calls=1, tokens_input=10, tokens_output=4)


def part(index: int) -> Part:
    return Part(Record(b"{}"), index, "answer", PROVENANCE)


def index_of(piece: Piece) -> int:
    return piece.index if isinstance(piece, Part) else 99


def test_what_has_failed_goes_before_the_next_piece() -> None:
    """The first record is not acknowledged, the second hangs: the third waits until both are
    settled and the first has gone again, even twice."""

    async def play() -> list[int]:
        handed: list[int] = []
        answers: list[asyncio.Future[None]] = []

        async def send(piece: Piece) -> asyncio.Future[None]:
            handed.append(index_of(piece))
            answers.append(asyncio.get_running_loop().create_future())
            if handed.count(0) == 2 and handed[-1] == 0:
                answers[-1].set_exception(PublishFailed())
            elif len(handed) > 2:
                answers[-1].set_result(None)
            return answers[-1]

        stream = RecordStream(send, lambda _: asyncio.sleep(0), lambda *_: None)
        await stream.publish(part(0))
        await stream.publish(part(1))
        answers[0].set_exception(PublishFailed())
        asyncio.get_running_loop().call_later(5, answers[1].set_result, None)
        await stream.publish(part(2))
        assert asyncio.get_running_loop().time() >= 5
        await stream.complete(Extracted((Record(b"{}"),), PROVENANCE, "answer"))
        return handed

    assert virtual_time.run(play()) == [0, 1, 0, 0, 2, 99]

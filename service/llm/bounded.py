"""Bodies of answers, read up to a bound: before and after they are decoded.

An endpoint can answer without end, with 50 MB, or with a kilobyte that becomes a gigabyte when it
is decoded. Nothing is kept beyond the bound, and the connection is closed.

Rules of this file: no more than `PIECE_BYTES` are decoded at once.
"""

from __future__ import annotations

import zlib
from collections.abc import AsyncGenerator, AsyncIterable, Iterator

PIECE_BYTES = 65_536
"""Decoded at once."""
ERROR_MAX_BYTES = 65_536
"""What is read of an error's body; enough for any that is worth reading."""
IN_PLAIN = frozenset({"", "identity"})
"""Content encodings that need no decoding."""
_GZIP_OR_ZLIB = 47
"""What zlib calls a stream of either kind, told by its first bytes."""


class TooLarge(Exception):
    """More than the bound came; nothing of it was kept."""


class Undecodable(Exception):
    """The body is in an encoding that was not asked for, or damaged."""


class Decoder:
    """Decodes piece by piece; `gzip`, `deflate` and plain bodies."""

    def __init__(self, encoding: str) -> None:
        """Raises `Undecodable` for another encoding."""
        self._inflate = None
        if (encoding := encoding.strip().lower()) in IN_PLAIN:
            return
        if encoding not in ("gzip", "x-gzip", "deflate"):
            raise Undecodable(encoding[:40])
        self._inflate = zlib.decompressobj(_GZIP_OR_ZLIB)

    @property
    def ended(self) -> bool:
        """Whether all of it came, as far as the encoding says."""
        return self._inflate is None or self._inflate.eof

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """What it decodes to, never much at once. Raises `Undecodable`."""
        if self._inflate is None:
            yield piece
            return
        while piece:
            try:
                yield self._inflate.decompress(piece, PIECE_BYTES)
            except zlib.error:
                raise Undecodable("damaged") from None
            piece = b"" if self._inflate.eof else self._inflate.unconsumed_tail


def decoded(content: bytes, encoding: str, max_bytes: int) -> bytes:
    """All of it. Raises `TooLarge`, `Undecodable`."""
    pieces, size = [], 0
    decoder = Decoder(encoding)
    for piece in decoder.feed(content):
        size += len(piece)
        if size > max_bytes:
            raise TooLarge
        pieces.append(piece)
    if not decoder.ended:
        raise Undecodable("cut off")
    return b"".join(pieces)


async def lines(
    chunks: AsyncIterable[bytes], encoding: str, max_bytes: int
) -> AsyncGenerator[bytes, None]:
    """The lines of a stream, however long it is, none of them longer than the bound.

    Raises `TooLarge`, `Undecodable`.
    """
    decoder = Decoder(encoding)
    rest = bytearray()
    async for chunk in chunks:
        for piece in decoder.feed(chunk):
            returned = rest.endswith(b"\r")  # a line's end, or the first half of one
            rest += piece
            if returned or b"\n" in piece or b"\r" in piece:
                *whole, last = rest.splitlines(keepends=True)
                if last.endswith(b"\n"):
                    whole, last = [*whole, last], bytearray()
                for line in whole:
                    yield bytes(line.rstrip(b"\r\n"))
                rest = bytearray(last)
            if len(rest) > max_bytes:
                raise TooLarge
    if rest:
        yield bytes(rest.rstrip(b"\r\n"))

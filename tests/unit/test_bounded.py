"""Bodies are read up to a bound, encoded and decoded."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib
from collections.abc import AsyncIterator

import pytest

from service.llm.bounded import TooLarge, Undecodable, decoded, lines

BOMB = gzip.compress(b"\0" * 100_000_000)
"""100 MB in 97 KB."""


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP", "deflate", "identity", ""])
def test_what_fits_is_decoded(encoding: str) -> None:
    """In the encodings that HTTP knows best, although none is asked for."""
    plain = b'{"a":1}' * 1000
    pack = {"identity": bytes, "": bytes, "deflate": zlib.compress}.get(encoding, gzip.compress)
    assert decoded(pack(plain), encoding, len(plain)) == plain
    with pytest.raises(TooLarge):
        decoded(pack(plain), encoding, len(plain) - 1)


def test_a_bomb_stays_small() -> None:
    """No more than the bound is ever there."""
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            decoded(BOMB, "gzip", 1_000_000)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("content", "encoding"), [(b"x", "br"), (b"no gzip", "gzip")])
def test_what_cannot_be_decoded_is_told(content: bytes, encoding: str) -> None:
    """Another encoding, or damage: an error of its own."""
    with pytest.raises(Undecodable):
        decoded(content, encoding, 100)


async def chunks(content: bytes, size: int) -> AsyncIterator[bytes]:
    for at in range(0, len(content), size):
        yield content[at : at + size]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
async def test_lines_of_a_stream(size: int, end: bytes) -> None:
    """However it is cut into chunks; the stream may be far longer than its lines may be."""
    said = [b"data: 1", b"", b"data: 22", b"", b": comment", b"x" * 90] * 5
    content = end.join(said)
    assert [line async for line in lines(chunks(content, size), "", 100)] == said
    packed = gzip.compress(content)
    assert [line async for line in lines(chunks(packed, size), "gzip", 100)] == said


@pytest.mark.parametrize("encoding", ["", "gzip"])
async def test_a_line_without_end(encoding: str) -> None:
    """It is not kept beyond the bound."""
    content = BOMB if encoding else b"x" * 5_000_000
    with pytest.raises(TooLarge):
        [line async for line in lines(chunks(content, 10_000), encoding, 1_000_000)]

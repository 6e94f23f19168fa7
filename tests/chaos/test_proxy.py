"""The fault proxy does to connections what it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.support.kafka import free_ports
from tests.support.proxy import FAIR, Proxy, Weather

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]
GONE = (ConnectionError, asyncio.IncompleteReadError)


class Scene:
    """An echo behind a proxy."""

    def __init__(self, proxy: Proxy, port: int) -> None:
        self.proxy, self.port = proxy, port
        self._open: list[asyncio.StreamWriter] = []

    async def connect(self) -> Ends:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self._open.append(writer)
        return reader, writer

    def close(self) -> None:
        for writer in self._open:
            writer.transport.abort()


@asynccontextmanager
async def echo() -> AsyncIterator[int]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    (front,) = free_ports(1)
    async with echo() as back, Proxy({front: back}) as proxy:
        made = Scene(proxy, front)
        yield made
        made.close()
    await asyncio.sleep(0)


async def ask(ends: Ends, data: bytes = b"hello") -> bytes:
    reader, writer = ends
    writer.write(data)
    return await reader.readexactly(len(data))


async def test_what_goes_in_comes_out(scene: Scene) -> None:
    """In fair weather ten megabytes pass both ways unchanged, in order."""
    reader, writer = await scene.connect()
    data = bytes(range(256)) * 40_000
    writer.write(data)
    assert await reader.readexactly(len(data)) == data


async def test_a_cut_is_a_reset_of_all_that_is_open(scene: Scene) -> None:
    """`cut` ends open connections for both sides; a new one works."""
    before = await scene.connect()
    await ask(before)
    assert scene.proxy.cut() == 1
    with pytest.raises(GONE):
        await ask(before)
    assert await ask(await scene.connect()) == b"hello"
    assert scene.proxy.connections == 1


async def test_refused_while_it_lasts(scene: Scene) -> None:
    """With `refuse` a new connection is cut at once, an open one goes on."""
    before = await scene.connect()
    await ask(before)
    scene.proxy.set(Weather(refuse=True))
    with pytest.raises(GONE):
        await ask(await scene.connect())
    assert await ask(before) == b"hello"


async def test_delay(scene: Scene) -> None:
    """Each way takes the delay."""
    ends = await scene.connect()
    await ask(ends)
    scene.proxy.set(Weather(delay_s=0.15))
    began_s = asyncio.get_running_loop().time()
    assert await ask(ends) == b"hello"
    assert asyncio.get_running_loop().time() - began_s >= 0.3


async def test_throttle(scene: Scene) -> None:
    """Bytes pass no faster than told, and nothing is lost or turned round."""
    ends = await scene.connect()
    scene.proxy.set(Weather(bytes_per_s=200_000))
    data = bytes(range(200)) * 250
    began_s = asyncio.get_running_loop().time()
    assert await ask(ends, data) == data
    assert asyncio.get_running_loop().time() - began_s >= 0.25


async def test_half_open(scene: Scene) -> None:
    """`swallow` keeps the socket and loses the bytes; when it is over the damaged connection is
    cut, an untouched one goes on."""
    damaged, untouched = await scene.connect(), await scene.connect()
    await ask(damaged)
    await ask(untouched)
    scene.proxy.set(Weather(swallow=True))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await ask(damaged)
    scene.proxy.set(FAIR)
    with pytest.raises(GONE):
        await ask(damaged)
    assert await ask(untouched) == b"hello"


async def test_only_the_front_that_is_meant(scene: Scene) -> None:
    """Ports choose fronts: a cut elsewhere does nothing here."""
    ends = await scene.connect()
    await ask(ends)
    assert scene.proxy.cut([scene.port + 1]) == 0
    assert await ask(ends) == b"hello"


async def test_an_end_is_handed_on(scene: Scene) -> None:
    """A side that closes is seen to close by the other."""
    reader, writer = await scene.connect()
    await ask((reader, writer))
    writer.write_eof()
    async with asyncio.timeout(5):
        assert await reader.read() == b""
    assert scene.proxy.connections == 0


async def test_nothing_behind(scene: Scene) -> None:
    """Where nobody listens behind it, the connection is cut."""
    front, nobody = free_ports(2)
    async with Proxy({front: nobody}):
        reader, writer = await asyncio.open_connection("127.0.0.1", front)
        with pytest.raises(GONE):
            await ask((reader, writer))
        writer.transport.abort()

"""A TCP proxy that does what networks do: cut, delay, throttle, swallow, refuse.

It runs on the event loop of whoever uses it and knows nothing of what passes through. What a
front does to its connections is a value, `Weather`, that may be changed while they are open.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

QUEUED_MAX_BYTES = 1_000_000
"""In one direction of one connection; beyond it the sender is read no further."""


@dataclass(frozen=True, slots=True)
class Weather:
    """What happens to what passes a front; seconds, bytes a second."""

    delay_s: float = 0.0
    bytes_per_s: float | None = None
    swallow: bool = False
    """Half-open: bytes vanish in both directions, sockets stay. When it is over, connections that
    lost something are cut: what comes after a gap means nothing."""
    refuse: bool = False
    """New connections are cut at once."""


FAIR = Weather()


class Proxy:
    """`fronts`: port that is connected to -> port on 127.0.0.1 that it leads to."""

    def __init__(self, fronts: Mapping[int, int]) -> None:
        self._fronts = [_Front(front, back) for front, back in fronts.items()]

    async def __aenter__(self) -> Self:
        for front in self._fronts:
            await front.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for front in self._fronts:
            front.close()

    @property
    def connections(self) -> int:
        return sum(len(front.links) for front in self._fronts)

    def cut(self, ports: Iterable[int] | None = None) -> int:
        """Cut every open connection of these fronts (of all); how many there were."""
        return sum(front.cut() for front in self._of(ports))

    def set(self, weather: Weather, ports: Iterable[int] | None = None) -> None:
        """From now on, for open connections and new ones, at these fronts (at all)."""
        for front in self._of(ports):
            front.set(weather)

    def _of(self, ports: Iterable[int] | None) -> list[_Front]:
        if ports is None:
            return self._fronts
        wanted = set(ports)
        return [front for front in self._fronts if front.port in wanted]


class _Front:
    """One port and the connections that came in through it."""

    def __init__(self, port: int, back: int) -> None:
        self.port, self.back = port, back
        self.weather = FAIR
        self.links: set[_Link] = set()
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Link(self).client, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()

    def cut(self) -> int:
        links = tuple(self.links)
        for link in links:
            link.cut()
        return len(links)

    def set(self, weather: Weather) -> None:
        self.weather = weather
        if not weather.swallow:
            for link in tuple(self.links):
                if link.damaged:
                    link.cut()


class _Link:
    """A client's connection and ours to the back: two ends, each the other's writer."""

    def __init__(self, front: _Front) -> None:
        self.front = front
        self.damaged = False
        self.client, self.back = _End(self), _End(self)
        self._connecting: asyncio.Task[object] | None = None

    def begun(self) -> None:
        """The client is connected."""
        self.front.links.add(self)
        if self.front.weather.refuse:
            self.cut()
            return
        loop = asyncio.get_running_loop()
        self._connecting = loop.create_task(self._connect(loop))

    async def _connect(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            await loop.create_connection(lambda: self.back, "127.0.0.1", self.front.back)
        except OSError:
            self.cut()

    def other(self, end: _End) -> _End:
        return self.back if end is self.client else self.client

    def cut(self) -> None:
        """At once, both ways, as a reset."""
        self.front.links.discard(self)
        if self._connecting is not None:
            self._connecting.cancel()
        self.client.cut()
        self.back.cut()


class _End(asyncio.Protocol):
    """One socket: what it receives goes to the other end, in order, when its time has come."""

    def __init__(self, link: _Link) -> None:
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._queue: deque[tuple[float, bytes | None]] = deque()
        """What is to be written to this end, and when; None is the end of the stream."""
        self._queued_bytes = 0
        self._free_at_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._is_cut = self._is_full = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._is_cut:
            transport.abort()
        elif self is self._link.client:
            self._link.begun()
        else:
            self._pump()

    def data_received(self, data: bytes) -> None:
        weather = self._link.front.weather
        if weather.swallow:
            self._link.damaged = True
            return
        self._link.other(self).put(data, weather)

    def eof_received(self) -> bool:
        weather = self._link.front.weather
        if weather.swallow:
            self._link.damaged = True
        else:
            self._link.other(self).put(None, weather)
        return True  # the other direction stays open

    def connection_lost(self, error: Exception | None) -> None:
        if self._link.front.weather.swallow and not self._is_cut:
            self._link.damaged = True  # the other side hears nothing of it
        elif error is not None or self._is_cut:
            self._link.cut()
        else:
            self._link.front.links.discard(self._link)
            self._link.other(self).put(None, self._link.front.weather)

    def put(self, data: bytes | None, weather: Weather) -> None:
        size = len(data or b"")
        begins_s = max(self._loop.time() + weather.delay_s, self._free_at_s)
        self._free_at_s = begins_s + (size / weather.bytes_per_s if weather.bytes_per_s else 0.0)
        self._queue.append((self._free_at_s, data))
        self._queued_bytes += size
        self._pump()

    def _pump(self) -> None:
        """Write what is due; ask to be called for the rest."""
        while self._transport is not None and self._queue and self._timer is None:
            due_s, data = self._queue[0]
            if due_s > self._loop.time():
                self._timer = self._loop.call_at(due_s, self._on_time)
                break
            self._queue.popleft()
            if data is None:
                self._transport.close()
            elif not self._transport.is_closing():
                self._queued_bytes -= len(data)
                self._transport.write(data)
        self._hold_back()

    def _on_time(self) -> None:
        self._timer = None
        self._pump()

    def pause_writing(self) -> None:
        self._is_full = True
        self._hold_back()

    def resume_writing(self) -> None:
        self._is_full = False
        self._hold_back()

    def _hold_back(self) -> None:
        """Read no further from the other end while this one is behind."""
        source = self._link.other(self)._transport
        if source is None or source.is_closing():
            return
        if self._is_full or self._queued_bytes > QUEUED_MAX_BYTES:
            source.pause_reading()
        else:
            source.resume_reading()

    def cut(self) -> None:
        self._is_cut = True
        if self._timer is not None:
            self._timer.cancel()
        self._queue.clear()
        if self._transport is not None:
            raw = self._transport.get_extra_info("socket")
            if raw is not None and raw.fileno() >= 0:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._transport.abort()

"""The telemetry port's connections: few, and none that does nothing for long.

Whoever reaches the port can open connections, and each takes one of the process's descriptors. At
the bound the oldest one without a running request is closed for the new one: a probe sends its
request at once, so it is answered however many others hold connections open and say nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

CONNECTIONS_MAX = 64
"""Of one process; a Prometheus and a kubelet need one each."""

HEADERS_S = 10.0
"""The longest that a new connection may take until its first request is there."""

IDLE_S = 75.0
"""The longest that a connection may rest between two requests; Prometheus keeps its own open, and
asks once a minute by default."""


class Connections:
    """Those that are open, oldest first."""

    def __init__(self, protocol: Callable[[], asyncio.Protocol]) -> None:
        self._protocol = protocol
        self._resting: dict[asyncio.BaseTransport, asyncio.TimerHandle] = {}
        self._answering: set[asyncio.BaseTransport] = set()

    def __call__(self) -> asyncio.Protocol:
        return _Counted(self._protocol(), self)

    def __len__(self) -> int:
        return len(self._resting) + len(self._answering)

    @contextmanager
    def answering(self, transport: asyncio.BaseTransport | None) -> Iterator[None]:
        """A request of this connection is being answered: it is not closed meanwhile."""
        if transport is None or transport not in self._resting:  # it is gone, or was closed
            yield
            return
        self._resting.pop(transport).cancel()
        self._answering.add(transport)
        try:
            yield
        finally:
            if transport in self._answering:
                self._answering.remove(transport)
                self._rest(transport, IDLE_S)

    def opened(self, transport: asyncio.BaseTransport) -> None:
        if len(self) >= CONNECTIONS_MAX:
            self._close(next(iter(self._resting), transport))
        if not transport.is_closing():
            self._rest(transport, HEADERS_S)

    def closed(self, transport: asyncio.BaseTransport) -> None:
        self._answering.discard(transport)
        if transport in self._resting:
            self._resting.pop(transport).cancel()

    def _rest(self, transport: asyncio.BaseTransport, at_most_s: float) -> None:
        timer = asyncio.get_running_loop().call_later(at_most_s, self._close, transport)
        self._resting[transport] = timer

    def _close(self, transport: asyncio.BaseTransport) -> None:
        self.closed(transport)
        # Closing would wait for a client that does not read its answer.
        assert isinstance(transport, asyncio.Transport), "the server is TCP's"
        transport.abort()


class _Counted(asyncio.Protocol):
    """Hands everything on, and tells of the connection's begin and end."""

    def __init__(self, protocol: asyncio.Protocol, connections: Connections) -> None:
        self._inner, self._connections = protocol, connections
        self._transport: asyncio.BaseTransport | None = None
        self.data_received = protocol.data_received  # type: ignore[method-assign]
        self.eof_received = protocol.eof_received  # type: ignore[method-assign]
        self.pause_writing = protocol.pause_writing  # type: ignore[method-assign]
        self.resume_writing = protocol.resume_writing  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._connections.opened(transport)
        self._inner.connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._transport is not None:
            self._connections.closed(self._transport)
        self._inner.connection_lost(error)

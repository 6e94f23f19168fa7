"""The HTTP server for /metrics, /livez and /readyz.

Liveness fails only where a restart would help; an outage of the broker or the provider never makes
it fail. Readiness tells whether intake goes on, and if not, why, in sentences.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, TypeAlias

from aiohttp import hdrs, web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from service.core.errors import CannotRun
from service.core.status import Status
from service.settings import Settings
from service.telemetry.connections import Connections

logger = logging.getLogger(__name__)

POLL_TURN_S = 60.0
"""The poll loop counts as stuck after this many seconds plus one request's timeout; it usually
turns about once a second."""

CALL_OVERDUE_S = 60.0
"""A call that exceeds its own deadline by this many seconds will never end."""

LOOK_S = 120.0
"""The watchdog itself counts as stuck after this many seconds without a look. It looks every ten
seconds, and each look is bounded."""

UNSETTLED_MARGIN_S = 60.0
"""Seconds added to the group's own timeouts, so that a slow member elsewhere does not make this one
fail."""

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]

SCRAPES_WAITING_MAX = 8
"""Scrapes under way or waiting; each takes milliseconds of the event loop."""

BACKLOG_MAX = 128
"""Connections that the system keeps until they are accepted."""

EVERYWHERE = ("0.0.0.0", "::")
"""Hosts that stand for every address of the machine."""

CLOSE_S = 1.0
"""How many seconds closing the server waits for answers that are being written."""


@dataclass(frozen=True, slots=True)
class Patience:
    """The values of the status, in seconds, above which liveness fails."""

    poll_turn_s: float
    call_overdue_s: float
    unsettled_s: float
    look_s: float

    @classmethod
    def of(cls, settings: Settings) -> Self:
        kafka = settings.kafka
        return cls(
            poll_turn_s=POLL_TURN_S + kafka.request_timeout_s,
            call_overdue_s=CALL_OVERDUE_S,
            unsettled_s=settings.rebalance_timeout_s + kafka.session_timeout_s + UNSETTLED_MARGIN_S,
            look_s=LOOK_S,
        )


def not_alive(status: Status, patience: Patience) -> tuple[str, ...]:
    """The reasons why a restart would help; empty: it would not.

    The source counts `unsettled_s` only while a broker answers. Whether one answers now is checked
    here again, since a restart in an outage does not help.
    """
    reasons = []
    if status.poll_turn_age_s > patience.poll_turn_s:
        reasons.append(f"the poll loop has not turned for {status.poll_turn_age_s:.0f} s")
    if status.call_overdue_s > patience.call_overdue_s:
        reasons.append(f"a call exceeds its deadline by {status.call_overdue_s:.0f} s")
    group = status.group
    if group.broker_answers and not group.settled and group.unsettled_s > patience.unsettled_s:
        reasons.append(
            f"the group has not settled for {group.unsettled_s:.0f} s although a broker answers"
        )
    if group.look_age_s > patience.look_s:
        reasons.append(f"the watchdog has not looked for {group.look_age_s:.0f} s")
    return tuple(reasons)


@dataclass(frozen=True, slots=True)
class Readiness:
    """`reasons` says why no messages are taken; empty: ready. `state` is one word, or one for each
    worker."""

    reasons: Sequence[str]
    state: str | Mapping[str, str]


class Answers(Protocol):
    """The contents of the three pages."""

    async def metrics(self) -> CollectorRegistry: ...

    async def not_alive(self) -> Sequence[str]: ...

    async def readiness(self) -> Readiness: ...


@dataclass(frozen=True, slots=True)
class OwnAnswers:
    """The answers of this process about itself."""

    registry: CollectorRegistry
    status: Callable[[], Status]
    patience: Patience

    async def metrics(self) -> CollectorRegistry:
        return self.registry

    async def not_alive(self) -> Sequence[str]:
        return not_alive(self.status(), self.patience)

    async def readiness(self) -> Readiness:
        status = self.status()
        return Readiness(status.not_ready, status.state.value)


class Probes:
    """The HTTP server; an async context manager that leaves nothing behind.

    Entering raises `CannotRun` where the address cannot be bound. `port` is the port that was
    bound, also where the setting is 0.
    """

    def __init__(self, host: str, port: int, answers: Answers) -> None:
        self.host, self.port, self._answers = host, port, answers
        application = web.Application(middlewares=[self._counted])
        application.add_routes(
            [
                web.get("/metrics", self._metrics),
                web.get("/livez", self._livez),
                web.get("/readyz", self._readyz),
            ]
        )
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=CLOSE_S)
        self._connections = Connections(self._handler)
        self._listening: asyncio.Server | None = None
        self._scrape = asyncio.Lock()
        self._scrapes_waiting = 0

    def _handler(self) -> asyncio.Protocol:
        assert self._runner.server is not None, "it is set up"
        return self._runner.server()

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        try:
            self._listening = await loop.create_server(
                self._connections, self.host, self.port, backlog=BACKLOG_MAX, reuse_address=True
            )
        except OSError as error:
            await self._runner.cleanup()
            raise CannotRun(_unavailable(self.host, self.port, error)) from error
        self.port = int(self._listening.sockets[0].getsockname()[1])
        logger.info("metrics and probes on http://%s:%d/metrics", self.host, self.port)
        if self.host in EVERYWHERE:
            logger.info(
                "they are open to every machine that reaches this one, without a password; "
                "telemetry.host 127.0.0.1 keeps them to this machine"
            )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._listening is not None:
            self._listening.close()
        await self._runner.cleanup()

    @web.middleware
    async def _counted(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        with self._connections.answering(request.transport):
            return await handler(request)

    async def _metrics(self, request: web.Request) -> web.Response:
        """One scrape at a time, and few that wait: probes are answered between two of them."""
        if self._scrapes_waiting >= SCRAPES_WAITING_MAX:
            return web.Response(status=503, text="too many scrapes at once\n")
        encode, content_type = choose_encoder(",".join(request.headers.getall(hdrs.ACCEPT, [])))
        self._scrapes_waiting += 1
        try:
            async with self._scrape:
                body = encode(await self._answers.metrics())
        finally:
            self._scrapes_waiting -= 1
        return web.Response(body=body, headers={hdrs.CONTENT_TYPE: content_type})

    async def _livez(self, _: web.Request) -> web.Response:
        reasons = await self._answers.not_alive()
        return _answer({"alive": not reasons, "reasons": reasons}, good=not reasons)

    async def _readyz(self, _: web.Request) -> web.Response:
        found = await self._answers.readiness()
        ready = not found.reasons
        body = {"ready": ready, "state": found.state, "reasons": found.reasons}
        return _answer(body, good=ready)


def _answer(body: Mapping[str, object], *, good: bool) -> web.Response:
    return web.json_response(
        body, status=200 if good else 503, headers={hdrs.CACHE_CONTROL: "no-store"}
    )


def _unavailable(host: str, port: int, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            why = "is taken; set telemetry.port to another (0 takes a free one)"
        case errno.EACCES | errno.EPERM:
            why = "is not allowed to this user; set telemetry.port above 1023"
        case _:
            why = "cannot be bound; set telemetry.host to an address of this machine"
    return f"{host} port {port} for metrics and probes {why}"

"""One endpoint's client: its connections, its headers, and its key as it is now."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import httpx2
import openai

from service.core.errors import NotReachable
from service.llm.endpoint import Endpoint, unlisted
from service.llm.lean import Answered, LeanPost

CONNECT_TIMEOUT_S = 15.0
"""A new connection, TLS included; a burst of hundreds at the start takes more than the SDK's 5."""
CHECK_TIMEOUT_S = 15.0
"""The reachability check, from sending to the last byte."""
KEEPALIVE_S = 4.0
"""Idle connections are let go after this: below the 5 s after which uvicorn (vLLM and many
others) closes them, which would cost a call each time both happen at once."""
AS_IT_IS = {"Accept-Encoding": "identity"}
"""Answers are small, and one that is not encoded cannot grow when it is decoded."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class Connection:
    """The way to one endpoint. `open` needs a running loop; no traffic before the first call."""

    client: openai.AsyncOpenAI
    _clients: tuple[openai.AsyncOpenAI, ...] = ()

    def __init__(self, endpoint: Endpoint, connections_max: int, answer_max_bytes: int) -> None:
        self.endpoint = endpoint
        self._connections_max, self._answer_max_bytes = connections_max, answer_max_bytes

    async def open(self) -> None:
        self.client, self._lean = self._made(KEEPALIVE_S)
        # Connections that are let go at once: each of its calls has a new one.
        anew, self._anew = self._made(0.0)
        self._clients = self.client, anew
        await self._open_both()

    async def _open_both(self) -> None:
        await self._lean.open()
        await self._anew.open()

    def _made(self, keepalive_s: float) -> tuple[openai.AsyncOpenAI, LeanPost]:
        # Each call has a deadline of its own around it, so reading has none here.
        timeout = httpx2.Timeout(None, connect=CONNECT_TIMEOUT_S)
        limits = httpx2.Limits(
            max_connections=self._connections_max,
            max_keepalive_connections=self._connections_max,
            keepalive_expiry=keepalive_s,
        )
        http = openai.DefaultAioHttpClient(timeout=timeout, limits=limits)
        client = openai.AsyncOpenAI(
            api_key=self.endpoint.key.value,
            base_url=self.endpoint.base_url,
            max_retries=0,  # the pipeline owns retries
            timeout=timeout,
            http_client=http,
            default_headers={**self.endpoint.headers, **AS_IT_IS},
            default_query=self.endpoint.query,
        )
        return client, LeanPost(client, http, "/chat/completions", self._answer_max_bytes)

    async def close(self) -> None:
        """Calls in flight are to be cancelled first."""
        for client in self._clients:
            await client.close()

    async def post(self, body: bytes, *, anew: bool = False) -> Answered | httpx2.Response:
        """One call, as `LeanPost.post`; `anew` on a connection of its own: behind one address
        there may be several servers, of which one refuses everything."""
        return await self.with_key(lambda lean: lean.post(body), anew=anew)

    async def with_key(self, call: Callable[[LeanPost], Awaitable[T]], *, anew: bool = False) -> T:
        """The call with the key as it is now, and once more with another one where this one was
        refused (401) and its file holds another."""
        await self.renewed()
        sent, lean = self.client.api_key, self._anew if anew else self._lean
        try:
            return await call(lean)
        except openai.AuthenticationError:
            if not await self.renewed(refused=sent):
                raise
        return await call(lean)

    async def renewed(self, refused: str | None = None) -> bool:
        """Whether calls from now on carry another key than before, or than the one `refused`."""
        key = self.endpoint.key
        if not key.changed(refused=refused):
            return False
        if self.client.api_key != key.value:
            for client in self._clients:
                client.api_key = key.value
            log.info("%s: the key was read anew", key.origin)
            await self._open_both()
        return True

    async def models(self) -> httpx2.Response | str:
        """The endpoint's list of models, or a warning; costs nothing. Raises `CannotRun`."""
        await self.renewed()
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                return await self.client.get("/models", cast_to=httpx2.Response)
        except openai.APIStatusError as error:
            return unlisted(self.endpoint, error.status_code)
        except (openai.APIConnectionError, TimeoutError):
            raise NotReachable(
                f"{self.endpoint.base_url} does not answer: check {self.endpoint.setting}, and "
                "that the model endpoint is running."
            ) from None

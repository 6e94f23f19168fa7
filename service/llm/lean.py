"""One request of the SDK's, sent many times: only its body differs, so only that is made anew.

The SDK builds the request (address, credentials, organisation, its own headers) and says what an
error answer means; both through its public face. In between, the bytes go straight to a connection
of the aiohttp session on which its transport stands: that session's pool, certificates and parser,
without the request and response objects that it builds around each call and that come out the same
each time. What is not an ordinary answer (a redirect) is left to the SDK altogether, and so is the
way through a proxy to that session. Parts of aiohttp that it does not document are used here and
nowhere else; where they are missing or have another shape, every call goes the session's own way.

No body is read beyond a bound: an answer that is larger, encoded or decoded, is `TooLarge`, and of
an error's body the beginning is enough.
"""

from __future__ import annotations

import base64
import inspect
import logging
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import aiohttp
import httpx2
import openai
from yarl import URL

from service.core.errors import WrongSettings
from service.llm.bounded import ERROR_MAX_BYTES, IN_PLAIN, TooLarge, Undecodable, decoded

try:
    from aiohttp.client_proto import ResponseHandler
except ImportError:  # `changed_part` says so
    ResponseHandler = None  # type: ignore[assignment, misc]

log = logging.getLogger(__name__)

_OF_BODY = frozenset({"content-length", "host"})
"""Headers of a request that are made anew with each."""


class Answered(NamedTuple):
    """An answer with its body read; the names are httpx's. Header names don't mind their case."""

    status_code: int
    headers: Mapping[str, str]
    raw_headers: tuple[tuple[bytes, bytes], ...]
    content: bytes


class LeanPost:
    """`AsyncOpenAI.post` for one path; `open` it once in a running loop."""

    def __init__(
        self, client: openai.AsyncOpenAI, http: httpx2.AsyncClient, path: str, max_bytes: int
    ) -> None:
        """`http` is what `client` was built with: `openai.DefaultAioHttpClient`. `max_bytes` is
        the largest answer that is read, encoded or decoded."""
        self._client, self._http, self._path = client, http, path
        self._max_bytes = max_bytes

    async def open(self) -> None:
        """Have the SDK and aiohttp make their request once; no traffic. Raises `WrongSettings`."""
        self._request = await self._as_the_sdk_makes_it()
        transport = self._http._transport_for_url(self._request.url)
        # The SDK's own transport opens its session at the first request; here it does so now.
        session = transport.client = transport.get_client()  # type: ignore[attr-defined]
        self._session: aiohttp.ClientSession = session
        self._address = URL(str(self._request.url), encoded=True)
        self._options = _options(self._request, transport)
        _refuse_line_breaks(self._options["headers"])
        self._exchange = self._by_the_session
        if (changed := changed_part()) is not None:
            log.warning(
                "aiohttp %s has changed (%s): calls to the model go its own way, which takes more "
                "CPU; the version in constraints.txt has what the shorter one needs",
                aiohttp.__version__,
                changed,
            )
            return
        made = await self._as_aiohttp_makes_it()
        if made.proxy is None:
            self._made, self._head = made, _head(made)
            self._exchange = self._directly

    async def post(self, body: bytes) -> Answered | httpx2.Response:
        """Send it; raises what `AsyncOpenAI.post` raises: `APIStatusError`, `APIConnectionError`;
        and `TooLarge`, `Undecodable`.

        Cancelled, the connection is closed and the request may have been answered.
        """
        try:
            answer = await self._exchange(body)
        except TimeoutError as error:
            raise openai.APITimeoutError(request=self._request) from error
        except TooLarge:
            raise
        except Exception as error:  # the SDK draws the line here too
            raise openai.APIConnectionError(request=self._request) from error
        if 300 <= answer.status_code < 400 and "Location" in answer.headers:
            answer = await self._followed(body)
        answer = self._in_plain(answer)
        if answer.status_code == 200:
            return answer
        return await self._as_the_sdk_takes_it(answer)

    @asynccontextmanager
    async def stream(self, body: bytes) -> AsyncIterator[httpx2.Response]:
        """Send it; the answer is read by the caller, while it is written. Raises as `post` does.

        An error's body is read here, and no further than `ERROR_MAX_BYTES`.
        """
        headers = [pair for pair in self._request.headers.multi_items() if pair[0] not in _OF_BODY]
        request = self._http.build_request("POST", self._request.url, headers=headers, content=body)
        try:
            response = await self._http.send(request, stream=True, follow_redirects=True)
        except httpx2.TimeoutException as error:
            raise openai.APITimeoutError(request=self._request) from error
        except Exception as error:  # the SDK draws the line here too
            raise openai.APIConnectionError(request=self._request) from error
        try:
            if response.is_error:
                content, _ = await _read(response.aiter_raw(), ERROR_MAX_BYTES, whole=False)
                raw = tuple(response.headers.raw)
                answer = Answered(response.status_code, response.headers, raw, content)
                await self._as_the_sdk_takes_it(self._in_plain(answer))
            yield response
        finally:
            await response.aclose()

    def _in_plain(self, answer: Answered) -> Answered:
        """Decoded, where it came encoded although nobody asked for it."""
        encoding = answer.headers.get("Content-Encoding", "")
        if encoding in IN_PLAIN:
            return answer
        try:
            content = decoded(answer.content, encoding, self._most_of(answer.status_code))
        except (TooLarge, Undecodable):
            if answer.status_code < 400:
                raise
            content = b""  # an error's status says most of it
        raw = tuple(pair for pair in answer.raw_headers if pair[0].lower() != b"content-encoding")
        return answer._replace(content=content, raw_headers=raw)

    def _most_of(self, status_code: int) -> int:
        return self._max_bytes if status_code < 400 else min(self._max_bytes, ERROR_MAX_BYTES)

    async def _followed(self, body: bytes) -> Answered:
        """A redirect, by the SDK's own way."""
        stream = await self._client.post(
            self._path,
            cast_to=object,
            content=body,
            stream=True,
            stream_cls=openai.AsyncStream[object],
        )
        async with stream:
            response = stream.response
            content, _ = await _read(response.aiter_raw(), self._max_bytes, whole=True)
            return Answered(
                response.status_code, response.headers, tuple(response.headers.raw), content
            )

    async def _directly(self, body: bytes) -> Answered:
        """On a connection of the session's pool, which gets it back only after a whole answer."""
        assert self._session.connector is not None, "the session is open"
        connection = await self._session.connector.connect(
            self._made, traces=[], timeout=self._options["timeout"]
        )
        whole = False
        try:
            assert connection.protocol is not None, "connected"
            answer, ended = await self._asked(connection.protocol, body)
            whole = ended and not _has_unsent(connection.protocol)
            return answer
        finally:
            if whole:
                connection.release()
            else:
                connection.close()

    async def _asked(self, protocol: ResponseHandler, body: bytes) -> tuple[Answered, bool]:
        """The answer, and whether it was read to its end."""
        protocol.set_response_params(read_until_eof=True, auto_decompress=False)
        if protocol.transport is None:
            raise aiohttp.ServerDisconnectedError
        # At once, so that it is one packet and one system call. It is not waited for that a large
        # body has left: it is in memory either way.
        protocol.transport.write(b"%b%d\r\n\r\n%b" % (self._head, len(body), body))
        while True:
            message, payload = await protocol.read()
            if message.code >= 200:
                content, ended = await self._content(message.code, payload.iter_any())
                answer = Answered(message.code, message.headers, message.raw_headers, content)
                return answer, ended

    async def _content(self, status_code: int, chunks: AsyncIterable[bytes]) -> tuple[bytes, bool]:
        return await _read(chunks, self._most_of(status_code), whole=status_code < 400)

    async def _by_the_session(self, body: bytes) -> Answered:
        """Through a proxy, which may want a tunnel and credentials for each connection."""
        async with self._session.post(self._address, data=body, **self._options) as response:
            content, _ = await self._content(response.status, response.content.iter_any())
            return Answered(response.status, response.headers, response.raw_headers, content)

    async def _as_aiohttp_makes_it(self) -> aiohttp.ClientRequest:
        made: list[aiohttp.ClientRequest] = []

        async def keep(request: aiohttp.ClientRequest, _: object) -> aiohttp.ClientResponse:
            made.append(request)
            raise _Kept

        try:
            await self._session.post(self._address, data=b"", **self._options, middlewares=[keep])
        except _Kept:
            return made[0]
        raise AssertionError("aiohttp sent a request that was only to be made")

    async def _as_the_sdk_makes_it(self) -> httpx2.Request:
        made: list[httpx2.Request] = []

        def keep(request: httpx2.Request) -> httpx2.Response:
            made.append(request)
            return httpx2.Response(200, json={})

        await self._through_the_sdk(keep)
        return made[0]

    async def _as_the_sdk_takes_it(self, answer: Answered) -> httpx2.Response:
        """Decoded where it is encoded; an error is raised as the SDK raises it."""
        return await self._through_the_sdk(
            lambda _: httpx2.Response(
                answer.status_code, headers=list(answer.raw_headers), content=answer.content
            )
        )

    async def _through_the_sdk(
        self, answer: Callable[[httpx2.Request], httpx2.Response]
    ) -> httpx2.Response:
        """A call of the SDK's that never leaves the process."""
        inner = httpx2.MockTransport(answer)
        async with httpx2.AsyncClient(transport=inner) as http:
            client = self._client.copy(http_client=http)
            return await client.post(self._path, cast_to=httpx2.Response, content=b"{}")


async def _read(chunks: AsyncIterable[bytes], max_bytes: int, *, whole: bool) -> tuple[bytes, bool]:
    """What came, and whether that was all; raises `TooLarge` where a part is of no use."""
    pieces, size = [], 0
    async for chunk in chunks:
        pieces.append(chunk)
        size += len(chunk)
        if size > max_bytes:
            if whole:
                raise TooLarge
            return b"".join(pieces)[:max_bytes], False
    return b"".join(pieces), True


def changed_part() -> str | None:
    """What of aiohttp's undocumented parts is not as the direct way needs it; None: all is."""
    if ResponseHandler is None:
        return "no client_proto.ResponseHandler"
    needed: tuple[tuple[type, str, tuple[Any, ...], dict[str, Any]], ...] = (
        (aiohttp.BaseConnector, "connect", ("request",), {"traces": [], "timeout": None}),
        (
            ResponseHandler,
            "set_response_params",
            (),
            {"read_until_eof": True, "auto_decompress": False},
        ),
        (ResponseHandler, "read", (), {}),
    )
    for owner, name, arguments, options in needed:
        try:
            inspect.signature(getattr(owner, name)).bind("self", *arguments, **options)
        except (AttributeError, TypeError, ValueError):
            return f"{owner.__name__}.{name}"
    return None


class _Kept(Exception):
    """The request was made; it is not to be sent."""


def _head(request: aiohttp.ClientRequest) -> bytes:
    """Of a direct request, up to the value of its content length."""
    lines = [f"{request.method} {request.url.raw_path_qs} HTTP/1.1"]
    lines += [
        f"{name}: {value}"
        for name, value in request.headers.items()
        if name.lower() != "content-length"
    ]
    return "\r\n".join([*lines, "Content-Length: "]).encode()


def _refuse_line_breaks(headers: list[tuple[str, str]]) -> None:
    for name, value in headers:
        if any(character in value for character in "\r\n\0"):
            raise WrongSettings(
                f"The header {name} for the model endpoint holds a line break: look at "
                "OPENAI_ORG_ID, OPENAI_PROJECT_ID and OPENAI_CUSTOM_HEADERS."
            )


def _has_unsent(protocol: ResponseHandler) -> bool:
    """Answered before all of the request had left: what is left would go before the next."""
    return protocol.transport is None or protocol.transport.get_write_buffer_size() > 0


def _options(request: httpx2.Request, transport: Any) -> dict[str, Any]:
    """What aiohttp is told with every request, as the SDK's transport tells it."""
    timeout = request.extensions["timeout"]
    proxy: httpx2.Proxy | None = transport.proxy
    to_the_proxy = [] if proxy is None else _proxy_headers(proxy)
    # The body differs each time, and so does its length.
    headers = [pair for pair in request.headers.multi_items() if pair[0] != "content-length"]
    if request.url.scheme == "http":  # else they belong to the tunnel alone
        headers += to_the_proxy
    return {
        "headers": headers,
        "allow_redirects": False,
        "auto_decompress": False,  # decoded where the SDK would do it
        "timeout": aiohttp.ClientTimeout(
            sock_connect=timeout["connect"], sock_read=timeout["read"], connect=timeout["pool"]
        ),
        "server_hostname": request.extensions.get("sni_hostname"),
        "proxy": None if proxy is None else str(proxy.url),
        "proxy_headers": to_the_proxy,
    }


def _proxy_headers(proxy: httpx2.Proxy) -> list[tuple[str, str]]:
    own = proxy.headers.multi_items()
    if proxy.auth is not None:
        user, password = proxy.auth
        own.append(("Proxy-Authorization", "Basic " + _base64(f"{user}:{password}")))
    return own


def _base64(text: str) -> str:
    return base64.b64encode(text.encode("latin1")).decode()

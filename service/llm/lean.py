"""One request of the SDK's, sent many times: only its body differs, so only that is made anew.

The SDK builds the request (address, credentials, organisation, its own headers) and says what an
error answer means; both through its public face. In between, the bytes go straight to the aiohttp
session on which its transport stands, with that transport's certificates, proxy and connections.
That leaves out what it does for each call and what comes out the same each time: about half of a
message's CPU. What is not an ordinary answer (a redirect) is left to the SDK altogether.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import aiohttp
import httpx2
import openai
from yarl import URL

IN_PLAIN = frozenset({"", "identity"})
"""Content encodings that need no decoding."""


class Answered(NamedTuple):
    """A successful answer; the names are httpx's. Header names don't mind their case."""

    headers: Mapping[str, str]
    content: bytes


class LeanPost:
    """`AsyncOpenAI.post` for one path; `open` it once in a running loop."""

    def __init__(self, client: openai.AsyncOpenAI, http: httpx2.AsyncClient, path: str) -> None:
        """`http` is what `client` was built with: `openai.DefaultAioHttpClient`."""
        self._client, self._http, self._path = client, http, path

    async def open(self) -> None:
        """Have the SDK make its request once; no traffic."""
        self._request = await self._as_the_sdk_makes_it()
        transport = self._http._transport_for_url(self._request.url)
        # The SDK's own transport opens its session at the first request; here it does so now.
        session = transport.client = transport.get_client()  # type: ignore[attr-defined]
        self._session: aiohttp.ClientSession = session
        self._address = URL(str(self._request.url), encoded=True)
        self._options = _options(self._request, transport)

    async def post(self, body: bytes) -> Answered | httpx2.Response:
        """Send it; raises what `AsyncOpenAI.post` raises: `APIStatusError`, `APIConnectionError`.

        Cancelled, the connection is closed and the request may have been answered.
        """
        try:
            async with self._session.post(self._address, data=body, **self._options) as response:
                content = await response.read()
        except TimeoutError as error:
            raise openai.APITimeoutError(request=self._request) from error
        except Exception as error:  # the SDK draws the line here too
            raise openai.APIConnectionError(request=self._request) from error
        if response.status == 200 and response.headers.get("Content-Encoding", "") in IN_PLAIN:
            return Answered(response.headers, content)
        if 300 <= response.status < 400 and "Location" in response.headers:
            return await self._client.post(self._path, cast_to=httpx2.Response, content=body)
        return await self._as_the_sdk_takes_it(response, content)

    async def _as_the_sdk_makes_it(self) -> httpx2.Request:
        made: list[httpx2.Request] = []

        def keep(request: httpx2.Request) -> httpx2.Response:
            made.append(request)
            return httpx2.Response(200, json={})

        await self._through_the_sdk(keep)
        return made[0]

    async def _as_the_sdk_takes_it(
        self, response: aiohttp.ClientResponse, content: bytes
    ) -> httpx2.Response:
        """Decoded where it is encoded; an error is raised as the SDK raises it."""
        return await self._through_the_sdk(
            lambda _: httpx2.Response(
                response.status, headers=list(response.raw_headers), content=content
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

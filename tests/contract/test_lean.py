"""What `LeanPost` sends and raises is what the SDK's own `post` would, byte by byte."""

from __future__ import annotations

import asyncio
import functools
import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import httpx2
import openai
import pytest

from service.core.errors import WrongSettings
from service.llm import lean as lean_calls
from service.llm.bounded import ERROR_MAX_BYTES, TooLarge, Undecodable
from service.llm.lean import LeanPost

PATH = "/chat/completions"
BODY = '{"messages":[{"role":"user","content":"Ada Löwe"}]}'.encode()
MAX_BYTES = 100_000
COMPLETION = b'{"choices":[]}'


@pytest.fixture(autouse=True)
def _read_certificates_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each client would read the system's certificates anew, a tenth of a second each."""
    monkeypatch.setattr(httpx2, "create_ssl_context", _tls)


_tls = functools.cache(httpx2.create_ssl_context)


@pytest.fixture(autouse=True, params=["directly", "by the session"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On a connection of the pool, and as if aiohttp were another than the one we know."""
    if request.param == "by the session":
        monkeypatch.setattr(lean_calls, "changed_part", lambda: "a part")
    return str(request.param)


def answer(status: str, body: bytes, *headers: str) -> bytes:
    lines = (f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers)
    return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass
class Server:
    """Keeps what arrives, byte by byte, and says what it is told to."""

    answers: list[bytes] = field(default_factory=list)
    requests: list[bytes] = field(default_factory=list)
    hangs_up: bool = False  # after each answer
    hasty: bool = False  # answers before it has read the body, and reads no further
    connections: int = 0
    port: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if self.hasty:
                    writer.write(self.answers.pop(0))
                    await asyncio.sleep(5)
                length = head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]
                self.requests.append(head + await reader.readexactly(int(length)))
                said = self.answers.pop(0) if self.answers else answer("200 OK", COMPLETION)
                writer.write(said)
                if self.hangs_up:
                    return
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    keeping = Server()
    async with await asyncio.start_server(keeping.serve, "127.0.0.1", 0) as listening:
        keeping.port = listening.sockets[0].getsockname()[1]
        yield keeping


@asynccontextmanager
async def posts(base_url: str) -> AsyncIterator[tuple[openai.AsyncOpenAI, LeanPost]]:
    http = openai.DefaultAioHttpClient(timeout=httpx2.Timeout(None, connect=5))
    client = openai.AsyncOpenAI(
        base_url=base_url, api_key="sk-1", max_retries=0, http_client=http, timeout=http.timeout
    )
    async with client:
        lean = LeanPost(client, http, PATH, MAX_BYTES)
        await lean.open()
        yield client, lean


def sorted_lines(request: bytes) -> tuple[bytes, list[bytes], bytes]:
    """Request line, headers without regard to order and case of names, body."""
    head, body = request.split(b"\r\n\r\n", 1)
    line, *headers = head.split(b"\r\n")
    pairs = (header.split(b": ", 1) for header in headers)
    return line, sorted(name.lower() + b": " + value for name, value in pairs), body


# Both are what the SDK's transport does.
@pytest.mark.filterwarnings("ignore:BasicAuth is deprecated")
@pytest.mark.filterwarnings("ignore:The 'proxy_auth' parameter is deprecated")
@pytest.mark.parametrize(
    ("path", "environment"),
    [
        ("/v1", {}),
        ("/v1/", {"OPENAI_ORG_ID": "org-1", "OPENAI_PROJECT_ID": "proj-1"}),
        ("/openai/v1?api-version=2026-01-01", {}),  # Azure's way
        ("/v1", {"HTTP_PROXY": "http://127.0.0.1:PORT"}),
        ("/v1", {"HTTP_PROXY": "http://user:secret@127.0.0.1:PORT"}),
        ("/v1", {"HTTP_PROXY": "http://127.0.0.1:1", "NO_PROXY": "127.0.0.1"}),
    ],
)
async def test_the_request_is_the_sdks(
    server: Server, monkeypatch: pytest.MonkeyPatch, path: str, environment: dict[str, str]
) -> None:
    """Address, credentials, organisation, the SDK's own headers and the proxy are the same."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value.replace("PORT", str(server.port)))
    proxied = "PORT" in environment.get("HTTP_PROXY", "")
    host = "model.invalid" if proxied else f"127.0.0.1:{server.port}"
    async with posts(f"http://{host}{path}") as (client, lean):
        theirs = await client.post(PATH, cast_to=httpx2.Response, content=BODY)
        ours = await lean.post(BODY)
        again = await lean.post(BODY + b" ")
    sdks, first, second = map(sorted_lines, server.requests)
    assert first == sdks
    assert second[0] == sdks[0]
    assert second[2] == BODY + b" "
    assert ours.content == again.content == theirs.content


@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 409, 413, 422, 429, 500, 503, 529])
@pytest.mark.parametrize("body", [b'{"error": {"code": "c", "message": "m"}}', b"<p>gateway", b""])
async def test_an_error_answer_raises_what_the_sdk_raises(
    server: Server, status: int, body: bytes
) -> None:
    """The same class with the same status, headers, body and text."""
    server.answers = [answer(f"{status} Nope", body, "Retry-After: 7")] * 2
    async with posts(f"http://127.0.0.1:{server.port}/v1") as (client, lean):
        with pytest.raises(openai.APIStatusError) as theirs:
            await client.post(PATH, cast_to=httpx2.Response, content=BODY)
        with pytest.raises(openai.APIStatusError) as ours:
            await lean.post(BODY)
    assert type(ours.value) is type(theirs.value)
    assert ours.value.status_code == theirs.value.status_code == status
    assert ours.value.body == theirs.value.body
    assert str(ours.value) == str(theirs.value)
    assert ours.value.response.headers["retry-after"] == "7"


@pytest.mark.parametrize(
    "said", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", b"?\r\n\r\n"]
)
async def test_a_broken_connection_raises_what_the_sdk_raises(server: Server, said: bytes) -> None:
    """Hung up before, within, or instead of an answer: a connection error, nothing else.

    The SDK's transport takes a lost connection for a timeout of connecting, which is one too.
    """
    server.answers, server.hangs_up = [said, said], True
    async with posts(f"http://127.0.0.1:{server.port}/v1") as (client, lean):
        with pytest.raises(openai.APIConnectionError):
            await client.post(PATH, cast_to=httpx2.Response, content=BODY)
        with pytest.raises(openai.APIConnectionError):
            await lean.post(BODY)


async def test_nobody_there_is_a_connection_error() -> None:
    """As it is with the SDK, and no other exception of the transport's."""
    async with posts("http://127.0.0.1:1/v1") as (_, lean):
        with pytest.raises(openai.APIConnectionError):
            await lean.post(BODY)


async def test_a_compressed_answer_is_unpacked(server: Server) -> None:
    """Although none is asked for: some servers pack whatever they send."""
    packed = answer("200 OK", gzip.compress(COMPLETION), "Content-Encoding: gzip")
    server.answers = [packed]
    async with posts(f"http://127.0.0.1:{server.port}/v1") as (_, lean):
        assert (await lean.post(BODY)).content == COMPLETION


async def test_a_redirect_is_followed_as_the_sdk_follows_it(server: Server) -> None:
    """With body and credentials, to the same host."""
    there = answer("307 Moved", b"", f"Location: http://127.0.0.1:{server.port}/v2/x")
    server.answers = [there, there]
    async with posts(f"http://127.0.0.1:{server.port}/v1") as (_, lean):
        assert (await lean.post(BODY)).content == COMPLETION
    last = sorted_lines(server.requests[-1])
    assert last[0] == b"POST /v2/x HTTP/1.1"
    assert last[2] == BODY
    assert b"authorization: Bearer sk-1" in last[1]


async def test_calls_share_their_connections(server: Server) -> None:
    """With the SDK's own calls too: one pool, one limit."""
    async with posts(f"http://127.0.0.1:{server.port}/v1") as (client, lean):
        await lean.post(BODY)
        assert lean._session is client._client._transport.client  # type: ignore[attr-defined]


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
TO_THE_END = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.mark.parametrize(
    ("said", "used_again"),
    [
        (b"HTTP/1.1 100 Continue\r\n\r\n" + answer("200 OK", COMPLETION), True),
        (
            CHUNKED + b"8\r\n" + COMPLETION[:8] + b"\r\n6\r\n" + COMPLETION[8:] + b"\r\n0\r\n\r\n",
            True,
        ),
        (answer("200 OK", COMPLETION, "Connection: close"), False),
        (TO_THE_END + COMPLETION, False),
    ],
    ids=["after a 100", "in chunks", "the last one", "until it hangs up"],
)
async def test_answers_of_every_shape_are_read(
    server: Server, said: bytes, used_again: bool
) -> None:
    """Whole, and the connection serves the next call where it can."""
    server.answers, server.hangs_up = [said], not used_again
    async with posts(f"http://127.0.0.1:{server.port}/v1") as (_, lean):
        assert (await lean.post(BODY)).content == COMPLETION
        assert (await lean.post(BODY)).content == COMPLETION
    assert server.connections == (1 if used_again else 2)


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n"])
async def test_a_connection_whose_call_was_cut_off_is_not_used_again(
    server: Server, said: bytes
) -> None:
    """The answer that still comes on it would be taken for the next call's."""
    server.answers = [said]
    async with posts(f"http://127.0.0.1:{server.port}/v1") as (_, lean):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await lean.post(BODY)
        assert (await lean.post(BODY)).content == COMPLETION
    assert server.connections == 2


@pytest.mark.parametrize("way", ["directly"], indirect=True)
async def test_an_answer_before_the_whole_request_ends_its_connection(server: Server) -> None:
    """What has not left of the request would be taken for the beginning of the next one."""
    refused = answer("413 Too Large", b"{}")
    server.answers, server.hasty = [refused, refused], True
    large = b'{"x":"' + b"x" * 50_000_000 + b'"}'
    async with posts(f"http://127.0.0.1:{server.port}/v1") as (_, lean):
        for _ in range(2):
            with pytest.raises(openai.APIStatusError) as found:
                await lean.post(large)
            assert found.value.status_code == 413
    assert server.connections == 2


async def test_a_header_with_a_line_break_is_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be two headers; said at the start, in a sentence."""
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1\r\nX-Other: 1")
    with pytest.raises(WrongSettings, match="OPENAI_ORG_ID"):
        async with posts(f"http://127.0.0.1:{server.port}/v1"):
            pass


@pytest.mark.parametrize(
    "said",
    [
        answer("200 OK", b"x" * (MAX_BYTES + 1)),
        answer("200 OK", gzip.compress(b"x" * 10_000_000), "Content-Encoding: gzip"),
        answer("200 OK", b"x", "Content-Encoding: gzip"),
        CHUNKED + b"fffffff\r\n" + b"x" * 500_000,
        TO_THE_END + b"x" * 500_000,
    ],
    ids=["said", "a bomb", "damaged", "without end", "until it hangs up"],
)
async def test_an_answer_is_not_read_beyond_its_bound(server: Server, said: bytes) -> None:
    """Encoded or decoded; the connection is not used again, and the next call is answered."""
    server.answers = [said]
    async with posts(f"http://127.0.0.1:{server.port}/v1") as (_, lean):
        with pytest.raises((TooLarge, Undecodable)):
            await lean.post(BODY)
        assert (await lean.post(BODY)).content == COMPLETION


@pytest.mark.parametrize(
    "said",
    [
        answer("503 Busy", b"x" * 5_000_000, "Retry-After: 7"),
        answer(
            "503 Busy", gzip.compress(b"x" * 50_000_000), "Content-Encoding: gzip", "Retry-After: 7"
        ),
        answer("503 Busy", b"x", "Content-Encoding: br", "Retry-After: 7"),
    ],
    ids=["large", "a bomb", "unknown encoding"],
)
async def test_of_an_error_the_beginning_is_enough(server: Server, said: bytes) -> None:
    """Its status and headers say most of it, however large its body is."""
    server.answers = [said]
    async with posts(f"http://127.0.0.1:{server.port}/v1") as (_, lean):
        with pytest.raises(openai.APIStatusError) as found:
            await lean.post(BODY)
        assert found.value.status_code == 503
        assert found.value.response.headers["retry-after"] == "7"
        assert len(found.value.response.content) <= ERROR_MAX_BYTES
        assert (await lean.post(BODY)).content == COMPLETION


@pytest.mark.parametrize("way", ["directly"], indirect=True)
def test_a_part_of_aiohttp_that_has_changed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is used is there; what is gone, or takes other arguments, is found."""
    assert lean_calls.changed_part() is None
    with monkeypatch.context() as patch:
        patch.setattr(aiohttp.BaseConnector, "connect", lambda _self, _request: None)
        assert lean_calls.changed_part() == "BaseConnector.connect"
    with monkeypatch.context() as patch:
        patch.delattr(lean_calls.ResponseHandler, "set_response_params")
        assert lean_calls.changed_part() == "ResponseHandler.set_response_params"
    monkeypatch.setattr(lean_calls, "ResponseHandler", None)
    assert "ResponseHandler" in str(lean_calls.changed_part())


async def test_another_aiohttp_is_told_once(
    server: Server, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Calls go on, and the log says once why they take more."""
    async with posts(f"http://127.0.0.1:{server.port}/v1") as (_, lean):
        for _ in range(3):
            await lean.post(BODY)
    told = [record for record in caplog.records if "has changed" in record.getMessage()]
    assert len(told) == (way == "by the session")


async def test_a_streams_request_is_the_same(server: Server) -> None:
    """Address, credentials and headers; its answer is the caller's to read."""
    async with posts(f"http://127.0.0.1:{server.port}/v1") as (_, lean):
        await lean.post(BODY)
        async with lean.stream(BODY) as response:
            assert await response.aread() == COMPLETION
    ours, theirs = map(sorted_lines, server.requests)
    assert ours == theirs


@pytest.mark.parametrize(
    "said",
    [
        answer("503 Busy", b"x" * 5_000_000, "Retry-After: 7"),
        b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\n\r\n" + b"x" * 500_000,
    ],
    ids=["large", "without end"],
)
async def test_of_a_streams_error_the_beginning_is_enough(server: Server, said: bytes) -> None:
    """As of any other: raised before there is anything to read."""
    server.answers = [said]
    async with posts(f"http://127.0.0.1:{server.port}/v1") as (_, lean):
        with pytest.raises(openai.APIStatusError) as found:
            async with lean.stream(BODY):
                pass
        assert found.value.response.headers["retry-after"] == "7"
        assert len(found.value.response.content) <= ERROR_MAX_BYTES
        assert (await lean.post(BODY)).content == COMPLETION


async def test_a_stream_from_nobody_is_a_connection_error() -> None:
    """As it is for any other call."""
    async with posts("http://127.0.0.1:1/v1") as (_, lean):
        with pytest.raises(openai.APIConnectionError):
            async with lean.stream(BODY):
                pass

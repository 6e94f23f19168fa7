"""A scripted model endpoint for loopback: speaks /v1/chat/completions and does what it is told.

What happens is chosen by the text itself, so that it works from another process too: a text may
carry a script in double brackets, one step for each call made for that text, the last one again
and again:

    Ada Lovelace is 36                                      answered at once
    Ada Lovelace is 36 [[500 x2, answer]]                   two errors, then an answer
    Ada Lovelace is 36 [[429 retry_after=1, invalid, answer]]
    Ada Lovelace is 36 [[answer after_ms=250]]              any step can be late
    Ada Lovelace is 36 [[hang]]                             never answered

Steps:
    answer         what the requested schema asks for, read from the text ("NAME is AGE") or made up
    invalid        an object that no schema of ours accepts
    no_json        an answer that is no JSON
    no_content     an answer without content
    refuse         message.refusal, as OpenAI declines under a schema
    content_filter finish_reason content_filter
    truncate       finish_reason length, the answer cut
    too_long       400 context_length_exceeded
    policy         400 content_policy_violation
    quota          429 insufficient_quota
    no_model       404 model_not_found
    hang           takes the request and never answers
    cut            the connection is cut in the middle of the answer
    cut_at_once    the connection is cut before the first byte of the answer
    cut_body       200 with JSON that ends too early
    html           200 with a page that is no JSON
    no_choices     200 with an empty list of choices
    no_usage       an answer that does not say what it cost
    400 … 599      that status, with an error body that repeats the message (as some servers do)
    bad_element    a list whose element at=N does not validate (else the one in the middle)
    stall          half of the answer, then nothing more
    cut_list       a stream that ends in order, in the middle of the answer
    late_error     half of the answer, then an error in its stead (500, in an answer of 200)
    given          what a test's own function gives: status, headers and body
Where the request says `stream`, the answer comes in pieces (server-sent events) of four
characters, with piece_ms=N between two of them; a cut, a truncation, a stall come half way.
Options: xN (N calls), after_ms=N, retry_after=S (seconds), retry_after_date=S (as an HTTP date
S seconds from now), retry_after_ms=N, cached=N and reasoning=N (tokens that the usage names).

A script may say what each model does; each then counts its own calls:

    Ada Lovelace is 36 [[small: refuse; large: invalid, answer]]

Tests in the same process may pass a function of their own instead (`script=`).

What befalls calls whatever their texts say can be changed while it runs, by POST:

    /_fault  {"step": "429 retry_after=1", "share": 0.8}   from now on, for a share of the calls
    /_fault  {"after_ms": 3000}                            answered as ever, but later
    /_fault  {}                                            no longer
    /_down   {"for_s": 5}                                  connections are reset until then
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

MODEL = "scripted"
_SCRIPT = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_PERSON = re.compile(r"([A-Z][\w.'-]*(?: [A-Z][\w.'-]*)*) is (\d+)")
_DELIMITED = re.compile(r"<text ([0-9a-f]+)>\n(.*)\n</text \1>", re.DOTALL)
# How instructor begins the user message that tells the model what was wrong.
_REASK = re.compile(r"Correct your JSON|Validation Error|Recall the function")


@dataclass(frozen=True)
class Step:
    """What to do with one call."""

    kind: str = "answer"
    after_s: float = 0.0
    headers: tuple[tuple[str, str], ...] = ()
    content: str | None = None
    """With `answer`: this instead of what the schema asks for."""
    cached: int | None = None
    """Of the prompt's tokens, those that the usage calls cached; None: it does not say."""
    reasoning: int | None = None
    """Of the completion's tokens, likewise."""
    piece_s: float = 0.0
    """Between two pieces of a streamed answer."""
    at: int | None = None
    """With `bad_element`: which."""
    status: int = 200
    """With `given`: the answer's, whose body is `body`, byte for byte."""
    body: bytes = b""


@dataclass(frozen=True)
class Asked:
    """One call as it arrived. `call` counts from 1 for each text, `model_call` for each text
    and model."""

    text: str
    call: int
    body: Mapping[str, Any]
    model_call: int = 1


@dataclass(frozen=True)
class Request:
    """One HTTP request, byte for byte; a header that came twice has both values."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Script = Callable[[Asked], Step]


def script_in_text(asked: Asked) -> Step:
    """What the text itself says about this call."""
    found = _SCRIPT.search(asked.text)
    if found is None:
        return Step()
    if ":" not in found.group(1):
        return _steps(found.group(1), time_of_use=asked.call)
    parts = (part.partition(":") for part in found.group(1).split(";"))
    by_model = {name.strip(): steps for name, _, steps in parts}
    return _steps(by_model[asked.body["model"]], time_of_use=asked.model_call)


def _steps(script: str, time_of_use: int) -> Step:
    steps = [step for part in script.split(",") for step in _expand(part)]
    return _step(steps[min(time_of_use, len(steps)) - 1])


def _expand(part: str) -> list[str]:
    words = part.split()
    times = [int(word[1:]) for word in words if re.fullmatch(r"x\d+", word)]
    rest = " ".join(word for word in words if not re.fullmatch(r"x\d+", word))
    return [rest] * (times[0] if times else 1)


def _step(text: str) -> Step:
    kind, *options = text.split()
    after_s, piece_s, at, headers = 0.0, 0.0, None, []
    usage: dict[str, int] = {}
    for option in options:
        name, _, value = option.partition("=")
        match name:
            case "after_ms":
                after_s = float(value) / 1000
            case "piece_ms":
                piece_s = float(value) / 1000
            case "at":
                at = int(value)
            case "retry_after":
                headers.append(("retry-after", value))
            case "retry_after_ms":
                headers.append(("retry-after-ms", value))
            case "retry_after_date":
                # Dates have whole seconds: round up, so that a test can rely on "at least".
                date = formatdate(math.ceil(time.time() + float(value)), usegmt=True)
                headers.append(("retry-after", date))
            case "cached" | "reasoning":
                usage[name] = int(value)
            case _:
                raise ValueError(f"no such option: {option!r}")
    return Step(kind, after_s, tuple(headers), piece_s=piece_s, at=at, **usage)


@dataclass(frozen=True)
class Latency:
    """Lognormal seconds, the same for the same seed, text and number of the call."""

    median_s: float = 0.0
    sigma: float = 0.0
    seed: int = 0

    max_s: float = math.inf

    def of(self, asked: Asked) -> float:
        if self.median_s <= 0:
            return 0.0
        chance = random.Random(f"{self.seed}:{asked.call}:{asked.text}")
        return min(self.max_s, self.median_s * math.exp(chance.gauss(0.0, self.sigma)))


@dataclass(frozen=True)
class Fault:
    """What befalls a share of the calls, whatever their texts say."""

    step: Step | None
    """Instead of what the text says; without one it is only late."""
    after_s: float = 0.0
    share: float = 1.0

    def of(self, step: Step) -> Step:
        step = self.step or step
        return replace(step, after_s=step.after_s + self.after_s)

    def hits(self, asked: Asked) -> bool:
        return random.Random(f"fault:{asked.call}:{asked.text}").random() < self.share


@dataclass
class Endpoint:
    """An async context manager that serves on a free port of 127.0.0.1."""

    script: Script = script_in_text
    latency: Latency = field(default_factory=Latency)
    models: tuple[str, ...] = (MODEL,)
    api_key: str | None = None
    """Where set, any other key gets 401."""
    record: bool = True
    """Keep requests and spans; off for long runs."""
    port: int = 0
    journal: Path | None = None
    """A file for a line of JSON for each call that ended: when it began and ended (seconds since
    the epoch), with which key, how ("200" …, "cut", "gone" where the client left first), its
    text."""
    fault: Fault | None = None
    down_until_s: float = 0.0
    """Monotonic: until then every connection is reset."""
    context_chars: int | None = None
    """Where set, a text of more characters is over the context."""
    calls: Counter[str] = field(default_factory=Counter)
    """Calls by text."""
    model_calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Calls by text and model."""
    requests: list[Request] = field(default_factory=list)
    """Chat requests as they arrived."""
    spans: list[tuple[float, float]] = field(default_factory=list)
    """When each answered call began and ended (monotonic seconds)."""
    in_flight: int = 0
    in_flight_max: int = 0
    connections: set[_Connection] = field(default_factory=set)
    _server: asyncio.Server | None = None
    _journal: TextIO | None = None

    @property
    def url(self) -> str:
        """What OPENAI_BASE_URL wants."""
        return f"http://127.0.0.1:{self.port}/v1"

    async def __aenter__(self) -> Endpoint:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self), "127.0.0.1", self.port, backlog=4096
        )
        self.port = self._server.sockets[0].getsockname()[1]
        if self.journal is not None:
            self._journal = self.journal.open("a")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await self._server.wait_closed()
        if self._journal is not None:
            self._journal.close()

    def cut(self) -> None:
        """Reset every connection; calls in flight are noted as cut."""
        for connection in tuple(self.connections):
            connection.close()

    def step_of(self, asked: Asked) -> Step:
        if self.context_chars is not None and len(asked.text) > self.context_chars:
            return Step("too_long")
        step, fault = self.script(asked), self.fault
        return fault.of(step) if fault is not None and fault.hits(asked) else step

    def note(self, began_s: float, key: str, how: str, text: str) -> None:
        """A line of the journal about a call that has just ended."""
        if self._journal is not None:
            self._journal.write(json.dumps([began_s, time.time(), key, how, text]) + "\n")

    def total(self) -> int:
        return self.calls.total()

    def stats(self) -> dict[str, int]:
        return {
            "calls": self.total(),
            "texts": len(self.calls),
            "in_flight": self.in_flight,
            "in_flight_max": self.in_flight_max,
            "connections": len(self.connections),
        }


@dataclass(frozen=True, slots=True)
class _Call:
    """What the journal will say of a call in flight."""

    began_s: float
    key: str
    text: str


def _how(step: Step) -> str:
    """The journal's word: the status, where there was a whole answer."""
    if step.kind.startswith("cut"):
        return "cut"
    if step.kind.isdigit():
        return step.kind
    if step.kind == "given":
        return str(step.status)
    return {"too_long": "400", "policy": "400", "quota": "429", "no_model": "404"}.get(
        step.kind, "200"
    )


class _Connection(asyncio.Protocol):
    """One client connection: one request after the other."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._timer: asyncio.TimerHandle | None = None
        self._busy = False
        self._in_flight = False
        self._call: _Call | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._endpoint.connections.add(self)
        if self._loop.time() < self._endpoint.down_until_s:
            transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._endpoint.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        self._land("gone")

    def close(self) -> None:
        self._land("cut")
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._next()

    def _next(self) -> None:
        if self._busy or (request := self._take()) is None:
            return
        self._busy = True
        self._handle(request)

    def _take(self) -> Request | None:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return None
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        headers: dict[str, str] = {}
        for name, _, value in (line.partition(":") for line in lines):
            before = [headers[name.lower()]] if name.lower() in headers else []
            headers[name.lower()] = ", ".join([*before, value.strip()])
        size = end + 4 + int(headers.get("content-length", "0"))
        if len(self._buffer) < size:
            return None
        method, path, _ = first.split(" ")
        body = bytes(self._buffer[end + 4 : size])
        del self._buffer[:size]
        return Request(method, path, headers, body)

    def _handle(self, request: Request) -> None:
        path = urlsplit(request.path).path
        if path.startswith("/_"):
            self._reply(200, _inside(self._endpoint, path, request))
        elif not self._allowed(request):
            self._reply(401, _error("Incorrect API key provided", "invalid_api_key"))
        elif path == "/v1/models":
            self._reply(200, _models(self._endpoint.models))
        elif path == "/v1/chat/completions" and request.method == "POST":
            self._chat(request)
        else:
            self._reply(404, _error(f"Unknown request URL: {path}", "unknown_url"))

    def _allowed(self, request: Request) -> bool:
        key = self._endpoint.api_key
        return key is None or request.headers.get("authorization") == f"Bearer {key}"

    def _chat(self, request: Request) -> None:
        body = request.json
        text = text_of(body["messages"])
        endpoint = self._endpoint
        self._in_flight = True
        endpoint.in_flight += 1
        endpoint.in_flight_max = max(endpoint.in_flight_max, endpoint.in_flight)
        endpoint.calls[text] += 1
        endpoint.model_calls[text, body["model"]] += 1
        if endpoint.record:
            endpoint.requests.append(request)
        asked = Asked(text, endpoint.calls[text], body, endpoint.model_calls[text, body["model"]])
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        self._call = _Call(time.time(), key, text)
        step = endpoint.step_of(asked)
        if step.kind == "hang":
            return
        delay_s = step.after_s + endpoint.latency.of(asked)
        began = self._loop.time()
        if delay_s > 0:
            self._timer = self._loop.call_later(delay_s, self._act, step, asked, began)
        else:
            self._act(step, asked, began)

    def _land(self, how: str) -> None:
        self._endpoint.in_flight -= self._in_flight
        self._in_flight = False
        call, self._call = self._call, None
        if call is not None:
            self._endpoint.note(call.began_s, call.key, how, call.text)

    def _act(self, step: Step, asked: Asked, began: float) -> None:
        if step.kind == "cut_at_once":
            self._end(step, began)
            self._transport.abort()
            return
        status, reply = reply_to(step, asked)
        if _streams(asked.body) and isinstance(reply, dict) and reply.get("choices"):
            own = "".join(f"{name}: {value}\r\n" for name, value in step.headers)
            self._transport.write(_STREAM_HEAD[:-2] + own.encode() + b"\r\n")
            self._stream(_pieces(reply, step), step, began)
            return
        self._end(step, began)
        if step.kind == "cut":
            whole = _http(status, reply, step.headers)
            self._transport.write(whole[: len(whole) // 2])
            self._transport.close()
            return
        self._reply(status, reply, step.headers)

    def _end(self, step: Step, began: float) -> None:
        self._land(_how(step))
        if self._endpoint.record:
            self._endpoint.spans.append((began, self._loop.time()))

    def _stream(self, pieces: Iterator[bytes], step: Step, began: float) -> None:
        """The next piece, and so on until there is none."""
        for piece in pieces:
            self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            if step.piece_s:
                again = (self._stream, pieces, step, began)
                self._timer = self._loop.call_later(step.piece_s, *again)
                return
        if step.kind == "stall":
            return
        self._end(step, began)
        if step.kind == "cut":
            self._transport.close()
            return
        self._transport.write(b"0\r\n\r\n")
        self._busy = False
        if self._buffer:
            self._next()

    def _reply(self, status: int, reply: object, headers: tuple[tuple[str, str], ...] = ()) -> None:
        if not self._transport.is_closing():
            self._transport.write(_http(status, reply, headers))
        self._busy = False
        if self._buffer:
            self._next()


def _http(status: int, reply: object, headers: tuple[tuple[str, str], ...]) -> bytes:
    body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
    kind = "text/html" if body[:1] == b"<" else "application/json"
    own = {"content-type": kind, **{name.lower(): value for name, value in headers}}
    lines = "".join(f"{name}: {value}\r\n" for name, value in own.items())
    return (
        f"HTTP/1.1 {status} Scripted\r\ncontent-length: {len(body)}\r\n{lines}\r\n"
    ).encode() + body


_STREAM_HEAD = (
    b"HTTP/1.1 200 Scripted\r\ncontent-type: text/event-stream\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_PIECE_CHARS = 4
_HALF_WAY = ("cut", "stall", "cut_list", "late_error")


def _streams(body: Mapping[str, Any]) -> bool:
    return bool(body.get("stream"))


def _pieces(reply: dict[str, Any], step: Step) -> Iterator[bytes]:
    """A completion as OpenAI streams it: deltas, their end, and the cost in a chunk of its own."""
    choice = reply["choices"][0]
    message = choice["message"]
    yield _event(reply, {"role": "assistant", "content": ""})
    if message["refusal"]:
        yield _event(reply, {"refusal": message["refusal"]})
    calls = message.get("tool_calls")
    text = calls[0]["function"]["arguments"] if calls else message["content"] or ""
    if step.kind in _HALF_WAY:
        text = text[: len(text) // 2]
    for begin in range(0, len(text), _PIECE_CHARS):
        piece = text[begin : begin + _PIECE_CHARS]
        yield _event(reply, _delta(calls, piece, first=begin == 0))
    if step.kind == "late_error":
        yield _sse(_error("The server had an error", None))
        return
    if step.kind in _HALF_WAY:
        return
    yield _event(reply, {}, finish=choice["finish_reason"])
    if reply["usage"]:
        yield _sse({**reply, "object": "chat.completion.chunk", "choices": []})
    yield b"data: [DONE]\n\n"


def _delta(calls: Any, piece: str, *, first: bool) -> dict[str, Any]:
    if not calls:
        return {"content": piece}
    call = {"index": 0, "function": {"arguments": piece}}
    if first:
        name = calls[0]["function"]["name"]
        call |= {"id": calls[0]["id"], "type": "function"}
        call["function"] = {"name": name, "arguments": piece}
    return {"tool_calls": [call]}


def _event(reply: Mapping[str, Any], delta: object, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
    same = {key: reply[key] for key in ("id", "created", "model")}
    return _sse({**same, "object": "chat.completion.chunk", "choices": [choice], "usage": None})


def _sse(chunk: object) -> bytes:
    return f"data: {json.dumps(chunk)}\n\n".encode()


def _inside(endpoint: Endpoint, path: str, request: Request) -> object:
    match path:
        case "/_fault":
            wanted = request.json
            endpoint.fault = _fault(wanted) if wanted else None
            return wanted
        case "/_down":
            loop = asyncio.get_running_loop()
            endpoint.down_until_s = loop.time() + request.json["for_s"]
            loop.call_soon(endpoint.cut)  # the answer to this goes out first
            return {}
        case "/_calls":
            return dict(endpoint.calls)
        case "/_stats":
            return endpoint.stats()
        case "/_spans":
            return endpoint.spans
        case "/_requests":
            return [request.json for request in endpoint.requests]
        case _:
            return {"paths": ["/_calls", "/_stats", "/_spans", "/_requests", "/_fault", "/_down"]}


def _fault(wanted: Mapping[str, Any]) -> Fault:
    step = _step(wanted["step"]) if "step" in wanted else None
    return Fault(step, wanted.get("after_ms", 0) / 1000, wanted.get("share", 1.0))


def _models(names: tuple[str, ...]) -> dict[str, Any]:
    rows = [{"id": name, "object": "model", "created": 0, "owned_by": "us"} for name in names]
    return {"object": "list", "data": rows}


def text_of(messages: list[Mapping[str, Any]]) -> str:
    """The message's text: what the last user message that is no re-ask holds between its tags."""
    said = [m["content"] for m in messages if m["role"] == "user" and isinstance(m["content"], str)]
    asked = [content for content in said if not _REASK.match(content.lstrip())]
    content = asked[-1] if asked else ""
    found = _DELIMITED.search(content)
    return found.group(2) if found else content


def reply_to(step: Step, asked: Asked) -> tuple[int, object]:
    """Status and body of the answer."""
    status, reply = _reply_to(step, asked)
    if isinstance(reply, dict) and reply.get("usage"):
        if step.cached is not None:
            reply["usage"]["prompt_tokens_details"] = {"cached_tokens": step.cached}
        if step.reasoning is not None:
            reply["usage"]["completion_tokens_details"] = {"reasoning_tokens": step.reasoning}
    return status, reply


def _reply_to(step: Step, asked: Asked) -> tuple[int, object]:
    match step.kind:
        case "given":
            return step.status, step.body
        case "answer" | "cut" | "stall" | "cut_list" | "late_error":
            return 200, _completion(asked, step.content or answer_to(asked))
        case "invalid":
            return 200, _completion(asked, '{"unexpected": ["nothing", "fits"]}')
        case "bad_element":
            return 200, _completion(asked, _with_bad_element(answer_to(asked), step.at))
        case "no_json":
            return 200, _completion(asked, "I would rather tell you a story.")
        case "no_content":
            return 200, _completion(asked, None)
        case "refuse":
            return 200, _completion(asked, None, refusal="I'm sorry, I can't help with that.")
        case "content_filter":
            return 200, _completion(asked, "", finish="content_filter")
        case "truncate":
            half = answer_to(asked)
            return 200, _completion(asked, half[: len(half) // 2], finish="length")
        case "too_long":
            return 400, _error(
                "This model's maximum context length is 8192 tokens.", "context_length_exceeded"
            )
        case "policy":
            return 400, _error("Your request was rejected.", "content_policy_violation")
        case "quota":
            return 429, _error("You exceeded your current quota.", "insufficient_quota")
        case "no_model":
            return 404, _error("The model does not exist.", "model_not_found")
        case "cut_body":
            whole = json.dumps(_completion(asked, answer_to(asked))).encode()
            return 200, whole[: len(whole) // 2]
        case "html":
            return 200, b"<html><body>Welcome to the proxy</body></html>"
        case "no_choices":
            return 200, {**_completion(asked, ""), "choices": []}
        case "no_usage":
            return 200, {**_completion(asked, answer_to(asked)), "usage": None}
        case status:
            # Some servers repeat the request in their errors: nothing of it may reach a log.
            return int(status), _error(f"Scripted failure for: {asked.text}", None)


def _error(message: str, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "scripted_error", "param": None, "code": code}}


def _completion(
    asked: Asked, content: str | None, *, finish: str = "stop", refusal: str | None = None
) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": refusal}
    if (tools := asked.body.get("tools")) and content:
        call = {"name": tools[0]["function"]["name"], "arguments": content}
        message["content"] = None
        message["tool_calls"] = [{"id": f"call_{asked.call}", "type": "function", "function": call}]
        finish = "tool_calls" if finish == "stop" else finish
    size_in = sum(len(str(m.get("content"))) for m in asked.body["messages"]) // 4 + 1
    size_out = len(content or "") // 4 + 1
    return {
        "id": f"chatcmpl-{asked.call}",
        "object": "chat.completion",
        "created": 0,
        "model": asked.body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
        "usage": {
            "prompt_tokens": size_in,
            "completion_tokens": size_out,
            "total_tokens": size_in + size_out,
        },
    }


def answer_to(asked: Asked) -> str:
    """JSON that the requested schema accepts."""
    schema = _requested(asked.body)
    return json.dumps(_fill(schema, schema, asked.text, None))


def _with_bad_element(answer: str, at: int | None) -> str:
    whole = json.loads(answer)
    records = whole["records"]
    records[len(records) // 2 if at is None else at] = {"unexpected": 'nothing, "fits" ]}'}
    return json.dumps(whole)


def _requested(body: Mapping[str, Any]) -> Mapping[str, Any]:
    if tools := body.get("tools"):
        return tools[0]["function"]["parameters"]
    form = body.get("response_format") or {}
    if form.get("type") == "json_schema":
        return form["json_schema"]["schema"]
    # In json mode the schema stands in the instructions.
    return _schema_within(str(body["messages"][0]["content"]))


@lru_cache(maxsize=64)
def _schema_within(instructions: str) -> Mapping[str, Any]:
    decoder = json.JSONDecoder()
    for start in re.finditer(r"\{", instructions):
        try:
            found, _ = decoder.raw_decode(instructions, start.start())
        except ValueError:
            continue
        if isinstance(found, dict) and ("properties" in found or "$ref" in found):
            return found
    return {"type": "object"}


def _fill(schema: Mapping[str, Any], root: Mapping[str, Any], text: str, name: str | None) -> Any:
    """A value of this schema; `name` is the field's, for what can be read from the text."""
    if "$ref" in schema:
        target: Any = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        return _fill(target, root, text, name)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    for union in ("anyOf", "oneOf", "allOf"):
        if union in schema:
            # A type that refers to itself ends where it may.
            plain = [option for option in schema[union] if "$ref" not in option]
            return _fill((plain or schema[union])[0], root, text, name)
    return _fill_type(schema, root, text, name)


def _fill_type(
    schema: Mapping[str, Any], root: Mapping[str, Any], text: str, name: str | None
) -> Any:
    found = _PERSON.search(text)
    match schema.get("type"):
        case "object":
            fields = schema.get("properties", {})
            return {key: _fill(value, root, text, key) for key, value in fields.items()}
        case "array":
            items = schema.get("items", {"type": "string"})
            parts = [m.group() for m in _PERSON.finditer(text)] if name == "records" else []
            least = max(1, schema.get("minItems", 1)) if name != "records" else 0
            return [_fill(items, root, part, None) for part in parts or [text] * least]
        case "integer":
            return int(found.group(2)) if found else schema.get("minimum", 0)
        case "number":
            return float(found.group(2)) if found else schema.get("minimum", 0.0)
        case "boolean":
            return True
        case "null":
            return None
        case _:
            return _fill_string(schema, found.group(1) if found else text.split("[[")[0][:40])


def _fill_string(schema: Mapping[str, Any], read: str) -> str:
    made_up = {
        "date": "2024-02-29",
        "date-time": "2024-02-29T12:00:00Z",
        "time": "12:00:00Z",
        "uuid": "12345678-1234-4234-8234-123456789abc",
        "email": "ada@example.org",
        "uri": "https://example.org/",
    }
    value = made_up.get(schema.get("format", ""), read.strip() or "something")
    return value[: schema.get("maxLength", len(value))].ljust(schema.get("minLength", 0), "x")


async def _serve(endpoint: Endpoint) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    async with endpoint:
        print(endpoint.port, flush=True)
        await stop.wait()


def _arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.support.endpoint", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one and prints it")
    parser.add_argument("--model", action="append", help="a model that /v1/models names")
    parser.add_argument("--api-key", default=None, help="any other key gets 401")
    parser.add_argument("--latency-median-ms", type=float, default=0.0)
    parser.add_argument("--latency-sigma", type=float, default=0.0)
    parser.add_argument("--latency-max-ms", type=float, default=math.inf)
    parser.add_argument("--journal", type=Path, default=None, help="a file: a line for each call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="keep requests and spans in memory")
    return parser.parse_args(words)


def main(words: list[str]) -> None:
    """Serve until SIGTERM or SIGINT; the first line printed is the port."""
    given = _arguments(words)
    endpoint = Endpoint(
        journal=given.journal,
        latency=Latency(
            given.latency_median_ms / 1000,
            given.latency_sigma,
            given.seed,
            given.latency_max_ms / 1000,
        ),
        models=tuple(given.model or (MODEL,)),
        api_key=given.api_key,
        record=given.record,
        port=given.port,
    )
    asyncio.run(_serve(endpoint))


if __name__ == "__main__":
    main(sys.argv[1:])

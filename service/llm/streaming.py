"""A list of records, read while the model writes it.

instructor's iterable mode would do, were it not that at each chunk it looks at the unfinished
element from its beginning again, that it takes the first bracket of any text for the list's, and
that an element which does not validate ends everything with nobody knowing what the answer cost.
Here each character is looked at once; an element ends where a comma or the list's closing bracket
stands, and whether it is one is for pydantic to say. An element that does not validate stops the
publishing, not the reading: the answer is paid for anyway, and only its end says what it cost and
lets the model be told all that is wrong with it.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import httpx2
import openai
from instructor.v2.core.errors import ResponseParsingError
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic_core import to_json

from service.core.messages import Extracted, Part, Provenance, Record
from service.llm.answers import BrokenAnswer, Completion, Mode, read_completion
from service.llm.records import RecordType, new_answer_id
from service.streams import Publish

T = TypeVar("T")

IDLE_MAX_S = 30.0
"""Between two pieces of an answer that has begun: a model that writes does so many times a second.
Before the first piece, where models may think, the call's own time is the only limit."""

_STRUCTURE = re.compile(r'["\[\]{},]')
_IN_STRING = re.compile(r'["\\]')
_BEFORE_LIST = re.compile(r'\s*"records"\s*:\s*')
_LIST_DEPTH = 2
"""The list stands in the answer's object."""
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1, ",": 0}


class BrokenStream(Exception):
    """What came was no chat completion; `error` is the provider's own, where it sent one."""

    def __init__(self, response: httpx2.Response, error: object = None) -> None:
        super().__init__("no chat completion")
        self.response, self.error = response, error


class Elements:
    """Where the elements of `{"records": […]}` end, in a text that is still growing.

    It tells strings, brackets and commas apart and takes the rest on trust. Each character is
    looked at once, however small the pieces.
    """

    __slots__ = ("_depth", "_in_list", "_in_string", "_overhang", "_pieces", "ended")

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._in_list = False
        self._overhang = 0  # characters of the next piece that belong to a backslash
        self._pieces: list[str] = []  # since the last mark that counted
        self.ended = False  # the list is closed

    def feed(self, piece: str) -> Iterator[tuple[str, bool]]:
        """The elements that end in this piece, and of each whether it is the list's last."""
        begin, at = 0, self._overhang
        while not self.ended:
            found = (_IN_STRING if self._in_string else _STRUCTURE).search(piece, at)
            if found is None:
                break
            at = found.end()
            match found.group():
                case "\\":
                    at += 1
                case '"':
                    self._in_string = not self._in_string
                case mark if self._counts(mark):
                    text = "".join((*self._pieces, piece[begin : found.start()]))
                    self._pieces.clear()
                    begin = at
                    yield from self._before(mark, text)
        self._pieces.append(piece[begin:])
        self._overhang = max(0, at - len(piece))

    def _counts(self, mark: str) -> bool:
        """Whether the text before it stands for itself: not within an element."""
        depth, self._depth = self._depth, self._depth + _STEPS[mark]
        if not self._in_list:
            return True
        return depth == _LIST_DEPTH and mark in ",]}"

    def _before(self, mark: str, text: str) -> Iterator[tuple[str, bool]]:
        """What a text is: an element, or what stands before the list."""
        if not self._in_list:
            opens = mark == "[" and self._depth == _LIST_DEPTH
            self._in_list = opens and _BEFORE_LIST.fullmatch(text) is not None
            return
        self.ended = mark != ","
        # Behind the last comma stands an element; an empty list has neither.
        if mark == "," or (mark == "]" and text.strip()):
            yield text, self.ended


class StreamedAnswer:
    """One answer: its records go out one by one, but for the last, which waits for its end."""

    def __init__(
        self,
        record_type: RecordType,
        outline: type[BaseModel],
        publish: Publish,
        provenance: Provenance,
    ) -> None:
        self._record_type, self._outline = record_type, outline
        self._publish, self._provenance = publish, provenance
        self._elements = Elements()
        self._last: Record | None = None
        self._failure: Exception | None = None
        self._id = new_answer_id()
        self._out = 0  # records handed over

    async def hear(self, piece: str) -> None:
        """Publish what is complete now, up to the first element that does not validate."""
        if self._failure is not None:
            return
        for text, last in self._elements.feed(piece):
            try:
                record = self._record_type.element(text)
            # The user's validators and serializers too: what it means is said at the end.
            except Exception as error:
                self._failure = error
                return
            if last:
                self._last = record
                return
            await self._publish(Part(record, self._out, self._id, self._provenance))
            self._out += 1

    def ended(self, text: str, spent: Provenance) -> Extracted:
        """The records that have not gone out, of an answer that has ended.

        Raises what validation raises: for the whole answer, so that all of it can be mended.
        """
        return Extracted(self._rest(text), spent, self._id, earlier=self._out)

    def _rest(self, text: str) -> tuple[Record, ...]:
        if isinstance(self._failure, ValidationError):
            self._record_type.answer.model_validate_json(text, strict=True)
        if self._failure is not None:
            raise self._failure
        rest = () if self._last is None else (self._last,)
        outline: Any = self._outline.model_validate_json(text, strict=True)
        if len(outline.records) != self._out + len(rest):
            raise ResponseParsingError("records is there more than once", mode="JSON")
        return rest


class Streaming:
    """How calls are made whose answers are read while they are written."""

    def __init__(self, record_type: RecordType, mode: Mode, call_timeout_s: float) -> None:
        self._record_type, self._mode = record_type, mode
        self._call_timeout_s = call_timeout_s
        self._outline = _outline(record_type.answer)

    async def ask(
        self, client: openai.AsyncOpenAI, body: bytes, publish: Publish, provenance: Provenance
    ) -> Completion:
        """One call; its records go out while it runs, and `streamed` knows which have not.

        Raises what the SDK and its transport raise, `BrokenStream`, `TimeoutError` (after the
        call's time without the waits for Kafka, or when a begun answer stands still), and what
        `publish` raises. Its end, of whatever kind, ends the request.
        """
        answer = StreamedAnswer(self._record_type, self._outline, publish, provenance)
        clock = _Clock(self._call_timeout_s)
        stream = await clock.wait_for(
            client.post(
                "/chat/completions",
                cast_to=object,
                content=body,
                stream=True,
                stream_cls=openai.AsyncStream[object],
            )
        )
        async with stream:
            try:
                return await self._read(stream, answer, clock)
            except (openai.APIError, BrokenAnswer) as error:
                said = error.body if isinstance(error, openai.APIError) else error.error
                raise BrokenStream(stream.response, said) from None

    async def _read(
        self, stream: openai.AsyncStream[object], answer: StreamedAnswer, clock: _Clock
    ) -> Completion:
        if not _is_stream(stream.response):
            whole = read_completion(await clock.wait_for(stream.response.aread()), self._mode)
            await answer.hear(whole.text or "")
            return replace(whole, streamed=answer)
        gathered = _Gathered(self._mode)
        idle_s = math.inf
        while (chunk := await clock.wait_for(_next(stream), idle_s)) is not None:
            if piece := gathered.add(chunk):
                idle_s = IDLE_MAX_S
                await answer.hear(piece)
        # A connection that was closed too early can look like an end, and like a whole answer.
        if gathered.finish_reason is None:
            raise BrokenAnswer
        return replace(gathered.completion(), streamed=answer)


async def _next(stream: openai.AsyncStream[object]) -> object:
    """The next chunk; None behind the last one."""
    try:
        return await anext(stream, None)
    except ValueError:  # it is no JSON
        raise BrokenAnswer from None


class _Clock:
    """What is left of a call's time; it stands still while nobody waits for the model."""

    def __init__(self, left_s: float) -> None:
        self._left_s = left_s

    async def wait_for(self, work: Awaitable[T], at_most_s: float = math.inf) -> T:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            async with asyncio.timeout(min(self._left_s, at_most_s)):
                return await work
        finally:
            self._left_s -= loop.time() - began_s


class _Gathered:
    """A message, put together from what each chunk adds to it."""

    def __init__(self, mode: Mode) -> None:
        self._mode: Mode = mode
        self._content: list[str] = []
        self._refusal: list[str] = []
        self._arguments: list[str] = []
        self._call: dict[str, object] = {}
        self._name: object = None
        self._usage: object = None
        self.finish_reason: object = None

    def add(self, chunk: object) -> str:
        """What it adds to the JSON that we asked for. Raises `BrokenAnswer`."""
        if not isinstance(chunk, Mapping):
            raise BrokenAnswer
        self._usage = chunk.get("usage") or self._usage
        match chunk.get("choices"):
            case [{"delta": dict(delta)} as choice, *_]:
                self.finish_reason = choice.get("finish_reason") or self.finish_reason
                return self._said(delta)
            case _:
                return ""

    def _said(self, delta: dict[str, Any]) -> str:
        content = _extend(self._content, delta.get("content"))
        _extend(self._refusal, delta.get("refusal"))
        arguments = ""
        match delta.get("tool_calls"):
            case [{"function": dict(function)} as call, *_] if not call.get("index"):
                self._call.update({key: call[key] for key in ("id", "type") if call.get(key)})
                self._name = function.get("name") or self._name
                arguments = _extend(self._arguments, function.get("arguments"))
        return arguments if self._mode == "tools" else content

    def completion(self) -> Completion:
        message: dict[str, object] = {
            "role": "assistant",
            "content": "".join(self._content) or None,
            "refusal": "".join(self._refusal) or None,
        }
        if self._arguments:
            function = {"name": self._name, "arguments": "".join(self._arguments)}
            message["tool_calls"] = [{"type": "function", **self._call, "function": function}]
        choice = {"message": message, "finish_reason": self.finish_reason}
        try:
            body = to_json({"choices": [choice], "usage": self._usage})
        except ValueError:  # half a character
            raise BrokenAnswer from None
        return read_completion(body, self._mode)


def _extend(pieces: list[str], piece: object) -> str:
    if not isinstance(piece, str):
        return ""
    pieces.append(piece)
    return piece


def _is_stream(response: httpx2.Response) -> bool:
    """Some endpoints know nothing of streams and answer as ever."""
    return "json" not in response.headers.get("content-type", "")


def _outline(answer: type[BaseModel]) -> type[BaseModel]:
    """The answer without its elements, which were looked at one by one."""
    made: type[BaseModel] = create_model(
        f"{answer.__name__}Outline",
        __config__=ConfigDict(extra=answer.model_config.get("extra")),
        records=(list[Any], ...),
    )
    return made

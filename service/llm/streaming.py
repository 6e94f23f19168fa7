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
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import httpx2
from instructor.v2.core.errors import ResponseParsingError
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic_core import from_json, to_json

from service.core.messages import Extracted, Part, Provenance, Record
from service.llm.answer_text import TWO_OBJECTS, AnswerText, Mode, beginning_of, content_of
from service.llm.answers import BrokenAnswer, Completion, read_completion, with_headers
from service.llm.bounded import TooLarge, lines
from service.llm.lean import LeanPost
from service.llm.records import RecordType, new_answer_id
from service.ports import Publish

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
        self._opening = Opening()
        self._elements = Elements()
        self._last: Record | None = None
        self._failure: Exception | None = None
        self._id = new_answer_id()
        self._out = 0  # records handed over

    async def hear(self, piece: str) -> None:
        """Publish what is complete now, up to the first element that does not validate."""
        if self._failure is not None:
            return
        for text, last in self._elements.feed(self._opening.feed(piece)):
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

    def ended(self, answer: AnswerText, spent: Provenance) -> Extracted:
        """The records that have not gone out, of an answer that has ended.

        Raises what validation raises: for the whole answer, so that all of it can be mended. An
        answer that turns out to be another object than the one whose records went out is none:
        their set is never completed.
        """
        if answer.problem is not None:
            raise ResponseParsingError(answer.problem, mode="JSON")
        if self._heard(answer):
            rest = self._rest(answer.texts[0])
            later = answer.texts[1:]
        elif self._out:
            raise ResponseParsingError(TWO_OBJECTS, mode="JSON")
        else:
            rest, later = (), answer.texts
        more = [
            record
            for text in later
            for record in self._record_type.records(self._record_type.answer_of(text))
        ]
        return Extracted((*rest, *more), spent, self._id, earlier=self._out)

    def _heard(self, answer: AnswerText) -> bool:
        """Whether the first object is the one that was read while it was written."""
        return bool(answer.texts) and self._opening.start == answer.start

    def _rest(self, text: str) -> tuple[Record, ...]:
        if isinstance(self._failure, ValidationError):
            self._record_type.answer_of(text)
        if self._failure is not None:
            raise self._failure
        rest = () if self._last is None else (self._last,)
        outline: Any = self._outline.model_validate_json(text, strict=True)
        if len(outline.records) != self._out + len(rest):
            raise ResponseParsingError("records is there more than once", mode="JSON")
        return rest


class Opening:
    """Passes over what stands before the answer's object, in a text that is still growing.

    It looks again only when the text has grown by a twentieth, so that long thoughts before an
    answer cost little. Whether it was the right object is compared at the end, when the whole text
    has been read.
    """

    __slots__ = ("_before", "_chars", "_next_look", "start")

    def __init__(self) -> None:
        self._before: list[str] = []
        self._chars = self._next_look = 0
        self.start: int | None = None
        """Where the object begins; None as long as it does not."""

    def feed(self, piece: str) -> str:
        """The part of the piece that belongs to the object, or stands behind it."""
        if self.start is not None:
            return piece
        self._before.append(piece)
        self._chars += len(piece)
        if self._chars < self._next_look:
            return ""
        self._next_look = self._chars + self._chars // 20
        text = "".join(self._before)
        self.start = beginning_of(text)
        return "" if self.start is None else text[self.start :]


class Streaming:
    """How calls are made whose answers are read while they are written."""

    def __init__(self, record_type: RecordType, call_timeout_s: float, max_bytes: int) -> None:
        self._record_type = record_type
        self._call_timeout_s, self._max_bytes = call_timeout_s, max_bytes
        self._outline = _outline(record_type.answer)

    async def ask(
        self,
        lean: LeanPost,
        body: bytes,
        mode: Mode,
        publish: Publish,
        provenance: Provenance,
    ) -> Completion:
        """One call; its records go out while it runs, and `streamed` knows which have not.

        Raises what `LeanPost.stream` raises, `BrokenStream`, `TooLarge`, `Undecodable`,
        `TimeoutError` (after the call's time without the waits for Kafka, or when a begun answer
        stands still), and what `publish` raises. Its end, of whatever kind, ends the request.
        """
        answer = StreamedAnswer(self._record_type, self._outline, publish, provenance)
        clock = _Clock(self._call_timeout_s)
        async with AsyncExitStack() as stack:
            response = await clock.wait_for(stack.enter_async_context(lean.stream(body)))
            try:
                return with_headers(
                    await self._read(response, mode, answer, clock), response.headers
                )
            except BrokenAnswer as error:
                raise BrokenStream(response, error.error) from None

    async def _read(
        self, response: httpx2.Response, mode: Mode, answer: StreamedAnswer, clock: _Clock
    ) -> Completion:
        encoding = response.headers.get("content-encoding", "")
        async with (
            aclosing(_raw(response)) as raw,
            aclosing(lines(raw, encoding, self._max_bytes)) as received,
        ):
            if not _is_stream(response):
                whole = await self._whole(received, mode, clock)
                return replace(whole, streamed=answer)
            async with aclosing(_events(received)) as events:
                gathered = await self._gathered(events, mode, answer, clock)
        return replace(gathered.completion(), streamed=answer)

    async def _gathered(
        self, events: AsyncIterator[object], mode: Mode, answer: StreamedAnswer, clock: _Clock
    ) -> _Gathered:
        gathered = _Gathered(mode, self._max_bytes)
        idle_s = math.inf
        while (chunk := await clock.wait_for(anext(events, None), idle_s)) is not None:
            if piece := gathered.add(chunk):
                idle_s = IDLE_MAX_S
                await answer.hear(piece)
        return gathered

    async def _whole(self, received: AsyncIterator[bytes], mode: Mode, clock: _Clock) -> Completion:
        """An answer that came at once: its records go out at its end."""
        body = bytearray()
        while (line := await clock.wait_for(anext(received, None))) is not None:
            body += line + b"\n"
            if len(body) > self._max_bytes + 1:
                raise TooLarge
        return read_completion(bytes(body), mode, many=True)


async def _raw(response: httpx2.Response) -> AsyncGenerator[bytes, None]:
    async for chunk in response.aiter_raw():
        yield chunk


async def _events(received: AsyncIterator[bytes]) -> AsyncGenerator[object, None]:
    """The JSON of each event, up to the one that says that it was the last. Raises
    `BrokenAnswer`."""
    pieces: list[bytes] = []
    async for line in received:
        if line.startswith(b"data:"):
            pieces.append(line[5:].removeprefix(b" "))
            continue
        if line or not pieces:  # a comment, a name, or nothing to end
            continue
        event, pieces = b"\n".join(pieces), []
        if event.startswith(b"[DONE]"):
            return
        yield _json(event)
    if pieces and not pieces[0].startswith(b"[DONE]"):
        yield _json(b"\n".join(pieces))


def _json(event: bytes) -> object:
    try:
        return from_json(event, allow_inf_nan=False)
    except ValueError:
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

    def __init__(self, mode: Mode, max_bytes: int) -> None:
        self._mode: Mode = mode
        self._max_chars = max_bytes
        self._chars = 0
        self._content: list[str] = []
        self._refusal: list[str] = []
        self._calls: list[_Call] = []
        self._parts = False
        self._thoughts = ""
        self._answered = False  # there was a choice
        self._usage: object = None
        self._tier: object = None
        self.finish_reason: object = None

    def add(self, chunk: object) -> str:
        """What it adds to the JSON that we asked for. Raises `BrokenAnswer`, `TooLarge`."""
        if not isinstance(chunk, Mapping):
            raise BrokenAnswer
        if error := chunk.get("error"):
            raise BrokenAnswer(error)
        self._usage = chunk.get("usage") or self._usage
        self._tier = chunk.get("service_tier") or self._tier
        match chunk.get("choices"):
            case [{"error": error}, *_] if error:
                raise BrokenAnswer(error)
            case [{"delta": dict(delta)} as choice, *_]:
                self._answered = True
                self.finish_reason = choice.get("finish_reason") or self.finish_reason
                return self._said(delta)
            case [{"finish_reason": str(reason)}, *_]:
                self._answered, self.finish_reason = True, reason
        return ""

    def _said(self, delta: dict[str, Any]) -> str:
        content, odd = content_of(delta)
        self._parts = self._parts or bool(odd)
        self._extend(self._content, content)
        self._extend(self._refusal, delta.get("refusal"))
        self._thoughts = delta.get("reasoning_content") or delta.get("reasoning") or self._thoughts
        arguments = ""
        calls = delta.get("tool_calls")
        for place, call in enumerate(calls if isinstance(calls, list) else ()):
            if isinstance(call, dict):
                arguments += self._called(place, call)
        match delta.get("function_call"):
            case dict(function):
                arguments += self._called(0, {"function": function})
        return arguments if self._mode == "tools" else content

    def _called(self, place: int, call: Mapping[str, Any]) -> str:
        """What it adds to the first call's arguments."""
        match call.get("function"):
            case dict(function):
                kept = self._call_of(call.get("index", place), call.get("id"))
                kept.known |= {key: call[key] for key in ("id", "type") if call.get(key)}
                kept.name = function.get("name") or kept.name
                arguments = function.get("arguments")
                if isinstance(arguments, dict):
                    arguments = to_json(arguments).decode()
                self._extend(kept.arguments, arguments)
                return arguments if kept is self._calls[0] and isinstance(arguments, str) else ""
        return ""

    def _call_of(self, index: object, call_id: object) -> _Call:
        """The call that a piece belongs to; some providers give all calls the same index."""
        for call in reversed(self._calls):
            if call.index == index and call_id in (None, "", call.known.get("id", call_id)):
                return call
        self._calls.append(_Call(index))
        return self._calls[-1]

    def _extend(self, pieces: list[str], piece: object) -> None:
        if isinstance(piece, str) and piece:
            pieces.append(piece)
            self._chars += len(piece)
        if self._chars > self._max_chars:
            raise TooLarge

    def completion(self) -> Completion:
        # A connection that was closed too early can look like an end, and like a whole answer.
        if self._answered and self.finish_reason is None:
            raise BrokenAnswer
        message: dict[str, object] = {
            "role": "assistant",
            "content": "".join(self._content) or None,
            "refusal": "".join(self._refusal) or None,
        }
        if self._parts:
            message["content"] = [{"type": "text", "text": message["content"] or ""}]
        if self._thoughts:
            message["reasoning_content"] = self._thoughts
        if self._calls:
            message["tool_calls"] = [call.said for call in self._calls]
        choice = {"message": message, "finish_reason": self.finish_reason}
        choices = [choice] if self._answered else []
        try:
            body = to_json({"choices": choices, "usage": self._usage, "service_tier": self._tier})
        except ValueError:  # half a character
            raise BrokenAnswer from None
        return read_completion(body, self._mode, many=True)


@dataclass(eq=False, slots=True)
class _Call:
    """One call of the tool, as far as it was told."""

    index: object
    known: dict[str, object] = field(default_factory=dict)
    name: object = None
    arguments: list[str] = field(default_factory=list)

    @property
    def said(self) -> dict[str, object]:
        function = {"name": self.name, "arguments": "".join(self.arguments)}
        return {"type": "function", **self.known, "function": function}


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

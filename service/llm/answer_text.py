"""Where the JSON stands in an answer's message: read generously, since validation is strict.

What is passed over: a byte order mark, thoughts before the answer, a code fence, prose around it,
content that comes as a list of parts, and a call of the tool where content was asked for, or the
other way round. What is never done: choose. Two objects where one was asked for are no answer.

Rules of this file: pure; one pass over the text, however hostile it is. No JSON is parsed here: an
object ends at the brace that closes it, and whether it is one is for pydantic to say. An object
within a broken one is therefore never taken for the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic_core import to_json

from service.core.events import Repair

Mode = Literal["tools", "json_schema", "json"]

NO_CALL = "No tool calls or function call found in response"
"""As instructor words it to the model."""
TWO_OBJECTS = "The answer holds more than one JSON object; give exactly one"
TWO_CALLS = "The answer calls the tool more than once; call it exactly once"

_BOM = "\ufeff"
_THOUGHTS = re.compile(
    r"\s*<(think|thinking|thought|thoughts|reasoning)>.*?</\1>", re.DOTALL | re.IGNORECASE
)
_UNFINISHED_THOUGHTS = re.compile(
    r"\s*<(?:think|thinking|thought|thoughts|reasoning)>", re.IGNORECASE
)
_CHANNELS = ("<|channel|>", "<|start|>")
_FINAL_CHANNEL = re.compile(r"<\|channel\|>\s*final\b[^{]{0,40}?<\|message\|>")
"""gpt-oss writes its thoughts into other channels; servers without a parser for it hand all on."""
_TOP = re.compile(r'\{(?=\s*["}])|</(?:think|thinking|thought|thoughts|reasoning)>', re.IGNORECASE)
"""What counts outside of objects: the beginning of one, and the end of thoughts whose beginning
stood in the prompt."""
_INSIDE = re.compile(r'["{}]')
_STRING_END = re.compile(r'[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_FENCE = re.compile(r"```\w*\s*\Z")


@dataclass(frozen=True, slots=True)
class AnswerText:
    """The JSON objects that stand for the answer: one, or with cardinality many one a call.

    `problem` says to the model why there is none. `shown` is what a dead letter shows. `start` is
    where in the content (or in the first call's arguments) the object begins.
    """

    texts: tuple[str, ...] = field(default=(), repr=False)
    repairs: tuple[Repair, ...] = ()
    problem: str | None = None
    shown: str | None = field(default=None, repr=False)
    start: int = 0


def read_message(message: Mapping[str, Any], mode: Mode, *, many: bool) -> AnswerText:
    """What of a chat completion's message is the answer."""
    content, parts = content_of(message)
    calls = list(_calls(message))
    if mode == "tools" and not calls:
        found = _one_object(content)
        if found is None:
            return AnswerText(problem=NO_CALL, shown=content or None)
        return _with(found, "content", *parts)
    if mode == "tools" or (not content.strip() and calls):
        return _in_calls(calls, mode, many=many)
    found = _in_text(content)
    return _with(found, *parts)


def content_of(message: Mapping[str, Any]) -> tuple[str, tuple[Repair, ...]]:
    """The message's text; its text parts joined where it is a list."""
    content = message.get("content")
    match content:
        case str():
            return content, ()
        case list():
            return "".join(_part(part) for part in content), ("parts",)
        case dict():  # some servers parse what they were asked to be JSON
            return to_json(content).decode(), ("object",)
        case _:
            return "", ()


def _part(part: object) -> str:
    match part:
        case str(text):
            return text
        case {"type": "text" | "output_text", "text": str(text)}:
            return text
        case _:
            return ""


def _calls(message: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Repair, ...]]]:
    """The arguments of each call, and what was odd about it."""
    called = message.get("tool_calls")
    for call in called if isinstance(called, list) else ():
        match call:
            case {"function": {"arguments": str(arguments)}}:
                yield arguments, ()
            case {"function": {"arguments": dict(arguments)}}:
                yield to_json(arguments).decode(), ("object",)
    if called:
        return
    match message.get("function_call"):
        case {"arguments": str(arguments)}:
            yield arguments, ("tool_call",)
        case {"arguments": dict(arguments)}:
            yield to_json(arguments).decode(), ("tool_call", "object")


def _in_calls(calls: list[tuple[str, tuple[Repair, ...]]], mode: Mode, *, many: bool) -> AnswerText:
    shown = "\n".join(arguments for arguments, _ in calls)
    if len(calls) > 1 and not many:
        return AnswerText(problem=TWO_CALLS, shown=shown)
    found = [_with(_in_text(arguments), *odd) for arguments, odd in calls]
    repairs: list[Repair] = [how for one in found for how in one.repairs]
    if mode != "tools" and "tool_call" not in repairs:
        repairs.append("tool_call")
    if len(calls) > 1:
        repairs.append("calls")
    return AnswerText(
        texts=tuple(text for one in found for text in one.texts),
        repairs=tuple(dict.fromkeys(repairs)),
        problem=next((one.problem for one in found if one.problem), None),
        shown=shown,
        start=found[0].start,
    )


def _with(found: AnswerText, *repairs: Repair) -> AnswerText:
    if not repairs:
        return found
    together = tuple(dict.fromkeys((*repairs, *found.repairs)))
    return AnswerText(found.texts, together, found.problem, found.shown, found.start)


def _in_text(text: str) -> AnswerText:
    """The one object in it. A text that holds none is handed on whole: pydantic says what is
    wrong with it."""
    return _one_object(text) or AnswerText((text,), shown=text)


def _one_object(text: str) -> AnswerText | None:
    bare = text.strip()
    if bare[:1] == "{" and bare[-1:] == "}":
        return AnswerText((bare,), shown=text, start=len(text) - len(text.lstrip()))
    repairs: list[Repair] = []
    at = len(text) - len(text.lstrip())
    if text.startswith(_BOM, at):
        repairs.append("bom")
        at += 1
    if (after := _after_thoughts(text, at)) != at:
        repairs.append("thoughts")
        at = after
    objects, thought = _objects(text, at)
    if thought and "thoughts" not in repairs:
        repairs.append("thoughts")
    match objects:
        case []:
            return None
        case [(start, end)]:
            before = text[max(at, thought) : start].strip()
            if before[-1:] == "[":  # a part of a list, which is not what was asked for
                return None
            if before or text[end:].strip():
                repairs.append("fence" if _FENCE.search(before) else "prose")
            return AnswerText((text[start:end],), tuple(repairs), shown=text, start=start)
        case _:
            return AnswerText(problem=TWO_OBJECTS, shown=text)


def beginning_of(text: str) -> int | None:
    """Where the answer's object begins in a text that may still grow; None where none does yet."""
    at = len(text) - len(text.lstrip())
    at = _after_thoughts(text, at + text.startswith(_BOM, at))
    found = _TOP.search(text, at)
    return found.start() if found and found.group() == "{" else None


def _after_thoughts(text: str, at: int) -> int:
    """Behind the thoughts that the text begins with; its end where they never end."""
    if text.startswith(_CHANNELS, at):
        return max((final.end() for final in _FINAL_CHANNEL.finditer(text, at)), default=len(text))
    while found := _THOUGHTS.match(text, at):
        at = found.end()
    return len(text) if _UNFINISHED_THOUGHTS.match(text, at) else at


def _objects(text: str, at: int) -> tuple[list[tuple[int, int]], int]:
    """Where the objects of the outermost level begin and end, and where thoughts ended whose
    beginning was not written: what those drafted does not count.

    An object that never ends goes to the end of the text: pydantic says what it lacks.
    """
    objects: list[tuple[int, int]] = []
    thought = 0
    while found := _TOP.search(text, at):
        if found.group() == "{":
            at = _end_of(text, found.start())
            objects.append((found.start(), at))
        else:
            at = thought = found.end()
            objects = []
    return objects, thought


def _end_of(text: str, start: int) -> int:
    """Behind the brace that closes the one at `start`."""
    depth, at = 0, start
    while found := _INSIDE.search(text, at):
        at = found.end()
        match found.group():
            case '"':
                string = _STRING_END.match(text, at)
                if string is None:
                    break
                at = string.end()
            case "{":
                depth += 1
            case _:
                depth -= 1
                if not depth:
                    return at
    return len(text)

"""A chat completion's body, read as far as we need it.

Rules of this file: pure; an answer comes from outside, so every field may be missing or of
another type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic_core import from_json, to_json

from service.llm.prices import Tokens

if TYPE_CHECKING:
    from service.llm.streaming import StreamedAnswer

Mode = Literal["tools", "json_schema", "json"]


class BrokenAnswer(Exception):
    """The body is no chat completion; `error` holds the provider's error if that is what it is."""

    def __init__(self, error: object = None) -> None:
        super().__init__("no chat completion")
        self.error = error


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer. `text` is the JSON that we asked for, None where it was not given.

    `said` is the answer's message as it came.
    """

    said: Mapping[str, Any] = field(repr=False)
    text: str | None = field(repr=False)
    refusal: str | None = field(repr=False)
    finish_reason: str | None
    tokens: Tokens
    streamed: StreamedAnswer | None = None
    """Where it was read while it was written: what has become of its records."""

    @property
    def message(self) -> Mapping[str, Any]:
        """The message as it can be said again in a re-ask: with a role, and without calls that
        could not be referred to."""
        calls = self.said.get("tool_calls") or ()
        kept = {key: value for key, value in self.said.items() if key != "tool_calls"}
        if calls and all(map(_is_call, calls)):
            kept["tool_calls"] = calls
        return {**kept, "role": "assistant"}


def read_completion(body: bytes, mode: Mode) -> Completion:
    """Reads the first choice. Raises `BrokenAnswer`."""
    try:
        completion = from_json(body, allow_inf_nan=False)
    except ValueError:
        raise BrokenAnswer from None
    match completion:
        case {"choices": [{"message": dict(message)} as choice, *_]}:
            usage = completion.get("usage")
        case {"error": error} if error:
            raise BrokenAnswer(error)
        case _:
            raise BrokenAnswer
    return Completion(
        said=message,
        text=_arguments(message) if mode == "tools" else _content(message),
        refusal=_text_or_none(message.get("refusal")),
        finish_reason=_text_or_none(choice.get("finish_reason")),
        tokens=read_usage(usage),
    )


def _content(message: Mapping[str, Any]) -> str:
    return _text_or_none(message.get("content")) or ""


def _arguments(message: Mapping[str, Any]) -> str | None:
    match message.get("tool_calls"):
        case [{"function": {"arguments": str(arguments)}}, *_]:
            return arguments
        case [{"function": {"arguments": dict(arguments)}}, *_]:
            return to_json(arguments).decode()  # some servers send the object itself
        case _:
            return None


def _is_call(call: object) -> bool:
    match call:
        case {"id": str(), "function": {"name": str(), "arguments": str()}}:
            return True
        case _:
            return False


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def read_usage(usage: object) -> Tokens:
    """Tokens by kind, however the endpoint says it.

    Most leave the tokens of reasoning within the completion's; where the total is larger than
    prompt and completion (xAI, Gemini), they stand beside them, and are charged as output.
    """
    if not isinstance(usage, dict):
        return Tokens()
    prompt, completion = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    beside = max(0, _count(usage, "total_tokens") - prompt - completion)
    told = _count(usage.get("completion_tokens_details"), "reasoning_tokens")
    cached = _count(usage.get("prompt_tokens_details"), "cached_tokens")
    return Tokens(
        input=prompt,
        output=completion + beside,
        # DeepSeek has its own name for it.
        cached=min(prompt, cached or _count(usage, "prompt_cache_hit_tokens")),
        reasoning=min(completion + beside, max(told, beside)),
    )


def _count(usage: object, name: str) -> int:
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and count > 0 else 0

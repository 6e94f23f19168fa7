"""A chat completion's body, read as far as we need it.

Rules of this file: pure; an answer comes from outside, so every field may be missing or of
another type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeAlias

from pydantic_core import from_json

from service.core.messages import Extracted, Provenance
from service.llm.answer_text import AnswerText, Mode, content_of, read_message
from service.llm.prices import Tokens, told_cost

Finish: TypeAlias = Literal["stop", "truncated", "filtered", "refused", "failed", "malformed"]
"""How an answer ended: by itself, at a limit, by a filter, declined, by a failure of the provider
that the next try may not meet, with a call of the tool that the provider could not read."""

TOKENS_MAX = 20_000_000
"""A count above it is none: no model has such a context, and sums with it may not be numbers."""

_FINISHES: Mapping[str, Finish] = {
    **dict.fromkeys(
        (
            *("length", "max_tokens", "max_output_tokens", "max_length", "model_length"),
            *("token_limit", "max_new_tokens", "context_window_exceeded", "incomplete"),
            *("model_context_window_exceeded", "context_length_exceeded"),
        ),
        "truncated",
    ),
    **dict.fromkeys(
        (
            *("content_filter", "content_filtered", "safety", "prohibited_content", "recitation"),
            *("blocklist", "spii", "sensitive", "guardrail_intervened", "guardrails", "blocked"),
            *("image_safety", "image_prohibited_content", "moderation", "prompt_blocked"),
            "model_armor",
        ),
        "filtered",
    ),
    "refusal": "refused",
    **dict.fromkeys(
        (
            *("error", "abort", "aborted", "load", "unload", "failed", "cancelled", "canceled"),
            *("insufficient_system_resource", "network_error", "server_error", "internal_error"),
            *("timeout", "engine_error", "model_error", "overloaded"),
        ),
        "failed",
    ),
    **dict.fromkeys(
        (
            *("malformed_function_call", "unexpected_tool_call", "malformed_response"),
            *("too_many_tool_calls", "malformed_tool_use", "malformed_model_output"),
        ),
        "malformed",
    ),
}
"""`finish_reason` in the words of providers; what is not here is an end like any other."""
_WORD = re.compile(r"[a-z][a-z_]*[a-z]")
_BLOCKED = frozenset({"prompt_feedback", "promptFeedback", "prompt_filter_results"})
"""Where a provider says why it gave no answer at all."""


_NOT_SAID_AGAIN = frozenset(
    {"tool_calls", "function_call", "reasoning", "reasoning_content", "reasoning_details"}
)
"""Of an answer's message: what endpoints refuse, or charge for, in a later request."""


class BrokenAnswer(Exception):
    """The body is no chat completion; `error` holds the provider's error if that is what it is."""

    def __init__(self, error: object = None) -> None:
        super().__init__("no chat completion")
        self.error = error


class StreamedRecords(Protocol):
    """The records of an answer that was read while it was written."""

    def ended(self, answer: AnswerText, spent: Provenance) -> Extracted:
        """Those that have not gone out yet; raises what validation raises."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer. `answer` is the JSON that we asked for. `said` is its message as it came."""

    said: Mapping[str, Any] = field(repr=False)
    answer: AnswerText
    refusal: str | None = field(repr=False)
    finish: Finish
    tokens: Tokens
    tier: str | None = None
    """The `service_tier` that has answered, where it says so."""
    told_usd: float | None = None
    """What the call has cost, where the endpoint says so."""
    streamed: StreamedRecords | None = None
    """Where it was read while it was written: what has become of its records."""

    @property
    def message(self) -> Mapping[str, Any]:
        """The message as it can be said again in a re-ask: with a role, its text as one string,
        without thoughts and without calls that could not be referred to."""
        calls = self.said.get("tool_calls") or ()
        kept = {key: value for key, value in self.said.items() if key not in _NOT_SAID_AGAIN}
        if isinstance(kept.get("content"), list | dict):
            kept["content"] = content_of(self.said)[0]
        if isinstance(calls, list) and calls and all(map(_is_call, calls)):
            kept["tool_calls"] = calls
        elif not kept.get("content"):
            kept["content"] = self.answer.shown or ""
        return {**kept, "role": "assistant"}

    @property
    def thought(self) -> bool:
        """Whether the model spent tokens on thoughts before its answer."""
        said = self.said
        if self.tokens.reasoning or said.get("reasoning_content") or said.get("reasoning"):
            return True
        return "<think" in content_of(said)[0][:64]


def read_completion(body: bytes, mode: Mode, *, many: bool) -> Completion:
    """Reads the first choice. Raises `BrokenAnswer`."""
    try:
        completion = from_json(body.removeprefix(b"\xef\xbb\xbf"), allow_inf_nan=False)
    except ValueError:
        raise BrokenAnswer from None
    match completion:
        case {"choices": [{"error": error}, *_]} if error:
            raise BrokenAnswer(error)
        case {"choices": [{"message": dict(message)} as choice, *_]}:
            finish = _finish(choice)
        case {"error": error} if error:
            raise BrokenAnswer(error)
        case dict() if _is_blocked(completion):
            message, finish = {}, "filtered"
        case dict() if isinstance(completion.get("base_resp"), dict):  # MiniMax
            raise BrokenAnswer(completion["base_resp"])
        case _:
            raise BrokenAnswer
    return Completion(
        said=message,
        answer=read_message(message, mode, many=many),
        refusal=_text_or_none(message.get("refusal")) or _refused_part(message.get("content")),
        finish=finish,
        tokens=read_usage(completion.get("usage")),
        tier=_text_or_none(completion.get("service_tier")),
        told_usd=_cost(completion.get("usage")),
    )


def _cost(usage: object) -> float | None:
    return told_cost(usage.get("cost")) if isinstance(usage, dict) else None


def with_headers(completion: Completion, headers: Mapping[str, str]) -> Completion:
    """The same, with the cost that a gateway tells beside it."""
    told_usd = told_cost(headers.get("x-litellm-response-cost"))
    return completion if told_usd is None else replace(completion, told_usd=told_usd)


def _finish(choice: Mapping[str, Any]) -> Finish:
    """ "content_filter: SAFETY" is one as well as "SAFETY"."""
    told = choice.get("finish_reason") or choice.get("native_finish_reason")
    words = _WORD.findall(told.lower()) if isinstance(told, str) else ()
    return next((_FINISHES[word] for word in words if word in _FINISHES), "stop")


def _is_blocked(completion: Mapping[str, Any]) -> bool:
    """A prompt that was read and not answered: a completion without choices."""
    if completion.get("choices"):
        return False
    if any(completion.get(key) for key in _BLOCKED):
        return True
    usage = completion.get("usage")
    return _count(usage, "prompt_tokens") > 0 and _count(usage, "completion_tokens") == 0


def _refused_part(content: object) -> str | None:
    for part in content if isinstance(content, list) else ():
        match part:
            case {"type": "refusal", "refusal": str(refusal)} if refusal:
                return refusal
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
    details = usage.get("prompt_tokens_details")
    # DeepSeek has its own name for it, and Anthropic's go through gateways.
    cached = _first_count(
        *((details, "cached_tokens"), (usage, "prompt_cache_hit_tokens")),
        (usage, "cache_read_input_tokens"),
    )
    written = _first_count(
        *((details, "cache_write_tokens"), (details, "cache_creation_tokens")),
        (usage, "cache_creation_input_tokens"),
    )
    return Tokens(
        input=prompt,
        output=completion + beside,
        cached=min(prompt, cached),
        reasoning=min(completion + beside, max(told, beside)),
        cache_write=min(prompt - min(prompt, cached), written),
    )


def _first_count(*places: tuple[object, str]) -> int:
    return next(filter(None, (_count(usage, name) for usage, name in places)), 0)


def _count(usage: object, name: str) -> int:
    count = usage.get(name) if isinstance(usage, dict) else None
    if isinstance(count, float) and count.is_integer():
        count = int(count)
    return count if isinstance(count, int) and 0 < count <= TOKENS_MAX else 0

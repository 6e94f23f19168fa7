"""What a failed call means: one table from statuses and error bodies to what is done about it.

Rules of this file: no texts of the provider in what is raised or logged (they can repeat the
request); they go into a verdict's `detail`, which only a dead letter shows.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Any, TypeAlias

from service.core.events import CallResult
from service.core.messages import Reason


@dataclass(frozen=True, slots=True)
class Transient:
    """Try again; `result` is the metric's label too."""

    result: CallResult
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Unserviceable:
    """No call can succeed until somebody does what `remedy` says."""

    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The provider does not take this very message."""

    reason: Reason
    result: CallResult
    detail: str = field(repr=False)


Failure: TypeAlias = Transient | Unserviceable | Refused


class FailureClass(StrEnum):
    """What is done about a failure."""

    TRANSIENT = "transient"  # wait and try again; a message that fails alone: `exhausted`
    MESSAGE = "this message"  # a dead letter
    SERVICE = "service"  # intake stops until somebody mends it and a probe succeeds


@dataclass(frozen=True, slots=True)
class Row:
    """A failure in words, its class, and its label: of `sluice_calls_total` and
    `sluice_retries_total` while it passes, of the dead letter where it is for good."""

    failure: str
    kind: FailureClass
    label: str


_T, _M, _S = FailureClass

TABLE: tuple[Row, ...] = (
    Row("no connection, or it is cut", _T, "connection"),
    Row("no answer within `call_timeout_s`, 408", _T, "timeout"),
    Row("429", _T, "rate_limited"),
    Row("503, 529, overloaded", _T, "overloaded"),
    Row("409, 425, other 5xx", _T, "server_error"),
    Row("200 without a completion", _T, "broken_answer"),
    Row("the answer does not validate, re-asks included", _M, "invalid"),
    Row("the model declines", _M, "refused"),
    Row("the provider's filter, on text or answer", _M, "filtered"),
    Row("the answer reaches `output_tokens_max`", _M, "truncated"),
    Row("over the model's context or `text_tokens_max`, 413", _M, "too_long"),
    Row("the text cannot be sent (half a character)", _M, "undecodable"),
    Row("400, 422 that names the input, or nothing", _M, "bad_request"),
    Row("the user's code raises", _M, "user_code"),
    Row("401", _S, "credentials"),
    Row("403", _S, "permission"),
    Row("402, quota used up (a 429 or 403 that says so)", _S, "quota"),
    Row("unknown model (404 or 400 that says so)", _S, "model"),
    Row("endpoint not found: 404, 405", _S, "endpoint"),
    Row("400, 422 that names a setting of ours", _S, "setting"),
    Row("any other 4xx", _S, "refused"),
)
"""Every failure of a call. docs/failures.md shows it, with the test of each row beside it."""

REMEDIES = {
    "credentials": "{url} refuses the credentials: set OPENAI_API_KEY to a key that it knows.",
    "permission": (
        "{url} forbids these calls: give the key of OPENAI_API_KEY access to the model {model!r}."
    ),
    "quota": "The account behind OPENAI_API_KEY has no quota left: add credit or raise it.",
    "model": "{url} has no model {model!r}: set extraction.model to one it has.",
    "endpoint": (
        "{url} answers {status} to chat completions: check OPENAI_BASE_URL (many endpoints want "
        "/v1 at its end) and extraction.model ({model!r})."
    ),
    "setting": "The model endpoint refuses a setting of ours: look at {setting}.",
    "refused": "{url} answers {status} to every call: check OPENAI_BASE_URL.",
}
"""What readiness and the start tell a person to do, by the label of a service failure."""

_QUOTA = frozenset(
    {
        "insufficient_quota",
        "billing_hard_limit_reached",
        "billing_not_active",
        "access_terminated",
    }
)
_NO_MODEL = frozenset({"model_not_found", "notfounderror", "invalid_model"})
_FILTERED = frozenset(
    {
        "content_filter",
        "content_policy_violation",
        "moderation_blocked",
        "responsibleaipolicyviolation",
    }
)
_TOO_LONG = re.compile(
    r"context.?(length|window|size)|maximum context|too many tokens|(prompt|input) is too long"
    r"|reduce the length|string_above_max_length",
    re.IGNORECASE,
)
"""How OpenAI, Azure, vLLM, llama.cpp and others word it: there is no common code."""
_SETTING_OF = {
    "model": "extraction.model",
    "response_format": "extraction.mode or the record type",
    "tools": "extraction.mode or the record type",
    "tool_choice": "extraction.mode",
    "temperature": "extraction.temperature",
    "max_tokens": "extraction.output_tokens_max",
    "max_completion_tokens": "extraction.output_tokens_max",
    "stream": "extraction.streaming",
    "stream_options": "extraction.streaming",
}
"""What we send that is the same for every message, by the provider's name for it."""


def from_status(
    status: int, headers: Mapping[str, str], error: object, *, model: str, base_url: str
) -> Failure:
    """What an answer with an error status means; `error` is its body's error, if it has one."""
    known = {"model": model, "url": base_url, "status": status}
    body = error if isinstance(error, Mapping) else {}
    words = {str(body.get("code")).lower(), str(body.get("type")).lower()} | _inner_codes(body)
    detail = f"{status}: {_text(error)}"
    match status:
        case _ if words & _FILTERED or _is_flagged(body):
            return Refused(Reason.FILTERED, "filtered", detail)
        case _ if status == 402 or words & _QUOTA:
            return _unserviceable("quota", known)
        case 408:
            return Transient("timeout", retry_after_s(headers))
        case 429:
            return Transient("rate_limited", retry_after_s(headers))
        case 503 | 529:
            return Transient("overloaded", retry_after_s(headers))
        case _ if status in (409, 425) or status >= 500:
            return Transient("server_error", retry_after_s(headers))
        case 400 | 413 | 422:
            return _about_the_message(status, body, words, detail, known)
        case 401:
            return _unserviceable("credentials", known)
        case 403:
            return _unserviceable("permission", known)
        case 404 if words & _NO_MODEL:
            return _unserviceable("model", known)
        case 404 | 405:
            return _unserviceable("endpoint", known)
        case _:
            return _unserviceable("refused", known)


def _about_the_message(
    status: int,
    body: Mapping[str, Any],
    words: set[str],
    detail: str,
    known: Mapping[str, object],
) -> Failure:
    if words & _NO_MODEL:
        return _unserviceable("model", known)
    if status == 413 or any(_TOO_LONG.search(word) for word in (*words, _text(body))):
        return Refused(Reason.TOO_LONG, "too_long", detail)
    # Else every message of a whole topic would be rejected for a setting of ours.
    if setting := _SETTING_OF.get(str(body.get("param")).split(".")[0].split("[")[0]):
        return _unserviceable("setting", {"setting": setting})
    return Refused(Reason.BAD_REQUEST, "bad_request", detail)


def _unserviceable(label: str, known: Mapping[str, object]) -> Unserviceable:
    return Unserviceable(label, REMEDIES[label].format_map(known))


def _inner_codes(body: Mapping[str, Any]) -> set[str]:
    """Azure names its filter one level deeper."""
    inner = body.get("innererror")
    return {str(inner.get("code")).lower()} if isinstance(inner, Mapping) else set()


def _is_flagged(body: Mapping[str, Any]) -> bool:
    """OpenRouter answers 403 to a text that its moderation flags."""
    metadata = body.get("metadata")
    return isinstance(metadata, Mapping) and "flagged_input" in metadata


def _text(error: object) -> str:
    if isinstance(error, Mapping):
        return str(error.get("message") or error)
    return str(error)


def retry_after_s(headers: Mapping[str, str], now_s: float | None = None) -> float | None:
    """Seconds that the provider asks us to wait: `retry-after-ms`, seconds, or an HTTP date.

    None where it asks for nothing, or for something that cannot be read or is in the past.
    """
    asked = _milliseconds(headers.get("retry-after-ms"))
    if asked is None:
        asked = _seconds_or_date(
            headers.get("retry-after"), time.time() if now_s is None else now_s
        )
    if asked is None or not 0 < asked < float("inf"):
        return None
    return asked


def _milliseconds(value: str | None) -> float | None:
    number = _number(value)
    return None if number is None else number / 1000


def _seconds_or_date(value: str | None, now_s: float) -> float | None:
    if (number := _number(value)) is not None or value is None:
        return number
    try:
        return parsedate_to_datetime(value).timestamp() - now_s
    except (ValueError, OverflowError):
        return None


def _number(value: str | None) -> float | None:
    try:
        return None if value is None else float(value)
    except ValueError:
        return None

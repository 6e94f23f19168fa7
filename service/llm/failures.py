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
from typing import TypeAlias, assert_never

from service.core.events import CallResult
from service.core.messages import Reason
from service.llm.shapes import Label, Said, meaning, read_error


@dataclass(frozen=True, slots=True)
class Transient:
    """Try again; `result` is the metric's label too."""

    result: CallResult
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Unserviceable:
    """No call can succeed until somebody does what `remedy` says.

    `unclear`: unless the refusal is this message's own, which only evidence can tell; then
    `detail` is what its dead letter says.
    """

    reason: str
    remedy: str
    unclear: bool = False
    detail: str = field(default="", repr=False)


FORM = "response_format"
"""The parameter that stands for the way in which the schema is asked for, whatever its name."""


@dataclass(frozen=True, slots=True)
class Unsupported:
    """The endpoint does not take this parameter, or the form of the question (`FORM`); `otherwise`,
    where we can't do without it."""

    parameter: str
    otherwise: Unserviceable


@dataclass(frozen=True, slots=True)
class Malformed:
    """The model answered, and what it wrote was no JSON or no call for the provider, which kept
    the answer: an answer that does not validate. `said` is the answer, where it is shown."""

    detail: str = field(repr=False)
    said: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Refused:
    """The provider does not take this very message."""

    reason: Reason
    result: CallResult
    detail: str = field(repr=False)


Failure: TypeAlias = Transient | Unserviceable | Unsupported | Malformed | Refused


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
    Row("429, or a limit of rate under another status", _T, "rate_limited"),
    Row("503, 529, 498, overloaded, no capacity", _T, "overloaded"),
    Row("409, 424, 425, other 5xx", _T, "server_error"),
    Row(
        "200 without a completion, larger than `answer_max_bytes`, or ended by a failure",
        _T,
        "broken_answer",
    ),
    Row(
        "the answer does not validate, re-asks included; the provider says that it is no JSON",
        _M,
        "invalid",
    ),
    Row("the model declines", _M, "refused"),
    Row("the provider's filter, on text or answer", _M, "filtered"),
    Row("the answer reaches `output_tokens_max`", _M, "truncated"),
    Row(
        "over the model's context, `text_tokens_max` or a whole minute's tokens, 413",
        _M,
        "too_long",
    ),
    Row("the text cannot be sent (half a character)", _M, "undecodable"),
    Row(
        "400, 422 that names the input; a refusal that says nothing, once others were answered",
        _M,
        "bad_request",
    ),
    Row("the user's code raises", _M, "user_code"),
    Row("401, or a 400 or 403 that speaks of the key", _S, "credentials"),
    Row("a 403 or 400 that speaks of rights", _S, "permission"),
    Row("402, quota, credit or a gateway's budget used up, under any status", _S, "quota"),
    Row("the account is closed or restricted", _S, "account"),
    Row("not offered in this country", _S, "region"),
    Row("unknown or retired model, under any status", _S, "model"),
    Row("endpoint not found: 404, 405, 410", _S, "endpoint"),
    Row("400, 422 that names a setting of ours, a mode or a keyword of the schema", _S, "setting"),
    Row("any other 4xx, until others are answered and it is refused again", _S, "unclear"),
)
"""Every failure of a call. docs/failures.md shows it, with the test of each row beside it."""

REMEDIES = {
    "credentials": (
        "{url} refuses the credentials: set OPENAI_API_KEY to a key that it knows and that has not "
        "expired."
    ),
    "permission": (
        "{url} forbids these calls: give the key of OPENAI_API_KEY access to the model {model!r}."
    ),
    "quota": (
        "The account or budget behind OPENAI_API_KEY has no quota left: add credit or raise it."
    ),
    "account": (
        "{url} has closed or restricted the account behind OPENAI_API_KEY: look at it there."
    ),
    "region": (
        "{url} does not serve the country that these calls come from: call it from another one, or "
        "set OPENAI_BASE_URL to an endpoint that does."
    ),
    "model": "{url} has no model {model!r}: set extraction.model to one it has.",
    "endpoint": (
        "{url} answers {status} to chat completions: check OPENAI_BASE_URL (many endpoints want "
        "/v1 at its end) and extraction.model ({model!r})."
    ),
    "setting": "The model endpoint refuses a setting of ours: look at {setting}.",
    "unclear": (
        "{url} answers {status} without a reason that is known here: check OPENAI_BASE_URL, what "
        "the key may do, extraction.mode and the endpoint's own log."
    ),
}
"""What readiness and the start tell a person to do, by the label of a service failure."""

_MODE = "extraction.mode or the record type"
_SHARED = "messages[0]"
"""The instructions, which are the same for every message."""
_IN_ALL = re.compile(r"(messages|contents)[.\[]0\b")
_FIRST = re.compile(r"[.\[]")
_SETTING_OF = {
    "model": "extraction.model",
    _SHARED: "extraction.instructions",
    "response_format": _MODE,
    "json_schema": _MODE,
    "generation_config": _MODE,
    "strict": _MODE,
    "tools": _MODE,
    "tool_choice": "extraction.mode",
    "parallel_tool_calls": "extraction.mode",
    "temperature": "extraction.temperature",
    "max_tokens": "extraction.output_tokens_max",
    "max_completion_tokens": "extraction.output_tokens_max",
    "max_new_tokens": "extraction.output_tokens_max",
    "stream": "extraction.streaming",
    "stream_options": "extraction.streaming",
}
"""What we send that is the same for every message, by the provider's name for it."""
_OF_THE_FORM = (_MODE, "extraction.mode")
_ANY_SETTING = "extraction.mode, extraction.temperature and the record type"
_MESSAGE = frozenset({"messages", "message", "input", "inputs", "prompt", "contents", "content"})
"""What a provider calls the part of a request that differs between messages."""
_ADAPTABLE = ("max_tokens", "max_completion_tokens", "temperature")
"""Parameters that go by another name, or can be left out."""
_NOT_TAKEN = re.compile(
    r"unsupported|not (?:be )?(?:supported|permitted|allowed|recognized)|unrecognized|unknown"
    r"|unexpected|extra (?:inputs|fields|parameters)|deprecated|instead|does(?: not|n't) support"
    r"|extra_forbidden|only the default",
    re.IGNORECASE,
)
_NAMED_IN_WORDS = re.compile(
    r"\b(max_tokens|max_completion_tokens|max_new_tokens|temperature|response_format|tool_choice"
    r"|stream_options|parallel_tool_calls)\b"
)
"""Parameters that no sentence names by chance."""
_OF_THE_SCHEMA = re.compile(
    r"response.?format|json.?schema|json.?object|schema|grammar|tool|function|structured", re.I
)


def from_status(
    status: int,
    headers: Mapping[str, str],
    body: object,
    *,
    model: str,
    base_url: str,
    text: str = "",
) -> Failure:
    """What an answer with an error status means. `body` is its JSON, or text that is none; `text`
    the message's own, so that an echo of it says nothing."""
    said = read_error(body, text)
    known = {"model": model, "url": base_url, "status": status}
    detail = f"{status}: {_text(body)}"
    label = meaning(status, said)
    match label:
        case "timeout" | "rate_limited" | "overloaded" | "server_error":
            return Transient(label, wait_s(status, headers, said))
        case "filtered":
            return Refused(Reason.FILTERED, "filtered", detail)
        case "too_long":
            return Refused(Reason.TOO_LONG, "too_long", detail)
        case "malformed":
            return Malformed(detail, _failed_generation(body))
        case None if status >= 500:
            return Transient("server_error", wait_s(status, headers, said))
        case None | "setting" | "model" | "endpoint" if status in (400, 403, 404, 422):
            return _about_the_request(label, said, detail, known)
        case None:
            return _unclear(detail, known)
        case (
            "credentials"
            | "permission"
            | "quota"
            | "account"
            | "region"
            | "model"
            | "endpoint"
            | "setting"
        ):
            failure = _unserviceable(label, {**known, "setting": _setting(said)})
            return _about_the_form(failure, _setting(said)) if label == "setting" else failure
        case _:
            assert_never(label)


def from_words(
    headers: Mapping[str, str], error: object, *, model: str, base_url: str, text: str = ""
) -> Failure | None:
    """What an error within a 200 means, by its words alone; None where they say nothing."""
    if meaning(400, read_error(error, text)) is None:
        return None
    return from_status(400, headers, error, model=model, base_url=base_url, text=text)


def _about_the_request(
    label: Label | None, said: Said, detail: str, known: Mapping[str, object]
) -> Failure:
    """A 400 that names what it refuses: a parameter, a setting, the message."""
    names = (*said.names, *_NAMED_IN_WORDS.findall(said.words))
    named = [_SHARED if _IN_ALL.match(name) else _FIRST.split(name)[0] for name in names]
    setting = next((_SETTING_OF[name] for name in named if name in _SETTING_OF), None)
    otherwise = _unserviceable("setting", {"setting": setting or _setting(said)})
    if (parameter := _not_taken(named, said)) is not None:
        return Unsupported(parameter, otherwise)
    first = next((name for name in named if name in _SETTING_OF or name in _MESSAGE), None)
    if first in _MESSAGE and label is None and setting is None:
        if "string_above_max_length" in said.codes:
            return Refused(Reason.TOO_LONG, "too_long", detail)
        return Refused(Reason.BAD_REQUEST, "bad_request", detail)
    # Else every message of a whole topic would be rejected for a setting of ours.
    if first == "model" and label != "setting":
        return _unserviceable("model", known)
    if label == "setting" or (first is not None and label != "endpoint"):
        return _about_the_form(otherwise, setting or _setting(said))
    if label is not None:
        return _unserviceable(label, known)
    if "extra_forbidden" in said.codes or _NOT_TAKEN.search(said.words):
        return otherwise
    return _unclear(detail, known)


def _about_the_form(refusal: Unserviceable, setting: str) -> Failure:
    return Unsupported(FORM, refusal) if setting in _OF_THE_FORM else refusal


def _not_taken(named: list[str], said: Said) -> str | None:
    """The parameter that we could name otherwise, or leave out."""
    words = "\n".join((said.words, *said.codes))
    if not _NOT_TAKEN.search(words):
        return None
    first = next((name for name in named if name in _SETTING_OF or name in _MESSAGE), None)
    return first if first in _ADAPTABLE else None


def _setting(said: Said) -> str:
    return _MODE if _OF_THE_SCHEMA.search(said.words) else _ANY_SETTING


def _unclear(detail: str, known: Mapping[str, object]) -> Unserviceable:
    remedy = REMEDIES["unclear"].format_map(known)
    return Unserviceable("unclear", remedy, unclear=True, detail=detail)


def _unserviceable(label: str, known: Mapping[str, object]) -> Unserviceable:
    return Unserviceable(label, REMEDIES[label].format_map(known))


def _failed_generation(body: object) -> str:
    """Groq shows what the model wrote."""
    match body:
        case {"error": {"failed_generation": str(written)}} | {"failed_generation": str(written)}:
            return written[:FAILED_GENERATION_MAX_CHARS]
        case _:
            return ""


FAILED_GENERATION_MAX_CHARS = 16_384
"""Of an answer that a provider did not take: what the model is shown again."""


def _text(body: object) -> str:
    """What a person reads first of it."""
    match body:
        case [dict(first), *_]:
            return _text(first)
        case {"error": dict(error)}:
            return _text(error)
        case {"message": str(message)} if message:
            return message
        case _:
            return str(body)


def wait_s(status: int, headers: Mapping[str, str], said: Said) -> float | None:
    """Seconds that the provider asks us to wait, in a header or in its body."""
    asked = retry_after_s(headers, limited=status == 429)
    return said.wait_s if asked is None else asked


def retry_after_s(
    headers: Mapping[str, str], now_s: float | None = None, *, limited: bool = False
) -> float | None:
    """Seconds that the provider asks us to wait: `retry-after-ms`, seconds, or an HTTP date; also
    where a gateway hands its provider's header on. `limited`: it was a limit of rate, and when that
    ends may stand in a header of its own.

    None where it asks for nothing, or for something that cannot be read or is in the past.
    """
    now_s = time.time() if now_s is None else now_s
    asked = (
        *(_milliseconds(headers.get(name)) for name in _IN_MILLISECONDS),
        *(_seconds_or_date(headers.get(name), now_s) for name in _IN_SECONDS),
        *(_until(headers.get(name), now_s) for name in _RESETS if limited),
    )
    told = next((one for one in asked if one is not None), None)
    return told if told is not None and 0 < told < float("inf") else None


_IN_MILLISECONDS = ("retry-after-ms", "x-ms-retry-after-ms", "llm_provider-retry-after-ms")
_IN_SECONDS = ("retry-after", "llm_provider-retry-after", "x-retry-after")
_RESETS = ("ratelimit-reset", "x-ratelimit-reset", "x-ratelimit-reset-after")
_EPOCH_S = 1e9
"""A larger number is a time, not a wait."""
_EPOCH_MS = 1e12


def _until(value: str | None, now_s: float) -> float | None:
    number = _number(value)
    if number is None or number < _EPOCH_S:
        return number
    return (number / 1000 if number >= _EPOCH_MS else number) - now_s


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

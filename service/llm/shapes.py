"""How providers, gateways and servers word a refusal: one table, from the first row that fits.

There is no common code: the same thing is a code at one provider, a type at the next, a sentence in
English at the third, and JSON within a text behind a gateway. A row names codes (identifiers, found
wherever they stand) and words (patterns, found in any string); one of them has to fit, and the
status where the row names some. The order is the meaning: what says more stands before what says
less.

Rules of this file: pure; what is read of a body is bounded; nothing that repeats the message's own
text counts, so that no text can choose what becomes of it or of others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from pydantic_core import from_json

Label: TypeAlias = Literal[
    "timeout",
    "rate_limited",
    "overloaded",
    "server_error",
    "filtered",
    "too_long",
    "malformed",
    "credentials",
    "permission",
    "quota",
    "account",
    "region",
    "model",
    "endpoint",
    "setting",
]
"""What a row means: a failure that passes, one of the message, one that somebody must mend.
`malformed`: the model's answer was no valid JSON or call, and the provider kept it."""

NODES_MAX = 256
"""Values of a body that are looked at."""
STRING_MAX_CHARS = 2_000
"""Of each string; errors say what they mean at their beginning."""
DEPTH_MAX = 12
"""Of lists and objects within each other, texts that hold JSON included."""
WORDS_MAX_CHARS = 16_000
"""Of all strings together."""
ECHO_CHARS = 24
"""So many characters in a row of the message's own text are an echo of it."""
ECHO_MIN_CHARS = 3
"""A text that is shorter cannot be told from a word."""
ECHO_MAX_CHARS = 20_000
"""Echoes are looked for in so much of the text's beginning, and of its end."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A row: `codes` and `words` that mean `label`, under one of the `statuses`."""

    label: Label
    codes: frozenset[str] = frozenset()
    words: re.Pattern[str] | None = None
    statuses: frozenset[int] | None = None

    def fits(self, status: int, said: Said) -> bool:
        if self.statuses is not None and status not in self.statuses:
            return False
        if self.words is None:
            return not self.codes or bool(self.codes & said.codes)
        return bool(self.codes & said.codes) or self.words.search(said.words) is not None


@dataclass(frozen=True, slots=True)
class Said:
    """What an error's body says: identifiers, names of parameters, sentences, a wait."""

    codes: frozenset[str] = frozenset()
    names: tuple[str, ...] = ()
    words: str = field(default="", repr=False)
    wait_s: float | None = None


def _shape(label: Label, codes: str = "", words: str = "", *statuses: int) -> Shape:
    return Shape(
        label,
        frozenset(codes.split()),
        re.compile(words, re.IGNORECASE | re.VERBOSE) if words else None,
        frozenset(statuses) or None,
    )


_CLIENT = (400, 403, 404, 406, 409, 410, 412, 413, 415, 422, 424, 446, 451)
"""Statuses under which a sentence can mean the request; a 5xx needs a code, or says little."""

SHAPES: tuple[Shape, ...] = (
    _shape(
        "account",
        "account_deactivated access_terminated organization_deactivated account_suspended",
        r"""(account|organi[sz]ation|workspace|project|team) \b .{0,40} \b
            (suspended|deactivated|disabled|banned|terminated|restricted|archived)""",
        *(400, 401, 403, 429),
    ),
    _shape(
        "region",
        "unsupported_country_region_territory unsupported_location",
        r"""(country|region|territory|location) \b .{0,40}
                (not \s (supported|available)|unsupported)
            | not \s (supported|available|offered) \s in \s your \s (country|region|location)""",
        *(400, 401, 403, 451),
    ),
    # A provider's own wait for calls in flight, not an empty account.
    _shape("rate_limited", "openrouter_in_flight_budget", r"in-flight \s budget", 402, 429),
    _shape(
        "quota",
        """insufficient_quota billing_hard_limit_reached billing_not_active arrearage
        budget_exceeded exceeded_current_quota_error insufficient_balance insufficient_user_quota
        insufficient_credits insufficient_credit reject_no_credit credits_exhausted billing_error
        payment_required billing_disabled quote_exceeded exceededbudget spending_limit_reached
        credit_balance_too_low usage_limit_reached token_quota_reached""",
        r"""credit \s balance | (insufficient|not \s enough|no \s remaining) \s
                (account \s)? (balance|credit|fund|quota)
            | balance \b .{0,20} (insufficient|too \s low|exhausted|is \s not \s enough)
            | good \s standing | budget \s (has \s been \s)? exceeded | exceeded \s budget
            | over \s (the \s)? budget | specified \s api \s usage \s limit
            | (spend|spending|usage|monthly|billing) \s (\w+ \s)? (limit|cap|quota) \b .{0,40}
                (reached|exceeded|hit)
            | (reached|exceeded|hit) \b .{0,50} (monthly|spending|spend|billing|free) \b .{0,20}
                (limit|quota|tier|allocation|credit)
            | (used|ran \s out \s of|run \s out \s of|out \s of|depleted|exhausted) \s
                (up \s)? (all|your|the|available|prepa(y|id)(ment)?|free|daily|included|\s){0,8}
                (credit|fund|balance|allocation|neuron)
            | (prepay(ment)?|prepaid|free) \s credits? \s (are|is|have \s been) \s
                (depleted|exhausted|used)
            | (requires?|needs?) \s more \s credits | requires? \s billing
            | enable \s billing | purchase \s (more \s)? credits | top \s? up
            | 余额不足 | 欠费 | 额度不足""",
        *(400, 401, 402, 403, 422, 429),
    ),
    _shape("quota", "", "", 402),
    _shape(
        "malformed",
        "json_validate_failed tool_use_failed output_parse_failed tool_call_parse_failed",
        r"""failed \s to \s (generate|produce) \s (a \s)? (valid \s)?
                (json|tool|structured|function)
            | failed \s to \s call \s a \s (function|tool)
            | error \s parsing \s tool \s call | tool \s call \s (validation|parsing) \s failed
            | model \s (produced|generated|returned) \s (an? \s)? (invalid|malformed) """,
        *(400, 422, 424, 500, 502),
    ),
    _shape("malformed", "json_validate_failed tool_use_failed output_parse_failed"),
    # What an account may not use, although the words speak of policies.
    _shape(
        "permission",
        "model_terms_required key_model_access_denied team_model_access_denied",
        r"""terms \s acceptance | accept \s the \s terms | requires \s terms
            | no \s endpoints? \s available \s matching \s your
            | data \s (retention|policy) \b .{0,40} (setting|privacy|account)""",
        *_CLIENT,
        401,
    ),
    _shape(
        "filtered",
        """content_filter content_policy_violation moderation_blocked flagged_input
        responsibleaipolicyviolation data_inspection_failed datainspectionfailed invalid_prompt
        content_blocked prompt_blocked guardrail_intervened safety_check_failed
        contentpolicyviolationerror content_moderation_failed content_violation sensitive_content
        prohibited_content guardrail_violation content_filter_error input_blocked
        content_policy_blocked new_sensitive input_sensitive""",
        r"""content .{0,20} (filter|polic|moderation|risk) | inappropriate \s content
            | (sensitive|prohibited|harmful|unsafe|disallowed|nsfw) \s
                (word|content|information|input|material|prompt)
            | responsible \s ai | usage \s (guideline|polic) | guardrail
            | \b (flagged|blocked|rejected|refused|denied) \b .{0,60}
                (safety|polic|moderation|harm|unsafe|high \s risk|security \s (config|rule|polic))
            | violat\w* \b .{0,60} (polic|guideline|moderation|safety)
            | considered \s high \s risk | safety \s (system|setting|reason|filter|check)
            | 敏感 | 不安全 | 违规""",
        *_CLIENT,
        500,
    ),
    _shape("filtered", "content_filter content_policy_violation responsibleaipolicyviolation"),
    _shape("rate_limited", "throttlingexception toomanyrequestsexception ratelimitexceeded"),
    _shape(
        "too_long",
        """context_length_exceeded exceed_context_size_error request_too_large
        context_window_exceeded contextwindowexceedederror tokens_limit_reached
        max_tokens_exceeded prompt_too_long input_too_long context_length_error
        max_context_length_exceeded model_max_prompt_tokens_exceeded""",
        r"""context .? (length|window|size|overflow|limit) | max(imum)? \s (context|prompt|input)
            | (prompt|input|inputs|message|messages|request|text|sequence|conversation)
                (\s body|\s payload)? \s (is|are|was|were)? \s? too \s (long|large|big)
            | request \s too \s large | too \s many (\s input|\s prompt)? \s tokens
            | reduce \s (the \s|your \s)? (length|size|prompt|input|message)
            | (input|prompt|inputs) .? \s (tokens?|length|size) \b .{0,120}
                (exceed|must|should|limit|at \s most|maximum|larger|longer|greater|less)
            | range \s of \s input \s length
            | (exceed\w*|longer|larger|greater|more) \b .{0,80}
                (model|context|input|prompt|total|sequence) .? \s (token|length|len|limit|window)
            | exceed\w* \b .{0,40} (token \s limit|max\w* \s (number \s of \s)? tokens
                |max_model_len|max_seq_len|max_input_len|max_num_tokens)
            | token \s count \b .{0,60} (exceed|must \s be|limit)
            | inputs? `? \s must \s have \s less
            | (token|length) \s limit \s (of|is|:) | tokens? \s exceed
            | max(imum)? \s (sequence|total|model) \s (length|tokens)
            | max_tokens \s must \s be \s at \s least \s 1, \s got \s -
            | current \s length \s is \b .{0,20} while \s limit
            | tokens? \s (exceed|over)\w* \s (the \s)? (configured \s)? limit
            | prompt \s exceeds | 上下文 | 超长 | 长度超 | 超过.{0,10}长度""",
        *_CLIENT,
        500,
    ),
    # Larger than what a minute's budget of tokens can ever hold: it would be refused for ever.
    _shape("too_long", "", r"request \s too \s large", 429),
    _shape("too_long", "", "", 413),
    _shape("too_long", "context_length_exceeded exceed_context_size_error"),
    _shape(
        "credentials",
        """invalid_api_key api_key_invalid expiredtokenexception unrecognizedclientexception
        invalidsignatureexception token_expired expired_token authentication_error unauthenticated
        invalid_token missing_api_key incorrect_api_key token_not_found_in_db expired_key
        api_key_expired invalid_authentication_error unauthorized""",
        r"""(api|access|secret|virtual|proxy \s server|security|bearer|auth\w*) [ _-]? (key|token)s?
                \b .{0,40} (invalid|not \s valid|expired|incorrect|missing|not \s found|revoked
                |not \s provided|required|malformed|wrong)
            | (invalid|incorrect|expired|missing|wrong|no) \s (\w+ \s)?
                (api|access|auth\w*|bearer|secret|x-api|security) [ _-]? (key|token|credential)s? \b
            | invalid \s credentials
            | (key|token|credential)s? \s (has|have|is|are) \s (been \s)?
                (expired|revoked|disabled)
            | authentication \s (error|fail|required) | unauthenticated | not \s authenticated
            | could \s not \s authenticate""",
        *(400, 403),
    ),
    # Overload and limits of rate under another status than 429 and 503.
    _shape(
        "rate_limited",
        "ratelimitexceeded rate_limit_exceeded throttlingexception toomanyrequestsexception",
        r"rate [ _-]? limit | too \s many \s (concurrent \s)? (requests|connections) | throttl",
        *_CLIENT,
        420,
    ),
    _shape(
        "overloaded",
        "resource_unavailable capacity_exceeded overloaded_error engine_overloaded",
        r"""overloaded | (no|insufficient|exceeded|at|out \s of|limited) \s (available \s)? capacity
            | capacity \s exceeded | server \s is \s busy | temporarily \s unavailable
            | try \s again \s (later|in \s a) | has \s crashed""",
        *_CLIENT,
        498,
    ),
    _shape("overloaded", "resource_unavailable overloaded_error engine_overloaded_error"),
    _shape("setting", "", r"requires? \s --[a-z]"),  # a switch that the server was not started with
    _shape(
        "setting",
        """structured_output_not_supported json_mode_not_supported invalid_json_schema
        tools_not_supported unsupported_response_format""",
        r"""must \s contain \s the \s word | (system|developer) \s role
            | roles \s must \s alternate | chat \s template | jinja
            | (does \s not|doesn.t|do \s not|don.t|not) \s ((currently|yet) \s)?
                support (ed)? \b
                .{0,60} (response .? format|json .? schema|json .? object|json \s mode
                |tools?\b|tool .? (use|call|choice)|function|structured|parameter|system|stream
                |grammar|image)
            | (response .? format|json .? schema|tool .? choice|tools|function \s calling
                |structured \s outputs?) \b .{0,80}
                (not \s (yet \s)? (support|available|enabled|allowed|permitted)|unsupported
                |unavailable|must \s be|is \s invalid)
            | no \s endpoints? \s found \s that
            | (xgrammar|outlines|llguidance|lm-format-enforcer|grammar|guided \s decoding)
            | schema \s (conversion|compilation|is \s (too|not|invalid)|contains|must|has)
            | invalid \s (json \s)? schema
            | (not \s supported|unsupported|invalid) \b .{0,40} schema
            | enable-auto-tool-choice | too \s many \s (states|propert|optional)""",
        *_CLIENT,
        501,
    ),
    _shape(
        "model",
        """model_not_found invalid_model model_decommissioned deploymentnotfound model_not_exist
        model_not_available unknown_model modelnotfound model_deprecated model_not_supported
        operationnotsupported""",
        r"""models? \b .{0,90} (does \s not \s exist|do \s not \s exist|not \s found|not \s exist
                |not \s (available|supported|recogni[sz]ed|valid|a \s valid|deployed|loaded)
                |invalid|unknown|decommissioned|deprecated|retired|no \s longer|unavailable
                |end \s of \s life|has \s been \s removed)
            | (invalid|unknown|unsupported|no \s such|nonexistent|unrecogni[sz]ed)
                \s (\w+ \s)? model \b
            | no \s models? \s (is \s|are \s)? (currently \s)? loaded | failed \s to \s load
            | not \s a \s valid \s model | no \s endpoints? \s found \s for
            | (access|permission) \s to \s (the \s)? model | inference \s profile
            | on-demand \s throughput | no \s (available \s)? (channel|deployment|provider)s? \b
                .{0,40} model | deployment \b .{0,60} does \s not \s exist | ^model:\s""",
        *_CLIENT,
        401,
    ),
    _shape("model", "notfounderror not_found_error", "", 400, 404),
    _shape(
        "permission",
        """permission_denied permission_error accessdeniedexception access_denied
        insufficient_permissions model_not_allowed""",
        r"""(not|n.t) \s (have \s)? (sufficient \s)? (access|permission|authori[sz]ed|allowed \s to
                |permitted \s to) | missing \s scopes | insufficient \s permission""",
        *(401, 403),
    ),
    _shape("credentials", "", "", 401),
    _shape("endpoint", "", r"api .? versions?\b", 400, 404),
    _shape("timeout", "", "", 408),
    _shape("rate_limited", "", "", 420, 429),
    _shape("overloaded", "", "", 498, 503, 529),
    _shape("server_error", "", "", 409, 424, 425),
    _shape("endpoint", "", "", 404, 405, 410),
)
"""Rows without codes and words fit by their status alone."""

_ECHOES = frozenset(
    {"input", "failed_generation", "flagged_input", "messages", "prompt", "request", "body"}
)
"""Fields that repeat what was sent, or what the model wrote."""
_CODE = frozenset(
    {
        *("code", "type", "status", "reason", "error", "error_code", "error_type", "errorcode"),
        *("__type", "name", "limit_source", "error_subcode", "detail", "message"),
    }
)
"""Fields whose whole value can be an identifier."""
_IDENTIFIER = re.compile(r"[A-Za-z_][\w.-]{2,63}")
_IN_TEXT = re.compile(r"\b[a-z]+(?:_[a-z]+)+\b|\b(?:[A-Z][a-z]+){2,}(?:Error|Exception)\b")
"""Identifiers within a sentence: with underscores, or named like an exception."""
_QUOTED = re.compile("[`'\"\u2018\u201c](\\w+(?:\\.\\w+)*)[`'\"\u2019\u201d]")
_WAIT_KEYS = {"retrydelay": 1.0, "retry_after": 1.0, "retry_after_seconds": 1.0}
_WAIT_KEYS |= {"retry_after_ms": 0.001, "resets_in_seconds": 1.0}
_UNIT = "ms|milliseconds?|hours?|h|minutes?|min|m|seconds?|secs?|s"
_DURATION = rf"((?:\d+(?:\.\d+)?\s*(?:{_UNIT})(?![a-z])\s*)+)"
_WAIT = re.compile(
    rf"(?:try\s+again\s+(?:in|after)|retry\s+(?:in|after)|wait(?:\s+for)?|resets?\s+in)\s+{_DURATION}",
    re.IGNORECASE,
)
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|milli|h|m(?:in)?|s)", re.IGNORECASE)
_UNIT_S = {"ms": 0.001, "milli": 0.001, "h": 3600.0, "m": 60.0, "min": 60.0, "s": 1.0}
_LIMIT = re.compile(r"limit:?\s*([\d,]+).{0,80}?requested:?\s*([\d,]+)", re.IGNORECASE | re.DOTALL)


def meaning(status: int, said: Said) -> Label | None:
    """The first row that fits; None where the table is silent."""
    if status == 429 and _never_fits(said.words):
        return "too_long"
    return next((shape.label for shape in SHAPES if shape.fits(status, said)), None)


def _never_fits(words: str) -> bool:
    """One request asks for more than a whole minute allows."""
    found = _LIMIT.search(words)
    if found is None:
        return False
    limit, requested = (int(figure.replace(",", "")[:15] or 0) for figure in found.groups())
    return requested > limit > 0


def read_error(body: object, text: str = "") -> Said:
    """What an error's body says, but for what repeats the message's own `text`."""
    if isinstance(body, str) and body.lstrip()[:1] == "<":
        return Said()  # a page, written for people by whatever stands in between
    reading = _Reading(text)
    reading.walk(body, "", 0)
    words = "\n".join(reading.words)
    return Said(
        codes=frozenset(reading.codes | {code.lower() for code in _IN_TEXT.findall(words)}),
        names=tuple(dict.fromkeys((*reading.names, *_QUOTED.findall(words)))),
        words=words,
        wait_s=reading.wait_s if reading.wait_s is not None else _told_wait_s(words),
    )


class _Reading:
    """One walk through a body, bounded in every direction."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._grams = _grams(text)
        self._nodes = self._chars = 0
        self.words: list[str] = []
        self.codes: set[str] = set()
        self.names: list[str] = []
        self.wait_s: float | None = None

    def walk(self, value: object, key: str, depth: int) -> None:
        self._nodes += 1
        if self._nodes > NODES_MAX or depth > DEPTH_MAX:
            return
        match value:
            case str():
                self._string(value, key, depth)
            case Mapping():
                for name, inner in value.items():
                    if not isinstance(name, str):
                        continue
                    lower = name.lower()
                    self.codes.add(lower[:64])
                    if lower not in _ECHOES:
                        self.walk(inner, lower, depth + 1)
            case list() if key == "loc":
                self.names.append(".".join(map(str, value[:8]))[:100].removeprefix("body."))
            case list():
                for inner in value:
                    self.walk(inner, key, depth + 1)
            case bool():
                pass
            case int() | float() if key in _WAIT_KEYS:
                self._wait(float(value) * _WAIT_KEYS[key])

    def _string(self, value: str, key: str, depth: int) -> None:
        value = value[: 4 * STRING_MAX_CHARS]
        stripped = value.strip()
        if stripped[:1] in ("{", "["):
            try:
                self.walk(from_json(stripped), key, depth + 1)
            except ValueError:
                pass
            else:
                return
        if key == "param":
            self.names.append(value[:100])
            return
        if key in _WAIT_KEYS and (wait_s := _seconds(value)) is not None:
            self._wait(wait_s)
            return
        if key in _CODE and stripped != self._text and _IDENTIFIER.fullmatch(stripped):
            self.codes.add(stripped.lower())
        if self._chars < WORDS_MAX_CHARS:
            words = " ".join(self._without_echo(value[:STRING_MAX_CHARS]).split())
            self._chars += len(words)
            self.words.append(words)

    def _wait(self, wait_s: float) -> None:
        if self.wait_s is None and 0 < wait_s < float("inf"):
            self.wait_s = wait_s

    def _without_echo(self, value: str) -> str:
        """A server may repeat the message, whose text could then choose what it means."""
        if not self._grams:
            return value.replace(self._text, " ") if len(self._text) > ECHO_MIN_CHARS else value
        kept, at = [], 0
        while at < len(value):
            if value[at : at + ECHO_CHARS] in self._grams:
                at += ECHO_CHARS
                while value[at - ECHO_CHARS + 1 : at + 1] in self._grams:
                    at += 1
                kept.append(" ")
                continue
            kept.append(value[at])
            at += 1
        return "".join(kept)


def _grams(text: str) -> frozenset[str]:
    """Every run of `ECHO_CHARS` characters, so that an echo is found wherever it begins."""
    if len(text) < ECHO_CHARS:
        return frozenset()
    halves = (text[:ECHO_MAX_CHARS], text[ECHO_MAX_CHARS:][-ECHO_MAX_CHARS:])
    return frozenset(
        half[at : at + ECHO_CHARS] for half in halves for at in range(len(half) - ECHO_CHARS + 1)
    )


def _told_wait_s(words: str) -> float | None:
    found = _WAIT.search(words)
    return None if found is None else _seconds(found.group(1))


def _seconds(value: str) -> float | None:
    parts = list(_parts(value))
    wait_s = sum(parts)
    return wait_s if parts and 0 < wait_s < float("inf") else None


def _parts(value: str) -> Iterator[float]:
    for figure, unit in _PART.findall(value[:80]):
        yield float(figure) * _UNIT_S[unit.lower()]

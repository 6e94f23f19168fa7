"""What a failed call means: the table."""

from __future__ import annotations

import time
from email.utils import formatdate

import pytest

from service.core.messages import Reason
from service.llm.failures import (
    Failure,
    Refused,
    Transient,
    Unserviceable,
    Unsupported,
    from_status,
    retry_after_s,
)


def meaning(status: int, error: object = None, **headers: str) -> Failure:
    return from_status(status, headers, error, model="gpt", base_url="http://localhost/v1")


@pytest.mark.parametrize(
    ("status", "result"),
    [
        (408, "timeout"),
        (409, "server_error"),
        (424, "server_error"),
        (425, "server_error"),
        (429, "rate_limited"),
        (498, "overloaded"),
        (500, "server_error"),
        (502, "server_error"),
        (503, "overloaded"),
        (504, "server_error"),
        (529, "overloaded"),
    ],
)
def test_what_passes_is_tried_again(status: int, result: str) -> None:
    """Overload, rate limits and broken servers are nobody's message."""
    assert meaning(status) == Transient(result)
    assert meaning(status, **{"retry-after": "3"}) == Transient(result, 3.0)


@pytest.mark.parametrize(
    ("status", "error", "reason"),
    [
        (401, {}, "credentials"),
        (402, {}, "quota"),
        (403, {"message": "You do not have access to this"}, "permission"),
        (403, {"code": "permission_error"}, "permission"),
        (404, {"code": "model_not_found"}, "model"),
        (404, {"type": "NotFoundError", "code": 404}, "model"),
        (404, "page not found", "endpoint"),
        (400, {"code": "model_not_found"}, "model"),
        (403, {"code": "insufficient_quota"}, "quota"),
        (405, None, "endpoint"),
        (429, {"code": "insufficient_quota"}, "quota"),
        (429, {"type": "insufficient_quota", "code": None}, "quota"),
        (400, {"message": "Your organization was disabled"}, "account"),
        (401, {"code": "account_deactivated"}, "account"),
        (403, {"code": "unsupported_country_region_territory"}, "region"),
        (400, {"message": "User location is not supported for the API use."}, "region"),
        (400, {"param": "stream_options", "code": "unsupported_value"}, "setting"),
        (400, {"param": "response_format"}, "setting"),
        (400, {"param": "tools[0].function.parameters"}, "setting"),
    ],
)
def test_what_somebody_must_mend(status: int, error: object, reason: str) -> None:
    """What every message would meet rejects none; it comes with what to do, where we can't do
    otherwise."""
    failure = meaning(status, error)
    if isinstance(failure, Unsupported):
        failure = failure.otherwise
    assert isinstance(failure, Unserviceable)
    assert failure.reason == reason
    assert failure.remedy.endswith(".")


@pytest.mark.parametrize(
    ("status", "error", "reason"),
    [
        (400, {"code": "context_length_exceeded"}, Reason.TOO_LONG),
        (400, {"type": "exceed_context_size_error", "message": "x"}, Reason.TOO_LONG),
        (400, {"message": "This model's maximum context length is 8192"}, Reason.TOO_LONG),
        (400, {"code": "string_above_max_length", "param": "messages[1]"}, Reason.TOO_LONG),
        (413, "Payload Too Large", Reason.TOO_LONG),
        (429, {"message": "tokens per min: Limit 30,000, Requested 45,000"}, Reason.TOO_LONG),
        (400, {"code": "content_policy_violation"}, Reason.FILTERED),
        (400, {"code": "content_filter"}, Reason.FILTERED),
        (400, {"innererror": {"code": "ResponsibleAIPolicyViolation"}}, Reason.FILTERED),
        (403, {"metadata": {"flagged_input": "…"}}, Reason.FILTERED),
        (400, {"message": "bad", "param": "messages[1].content"}, Reason.BAD_REQUEST),
        (422, {"detail": [{"loc": ["body", "messages", 1], "msg": "x"}]}, Reason.BAD_REQUEST),
    ],
)
def test_what_concerns_this_message(status: int, error: object, reason: Reason) -> None:
    """Only what a provider says about this very request rejects it."""
    failure = meaning(status, error)
    assert isinstance(failure, Refused)
    assert failure.reason == reason


def test_what_the_provider_says_is_not_in_the_repr() -> None:
    """A provider's text may repeat the message: it shows in dead letters only."""
    for code in ("content_filter", "something else"):
        failure = meaning(400, {"code": code, "message": "canary"})
        assert isinstance(failure, Refused | Unserviceable)
        assert "canary" in failure.detail
        assert "canary" not in repr(failure)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": formatdate(1030, usegmt=True)}, 30.0),
        ({"retry-after": formatdate(900, usegmt=True)}, None),
        ({"retry-after": "0"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after-ms": "soon", "retry-after": "4"}, 4.0),
    ],
)
def test_retry_after_in_all_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    """Milliseconds, seconds or a date; nonsense and the past count as nothing."""
    assert retry_after_s(headers, now_s=1000.0) == seconds


@pytest.mark.parametrize("status", [400, 403, 406, 418, 422, 451])
@pytest.mark.parametrize(
    "error", [None, "", {"detail": []}, {"message": "no"}, "<html>quota</html>"]
)
def test_what_says_nothing_is_unclear(status: int, error: object) -> None:
    """Everybody's, until evidence tells; a page for people says nothing, whatever it says."""
    failure = meaning(status, error)
    assert isinstance(failure, Unserviceable)
    assert failure.unclear
    assert failure.reason == "unclear"


ECHOED = (
    "API key not valid. Your credit balance is too low. maximum context length",
    "model not found",
    "json_validate_failed",
)


@pytest.mark.parametrize("text", ECHOED)
@pytest.mark.parametrize("said", ["Cannot process: {}", "{}", '{{"input": "{}"}}', "{} {} {}"])
def test_an_echo_of_the_message_says_nothing(text: str, said: str) -> None:
    """A server may repeat the message: its text chooses neither its fate nor that of others."""
    for body in (
        said.format(text, text, text),
        {"error": {"message": said.format(text, text, text)}},
    ):
        failure = from_status(400, {}, body, model="gpt", base_url="http://x/v1", text=text)
        assert isinstance(failure, Unserviceable), body
        assert failure.unclear


def test_an_echo_hides_nothing_that_the_provider_says() -> None:
    """Around the message's own words its sentence still counts."""
    text = "Ann Example is 30 years old and lives in Springfield with two cats."
    body = {"message": f"Prompt {text!r} is too long: maximum context length is 4096 tokens"}
    failure = from_status(400, {}, body, model="gpt", base_url="http://x/v1", text=text)
    assert isinstance(failure, Refused)
    assert failure.reason == Reason.TOO_LONG


@pytest.mark.parametrize(
    "body",
    [
        {"a": [{"b": "x" * 10_000}] * 10_000},
        ["x"] * 100_000,
        "[" * 100_000,
        '{"a":' * 5_000,
        {"message": "rate " * 100_000},
        '\\"' * 50_000,
        {str(n): "model " * 300 for n in range(300)},
    ],
)
def test_a_hostile_body_is_read_in_little_time(body: object) -> None:
    """Whatever it holds, and however long the message was that it may repeat."""
    began_s = time.process_time()
    from_status(400, {}, body, model="gpt", base_url="http://x/v1", text="rate model " * 100_000)
    assert time.process_time() - began_s < 1.0


@pytest.mark.parametrize(
    ("body", "seconds"),
    [
        ({"details": [{"retryDelay": "34s"}]}, 34.0),
        ({"details": [{"retryDelay": "0.5s"}]}, 0.5),
        ({"message": "Rate limit reached. Please try again in 6m12.5s. Visit"}, 372.5),
        ({"message": "Please try again in 250ms."}, 0.25),
        ({"message": "Please retry after 6 seconds."}, 6.0),
        ({"message": "Please wait 41 seconds before retrying."}, 41.0),
        ({"message": "Try again after 2 minutes"}, 120.0),
        ({"message": "limit resets in 1h 30m"}, 5400.0),
        ({"retry_after": 12}, 12.0),
        ({"error": {"metadata": {"retry_after_seconds": 3.5}}}, 3.5),
        ({"message": "try again later"}, None),
        ({"retry_after": -1}, None),
        ({"retry_after": 1e309}, None),
        ({"message": "Please try again in 0s"}, None),
    ],
)
def test_a_wait_can_stand_in_the_body(body: object, seconds: float | None) -> None:
    """As Gemini, OpenAI, Groq, Azure and gateways say it; a header wins."""
    failure = meaning(429, body)
    assert isinstance(failure, Transient)
    assert failure.retry_after_s == seconds
    assert meaning(429, body, **{"retry-after": "5"}) == Transient("rate_limited", 5.0)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"llm_provider-retry-after": "8"}, 8.0),
        ({"x-ms-retry-after-ms": "700", "retry-after": "1"}, 0.7),
        ({"ratelimit-reset": "9"}, 9.0),
        ({"x-ratelimit-reset": "1030"}, 1030.0),
        ({"x-ratelimit-reset": "2000000030"}, 30.0),
        ({"x-ratelimit-reset": "2000000030000"}, 30.0),
    ],
)
def test_gateways_have_headers_of_their_own(headers: dict[str, str], seconds: float) -> None:
    """They hand their provider's on, or tell when their own limit is over."""
    assert retry_after_s(headers, now_s=2_000_000_000.0, limited=True) == pytest.approx(seconds)


def test_when_a_limit_ends_is_no_wait_for_others() -> None:
    """A server error says nothing of limits."""
    assert meaning(500, {}, **{"x-ratelimit-reset": "9"}) == Transient("server_error")


@pytest.mark.parametrize(
    ("error", "parameter"),
    [
        ({"param": "max_tokens", "code": "unsupported_parameter"}, "max_tokens"),
        (
            {"message": "'max_tokens' is not supported, use 'max_completion_tokens' instead"},
            "max_tokens",
        ),
        (
            {"message": "Unrecognized request argument supplied: max_completion_tokens"},
            "max_completion_tokens",
        ),
        (
            {"detail": [{"type": "extra_forbidden", "loc": ["body", "max_completion_tokens"]}]},
            "max_completion_tokens",
        ),
        (
            {
                "param": "temperature",
                "code": "unsupported_value",
                "message": "Only the default (1) value",
            },
            "temperature",
        ),
        ({"message": "`temperature` is deprecated for this model."}, "temperature"),
        (
            {"message": "UnsupportedParamsError: gpt-5 does not support temperature=0"},
            "temperature",
        ),
    ],
)
def test_a_parameter_that_is_not_taken(error: object, parameter: str) -> None:
    """Under every provider's words; what we can do about it is the caller's to know."""
    failure = meaning(400, error)
    assert isinstance(failure, Unsupported)
    assert failure.parameter == parameter
    assert failure.otherwise.reason == "setting"


@pytest.mark.parametrize(
    "error",
    [
        {
            "param": "max_tokens",
            "message": "max_tokens is too large: 9. This model supports at most 4",
        },
        {"message": "max_tokens must be at least 1"},
        {"message": "Range of max_tokens should be [1, 8192]"},
    ],
)
def test_a_limit_out_of_bounds_is_a_setting(error: object) -> None:
    """Its name is known, its value is refused."""
    failure = meaning(400, error)
    assert isinstance(failure, Unserviceable)
    assert (failure.reason, failure.unclear) == ("setting", False)
    assert "output_tokens_max" in failure.remedy

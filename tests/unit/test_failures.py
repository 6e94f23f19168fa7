"""What a failed call means: the table."""

from __future__ import annotations

from email.utils import formatdate

import pytest

from service.core.messages import Reason
from service.llm.failures import (
    Failure,
    Refused,
    Transient,
    Unserviceable,
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
        (425, "server_error"),
        (429, "rate_limited"),
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
        (403, {}, "permission"),
        (404, {"code": "model_not_found"}, "model"),
        (404, {"type": "NotFoundError", "code": 404}, "model"),
        (404, "page not found", "endpoint"),
        (400, {"code": "model_not_found"}, "model"),
        (403, {"code": "insufficient_quota"}, "quota"),
        (405, None, "endpoint"),
        (418, {}, "refused"),
        (429, {"code": "insufficient_quota"}, "quota"),
        (429, {"type": "insufficient_quota", "code": None}, "quota"),
        (400, {"param": "temperature", "code": "unsupported_value"}, "setting"),
        (400, {"param": "response_format"}, "setting"),
        (400, {"param": "tools[0].function.parameters"}, "setting"),
    ],
)
def test_what_somebody_must_mend(status: int, error: object, reason: str) -> None:
    """What every message would meet rejects none; it comes with what to do."""
    failure = meaning(status, error)
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
        (400, {"code": "content_policy_violation"}, Reason.FILTERED),
        (400, {"code": "content_filter"}, Reason.FILTERED),
        (400, {"innererror": {"code": "ResponsibleAIPolicyViolation"}}, Reason.FILTERED),
        (403, {"metadata": {"flagged_input": "…"}}, Reason.FILTERED),
        (400, {"message": "bad", "param": "messages[1].content"}, Reason.BAD_REQUEST),
        (400, None, Reason.BAD_REQUEST),
        (422, {"detail": []}, Reason.BAD_REQUEST),
    ],
)
def test_what_concerns_this_message(status: int, error: object, reason: Reason) -> None:
    """Only what a provider says about this very request rejects it."""
    failure = meaning(status, error)
    assert isinstance(failure, Refused)
    assert failure.reason == reason


def test_what_the_provider_says_is_not_in_the_repr() -> None:
    """A provider's text may repeat the message: it shows in dead letters only."""
    failure = meaning(400, {"message": "canary"})
    assert isinstance(failure, Refused)
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

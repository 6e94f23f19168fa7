"""Tokens before a call, and the provider's headers after it."""

from dataclasses import replace

import pytest

from service.core.admission.budgets import Allowance, Quota
from service.llm.allowance import duration_s, read_allowance
from service.llm.estimate import Estimator


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("6m0s", 360.0),
        ("1s", 1.0),
        ("20ms", 0.02),
        ("1h2m3.5s", 3723.5),
        ("7.66", 7.66),
        ("0", 0.0),
        ("1m20ms", 60.02),
        ("soon", None),
        ("-3", None),
        ("5 minutes", None),
        ("nan", None),
        ("", None),
        (None, None),
    ],
)
def test_durations_as_providers_write_them(text: str | None, seconds: float | None) -> None:
    """Go's durations and plain seconds; what is neither is nothing."""
    assert duration_s(text) == (seconds if seconds is None else pytest.approx(seconds))


def test_both_quotas_are_read() -> None:
    """Limit and remaining are needed, the reset is not; anything else says nothing."""
    headers = {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "150000",
        "x-ratelimit-remaining-tokens": "149984",
    }
    assert read_allowance(headers, 7.0) == Allowance(
        7.0, Quota(60, 59, 1.0), Quota(150_000, 149_984, None)
    )
    assert read_allowance({"x-ratelimit-remaining-requests": "0"}, 0.0) is None
    assert read_allowance({"x-ratelimit-limit-tokens": "many"}, 0.0) is None


def test_the_ratio_and_the_answers_length_are_learned() -> None:
    """After some calls an estimate is what they used; each model has its own."""
    estimator = Estimator(output_tokens_max=1000)
    first = estimator.estimate("m", 3000)
    assert (first.tokens, first.tokens_max) == (1256, 2000)
    for _ in range(50):
        estimator.learn("m", 3000, 600, 40)
    estimator.learn("m", 3000, 0, 0)  # an answer without usage
    learned = estimator.estimate("m", 3000)
    assert (learned.tokens, learned.tokens_max) == (640, 1600)
    assert estimator.estimate("other", 3000) == replace(first, route="other")


def test_an_answer_is_never_expected_beyond_its_limit() -> None:
    """The limit bounds the estimate from the first call on."""
    assert Estimator(output_tokens_max=10).estimate("m", 3).tokens == 11

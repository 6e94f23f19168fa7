"""Backoff, and when a message is poison."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.admission.retry import RETRY_AFTER_MAX_S, Backoff, exhausted
from service.core.errors import TransientFailure


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_delay_is_full_jitter_under_a_cap(attempt: int, share: float) -> None:
    """delay = share x min(cap, base x 2^(attempt - 1)), however many attempts there were."""
    backoff = Backoff(base_s=0.5, cap_s=30)
    expected = share * min(30.0, 0.5 * 2.0 ** min(attempt - 1, 100))
    assert backoff.delay_s(attempt, lambda low, high: low + share * (high - low)) == expected


def test_retry_after_is_waited_in_full() -> None:
    """What the provider asked for is never undercut."""
    assert Backoff().delay_s(1, lambda low, _: low, retry_after_s=7.5) == 7.5


@pytest.mark.parametrize(
    ("told_s", "waited_s"),
    [
        (7.5, 7.5),
        (None, None),
        (0.0, None),
        (-3.0, None),
        (float("nan"), None),
        (float("-inf"), None),
        (86_400.0, RETRY_AFTER_MAX_S),
        (float("inf"), RETRY_AFTER_MAX_S),
    ],
)
def test_a_failure_asks_for_a_wait_that_can_be_kept(
    told_s: float | None, waited_s: float | None
) -> None:
    """Whatever an extractor was told, the wait is above 0 and at most a quarter of an hour."""
    assert TransientFailure("rate_limited", retry_after_s=told_s).retry_after_s == waited_s


def test_the_jitter_after_a_short_retry_after_is_short() -> None:
    """A tenth of a second asked for the ninth time is not followed by half a minute of ours."""
    assert Backoff().delay_s(9, lambda _, high: high, retry_after_s=0.1) == 0.2


def test_poison_needs_attempts_and_a_fresh_success_of_others() -> None:
    """Neither many failures alone nor other successes alone reject a message."""
    assert exhausted(8, 8, began_s=100, other_success_s=41)
    assert not exhausted(7, 8, began_s=100, other_success_s=99)
    assert not exhausted(99, 8, began_s=100, other_success_s=None)
    assert not exhausted(99, 8, began_s=100, other_success_s=39)

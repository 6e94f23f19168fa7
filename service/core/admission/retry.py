"""Attempts and backoff: when the next one is due, and when there is none."""

from collections.abc import Callable
from dataclasses import dataclass

Uniform = Callable[[float, float], float]

RETRY_AFTER_MAX_S = 900.0
"""A provider's Retry-After is honoured up to this many seconds: beyond it we ask again to see.
The cap is applied once, by `asked_to_wait_s`, where a failure is made."""

OTHERS_SUCCEED_WITHIN_S = 60.0
"""A success of another message within this time shows that the provider is not the cause."""

OVERLOAD = frozenset({"rate_limited", "overloaded", "timeout"})
"""Failures that say that we ask for too much at once."""

NEVER_THE_MESSAGE = frozenset({"rate_limited", "overloaded"})
"""Failures that no message can be the cause of: they don't count towards its attempts."""


def asked_to_wait_s(retry_after_s: float | None) -> float | None:
    """What a provider's Retry-After means, in seconds above 0 and up to `RETRY_AFTER_MAX_S`.

    None where it asks for nothing, or for what is no time to wait (0, negative, not a number).
    """
    if retry_after_s is None or not retry_after_s > 0.0:  # `not >` is true for NaN as well
        return None
    return min(retry_after_s, RETRY_AFTER_MAX_S)


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff with full jitter.

    delay = uniform(0, min(cap, base * 2^(attempt - 1))), after M. Brooker, "Exponential Backoff
    and Jitter" (2015). What a provider asked for is waited in full, and then a jitter of at most
    as much again: it knows better than our doubling when there is room.
    """

    base_s: float = 0.5
    cap_s: float = 30.0

    def delay_s(self, attempt: int, uniform: Uniform, retry_after_s: float | None = None) -> float:
        """Seconds from the failure of attempt number `attempt` (from 1) to the next one."""
        assert attempt >= 1, "attempts are counted from 1"
        ceiling_s = min(self.cap_s, self.base_s * 2.0 ** min(attempt - 1, 32))
        asked_s = retry_after_s or 0.0
        return asked_s + uniform(0.0, min(ceiling_s, asked_s) if asked_s else ceiling_s)


def exhausted(
    attempts: int, attempts_max: int, began_s: float, other_success_s: float | None
) -> bool:
    """Whether a message is poison rather than hit by an outage.

    It failed `attempts_max` times, and another message, or a probe, succeeded within the minute
    before the last attempt began, or later (`other_success_s` is that moment on the clock of
    `began_s`; None: never). An attempt may last longer than a minute, and a probe come before it.
    """
    return attempts >= attempts_max and others_succeed(began_s, other_success_s)


def others_succeed(since_s: float, other_success_s: float | None) -> bool:
    """Whether the provider is there, as others have seen."""
    return other_success_s is not None and since_s - other_success_s <= OTHERS_SUCCEED_WITHIN_S


RETRIES_SAVED = 100.0
"""Retries that may follow one upon the other before successes must pay for them."""

RETRIES_PER_S = 1.0
"""That come back by themselves, so that retries alone get through in the end."""


@dataclass(slots=True)
class RetryQuota:
    """How many retries may start: in the long run one for each success, and one a second.

    A token bucket as in botocore's standard mode, where a success pays for what it took; there a
    retry that finds none is given up, here it waits. Below half of all calls failing nothing
    waits; above, retries can't multiply the load on a provider that is going down.
    """

    saved: float = RETRIES_SAVED
    at_s: float = float("-inf")

    def available(self, now_s: float) -> int:
        self._fill(now_s)
        return int(self.saved + 1e-6)

    def wait_s(self, now_s: float) -> float:
        """Until the next one; 0: now."""
        self._fill(now_s)
        return max(0.0, (1.0 - self.saved - 1e-6) / RETRIES_PER_S)

    def take(self, retries: int) -> None:
        assert retries <= self.saved + 1e-6, "more retries than there are"
        self.saved -= retries

    def succeeded(self) -> None:
        self.saved = min(RETRIES_SAVED, self.saved + 1.0)

    def forgive(self) -> None:
        """The provider is back."""
        self.saved = RETRIES_SAVED

    def _fill(self, now_s: float) -> None:
        if now_s > self.at_s:
            if self.at_s > float("-inf"):
                gained = (now_s - self.at_s) * RETRIES_PER_S
                self.saved = min(RETRIES_SAVED, self.saved + gained)
            self.at_s = now_s

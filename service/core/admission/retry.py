"""Attempts and backoff: when a message's next attempt is due, and when it gets none."""

from collections.abc import Callable
from dataclasses import dataclass

Uniform = Callable[[float, float], float]

RETRY_AFTER_MAX_S = 900.0
"""A provider's Retry-After is honoured up to this many seconds; after them we try again anyway. The
cap is applied in one place, `asked_to_wait_s`, when a failure is created."""

OTHERS_SUCCEED_WITHIN_S = 60.0
"""A success of another message within this time shows that the provider is not the cause."""

RATE_LIMITED = "rate_limited"
"""The reason of a failure that came with a 429."""

OVERLOAD = frozenset({"rate_limited", "overloaded", "timeout"})
"""Reasons of failures that show that we send too much at once."""

NEVER_THE_MESSAGE = frozenset({"rate_limited", "overloaded"})
"""Reasons of failures that a message hardly ever causes: they don't count towards its
`attempts_max`, unless others are answered meanwhile (core/admission/suspicion.py)."""


def asked_to_wait_s(retry_after_s: float | None) -> float | None:
    """How long to wait for a provider's Retry-After: above 0 and up to `RETRY_AFTER_MAX_S` seconds.

    None where it asked for nothing, or for no usable time (0, negative, not a number).
    """
    if retry_after_s is None or not retry_after_s > 0.0:  # `not >` is true for NaN as well
        return None
    return min(retry_after_s, RETRY_AFTER_MAX_S)


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff with full jitter.

    delay = uniform(0, min(cap, base * 2^(attempt - 1))), after M. Brooker, "Exponential Backoff
    and Jitter" (2015). Where the provider asked us to wait, that time is waited in full, then a
    random time of at most as much again: the provider knows better when there is room.
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
    """Whether a message fails because of itself and not because of an outage, if failures are no
    matter of chance (core/admission/suspicion.py).

    It does where it failed `attempts_max` times although another message or a probe succeeded: not
    earlier than a minute before the last attempt began (an attempt may last longer than a minute).
    `other_success_s` is the moment of that success, on the same clock as `began_s`; None: never.
    """
    return attempts >= attempts_max and others_succeed(began_s, other_success_s)


def others_succeed(since_s: float, other_success_s: float | None) -> bool:
    """Whether calls of others show that the provider is reachable."""
    return other_success_s is not None and since_s - other_success_s <= OTHERS_SUCCEED_WITHIN_S


RETRIES_SAVED = 100.0
"""How many retries may start in a row before successes have to pay for them."""

RETRIES_PER_S = 1.0
"""How many retries a second are added without any success, so that in the end even a queue of
nothing but retries is worked off."""


@dataclass(slots=True)
class RetryQuota:
    """How many retries may start: in the long run one for each success, and one a second.

    It is a token bucket, as in botocore's standard mode, where each success pays for a retry. There
    a retry that finds the bucket empty is given up; here it waits. As long as fewer than half of
    all calls fail, no retry waits. Above that, retries can't multiply the load on a provider that
    is going down.
    """

    saved: float = RETRIES_SAVED
    at_s: float = float("-inf")

    def available(self, now_s: float) -> int:
        self._fill(now_s)
        return int(self.saved + 1e-6)

    def wait_s(self, now_s: float) -> float:
        """Seconds until the next retry may start; 0: now."""
        self._fill(now_s)
        if self.available(now_s):
            return 0.0
        # Until there is a whole one, above what `available` is content with: a wait that ends
        # short of it by a rounding error would be followed by one too short to move the clock.
        return (1.0 - self.saved) / RETRIES_PER_S

    def take(self, retries: int) -> None:
        assert retries <= self.saved + 1e-6, "more retries than there are"
        self.saved -= retries

    def succeeded(self) -> None:
        self.saved = min(RETRIES_SAVED, self.saved + 1.0)

    def forgive(self) -> None:
        """The provider is back: the bucket is full again."""
        self.saved = RETRIES_SAVED

    def _fill(self, now_s: float) -> None:
        if now_s > self.at_s:
            if self.at_s > float("-inf"):
                gained = (now_s - self.at_s) * RETRIES_PER_S
                self.saved = min(RETRIES_SAVED, self.saved + gained)
            self.at_s = now_s

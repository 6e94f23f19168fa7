"""Budgets of requests and of tokens: our own by setting, the provider's by its headers.

Every call is charged once, before it is sent: with an estimate of its tokens, which is corrected
when the provider has told what it used. Rules of this file: pure; time comes in as seconds of a
monotonic clock.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field

from service.core.admission.buckets import ROUNDING, WAIT_MAX_S, Bucket

BURST_S = 2.0
"""Seconds' worth of a budget that may go at once. Providers cut a minute's limit into pieces of
one to ten seconds, so that more would be refused there and exceed the minute by more than a
thirtieth; with less, what a late event loop has not used would be lost."""

HEARD_MAX_S = 60.0
"""What a provider said of its limits holds so long: a minute's limit is full again by then, and
what lasts longer comes with a Retry-After."""

CHARGE_MAX = 8.0
"""A refusal with more room than for so many such calls has another cause than the count."""

CHARGE_MORE = 1.05
"""Beyond what a refusal proves, so that a few of them find what the provider counts."""

CONTINUOUS_SHARE = 0.1
"""A reset within a tenth (and a second) of what a bucket that fills evenly would need means that
it is one; else the limit comes back all at once, at the reset."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Tokens of a call that is not sent yet: what is expected, and what the provider may count
    against its limit at once (many count the whole `output_tokens_max`)."""

    tokens: int = 0
    tokens_max: int = 0


NO_TOKENS = Estimate()
"""Of a call whose tokens nobody counts."""


@dataclass(frozen=True, slots=True)
class Quota:
    """One kind of a provider's limit, as an answer's headers tell it; `reset_s` until full."""

    limit: float
    remaining: float
    reset_s: float | None = None


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one answer's headers say of the limits; `asked_at_s` is when its call was sent."""

    asked_at_s: float
    requests: Quota | None = None
    tokens: Quota | None = None
    refused: Estimate | None = None
    """What its call was charged with, where it was refused for a limit."""


@dataclass(slots=True)
class ProviderQuota:
    """What the provider will still take, from what it said last and what was sent since.

    It said it when the call arrived; what we have sent after that call is taken off, what has
    filled up since is added only from the moment on in which we heard of it. So we err on the
    safe side by a round trip's worth, which the provider's bucket (a minute's worth) has room for.
    """

    share: float = 1.0
    limit: float = 0.0
    level: float = 0.0
    rate_per_s: float = 0.0
    full_at_s: float = 0.0
    charge: float = 1.0  # what the provider counts for one that we count
    asked_at_s: float = float("-inf")
    heard_at_s: float = float("-inf")
    at_s: float = float("-inf")
    _taken: float = 0.0
    _history: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=4096))

    def heard(
        self, now_s: float, quota: Quota, asked_at_s: float, refused: float | None = None
    ) -> None:
        """An answer told; one of an older call than the last is old news.

        `refused` is the amount of the call where it was turned away.
        """
        if refused:
            self._learn_charge(quota.remaining / refused)
        if quota.limit <= 0 or asked_at_s < self.asked_at_s:
            return
        self._fill(now_s)
        level = quota.remaining - (self._taken - self._taken_until(asked_at_s))
        same = asked_at_s == self.asked_at_s and self.heard_at_s > float("-inf")
        self.level = min(self.level, level) if same else level
        self.limit, self.asked_at_s = quota.limit, asked_at_s
        self.heard_at_s = self.at_s = now_s
        self._judge_reset(now_s, quota)

    def _learn_charge(self, room: float) -> None:
        """A call was refused for which there was room, by our count: the provider counts more."""
        if self.charge <= room <= CHARGE_MAX:
            self.charge = min(CHARGE_MAX, room * CHARGE_MORE)

    def _judge_reset(self, now_s: float, quota: Quota) -> None:
        needed_s = (quota.limit - quota.remaining) / quota.limit * 60.0
        reset_s = needed_s if quota.reset_s is None else quota.reset_s
        even = abs(reset_s - needed_s) <= max(1.0, CONTINUOUS_SHARE * needed_s)
        self.rate_per_s = quota.limit / 60.0 if even else 0.0
        self.full_at_s = now_s + reset_s if not even else float("inf")

    def wait_s(self, now_s: float, amount: float) -> float:
        """Seconds until the provider should take so much; 0 where it has said nothing lately."""
        if now_s - self.heard_at_s >= HEARD_MAX_S:
            return 0.0
        self._fill(now_s)
        missing = min(amount * self.charge, self.limit) - self.level
        if missing <= self.limit * ROUNDING:
            return 0.0
        rate = self.rate_per_s * self.share
        wait_s = missing / rate if rate > 0 else self.full_at_s - now_s
        return max(0.0, min(wait_s, HEARD_MAX_S - (now_s - self.heard_at_s)))

    def take(self, now_s: float, amount: float) -> None:
        self._fill(now_s)
        amount *= self.charge
        self.level -= amount
        self._taken += amount
        self._history.append((now_s, self._taken))

    def _taken_until(self, at_s: float) -> float:
        index = bisect_right(self._history, (at_s, float("inf")))
        return self._history[index - 1][1] if index else 0.0

    def _fill(self, now_s: float) -> None:
        if now_s <= self.at_s:
            return
        if now_s >= self.full_at_s:
            self.level, self.full_at_s = self.limit, float("inf")
        elif self.at_s > float("-inf"):
            gained = (now_s - self.at_s) * self.rate_per_s * self.share
            self.level = min(self.limit, self.level + gained)
        self.at_s = now_s


class Budget:
    """Requests, or tokens: the smaller of our own share and of what the provider takes."""

    def __init__(self, per_minute: int | None, smallest_burst: float = 0.0) -> None:
        """`per_minute` for all workers together; None: only what the provider says counts."""
        self._per_minute, self._smallest_burst = per_minute, smallest_burst
        self._provider = ProviderQuota()
        self._own: Bucket | None = None
        if per_minute is not None:
            self._own = Bucket.full(*self._rate_and_burst(1.0))

    def _rate_and_burst(self, share: float) -> tuple[float, float]:
        assert self._per_minute is not None
        rate_per_s = self._per_minute * share / 60.0
        return rate_per_s, max(self._smallest_burst, rate_per_s * BURST_S)

    def set_share(self, now_s: float, share: float) -> None:
        """Our part of it, from now on."""
        self._provider.share = share
        if self._own is not None:
            self._own.change(now_s, *self._rate_and_burst(share))

    def wait_s(self, now_s: float, amount: float, amount_max: float) -> float:
        own_s = 0.0 if self._own is None else self._own.wait_s(now_s, amount)
        return min(WAIT_MAX_S, max(own_s, self._provider.wait_s(now_s, amount_max)))

    def take(self, now_s: float, amount: float, amount_max: float) -> None:
        if self._own is not None:
            self._own.take(now_s, amount)
        self._provider.take(now_s, amount_max)

    def correct(self, now_s: float, estimated: float, used: float) -> None:
        """What was used is known now; the provider's own count comes with its headers."""
        if self._own is not None:
            self._own.take(now_s, used - estimated)

    def heard(
        self, now_s: float, quota: Quota, asked_at_s: float, refused: float | None = None
    ) -> None:
        self._provider.heard(now_s, quota, asked_at_s, refused)

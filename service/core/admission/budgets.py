"""Budgets of requests and of tokens: our own from settings, the provider's from its headers.

Every call is charged once, before it is sent, with an estimate of its tokens. The estimate is
corrected when the provider tells what the call used. Rules of this file: pure; time comes in as
seconds of a monotonic clock.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field

from service.core.admission.buckets import ROUNDING, WAIT_MAX_S, Bucket

BURST_S = 2.0
"""How many seconds' worth of a budget may be used at once. Providers divide a minute's limit into
pieces of one to ten seconds: a longer burst would be refused there, and would exceed the minute's
limit by more than a thirtieth. With a shorter one, room that a late event loop has not used would
be lost."""

HEARD_MAX_S = 60.0
"""For how many seconds the limits in a provider's headers are believed. A limit by the minute has
room again by then, and for a longer wait the provider sends a Retry-After."""

CHARGE_MAX = 8.0
"""The most that the provider may count for one unit of ours. Where a call is refused although there
was room for more than this many calls of its size, the refusal has another cause."""

CHARGE_MORE = 1.05
"""A refusal raises `charge` by this factor beyond what it proves, so that a few refusals are enough
to find what the provider counts."""

CONTINUOUS_SHARE = 0.1
"""How far the reset that a provider names may differ from the time in which an evenly filling
bucket is full: a tenth of it, or a second. Where it differs by more, the limit comes back all at
once, at the reset."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """The tokens of a call that is not sent yet. `tokens` is the number expected, `tokens_max` what
    the provider may count when the call arrives (many count the whole `output_tokens_max`)."""

    tokens: int = 0
    tokens_max: int = 0
    route: str = ""
    """The route that the call goes out on."""


NO_TOKENS = Estimate()
"""The estimate of a call whose tokens are not counted."""


@dataclass(frozen=True, slots=True)
class Quota:
    """One limit of a provider (requests or tokens), as an answer's headers tell it. `reset_s`:
    seconds until the limit is full again."""

    limit: float
    remaining: float
    reset_s: float | None = None


@dataclass(frozen=True, slots=True)
class Allowance:
    """The limits in one answer's headers; `asked_at_s` is when its call was sent."""

    asked_at_s: float
    requests: Quota | None = None
    tokens: Quota | None = None
    route: str = ""
    refused: Estimate | None = None
    """The estimate that the call was charged with, where it was refused for a limit; else None."""


@dataclass(slots=True)
class ProviderQuota:
    """How much the provider will still accept, from its last headers and from what was sent since.

    The headers tell the state at the moment the call arrived at the provider. Everything that we
    sent after that call is subtracted. What has filled up since is added only from the moment in
    which the headers reached us. We therefore assume too little by what fills up in one round
    trip, which is small beside the provider's bucket of a minute.
    """

    share: float = 1.0
    limit: float = 0.0
    level: float = 0.0
    rate_per_s: float = 0.0
    full_at_s: float = 0.0
    charge: float = 1.0  # how much the provider counts for one unit that we count
    asked_at_s: float = float("-inf")
    heard_at_s: float = float("-inf")
    at_s: float = float("-inf")
    _taken: float = 0.0
    _history: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=4096))

    def heard(
        self, now_s: float, quota: Quota, asked_at_s: float, refused: float | None = None
    ) -> None:
        """Take over an answer's `quota`, unless its call was sent before that of the last one.

        `refused` is the amount of the call where it was refused for a limit.
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
        """Where a call was refused although there was room by our count, the provider counts more
        for it than we do."""
        if self.charge <= room <= CHARGE_MAX:
            self.charge = min(CHARGE_MAX, room * CHARGE_MORE)

    def _judge_reset(self, now_s: float, quota: Quota) -> None:
        needed_s = (quota.limit - quota.remaining) / quota.limit * 60.0
        reset_s = needed_s if quota.reset_s is None else quota.reset_s
        even = abs(reset_s - needed_s) <= max(1.0, CONTINUOUS_SHARE * needed_s)
        self.rate_per_s = quota.limit / 60.0 if even else 0.0
        self.full_at_s = now_s + reset_s if not even else float("inf")

    def wait_s(self, now_s: float, amount: float) -> float:
        """Seconds until the provider should accept `amount`; 0 where it has told no limits
        lately."""
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
    """Requests, or tokens: the smaller of our own share and of what the route's provider takes."""

    def __init__(self, per_minute: int | None, smallest_burst: float = 0.0) -> None:
        """`per_minute` is for all workers together; None: only the provider's limit counts."""
        self._per_minute, self._smallest_burst = per_minute, smallest_burst
        self._providers: dict[str, ProviderQuota] = {}  # by route
        self._share = 1.0
        self._own: Bucket | None = None
        if per_minute is not None:
            self._own = Bucket.full(*self._rate_and_burst(1.0))

    def _provider(self, route: str) -> ProviderQuota:
        provider = self._providers.get(route)
        if provider is None:
            provider = self._providers[route] = ProviderQuota(self._share)
        return provider

    def _rate_and_burst(self, share: float) -> tuple[float, float]:
        assert self._per_minute is not None
        rate_per_s = self._per_minute * share / 60.0
        return rate_per_s, max(self._smallest_burst, rate_per_s * BURST_S)

    def set_share(self, now_s: float, share: float) -> None:
        """Sets our part of the budget, 0 to 1, from now on."""
        self._share = share
        for provider in self._providers.values():
            provider.share = share
        if self._own is not None:
            self._own.change(now_s, *self._rate_and_burst(share))

    def wait_s(self, now_s: float, amount: float, amount_max: float, route: str = "") -> float:
        own_s = 0.0 if self._own is None else self._own.wait_s(now_s, amount)
        return min(WAIT_MAX_S, max(own_s, self._provider(route).wait_s(now_s, amount_max)))

    def take(self, now_s: float, amount: float, amount_max: float, route: str = "") -> None:
        if self._own is not None:
            self._own.take(now_s, amount)
        self._provider(route).take(now_s, amount_max)

    def correct(self, now_s: float, estimated: float, used: float) -> None:
        """Replace an estimate by what was used. The provider's quota needs no correction: its
        headers tell its own count."""
        if self._own is not None:
            self._own.take(now_s, used - estimated)

    def heard(
        self,
        now_s: float,
        quota: Quota,
        asked_at_s: float,
        refused: float | None = None,
        route: str = "",
    ) -> None:
        self._provider(route).heard(now_s, quota, asked_at_s, refused)

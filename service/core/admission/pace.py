"""The pace: calls a second where the provider limits the rate and does not tell its limit.

Rules of this file: pure; time comes in as seconds of a monotonic clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

HOLD_BELOW = 0.96
"""After a refusal the rate starts at this share of the limit that was found. It is low enough for
the provider's bucket to refill, and high enough to lose little."""

PLATEAU = 0.985
"""The share of the found limit around which the rate grows slowest: just below what was refused."""

PLATEAU_S = 30.0
"""Seconds of growth until the plateau is reached. The rate reaches the found limit again after
about twice as long."""

AGAIN_S = 5.0
"""A refusal within this many seconds of the last one shows that the rate is still far too high: it
is cut by more."""

CUTS = (0.93, 0.85, 0.7)
"""The factors by which the rate is cut for the first, the second and each further refusal in such a
row."""

SEARCH_PER_S = 0.05
"""By which share the rate grows each second after such a row, until the next refusal: the limit is
not known at all then."""

LATE_S = 0.1
"""For how many seconds' worth of calls a late event loop may catch up."""

RATE_MIN_PER_S = 1 / 60
"""The lowest pace, one call a minute: no provider has a smaller limit."""

_KNOWN = 8
"""How many starts are needed to compute a rate from them."""


@dataclass(slots=True)
class Pace:
    """Starts one call after the other at a rate that stays just below the hidden limit.

    It is off until the first refusal. From then on it works as TCP Cubic does with its window (RFC
    9438; the AWS SDKs limit their rate by the same curve): the rate grows quickly towards the limit
    that was found at the last refusal, slowly around it, and quickly beyond it.

    The limit that a refusal shows lies between two rates. One is the rate that was refused. The
    other is the rate of the calls accepted since the refusal before: the provider's bucket is empty
    at both refusals, so these calls used exactly what filled up in between, unless the bucket is so
    small that it overflowed meanwhile; then the refused rate is nearer. We take the mean of both.
    """

    rate_per_s: float | None = None
    _found: float = 0.0  # the limit as the last refusal showed it
    _low: float = 0.0  # where the growth began
    _grown_s: float = 0.0  # seconds of growth; they pass only while calls use the pace
    _searching: bool = False
    _row: int = 0
    _cut_at_s: float = float("-inf")
    _next_s: float = float("-inf")
    _accepted: int = 0  # calls answered that began since the cut
    _starts: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    _fitted: float | None = None  # the rate at the last answer
    _cut_since_answer: bool = False

    def wait_s(self, now_s: float) -> float:
        if self.rate_per_s is None:
            return 0.0
        return max(0.0, self._next_s - now_s)

    def started(self, now_s: float) -> None:
        before_s = self._starts[-1] if self._starts else now_s
        self._starts.append(now_s)
        if self.rate_per_s is None:
            return
        self._grow(min(now_s - before_s, 2.0 / self.rate_per_s))
        self._next_s = max(self._next_s, now_s - LATE_S) + 1.0 / self.rate_per_s

    def succeeded(self, started_s: float) -> None:
        self._fitted, self._cut_since_answer = self.rate_per_s, False
        if started_s >= self._cut_at_s:
            self._accepted += 1

    def refused(self, now_s: float, started_s: float) -> None:
        """A call was refused with a 429. One that began before the last cut is ignored."""
        if started_s < self._cut_at_s:
            return
        rate = self._sent_per_s(now_s)
        if rate is None:
            return
        self._cut_since_answer = True
        if self._cut_at_s == float("-inf") or now_s - self._cut_at_s < AGAIN_S:
            self._cut_deep(rate)
        else:
            self._cut_to(self._limit(rate, now_s))
        self._cut_at_s, self._grown_s, self._accepted = now_s, 0.0, 0
        assert self.rate_per_s is not None
        self._next_s = now_s + 1.0 / self.rate_per_s

    def outage(self) -> None:
        """The circuit has opened: cuts since the last answer came from the outage, not from a
        limit, and are taken back."""
        if self._cut_since_answer:
            self.rate_per_s, self._cut_at_s = self._fitted, float("-inf")
            self._low = self._found = self._fitted or 0.0
            self._grown_s = 0.0

    def take_back(self) -> None:
        """The refusals turned out to concern one message alone: there is no known limit, and the
        pace is off again."""
        self.rate_per_s, self._cut_at_s = None, float("-inf")
        self._low = self._found = self._grown_s = 0.0
        self._row, self._searching = 0, False

    def _limit(self, rate: float, now_s: float) -> float:
        accepted = self._accepted / (now_s - self._cut_at_s)
        return (rate + min(rate, accepted)) / 2.0

    def _cut_to(self, found: float) -> None:
        self._row, self._searching = 0, False
        self._found = found
        self._low = self.rate_per_s = max(RATE_MIN_PER_S, HOLD_BELOW * found)

    def _cut_deep(self, rate: float) -> None:
        factor = CUTS[-1] if self._cut_at_s == float("-inf") else CUTS[min(self._row, 2)]
        self._row += 1
        self._searching = self._searching or factor == CUTS[-1]
        self._low = self.rate_per_s = max(RATE_MIN_PER_S, factor * rate)
        self._found = self._low / HOLD_BELOW

    def _grow(self, elapsed_s: float) -> None:
        self._grown_s += elapsed_s
        if self._searching:
            self.rate_per_s = self._low * (1.0 + SEARCH_PER_S) ** self._grown_s
            return
        plateau = PLATEAU * self._found
        steepness = (plateau - self._low) / PLATEAU_S**3
        self.rate_per_s = plateau + steepness * (self._grown_s - PLATEAU_S) ** 3

    def _sent_per_s(self, now_s: float) -> float | None:
        """The rate that was refused: the pace, or the rate of the last starts where it was less
        than half of it; None: not known."""
        sent = None
        if len(self._starts) >= _KNOWN:
            sent = (len(self._starts) - 1) / max(now_s - self._starts[0], 1e-3)
        if self.rate_per_s is None or (sent is not None and sent < self.rate_per_s / 2):
            return sent
        return self.rate_per_s

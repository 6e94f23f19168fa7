"""The spend limit: what calls may cost in a rolling hour, in US dollars, counted by the minute.

Rules of this file: pure; time comes in as seconds of a monotonic clock.
"""

from __future__ import annotations

from collections import deque

HOUR_S = 3600.0
MINUTE_S = 60.0

FIRST_ANSWER_S = 1.0
"""Before the first answer it is not known what a call costs, so calls go out one at a time. The
next one asks again after this many seconds, or when the running call has ended."""


class Spend:
    """Compares what was spent in the last hour with our part of the limit.

    Each call in flight counts with the mean cost of a call, so that all of them together do not
    exceed the limit. Each partition has an equal part of the limit, and takes it and its account
    along to its next holder. Lags don't count here: they change, but money that is spent stays
    spent.
    """

    def __init__(self, usd_per_hour: float | None) -> None:
        self._limit_usd = usd_per_hour
        self._minutes: deque[list[float]] = deque()  # [minute's begin, usd]
        self._share = 1.0
        self._spent_usd = self._call_usd = 0.0
        self._knows_cost = False

    def set_share(self, share: float) -> None:
        """Sets our part of the limit from now on: the share of all partitions that we hold."""
        self._share = share

    def carry(self, now_s: float, age_s: float, usd: float) -> None:
        """Add what was spent `age_s` seconds ago on the account of a partition that has come;
        negative for one that has gone."""
        if age_s >= HOUR_S + MINUTE_S:
            return
        self._minutes = deque(sorted([*self._minutes, [now_s - age_s, usd]]))
        self._spent_usd += usd

    def spent(self, now_s: float, usd: float) -> None:
        """An answer has cost this much, which may be 0."""
        self._knows_cost = True
        if usd <= 0:
            return
        self._call_usd = usd if not self._call_usd else 0.9 * self._call_usd + 0.1 * usd
        if not self._minutes or now_s >= self._minutes[-1][0] + MINUTE_S:
            self._minutes.append([now_s, 0.0])
        self._minutes[-1][1] += usd
        self._spent_usd += usd

    def last_hour_usd(self, now_s: float) -> float:
        while self._minutes and self._minutes[0][0] + MINUTE_S <= now_s - HOUR_S:
            self._spent_usd -= self._minutes.popleft()[1]
        if not self._minutes:
            self._spent_usd = 0.0
        return self._spent_usd

    def wait_s(self, now_s: float, in_flight: int) -> float:
        """Seconds until the oldest minute leaves the hour; 0: there is room for one more call."""
        if self._limit_usd is None:
            return 0.0
        if not self._knows_cost and in_flight:
            return FIRST_ANSWER_S
        spent = self.last_hour_usd(now_s) + in_flight * self._call_usd
        if spent < self._limit_usd * self._share:
            return 0.0
        return self._until_less_s(now_s)

    def _until_less_s(self, now_s: float) -> float:
        if not self._minutes:
            return MINUTE_S
        return max(1.0, self._minutes[0][0] + MINUTE_S + HOUR_S - now_s)

    def exceeded(self, now_s: float) -> str | None:
        """A sentence for a person where the limit holds calls up."""
        if self._limit_usd is None or not self.wait_s(now_s, 0):
            return None
        return (
            f"limits.spend_usd_per_hour is reached: calls of the last hour cost "
            f"{self.last_hour_usd(now_s):.2f} USD; calls start again when the oldest of them are "
            "an hour old, or with a higher limit"
        )

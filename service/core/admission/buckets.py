"""A token bucket: what may be used now, and what has to be waited for.

Rules of this file: pure; time comes in as seconds of a monotonic clock.
"""

from dataclasses import dataclass

ROUNDING = 1e-6
"""Share of the burst that may be missing: a wait computed in floats must be over when it is."""

WAIT_MAX_S = 60.0
"""The longest wait that is told at once; whoever waits asks again, for the rate may have grown."""


@dataclass(slots=True)
class Bucket:
    """Fills with `rate_per_s` up to `burst`, and may be overdrawn.

    In any stretch of time T at most burst + rate x T goes out, and what one amount larger than
    the burst exceeds it by: such a one goes on a full bucket and leaves a debt.
    """

    rate_per_s: float
    burst: float
    level: float
    at_s: float = float("-inf")

    @staticmethod
    def full(rate_per_s: float, burst: float) -> "Bucket":
        return Bucket(rate_per_s, burst, burst)

    def wait_s(self, now_s: float, amount: float) -> float:
        """Seconds until so much may go; 0: now."""
        self._fill(now_s)
        missing = min(amount, self.burst) - self.level
        if missing <= self.burst * ROUNDING:
            return 0.0
        return min(WAIT_MAX_S, missing / self.rate_per_s) if self.rate_per_s > 0 else WAIT_MAX_S

    def take(self, now_s: float, amount: float) -> None:
        """Use it, room or not; a negative amount gives back what was taken too much."""
        self._fill(now_s)
        self.level = min(self.burst, self.level - amount)

    def change(self, now_s: float, rate_per_s: float, burst: float) -> None:
        """Fill with another rate from now on; what is there stays there, within the burst."""
        self._fill(now_s)
        self.rate_per_s, self.burst = rate_per_s, burst
        self.level = min(self.level, burst)

    def _fill(self, now_s: float) -> None:
        if now_s > self.at_s:
            if self.at_s > float("-inf"):
                gained = (now_s - self.at_s) * self.rate_per_s
                self.level = min(self.burst, self.level + gained)
            self.at_s = now_s

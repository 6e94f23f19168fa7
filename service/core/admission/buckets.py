"""A token bucket: how much may be used now, and how long to wait for more.

Rules of this file: pure; time comes in as seconds of a monotonic clock.
"""

from dataclasses import dataclass

ROUNDING = 1e-6
"""The share of the burst that may be missing. Without it, rounding of floats could leave a tiny
rest to wait for after the computed wait is over."""

WAIT_MAX_S = 60.0
"""The longest wait that is returned at once. The caller asks again after it, because the rate may
have grown meanwhile."""


@dataclass(slots=True)
class Bucket:
    """Fills with `rate_per_s` up to `burst`, and may be overdrawn.

    In any T seconds at most burst + rate x T goes out. The exception is one amount that is larger
    than the burst: it may go once the bucket is full, and leaves a debt.
    """

    rate_per_s: float
    burst: float
    level: float
    at_s: float = float("-inf")

    @staticmethod
    def full(rate_per_s: float, burst: float) -> "Bucket":
        return Bucket(rate_per_s, burst, burst)

    def wait_s(self, now_s: float, amount: float) -> float:
        """Seconds until `amount` may be taken; 0: now."""
        self._fill(now_s)
        missing = min(amount, self.burst) - self.level
        if missing <= self.burst * ROUNDING:
            return 0.0
        return min(WAIT_MAX_S, missing / self.rate_per_s) if self.rate_per_s > 0 else WAIT_MAX_S

    def take(self, now_s: float, amount: float) -> None:
        """Take `amount`, whether there is room or not; a negative amount is given back."""
        self._fill(now_s)
        self.level = min(self.burst, self.level - amount)

    def change(self, now_s: float, rate_per_s: float, burst: float) -> None:
        """Fill with another rate from now on; the level stays, up to the new burst."""
        self._fill(now_s)
        self.rate_per_s, self.burst = rate_per_s, burst
        self.level = min(self.level, burst)

    def _fill(self, now_s: float) -> None:
        if now_s > self.at_s:
            if self.at_s > float("-inf"):
                gained = (now_s - self.at_s) * self.rate_per_s
                self.level = min(self.burst, self.level + gained)
            self.at_s = now_s

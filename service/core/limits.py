"""Admission: whether one more call may start now, and if not, when to ask again.

Rules of this file: time comes in as seconds of a monotonic clock; nothing waits here, callers do.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from service.core.retry import RETRY_AFTER_MAX_S, Backoff, Uniform

CIRCUIT_FAILURES = 10
"""Failures in a row, with no success between, that open the circuit: fewer happen by chance
among concurrent calls, more only cost calls."""

DECREASE = 0.7
"""A smaller factor gives more of the provider away than it takes back; a larger one asks more
often in vain before it fits."""


class CircuitState(StrEnum):
    CLOSED = "closed"  # calls go through
    OPEN = "open"  # none do, until a moment
    PROBING = "probing"  # one call is out to see


@dataclass(slots=True)
class Circuit:
    """Opens when everything fails; then lets one call through at a time to see.

    One success closes it. Each failed probe doubles the wait, up to the backoff's cap.
    """

    uniform: Uniform
    backoff: Backoff = field(default_factory=lambda: Backoff(base_s=2.0, cap_s=30.0))
    state: CircuitState = CircuitState.CLOSED
    reason: str | None = None
    failures: int = 0
    openings: int = 0
    reopen_at_s: float = 0.0

    def succeeded(self) -> None:
        self.state, self.reason = CircuitState.CLOSED, None
        self.failures = self.openings = 0

    def failed(self, now_s: float, sentence: str, *, service: bool) -> None:
        """A call failed; a service failure opens at once, others after a row of them."""
        self.failures += 1
        probing = self.state is CircuitState.PROBING
        if self.state is CircuitState.OPEN or not (
            service or probing or self.failures >= CIRCUIT_FAILURES
        ):
            return
        self.openings += 1
        self.state, self.reason = CircuitState.OPEN, sentence
        # Half of the ceiling at least: full jitter could ask again at once.
        half_s = min(self.backoff.cap_s, self.backoff.base_s * 2.0 ** min(self.openings, 32)) / 2
        self.reopen_at_s = now_s + half_s + self.uniform(0.0, half_s)

    def cancelled(self) -> None:
        """The probe was called off without an answer: another may go."""
        if self.state is CircuitState.PROBING:
            self.state = CircuitState.OPEN

    def wait_s(self, now_s: float) -> float | None:
        """0: a call may start; a number: ask again then; None: only an answer changes it."""
        match self.state:
            case CircuitState.CLOSED:
                return 0.0
            case CircuitState.OPEN:
                return max(0.0, self.reopen_at_s - now_s)
            case CircuitState.PROBING:
                return None

    def admitted(self) -> None:
        if self.state is CircuitState.OPEN:
            self.state = CircuitState.PROBING


@dataclass(slots=True)
class Admission:
    """Slots in use, how many of them may be, a shared cooldown, and the circuit.

    `limit` follows what the provider bears: after a sign of overload it falls to `DECREASE` of
    itself, once for all calls that were under way together; each success raises it by
    1 / `limit`, so by about one slot for a round of calls (additive increase, multiplicative
    decrease: Chiu and Jain, 1989). It stays between 1 and `slots`.
    """

    slots: int
    circuit: Circuit
    busy: int = 0
    limit: float = 0.0
    cooldown_until_s: float = 0.0
    decreased_at_s: float = float("-inf")

    def __post_init__(self) -> None:
        self.limit = float(self.slots)

    def wait_s(self, now_s: float) -> float | None:
        """0: a call may start; a number: ask again after it; None: when a call has ended."""
        if self.busy >= int(self.limit):
            return None
        circuit_s = self.circuit.wait_s(now_s)
        if circuit_s is None:
            return None
        return max(circuit_s, self.cooldown_until_s - now_s, 0.0)

    def admit(self) -> None:
        """Take a slot; only after `wait_s` gave 0."""
        assert self.busy < self.slots, "no free slot"
        self.busy += 1
        self.circuit.admitted()

    def release(self) -> None:
        """Give the slot back; exactly once for each `admit`."""
        assert self.busy > 0, "a slot was given back twice"
        self.busy -= 1

    def succeeded(self) -> None:
        self.circuit.succeeded()
        self.limit = min(float(self.slots), self.limit + 1.0 / self.limit)

    def overloaded(self, now_s: float, started_s: float, retry_after_s: float | None) -> None:
        """A call that began at `started_s` was turned away, or not answered in time."""
        if retry_after_s is not None:
            asked_s = min(retry_after_s, RETRY_AFTER_MAX_S)
            self.cooldown_until_s = max(self.cooldown_until_s, now_s + asked_s)
        if started_s >= self.decreased_at_s:
            self.limit = max(1.0, self.limit * DECREASE)
            self.decreased_at_s = now_s

"""The circuit breaker: whether calls go through at all.

Rules of this file: time comes in as seconds of a monotonic clock; nothing waits here.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from service.core.admission.retry import Backoff, Uniform

CIRCUIT_FAILURES = 10
"""Failures in a row, with no success between, that open the circuit: fewer happen by chance
among concurrent calls, more only cost calls."""

PROBE_CAP_S = 12.0
"""The longest wait before the next probe, where the provider asks for none. A probe is one tiny
call, and what a longer wait saves in them it costs in time after the provider is back."""

PROBE_JITTER_S = 2.0
"""At most so long after a Retry-After is over does the probe go out."""


class CircuitState(StrEnum):
    CLOSED = "closed"  # calls go through
    OPEN = "open"  # none do, until a moment
    PROBING = "probing"  # one call is out to see


@dataclass(slots=True)
class Circuit:
    """Opens when everything fails; then one probe at a time goes out to see.

    One success closes it. Each failed probe doubles the wait, up to the backoff's cap; what the
    provider asked for (Retry-After) is waited instead where it asks.
    """

    uniform: Uniform
    backoff: Backoff = field(default_factory=lambda: Backoff(base_s=2.0, cap_s=PROBE_CAP_S))
    state: CircuitState = CircuitState.CLOSED
    reason: str | None = None
    failures: int = 0
    openings: int = 0
    reopen_at_s: float = 0.0

    def succeeded(self) -> bool:
        """A call was answered; True: the circuit was not closed until now."""
        reopened = self.state is not CircuitState.CLOSED
        self.state, self.reason = CircuitState.CLOSED, None
        self.failures = self.openings = 0
        return reopened

    def failed(
        self, now_s: float, sentence: str, *, service: bool, retry_after_s: float | None = None
    ) -> bool:
        """A call failed; a service failure opens at once, others after a row of them.

        True: this has opened the circuit, which was closed.
        """
        self.failures += 1
        before = self.state
        if before is CircuitState.OPEN or not (
            service or before is CircuitState.PROBING or self.failures >= CIRCUIT_FAILURES
        ):
            return False
        self.openings += 1
        self.state, self.reason = CircuitState.OPEN, sentence
        self.reopen_at_s = now_s + self._wait_s(retry_after_s)
        return before is CircuitState.CLOSED

    def doubt(self, now_s: float) -> None:
        """Nobody knows whether the provider is there: a probe goes out at once."""
        if self.state is CircuitState.CLOSED:
            self.state, self.reopen_at_s = CircuitState.OPEN, now_s

    def _wait_s(self, retry_after_s: float | None) -> float:
        if retry_after_s is not None:
            return retry_after_s + self.uniform(0.0, min(PROBE_JITTER_S, retry_after_s))
        # Half of the ceiling at least: full jitter could ask again at once.
        half_s = min(self.backoff.cap_s, self.backoff.base_s * 2.0 ** min(self.openings, 32)) / 2
        return half_s + self.uniform(0.0, half_s)

    def cancelled(self) -> None:
        """The probe was called off without an answer: another may go."""
        if self.state is CircuitState.PROBING:
            self.state = CircuitState.OPEN

    def wait_s(self, now_s: float) -> float | None:
        """0: a probe may start, or any call where it is closed; a number: ask again then; None:
        only an answer changes it."""
        match self.state:
            case CircuitState.CLOSED:
                return 0.0
            case CircuitState.OPEN:
                return max(0.0, self.reopen_at_s - now_s)
            case CircuitState.PROBING:
                return None

    def probing(self) -> None:
        """The probe is out; only after `wait_s` gave 0."""
        assert self.state is CircuitState.OPEN, f"a probe while {self.state}"
        self.state = CircuitState.PROBING

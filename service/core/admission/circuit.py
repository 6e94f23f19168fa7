"""The circuit breaker: whether calls go through at all.

Rules of this file: time comes in as seconds of a monotonic clock; nothing waits here.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from service.core.admission.retry import Backoff, Uniform

CIRCUIT_FAILURES = 10
"""How many failures in a row, with no success between them, open the circuit. Fewer may happen by
chance among concurrent calls; waiting for more only costs calls."""

PROBE_CAP_S = 12.0
"""The longest wait before the next probe, where the provider asks for none. A longer wait would
save a few tiny calls, but calls would start that much later once the provider is back."""

PROBE_JITTER_S = 2.0
"""The most that is added at random to a Retry-After before the probe goes out, so that not all
workers send theirs at once."""

MESSAGE_EVERY = 3
"""Every third try is a waiting message instead of a probe, because a guardrail may refuse only the
probe's text."""


class CircuitState(StrEnum):
    CLOSED = "closed"  # calls go through
    OPEN = "open"  # no call goes out; a probe does at `reopen_at_s`
    PROBING = "probing"  # a probe is out


@dataclass(slots=True)
class Circuit:
    """Opens when everything fails; then one probe at a time looks whether the provider is back.

    One success closes it. Each failed probe doubles the wait, up to the backoff's cap. Where the
    provider sends a Retry-After, that is waited instead.
    """

    uniform: Uniform
    backoff: Backoff = field(default_factory=lambda: Backoff(base_s=2.0, cap_s=PROBE_CAP_S))
    state: CircuitState = CircuitState.CLOSED
    reason: str | None = None
    failures: int = 0
    openings: int = 0
    tries: int = 0  # probes, and messages instead of them, since the last success
    reopen_at_s: float = 0.0

    def succeeded(self) -> bool:
        """A call was answered; True: the circuit was not closed until now."""
        reopened = self.state is not CircuitState.CLOSED
        self.state, self.reason = CircuitState.CLOSED, None
        self.failures = self.openings = self.tries = 0
        return reopened

    def failed(
        self, now_s: float, sentence: str, *, service: bool, retry_after_s: float | None = None
    ) -> bool:
        """A call failed. A service failure opens the circuit at once, other failures after
        `CIRCUIT_FAILURES` in a row.

        True: the circuit was closed, and this failure has opened it.
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
        """Nothing shows whether the provider is reachable: a probe goes out at once."""
        if self.state is CircuitState.CLOSED:
            self.state, self.reopen_at_s = CircuitState.OPEN, now_s

    def _wait_s(self, retry_after_s: float | None) -> float:
        if retry_after_s is not None:
            return retry_after_s + self.uniform(0.0, min(PROBE_JITTER_S, retry_after_s))
        # At least half of the ceiling is waited: with full jitter the wait could be near 0.
        half_s = min(self.backoff.cap_s, self.backoff.base_s * 2.0 ** min(self.openings, 32)) / 2
        return half_s + self.uniform(0.0, half_s)

    def cancelled(self) -> None:
        """The probe was cancelled without an answer: another may go out."""
        if self.state is CircuitState.PROBING:
            self.state = CircuitState.OPEN

    @property
    def wants_a_message(self) -> bool:
        """Whether the next try is a waiting message and not a probe."""
        return (self.tries + 1) % MESSAGE_EVERY == 0

    def wait_s(self, now_s: float) -> float | None:
        """Seconds until a probe may start, or any call where the circuit is closed. None: a probe
        is out, and only its answer changes that."""
        match self.state:
            case CircuitState.CLOSED:
                return 0.0
            case CircuitState.OPEN:
                return max(0.0, self.reopen_at_s - now_s)
            case CircuitState.PROBING:
                return None

    def probing(self) -> None:
        """A probe goes out; allowed only after `wait_s` returned 0."""
        assert self.state is CircuitState.OPEN, f"a probe while {self.state}"
        self.state = CircuitState.PROBING
        self.tries += 1

"""Admission: whether one more call may start now, and if not, why and when to ask again.

A call needs a slot, room in the budgets of requests, tokens and money, its turn in the pace, no
cooldown and a closed circuit. Each of these has a file of its own; this file joins their answers.

Every call is charged here before it is sent. The first call of an attempt is charged when it gets
its slot. For a further call (a re-ask, another model) the extractor asks `again`; where there is no
room, the message gives its slot back and waits in the queue. Rules of this file: time comes in as
seconds of a monotonic clock; nothing waits here, callers do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from service.core.admission.budgets import NO_TOKENS, Allowance, Budget, Estimate
from service.core.admission.circuit import Circuit, CircuitState
from service.core.admission.pace import Pace
from service.core.admission.retry import RetryQuota
from service.core.admission.slots import Slots
from service.core.admission.spend import Spend

RESTART_SLOTS = 4
"""After a cooldown or an outage, this many calls may run beside those that still do. It is enough
to be at full speed after a few round trips, and too few to overload the provider at once."""

RESTART_GROWTH = 2
"""By how many slots each answer raises the limit after a restart. With the slot that the answer
itself frees, the number of calls triples in a round trip."""

RATE_LIMITED = "rate_limited"
"""The `reason` of a call's failure with status 429."""


class Cause(StrEnum):
    """What keeps the next call from starting, other than slots; in the order of the tuple in
    `Admission.waits`."""

    REQUESTS = "requests"  # the budget of requests, ours or the provider's
    TOKENS = "tokens"  # the budget of tokens, ours or the provider's
    SPEND = "spend"  # the spend limit of the hour
    PACE = "pace"  # the provider's hidden limit of the rate, as far as it is known
    COOLDOWN = "cooldown"  # the provider asked us to wait (Retry-After)
    CIRCUIT = "circuit"  # the circuit is not closed: calls are not answered


BUDGETS = frozenset({Cause.REQUESTS, Cause.TOKENS, Cause.SPEND})
"""Causes for which no messages are fetched either: they could not be called now, although nothing
is wrong."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The settings of admission; None: no such limit."""

    slots: int
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    spend_usd_per_hour: float | None = None


@dataclass(frozen=True, slots=True)
class Hold:
    """Why no call may start. Ask again after `wait_s` seconds; None: after a call has ended.
    `cause` is None where all slots are in use."""

    wait_s: float | None
    cause: Cause | None


NO_SLOT = Hold(None, None)


@dataclass(frozen=True, slots=True)
class Turn:
    """The right to one call: when it began, how many calls were in flight then (itself included),
    and what it was charged with."""

    started_s: float
    in_flight: int
    estimate: Estimate


class Meter(Protocol):
    """The part of admission that an extractor uses: it reports its calls and asks before a further
    one."""

    def again(self, now_s: float, estimate: Estimate) -> bool:
        """Charge a further call of a message that has a slot. False: there is no room, and the
        message has to give its slot back."""

    def used(self, now_s: float, estimate: Estimate, tokens: int) -> None:
        """A call that was charged with `estimate` has used `tokens`."""

    def told(self, now_s: float, allowance: Allowance) -> None:
        """An answer's headers have told the provider's limits."""


class Admission:
    """All limits in one; for one event loop."""

    def __init__(self, limits: Limits, circuit: Circuit) -> None:
        self._circuit = circuit
        self._slots = Slots(limits.slots)
        self._pace = Pace()
        self._requests = Budget(limits.requests_per_minute, smallest_burst=1.0)
        self._tokens = Budget(limits.tokens_per_minute, smallest_burst=1.0)
        self._spend = Spend(limits.spend_usd_per_hour)
        self._retries = RetryQuota()
        self.busy = 0
        self._cooldown_until_s = 0.0
        self.share = 1.0
        self.last_success_s: float | None = None
        """When a call or a probe was last answered; None: never. It shows that the provider was
        reachable then."""
        self._finishing = False
        self._restarting = False  # True from a cooldown or an outage to the first call after it
        self._restart_slots: int | None = None  # the limit after a restart, while it is the smaller

    @property
    def limit(self) -> int:
        """Calls that may be in flight now."""
        limit = int(self._slots.limit)
        return limit if self._restart_slots is None else min(limit, self._restart_slots)

    @property
    def closed(self) -> bool:
        """Whether the circuit is closed, so that calls may go out."""
        return self._circuit.state is CircuitState.CLOSED

    @property
    def outage(self) -> str | None:
        """A sentence for a person: why the circuit is not closed. None: it is closed."""
        return self._circuit.reason

    @property
    def pace_per_s(self) -> float | None:
        """Calls a second; None: the provider has no hidden limit of the rate that we met."""
        return self._pace.rate_per_s

    @property
    def finishing(self) -> bool:
        """Messages have to finish soon (a stop, a rebalance): a further call of a message that has
        a slot is charged, but does not wait."""
        return self._finishing

    def finish(self, *, finishing: bool) -> None:
        self._finishing = finishing

    def spent_last_hour_usd(self, now_s: float) -> float:
        return self._spend.last_hour_usd(now_s)

    def spend_exceeded(self, now_s: float) -> str | None:
        """A sentence for a person where the spend limit holds calls up."""
        return self._spend.exceeded(now_s)

    # --- asking ----------------------------------------------------------------------------------

    def hold(self, now_s: float, estimate: Estimate = NO_TOKENS) -> Hold | None:
        """Why no call may start now; None: one may. Asking charges nothing."""
        if self.full(now_s):
            return NO_SLOT
        if self._circuit.state is CircuitState.PROBING:
            return Hold(None, Cause.CIRCUIT)
        waits = self.waits(now_s, estimate)
        if not waits:
            return None
        cause = max(waits, key=waits.__getitem__)
        return Hold(waits[cause], cause)

    def full(self, now_s: float) -> bool:
        """Whether all slots that may be in use now are in use."""
        self._restart_now(now_s)
        return self.busy >= self.limit

    def waits(self, now_s: float, estimate: Estimate = NO_TOKENS) -> Mapping[Cause, float]:
        """Seconds until the next call may start, by cause; slots are not among the causes."""
        waits = (
            self._requests.wait_s(now_s, 1.0, 1.0),
            self._tokens.wait_s(now_s, estimate.tokens, estimate.tokens_max),
            self._spend.wait_s(now_s, self.busy),
            self._pace.wait_s(now_s),
            self._cooldown_until_s - now_s,
            self._circuit_s(now_s),
        )
        if max(waits) <= 0.0:  # nearly always so; asked before each call, so this has to be quick
            return {}
        return {cause: wait_s for cause, wait_s in zip(Cause, waits, strict=True) if wait_s > 0.0}

    def _circuit_s(self, now_s: float) -> float:
        """Seconds until the circuit lets a call start. It is never 0 while the circuit is not
        closed, even where a probe is due: only a probe may go then."""
        if self._circuit.state is CircuitState.CLOSED:
            return 0.0
        return max(self._circuit.wait_s(now_s) or 0.0, 1e-3)

    def _restart_now(self, now_s: float) -> None:
        over = now_s >= self._cooldown_until_s and self._circuit.state is CircuitState.CLOSED
        if self._restarting and over:
            self._restarting, self._restart_slots = False, self.busy + RESTART_SLOTS

    # --- one call --------------------------------------------------------------------------------

    def admit(self, now_s: float, estimate: Estimate = NO_TOKENS) -> Turn:
        """Take a slot and charge the call; allowed only after `hold` returned None."""
        assert self.busy < self._slots.most, "no free slot"
        self.busy += 1
        self.charge(now_s, estimate)
        return Turn(now_s, self.busy, estimate)

    def release(self) -> None:
        """Give the slot back; exactly once for each `admit`."""
        assert self.busy > 0, "a slot was given back twice"
        self.busy -= 1

    def again(self, now_s: float, estimate: Estimate) -> bool:
        """Charge a further call of a message that has a slot. False: there is no room, and the
        message has to give its slot back."""
        if not self._finishing and self.waits(now_s, estimate):
            return False
        self.charge(now_s, estimate)
        return True

    def charge(self, now_s: float, estimate: Estimate) -> None:
        """Charge a call that goes out, whether there is room or not."""
        self._requests.take(now_s, 1.0, 1.0)
        self._tokens.take(now_s, estimate.tokens, estimate.tokens_max)
        self._pace.started(now_s)

    def unused(self, now_s: float, estimate: Estimate) -> None:
        """Give back what was charged for a call that was not made (an answer from the cache)."""
        self._requests.correct(now_s, 1.0, 0.0)
        self._tokens.correct(now_s, estimate.tokens, 0.0)

    def used(self, now_s: float, estimate: Estimate, tokens: int) -> None:
        """A call that was charged with `estimate` has used `tokens`."""
        self._tokens.correct(now_s, estimate.tokens, tokens)

    def told(self, now_s: float, allowance: Allowance) -> None:
        """An answer's headers have told the provider's limits."""
        if allowance.requests is not None:
            self._requests.heard(now_s, allowance.requests, allowance.asked_at_s)
        if allowance.tokens is not None:
            refused = None if allowance.refused is None else allowance.refused.tokens_max
            self._tokens.heard(now_s, allowance.tokens, allowance.asked_at_s, refused)

    # --- what came of it -------------------------------------------------------------------------

    def succeeded(self, now_s: float, turn: Turn) -> bool:
        """A call was answered. True: the circuit was not closed until now."""
        self._slots.succeeded(now_s, turn.started_s, turn.in_flight)
        self._pace.succeeded(turn.started_s)
        self._retries.succeeded()
        if self._restart_slots is not None:
            self._restart_slots += RESTART_GROWTH
            if self._restart_slots >= self._slots.limit:
                self._restart_slots = None
        return self._answered(now_s)

    def _answered(self, now_s: float) -> bool:
        """The provider is reachable. True: the circuit was not closed until now."""
        self.last_success_s = now_s
        reopened = self._circuit.succeeded()
        if reopened:
            self._restarting = True
            self._retries.forgive()
        return reopened

    def overloaded(
        self, now_s: float, turn: Turn, reason: str, retry_after_s: float | None
    ) -> None:
        """A call was refused for overload, or not answered in time."""
        self.cool_down(now_s, retry_after_s)
        if self._circuit.state is not CircuitState.CLOSED:
            return  # it failed because of the outage, not because of too many calls
        limited = reason == RATE_LIMITED
        by_slots = self._slots.overloaded(now_s, turn.started_s, turn.in_flight, limited=limited)
        if limited and not by_slots:
            self._pace.refused(now_s, turn.started_s)

    def cool_down(self, now_s: float, retry_after_s: float | None) -> None:
        """No call starts for this time; afterwards they start slowly, unless a pace is in force and
        sees to that."""
        if retry_after_s is None:
            return
        self._cooldown_until_s = max(self._cooldown_until_s, now_s + retry_after_s)
        self._restarting = self._restarting or self._pace.rate_per_s is None

    def failed(
        self, now_s: float, sentence: str, *, service: bool, retry_after_s: float | None = None
    ) -> None:
        """A call, or a probe, was not answered."""
        opened = self._circuit.failed(now_s, sentence, service=service, retry_after_s=retry_after_s)
        if opened:
            self._slots.outage()
            self._pace.outage()

    def spent(self, now_s: float, usd: float) -> None:
        """An answer has cost this much, which may be 0."""
        self._spend.spent(now_s, usd)

    def doubt(self, now_s: float) -> None:
        """Nothing shows whether the provider is reachable: a probe goes out at once."""
        self._circuit.doubt(now_s)

    # --- probes ----------------------------------------------------------------------------------

    @property
    def probe_is_out(self) -> bool:
        return self._circuit.state is CircuitState.PROBING

    def probe_wait_s(self, now_s: float) -> float | None:
        """Seconds until a probe may start; None: a probe is out, and only its answer changes
        that."""
        return self._circuit.wait_s(now_s)

    def probing(self, now_s: float) -> None:
        """A probe goes out, which takes no slot; allowed only after `probe_wait_s` returned 0."""
        self._circuit.probing()
        self.charge(now_s, NO_TOKENS)

    def probe_succeeded(self, now_s: float) -> bool:
        """A probe was answered. True: the circuit was not closed until now."""
        return self._answered(now_s)

    def probe_cancelled(self) -> None:
        """The probe was cancelled without an answer: another may go out."""
        self._circuit.cancelled()

    # --- retries ---------------------------------------------------------------------------------

    def retries_available(self, now_s: float) -> int:
        """How many retries may be queued now."""
        return self._retries.available(now_s)

    def took_retries(self, retries: int) -> None:
        self._retries.take(retries)

    def retry_wait_s(self, now_s: float) -> float:
        """Seconds until one more retry may be queued; 0: now."""
        return self._retries.wait_s(now_s)

    # --- shares ----------------------------------------------------------------------------------

    def set_share(self, now_s: float, share: float) -> None:
        """Our part of the budgets that all workers share, 0 to 1."""
        self.share = share
        for budget in (self._requests, self._tokens):
            budget.set_share(now_s, share)
        self._spend.set_share(now_s, share)

"""Admission: whether one more call may start now, and if not, why and when to ask again.

What a call needs: a slot, room in the budgets of requests, tokens and money, its turn in the
pace, no cooldown, a closed circuit. Each of these is a file of its own; here they are one answer.

Every call is charged here before it is sent. The first one of an attempt with its slot; a further
one (a re-ask, another model) by the extractor through `again`, which gives the slot back and
waits like any other where there is no room. Rules of this file: time comes in as seconds of a
monotonic clock; nothing waits here, callers do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from service.core.budgets import NO_TOKENS, Allowance, Budget, Estimate
from service.core.circuit import Circuit, CircuitState
from service.core.pace import Pace
from service.core.retry import RetryQuota
from service.core.slots import Slots
from service.core.spend import Spend

RESTART_SLOTS = 4
"""With so many calls more than are running it goes on after a cooldown or an outage: enough to
be at full speed after a few round trips, too few to be a blow."""

RESTART_GROWTH = 2
"""Slots more for each answer, and the one that the answer frees: threefold for a round trip."""

RATE_LIMITED = "rate_limited"
"""The reason of a failure that came with a 429."""


class Cause(StrEnum):
    """What keeps the next call from starting, slots apart; in the order of `Admission.waits`."""

    REQUESTS = "requests"  # the budget of requests, ours or the provider's
    TOKENS = "tokens"  # of tokens
    SPEND = "spend"  # the spend limit of the hour
    PACE = "pace"  # the provider's hidden rate, as far as it is known
    COOLDOWN = "cooldown"  # the provider asked everybody to wait
    CIRCUIT = "circuit"  # nothing is answered


BUDGETS = frozenset({Cause.REQUESTS, Cause.TOKENS, Cause.SPEND})
"""Causes for which nothing is fetched either: nothing is wrong, and nothing can be done now."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Settings of admission; None: off."""

    slots: int
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    spend_usd_per_hour: float | None = None


@dataclass(frozen=True, slots=True)
class Hold:
    """Why no call may start. `wait_s`: ask again after it; None: when a call has ended.
    `cause` is None where it is the slots."""

    wait_s: float | None
    cause: Cause | None


NO_SLOT = Hold(None, None)


@dataclass(frozen=True, slots=True)
class Turn:
    """The right to one call: when it began, with how many in flight (itself included)."""

    started_s: float
    in_flight: int
    estimate: Estimate


class Meter(Protocol):
    """What an extractor tells of the calls that it makes, and asks before a further one."""

    def again(self, now_s: float, estimate: Estimate) -> bool:
        """Charge a further call of a message that has a slot; False: no room, give it back."""

    def used(self, now_s: float, estimate: Estimate, tokens: int) -> None:
        """What a call that was charged with an estimate came to."""

    def told(self, now_s: float, allowance: Allowance) -> None:
        """An answer's headers spoke of the provider's limits."""


class Admission:
    """The smallest of all limits; for one event loop."""

    def __init__(self, limits: Limits, circuit: Circuit) -> None:
        self.circuit = circuit
        self.slots = Slots(limits.slots)
        self.pace = Pace()
        self.requests = Budget(limits.requests_per_minute, smallest_burst=1.0)
        self.tokens = Budget(limits.tokens_per_minute, smallest_burst=1.0)
        self.spend = Spend(limits.spend_usd_per_hour)
        self.retries = RetryQuota()
        self.busy = 0
        self.cooldown_until_s = 0.0
        self.share = 1.0
        self.finishing = False
        """Messages are to come to their end: a further call of one that has a slot is charged,
        but waits for nothing."""
        self._restarting = False  # from a cooldown or an outage to the first call after it
        self._restart_slots: int | None = None  # until the slots are all in use again

    @property
    def limit(self) -> int:
        """Calls that may be in flight now."""
        limit = int(self.slots.limit)
        return limit if self._restart_slots is None else min(limit, self._restart_slots)

    # --- asking ----------------------------------------------------------------------------------

    def hold(self, now_s: float, estimate: Estimate = NO_TOKENS) -> Hold | None:
        """None: a call may start. Asking changes nothing that matters to others."""
        if self.full(now_s):
            return NO_SLOT
        if self.circuit.state is CircuitState.PROBING:
            return Hold(None, Cause.CIRCUIT)
        waits = self.waits(now_s, estimate)
        if not waits:
            return None
        cause = max(waits, key=waits.__getitem__)
        return Hold(waits[cause], cause)

    def full(self, now_s: float) -> bool:
        """All slots that may be in use now are."""
        self._restart_now(now_s)
        return self.busy >= self.limit

    def waits(self, now_s: float, estimate: Estimate = NO_TOKENS) -> Mapping[Cause, float]:
        """Seconds to wait by each cause that holds the next call up; slots apart."""
        waits = (
            self.requests.wait_s(now_s, 1.0, 1.0),
            self.tokens.wait_s(now_s, estimate.tokens, estimate.tokens_max),
            self.spend.wait_s(now_s, self.busy),
            self.pace.wait_s(now_s),
            self.cooldown_until_s - now_s,
            self._circuit_s(now_s),
        )
        if max(waits) <= 0.0:  # as a rule, and asked for each call
            return {}
        return {cause: wait_s for cause, wait_s in zip(Cause, waits, strict=True) if wait_s > 0.0}

    def _circuit_s(self, now_s: float) -> float:
        """While it is not closed only a probe may go, so that a call never may."""
        if self.circuit.state is CircuitState.CLOSED:
            return 0.0
        return max(self.circuit.wait_s(now_s) or 0.0, 1e-3)

    def _restart_now(self, now_s: float) -> None:
        over = now_s >= self.cooldown_until_s and self.circuit.state is CircuitState.CLOSED
        if self._restarting and over:
            self._restarting, self._restart_slots = False, self.busy + RESTART_SLOTS

    # --- one call --------------------------------------------------------------------------------

    def admit(self, now_s: float, estimate: Estimate = NO_TOKENS) -> Turn:
        """Take a slot and what the call needs; only after `hold` gave None."""
        assert self.busy < self.slots.most, "no free slot"
        self.busy += 1
        self.charge(now_s, estimate)
        return Turn(now_s, self.busy, estimate)

    def release(self) -> None:
        """Give the slot back; exactly once for each `admit`."""
        assert self.busy > 0, "a slot was given back twice"
        self.busy -= 1

    def again(self, now_s: float, estimate: Estimate) -> bool:
        """Charge a further call of a message that has a slot; False: no room, give it back."""
        if not self.finishing and self.waits(now_s, estimate):
            return False
        self.charge(now_s, estimate)
        return True

    def charge(self, now_s: float, estimate: Estimate) -> None:
        """A call goes out, room or not."""
        self.requests.take(now_s, 1.0, 1.0)
        self.tokens.take(now_s, estimate.tokens, estimate.tokens_max)
        self.pace.started(now_s)

    def unused(self, now_s: float, estimate: Estimate) -> None:
        """What was charged for a call that nobody made (an answer from the cache)."""
        self.requests.correct(now_s, 1.0, 0.0)
        self.tokens.correct(now_s, estimate.tokens, 0.0)

    def used(self, now_s: float, estimate: Estimate, tokens: int) -> None:
        """What a call that was charged with an estimate came to."""
        self.tokens.correct(now_s, estimate.tokens, tokens)

    def told(self, now_s: float, allowance: Allowance) -> None:
        """An answer's headers spoke of the provider's limits."""
        if allowance.requests is not None:
            self.requests.heard(now_s, allowance.requests, allowance.asked_at_s)
        if allowance.tokens is not None:
            refused = None if allowance.refused is None else allowance.refused.tokens_max
            self.tokens.heard(now_s, allowance.tokens, allowance.asked_at_s, refused)

    # --- what came of it -------------------------------------------------------------------------

    def succeeded(self, now_s: float, turn: Turn) -> bool:
        """A call was answered. True: the circuit was not closed until now."""
        self.slots.succeeded(now_s, turn.started_s, turn.in_flight)
        self.pace.succeeded(turn.started_s)
        self.retries.succeeded()
        if self._restart_slots is not None:
            self._restart_slots += RESTART_GROWTH
            if self._restart_slots >= self.slots.limit:
                self._restart_slots = None
        return self.back()

    def back(self) -> bool:
        """The provider answers. True: the circuit was not closed until now."""
        reopened = self.circuit.succeeded()
        if reopened:
            self._restarting = True
            self.retries.forgive()
        return reopened

    def overloaded(
        self, now_s: float, turn: Turn, reason: str, retry_after_s: float | None
    ) -> None:
        """A call was turned away, or not answered in time."""
        self.cool_down(now_s, retry_after_s)
        if self.circuit.state is not CircuitState.CLOSED:
            return  # a leftover of the outage, not of our being too many
        limited = reason == RATE_LIMITED
        by_slots = self.slots.overloaded(now_s, turn.started_s, turn.in_flight, limited=limited)
        if limited and not by_slots:
            self.pace.refused(now_s, turn.started_s)

    def cool_down(self, now_s: float, retry_after_s: float | None) -> None:
        """Nobody starts until then; afterwards slowly, where no pace sees to that."""
        if retry_after_s is None:
            return
        self.cooldown_until_s = max(self.cooldown_until_s, now_s + retry_after_s)
        self._restarting = self._restarting or self.pace.rate_per_s is None

    def failed(
        self, now_s: float, sentence: str, *, service: bool, retry_after_s: float | None = None
    ) -> None:
        """A call, or a probe, was not answered."""
        opened = self.circuit.failed(now_s, sentence, service=service, retry_after_s=retry_after_s)
        if opened:
            self.slots.outage()
            self.pace.outage()

    def set_share(self, now_s: float, share: float) -> None:
        """Our part of the budgets that all workers have together, 0 to 1."""
        self.share = share
        for budget in (self.requests, self.tokens):
            budget.set_share(now_s, share)
        self.spend.set_share(now_s, share)

"""Admission: whether one more call may start now, and if not, why and when to ask again.

A call needs a slot, and room in the budgets of requests, tokens and money. Its route must have no
cooldown and a closed circuit, and it must be the call's turn in the route's pace. Each of these has
a file of its own; this file joins their answers. The estimate of a call names its route; an
extractor that does not tell routes apart uses one route without a name.

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
from service.core.admission.retry import RetryQuota, Uniform
from service.core.admission.routes import Routes
from service.core.admission.spend import Spend


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

    def answered(self, now_s: float, route: str) -> object:
        """A further call of a message was answered, whatever the outcome of the message is."""


class Admission:
    """All limits in one; for one event loop."""

    def __init__(self, limits: Limits, uniform: Uniform) -> None:
        self._slots_max = limits.slots
        self.routes = Routes(limits.slots, uniform)
        self._route_of = self.routes.of
        self._requests = Budget(limits.requests_per_minute, smallest_burst=1.0)
        self._tokens = Budget(limits.tokens_per_minute, smallest_burst=1.0)
        self._spend = Spend(limits.spend_usd_per_hour)
        self._retries = RetryQuota()
        self.busy = 0
        self.share = 1.0
        self._finishing = False

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
        if self.full(now_s, estimate.route):
            return NO_SLOT
        if self.routes.probe_is_out(estimate.route):
            return Hold(None, Cause.CIRCUIT)
        waits = self.waits(now_s, estimate)
        if not waits:
            return None
        cause = max(waits, key=waits.__getitem__)
        return Hold(waits[cause], cause)

    @property
    def all_busy(self) -> bool:
        """Whether all slots of all routes together are in use."""
        return self.busy >= self._slots_max

    def full(self, now_s: float, route: str = "") -> bool:
        """Whether all slots that this route may use now are in use."""
        to_use = self._route_of(route)
        to_use.restart_now(now_s)
        return self.all_busy or to_use.busy >= to_use.limit

    def waits(self, now_s: float, estimate: Estimate = NO_TOKENS) -> Mapping[Cause, float]:
        """Seconds until the next call may start, by cause; slots are not among the causes."""
        route = self._route_of(estimate.route)
        waits = (
            *self._budget_waits(now_s, estimate),
            route.pace.wait_s(now_s),
            route.cooldown_until_s - now_s,
            route.circuit_wait_s(now_s),
        )
        if max(waits) <= 0.0:  # nearly always so; asked before each call, so this has to be quick
            return {}
        return {cause: wait_s for cause, wait_s in zip(Cause, waits, strict=True) if wait_s > 0.0}

    def _budget_waits(self, now_s: float, estimate: Estimate) -> tuple[float, float, float]:
        route = estimate.route
        return (
            self._requests.wait_s(now_s, 1.0, 1.0, route),
            self._tokens.wait_s(now_s, estimate.tokens, estimate.tokens_max, route),
            self._spend.wait_s(now_s, self.busy),
        )

    # --- one call --------------------------------------------------------------------------------

    def admit(self, now_s: float, estimate: Estimate = NO_TOKENS) -> Turn:
        """Take a slot and charge the call; allowed only after `hold` returned None, or where the
        message goes out instead of a probe."""
        assert self.busy < self._slots_max, "no free slot"
        route = self._route_of(estimate.route)
        self.busy += 1
        route.busy += 1
        self.charge(now_s, estimate)
        return Turn(now_s, route.busy, estimate)

    def release(self, route: str = "") -> None:
        """Give the slot back; exactly once for each `admit`."""
        to_free = self._route_of(route)
        assert to_free.busy > 0, "a slot was given back twice"
        self.busy -= 1
        to_free.busy -= 1

    def again(self, now_s: float, estimate: Estimate) -> bool:
        """Charge a further call of a message that has a slot. False: there is no room, and the
        message has to give its slot back."""
        if not self._finishing and self.waits(now_s, estimate):
            return False
        self.charge(now_s, estimate)
        return True

    def charge(self, now_s: float, estimate: Estimate) -> None:
        """Charge a call that goes out, whether there is room or not."""
        self._requests.take(now_s, 1.0, 1.0, estimate.route)
        self._tokens.take(now_s, estimate.tokens, estimate.tokens_max, estimate.route)
        self._route_of(estimate.route).pace.started(now_s)

    def unused(self, now_s: float, estimate: Estimate) -> None:
        """Give back what was charged for a call that was not made (an answer from the cache)."""
        self._requests.correct(now_s, 1.0, 0.0)
        self._tokens.correct(now_s, estimate.tokens, 0.0)

    def used(self, now_s: float, estimate: Estimate, tokens: int) -> None:
        """A call that was charged with `estimate` has used `tokens`."""
        self._tokens.correct(now_s, estimate.tokens, tokens)

    def told(self, now_s: float, allowance: Allowance) -> None:
        """An answer's headers have told the provider's limits."""
        route, asked_at_s = allowance.route, allowance.asked_at_s
        if allowance.requests is not None:
            self._requests.heard(now_s, allowance.requests, asked_at_s, route=route)
        if allowance.tokens is not None:
            refused = None if allowance.refused is None else allowance.refused.tokens_max
            self._tokens.heard(now_s, allowance.tokens, asked_at_s, refused, route)

    # --- what came of it -------------------------------------------------------------------------

    def succeeded(self, now_s: float, turn: Turn) -> bool:
        """A call was answered. True: the route's circuit was not closed until now."""
        self._retries.succeeded()
        route = self._route_of(turn.estimate.route)
        return self._reopened(route.succeeded(now_s, turn.started_s, turn.in_flight))

    def answered(self, now_s: float, route: str = "") -> bool:
        """A probe, or a further call of a message, was answered, whatever its outcome is. True:
        the route's circuit was not closed until now."""
        return self._reopened(self._route_of(route).answers(now_s))

    def _reopened(self, reopened: bool) -> bool:
        if reopened:
            self._retries.forgive()
        return reopened

    def overloaded(
        self, now_s: float, turn: Turn, route: str, reason: str, retry_after_s: float | None
    ) -> None:
        """A call on `route` was refused for overload, or not answered in time."""
        self.routes.cool_down(now_s, retry_after_s, route)
        in_flight = turn.in_flight if turn.estimate.route == route else None
        self._route_of(route).overloaded(now_s, turn.started_s, in_flight, reason)

    def spent(self, now_s: float, usd: float) -> None:
        """An answer has cost this much, which may be 0."""
        self._spend.spent(now_s, usd)

    def carry(self, now_s: float, age_s: float, usd: float) -> None:
        """Add what was spent `age_s` seconds ago on the account of a partition that has come;
        negative for one that has gone."""
        self._spend.carry(now_s, age_s, usd)

    # --- probes ----------------------------------------------------------------------------------

    def wants_a_message(self, route: str) -> bool:
        """Whether the next try is a message instead of the probe, and there is a slot for it."""
        return self._route_of(route).circuit.wants_a_message and not self.all_busy

    def has_room(self, now_s: float, estimate: Estimate) -> bool:
        """Whether the budgets have room for a call; the state of its route does not count."""
        return max(self._budget_waits(now_s, estimate)) <= 0.0

    def probing(self, now_s: float, route: str = "") -> None:
        """A probe goes out, which takes no slot; allowed only after `probe_wait_s` returned 0."""
        self._route_of(route).circuit.probing()
        self.charge(now_s, Estimate(route=route))

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

    def set_share(self, now_s: float, share: float, even: float) -> None:
        """Our part of the budgets that all workers share, 0 to 1."""
        self.share = share
        for budget in (self._requests, self._tokens):
            budget.set_share(now_s, share)
        self._spend.set_share(even)

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
from service.core.admission.circuit import Circuit, CircuitState
from service.core.admission.retry import RetryQuota, Uniform
from service.core.admission.route import Route, Untroubled
from service.core.admission.slots import Slots
from service.core.admission.spend import Spend
from service.core.admission.suspicion import Suspicion


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

    def answered(self, now_s: float, route: str) -> None:
        """A further call of a message was answered, whatever the outcome of the message is."""


class Admission:
    """All limits in one; for one event loop."""

    def __init__(self, limits: Limits, uniform: Uniform) -> None:
        self._slots_max, self._uniform = limits.slots, uniform
        self._routes: dict[str, Route] = {}
        self._requests = Budget(limits.requests_per_minute, smallest_burst=1.0)
        self._tokens = Budget(limits.tokens_per_minute, smallest_burst=1.0)
        self._spend = Spend(limits.spend_usd_per_hour)
        self._retries = RetryQuota()
        self.busy = 0
        self.share = 1.0
        self._finishing = False

    def _route(self, name: str) -> Route:
        route = self._routes.get(name)
        if route is None:
            route = Route(Slots(self._slots_max), Circuit(self._uniform))
            self._routes[name] = route
        return route

    @property
    def limit(self) -> int:
        """How many calls may be in flight now on the route that accepts most."""
        return max((route.limit for route in self._routes.values()), default=self._slots_max)

    def closed(self, route: str = "") -> bool:
        """Whether the route's circuit is closed, so that calls may go out."""
        return self._route(route).closed

    @property
    def broken(self) -> tuple[str, ...]:
        """The routes whose circuit is not closed."""
        return tuple(name for name, route in self._routes.items() if not route.closed)

    @property
    def all_broken(self) -> bool:
        """Whether there are routes and the circuit of none of them is closed."""
        return bool(self._routes) and not any(route.closed for route in self._routes.values())

    @property
    def outages(self) -> tuple[str, ...]:
        """A sentence for a person on each circuit that is not closed, and why."""
        reasons = (route.circuit.reason for route in self._routes.values())
        return tuple(reason for reason in reasons if reason is not None)

    @property
    def pace_per_s(self) -> float | None:
        """Calls a second of the route with the lowest pace; None: no hidden limit was met."""
        paces = (route.pace.rate_per_s for route in self._routes.values())
        return min((pace for pace in paces if pace is not None), default=None)

    def last_success_s(self, route: str = "") -> float | None:
        """When a call or a probe of the route was last answered; None: never."""
        return self._route(route).last_success_s

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
        if self.probe_is_out(estimate.route):
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
        to_use = self._route(route)
        to_use.restart_now(now_s)
        return self.all_busy or to_use.busy >= to_use.limit

    def waits(self, now_s: float, estimate: Estimate = NO_TOKENS) -> Mapping[Cause, float]:
        """Seconds until the next call may start, by cause; slots are not among the causes."""
        route = self._route(estimate.route)
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
        route = self._route(estimate.route)
        self.busy += 1
        route.busy += 1
        self.charge(now_s, estimate)
        return Turn(now_s, route.busy, estimate)

    def release(self, route: str = "") -> None:
        """Give the slot back; exactly once for each `admit`."""
        to_free = self._route(route)
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
        self._route(estimate.route).pace.started(now_s)

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
        route = self._route(turn.estimate.route)
        return self._reopened(route.succeeded(now_s, turn.started_s, turn.in_flight))

    def answered(self, now_s: float, route: str) -> None:
        """A further call of a message was answered, whatever the outcome of the message is."""
        self._reopened(self._route(route).answers(now_s))

    def _reopened(self, reopened: bool) -> bool:
        if reopened:
            self._retries.forgive()
        return reopened

    def overloaded(
        self, now_s: float, turn: Turn, route: str, reason: str, retry_after_s: float | None
    ) -> None:
        """A call on `route` was refused for overload, or not answered in time."""
        self.cool_down(now_s, retry_after_s, route)
        in_flight = turn.in_flight if turn.estimate.route == route else None
        self._route(route).overloaded(now_s, turn.started_s, in_flight, reason)

    def cool_down(self, now_s: float, retry_after_s: float | None, route: str = "") -> None:
        """No call starts for this time; afterwards they start slowly, unless a pace is in force and
        sees to that."""
        self._route(route).cool_down(now_s, retry_after_s)

    def failed(
        self,
        now_s: float,
        sentence: str,
        *,
        service: bool,
        retry_after_s: float | None = None,
        route: str = "",
    ) -> None:
        """A call or a probe failed."""
        self._route(route).fails(now_s, sentence, service=service, retry_after_s=retry_after_s)

    def spent(self, now_s: float, usd: float) -> None:
        """An answer has cost this much, which may be 0."""
        self._spend.spent(now_s, usd)

    def carry(self, now_s: float, age_s: float, usd: float) -> None:
        """Add what was spent `age_s` seconds ago on the account of a partition that has come;
        negative for one that has gone."""
        self._spend.carry(now_s, age_s, usd)

    def doubt(self, now_s: float, route: str = "") -> None:
        """Nothing shows whether the provider is reachable: a probe goes out at once."""
        self._route(route).circuit.doubt(now_s)

    # --- whose fault it is -----------------------------------------------------------------------

    def suspicion(self, route: str, before: Suspicion | None, *, shared: bool) -> Suspicion:
        """A message's call on the route has failed: what now speaks against the message itself."""
        return self._route(route).suspicion(route, before, shared=shared)

    def nobody_else(self, suspicion: Suspicion) -> bool:
        """Whether no call that began on its route after the message's failure was answered, and
        none is running."""
        route = self._route(suspicion.route)
        return not route.busy and route.answered <= suspicion.since.answered

    def untroubled(self, route: str) -> Untroubled:
        """The route as it is now, for `take_back`."""
        return self._route(route).untroubled

    def take_back(self, route: str, before: Untroubled) -> None:
        """Refusals turned out to concern one message alone: undo what the route learned from
        them."""
        self._route(route).take_back(before)

    # --- probes ----------------------------------------------------------------------------------

    def probe_is_out(self, route: str = "") -> bool:
        return self._route(route).circuit.state is CircuitState.PROBING

    def probe_wait_s(self, now_s: float, route: str = "") -> float | None:
        """Seconds until a probe may start; None: a probe is out, and only its answer changes
        that."""
        return self._route(route).circuit.wait_s(now_s)

    def wants_a_message(self, route: str) -> bool:
        """Whether the next try is a message instead of the probe, and there is a slot for it."""
        return self._route(route).circuit.wants_a_message and not self.all_busy

    def has_room(self, now_s: float, estimate: Estimate) -> bool:
        """Whether the budgets have room for a call; the state of its route does not count."""
        return max(self._budget_waits(now_s, estimate)) <= 0.0

    def trying(self, route: str) -> None:
        """A message goes out instead of a probe; it is charged as any other message is."""
        self._route(route).circuit.probing()

    def probing(self, now_s: float, route: str = "") -> None:
        """A probe goes out, which takes no slot; allowed only after `probe_wait_s` returned 0."""
        self._route(route).circuit.probing()
        self.charge(now_s, Estimate(route=route))

    def probe_succeeded(self, now_s: float, route: str = "") -> bool:
        """A probe was answered. True: the circuit was not closed until now."""
        return self._reopened(self._route(route).answers(now_s))

    def probe_cancelled(self, route: str = "") -> None:
        """The probe was cancelled without an answer: another may go out."""
        self._route(route).circuit.cancelled()

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

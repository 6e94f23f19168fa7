"""A route: one endpoint, model and parameters, and what its own answers show about it.

Answers of the first model do not show that a second one works, whose key may be refused. So
circuit, slots, pace, cooldown and last success belong to the route. All routes share the number of
slots in the settings and the user's own budgets (`Admission`). Rules of this file: time comes in as
seconds of a monotonic clock; nothing waits here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from service.core.admission.circuit import Circuit, CircuitState
from service.core.admission.pace import Pace
from service.core.admission.retry import RATE_LIMITED
from service.core.admission.slots import Slots
from service.core.admission.suspicion import Suspicion, Tally

RESTART_SLOTS = 4
"""After a cooldown or an outage, this many calls may run beside those that still do. It is enough
to be at full speed after a few round trips, and too few to overload the provider at once."""

RESTART_GROWTH = 2
"""By how many slots each answer raises the limit after a restart. With the slot that the answer
itself frees, the number of calls triples in a round trip."""


@dataclass(frozen=True, slots=True)
class Untroubled:
    """A route's slots and pace before a message's first refusal. They are restored where it turns
    out that the refusals concerned only that message."""

    slots: float
    paced: bool


@dataclass(slots=True, eq=False)
class Route:
    """How many calls the route accepts, how fast, and whether it answers at all."""

    slots: Slots
    circuit: Circuit
    pace: Pace = field(default_factory=Pace)
    busy: int = 0
    last_success_s: float | None = None
    """When a call or a probe was last answered; None: never."""
    cooldown_until_s: float = 0.0
    answered: int = 0
    failed: int = 0
    recovered: int = 0
    """How many messages were answered after they had failed here."""
    _restarting: bool = False  # True from a cooldown or an outage to the first call after it
    _restart_slots: int | None = None  # the limit after a restart, while it is the smaller

    @property
    def limit(self) -> int:
        """Calls that may be in flight now."""
        limit = int(self.slots.limit)
        return limit if self._restart_slots is None else min(limit, self._restart_slots)

    @property
    def closed(self) -> bool:
        """Whether the circuit is closed, so that calls may go out."""
        return self.circuit.state is CircuitState.CLOSED

    def circuit_wait_s(self, now_s: float) -> float:
        """Seconds until the circuit lets a call start. It is never 0 while the circuit is not
        closed, even where a probe is due: only a probe may go then."""
        return 0.0 if self.closed else max(self.circuit.wait_s(now_s) or 0.0, 1e-3)

    def restart_now(self, now_s: float) -> None:
        """Called before each call starts: behind a cooldown or an outage few slots are used at
        first."""
        if self._restarting and now_s >= self.cooldown_until_s and self.closed:
            self._restarting, self._restart_slots = False, self.busy + RESTART_SLOTS

    # --- what came of a call ---------------------------------------------------------------------

    def succeeded(self, now_s: float, started_s: float, in_flight: int) -> bool:
        """A call was answered. True: the circuit was not closed until now."""
        self.slots.succeeded(now_s, started_s, in_flight)
        self.pace.succeeded(started_s)
        if self._restart_slots is not None:
            self._restart_slots += RESTART_GROWTH
            if self._restart_slots >= self.slots.limit:
                self._restart_slots = None
        return self.answers(now_s)

    def answers(self, now_s: float) -> bool:
        """The provider is reachable. True: the circuit was not closed until now."""
        self.last_success_s = now_s
        self.answered += 1
        reopened = self.circuit.succeeded()
        self._restarting = self._restarting or reopened
        return reopened

    def overloaded(
        self, now_s: float, started_s: float, in_flight: int | None, reason: str
    ) -> None:
        """A call was refused for overload, or not answered in time. `in_flight` is None where the
        attempt began on another route: the number of calls in flight then says nothing."""
        if not self.closed:
            return  # it failed because of the outage, not because of too many calls
        limited = reason == RATE_LIMITED
        by_slots = in_flight is not None and self.slots.overloaded(
            now_s, started_s, in_flight, limited=limited
        )
        if limited and not by_slots:
            self.pace.refused(now_s, started_s)

    def cool_down(self, now_s: float, retry_after_s: float | None) -> None:
        """No call starts for this time; afterwards they start slowly, unless a pace is in force and
        sees to that."""
        if retry_after_s is None:
            return
        self.cooldown_until_s = max(self.cooldown_until_s, now_s + retry_after_s)
        self._restarting = self._restarting or self.pace.rate_per_s is None

    def fails(
        self, now_s: float, sentence: str, *, service: bool, retry_after_s: float | None
    ) -> None:
        """A call or a probe failed."""
        opened = self.circuit.failed(now_s, sentence, service=service, retry_after_s=retry_after_s)
        if opened:
            self.slots.outage()
            self.pace.outage()

    # --- whose fault it is -----------------------------------------------------------------------

    def suspicion(self, name: str, before: Suspicion | None, *, shared: bool) -> Suspicion:
        """A message's call has failed. `before` is what spoke against the message until now;
        `shared` is true where another message has reported this call already."""
        now = Tally(self.answered, self.failed, self.recovered)
        self.failed += not shared
        since = Tally(self.answered + self.busy, self.failed, self.recovered)
        if before is None or before.route != name:
            return Suspicion(name, since, since)
        return before.again(now, since)

    @property
    def untroubled(self) -> Untroubled:
        return Untroubled(self.slots.limit, self.pace.rate_per_s is not None)

    def take_back(self, before: Untroubled) -> None:
        """Refusals turned out to concern one message alone: undo what was learned from them."""
        self.slots.take_back(before.slots)
        if not before.paced:
            self.pace.take_back()

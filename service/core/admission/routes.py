"""The routes that calls take: what is known of each, by its name.

Rules of this file: time comes in as seconds of a monotonic clock; nothing waits here.
"""

from __future__ import annotations

from service.core.admission.circuit import Circuit, CircuitState
from service.core.admission.retry import Uniform
from service.core.admission.route import Route, Untroubled
from service.core.admission.slots import Slots
from service.core.admission.suspicion import Suspicion


class Routes:
    """Each route's circuit, slots, pace, cooldown and last success."""

    def __init__(self, slots_max: int, uniform: Uniform) -> None:
        self._slots_max, self._uniform = slots_max, uniform
        self._routes: dict[str, Route] = {}

    def of(self, name: str) -> Route:
        """The route; made when it is first named."""
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
        return self.of(route).closed

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
        return self.of(route).last_success_s

    def cool_down(self, now_s: float, retry_after_s: float | None, route: str = "") -> None:
        """No call starts for this time; afterwards they start slowly, unless a pace is in force and
        sees to that."""
        self.of(route).cool_down(now_s, retry_after_s)

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
        self.of(route).fails(now_s, sentence, service=service, retry_after_s=retry_after_s)

    def doubt(self, now_s: float, route: str = "") -> None:
        """Nothing shows whether the provider is reachable: a probe goes out at once."""
        self.of(route).circuit.doubt(now_s)

    def suspicion(self, route: str, before: Suspicion | None, *, shared: bool) -> Suspicion:
        """A message's call on the route has failed: what now speaks against the message itself."""
        return self.of(route).suspicion(route, before, shared=shared)

    def recovered(self, route: str) -> None:
        """A message that had failed on the route was answered."""
        self.of(route).recovered += 1

    def nobody_else(self, suspicion: Suspicion) -> bool:
        """Whether no call that began on its route after the message's failure was answered, and
        none is running."""
        route = self.of(suspicion.route)
        return not route.busy and route.answered <= suspicion.since.answered

    def untroubled(self, route: str) -> Untroubled:
        """The route as it is now, for `take_back`."""
        return self.of(route).untroubled

    def take_back(self, route: str, before: Untroubled) -> None:
        """Refusals turned out to concern one message alone: undo what the route learned from
        them."""
        self.of(route).take_back(before)

    def probe_is_out(self, route: str = "") -> bool:
        return self.of(route).circuit.state is CircuitState.PROBING

    def probe_wait_s(self, now_s: float, route: str = "") -> float | None:
        """Seconds until a probe may start; None: a probe is out, and only its answer changes
        that."""
        return self.of(route).circuit.wait_s(now_s)

    def trying(self, route: str) -> None:
        """A message goes out instead of a probe; it is charged as any other message is."""
        self.of(route).circuit.probing()

    def probe_cancelled(self, route: str = "") -> None:
        """The probe was cancelled without an answer: another may go out."""
        self.of(route).circuit.cancelled()

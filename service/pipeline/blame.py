"""Blame: whether a failed call is the fault of its route or of its message.

Rules of this file: a route is blamed for failures that other messages would have too; then all of
them wait. A message is blamed for failures that it alone has while others are answered. Quota,
credentials, model and settings are never a message's fault.
"""

from __future__ import annotations

from service.core.admission.admission import Admission, Turn
from service.core.admission.retry import NEVER_THE_MESSAGE, OVERLOAD, exhausted, others_succeed
from service.core.admission.suspicion import Suspicion
from service.core.errors import CallFailure, ServiceFailure, TransientFailure, Unclear
from service.core.window import Entry
from service.pipeline.bounds import Bounds
from service.pipeline.outcomes import tell_the_circuit
from service.pipeline.probing import Probing


class Blame:
    """Compares a message's failures with the calls of others. It tells the route of a failure, or
    keeps it with the message."""

    def __init__(self, admission: Admission, probing: Probing, bounds: Bounds) -> None:
        self._admission, self._probing = admission, probing
        self._attempts_max = bounds.attempts_max

    def failed(self, now_s: float, entry: Entry, turn: Turn, failure: CallFailure) -> None:
        """A call for the message has failed; to be called before its attempts are counted.

        A message's first refusal slows everybody down. A further one does not while calls of others
        go through: its retry comes right after everybody's cooldown, so that too few others are
        answered in between to say that the failures are its own.
        """
        route = route_of(turn, failure)
        found = self._weigh(entry, route, shared=failure.shared)
        if found.its_own:
            return
        self._tell_the_circuit(now_s, entry, route, failure)
        if failure.reason in OVERLOAD and not found.others_go_through:
            self._admission.overloaded(now_s, turn, route, failure.reason, failure.retry_after_s)

    def _weigh(self, entry: Entry, route: str, *, shared: bool) -> Suspicion:
        """Count the failure against the message. As soon as its failures seem its own, what the
        route learned from the first ones is undone, unless others failed too."""
        before = entry.suspicion
        found = self._admission.routes.suspicion(route, before, shared=shared)
        if before is None or before.route != route:
            entry.untroubled = self._admission.routes.untroubled(route)
        elif found.its_own and not before.its_own and not found.others_failed:
            assert entry.untroubled is not None, "it is set with the first failure on a route"
            self._admission.routes.take_back(route, entry.untroubled)
        entry.suspicion = found
        return found

    def _tell_the_circuit(
        self, now_s: float, entry: Entry, route: str, failure: CallFailure
    ) -> None:
        """Count the failure for the route's circuit.

        A call for which several messages waited counts once. While a probe is out, only its answer
        counts: this call began before it. An `Unclear` refusal stops intake as long as the route
        has never answered; afterwards it is one failure in a row, like any other.
        """
        unclear = isinstance(failure, Unclear)
        known = not unclear or self._admission.routes.last_success_s(route) is None
        a_try = self._probing.stands_for_a_probe(entry, route)
        if not failure.shared and (a_try or not self._admission.routes.probe_is_out(route)):
            service = isinstance(failure, ServiceFailure) and known
            tell_the_circuit(self._admission, now_s, route, failure, service=service)

    def recovered(self, entry: Entry) -> None:
        """The message has its records. If it had failed before, failures may be chance."""
        if entry.suspicion is not None:
            self._admission.routes.recovered(entry.suspicion.route)

    def gives_up(self, entry: Entry, turn: Turn, failure: CallFailure) -> bool:
        """Whether the message has failed often enough while others succeeded."""
        if self._beyond_chance(entry, failure):
            return True
        if entry.suspicion is not None and entry.suspicion.may_be_chance:
            return False
        success_s = self._admission.routes.last_success_s(route_of(turn, failure))
        return exhausted(entry.attempts_that_count, self._attempts_max, turn.started_s, success_s)

    def _beyond_chance(self, entry: Entry, failure: CallFailure) -> bool:
        """Whether chance cannot explain the message's failures, although their kind (429, 503) is
        hardly ever a message's fault."""
        if entry.attempts < self._attempts_max or not isinstance(failure, TransientFailure):
            return False
        return entry.suspicion is not None and entry.suspicion.certain

    def doubt(self, now_s: float, entry: Entry, turn: Turn, failure: CallFailure) -> None:
        """Send a probe where no other message shows that the provider is reachable."""
        route = route_of(turn, failure)
        success_s = self._admission.routes.last_success_s(route)
        unknown = self._often(entry) and not others_succeed(turn.started_s, success_s)
        if unknown or self._only_witness(entry, failure):
            self._admission.routes.doubt(now_s, route)

    def _often(self, entry: Entry) -> bool:
        return entry.attempts_that_count >= self._attempts_max

    def _only_witness(self, entry: Entry, failure: CallFailure) -> bool:
        by_evidence = (
            failure.reason in NEVER_THE_MESSAGE
            or isinstance(failure, Unclear)
            or self._often(entry)  # and others failed by chance, so that their number says little
        )
        if not by_evidence or entry.attempts < 2 or entry.suspicion is None:
            return False
        return self._admission.routes.nobody_else(entry.suspicion)


def counts(failure: CallFailure) -> bool:
    """Whether a failure of this kind may be the message's own fault."""
    return not isinstance(failure, ServiceFailure) and failure.reason not in NEVER_THE_MESSAGE


def route_of(turn: Turn, failure: CallFailure) -> str:
    """The route on which the call failed; an attempt may have gone on to another one."""
    return turn.estimate.route if failure.route is None else failure.route

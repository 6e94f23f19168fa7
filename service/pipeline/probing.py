"""While a route's circuit is not closed, one call at a time asks whether the provider is back.

Two of three tries are probes: tiny calls with a fixed text that belong to no message. The third try
is a waiting message, each time another one, because a guardrail may refuse only the probe's text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from service import clock
from service.core.admission.admission import Admission
from service.core.admission.budgets import Estimate
from service.core.errors import CallFailure, ServiceFailure
from service.core.phase import Phase
from service.core.window import Entry, Window
from service.pipeline.outcomes import earliest, tell_the_circuit
from service.pipeline.tasks import Conditions, Tasks
from service.ports import Extractor

Begin: TypeAlias = Callable[[Entry, Estimate], bool]
"""Starts a message's call where it may begin now; returns whether it did."""


class Probing:
    """Makes the tries; owns the probe, or the message in its place, that is out on each route."""

    def __init__(
        self,
        extractor: Extractor,
        window: Window,
        admission: Admission,
        phase: Phase,
        tasks: Tasks,
        conditions: Conditions,
    ) -> None:
        self._extractor, self._window, self._admission = extractor, window, admission
        self._phase, self._tasks, self._conditions = phase, tasks, conditions
        self._running: dict[str, asyncio.Task[None]] = {}  # probes
        self._messages: dict[str, Entry] = {}  # that are out instead of a probe

    def when_due(self, now_s: float, again: Callable[[], None], begin: Begin) -> float | None:
        """Send the tries that are due; returns when to look again. The end of each try calls
        `again`.

        Only one probe runs at a time, even where the circuit has closed and opened again meanwhile.
        In a drain a probe goes out only where a message waits for it, so that the message can
        finish before the deadline.
        """
        ask_again_s: float | None = None
        for route in self._admission.routes.broken:
            wait_s = self._admission.routes.probe_wait_s(now_s, route)
            if wait_s is None or route in self._running:
                continue
            if self._phase.draining and not self._window.waits_for_a_call:
                continue  # the end of a running call calls `admit` again
            if wait_s > 0.0:
                ask_again_s = earliest(ask_again_s, now_s + wait_s)
            elif not self._tried(now_s, route, begin):
                self._start(now_s, route, again)
        return ask_again_s

    # --- a message -------------------------------------------------------------------------------

    def _tried(self, now_s: float, route: str, begin: Begin) -> bool:
        """Send a message where the next try is one; it has a slot and a charge as any other.
        Returns whether one went out."""
        if not self._admission.wants_a_message(route):
            return False
        entry = self._window.waiting_for(route, now_s)
        if entry is None:
            return False
        estimate = self._extractor.estimate(entry.text, entry.progress)
        if not self._admission.has_room(now_s, estimate):
            return False
        self._messages[route] = entry
        self._admission.routes.trying(route)
        if begin(entry, estimate):
            return True
        self.ended(entry, route)
        return False

    def stands_for_a_probe(self, entry: Entry, route: str) -> bool:
        """Whether the message went out instead of a probe, so that its call counts for the circuit
        as a probe does."""
        return self._messages.get(route) is entry

    def ended(self, entry: Entry, route: str) -> None:
        """A call of the message is over. Where it went out instead of a probe and shows nothing
        about the provider (cut off, answered from the cache), another try may follow."""
        if self._messages.get(route) is entry:
            del self._messages[route]
            self._admission.routes.probe_cancelled(route)

    # --- a probe ---------------------------------------------------------------------------------

    def _start(self, now_s: float, route: str, again: Callable[[], None]) -> None:
        self._admission.probing(now_s, route)
        probe = self._tasks.start_for_run(self._probe, route, again)
        if probe is None:
            self._admission.routes.probe_cancelled(route)
            return
        self._running[route] = probe
        probe.add_done_callback(partial(self._called_off, route, again))

    def _called_off(self, route: str, again: Callable[[], None], probe: asyncio.Task[None]) -> None:
        """The probe was cancelled, maybe before its first step, and nothing is known: another may
        go out."""
        if self._running.get(route) is probe:
            del self._running[route]
            self._admission.routes.probe_cancelled(route)
            asyncio.get_running_loop().call_soon(self._tasks.called_back, again)

    async def _probe(self, route: str, again: Callable[[], None]) -> None:
        """Sends one probe for all queued messages: is the provider reachable, and does it accept
        the settings that every request shares?"""
        failure = None
        try:
            await self._extractor.probe(route)
        except CallFailure as found:
            failure = found
        self._running.pop(route, None)
        now_s = clock.now_s()
        if failure is None:
            self._admission.answered(now_s, route)
            self._window.wake_retries(now_s)
        else:
            self._admission.routes.cool_down(now_s, failure.retry_after_s, route)
            service = isinstance(failure, ServiceFailure)
            tell_the_circuit(self._admission, now_s, route, failure, service=service)
        self._conditions.moved_on()
        again()

    def close(self) -> None:
        """Cancel the probes that run."""
        for probe in self._running.values():
            probe.cancel()

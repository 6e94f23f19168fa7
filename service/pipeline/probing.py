"""Probes: while the circuit is not closed, one tiny call at a time looks if the provider is
back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from service import clock
from service.core.admission.admission import Admission
from service.core.errors import CallFailure
from service.core.phase import Phase
from service.core.window import Window
from service.pipeline.outcomes import tell_the_circuit
from service.pipeline.tasks import Conditions, Tasks
from service.ports import Extractor


class Probing:
    """Sends probes; owns the one that runs."""

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
        self._running: asyncio.Task[None] | None = None

    def when_due(self, now_s: float, again: Callable[[], None]) -> float | None:
        """Send a probe if one is due; returns when to look again. The probe's end calls `again`.

        Only one probe runs at a time, even where the circuit has closed and opened again meanwhile.
        In a drain a probe goes out only where a message waits for it, so that the message can
        finish before the deadline.
        """
        wait_s = self._admission.probe_wait_s(now_s)
        if wait_s is None or self._running is not None:
            return None
        if self._phase.draining and not self._window.waits_for_a_call:
            return None  # the end of a running call calls `admit` again
        if wait_s > 0.0:
            return now_s + wait_s
        self._admission.probing(now_s)
        self._running = self._tasks.start_alone(self._probe, again)
        if self._running is None:
            self._admission.probe_cancelled()
        else:
            self._running.add_done_callback(partial(self._called_off, again))
        return None

    def _called_off(self, again: Callable[[], None], probe: asyncio.Task[None]) -> None:
        """The probe was cancelled, maybe before its first step, and nothing is known: another may
        go out."""
        if self._running is probe:
            self._running = None
            self._admission.probe_cancelled()
            asyncio.get_running_loop().call_soon(self._tasks.called_back, again)

    async def _probe(self, again: Callable[[], None]) -> None:
        """Sends one probe for all queued messages: is the provider reachable, and does it accept
        the settings that every request shares?"""
        failure = None
        try:
            await self._extractor.probe()
        except CallFailure as found:
            failure = found
        self._running = None
        now_s = clock.now_s()
        if failure is None:
            self._admission.probe_succeeded(now_s)
            self._window.wake_retries(now_s)
        else:
            self._admission.cool_down(now_s, failure.retry_after_s)
            tell_the_circuit(self._admission, now_s, failure)
        self._conditions.moved_on()
        again()

    def close(self) -> None:
        """Cancel the probe that runs."""
        if self._running is not None:
            self._running.cancel()

"""From the queue to an answer: which message is called next, and what comes of its attempt.

Rules of this file: a call's slot and its charge are given back exactly once, whether its task came
to its first step or not. While the circuit of a route is not closed, only probes and messages in
their place go out on it, one at a time; messages for other routes go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial

from service import clock
from service.core.admission.admission import BUDGETS, NO_SLOT, Admission, Cause, Hold, Turn
from service.core.admission.budgets import NO_TOKENS, Estimate
from service.core.admission.guard import Guard
from service.core.admission.shares import even_share, share
from service.core.errors import CallFailure, NoRoom
from service.core.events import Admitted, Observe
from service.core.messages import Partition
from service.core.phase import Phase
from service.core.window import Entry, Window
from service.pipeline.answering import Answering
from service.pipeline.asking import Asking
from service.pipeline.outcomes import (
    CutOff,
    earliest,
    from_the_cache,
)
from service.pipeline.probing import Probing
from service.pipeline.publishing import Publishing
from service.pipeline.purse import Purse
from service.pipeline.tasks import Conditions, Tasks
from service.ports import Extractor


class Calls:
    """Starts calls. It owns why the queue waits, which messages have a slot, which one runs alone,
    and the timer after which it looks at the queue again."""

    def __init__(
        self,
        extractor: Extractor,
        window: Window,
        admission: Admission,
        guard: Guard,
        phase: Phase,
        tasks: Tasks,
        conditions: Conditions,
        probing: Probing,
        answering: Answering,
        asking: Asking,
        publishing: Publishing,
        purse: Purse,
        observe: Observe,
    ) -> None:
        self._extractor, self._observe = extractor, observe
        self._window, self._admission, self._guard = window, admission, guard
        self._phase, self._tasks, self._conditions = phase, tasks, conditions
        self._probing, self._answering = probing, answering
        self._asking, self._publishing, self._purse = asking, publishing, purse
        self._holds: dict[str, Hold] = {}  # by route: why the messages queued for it wait
        self._lags: Mapping[Partition, int | None] = {}
        self._turns: dict[Entry, Turn] = {}  # of the calls that have a slot now
        self._alone: Entry | None = None  # the only call that may run now
        self._wake: asyncio.TimerHandle | None = None

    # --- admission -------------------------------------------------------------------------------

    def queue(self, entry: Entry) -> None:
        """A message is ready for its first call."""
        entry.route = self._extractor.route(None)
        self._window.queue(entry)

    def admit(self) -> None:
        """Start calls as far as admission allows, and set a timer where a later look is needed."""
        if not self._tasks.is_open or not self._phase.may_call:
            return
        now_s, waited = clock.now_s(), self.waits_for_budget
        ask_again_s = self._probing.when_due(now_s, self.admit, self._try)
        self._holds = {route: Hold(None, Cause.CIRCUIT) for route in self._admission.routes.broken}
        if not self._admission.routes.all_broken:  # else no retry could start
            ask_again_s = earliest(ask_again_s, self._requeue(now_s))
        while (entry := self._window.next_queued(self._holds)) is not None:
            if not self._may_begin(entry):
                break  # the end of a running call calls `admit` again
            if (held_s := self._guard.wait_s(now_s)) > 0.0:
                ask_again_s = earliest(ask_again_s, now_s + held_s)
                break
            hold: Hold | None = NO_SLOT
            estimate = NO_TOKENS
            if not self._admission.full(now_s, entry.route):
                estimate = self._extractor.estimate(entry.text, entry.progress)
                hold = self._admission.hold(now_s, estimate)
            if hold is None:
                self._begin(entry, estimate, now_s)
                continue
            self._holds[entry.route] = hold
            if self._admission.all_busy:
                break
            if hold.wait_s is not None:
                ask_again_s = earliest(ask_again_s, now_s + hold.wait_s)
        if waited and not self.waits_for_budget:
            self._conditions.look()  # there may be room to fetch
        self._wake_at(ask_again_s)

    def _may_begin(self, entry: Entry) -> bool:
        """Whether no suspect is running, and this message is no suspect while others run."""
        return self._alone is None and not (entry.alone and self._window.calling)

    def _try(self, entry: Entry, estimate: Estimate) -> bool:
        """Start a message that goes out instead of a probe; False: it may not begin now."""
        now_s = clock.now_s()
        if not self._may_begin(entry) or self._guard.wait_s(now_s) > 0.0:
            return False
        self._begin(entry, estimate, now_s)
        return True

    def _begin(self, entry: Entry, estimate: Estimate, now_s: float) -> None:
        self._observe(Admitted(now_s - entry.since_s))
        self._window.call(entry, now_s)
        self._guard.began(now_s)
        if entry.alone:
            self._alone = entry
        self._start(entry, self._admission.admit(now_s, estimate))

    def _requeue(self, now_s: float) -> float | None:
        """Queue the retries that are due, as many as the quota allows. Returns when to look for
        further ones; None: there are none."""
        admission = self._admission
        admission.took_retries(self._window.requeue_due(now_s, admission.retries_available(now_s)))
        due_s = self._window.next_retry_s
        return None if due_s is None else max(due_s, now_s + admission.retry_wait_s(now_s))

    @property
    def cannot_begin(self) -> bool:
        """Whether the circuit of the first route is not closed: fetching more messages makes no
        sense then."""
        return not self._admission.routes.closed(self._extractor.route(None))

    @property
    def waits_for_budget(self) -> bool:
        """Whether messages queued for the first route wait for a budget: fetching more makes no
        sense then."""
        hold = self._holds.get(self._extractor.route(None))
        if hold is None or hold.cause not in BUDGETS:
            return False
        return self._window.next_queued() is not None

    @property
    def queue_waits(self) -> bool:
        """Whether admission keeps the queue of any route waiting (slots, a budget, a cooldown)."""
        return bool(self._holds)

    def waits(self, now_s: float) -> Mapping[Cause, float]:
        """Seconds until the next call may start, by cause; slots are not among the causes."""
        entry = self._window.next_queued()
        if entry is None:
            return self._admission.waits(now_s)
        return self._admission.waits(now_s, self._extractor.estimate(entry.text, entry.progress))

    def share_out(self) -> None:
        """Set our share of the budgets anew, from the partitions held and the lags."""
        held, lags = self._window.held.keys(), self._lags
        self._admission.set_share(clock.now_s(), share(held, lags), even_share(held, lags))

    def seen(self, lags: Mapping[Partition, int | None]) -> None:
        """Take over new lags, by partition of the input topics; None: not known."""
        self._lags = lags
        self.share_out()
        self.admit()

    def _wake_at(self, when_s: float | None) -> None:
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        if when_s is not None:
            loop = asyncio.get_running_loop()
            self._wake = loop.call_at(when_s, self._tasks.called_back, self.admit)

    def close(self) -> None:
        """No call starts any more; a running probe is cancelled."""
        if self._wake is not None:
            self._wake.cancel()
        self._probing.close()

    # --- one call --------------------------------------------------------------------------------

    def _start(self, entry: Entry, turn: Turn) -> None:
        """Start the task of a call. `_call` gives slot and charge back when its attempt ends; the
        callback `_ended` does it for a task that was cancelled before its first step, because none
        of its code runs then."""
        self._turns[entry] = turn
        self._tasks.start(
            entry.holding, self._call, entry, turn, ended=partial(self._ended, entry, turn)
        )

    def _ended(self, entry: Entry, turn: Turn, task: asyncio.Task[None] | None) -> None:
        if task is not None:
            self._tasks.over(task)
        if self._turns.get(entry) is turn:  # `_call` has never begun, so no request was sent
            self._admission.unused(clock.now_s(), turn.estimate)
            self._give_back(entry)
            self._probing.ended(entry, turn.estimate.route)
            self._wake_at(clock.now_s())  # the slot is free for another

    def _give_back(self, entry: Entry) -> None:
        turn = self._turns.pop(entry)
        if self._alone is entry:
            self._alone = None
        self._window.call_ended(entry)
        self._admission.release(turn.estimate.route)
        self._conditions.moved_on()

    async def _call(self, entry: Entry, turn: Turn) -> None:
        """One attempt; afterwards everything that its lane can publish now."""
        ask = self._asking.alone if entry.alone else self._asking.ask
        try:
            if (trace := self._publishing.traces.get(entry)) is None:
                result = await ask(entry, turn)
            else:
                with trace.asking():
                    result = await ask(entry, turn)
        except asyncio.CancelledError:
            self._probing.ended(entry, turn.estimate.route)
            self._wake_at(clock.now_s())  # the slot is free for another
            raise
        finally:
            self._give_back(entry)
        self._purse.account(entry, turn, result)
        match result:
            case CutOff():
                self._answering.cut_off(entry)
            case NoRoom():
                self._answering.succeeded(turn)
                self._go_on_later(entry, result)
            case CallFailure():
                self._answering.failed(entry, turn, result)
            case _:
                if not from_the_cache(result):
                    self._answering.succeeded(turn)
                self._answering.judged(entry, result)
        self._probing.ended(entry, turn.estimate.route)
        self.admit()
        await self._publishing.hand_over(entry.holding, entry.lane)

    def _go_on_later(self, entry: Entry, paused: NoRoom) -> None:
        if not entry.holding.lost:
            entry.progress = paused.progress
            entry.route = self._extractor.route(entry.progress)
            self._window.queue_first(entry, clock.now_s())

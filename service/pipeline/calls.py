"""From the queue to an answer: which message is called next, and what comes of its attempt.

Rules of this file: what a call holds (its slot, its charge) is given back exactly once, whether
its task came to its first step or not. While the circuit is not closed, nothing but a probe goes
out, one at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from service import clock
from service.core.admission.admission import BUDGETS, NO_SLOT, Admission, Cause, Hold, Turn
from service.core.admission.guard import Guard
from service.core.admission.retry import (
    NEVER_THE_MESSAGE,
    OVERLOAD,
    Backoff,
    Uniform,
    exhausted,
)
from service.core.admission.shares import share
from service.core.errors import CallFailure, NoRoom, ServiceFailure, TransientFailure
from service.core.events import Admitted, Observe, Retried
from service.core.history import lived_on
from service.core.messages import Extracted, Outcome, Partition, Postponed, Rejected
from service.core.phase import Phase
from service.core.window import Entry, Window
from service.pipeline.asking import Asking
from service.pipeline.bounds import Bounds
from service.pipeline.outcomes import (
    CutOff,
    Result,
    attempts,
    from_the_cache,
    given_up,
    overstayed,
    sentence,
    with_calls_beside,
)
from service.pipeline.publishing import Publishing
from service.pipeline.tasks import Conditions, Tasks
from service.ports import Extractor


class Calls:
    """Why the queue waits, who runs alone, when to look again, and the probe."""

    def __init__(
        self,
        extractor: Extractor,
        window: Window,
        admission: Admission,
        guard: Guard,
        phase: Phase,
        tasks: Tasks,
        conditions: Conditions,
        asking: Asking,
        publishing: Publishing,
        bounds: Bounds,
        *,
        observe: Observe,
        uniform: Uniform,
        wall_clock: Callable[[], float],
    ) -> None:
        self._extractor, self._bounds = extractor, bounds
        self._window, self._admission, self._guard = window, admission, guard
        self._phase, self._tasks, self._conditions = phase, tasks, conditions
        self._asking, self._publishing = asking, publishing
        self._observe, self._uniform, self._wall_clock = observe, uniform, wall_clock
        self._backoff = Backoff()
        self._hold: Hold | None = None  # why the queue waits
        self._lags: Mapping[Partition, int | None] = {}
        self._turns: dict[Entry, Turn] = {}  # of the calls that have a slot now
        self._alone: Entry | None = None  # the only call that may run now
        self._probe_running: asyncio.Task[None] | None = None
        self._wake: asyncio.TimerHandle | None = None

    # --- admission -------------------------------------------------------------------------------

    def admit(self) -> None:
        """Start calls while there are slots, and see to it that somebody asks again."""
        if not self._tasks.is_open or not self._phase.may_call:
            return
        now_s = clock.now_s()
        if not self._admission.closed:
            self._wake_at(self._probe_when_due(now_s))
            return
        ask_again_s, held = self._requeue(now_s), self.waits_for_budget
        self._hold = None
        while (entry := self._window.next_queued()) is not None:
            if self._alone is not None or (entry.alone and self._window.calling):
                break  # the end of a call goes on with it
            if (held_s := self._guard.wait_s(now_s)) > 0.0:
                ask_again_s = _earlier(ask_again_s, now_s + held_s)
                break
            if self._admission.full(now_s):
                self._hold = NO_SLOT
                break
            estimate = self._extractor.estimate(entry.text, entry.progress)
            self._hold = self._admission.hold(now_s, estimate)
            if self._hold is not None:
                if self._hold.wait_s is not None:
                    ask_again_s = _earlier(ask_again_s, now_s + self._hold.wait_s)
                break
            self._observe(Admitted(now_s - entry.since_s))
            self._window.call_next(now_s)
            self._guard.began(now_s)
            if entry.alone:
                self._alone = entry
            self._start(entry, self._admission.admit(now_s, estimate))
        if held and not self.waits_for_budget:
            self._conditions.look()  # there may be room to fetch
        self._wake_at(ask_again_s)

    def _requeue(self, now_s: float) -> float | None:
        """Retries that are due, as many as may be; returns when there are more to look for."""
        admission = self._admission
        admission.took_retries(self._window.requeue_due(now_s, admission.retries_available(now_s)))
        due_s = self._window.next_retry_s
        return None if due_s is None else max(due_s, now_s + admission.retry_wait_s(now_s))

    @property
    def waits_for_budget(self) -> bool:
        """The queue waits for it, so that fetching more makes no sense."""
        if self._hold is None or self._hold.cause not in BUDGETS:
            return False
        return self._window.next_queued() is not None

    @property
    def held(self) -> bool:
        """Something keeps the queue waiting: slots, a budget, a cooldown."""
        return self._hold is not None

    def waits(self, now_s: float) -> Mapping[Cause, float]:
        """Seconds until the next call may start, by each cause that holds it up; slots apart."""
        entry = self._window.next_queued()
        if entry is None:
            return self._admission.waits(now_s)
        return self._admission.waits(now_s, self._extractor.estimate(entry.text, entry.progress))

    def share_out(self) -> None:
        """Our part of the budgets follows the partitions and their lags."""
        self._admission.set_share(clock.now_s(), share(self._window.held.keys(), self._lags))

    def seen(self, lags: Mapping[Partition, int | None]) -> None:
        """Every partition of the input topics and its lag, where it is known."""
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
        """Nothing starts any more; the probe that runs is called off."""
        if self._wake is not None:
            self._wake.cancel()
        if self._probe_running is not None:
            self._probe_running.cancel()

    # --- the probe -------------------------------------------------------------------------------

    def _probe_when_due(self, now_s: float) -> float | None:
        """While the circuit is not closed nothing but a probe goes out; returns when to ask again.

        One at a time: the circuit may have closed and opened while a probe runs, whose end asks
        again. In a drain one goes out only where a message waits for it, so that the message can
        end before the deadline.
        """
        wait_s = self._admission.probe_wait_s(now_s)
        if wait_s is None or self._probe_running is not None:
            return None
        if self._phase.draining and not self._window.waits_for_a_call:
            return None  # the end of a call asks again
        if wait_s > 0.0:
            return now_s + wait_s
        self._admission.probing(now_s)
        self._probe_running = self._tasks.start_alone(self._probe)
        if self._probe_running is None:
            self._admission.probe_cancelled()
        else:
            self._probe_running.add_done_callback(self._probe_called_off)
        return None

    def _probe_called_off(self, probe: asyncio.Task[None]) -> None:
        """A probe that was cancelled, before its first step or later, has told nothing."""
        if self._probe_running is probe:
            self._probe_running = None
            self._admission.probe_cancelled()
            self._wake_at(clock.now_s())

    async def _probe(self) -> None:
        """Sends one probe for all queued messages: is the provider reachable, and does it accept
        the settings that every request shares?"""
        failure = None
        try:
            await self._extractor.probe()
        except CallFailure as found:
            failure = found
        self._probe_running = None
        now_s = clock.now_s()
        if failure is None:
            self._admission.probe_succeeded(now_s)
            self._window.wake_retries(now_s)
        else:
            self._admission.cool_down(now_s, failure.retry_after_s)
            self._circuit_failed(now_s, failure)
        self._conditions.moved_on()
        self.admit()

    # --- one call --------------------------------------------------------------------------------

    def _start(self, entry: Entry, turn: Turn) -> None:
        """What the call holds is given back where its attempt ends, or where its task does: a
        task that is cancelled before its first step runs none of its code."""
        self._turns[entry] = turn
        self._tasks.start(
            entry.holding, self._call, entry, turn, ended=partial(self._ended, entry, turn)
        )

    def _ended(self, entry: Entry, turn: Turn, task: asyncio.Task[None] | None) -> None:
        if task is not None:
            self._tasks.over(task)
        if self._turns.get(entry) is turn:  # it has never begun, so nothing went out
            self._admission.unused(clock.now_s(), turn.estimate)
            self._give_back(entry)
            self._wake_at(clock.now_s())  # the slot is free for another

    def _give_back(self, entry: Entry) -> None:
        del self._turns[entry]
        if self._alone is entry:
            self._alone = None
        self._window.call_ended(entry)
        self._admission.release()
        self._conditions.moved_on()

    async def _call(self, entry: Entry, turn: Turn) -> None:
        """One attempt; then whatever the lane can publish."""
        ask = self._asking.alone if entry.alone else self._asking.ask
        try:
            if (trace := self._publishing.traces.get(entry)) is None:
                result = await ask(entry, turn)
            else:
                with trace.asking():
                    result = await ask(entry, turn)
        except asyncio.CancelledError:
            self._wake_at(clock.now_s())  # the slot is free for another
            raise
        finally:
            self._give_back(entry)
        self._account(entry, turn, result)
        match result:
            case CutOff():
                self.answer(entry, self._overstayed(entry))
            case NoRoom():
                self._provider_answers(turn)
                self._go_on_later(entry, result)
            case CallFailure():
                self._failed(entry, turn, result)
            case _:
                if not from_the_cache(result):
                    self._provider_answers(turn)
                self.answer(entry, result)
        self.admit()
        await self._publishing.hand_over(entry.holding, entry.lane)

    def _account(self, entry: Entry, turn: Turn, result: Result | CutOff) -> None:
        """What an attempt has cost; one that took its answer from the cache has cost nothing."""
        if isinstance(result, CutOff) or result.provenance is None:
            return
        spent = result.provenance
        before, entry.spent = entry.spent, spent
        usd = spent.cost_usd - (0.0 if before is None else before.cost_usd)
        answered = not (spent.cached or isinstance(result, TransientFailure | ServiceFailure))
        if usd > 0 or answered:  # what nobody answered says nothing of what a call costs
            self._admission.spent(clock.now_s(), usd)
        if spent.cached:
            self._admission.unused(clock.now_s(), turn.estimate)

    def _provider_answers(self, turn: Turn) -> None:
        now_s = clock.now_s()
        if self._admission.succeeded(now_s, turn):
            self._window.wake_retries(now_s)

    def _go_on_later(self, entry: Entry, paused: NoRoom) -> None:
        if not entry.holding.lost:
            entry.progress = paused.progress
            self._window.queue_first(entry, clock.now_s())

    def _circuit_failed(self, now_s: float, failure: CallFailure) -> None:
        self._admission.failed(
            now_s,
            sentence(failure),
            service=isinstance(failure, ServiceFailure),
            retry_after_s=failure.retry_after_s,
        )

    # --- what failed -----------------------------------------------------------------------------

    def _failed(self, entry: Entry, turn: Turn, failure: CallFailure) -> None:
        now_s = clock.now_s()
        service = isinstance(failure, ServiceFailure)
        # One call counts once, however many waited; and while a probe is out, its answer counts,
        # not that of a call from before.
        if not failure.shared and not self._admission.probe_is_out:
            self._circuit_failed(now_s, failure)
        if failure.reason in OVERLOAD:
            self._admission.overloaded(now_s, turn, failure.reason, failure.retry_after_s)
        self._observe(Retried(failure.reason))
        entry.progress = failure.progress
        entry.not_before_s = now_s + (failure.retry_after_s or 0.0)
        entry.attempts += 1
        entry.attempts_that_count += not service and failure.reason not in NEVER_THE_MESSAGE
        if entry.first_failed_at_ms is None:
            entry.first_failed_at_ms = self._wall_ms()
        if (outcome := self._given_up(entry, turn, failure)) is not None:
            self.answer(entry, outcome)
            return
        if entry.attempts_that_count >= self._bounds.attempts_max:
            self._admission.doubt(now_s)  # nobody else has shown that the provider is there
        delay_s = self._backoff.delay_s(entry.attempts, self._uniform, failure.retry_after_s)
        self._window.retry(entry, now_s, now_s + delay_s)
        if self._phase.draining:
            self.let_go()

    def let_go(self) -> None:
        """Forget messages that cost nothing to forget."""
        self._window.let_go()
        self._publishing.end_traces()

    def _given_up(self, entry: Entry, turn: Turn, failure: CallFailure) -> Outcome | None:
        if exhausted(
            entry.attempts_that_count,
            self._bounds.attempts_max,
            turn.started_s,
            self._admission.last_success_s,
        ):
            return self._postponed(entry) or given_up(entry, failure)
        return self._overstayed(entry) if self._asking.overstays(entry) else None

    def _overstayed(self, entry: Entry) -> Outcome:
        return self._postponed(entry) or overstayed(entry, self._bounds.message_timeout_s)

    def _postponed(self, entry: Entry) -> Postponed | None:
        """An exhausted message goes to the retry topic, where there is one, so and so often."""
        later, now_ms = self._bounds.later, self._wall_ms()
        made = attempts(entry, entry.spent)
        history = lived_on(entry.message, made, entry.first_failed_at_ms or now_ms)
        if later is None or history.retries >= later.attempts_max:
            return None
        due_ms = now_ms + int(later.delay_s * 1000)
        return Postponed(replace(history, retries=history.retries + 1, due_ms=due_ms).headers)

    def answer(self, entry: Entry, outcome: Outcome) -> None:
        """The message has its outcome; a rejected one is told how it came to it."""
        if entry.holding.lost:
            return
        if isinstance(outcome, Rejected):
            outcome = self._explained(entry, outcome)
        if isinstance(outcome, Extracted | Rejected) and outcome.provenance is not None:
            outcome = replace(outcome, provenance=with_calls_beside(entry, outcome.provenance))
        self._window.answered(entry, outcome, clock.now_s())

    def _explained(self, entry: Entry, rejected: Rejected) -> Rejected:
        """How the message came to it; before `with_calls_beside`."""
        first_ms = entry.first_failed_at_ms
        return replace(
            rejected,
            attempts=attempts(entry, rejected.provenance),
            first_failed_at_ms=self._wall_ms() if first_ms is None else first_ms,
            records_out=entry.records_out,
        )

    def _wall_ms(self) -> int:
        return int(self._wall_clock() * 1000)


def _earlier(one_s: float | None, other_s: float) -> float:
    return other_s if one_s is None else min(one_s, other_s)

"""The pipeline's status: its state in one word, its figures, and why it is not ready."""

from __future__ import annotations

from collections import Counter

from service import clock
from service.core.admission.admission import Admission
from service.core.admission.guard import Guard
from service.core.phase import Phase, Tenure
from service.core.status import GroupStatus, State, Status
from service.core.window import Entry, Stage, Window
from service.pipeline.bounds import Bounds
from service.pipeline.calls import Calls
from service.pipeline.streaming import Streaming
from service.pipeline.tasks import Conditions

STALLED_AFTER_S = 60.0
"""The state is `stalled` where nothing has moved for this many seconds although there is work, no
call runs and no known cause holds it up."""

KAFKA_SLOW_AFTER_S = 5.0
"""The state is `waiting_for_kafka` where an acknowledgement takes longer than this many seconds."""


class Reporting:
    """Reads all parts and changes none."""

    def __init__(
        self,
        window: Window,
        admission: Admission,
        guard: Guard,
        phase: Phase,
        conditions: Conditions,
        calls: Calls,
        streaming: Streaming,
        bounds: Bounds,
    ) -> None:
        self._window, self._admission, self._guard = window, admission, guard
        self._phase, self._conditions = phase, conditions
        self._calls, self._streaming, self._bounds = calls, streaming, bounds

    def status(self, group: GroupStatus, turned_at_s: float) -> Status:
        """A snapshot; `turned_at_s` is when the intake last turned."""
        now_s = clock.now_s()
        window, admission = self._window, self._admission
        stages = Counter(entry.stage for entry in window.entries())
        overdue_s = max((self._call_s(each, now_s) for each in window.calling), default=0.0)
        partitions = {each: holding.status() for each, holding in window.held.items()}
        lag = sum(one.lag or 0 for one in partitions.values())
        oldest_s = min((entry.taken_s for entry in window.entries()), default=now_s)
        held = self._phase.tenure is Tenure.HELD
        return Status(
            state=self._state(group, now_s, stages, lag),
            slots=admission.routes.limit,
            slots_busy=admission.busy,
            window=self._bounds.window,
            window_messages=window.messages,
            window_bytes=window.size_bytes,
            window_full=not self._bounds.room_worth_a_poll(self._bounds.window - window.messages),
            queued=stages[Stage.QUEUED],
            retrying=stages[Stage.RETRYING],
            waiting_in_lane=stages[Stage.ANSWERED],
            publishing=stages[Stage.HANDED],
            poll_turn_age_s=now_s - turned_at_s if held else 0.0,
            call_overdue_s=max(0.0, overdue_s - self._bounds.call_deadline_s),
            not_ready=self._not_ready(group, now_s),
            group=group,
            partitions=partitions,
            reject_guard_tripped=self._guard.tripped,
            admission_waits=self._calls.waits(now_s),
            budget_share=admission.share,
            pace_per_s=admission.routes.pace_per_s,
            spent_last_hour_usd=admission.spent_last_hour_usd(now_s),
            oldest_message_age_s=now_s - oldest_s,
            lanes_waiting=window.lanes_waiting(),
        )

    def _state(self, group: GroupStatus, now_s: float, stages: Counter[Stage], lag: int) -> State:
        if self._phase.draining:
            return State.DRAINING
        if self._phase.tenure is Tenure.NONE_YET:
            return State.STARTING
        if not group.broker_answers or self._slowest_publish_s(now_s) > KAFKA_SLOW_AFTER_S:
            return State.WAITING_FOR_KAFKA
        if self._phase.tenure is not Tenure.HELD:
            return State.REBALANCING
        if self._calls.cannot_begin:
            return State.WAITING_FOR_PROVIDER
        if self._guard.tripped:
            return State.GUARDED
        if self._window.calling:
            return State.RUNNING
        if self._calls.waits_for_budget:
            return State.WAITING_FOR_BUDGET
        if stages[Stage.RETRYING] or self._calls.queue_waits:
            return State.WAITING_FOR_PROVIDER
        if not lag and not self._window.messages:
            return State.IDLE
        stalled = now_s - self._conditions.moved_at_s > STALLED_AFTER_S
        return State.STALLED if stalled else State.RUNNING

    def _slowest_publish_s(self, now_s: float) -> float:
        handed = (e.since_s for e in self._window.entries() if e.stage is Stage.HANDED)
        return max(now_s - min(handed, default=now_s), self._streaming.slowest_s(now_s))

    def _call_s(self, entry: Entry, now_s: float) -> float:
        """For how many seconds a call has been running, not counting its waits for Kafka."""
        return now_s - entry.since_s - self._streaming.waited_s(entry, now_s)

    def _not_ready(self, group: GroupStatus, now_s: float) -> tuple[str, ...]:
        """Sentences for a person: why it is not ready; empty: it is. A member of a settled group is
        ready even where it holds no partition."""
        first = None
        if self._phase.draining:
            first = "it is stopping"
        elif self._phase.tenure is Tenure.NONE_YET:
            first = "the group has not settled: no assignment yet"
        sentences = (
            first,
            group.problem,
            *self._admission.routes.outages,
            self._guard.problem,
            self._admission.spend_exceeded(now_s),
        )
        return tuple(sentence for sentence in sentences if sentence is not None)

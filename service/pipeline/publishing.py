"""From an outcome to its acknowledgement: it is handed over in lane order, settled, finished.

Rules of this file: a lane hands its outcomes over without waiting for acknowledgements. After a
failed send it stops until everything that it had handed over is settled, rests, and then goes on
in order.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial

from service import clock
from service.core.admission.guard import Guard
from service.core.admission.retry import Backoff, Uniform
from service.core.errors import OutputTooLarge, PublishFailed
from service.core.events import Finished, Observe, PublishRetried, outcome_word
from service.core.lanes import Lane
from service.core.messages import (
    Extracted,
    Message,
    Outcome,
    Passed,
    Postponed,
    Publishable,
    Rejected,
)
from service.core.phase import Phase
from service.core.window import Entry, Holding, Window
from service.pipeline.outcomes import from_the_cache, too_large
from service.pipeline.tasks import Conditions, Tasks
from service.ports import Sink, Trace

log = logging.getLogger(__name__)


class Publishing:
    """Hands outcomes to the sink. It owns which lanes are at work and which rest, what is sent and
    not acknowledged, and the traces of messages."""

    def __init__(
        self,
        sink: Sink,
        window: Window,
        guard: Guard,
        phase: Phase,
        tasks: Tasks,
        conditions: Conditions,
        *,
        observe: Observe,
        uniform: Uniform,
        wall_clock: Callable[[], float],
        follow: Callable[[Message], Trace] | None,
    ) -> None:
        self._sink, self._window, self._guard, self._phase = sink, window, guard, phase
        self._tasks, self._conditions = tasks, conditions
        self._observe, self._uniform, self._wall_clock = observe, uniform, wall_clock
        self._follow = follow
        self._backoff = Backoff()
        self._sent: dict[asyncio.Future[None], Holding] = {}  # not acknowledged
        self._at_work: set[Lane] = set()  # a task is handing over their outcomes
        self._resting: set[Lane] = set()  # a send failed; a timer will start them again
        self.traces: dict[Entry, Trace] = {}  # of messages in the window; empty without tracing

    # --- handing over ----------------------------------------------------------------------------

    def start(self, entry: Entry) -> None:
        """Hand over what the entry's lane has ready, unless a task does so already."""
        if entry.lane.ready and self._may_hand_over(entry.holding, entry.lane):
            self._tasks.start(entry.holding, self.hand_over, entry.holding, entry.lane)

    def start_all(self) -> None:
        """After an assignment: hand over the outcomes that were held back during it."""
        for entry in tuple(self._window.entries()):
            self.start(entry)

    async def hand_over(self, holding: Holding, lane: Lane) -> None:
        """Give the sink what the lane has ready, in order; one task at a time for a lane."""
        while self._may_hand_over(holding, lane):
            entry = self._window.hand_over(holding, lane, clock.now_s())
            if entry is None:
                return
            self._at_work.add(lane)
            try:
                await self._publish(entry)
            finally:
                self._at_work.discard(lane)

    def _may_hand_over(self, holding: Holding, lane: Lane) -> bool:
        if holding.lost or not self._phase.may_publish:
            return False
        return lane not in self._at_work and lane not in self._resting

    async def _publish(self, entry: Entry) -> None:
        assert entry.outcome is not None, "handed over without an outcome"
        acknowledged = await self._give(entry, entry.outcome)
        acknowledged.add_done_callback(partial(self._tasks.called_back, self._settled, entry))

    async def send(self, entry: Entry, outcome: Publishable) -> asyncio.Future[None]:
        """Give the sink a piece of a streamed answer, which goes through no lane."""
        acknowledged = await self._give(entry, outcome)
        acknowledged.add_done_callback(self._sent.pop)
        return acknowledged

    async def _give(self, entry: Entry, outcome: Publishable) -> asyncio.Future[None]:
        """Give an outcome to the sink. If its partition is lost before it is sent, it is
        withdrawn."""
        trace = self.traces.get(entry)
        if trace is None:
            acknowledged = await self._sink.publish(entry.message, outcome)
        else:
            acknowledged = await trace.publish(self._sink, entry.message, outcome)
        self._sent[acknowledged] = entry.holding
        return acknowledged

    def withdraw(self, lost: Sequence[Holding]) -> None:
        """Withdraw the outcomes of lost partitions that are not sent yet."""
        for acknowledged, holding in self._sent.items():
            if holding in lost:
                acknowledged.cancel()

    # --- the sink's word -------------------------------------------------------------------------

    def _settled(self, entry: Entry, acknowledged: asyncio.Future[None]) -> None:
        """The sink has settled one outcome; ignored where the partition is no longer ours."""
        del self._sent[acknowledged]
        failure = PublishFailed() if acknowledged.cancelled() else acknowledged.exception()
        if entry.holding.lost:
            return
        match failure:
            case None:
                self._finish(entry)
            case OutputTooLarge() | PublishFailed():
                self._not_published(entry, failure)
            case _:
                raise failure

    def _finish(self, entry: Entry) -> None:
        assert entry.outcome is not None, "finished without an outcome"
        reopened = entry.lane.acknowledge(entry.message.offset)
        self._window.finish(entry)
        self._observe(
            Finished(
                outcome=outcome_word(entry.outcome),
                reason=entry.outcome.reason if isinstance(entry.outcome, Rejected) else None,
                records=len(entry.outcome.records) if isinstance(entry.outcome, Extracted) else 0,
                publish_s=clock.now_s() - entry.since_s,
                end_to_end_s=self._wall_clock() - entry.message.timestamp_ms / 1000,
                lane_wait_s=entry.lane_wait_s,
            )
        )
        if (trace := self.traces.pop(entry, None)) is not None:
            trace.ended(entry.outcome)
        if reopened:
            self._rest(entry, self._backoff.delay_s(1, self._uniform))
        self._tell_the_guard(entry.outcome)
        self._conditions.moved_on()

    def _tell_the_guard(self, outcome: Outcome) -> None:
        if not isinstance(outcome, Extracted | Rejected):
            return
        if isinstance(outcome, Rejected) and from_the_cache(outcome):
            return  # a shared call counts once: another message has told the guard
        before = self._guard.tripped
        reason = outcome.reason if isinstance(outcome, Rejected) else None
        self._guard.finished(reason, clock.now_s())
        if self._guard.tripped and not before:
            log.error("%s", self._guard.problem)
        elif before and not self._guard.tripped:
            log.info("messages are not rejected any more: intake goes on")

    def _not_published(self, entry: Entry, failure: OutputTooLarge | PublishFailed) -> None:
        """The lane stops. Once everything that it had handed over is settled, it rests and then
        starts again, in order."""
        rest_s = 0.0
        if isinstance(failure, OutputTooLarge) and isinstance(
            entry.outcome, Extracted | Passed | Postponed
        ):
            entry.outcome = too_large(entry, entry.outcome)
        else:
            entry.publish_attempts += 1
            rest_s = self._backoff.delay_s(entry.publish_attempts, self._uniform)
            self._observe(PublishRetried())
        if entry.lane.fail(entry.message.offset):
            self._rest(entry, rest_s)

    def _rest(self, entry: Entry, rest_s: float) -> None:
        """The entry's lane goes on after `rest_s` seconds."""
        self._resting.add(entry.lane)
        asyncio.get_running_loop().call_later(rest_s, self._tasks.called_back, self._rested, entry)

    def _rested(self, entry: Entry) -> None:
        self._resting.discard(entry.lane)
        self.start(entry)

    # --- traces ----------------------------------------------------------------------------------

    def follow(self, entry: Entry) -> None:
        """Begin the message's trace, where tracing is on."""
        if self._follow is not None:
            self.traces[entry] = self._follow(entry.message)

    def end_traces(self) -> None:
        """End the traces of messages that have left the window unfinished."""
        for entry in [each for each in self.traces if each.gone]:
            self.traces.pop(entry).ended(None)

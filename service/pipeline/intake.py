"""From the source into the window: when to poll, for how much, and what becomes of a message."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from service import clock
from service.core.admission.guard import Guard
from service.core.events import Dropped, Observe, Spared, Taken
from service.core.messages import Batch, Message, Outcome, Partition
from service.core.phase import Phase
from service.core.window import Entry, Window
from service.pipeline.answering import Answering
from service.pipeline.bounds import Bounds
from service.pipeline.calls import Calls
from service.pipeline.outcomes import died_before
from service.pipeline.publishing import Publishing
from service.pipeline.tasks import Conditions
from service.ports import Source

IDLE_TURN_S = 1.0
"""The longest that the intake waits for room before it polls anyway, with a limit of 0. Without
polls the group would remove this member, and the liveness probe watches that the loop turns."""


class Intake:
    """The one task that polls. `turned_at_s` is when its loop last turned."""

    def __init__(
        self,
        source: Source,
        decode: Callable[[Message], str | Outcome],
        window: Window,
        guard: Guard,
        phase: Phase,
        conditions: Conditions,
        calls: Calls,
        answering: Answering,
        publishing: Publishing,
        bounds: Bounds,
        observe: Observe,
    ) -> None:
        self._source, self._decode, self._bounds = source, decode, bounds
        self._window, self._guard = window, guard
        self._phase, self._conditions = phase, conditions
        self._calls, self._answering = calls, answering
        self._publishing, self._observe = publishing, observe
        self.turned_at_s = 0.0

    async def run(self, until: Mapping[Partition, int] | None, stop: Callable[[], None]) -> None:
        """Poll and take until it is cancelled; calls `stop` once the offsets in `until` are
        reached."""
        while True:
            self.turned_at_s = clock.now_s()
            limit = self._room()
            if limit == 0 and await self._conditions.until(lambda: self._room() > 0, IDLE_TURN_S):
                continue
            batch = await self._source.poll(limit, self._window.crowded())
            if self._phase.stopping:
                # Messages that were let go keep their places in the lanes, so an outcome behind
                # them could not be published. The positions must not count either: they are beyond
                # the messages of this batch, which are not taken.
                continue
            self._take(batch)
            if until is not None and (self._reached(until) or self._guard.tripped):
                stop()  # a guard that has tripped ends such a run too: nobody may be there to mend

    def _room(self) -> int:
        """How many messages to poll for; 0 while it is not allowed or not worth a poll."""
        if not self._phase.may_take:
            return 0
        if self._window.size_bytes >= self._bounds.window_bytes:
            return 0
        if self._calls.cannot_begin or self._calls.waits_for_budget:
            return 0
        room = self._bounds.window - self._window.messages
        if (tries := self._guard.room(self._window.messages, clock.now_s())) is not None:
            return min(room, tries)
        return room if self._bounds.room_worth_a_poll(room) else 0

    def _take(self, batch: Batch) -> None:
        """Messages enter the window first; then the positions count, which are behind them."""
        now_s = clock.now_s()
        taken = taken_bytes = finished = 0
        for message in batch.messages:
            entry = self._window.take(message, now_s)
            if not isinstance(entry, Entry):
                finished += entry == "finished"
                continue
            taken += 1
            taken_bytes += message.size_bytes
            self._publishing.follow(entry)
            decoded = died_before(entry) or self._decode(message)
            if isinstance(decoded, str):
                entry.text = decoded
                self._calls.queue(entry)
            else:
                self._answering.answer(entry, decoded)
                self._publishing.start(entry)
        for partition, position in batch.positions.items():
            if (holding := self._window.held.get(partition)) is not None:
                holding.tracker.advance(position)
                holding.end = batch.ends.get(partition, holding.end)
        if taken:
            self._observe(Taken(taken, taken_bytes))
        if finished:
            self._observe(Spared(finished))
        if taken + finished < len(batch.messages):
            self._observe(Dropped(len(batch.messages) - taken - finished))
        self._calls.admit()

    def _reached(self, until: Mapping[Partition, int]) -> bool:
        """Whether everything below the offsets in `until` is finished, in the partitions held."""
        if not self._phase.may_publish:
            return False
        for partition, end in until.items():
            holding = self._window.held.get(partition)
            if holding is not None and holding.tracker.next_offset < end:
                return False
        return True

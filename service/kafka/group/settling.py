"""Two clocks of a group member: since when no broker has answered, and how long it is unsettled."""

from __future__ import annotations

SILENT_S = 10.0
"""Brokers that were silent for this long count as not answering."""


class SettlingClock:
    """Counts unsettled time only while brokers answer: an outage is no reason to restart.

    All times are seconds of one monotonic clock that the caller reads.
    """

    def __init__(self) -> None:
        self.answered_at_s = float("-inf")
        self.unsettled_s = 0.0
        self._ticked_at_s: float | None = None
        self._fetched_at_ms = 0

    def broker_answered(self, now_s: float) -> None:
        """A broker answered something."""
        self.answered_at_s = now_s

    def fetched(self, at_ms: int, now_s: float) -> None:
        """The client's latest answered fetch; one that was seen before says nothing new."""
        if at_ms > self._fetched_at_ms:
            self._fetched_at_ms, self.answered_at_s = at_ms, now_s

    def answers(self, now_s: float) -> bool:
        """Whether a broker answered lately."""
        return now_s - self.answered_at_s < SILENT_S

    def tick(self, now_s: float, *, settled: bool) -> None:
        """Time has passed since the last tick, in the state that it has now."""
        since_s = 0.0 if self._ticked_at_s is None else now_s - self._ticked_at_s
        self._ticked_at_s = now_s
        if settled:
            self.unsettled_s = 0.0
        elif self.answers(now_s):
            self.unsettled_s += since_s

"""The pipeline's bounds: how much it may take and how long it may wait."""

from dataclasses import dataclass

from service.core.admission.guard import NEVER, GuardBounds
from service.core.lanes import Ordering

POLL_SHARE = 8
"""A poll waits until an eighth of the window is free. One poll for each finished message would
cost more CPU than it saves, and the rest of the window keeps the slots busy meanwhile."""


@dataclass(frozen=True, slots=True)
class Later:
    """How long an exhausted message waits in the retry topic, and how often at most."""

    delay_s: float
    attempts_max: int


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the pipeline may take and how long it may wait; messages, bytes, seconds."""

    concurrency: int
    window: int
    window_bytes: int
    ordering: Ordering
    attempts_max: int
    call_deadline_s: float  # for one attempt with its re-asks; after it the call is overdue
    commit_interval_s: float
    drain_timeout_s: float
    rebalance_drain_s: float
    guard: GuardBounds = NEVER
    later: Later | None = None  # None: exhausted messages are rejected at once
    message_timeout_s: float | None = None  # counted from its first call; None: no limit
    hedge_after_s: float | None = None  # a call is hedged after this time; None: never

    def room_worth_a_poll(self, room: int) -> bool:
        """Whether `room` free places in the window are enough for a poll."""
        return room >= max(1, self.window // POLL_SHARE)

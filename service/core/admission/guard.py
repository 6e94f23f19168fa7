"""The reject guard: when suddenly everything is rejected, it is hardly the messages' fault.

Rules of this file: pure; time comes in as seconds of a monotonic clock. The pipeline tells each
outcome and asks before each call and each poll. A guard that has tripped lets a few messages
through now and then to see, as a circuit does: whoever mends a prompt, a schema or a model need
not restart anything, and until then little goes into the dead letters.
"""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from service.core.messages import Reason

TRY_EVERY_S = 60.0
"""Between two looks whether it is over: what is rejected meanwhile is `TRIES` a minute."""

TRIES = 5
"""Messages of one look: one or two good ones happen by chance where half are rejected."""


class GuardState(StrEnum):
    CLOSED = "closed"  # messages go through
    TRIPPED = "tripped"  # none do, until a moment
    TRYING = "trying"  # a few are out to see


@dataclass(frozen=True, slots=True)
class GuardBounds:
    """Rejections that are too many; None: this rule is off.

    More than `share_max` of the last `window` outcomes, once there are `outcomes_min`; or
    `in_a_row_max` with nothing else between them.
    """

    share_max: float | None = None
    window: int = 200
    outcomes_min: int = 50
    in_a_row_max: int | None = None


NEVER = GuardBounds()
"""It never trips."""


@dataclass(slots=True)
class Guard:
    """Counts outcomes that say something: records or a rejection."""

    bounds: GuardBounds
    state: GuardState = GuardState.CLOSED
    _last: deque[Reason | None] = field(init=False)
    _reasons: Counter[Reason | None] = field(default_factory=Counter)
    _in_a_row: int = 0
    _why: str = ""
    _try_at_s: float = 0.0
    _tries_left: int = 0  # that may still begin
    _tried: list[Reason | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._last = deque()

    @property
    def tripped(self) -> bool:
        return self.state is not GuardState.CLOSED

    @property
    def problem(self) -> str | None:
        """A sentence for a person: what happened and what to do."""
        if not self.tripped:
            return None
        return (
            f"too many messages are rejected ({self._why}): nothing more is taken, so that the "
            "topic is not emptied into the dead letters. See `sluice dead-letters list` for why; "
            f"mend it, and restart, or wait: {TRIES} messages a minute are tried, and it goes on "
            "by itself once they are not rejected. To go on all the same, raise or null "
            "dead_letters.guard.share_max and in_a_row_max"
        )

    def finished(self, reason: Reason | None, now_s: float) -> None:
        """An outcome: why it was rejected, None for records."""
        match self.state:
            case GuardState.CLOSED:
                self._count(reason)
                if (why := next(self._too_many(), None)) is not None:
                    self._trip(why, now_s)
            case GuardState.TRYING:
                self._tried.append(reason)
                self._judge(now_s)
            case GuardState.TRIPPED:
                pass  # what was under way when it tripped

    def wait_s(self, now_s: float) -> float:
        """0: a message may begin; else ask again after so long, or after an outcome."""
        if self.state is GuardState.CLOSED:
            return 0.0
        if self.state is GuardState.TRIPPED:
            if now_s < self._try_at_s:
                return self._try_at_s - now_s
            self.state, self._tries_left = GuardState.TRYING, TRIES
            self._tried.clear()
        return 0.0 if self._tries_left else self._out_s(now_s)

    def room(self, queued: int, now_s: float) -> int | None:
        """How many messages may be taken beside those that wait for a call; None: any number."""
        if self.state is GuardState.CLOSED:
            return None
        return max(0, self._tries_left - queued) if self.wait_s(now_s) == 0.0 else 0

    def began(self, now_s: float) -> None:
        """A message has begun; only after `wait_s` gave 0."""
        if self.state is GuardState.TRYING:
            self._tries_left -= 1
            if not self._tries_left:
                self._try_at_s = now_s + TRY_EVERY_S

    def _out_s(self, now_s: float) -> float:
        """All tries are out. One whose outcome never comes (its partition was lost) is not waited
        for: after a while others go."""
        if now_s < self._try_at_s:
            return self._try_at_s - now_s
        self._tries_left = TRIES - len(self._tried)
        return 0.0

    def _count(self, reason: Reason | None) -> None:
        self._in_a_row = 0 if reason is None else self._in_a_row + 1
        self._last.append(reason)
        self._reasons[reason] += 1
        if len(self._last) > self.bounds.window:
            self._reasons[self._last.popleft()] -= 1

    def _too_many(self) -> Iterator[str]:
        bounds, outcomes = self.bounds, len(self._last)
        if bounds.in_a_row_max is not None and self._in_a_row >= bounds.in_a_row_max:
            yield f"{self._in_a_row} in a row, most of them {self._top()}"
        rejected = outcomes - self._reasons[None]
        if bounds.share_max is None or outcomes < bounds.outcomes_min:
            return
        if rejected > bounds.share_max * outcomes:
            yield f"{rejected} of the last {outcomes}, most of them {self._top()}"

    def _top(self) -> str:
        return max(Reason, key=lambda each: self._reasons[each]).value

    def _trip(self, why: str, now_s: float) -> None:
        self.state, self._why = GuardState.TRIPPED, why
        self._try_at_s = now_s + TRY_EVERY_S

    def _judge(self, now_s: float) -> None:
        """As soon as it is certain what the share of all tries will be; without a share, a single
        good one ends the row."""
        share_max = self.bounds.share_max
        bearable = TRIES - 1 if share_max is None else int(share_max * TRIES)
        rejected = sum(reason is not None for reason in self._tried)
        if rejected > bearable:
            self._trip(self._why, now_s)
        elif len(self._tried) - rejected >= TRIES - bearable:
            self.state, self._in_a_row = GuardState.CLOSED, 0
            self._last.clear()
            self._reasons.clear()

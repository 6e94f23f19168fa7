"""The reject guard stops intake when too much is rejected: the messages are hardly the cause then.

Rules of this file: pure; time comes in as seconds of a monotonic clock. The pipeline tells the
guard each outcome and asks it before each call and each poll. A guard that has tripped lets a few
messages through now and then, as a circuit does with probes. Once the prompt, the schema or the
model is mended, work goes on without a restart, and until then few messages are rejected.
"""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from service.core.messages import Reason

TRY_EVERY_S = 60.0
"""Seconds between two rounds of tries: a tripped guard lets `TRIES` messages a minute through."""

TRIES = 5
"""How many messages are tried in a round. With fewer, one or two good ones among many bad ones
could close the guard by chance."""


class GuardState(StrEnum):
    CLOSED = "closed"  # messages go through
    TRIPPED = "tripped"  # none do, until the next round of tries
    TRYING = "trying"  # a round of tries is under way


@dataclass(frozen=True, slots=True)
class GuardBounds:
    """How many rejections are too many; None: this rule is off.

    Either more than the share `share_max` of the last `window` outcomes, once there are
    `outcomes_min`; or `in_a_row_max` rejections without another outcome between them.
    """

    share_max: float | None = None
    window: int = 200
    outcomes_min: int = 50
    in_a_row_max: int | None = None


NEVER = GuardBounds()
"""The bounds of a guard that never trips."""


@dataclass(slots=True)
class Guard:
    """Counts the outcomes that tell something about the setup: records and rejections."""

    bounds: GuardBounds
    state: GuardState = GuardState.CLOSED
    _last: deque[Reason | None] = field(init=False)
    _reasons: Counter[Reason | None] = field(default_factory=Counter)
    _in_a_row: int = 0
    _why: str = ""
    _try_at_s: float = 0.0
    _tries_left: int = 0  # messages of this round that may still begin
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
            f"too many messages are rejected ({self._why}): no more messages are taken, so that "
            "the topic is not emptied into the dead letters. `sluice dead-letters list` shows the "
            "reasons. Mend the cause; then restart, or wait: "
            f"{TRIES} messages a minute are tried, and work goes on by itself once they are not "
            "rejected. To go on in spite of the rejections, raise dead_letters.guard.share_max and "
            "in_a_row_max or set them to null"
        )

    def finished(self, reason: Reason | None, now_s: float) -> None:
        """A message finished; `reason` is why it was rejected, None where it has records."""
        match self.state:
            case GuardState.CLOSED:
                self._count(reason)
                if (why := next(self._too_many(), None)) is not None:
                    self._trip(why, now_s)
            case GuardState.TRYING:
                self._tried.append(reason)
                self._judge(now_s)
            case GuardState.TRIPPED:
                pass  # the message was under way when the guard tripped

    def wait_s(self, now_s: float) -> float:
        """0: a message may begin. Else ask again after this many seconds, or after an outcome."""
        if self.state is GuardState.CLOSED:
            return 0.0
        if self.state is GuardState.TRIPPED:
            if now_s < self._try_at_s:
                return self._try_at_s - now_s
            self.state, self._tries_left = GuardState.TRYING, TRIES
            self._tried.clear()
        return 0.0 if self._tries_left else self._out_s(now_s)

    def room(self, queued: int, now_s: float) -> int | None:
        """How many messages may be taken while `queued` wait for a call; None: any number."""
        if self.state is GuardState.CLOSED:
            return None
        return max(0, self._tries_left - queued) if self.wait_s(now_s) == 0.0 else 0

    def began(self, now_s: float) -> None:
        """A message has begun; allowed only after `wait_s` returned 0."""
        if self.state is GuardState.TRYING:
            self._tries_left -= 1
            if not self._tries_left:
                self._try_at_s = now_s + TRY_EVERY_S

    def _out_s(self, now_s: float) -> float:
        """All tries of the round are under way. After `TRY_EVERY_S` others replace those without an
        outcome: theirs may never come, because the partition was lost."""
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
        """Decide as soon as the tries that are still out cannot change the result. Where only
        `in_a_row_max` is set, one message that is not rejected closes the guard."""
        share_max = self.bounds.share_max
        bearable = TRIES - 1 if share_max is None else int(share_max * TRIES)
        rejected = sum(reason is not None for reason in self._tried)
        if rejected > bearable:
            self._trip(self._why, now_s)
        elif len(self._tried) - rejected >= TRIES - bearable:
            self.state, self._in_a_row = GuardState.CLOSED, 0
            self._last.clear()
            self._reasons.clear()

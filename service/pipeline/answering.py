"""What becomes of a message after an attempt: an outcome, another attempt, or the retry topic."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from service import clock
from service.core.admission.admission import Admission, Turn
from service.core.admission.retry import Backoff, Uniform
from service.core.errors import CallFailure
from service.core.events import Observe, Retried
from service.core.history import lived_on
from service.core.messages import Extracted, Outcome, Postponed, Reason, Rejected
from service.core.phase import Phase
from service.core.window import Entry, Window
from service.pipeline.asking import Asking
from service.pipeline.blame import Blame, counts
from service.pipeline.bounds import Bounds
from service.pipeline.outcomes import (
    attempts,
    from_the_cache,
    given_up,
    overstayed,
    with_calls_beside,
)
from service.pipeline.publishing import Publishing
from service.ports import Extractor

log = logging.getLogger(__name__)

DRAIN_DELAY_S = 2.0
"""The longest wait in seconds between two attempts during a drain, so that it ends soon. Where the
provider asks us to wait longer, that still counts."""


class Answering:
    """Gives a message its outcome, or another attempt where the last one failed."""

    def __init__(
        self,
        extractor: Extractor,
        window: Window,
        admission: Admission,
        phase: Phase,
        asking: Asking,
        blame: Blame,
        publishing: Publishing,
        bounds: Bounds,
        *,
        observe: Observe,
        uniform: Uniform,
        wall_clock: Callable[[], float],
    ) -> None:
        self._extractor, self._blame = extractor, blame
        self._window, self._admission, self._phase = window, admission, phase
        self._asking, self._publishing, self._bounds = asking, publishing, bounds
        self._observe, self._uniform, self._wall_clock = observe, uniform, wall_clock
        self._backoff = Backoff()

    def succeeded(self, turn: Turn) -> None:
        """The call of this turn was answered."""
        now_s = clock.now_s()
        if self._admission.succeeded(now_s, turn):
            self._window.wake_retries(now_s)

    def failed(self, entry: Entry, turn: Turn, failure: CallFailure) -> None:
        now_s = clock.now_s()
        if failure.route not in (None, turn.estimate.route):
            self.succeeded(turn)  # the first route answered: else no other would have been asked
        self._blame.failed(now_s, entry, turn, failure)
        self._observe(Retried(failure.reason))
        entry.progress = failure.progress
        entry.route = self._extractor.route(entry.progress)
        entry.not_before_s = now_s + (failure.retry_after_s or 0.0)
        entry.attempts += 1
        entry.attempts_that_count += counts(failure)
        if entry.first_failed_at_ms is None:
            entry.first_failed_at_ms = self._wall_ms()
        if (outcome := self._given_up(entry, turn, failure)) is not None:
            self._log_its_own(entry, failure.reason)
            self.answer(entry, outcome)
            return
        self._blame.doubt(now_s, entry, turn, failure)
        self._window.retry(entry, now_s, now_s + self._delay_s(entry, failure))
        if self._phase.draining:
            self.let_go()

    def _delay_s(self, entry: Entry, failure: CallFailure) -> float:
        delay_s = self._backoff.delay_s(entry.attempts, self._uniform, failure.retry_after_s)
        if self._phase.draining and failure.retry_after_s is None:
            return min(delay_s, DRAIN_DELAY_S)
        return delay_s

    def _log_its_own(self, entry: Entry, how: str) -> None:
        """Log one line for a message that kept failing while others were answered."""
        log.warning(
            "%s is given up after %d failed attempts (%s): others were answered meanwhile",
            entry.message.coordinates,
            entry.attempts,
            how,
        )

    def judged(self, entry: Entry, outcome: Extracted | Rejected) -> None:
        """The extractor has returned an outcome."""
        if isinstance(outcome, Extracted) and not from_the_cache(outcome):
            self._blame.recovered(entry)
        if (
            isinstance(outcome, Rejected)
            and outcome.reason is Reason.BAD_REQUEST
            and entry.attempts
        ):
            self._log_its_own(entry, "refused")
        self.answer(entry, outcome)

    def let_go(self) -> None:
        """Forget messages for which nothing has to be paid again; see `Window.let_go`."""
        self._window.let_go()
        self._publishing.end_traces()

    def _given_up(self, entry: Entry, turn: Turn, failure: CallFailure) -> Outcome | None:
        if self._blame.gives_up(entry, turn, failure):
            return self._postponed(entry) or given_up(entry, failure)
        return self._overstayed(entry) if self._asking.overstays(entry) else None

    def cut_off(self, entry: Entry) -> None:
        """`message_timeout_s` was over before the message had an answer."""
        self.answer(entry, self._overstayed(entry))

    def _overstayed(self, entry: Entry) -> Outcome:
        return self._postponed(entry) or overstayed(entry, self._bounds.message_timeout_s)

    def _postponed(self, entry: Entry) -> Postponed | None:
        """The outcome of an exhausted message that may still go to the retry topic; None where
        there is no such topic, or the message was there `attempts_max` times already."""
        later, now_ms = self._bounds.later, self._wall_ms()
        made = attempts(entry, entry.spent)
        history = lived_on(entry.message, made, entry.first_failed_at_ms or now_ms)
        if later is None or history.retries >= later.attempts_max:
            return None
        due_ms = now_ms + int(later.delay_s * 1000)
        return Postponed(replace(history, retries=history.retries + 1, due_ms=due_ms).headers)

    def answer(self, entry: Entry, outcome: Outcome) -> None:
        """The message has its outcome. A rejection also gets the message's failed attempts."""
        if entry.holding.lost:
            return
        if isinstance(outcome, Rejected):
            outcome = self._explained(entry, outcome)
        if isinstance(outcome, Extracted | Rejected) and outcome.provenance is not None:
            outcome = replace(outcome, provenance=with_calls_beside(entry, outcome.provenance))
        self._window.answered(entry, outcome, clock.now_s())

    def _explained(self, entry: Entry, rejected: Rejected) -> Rejected:
        """The rejection with attempts, first failure and records that are out. It has to come
        before `with_calls_beside`, whose calls `attempts` counts by itself."""
        first_ms = entry.first_failed_at_ms
        return replace(
            rejected,
            attempts=attempts(entry, rejected.provenance),
            first_failed_at_ms=self._wall_ms() if first_ms is None else first_ms,
            records_out=entry.records_out,
        )

    def _wall_ms(self) -> int:
        return int(self._wall_clock() * 1000)

"""What a run came to, for its last log line and its exit code."""

from __future__ import annotations

from collections import Counter

from service.core.events import Called, Event, Finished, Streamed
from service.core.words import how_many


class Summary:
    """Counts a run's messages, records, calls and money."""

    def __init__(self) -> None:
        self._outcomes: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._records = self._calls = self._tokens_input = self._tokens_output = 0
        self._cost_usd, self._unpriced = 0.0, 0

    @property
    def finished(self) -> int:
        """All messages that have an outcome."""
        return self._outcomes.total()

    @property
    def rejected(self) -> int:
        """Messages in the dead letter topic."""
        return self._outcomes["rejected"]

    @property
    def asked(self) -> int:
        """Messages that something was expected of: all but those that were skipped on purpose."""
        return self.finished - self._outcomes["skipped"]

    @property
    def all_rejected(self) -> bool:
        """Whether there were messages and not one of them came to anything."""
        return 0 < self.asked == self.rejected

    def observe(self, event: Event) -> None:
        if isinstance(event, Finished):
            self._outcomes[event.outcome] += 1
            self._records += event.records
            if event.reason is not None:
                self._reasons[event.reason.value] += 1
        elif isinstance(event, Streamed):
            self._records += event.records
        elif isinstance(event, Called):
            self._calls += 1
            self._tokens_input += event.tokens_input
            self._tokens_output += event.tokens_output
            self._cost_usd += event.cost_usd or 0.0
            self._unpriced += event.cost_usd is None

    def __str__(self) -> str:
        outcomes = ", ".join(f"{count} {word}" for word, count in self._outcomes.items())
        return (
            f"{how_many(self.finished, 'message')} finished ({outcomes or 'none'}), "
            f"{how_many(self._records, 'record')}, {how_many(self._calls, 'call')}, "
            f"{how_many(self._tokens_input, 'token')} in, {self._tokens_output} out, "
            f"{self._money()}{self._why()}"
        )

    def _money(self) -> str:
        spent = f"{self._cost_usd:.4f} USD"
        if not self._unpriced:
            return spent
        return (
            f"{spent} and {how_many(self._unpriced, 'call')} whose price is not known (set prices)"
        )

    def _why(self) -> str:
        if not self.rejected:
            return ""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self._reasons.most_common())
        return f"; rejected: {reasons} (`sluice dead-letters list` shows them)"

"""Each change of the process's state as one log line: what is going on now, in a sentence.

Metrics and probes answer whoever asks; a person who watches a terminal or reads a log did not ask.
"""

from __future__ import annotations

import re

from service.core.status import State, Status
from service.core.words import how_many

LOOK_S = 1.0
"""Between two looks at the status."""

STEADY_S = 5.0
"""A state that lasts is told. Shorter ones come and go with each message of a slow topic, with each
refilled budget and with each rebalance, and the metrics show those."""

TROUBLED = frozenset(
    {
        State.WAITING_FOR_PROVIDER,
        State.WAITING_FOR_KAFKA,
        State.GUARDED,
        State.STALLED,
    }
)
"""States in which a person may have to do something: their lines are warnings."""

_SENTENCES = {
    State.STARTING: "starting: no partitions are assigned yet",
    State.IDLE: "idle: all messages that are there are finished",
    State.RUNNING: "running: messages are being processed",
    State.WAITING_FOR_BUDGET: "waiting for a limit of requests, tokens or money",
    State.WAITING_FOR_PROVIDER: "waiting for the model's endpoint: calls fail and are tried again",
    State.WAITING_FOR_KAFKA: "waiting for Kafka: brokers do not answer, or do not acknowledge",
    State.REBALANCING: "rebalancing: the group is sharing its partitions out anew",
    State.GUARDED: "guarded: too many messages in a row were rejected",
    State.DRAINING: "draining: finishing what is in flight",
    State.STALLED: "stalled: there is work, and nothing has moved for a minute",
}


def sentence(status: Status) -> str:
    """The state in words, what is known of its causes, and how much is waiting."""
    causes = [*status.not_ready]
    if status.state is State.WAITING_FOR_BUDGET:
        causes += [
            f"the next call may start in {seconds:.0f} s ({cause.value})"
            for cause, seconds in status.admission_waits.items()
        ]
    under_way = f"{how_many(status.window_messages, 'message')} taken and not finished"
    said = _SENTENCES[status.state]
    if status.state in (State.IDLE, State.STARTING, State.RUNNING) and not causes:
        return said
    return f"{said} ({'; '.join([*causes, under_way])})"


def word(status: Status) -> str:
    """What a progress bar calls what it counts, or why it does not move."""
    if status.state in (State.RUNNING, State.IDLE):
        return "messages"
    return status.state.value.replace("_", " ")


class Changes:
    """Notices when something else is going on than was told last."""

    def __init__(self) -> None:
        self._told: object = (State.RUNNING, ())
        self._seen: object = None
        self._since_s = 0.0

    def look(self, status: Status, now_s: float) -> str | None:
        """The sentence for a state that lasts and was not told yet."""
        seen = status.state, tuple(map(_without_figures, status.not_ready))
        if seen != self._seen:
            self._seen, self._since_s = seen, now_s
        if seen == self._told or now_s - self._since_s < STEADY_S:
            return None
        self._told = seen
        return sentence(status)


def _without_figures(cause: str) -> str:
    """Seconds that count down are no change."""
    return re.sub(r"\d+", "#", cause)

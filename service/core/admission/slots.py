"""Slots: how many calls may be in flight, found from what the provider accepts and refuses.

Rules of this file: pure; time comes in as seconds of a monotonic clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

DECREASE = 0.7
"""The factor for the number of slots after overload. With a smaller one, more capacity stays unused
until the slots have grown back; with a larger one, more calls are refused before it fits."""

DECREASE_ANYWAY = 0.95
"""The factor after overload that the number of calls did not cause: as many were accepted
lately."""

BORNE_S = 60.0
"""For how many seconds an accepted number of calls counts as accepted lately."""

PROBE_EVERY_S = 30.0
"""Seconds after a refusal before as many slots as were refused are tried again. The number then
stays just below the limit instead of swinging around it, at the price of one refused call in half a
minute."""

BORNE_SHARE = 0.95
"""A refusal at or below 95 % of the in-flight level that was recently accepted, less one, is not
blamed on concurrency: our count includes answers still in transit."""

SEARCH = 0.1
"""How many slots each answer adds while it is not known how many are too many: a tenth more for a
round of answers."""

IN_USE = 0.8
"""The number of slots grows only while at least this share of them is in use: else more slots would
be of no use."""


@dataclass(slots=True)
class Slots:
    """How many calls may be in flight, between 1 and `most`.

    Additive increase, multiplicative decrease (Chiu and Jain, 1989), with a memory. For each
    refused call it is known how many calls were in flight with it, and so how many were too many.
    The number of slots falls to one below that, but not below `DECREASE` of itself for all calls
    that were in flight together. Then it rises by one for a round of answers until it reaches the
    refused number again; it rises faster where no number is known to be too many.
    """

    most: int
    limit: float = 0.0
    refused_at: float = float("inf")  # this many calls in flight were too many
    refused_at_s: float = float("-inf")
    decreased_at_s: float = float("-inf")
    lowest: float = 1.0  # the present decrease goes no lower
    borne: int = 0  # with this many calls in flight, one was answered
    borne_at_s: float = float("-inf")
    fitted: float = 0.0  # the limit at the last answer
    _refused: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=128))
    """When calls that were refused were in flight (begin, end): the provider did not work on them,
    so they are not counted as accepted."""

    def __post_init__(self) -> None:
        self.limit = self.fitted = float(self.most)

    def succeeded(self, now_s: float, started_s: float, in_flight: int) -> None:
        """A call was answered; `in_flight` calls ran when it began, itself included."""
        in_flight -= sum(began_s <= started_s < ended_s for began_s, ended_s in self._refused)
        if in_flight >= self.borne or now_s - self.borne_at_s > BORNE_S:
            self.borne, self.borne_at_s = in_flight, now_s
        self.fitted = self.limit
        if in_flight < IN_USE * int(self.limit):
            return
        if in_flight >= self.refused_at:
            self.refused_at = float("inf")  # the provider accepts more now
        known = self.refused_at < float("inf")
        more = self.limit + (1.0 / self.limit if known else max(1.0 / self.limit, SEARCH))
        if more >= self.refused_at and now_s - self.refused_at_s < PROBE_EVERY_S:
            return
        self.limit = min(float(self.most), more)

    def overloaded(self, now_s: float, started_s: float, in_flight: int, *, limited: bool) -> bool:
        """A call was refused (`limited`: with a 429), or not answered in time.

        False: the provider limits the rate and not the number of calls in flight, since more of
        them were accepted lately.
        """
        enough = in_flight <= BORNE_SHARE * self.borne - 1
        borne = enough and now_s - self.borne_at_s <= BORNE_S
        self._refused.append((started_s, now_s))
        if limited and borne:
            return False
        if started_s >= self.decreased_at_s:
            self.decreased_at_s = now_s
            self.lowest = max(1.0, self.limit * (DECREASE_ANYWAY if borne else DECREASE))
            self.refused_at = float("inf")
            if in_flight == 1:
                self.limit = self.lowest  # it was the only call: no number of calls was too many
        self.refused_at_s = now_s
        if not borne:
            self.refused_at = min(self.refused_at, float(max(2, in_flight)))
        self.limit = max(self.lowest, min(self.limit, in_flight - 1.0))
        return True

    def outage(self) -> None:
        """The circuit has opened: decreases since the last answer came from the outage, not from
        too many calls, and are taken back."""
        self.limit = max(self.limit, self.fitted)
        self.refused_at = float("inf")

    def take_back(self, limit: float) -> None:
        """The refusals turned out to concern one message alone: the number of slots is again at
        least `limit`, and none is known to be too many."""
        self.limit = max(self.limit, limit)
        self.refused_at = float("inf")

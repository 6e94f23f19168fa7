"""Slots that follow what the provider bears at once.

Rules of this file: pure; time comes in as seconds of a monotonic clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

DECREASE = 0.7
"""A smaller factor gives more of the provider away than it takes back; a larger one asks more
often in vain before it fits."""

DECREASE_ANYWAY = 0.95
"""For overload that so many calls at once have not brought about: as many were borne lately."""

BORNE_S = 60.0
"""How long it counts that so many calls were borne."""

PROBE_EVERY_S = 30.0
"""After a refusal, one slot more than was refused is asked for again only after this: it stays
where it fits instead of swinging around it, for one refused call in half a minute."""

BORNE_SHARE = 0.95
"""Of what was borne, and one less: our count runs ahead of the provider's by the answers that are
on their way."""

SEARCH = 0.1
"""Slots more for each answer while it is not known how many are too many: a tenth in a round."""

IN_USE = 0.8
"""More slots are of use only where these are: a share of them must be taken."""


@dataclass(slots=True)
class Slots:
    """How many calls may be in flight, between 1 and `most`.

    Additive increase, multiplicative decrease (Chiu and Jain, 1989), with a memory. A refused
    call says with how many others it was in flight, and so how many were too many: the number
    falls to just below, at most to `DECREASE` of itself for all calls that were under way
    together, and then rises by one for a round of answers until it stands there again, or faster
    where nobody knows how many are too many.
    """

    most: int
    limit: float = 0.0
    refused_at: float = float("inf")  # so many in flight were too many
    refused_at_s: float = float("-inf")
    decreased_at_s: float = float("-inf")
    lowest: float = 1.0  # the present decrease ends there
    borne: int = 0  # so many in flight were answered
    borne_at_s: float = float("-inf")
    fitted: float = 0.0  # the limit at the last answer
    _refused: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=128))
    """From when to when calls were in flight that were turned away: the provider had not them."""

    def __post_init__(self) -> None:
        self.limit = self.fitted = float(self.most)

    def succeeded(self, now_s: float, started_s: float, in_flight: int) -> None:
        """A call was answered that had so many in flight when it began, itself included."""
        in_flight -= sum(began_s <= started_s < ended_s for began_s, ended_s in self._refused)
        if in_flight >= self.borne or now_s - self.borne_at_s > BORNE_S:
            self.borne, self.borne_at_s = in_flight, now_s
        self.fitted = self.limit
        if in_flight < IN_USE * int(self.limit):
            return
        if in_flight >= self.refused_at:
            self.refused_at = float("inf")  # it bears more now
        known = self.refused_at < float("inf")
        more = self.limit + (1.0 / self.limit if known else max(1.0 / self.limit, SEARCH))
        if more >= self.refused_at and now_s - self.refused_at_s < PROBE_EVERY_S:
            return
        self.limit = min(float(self.most), more)

    def overloaded(self, now_s: float, started_s: float, in_flight: int, *, limited: bool) -> bool:
        """A call was turned away, or not answered in time; `limited`: with a 429.

        False: it is a limit of the rate, not of the calls at once, of which more were borne.
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
                self.limit = self.lowest  # it was alone: nothing can be read from that
        self.refused_at_s = now_s
        if not borne:
            self.refused_at = min(self.refused_at, float(max(2, in_flight)))
        self.limit = max(self.lowest, min(self.limit, in_flight - 1.0))
        return True

    def outage(self) -> None:
        """Nothing was answered at all: what that seemed to say of the number is taken back."""
        self.limit = max(self.limit, self.fitted)
        self.refused_at = float("inf")

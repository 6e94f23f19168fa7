"""Whether a message fails for its own sake, or by the same chance as everybody.

A provider that turns away nine calls of ten turns an innocent message away eight times in a row
with a chance of 43 %; one that answers everybody else does so never. What others were told between
two failures of the message says which of the two it is.

Rules of this file: pure.
"""

from __future__ import annotations

from dataclasses import dataclass

CHANCE_MAX = 1e-6
"""A message is rejected for failures that are never a message's fault by their kind (429, 503) once
an innocent one would have been turned away so often with at most this probability."""

DOUBTFUL = 0.05
"""From this probability on its failures count as its own: they slow nobody else down."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Calls of a route so far: how many were answered, and how many failed."""

    answered: int
    failed: int


@dataclass(frozen=True, slots=True)
class Suspicion:
    """What speaks against a message after its latest failure.

    `chance` bounds the probability that a message which fails no more often than others has come
    so far. Each failure after the first multiplies it by (r + 1) / (s + r + 1), where s calls of
    others were answered and r failed since the failure before. Where each call fails with
    probability q, the mean of the inverse of that factor, over failures, is
    1 - (1 - q) ** (s + r + 1), at most 1: the inverse of `chance` is a supermartingale, and by
    Ville's inequality reaches 1 / c with a probability of at most c.
    """

    route: str
    since: Tally
    """The route's calls then; those that were in flight count as answered, so that only calls that
    began later speak against the message."""
    chance: float = 1.0
    failures: int = 1
    others_failed: int = 0

    def again(self, now: Tally, since: Tally) -> Suspicion:
        """It has failed once more. `now` are the route's calls but for this one; from `since` on
        is counted next."""
        answered = max(0, now.answered - self.since.answered)
        failed = max(0, now.failed - self.since.failed)
        chance = self.chance * (failed + 1) / (answered + failed + 1)
        return Suspicion(self.route, since, chance, self.failures + 1, self.others_failed + failed)

    @property
    def its_own(self) -> bool:
        """It fails for its own sake, as far as anybody can tell."""
        return self.chance <= DOUBTFUL

    @property
    def certain(self) -> bool:
        """So often by chance alone, nobody fails."""
        return self.chance <= CHANCE_MAX

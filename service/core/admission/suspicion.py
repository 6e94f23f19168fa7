"""Whether a message itself causes its failures, or only fails as often as all messages do.

A provider that refuses nine calls of ten refuses a harmless message eight times in a row with a
probability of 43 %. A provider that answers all other messages practically never does. The calls of
others between two failures of the message show which of the two cases it is.

Rules of this file: pure.
"""

from __future__ import annotations

from dataclasses import dataclass

CHANCE_MAX = 1e-6
"""Failures whose kind is hardly ever a message's fault (429, 503) reject a message only where a
harmless one would have failed this often with at most this probability."""

DOUBTFUL = 0.05
"""At or below this probability a message's failures count as caused by itself, so they do not slow
down the calls of others."""


@dataclass(frozen=True, slots=True)
class Tally:
    """How many calls of a route were answered and how many failed so far; `recovered` counts the
    messages that were answered after failures."""

    answered: int
    failed: int
    recovered: int = 0


@dataclass(frozen=True, slots=True)
class Suspicion:
    """How much speaks against a message after its last failure.

    `chance` bounds the probability that a message that fails no more often than others fails this
    often. Each failure after the first multiplies it by (r + 1) / (s + r + 1), where s calls of
    others were answered and r failed since the failure before. Where each call fails with
    probability q, the mean of the inverse of that factor, over failures, is
    1 - (1 - q) ** (s + r + 1), at most 1: the inverse of `chance` is a supermartingale, and by
    Ville's inequality reaches 1 / c with a probability of at most c.
    """

    route: str
    since: Tally
    """The route's calls at the last failure. Those in flight then count as answered already, so
    that only calls that began later speak against the message."""
    first: Tally
    """The route's calls at the first failure, counted in the same way."""
    chance: float = 1.0
    failures: int = 1
    others_answered: int = 0
    others_failed: int = 0
    others_recovered: int = 0

    def again(self, now: Tally, since: Tally) -> Suspicion:
        """The suspicion after one more failure. `now` counts the route's calls without this one;
        the next failure is counted from `since` on."""
        answered = max(0, now.answered - self.since.answered)
        failed = max(0, now.failed - self.since.failed)
        chance = self.chance * (failed + 1) / (answered + failed + 1)
        return Suspicion(
            self.route,
            since,
            self.first,
            chance,
            self.failures + 1,
            max(0, now.answered - self.first.answered),
            self.others_failed + failed,
            now.recovered - self.first.recovered,
        )

    @property
    def others_go_through(self) -> bool:
        """Whether calls of others that began after the message's first failure were answered, and
        none failed: a provider that asks everybody to wait would have refused them too."""
        return self.others_answered > 0 and self.others_failed == 0

    @property
    def may_be_chance(self) -> bool:
        """Whether others failed like it and were answered at a later attempt, so that the number
        of its failures says little: with 60 % of all calls failing at random, 17 in 1,000 messages
        fail eight times in a row."""
        return self.others_recovered > 0 and not self.certain

    @property
    def its_own(self) -> bool:
        """Whether the message probably causes its failures itself."""
        return self.chance <= DOUBTFUL

    @property
    def certain(self) -> bool:
        """Whether chance alone cannot explain so many failures."""
        return self.chance <= CHANCE_MAX

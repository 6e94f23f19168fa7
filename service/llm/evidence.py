"""Whose fault a refusal is that says nothing: a route's, or the one message's.

A firewall that does not like one text answers as one that does not like the key: with a 403. What
tells them apart is what becomes of others. A message was refused; a call of the same route that
began later was answered; then the message was refused again: it is the message's own.

Rules of this file: no I/O; a route is a model's name.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Evidence:
    """When the latest call of each route began that was answered (monotonic seconds)."""

    _answered: dict[str, float] = field(default_factory=dict)

    def answered(self, route: str, began_s: float) -> None:
        """A call that began then was answered, whatever its answer was worth."""
        self._answered[route] = max(began_s, self._answered.get(route, began_s))

    def is_its_own(self, route: str, refused_s: float | None) -> bool:
        """Whether a message that was refused then, and now again, is refused for its own sake."""
        if refused_s is None:
            return False
        return self._answered.get(route, refused_s) > refused_s

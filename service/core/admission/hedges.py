"""When a second call for the same message may be made, because the first one takes so long.

Rules of this file: pure; time comes in as seconds of a monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass

HEDGED_SHARE = 0.05
"""Of all calls at most: where more of them are slow, the provider is, and a second call for each
would make it slower (J. Dean and L. Barroso, "The Tail at Scale", 2013)."""

HEDGES_SAVED = 5.0
"""That many may come together: slow calls do."""


@dataclass(slots=True)
class Hedges:
    """At most one for a message, and in the long run one for each twenty calls."""

    after_s: float | None
    saved: float = 1.0

    def called(self) -> None:
        """A first call was made."""
        self.saved = min(HEDGES_SAVED, self.saved + HEDGED_SHARE)

    def due_s(self, began_s: float) -> float | None:
        """When a call that began then is slow; None: never."""
        return None if self.after_s is None else began_s + self.after_s

    def may(self) -> bool:
        return self.saved >= 1.0

    def hedged(self) -> None:
        assert self.may(), "more second calls than there may be"
        self.saved -= 1.0

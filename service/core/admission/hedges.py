"""When a second call for the same message may be made because the first one is slow.

Rules of this file: pure; time comes in as seconds of a monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass

HEDGED_SHARE = 0.05
"""The largest share of all calls that may be hedges. Where more calls than this are slow, the whole
provider is slow, and a second call for each would make it slower still (J. Dean and L. Barroso,
"The Tail at Scale", 2013)."""

HEDGES_SAVED = 5.0
"""How many hedges may be saved up and then made at once: slow calls come in groups."""


@dataclass(slots=True)
class Hedges:
    """The budget of hedges: in the long run one for each twenty calls."""

    after_s: float | None
    saved: float = 1.0

    def called(self) -> None:
        """A first call was made."""
        self.saved = min(HEDGES_SAVED, self.saved + HEDGED_SHARE)

    def due_s(self, began_s: float) -> float | None:
        """The moment from which a call that began at `began_s` counts as slow; None: never."""
        return None if self.after_s is None else began_s + self.after_s

    def may(self) -> bool:
        return self.saved >= 1.0

    def hedged(self) -> None:
        assert self.may(), "more second calls than there may be"
        self.saved -= 1.0

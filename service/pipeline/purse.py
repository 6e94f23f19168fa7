"""What calls cost, counted against the limit and on the account of the partitions that are held.

A partition takes its account along to whoever holds it next. All of them get equal parts of the
limit, and each cost goes onto the account with the least on it: so no account exceeds its part for
as long as all that one worker holds together do not, however they are divided afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from service import clock
from service.core.admission.admission import Admission
from service.core.admission.ledger import SLOT_S, Ledger, added, total_usd
from service.core.messages import Partition
from service.core.window import Holding, Window


class Purse:
    """Knows the wall clock, which is what another process can read."""

    def __init__(
        self, window: Window, admission: Admission, wall_clock: Callable[[], float]
    ) -> None:
        self._window, self._admission, self._wall_clock = window, admission, wall_clock

    def spent(self, usd: float) -> None:
        """An answer has cost so much, which may be nothing."""
        self._admission.spent(clock.now_s(), usd)
        if usd > 0 and self._window.held:
            least = min(self._window.held.values(), key=lambda each: total_usd(each.spent))
            least.spent = added(least.spent, self._wall_clock(), usd)

    def reassigned(self, before: Mapping[Partition, Holding]) -> None:
        """What was spent on the account of partitions that have come counts from now on, and no
        more what Kafka holds of those that have gone. A slot of a ledger counts until its end has
        left the hour, and is taken off for as long as its begin is in it."""
        held = self._window.held
        for partition, holding in held.items():
            if before.get(partition) is not holding:
                self._carry(holding.given.spent, at=1, sign=1)
        for partition, holding in before.items():
            if held.get(partition) is not holding:
                self._carry(holding.committed.spent, at=0, sign=-1)

    def _carry(self, ledger: Ledger, *, at: int, sign: int) -> None:
        wall_s = self._wall_clock()
        for slot, micro in ledger:
            age_s = max(0.0, wall_s - (slot + at) * SLOT_S)
            self._admission.carry(clock.now_s(), age_s, sign * micro / 1e6)

"""What calls cost: it counts against the spend limit, and is put on the held partitions' accounts.

A partition takes its account along to its next holder. All partitions have equal parts of the
limit, and each cost goes onto the account with the least on it. So no account exceeds its part
unless all accounts of one worker together exceed theirs, however they are divided afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from service import clock
from service.core.admission.accounts import PERIOD_S, Account, added, total_usd
from service.core.admission.admission import Admission, Turn
from service.core.errors import ServiceFailure, TransientFailure
from service.core.messages import Partition
from service.core.window import Entry, Holding, Window
from service.pipeline.outcomes import CutOff, Result


class Purse:
    """Puts costs on accounts. It uses the wall clock, the only one that other processes share."""

    def __init__(
        self, window: Window, admission: Admission, wall_clock: Callable[[], float]
    ) -> None:
        self._window, self._admission, self._wall_clock = window, admission, wall_clock

    def spent(self, usd: float) -> None:
        """An answer has cost this much, which may be 0."""
        self._admission.spent(clock.now_s(), usd)
        if usd > 0 and self._window.held:
            least = min(self._window.held.values(), key=lambda each: total_usd(each.spent))
            least.spent = added(least.spent, self._wall_clock(), usd)

    def account(self, entry: Entry, turn: Turn, result: Result | CutOff) -> None:
        """Report the attempt's cost to admission. An answer from the cache has cost nothing, so its
        charge is given back."""
        if isinstance(result, CutOff) or result.provenance is None:
            return
        spent = result.provenance
        before, entry.spent = entry.spent, spent
        usd = spent.cost_usd - (0.0 if before is None else before.cost_usd)
        answered = not (spent.cached or isinstance(result, TransientFailure | ServiceFailure))
        if usd > 0 or answered:  # a call without an answer does not show what a call costs
            self.spent(usd)
        if spent.cached:
            self._admission.unused(clock.now_s(), turn.estimate)

    def reassigned(self, before: Mapping[Partition, Holding]) -> None:
        """Partitions have come and gone. The accounts of those that have come count from now on;
        what Kafka holds of those that have gone no longer does.

        To err on the safe side, a period counts until its end has left the hour, and is subtracted
        only while its beginning is in the hour.
        """
        held = self._window.held
        for partition, holding in held.items():
            if before.get(partition) is not holding:
                self._carry(holding.given.spent, at=1, sign=1)
        for partition, holding in before.items():
            if held.get(partition) is not holding:
                self._carry(holding.committed.spent, at=0, sign=-1)

    def _carry(self, account: Account, *, at: int, sign: int) -> None:
        wall_s = self._wall_clock()
        for period, micro in account:
            age_s = max(0.0, wall_s - (period + at) * PERIOD_S)
            self._admission.carry(clock.now_s(), age_s, sign * micro / 1e6)

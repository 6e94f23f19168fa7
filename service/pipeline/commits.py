"""Commits: progress is stored in Kafka regularly, at the end, and when another part waits for
it."""

from __future__ import annotations

import asyncio
import logging

from service import clock
from service.core.errors import CommitFailed
from service.core.messages import Partition
from service.core.phase import Phase
from service.core.tracker import Progress
from service.core.window import Window
from service.pipeline.tasks import Conditions
from service.ports import Source

log = logging.getLogger(__name__)

FINAL_COMMITS_S = 5.0
"""For how many seconds a run's refused last commit is tried again. A rebalance refuses commits only
for a moment, and what is not committed is paid for again."""

COMMIT_AGAIN_S = 1.0
"""Seconds until a refused commit is tried again where a stop or a suspect waits for it. They can't
wait for `delivery.commit_interval_s`, which may be minutes."""


class Commits:
    """One commit at a time, of the partitions whose progress has changed."""

    def __init__(
        self,
        source: Source,
        window: Window,
        phase: Phase,
        conditions: Conditions,
        commit_interval_s: float,
    ) -> None:
        self._source, self._window = source, window
        self._phase, self._conditions = phase, conditions
        self._interval_s = commit_interval_s
        self._committing = asyncio.Lock()

    async def regularly(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            await self.commit()
            self._window.measure()

    async def finally_(self) -> bool:
        """The last commit of a run, tried again until it is stored; False where the source refused
        every try.

        Where the stop is forced, before or meanwhile, there is no further try and no wait.
        """
        until_s = clock.now_s() + FINAL_COMMITS_S - COMMIT_AGAIN_S
        while not await self.commit():
            forced = await self._conditions.until(lambda: self._phase.forced, COMMIT_AGAIN_S)
            if forced or clock.now_s() > until_s:
                break
        else:
            return True
        log.error("the last commit failed; what finished after the one before it may be repeated")
        return False

    async def commit(self) -> bool:
        """Store the progress that has changed; False where the source refused."""
        async with self._committing:
            changed = {each for each in self._window.held if self._has_changed(each)}
            if not changed:
                return True
            try:
                await self._source.commit(changed)
            except CommitFailed:
                return False
            return True

    def _has_changed(self, partition: Partition) -> bool:
        return self.progress(partition) != self._window.held[partition].committed

    def progress(
        self, partition: Partition, finishing: frozenset[int] = frozenset()
    ) -> Progress | None:
        """The progress to store for a partition, as it is once `finishing` has finished too; None:
        the partition is not held."""
        holding = self._window.held.get(partition)
        if holding is None:
            return None
        return holding.progress(clean=self._phase.clean, finishing=finishing)

    def has_room(self, partition: Partition) -> bool:
        """Whether the completed map surely has room, whichever of the messages taken finish."""
        holding = self._window.held.get(partition)
        return holding is None or holding.has_room()

    def stored(self, partition: Partition, progress: Progress) -> None:
        """Kafka holds this progress now."""
        if (holding := self._window.held.get(partition)) is not None:
            holding.committed = progress

"""The pipeline between a source and a sink: the life of a run, and its partitions.

Everything here runs on one event loop. No await stands between a check ("is the partition still
ours?") and the act that depends on it. All tasks start in one `TaskGroup`: one for the intake, one
for the commits, and one for each call, which afterwards hands over what its lane has ready. An
unexpected exception in any of them ends the run, and what is not committed is delivered again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from service import clock
from service.core.admission.admission import Admission, Limits
from service.core.admission.guard import Guard
from service.core.admission.retry import Uniform
from service.core.events import Abandoned, Observe
from service.core.messages import Message, Outcome, Partition
from service.core.phase import Phase
from service.core.status import GroupStatus, Status
from service.core.tracker import Given, Progress
from service.core.window import Holding, Window
from service.core.words import how_many
from service.pipeline.answering import Answering
from service.pipeline.asking import Asking
from service.pipeline.blame import Blame
from service.pipeline.bounds import Bounds
from service.pipeline.calls import Calls
from service.pipeline.commits import Commits
from service.pipeline.intake import Intake
from service.pipeline.probing import Probing
from service.pipeline.publishing import Publishing
from service.pipeline.purse import Purse
from service.pipeline.reporting import Reporting
from service.pipeline.streaming import Streaming
from service.pipeline.tasks import Conditions, Tasks
from service.ports import Extractor, Sink, Source, Streams, Trace

log = logging.getLogger(__name__)


class Pipeline:
    """Builds the parts, runs them, and is the source's `Assignment`."""

    def __init__(
        self,
        source: Source,
        extractor: Extractor,
        sink: Sink,
        decode: Callable[[Message], str | Outcome],
        bounds: Bounds,
        *,
        observe: Observe,
        uniform: Uniform,
        wall_clock: Callable[[], float],
        streams: Streams | None = None,
        admission: Admission | None = None,
        follow: Callable[[Message], Trace] | None = None,
    ) -> None:
        """With `streams`, records are published while the model still writes. `admission` has to be
        the extractor's; without it, slots are the only limit."""
        self._bounds, self._observe = bounds, observe
        self._admission = admission or Admission(Limits(bounds.concurrency), uniform)
        self._guard = Guard(bounds.guard)
        self._window = Window(bounds.ordering, suspects=bounds.concurrency)
        self._phase, self._tasks = Phase(), Tasks()
        self._conditions = Conditions(self._tasks)
        shared = (self._window, self._admission, self._guard, self._phase)
        running = (self._tasks, self._conditions)
        self._commits = Commits(
            source, self._window, self._phase, self._conditions, bounds.commit_interval_s
        )
        self._publishing = Publishing(
            sink,
            self._window,
            self._guard,
            self._phase,
            *running,
            observe=observe,
            uniform=uniform,
            wall_clock=wall_clock,
            follow=follow,
        )
        streaming = Streaming(
            streams,
            self._publishing,
            self._phase,
            self._conditions,
            observe=observe,
            uniform=uniform,
        )
        self._purse = Purse(self._window, self._admission, wall_clock)
        asking = Asking(
            extractor, self._admission, streaming, self._commits, self._purse, bounds, observe
        )
        probing = Probing(extractor, self._window, self._admission, self._phase, *running)
        self._answering = Answering(
            extractor,
            self._window,
            self._admission,
            self._phase,
            asking,
            Blame(self._admission, probing, bounds),
            self._publishing,
            bounds,
            observe=observe,
            uniform=uniform,
            wall_clock=wall_clock,
        )
        self._calls = Calls(
            extractor,
            *shared,
            *running,
            probing,
            self._answering,
            asking,
            self._publishing,
            self._purse,
            observe,
        )
        self._reporting = Reporting(*shared, self._conditions, self._calls, streaming, bounds)
        self._intake = Intake(
            source,
            decode,
            self._window,
            self._guard,
            self._phase,
            self._conditions,
            self._calls,
            self._answering,
            self._publishing,
            bounds,
            observe,
        )

    # --- the life of a run ---------------------------------------------------------------------

    async def run(self, until: Mapping[Partition, int] | None = None) -> bool:
        """Work until `stop`, or until the partitions held have reached the offsets in `until`.

        Returns True where everything that finished is committed, False where the source refused
        every last commit. Where it is cancelled or raises, messages that are not committed will be
        delivered again.
        """
        self._intake.turned_at_s = self._conditions.moved_at_s = clock.now_s()
        async with asyncio.TaskGroup() as group:
            self._tasks.open(group)
            intake = self._tasks.start_for_run(self._intake.run, until, self.stop)
            commits = self._tasks.start_for_run(self._commits.regularly)
            assert intake is not None, "the group is open"
            assert commits is not None, "the group is open"
            try:
                await self._conditions.until(lambda: self._phase.stopping)
                await self._drain()
                commits.cancel()
                self._phase.end()
                committed = await self._commits.finally_()
                intake.cancel()
            finally:
                self._end()
        return committed

    @property
    def stopping(self) -> bool:
        return self._phase.stopping

    @property
    def problem(self) -> str | None:
        """A sentence for a person: why the reject guard stops intake. None: it does not."""
        return self._guard.problem

    def stop(self) -> None:
        """Take no more, finish what is in flight, commit, return from `run`."""
        self._phase.stop()
        self._conditions.look()

    def force(self) -> None:
        """Stop without waiting: what is in flight is abandoned, what is finished committed."""
        self._phase.force()
        self._conditions.look()

    async def _drain(self) -> None:
        self._phase.drain()
        self._admission.finish(finishing=self._phase.finishing)
        self._answering.let_go()
        self._window.wake_retries(clock.now_s())  # the drain waits only for what is left
        drained = await self._conditions.until(
            lambda: self._phase.forced or not self._window.messages, self._bounds.drain_timeout_s
        )
        if not drained or self._phase.forced:
            self._abandon(len(self._window.calling))

    def _end(self) -> None:
        """Cancel everything that still runs; nothing may start any more."""
        self._tasks.close()
        self._calls.close()
        self._call_off(self._window.assign({}))

    # --- assignment ------------------------------------------------------------------------------

    async def revoked(self) -> None:
        self._phase.revoke()
        self._admission.finish(finishing=self._phase.finishing)
        await self._conditions.until(
            lambda: self._phase.forced or not (self._window.calling or self._window.handed),
            self._bounds.rebalance_drain_s,
        )
        self._phase.let_go()
        await self._commits.commit()

    def assigned(self, given: Mapping[Partition, Given]) -> None:
        before = dict(self._window.held)
        self._call_off(self._window.assign(given))
        self._purse.reassigned(before)
        self._phase.hold()
        self._admission.finish(finishing=self._phase.finishing)
        self._calls.share_out()
        self._intake.turned_at_s = clock.now_s()
        self._publishing.start_all()
        self._calls.admit()
        self._conditions.look()

    def _call_off(self, lost: Sequence[Holding]) -> None:
        """Cancel the work for lost partitions, and withdraw outcomes that are not sent yet."""
        self._tasks.call_off(lost)
        self._publishing.withdraw(lost)
        self._publishing.end_traces()
        called_off = sum(1 for entry in self._window.calling if entry.holding in lost)
        if called_off and not self._phase.draining:
            self._abandon(called_off)

    def _abandon(self, calls: int) -> None:
        if calls:
            cut_off = how_many(calls, "call")
            log.warning("cut off: %s, whose messages may be paid for again", cut_off)
            self._observe(Abandoned(calls))

    # --- what others ask -------------------------------------------------------------------------

    def progress(
        self, partition: Partition, finishing: frozenset[int] = frozenset()
    ) -> Progress | None:
        return self._commits.progress(partition, finishing)

    def has_room(self, partition: Partition) -> bool:
        return self._commits.has_room(partition)

    def stored(self, partition: Partition, progress: Progress) -> None:
        self._commits.stored(partition, progress)

    def seen(self, lags: Mapping[Partition, int | None]) -> None:
        self._calls.seen(lags)

    def status(self, group: GroupStatus) -> Status:
        """A snapshot; walks the window, so it is for scrapes and probes, not for the hot path."""
        return self._reporting.status(group, self._intake.turned_at_s)

"""The tasks of a run, and the conditions that some of them wait for.

Rules of this file: every task starts in the run's own group. An unexpected exception in a task, or
in a callback of the event loop, ends the run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import TypeAlias

from service import clock
from service.core.window import Holding

Work: TypeAlias = Callable[..., Coroutine[None, None, None]]


class Tasks:
    """The run's task group, and which holding each of its tasks works for."""

    def __init__(self) -> None:
        self._group: asyncio.TaskGroup | None = None  # only while work may be started
        self._working: dict[asyncio.Task[None], Holding] = {}

    def open(self, group: asyncio.TaskGroup) -> None:
        self._group = group

    def close(self) -> None:
        """No task may start any more."""
        self._group = None

    @property
    def is_open(self) -> bool:
        return self._group is not None

    def start(
        self,
        holding: Holding,
        work: Work,
        *arguments: object,
        ended: Callable[[asyncio.Task[None] | None], None] | None = None,
    ) -> None:
        """Start a task that is cancelled when the holding is lost.

        `ended` is called when the task is over, even where it was cancelled before its first step
        or could not start (None). It has to call `over` for a task: one callback is cheaper than
        two.
        """
        task = self.start_for_run(work, *arguments)
        if task is None:
            if ended is not None:
                ended(None)
            return
        self._working[task] = holding
        task.add_done_callback(self.over if ended is None else ended)

    def over(self, task: asyncio.Task[None]) -> None:
        """A task that was started for a holding has ended."""
        del self._working[task]

    def start_for_run(self, work: Work, *arguments: object) -> asyncio.Task[None] | None:
        """Start a task that belongs to no holding. Returns None where the run is over, or is ending
        because another task has failed: the group then takes no more tasks, while timers and
        answers still arrive."""
        if self._group is None:
            return None
        coroutine = _to_its_end(work, *arguments)
        try:
            return self._group.create_task(coroutine)
        except RuntimeError:
            coroutine.close()
            return None

    def call_off(self, lost: Sequence[Holding]) -> None:
        for task, holding in self._working.items():
            if holding in lost:
                task.cancel()

    def called_back(self, act: Callable[..., None], *arguments: object) -> None:
        """Run a callback of the event loop: an unexpected exception in it ends the run too."""
        try:
            act(*arguments)
        except Exception as error:  # the loop would only log it, and the message would hang
            self.start_for_run(_raise, error)


class Conditions:
    """Lets tasks wait until a condition is true; knows when a call or publish last ended."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self._waiting: dict[asyncio.Future[None], Callable[[], bool]] = {}
        self._looks = False  # a look at the conditions is scheduled
        self.moved_at_s = 0.0

    def moved_on(self) -> None:
        """A call or a publish has ended, so a condition may have become true."""
        self.moved_at_s = clock.now_s()
        self.look()

    def look(self) -> None:
        """A condition may have become true: look at all of them once this step of the loop is
        over."""
        if self._waiting and not self._looks:
            self._looks = True
            asyncio.get_running_loop().call_soon(self._tasks.called_back, self._wake)

    async def until(self, possible: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait until `possible()` is true, at most `timeout_s` seconds; returns whether it is.

        It is evaluated after each `look`, and the waiting task is woken only when it is true.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not possible():
                    await self._woken(possible)
        except TimeoutError:
            return possible()
        return True

    async def _woken(self, possible: Callable[[], bool]) -> None:
        woken = asyncio.get_running_loop().create_future()
        self._waiting[woken] = possible
        try:
            await woken
        finally:
            del self._waiting[woken]

    def _wake(self) -> None:
        self._looks = False
        for woken, possible in self._waiting.items():
            if not woken.done() and possible():
                woken.set_result(None)


async def _raise(failure: BaseException) -> None:
    raise failure


async def _to_its_end(work: Work, *arguments: object) -> None:
    """Turn a `CancelledError` that nobody asked for into a failure: a task group would take the
    task for one that was cancelled, and go on."""
    try:
        await work(*arguments)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise RuntimeError("cancelled, and not by us") from None

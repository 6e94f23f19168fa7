"""The tasks of a run, and who waits for what to become possible.

Rules of this file: tasks are born in the run's own group; an unexpected exception in one of them,
or in what the loop calls back, ends the run.
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
        """Nothing may start any more."""
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
        """A task that is called off when the holding is lost.

        `ended` is called when it is over, even if it was called off before its first step or was
        never born, and has to call `over`: one callback for each call is cheaper than two.
        """
        task = self.start_alone(work, *arguments)
        if task is None:
            if ended is not None:
                ended(None)
            return
        self._working[task] = holding
        task.add_done_callback(self.over if ended is None else ended)

    def over(self, task: asyncio.Task[None]) -> None:
        """A task that was started for a holding has ended."""
        del self._working[task]

    def start_alone(self, work: Work, *arguments: object) -> asyncio.Task[None] | None:
        """A task that belongs to no holding. None where the run is over, or ends because another
        task has failed: in that moment the group takes none any more, while timers and answers
        still come."""
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
        """What the loop calls outside of a task: an unexpected exception ends the run as well."""
        try:
            act(*arguments)
        except Exception as error:  # the loop would only log it, and the message would hang
            self.start_alone(_raise, error)


class Conditions:
    """Who waits for what, and when something last moved."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self._waiting: dict[asyncio.Future[None], Callable[[], bool]] = {}
        self._looks = False  # what waits is looked at after this step of a task
        self.moved_at_s = 0.0

    def moved_on(self) -> None:
        """A call or a publish has ended: something may have become possible by it."""
        self.moved_at_s = clock.now_s()
        self.look()

    def look(self) -> None:
        """Something may have become possible: once this step is done, see who waits for it."""
        if self._waiting and not self._looks:
            self._looks = True
            asyncio.get_running_loop().call_soon(self._tasks.called_back, self._wake)

    async def until(self, possible: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait until `possible`, at most `timeout_s`; says whether it is.

        It is asked when something has moved; who waits is woken only when it has become true.
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
    """A cancellation that comes from within is a failure, which a task group would overlook."""
    try:
        await work(*arguments)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise RuntimeError("cancelled, and not by us") from None

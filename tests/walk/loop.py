"""A loop whose clock jumps, that is asked at each jump, and that sees what spins."""

from __future__ import annotations

import asyncio
import itertools
import selectors
from collections.abc import Callable
from typing import Any

TURNS_MAX = 3_000
"""Turns of the loop at one instant: the busiest honest one takes some dozens."""


class Violation(AssertionError):
    """Something that must never be is."""


class _Selector(selectors.SelectSelector):
    """Nothing is read from outside: a wait is a jump of the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.turns = 0
        self.at_jump: Callable[[], None] = lambda: None

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise Violation("every task waits and no timer is set")
        if timeout <= 0:
            self.turns += 1
            if self.turns > TURNS_MAX:
                raise Violation(f"the loop spins: {TURNS_MAX} turns at {self.now_s:.3f} s")
            return []
        self.at_jump()
        self.turns = 0
        self.now_s += timeout
        return []


class _Future(asyncio.Future[Any]):
    """In a set it has the place of its number, not of its address: a walk can be replayed."""

    def __init__(self, number: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._number = number

    def __hash__(self) -> int:
        return self._number


class _Task(asyncio.Task[Any]):
    """As `_Future`."""

    _number = 0

    def __hash__(self) -> int:
        return self._number


class WalkLoop(asyncio.SelectorEventLoop):
    """As `tests.support.virtual_time`, with a question at each jump."""

    def __init__(self) -> None:
        self.clock = _Selector()
        super().__init__(self.clock)
        self._clock_resolution = 1e-9
        self._numbers = itertools.count()

    def time(self) -> float:
        return self.clock.now_s

    def create_future(self) -> asyncio.Future[Any]:
        return _Future(next(self._numbers), self)

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None) -> Any:
        # Its own constructor puts it into sets, where it must have its number already.
        task = _Task.__new__(_Task)
        task._number = next(self._numbers)
        task.__init__(coro, loop=self, name=name, context=context)  # type: ignore[misc]
        return task

"""What a test needs beside Python: started, given out and removed in one place, or done without.

A server that tests start (Kafka, Redis, Prometheus, a cluster) is a `Started`. Where the machine
cannot have it, its tests are skipped with the reason, or fail where `TEST_…=required` asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import NoReturn, Self, TypeVar

import pytest

from service.core.errors import CannotRun
from service.demo.download import fetch_model


class Started:
    """`with server:` starts it, and in the end removes its process and its data.

    What was begun is removed too where the start itself fails or is interrupted.
    """

    def begin(self) -> None:
        """Start it and wait until it answers."""
        raise NotImplementedError

    def remove(self) -> None:
        """End its process and delete its data, in whatever state it is."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            self.begin()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


S = TypeVar("S", bound=Started)


def for_tests(make: Callable[[], S], missing: type[Exception], wanted: str) -> Iterator[S]:
    """A fixture's server, as long as its tests run; `missing` is raised where it cannot be had."""
    with ExitStack() as until_removed:
        try:
            server = make()
            until_removed.enter_context(server)
        except missing as error:
            do_without(str(error), wanted)
        yield server


def do_without(reason: str, wanted: str = "TEST_KAFKA") -> NoReturn:
    """Skips the test; fails it where the environment says that this must not happen."""
    if os.environ.get(wanted) == "required":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


async def local_model_is_here() -> None:
    """The demo's model lies in the cache after this, or the test is done without."""
    try:
        await fetch_model(lambda done, total: None)
    except CannotRun as reason:
        do_without(str(reason), "TEST_MODEL")

"""Signals that stop the process: which are heard, and how often."""

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from service.signals import STOPS, stopped_by


async def heard_of(*sent: signal.Signals) -> list[signal.Signals]:
    """What is heard of signals that this process sends to itself, in their order."""
    heard: list[signal.Signals] = []
    with stopped_by(heard.append):
        for number in sent:
            os.kill(os.getpid(), number)
            for _ in range(3):  # the loop reads its wake-up pipe, then calls the handler
                await asyncio.sleep(0)
    return heard


@pytest.mark.parametrize("number", STOPS)
async def test_each_stops(number: signal.Signals) -> None:
    """SIGTERM, Ctrl-C and a terminal that closes are all heard; none of them kills."""
    assert await heard_of(number) == [number]


async def test_a_second_one_is_heard() -> None:
    """Whoever sends it again does not want to wait."""
    assert await heard_of(signal.SIGTERM, signal.SIGINT) == [signal.SIGTERM, signal.SIGINT]


async def test_a_terminal_that_closes_says_so_twice() -> None:
    """The second SIGHUP does not mean that nothing is to be waited for; a SIGTERM after it does."""
    sent = signal.SIGHUP, signal.SIGHUP, signal.SIGTERM
    assert await heard_of(*sent) == [signal.SIGHUP, signal.SIGTERM]


@contextmanager
def ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


async def test_nohup_is_kept() -> None:
    """A SIGHUP that was ignored before the start stays ignored, and afterwards too."""
    with ignored():
        assert await heard_of(signal.SIGHUP) == []
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN

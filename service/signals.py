"""Signals that stop the process, heard in one place by whatever runs: app, workers, demo."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""A terminal or an SSH session that closes sends SIGHUP: what is in flight has been paid for, so it
is finished as with SIGTERM."""


@contextmanager
def stopped_by(stop: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call `stop` with each signal that arrives inside the block, on the event loop.

    A SIGHUP that was ignored at the start stays ignored (nohup), and only the first one counts: a
    terminal that closes sends it twice, and the second must not mean "do not wait".
    """
    loop = asyncio.get_running_loop()
    heard = [each for each in STOPS if not _ignored_hangup(each)]
    hung_up = False

    def hear(number: signal.Signals) -> None:
        nonlocal hung_up
        if number is signal.SIGHUP and hung_up:
            return
        hung_up = hung_up or number is signal.SIGHUP
        stop(number)

    for number in heard:
        loop.add_signal_handler(number, hear, number)
    try:
        yield
    finally:
        for number in heard:
            loop.remove_signal_handler(number)


def _ignored_hangup(number: signal.Signals) -> bool:
    return number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN

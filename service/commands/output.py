"""The commands' stdout and stderr, also where a reader has left or a stream was never open."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class OutputClosed(Exception):
    """The reader of stdout has left, as `| head -1` does.

    It is not an `OSError`, because Kafka's client raises those too, where no broker answers.
    """


class _Printed:
    """A text stream that raises `OutputClosed` where its reader has left."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            raise OutputClosed from None

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            raise OutputClosed from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def printing() -> Iterator[None]:
    """Run a command with stdout and stderr; where the reader leaves, it ends with exit code 0.

    Streams that were closed before the start become /dev/null. Without that, the next connection
    would get their file number, and text that a library prints would go to a broker.
    """
    before = sys.stdout, sys.stderr
    for number in (0, 1, 2):
        _open(number)
    sys.stdout = cast(TextIO, _Printed(before[0] or _nowhere()))
    sys.stderr = before[1] or _nowhere()
    try:
        yield
    except OutputClosed:
        raise SystemExit(0) from None
    finally:
        try:
            sys.stdout.flush()
        except OutputClosed:
            _forget(before[0])
        sys.stdout, sys.stderr = before


def _open(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number, which is this one


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def _forget(stream: TextIO) -> None:
    """Send the rest of the text to /dev/null, so that Python does not fail on it at its exit."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)

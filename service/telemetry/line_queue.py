"""Log lines on their way to stderr: whoever logs never waits for whoever reads.

A pipe that nobody empties fills up, and a write to it blocks: on the event loop that would freeze
calls, commits, heartbeats and probes. So a thread writes, and what it cannot write in time is
dropped, counted and told of once there is room again.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

QUEUED_MAX_CHARS = 1024 * 1024
"""The longest queue, in characters: some ten thousand lines."""

CLOSE_S = 2.0
"""The longest that the end of the process waits for lines to be read."""

POLL_MS = 100
"""Between two looks at whether the end has come, while nobody reads."""

CHUNK_BYTES = select.PIPE_BUF
"""So much fits where a pipe says that it can be written to; more could block."""


class LineQueue:
    """Writes lines to a descriptor, in their order; `dropped` is told how many it could not write,
    and `missing` makes a line of it for whoever reads."""

    def __init__(
        self, descriptor: int, dropped: Callable[[int], None], missing: Callable[[int], str]
    ) -> None:
        self._descriptor, self._dropped, self._missing = descriptor, dropped, missing
        self._lines: deque[str] = deque()
        self._chars = self._dropped_since = 0
        self._changed = threading.Condition()
        self._closing = self._left = False
        self._writer = threading.Thread(target=self._write_all, name="log lines", daemon=True)
        self._writer.start()

    def put(self, line: str) -> None:
        """Queue a line with its line break, or drop it where the queue is full."""
        with self._changed:
            if self._chars + len(line) > QUEUED_MAX_CHARS:
                self._dropped_since += 1
                dropped = True
            else:
                self._lines.append(line)
                self._chars += len(line)
                dropped = False
                self._changed.notify()
        if dropped:
            self._dropped(1)

    def close(self) -> None:
        """Wait a bounded time for what is queued, then leave the rest."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._writer.join(CLOSE_S)
        self._left = True

    def _write_all(self) -> None:
        while not self._left and (line := self._next()) is not None:
            try:
                self._write(line.encode(errors="backslashreplace"))
            except (OSError, ValueError):  # closed, or its disk is full: the next one may go
                self._dropped(1)

    def _next(self) -> str | None:
        """The next line, once there is one; None at the end."""
        with self._changed:
            while not self._lines and not self._closing:
                self._changed.wait()
            if not self._lines:
                return None
            line = self._lines.popleft()
            self._chars -= len(line)
            missing, self._dropped_since = self._dropped_since, 0
        return (
            line if not missing else f"{line}{missing} log lines were dropped: nobody read them\n"
        )

    def _write(self, text: bytes) -> None:
        """Only where it cannot block, so that no lock is held in the end by a thread that waits."""
        room = select.poll()
        room.register(self._descriptor, select.POLLOUT)
        while text and not self._left:
            if not room.poll(POLL_MS):
                continue
            with suppress(BlockingIOError):
                text = text[os.write(self._descriptor, text[:CHUNK_BYTES]) :]

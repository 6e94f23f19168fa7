"""Log lines: for people or as JSON, to stderr, without the text of a message or an answer.

Our own lines are written so that they hold none. What libraries log is made safe here:

- `instructor` logs the model's answers, at ERROR: none of its lines is written;
- others log request bodies at DEBUG: they are written from INFO on, talkative ones from WARNING on;
- texts of foreign exceptions can hold what was parsed (pydantic's do): an exception is written as
  its type and its frames, wherever it appears. Only our own exceptions are written with their text.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, Literal, TextIO, TypeAlias

from service.core.errors import SluiceError
from service.settings import TelemetrySettings
from service.telemetry.line_queue import LineQueue

Level: TypeAlias = Literal["warning", "error"]

OURS = ("service", "sluice")
"""The loggers of our own code; `sluice` is for users' code that wants to log."""

SILENT = ("instructor",)
"""Loggers that are never written: their lines can hold a model's answer at any level."""

TALKATIVE = (
    "httpx2",  # a line for each request
    "httpx",
    "httpcore2",
    "httpcore",
    "openai",  # a line for each request, and its retries, which are off here
    "aiohttp.access",  # a line for each probe
    "aiokafka",  # ten lines for each rebalance; our own lines say what matters
)
"""Libraries whose lines are written from WARNING on. With log_level DEBUG they are written from
INFO on, as those of all other libraries always are."""

CHAIN_MAX = 8
"""How many exceptions of one chain or group are written. A task group may hold 10,000, and the
first few say enough."""

REPEAT_S = 10.0
"""The same line of a library is written once in this many seconds."""

REPEAT_MAX = 500
"""How many different lines are remembered for `REPEAT_S`; beyond it, all of them are forgotten."""

_QUERY = re.compile(r"(https?://[^\s?\"']+)\?[^\s\"']+")
"""A URL in a library's line; its query is left out because it may hold a key."""

_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


@contextmanager
def configured(
    telemetry: TelemetrySettings,
    count: Callable[[Level], None] | None = None,
    stream: TextIO | None = None,
    worker: int | None = None,
    dropped: Callable[[int], None] = lambda _: None,
) -> Iterator[None]:
    """Log as the settings say, and afterwards as before. `count` is called for each warning and
    error. Where there are several workers, each line holds the number of its `worker`. Nobody waits
    for a reader of stderr: `dropped` is called for lines that were not read in time."""
    root, shown_before = logging.getLogger(), warnings.showwarning
    level, handlers = root.level, root.handlers[:]
    formatter = JsonLines() if telemetry.log_format == "json" else TextLines()
    queue = _queue(dropped, formatter) if stream is None else None
    root.handlers[:] = [_Lines(formatter, count, stream, worker, queue)]
    root.setLevel(telemetry.log_level)
    warnings.showwarning = _warned
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
        warnings.showwarning = shown_before
        if queue is not None:
            queue.close()


def last_words(text: str) -> None:
    """Write to stderr as the process ends, which does not wait long for a reader."""
    queue = _queue(lambda _: None, logging.Formatter())
    if queue is None:
        with suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)
        return
    queue.put(f"{text}\n")
    queue.close()


def _queue(dropped: Callable[[int], None], formatter: logging.Formatter) -> LineQueue | None:
    """The way to stderr; None where it is no file of the system's."""

    def missing(lines: int) -> str:
        said = ("%d log lines were dropped: nobody read them in time", (lines,))
        record = logging.LogRecord(__name__, logging.WARNING, __file__, 0, *said, None)
        return f"{formatter.format(record)}\n"

    try:
        sys.stderr.flush()
        return LineQueue(sys.stderr.fileno(), dropped, missing)
    except (AttributeError, OSError, ValueError):
        return None


class _Lines(logging.StreamHandler[TextIO]):
    """Writes the lines that may be logged, and counts warnings and errors."""

    def __init__(
        self,
        formatter: logging.Formatter,
        count: Callable[[Level], None] | None,
        stream: TextIO | None,
        worker: int | None,
        queue: LineQueue | None,
    ) -> None:
        super().__init__(stream)
        self._follows_stderr, self._worker = stream is None, worker
        self._queue, self._stderr = queue, sys.stderr
        self.setFormatter(formatter)
        self.addFilter(may_be_logged)
        self.addFilter(_Repeats())
        self._count = count

    def emit(self, record: logging.LogRecord) -> None:
        if self._worker is not None:
            record.__dict__["worker"] = self._worker
        if self._follows_stderr:
            self.stream = sys.stderr  # read anew: a progress bar replaces it while it is shown
        if self._queue is not None and sys.stderr is self._stderr:
            self._put(record, self._queue)
        else:
            super().emit(record)
        if self._count is not None and record.levelno >= logging.WARNING:
            self._count("error" if record.levelno >= logging.ERROR else "warning")

    def _put(self, record: logging.LogRecord, queue: LineQueue) -> None:
        try:
            line = self.format(record)
        except Exception:  # as logging does: a line that cannot be formatted stops nobody
            line = f"a log line of {record.name}:{record.lineno} could not be written"
        queue.put(f"{line}\n")

    def handleError(self, record: logging.LogRecord) -> None:
        """Report a line that could not be written. Logging's own report would show the line's
        arguments, which may hold a message's text."""
        with suppress(OSError, ValueError):
            self.stream.write(f"a log line of {record.name}:{record.lineno} could not be written\n")


class _Repeats(logging.Filter):
    """Lets the same line of a library pass once in `REPEAT_S`; the next one to pass tells how many
    were kept back.

    A client that does not reach its brokers logs each attempt, many a second.
    """

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if _under(record.name, OURS):
            return True
        same = (record.name, str(record.msg))
        said_at, kept_back = self._said.get(same, (-REPEAT_S, 0))
        if record.created - said_at < REPEAT_S:
            self._said[same] = (said_at, kept_back + 1)
            return False
        if len(self._said) >= REPEAT_MAX:
            self._said.clear()
        self._said[same] = (record.created, 0)
        if kept_back:
            record.__dict__["kept_back"] = kept_back
        return True


def may_be_logged(record: logging.LogRecord) -> bool:
    """Whether a line is written: ours always, a library's where it cannot hold a message's text."""
    if _under(record.name, OURS):
        return True
    if _under(record.name, SILENT):
        return False
    if _under(record.name, TALKATIVE) and logging.getLogger().level > logging.DEBUG:
        return record.levelno >= logging.WARNING
    return record.levelno >= logging.INFO


def _under(name: str, parents: tuple[str, ...]) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def _warned(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Log a Python warning without its text: pydantic's warnings show the value they are about."""
    logging.getLogger("py.warnings").warning("%s at %s:%d", category.__name__, filename, lineno)


class TextLines(logging.Formatter):
    """`12:00:00.123 WARNING kafka.source  text key=value`: UTC, one line, then the frames."""

    def format(self, record: logging.LogRecord) -> str:
        time = _time(record).strftime("%H:%M:%S.%f")[:-3]
        name = record.name.removeprefix("service.")
        extras = "".join(f" {key}={_plain(value)}" for key, value in _extras(record).items())
        line = f"{time} {record.levelname:<7} {name:<14} {text_of(record)}{extras}"
        error = _error(record)
        return f"{line}\n{error}" if error else line


class JsonLines(logging.Formatter):
    """One JSON object a line: ts, level, logger, message, the extra fields, exception."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "ts": _time(record).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": text_of(record),
        }
        fields = {**_extras(record), **fields}
        error = _error(record)
        if error:
            fields["exception"] = error
        return json.dumps(fields, default=_plain, ensure_ascii=False)


def _time(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, UTC)


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _ATTRIBUTES}


def _plain(value: object) -> str:
    text = named(value) if isinstance(value, BaseException) else str(value)
    return text.replace("\n", "\\n")


def text_of(record: logging.LogRecord) -> str:
    """The line's text, in which exceptions among the arguments are shown by their type.

    asyncio's lines hold the repr of callbacks, tasks and exceptions: they are cut off before it.
    """
    if isinstance(record.args, tuple) and record.args:
        args = tuple(named(one) if isinstance(one, BaseException) else one for one in record.args)
        text = str(record.msg) % args
    elif isinstance(record.msg, BaseException):
        text = named(record.msg)
    else:
        text = record.getMessage()
    if not _under(record.name, OURS):
        text = _QUERY.sub(r"\1?…", text)
    if _under(record.name, ("asyncio",)):
        text = re.split(r"[\n<(]", text)[0].strip()
    return text.replace("\n", "\\n")


# --- exceptions -------------------------------------------------------------------------------


def named(error: BaseException) -> str:
    """An exception's type, with its text where it is ours or cannot hold a message's text."""
    kind = type(error)
    name = kind.__qualname__
    if kind.__module__ != "builtins":
        name = f"{kind.__module__}.{name}"
    if isinstance(error, SluiceError):
        return f"{name}: {error}"
    if isinstance(error, OSError) and isinstance(error.errno, int):
        return f"{name}: {os.strerror(error.errno)}"
    if isinstance(error, ImportError) and error.name:
        return f"{name}: {error.name}"
    return name


def shown(error: BaseException) -> str:
    """A traceback without the texts of foreign exceptions: their types, frames, causes and, of a
    group, its members."""
    return "\n".join(_lines(error, set()))


def _lines(error: BaseException, seen: set[int]) -> Iterator[str]:
    seen.add(id(error))
    cause, link = _before(error)
    if cause is not None and id(cause) not in seen and len(seen) < CHAIN_MAX:
        yield from _lines(cause, seen)
        yield link
    yield "Traceback (most recent call last):"
    for frame in traceback.format_tb(error.__traceback__):
        yield frame.rstrip("\n")
    yield named(error)
    if isinstance(error, BaseExceptionGroup):
        yield from _members(error, seen)


def _members(group: BaseExceptionGroup[BaseException], seen: set[int]) -> Iterator[str]:
    for number, member in enumerate(group.exceptions, 1):
        if len(seen) >= CHAIN_MAX:
            yield f"  … and {len(group.exceptions) - number + 1} more"
            return
        yield f"  {number} of {len(group.exceptions)}:"
        for line in _lines(member, seen):
            yield "\n".join("  " + part for part in line.split("\n"))


def _before(error: BaseException) -> tuple[BaseException | None, str]:
    if error.__cause__ is not None:
        return error.__cause__, "which is why:"
    if error.__suppress_context__:
        return None, ""
    return error.__context__, "and while that was handled:"


def _error(record: logging.LogRecord) -> str | None:
    if record.exc_info and record.exc_info[1] is not None:
        return shown(record.exc_info[1])
    return None

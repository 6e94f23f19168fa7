"""Log lines on their way to stderr: nobody waits for whoever reads them."""

import io
import logging
import os
import threading
from collections.abc import Iterator

import pytest

from service.settings import TelemetrySettings
from service.telemetry import line_queue
from service.telemetry.line_queue import QUEUED_MAX_CHARS, LineQueue
from service.telemetry.logs import configured, last_words

LINE = "x" * 999 + "\n"
MANY = 3 * QUEUED_MAX_CHARS // len(LINE)


def told(lines: int) -> str:
    return f"{lines} are missing\n"


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    monkeypatch.setattr(line_queue, "CLOSE_S", 1.0)
    reads, writes = os.pipe()
    before = set(threading.enumerate())
    yield reads, writes
    # Nobody reads any more, which ends a thread that still writes. It must not be there when
    # another test gets a descriptor of the same number.
    os.close(reads)
    for thread in set(threading.enumerate()) - before:
        thread.join(30.0)
    os.close(writes)


def read(descriptor: int, ending: bytes) -> bytes:
    """What arrives, up to a text."""
    found = b""
    while not found.endswith(ending):
        found += os.read(descriptor, 1 << 20)
    return found


def test_lines_arrive_in_order(pipe: tuple[int, int]) -> None:
    """All of them, whatever they hold."""
    lines = LineQueue(pipe[1], lambda _: pytest.fail("nothing is dropped"), told)
    for number in range(1000):
        lines.put(f"{number} \ud800é\n")
    found = read(pipe[0], "999 \\ud800é\n".encode())
    assert found.decode().splitlines() == [f"{number} \\ud800é" for number in range(1000)]
    lines.close()


def test_a_full_pipe_stops_nobody(pipe: tuple[int, int]) -> None:
    """Lines beyond the bound are dropped and counted; once it is read, lines say how many."""
    lost: list[int] = []
    lines = LineQueue(pipe[1], lost.append, told)
    for _ in range(MANY):
        lines.put(LINE)
    dropped = sum(lost)
    assert 0 < dropped < MANY
    arrived = missing = 0
    with open(pipe[0], closefd=False) as reader:
        while arrived + missing < MANY:
            line = reader.readline()
            arrived += line == LINE
            missing += 0 if line == LINE else int(line.split()[0])
    assert missing == dropped
    lines.close()


def test_the_end_waits_a_bounded_time(pipe: tuple[int, int]) -> None:
    """Nobody reads: the end comes all the same, and no lock of Python's is held for good."""
    lines = LineQueue(pipe[1], lambda _: None, told)
    for _ in range(500):
        lines.put(LINE)
    lines.close()


def test_a_reader_that_has_left_is_no_error() -> None:
    """Lines are counted as dropped."""
    lost: list[int] = []
    reads, writes = os.pipe()
    os.close(reads)
    lines = LineQueue(writes, lost.append, told)
    lines.put(LINE)
    lines.put(LINE)
    lines.close()
    os.close(writes)
    assert lost == [1, 1]


def test_logging_goes_by_the_queue(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A full stderr does not hold up whoever logs."""
    lost: list[int] = []
    with open(pipe[1], "w", closefd=False) as stderr:
        monkeypatch.setattr("sys.stderr", stderr)
        with configured(TelemetrySettings(), dropped=lost.append):
            for _ in range(MANY):
                logging.getLogger("service").warning(LINE.rstrip())
    assert sum(lost) > 0


def test_a_stream_that_is_no_file_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a test or a notebook replaces stderr."""
    replaced = io.StringIO()
    monkeypatch.setattr("sys.stderr", replaced)
    with configured(TelemetrySettings()):
        logging.getLogger("service").warning("here")
    assert "here" in replaced.getvalue()


def test_the_last_words_wait_a_bounded_time(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why a process ends is written where it can be; a full pipe does not keep the process."""
    with open(pipe[1], "w", closefd=False) as stderr:
        monkeypatch.setattr("sys.stderr", stderr)
        monkeypatch.setattr(line_queue, "CLOSE_S", 30.0)  # a busy machine starts threads late
        last_words("why")
        assert os.read(pipe[0], 100) == b"why\n"
        monkeypatch.setattr(line_queue, "CLOSE_S", 0.2)
        last_words(LINE * 100)

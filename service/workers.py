"""Several workers of one command, and their parent: it starts, watches and restarts them.

Each worker is a process of its own that runs `service.app`, in the same way as a single one. A line
(a pair of sockets) joins it with its parent. The parent sends the settings; the worker sends its
port and that it is up; the end of the line tells each that the other is gone. Rules of this file:
no worker outlives its parent. A worker that fails before it was ever up ends all of them; one that
dies later is started again while the others go on. Signals reach workers only through the parent.
"""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol, TypeAlias

from prometheus_client import CollectorRegistry, ProcessCollector

from service import clock
from service.core.admission.retry import Backoff, Uniform
from service.core.errors import (
    ALL_REJECTED,
    FAILED,
    INTERRUPTED,
    WRONG,
    CannotRun,
    Stop,
    WrongSettings,
)
from service.settings import Settings, warnings
from service.signals import stopped_by
from service.telemetry.logs import configured, last_words, shown
from service.telemetry.merged import MergedAnswers, Worker
from service.telemetry.metrics import WorkerMetrics
from service.telemetry.probes import Probes

log = logging.getLogger(__name__)

RESTARTS = Backoff(base_s=1.0, cap_s=60.0)
"""The delays before a dead worker is started again. Each start is a rebalance for the whole group,
so a worker that dies at its start must not be started again at once for ever."""

STEADY_S = 300.0
"""A worker that lived for this many seconds did not die of its start: the delays begin anew."""

STOP_MARGIN_S = 25.0
"""How many seconds a worker has for its end beyond its drain and one call. It is five seconds below
the chart's grace period, so that the parent can still log which worker it has killed."""

LAST_WORDS_S = 1.0
"""How many seconds the parent still reads the line of a worker that has ended. What the worker
wrote is there at once, but a process that it has left behind may hold the line open."""


def run(
    settings: Settings, count: int, *, until_caught_up: bool = False, start_over: bool = False
) -> int:
    """Run `count` workers until a signal, or until all have caught up; returns the exit code.

    `start_over` holds only for the first process of each worker. A process that replaces a dead one
    may find another cut, on which the person has not decided.

    Raises `Stop` where a worker cannot run at all. The exit code is the worst of all workers.
    """
    with configured(settings.telemetry):
        for sentence in warnings(settings):
            log.warning("%s", sentence)
        try:
            return asyncio.run(_run(settings, count, until_caught_up, start_over))
        except Stop:
            raise
        except Exception:  # the boundary of the process: no text of a message is printed
            log.critical("ended by an unexpected error", exc_info=True)
            return FAILED


async def _run(settings: Settings, count: int, until_caught_up: bool, start_over: bool) -> int:
    first = Once(start_over)

    def start(number: int) -> AbstractAsyncContextManager[ChildProcess]:
        return started(settings, until_caught_up, first.of(number), number)

    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    workers = Workers(
        start,
        count,
        stop_within_s(settings),
        WorkerMetrics(registry),
        random.uniform,
        until_caught_up=until_caught_up,
    )
    telemetry = settings.telemetry
    with stopped_by(workers.stop):
        async with Probes(telemetry.host, telemetry.port, MergedAnswers(registry, workers.seen)):
            return await workers.run()


class Once:
    """A person's decision at the command's start; it holds for each worker's first process."""

    def __init__(self, said: bool) -> None:
        self._said = said
        self._begun: set[int] = set()

    def of(self, number: int) -> bool:
        """Whether the decision holds for the process of this worker that is started now."""
        holds = self._said and number not in self._begun
        self._begun.add(number)
        return holds


def stop_within_s(settings: Settings) -> float:
    """How many seconds a worker may take from a signal to its end."""
    drain_s = settings.delivery.drain_timeout_s
    return drain_s + settings.extraction.call_timeout_s + STOP_MARGIN_S


# --- watching over them -----------------------------------------------------------------------


class Tally(NamedTuple):
    """What a worker that ended in order had finished: messages, and those of them rejected."""

    asked: int
    rejected: int


class Child(Protocol):
    """A worker's process. It is `up` once all of its parts have started. `failure` says why it
    could not run, where it could tell."""

    @property
    def port(self) -> int | None: ...

    @property
    def up(self) -> bool: ...

    @property
    def failure(self) -> Stop | None: ...

    @property
    def tally(self) -> Tally | None: ...

    def signal(self, number: signal.Signals) -> None: ...

    async def ended(self) -> int:
        """Wait for its end; returns the exit code, or minus the number of the signal that killed
        it."""


StartWorker: TypeAlias = Callable[[int], AbstractAsyncContextManager[Child]]
"""Starts the worker with this number; when the context is left, its process is gone."""


@dataclass(slots=True)
class _Seat:
    """A worker's place: its processes follow each other in it."""

    child: Child | None = None
    came_up: bool = False
    exit_code: int = 0  # of the last process in this place
    done: bool = False  # no other process follows


class Workers:
    """The workers of one command, from their start to their end."""

    def __init__(
        self,
        start: StartWorker,
        count: int,
        stop_within_s: float,
        metrics: WorkerMetrics,
        uniform: Uniform,
        *,
        until_caught_up: bool,
    ) -> None:
        self._start, self._stop_within_s = start, stop_within_s
        self._metrics, self._uniform = metrics, uniform
        self._until_caught_up = until_caught_up
        self._seats = {number: _Seat() for number in range(1, count + 1)}
        self._stopping = asyncio.Event()
        self._stopped_by: signal.Signals | None = None
        self._tallies: list[Tally | None] = []  # of each life that has ended
        self._failure: Stop | None = None

    async def run(self) -> int:
        """Run until a stop, or until all have caught up; returns the worst exit code.

        Raises the failure of a worker that could not run at all. Where it is cancelled, it kills
        all workers.
        """
        async with asyncio.TaskGroup() as tasks:
            late = tasks.create_task(self._kill_late_ones())
            async with asyncio.TaskGroup() as seats:
                for number, seat in self._seats.items():
                    seats.create_task(self._keep(number, seat))
            late.cancel()
        if self._failure is not None:
            raise self._failure
        return self._exit_code()

    def _exit_code(self) -> int:
        worst = max(seat.exit_code for seat in self._seats.values())
        if self._stopped_by is signal.SIGINT:
            return INTERRUPTED
        if not self._until_caught_up or worst != 0:
            return worst
        if self._stopped_by is not None:
            return FAILED
        return ALL_REJECTED if self._all_rejected() else 0

    def _all_rejected(self) -> bool:
        """Never said where a worker was killed: nobody knows what that one had finished."""
        told = [each for each in self._tallies if each is not None]
        asked = sum(each.asked for each in told)
        return len(told) == len(self._tallies) and 0 < asked == sum(each.rejected for each in told)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Stop all workers after what is in flight; a second call does not wait for that."""
        if not self._stopping.is_set():
            self._stopped_by = number
            log.info("stopping all workers; a second signal does not wait for what is in flight")
        self._end_all()

    def _end_all(self) -> None:
        self._stopping.set()
        for child in self._children().values():
            child.signal(signal.SIGTERM)

    def seen(self) -> dict[int, Worker]:
        """The workers that run or will run again, by number."""
        return {
            number: Worker(seat.child.port, seat.child.up) if seat.child else Worker(None, False)
            for number, seat in self._seats.items()
            if not seat.done
        }

    def _children(self) -> dict[int, Child]:
        return {number: seat.child for number, seat in self._seats.items() if seat.child}

    async def _keep(self, number: int, seat: _Seat) -> None:
        """Start a worker, and start it again whenever it dies."""
        deaths = 0
        while not self._stopping.is_set():
            began_s = clock.now_s()
            ending = await self._one_life(number, seat)
            if self._is_last(seat, ending):
                break
            deaths = 1 if clock.now_s() - began_s >= STEADY_S else deaths + 1
            delay_s = RESTARTS.delay_s(deaths, self._uniform)
            log.error("worker %d %s; it is started again in %.1f s", number, ending, delay_s)
            await self._stops_within(delay_s)
            if not self._stopping.is_set():
                self._metrics.restarts.inc()
        seat.done = True

    async def _one_life(self, number: int, seat: _Seat) -> Ending:
        async with self._start(number) as child:
            seat.child = child
            self._metrics.running.inc()
            try:
                if self._stopping.is_set():
                    child.signal(signal.SIGTERM)
                ending = Ending(await child.ended(), child.up, child.failure)
            finally:
                self._metrics.running.dec()
                seat.child = None
        self._tallies.append(child.tally)
        seat.came_up |= ending.came_up
        seat.exit_code = ending.exit_code
        return ending

    def _is_last(self, seat: _Seat, ending: Ending) -> bool:
        """Whether no process follows this one: after a stop, when it has caught up, or where the
        first start failed."""
        if self._stopping.is_set():
            return True
        if not seat.came_up and ending.code != 0:
            self._failure = ending.failure
            self._end_all()
            return True
        # A process that was killed has not caught up: another has to finish its messages.
        return self._until_caught_up and ending.code >= 0

    async def _stops_within(self, delay_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._stopping.wait()

    async def _kill_late_ones(self) -> None:
        await self._stopping.wait()
        await asyncio.sleep(self._stop_within_s)
        for number, child in self._children().items():
            log.error("worker %d has not ended for %.0f s: killed", number, self._stop_within_s)
            child.signal(signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a worker's process ended."""

    code: int
    came_up: bool
    failure: Stop | None

    @property
    def exit_code(self) -> int:
        """The exit code that counts for the whole command."""
        if self.code == -signal.SIGTERM and not self.came_up:
            return 0  # killed while it was importing, before it could handle signals: no work lost
        return self.code if self.code >= 0 else FAILED

    def __str__(self) -> str:
        if self.code < 0:
            return f"was killed by {signal.Signals(-self.code).name}"
        why = "" if self.failure is None else f" ({self.failure})"
        return f"ended with exit code {self.code}{why}"


# --- a process, from its parent's side --------------------------------------------------------

WORKER_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from service.workers import work; work(int(sys.argv[1]))"
)
"""The code that a worker's process runs. It imports from the same places as its parent; with `-P`,
files in the working folder don't count."""


@dataclass(frozen=True, slots=True)
class WorkerTask:
    """The first thing that a worker reads from its line."""

    settings: Settings
    worker: int
    until_caught_up: bool
    start_over: bool


@asynccontextmanager
async def started(
    settings: Settings, until_caught_up: bool, start_over: bool, number: int
) -> AsyncIterator[ChildProcess]:
    """Start the worker with this number. It gets a session of its own, so that only the parent gets
    a terminal's Ctrl-C. When the context is left, its process is gone."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = (
            sys.executable,
            "-P",
            "-c",
            WORKER_CODE,
            str(theirs.fileno()),
            json.dumps(sys.path),
        )
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
        theirs.close()
        try:
            reader, writer = await asyncio.open_connection(sock=ours)
            task = WorkerTask(of_worker(settings, number), number, until_caught_up, start_over)
            writer.write(pickle.dumps(task))
            try:
                yield ChildProcess(process, reader)
            finally:
                writer.transport.abort()
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


def of_worker(settings: Settings, number: int) -> Settings:
    """The settings for one worker: its pages on loopback, where only its parent asks, and its own
    name in the group."""
    own = settings.telemetry.model_copy(update={"host": "127.0.0.1", "port": 0})
    kafka = settings.kafka
    if kafka.group_instance_id is not None:
        name = f"{kafka.group_instance_id}-{number}"
        kafka = kafka.model_copy(update={"group_instance_id": name})
    return settings.model_copy(update={"telemetry": own, "kafka": kafka})


class ChildProcess:
    """A `Child` that is a real process; it reports over its line."""

    def __init__(self, process: asyncio.subprocess.Process, line: asyncio.StreamReader) -> None:
        self._process, self._line = process, line
        self.port: int | None = None
        self.up = False
        self.failure: Stop | None = None
        self.tally: Tally | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def ended(self) -> int:
        async with asyncio.TaskGroup() as tasks:
            listening = tasks.create_task(self._listen())
            code = await self._process.wait()
            await asyncio.wait({listening}, timeout=LAST_WORDS_S)
            listening.cancel()
        return code

    async def _listen(self) -> None:
        with suppress(ConnectionError):
            async for line in self._line:
                self._hear(json.loads(line))

    def _hear(self, said: dict[str, Any]) -> None:
        match said:
            case {"port": int(port)}:
                self.port = port
            case {"up": True}:
                self.up = True
            case {"asked": int(asked), "rejected": int(rejected)}:
                self.tally = Tally(asked, rejected)
            case {"failure": str(sentence), "wrong": bool(wrong)}:
                self.failure = WrongSettings(sentence) if wrong else CannotRun(sentence)
            case _:
                raise AssertionError("a worker says what no worker says")


# --- and from its own -------------------------------------------------------------------------


def work(descriptor: int) -> NoReturn:
    """The main function of a worker's process."""
    with socket.socket(fileno=descriptor) as line:
        line.set_inheritable(False)
        try:
            with line.makefile("rb") as told:
                task: WorkerTask = pickle.load(told)
        except EOFError:
            sys.exit(FAILED)  # the parent is gone already
        sys.exit(_work(task, Line(line, task.worker)))


def _work(task: WorkerTask, line: Line) -> int:
    from service.app import run as run_app  # not above: the parent needs none of its clients

    try:
        return run_app(
            task.settings,
            until_caught_up=task.until_caught_up,
            start_over=task.start_over,
            parent=line,
        )
    except Stop as error:
        line.failed(error)
        return WRONG if isinstance(error, WrongSettings) else FAILED
    except Exception as error:  # the boundary of the process: any other error is a fault of ours
        last_words(shown(error))
        return FAILED


class Line:
    """The worker's end of the line (`service.app.Parent`). Telling something to a parent that is
    gone is no error here: the worker notices the end of the line by itself."""

    def __init__(self, line: socket.socket, worker: int) -> None:
        self._line, self.worker = line, worker

    def listening(self, port: int) -> None:
        self._say({"port": port})

    def up(self) -> None:
        self._say({"up": True})

    def finished(self, asked: int, rejected: int) -> None:
        self._say({"asked": asked, "rejected": rejected})

    def failed(self, error: Stop) -> None:
        self._say({"failure": str(error), "wrong": isinstance(error, WrongSettings)})

    def fileno(self) -> int:
        return self._line.fileno()

    def _say(self, said: dict[str, Any]) -> None:
        with suppress(OSError):
            self._line.sendall(json.dumps(said).encode() + b"\n")

"""Several workers of one command, and their parent: it starts them, watches them, speaks for all.

Each worker is a process of its own that runs `service.app`, as one that stands alone would. A line
(a pair of sockets) joins it with its parent: settings go down, port and progress come up, and its
end tells each that the other is gone. Rules of this file: no worker outlives its parent; one that
has never come up ends them all, one that dies later is started again and disturbs nobody; signals
reach workers through the parent alone.
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
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeAlias

from prometheus_client import CollectorRegistry, ProcessCollector

from service.core.admission.retry import Backoff, Uniform
from service.core.errors import FAILED, WRONG, CannotRun, Stop, WrongSettings
from service.settings import Settings, warnings
from service.telemetry.logs import configured, shown
from service.telemetry.merged import MergedAnswers, Worker
from service.telemetry.metrics import WorkerMetrics
from service.telemetry.probes import Probes

log = logging.getLogger(__name__)

RESTARTS = Backoff(base_s=1.0, cap_s=60.0)
"""Each start is a rebalance for the whole group, so that a worker that dies at once must not be
started at once for ever."""

STEADY_S = 300.0
"""A worker that lived so long has not died of its start: delays begin anew."""

STOP_MARGIN_S = 25.0
"""For the end of a worker beyond its drain and one call; five seconds below the chart's grace, so
that the parent can still say whom it has killed."""

LAST_WORDS_S = 1.0
"""What a worker wrote to its line before it ended is there at once; a process that it has left
behind may hold the line open."""


def run(
    settings: Settings, count: int, *, until_caught_up: bool = False, start_over: bool = False
) -> int:
    """Run `count` workers until a signal, or until all have caught up; returns the exit code.

    With `start_over` the first process of each reads what waits for a person's word; one that
    takes a dead one's place does not, since a person has not seen what it finds.

    Raises `Stop` where a worker cannot run at all. Unless all ended with 0, the worst exit code.
    """
    with configured(settings.telemetry):
        for sentence in warnings(settings):
            log.warning("%s", sentence)
        try:
            return asyncio.run(_run(settings, count, until_caught_up, start_over))
        except Stop:
            raise
        except Exception:  # the boundary of the process: nothing is printed raw
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
    with _signals(workers.stop):
        async with Probes(telemetry.host, telemetry.port, MergedAnswers(registry, workers.seen)):
            return await workers.run()


class Once:
    """What a person said when the command was started: it holds for each worker's first process."""

    def __init__(self, said: bool) -> None:
        self._said = said
        self._begun: set[int] = set()

    def of(self, number: int) -> bool:
        """Whether it holds for the process that is started now."""
        holds = self._said and number not in self._begun
        self._begun.add(number)
        return holds


def stop_within_s(settings: Settings) -> float:
    """How long a worker may take to its end."""
    drain_s = settings.delivery.drain_timeout_s
    return drain_s + settings.extraction.call_timeout_s + STOP_MARGIN_S


@contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


# --- watching over them -----------------------------------------------------------------------


class Child(Protocol):
    """A worker's process. It is `up` once it has started all of its parts; `failure` says why it
    could not run, where it could say so."""

    @property
    def port(self) -> int | None: ...

    @property
    def up(self) -> bool: ...

    @property
    def failure(self) -> Stop | None: ...

    def signal(self, number: signal.Signals) -> None: ...

    async def ended(self) -> int:
        """Its exit code; of one that a signal killed, its number below zero."""


Start: TypeAlias = Callable[[int], AbstractAsyncContextManager[Child]]
"""Starts the worker of a number; on leaving, its process is gone."""


@dataclass(slots=True)
class _Seat:
    """A worker's place, whichever process is in it."""

    child: Child | None = None
    came_up: bool = False
    exit_code: int = 0  # of the last process that was in it
    done: bool = False  # nobody comes after that one


class Workers:
    """The workers of one command, from their start to their end."""

    def __init__(
        self,
        start: Start,
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
        self._failure: Stop | None = None

    async def run(self) -> int:
        """Until a stop, or until all have caught up; returns the worst exit code.

        Raises what a worker said that could not run at all. Cancelled, it kills them all.
        """
        async with asyncio.TaskGroup() as tasks:
            late = tasks.create_task(self._kill_late_ones())
            async with asyncio.TaskGroup() as seats:
                for number, seat in self._seats.items():
                    seats.create_task(self._keep(number, seat))
            late.cancel()
        if self._failure is not None:
            raise self._failure
        return max(seat.exit_code for seat in self._seats.values())

    def stop(self) -> None:
        """Have all of them finish what is in flight; the second time, not even that."""
        if not self._stopping.is_set():
            log.info("stopping all workers; a second signal does not wait for what is in flight")
        self._end_all()

    def _end_all(self) -> None:
        self._stopping.set()
        for child in self._children().values():
            child.signal(signal.SIGTERM)

    def seen(self) -> dict[int, Worker]:
        """Those that run, or will run again."""
        return {
            number: Worker(seat.child.port, seat.child.up) if seat.child else Worker(None, False)
            for number, seat in self._seats.items()
            if not seat.done
        }

    def _children(self) -> dict[int, Child]:
        return {number: seat.child for number, seat in self._seats.items() if seat.child}

    async def _keep(self, number: int, seat: _Seat) -> None:
        """Start a worker, and again whenever it dies."""
        deaths = 0
        while not self._stopping.is_set():
            began_s = _now_s()
            ending = await self._one_life(number, seat)
            if self._is_last(seat, ending):
                break
            deaths = 1 if _now_s() - began_s >= STEADY_S else deaths + 1
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
        seat.came_up |= ending.came_up
        seat.exit_code = ending.exit_code
        return ending

    def _is_last(self, seat: _Seat, ending: Ending) -> bool:
        """Whether nobody comes after it: a stop, a catch-up that is over, a start that fails."""
        if self._stopping.is_set():
            return True
        if not seat.came_up and ending.code != 0:
            self._failure = ending.failure
            self._end_all()
            return True
        # A signal from outside is no result: somebody has to finish what that one held.
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
        """What it counts as for the whole command."""
        if self.code == -signal.SIGTERM and not self.came_up:
            return 0  # while it was imported, before it could hear of signals: nothing had begun
        return self.code if self.code >= 0 else FAILED

    def __str__(self) -> str:
        if self.code < 0:
            return f"was killed by {signal.Signals(-self.code).name}"
        why = "" if self.failure is None else f" ({self.failure})"
        return f"ended with exit code {self.code}{why}"


def _now_s() -> float:
    return asyncio.get_running_loop().time()


# --- a process, from its parent's side --------------------------------------------------------

START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from service.workers import work; work(int(sys.argv[1]))"
)
"""Imports come from where the parent's come from, whatever lies in the working folder (-P)."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker is told at its start."""

    settings: Settings
    worker: int
    until_caught_up: bool
    start_over: bool


@asynccontextmanager
async def started(
    settings: Settings, until_caught_up: bool, start_over: bool, number: int
) -> AsyncIterator[ChildProcess]:
    """Start the worker of a number, in a session of its own: Ctrl-C in a terminal is the parent's.
    On leaving, its process is gone."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = (sys.executable, "-P", "-c", START, str(theirs.fileno()), json.dumps(sys.path))
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
        theirs.close()
        try:
            reader, writer = await asyncio.open_connection(sock=ours)
            task = Task(of_worker(settings, number), number, until_caught_up, start_over)
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
    """Pages that its parent alone asks for, and a name of its own in the group."""
    own = settings.telemetry.model_copy(update={"host": "127.0.0.1", "port": 0})
    kafka = settings.kafka
    if kafka.group_instance_id is not None:
        name = f"{kafka.group_instance_id}-{number}"
        kafka = kafka.model_copy(update={"group_instance_id": name})
    return settings.model_copy(update={"telemetry": own, "kafka": kafka})


class ChildProcess:
    """A `Child` that is a process; what it says of itself comes up its line."""

    def __init__(self, process: asyncio.subprocess.Process, line: asyncio.StreamReader) -> None:
        self._process, self._line = process, line
        self.port: int | None = None
        self.up = False
        self.failure: Stop | None = None

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
            case {"failure": str(sentence), "wrong": bool(wrong)}:
                self.failure = WrongSettings(sentence) if wrong else CannotRun(sentence)
            case _:
                raise AssertionError("a worker says what no worker says")


# --- and from its own -------------------------------------------------------------------------


def work(descriptor: int) -> NoReturn:
    """Be a worker: what its process runs."""
    with socket.socket(fileno=descriptor) as line:
        line.set_inheritable(False)
        try:
            with line.makefile("rb") as told:
                task: Task = pickle.load(told)
        except EOFError:
            sys.exit(FAILED)  # the parent is gone already
        sys.exit(_work(task, Line(line, task.worker)))


def _work(task: Task, line: Line) -> int:
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
    except Exception as error:  # the boundary of the process: what is left is a fault of ours
        print(shown(error), file=sys.stderr)
        return FAILED


class Line:
    """The way to the parent (`service.app.Parent`); one that is gone hears nothing, which is no
    error: the end of the line says so too."""

    def __init__(self, line: socket.socket, worker: int) -> None:
        self._line, self.worker = line, worker

    def listening(self, port: int) -> None:
        self._say({"port": port})

    def up(self) -> None:
        self._say({"up": True})

    def failed(self, error: Stop) -> None:
        self._say({"failure": str(error), "wrong": isinstance(error, WrongSettings)})

    def fileno(self) -> int:
        return self._line.fileno()

    def _say(self, said: dict[str, Any]) -> None:
        with suppress(OSError):
            self._line.sendall(json.dumps(said).encode() + b"\n")

"""Several workers: who is started again and when, who ends all, and what a stop leaves behind."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from service import workers
from service.core.errors import CannotRun, Stop, WrongSettings
from service.settings import Settings
from service.telemetry.merged import Worker
from service.telemetry.metrics import WorkerMetrics
from service.workers import (
    STEADY_S,
    ChildProcess,
    Line,
    Once,
    Tally,
    Workers,
    of_worker,
    started,
    stop_within_s,
)
from tests.support import virtual_time

STOP_WITHIN_S = 100.0
KILLED, TERMINATED = -signal.SIGKILL, -signal.SIGTERM


class Process:
    """A worker's process that ends as a test says, and by itself when it is told to."""

    def __init__(self, number: int, at_s: float) -> None:
        self.number, self.at_s = number, at_s
        self.port: int | None = None
        self.up = False
        self.failure: Stop | None = None
        self.tally: Tally | None = None
        self.deaf = False
        self.signals: list[signal.Signals] = []
        self.code: int | None = None
        self._over = asyncio.Event()

    def comes_up(self) -> None:
        self.port, self.up = 5000 + self.number, True

    def ends(self, code: int, failure: Stop | None = None) -> None:
        assert self.code is None, "it has ended before"
        self.code, self.failure = code, failure
        self._over.set()

    def signal(self, number: signal.Signals) -> None:
        assert self.code is None, "a signal for one that has ended"
        self.signals.append(number)
        if number is signal.SIGKILL:
            self.ends(-number)
        elif not self.deaf:
            self.ends(0)

    async def ended(self) -> int:
        await self._over.wait()
        assert self.code is not None
        return self.code


class Scene:
    """Workers, and the processes that they have started so far."""

    def __init__(self, count: int = 2, *, until_caught_up: bool = False) -> None:
        self.processes: list[Process] = []
        self.registry = CollectorRegistry()
        self.start_takes_s = 0.0
        self.workers = Workers(
            self._start,
            count,
            STOP_WITHIN_S,
            WorkerMetrics(self.registry),
            lambda _, most: most,
            until_caught_up=until_caught_up,
        )

    @asynccontextmanager
    async def _start(self, number: int) -> AsyncIterator[Process]:
        await asyncio.sleep(self.start_takes_s)
        alive = [one.number for one in self.processes if one.code is None]
        assert number not in alive, "two processes in one place"
        process = Process(number, asyncio.get_running_loop().time())
        self.processes.append(process)
        try:
            yield process
        finally:
            if process.code is None:
                process.ends(KILLED)

    def process(self, number: int) -> Process:
        """The last one in the place of a worker."""
        return [one for one in self.processes if one.number == number][-1]

    def all_come_up(self) -> None:
        for one in self.processes:
            one.comes_up()

    def starts_s(self, number: int) -> list[float]:
        return [one.at_s for one in self.processes if one.number == number]

    def value(self, name: str) -> float | None:
        return self.registry.get_sample_value(name)


def play(scene_: Callable[[], Scene], course: Callable[[Scene], Awaitable[None]]) -> int:
    """The exit code of workers that live through `course`; afterwards no process is left."""

    async def lived() -> int:
        scene = scene_()
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(_code(scene.workers))
            await asyncio.sleep(0.01)
            await course(scene)
            result = await running
        assert all(one.code is not None for one in scene.processes)
        assert scene.value("sluice_workers") == 0
        if isinstance(result, Stop):
            raise result
        return result

    return virtual_time.run(lived())


async def _code(workers: Workers) -> int | Stop:
    try:
        return await workers.run()
    except Stop as error:
        return error  # a task group would wrap it


def test_a_stop_reaches_all_once() -> None:
    """Each gets SIGTERM, and with all ended in order the exit code is 0."""

    async def course(scene: Scene) -> None:
        scene.all_come_up()
        assert scene.value("sluice_workers") == 3
        scene.workers.stop()
        assert [one.signals for one in scene.processes] == [[signal.SIGTERM]] * 3

    assert play(lambda: Scene(3), course) == 0


def test_a_second_signal_is_forwarded_too() -> None:
    """So that workers that still drain are forced; it kills none."""

    async def course(scene: Scene) -> None:
        scene.all_come_up()
        scene.process(1).deaf = True
        scene.workers.stop()
        await asyncio.sleep(1)
        scene.workers.stop()
        assert scene.process(1).signals == [signal.SIGTERM] * 2
        assert scene.process(2).signals == [signal.SIGTERM]
        scene.process(1).ends(0)

    assert play(Scene, course) == 0


def test_one_that_ends_badly_at_the_stop_is_told() -> None:
    """The exit code is 1 where a last commit failed."""

    async def course(scene: Scene) -> None:
        scene.all_come_up()
        scene.process(2).deaf = True
        scene.workers.stop()
        scene.process(2).ends(1)

    assert play(Scene, course) == 1


def test_one_that_is_late_is_killed() -> None:
    """Beyond its drain and a margin nobody is waited for, and the exit code is 1."""

    async def course(scene: Scene) -> None:
        scene.all_come_up()
        scene.process(1).deaf = True
        scene.workers.stop()
        await asyncio.sleep(STOP_WITHIN_S - 1)
        assert scene.process(1).code is None
        await asyncio.sleep(2)
        assert scene.process(1).code == KILLED

    assert play(Scene, course) == 1


@pytest.mark.parametrize(
    ("code", "said"), [(KILLED, "was killed by SIGKILL"), (1, "ended with exit code 1")]
)
def test_one_that_dies_comes_back(code: int, said: str, caplog: pytest.LogCaptureFixture) -> None:
    """In its own place, told and counted; the others hear nothing of it."""

    async def course(scene: Scene) -> None:
        scene.all_come_up()
        first = scene.process(2)
        first.ends(code)
        await asyncio.sleep(2)
        assert scene.process(2) is not first
        assert scene.process(1).signals == []
        assert scene.value("sluice_worker_restarts_total") == 1
        assert scene.value("sluice_workers") == 2
        scene.workers.stop()

    with caplog.at_level(logging.ERROR):
        assert play(Scene, course) == 0
    assert [line.message for line in caplog.records] == [
        f"worker 2 {said}; it is started again in 1.0 s"
    ]


def test_delays_grow_and_begin_anew() -> None:
    """One that dies at once is started ever more rarely, up to once a minute; one that lived for
    five minutes is started soon."""

    async def course(scene: Scene) -> None:
        scene.all_come_up()
        for _ in range(9):
            scene.process(1).ends(KILLED)
            await asyncio.sleep(60.5)
        starts_s = scene.starts_s(1)
        await asyncio.sleep(STEADY_S)
        scene.process(1).ends(KILLED)
        died_s = asyncio.get_running_loop().time()
        await asyncio.sleep(2)
        assert scene.starts_s(1)[-1] - died_s == pytest.approx(1)
        # Each lived from its start to the next look, 60.5 s after the death before it.
        delays = [start % 60.5 for start in starts_s[1:]]
        assert [round(one) for one in delays] == [1, 2, 4, 8, 16, 32, 60, 60, 60]
        scene.workers.stop()

    assert play(lambda: Scene(1), course) == 0


def test_a_restart_that_fails_is_no_reason_to_end_all() -> None:
    """A broker that is away when a worker comes back ends nobody who is at work."""

    async def course(scene: Scene) -> None:
        scene.all_come_up()
        scene.process(1).ends(KILLED)
        await asyncio.sleep(2)
        scene.process(1).ends(1, CannotRun("no broker"))
        await asyncio.sleep(5)
        assert len(scene.starts_s(1)) == 3
        assert scene.process(2).signals == []
        scene.workers.stop()

    assert play(Scene, course) == 0


@pytest.mark.parametrize("kind", [CannotRun, WrongSettings])
def test_one_that_cannot_run_ends_all(kind: type[Stop]) -> None:
    """What it said is raised, and the others are stopped in order."""

    async def course(scene: Scene) -> None:
        scene.process(2).comes_up()
        scene.process(1).ends(1, kind("There is no topic."))
        await asyncio.sleep(0.01)
        assert scene.process(2).signals == [signal.SIGTERM]

    with pytest.raises(kind, match="There is no topic"):
        play(Scene, course)


@pytest.mark.parametrize("code", [1, KILLED])
def test_one_that_dies_of_its_start_ends_all(code: int) -> None:
    """Without a sentence too, and even where others have come up: nothing is tried for ever."""

    async def course(scene: Scene) -> None:
        scene.process(2).comes_up()
        scene.process(1).ends(code)
        await asyncio.sleep(0.01)
        assert scene.process(2).code == 0

    assert play(Scene, course) == 1


def test_a_catch_up_ends_with_the_last() -> None:
    """One that has caught up is done and not started again; all at 0 make 0."""

    async def course(scene: Scene) -> None:
        scene.all_come_up()
        scene.process(1).ends(0)
        await asyncio.sleep(1000)
        assert scene.process(2).signals == []
        assert scene.workers.seen().keys() == {2}
        scene.process(2).ends(0)

    assert play(lambda: Scene(until_caught_up=True), course) == 0


def test_a_catch_up_that_fails_is_over() -> None:
    """One with an exit code has decided it; the others finish, and the worst one counts."""

    async def course(scene: Scene) -> None:
        scene.all_come_up()
        scene.process(1).ends(1)
        await asyncio.sleep(1000)
        assert len(scene.processes) == 2
        scene.process(2).ends(0)

    assert play(lambda: Scene(until_caught_up=True), course) == 1


def test_a_catch_up_outlives_a_kill() -> None:
    """What a killed one held is finished by the one that comes back."""

    async def course(scene: Scene) -> None:
        scene.all_come_up()
        scene.process(2).ends(0)
        scene.process(1).ends(KILLED)
        await asyncio.sleep(2)
        scene.process(1).comes_up()
        scene.process(1).ends(0)

    assert play(lambda: Scene(until_caught_up=True), course) == 0


@pytest.mark.parametrize(
    ("tallies", "code"),
    [
        ((Tally(3, 3), Tally(0, 0)), 3),
        ((Tally(3, 3), Tally(2, 1)), 0),
        ((Tally(0, 0), Tally(0, 0)), 0),
        ((Tally(3, 3), None), 0),
    ],
)
def test_every_message_rejected_by_all_of_them(
    tallies: tuple[Tally | None, Tally | None], code: int
) -> None:
    """3 where all that they finished together was rejected; not where one did not tell."""

    async def course(scene: Scene) -> None:
        scene.all_come_up()
        for number, tally in enumerate(tallies, 1):
            scene.process(number).tally = tally
            scene.process(number).ends(0)

    assert play(lambda: Scene(until_caught_up=True), course) == code


@pytest.mark.parametrize(
    ("number", "until_caught_up", "code"),
    [
        (signal.SIGTERM, False, 0),
        (signal.SIGTERM, True, 1),
        (signal.SIGHUP, False, 0),
        (signal.SIGINT, False, 130),
        (signal.SIGINT, True, 130),
    ],
)
def test_the_exit_code_of_a_stop(number: signal.Signals, until_caught_up: bool, code: int) -> None:
    """130 for Ctrl-C; 1 where a catch-up was stopped before its end; else 0."""

    async def course(scene: Scene) -> None:
        scene.all_come_up()
        scene.workers.stop(number)

    assert play(lambda: Scene(until_caught_up=until_caught_up), course) == code


def test_a_stop_ends_the_wait_for_a_restart() -> None:
    """Nobody is started any more; the death before it still counts."""

    async def course(scene: Scene) -> None:
        scene.all_come_up()
        scene.process(1).ends(KILLED)
        await asyncio.sleep(0.5)
        scene.workers.stop()
        await asyncio.sleep(0.1)
        assert scene.workers.seen() == {}
        await asyncio.sleep(10)
        assert len(scene.processes) == 2
        assert scene.value("sluice_worker_restarts_total") == 0

    assert play(Scene, course) == 1


def test_a_stop_reaches_one_that_is_being_started() -> None:
    """It is told as soon as there is somebody to tell; one that SIGTERM killed before it could
    listen had done nothing, which is no failure."""

    async def course(scene: Scene) -> None:
        scene.workers.stop()
        await asyncio.sleep(6)
        assert [one.signals for one in scene.processes] == [[signal.SIGTERM]] * 2

    def slow() -> Scene:
        scene = Scene()
        scene.start_takes_s = 5
        return scene

    assert play(slow, course) == 0

    async def killed(scene: Scene) -> None:
        scene.process(1).deaf = True
        scene.workers.stop()
        scene.process(1).ends(TERMINATED)

    assert play(Scene, killed) == 0


def test_an_end_of_the_parent_itself_leaves_nobody() -> None:
    """Cancelled, it leaves no process behind."""

    async def lived() -> Scene:
        scene = Scene()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await scene.workers.run()
        return scene

    assert [one.code for one in virtual_time.run(lived()).processes] == [KILLED] * 2


def test_what_its_pages_ask() -> None:
    """Each by its port, once it has one; one that is being started again is there without."""

    async def course(scene: Scene) -> None:
        scene.process(1).comes_up()
        assert scene.workers.seen() == {1: Worker(5001, True), 2: Worker(None, False)}
        scene.process(1).ends(KILLED)
        await asyncio.sleep(0.5)
        assert scene.workers.seen()[1] == Worker(None, False)
        scene.workers.stop()

    play(Scene, course)


# --- what a worker is told, and tells ---


def test_workers_have_pages_and_names_of_their_own() -> None:
    """Nobody but the parent asks them, and static members don't push each other out."""
    settings = Settings.model_validate({"kafka": {"group_instance_id": "pod-0"}})
    third = of_worker(settings, 3)
    assert (third.telemetry.host, third.telemetry.port) == ("127.0.0.1", 0)
    assert third.kafka.group_instance_id == "pod-0-3"
    assert of_worker(Settings(), 3).kafka.group_instance_id is None
    assert third.limits == settings.limits


def test_a_stop_has_time_for_the_drain() -> None:
    """The drain, one call and a margin, within the chart's grace of 30 s above them."""
    settings = Settings.model_validate({"delivery": {"drain_timeout_s": 50}})
    assert stop_within_s(settings) == 50 + 60 + 25


class Gone:
    """A process that has ended before anybody asked."""

    async def wait(self) -> int:
        return 2


async def test_what_a_worker_says_arrives() -> None:
    """Its port, that it has come up, and why it could not run, with the kind that makes the exit
    code; also what it said just before its end."""
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    process = ChildProcess(Gone(), reader)
    with theirs:
        line = Line(theirs, 2)
        line.listening(4711)
        line.up()
        line.failed(WrongSettings("Set it.\nAnd this."))
    assert await process.ended() == 2
    writer.close()
    assert (process.port, process.up) == (4711, True)
    assert isinstance(process.failure, WrongSettings)
    assert str(process.failure) == "Set it.\nAnd this."


async def test_a_line_held_open_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that a worker has left behind may have inherited it."""
    monkeypatch.setattr(workers, "LAST_WORDS_S", 0.05)
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    with theirs:
        async with asyncio.timeout(5):
            assert await ChildProcess(Gone(), reader).ended() == 2
    writer.close()


async def test_a_worker_is_told_its_settings_and_imports_what_its_parent_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A real process in a folder with modules named as ours and Python's: what it says of its
    settings comes back with the exit code."""
    for name in ("json", "service", "asyncio"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError('a module of the folder')")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "ships.py").write_text("Boat = str")
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    settings = Settings.model_validate({"extraction": {"record": "ships:Ship"}})
    async with started(settings, False, False, 1) as process:
        assert await process.ended() == 2
    assert isinstance(process.failure, WrongSettings)
    assert "has no 'Ship'" in str(process.failure)
    assert not process.up


def test_a_persons_word_holds_for_the_first_process_of_each_worker() -> None:
    """What a later one finds nobody has seen: it waits for another word."""
    once, never = Once(True), Once(False)
    assert [once.of(number) for number in (1, 2, 1, 2, 3)] == [True, True, False, False, True]
    assert not never.of(1)


async def test_a_worker_whose_parent_gives_up_is_killed() -> None:
    """On leaving, its process is gone, whatever it was about."""
    async with started(Settings(), False, False, 1) as process:
        pid = process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_parent_that_is_gone_is_no_error_to_its_worker() -> None:
    """It hears of that by the end of the line."""
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs:
        Line(theirs, 1).up()

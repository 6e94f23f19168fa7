"""The life of the process: build, start, run, stop, in order; signals and the exit code.

A first SIGTERM, SIGINT or SIGHUP stops intake, drains and commits; a second one doesn't wait for
what is in flight. The parts are stopped in the reverse order of their start, each within its own
bound.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from logging import INFO, WARNING
from typing import TYPE_CHECKING, Protocol

from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from service.core.admission.admission import Admission, Limits
from service.core.admission.guard import GuardBounds
from service.core.errors import (
    ALL_REJECTED,
    FAILED,
    INTERRUPTED,
    CannotRun,
    NotReachable,
    Stop,
)
from service.core.events import Event
from service.core.messages import Partition
from service.core.status import Status
from service.kafka.decoding import decoder
from service.kafka.sink import KafkaSink
from service.kafka.source import KafkaSource
from service.llm.cache import cached
from service.llm.extractor import OpenAIExtractor
from service.pipeline import Bounds, Later, Pipeline
from service.settings import RetrySettings, Settings, warnings
from service.signals import stopped_by
from service.telemetry.changes import LOOK_S, TROUBLED, Changes, word
from service.telemetry.gauges import StatusGauges
from service.telemetry.logs import configured
from service.telemetry.metrics import Metrics, expose_process
from service.telemetry.probes import OwnAnswers, Patience, Probes
from service.telemetry.summary import Summary

if TYPE_CHECKING:
    from service.telemetry.tracing import Tracing

log = logging.getLogger(__name__)

PROGRESS_S = 0.2
"""Seconds between two updates of the progress bar."""


GARBAGE_OBJECTS = 50_000
"""How many new objects start a garbage collection. Python's default, 700, starts about one for each
message and takes more than a fifth of the CPU. Only cycles have to be collected, which errors leave
behind; some megabytes of them may now wait for a collection."""


MODEL_WAIT_S = 5.0
"""Seconds between two tries to ask an endpoint that is down which model it has."""


class Parent(Protocol):
    """The parent process, where this one is one of several workers."""

    @property
    def worker(self) -> int:
        """The number of this worker, from 1."""

    def listening(self, port: int) -> None:
        """Tell the parent the port of metrics and probes."""

    def up(self) -> None:
        """Tell the parent that all parts have started."""

    def finished(self, asked: int, rejected: int) -> None:
        """It has ended in order, having finished so many messages, of which it rejected some."""

    def fileno(self) -> int:
        """A file descriptor that becomes readable once the parent is gone."""


def run(
    settings: Settings,
    *,
    until_caught_up: bool = False,
    start_over: bool = False,
    parent: Parent | None = None,
) -> int:
    """Run until a signal, or until caught up; returns the exit code.

    With `start_over`, partitions are read too that would otherwise wait until a person says from
    where. With a `parent`, the run also ends when the parent is gone: no worker outlives it.

    Raises `Stop` (wrong settings, no broker, no topic, refused credentials) with a sentence for
    a person. An unexpected error is logged without texts of messages; the exit code is then 1.
    """
    registry = CollectorRegistry()
    tracing = _tracing(settings)
    trace_id = None if tracing is None else tracing.trace_id
    metrics = Metrics(registry, models=settings.extraction.model, trace_id=trace_id)
    expose_process(registry)
    _look_for_garbage_rarely()
    worker = None if parent is None else parent.worker
    lines_lost = metrics.log_lines_dropped
    with configured(settings.telemetry, metrics.log_line, worker=worker, dropped=lines_lost):
        try:
            app = _App(settings, registry, metrics, tracing, parent, start_over)
            return asyncio.run(app.run(until_caught_up))
        except Exception as error:  # the boundary of the process: no text of a message is printed
            stop = _stop_in(error)
            if stop is not None:
                raise stop from None
            log.critical("ended by an unexpected error", exc_info=True)
            return FAILED


def _tracing(settings: Settings) -> Tracing | None:
    """The tracing, imported only where it is on, because its packages are an extra."""
    if not settings.telemetry.tracing:
        return None
    from service.telemetry.tracing import Tracing

    return Tracing(settings)


def _look_for_garbage_rarely() -> None:
    """Collect garbage rarely, and never look at imported modules: they stay until the end."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS, *gc.get_threshold()[1:])


class _App:
    """All parts of one process, built, started and stopped."""

    def __init__(
        self,
        settings: Settings,
        registry: CollectorRegistry,
        metrics: Metrics,
        tracing: Tracing | None,
        parent: Parent | None,
        start_over: bool,
    ) -> None:
        self._settings, self._metrics, self._tracing = settings, metrics, tracing
        self._parent = parent
        self._summary = Summary()
        admission = Admission(limits(settings), random.uniform)
        self._model = model = OpenAIExtractor(settings, self._observe, admission)
        self._extractor = cached(model, settings.cache, self._observe)
        self._sink = KafkaSink(settings, self._observe)
        self._source = KafkaSource(
            settings, self._observe, self._sink.transactions, start_over=start_over
        )
        self._pipeline = Pipeline(
            self._source,
            self._extractor,
            self._sink,
            decoder(settings.input),
            bounds(settings),
            observe=self._observe,
            uniform=random.uniform,
            wall_clock=time.time,
            streams=model if settings.extraction.streaming else None,
            admission=admission,
            follow=None if tracing is None else tracing.follow,
        )
        registry.register(StatusGauges(self.status))
        self._probes = Probes(
            settings.telemetry.host,
            settings.telemetry.port,
            OwnAnswers(registry, self.status, Patience.of(settings)),
        )
        self._started = False
        self._stopped_by: signal.Signals | None = None

    def status(self) -> Status:
        return self._pipeline.status(self._source.group())

    def _observe(self, event: Event) -> None:
        self._metrics.observe(event)
        self._summary.observe(event)
        if self._tracing is not None:
            self._tracing.observe(event)

    async def run(self, until_caught_up: bool) -> int:
        """Start, work, stop; returns the exit code."""
        if self._parent is None:  # a parent has logged the warnings once for all workers
            for sentence in warnings(self._settings):
                log.warning("%s", sentence)
        with stopped_by(partial(self._signalled, running_task())), self._watched_parent():
            try:
                async with AsyncExitStack() as started:
                    await self._start(started)
                    until = await self._source.ends() if until_caught_up else None
                    self._started = True
                    if self._parent is not None:
                        self._parent.up()
                    committed = await self._work(until)
            except asyncio.CancelledError:
                if self._started:
                    raise
                log.info("stopped by a signal before it had started")
                return self._exit_code(until_caught_up, committed=True)
        log.info("stopped: %s", self._summary)
        problem = self._source.group().problem or self._pipeline.problem
        if until_caught_up and problem is not None:
            raise CannotRun(problem)
        return self._exit_code(until_caught_up, committed)

    def _exit_code(self, until_caught_up: bool, committed: bool) -> int:
        """A worker of several tells its parent what it has finished, and the parent judges it."""
        if self._parent is not None:
            self._parent.finished(self._summary.asked, self._summary.rejected)
        if self._stopped_by is signal.SIGINT:
            return INTERRUPTED
        if not committed:
            return FAILED
        if not until_caught_up:
            return 0
        if self._stopped_by is not None:
            log.warning("stopped before it had caught up: run it again to go on from here")
            return FAILED
        return ALL_REJECTED if self._parent is None and self._summary.all_rejected else 0

    async def _start(self, started: AsyncExitStack) -> None:
        """Start the parts; the stop takes them in the reverse order."""
        await started.enter_async_context(self._probes)
        if self._parent is not None:
            self._parent.listening(self._probes.port)
        if self._tracing is not None:
            started.push_async_callback(self._tracing.stop)
        started.push_async_callback(self._extractor.stop)
        await self._extractor.start()
        await self._ask_the_model()
        started.push_async_callback(self._sink.stop)
        await self._sink.start()
        started.push_async_callback(self._source.stop)
        await self._source.start(self._pipeline)

    async def _ask_the_model(self) -> None:
        """Ask the endpoint for its models. Refused credentials end the start. An outage does not:
        calls wait until it is over; only where the endpoint has to tell the model does the start
        itself wait."""
        while True:
            try:
                warning = await self._extractor.check()
            except NotReachable as failure:
                if self._model.models:
                    log.warning("%s The start goes on; calls wait until it does.", failure)
                    return
                log.warning("%s The start waits for it: extraction.model names no model.", failure)
                await asyncio.sleep(MODEL_WAIT_S)
            else:
                break
        if warning is not None:
            log.warning("%s", warning)

    async def _work(self, until: Mapping[Partition, int] | None) -> bool:
        async with asyncio.TaskGroup() as tasks:
            beside = [
                tasks.create_task(self._metrics.watch(self.status)),
                tasks.create_task(self._source.supervise()),
                tasks.create_task(self._tell_changes()),
            ]
            if until is not None and self._parent is None and sys.stderr.isatty():
                beside.append(tasks.create_task(self._show_progress(until)))
            committed = await self._pipeline.run(until)
            for task in beside:
                task.cancel()
        return committed

    async def _tell_changes(self) -> None:
        """Say in the log what is going on, whenever that is something else than before."""
        changes, loop = Changes(), asyncio.get_running_loop()
        while True:
            status = self.status()
            said = changes.look(status, loop.time())
            if said is not None:
                log.log(WARNING if status.state in TROUBLED else INFO, "%s", said)
            await asyncio.sleep(LOOK_S)

    async def _show_progress(self, until: Mapping[Partition, int]) -> None:
        """Draw the progress bar: how many of the messages that were there at the start have
        finished, in the partitions held."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        first: dict[Partition, int] = {}
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
            task = progress.add_task("messages", total=None)
            while True:
                status = self.status()
                for partition, one in status.partitions.items():
                    if partition in until:
                        first.setdefault(partition, one.next_offset)
                total = sum(max(0, until[partition] - at) for partition, at in first.items())
                progress.update(
                    task,
                    total=total,
                    completed=self._summary.finished,
                    description=word(status),
                )
                await asyncio.sleep(PROGRESS_S)

    # --- signals -------------------------------------------------------------------------------

    @contextmanager
    def _watched_parent(self) -> Iterator[None]:
        """Stop as with SIGTERM once the parent is gone."""
        if self._parent is None:
            yield
            return
        loop, line = asyncio.get_running_loop(), self._parent.fileno()
        loop.add_reader(line, self._left_alone, running_task())
        try:
            yield
        finally:
            loop.remove_reader(line)

    def _left_alone(self, running: asyncio.Task[object]) -> None:
        assert self._parent is not None, "nobody else is listened to"
        asyncio.get_running_loop().remove_reader(self._parent.fileno())
        log.warning("the process that had started this worker is gone")
        if not self._pipeline.stopping:
            self._signalled(running, signal.SIGTERM)

    def _signalled(self, running: asyncio.Task[object], number: signal.Signals) -> None:
        if not self._started:
            self._stopped_by = number
            running.cancel()
        elif not self._pipeline.stopping:
            self._stopped_by = number
            log.info("stopping: finishing what is in flight; a second signal does not wait for it")
            self._pipeline.stop()
        else:
            log.warning("stopping at once")
            self._pipeline.force()


def running_task() -> asyncio.Task[object]:
    """The task that runs this very line."""
    task = asyncio.current_task()
    assert task is not None, "runs inside a task"
    return task


def bounds(settings: Settings) -> Bounds:
    """The pipeline's bounds, from the settings."""
    extraction, delivery = settings.extraction, settings.delivery
    return Bounds(
        concurrency=settings.limits.concurrency,
        window=settings.window,
        window_bytes=settings.limits.window_bytes,
        ordering=delivery.ordering,
        attempts_max=extraction.attempts_max,
        call_deadline_s=extraction.calls_max * extraction.call_timeout_s + settings.cache.waits_s,
        commit_interval_s=delivery.commit_interval_s,
        drain_timeout_s=delivery.drain_timeout_s,
        rebalance_drain_s=delivery.rebalance_drain_s,
        guard=GuardBounds(**settings.dead_letters.guard.model_dump()),
        later=_later(settings.retries),
        message_timeout_s=extraction.message_timeout_s,
        hedge_after_s=extraction.hedge_after_s,
    )


def limits(settings: Settings) -> Limits:
    """Admission's limits, from the settings."""
    return Limits(
        slots=settings.limits.concurrency,
        requests_per_minute=settings.limits.requests_per_minute,
        tokens_per_minute=settings.limits.tokens_per_minute,
        spend_usd_per_hour=settings.limits.spend_usd_per_hour,
    )


def _later(retries: RetrySettings) -> Later | None:
    return None if retries.topic is None else Later(retries.delay_s, retries.attempts_max)


def _stop_in(error: BaseException) -> Stop | None:
    """The `Stop` inside an error, also inside the groups of task groups; None: there is none."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(_stop_in, error.exceptions)), None)
    return error if isinstance(error, Stop) else None

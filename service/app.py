"""The life of the process: build, start, run, stop, in order; signals and the exit code.

A first SIGTERM or SIGINT stops intake, drains and commits; a second one doesn't wait for what is
in flight. The parts are stopped in the reverse order of their start, each within its own bound.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from typing import TYPE_CHECKING, Protocol

from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from service.core.admission.admission import Admission, Limits
from service.core.admission.guard import GuardBounds
from service.core.errors import CannotRun, NotReachable, Stop
from service.core.events import Called, Event, Finished, Streamed
from service.core.messages import Partition
from service.core.status import Status
from service.kafka.decoding import decoder
from service.kafka.sink import KafkaSink
from service.kafka.source import KafkaSource
from service.llm.cache import cached
from service.llm.extractor import OpenAIExtractor
from service.pipeline import Bounds, Later, Pipeline
from service.settings import RetrySettings, Settings, warnings
from service.telemetry.gauges import StatusGauges
from service.telemetry.logs import configured
from service.telemetry.metrics import Metrics, expose_process
from service.telemetry.probes import OwnAnswers, Patience, Probes

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
    with configured(settings.telemetry, metrics.log_line, worker=worker):
        try:
            app = _App(settings, registry, metrics, tracing, parent, start_over)
            return asyncio.run(app.run(until_caught_up))
        except Exception as error:  # the boundary of the process: no text of a message is printed
            stop = _stop_in(error)
            if stop is not None:
                raise stop from None
            log.critical("ended by an unexpected error", exc_info=True)
            return 1


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
        self._summary = _Summary()
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

    def status(self) -> Status:
        return self._pipeline.status(self._source.group())

    def _observe(self, event: Event) -> None:
        self._metrics.observe(event)
        self._summary.observe(event)
        if self._tracing is not None:
            self._tracing.observe(event)

    async def run(self, until_caught_up: bool) -> int:
        """Start, work, stop; returns 0, or 1 where the last commit failed."""
        if self._parent is None:  # a parent has logged the warnings once for all workers
            for sentence in warnings(self._settings):
                log.warning("%s", sentence)
        with self._signals():
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
                return 0
        log.info("stopped: %s", self._summary)
        problem = self._source.group().problem or self._pipeline.problem
        if until_caught_up and problem is not None:
            raise CannotRun(problem)
        return 0 if committed else 1

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
            ]
            if until is not None and self._parent is None and sys.stderr.isatty():
                beside.append(tasks.create_task(self._show_progress(until)))
            committed = await self._pipeline.run(until)
            for task in beside:
                task.cancel()
        return committed

    async def _show_progress(self, until: Mapping[Partition, int]) -> None:
        """Draw the progress bar: how many of the messages that were there at the start have
        finished, in the partitions held."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        first: dict[Partition, int] = {}
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
            task = progress.add_task("messages", total=None)
            while True:
                for partition, one in self.status().partitions.items():
                    if partition in until:
                        first.setdefault(partition, one.next_offset)
                total = sum(max(0, until[partition] - at) for partition, at in first.items())
                progress.update(task, total=total, completed=self._summary.finished)
                await asyncio.sleep(PROGRESS_S)

    # --- signals -------------------------------------------------------------------------------

    @contextmanager
    def _signals(self) -> Iterator[None]:
        loop, running = asyncio.get_running_loop(), asyncio.current_task()
        assert running is not None, "runs inside a task"
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, running)
        if self._parent is not None:
            loop.add_reader(self._parent.fileno(), self._left_alone, running)
        try:
            yield
        finally:
            if self._parent is not None:
                loop.remove_reader(self._parent.fileno())
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _left_alone(self, running: asyncio.Task[object]) -> None:
        assert self._parent is not None, "nobody else is listened to"
        asyncio.get_running_loop().remove_reader(self._parent.fileno())
        log.warning("the process that had started this worker is gone")
        if not self._pipeline.stopping:
            self._signalled(running)

    def _signalled(self, running: asyncio.Task[object]) -> None:
        if not self._started:
            running.cancel()
        elif not self._pipeline.stopping:
            log.info("stopping: finishing what is in flight; a second signal does not wait for it")
            self._pipeline.stop()
        else:
            log.warning("stopping at once")
            self._pipeline.force()


class _Summary:
    """Counts for the last log line of a run."""

    def __init__(self) -> None:
        self._outcomes: Counter[str] = Counter()
        self._records = self._calls = self._tokens_input = self._tokens_output = 0
        self._cost_usd, self._unpriced = 0.0, 0

    @property
    def finished(self) -> int:
        return self._outcomes.total()

    def observe(self, event: Event) -> None:
        if isinstance(event, Finished):
            self._outcomes[event.outcome] += 1
            self._records += event.records
        elif isinstance(event, Streamed):
            self._records += event.records
        elif isinstance(event, Called):
            self._calls += 1
            self._tokens_input += event.tokens_input
            self._tokens_output += event.tokens_output
            self._cost_usd += event.cost_usd or 0.0
            self._unpriced += event.cost_usd is None

    def __str__(self) -> str:
        outcomes = ", ".join(f"{count} {word}" for word, count in self._outcomes.items())
        return (
            f"{self.finished} messages finished ({outcomes or 'none'}), {self._records} records, "
            f"{self._calls} calls, {self._tokens_input} tokens in, {self._tokens_output} out, "
            f"{self._money()}"
        )

    def _money(self) -> str:
        spent = f"{self._cost_usd:.4f} USD"
        if not self._unpriced:
            return spent
        return f"{spent} and {self._unpriced} calls whose price is not known (set prices)"


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

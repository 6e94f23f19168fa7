"""Every counter and histogram, once: its name, labels, unit and meaning.

They count events; gauges.py reads the status when it is scraped. Rules of this file: names are a
contract (tests/data/metrics.txt) and begin with `sluice_`; units are seconds and bytes. Labels come
from closed sets, and each value has its series from the first scrape on, so that a rate starts at
the first event. A help text says what the figure means and, where it asks for something, what to
do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeAlias, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

from service.core.events import (
    Abandoned,
    Admitted,
    CacheLooked,
    CacheLookup,
    CacheSized,
    CacheWrite,
    CacheWritten,
    Called,
    CallResult,
    Client,
    ClientReplaced,
    Committed,
    Dropped,
    Event,
    Finished,
    ForeignMetadata,
    Hedged,
    OffsetsMissing,
    OutcomeWord,
    PublishRetried,
    Purpose,
    Rebalanced,
    Repair,
    Repaired,
    Retried,
    Spared,
    StopForced,
    Streamed,
    Taken,
)
from service.core.messages import Reason
from service.core.status import Status

OUTCOMES: tuple[OutcomeWord, ...] = get_args(OutcomeWord)
COMMITS = ("ok", "refused", "failed")
HEDGES_WON = ("first", "second", "none")
CALL_RESULTS: tuple[CallResult, ...] = get_args(CallResult)
CLIENTS: tuple[Client, ...] = get_args(Client)
CACHE_LOOKUPS: tuple[CacheLookup, ...] = get_args(CacheLookup)
CACHE_WRITES: tuple[CacheWrite, ...] = get_args(CacheWrite)
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
REPAIRS: tuple[Repair, ...] = get_args(Repair)

ANSWERED = frozenset(
    {"validated", "unsure", "invalid", "refused", "filtered", "truncated", "user_code"}
)
"""Results for which the model has written an answer. The durations of the others say nothing about
the model."""

RETRY_REASONS = (
    *("rate_limited", "overloaded", "timeout", "connection", "server_error", "broken_answer"),
    *("credentials", "permission", "quota", "account", "region", "model", "endpoint", "setting"),
    "unclear",
)
OTHER = "other"
"""The label's value for a reason that is not in the closed set; else each new text would make a new
series."""

QUEUE_EDGES_S = (0.001, 0.005, 0.025, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
CALL_EDGES_S = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 60, 120)
"""From a small local model's call to a long answer with reasoning. Where most calls lie, an edge is
about a third above the one before."""
PUBLISH_EDGES_S = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
END_TO_END_EDGES_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900, 3600, 14400, 86400)
"""They reach up to a day, because the messages of a backlog are that old. 300 must be an edge: it
is the objective of the freshness alerts (deploy/prometheus)."""
REBALANCE_EDGES_S = (0.1, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120)
LOOP_EDGES_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)

SAMPLE_S = 0.5
"""Seconds between two samples of `watch`. Each walks the whole window, so they are not taken more
often; faster changes average out."""

TraceId: TypeAlias = Callable[[], str | None]
"""Returns the id of the trace that the calling task belongs to; None: no trace is recorded."""

Handlers: TypeAlias = Mapping[type[Event], Callable[[Any], None]]
"""The function that counts an event, by the event's type."""

_LOG_LEVELS = ("warning", "error")


class Metrics:
    """Counters and histograms of one process; other parts get `observe` as their `Observe`."""

    def __init__(
        self,
        registry: CollectorRegistry,
        models: Iterable[str] = (),
        trace_id: TraceId | None = None,
    ) -> None:
        """`trace_id` makes exemplars: it is asked when a call has ended, in the call's task."""
        # The library's `_created` series would double the number of ours and tell only when this
        # process started.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        series = _Series(registry)
        messages, kafka = _MessageSeries(series), _KafkaSeries(series)
        calls, cache = _CallSeries(series, models, trace_id), _CacheSeries(series)
        self._by_type = {
            **messages.handlers,
            **calls.handlers,
            **kafka.handlers,
            **cache.handlers,
        }
        self._slots_busy_s = series.counter(
            "sluice_slots_busy_seconds",
            "Seconds for which slots were in use, summed over all slots; its rate divided by "
            "sluice_slots is the utilisation.",
        )
        self._window_full_s = series.counter(
            "sluice_window_full_seconds",
            "Seconds with a full window; where slots are idle meanwhile, enlarge limits.window.",
        )
        self._log_lines = series.counters(
            "sluice_log_lines", "Lines logged as a warning or an error.", "level", _LOG_LEVELS
        )
        self._log_lines_dropped = series.counter(
            "sluice_log_lines_dropped",
            "Log lines that were not written because nobody read stderr in time, or because it is "
            "closed. Let something read the pipe; the service does not wait for it.",
        )
        self._loop_delay = series.histogram(
            "sluice_event_loop_delay_seconds",
            "Seconds by which the event loop is late for a timer. Above 0.1 the process has too "
            "little CPU or something blocks it: set fewer slots or more workers.",
            LOOP_EDGES_S,
        )
        self._tasks = Gauge(
            "sluice_tasks",
            "Tasks of the event loop, sampled: about one for each message in the window and a few "
            "dozen more. Where it grows without end, it is a fault of ours.",
            registry=series.registry,
        )
        build = Info("sluice_build", "The version that runs.", registry=series.registry)
        build.info({"version": _version()})

    def observe(self, event: Event) -> None:
        """Count one event."""
        self._by_type[type(event)](event)

    def log_line(self, level: str) -> None:
        """Count a line that was logged as a warning or an error."""
        self._log_lines[level].inc()

    def log_lines_dropped(self, lines: int) -> None:
        """Count lines that could not be written."""
        self._log_lines_dropped.inc(lines)

    async def watch(self, status: Callable[[], Status]) -> None:
        """Sample until cancelled: the event loop's delay and tasks, busy slots and the full window
        over time."""
        loop = asyncio.get_running_loop()
        before_s = loop.time()
        while True:
            await asyncio.sleep(SAMPLE_S)
            now_s = loop.time()
            self._sampled(now_s - before_s, status())
            self._tasks.set(len(asyncio.all_tasks()))
            before_s = now_s

    def _sampled(self, elapsed_s: float, status: Status) -> None:
        self._loop_delay.observe(max(0.0, elapsed_s - SAMPLE_S))
        self._slots_busy_s.inc(elapsed_s * status.slots_busy)
        if status.window_full:
            self._window_full_s.inc(elapsed_s)


class _Series:
    """Makes series in one registry; each exists from the first scrape on."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

    def counter(self, name: str, meaning: str) -> Counter:
        return Counter(name, meaning, registry=self.registry)

    def counters(
        self, name: str, meaning: str, label: str, values: Iterable[str]
    ) -> dict[str, Counter]:
        """One series for each value of the label, at 0. They are made now, so that counting looks
        up no labels."""
        parent = Counter(name, meaning, (label,), registry=self.registry)
        return {value: parent.labels(value) for value in values}

    def histogram(self, name: str, meaning: str, edges: tuple[float, ...]) -> Histogram:
        return Histogram(name, meaning, buckets=edges, registry=self.registry)


class _MessageSeries:
    """The series about messages, from the poll to the acknowledgement."""

    def __init__(self, series: _Series) -> None:
        self._messages_taken = series.counter(
            "sluice_messages_taken", "Messages that came into the window."
        )
        self._bytes_taken = series.counter(
            "sluice_messages_taken_bytes",
            "Bytes of keys and values of the messages that came into the window.",
        )
        self._messages_dropped = series.counter(
            "sluice_messages_dropped",
            "Fetched messages that were not taken: they were known already, or fetched under an "
            "older assignment. Some at each rebalance are normal.",
        )
        self._messages_spared = series.counter(
            "sluice_messages_spared",
            "Fetched messages that an earlier holder of the partition had finished, according to "
            "its completed map: they are not called and paid for again.",
        )
        self._metadata_foreign = series.counter(
            "sluice_metadata_foreign",
            "Partitions taken over with metadata that is damaged or not ours. Only the offset is "
            "used, and messages that had finished beyond it are repeated.",
        )
        self._messages_finished = series.counters(
            "sluice_messages_finished",
            "Messages whose outcome Kafka has acknowledged, by outcome (skipped: they needed no "
            "acknowledgement; postponed: they wait in the retry topic).",
            "outcome",
            OUTCOMES,
        )
        self._messages_rejected = series.counters(
            "sluice_messages_rejected",
            "Messages that went to the dead letter topic, by reason; each dead letter says more.",
            "reason",
            [reason.value for reason in Reason],
        )
        self._records_published = series.counter(
            "sluice_records_published", "Records acknowledged in the output topic."
        )
        self._messages_missing = series.counter(
            "sluice_messages_missing",
            "Offsets that retention deleted before they were read. Their messages are lost for "
            "this group: lengthen retention.ms of the input topic or add workers.",
        )
        self._queue_wait = series.histogram(
            "sluice_queue_wait_seconds",
            "Seconds that a message waited in the queue for its slot; it grows where slots or "
            "limits are too few.",
            QUEUE_EDGES_S,
        )
        self._first_record = series.histogram(
            "sluice_first_record_seconds",
            "With extraction.streaming: seconds from the beginning of an attempt to the "
            "acknowledgement of its first record.",
            CALL_EDGES_S,
        )
        self._lane_wait = series.histogram(
            "sluice_lane_wait_seconds",
            "Seconds from a message's outcome to its hand-over to the producer: the price of "
            "order. It grows behind slow messages of the same key; see delivery.ordering.",
            QUEUE_EDGES_S,
        )
        self._end_to_end = series.histogram(
            "sluice_end_to_end_seconds",
            "Seconds from a message's own timestamp to the acknowledgement of its outcome.",
            END_TO_END_EDGES_S,
        )
        self._publish_duration = series.histogram(
            "sluice_publish_duration_seconds",
            "Seconds from an outcome's hand-over to the producer to the acknowledgement of all "
            "replicas.",
            PUBLISH_EDGES_S,
        )
        self.handlers: Handlers = {
            Taken: self._taken,
            Dropped: self._dropped,
            Spared: self._spared,
            ForeignMetadata: self._foreign_metadata,
            Admitted: self._admitted,
            Finished: self._finished,
            Streamed: self._streamed,
            OffsetsMissing: self._offsets_missing,
        }

    def _taken(self, event: Taken) -> None:
        self._messages_taken.inc(event.messages)
        self._bytes_taken.inc(event.size_bytes)

    def _dropped(self, event: Dropped) -> None:
        self._messages_dropped.inc(event.messages)

    def _spared(self, event: Spared) -> None:
        self._messages_spared.inc(event.messages)

    def _foreign_metadata(self, _: ForeignMetadata) -> None:
        self._metadata_foreign.inc()

    def _admitted(self, event: Admitted) -> None:
        self._queue_wait.observe(event.waited_s)

    def _finished(self, event: Finished) -> None:
        self._messages_finished[event.outcome].inc()
        self._end_to_end.observe(max(0.0, event.end_to_end_s))
        self._lane_wait.observe(event.lane_wait_s)
        self._records_published.inc(event.records)
        if event.reason is not None:
            self._messages_rejected[event.reason.value].inc()
        if event.outcome != "skipped":
            self._publish_duration.observe(event.publish_s)

    def _streamed(self, event: Streamed) -> None:
        self._records_published.inc(event.records)
        if event.first_after_s is not None:
            self._first_record.observe(event.first_after_s)

    def _offsets_missing(self, event: OffsetsMissing) -> None:
        self._messages_missing.inc(event.messages)


class _CallSeries:
    """Calls to the model, their cost, retries, hedges and repaired answers."""

    def __init__(self, series: _Series, models: Iterable[str], trace_id: TraceId | None) -> None:
        self._trace_id = trace_id
        self._models: dict[str, _ModelSeries] = {}
        self._calls = Counter(
            "sluice_calls",
            "Calls to the model that ended, by result; re-asks are calls too.",
            ("model", "result"),
            registry=series.registry,
        )
        self._reasks = Counter(
            "sluice_reasks",
            "Calls that told the model why its answer did not validate. Many of them show that the "
            "schema or the instructions ask too much of the model.",
            ("model",),
            registry=series.registry,
        )
        self._tokens = Counter(
            "sluice_tokens",
            "Tokens as the endpoint counts them, those of failed calls included where it tells "
            "them. Input includes cached, output includes reasoning.",
            ("model", "type"),
            registry=series.registry,
        )
        self._cost = Counter(
            "sluice_cost_usd",
            "US dollars that calls cost, by purpose: a message's first call (first), after an "
            "answer that did not validate (reask), that may have been charged but never arrived "
            "(repeat) or that was truncated at its limit (longer), with a shorter text after one "
            "that exceeded the context (shorter), to a stronger model (next_model).",
            ("model", "purpose"),
            registry=series.registry,
        )
        self._cost_unknown = Counter(
            "sluice_cost_unknown_calls",
            "Calls that are not in sluice_cost_usd_total: either no price is known for the model "
            "(set it in prices), or the endpoint did not tell the tokens.",
            ("model",),
            registry=series.registry,
        )
        self._call_duration = Histogram(
            "sluice_call_duration_seconds",
            "Seconds of one call, from sending to the last byte. answered=false: errors and "
            "timeouts, kept apart because they say nothing about the model's speed.",
            ("model", "answered"),
            buckets=CALL_EDGES_S,
            registry=series.registry,
        )
        self._retries = series.counters(
            "sluice_retries",
            "Failed attempts after which a message waits for another one or is given up, by "
            "reason.",
            "reason",
            (*RETRY_REASONS, OTHER),
        )
        self._repaired_by = series.counters(
            "sluice_answers_repaired",
            "Answers that had another form than we asked for and were read all the same, by what "
            "was unusual: a byte order mark (bom), reasoning before the JSON (thoughts), a code "
            "fence (fence), text around the JSON (prose), content as a list of parts (parts), JSON "
            "in the content where a tool call was asked for (content) or the reverse (tool_call), "
            "several tool calls (calls), an object in the place of JSON text (object). Where there "
            "are many, another extraction.mode may suit the endpoint better.",
            "how",
            REPAIRS,
        )
        self._calls_abandoned = series.counter(
            "sluice_calls_abandoned",
            "Calls that were cut off at the end of a drain and may be paid for again; lengthen "
            "delivery.drain_timeout_s.",
        )
        self._hedges = series.counters(
            "sluice_hedges",
            "Second calls for messages whose first call took longer than "
            "extraction.hedge_after_s, by which call was answered first. Where the first one wins "
            "often, hedge_after_s is too short.",
            "won",
            HEDGES_WON,
        )
        for model in models:
            self._of_model(model)
        self.handlers: Handlers = {
            Called: self._called,
            Repaired: self._repaired,
            Retried: self._retried,
            Abandoned: self._abandoned,
            Hedged: self._hedged,
        }

    def _of_model(self, model: str) -> _ModelSeries:
        if model not in self._models:
            self._models[model] = _ModelSeries(
                model,
                self._calls,
                self._reasks,
                self._tokens,
                self._call_duration,
                self._cost,
                self._cost_unknown,
            )
        return self._models[model]

    def _called(self, event: Called) -> None:
        trace_id = self._trace_id() if self._trace_id is not None else None
        exemplar = None if trace_id is None else {"trace_id": trace_id}
        self._of_model(event.model).called(event, exemplar)

    def _repaired(self, event: Repaired) -> None:
        self._repaired_by[event.how].inc()

    def _retried(self, event: Retried) -> None:
        known = event.reason in self._retries
        self._retries[event.reason if known else OTHER].inc()

    def _abandoned(self, event: Abandoned) -> None:
        self._calls_abandoned.inc(event.calls)

    def _hedged(self, event: Hedged) -> None:
        self._hedges[event.won].inc()


class _KafkaSeries:
    """The series about publishing, commits, rebalances and Kafka clients."""

    def __init__(self, series: _Series) -> None:
        self._publish_retries = series.counter(
            "sluice_publish_retries", "Sends that were not acknowledged and are tried again."
        )
        self._commits = series.counters(
            "sluice_commits",
            "Commits of next offsets, by result; refused: a rebalance came first, which is no "
            "fault.",
            "result",
            COMMITS,
        )
        self._commit_duration = series.histogram(
            "sluice_commit_duration_seconds",
            "Seconds of one commit, failed ones included.",
            PUBLISH_EDGES_S,
        )
        self._rebalances = series.counter(
            "sluice_rebalances", "Assignments of partitions to this worker, also of none."
        )
        self._partitions_assigned = series.counters(
            "sluice_partitions_assigned",
            "Partitions assigned; kept: held before, with running calls; new: read from the stored "
            "offset.",
            "progress",
            ("kept", "new"),
        )
        self._rebalance_duration = series.histogram(
            "sluice_rebalance_duration_seconds",
            "Seconds from the loss of the old partitions to the first poll of the new ones.",
            REBALANCE_EDGES_S,
        )
        self._clients_replaced = series.counters(
            "sluice_clients_replaced",
            "Kafka clients that were replaced because they failed or were silent; the log says "
            "why. Where it repeats, something between here and the brokers is wrong.",
            "client",
            CLIENTS,
        )
        self._stops_forced = series.counters(
            "sluice_stops_forced",
            "Kafka clients that did not close in time and were cut off. A consumer that was cut "
            "off keeps its partitions until its session times out.",
            "client",
            CLIENTS,
        )
        self.handlers: Handlers = {
            PublishRetried: self._publish_retried,
            Committed: self._committed,
            Rebalanced: self._rebalanced,
            ClientReplaced: self._client_replaced,
            StopForced: self._stop_forced,
        }

    def _publish_retried(self, _: PublishRetried) -> None:
        self._publish_retries.inc()

    def _committed(self, event: Committed) -> None:
        self._commits[event.result].inc()
        self._commit_duration.observe(event.duration_s)

    def _rebalanced(self, event: Rebalanced) -> None:
        self._rebalances.inc()
        self._partitions_assigned["kept"].inc(event.kept)
        self._partitions_assigned["new"].inc(event.assigned - event.kept)
        self._rebalance_duration.observe(event.duration_s)

    def _client_replaced(self, event: ClientReplaced) -> None:
        self._clients_replaced[event.client].inc()

    def _stop_forced(self, event: StopForced) -> None:
        self._stops_forced[event.client].inc()


class _CacheSeries:
    """The series about the result cache."""

    def __init__(self, series: _Series) -> None:
        self._cache_lookups = series.counters(
            "sluice_cache_lookups",
            "Lookups of a text's answer. hit: no call was needed; shared: the message waited for a "
            "running call for the same text; error: the store failed or is left alone for a while; "
            "damaged: the stored answer was not usable. After miss, error and damaged a call is "
            "paid for.",
            "result",
            CACHE_LOOKUPS,
        )
        self._cache_writes = series.counters(
            "sluice_cache_writes",
            "Answers that were to be stored in the result cache; error: the store failed.",
            "result",
            CACHE_WRITES,
        )
        self._cache_entries = Gauge(
            "sluice_cache_entries",
            "Answers in this process's memory (cache.mode memory), expired ones included.",
            registry=series.registry,
        )
        self._cache_bytes = Gauge(
            "sluice_cache_bytes",
            "Bytes of the answers in this process's memory; at cache.memory_max_bytes the least "
            "recently used answers are removed.",
            registry=series.registry,
        )
        self.handlers: Handlers = {
            CacheLooked: self._cache_looked,
            CacheWritten: self._cache_written,
            CacheSized: self._cache_sized,
        }

    def _cache_looked(self, event: CacheLooked) -> None:
        self._cache_lookups[event.result].inc()

    def _cache_written(self, event: CacheWritten) -> None:
        self._cache_writes[event.result].inc()

    def _cache_sized(self, event: CacheSized) -> None:
        self._cache_entries.set(event.entries)
        self._cache_bytes.set(event.size_bytes)


class _ModelSeries:
    """The series of one model; its labels are looked up once."""

    def __init__(
        self,
        model: str,
        calls: Counter,
        reasks: Counter,
        tokens: Counter,
        duration: Histogram,
        cost: Counter,
        cost_unknown: Counter,
    ) -> None:
        self._calls = {result: calls.labels(model, result) for result in CALL_RESULTS}
        self._reasks = reasks.labels(model)
        self._tokens_input = tokens.labels(model, "input")
        self._tokens_output = tokens.labels(model, "output")
        self._tokens_cached = tokens.labels(model, "cached")
        self._tokens_reasoning = tokens.labels(model, "reasoning")
        self._cost = {purpose: cost.labels(model, purpose) for purpose in PURPOSES}
        self._cost_unknown = cost_unknown.labels(model)
        self._answered = duration.labels(model, "true")
        self._failed = duration.labels(model, "false")

    def called(self, event: Called, exemplar: dict[str, str] | None) -> None:
        self._calls[event.result].inc()
        self._tokens_input.inc(event.tokens_input)
        self._tokens_output.inc(event.tokens_output)
        self._tokens_cached.inc(event.tokens_cached)
        self._tokens_reasoning.inc(event.tokens_reasoning)
        if event.cost_usd is None:
            self._cost_unknown.inc()
        else:
            self._cost[event.purpose].inc(event.cost_usd)
        if event.reask:
            self._reasks.inc()
        duration = self._answered if event.result in ANSWERED else self._failed
        duration.observe(event.duration_s, exemplar)


class WorkerMetrics:
    """The metrics of the parent of several workers; with one worker there is no parent and none of
    these."""

    def __init__(self, registry: CollectorRegistry) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.running = Gauge(
            "sluice_workers",
            "Workers that run now; absent with one worker.",
            registry=registry,
        )
        self.restarts = Counter(
            "sluice_worker_restarts",
            "Workers that died and were started again; the log says how they ended. Absent with "
            "one worker.",
            registry=registry,
        )


def expose_process(registry: CollectorRegistry) -> None:
    """Add the process's memory, CPU and file descriptors, and Python's version and collector."""
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)


def _version() -> str:
    try:
        return version("kafka-sluice")
    except PackageNotFoundError:
        return "unknown"  # run from a checkout that is not installed

"""Metrics: their names, that each event moves the right ones, and gauges that follow the status."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from service.core.events import (
    Abandoned,
    Admitted,
    CacheLooked,
    CacheSized,
    CacheWritten,
    Called,
    CallResult,
    ClientReplaced,
    Committed,
    Dropped,
    Event,
    Finished,
    ForeignMetadata,
    Hedged,
    OffsetsMissing,
    PublishRetried,
    Rebalanced,
    Repaired,
    Retried,
    Spared,
    StopForced,
    Streamed,
    Taken,
)
from service.core.messages import Partition, Reason
from service.core.status import GroupStatus, PartitionStatus, State, Status
from service.telemetry.gauges import StatusGauges
from service.telemetry.metrics import (
    CALL_EDGES_S,
    END_TO_END_EDGES_S,
    SAMPLE_S,
    Metrics,
    TraceId,
    WorkerMetrics,
    expose_process,
)

GOLDEN = Path(__file__).parents[1] / "data" / "metrics.txt"

STATUS = Status(
    state=State.RUNNING,
    slots=50,
    slots_busy=49,
    window=200,
    window_messages=180,
    window_full=False,
    window_bytes=9000,
    queued=100,
    retrying=1,
    waiting_in_lane=20,
    publishing=10,
    poll_turn_age_s=0.5,
    call_overdue_s=0.0,
    not_ready=(),
    group=GroupStatus(
        settled=True,
        unsettled_s=0.0,
        broker_answers=True,
        look_age_s=4.0,
        topic_partitions={"texts": 6},
    ),
    partitions={
        Partition("texts", 0): PartitionStatus(7, 13, 5, 1_769_839_200_500, map_ratio=0.5),
        Partition("texts", 1): PartitionStatus(3, None, 0, None),
    },
)


class Bench:
    """Metrics on a registry of their own, and what a scrape would show of several workers: of each
    its own, of their parent the few that are the parent's."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry, models=("small",))
        self.workers = WorkerMetrics(self.registry)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    def moved(self, *events: Event) -> dict[str, float]:
        """The samples that `events` changed, and by how much; without histograms' edges."""
        before = self._samples()
        for event in events:
            self.metrics.observe(event)
        after = self._samples()
        return {
            name: value - before.get(name, 0.0)
            for name, value in after.items()
            if value != before.get(name, 0.0)
        }

    def _samples(self) -> dict[str, float]:
        return {
            sample.name + "".join(f" {key}={value}" for key, value in sample.labels.items()): float(
                sample.value
            )
            for family in self.registry.collect()
            for sample in family.samples
            if not sample.name.endswith("_bucket")
        }


@pytest.fixture
def bench() -> Bench:
    return Bench()


def golden(registry: CollectorRegistry) -> Iterator[str]:
    """A line for each metric: name, type, labels, meaning."""
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        labels = sorted({key for sample in family.samples for key in sample.labels} - {"le"})
        yield f"{family.name} | {family.type} | {','.join(labels) or '-'} | {family.documentation}"


def test_names_are_a_contract(bench: Bench) -> None:
    """Names, types, labels and meanings are those of tests/data/metrics.txt: dashboards, alerts
    and readers of /metrics stand on them."""
    bench.registry.register(StatusGauges(lambda: STATUS))
    expected = [line for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    assert sorted(golden(bench.registry)) == expected


def test_one_worker_alone_has_no_parents_metrics() -> None:
    """What is counted of workers is not there, not even as 0, where nobody counts them."""
    registry = CollectorRegistry()
    Metrics(registry)
    registry.register(StatusGauges(lambda: STATUS))
    assert not [family for family in registry.collect() if "sluice_worker" in family.name]


def test_names_follow_the_conventions(bench: Bench) -> None:
    """Prefix, base units, a meaning that ends like a sentence."""
    bench.registry.register(StatusGauges(lambda: STATUS))
    for family in bench.registry.collect():
        assert family.name.startswith("sluice_")
        assert not family.name.endswith(("_ms", "_milliseconds", "_total", "_count"))
        assert family.documentation.endswith(".")


ABANDONED = Abandoned(calls=3)

MOVES: list[tuple[Event, dict[str, float]]] = [
    (
        Taken(messages=5, size_bytes=900),
        {"sluice_messages_taken_total": 5, "sluice_messages_taken_bytes_total": 900},
    ),
    (Dropped(messages=2), {"sluice_messages_dropped_total": 2}),
    (
        Admitted(waited_s=0.25),
        {"sluice_queue_wait_seconds_count": 1, "sluice_queue_wait_seconds_sum": 0.25},
    ),
    (
        Called(
            model="small",
            result="validated",
            duration_s=1.5,
            tokens_input=100,
            tokens_output=20,
            tokens_cached=40,
            tokens_reasoning=5,
            cost_usd=0.25,
            purpose="next_model",
        ),
        {
            "sluice_calls_total model=small result=validated": 1,
            "sluice_tokens_total model=small type=input": 100,
            "sluice_tokens_total model=small type=output": 20,
            "sluice_tokens_total model=small type=cached": 40,
            "sluice_tokens_total model=small type=reasoning": 5,
            "sluice_cost_usd_total model=small purpose=next_model": 0.25,
            "sluice_call_duration_seconds_count model=small answered=true": 1,
            "sluice_call_duration_seconds_sum model=small answered=true": 1.5,
        },
    ),
    (
        Called(model="small", result="unsure", duration_s=0.5, cost_usd=None),
        {
            "sluice_calls_total model=small result=unsure": 1,
            "sluice_cost_unknown_calls_total model=small": 1,
            "sluice_call_duration_seconds_count model=small answered=true": 1,
            "sluice_call_duration_seconds_sum model=small answered=true": 0.5,
        },
    ),
    (
        Called(model="small", result="rate_limited", duration_s=0.5, reask=True),
        {
            "sluice_calls_total model=small result=rate_limited": 1,
            "sluice_reasks_total model=small": 1,
            "sluice_call_duration_seconds_count model=small answered=false": 1,
            "sluice_call_duration_seconds_sum model=small answered=false": 0.5,
        },
    ),
    (Repaired("fence"), {"sluice_answers_repaired_total how=fence": 1}),
    (Retried(reason="overloaded"), {"sluice_retries_total reason=overloaded": 1}),
    (Retried(reason="never heard of"), {"sluice_retries_total reason=other": 1}),
    (PublishRetried(), {"sluice_publish_retries_total": 1}),
    (
        Finished("extracted", None, records=3, publish_s=0.5, end_to_end_s=2.0, lane_wait_s=0.25),
        {
            "sluice_messages_finished_total outcome=extracted": 1,
            "sluice_records_published_total": 3,
            "sluice_publish_duration_seconds_count": 1,
            "sluice_publish_duration_seconds_sum": 0.5,
            "sluice_end_to_end_seconds_count": 1,
            "sluice_lane_wait_seconds_count": 1,
            "sluice_end_to_end_seconds_sum": 2.0,
            "sluice_lane_wait_seconds_sum": 0.25,
        },
    ),
    (
        Finished("rejected", Reason.REFUSED, records=0, publish_s=0.5, end_to_end_s=2.0),
        {
            "sluice_messages_finished_total outcome=rejected": 1,
            "sluice_messages_rejected_total reason=refused": 1,
            "sluice_publish_duration_seconds_count": 1,
            "sluice_publish_duration_seconds_sum": 0.5,
            "sluice_end_to_end_seconds_count": 1,
            "sluice_lane_wait_seconds_count": 1,
            "sluice_end_to_end_seconds_sum": 2.0,
        },
    ),
    (
        # A producer whose clock goes ahead of ours: the histogram's sum must not fall.
        Finished("skipped", None, records=0, publish_s=0.0, end_to_end_s=-5.0),
        {
            "sluice_messages_finished_total outcome=skipped": 1,
            "sluice_end_to_end_seconds_count": 1,
            "sluice_lane_wait_seconds_count": 1,
        },
    ),
    (ABANDONED, {"sluice_calls_abandoned_total": 3}),
    (
        Committed("refused", duration_s=0.25),
        {
            "sluice_commits_total result=refused": 1,
            "sluice_commit_duration_seconds_count": 1,
            "sluice_commit_duration_seconds_sum": 0.25,
        },
    ),
    (
        Rebalanced(assigned=6, kept=2, duration_s=3.0),
        {
            "sluice_rebalances_total": 1,
            "sluice_partitions_assigned_total progress=kept": 2,
            "sluice_partitions_assigned_total progress=new": 4,
            "sluice_rebalance_duration_seconds_count": 1,
            "sluice_rebalance_duration_seconds_sum": 3.0,
        },
    ),
    (Spared(messages=4), {"sluice_messages_spared_total": 4}),
    (ForeignMetadata(), {"sluice_metadata_foreign_total": 1}),
    (OffsetsMissing(messages=9), {"sluice_messages_missing_total": 9}),
    (ClientReplaced("consumer"), {"sluice_clients_replaced_total client=consumer": 1}),
    (StopForced("producer"), {"sluice_stops_forced_total client=producer": 1}),
    (CacheLooked("shared"), {"sluice_cache_lookups_total result=shared": 1}),
    (CacheWritten("error"), {"sluice_cache_writes_total result=error": 1}),
    (CacheSized(3, size_bytes=900), {"sluice_cache_entries": 3, "sluice_cache_bytes": 900}),
    (
        Streamed(2, first_after_s=0.7),
        {
            "sluice_records_published_total": 2,
            "sluice_first_record_seconds_count": 1,
            "sluice_first_record_seconds_sum": 0.7,
        },
    ),
    (Hedged("second"), {"sluice_hedges_total won=second": 1}),
    (Streamed(1), {"sluice_records_published_total": 1}),
]


@pytest.mark.parametrize(("event", "moved"), MOVES, ids=lambda part: type(part).__name__)
def test_an_event_moves_its_metrics_and_no_others(
    bench: Bench, event: Event, moved: dict[str, float]
) -> None:
    """Each event changes exactly the samples that stand beside it here."""
    assert bench.moved(event) == moved


def test_every_event_is_heard() -> None:
    """An event without a metric, or without a row above, fails here and not in production."""
    assert {type(event) for event, _ in MOVES} == set(get_args(Event))


@pytest.mark.parametrize("result", get_args(CallResult))
def test_every_result_of_a_call_is_there_from_the_start(bench: Bench, result: str) -> None:
    """All results of the models named at the start stand at 0, so that a rate sees the first."""
    assert bench.value("sluice_calls_total", model="small", result=result) == 0


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_is_there_from_the_start(bench: Bench, reason: Reason) -> None:
    """All reasons of a reject stand at 0."""
    assert bench.value("sluice_messages_rejected_total", reason=reason.value) == 0


def test_log_lines_are_counted(bench: Bench) -> None:
    """What the logs count arrives by level."""
    bench.metrics.log_line("warning")
    bench.metrics.log_line("error")
    bench.metrics.log_line("error")
    assert bench.value("sluice_log_lines_total", level="warning") == 1
    assert bench.value("sluice_log_lines_total", level="error") == 2


# --- exemplars ---


def exemplars(trace_id: TraceId | None) -> list[tuple[str, dict[str, str], float]]:
    """Of each sample that carries one, as an OpenMetrics scrape shows it, after one call."""
    registry = CollectorRegistry()
    Metrics(registry, trace_id=trace_id).observe(Called("small", "validated", duration_s=1.25))
    text = generate_openmetrics(registry).decode()
    return [
        (f"{sample.name} le={sample.labels['le']}", sample.exemplar.labels, sample.exemplar.value)
        for family in openmetrics_families(text)
        for sample in family.samples
        if sample.exemplar is not None
    ]


def test_a_call_points_to_its_trace() -> None:
    """Where tracing is on, a call's bucket carries the id of the trace that it belongs to."""
    expected = ("sluice_call_duration_seconds_bucket le=1.5", {"trace_id": "4bf92f35"}, 1.25)
    assert exemplars(lambda: "4bf92f35") == [expected]


@pytest.mark.parametrize("trace_id", [None, lambda: None], ids=["no tracing", "not recorded"])
def test_a_call_without_a_trace_points_nowhere(trace_id: TraceId | None) -> None:
    """Tracing that is off, or a call that it did not sample, leaves no exemplar."""
    assert exemplars(trace_id) == []


def test_objectives_stand_on_edges() -> None:
    """The freshness objective is an edge, and calls of 0.05 to 120 s are told apart."""
    assert 300 in END_TO_END_EDGES_S
    assert (CALL_EDGES_S[0], CALL_EDGES_S[-1]) == (0.05, 120)


# --- gauges ---


def gauges(status: Status) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(StatusGauges(lambda: status))
    return registry


@pytest.mark.parametrize("state", list(State))
def test_exactly_one_state_holds(state: State) -> None:
    """One series for each state; the one that holds is 1."""
    registry = gauges(replace(STATUS, state=state))
    held = {one: registry.get_sample_value("sluice_state", {"state": one.value}) for one in State}
    assert held == {one: float(one is state) for one in State}


def test_gauges_show_the_status() -> None:
    """Each figure of the status is the gauge of its name."""
    registry = gauges(STATUS)
    shown = {
        sample.name: sample.value
        for family in registry.collect()
        for sample in family.samples
        if not sample.labels
    }
    assert shown == {
        "sluice_reject_guard_tripped": 0,
        "sluice_budget_share_ratio": 1.0,
        "sluice_spent_last_hour_usd": 0.0,
        "sluice_oldest_message_age_seconds": 0.0,
        "sluice_lanes_waiting": 0,
        "sluice_ready": 1,
        "sluice_slots": 50,
        "sluice_slots_busy": 49,
        "sluice_window_messages_max": 200,
        "sluice_window_messages": 180,
        "sluice_window_bytes": 9000,
        "sluice_messages_queued": 100,
        "sluice_messages_retrying": 1,
        "sluice_messages_waiting_in_lane": 20,
        "sluice_messages_publishing": 10,
        "sluice_poll_turn_age_seconds": 0.5,
        "sluice_call_overdue_seconds": 0,
        "sluice_group_settled": 1,
        "sluice_group_unsettled_seconds": 0,
        "sluice_broker_answers": 1,
        "sluice_look_age_seconds": 4,
    }
    assert registry.get_sample_value("sluice_input_partitions", {"topic": "texts"}) == 6


def test_partitions_show_what_is_known() -> None:
    """A figure that is not known is absent, never 0: a lag of 0 would say caught up."""
    registry = gauges(STATUS)
    shown = {
        (sample.name.removeprefix("sluice_partition_"), sample.labels["partition"]): sample.value
        for family in registry.collect()
        for sample in family.samples
        if "partition" in sample.labels
    }
    assert shown == {
        ("lag", "0"): 13,
        ("next_offset", "0"): 7,
        ("unfinished", "0"): 5,
        ("next_offset", "1"): 3,
        ("unfinished", "1"): 0,
        ("completed_map_ratio", "0"): 0.5,
        ("completed_map_ratio", "1"): 0,
        ("oldest_unfinished_timestamp_seconds", "0"): 1_769_839_200.5,
    }


def test_gauges_forget_a_partition_that_is_gone() -> None:
    """After a rebalance no series of the old partitions remains to be added up twice."""
    status = [STATUS]
    registry = CollectorRegistry()
    registry.register(StatusGauges(lambda: status[0]))
    lag = {"topic": "texts", "partition": "0"}
    assert registry.get_sample_value("sluice_partition_lag", lag) == 13
    status[0] = replace(STATUS, partitions={})
    assert registry.get_sample_value("sluice_partition_lag", lag) is None


def test_what_is_not_ready_shows() -> None:
    """Any reason of /readyz turns the gauge to 0."""
    assert gauges(STATUS).get_sample_value("sluice_ready") == 1
    status = replace(STATUS, not_ready=("it is stopping",))
    assert gauges(status).get_sample_value("sluice_ready") == 0


# --- samples over time ---


@pytest.mark.parametrize("full", [False, True])
async def test_watch_adds_up_slots_and_window(bench: Bench, full: bool) -> None:
    """Busy slots and the full window are summed over time."""
    status = replace(STATUS, window_full=full)
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(bench.metrics.watch(lambda: status))
        while not bench.value("sluice_slots_busy_seconds_total"):
            await asyncio.sleep(0.01)
        watching.cancel()
    busy_s = bench.value("sluice_slots_busy_seconds_total")
    full_s = bench.value("sluice_window_full_seconds_total")
    assert busy_s is not None
    assert busy_s >= 49 * SAMPLE_S * 0.99
    assert full_s == (pytest.approx(busy_s / 49) if full else 0)
    assert bench.value("sluice_event_loop_delay_seconds_count") == 1


def test_process_metrics_are_added() -> None:
    """Memory, CPU and Python's own figures stand beside ours."""
    registry = CollectorRegistry()
    expose_process(registry)
    names = {family.name for family in registry.collect()}
    assert {"process_resident_memory_bytes", "process_cpu_seconds", "python_info"} <= names

"""Gauges: they are read from the status at each scrape, so that they cannot drift from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from service.core.admission.admission import Cause
from service.core.status import PartitionStatus, State, Status


class StatusGauges(Collector):
    """Collects the gauges from the status at each scrape."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status

    def collect(self) -> Iterator[GaugeMetricFamily]:
        status = self._status()
        yield _states(status.state)
        for name, meaning, value in _figures(status):
            yield GaugeMetricFamily(name, meaning, value=value)
        yield _admission_waits(status)
        yield _pace(status)
        yield _input_partitions(status)
        for name, meaning, read in _PARTITION_FIGURES:
            yield _by_partition(name, meaning, read, status)


def _states(state: State) -> GaugeMetricFamily:
    family = GaugeMetricFamily(
        "sluice_state",
        "The process's state: 1 for the one that holds now, 0 for the others.",
        None,
        ["state"],
    )
    for one in State:
        family.add_metric([one.value], float(one is state))
    return family


def _figures(status: Status) -> tuple[tuple[str, str, float], ...]:
    group = status.group
    return (
        ("sluice_ready", "1 while /readyz says ready; it also says why not.", not status.not_ready),
        ("sluice_slots", "Calls that may be in flight at once now.", status.slots),
        ("sluice_slots_busy", "Calls in flight.", status.slots_busy),
        ("sluice_window_messages_max", "Messages that the window can hold.", status.window),
        ("sluice_window_messages", "Messages taken and not finished.", status.window_messages),
        ("sluice_window_bytes", "Bytes of keys and values in the window.", status.window_bytes),
        ("sluice_messages_queued", "Messages that wait for a slot.", status.queued),
        ("sluice_messages_retrying", "Messages that wait for another attempt.", status.retrying),
        (
            "sluice_messages_waiting_in_lane",
            "Messages that are answered and wait for an earlier one of their lane.",
            status.waiting_in_lane,
        ),
        (
            "sluice_messages_publishing",
            "Messages whose outcome Kafka has not acknowledged yet.",
            status.publishing,
        ),
        (
            "sluice_poll_turn_age_seconds",
            "Seconds since the poll loop last turned, usually at most one; /livez fails far above.",
            status.poll_turn_age_s,
        ),
        (
            "sluice_call_overdue_seconds",
            "Seconds by which the oldest call exceeds its deadline; above 0 it is a fault of ours.",
            status.call_overdue_s,
        ),
        ("sluice_group_settled", "1 while the group has assigned its partitions.", group.settled),
        (
            "sluice_group_unsettled_seconds",
            "Seconds for which the group has not settled although a broker answers.",
            group.unsettled_s,
        ),
        ("sluice_broker_answers", "1 while a broker answers.", group.broker_answers),
        (
            "sluice_look_age_seconds",
            "Seconds since the watchdog last looked at topics and progress, usually at most ten; "
            "/livez fails far above.",
            group.look_age_s,
        ),
        (
            "sluice_reject_guard_tripped",
            "1 while intake is stopped because too many messages are rejected; /readyz says why "
            "and how to go on.",
            status.reject_guard_tripped,
        ),
        (
            "sluice_budget_share_ratio",
            "This worker's part of the budgets that all workers share; the parts of all workers "
            "add up to about 1.",
            status.budget_share,
        ),
        (
            "sluice_spent_last_hour_usd",
            "US dollars that the calls of the last hour have cost, as far as prices are known.",
            status.spent_last_hour_usd,
        ),
        (
            "sluice_oldest_message_age_seconds",
            "Seconds since the oldest message in the window was taken. Where it keeps growing, one "
            "message holds up its lane or its partition: see extraction.message_timeout_s.",
            status.oldest_message_age_s,
        ),
        (
            "sluice_lanes_waiting",
            "Lanes in which an answer waits for an earlier message.",
            status.lanes_waiting,
        ),
    )


def _admission_waits(status: Status) -> GaugeMetricFamily:
    family = GaugeMetricFamily(
        "sluice_admission_wait_seconds",
        "Seconds until the next call may start, by cause: the budgets of requests and tokens (ours "
        "or the provider's), the hour's spend, the pace found for a hidden limit, a cooldown that "
        "the provider asked for, an open circuit. 0: this cause does not hold calls up.",
        None,
        ["cause"],
    )
    for cause in Cause:
        family.add_metric([cause.value], status.admission_waits.get(cause, 0.0))
    return family


def _pace(status: Status) -> GaugeMetricFamily:
    family = GaugeMetricFamily(
        "sluice_pace_calls_per_second",
        "Calls a second that the provider accepts, found from its refusals; absent where it has "
        "refused none.",
    )
    if status.pace_per_s is not None:
        family.add_metric([], status.pace_per_s)
    return family


def _input_partitions(status: Status) -> GaugeMetricFamily:
    family = GaugeMetricFamily(
        "sluice_input_partitions",
        "Partitions of each input topic, also those that other workers hold.",
        None,
        ["topic"],
    )
    for topic, partitions in status.group.topic_partitions.items():
        family.add_metric([topic], partitions)
    return family


_Read: TypeAlias = Callable[[PartitionStatus], float | None]


def _oldest_s(one: PartitionStatus) -> float | None:
    return None if one.oldest_unfinished_ms is None else one.oldest_unfinished_ms / 1000


_PARTITION_FIGURES: tuple[tuple[str, str, _Read], ...] = (
    (
        "sluice_partition_lag",
        "Messages between the next offset and the end of the partition; absent while unknown.",
        lambda one: one.lag,
    ),
    (
        "sluice_partition_next_offset",
        "The smallest offset that is not finished: what the next commit stores.",
        lambda one: one.next_offset,
    ),
    (
        "sluice_partition_unfinished",
        "Messages of the partition in the window.",
        lambda one: one.unfinished,
    ),
    (
        "sluice_partition_completed_map_ratio",
        "How full the partition's completed map is, 0 to 1. From about 0.75 on no messages are "
        "taken from the partition until an old one finishes.",
        lambda one: one.map_ratio,
    ),
    (
        "sluice_partition_oldest_unfinished_timestamp_seconds",
        "The oldest unfinished message's own timestamp, in seconds since the epoch; absent where "
        "every message is finished.",
        _oldest_s,
    ),
)


def _by_partition(name: str, meaning: str, read: _Read, status: Status) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, meaning, None, ["topic", "partition"])
    for held, one in status.partitions.items():
        value = read(one)
        if value is not None:
            family.add_metric([held.topic, str(held.partition)], value)
    return family

"""The process's status, read by probes and, at a scrape, by gauges."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from service.core.admission.admission import Cause
from service.core.messages import Partition


class State(StrEnum):
    """One word for what is going on; exactly one holds."""

    STARTING = "starting"
    IDLE = "idle"  # caught up: nothing taken, nothing to take
    RUNNING = "running"
    WAITING_FOR_BUDGET = "waiting_for_budget"  # of requests, tokens or money
    WAITING_FOR_PROVIDER = "waiting_for_provider"  # the circuit is open, or all wait to retry
    WAITING_FOR_KAFKA = "waiting_for_kafka"  # brokers don't answer, or sends are not acknowledged
    REBALANCING = "rebalancing"
    GUARDED = "guarded"  # too many messages were rejected: intake stands still
    DRAINING = "draining"
    STALLED = "stalled"  # there is work and nothing moves, for no reason that we know of


@dataclass(frozen=True, slots=True)
class PartitionStatus:
    """One held partition. `lag` counts messages behind the end, None while it is unknown."""

    next_offset: int
    lag: int | None
    unfinished: int
    oldest_unfinished_ms: int | None  # the message's own timestamp, epoch milliseconds
    map_ratio: float = 0.0  # how full the completed map is; intake stops at about 0.75


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """Membership of the consumer group as the source sees it.

    `unsettled_s` counts only time in which a broker answered: an outage is no reason to restart.
    `problem` is a sentence for a person: what holds intake up and what to do. `look_age_s` is how
    long ago the watchdog last looked, 0 where there is no watchdog. `topic_partitions` is the
    number of partitions of each input topic, as the brokers report it.
    """

    settled: bool = False
    unsettled_s: float = 0.0
    broker_answers: bool = False
    problem: str | None = None
    look_age_s: float = 0.0
    topic_partitions: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Status:
    """A snapshot; counts are messages unless named otherwise."""

    state: State
    slots: int  # calls that may be in flight now; under overload fewer than limits.concurrency
    slots_busy: int
    window: int
    window_messages: int
    window_bytes: int
    window_full: bool  # so full that nothing is polled
    queued: int  # waiting for a slot
    retrying: int  # waiting for another attempt
    waiting_in_lane: int  # answered, while an earlier message of the lane is not
    publishing: int  # handed over, not acknowledged
    poll_turn_age_s: float  # since the poll loop last turned; 0 during a rebalance
    call_overdue_s: float  # by how much the oldest call exceeds its deadline; 0: none does
    not_ready: tuple[str, ...]  # sentences; empty means ready
    group: GroupStatus = field(default_factory=GroupStatus)
    partitions: Mapping[Partition, PartitionStatus] = field(default_factory=dict)
    reject_guard_tripped: bool = False
    admission_waits: Mapping[Cause, float] = field(default_factory=dict)
    """Seconds until the next call may start, by cause; slots are not among the causes."""
    budget_share: float = 1.0  # our part of the budgets that all workers share
    pace_per_s: float | None = None  # calls a second; None: no hidden limit was met
    spent_last_hour_usd: float = 0.0
    oldest_message_age_s: float = 0.0  # since it came into the window; 0 if there is none
    lanes_waiting: int = 0  # lanes in which an answer waits for an earlier message

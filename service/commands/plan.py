"""Capacity: from a rate of messages to slots, workers, partitions and money.

Rules of this file: arithmetic alone. Little's law (Little, 1961): calls in flight on average =
calls a second x mean seconds of a call, whatever the distribution. More slots than that are needed,
since not all of them are always busy. The number of workers follows from CPU and slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from service.core.words import how_many

UTILISATION = 0.97
"""The share of the slots that is busy while there is a backlog: the design's promise in key
order."""
CPU_MS = 0.7
"""Milliseconds of CPU for one message with one call, reading and writing Kafka included. It is more
than was measured, since other machines are slower and texts longer."""
CPU_SHARE_MAX = 0.7
"""The share of one core that a worker may use. It runs on one core only, and above this share its
event loop is late for everything."""
SLOTS_MAX = 1000
"""How many slots one worker may have. With more, its window takes much memory, and after a crash
more calls are repeated."""
PARTITIONS_PER_WORKER = 3
"""How many partitions each worker gets. With several, workers can be added later, and one partition
more or less does not change a worker's load much."""
SECONDS_PER_MONTH = 30 * 24 * 3600


@dataclass(frozen=True, slots=True)
class Demand:
    """The load to plan for. A limit of 0 means that there is none, a price of 0 that it is not
    known.

    `load_max` is the share of the slots that may be busy at this rate. The rest is for bursts and
    for catching up: with 0.8 a backlog of one hour is gone after four hours.
    """

    messages_per_s: float
    latency_median_s: float
    latency_sigma: float = 1.0  # of a lognormal distribution; 0: all calls take the same time
    calls_per_message: float = 1.0  # re-asks and retries are calls too
    tokens_input: float = 0.0  # of one call
    tokens_output: float = 0.0
    usd_per_million_input: float = 0.0
    usd_per_million_output: float = 0.0
    requests_per_minute: float = 0.0
    tokens_per_minute: float = 0.0
    load_max: float = 0.8
    cpu_ms: float = CPU_MS
    slots_max: int = SLOTS_MAX


@dataclass(frozen=True, slots=True)
class Plan:
    """The result: what the load needs."""

    latency_mean_s: float
    in_flight: float  # on average
    slots: int  # of all workers together
    workers: int
    slots_per_worker: int
    partitions: int
    cores: float  # busy on average, of all workers together
    requests_per_minute: float
    tokens_per_minute: float
    messages_per_s_max: float  # as many as slots and the provider's limits allow
    usd_per_million_messages: float
    usd_per_month: float
    bound_by: str  # why there are this many workers: "CPU" or "slots"


def plan(demand: Demand) -> Plan:
    """The smallest plan that is enough for the demand; the provider's limits may still be too
    low."""
    mean_s = mean_latency_s(demand)
    calls_per_s = demand.messages_per_s * demand.calls_per_message
    in_flight = calls_per_s * mean_s
    slots = max(1, math.ceil(in_flight / min(demand.load_max, UTILISATION)))
    cores = calls_per_s * demand.cpu_ms / 1000
    by_cpu, by_slots = math.ceil(cores / CPU_SHARE_MAX), math.ceil(slots / demand.slots_max)
    workers = max(1, by_cpu, by_slots)
    each = math.ceil(slots / workers)
    usd = usd_per_message(demand)
    return Plan(
        latency_mean_s=mean_s,
        in_flight=in_flight,
        slots=each * workers,
        workers=workers,
        slots_per_worker=each,
        partitions=PARTITIONS_PER_WORKER * workers,
        cores=cores,
        requests_per_minute=calls_per_s * 60,
        tokens_per_minute=calls_per_s * 60 * (demand.tokens_input + demand.tokens_output),
        messages_per_s_max=min(rates(demand, each * workers)),
        usd_per_million_messages=usd * 1e6,
        usd_per_month=usd * demand.messages_per_s * SECONDS_PER_MONTH,
        bound_by="CPU" if by_cpu > by_slots else "slots",
    )


def mean_latency_s(demand: Demand) -> float:
    """The mean of a lognormal distribution: median x exp(sigma² / 2), which for sigma 1 is 1.65
    times the median."""
    return demand.latency_median_s * math.exp(demand.latency_sigma**2 / 2)


def rates(demand: Demand, slots: int) -> Iterator[float]:
    """How many messages a second the slots allow, then each of the provider's limits."""
    calls = demand.calls_per_message
    if mean_s := mean_latency_s(demand):
        yield slots * UTILISATION / mean_s / calls
    if demand.requests_per_minute:
        yield demand.requests_per_minute / 60 / calls
    if demand.tokens_per_minute and (tokens := demand.tokens_input + demand.tokens_output):
        yield demand.tokens_per_minute / 60 / tokens / calls


def usd_per_message(demand: Demand) -> float:
    """US dollars for all calls of one message."""
    one_call = (
        demand.tokens_input * demand.usd_per_million_input
        + demand.tokens_output * demand.usd_per_million_output
    ) / 1e6
    return one_call * demand.calls_per_message


def sentences(demand: Demand, found: Plan) -> Iterator[str]:
    """The plan as sentences, most important first."""
    yield (
        f"{demand.messages_per_s:,.1f} messages/s, {found.requests_per_minute:,.0f} calls/min, "
        f"{found.tokens_per_minute:,.0f} tokens/min"
    )
    yield f"{found.in_flight:,.0f} calls in flight on average ({_latency(demand, found)})"
    yield (
        f"{how_many(found.workers, 'worker', ',')} (by {found.bound_by}) with limits.concurrency "
        f"{found.slots_per_worker:,}, {how_many(found.partitions, 'partition', ',')} of the input "
        "topic"
    )
    yield f"{found.cores:,.1f} cores busy with {demand.cpu_ms:g} ms CPU a call"
    if found.usd_per_month:
        yield (
            f"{found.usd_per_million_messages:,.2f} USD for a million messages, "
            f"{found.usd_per_month:,.0f} USD in 30 days"
        )
    if found.messages_per_s_max < demand.messages_per_s:
        yield (
            f"too much for the provider's limits, which allow {found.messages_per_s_max:,.1f} "
            f"messages/s; ask the provider for {found.requests_per_minute:,.0f} requests and "
            f"{found.tokens_per_minute:,.0f} tokens a minute"
        )
    else:
        yield f"this is enough for up to {found.messages_per_s_max:,.1f} messages/s"


def _latency(demand: Demand, found: Plan) -> str:
    """How long a call takes on average, and why that is not the median that was asked for."""
    mean = f"a call takes {found.latency_mean_s:.2f} s on average"
    if not demand.latency_sigma:
        return mean
    return (
        f"{mean}: latencies are taken as lognormal with sigma {demand.latency_sigma:g}, whose slow "
        f"calls raise the mean above the median of {demand.latency_median_s:g} s"
    )

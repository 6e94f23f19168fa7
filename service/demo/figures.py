"""The few figures that the demo shows, read from the service's /metrics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one scrape. Counts are since the start; a quantile is None before the first
    observation."""

    state: str = "starting"
    finished: int = 0
    rejected: int = 0
    records: int = 0
    calls: int = 0
    tokens_input: int = 0
    tokens_output: int = 0
    slots: int = 0
    slots_busy: int = 0
    window: int = 0
    window_max: int = 0
    lag: int = 0
    call_p50_s: float | None = None
    call_p95_s: float | None = None
    end_to_end_p50_s: float | None = None
    end_to_end_p95_s: float | None = None


def read_figures(exposition: str) -> Figures:
    """Read the figures from Prometheus' text format; a metric that is missing counts as 0."""
    sums: dict[str, float] = defaultdict(float)
    buckets: dict[str, dict[float, float]] = defaultdict(lambda: defaultdict(float))
    state = "starting"
    for family in text_string_to_metric_families(exposition):
        for name, labels, value, *_ in family.samples:
            if name.endswith("_bucket") and labels.get("answered", "true") == "true":
                buckets[family.name][float(labels["le"])] += value
            elif name == "sluice_state" and value:
                state = labels["state"]
            sums[name] += value
            for label in ("type", "outcome"):
                if label in labels:
                    sums[f"{name}.{labels[label]}"] += value
    calls = buckets["sluice_call_duration_seconds"]
    end_to_end = buckets["sluice_end_to_end_seconds"]
    return Figures(
        state=state,
        finished=int(sums["sluice_messages_finished_total"]),
        rejected=int(sums["sluice_messages_finished_total.rejected"]),
        records=int(sums["sluice_records_published_total"]),
        calls=int(sums["sluice_calls_total"]),
        tokens_input=int(sums["sluice_tokens_total.input"]),
        tokens_output=int(sums["sluice_tokens_total.output"]),
        slots=int(sums["sluice_slots"]),
        slots_busy=int(sums["sluice_slots_busy"]),
        window=int(sums["sluice_window_messages"]),
        window_max=int(sums["sluice_window_messages_max"]),
        lag=int(sums["sluice_partition_lag"]),
        call_p50_s=quantile(calls, 0.50),
        call_p95_s=quantile(calls, 0.95),
        end_to_end_p50_s=quantile(end_to_end, 0.50),
        end_to_end_p95_s=quantile(end_to_end, 0.95),
    )


def quantile(buckets: Mapping[float, float], share: float) -> float | None:
    """The value below which `share` of the observations lie, as Prometheus estimates it.

    `buckets` maps an upper edge to the number of observations at or below it. Observations are
    assumed to lie evenly within a bucket. Above the last finite edge, that edge is returned.
    """
    edges = sorted(buckets)
    total = buckets[edges[-1]] if edges else 0
    if not total:
        return None
    wanted = share * total
    lower, below = 0.0, 0.0
    for edge in edges:
        if buckets[edge] >= wanted:
            if edge == float("inf"):
                return lower
            return lower + (edge - lower) * (wanted - below) / (buckets[edge] - below)
        lower, below = edge, buckets[edge]
    raise AssertionError("the last bucket counts all")

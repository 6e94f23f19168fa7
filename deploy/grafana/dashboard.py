"""Writes the dashboard: `python deploy/grafana/dashboard.py` after a change here.

Rules of this file: rows tell a story, from "is it well?" down to causes; each panel answers one
question, which is its description; every query is bound to the chosen job and instances.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).parent / "dashboards" / "sluice.json"

WIDTH = 24
"""Columns of Grafana's grid."""

CHOSEN = 'job=~"$job", instance=~"$instance"'
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

STATES = {
    "starting": "blue",
    "idle": "blue",
    "running": "green",
    "waiting_for_budget": "yellow",
    "waiting_for_provider": "orange",
    "waiting_for_kafka": "orange",
    "rebalancing": "yellow",
    "draining": "purple",
    "stalled": "red",
}
"""Every state of the service and its colour."""


@dataclass(frozen=True)
class Query:
    """One PromQL expression; `legend` may name labels as {{label}}."""

    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One question and the queries that answer it. Unit as Grafana calls it."""

    title: str
    question: str
    unit: str
    queries: tuple[Query, ...]
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    stacked: bool = False
    maximum: float | None = None
    colors: Mapping[str, str] = field(default_factory=dict)  # of series, by their legend


@dataclass(frozen=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


def figure(title: str, question: str, unit: str, query: Query) -> Panel:
    """One number, six in a row."""
    return Panel(title, question, unit, (query,), kind="stat", width=4, height=4)


def rate(metric: str, by: str = "", **labels: str) -> str:
    """Per second, over all chosen instances; `by` names labels to keep."""
    return f"sum{_by(by)} (rate({_select(metric, labels)}[$__rate_interval]))"


def total(metric: str, by: str = "", **labels: str) -> str:
    """A gauge summed over all chosen instances."""
    return f"sum{_by(by)} ({_select(metric, labels)})"


def quantile(share: float, metric: str, **labels: str) -> str:
    """A quantile of a histogram's observations, in the histogram's unit."""
    return f"histogram_quantile({share}, {rate(f'{metric}_bucket', 'le', **labels)})"


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""


def _select(metric: str, labels: dict[str, str]) -> str:
    pairs = [CHOSEN, *(f'{name}="{value}"' for name, value in labels.items())]
    return f"{metric}{{{', '.join(pairs)}}}"


def spread(metric: str, **labels: str) -> tuple[Query, ...]:
    """The middle and the tail of a histogram."""
    return tuple(
        Query(quantile(share, metric, **labels), name)
        for share, name in ((0.5, "half within"), (0.95, "95 % within"), (0.99, "99 % within"))
    )


def busy_share() -> str:
    """Share of the slots that had a call, 0 to 1, over all chosen instances."""
    return f"{rate('sluice_slots_busy_seconds_total')} / {total('sluice_slots')}"


def rejected_share() -> str:
    """Share of the messages finished that were rejected; 0 while none finish."""
    finished = rate("sluice_messages_finished_total")
    rejected = rate("sluice_messages_finished_total", outcome="rejected")
    return f"{rejected} / clamp_min({finished}, 1e-9)"


def oldest_age(by: str = "") -> str:
    """Seconds since the oldest unfinished message was written; nothing where all are finished."""
    oldest = _select("sluice_partition_oldest_unfinished_timestamp_seconds", {})
    return f"time() - min{_by(by)} ({oldest})"


def answered_share() -> str:
    """Share of the calls that gave a validated answer; 1 while there are none."""
    failed = f'sluice_calls_total{{{CHOSEN}, result!~"validated|cancelled"}}'
    failures = f"sum (rate({failed}[$__rate_interval]))"
    return f"1 - {failures} / clamp_min({rate('sluice_calls_total')}, 1e-9)"


WELL = Row(
    "Is it well?",
    (
        figure(
            "Workers ready",
            "How many workers are ready? /readyz of the others says why not.",
            "none",
            Query(total("sluice_ready"), "ready"),
        ),
        figure(
            "Lag",
            "How many messages are not finished yet, over all partitions?",
            "short",
            Query(total("sluice_partition_lag"), "messages"),
        ),
        figure(
            "Oldest message",
            "How long ago was the oldest message written that is being worked on?",
            "s",
            Query(oldest_age(), "age"),
        ),
        figure(
            "Finished",
            "How many messages get their outcome each second?",
            "ops",
            Query(rate("sluice_messages_finished_total"), "per second"),
        ),
        figure(
            "Rejected",
            "Which share of them goes to the dead letter topic?",
            "percentunit",
            Query(rejected_share(), "share"),
        ),
        figure(
            "Slots busy",
            "Which share of the slots has a call? Low with lag: look at the window and the state.",
            "percentunit",
            Query(busy_share(), "share"),
        ),
        Panel(
            "State",
            "What are the workers doing? Waiting and stalled are told apart.",
            "none",
            (Query(total("sluice_state", "state"), "{{state}}"),),
            width=12,
            stacked=True,
            colors=STATES,
        ),
        Panel(
            "Throughput",
            "How much comes in, and what becomes of it?",
            "ops",
            (
                Query(rate("sluice_messages_taken_total"), "in"),
                Query(rate("sluice_messages_finished_total", "outcome"), "{{outcome}}"),
                Query(rate("sluice_records_published_total"), "records out"),
            ),
            width=12,
        ),
    ),
)

LAG = Row(
    "Lag",
    (
        Panel(
            "Lag by partition",
            "Which partitions are behind? One alone: a message that is held up, or a hot key.",
            "short",
            (Query(total("sluice_partition_lag", "topic, partition"), "{{topic}}[{{partition}}]"),),
            width=12,
        ),
        Panel(
            "Age of the oldest unfinished message",
            "How stale is what readers see, by partition? Nothing is shown where all is finished.",
            "s",
            (Query(oldest_age("topic, partition"), "{{topic}}[{{partition}}]"),),
            width=12,
        ),
    ),
)

LATENCY = Row(
    "Latency by stage",
    (
        Panel(
            "Queue",
            "How long does a message wait for its slot? It grows when slots are short.",
            "s",
            spread("sluice_queue_wait_seconds"),
            width=6,
        ),
        Panel(
            "Call",
            "How long does one call to the model take, errors and timeouts left out?",
            "s",
            spread("sluice_call_duration_seconds", answered="true"),
            width=6,
        ),
        Panel(
            "Publish",
            "How long does Kafka take to acknowledge an outcome?",
            "s",
            spread("sluice_publish_duration_seconds"),
            width=6,
        ),
        Panel(
            "End to end",
            "How long from a message's own timestamp to its acknowledged outcome?",
            "s",
            spread("sluice_end_to_end_seconds"),
            width=6,
        ),
    ),
)

MODEL = Row(
    "Model",
    (
        Panel(
            "Calls by result",
            "How do calls end? Anything but validated costs time or money.",
            "ops",
            (Query(rate("sluice_calls_total", "result"), "{{result}}"),),
            stacked=True,
        ),
        Panel(
            "Validated",
            "Which share of the calls gives an answer that validates?",
            "percentunit",
            (Query(answered_share(), "share"),),
            maximum=1,
        ),
        Panel(
            "Tokens",
            "How many tokens go in and out each second, by model?",
            "short",
            (Query(rate("sluice_tokens_total", "model, type"), "{{model}} {{type}}"),),
        ),
        Panel(
            "Waits for another attempt",
            "Why do messages wait to be tried again?",
            "ops",
            (Query(rate("sluice_retries_total", "reason"), "{{reason}}"),),
            stacked=True,
        ),
        Panel(
            "Re-asks",
            "How often is the model told why its answer did not validate?",
            "ops",
            (Query(rate("sluice_reasks_total", "model"), "{{model}}"),),
        ),
        Panel(
            "Rejected by reason",
            "Why do messages go to the dead letter topic? Each dead letter says more.",
            "ops",
            (Query(rate("sluice_messages_rejected_total", "reason"), "{{reason}}"),),
            stacked=True,
        ),
    ),
)

SATURATION = Row(
    "Slots and window",
    (
        Panel(
            "Slots",
            "How many calls are in flight, of how many allowed?",
            "none",
            (
                Query(total("sluice_slots_busy"), "busy"),
                Query(total("sluice_slots"), "allowed"),
            ),
        ),
        Panel(
            "Window",
            "How full is the window, and where do its messages stand?",
            "none",
            (
                Query(total("sluice_messages_queued"), "wait for a slot"),
                Query(total("sluice_slots_busy"), "in flight"),
                Query(total("sluice_messages_retrying"), "wait for another attempt"),
                Query(total("sluice_messages_waiting_in_lane"), "wait in their lane"),
                Query(total("sluice_messages_publishing"), "being published"),
            ),
            stacked=True,
        ),
        Panel(
            "Full window",
            "Which share of the time was the window full? With idle slots: enlarge limits.window.",
            "percentunit",
            (
                Query(
                    rate("sluice_window_full_seconds_total", "instance"),
                    "{{instance}}",
                ),
            ),
            maximum=1,
        ),
    ),
)

CAUSES = Row(
    "Kafka and process",
    (
        Panel(
            "Commits",
            "Are next offsets stored? Refused ones come with a rebalance and are no fault.",
            "ops",
            (Query(rate("sluice_commits_total", "result"), "{{result}}"),),
        ),
        Panel(
            "Rebalances",
            "How often do partitions move, and how many calls did a drain cut off?",
            "ops",
            (
                Query(rate("sluice_rebalances_total"), "rebalances"),
                Query(rate("sluice_calls_abandoned_total"), "calls cut off"),
                Query(rate("sluice_publish_retries_total"), "sends repeated"),
            ),
        ),
        Panel(
            "Warnings and errors",
            "How many lines of the log ask for somebody's eyes?",
            "ops",
            (Query(rate("sluice_log_lines_total", "level"), "{{level}}"),),
        ),
        Panel(
            "Event loop",
            "How late does the process get to what is due? Above 0.1 s it is out of CPU.",
            "s",
            spread("sluice_event_loop_delay_seconds"),
        ),
        Panel(
            "CPU",
            "How much of a core does each worker use? One is the most a process can.",
            "percentunit",
            (Query(rate("process_cpu_seconds_total", "instance"), "{{instance}}"),),
        ),
        Panel(
            "Memory",
            "How much memory does each worker hold? It should be flat.",
            "bytes",
            (Query(total("process_resident_memory_bytes", "instance"), "{{instance}}"),),
        ),
    ),
)

ROWS = (WELL, LAG, LATENCY, MODEL, SATURATION, CAUSES)


def dashboard() -> dict[str, Any]:
    """The whole dashboard in Grafana's JSON model."""
    return {
        "uid": "sluice",
        "title": "Sluice",
        "description": "Text messages in, validated records out.",
        "tags": ["sluice"],
        "schemaVersion": 41,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "5s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": _variables()},
        "annotations": {"list": []},
        "links": [],
        "panels": _laid_out(ROWS),
    }


def _variables() -> list[dict[str, Any]]:
    datasource = {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "current": {"text": "Prometheus", "value": "prometheus"},
    }
    job = _choice("job", "sluice_build_info")
    return [datasource, job, _choice("instance", 'sluice_build_info{job=~"$job"}')]


def _choice(label: str, series: str) -> dict[str, Any]:
    query = f"label_values({series}, {label})"
    return {
        "name": label,
        "label": label.capitalize(),
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": label},
        "refresh": 2,  # at each change of the time range: pods come and go
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": "All", "value": "$__all"},
        "sort": 1,
    }


def _laid_out(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows from top to bottom, panels from left to right."""
    laid: list[dict[str, Any]] = []
    top = 0
    for row in rows:
        laid.append(_row(row.title, len(laid) + 1, top))
        left, top = 0, top + 1
        for panel in row.panels:
            if left + panel.width > WIDTH:
                left, top = 0, top + panel.height
            laid.append(_panel(panel, len(laid) + 1, left, top))
            left += panel.width
        top += row.panels[-1].height
    return laid


def _row(title: str, number: int, top: int) -> dict[str, Any]:
    place = {"x": 0, "y": top, "w": WIDTH, "h": 1}
    return {
        "id": number,
        "type": "row",
        "title": title,
        "gridPos": place,
        "collapsed": False,
        "panels": [],
    }


def _panel(panel: Panel, number: int, left: int, top: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.question,
        "datasource": DATASOURCE,
        "gridPos": {"x": left, "y": top, "w": panel.width, "h": panel.height},
        "fieldConfig": {
            "defaults": _defaults(panel),
            "overrides": [_painted(*pair) for pair in panel.colors.items()],
        },
        "options": OPTIONS[panel.kind],
        "targets": [_target(query, index) for index, query in enumerate(panel.queries)],
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "fillOpacity": 40 if panel.stacked else 10,
            "stacking": {"mode": "normal" if panel.stacked else "none"},
            "showPoints": "never",
        }
    return defaults


def _painted(series: str, color: str) -> dict[str, Any]:
    paint = {"id": "color", "value": {"mode": "fixed", "fixedColor": color}}
    return {"matcher": {"id": "byName", "options": series}, "properties": [paint]}


OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "reduceOptions": {"calcs": ["lastNotNull"], "values": False},
        "colorMode": "value",
        "graphMode": "area",
    },
}


def _target(query: Query, index: int) -> dict[str, Any]:
    return {
        "refId": chr(ord("A") + index),
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": query.expression,
        "legendFormat": query.legend,
        "range": True,
    }


def text() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(text())

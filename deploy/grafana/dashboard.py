"""Writes the dashboard: `python deploy/grafana/dashboard.py` after a change here.

Rules of this file: rows tell a story, from "is it well?" down to causes; each panel answers one
question, which is its description; every query is bound to the chosen job and instances.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
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
    "waiting_for_provider": "orange",
    "waiting_for_kafka": "orange",
    "rebalancing": "yellow",
    "draining": "purple",
    "stalled": "red",
}
"""In the order of their numbers in the state panel, with their colour."""


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


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


def rate(metric: str, by: str = "", **labels: str) -> str:
    """Per second, over all chosen instances; `by` names labels to keep."""
    return f"sum{_by(by)} (rate({_select(metric, labels)}[$__rate_interval]))"


def total(metric: str, by: str = "", **labels: str) -> str:
    """A gauge summed over all chosen instances."""
    return f"sum{_by(by)} ({_select(metric, labels)})"


def quantile(share: float, metric: str, by: str = "") -> str:
    """A quantile of a histogram's observations, in the histogram's unit."""
    kept = f"le, {by}" if by else "le"
    buckets = f"rate({metric}_bucket{{{CHOSEN}}}[$__rate_interval])"
    return f"histogram_quantile({share}, sum by ({kept}) ({buckets}))"


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""


def _select(metric: str, labels: dict[str, str]) -> str:
    pairs = [CHOSEN, *(f'{name}="{value}"' for name, value in labels.items())]
    return f"{metric}{{{', '.join(pairs)}}}"


def spread(metric: str) -> tuple[Query, ...]:
    """The middle and the tail of a histogram."""
    return tuple(
        Query(quantile(share, metric), name)
        for share, name in ((0.5, "half within"), (0.95, "95 % within"), (0.99, "99 % within"))
    )


ROWS: tuple[Row, ...] = ()


def dashboard(rows: Sequence[Row] = ROWS) -> dict[str, Any]:
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
        "panels": _laid_out(rows),
    }


def _variables() -> list[dict[str, Any]]:
    datasource = {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "current": {"text": "Prometheus", "value": "prometheus"},
    }
    return [datasource, _choice("job", "sluice_build_info"), _choice("instance", INSTANCES)]


INSTANCES = 'sluice_build_info{job=~"$job"}'


def _choice(label: str, series: str) -> dict[str, Any]:
    query = f"label_values({series}, {label})"
    return {
        "name": label,
        "label": label.capitalize(),
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
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
    return {"id": number, "type": "row", "title": title, "gridPos": place, "panels": []}


def _panel(panel: Panel, number: int, left: int, top: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.question,
        "datasource": DATASOURCE,
        "gridPos": {"x": left, "y": top, "w": panel.width, "h": panel.height},
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
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
    if panel.kind == "state-timeline":
        defaults["mappings"] = [_state_mapping()]
    return defaults


def _state_mapping() -> dict[str, Any]:
    words = {
        str(number): {"text": state.replace("_", " "), "color": color}
        for number, (state, color) in enumerate(STATES.items())
    }
    return {"type": "value", "options": words}


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
    "state-timeline": {
        "mergeValues": True,
        "showValue": "auto",
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": False},
        "tooltip": {"mode": "single", "sort": "none"},
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

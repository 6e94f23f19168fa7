"""Writes the dashboards: `python deploy/grafana/dashboard.py` after a change here.

`sluice.json` is the overview, `sluice-worker.json` a look into one worker. Rules of this file: rows
tell a story, from "is it well?" down to causes; each panel answers one question and says what to do
about the answer, in its description; every query is bound to the chosen job and instances.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import common as form
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders import prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.prometheus import QueryEditorMode

FOLDER = Path(__file__).parent / "dashboards"

WIDTH = 24
"""Columns of Grafana's grid."""

CHOSEN = 'job=~"$job", instance=~"$instance", worker=~"$worker"'
"""With one worker an instance has no label `worker`, which All of them (.*) takes in too."""
WORKER, NAMED = "instance, worker", "{{instance}} {{worker}}"
"""What tells workers apart, and what they are called. The process that has started several workers
is there too where processes are looked at, without a number."""
DATASOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")

STATES = {
    "starting": "blue",
    "idle": "blue",
    "running": "green",
    "waiting_for_budget": "teal",
    "waiting_for_provider": "orange",
    "waiting_for_kafka": "orange",
    "rebalancing": "yellow",
    "guarded": "brown",
    "draining": "purple",
    "stalled": "red",
}
"""Every state of the service and its colour."""

LATE_S = "300.0"
"""The objective of the freshness alerts (deploy/prometheus), as an edge is written."""


@dataclass(frozen=True)
class Query:
    """One PromQL expression; `legend` may name labels as {{label}}."""

    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One question, what to do about the answer, and the queries. Unit as Grafana calls it."""

    title: str
    question: str
    remedy: str
    unit: str
    queries: tuple[Query, ...]
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    stacked: bool = False
    maximum: float | None = None
    colors: Mapping[str, str] = field(default_factory=dict)  # of series, by their legend

    @property
    def description(self) -> str:
        return f"{self.question} {self.remedy}"


@dataclass(frozen=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Page:
    """One dashboard. `several` instances may be chosen, or just one."""

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]
    several: bool = True

    @property
    def file(self) -> Path:
        return FOLDER / f"{self.uid}.json"


# --- queries ----------------------------------------------------------------------------------


def figure(title: str, question: str, remedy: str, unit: str, query: Query) -> Panel:
    """One number, six in a row."""
    return Panel(title, question, remedy, unit, (query,), kind="stat", width=4, height=4)


def rate(metric: str, by: str = "", **labels: str) -> str:
    """Per second, over all chosen instances; `by` names labels to keep."""
    return f"sum{_by(by)} (rate({_select(metric, labels)}[$__rate_interval]))"


def total(metric: str, by: str = "", **labels: str) -> str:
    """A gauge summed over all chosen instances."""
    return f"sum{_by(by)} ({_select(metric, labels)})"


def largest(metric: str) -> str:
    """A gauge of the chosen worker for which it is largest."""
    return f"max ({_select(metric, {})})"


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


def mean(metric: str, **labels: str) -> str:
    """The mean of a histogram's observations."""
    observed = rate(f"{metric}_count", **labels)
    return f"{rate(f'{metric}_sum', **labels)} / clamp_min({observed}, 1e-9)"


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


def late_share() -> str:
    """Share of the messages finished that took longer than the objective allows."""
    finished = rate("sluice_end_to_end_seconds_count")
    in_time = rate("sluice_end_to_end_seconds_bucket", le=LATE_S)
    return f"({finished} - {in_time}) / clamp_min({finished}, 1e-9)"


def drain_s() -> str:
    """Seconds until the lag is worked off, if nothing more came in; without end while none is."""
    return f"{total('sluice_partition_lag')} / {rate('sluice_messages_finished_total')}"


def answered_share() -> str:
    """Share of the calls that gave a validated answer; 1 while there are none."""
    failed = f'sluice_calls_total{{{CHOSEN}, result!~"validated|cancelled"}}'
    failures = f"sum (rate({failed}[$__rate_interval]))"
    return f"1 - {failures} / clamp_min({rate('sluice_calls_total')}, 1e-9)"


STAGES = (
    Query(mean("sluice_queue_wait_seconds"), "queue"),
    Query(mean("sluice_call_duration_seconds", answered="true"), "call"),
    Query(mean("sluice_lane_wait_seconds"), "lane"),
    Query(mean("sluice_publish_duration_seconds"), "publish"),
    Query(mean("sluice_commit_duration_seconds"), "commit"),
)

STATE = Panel(
    "State",
    "What are the workers doing, each in one word?",
    "docs/runbook.md says of each state whose business it is.",
    "short",
    (Query(total("sluice_state", "state"), "{{state}}"),),
    width=12,
    stacked=True,
    colors=STATES,
)
WINDOW = Panel(
    "Window",
    "Where do the messages stand that are taken and not finished?",
    "Much in a lane: order waits for slow messages. Much being published: look at the brokers.",
    "short",
    (
        Query(total("sluice_messages_queued"), "wait for a slot"),
        Query(total("sluice_slots_busy"), "in flight"),
        Query(total("sluice_messages_retrying"), "wait for another attempt"),
        Query(total("sluice_messages_waiting_in_lane"), "wait in their lane"),
        Query(total("sluice_messages_publishing"), "being published"),
    ),
    stacked=True,
)
SLOTS = Panel(
    "Slots",
    "How many calls are in flight, of how many allowed?",
    "Allowed falls below limits.concurrency while the provider turns calls away.",
    "short",
    (
        Query(total("sluice_slots_busy"), "busy"),
        Query(total("sluice_slots"), "allowed"),
    ),
)
FULL_WINDOW = Panel(
    "Full window",
    "Which share of the time was the window full?",
    "With idle slots meanwhile: enlarge limits.window.",
    "percentunit",
    (Query(rate("sluice_window_full_seconds_total", WORKER), NAMED),),
    maximum=1,
)
LAG_BY_PARTITION = Panel(
    "Lag by partition",
    "Which partitions are behind?",
    "One alone: a message that is held up, or a hot key. All: more slots, workers or quota.",
    "short",
    (Query(total("sluice_partition_lag", "topic, partition"), "{{topic}}[{{partition}}]"),),
    width=12,
)
AGE_BY_PARTITION = Panel(
    "Age of the oldest unfinished message",
    "How long ago was the oldest message written that is being worked on, by partition?",
    "Growing steadily, it is one message that does not finish: see its worker's page.",
    "s",
    (Query(oldest_age("topic, partition"), "{{topic}}[{{partition}}]"),),
    width=12,
)
COMMITS = Panel(
    "Commits",
    "Are next offsets stored?",
    "Refused ones come with a rebalance and are no fault; failed ones are Kafka's.",
    "ops",
    (Query(rate("sluice_commits_total", "result"), "{{result}}"),),
)
LOG_LINES = Panel(
    "Warnings and errors",
    "How many lines of the log ask for somebody's eyes?",
    "Read them; they hold no text of a message.",
    "ops",
    (Query(rate("sluice_log_lines_total", "level"), "{{level}}"),),
)
EVENT_LOOP = Panel(
    "Event loop",
    "How late does the process get to what is due?",
    "Above 0.1 s it is out of CPU or something blocks it: fewer slots, or more workers.",
    "s",
    spread("sluice_event_loop_delay_seconds"),
)
CPU = Panel(
    "CPU",
    "How much of a core does each worker use?",
    "One is the most a process can: then add workers.",
    "percentunit",
    (Query(rate("process_cpu_seconds_total", WORKER), NAMED),),
)
MEMORY = Panel(
    "Memory",
    "How much memory does each worker hold?",
    "It should be flat; limits.window_bytes bounds what messages take of it.",
    "bytes",
    (Query(total("process_resident_memory_bytes", WORKER), NAMED),),
)

WELL = Row(
    "Is it well?",
    (
        figure(
            "Workers ready",
            "How many workers take messages?",
            "/readyz of the others says why not.",
            "short",
            Query(total("sluice_ready"), "ready"),
        ),
        figure(
            "Late",
            "Which share of the messages took longer than five minutes?",
            "Above 1 % the objective is missed: see the latency by stage.",
            "percentunit",
            Query(late_share(), "share"),
        ),
        figure(
            "Rejected",
            "Which share of the messages goes to the dead letter topic?",
            "Above 1 % the objective is missed: see the reasons below.",
            "percentunit",
            Query(rejected_share(), "share"),
        ),
        figure(
            "Lag",
            "How many messages are not finished yet, over all partitions?",
            "The time to drain says whether that is much.",
            "short",
            Query(total("sluice_partition_lag"), "messages"),
        ),
        figure(
            "Time to drain",
            "How long would the lag take if nothing more came in?",
            "Too long: more slots, then more workers, as far as the quota bears them.",
            "s",
            Query(drain_s(), "time"),
        ),
        figure(
            "Slots busy",
            "Which share of the slots has a call?",
            "Low with lag: look at the window and the state.",
            "percentunit",
            Query(busy_share(), "share"),
        ),
        STATE,
        Panel(
            "Throughput",
            "How much comes in, and what becomes of it?",
            "In above out for long: the lag grows.",
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

LAG = Row("Lag and freshness", (LAG_BY_PARTITION, AGE_BY_PARTITION))

LATENCY = Row(
    "Latency by stage",
    (
        Panel(
            "Where the time goes",
            "How long does a message spend in each stage, on average?",
            "The largest part is the one to work at; a commit holds no message up.",
            "s",
            STAGES,
            width=12,
            stacked=True,
        ),
        Panel(
            "End to end",
            "How long from a message's own timestamp to its acknowledged outcome?",
            "What readers feel; the objective is five minutes for 99 %.",
            "s",
            spread("sluice_end_to_end_seconds"),
            width=12,
        ),
        Panel(
            "Queue",
            "How long does a message wait for its slot?",
            "It grows when slots, workers or limits are short.",
            "s",
            spread("sluice_queue_wait_seconds"),
            width=6,
        ),
        Panel(
            "Call",
            "How long does one call to the model take, errors and timeouts left out?",
            "It follows the length of the answers; a smaller record or model is faster.",
            "s",
            spread("sluice_call_duration_seconds", answered="true"),
            width=6,
        ),
        Panel(
            "Lane",
            "How long does an answered message wait for earlier ones of its lane?",
            "What order costs: delivery.ordering key costs less than partition, none nothing.",
            "s",
            spread("sluice_lane_wait_seconds"),
            width=6,
        ),
        Panel(
            "Publish",
            "How long does Kafka take to acknowledge an outcome?",
            "Seconds: look at the brokers and their replicas.",
            "s",
            spread("sluice_publish_duration_seconds"),
            width=6,
        ),
    ),
)

MODEL = Row(
    "Model",
    (
        Panel(
            "Calls by result",
            "How do calls end?",
            "Anything but validated costs time or money.",
            "ops",
            (Query(rate("sluice_calls_total", "result"), "{{result}}"),),
            stacked=True,
        ),
        Panel(
            "Validated",
            "Which share of the calls gives an answer that validates?",
            "Falling after a change of record, instructions or model: go back.",
            "percentunit",
            (Query(answered_share(), "share"),),
            maximum=1,
        ),
        Panel(
            "Tokens",
            "How many tokens go in and out each second, by model?",
            "Input grows with instructions and examples, which go along with every call.",
            "short",
            (Query(rate("sluice_tokens_total", "model, type"), "{{model}} {{type}}"),),
        ),
        Panel(
            "Waits for another attempt",
            "Why do messages wait to be tried again?",
            "Rate limits: ask for more. Credentials, quota, setting: only mending it helps.",
            "ops",
            (Query(rate("sluice_retries_total", "reason"), "{{reason}}"),),
            stacked=True,
        ),
        Panel(
            "Re-asks",
            "How often is the model told why its answer did not validate?",
            "Many: the schema or the instructions ask too much of this model.",
            "ops",
            (Query(rate("sluice_reasks_total", "model"), "{{model}}"),),
        ),
        Panel(
            "Rejected by reason",
            "Why do messages go to the dead letter topic?",
            "Each dead letter says more in its headers; the runbook goes through the reasons.",
            "ops",
            (Query(rate("sluice_messages_rejected_total", "reason"), "{{reason}}"),),
            stacked=True,
        ),
    ),
)

MONEY = Row(
    "Money, budgets, cache, guard",
    (
        Panel(
            "Cost per hour",
            "What would an hour like this cost, by model?",
            "Above plan: a smaller model, shorter instructions, the cache, or a spend limit.",
            "currencyUSD",
            (Query(f"3600 * {rate('sluice_cost_usd_total', 'model')}", "{{model}}"),),
            stacked=True,
        ),
        Panel(
            "What it is paid for",
            "Which part goes into first answers, and which into further tries?",
            "Much for reask: schema or instructions; for repeat: timeouts that are too short.",
            "currencyUSD",
            (Query(f"3600 * {rate('sluice_cost_usd_total', 'purpose')}", "{{purpose}}"),),
            stacked=True,
        ),
        Panel(
            "Answers from the cache",
            "How often is an answer there already?",
            "Hits and shared ones cost nothing; errors are paid for: look at the store.",
            "ops",
            (Query(rate("sluice_cache_lookups_total", "result"), "{{result}}"),),
            stacked=True,
        ),
        Panel(
            "What holds calls up",
            "How long until the next call may start, by what holds it up?",
            "Requests, tokens, spend: a limit of yours. Pace, cooldown, circuit: the provider's.",
            "s",
            (
                Query(
                    f"max by (cause) ({_select('sluice_admission_wait_seconds', {})})", "{{cause}}"
                ),
            ),
        ),
        Panel(
            "Spent in the last hour",
            "What have the calls of the last hour cost, over all workers?",
            "At limits.spend_usd_per_hour calls wait; raise it, or see what it is paid for.",
            "currencyUSD",
            (Query(total("sluice_spent_last_hour_usd"), "dollars"),),
        ),
        Panel(
            "Reject guard",
            "Has intake stopped because too much is rejected?",
            "1: mend the cause; the guard itself looks whether it is over.",
            "short",
            (Query(f"max ({_select('sluice_reject_guard_tripped', {})})", "tripped"),),
        ),
    ),
)

SATURATION = Row("Slots and window", (SLOTS, WINDOW, FULL_WINDOW))

CAUSES = Row(
    "Kafka and process",
    (
        COMMITS,
        Panel(
            "Rebalances",
            "How often do partitions move, and how many calls were cut off?",
            "Often: workers restart or heartbeats come too late. Cut off: longer drain times.",
            "ops",
            (
                Query(rate("sluice_rebalances_total"), "rebalances"),
                Query(rate("sluice_calls_abandoned_total"), "calls cut off"),
                Query(rate("sluice_publish_retries_total"), "sends repeated"),
            ),
        ),
        LOG_LINES,
        EVENT_LOOP,
        CPU,
        MEMORY,
    ),
)

NOW = Row(
    "What it does",
    (
        figure(
            "Ready",
            "Does it take messages?",
            "1 for each worker is yes; else /readyz says why not.",
            "short",
            Query(total("sluice_ready"), "ready"),
        ),
        figure(
            "Partitions",
            "How many partitions does it hold?",
            "None in a settled group: it is a spare one.",
            "short",
            Query(
                f"count ({_select('sluice_partition_next_offset', {})}) or vector(0)", "partitions"
            ),
        ),
        figure(
            "Up for",
            "How long ago did it start?",
            "Short again and again: see how its last run ended.",
            "s",
            Query(f"time() - min ({_select('process_start_time_seconds', {})})", "time"),
        ),
        figure(
            "Finished",
            "How many messages get their outcome each second?",
            "Compare with other workers: one alone that is slow is short of CPU.",
            "ops",
            Query(rate("sluice_messages_finished_total"), "per second"),
        ),
        figure(
            "Messages taken",
            "How many messages are taken and not finished?",
            "Its bound is limits.window.",
            "short",
            Query(total("sluice_window_messages"), "messages"),
        ),
        figure(
            "Window's bytes",
            "How much do their keys and values take?",
            "Its bound is limits.window_bytes: at it, intake stops.",
            "bytes",
            Query(total("sluice_window_bytes"), "bytes"),
        ),
        STATE,
        Panel(
            "Where the time goes",
            "How long does a message spend in each stage, on average?",
            "The largest part is the one to work at; a commit holds no message up.",
            "s",
            STAGES,
            width=12,
            stacked=True,
        ),
    ),
)

PARTITIONS = Row(
    "Its partitions",
    (
        LAG_BY_PARTITION,
        AGE_BY_PARTITION,
        Panel(
            "Progress",
            "How fast does each next offset move?",
            "One that stands with lag: its oldest message does not finish.",
            "ops",
            (
                Query(
                    "sum by (topic, partition) (deriv("
                    f"{_select('sluice_partition_next_offset', {})}[$__rate_interval]))",
                    "{{topic}}[{{partition}}]",
                ),
            ),
        ),
        Panel(
            "Unfinished",
            "How many messages of each partition are in the window?",
            "Much more of one than of others: a hot partition.",
            "short",
            (
                Query(
                    total("sluice_partition_unfinished", "topic, partition"),
                    "{{topic}}[{{partition}}]",
                ),
            ),
        ),
        Panel(
            "Completed map",
            "How full is the room for what is finished beyond the next offset?",
            "At 0.75 the partition takes no more until its oldest message finishes.",
            "percentunit",
            (
                Query(
                    total("sluice_partition_completed_map_ratio", "topic, partition"),
                    "{{topic}}[{{partition}}]",
                ),
            ),
            maximum=1,
        ),
    ),
)

WORK = Row("Its slots and window", (SLOTS, WINDOW, FULL_WINDOW))

KAFKA = Row(
    "Its Kafka",
    (
        COMMITS,
        Panel(
            "Commit",
            "How long does a commit take?",
            "Seconds: look at the group's coordinator.",
            "s",
            spread("sluice_commit_duration_seconds"),
        ),
        Panel(
            "Rebalance",
            "How long does a reassignment stop the worker?",
            "Near delivery.rebalance_drain_s: long calls; the whole group waits for them.",
            "s",
            spread("sluice_rebalance_duration_seconds"),
        ),
        Panel(
            "What the client does",
            "Are clients replaced, closes forced, sends repeated?",
            "More than now and then: something between here and the brokers drops connections.",
            "ops",
            (
                Query(rate("sluice_clients_replaced_total", "client"), "{{client}} replaced"),
                Query(rate("sluice_stops_forced_total", "client"), "{{client}} cut off"),
                Query(rate("sluice_publish_retries_total"), "sends repeated"),
            ),
        ),
        Panel(
            "Messages that are not taken",
            "How many fetched messages were known already, or finished by an earlier holder?",
            "Some at each rebalance are as it should be. Missing ones are lost: longer retention.",
            "ops",
            (
                Query(rate("sluice_messages_dropped_total"), "known already"),
                Query(rate("sluice_messages_spared_total"), "finished by another"),
                Query(rate("sluice_messages_missing_total"), "missing"),
                Query(rate("sluice_metadata_foreign_total"), "foreign metadata"),
            ),
        ),
        Panel(
            "Clocks",
            "How long ago did the poll loop turn and the watchdog look; is a call overdue?",
            "Above a minute or two /livez fails, and a restart helps.",
            "s",
            (
                Query(largest("sluice_poll_turn_age_seconds"), "poll loop"),
                Query(largest("sluice_look_age_seconds"), "watchdog"),
                Query(largest("sluice_call_overdue_seconds"), "overdue call"),
                Query(largest("sluice_group_unsettled_seconds"), "unsettled group"),
            ),
        ),
    ),
)

PROCESS = Row(
    "Its process",
    (
        EVENT_LOOP,
        CPU,
        MEMORY,
        Panel(
            "Tasks",
            "How many tasks does the event loop have?",
            "About one for each message in the window; growing without end it is a fault of ours.",
            "short",
            (Query(total("sluice_tasks"), "tasks"),),
        ),
        Panel(
            "Open files",
            "How many files and connections are open?",
            "It should be flat; near the limit of the process nothing works any more.",
            "short",
            (
                Query(total("process_open_fds"), "open"),
                Query(total("process_max_fds"), "most"),
            ),
        ),
        LOG_LINES,
    ),
)

PAGES = (
    Page(
        "sluice",
        "Sluice",
        "Text messages in, validated records out: all workers.",
        (WELL, LAG, LATENCY, MODEL, MONEY, SATURATION, CAUSES),
    ),
    Page(
        "sluice-worker",
        "Sluice: one worker",
        "A look into one worker: its partitions, its Kafka, its process.",
        (NOW, PARTITIONS, WORK, KAFKA, PROCESS),
        several=False,
    ),
)


# --- Grafana's model --------------------------------------------------------------------------


def built(page: Page) -> dict[str, Any]:
    """The dashboard in Grafana's JSON model."""
    made = (
        build.Dashboard(page.title)
        .uid(page.uid)
        .description(page.description)
        .tags(["sluice"])
        .readonly()
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .refresh("5s")
        .time("now-30m", "now")
        .timezone("browser")
        .version(1)
        .link(_other_pages())
        .annotation(_annotation("Alerts", ALERTS, "red"))
        .annotation(_annotation("Rebalances", REBALANCES, "yellow"))
    )
    for variable in _variables(page):
        made.with_variable(variable)
    number = 0
    for row in page.rows:
        number += 1
        made.with_row(build.Row(row.title).id(number))
        for panel in row.panels:
            number += 1
            made.with_panel(_panel(panel).id(number))
    model: dict[str, Any] = json.loads(json.dumps(made.build(), cls=JSONEncoder))
    for variable in model["templating"]["list"]:
        # The library gives each kind of variable the fields of intervals.
        for name in ("auto", "auto_min", "auto_count"):
            del variable[name]
    return model


ALERTS = 'ALERTS{alertname=~"Sluice.*", alertstate="firing", job=~"$job|"}'
REBALANCES = f"{rate('sluice_rebalances_total', 'instance')} > 0"


def _annotation(name: str, expression: str, color: str) -> build.AnnotationQuery:
    return (
        build.AnnotationQuery()
        .name(name)
        .datasource(DATASOURCE)
        .enable(True)
        .icon_color(color)
        .expr(expression)
    )


def _other_pages() -> build.DashboardLink:
    return (
        build.DashboardLink("Sluice")
        .type(dashboard.DashboardLinkType.DASHBOARDS)
        .tags(["sluice"])
        .include_vars(True)
        .keep_time(True)
    )


def _variables(page: Page) -> tuple[build.DatasourceVariable | build.QueryVariable, ...]:
    prometheus_of = dashboard.VariableOption(text="Prometheus", value="prometheus")
    return (
        build.DatasourceVariable("datasource")
        .label("Data source")
        .type("prometheus")
        .current(prometheus_of),
        _choice("job", "sluice_build_info", several=page.several),
        _choice("instance", 'sluice_build_info{job=~"$job"}', several=page.several),
        _choice("worker", 'sluice_build_info{job=~"$job", instance=~"$instance"}', everything=".*"),
    )


def _choice(
    label: str, series: str, *, several: bool = True, everything: str = ".+"
) -> build.QueryVariable:
    choice = (
        build.QueryVariable(label)
        .label(label.capitalize())
        .datasource(DATASOURCE)
        .query({"query": f"label_values({series}, {label})", "refId": label})
        # At each change of the time range: workers come and go.
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
    )
    if several:
        chosen = dashboard.VariableOption(text="All", value="$__all", selected=True)
        choice.multi(True).include_all(True).all_value(everything).current(chosen)
    return choice


def _panel(panel: Panel) -> stat.Panel | timeseries.Panel:
    made = _figure() if panel.kind == "stat" else _graph(panel)
    made.title(panel.title).description(panel.description).datasource(DATASOURCE)
    made.unit(panel.unit).min(0).span(panel.width).height(panel.height)
    if panel.maximum is not None:
        made.max(panel.maximum)
    for series, color in panel.colors.items():
        paint = dashboard.DynamicConfigValue(
            id_val="color", value={"mode": "fixed", "fixedColor": color}
        )
        made.override_by_name(series, [paint])
    for index, query in enumerate(panel.queries):
        made.with_target(_target(query, index))
    return made


def _figure() -> stat.Panel:
    last = form.ReduceDataOptions().calcs(["lastNotNull"]).values(False)
    return (
        stat.Panel()
        .reduce_options(last)
        .color_mode(common.BigValueColorMode.VALUE)
        .graph_mode(common.BigValueGraphMode.AREA)
    )


def _graph(panel: Panel) -> timeseries.Panel:
    stacking = common.StackingMode.NORMAL if panel.stacked else common.StackingMode.NONE
    return (
        timeseries.Panel()
        .fill_opacity(40 if panel.stacked else 10)
        .stacking(form.StackingConfig().mode(stacking))
        .show_points(common.VisibilityMode.NEVER)
        .legend(
            form.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(
            form.VizTooltipOptions()
            .mode(common.TooltipDisplayMode.MULTI)
            .sort(common.SortOrder.DESCENDING)
        )
    )


def _target(query: Query, index: int) -> prometheus.Dataquery:
    return (
        prometheus.Dataquery()
        .ref_id(chr(ord("A") + index))
        .datasource(DATASOURCE)
        .editor_mode(QueryEditorMode.CODE)
        .expr(query.expression)
        .legend_format(query.legend)
        # Where a bucket carries the id of a trace, the graph shows it.
        .exemplar("sluice_call_duration_seconds_bucket" in query.expression)
        .range()
    )


def text(page: Page) -> str:
    """The file's content."""
    return json.dumps(built(page), indent=2) + "\n"


if __name__ == "__main__":
    for each in PAGES:
        each.file.write_text(text(each))

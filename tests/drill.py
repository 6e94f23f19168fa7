"""The fire drill: `python -m tests.drill` shows that the right alerts fire, and end, in a real run.

It starts a real Kafka, the scripted model endpoint, `python -m service run` and a real Prometheus
with the rules of deploy/prometheus, keeps messages coming, and does to them what the phases below
say. A phase fails where an alert that it names does not fire, where another one does, or where one
does not end. In the end every query of the dashboards and every recording rule must have returned
something. Takes some minutes; the exit code is 0 only if all of it held.

Alerts wait for minutes and count over days. So that the drill does not, time in the rules runs
sixty times as fast: `[5m]` becomes `[5s]`, `for: 10m` becomes `for: 10s`, and a message is late
after five seconds instead of five minutes. Nothing else of the rules is touched.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import math
import random
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from rich.console import Console
from rich.table import Table

from tests.support.endpoint import Endpoint, Fault, Latency, Step
from tests.support.kafka import RealKafka
from tests.support.pictures import picture
from tests.support.prometheus import Prometheus, load
from tests.support.service import Service, service
from tests.support.topics import create_topic

DEPLOY = Path(__file__).parents[1] / "deploy"
RULES = DEPLOY / "prometheus" / "sluice.rules.yml"

FASTER = 60
"""Times; more would leave too few scrapes of a second in the shortest window."""
SCRAPE_S = 1
LOOK_S = 1.0
PER_SECOND = 20
"""Messages; few enough for a busy machine, and enough that ten make no burn rate."""
POISONED = 0.3
"""Share of the flood that the model refuses: far above the objective, and far below what stops the
intake."""

FIRES_WITHIN_S = 90.0
ENDS_WITHIN_S = 240.0
"""After an outage: the circuit's longest wait, the backlog, and the windows that still see it."""
QUIET_S = 5.0
"""Nothing has fired for so long: it is over."""

SLOW = {"SluiceFreshnessBudgetBurnsSlowly", "SluiceSuccessBudgetBurnsSlowly"}
"""They look back for days, a quarter of an hour and more in the drill: they may fire from the first
fault on, and nobody waits for their end."""
MACHINE = {"SluiceEventLoopLate"}
"""It speaks of the machine, and is right wherever the drill has to share it."""
NOT_WAITED_FOR = SLOW | MACHINE
OUTAGE = {"SluiceNotReady", "SluiceFallsBehind"}
"""What an outage sets off too if it lasts."""
BACKLOG = {"SluiceFreshnessBudgetBurnsFast", "SluiceFallsBehind"}
"""What the backlog of an outage sets off afterwards."""

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def faster(rules: str) -> str:
    """The rules with their time `FASTER` times as fast."""

    def shortened(found: re.Match[str]) -> str:
        seconds = int(found[2]) * _UNITS_S[found[3]] / FASTER
        return f"{found[1]}{max(1, round(seconds))}s{found[4]}"

    rules = re.sub(r"(\[)(\d+)([smhd])(\])", shortened, rules)
    rules = re.sub(r"(for: )(\d+)([smhd])(\n)", shortened, rules)
    return rules.replace('le="300.0"', 'le="5.0"').replace(":max) > 300", ":max) > 5")


@dataclass
class Stage:
    """What the drill acts on."""

    broker: RealKafka
    endpoint: Endpoint
    worker: Service
    prometheus: Prometheus
    leaving: AsyncExitStack
    stranger: Service | None = None
    poisoned: float = 0.0
    began_s: float = field(default_factory=time.time)

    async def nothing(self) -> None:
        """Let it run."""

    async def take_provider_down(self) -> None:
        self.endpoint.down_until_s = math.inf
        self.endpoint.cut()

    async def bring_provider_back(self) -> None:
        self.endpoint.down_until_s = 0.0

    async def refuse_credentials(self) -> None:
        self.endpoint.fault = Fault(Step("401"))

    async def mend_endpoint(self) -> None:
        self.endpoint.fault = None

    async def flood(self) -> None:
        self.poisoned = POISONED

    async def let_model_refuse(self) -> None:
        """Every text, as a model that was changed might."""
        self.endpoint.fault = Fault(Step("refuse"))

    async def end_flood(self) -> None:
        self.poisoned = 0.0

    async def kill_kafka(self) -> None:
        await asyncio.to_thread(self.broker.kill)

    async def start_kafka(self) -> None:
        await asyncio.to_thread(self.broker.start)

    async def let_stranger_in(self) -> None:
        """Another worker of the group, which Prometheus does not see."""
        stranger = service(environment(self.broker, self.endpoint))
        self.stranger = await self.leaving.enter_async_context(stranger)

    async def turn_stranger_out(self) -> None:
        assert self.stranger is not None
        self.stranger.signal(signal.SIGTERM)
        ended = await self.stranger.ended()
        assert ended.code == 0, ended.printed

    async def stop_worker(self) -> None:
        self.worker.signal(signal.SIGTERM)
        ended = await self.worker.ended()
        assert ended.code == 0, ended.printed

    async def firing(self) -> set[str]:
        alerts = await asyncio.to_thread(self.prometheus.alerts)
        return {one["labels"]["alertname"] for one in alerts if one["state"] == "firing"}


@dataclass(frozen=True)
class Phase:
    """What is done, which alerts have to fire, which others may, and whether all must end."""

    name: str
    act: Callable[[Stage], Awaitable[None]]
    fires: frozenset[str] | set[str] = frozenset()
    may: frozenset[str] | set[str] = frozenset()
    ends: bool = False
    least_s: float = 10.0


PHASES = (
    Phase("healthy", Stage.nothing, least_s=20.0),
    Phase(
        "provider down", Stage.take_provider_down, {"SluiceWaitingForProvider"}, OUTAGE, least_s=25
    ),
    Phase(
        "recovered",
        Stage.bring_provider_back,
        {"SluiceFreshnessBudgetBurnsFast"},
        OUTAGE | BACKLOG,
        ends=True,
    ),
    Phase(
        "credentials refused",
        Stage.refuse_credentials,
        {"SluiceCredentialsRefused", "SluiceWaitingForProvider"},
        OUTAGE,
    ),
    Phase(
        "accepted again",
        Stage.mend_endpoint,
        # The last probe before may have been refused after the first alert had ended.
        may=OUTAGE | BACKLOG | {"SluiceCredentialsRefused"},
        ends=True,
    ),
    Phase(
        "a stranger in the group",
        Stage.let_stranger_in,
        {"SluicePartitionUnassigned"},
        BACKLOG,
    ),
    Phase("stranger gone", Stage.turn_stranger_out, may=BACKLOG, ends=True),
    Phase("poison flood", Stage.flood, {"SluiceSuccessBudgetBurnsFast", "SluiceDeadLettersGrow"}),
    Phase("flood over", Stage.end_flood, ends=True),
    Phase(
        "model refuses all",
        Stage.let_model_refuse,
        {"SluiceRejectGuardTripped"},
        OUTAGE | BACKLOG | {"SluiceSuccessBudgetBurnsFast", "SluiceDeadLettersGrow"},
    ),
    Phase(
        "model is good again",
        Stage.mend_endpoint,
        may=OUTAGE | BACKLOG | {"SluiceSuccessBudgetBurnsFast", "SluiceDeadLettersGrow"},
        ends=True,
    ),
    Phase(
        "Kafka down",
        Stage.kill_kafka,
        {"SluiceWaitingForKafka"},
        OUTAGE | {"SluiceCommitFailures"},
    ),
    Phase(
        "Kafka back",
        Stage.start_kafka,
        may=OUTAGE | BACKLOG | {"SluiceCommitFailures"},
        ends=True,
    ),
    Phase("worker stopped", Stage.stop_worker, {"SluiceAbsent"}),
)


@dataclass
class Seen:
    """What a phase showed; seconds since its begin."""

    phase: Phase
    lasted_s: float = 0.0
    fired_s: dict[str, float] = field(default_factory=dict)
    ended_s: float | None = None
    carried: frozenset[str] = frozenset()

    @property
    def missing(self) -> set[str]:
        return set(self.phase.fires) - self.fired_s.keys()

    @property
    def unexpected(self) -> set[str]:
        return (
            self.fired_s.keys() - self.phase.fires - self.phase.may - self.carried - NOT_WAITED_FOR
        )

    @property
    def good(self) -> bool:
        ended = self.ended_s is not None or not self.phase.ends
        return not self.missing and not self.unexpected and ended


async def play(phase: Phase, stage: Stage) -> Seen:
    """Do what the phase does and look at the alerts until it has shown all, or its time is up."""
    seen = Seen(phase, carried=frozenset(await stage.firing()))
    began_s = quiet_since_s = time.monotonic()
    await phase.act(stage)
    limit_s = ENDS_WITHIN_S if phase.ends else FIRES_WITHIN_S
    while seen.lasted_s < limit_s:
        firing = await stage.firing()
        now_s = time.monotonic()
        seen.lasted_s = now_s - began_s
        for name in firing:
            seen.fired_s.setdefault(name, seen.lasted_s)
        if firing - NOT_WAITED_FOR:
            quiet_since_s = now_s
        quiet = now_s - quiet_since_s >= QUIET_S
        if seen.lasted_s >= phase.least_s and not seen.missing and (quiet or not phase.ends):
            seen.ended_s = quiet_since_s - began_s if phase.ends else None
            break
        await asyncio.sleep(LOOK_S)
    return seen


# --- the dashboards' queries ------------------------------------------------------------------


def substituted(query: str) -> str:
    """As Grafana would ask it: all instances and workers, and four scrapes a rate."""
    query = query.replace("$__rate_interval", f"{4 * SCRAPE_S}s")
    return query.replace("$job", ".+").replace("$instance", ".+").replace("$worker", ".*")


def asked() -> dict[str, str]:
    """Every query of the dashboards, annotations included, and every recording rule, by name."""
    dashboard = load(DEPLOY / "grafana" / "dashboard.py")
    found = {}
    for page in dashboard.PAGES:
        for panel in itertools.chain.from_iterable(row.panels for row in page.rows):
            for query in panel.queries:
                found[f"{page.uid} / {panel.title} / {query.legend}"] = query.expression
        for annotation in dashboard.built(page)["annotations"]["list"]:
            found[f"{page.uid} / annotation {annotation['name']}"] = annotation["expr"]
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        records = [rule["record"] for rule in group["rules"] if "record" in rule]
        found |= {f"rule {record}": record for record in records}
    return found


def has_values(result: list[dict[str, Any]]) -> bool:
    return any(not math.isnan(float(value)) for one in result for _, value in one["values"])


async def silent(stage: Stage) -> dict[str, str]:
    """Queries that returned nothing in the whole run, or an error, with the reason."""
    wrong = {}
    for name, query in asked().items():
        try:
            result = await asyncio.to_thread(
                stage.prometheus.query_range, substituted(query), stage.began_s, time.time(), 2
            )
        except ValueError as error:
            wrong[name] = str(error)
            continue
        if not has_values(result):
            wrong[name] = "no value in the whole run"
    return wrong


def draw(stage: Stage, folder: Path) -> None:
    """Each dashboard as it looked at the end of the run, without Grafana."""
    span = (stage.began_s, time.time())

    def ask(query: str) -> list[dict[str, Any]]:
        return stage.prometheus.query_range(substituted(query), *span, 2)

    dashboard = load(DEPLOY / "grafana" / "dashboard.py")
    for page in dashboard.PAGES:
        (folder / f"{page.uid}.svg").write_text(picture(dashboard.built(page), ask, span))


# --- setting up -------------------------------------------------------------------------------


@asynccontextmanager
async def stage_set() -> AsyncIterator[Stage]:
    """Everything started, messages coming; everything stopped and removed at the end."""
    with RealKafka() as broker:
        for name in ("messages", "records", "dead-letters"):
            await create_topic(broker.bootstrap_servers, name)
        async with (
            Endpoint(record=False, latency=Latency(0.1, 0.5)) as endpoint,
            service(environment(broker, endpoint)) as worker,
            AsyncExitStack() as leaving,
        ):
            await worker.until("sluice_group_settled", 1)
            files = {"sluice.rules.yml": faster(RULES.read_text())}
            with Prometheus(configuration(worker), files) as prometheus:
                stage = Stage(broker, endpoint, worker, prometheus, leaving)
                await until_scraped(stage)
                async with asyncio.TaskGroup() as tasks:
                    feeding = tasks.create_task(feed(stage))
                    yield stage
                    feeding.cancel()


async def until_scraped(stage: Stage) -> None:
    """Before its first scrape Prometheus rightly misses the worker."""
    async with asyncio.timeout(60):
        while await stage.firing() or not await asyncio.to_thread(
            stage.prometheus.query, "rate(sluice_commits_total[5s])"
        ):
            await asyncio.sleep(LOOK_S)


def environment(broker: RealKafka, endpoint: Endpoint) -> dict[str, str]:
    return {
        "SLUICE_KAFKA__BOOTSTRAP_SERVERS": broker.bootstrap_servers,
        "SLUICE_KAFKA__SESSION_TIMEOUT_S": "10",
        "SLUICE_EXTRACTION__MODEL": "scripted",
        "SLUICE_LIMITS__CONCURRENCY": "20",
        "OPENAI_BASE_URL": endpoint.url,
        "OPENAI_API_KEY": "drill",
    }


def configuration(worker: Service) -> Mapping[str, Any]:
    every = f"{SCRAPE_S}s"
    return {
        "global": {
            "scrape_interval": every,
            "scrape_timeout": every,
            "evaluation_interval": every,
        },
        "rule_files": ["sluice.rules.yml"],
        "scrape_configs": [
            {"job_name": "sluice", "static_configs": [{"targets": [f"127.0.0.1:{worker.port}"]}]}
        ],
    }


async def feed(stage: Stage) -> None:
    """Messages at a steady rate, some of them poisoned during the flood, until cancelled."""
    chance = random.Random(0)
    client = AIOKafkaProducer(bootstrap_servers=stage.broker.bootstrap_servers, linger_ms=5)
    await client.start()
    try:
        for number in itertools.count():
            poison = " [[refuse]]" if chance.random() < stage.poisoned else ""
            text = f"Ada Lovelace is {number % 90}, says letter {number}{poison}"
            with suppress(KafkaError):  # Kafka may be down: that is part of the drill
                await client.send("messages", text.encode(), str(number % 50).encode())
            await asyncio.sleep(1 / PER_SECOND)
    finally:
        with suppress(KafkaError, TimeoutError):
            await asyncio.wait_for(client.stop(), 10)


# --- what it prints ---------------------------------------------------------------------------


def row(seen: Seen) -> tuple[str, ...]:
    fired = [
        f"{name} ({'still' if name in seen.carried else f'after {at:.0f} s'})"
        for name, at in sorted(seen.fired_s.items(), key=lambda one: one[1])
    ]
    wrong = [f"{name} did not fire" for name in sorted(seen.missing)]
    wrong += [f"{name} should not have" for name in sorted(seen.unexpected)]
    if seen.phase.ends and seen.ended_s is None:
        wrong.append("did not end")
    ended = f"{seen.ended_s:.0f} s" if seen.ended_s is not None else ""
    return (
        seen.phase.name,
        f"{seen.lasted_s:.0f} s",
        "\n".join(fired),
        ended,
        "\n".join(wrong) or "✓",
    )


def table(phases: list[Seen]) -> Table:
    made = Table("phase", "lasted", "fired", "all ended after", "as it should be", show_lines=True)
    for seen in phases:
        made.add_row(*row(seen))
    return made


async def drill(only: int | None, pictures: Path | None) -> bool:
    """Play the phases; whether all was as it should be."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    # What the feeder's client says while Kafka is down is no news.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    async with stage_set() as stage:
        phases = []
        for phase in PHASES[:only]:
            phases.append(await play(phase, stage))
            console.print(f"{'✓' if phases[-1].good else '✗'} {phase.name}")
        wrong = await silent(stage)
        if pictures is not None:
            await asyncio.to_thread(draw, stage, pictures)
    console.print(table(phases))
    console.print(f"{len(asked()) - len(wrong)} of {len(asked())} queries returned data")
    for name, why in wrong.items():
        console.print(f"✗ {name}: {why}")
    return not wrong and all(seen.good for seen in phases)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.drill", description=__doc__)
    parser.add_argument("--phases", type=int, default=None, help="only the first so many")
    parser.add_argument("--pictures", type=Path, default=None, help="a folder to draw them into")
    given = parser.parse_args()
    return 0 if asyncio.run(drill(given.phases, given.pictures)) else 1


if __name__ == "__main__":
    sys.exit(main())

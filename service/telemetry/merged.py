"""Several workers' pages as one, told by their parent: it asks each worker and merges the answers.

Rules of this file: every sample of a worker keeps what it had (exemplars and timestamps too) and
gets one label more, `worker`; a worker that does not answer in time is left out, and never holds
up the others' figures.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import aiohttp
from aiohttp import hdrs
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from service.telemetry.probes import Readiness

ANSWER_S = 4.0
"""The longest that a worker may take for its page; a probe of the chart's waits five seconds."""

PROBED = (200, 503)
"""What a probe answers with when all is as it should be there."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker as its parent sees it: where it answers, None before it has said so, and whether
    it has come up."""

    port: int | None
    up: bool


Workers = Mapping[int, Worker]
"""By their numbers; those that are done are not among them."""


class MergedAnswers:
    """What the parent's pages tell: everything of every worker, and what `registry` has besides."""

    def __init__(self, registry: CollectorRegistry, workers: Callable[[], Workers]) -> None:
        self._registry, self._workers = registry, workers

    async def metrics(self) -> CollectorRegistry:
        pages = await _pages(self._workers(), "/metrics", CONTENT_TYPE_LATEST)
        texts = {number: page.body for number, page in pages.items() if page.status == 200}
        # Seconds of CPU for many workers, in which probes and signals must not wait.
        return await asyncio.to_thread(merged, self._registry, texts)

    async def not_alive(self) -> Sequence[str]:
        workers = self._workers()
        pages = await _pages(workers, "/livez")
        reasons = []
        for number, worker in workers.items():
            if number in pages:
                reasons += pages[number].reasons(number)
            # One that has ended meanwhile is started again anyway.
            elif worker.up and self._workers().get(number) == worker:
                reasons.append(f"worker {number}: does not answer")
        return reasons

    async def readiness(self) -> Readiness:
        workers = self._workers()
        pages = await _pages(workers, "/readyz")
        reasons, states = [], {}
        for number, worker in workers.items():
            if number in pages:
                reasons += pages[number].reasons(number)
                states[str(number)] = pages[number].state
            elif worker.port is None:
                reasons.append(f"worker {number}: is being started")
                states[str(number)] = "starting"
            else:
                reasons.append(f"worker {number}: does not answer")
                states[str(number)] = "unknown"
        return Readiness(reasons, states)


def merged(registry: CollectorRegistry, texts: Mapping[int, str]) -> CollectorRegistry:
    """`registry` as it is now and what workers tell, by their numbers, as OpenMetrics."""
    families: dict[str, Metric] = {}
    for family in registry.collect():
        _extend(families, family, {})
    for number, text in texts.items():
        for family in text_string_to_metric_families(text):  # type: ignore[no-untyped-call]
            _extend(families, family, {"worker": str(number)})
    found = CollectorRegistry()
    found.register(_Families(families.values()))
    return found


def _extend(families: dict[str, Metric], family: Metric, labels: Mapping[str, str]) -> None:
    """Samples of one family stand together, as the format asks for, whosever they are."""
    if family.name not in families:
        families[family.name] = Metric(family.name, family.documentation, family.type, family.unit)
    families[family.name].samples.extend(
        sample._replace(labels={**sample.labels, **labels}) for sample in family.samples
    )


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


# --- asking -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Page:
    """What a worker has answered."""

    status: int
    body: str

    def reasons(self, number: int) -> list[str]:
        return [f"worker {number}: {reason}" for reason in json.loads(self.body)["reasons"]]

    @property
    def state(self) -> str:
        return str(json.loads(self.body)["state"])


async def _pages(workers: Workers, path: str, accept: str = "*/*") -> dict[int, _Page]:
    """The page of each worker that answers in time."""
    limit = aiohttp.ClientTimeout(total=ANSWER_S)
    asking = aiohttp.ClientSession(timeout=limit, headers={hdrs.ACCEPT: accept})
    async with asking as session, asyncio.TaskGroup() as tasks:
        asked = {
            number: tasks.create_task(_page(session, worker.port, path))
            for number, worker in workers.items()
            if worker.port is not None
        }
    answers = {number: task.result() for number, task in asked.items()}
    return {number: page for number, page in answers.items() if page is not None}


async def _page(session: aiohttp.ClientSession, port: int, path: str) -> _Page | None:
    try:
        async with session.get(f"http://127.0.0.1:{port}{path}") as answer:
            page = _Page(answer.status, await answer.text())
    except (aiohttp.ClientError, OSError, TimeoutError):
        return None
    return page if page.status in PROBED else None

"""The pages of several workers as one: their parent asks each worker and merges the answers.

Rules of this file: every sample of a worker stays as it is (with exemplar and timestamp) and gets
one more label, `worker`. A worker that does not answer in time is left out; it never holds up the
figures of the others.
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
"""The longest that a worker may take for its page, in seconds. The chart's probes wait five."""

PROBED = (200, 503)
"""The statuses of a page that can be read: 503 is how a probe says no. Any other is no answer."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker as its parent sees it. `port` is where it answers, None until it has told its
    parent; `up` is whether all of its parts have started."""

    port: int | None
    up: bool


WorkersByNumber = Mapping[int, Worker]
"""The workers by their numbers, without those that have ended for good."""


class MergedAnswers:
    """The parent's pages: those of all workers in one, and the parent's own metrics in
    `registry`."""

    def __init__(self, registry: CollectorRegistry, workers: Callable[[], WorkersByNumber]) -> None:
        self._registry, self._workers = registry, workers

    async def metrics(self) -> CollectorRegistry:
        pages = await _pages(self._workers(), "/metrics", CONTENT_TYPE_LATEST)
        texts = {number: page.body for number, page in pages.items() if page.status == 200}
        # With many workers it takes seconds of CPU, and probes and signals must not wait for it.
        return await asyncio.to_thread(merged, self._registry, texts)

    async def not_alive(self) -> Sequence[str]:
        workers = self._workers()
        pages = await _pages(workers, "/livez")
        reasons = []
        for number, worker in workers.items():
            if number in pages:
                reasons += pages[number].reasons(number)
            # A worker that has ended meanwhile is started again anyway.
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
    """A registry with the metrics of `registry` and those in `texts`: the workers' pages in
    OpenMetrics, by their numbers."""
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
    """Add a family's samples to the family of that name: the format wants them together."""
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
    """A worker's answer."""

    status: int
    body: str

    def reasons(self, number: int) -> list[str]:
        return [f"worker {number}: {reason}" for reason in json.loads(self.body)["reasons"]]

    @property
    def state(self) -> str:
        return str(json.loads(self.body)["state"])


async def _pages(workers: WorkersByNumber, path: str, accept: str = "*/*") -> dict[int, _Page]:
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

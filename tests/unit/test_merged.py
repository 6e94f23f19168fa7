"""Several workers' pages as one: nothing of a sample is lost, and nobody holds up the others."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import aiohttp
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from service.core.events import Called
from service.core.status import State, Status
from service.telemetry import merged
from service.telemetry.gauges import StatusGauges
from service.telemetry.merged import MergedAnswers, Worker
from service.telemetry.metrics import Metrics, WorkerMetrics
from service.telemetry.probes import OwnAnswers, Probes
from tests.unit.test_probes import PATIENCE, WELL

OPENMETRICS = "application/openmetrics-text;version=1.0.0"


class Served:
    """One worker's pages, with a call that left an exemplar."""

    def __init__(self, number: int) -> None:
        self.status = WELL
        registry = CollectorRegistry()
        metrics = Metrics(registry, models=("small",), trace_id=lambda: f"trace-{number}")
        registry.register(StatusGauges(lambda: self.status))
        for _ in range(number):
            metrics.observe(Called("small", "validated", 0.5))
        self.probes = Probes("127.0.0.1", 0, OwnAnswers(registry, self._status, PATIENCE))

    def _status(self) -> Status:
        return self.status


@dataclass
class Scene:
    """Two workers that answer, a third that a test may add, and the pages of their parent."""

    served: dict[int, Served]
    workers: dict[int, Worker]
    probes: Probes

    async def get(self, path: str, accept: str = "*/*") -> tuple[int, str]:
        url = f"http://127.0.0.1:{self.probes.port}{path}"
        async with (
            aiohttp.ClientSession() as session,
            session.get(url, headers={"Accept": accept}) as answer,
        ):
            return answer.status, await answer.text()

    async def samples(self) -> list[Sample]:
        _, page = await self.get("/metrics", OPENMETRICS)
        families = openmetrics_families(page)
        return [sample for family in families for sample in family.samples]


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        served = {number: Served(number) for number in (1, 2)}
        for one in served.values():
            await stack.enter_async_context(one.probes)
        workers = {number: Worker(one.probes.port, True) for number, one in served.items()}
        registry = CollectorRegistry()
        WorkerMetrics(registry).running.set(2)
        probes = Probes("127.0.0.1", 0, MergedAnswers(registry, lambda: dict(workers)))
        await stack.enter_async_context(probes)
        yield Scene(served, workers, probes)


@asynccontextmanager
async def silent() -> AsyncIterator[int]:
    """The port of somebody who takes requests and never answers."""
    waiting = asyncio.Event()

    async def handle(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await waiting.wait()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        waiting.set()
        server.close()


# --- metrics ---


async def test_each_sample_says_whose_it_is(scene: Scene) -> None:
    """Counters of both side by side; the parent's own without a number."""
    found = await scene.samples()
    calls = {
        one.labels["worker"]: one.value
        for one in found
        if one.name == "sluice_calls_total" and one.labels["result"] == "validated"
    }
    assert calls == {"1": 1, "2": 2}
    assert [one.labels for one in found if one.name == "sluice_workers"] == [{}]
    rest = [
        one for one in found if one.name not in ("sluice_workers", "sluice_worker_restarts_total")
    ]
    assert all(one.labels["worker"] in ("1", "2") for one in rest)


async def test_histograms_info_and_exemplars_are_kept(scene: Scene) -> None:
    """Every bucket, the version, and the trace of a call, each with its worker."""
    found = await scene.samples()
    buckets = [
        one
        for one in found
        if one.name == "sluice_call_duration_seconds_bucket" and one.labels["answered"] == "true"
    ]
    exemplars = {one.labels["worker"]: one.exemplar for one in buckets if one.exemplar}
    assert len({(one.labels["worker"], one.labels["le"]) for one in buckets}) == len(buckets) == 38
    assert {n: (one.labels, one.value) for n, one in exemplars.items()} == {
        "1": ({"trace_id": "trace-1"}, 0.5),
        "2": ({"trace_id": "trace-2"}, 0.5),
    }
    assert all(one.timestamp for one in exemplars.values())
    builds = [one.labels for one in found if one.name == "sluice_build_info"]
    assert [one["worker"] for one in builds] == ["1", "2"]
    assert all(one["version"] for one in builds)


async def test_families_stand_once(scene: Scene) -> None:
    """One help and one type for all workers, in both formats, as parsers insist on."""
    for accept, families in (
        (OPENMETRICS, openmetrics_families),
        ("text/plain", text_string_to_metric_families),
    ):
        _, page = await scene.get("/metrics", accept)
        names = [family.name for family in families(page)]
        assert len(names) == len(set(names))
        for kind in ("HELP", "TYPE"):
            lines = [line for line in page.splitlines() if line.startswith(f"# {kind} ")]
            assert len(lines) == len(set(lines)) == len(names)
    assert "# TYPE sluice_calls_total counter" in page
    assert 'sluice_state{state="running",worker="1"} 1.0' in page


async def test_one_that_does_not_answer_is_left_out(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dead or hanging, it costs the others no figure."""
    monkeypatch.setattr(merged, "ANSWER_S", 0.3)
    async with silent() as port:
        scene.workers[3] = Worker(port, True)
        scene.workers[4] = Worker(None, False)
        await scene.served[1].probes.__aexit__(None, None, None)
        found = await scene.samples()
    assert {one.labels.get("worker") for one in found} == {None, "2"}


async def test_label_values_cannot_break_the_merging() -> None:
    """A model's name with quotes and line breaks arrives as it is."""
    name = 'a "b"\nc\\d'
    registry = CollectorRegistry()
    Metrics(registry).observe(Called(name, "validated", 0.5))
    async with Probes("127.0.0.1", 0, OwnAnswers(registry, lambda: WELL, PATIENCE)) as probes:
        workers = {1: Worker(probes.port, True)}
        answers = MergedAnswers(CollectorRegistry(), lambda: workers)
        found = await answers.metrics()
    labels = {"model": name, "result": "validated", "worker": "1"}
    assert found.get_sample_value("sluice_calls_total", labels) == 1


# --- probes ---


async def test_all_well(scene: Scene) -> None:
    """Alive and ready, with the state of each."""
    assert (await scene.get("/livez"))[0] == 200
    code, body = await scene.get("/readyz")
    assert code == 200
    assert json.loads(body) == {
        "ready": True,
        "state": {"1": "running", "2": "running"},
        "reasons": [],
    }


async def test_one_that_needs_a_restart(scene: Scene) -> None:
    """What it says of itself is said with its number; the others are as they were."""
    scene.served[2].status = replace(WELL, call_overdue_s=100)
    code, body = await scene.get("/livez")
    assert code == 503
    assert json.loads(body)["reasons"] == ["worker 2: a call exceeds its deadline by 100 s"]


async def test_one_that_is_not_ready(scene: Scene) -> None:
    """All have to be; liveness does not follow."""
    scene.served[1].status = replace(
        WELL, state=State.WAITING_FOR_PROVIDER, not_ready=("the credentials are refused",)
    )
    code, body = await scene.get("/readyz")
    assert code == 503
    assert json.loads(body) == {
        "ready": False,
        "state": {"1": "waiting_for_provider", "2": "running"},
        "reasons": ["worker 1: the credentials are refused"],
    }
    assert (await scene.get("/livez"))[0] == 200


async def test_one_that_is_started_again(scene: Scene) -> None:
    """It makes the whole not ready, but a restart of all would not help."""
    scene.workers[2] = Worker(None, False)
    assert (await scene.get("/livez"))[0] == 200
    code, body = await scene.get("/readyz")
    assert code == 503
    assert json.loads(body)["reasons"] == ["worker 2: is being started"]
    assert json.loads(body)["state"] == {"1": "running", "2": "starting"}


@pytest.mark.parametrize("up", [True, False])
async def test_one_that_hangs(scene: Scene, up: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has come up and does not answer needs a restart; one on its way up does not."""
    monkeypatch.setattr(merged, "ANSWER_S", 0.3)
    async with silent() as port:
        scene.workers[2] = Worker(port, up)
        code, body = await scene.get("/livez")
        ready = await scene.get("/readyz")
    assert code == (503 if up else 200)
    assert json.loads(body)["reasons"] == (["worker 2: does not answer"] if up else [])
    assert ready[0] == 503
    assert json.loads(ready[1])["state"] == {"1": "running", "2": "unknown"}


async def test_one_that_ends_while_it_is_asked(scene: Scene) -> None:
    """It is started again anyway: no reason to restart all."""
    await scene.served[2].probes.__aexit__(None, None, None)
    seen = iter([dict(scene.workers), {**scene.workers, 2: Worker(None, False)}])
    assert await MergedAnswers(CollectorRegistry(), lambda: next(seen)).not_alive() == []

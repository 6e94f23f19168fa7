"""`sluice run --workers`: several processes of one command on a real Kafka."""

from __future__ import annotations

import asyncio
import os
import re
import signal

from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.process.conftest import Scene
from tests.support.endpoint import Latency
from tests.support.service import Service, children, run, service

COUNT = 800
ARGUMENTS = ("run", "--workers", "2")
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


async def finished(running: Service) -> dict[str, float]:
    """Messages finished, by the worker whose they were."""
    _, page = await running.get("/metrics", OPENMETRICS)
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == "sluice_messages_finished_total":
                worker = sample.labels["worker"]
                found[worker] = found.get(worker, 0) + sample.value
    return found


async def until_both_finish(running: Service, least: float) -> None:
    async with asyncio.timeout(60):
        while min((found := await finished(running)).values(), default=0) < least or len(found) < 2:
            await asyncio.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_two_workers_of_one_command(scene: Scene) -> None:
    """Both take part, and one page tells of both; one that is killed with -9 comes back, and
    nothing is lost; SIGTERM ends all with 0, and no process is left."""
    scene.endpoint.latency = Latency(median_s=0.08)
    await scene.send(*((b"key-%d" % (n % 50), b"Text number %d" % n) for n in range(COUNT)))
    settings = {"SLUICE_LIMITS__CONCURRENCY": "8", "SLUICE_DELIVERY__DRAIN_TIMEOUT_S": "30"}
    environment = {**scene.environment, **settings}
    async with service(environment, ARGUMENTS) as running:
        await until_both_finish(running, COUNT / 40)
        assert (await running.get("/livez"))[0] == 200
        assert '"state": {"1": "running", "2": "running"}' in (await running.get("/readyz"))[1]
        workers = children(running.process.pid)
        assert len(workers) == 2
        assert all(os.getsid(one) == one for one in workers), "Ctrl-C would reach them too"
        os.kill(min(workers), signal.SIGKILL)
        await running.until("sluice_worker_restarts_total", 1)
        await running.until("sluice_workers", 2)
        async with asyncio.timeout(60):
            while await scene.lag():
                await asyncio.sleep(0.3)
        await until_both_finish(running, 0)
        workers |= children(running.process.pid)
        running.signal(signal.SIGTERM)
        ended = await running.ended()
    assert ended.code == 0, ended.printed
    assert not any(map(alive, workers))
    assert len(workers) == 3
    assert re.search(
        r"ERROR .* worker \d was killed by SIGKILL; it is started again", ended.printed
    )
    assert ended.printed.count("delivery.drain_timeout_s is 30") == 1
    assert re.search(r"INFO .* stopped: .* worker=1$", ended.printed, re.MULTILINE)
    assert (await scene.outcomes()).keys() == (await scene.everything()).keys()
    assert scene.endpoint.total() - COUNT <= 32 + 100


async def test_two_workers_catch_up(scene: Scene) -> None:
    """Each ends once what it holds has reached the ends, and the command with the last."""
    await scene.send(*((b"key-%d" % n, b"Text number %d" % n) for n in range(60)))
    ended = await run(scene.environment, *ARGUMENTS, "--until-caught-up")
    assert ended.code == 0, ended.printed
    assert await scene.outcomes() == await scene.everything()
    assert scene.endpoint.total() == 60


async def test_a_topic_that_is_not_there(scene: Scene) -> None:
    """What no worker can start with is said once, as by one alone, and ends them all with 1."""
    wrong = {**scene.environment, "SLUICE_INPUT__TOPICS": "nowhere"}
    alone = await run(wrong, "run")
    ended = await run(wrong, *ARGUMENTS)
    assert ended.code == alone.code == 1, ended.printed
    said = [line for line in ended.printed.splitlines() if not re.match(r"\d\d:\d\d:", line)]
    assert said == [
        line for line in alone.printed.splitlines() if not re.match(r"\d\d:\d\d:", line)
    ]
    assert len(said) == 1
    assert "nowhere" in said[0]


async def test_orphans_do_not_stay(scene: Scene) -> None:
    """Workers whose parent is killed with -9 finish what is in flight and end."""
    async with service(scene.environment, ARGUMENTS) as running:
        await running.until("sluice_ready", 2)
        workers = children(running.process.pid)
        running.signal(signal.SIGKILL)
        try:
            async with asyncio.timeout(30):
                while any(map(alive, workers)):
                    await asyncio.sleep(0.1)
        finally:
            for one in filter(alive, workers):
                os.kill(one, signal.SIGKILL)
        printed = running.printed
    assert len(workers) == 2
    assert printed.count("is gone") == printed.count("stopped: 0 messages") == 2

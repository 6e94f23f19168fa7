"""Two workers of one group on a real Kafka: joining, leaving and dying under load."""

from __future__ import annotations

import asyncio
import signal

from tests.process.conftest import Scene
from tests.support.endpoint import Latency
from tests.support.service import service

COUNT = 800


async def load(scene: Scene) -> dict[str, str]:
    scene.endpoint.latency = Latency(median_s=0.08)
    await scene.send(*((b"key-%d" % (n % 50), b"Text number %d" % n) for n in range(COUNT)))
    return {**scene.environment, "SLUICE_LIMITS__CONCURRENCY": "8"}


async def until_done(scene: Scene, within_s: float = 60) -> None:
    async with asyncio.timeout(within_s):
        while await scene.lag():
            await asyncio.sleep(0.3)


async def test_a_worker_that_joins_and_one_that_leaves_repeat_nothing(scene: Scene) -> None:
    """A second worker joins under load, the first is stopped by SIGTERM: no call is made twice,
    every message has one outcome."""
    environment = await load(scene)
    async with service(environment) as first:
        await first.until("sluice_messages_finished_total", COUNT / 8)
        async with service(environment) as second:
            await second.until("sluice_messages_finished_total", COUNT / 40)
            first.signal(signal.SIGTERM)
            assert (await first.ended()).code == 0
            await until_done(scene)
            second.signal(signal.SIGTERM)
            assert (await second.ended()).code == 0
    assert await scene.outcomes() == await scene.everything()
    assert scene.endpoint.total() == COUNT


async def test_the_partitions_of_a_dead_worker_move(scene: Scene) -> None:
    """One of two workers is killed with -9: the other finishes everything; what is repeated is at
    most the dead one's window and what it finished since its last commit."""
    environment = await load(scene)
    async with service(environment) as first, service(environment) as second:
        for worker in (first, second):
            await worker.until("sluice_messages_finished_total", COUNT / 10)
        first.signal(signal.SIGKILL)
        await until_done(scene)
        second.signal(signal.SIGTERM)
        assert (await second.ended()).code == 0
    outcomes = await scene.outcomes()
    assert outcomes.keys() == (await scene.everything()).keys()
    assert scene.endpoint.total() - COUNT <= 32 + 100

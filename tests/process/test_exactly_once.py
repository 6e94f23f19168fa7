"""Exactly once on a real Kafka: a reader of committed records sees each outcome once."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter

import pytest

from service.core.messages import Partition
from service.kafka.transactions.producer import transactional_id
from service.kafka.transactions.transactions import PREFIX
from tests.process.conftest import Scene
from tests.support.endpoint import Latency
from tests.support.service import service
from tests.support.topics import producer

pytestmark = pytest.mark.timeout(240)

COUNT = 600


async def load(scene: Scene) -> dict[str, str]:
    scene.endpoint.latency = Latency(median_s=0.05, sigma=1.0)
    await scene.send(*((b"key-%d" % (n % 50), b"Text number %d" % n) for n in range(COUNT)))
    return {
        **scene.environment,
        "SLUICE_DELIVERY__MODE": "exactly_once",
        "SLUICE_LIMITS__CONCURRENCY": "8",
    }


async def ids(scene: Scene) -> Counter[str]:
    """How often each id stands in the output, for a reader of committed records."""
    return Counter(read.header["sluice.id"] for read in await scene.outputs())


async def test_each_outcome_is_seen_once(scene: Scene) -> None:
    """Run to the end, without a fault: outputs, dead letters and offsets are all there, once."""
    environment = await load(scene)
    await scene.send(b"\xff not UTF-8", (b"key-2", None), (b"key-1", b"Text [[refuse]]"))
    await scene.catch_up(**environment)
    assert set((await ids(scene)).values()) == {1}
    outcomes = await scene.outcomes()
    skipped = 1
    assert outcomes.total() == len(outcomes) == COUNT + 3 - skipped
    assert await scene.lag() == 0


async def test_workers_killed_in_turn_leave_no_duplicate(scene: Scene) -> None:
    """kill -9 under load, again and again: each id once, nothing lost."""
    environment = await load(scene)
    for share in (0.2, 0.4, 0.6):
        async with service(environment) as running:
            await running.until("sluice_messages_finished_total", COUNT * 0.2)
            running.signal(signal.SIGKILL)
            await running.ended()
        print(share, (await ids(scene)).total())
    await scene.catch_up(**environment)
    assert set((await ids(scene)).values()) == {1}
    assert await scene.outcomes() == await scene.everything()


async def test_a_worker_that_was_stopped_for_too_long_is_fenced(scene: Scene) -> None:
    """SIGSTOP beyond its session, then SIGCONT: what it still has is not seen, and it goes on."""
    environment = await load(scene)
    scene.endpoint.latency = Latency(median_s=0.2, sigma=0.5)
    async with service(environment) as first:
        await first.until("sluice_messages_finished_total", COUNT / 8)
        async with service(environment) as second:
            await second.until("sluice_messages_finished_total", COUNT / 60)
            first.signal(signal.SIGSTOP)
            async with asyncio.timeout(60):
                while await scene.lag() > COUNT / 8:
                    await asyncio.sleep(0.3)
            first.signal(signal.SIGCONT)
            async with asyncio.timeout(60):
                while await scene.lag():
                    await asyncio.sleep(0.3)
            for worker in (first, second):
                worker.signal(signal.SIGTERM)
                assert (await worker.ended()).code == 0
    assert set((await ids(scene)).values()) == {1}
    assert await scene.outcomes() == await scene.everything()


async def test_a_producer_that_takes_our_place_is_not_the_end(scene: Scene) -> None:
    """Whoever fences a partition that is still ours voids what is not committed: it is read anew
    from what Kafka holds, and each outcome is still seen once."""
    environment = await load(scene)
    scene.endpoint.latency = Latency(median_s=0.2, sigma=0.5)
    async with service(environment) as running:
        await running.until("sluice_messages_finished_total", COUNT / 8)
        for number in range(3):
            where = Partition(scene.input, number)
            name = transactional_id(PREFIX, scene.group, where)
            async with producer(scene.servers, transactional_id=name):
                pass
        async with asyncio.timeout(90):
            while await scene.lag():
                await asyncio.sleep(0.3)
        running.signal(signal.SIGTERM)
        ended = await running.ended()
    assert ended.code == 0, ended.printed
    assert "fenced" in ended.printed
    assert set((await ids(scene)).values()) == {1}
    assert await scene.outcomes() == await scene.everything()
